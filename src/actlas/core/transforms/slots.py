"""Slots: the places of a model where a scale, a shift or a rotation can be moved from one weight to another.

    norm       y = norm(x) is read by linear maps only:           weight / s, bias / s  and  columns * s
    head       the same, where the reader gives the model's output
    single     the same, where the norm has one number for all channels (no scale, but rotations pass)
    v_o        attention mixes tokens, not channels:              rows of v / s         and  columns of o * s
    up_down    down reads up * f(gate), or relu(up):              rows of up / s      and  columns of down * s
    qk         scores are q . k, after rotary positions:          rows of q / s         and  rows of k * s
    residual   what norms read and other layers write to:         columns, rows and tables rotated by one R

They are found by what tensors do and not by what layers are called. One small pass with gradients tells which
layer reads what (`dataflow`); then scales are tried in the rows of a batch (`probing`): where multiplying
output channel j of one layer multiplies input channel c of another by the same number, for every token, and
nothing else, the two form a slot and j = index[c], repeated heads included. In the end every slot is tried
with random scales on both sides, and what changes the model's output is refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError
from actlas.core.layout import plain_module, weight_matrix
from actlas.core.model import Model
from actlas.core.transforms.dataflow import Flow, Sources, probe_inputs, record
from actlas.core.transforms.norms import NormUse
from actlas.core.transforms.passing import channels_that_pass
from actlas.core.transforms.probing import Trial, run_trials
from actlas.core.transforms.scores import head_widths, score_slots

Kind = Literal["norm", "single", "head", "v_o", "up_down", "qk", "residual"]
#: Largest relative change of the output that counts as none, in float32 (half precision: 200 times as much).
TOLERANCE = 2e-4
#: Slots depend on the architecture, so a module is searched once.
_FOUND: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Slot:
    """One place where transforms fold.

    Attributes:
        kind: see the module docstring.
        producer: path of the norm or linear map that makes the value (of q for `qk`); of a residual stream:
            the first norm that reads it.
        readers: paths of the linear maps that read it (of k for `qk`; of all reading norms for `residual`).
        width: how many numbers a scale for this slot has.
        rows: row of the producer's weight for each of the `width` channels; `[width]`.
        index: which of the `width` channels each input of a reader is; `[inputs]` (`qk`: each row of q).
        norm: how the producing norm uses its weight.
        groups: `v_o`, `qk`: key-value heads; a rotation mixes the channels of one.
        tied: `qk`: number of the free scale that each channel of k takes (rotary pairs share one).
        writers: `residual`: linear maps that write to the stream.
        tables: `residual`: names of parameters that are added to it (embeddings, positions).
    """

    kind: Kind
    producer: str
    readers: tuple[str, ...]
    width: int
    rows: Tensor
    index: Tensor
    norm: NormUse | None = None
    groups: int = 1
    tied: Tensor | None = None
    writers: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """One line for people."""
        if self.kind == "residual":
            return f"residual stream of {len(self.writers)} writers and {len(self.readers)} norms"
        return f"{self.kind}: {self.producer} -> {', '.join(self.readers)}"

    def __repr__(self) -> str:
        return f"<Slot {self.name} [{self.width}]>"


@dataclass(frozen=True)
class Refused:
    """A place where nothing folds, and why."""

    kind: Kind
    where: str
    reason: str


@dataclass
class Slots(Sequence[Slot]):
    """The slots of a model in the order of its pass; `refused` says where there is none and why."""

    found: list[Slot] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: Any) -> Any:
        return self.found[index]

    def of(self, *kinds: str) -> list[Slot]:
        """Return the slots of some kinds.

        Raises:
            InputError: there is none; the reasons are given.
        """
        found = [s for s in self.found if s.kind in kinds]
        if not found:
            said = "; ".join(f"{r.where}: {r.reason}" for r in self.refused if r.kind in kinds)
            raise InputError(f"no {' or '.join(kinds)} slot to fold into ({said or 'this model has none'})")
        return found

    def reading(self, linear: str) -> Slot | None:
        """Return the slot through which a linear map's input can be scaled, or `None`."""
        return next(
            (s for s in self.found if s.kind not in ("qk", "residual", "single") and linear in s.readers),
            None,
        )

    def why_not(self, linear: str) -> str:
        """Return why a linear map's input cannot be scaled."""
        return next((r.reason for r in self.refused if linear in r.where), "it reads no slot")


