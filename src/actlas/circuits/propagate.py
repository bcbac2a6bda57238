"""Pull an observable back through a model: feature vectors without data.

    y = propagate(model, pronoun, [head(20, 3)])            # what head 20.3 must read to move she - he
    y.score(x), y.steer(0.1)                                # a lens and a steering direction at its input
    rank_paths(model, pronoun, depth=2)                     # which heads, and pairs of heads, could matter

From the output back, with attention patterns taken as they are (OV circuits only):

    unembedding   y = W_U' n
    norm          y <- gain * C y                    data-free: its direction, at 1 / sigma = 1
                  y <- (1 / sigma) P (gain * y)      at a given input: the exact gradient
    head (l, h)   y <- W_V,g' W_O,h' y               g = h // (heads / groups), the values that h reads
    MLP           y <- gradient of y . MLP(x) at a given input

C centres (LayerNorm), P takes out the direction of the input. In d = 576 dimensions P turns a random vector
by about sqrt(2 / d) at most, so that the data-free direction is kept; `norm_scales` gives 1 / sigma on text.

Source: Dunefsky and Cohan 2024, "Observable Propagation" (arXiv 2312.16291), sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actlas.circuits.nodes import Node, head
from actlas.circuits.observable import Observable
from actlas.circuits.readers import _weight, readers_of, through_norm
from actlas.core.calibration.massive import massive_rows
from actlas.core.direction import Direction
from actlas.core.errors import InputError, ModelError, ShapeError
from actlas.core.layout import find

if TYPE_CHECKING:
    from actlas.core.model import Model

At = Mapping[str, Tensor]


@dataclass(kw_only=True, eq=False)
class FeatureVector(Direction):
    """An observable pulled back to a site: a lens whose score is `x . vector`, in the observable's unit.

    Attributes:
        observable: its name.
        path: the components between the site and the logits, first to last, e.g. `("L12H1", "L20H3")`.
    """

    observable: str = ""
    path: tuple[str, ...] = ()

    def score(self, x: Tensor) -> Tensor:
        """Return `x . vector`, `[...]` for activations `[..., d]`."""
        flat = self.flat(x)
        along: Tensor = flat @ self.vector.to(flat)
        return along

    def describe(self) -> str:
        """Return e.g. `"+1she -1he through L20H3, read at blocks.20.resid_pre (length 0.8)"`."""
        through = " > ".join(self.path) or "the output head alone"
        return f"{self.observable} through {through}, read at {self.site} (length {self.norm:.3g})"


@dataclass(frozen=True, eq=False)
class RankedPath:
    """A path and how strongly it could move the observable.

    Attributes:
        path: heads, first to last.
        weight: length of the feature vector in units of the normed input, which has the same length at
            every head, so that paths can be compared without data.
        feature: the vector float64 `[d]`, at the input of the first head.
    """

    path: tuple[Node, ...]
    weight: float
    feature: Tensor


def propagate(
    model: Model, observable: Observable, path: Sequence[Node] = (), *, at: At | None = None
) -> FeatureVector:
    """Return the feature vector of an observable at the input of a path.

    Args:
        model: a causal language model with a layout.
        observable: what is pulled back.
        path: heads and MLPs in the model's order; empty: straight from the last residual state.
        at: residual states `[d]` by site at which norms and MLPs are linearised: `blocks.l.resid_pre` (a
            head's norm), `blocks.l.resid_mid` (an MLP), the last block's `resid_post` (the final norm).
            Where a norm's is missing its data-free direction is taken; an MLP needs one.

    Returns:
        The vector at `blocks.l.resid_pre` of a first head, `blocks.l.resid_mid` of a first MLP, or at the
        last `resid_post`.

    Raises:
        InputError: a path out of order, a node that is no head or MLP, an MLP without a state, or states that
            no part of the path reads.
        ModelError: an architecture whose parts are normed after they are computed.
        ShapeError: a state of another width.
    """
    blocks = _checked(model)
    given = dict(at or {})
    last = f"blocks.{blocks - 1}.resid_post"
    y = _through(observable.readout(model), model.final_norm_module, given.pop(last, None), last)
    site, after = last, (blocks, 0)
    for node in reversed(path):
        kind, order = _kind(model, node)
        if order >= after:
            raise InputError(
                f"{node.label} does not come before what follows it in the path; order it as run"
            )
        if kind == "head":
            site = f"blocks.{node.block}.resid_pre"
            y = head_features(model, y[None], node.block, gain=False)[0, node.index or 0]
            y = _through(y, _norm(model, node.block, "attn_norm"), given.pop(site, None), site)
        else:
            site = f"blocks.{node.block}.resid_mid"
            if site not in given:
                raise InputError(f"{node.label} is linearised at a state of {site}; give it in `at`")
            y = _mlp_gradient(model, y, node.block, given.pop(site))
        after = order
    if given:
        raise InputError(f"no norm or MLP of this path reads {next(iter(given))}; leave it out of `at`")
    return FeatureVector(
        site=site, vector=y.float(), method="observable", observable=observable.name,
        path=tuple(n.label for n in path), fingerprint=model.fingerprint,
    )  # fmt: skip


def head_features(model: Model, y: Tensor, block: int, *, gain: bool = True) -> Tensor:
    """Return what each head of a block must read to write along vectors `y`.

    Args:
        model: the model.
        y: float64 `[m, d]`, vectors that read the block's attention output.
        block: its number.
        gain: include the gain (and centring) of the norm before the heads, not its scale.

    Returns:
        float64 `[m, heads, d]`.
    """
    tower = model.tower
    assert tower is not None
    out = readers_of(model, f"blocks.{block}.attn.z").matrix  # [d, heads * head_dim]
    values = value_matrix(model, block, gain=gain)  # [groups, head_dim, d]
    heads = tower.heads
    z = (y.to(out) @ out).unflatten(-1, (heads, -1))
    each = values.repeat_interleave(heads // len(values), 0)
    return torch.einsum("mhk,hkd->mhd", z, each)


def value_matrix(model: Model, block: int, *, gain: bool) -> Tensor:
    """Return the value maps of a block, float64 `[groups, head_dim, d]`, without or with the norm's gain."""
    site = model.resolve(f"blocks.{block}.attn.v")[0]
    rows = _weight(model, site)
    module = _norm(model, block, "attn_norm")
    if gain and module is not None:
        rows = through_norm(rows, module)
    groups = site.features[0] if site.features else 1
    return rows.unflatten(0, (groups, -1))


def rank_paths(
    model: Model,
    observable: Observable,
    *,
    depth: int = 1,
    top: int = 20,
    scales: Mapping[str, float] | None = None,
) -> list[RankedPath]:
    """Return the paths through up to `depth` heads with the longest feature vectors, longest first.

    Args:
        model: the model.
        observable: what is moved.
        depth: 1 for single heads, 2 for pairs of heads as well.
        top: how many are returned.
        scales: `norm_scales`; without them a pair's inner norm counts as 1, which makes pairs too long
            compared with single heads but leaves their order within one later layer.

    Raises:
        InputError: a depth other than 1 or 2.
    """
    if depth not in (1, 2):
        raise InputError(f"depth is {depth}; paths through 1 or 2 heads are ranked")
    blocks = _checked(model)
    y = through(observable.readout(model), model.final_norm_module)
    y = y * (scales or {}).get(f"blocks.{blocks - 1}.resid_post", 1.0)
    found: list[RankedPath] = []
    later: list[tuple[Node, Tensor]] = []
    for block in reversed(range(blocks)):
        single = head_features(model, y[None], block)[0]
        if depth == 2 and later:
            outer = torch.stack([v for _, v in later])
            pairs = head_features(model, outer, block)
            weights = pairs.norm(dim=-1)
            best = weights.flatten().topk(min(top, weights.numel())).indices.tolist()
            for place in best:
                i, h = divmod(place, weights.shape[1])
                path = (head(block, h), later[i][0])
                found.append(RankedPath(path, float(weights[i, h]), pairs[i, h].clone()))
        scale = (scales or {}).get(f"blocks.{block}.resid_pre", 1.0)
        for h, vector in enumerate(single):
            found.append(RankedPath((head(block, h),), float(vector.norm()), vector))
            later.append((head(block, h), vector * scale))
    found.sort(key=lambda p: -p.weight)
    return found[:top]


def norm_scales(model: Model, inputs: Any) -> dict[str, float]:
    """Return the mean of 1 / sigma over ordinary tokens of some texts, by the site that each norm reads.

    sigma is the root mean square of the state (RMSNorm) or its deviation (LayerNorm); rows of massive
    activations and padding are left out.
    """
    blocks = _checked(model)
    names = [f"blocks.{b}.{k}" for b in range(blocks) for k in ("resid_pre", "resid_mid")]
    sites = model.resolve([*names, f"blocks.{blocks - 1}.resid_post"])
    encoded = model.encode(inputs, padding_side="left")
    mask = encoded.get("attention_mask", torch.ones_like(encoded["input_ids"])).bool()
    found = {}
    trace = model.trace(encoded, sites)
    for site in sites:
        x = trace[site.name][mask].double()
        x = x[~massive_rows(x)]
        if _centres(model, site.name, blocks):
            x = x - x.mean(1, keepdim=True)
        found[site.name] = float(x.square().mean(1).rsqrt().mean())
    return found


def through(y: Tensor, norm: nn.Module | None) -> Tensor:
    """Return the data-free pull-back of `y` `[d]` through a norm: gain and centring."""
    return y if norm is None else through_norm(y[None].double(), norm)[0]


def norm_gradient(y: Tensor, norm: nn.Module, x: Tensor) -> Tensor:
    """Return the gradient of `y . norm(x)` at states `x` `[..., d]`, float64: (1 / sigma) P (gain * y)."""
    like = next(norm.parameters(), x)
    with torch.enable_grad():
        at = x.detach().to(like).requires_grad_()
        (gradient,) = torch.autograd.grad((norm(at) * y.to(like)).sum(), at)
    return gradient.double().cpu()


def _through(y: Tensor, norm: nn.Module | None, x: Tensor | None, site: str) -> Tensor:
    if x is not None and x.shape != y.shape:
        raise ShapeError(f"the state at {site} must be [{len(y)}], not {list(x.shape)}")
    return through(y, norm) if x is None or norm is None else norm_gradient(y, norm, x)


def _mlp_gradient(model: Model, y: Tensor, block: int, x: Tensor) -> Tensor:
    """Return the gradient of `y . MLP(norm(x))` at one state."""
    site = f"blocks.{block}.resid_mid"
    if x.shape != y.shape:
        raise ShapeError(f"the state at {site} must be [{len(y)}], not {list(x.shape)}")
    mlp = find(model.module, model.resolve(f"blocks.{block}.mlp.out")[0].module)
    norm = _norm(model, block, "mlp_norm")
    assert mlp is not None
    like = next(mlp.parameters())
    with torch.enable_grad():
        at = x.detach().to(like)[None, None].requires_grad_()
        out = mlp(norm(at) if norm is not None else at)
        out = out[0] if isinstance(out, tuple) else out
        (gradient,) = torch.autograd.grad((out * y.to(like)).sum(), at)
    return gradient[0, 0].double().cpu()


def _checked(model: Model) -> int:
    tower = model.tower
    if tower is None or not model.n_blocks:
        raise ModelError(f"{model.name} has no layout, so paths through its heads are not known")
    if tower.post_norm or tower.attn_out_norm or tower.mlp_out_norm:
        raise ModelError(
            f"{model.name} norms what its parts write, after they are computed; observables are pulled back"
            " through norms that stand before each part"
        )
    return int(model.n_blocks)


def _kind(model: Model, node: Node) -> tuple[str, tuple[int, int]]:
    model.resolve(node.site)
    if node.kind == "attn.z" and node.index is not None:
        return "head", (node.block, 0)
    if node.kind == "mlp.out" and node.index is None:
        return "mlp", (node.block, 0 if model.tower is not None and model.tower.parallel else 1)
    raise InputError(f"{node.label} is neither a head nor an MLP; a path is made of head(l, h) and mlp(l)")


def _norm(model: Model, block: int, part: str) -> nn.Module | None:
    name = f"blocks.{block}.{part}"
    site = next((s for s in model.resolve(f"blocks.{block}.*") if s.name == name and s.absent is None), None)
    return None if site is None else find(model.module, site.module)


def _centres(model: Model, site: str, blocks: int) -> bool:
    part = {"resid_pre": "attn_norm", "resid_mid": "mlp_norm"}.get(site.rsplit(".", 1)[1])
    norm = model.final_norm_module if part is None else _norm(model, int(site.split(".")[1]), part)
    if norm is None:
        return False
    d = model.d_model or 0
    return bool(through(torch.ones(d, dtype=torch.float64), norm).abs().max() < 1e-9) if d else False
