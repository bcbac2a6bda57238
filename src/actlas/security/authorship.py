"""Who wrote this code? Attribution of texts to models (or people) by style, with an answer "none of these".

    who = fit_authorship(None, [("def f(x): ...", "model a"), ...], groups=prompts)
    who.probabilities(texts)         # [n, authors], calibrated
    who.name(texts)                  # the author, or None where no author is likely enough

Features are TF-IDF of words and signs, or the states of any model that Actlas reads (a code encoder, the
suspect itself); above them stands a linear classifier. Logits are divided by one temperature that is
fitted on out-of-fold predictions (Guo et al. 2017), and a text is named only if its probability is above
what nine in ten texts of known authors reach.

What makes such numbers too good is switched off by default: texts that answer one prompt stay on one side
of a split, equal texts go together, TF-IDF is fitted inside each fold, and all texts are cut to one length.
A random split, shuffled authors and length alone are measured beside it.

Source: "I Know Which LLM Wrote Your Code Last Summer" (2025), whose own model fine-tunes the encoder of
CodeT5+; its released pipeline has the same prompt on both sides and fits TF-IDF before splitting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from actlas.core.errors import ArtifactError, InputError
from actlas.core.lens import Lens, check_finite
from actlas.core.methods import method
from actlas.security.authorship_features import Extractor, Features, states
from actlas.security.authorship_quality import Setting, judge, softmax, temperature_of
from actlas.security.code_text import without

if TYPE_CHECKING:
    from actlas.core.model import Model

Classifier = Literal["logistic", "svm"]


@dataclass(kw_only=True, eq=False)
class Authorship(Lens):
    """A fitted attribution.

    Attributes:
        authors: names, in the order of the probabilities.
        kind: `"tfidf"` or `"encoder"`.
        weight, bias: float32 `[authors, features]` and `[authors]`, for scaled features.
        centre, scale: float32 `[features]`; TF-IDF has its inverse document frequencies as `scale`.
        vocabulary: the words of the TF-IDF features; empty for an encoder.
        position: which state of the encoder stands for a text.
        temperature: logits are divided by it.
        threshold: no author is named where the greatest probability, before the temperature (which
            saturates where nothing was wrong), is below this.
        strip, language, characters: what is done to a text before it is read.
    """

    site: str = ""
    authors: tuple[str, ...]
    kind: str
    weight: Tensor
    bias: Tensor
    centre: Tensor
    scale: Tensor
    vocabulary: tuple[str, ...] = ()
    position: str = "mean"
    temperature: float = 1.0
    threshold: float = 0.0
    strip: tuple[str, ...] = ()
    language: str = "python"
    characters: int = 0

    def __post_init__(self) -> None:
        check_finite("Authorship", weight=self.weight, bias=self.bias, centre=self.centre, scale=self.scale)
        k, d = len(self.authors), len(self.centre)
        fits = self.weight.shape == (k, d) and self.bias.shape == (k,) and self.scale.shape == (d,)
        if not fits or (self.kind == "tfidf" and len(self.vocabulary) != d) or not self.temperature > 0:
            raise ArtifactError("the tensors of this attribution do not fit its authors and features")

    @property
    def channels(self) -> int:
        return len(self.centre)

    @property
    def features(self) -> int:
        return len(self.authors)

    def encode(self, x: Tensor) -> Tensor:
        """Return calibrated log-probabilities `[..., authors]` of features or states `[..., d]`."""
        return (self._logits(x) / self.temperature).log_softmax(-1)

    def score(self, x: Tensor) -> Tensor:
        """Return the confidence in the likeliest author `[...]`, less the threshold: above 0 it is named."""
        return self._logits(x).softmax(-1).amax(-1) - self.threshold

    def _logits(self, x: Tensor) -> Tensor:
        z = self.flat(x).to(self.weight)
        z = z if self.kind == "tfidf" else (z - self.centre.to(z)) / self.scale.to(z)
        return z @ self.weight.T.to(z) + self.bias.to(z)

    def probabilities(self, texts: Sequence[str], model: Model | None = None) -> Tensor:
        """Return the probability of each author, float32 `[n, authors]`.

        Args:
            texts: whole texts; stripped and cut as those that it was fitted on.
            model: the encoder, where features are an encoder's.

        Raises:
            InputError: an empty text, or no model where one is needed.
        """
        return self.encode(self._features(texts, model)).exp()

    def name(self, texts: Sequence[str], model: Model | None = None) -> list[str | None]:
        """Return the author of each text, or `None` where none is likely enough; see `probabilities`."""
        x = self._features(texts, model)
        which, known = self.encode(x).argmax(1).tolist(), (self.score(x) >= 0).tolist()
        return [self.authors[i] if k else None for i, k in zip(which, known, strict=True)]

    def _features(self, texts: Sequence[str], model: Model | None) -> Tensor:
        cut = prepare(texts, self.strip, self.language, self.characters)
        if self.kind == "tfidf":
            x = Features("tfidf", vocabulary=self.vocabulary, idf=self.scale.double().numpy()).of(cut)
        elif model is None:
            raise InputError("this attribution reads the states of a model; give it as model=")
        else:
            x = states(model, cut, self.site, self.position)
        return torch.tensor(x, dtype=torch.float32)


@method(
    "authorship",
    room="security",
    returns="Lens",
    data="labelled",
    summary="which model (or person) wrote a text, by its style, with an answer 'none of these'",
    example="actlas fit authorship minilm code.jsonl -o who/",
    papers=("code-authorship",),
)
def fit_authorship(
    model: Model | None,
    data: Any,
    *,
    features: str = "tfidf",
    groups: Sequence[Any] | None = None,
    site: str | None = None,
    position: str = "mean",
    classifier: Classifier = "logistic",
    strip: Sequence[str] | str = (),
    language: str = "python",
    characters: int | None = None,
    words: int = 400,
    folds: int = 5,
    accepted: float = 0.9,
    seed: int = 0,
) -> Authorship:
    """Fit an attribution and judge it on prompts that it was not fitted on.

    Args:
        model: the encoder (for `features="encoder"`); for TF-IDF only the name under which it is saved.
        data: items `(text, author)`, `(text, author, group)`, or records with `text` and `author` (or
            `label`) and perhaps `group`.
        features: `"tfidf"` or `"encoder"`.
        groups: for each item what must stay on one side of a split, e.g. its prompt; default the item's
            own group, or the text.
        site: of the encoder; default its last block's output.
        position: `"mean"` over the tokens (massive ones left out) or `"first"`.
        classifier: `"logistic"` or `"svm"` (linear, its margins as logits).
        strip: of `"comments"` and `"docstrings"`: taken out before anything else.
        language: of the code, for `strip`.
        characters: every text is cut to so many; default the length that 9 in 10 texts have, 0 cuts none.
        words: most frequent words and signs that TF-IDF keeps.
        folds: of the cross-validation.
        accepted: share of known authors' texts that are to be named.
        seed: of splits, shuffles and bootstrap.

    Returns:
        The attribution fitted on all texts. `measurements`: `authorship accuracy` (its details hold the
        confusion matrix), the same for a random split, shuffled authors and length only, differences,
        calibration error before and after, and for three or more authors how an unseen one fares.

    Raises:
        InputError: one author, an author with fewer groups than folds, unknown features, classifier or
            parts, an empty text, or no model for encoder features.
    """
    parts = (strip,) if isinstance(strip, str) else tuple(strip)
    if features not in ("tfidf", "encoder") or classifier not in ("logistic", "svm"):
        raise InputError(
            f"features is {features!r} and classifier {classifier!r}; they must be 'tfidf' or 'encoder', and "
            "'logistic' or 'svm'"
        )
    if not 0 < accepted < 1 or folds < 2 or words < 1:
        raise InputError(
            f"accepted is {accepted}, folds {folds}, words {words}; 0 to 1, 2 or more, 1 or more"
        )
    texts, authors, own = _items(data)
    if groups is not None and len(groups) != len(texts):
        raise InputError(f"there are {len(texts)} texts but {len(groups)} groups")
    length = _length(texts, parts, language, characters)
    given = len(texts)
    texts, authors, code, kept = _different(
        prepare(texts, parts, language, length), authors, own if groups is None else list(groups)
    )
    names, y = np.unique(np.array(authors), return_inverse=True)
    _check(names.tolist(), y, code, folds)
    x, where = None, ""
    if features == "encoder":
        if model is None:
            raise InputError("features='encoder' needs a model to read the texts")
        where = site or f"blocks.{(model.n_blocks or 1) - 1}.resid_post"
        where = model.resolve(where)[0].name
        x = states(model, texts, where, position)
    extractor = Extractor(texts, x, words)
    setting = Setting(extractor, y, code, len(names), classifier, folds, accepted, seed)
    measurements, logits, threshold = judge(setting, texts, names.tolist(), kept, given)
    fitted = extractor.fit(np.arange(len(y)))
    weight, bias = setting.classify(fitted.x, y)
    # the final classifier has seen more: it must not be shyer than those of the folds
    confident = softmax(fitted.x @ weight.T + bias).max(1)
    threshold = min(threshold, float(np.quantile(confident, 1 - accepted)))
    return Authorship(
        site=where,
        fingerprint=None if model is None else model.fingerprint,
        measurements=measurements,
        authors=tuple(names.tolist()),
        kind=features,
        weight=torch.tensor(weight, dtype=torch.float32),
        bias=torch.tensor(bias, dtype=torch.float32),
        centre=torch.tensor(fitted.features.centre, dtype=torch.float32),
        scale=torch.tensor(fitted.features.idf if x is None else fitted.features.scale, dtype=torch.float32),
        vocabulary=fitted.features.vocabulary,
        position=position,
        temperature=temperature_of(logits, y),
        threshold=threshold,
        strip=parts,
        language=language,
        characters=length,
    )


def prepare(texts: Sequence[str], strip: Sequence[str], language: str, characters: int) -> list[str]:
    """Return texts without what is stripped, cut to so many characters (0: not cut).

    Raises:
        InputError: a text of which nothing is left.
    """
    out = []
    for i, text in enumerate(texts):
        kept = without(text, strip, language)
        kept = kept[:characters] if characters else kept
        if not kept.strip():
            raise InputError(f"nothing is left of text {i}; leave it out")
        out.append(kept)
    return out


def _length(texts: Sequence[str], strip: Sequence[str], language: str, characters: int | None) -> int:
    if characters is None:
        return int(np.quantile([len(t) for t in prepare(texts, strip, language, 0)], 0.1))
    if characters < 0:
        raise InputError(f"characters is {characters}; it must be 0 or more")
    return characters


def _items(data: Any) -> tuple[list[str], list[str], list[Any]]:
    """Return texts, authors and groups."""
    texts: list[str] = []
    authors: list[str] = []
    groups: list[Any] = []
    for number, item in enumerate(data):
        if isinstance(item, dict) and "text" in item and ("author" in item or "label" in item):
            text, author = item["text"], item.get("author", item.get("label"))
            group = item.get("group", text)
        elif isinstance(item, (tuple, list)) and len(item) in (2, 3) and isinstance(item[0], str):
            text, author = item[0], item[1]
            group = item[2] if len(item) == 3 else text
        else:
            raise InputError(
                f"item {number} is {type(item).__name__}; give (text, author) or (text, author, group)"
            )
        if isinstance(author, float) and author.is_integer():
            author = int(author)
        texts.append(str(text))
        authors.append(str(author))
        groups.append(str(group))
    return texts, authors, groups


def _different(
    texts: list[str], authors: list[str], groups: list[Any]
) -> tuple[list[str], list[str], Any, list[int]]:
    """Drop an author's repeated texts; join the groups of equal texts. Returns also which were kept."""
    seen: dict[tuple[str, str], int] = {}
    kept = [i for i, pair in enumerate(zip(texts, authors, strict=True)) if seen.setdefault(pair, i) == i]
    parent: dict[Any, Any] = {}

    def root(g: Any) -> Any:
        while parent.setdefault(g, g) != g:
            g = parent[g]
        return g

    for i in kept:
        parent[root(("text", texts[i]))] = root(("group", str(groups[i])))
    code = np.unique([str(root(("group", str(groups[i])))) for i in kept], return_inverse=True)[1]
    return [texts[i] for i in kept], [authors[i] for i in kept], code.astype(np.int64), kept


def _check(authors: list[str], y: Any, groups: Any, folds: int) -> None:
    if len(authors) < 2:
        raise InputError(f"{len(authors)} author is nothing to tell apart; give at least 2")
    for i, author in enumerate(authors):
        n = len(np.unique(groups[y == i]))
        if n < folds:
            raise InputError(
                f"author {author!r} has texts of {n} groups; {folds} folds need at least {folds}"
            )
