"""CHESS: thresholds per channel on the gate, and sparse inputs of the query and output projections.

A gated MLP computes h = g * u with g = act(W_gate x) and u = W_up x. Leaving out g_i costs about
g_i^2 E[u_i^2], so the score of a gate is |g_i| m_i with

    m_i = sqrt(E[u_i^2])   ("rms")    or   E|u_i|   ("mean_abs")    or   1   ("none": that is CATS)

and one quantile of the scores over all channels and tokens gives every channel a threshold of its own,
t_i = tau / m_i. `down_norm=True` multiplies m_i by ||W_down[:, i]|| (ours): what the neuron writes counts.
A gate that is left out saves a row of W_up and a column of W_down; W_gate stays dense.

In attention only the inputs of W_Q and W_O are thresholded (by size), K and V stay dense: "selective".

Source: He et al. 2024, "CHESS" (arXiv 2409.01366); CATS: Lee et al. 2024 (arXiv 2404.08763). The official
code averages quantiles of small groups; this is the quantile of the pooled calibration tokens.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from actlas.core.activation_function import activation_function, activation_name
from actlas.core.calibration import Calibration
from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.core.skip_inputs import SkipInputs
from actlas.measure.linear_layers import linear_layers
from actlas.sparsity.input_sparsity import Phase, calibrate_inputs, check_sparsity, finish, threshold_at

ChannelStat = Literal["rms", "mean_abs", "none"]
Attention = Literal["selective", "all", "none"]
_READ = {"selective": ("q_proj", "o_proj"), "all": ("q_proj", "k_proj", "v_proj", "o_proj"), "none": ()}
_NAMES = {"relu": "relu", "relu2": "relu2", "silu": "silu", "swish": "silu", "gelu": "gelu"}
_NAMES |= {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


@method(
    "chess",
    room="sparsity",
    returns="Edit",
    data="corpus",
    summary="channel-wise thresholds on MLP gates; sparse inputs of the query and output projections",
    example="actlas fit chess smollm2 prose --sparsity 0.5 -o sparse/",
    papers=("chess",),
)
def fit_chess(
    model: Model,
    data: Any,
    *,
    sparsity: float = 0.5,
    channel_stat: ChannelStat = "rms",
    down_norm: bool = False,
    attention: Attention = "selective",
    attention_sparsity: float | None = None,
    phase: Phase = "all",
    tokens: int = 4096,
    context: int = 256,
    seed: int = 0,
) -> Edit:
    """Return the edit that leaves out gates, and inputs of attention's projections.

    Args:
        model: a model with gated MLPs.
        data: text, or a calibration of `calibrate_gates`.
        sparsity: share of gates left out, in [0, 1).
        channel_stat: the statistic of u; `"none"` gives one threshold a layer (CATS).
        down_norm: weigh channels by the norms of the down projection's columns as well.
        attention: which projections skip inputs.
        attention_sparsity: their share; default: `sparsity`.
        phase: all tokens, or generated ones only.
        tokens, context, seed: of the calibration.

    Raises:
        InputError: a share outside [0, 1), nothing to skip, an unknown option.
        ModelError: MLPs without a gate.
    """
    if channel_stat not in get_args(ChannelStat):
        raise InputError(f"channel_stat is {channel_stat!r}; it must be 'rms', 'mean_abs' or 'none'")
    if attention not in _READ:
        raise InputError(f"attention is {attention!r}; it must be 'selective', 'all' or 'none'")
    check_sparsity(sparsity)
    share = check_sparsity(
        sparsity if attention_sparsity is None else attention_sparsity, "attention_sparsity"
    )
    activation = gate_activation(model)
    act = activation_function(activation_name(model))
    calibration = calibrate_gates(model, data, tokens=tokens, context=context, seed=seed)
    made: list[Edit] = []
    for layer in linear_layers(model):
        if layer.name in _READ[attention] and share:
            rows = calibration[layer.reads].rows
            made.append(SkipInputs(layer.input_site, 1.0, threshold_at(rows.abs(), share)))
        if layer.name == "down_proj" and sparsity:
            gate = f"blocks.{layer.block}.mlp.gate"
            m = _channel_size(calibration, layer.block, channel_stat)
            if down_norm:
                m = m * layer.column_norms(model).cpu()
            scores = act(calibration[gate].rows).abs() * m
            made.append(
                SkipInputs(gate, m.to(model.device), threshold_at(scores, sparsity), None, None, activation)
            )
    return finish(model, made, phase)


def calibrate_gates(model: Model, corpus: Any, **options: Any) -> Calibration:
    """Read a corpus once: every linear layer's input, the gates and the up projections.

    `options` are those of `calibrate_inputs`; its result serves all methods of this room.

    Raises:
        ModelError: MLPs without a gate.
    """
    gate_activation(model)
    blocks = sorted({layer.block for layer in linear_layers(model)})
    beside = [f"blocks.{b}.mlp.{part}" for b in blocks for part in ("gate", "up")]
    return calibrate_inputs(model, corpus, beside=beside, **options)


def gate_activation(model: Model) -> str:
    """Return the gate's activation by the name that `SkipInputs` knows.

    Raises:
        ModelError: no gated MLP, or an activation that is not 0 at 0.
    """
    gates = [s for s in model.sites() if s.kind == "mlp.gate" and s.absent is None]
    if not gates:
        raise ModelError(
            f"{model.name} has no gated MLPs, which CHESS needs; use wina for its down projections"
        )
    name = activation_name(model)
    if name not in _NAMES:
        raise ModelError(f"{model.name} gates by {name!r}; known are {', '.join(_NAMES)}")
    return _NAMES[name]


def _channel_size(calibration: Calibration, block: int, stat: ChannelStat) -> Tensor:
    up = calibration[f"blocks.{block}.mlp.up"]
    if stat == "rms":
        return up.second_moment.sqrt().float()
    return up.mean_abs.float() if stat == "mean_abs" else torch.ones(up.channels)
