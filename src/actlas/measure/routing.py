"""Routing trace: which experts every token of a corpus went through, with what weight.

    trace = trace_routing(model, corpus)             # Mixtral-like models and the mixtures of actlas.nn
    trace.loads()                                    # P [L, E]: tokens routed to expert e in layer l
    trace.transitions()                              # R [L - 1, E, E]: through e1 in l and e2 in l + 1
    fit, test = trace.split(0.5)

For top-k routers P counts (token, expert) choices and R all k^2 pairs of a token, so rows of R sum to
k P. Routers with a varying number of experts (ReLU routers) are read in the same way. Source of P and R:
"MoETuner" (2025), section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.layout import Tap, find
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.measure.reading import read, token_rows


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """What the routers did, layer by layer; row i is the same token in every layer.

    Attributes:
        layers: numbers of the blocks that have experts.
        gates: per layer `[n, E]` float32: the weight of each expert, 0 for experts that were not chosen.
        active: per layer `[n, E]` bool: the chosen experts.
        logits: per layer `[n, E]` float32: what they were chosen by.
        windows: int64 `[n]`; tokens of one window of text share a number and stand in order.
        documents: int64 `[n]`: the document of each token.
        inputs: per layer `[n, d]`, what the router read, if it was asked for.
        top_k: most experts that a token of each layer may run; `None` for routers without a limit.
    """

    layers: tuple[int, ...]
    gates: tuple[Tensor, ...]
    active: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
    windows: NDArray[np.int64]
    documents: NDArray[np.int64]
    inputs: tuple[Tensor, ...] = ()
    top_k: tuple[int | None, ...] = ()

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def n_experts(self) -> int:
        """Experts of each layer.

        Raises:
            InputError: layers have different numbers of experts.
        """
        sizes = {a.shape[1] for a in self.active}
        if len(sizes) != 1:
            raise InputError(f"layers have {sorted(sizes)} experts; this needs equally many in each")
        return int(sizes.pop())

    def loads(self) -> NDArray[np.float64]:
        """Return P `[L, E]`: how many tokens each expert ran."""
        _ = self.n_experts
        return np.stack([a.double().sum(0).numpy() for a in self.active])

    def gate_mass(self) -> NDArray[np.float64]:
        """Return the sum over tokens of each expert's weight, `[L, E]`."""
        _ = self.n_experts
        return np.stack([g.double().sum(0).numpy() for g in self.gates])

    def transitions(self) -> NDArray[np.float64]:
        """Return R `[L - 1, E, E]`: tokens that ran e1 in one layer with experts and e2 in the next."""
        e = self.n_experts
        pairs = zip(self.active, self.active[1:], strict=False)
        found = [(a.float().T @ b.float()).double().numpy() for a, b in pairs]
        return np.stack(found) if found else np.zeros((0, e, e))

    def rows(self, keep: NDArray[Any]) -> RoutingTrace:
        """Return the trace of some tokens (a mask or indices)."""
        index = torch.as_tensor(np.flatnonzero(keep) if np.asarray(keep).dtype == bool else np.asarray(keep))

        def cut(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(t[index] for t in tensors)

        return RoutingTrace(
            self.layers,
            cut(self.gates),
            cut(self.active),
            cut(self.logits),
            self.windows[index.numpy()],
            self.documents[index.numpy()],
            cut(self.inputs),
            self.top_k,
        )

    def split(self, share: float = 0.5, seed: int = 0) -> tuple[RoutingTrace, RoutingTrace]:
        """Return two traces with different documents (different windows, if there is one document).

        Raises:
            InputError: a share outside (0, 1), or a single window.
        """
        unit = self.documents if len(np.unique(self.documents)) > 1 else self.windows
        names = np.unique(unit)
        count = round(share * len(names))
        if not 0 < share < 1 or len(names) < 2:
            raise InputError(
                f"share is {share:g} of {len(names)} texts; it must be inside (0, 1), of 2 or more"
            )
        first = np.random.default_rng(seed).permutation(names)[: min(max(count, 1), len(names) - 1)]
        mask = np.isin(unit, first)
        return self.rows(mask), self.rows(~mask)


def trace_routing(
    model: Model,
    data: Iterable[Any],
    *,
    tokens: int | None = 8192,
    context: int = 256,
    per_document: int | None = None,
    inputs: bool = False,
) -> RoutingTrace:
    """Run a corpus through a model and keep what its routers decided; installed edits apply.

    Args:
        model: a model with routers as in transformers (they return logits, gates and choices), or with the
            mixtures of `actlas.nn`.
        data: documents or strings.
        tokens, context, per_document: how much is read, in tokens.
        inputs: keep what the routers read, too.

    Raises:
        ModelError: the model has no router. InputError: no tokens. NonFiniteError: NaN in router logits.
    """
    found = _routers(model)
    if not found:
        raise ModelError(f"{model.name} has no router; a routing trace needs a mixture of experts")
    layers = tuple(found)
    held: dict[int, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {n: [] for n in layers}
    windows, documents, names = [], [], dict[str, int]()
    count = 0
    now: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
    with _watching(found, now):
        site = f"blocks.{layers[-1]}.resid_post"
        for trace in read(model, data, site, tokens=tokens, context=context, per_document=per_document):
            assert trace.mask is not None
            mask = trace.mask.cpu()
            here, index = token_rows(trace)
            ids = np.array([names.setdefault(name, len(names)) for name in here])
            documents.append(ids[index])
            line = torch.arange(len(mask)).unsqueeze(1).expand(mask.shape)[mask].numpy()
            windows.append(line + count)
            count += len(mask)
            for n in layers:
                held[n].append(tuple(t.cpu()[mask.reshape(-1)] for t in now.pop(n)))  # type: ignore[arg-type]
    if not windows:
        raise InputError("no tokens to route: give at least one document")
    parts = [[torch.cat(list(p)) for p in zip(*held[n], strict=True)] for n in layers]
    for n, part in zip(layers, parts, strict=True):
        if not bool(torch.isfinite(part[0]).all()):
            raise NonFiniteError(f"router logits of block {n} have NaN or infinity; the model's weights may")
    return RoutingTrace(
        layers,
        tuple(p[2] for p in parts),
        tuple(p[1].bool() for p in parts),
        tuple(p[0] for p in parts),
        np.concatenate(windows),
        np.concatenate(documents),
        tuple(p[3] for p in parts) if inputs else (),
        tuple(getattr(m, "top_k", None) for m in found.values()),
    )


def gini(x: NDArray[np.float64]) -> float:
    """Return the Gini coefficient of loads: 0 if all are equal, near 1 if one expert gets everything."""
    ordered = np.sort(np.asarray(x, float))
    n, total = len(ordered), float(ordered.sum())
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * total)) if total else 0.0


