"""Sites: the names of the places where activations live, and what they mean in one model.

The grammar, checked as a whole before anything runs:

    embed | final_norm | logits
    blocks.{which}.{kind}          which: 5 | 4-9 | 0,3,5 | -1 | *    kind: resid_post | attn.z | attn.*
    {tower}.blocks.{which}.{kind}  in models with two towers (encoder, decoder, text, vision)
    module:{path}[.input|.output]  any submodule of any model
    any of these + [head=3] | [head=0,2] | [head=0-3] | [channel=17]

TransformerLens names (`blocks.5.hook_resid_pre`, `blocks.5.attn.hook_z`) are accepted as aliases.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from actlas.core.errors import SiteError, did_you_mean
from actlas.core.layout import (
    ATTENTION_KINDS,
    BLOCK_KINDS,
    HEAD_KINDS,
    Layout,
    Tap,
    Taps,
    Tower,
    find,
    join,
)

#: TransformerLens hook name -> site name (inside a block, without its `blocks.5.`).
ALIASES = {
    "hook_embed": "embed",
    "ln_final.hook_normalized": "final_norm",
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn.out",
    "hook_mlp_out": "mlp.out",
    "ln1.hook_normalized": "attn_norm",
    "ln2.hook_normalized": "mlp_norm",
    "attn.hook_q": "attn.q",
    "attn.hook_k": "attn.k",
    "attn.hook_v": "attn.v",
    "attn.hook_z": "attn.z",
    "attn.hook_attn_scores": "attn.scores",
    "attn.hook_pattern": "attn.pattern",
    "mlp.hook_post": "mlp.act",
    "mlp.hook_pre_linear": "mlp.up",
}
_SELECTOR = re.compile(r"^(?P<name>.*?)\[(?P<axis>\w+)=(?P<which>[\d,\- ]+)\]$")
_BLOCK = re.compile(r"^(?:(?P<tower>[a-z]+)\.)?blocks\.(?P<which>[^.]+)\.(?P<kind>.+)$")
_GLOBAL_KINDS = ("embed", "final_norm", "logits")


@dataclass(frozen=True)
class Selector:
    """A part of a site along its heads or channels.

    A single index drops the axis (`attn.z[head=3]` is `[batch, pos, head_dim]`); a list keeps it.
    """

    axis: str
    indices: tuple[int, ...]
    single: bool
    dim: int

    def read(self, x: Tensor) -> Tensor:
        if self.single:
            return x.select(self.dim, self.indices[0])
        return x.index_select(self.dim, _index(self.indices, x))

    def write(self, x: Tensor, part: Tensor) -> Tensor:
        if self.single:
            part = part.unsqueeze(self.dim)
        return x.index_copy(self.dim, _index(self.indices, x), part)

    def __str__(self) -> str:
        return f"[{self.axis}={','.join(map(str, self.indices))}]"


def _index(indices: tuple[int, ...], x: Tensor) -> Tensor:
    import torch

    return torch.tensor(indices, device=x.device)


@dataclass(frozen=True)
class Site:
    """One resolved place in one model.

    Attributes:
        name: the canonical name, with its selector.
        kind: `"resid_post"`, `"attn.z"`, ..., `"module"`.
        block: index of the block, or `None`.
        tower: name of the tower (`""` where there is only one).
        module: absolute path of the submodule that is hooked.
        tap: how its tensor is found there.
        shape: the canonical shape in words, with this model's sizes.
        features: sizes of the feature axes (`(576,)`, `(9, 64)`), or `None` if unknown.
        absent: why the site does not exist here, or `None`.
        selector: the part of it that is meant.
    """

    name: str
    kind: str
    block: int | None
    tower: str
    module: str
    tap: Tap
    shape: str
    features: tuple[int, ...] | None = None
    absent: str | None = None
    selector: Selector | None = None

    @property
    def order(self) -> tuple[int, int]:
        """Where a forward pass reaches the site, for comparison within one tower."""
        if self.kind == "embed":
            return (-1, 0)
        if self.block is None:
            return (10**9, ("final_norm", "logits").index(self.kind) if self.kind in _GLOBAL_KINDS else 9)
        return (self.block, BLOCK_KINDS.index(self.kind))

    @property
    def has_tokens(self) -> bool:
        """Whether the second axis of the site counts tokens (the query axis of attention included)."""
        return self.kind != "module"

    def read(self, x: Tensor) -> Tensor:
        """Cut the canonical value out of the hooked tensor."""
        x = self.tap.read(x)
        return x if self.selector is None else self.selector.read(x)

    def write(self, x: Tensor, value: Tensor) -> Tensor:
        """Return the hooked tensor with its canonical value replaced."""
        if self.selector is not None:
            value = self.selector.write(self.tap.read(x), value)
        return self.tap.write(x, value)


def list_sites(layout: Layout | None) -> list[Site]:
    """Return every canonical site of a layout, absent ones included, in forward order."""
    if layout is None:
        return []
    found: list[Site] = []
    for tower in layout.towers:
        found.append(_global_site(layout, tower, "embed"))
        for block in range(tower.n_blocks):
            found += [_block_site(tower, block, kind) for kind in BLOCK_KINDS]
        found.append(_global_site(layout, tower, "final_norm"))
    found.append(_global_site(layout, layout.towers[-1], "logits"))
    return found


class SiteResolver:
    """Resolve site names and patterns for one model."""

    def __init__(self, model: nn.Module, layout: Layout | None) -> None:
        self.model = model
        self.layout = layout
        self._sites = {site.name: self._checked(site) for site in list_sites(layout)}

    def all(self) -> list[Site]:
        """Every canonical site, absent ones included."""
        return list(self._sites.values())

    def resolve(self, patterns: str | Site | Iterable[str | Site]) -> list[Site]:
        """Return the sites that the patterns name, in the order of the patterns, without repeats.

        Raises:
            SiteError: a name that this model has not got, an absent site, or an empty pattern.
        """
        if isinstance(patterns, (str, Site)):
            patterns = [patterns]
        found: dict[str, Site] = {}
        for pattern in patterns:
            if isinstance(pattern, Site):
                found[pattern.name] = pattern
                continue
            for site in self._one(pattern.strip()):
                found[site.name] = site
        if not found:
            raise SiteError("no site was given; name one, e.g. 'blocks.*.resid_post'")
        return list(found.values())

    def _one(self, pattern: str) -> Iterator[Site]:
        name, selector = _split_selector(pattern)
        if name.startswith("module:"):
            yield _select(self._module_site(name), selector, pattern)
            return
        if self.layout is None:
            raise SiteError(
                f"{pattern!r}: {type(self.model).__name__} has no layout, so it has only 'module:...' sites, "
                f"e.g. {self._example_module()!r}"
            )
        wanted = self._canonical(name)
        exact = self._sites.get(wanted)
        if exact is not None:
            yield _select(_existing(exact, pattern), selector, pattern)
            return
        matched = list(self._match(wanted))
        present = [s for s in matched if s.absent is None]
        if not matched:
            raise SiteError(f"no site {pattern!r} in {type(self.model).__name__}{self._hint(wanted)}")
        if not present:
            raise SiteError(f"{pattern!r} does not exist here: {matched[0].absent}")
        for site in present:
            yield _select(site, selector, pattern)

    def _canonical(self, name: str) -> str:
        """Translate TransformerLens aliases and negative block numbers."""
        if name in ALIASES:
            return ALIASES[name]
        match = _BLOCK.match(name)
        if match is None:
            return name
        kind = ALIASES.get(match["kind"], match["kind"])
        if kind == "mlp.hook_pre":
            prefix = name[: match.start("kind")]
            gate = self._sites.get(f"{prefix}mlp.gate")
            kind = "mlp.gate" if gate is not None and gate.absent is None else "mlp.up"
        which = match["which"]
        tower = self._tower(match["tower"] or "")
        if re.fullmatch(r"-\d+", which) and tower is not None:
            index = tower.n_blocks + int(which)
            which = str(index) if index >= 0 else which
        return join(match["tower"] or "", f"blocks.{which}.{kind}")

    def _match(self, pattern: str) -> Iterator[Site]:
        match = _BLOCK.match(pattern)
        if match is None:
            yield from (s for s in self._sites.values() if fnmatchcase(s.name, pattern))
            return
        tower = self._tower(match["tower"] or "")
        if tower is None:
            return
        wanted = _blocks(match["which"], tower.n_blocks)
        for site in self._sites.values():
            if site.tower == tower.name and site.block in wanted:
                kind = site.name.split("blocks.", 1)[1].split(".", 1)[1]
                if fnmatchcase(kind, match["kind"]):
                    yield site

    def _tower(self, name: str) -> Tower | None:
        return self.layout.tower(name) if self.layout is not None else None

    def _hint(self, name: str) -> str:
        assert self.layout is not None
        towers = [t.name for t in self.layout.towers if t.name]
        match = _BLOCK.match(name)
        if towers and (match is None or match["tower"] is None):
            return f"; it has the towers {' and '.join(towers)}, e.g. '{towers[0]}.{name}'"
        tower = self._tower(match["tower"] or "") if match is not None else None
        if match is not None and tower is not None and not _blocks(match["which"], tower.n_blocks):
            return f": it has blocks 0 to {tower.n_blocks - 1}, not {match['which']}"
        return did_you_mean(name, [s.name for s in self._sites.values() if s.absent is None])

    def _module_site(self, name: str) -> Site:
        path = name.removeprefix("module:")
        modules = dict(self.model.named_modules())
        end = "output"
        if path not in modules:
            stem, _, last = path.rpartition(".")
            if last in ("input", "output") and (stem in modules or stem == ""):
                path, end = stem, last
        if path not in modules:
            raise SiteError(f"no module {path!r} in {type(self.model).__name__}{did_you_mean(path, modules)}")
        tap = Tap(path, "input" if end == "input" else "output")
        shape = f"{end} of {type(modules[path]).__name__}"
        suffix = ".input" if end == "input" else ""
        return Site(f"module:{path}{suffix}", "module", None, "", path, tap, shape)

    def _example_module(self) -> str:
        names = [n for n, _ in self.model.named_modules() if n]
        return f"module:{names[-1]}" if names else "module:"

    def _checked(self, site: Site) -> Site:
        """Settle on the alternative that exists here, or declare the site absent.

        A mixture model has blocks with a dense MLP and blocks with experts; the layout names both.
        """
        if site.absent is not None or self.layout is None:
            return site
        tower = self.layout.tower(site.tower)
        if tower is None or site.block is None:
            return site if find(self.model, site.module) else replace(site, absent="no such module here")
        for tap in _alternatives(tower.sites[site.kind]):
            where = join(tower.blocks, str(site.block), tap.module)
            if find(self.model, where) is not None:
                return replace(site, module=where, tap=tap)
        return replace(site, absent=tower.absent.get(site.kind, "this block has no such module"))


def _existing(site: Site, pattern: str) -> Site:
    if site.absent is not None:
        raise SiteError(f"{pattern!r} does not exist here: {site.absent}")
    return site


def _blocks(which: str, n: int) -> frozenset[int]:
    """Return the block numbers that `5`, `4-9`, `0,3,5`, `-1` or `*` mean among `n` blocks."""
    if which == "*":
        return frozenset(range(n))
    found: set[int] = set()
    for part in which.split(","):
        span = re.fullmatch(r"(\d+)-(\d+)", part)
        if span:
            found |= set(range(int(span[1]), int(span[2]) + 1))
        elif re.fullmatch(r"-?\d+", part):
            found.add(int(part) % n if int(part) < 0 and n else int(part))
        else:
            return frozenset()
    return frozenset(found) if all(0 <= i < n for i in found) else frozenset()


def _split_selector(pattern: str) -> tuple[str, tuple[str, str] | None]:
    match = _SELECTOR.match(pattern)
    if match is None:
        if "[" in pattern:
            raise SiteError(f"cannot read the selector in {pattern!r}; write e.g. 'blocks.5.attn.z[head=3]'")
        return pattern, None
    return match["name"], (match["axis"], match["which"].replace(" ", ""))


def _select(site: Site, selector: tuple[str, str] | None, pattern: str) -> Site:
    if selector is None:
        return site
    axis, which = selector
    if axis == "head" and site.kind in HEAD_KINDS:
        dim, limit = -2, site.features[0] if site.features else None
    elif axis == "head" and site.kind in ATTENTION_KINDS:
        dim, limit = 1, site.features[0] if site.features else None
    elif axis == "channel" and site.kind not in ATTENTION_KINDS:
        dim, limit = -1, site.features[-1] if site.features else None
    else:
        axes = "head=" if axis != "head" else "channel="
        raise SiteError(f"{pattern!r}: {site.kind} cannot be selected by {axis!r}; try '{axes}'")
    indices: list[int] = []
    for part in which.split(","):
        span = re.fullmatch(r"(\d+)-(\d+)", part)
        if span:
            indices += range(int(span[1]), int(span[2]) + 1)
        elif part.isdigit():
            indices.append(int(part))
        else:
            raise SiteError(f"{pattern!r}: cannot read {part!r} as a {axis} number")
    if limit is not None and any(i >= limit for i in indices):
        raise SiteError(f"{pattern!r}: {axis} {max(indices)} does not exist; this site has {limit}")
    chosen = Selector(axis, tuple(indices), "," not in which and "-" not in which, dim)
    features = site.features
    return Site(
        site.name + str(chosen),
        site.kind,
        site.block,
        site.tower,
        site.module,
        site.tap,
        site.shape + f" {chosen}",
        _selected_features(features, chosen),
        None,
        chosen,
    )


def _selected_features(features: tuple[int, ...] | None, chosen: Selector) -> tuple[int, ...] | None:
    if features is None or chosen.dim == 1:
        return features
    sizes = list(features)
    if chosen.single:
        del sizes[chosen.dim]
    else:
        sizes[chosen.dim] = len(chosen.indices)
    return tuple(sizes)


def _alternatives(taps: Taps) -> tuple[Tap, ...]:
    return taps if isinstance(taps, tuple) else (taps,)


def _block_site(tower: Tower, block: int, kind: str) -> Site:
    name = join(tower.name, f"blocks.{block}.{kind}")
    features, shape = site_shape(tower, kind)
    if kind not in tower.sites:
        reason = tower.absent.get(kind, "not computed by this architecture")
        return Site(name, kind, block, tower.name, "", Tap(""), shape, features, reason)
    tap = _alternatives(tower.sites[kind])[0]
    where = join(tower.blocks, str(block), tap.module)
    return Site(name, kind, block, tower.name, where, tap, shape, features)


def _global_site(layout: Layout, tower: Tower, kind: str) -> Site:
    tap = {"embed": tower.embed, "final_norm": tower.final_norm, "logits": layout.logits}[kind]
    name = kind if kind == "logits" else join(tower.name, kind)
    features, shape = site_shape(tower, kind)
    if tap is None:
        reason = layout.logits_absent if kind == "logits" else f"this tower has no separate {kind}"
        return Site(name, kind, None, tower.name, "", Tap(""), shape, features, reason)
    return Site(name, kind, None, tower.name, tap.module, tap, shape, features)


def site_shape(tower: Tower, kind: str) -> tuple[tuple[int, ...] | None, str]:
    """Return the feature sizes of a kind of site in a tower, and its shape in words."""
    last = kind.rpartition(".")[2]
    if last in ("scores", "pattern"):
        return (tower.heads,), f"batch, heads={tower.heads}, query, key"
    if kind in HEAD_KINDS:
        heads = tower.kv_heads if last in ("k", "v") else tower.heads
        return (heads, tower.head_dim), f"batch, pos, heads={heads}, head_dim={tower.head_dim}"
    if kind in ("mlp.gate", "mlp.up", "mlp.act"):
        return (tower.d_mlp,), f"batch, pos, d_mlp={tower.d_mlp}"
    if kind == "moe.router":
        return None, "batch, pos, experts"
    if kind == "logits":
        return None, "batch, pos, vocab"
    return (tower.d_model,), f"batch, pos, d_model={tower.d_model}"
