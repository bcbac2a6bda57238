"""A Calibration: the statistics of many sites over one corpus, which can be merged and saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.artifact import load_artifact, save_artifact
from actlas.core.calibration.accumulators import Accumulator, ChannelSketch, Reservoir, Sketch
from actlas.core.calibration.massive import CRITERION, MassiveRows
from actlas.core.calibration.statistics import SiteStatistics, check_statistics, make_parts
from actlas.core.errors import ArtifactError, FingerprintError, InputError, did_you_mean
from actlas.core.fingerprint import Fingerprint

if TYPE_CHECKING:
    from actlas.core.model import Model

#: Constants that two calibrations must share to be merged.
SCHEME: dict[str, Any] = {
    "sketch": [Sketch.HALF, Sketch.GAMMA, Sketch.SMALLEST],
    "channel_sketch": [ChannelSketch.HALF, ChannelSketch.GAMMA, ChannelSketch.SMALLEST],
    "massive": [list(pair) for pair in CRITERION],
}


@dataclass
class Calibration(Mapping[str, SiteStatistics]):
    """Statistics by site: `calibration["blocks.5.mlp.act"].mean`.

    Attributes:
        sites: the statistics, by site name.
        stats: what was collected at every site.
        fingerprint: of the model; fine-tunes of one base share it, so keep their calibrations apart.
        model_name: what the model was called.
        corpora: for each part that was merged, its corpus's name and hash.
        tokens: how many tokens were read.
        documents: how many documents were begun.
        context: tokens a document was cut into, or `None` for the model's own length.
        seed: of the sampled rows.
        size: how many rows a site's sample holds at most.
        keep_massive: whether massive rows are in the statistics.
        under: descriptions of the edits that were installed.
    """

    sites: dict[str, SiteStatistics]
    stats: tuple[str, ...]
    fingerprint: Fingerprint
    model_name: str = ""
    corpora: list[dict[str, str]] = field(default_factory=list)
    tokens: int = 0
    documents: int = 0
    context: int | None = None
    seed: int = 0
    size: int = 0
    keep_massive: bool = False
    under: tuple[str, ...] = ()

    def __getitem__(self, site: str) -> SiteStatistics:
        if site not in self.sites:
            hint = did_you_mean(site, self.sites)
            raise InputError(f"this calibration has no site {site!r}{hint} (it has {len(self.sites)} sites)")
        return self.sites[site]

    def __contains__(self, site: object) -> bool:
        return site in self.sites

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __repr__(self) -> str:
        return (
            f"Calibration({self.model_name or 'model'}, {len(self.sites)} sites, {self.tokens:,} tokens "
            f"of {self.documents:,} documents: {', '.join(self.stats)})"
        )

    def merge(self, other: Calibration) -> Calibration:
        """Return the calibration over the corpora of both, which must not overlap.

        Merging is associative and commutative: counts, extremes, quantiles and sampled rows come out
        the same in any order, sums to float64 rounding.

        Raises:
            FingerprintError: the two were made with different models.
            InputError: other sites, statistics, seed, sample size, edits or treatment of massive rows.
        """
        found = self.fingerprint.differences(other.fingerprint)
        if found or self.model_name != other.model_name:
            said = ", ".join(found) or f"{self.model_name} and {other.model_name}"
            raise FingerprintError(f"cannot merge calibrations of two models: {said}; use one for all parts")
        if set(self.sites) != set(other.sites):
            odd = sorted(set(self.sites) ^ set(other.sites))
            raise InputError(f"cannot merge calibrations of different sites: only one of them has {odd[0]}")
        for name in ("stats", "seed", "size", "context", "keep_massive", "under"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise InputError(f"cannot merge calibrations with different {name}: {mine!r} and {theirs!r}")
        for site, statistics in self.sites.items():
            if statistics.channels != other.sites[site].channels:
                raise InputError(
                    f"cannot merge {site}: {statistics.channels} channels in one calibration, "
                    f"{other.sites[site].channels} in the other"
                )
        return Calibration(
            sites={site: s.merge(other.sites[site]) for site, s in self.sites.items()},
            stats=self.stats,
            fingerprint=self.fingerprint,
            model_name=self.model_name,
            corpora=sorted([*self.corpora, *other.corpora], key=lambda c: (c["name"], c["hash"])),
            tokens=self.tokens + other.tokens,
            documents=self.documents + other.documents,
            context=self.context,
            seed=self.seed,
            size=self.size,
            keep_massive=self.keep_massive,
            under=self.under,
        )

    def save(self, path: str | Path) -> Path:
        """Save it as an artifact folder (`kind` "calibration"); nothing is lost.

        Raises:
            InputError: the path is somebody else's folder.
            FailureError: it could not be written.
        """
        tensors: dict[str, Tensor] = {}
        names: dict[str, int] = {}
        sites: dict[str, Any] = {}
        for site, statistics in self.sites.items():
            for part_name, part in statistics.parts.items():
                for name, tensor in part.tensors().items():
                    tensors[f"{site}/{part_name}/{name}"] = tensor
                if isinstance(part, Reservoir):
                    index = [names.setdefault(d, len(names)) for d in part.documents]
                    tensors[f"{site}/{part_name}/document"] = torch.tensor(index, dtype=torch.int64)
            sites[site] = {
                "channels": statistics.channels,
                "count": statistics.count,
                "massive": statistics.massive.to_json(),
            }
        manifest: dict[str, Any] = {
            "stats": list(self.stats),
            "scheme": SCHEME,
            "fingerprint": self.fingerprint.to_json(),
            "model_name": self.model_name,
            "corpora": self.corpora,
            "tokens": self.tokens,
            "documents": self.documents,
            "context": self.context,
            "seed": self.seed,
            "size": self.size,
            "keep_massive": self.keep_massive,
            "under": list(self.under),
            "sites": sites,
            "document_names": list(names),
        }
        return save_artifact(path, "calibration", manifest, tensors)

    @classmethod
    def load(cls, path: str | Path, model: Model | None = None) -> Calibration:
        """Load a saved calibration.

        Args:
            path: the artifact's folder.
            model: if given, the calibration must have been made with it.

        Raises:
            ArtifactError: it is not a whole calibration, or its sketches have other buckets.
            FingerprintError: it was made with another model.
        """
        manifest, tensors = load_artifact(path, "calibration")
        if manifest.get("scheme") != SCHEME:
            raise ArtifactError(
                f"{path} was made with other buckets or another criterion for massive rows; calibrate again"
            )
        try:
            stats = check_statistics(manifest["stats"])
            names = manifest["document_names"]
            sites = {}
            for site, record in manifest["sites"].items():
                d = int(record["channels"])
                parts = _restore(site, d, stats, int(manifest["size"]), tensors, names)
                massive = MassiveRows.from_json(record["massive"])
                sites[site] = SiteStatistics(site, d, stats, int(record["count"]), massive, parts)
            loaded = cls(
                sites=sites,
                stats=stats,
                fingerprint=Fingerprint.from_json(manifest["fingerprint"], path),
                model_name=str(manifest["model_name"]),
                corpora=[{"name": str(c["name"]), "hash": str(c["hash"])} for c in manifest["corpora"]],
                tokens=int(manifest["tokens"]),
                documents=int(manifest["documents"]),
                context=None if manifest["context"] is None else int(manifest["context"]),
                seed=int(manifest["seed"]),
                size=int(manifest["size"]),
                keep_massive=bool(manifest["keep_massive"]),
                under=tuple(manifest["under"]),
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ArtifactError(f"{path} is not a whole calibration ({error}); save it again") from error
        if model is not None:
            loaded.fingerprint.check(model.fingerprint, f"the calibration {path}")
        return loaded


def _restore(
    site: str, d: int, stats: tuple[str, ...], size: int, tensors: Mapping[str, Tensor], names: list[str]
) -> dict[str, Accumulator]:
    """Fill accumulators with saved tensors, refusing other shapes and dtypes."""
    with torch.device("meta"):
        parts = make_parts(d, stats, size)
    for part_name, part in parts.items():
        prefix = f"{site}/{part_name}/"
        for name, blank in part.tensors().items():
            tensor, shape = tensors[prefix + name], list(blank.shape)
            if isinstance(part, Reservoir):
                shape[0] = min(len(tensors[prefix + "priority"]), size)
            if list(tensor.shape) != shape or not (tensor.dtype == blank.dtype or name == "rows"):
                raise ValueError(f"{prefix}{name} is {tensor.dtype} {list(tensor.shape)}, not {shape}")
            setattr(part, name, tensor)
        if isinstance(part, Reservoir):
            part.documents = [names[i] for i in tensors[prefix + "document"].tolist()]
            if len(part.documents) != len(part.priority):
                raise ValueError(f"{prefix}document has {len(part.documents)} entries")
    return parts
