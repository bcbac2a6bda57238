"""The edit of a transcoder: read codes at one site, change another site that comes later in the pass.

    whole           y <- decode(z')                           the transcoder's output replaces the layer's
    otherwise       y <- y + decode(z') - decode(z)           only what changes in the codes changes

z are the codes of what was read at the transcoder's site in the same forward pass, z' the same after
`operations`, `only` and `without`. Rows that are massive where they are read pass untouched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.dictionary_edits import operate
from actlas.core.edit import ActivationEdit, Edit, Here, register_edit
from actlas.core.errors import ArtifactError, InputError, ShapeError
from actlas.core.hooks import attach
from actlas.core.installation import Installation
from actlas.core.lens import rebuild_lens
from actlas.core.sites import Site
from actlas.dictionaries.transcoder import Transcoder


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class TranscoderEdit(ActivationEdit):
    """Change a transcoder's target; see the module's docstring.

    Attributes:
        lens: the transcoder; `site` is its target.
        whole: replace the target's value instead of changing it.
        operations: feature -> `("set", value)`, `("scale", factor)` or `("add", value)`.
        only, without: features to keep, or to leave out.
    """

    lens: Transcoder
    whole: bool = False
    operations: Mapping[int, tuple[str, float]] = field(default_factory=dict)
    only: tuple[int, ...] | None = None
    without: tuple[int, ...] = ()

    def value(self, x: Tensor, here: Here) -> Tensor:
        read = here.run.values.get(id(self))
        if read is None:
            raise InputError(f"{self.describe()} has read nothing at {self.lens.site}; that site never ran")
        rows = self.lens.flat(read).reshape(-1, self.lens.channels)
        old = x.reshape(-1, len(self.lens.b_dec))
        codes = self.lens.encode(rows)
        new_codes = self.changed(codes)
        if self.whole:
            new = self.lens.complete(rows, self.lens.decode(new_codes)).to(x.dtype)
        else:
            new = old + (self.lens.decode(new_codes) - self.lens.decode(codes)).to(x.dtype)
        massive = self.lens.massive(rows)
        return torch.where(massive.unsqueeze(-1), old, new).reshape(x.shape)

    def changed(self, codes: Codes) -> Codes:
        """Return the codes after the edit's operations."""
        kept = codes if self.only is None else codes.only(self.only)
        kept = kept.without(self.without) if self.without else kept
        if not self.operations:
            return kept
        features = list(self.operations)
        new = [operate(kept.of(f), *self.operations[f]) for f in features]
        rest = kept.without(features)
        indices = torch.tensor(features, device=codes.indices.device).expand(*codes.shape, -1)
        return Codes(
            torch.cat([rest.indices, indices], -1),
            torch.cat([rest.values, torch.stack(new, -1).to(rest.values)], -1),
            codes.features,
        )

    def check(self, site: Site) -> None:
        size = None if site.features is None else torch.Size(site.features).numel()
        if size is not None and size != len(self.lens.b_dec):
            raise ShapeError(
                f"the transcoder writes {len(self.lens.b_dec)} channels, but {site.name} is [{site.shape}]"
            )

    def _attach(self, installation: Installation) -> None:
        reads = installation.model.resolve(self.lens.site)
        target = installation.model.resolve(self.site)[0]
        if len(reads) != 1:
            raise InputError(f"a transcoder reads one site; {self.lens.site!r} names {len(reads)}")
        source = reads[0]
        if source.kind != "module" and target.kind != "module" and source.order > target.order:
            raise InputError(
                f"{source.name} comes after {target.name} in a forward pass; it cannot be read there"
            )

        def read(x: Tensor) -> Tensor:
            installation.watcher.of(target).values[id(self)] = x.detach()
            return x

        handle = attach(
            installation.model.module, source, read, batch=lambda: installation.watcher.of(source).batch
        )
        installation.keep(handle)
        super()._attach(installation)

    def _record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        record, tensors = super()._record()
        lens_record, lens_tensors = self.lens._record()
        record["lens"] = {"type": type(self.lens).__name__, **lens_record}
        record["operations"] = {str(f): list(o) for f, o in self.operations.items()}
        return record, tensors | {f"own.{n}": t for n, t in lens_tensors.items()}

    @classmethod
    def _rebuild(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        own = {n.removeprefix("own."): t for n, t in tensors.items() if n.startswith("own.")}
        lens = rebuild_lens(record["lens"], own)
        if not isinstance(lens, Transcoder):
            raise ArtifactError(f"a {cls.__name__} holds a {type(lens).__name__}, which is no transcoder")
        given: dict[str, Any] = {**record, "lens": lens}
        given["operations"] = {int(f): (str(o[0]), float(o[1])) for f, o in record["operations"].items()}
        given["only"] = None if record.get("only") is None else tuple(record["only"])
        given["without"] = tuple(record.get("without") or ())
        return super()._rebuild(given, {n: t for n, t in tensors.items() if not n.startswith("own.")})
