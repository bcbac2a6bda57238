"""Low-rank compensation (LoRC): add back the part of the rounding error that a small matrix can hold.

    E = W - W_hat = U S V^T,       W_hat + (U_m S_m^1/2) (S_m^1/2 V_m^T)

No other matrix of rank m is nearer to E (Eckart and Young) in the Frobenius norm; that is no promise about
the model's output. With `weighting="activation"` the columns of E are multiplied by the root mean square of
the inputs first, and V's divided by it afterwards, so that what the inputs reach counts.

The branch costs m (out + in) numbers a matrix; m = 8 in 16 bits is 0.44 bit a weight on a 576 x 576 matrix,
about what halving the group size costs. Compare at equal bytes (`edit.bits_per_weight`) before taking it.

Source: Yao et al. 2023, "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study
to Low Rank Compensation" (arXiv 2303.08302), section 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.layout import weight_matrix
from actlas.core.methods import method
from actlas.core.quant_edit import QuantEdit
from actlas.core.quant_linear import QuantLinear
from actlas.measure.quant_price import fit_measurements
from actlas.quantize.compensated_linear import CompensatedLinear
from actlas.quantize.gptq import fit_gptq
from actlas.quantize.input_moments import input_moments
from actlas.quantize.layers import LEAST_TOKENS, layer_of, split_text
from actlas.quantize.rtn import fit_rtn

if TYPE_CHECKING:
    from actlas.core.model import Model

Weighting = Literal["none", "activation"]
Base = Literal["rtn", "gptq"]


@method(
    "lorc",
    room="quantize",
    returns="Edit",
    data="corpus",
    summary="rounded weights, and a small low-rank matrix that adds back part of the error",
    example="actlas fit lorc smollm2 prose --bits 3 --rank 8 -o lorc3/",
    papers=("zeroquant-v2",),
)
def fit_lorc(
    model: Model,
    data: Iterable[Any] | None = None,
    *,
    bits: int = 3,
    group_size: int | None = None,
    symmetric: bool = False,
    format: str = "",
    base: Base = "rtn",
    rank: int = 8,
    factor_bits: int = 8,
    weighting: Weighting = "none",
    skip: tuple[str, ...] = (),
    tokens: int = 1024,
    context: int = 256,
    evaluate: int = 1024,
    seed: int = 0,
) -> Edit:
    """Return the edit that rounds weights and compensates with low-rank branches.

    Args:
        model: a model with linear layers and a tokenizer.
        data: calibration text (for GPTQ and the weighting); what follows is used to measure.
        bits, group_size, symmetric, format, skip: of the weights, as in `fit_rtn`.
        base: how weights are rounded.
        rank: m.
        factor_bits: 16, or 8: of the branch's factors.
        weighting: whether the error is weighted by the size of the inputs.
        tokens, context: calibration text; seed: of the text's order and the bootstrap.
        evaluate: tokens of held-out text on which perplexity ratio and divergence are measured; 0: none.

    Raises:
        InputError: a rank or factor bits out of range, or what `fit_rtn` and `fit_gptq` raise.
    """
    if base not in get_args(Base):
        raise InputError(f"base is {base!r}; it must be one of {', '.join(get_args(Base))}")
    if weighting not in get_args(Weighting):
        raise InputError(f"weighting is {weighting!r}; it must be 'none' or 'activation'")
    common: dict[str, Any] = {
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "format": format,
        "skip": skip,
        "evaluate": 0,
        "seed": seed,
    }
    needs = base == "gptq" or weighting == "activation"
    texts = split_text(model, data, tokens=tokens if needs else LEAST_TOKENS, context=context, seed=seed)
    rounded = (
        fit_rtn(model, **common)
        if base == "rtn"
        else fit_gptq(model, texts.fit, tokens=tokens, context=context, **common)
    )
    assert isinstance(rounded, QuantEdit)
    sizes = None
    if weighting == "activation":
        sizes = input_moments(model, texts)
    edit = compensate(model, rounded, rank=rank, factor_bits=factor_bits, input_sizes=sizes)
    if not evaluate:
        return edit
    return edit.with_measurements(
        fit_measurements(model, texts.held_out, edit, tokens=evaluate, context=context, seed=seed)
    )


@dataclass(frozen=True)
class Branch:
    """A low-rank branch of a layer; the first components alone are the best branch of that rank.

    Attributes:
        up, down: `[out, r]` and `[r, in]`.
        energy: share of the (weighted) squared error that the first 1, 2, ... r components hold, `[r]`.
    """

    up: Tensor
    down: Tensor
    energy: Tensor

    def cut(self, rank: int) -> Branch:
        """Return the branch of the first components."""
        return Branch(self.up[:, :rank].contiguous(), self.down[:rank].contiguous(), self.energy[:rank])


def compensate(
    model: Model,
    base: QuantEdit,
    *,
    rank: int = 8,
    factor_bits: int = 16,
    input_sizes: Mapping[str, Tensor] | None = None,
) -> Edit:
    """Return a quantised model's edit with a low-rank branch in every layer.

    Args:
        model: the model, without the edit.
        base: of any weight method that folds nothing into other parameters (the error must be that of the
            final weight).
        rank: of the branches.
        factor_bits: 16, or 8.
        input_sizes: path -> root mean square of each input channel, to weight the error by.

    Raises:
        InputError: folds in the edit, layers that have a branch already, a rank or bits out of range.
    """
    made = branches(model, base, rank=rank, input_sizes=input_sizes)
    return with_branches(model, base, made, factor_bits=factor_bits)


def branches(
    model: Model, base: QuantEdit, *, rank: int, input_sizes: Mapping[str, Tensor] | None = None
) -> dict[str, Branch]:
    """Return path -> branch for every layer of a quantised model; arguments as of `compensate`."""
    if base.parameters:
        raise InputError(
            f"{base.describe()} folds scales into other parameters; fit it with fold=False to compensate it"
        )
    out = {}
    for path, layer in base.modules.items():
        if not isinstance(layer, QuantLinear) or layer.up is not None or layer.rotate:
            raise InputError(f"{path} is a {type(layer).__name__} that takes no low-rank branch")
        error = weight_matrix(layer_of(model, path)).detach().float() - layer.weight
        size = None if input_sizes is None else input_sizes[path]
        if layer.input_scale is not None:  # the branch reads the divided inputs
            error = error * layer.input_scale
            size = None if size is None else size.to(error) / layer.input_scale
        out[path] = low_rank(error, rank, size, where=path)
    return out


def with_branches(
    model: Model,
    base: QuantEdit,
    made: Mapping[str, Branch],
    *,
    rank: int | None = None,
    factor_bits: int = 16,
) -> Edit:
    """Return a quantised model's edit with given branches.

    Args:
        model, base: as in `compensate`.
        made: of `branches`.
        rank: only so many components of them; default: all.
        factor_bits: 16, or 8.
    """
    if factor_bits not in (8, 16):
        raise InputError(f"factor_bits is {factor_bits}; factors are stored in 8 or 16 bits")
    modules: dict[str, nn.Module] = {}
    shares = {}
    for path, layer in base.modules.items():
        assert isinstance(layer, QuantLinear)
        branch = made[path] if rank is None else made[path].cut(rank)
        shares[path] = 1 - float(branch.energy[-1])
        if factor_bits == 16:
            modules[path] = _with_branch(layer, branch.up, branch.down)
        else:
            modules[path] = CompensatedLinear.of(layer, branch.up, branch.down, factor_bits)
    held = 1 - sum(shares.values()) / len(shares)
    note = f"branches in {factor_bits} bits hold {held:.1%} of the squared error"
    edit = replace(
        base,
        modules=modules,
        method=f"{base.method}+lorc",
        note="; ".join(part for part in (note, base.note) if part),
        errors=shares,
    )
    return edit.bind(model.fingerprint)


def low_rank(
    error: Tensor, rank: int, input_size: Tensor | None = None, *, where: str = "the layer"
) -> Branch:
    """Return the branch whose product is nearest to an error.

    Args:
        error: `[out, in]`.
        rank: r.
        input_size: weights of the columns, `[in]`; the product is nearest in the weighted norm.
        where: name of the layer, for messages.

    Raises:
        InputError: the rank is not between 1 and the smaller size.
    """
    limit = min(error.shape)
    if not 1 <= rank <= limit:
        raise InputError(
            f"{where}: rank is {rank}; this {error.shape[0]} x {error.shape[1]} map allows 1 to {limit}"
        )
    size = None
    if input_size is not None:
        size = input_size.to(error).clamp_min(1e-6 * float(input_size.max()) + 1e-30)
        error = error * size
    small = error.T if error.shape[0] > error.shape[1] else error
    # Eigenvectors of the smaller Gram matrix: as exact here as an SVD, and many times quicker.
    values, vectors = torch.linalg.eigh((small @ small.T).double())
    basis = vectors[:, -rank:].flip(1).to(error)
    values = values.clamp_min(0)
    energy = values[-rank:].flip(0).cumsum(0) / values.sum().clamp_min(1e-300)
    root = values[-rank:].flip(0).clamp_min(1e-30).pow(0.25).to(error)  # S^1/2
    first, second = basis * root, (basis.T @ small) / root.unsqueeze(1)
    up, down = (second.T, first.T) if error.shape[0] > error.shape[1] else (first, second)
    return Branch(up.contiguous(), (down if size is None else down / size).contiguous(), energy)


def _with_branch(layer: QuantLinear, up: Tensor, down: Tensor) -> QuantLinear:
    state = {key: value for key, value in layer.state_dict().items() if key not in ("up", "down")}
    made = QuantLinear({**layer.config(), "rank": up.shape[1]})
    made.load_state_dict({**state, "up": up.half(), "down": down.half()})
    return made.to(up.device).eval()
