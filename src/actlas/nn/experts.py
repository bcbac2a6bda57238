"""Mixtures of experts: M small MLPs, of which each token runs k.

    f_j(x) = W_dec_j a(W_enc_j x + b_j)                        an expert, W_enc_j [D, d]
    y      = sum over the k chosen j of w_j f_j(x) + b_dec

or, where the experts are gated as in Llama, f_j(x) = W_dec_j (a(W_enc_j x + b_j) * (W_up_j x + c_j)).

The wide view. With z = concat_j(w_j a(W_enc_j x + b_j)), zero for experts that were not chosen, and
W_dec = [W_dec_1 .. W_dec_M], the layer is exactly y = W_dec z + b_dec: one MLP of width M D of which at
most k D neurons are active. `features` gives z, or the same without the gates w_j.

A kind of mixture is a subclass that says how tokens are routed (`route`).

Load balance (Fedus et al. 2022, Switch Transformers, equations 4 to 6): with f_j the share of choices
that fell on expert j and P_j the mean over tokens of softmax(scores)_j,

    balance = M sum_j f_j P_j        1 when both are uniform, M when one expert gets everything
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.errors import InputError, ShapeError, did_you_mean

if TYPE_CHECKING:
    from typing_extensions import Self

    from actlas.nn.wide_view import ExpertDictionary

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@dataclass(frozen=True)
class Routing:
    """Where the tokens of a batch go.

    Attributes:
        experts: int64 `[n, k]`, the chosen experts, the best first.
        gates: `[n, k]`, their weights w; they sum to 1 unless the router says otherwise.
        scores: float32 `[n, M]`, what they were chosen by; higher is better.
    """

    experts: Tensor
    gates: Tensor
    scores: Tensor

    @property
    def load(self) -> Tensor:
        """The share of all choices that fell on each expert, float32 `[M]`."""
        counts = torch.bincount(self.experts.reshape(-1), minlength=self.scores.shape[-1])
        return counts / max(1, self.experts.numel())

    def balance(self) -> Tensor:
        """Return the load-balance loss (module docstring); gradients go through the scores."""
        share = torch.softmax(self.scores, dim=-1).mean(0)
        return self.scores.shape[-1] * (self.load.to(share) * share).sum()


class MixtureOfExperts(nn.Module):
    """Base of the mixtures.

    Args:
        d: channels of input and output.
        hidden: D, neurons of one expert.
        experts: M.
        top_k: k, experts that a token runs.
        activation: of the neurons: `"relu"`, `"gelu"`, `"gelu_new"` or `"silu"`.
        bias: whether the encoders and the output have one.
        gated: whether the experts are gated as in Llama (module docstring).
        dtype: of the weights.

    Raises:
        InputError: sizes that are not positive, more chosen experts than there are, an unknown activation.
    """

    #: What `upcycle` calls this kind, and the activation that it stands for.
    kind = ""
    standard_activation = "relu"

    def __init__(
        self,
        d: int,
        hidden: int,
        experts: int = 8,
        top_k: int = 2,
        *,
        activation: str = "",
        bias: bool = False,
        gated: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        for name, value in (("d", d), ("hidden", hidden), ("experts", experts)):
            if value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        if not 1 <= top_k <= experts:
            raise InputError(f"top_k is {top_k}; with {experts} experts it must be 1 to {experts}")
        activation = activation or self.standard_activation
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise InputError(
                f"no activation {activation!r}{did_you_mean(activation, ACTIVATIONS)} (there are {known})"
            )
        self.d, self.hidden, self.experts, self.top_k = d, hidden, experts, top_k
        self.activation = activation
        self.w_enc = nn.Parameter(torch.empty(experts, hidden, d, dtype=dtype))
        self.w_dec = nn.Parameter(torch.empty(experts, d, hidden, dtype=dtype))
        self.b_enc = nn.Parameter(torch.zeros(experts, hidden, dtype=dtype)) if bias else None
        self.b_dec = nn.Parameter(torch.zeros(d, dtype=dtype)) if bias else None
        self.w_up = nn.Parameter(torch.empty(experts, hidden, d, dtype=dtype)) if gated else None
        self.b_up = nn.Parameter(torch.zeros(experts, hidden, dtype=dtype)) if gated and bias else None
        self.routed: Routing | None = None
        with torch.no_grad():
            for weight, inputs in ((self.w_enc, d), (self.w_up, d), (self.w_dec, hidden)):
                if weight is not None:
                    weight.uniform_(-(inputs**-0.5), inputs**-0.5)

    def route(self, x: Tensor) -> Routing:
        """Return where rows `[n, d]` go."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., d]`. With gradients on, the routing is kept for `balance_loss`."""
        rows = self._rows(x)
        routing = self.route(rows)
        self.routed = routing if torch.is_grad_enabled() else None
        y = torch.zeros_like(rows)
        for j, tokens, places in self._dispatch(routing):
            z = self.neurons(rows[tokens], j) * routing.gates[tokens, places].to(rows).unsqueeze(-1)
            y = y.index_add(0, tokens, F.linear(z, self.w_dec[j]))
        return (y if self.b_dec is None else y + self.b_dec).reshape(x.shape)

    def features(self, x: Tensor, *, gated: bool = False) -> Tensor:
        """Return the features of the wide view, `[..., M D]`; those of experts not chosen are 0.

        Args:
            x: activations `[..., d]`.
            gated: multiply by the gates w_j. The default does not: a feature's strength then says what
                the neuron saw, and not how the router divided the token between its experts.
        """
        rows = self._rows(x)
        routing = self.route(rows)
        z = rows.new_zeros(len(rows), self.experts, self.hidden)
        for j, tokens, places in self._dispatch(routing):
            values = self.neurons(rows[tokens], j)
            if gated:
                values = values * routing.gates[tokens, places].to(rows).unsqueeze(-1)
            z[tokens, j] = values
        return z.reshape(*x.shape[:-1], -1)

    @property
    def atoms(self) -> Tensor:
        """What each feature of the wide view writes, `[M D, d]`: y = z @ atoms + b_dec for gated z."""
        return self.w_dec.transpose(1, 2).reshape(-1, self.d)

    def as_dictionary(self, site: str, *, target: str = "", gated: bool = False) -> ExpertDictionary:
        """Return the wide view as a dictionary with a copy of the weights of now.

        Args:
            site: where the layer reads, e.g. `"blocks.2.mlp_norm"`.
            target: where it writes; found from `site` by default (`"blocks.2.mlp.out"`).
            gated: codes with the gates w_j (`decode` is then exactly the layer), or without (the
                default, as for reading; what a feature writes is then its gate times its atom).
        """
        from actlas.nn.wide_view import ExpertDictionary

        return ExpertDictionary.of(self, site, target=target, gated=gated)

    def config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return {
            "d": self.d,
            "hidden": self.hidden,
            "experts": self.experts,
            "top_k": self.top_k,
            "activation": self.activation,
            "bias": self.b_enc is not None,
            "gated": self.w_up is not None,
            "dtype": str(self.w_enc.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build an untrained layer from `config()`'s dictionary.

        Raises:
            InputError: an unknown dtype, or sizes that do not fit.
        """
        dtype = getattr(torch, str(config["dtype"]), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise InputError(f"{cls.__name__} has dtype {config['dtype']!r}; it must be one of floats")
        return cls(**{**config, "dtype": dtype})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "routed": None}  # a graph can neither be copied nor pickled

    def extra_repr(self) -> str:
        return (
            f"d={self.d}, hidden={self.hidden}, experts={self.experts}, top_k={self.top_k}, {self.activation}"
        )

    def _rows(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d:
            raise ShapeError(f"{type(self).__name__} reads {self.d} channels; it was given {list(x.shape)}")
        return x.reshape(-1, self.d)

    def neurons(self, rows: Tensor, j: int) -> Tensor:
        """Return what enters the decoder of expert `j`, `[n, D]`."""
        bias = None if self.b_enc is None else self.b_enc[j]
        z: Tensor = ACTIVATIONS[self.activation](F.linear(rows, self.w_enc[j], bias))
        if self.w_up is not None:
            z = z * F.linear(rows, self.w_up[j], None if self.b_up is None else self.b_up[j])
        return z

    def _dispatch(self, routing: Routing) -> list[tuple[int, Tensor, Tensor]]:
        """Return (expert, its tokens, the place of the expert in the token's choice) for busy experts."""
        flat = routing.experts.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self.experts).tolist()
        parts = order.split(counts)
        k = self.top_k
        return [(j, p // k, p % k) for j, p in enumerate(parts) if len(p)]


def balance_loss(module: nn.Module) -> Tensor:
    """Return the mean load-balance loss of all mixtures in a module, at their last forward pass.

    Raises:
        InputError: there is no mixture, or none has run with gradients since.
    """
    found = [m.routed.balance() for m in module.modules() if isinstance(m, MixtureOfExperts) and m.routed]
    if not found:
        raise InputError("no mixture of experts has run with gradients; call the model first")
    return torch.stack(found).mean()
