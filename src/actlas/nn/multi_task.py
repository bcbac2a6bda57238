"""Mixtures of experts for several tasks at once: MMoE, PLE and HoME.

All share: experts E_e, softmax gates over the experts that a task may see, a tower (a small MLP) per task.

    MMoE   z_t = sum over all experts of g_t,e E_e(x)                                   (Ma et al. 2018)
    PLE    z_t mixes the shared experts and the task's own                               (Tang et al. 2020,
    CGC) HoME   two levels. Level 1 ("meta"): one gate mixes the shared and one group's experts into z_group,
    and
           one all of them into z_shared. Level 2: task t in group k reads u = [z_group_k ; z_shared] and
           mixes global, group-k and its own experts. Tasks never see other groups' experts.

HoME's other parts (each can be left out):

    experts        E(x) = Swish(BatchNorm(MLP(x))): outputs of different experts are comparable, and half of
    them
                   are not zeroed as behind ReLU
    feature gate   each expert reads x * 2 sigmoid(B A x), B zero at the start: a private view that begins as
    x
    self gate      z += sum over own experts of s_e E_e(x), s = sigmoid(x-dependent) for one expert, softmax
    for
                   several: own experts always get a gradient

Source: "HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou" (2024). The paper's text
was not at hand; the formulas are from a summary and public re-implementations. That the shared level-1 gate
sees all experts is our reading. There is no load-balance loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.errors import InputError, ShapeError

Kind = Literal["mmoe", "ple", "home"]
EXPERT_KINDS = ("relu", "home", "layer_norm")


@dataclass(frozen=True)
class GateRecord:
    """What one gate did with a batch.

    Attributes:
        level: 1 or 2. reader: the task (or group) that the gate belongs to.
        experts: names of the experts it mixes.
        weights: `[n, experts]`, summing to 1.
        own: whether each expert belongs to this reader alone.
        added: `[n]`, the weight that the self gate adds to own experts on top; `None` without one.
    """

    level: int
    reader: str
    experts: tuple[str, ...]
    weights: Tensor
    own: tuple[bool, ...]
    added: Tensor | None = None


class GatedExpert(nn.Module):
    """One expert, with its private view of the input.

    Args:
        d: input channels. hidden: of its MLP. out: output channels.
        kind: `"relu"` (two layers, ReLU), `"home"` (Swish of a batch norm) or `"layer_norm"`.
        rank: of the feature gate; 0 for none.
    """

    def __init__(self, d: int, hidden: int, out: int, kind: str = "home", rank: int = 0) -> None:
        super().__init__()
        if kind not in EXPERT_KINDS:
            raise InputError(f"the kind of experts is {kind!r}; it must be one of {', '.join(EXPERT_KINDS)}")
        self.mlp = nn.Sequential(nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, out))
        norms = {"relu": nn.Identity(), "home": nn.BatchNorm1d(out), "layer_norm": nn.LayerNorm(out)}
        self.norm, self.kind = norms[kind], kind
        self.view_down = nn.Linear(d, rank, bias=False) if rank else None
        self.view_up = nn.Linear(rank, d, bias=False) if rank else None
        if self.view_up is not None:
            nn.init.zeros_(self.view_up.weight)

    def view(self, x: Tensor) -> Tensor:
        """Return what the expert reads of x `[n, d]`; x itself at the start."""
        if self.view_down is None or self.view_up is None:
            return x
        return x * (2 * torch.sigmoid(self.view_up(self.view_down(x))))

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.mlp(self.view(x)))
        return F.relu(z) if self.kind == "relu" else F.silu(z)


class MultiTaskExperts(nn.Module):
    """MMoE, PLE or HoME: one logit per task.

    Args:
        d: input channels.
        groups: group -> its tasks, by prior knowledge. MMoE and PLE use only the tasks.
        kind: `"mmoe"`, `"ple"` or `"home"`.
        hidden, out: of each expert.
        shared, own: number of shared experts, and of experts of each task (and group). MMoE has
            `shared + own * tasks` shared ones, so that kinds can be compared at equal numbers.
        expert: kind of experts; default `"home"` for HoME, else `"relu"`.
        feature_gate: rank of the private views; 0 for none. Default 4 for HoME, else 0.
        self_gate: default on for HoME.
        hierarchy: HoME only: without it there is one level, as in PLE.

    Raises:
        InputError: no task, a task in two groups, an unknown kind, sizes below 1.
    """

    def __init__(
        self,
        d: int,
        groups: Mapping[str, Sequence[str]],
        *,
        kind: Kind = "home",
        hidden: int = 32,
        out: int = 16,
        shared: int = 2,
        own: int = 1,
        expert: str = "",
        feature_gate: int | None = None,
        self_gate: bool | None = None,
        hierarchy: bool = True,
    ) -> None:
        super().__init__()
        if kind not in ("mmoe", "ple", "home"):
            raise InputError(f"kind is {kind!r}; it must be 'mmoe', 'ple' or 'home'")
        self.groups = {g: tuple(tasks) for g, tasks in groups.items()}
        self.tasks = tuple(t for tasks in self.groups.values() for t in tasks)
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise InputError(f"groups hold the tasks {list(self.tasks)}; give at least one, each once")
        if odd := [n for n in (*self.groups, *self.tasks) if not n or "." in n or "/" in n]:
            raise InputError(f"{odd[0]!r} cannot name a task or group; take a name without '.' and '/'")
        for name, value in (("d", d), ("hidden", hidden), ("out", out), ("shared", shared), ("own", own)):
            if value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        home = kind == "home"
        self.d, self.kind = d, kind
        self.hierarchy = home and hierarchy
        self.self_gate = home if self_gate is None else self_gate
        rank = (4 if home else 0) if feature_gate is None else feature_gate
        expert = expert or ("home" if home else "relu")
        self.experts = nn.ModuleDict()
        self.gates = nn.ModuleDict()
        self.self_gates = nn.ModuleDict()

        def add(level: int, owner: str, count: int, width: int) -> None:
            for i in range(count):
                name = f"{level}/{owner}/{i}"
                self.experts[name] = GatedExpert(width, hidden, out, expert, rank)

        def gate(level: int, reader: str, width: int, mine: int) -> None:
            self.gates[f"{level}/{reader}"] = nn.Linear(width, len(self._seen(level, reader)), bias=False)
            if self.self_gate and mine:
                self.self_gates[f"{level}/{reader}"] = nn.Linear(width, mine)

        width, top = d, 1
        if self.hierarchy:
            top = 2
            add(1, "shared", shared, d)
            for g in self.groups:
                add(1, f"group {g}", own, d)
            for reader in ("shared", *(f"group {g}" for g in self.groups)):
                gate(1, reader, d, 0 if reader == "shared" else own)
            width = 2 * out
        if kind == "mmoe":
            add(top, "shared", shared + own * len(self.tasks), width)
        else:
            add(top, "shared", shared, width)
            if home:
                for g in self.groups:
                    add(top, f"group {g}", own, width)
            for t in self.tasks:
                add(top, f"task {t}", own, width)
        for t in self.tasks:
            gate(top, f"task {t}", width, 0 if kind == "mmoe" else own)
        self.top = top
        self.towers = nn.ModuleDict(
            {t: nn.Sequential(nn.Linear(out, out), nn.ReLU(), nn.Linear(out, 1)) for t in self.tasks}
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the logit of each task, `[n]`, for inputs `[n, d]`."""
        return self._run(x, None, None)

    def record(self, x: Tensor) -> tuple[list[GateRecord], dict[str, Tensor]]:
        """Return what every gate did, and the output `[n, out]` of every expert, for inputs `[n, d]`."""
        gates: list[GateRecord] = []
        outputs: dict[str, Tensor] = {}
        training = self.training
        self.eval()
        with torch.no_grad():
            self._run(x, gates, outputs)
        self.train(training)
        return gates, outputs

    def loss(
        self, x: Tensor, labels: Mapping[str, Tensor], weights: Mapping[str, float] | None = None
    ) -> Tensor:
        """Return the sum over tasks of binary cross-entropy.

        Args:
            x: `[n, d]`. labels: task -> 0 or 1, `[n]`. weights: of the tasks; 1 by default.
        """
        logits = self(x)
        parts = [
            (weights or {}).get(t, 1.0) * F.binary_cross_entropy_with_logits(logits[t], labels[t].to(x))
            for t in self.tasks
        ]
        return torch.stack(parts).sum()

    def _seen(self, level: int, reader: str) -> list[str]:
        """Return the experts that a reader's gate mixes, shared ones first and its own last."""
        if level == 1 and reader == "shared" and self.hierarchy:
            owners = ["shared", *(f"group {g}" for g in self.groups)]
        elif reader.startswith("task "):
            task = reader.removeprefix("task ")
            group = next(g for g, tasks in self.groups.items() if task in tasks)
            owners = ["shared", f"group {group}", reader]
        else:
            owners = ["shared", reader]
        return [n for o in owners for n in self.experts if n.rpartition("/")[0] == f"{level}/{o}"]

    def _level(
        self, level: int, reader: str, x: Tensor, run: dict[str, Tensor], gates: list[GateRecord] | None
    ) -> Tensor:
        seen = self._seen(level, reader)
        for name in seen:
            if name not in run:
                run[name] = self.experts[name](x)
        stack = torch.stack([run[n] for n in seen], 1)
        weights = torch.softmax(self.gates[f"{level}/{reader}"](x), -1)
        z = (weights.unsqueeze(-1) * stack).sum(1)
        own = [n.rpartition("/")[0] == f"{level}/{reader}" for n in seen]
        key, added = f"{level}/{reader}", None
        if key in self.self_gates:
            s = self.self_gates[key](x)
            s = torch.sigmoid(s) if s.shape[1] == 1 else torch.softmax(s, -1)
            z = z + (s.unsqueeze(-1) * stack[:, torch.tensor(own)]).sum(1)
            added = s.sum(1)
        if gates is not None:
            mine = tuple(o and reader != "shared" for o in own)
            gates.append(GateRecord(level, reader, tuple(seen), weights, mine, added))
        return z

    def _run(
        self, x: Tensor, gates: list[GateRecord] | None, outputs: dict[str, Tensor] | None
    ) -> dict[str, Tensor]:
        if x.ndim != 2 or x.shape[1] != self.d:
            raise ShapeError(f"{self.kind} reads [n, {self.d}]; it was given {list(x.shape)}")
        run: dict[str, Tensor] = {}
        views: dict[str, Tensor] = {}
        if self.hierarchy:
            common = self._level(1, "shared", x, run, gates)
            for g in self.groups:
                views[g] = torch.cat([self._level(1, f"group {g}", x, run, gates), common], 1)
        out = {}
        # Experts of level 2 that several groups share read each group's own view.
        for g, tasks in self.groups.items():
            here: dict[str, Tensor] = {} if self.hierarchy else run
            read = views.get(g, x)
            for t in tasks:
                z = self._level(self.top, f"task {t}", read, here, gates)
                out[t] = self.towers[t](z).squeeze(-1)
            if outputs is not None and self.hierarchy:
                for name, value in here.items():
                    outputs[name if name not in outputs else f"{name} ({g})"] = value
        if outputs is not None:
            outputs.update(run)
        return out


class HoME(MultiTaskExperts):
    """HoME with its two levels, normalised experts and both gates; arguments as `MultiTaskExperts`."""
