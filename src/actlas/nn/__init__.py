"""Building blocks: modules to train with, or to swap into a model that exists.

    from actlas.nn import MoEX
    block = MoEX(d=96, hidden=192, experts=8, top_k=2)
    y = block(x)
    loss = loss + 0.01 * balance_loss(model)

| file | what |
| --- | --- |
| `experts` | what all mixtures of experts share: weights, dispatch, features, the balance loss |
| `sparsity_router` | the router without weights of its own: to the experts predicted to be sparsest |
| `moe_x` | MoE-X: ReLU experts behind that router |
| `switch` | the baseline: a learned router |
| `blockffn` | BlockFFN: a ReLU router, so that tokens run as many experts as they need |
| `mohd` | a mixture of hidden dimensions: each token uses some slices of the residual stream |
| `mla` | attention whose keys and values come from one small latent vector |
| `squared_relu` | an MLP with the square of ReLU |
| `plm` | PLM: a language model of both |
| `delta_activation` | layers that pass on what changed since the last frame, and a stream of frames |
| `multi_task` | mixtures for several tasks: MMoE, PLE and HoME |
| `wide_view` | a mixture of experts as a dictionary |
| `activation_beacon` | windows condensed into a few keys and values that stay |
| `mixed_op` | one edge of a super-net: every operation at every bit width at once |
| `adaptive_skip_norm` | batch norm that image restoration can bear |
| `super_resolution` | a small super-resolution network of such edges, searched or fixed |
| `los_net` | LOS-Net: a transformer over a model's output distributions |
"""

from __future__ import annotations

from actlas.nn.activation_beacon import ActivationBeacon
from actlas.nn.activation_beacon_memory import BeaconMemory
from actlas.nn.adaptive_skip_norm import AdaptiveSkipNorm
from actlas.nn.blockffn import BlockFFN
from actlas.nn.delta_activation import DeltaActivation, DeltaStream
from actlas.nn.experts import MixtureOfExperts, Routing, balance_loss
from actlas.nn.los_net import LOSNet
from actlas.nn.mixed_op import MixedOp, QuantizedOp
from actlas.nn.mla import MLAttention
from actlas.nn.moe_x import MoEX
from actlas.nn.mohd import MoHD, MonarchLinear
from actlas.nn.multi_task import HoME, MultiTaskExperts
from actlas.nn.plm import PLM, PLMConfig
from actlas.nn.sparsity_router import SparsityRouter
from actlas.nn.squared_relu import ReLU2MLP
from actlas.nn.super_resolution import SuperResolution
from actlas.nn.switch import SwitchMoE
from actlas.nn.wide_view import ExpertDictionary

__all__ = [
    "ActivationBeacon",
    "AdaptiveSkipNorm",
    "BeaconMemory",
    "BlockFFN",
    "DeltaActivation",
    "DeltaStream",
    "ExpertDictionary",
    "HoME",
    "LOSNet",
    "MLAttention",
    "MixedOp",
    "MixtureOfExperts",
    "MoEX",
    "MoHD",
    "MonarchLinear",
    "MultiTaskExperts",
    "PLM",
    "PLMConfig",
    "QuantizedOp",
    "ReLU2MLP",
    "Routing",
    "SparsityRouter",
    "SuperResolution",
    "SwitchMoE",
    "balance_loss",
]
