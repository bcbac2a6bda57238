"""A concept dictionary: features named by what is known about the rows at which they fire, and judged.

Every row (a user's state, a token) has metadata with known values: the category of the last item, the
speaker, the language. Half of the rows name the features, the other half say whether the names are right:

    name(j)     = the attribute and value, or union of values, with the best F1 against [z_j > 0]
    precision   = P(value | fires)        recall = P(fires | value)        on rows that did not name it
    confidence  = their harmonic mean: how well the name alone predicts the firing

    book = concepts(sae, {"category": categories}, rows=states, groups=users)
    book.named(0.8)                    # the concepts that can be relied on
    book.of("category", "jazz")        # which features stand for jazz

A union of most of the values is no concept ("anything but tax law" fits every dense feature); a name covers
at most 60% of the rows. Names found in the same way for shuffled metadata are the control.

Another way to name (a language model that reads examples) is a function given as `namer`; the judgement is
the same. What a feature goes along with is not what it does: for that see `feature_ablation`.

Source: Wang et al. 2024, "Interpret the Internal States of Recommendation Model with Sparse Autoencoder"
(RecSAE), concept construction, verification and ablation; names by attribute as in Makelov et al. 2024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from actlas.core.artifact import load_artifact, save_artifact
from actlas.core.codes import Codes
from actlas.core.errors import ArtifactError, InputError
from actlas.core.intervals import wilson
from actlas.core.lens import Lens
from actlas.core.measurement import Measurement
from actlas.dictionaries.attribute_f1 import Sign
from actlas.dictionaries.concept_naming import Concept, Namer, name_and_judge

__all__ = ["Concept", "ConceptDictionary", "concepts"]


@dataclass(frozen=True)
class ConceptDictionary:
    """The concepts of a dictionary, the most reliable first.

    Attributes:
        concepts: one for each feature that could be named.
        features: number of features of the dictionary.
        live: how many fired often enough among the naming rows.
        measurements: share of live features whose confidence is above the bound, with its control.
    """

    concepts: tuple[Concept, ...]
    features: int
    live: int
    measurements: tuple[Measurement, ...] = field(default=(), compare=False)

    def __len__(self) -> int:
        return len(self.concepts)

    def __getitem__(self, feature: int) -> Concept:
        """Return the concept of a feature.

        Raises:
            InputError: it has none.
        """
        for concept in self.concepts:
            if concept.feature == feature:
                return concept
        raise InputError(
            f"feature {feature} has no concept; {len(self)} of {self.features} features have one"
        )

    def named(self, confidence: float = 0.8) -> tuple[Concept, ...]:
        """Return the concepts whose confidence is above a bound."""
        return tuple(c for c in self.concepts if c.confidence > confidence)

    def of(self, attribute: str, value: str) -> tuple[Concept, ...]:
        """Return the concepts whose name holds this value, the narrowest and most reliable first."""
        found = [c for c in self.concepts if c.attribute == attribute and value in c.values]
        return tuple(sorted(found, key=lambda c: (len(c.values), -c.confidence)))

    def save(self, path: str | Path) -> Path:
        """Save as a folder with one JSON file."""
        manifest = {
            "features": self.features,
            "live": self.live,
            "concepts": [_plain(asdict(c)) for c in self.concepts],
            "measurements": [m.to_json() for m in self.measurements],
        }
        return save_artifact(path, "concepts", manifest)

    @classmethod
    def load(cls, path: str | Path) -> ConceptDictionary:
        """Load a saved concept dictionary.

        Raises:
            ArtifactError: not a whole, untampered one.
        """
        manifest, _ = load_artifact(path, "concepts")
        try:
            found = [Concept(**{k: _value(v) for k, v in c.items()}) for c in manifest["concepts"]]
            measured = tuple(Measurement.from_json(m) for m in manifest["measurements"])
            return cls(tuple(found), int(manifest["features"]), int(manifest["live"]), measured)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{path} holds an incomplete concept dictionary ({error}); save it again"
            ) from error


def concepts(
    lens_or_codes: Lens | Codes | Tensor,
    metadata: Mapping[str, Sequence[Any]],
    *,
    rows: Tensor | None = None,
    namer: str | Namer = "attribute",
    groups: Sequence[Any] | None = None,
    holdout: float = 0.5,
    most: int = 10,
    most_share: float = 0.6,
    least_firings: int = 10,
    confidence: float = 0.8,
    sign: Sign = "positive",
    seed: int = 0,
) -> ConceptDictionary:
    """Name features and judge the names.

    Args:
        lens_or_codes: a lens (with `rows`), codes of n rows, or dense codes `[n, m]`.
        metadata: attribute -> one value for each row; `None` where it is not known.
        rows: activations `[n, d]`, for a lens.
        namer: `"attribute"`, or a function of (feature, its values at the naming rows, their metadata) that
            gives (attribute, values) or `None`.
        groups: what rows belong together (users, documents); whole groups name or judge.
        holdout: share of the groups that judge.
        most: how many values a union may have.
        most_share: a name may hold at that share of the rows at most.
        least_firings: naming rows at which a feature must fire to be live.
        confidence: bound of the share that is measured.
        sign: `"any"` where negative codes count as firing.
        seed: of the split and of the shuffled control.

    Raises:
        InputError: lengths that differ, no metadata, a split that leaves a side empty, or a namer that
            names what the metadata has not got.
    """
    codes = _codes(lens_or_codes, rows)
    if not metadata:
        raise InputError("no metadata was given; give {attribute: a value for each row}")
    for name, values in metadata.items():
        if len(values) != len(codes):
            raise InputError(
                f"{name!r} has {len(values)} values for {len(codes)} rows; give one for each row"
            )
    if namer != "attribute" and not callable(namer):
        raise InputError(f"namer is {namer!r}; it must be 'attribute' or a function")
    judging = _split(groups, len(codes), holdout, seed)
    labels = {
        a: np.array([None if v is None else str(v) for v in vs], dtype=object) for a, vs in metadata.items()
    }
    found, live = name_and_judge(codes, labels, judging, namer, most, most_share, least_firings, sign)
    generator = np.random.default_rng(seed)
    order = np.arange(len(codes))
    for side in (judging, ~judging):
        order[side] = generator.permutation(order[side])
    shuffled = {a: v[order] for a, v in labels.items()}
    control, _ = name_and_judge(codes, shuffled, judging, "attribute", most, most_share, least_firings, sign)
    name = f"features whose concept has confidence above {confidence:g}"
    base = _share(f"{name}, shuffled metadata", control, live, confidence, seed)
    measured = _share(name, found, live, confidence, seed, baseline=base)
    return ConceptDictionary(tuple(found), codes.features, live, (measured,))


def _share(
    name: str,
    found: Sequence[Concept],
    live: int,
    bound: float,
    seed: int,
    baseline: Measurement | None = None,
) -> Measurement:
    hits = sum(c.confidence > bound for c in found)
    low, high = wilson(hits, live)
    return Measurement(
        name,
        hits / live if live else float("nan"),
        "fraction of live features",
        live,
        low if live else None,
        high if live else None,
        "wilson",
        seed,
        better=None if baseline is None else "higher",
        baseline=baseline,
        note="named on one half of the rows, judged on the other"
        if live
        else "no feature fires often enough",
    )


def _codes(given: Lens | Codes | Tensor, rows: Tensor | None) -> Codes:
    if isinstance(given, Lens):
        if rows is None:
            raise InputError(f"a {type(given).__name__} needs the activations to read; give rows=[n, d]")
        read: Any = given.encode(rows)
        given = read
    elif rows is not None:
        raise InputError("rows are for a lens; codes were given already")
    codes = Codes.from_dense(given) if isinstance(given, Tensor) else given
    assert isinstance(codes, Codes)
    return codes.flatten().detach().to("cpu")


def _split(groups: Sequence[Any] | None, n: int, holdout: float, seed: int) -> Any:
    """Return which rows judge, bool `[n]`; whole groups go to one side."""
    if groups is not None and len(groups) != n:
        raise InputError(f"there are {n} rows but {len(groups)} groups; give one for each row")
    code = np.arange(n) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    count = int(code.max()) + 1 if n else 0
    judging = round(holdout * count)
    if not 0 < judging < count:
        raise InputError(f"holdout={holdout:g} of {count} groups leaves none to name or none to judge")
    drawn = np.random.default_rng(seed).permutation(count)[:judging]
    return np.isin(code, drawn)


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record that JSON can hold: NaN becomes null."""

    def clean(v: Any) -> Any:
        if isinstance(v, (tuple, list)):
            return [clean(x) for x in v]
        return None if isinstance(v, float) and v != v else v

    return {k: clean(v) for k, v in record.items()}


def _value(v: Any) -> Any:
    if isinstance(v, list):
        return tuple(_value(x) for x in v)
    return float("nan") if v is None else v