def slots(model: Model, inputs: Mapping[str, Any] | None = None) -> Slots:
    """Find the slots of a model.

    Args:
        model: any model that is made of linear maps, norms and attention; no edits must be installed.
        inputs: a small input, of which the first row is used; default: `probe_inputs(model)`.

    Raises:
        InputError: the configuration does not say what the model reads and no `inputs` were given.
    """
    root = plain_module(model.module)
    cached = inputs is None and not model._installations
    if cached and root in _FOUND:
        known: Slots = _FOUND[root]
        return known
    inputs = probe_inputs(model) if inputs is None else inputs
    inputs = {k: v[:1] if isinstance(v, Tensor) and v.ndim else v for k, v in inputs.items()}
    flow = record(model, inputs)
    found = Slots()
    _norm_slots(flow, found)
    _linear_slots(model, inputs, flow, found)
    _keep_exact(model, inputs, found)
    _residual_slots(flow, found)
    order = {path: i for i, path in enumerate(flow.order)}
    found.found.sort(key=lambda s: (s.kind == "residual", order.get(s.producer, 0)))
    if cached:
        _FOUND[root] = found
    return found


def _norm_slots(flow: Flow, out: Slots) -> None:
    readers: dict[str, list[str]] = {}
    for path in flow.linears:
        source = flow.read(path)
        for norm in source.modules & flow.norms.keys():
            readers.setdefault(norm, []).append(path)
    last = flow.order[-1] if flow.order else ""
    for path in (p for p in flow.order if p in flow.norms):
        use, reading = flow.norms[path], readers.get(path, [])
        width = flow.widths[path]
        if not reading:
            out.refused.append(Refused("norm", path, "no linear map reads it directly"))
        elif use.single:
            every = torch.arange(width)
            out.found.append(Slot("single", path, tuple(reading), width, every, every, use))
            where = f"{path} -> {', '.join(reading)}"
            out.refused.append(Refused("norm", where, "its weight is one number for all channels"))
        else:
            every = torch.arange(width)
            kind: Kind = "head" if reading == [last] else "norm"
            out.found.append(Slot(kind, path, tuple(reading), width, every, every, use))


def _linear_slots(model: Model, inputs: Mapping[str, Any], flow: Flow, out: Slots) -> None:
    """Find v_o, up_down and qk: pairs of linear maps with something else between."""
    pairs: list[tuple[str, str]] = []
    sources: dict[str, Sources] = {}
    for path in flow.linears:
        if flow.read(path).modules:  # it reads a norm or another linear map directly
            continue
        sources[path] = flow.read(path, anything=True)
        pairs += [(p, path) for p in sorted(sources[path].modules) if p in flow.linears]
    passing = channels_that_pass(model, inputs, flow, pairs)
    attending = {p: sorted(s.modules, key=flow.order.index) for p, s in sources.items() if _attends(flow, p)}
    asked = {
        path: [p for p in names if (p, path) not in passing or passing[p, path].rows is None] or names
        for path, names in attending.items()
    }
    heads = head_widths(model, inputs, flow, asked)
    mixed: dict[str, list[str]] = {}
    for path, source in sources.items():
        found = {p: passing[p, path] for p in source.modules if (p, path) in passing}
        good = [p for p, x in found.items() if x.rows is not None]
        kind: Kind = "v_o" if path in attending else "up_down"
        if path in attending:
            mixed[path] = [p for p in attending[path] if p not in good]
        if not good:
            names = ", ".join(sorted(source.modules)) or "nothing linear"
            between = ", ".join(sorted(flow.read(path).blocked))
            out.refused.append(
                Refused(kind, f"{names} -> {path}", f"between them is {between}; no scale passes through it")
            )
            continue
        for producer in good:
            rows, index = found[producer].rows, found[producer].index
            assert rows is not None and index is not None
            head = heads.get(path, 0)
            groups = len(rows) // head if head and len(rows) % head == 0 else 1
            out.found.append(Slot(kind, producer, (path,), len(rows), rows, index, groups=groups))
    score_slots(model, inputs, flow, mixed, heads, out)


