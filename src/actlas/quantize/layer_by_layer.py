"""Weight methods on models that are not one tower of text: every linear layer by itself, on its own inputs.

    moments = input_moments(model, batches, paths, rows=real_frames)
    layers = fit_layers(model, moments, method="awq", format="int3-g64")

Encoder-decoders, recognisers of speech and nets of one's own are calibrated by running them on ready-made
inputs. Of each layer only `X^T X`, mean |x| and max |x| of its inputs are kept, and a scale of inputs (AWQ,
SmoothQuant) divides at run time, so nothing needs to be folded and no layer needs to know its neighbours. The
error that AWQ's search looks at is the layer's own, `(W - W_hat) X^T X (W - W_hat)^T`: its paper looks at the
output of the attention or MLP around it where several layers share an input.

`rows` says which rows of an input count: speech recognisers see seconds of padding, whose statistics would
drown those of the speech.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from actlas.core.edit import Edit
from actlas.core.errors import InputError, NonFiniteError
from actlas.core.layout import find
from actlas.core.numbers import QuantSpec, params_of
from actlas.core.progress import progress
from actlas.core.quant_edit import QuantEdit
from actlas.core.quant_linear import ActQuant, QuantLinear
from actlas.quantize.awq_search import QUERY_AND_KEY, candidate, clip_range, round_fast
from actlas.quantize.gptq_solver import solve
from actlas.quantize.layers import Target, WeightFormat, targets
from actlas.quantize.smoothquant import smoothing

if TYPE_CHECKING:
    from actlas.core.model import Model

Method = Literal["rtn", "smoothquant", "awq", "gptq"]
Rows = Callable[[str, Tensor], Tensor]


@dataclass
class Moments:
    """What is known of a layer's inputs.

    Attributes:
        gram: `X^T X` `[in, in]`, float32.
        mean: mean |x| of each column; most: the largest |x|.
        rows: how many rows were seen.
    """

    gram: Tensor
    mean: Tensor
    most: Tensor
    rows: int = 0

    def add(self, x: Tensor) -> None:
        """Take in rows `[n, in]`."""
        wide = x.float()
        self.gram += wide.T @ wide
        self.mean += (wide.abs().sum(0) - self.mean * len(x)) / max(1, self.rows + len(x))
        self.most = torch.maximum(self.most, wide.abs().amax(0))
        self.rows += len(x)


def input_moments(
    model: Model, batches: Iterable[Mapping[str, Any]], paths: Sequence[str], *, rows: Rows | None = None
) -> dict[str, Moments]:
    """Run a model on inputs and keep the moments of what its layers receive.

    Args:
        model: any model.
        batches: keyword arguments of its module.
        paths: of the linear layers.
        rows: (path, inputs) -> the rows that count; default: all.

    Raises:
        InputError: no batches, or a layer that none of them reached (named).
        NonFiniteError: a layer receives NaN or infinities.
    """
    found: dict[str, Moments] = {}
    handles = []

    def reader(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            x = x.flatten(0, -2) if rows is None else rows(path, x)
            if not bool(torch.isfinite(x).all()):
                raise NonFiniteError(f"{path} receives NaN or infinite inputs")
            if path not in found:
                n = x.shape[-1]
                found[path] = Moments(torch.zeros(n, n), torch.zeros(n), torch.zeros(n))
            found[path].add(x)

        return hook

    n = 0
    try:
        for path in paths:
            module = find(model.module, path)
            if module is None:
                raise InputError(f"{model.name} has no module {path!r}")
            handles.append(module.register_forward_pre_hook(reader(path)))
        with torch.no_grad():
            for batch in batches:
                model.module(**batch)
                n += 1
    finally:
        for handle in handles:
            handle.remove()
    missing = [path for path in paths if path not in found or not found[path].rows]
    if not n or missing:
        which = (
            f"{missing[0]} was reached by none of {n} batches" if n else "no calibration inputs were given"
        )
        raise InputError(f"{which}; give inputs that run the whole model")
    return found


def fit_layers(
    model: Model,
    moments: Mapping[str, Moments],
    *,
    method: Method = "gptq",
    format: str = "int4-g64",
    act: str = "",
    skip: Sequence[str] = (),
    ratios: int = 20,
    alpha: float = 0.5,
    damp: float = 0.05,
) -> Edit:
    """Return the edit that quantises the layers whose inputs are known.

    Args:
        model: the model.
        moments: of `input_moments`.
        method: `rtn` rounds to nearest; `smoothquant` and `awq` scale the inputs first, by their largest
            value against the weights' or by the mean with the least error; `gptq` repairs errors column by
            column.
        format: of the weights, by name.
        act: of the inputs, by name, e.g. `"int8-token-sym"`; empty: as they are.
        skip: layers that keep their numbers.
        ratios: exponents that `awq` tries. alpha: of `smoothquant`. damp: of `gptq`.

    Raises:
        InputError: a method or format that does not exist or does not fit.
    """
    if method not in get_args(Method):
        raise InputError(f"there is no method {method!r} here; there are {', '.join(get_args(Method))}")
    chosen = [t for t in targets(model, WeightFormat(format=format), skip) if t.path in moments]
    inputs = ActQuant(QuantSpec.parse(act)) if act else None
    modules: dict[str, nn.Module] = {}
    errors: dict[str, float] = {}
    with progress(f"{method} by layer", total=len(chosen), unit="layers") as advance:
        for target in chosen:
            seen = moments[target.path]
            layer = _fit(target, seen, method, inputs, ratios, alpha, damp)
            modules[target.path] = layer
            errors[target.path] = _error(target.weight, layer.weight, seen.gram)
            advance()
    edit = QuantEdit(modules, method=method, note=f"layer by layer, {format}", errors=errors)
    return edit.bind(model.fingerprint)


def _fit(
    target: Target,
    seen: Moments,
    method: Method,
    act: ActQuant | None,
    ratios: int,
    alpha: float,
    damp: float,
) -> QuantLinear:
    w, spec = target.weight, target.spec
    if method == "rtn":
        return QuantLinear.of(target.module, spec, act=act, where=target.path)
    if method == "gptq":
        solved = solve(w, seen.gram, spec, damp=damp, search=True, where=target.path)
        return QuantLinear.of(
            target.module, spec, params=solved.params, codes=solved.codes, act=act, where=target.path
        )
    if method == "smoothquant":
        s = smoothing(seen.most, w.abs().amax(0), alpha).to(w)
        return QuantLinear.of(target.module, spec, weight=w * s, input_scale=s, act=act, where=target.path)
    best, least = torch.ones_like(seen.mean, dtype=torch.float64), float("inf")
    for step in range(ratios):
        s = candidate(seen.mean.double(), step / ratios)
        wide = s.to(w)
        error = _error(w, round_fast(w * wide, spec) / wide, seen.gram)
        if error < least:
            best, least = s, error
    s = best.to(w)
    outer = s.unsqueeze(1) * s
    clipped = spec.grid == "int" and not target.path.endswith(QUERY_AND_KEY)
    params = clip_range(w * s, seen.gram / outer, spec) if clipped else params_of(w * s, spec)
    return QuantLinear.of(
        target.module, spec, weight=w * s, params=params, input_scale=s, act=act, where=target.path
    )


def _error(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    """Return `||(W - W_hat) X||^2 / ||W X||^2`."""
    off = weight - other
    return float(((off @ gram) * off).sum() / ((weight @ gram) * weight).sum().clamp_min(1e-30))