@method(
    "expert-load",
    room="measure",
    returns="Measurement",
    data="corpus",
    summary="how unevenly a mixture's experts are used: the Gini coefficient of their loads, per layer",
    example="actlas fit expert-load my-mixtral/ prose",
    papers=("moetuner",),
)
def expert_load(model: Model, data: Any, *, tokens: int = 8192, context: int = 256) -> list[Measurement]:
    """Return, per layer, the Gini coefficient of expert loads.

    Args:
        model, data, tokens, context: as of `trace_routing`.
    """
    trace = trace_routing(model, data, tokens=tokens, context=context)
    out = []
    for layer, active in zip(trace.layers, trace.active, strict=True):
        load = active.double().sum(0).numpy()
        share = load / max(1.0, load.sum())
        details = {"busiest": float(share.max()), "unused": int((load == 0).sum()), "experts": len(load)}
        out.append(
            Measurement(
                "expert-load",
                gini(load),
                "fraction",
                len(trace),
                group={"layer": str(layer)},
                details=details,
            )
        )
    return out


def _routers(model: Model) -> dict[int, nn.Module]:
    """Return the module whose call says where a block's tokens go, by block."""
    found: dict[int, nn.Module] = {}
    tap = model.tower.sites.get("moe.router") if model.tower is not None else None
    for number in range(model.n_blocks or 0):
        root = model.block(number)
        router = find(root, tap.module) if isinstance(tap, Tap) else None
        if router is None or not hasattr(router, "top_k"):
            own = [m for m in root.modules() if callable(getattr(m, "route", None))]
            router = own[0] if own else None
        if router is not None:
            found[number] = router
    return found


@contextmanager
def _watching(
    found: dict[int, nn.Module], now: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]]
) -> Iterator[None]:
    """Keep what each router says of the current batch: logits, active, gates `[n, E]`, inputs."""

    def watch(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x = args[0].detach()
            x = x.reshape(-1, x.shape[-1])
            if callable(getattr(module, "route", None)):
                with torch.no_grad():
                    said = module.route(x)  # type: ignore[operator]
                if hasattr(said, "active"):  # a varying number of experts
                    now[number] = (said.scores.float(), said.active, said.gates.float(), x)
                    return
                logits, gates, chosen = said.scores, said.gates, said.experts
            elif isinstance(output, tuple) and len(output) == 3:
                logits, gates, chosen = output
            else:
                raise ModelError(
                    f"the router of block {number} ({type(module).__name__}) returns "
                    f"{type(output).__name__}; a routing trace needs (logits, gates, choices), as "
                    "transformers 5 has it"
                )
            logits, gates = logits.detach().float(), gates.detach().float()
            full = torch.zeros_like(logits).scatter(1, chosen, gates)
            active = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device).scatter(
                1, chosen, True
            )
            now[number] = (logits, active, full, x)

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in found.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