def _attends(flow: Flow, path: str) -> bool:
    """Tell whether tokens are mixed on the way: attention's products or its fused kernel."""
    node, seen, stack = None, set(), [flow._read.get(path)]
    while stack:
        node = stack.pop()
        if node is None or node in seen or node in flow._made:
            continue
        seen.add(node)
        name = type(node).__name__
        if name.startswith(("ScaledDot", "Softmax", "Bmm", "Baddbmm")):
            return True
        stack += [n for n, _ in node.next_functions]
    return False


def trial_of(slot: Slot, scale: Tensor) -> Trial:
    """Return the trial that puts a scale on both sides of a slot."""
    wide = torch.ones(int(slot.rows.max()) + 1 if slot.kind != "qk" else 1, dtype=scale.dtype)
    if slot.kind == "qk":
        raise InputError("qk slots are tried where they are found")
    return Trial(
        outputs={slot.producer: _put(wide, slot.rows, 1 / scale)},
        inputs=dict.fromkeys(slot.readers, scale[slot.index]),
    )


def _put(whole: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    out = whole.clone()
    out[rows] = values
    return out


def _keep_exact(model: Model, inputs: Mapping[str, Any], out: Slots) -> None:
    """Try each slot with random scales; refuse those that change the output."""
    tried = [s for s in out.found if s.kind != "qk"]
    generator = torch.Generator().manual_seed(7)
    trials = []
    for slot in tried:
        scale = torch.exp(0.5 * torch.randn(slot.width, generator=generator, dtype=torch.float64))
        trial = trial_of(slot, scale)
        width = weight_matrix_rows(model, slot)
        factor = trial.outputs[slot.producer]
        trial.outputs[slot.producer] = torch.cat([factor, factor.new_ones(width - len(factor))])
        trials.append(trial)
    limit = TOLERANCE * (200 if model.dtype in (torch.float16, torch.bfloat16) else 1)
    for slot, outcome in zip(tried, run_trials(model, inputs, trials), strict=True):
        if not outcome.moved <= limit:
            out.found.remove(slot)
            where = f"{slot.producer} -> {', '.join(slot.readers)}"
            reason = "something else reads the value too (a scale changes the output)"
            out.refused.append(Refused(slot.kind, where, reason))


def weight_matrix_rows(model: Model, slot: Slot) -> int:
    """Return how wide the producer's output is."""
    module = model.module.get_submodule(slot.producer)
    return slot.width if slot.norm is not None else weight_matrix(module).shape[0]


def _residual_slots(flow: Flow, out: Slots) -> None:
    """Group norms by what has been added into the values that they read."""
    streams: list[tuple[set[str], list[str], Sources]] = []
    for path in (p for p in flow.order if p in flow.norms):
        source = flow.read(path, sums=True)
        leaves = source.modules | source.parameters
        joined = [s for s in streams if s[0] & leaves]
        for s in joined:
            streams.remove(s)
            leaves = leaves | s[0]
            source = Sources(
                source.modules | s[2].modules,
                source.parameters | s[2].parameters,
                source.blocked | s[2].blocked,
            )
        streams.append((leaves, [n for s in joined for n in s[1]] + [path], source))
    for _, norms, source in streams:
        widths = {flow.widths[n] for n in norms}
        first, width = norms[0], flow.widths[norms[0]]
        if len(norms) == 1 and not source.parameters:
            continue  # a norm inside a layer (of queries and keys), not of a stream
        reason = ""
        if writing := source.modules & flow.norms.keys():
            reason = f"{sorted(writing)[0]} writes to it: a rotation does not pass through a norm's weights"
        elif source.blocked:
            reason = f"{', '.join(sorted(source.blocked))} writes to it, which is no linear map"
        elif unread := [n for n in norms if not any(s.producer == n for s in out.found)]:
            reason = f"{unread[0]} is not read by linear maps alone"
        elif len(widths) > 1:
            reason = f"its norms have several widths ({', '.join(map(str, sorted(widths)))})"
        if reason:
            out.refused.append(Refused("residual", f"stream read by {first}", reason))
            continue
        every = torch.arange(width)
        out.found.append(
            Slot(
                "residual",
                first,
                tuple(norms),
                width,
                every,
                every,
                flow.norms[first],
                writers=tuple(p for p in flow.order if p in source.modules),
                tables=tuple(sorted(source.parameters)),
            )
        )
