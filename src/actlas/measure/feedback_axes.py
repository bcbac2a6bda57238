"""Axes of neurofeedback: directions of a site along which a sentence's activation gets a score.

    label = 1 if score(activation) is above the median over the sentences, else 0

An axis is any Lens: a `Direction` or a probe (its `score`), or a feature of a dictionary or a PCA (one
column of `encode`). `standard_axes` fits those of the paper, on sentences that are not scored later:

| name | what |
| --- | --- |
| `means`, `logistic` | a probe for the sentences' own label |
| `pc1`, `pc8`, ... | a principal component of the sentences' activations |
| `shuffled` | the control: difference of means for labels that say nothing |
| `random` | a Gaussian direction |

An axis that can be told from the text is no sign of self-observation. `text_accuracy` therefore says how
well a reader of the text alone (word counts, or an encoder model) does with the same labelled examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.errors import InputError
from actlas.core.lens import Lens
from actlas.core.pca import fit_pca
from actlas.core.probe import fit_probe
from actlas.core.probe_data import Examples, read_texts

if TYPE_CHECKING:
    from actlas.core.model import Model

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Axis:
    """A direction with a name.

    Attributes:
        name: for people.
        lens: what reads activations.
        feature: column of `lens.encode`; `None` uses `lens.score`.
    """

    name: str
    lens: Lens
    feature: int | None = None

    @property
    def site(self) -> str:
        """Where it reads."""
        return self.lens.site

    def read(self, x: Tensor) -> Array:
        """Return the score of each activation, float64 `[n]` for `[n, d]`."""
        with torch.no_grad():
            if self.feature is None:
                found = self.lens.score(x.float())
            else:
                found = self.lens.encode(x.float())[..., self.lens.check_feature(self.feature)]
        return np.asarray(found.double().cpu())


def as_axis(given: Lens | Axis, name: str = "") -> Axis:
    """Return a lens as an axis: by its score, or by its first feature if it has no score.

    Raises:
        InputError: it is neither.
    """
    if isinstance(given, Axis):
        return given
    if not isinstance(given, Lens):
        raise InputError(f"an axis is a Lens or an Axis, not {type(given).__name__}; see standard_axes")
    scores = type(given).score is not Lens.score
    return Axis(name or type(given).__name__.lower(), given, None if scores else 0)


def standard_axes(examples: Examples, site: str, names: Sequence[str], *, seed: int = 0) -> list[Axis]:
    """Fit the axes of the module's table.

    Args:
        examples: activations of sentences, with labels 0 and 1 for `means`, `logistic` and `shuffled`.
        site: where they were read.
        names: which axes.
        seed: of the shuffle and of the random direction.

    Raises:
        InputError: an unknown name, or fewer sentences than a component needs.
    """
    out = []
    rows = torch.tensor(examples.x, dtype=torch.float32)
    numbers = [int(n[2:]) for n in names if n.startswith("pc") and n[2:].isdigit()]
    if numbers and not 1 <= min(numbers) <= max(numbers) < min(rows.shape):
        raise InputError(
            f"pc{max(numbers)} needs more than {max(numbers)} sentences and channels; "
            f"there are {rows.shape[0]} and {rows.shape[1]}"
        )
    pca = fit_pca(None, rows, site, components=max(numbers)) if numbers else None
    for name in names:
        if pca is not None and name.startswith("pc") and name[2:].isdigit():
            out.append(Axis(name, pca, int(name[2:]) - 1))
        elif name in ("means", "logistic"):
            out.append(Axis(name, _probe(examples, site, name)))
        elif name == "shuffled":
            blank = examples.shuffled(np.random.default_rng(seed))
            out.append(Axis(name, _probe(blank, site, "means")))
        elif name == "random":
            out.append(Axis(name, _random(rows, site, seed)))
        else:
            raise InputError(
                f"there is no axis {name!r}; give means, logistic, pc1, pc2, ..., shuffled or random"
            )
    return out


def _probe(examples: Examples, site: str, method: Any) -> Lens:
    return fit_probe(None, (examples.x, examples.y), site, method=method, standardise=False, controls=0)


def _random(rows: Tensor, site: str, seed: int) -> Lens:
    from actlas.core.direction import Direction

    drawn = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(seed))
    middle = float((rows @ (drawn / drawn.norm())).median())
    return Direction(site=site, vector=drawn, method="random", midpoint=middle)


def text_features(texts: Sequence[str], reader: Model | None) -> Array:
    """Return features of texts that no activation of the measured model enters, `[n, k]`.

    Args:
        texts: the sentences.
        reader: another model whose mean final activation is used; `None`: TF-IDF of words.
    """
    if reader is None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        found = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b").fit_transform(texts).toarray()
        return np.asarray(found, dtype=np.float64)
    last = (reader.n_blocks or 1) - 1
    where = reader.resolve(f"blocks.{last}.resid_post")[0]
    return read_texts(reader, texts, where, "mean")


def text_accuracy(features: Array, labels: NDArray[np.int64], shown: Sequence[int], asked: int) -> float:
    """Return 1 if a logistic regression on the shown sentences tells the asked one's label, else 0.

    One half where nothing was shown, or only one kind of label.
    """
    y = labels[list(shown)]
    if len(y) < 2 or len(np.unique(y)) < 2:
        return 0.5
    from sklearn.linear_model import LogisticRegression

    x = features[list(shown)]
    centre, scale = x.mean(0), max(float(x.std()), 1e-9)
    fitted = LogisticRegression(C=10.0, max_iter=500).fit((x - centre) / scale, y)
    return float(fitted.predict((features[[asked]] - centre) / scale)[0] == labels[asked])
