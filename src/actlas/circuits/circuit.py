"""A circuit as data: which parts and edges carry a task, and how well they were tested.

circuit = find_circuit(model, "ioi")         # circuit_search.py
circuit.nodes, circuit.edges, circuit.scores
circuit.save("circuit/"); Circuit.load("circuit/")
circuit.to_html("c.html"); circuit.save_png("c.png")
with model.edit(circuit.ablate_rest()): ...   # every head and MLP outside it replaced by its mean
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.circuits.edge_attribution import Edge
from actlas.circuits.graph import INPUT, LOGITS, Graph
from actlas.circuits.position_means import PositionMeanAblate
from actlas.core.artifact import atomic_write, load_artifact, save_artifact
from actlas.core.edit import Edit, compose
from actlas.core.errors import ArtifactError, InputError
from actlas.core.fingerprint import Fingerprint
from actlas.core.measurement import Measurement

if TYPE_CHECKING:
    from actlas.core.model import Model


@dataclass(frozen=True, eq=False)
class Circuit:
    """Nodes and edges of a model that carry a task.

    Attributes:
        model, task: their names.
        graph: the model's sizes.
        edges: the edges, largest score first.
        method: how they were found.
        scores: what was measured on prompts kept apart: faithfulness, controls, remainder, ...
        losses: what the circuit loses without each part.
        curve: faithfulness of circuits of other sizes: `{"edges", "parts", "faithfulness", "low", "high",
            "random"}`.
        means: site -> mean outputs by position (see `PositionMeanAblate`), for `ablate_rest`.
        fingerprint: of the model.
        seed: of every random choice.
        notes: what a reader must know.
    """

    model: str
    task: str
    graph: Graph
    edges: tuple[Edge, ...]
    method: str
    scores: tuple[Measurement, ...] = ()
    losses: tuple[Measurement, ...] = ()
    curve: tuple[Mapping[str, float], ...] = ()
    means: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    fingerprint: Fingerprint | None = field(default=None, repr=False)
    seed: int = 0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        writers, receivers = set(self.graph.writers), set(self.graph.receivers)
        for edge in self.edges:
            if edge.source not in writers or edge.target not in receivers:
                raise InputError(f"this graph has no edge {edge.source!r} -> {edge.target!r}")
        if not self.edges:
            raise InputError("a circuit has at least one edge")

    @cached_property
    def mask(self) -> Tensor:
        """The edges as bool `[receivers, writers]`."""
        rows = {name: i for i, name in enumerate(self.graph.receivers)}
        columns = {name: i for i, name in enumerate(self.graph.writers)}
        found = torch.zeros_like(self.graph.allowed)
        for e in self.edges:
            found[rows[e.target], columns[e.source]] = True
        return found

    @property
    def nodes(self) -> tuple[str, ...]:
        """Its heads and MLPs in order, e.g. `("MLP 0", "L3H2", "MLP 5")`."""
        return tuple(self.graph.writers[w] for w in self.graph.parts(self.mask))

    def score(self, name: str) -> Measurement:
        """Return one of its scores.

        Raises:
            InputError: it was not measured.
        """
        found = next((m for m in self.scores if m.name == name), None)
        if found is None:
            raise InputError(f"{name!r} was not measured; there are {', '.join(m.name for m in self.scores)}")
        return found

    def ablate_rest(self) -> Edit:
        """Return the edit that replaces every head and MLP outside the circuit by its mean.

        Means are by position, over the clean and corrupted prompts that the circuit was searched on. The
        circuit's own parts see whatever these make of the stream, so this tests its parts, not its edges.

        Raises:
            InputError: the circuit was made without means.
        """
        return ablate_all_but(self, self.nodes)

    def save(self, path: str | Path) -> Path:
        """Save as a folder of JSON and safetensors.

        Raises:
            InputError: somebody else's folder. FailureError: it could not be written.
        """
        manifest = {
            "model": self.model,
            "task": self.task,
            "graph": asdict(self.graph),
            "nodes": list(self.nodes),
            "edges": [asdict(e) for e in self.edges],
            "method": self.method,
            "scores": [m.to_json() for m in self.scores],
            "losses": [m.to_json() for m in self.losses],
            "curve": [dict(r) for r in self.curve],
            "fingerprint": None if self.fingerprint is None else self.fingerprint.to_json(),
            "seed": self.seed,
            "notes": list(self.notes),
        }
        return save_artifact(path, "circuit", manifest, dict(self.means))

    @classmethod
    def load(cls, path: str | Path, model: Model | None = None) -> Circuit:
        """Load a saved circuit.

        Args:
            path: the folder.
            model: checked against the one it was found in.

        Raises:
            ArtifactError: not a whole circuit. FingerprintError: found in another model.
        """
        manifest, tensors = load_artifact(path, "circuit")
        try:
            given = manifest["fingerprint"]
            fingerprint = None if given is None else Fingerprint.from_json(given, path)
            made = cls(
                str(manifest["model"]),
                str(manifest["task"]),
                Graph(**manifest["graph"]),
                tuple(Edge(**e) for e in manifest["edges"]),
                str(manifest["method"]),
                tuple(Measurement.from_json(m) for m in manifest["scores"]),
                tuple(Measurement.from_json(m) for m in manifest["losses"]),
                tuple(manifest["curve"]),
                tensors,
                fingerprint,
                int(manifest["seed"]),
                tuple(manifest["notes"]),
            )
        except (KeyError, TypeError, ValueError, InputError) as error:
            raise ArtifactError(f"{path} holds an incomplete circuit ({error}); save it again") from error
        if model is not None and fingerprint is not None:
            fingerprint.check(model.fingerprint, str(path))
        return made

    def to_html(self, path: str | Path) -> Path:
        """Write the circuit as one page that works offline: graph, scores, curve, parts and edges."""
        from actlas.circuits.circuit_page import page

        return atomic_write(path, page(self))

    def save_png(self, path: str | Path) -> Path:
        """Write the graph as a PNG picture."""
        from actlas.circuits.draw import png

        return atomic_write(path, png(self))

    def save_svg(self, path: str | Path) -> Path:
        """Write the graph as an SVG picture, a tenth of the PNG's size, with tooltips."""
        from actlas.circuits.draw import svg

        return atomic_write(path, svg(self) + "\n")

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary, without the means."""
        return {
            "model": self.model, "task": self.task, "method": self.method, "nodes": list(self.nodes),
            "edges": [asdict(e) for e in self.edges], "scores": [m.to_json() for m in self.scores],
            "losses": [m.to_json() for m in self.losses], "curve": [dict(r) for r in self.curve],
            "seed": self.seed, "notes": list(self.notes),
        }  # fmt: skip

    def __repr__(self) -> str:
        return f"<Circuit of {self.model} on {self.task}: {len(self.nodes)} parts, {len(self.edges)} edges>"


def ablate_all_but(circuit: Circuit, nodes: Sequence[str]) -> Edit:
    """Return the edit that replaces every head and MLP except some by its mean at the position.

    Args:
        circuit: where the means and the graph come from.
        nodes: the parts that stay.

    Raises:
        InputError: an unknown part, a circuit without means, or one that leaves nothing out.
    """
    if not circuit.means:
        raise InputError(
            "this circuit holds no means to put in the place of the rest; make it by find_circuit"
        )
    graph, kept = circuit.graph, set(nodes)
    wrong = kept - set(graph.writers[1:])
    if wrong:
        raise InputError(f"there is no part {sorted(wrong)[0]!r}; parts are called e.g. L5H3 or 'MLP 5'")
    prefix = next(iter(circuit.means)).split("blocks.")[0]
    edits: list[Edit] = []
    for b in range(graph.blocks):
        heads = tuple(h for h in range(graph.heads) if f"L{b}H{h}" not in kept)
        z, out = f"{prefix}blocks.{b}.attn.z", f"{prefix}blocks.{b}.mlp.out"
        if heads:
            edits.append(PositionMeanAblate(z, circuit.means[z], heads))
        if f"MLP {b}" not in kept:
            edits.append(PositionMeanAblate(out, circuit.means[out]))
    if not edits:
        raise InputError("every head and MLP is in the circuit, so there is no rest to ablate")
    made = compose(edits)
    return made if circuit.fingerprint is None else made.bind(circuit.fingerprint)


__all__ = ["INPUT", "LOGITS", "Circuit", "Edge", "ablate_all_but"]
