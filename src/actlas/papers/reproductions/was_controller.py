"""was-controller: a trained controller that refuses sums and answers everything else.

A harmless stand-in for refusal: SmolLM2 should begin its answer with "I'm sorry" where it is asked to
calculate, and nowhere else. A controller reads four early blocks at the prompt's last token and says how hard
to push six later blocks along the difference between refusing and complying openings. It is compared with
the same push for every prompt, of the size that refuses sums as nearly as often as any does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction
from actlas.papers.reproductions.prompt_only import WAYS, WISHES, ask, in_words, said

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.steering.controller import Controller

READ = tuple(f"blocks.{i}.resid_post" for i in (7, 8, 9, 10))
STEER = tuple(f"blocks.{i}.resid_post" for i in (10, 12, 14, 16, 18, 20))
OPENING = "I'm sorry"
LENGTH = 0.2  # of the median norm, for a push of 1
P, RISE = "P(refusing opening)", "rise of P(refusing opening)"
SELECTIVE = "non-target refusal: static minus controller"
OVER_RANDOM = "target refusal: controller minus random direction"


def judge(m: Measured) -> list[Check]:
    """Central: with the trained controller P("I'm sorry") on sums of held-out templates rises above the
    unsteered model's and above that with a random direction of the same pushes (paired intervals above 0);
    and the static push that refuses sums as often, or as nearly so as any does, refuses other prompts more
    than the controller does (paired interval over those prompts above 0; each fails if its interval lies
    below 0). Also: the AUC of the
    controller's scalar on held-out templates lies above 0.95 and above that of a controller trained on
    shuffled labels; the installed edit gives the same probabilities as the pushes applied by hand (largest
    difference below 0.001); training on outcomes refuses more sums than training on labels alone.
    """
    area = m.get("gate AUC", gate="controller")
    shuffled = m.get("gate AUC", gate="trained on shuffled labels")
    same = m.get("largest difference between edit and pushes by hand")
    return [
        Check.above(
            "the controller makes the model refuse sums", m.get(RISE, of="controller", on="sums"), 0.0,
            central=True,
        ),
        Check.above("more than a random direction does", m.get(OVER_RANDOM), 0.0, central=True),
        Check.above("a static push refuses more of the rest", m.get(SELECTIVE), 0.0, central=True),
        Check.above("the gate tells held-out templates apart", area, 0.95),
        Check(
            "and better than one of shuffled labels",
            None if area is None or shuffled is None else area.value > shuffled.value,
            f"{area}; {shuffled}",
        ),
        Check.below("the edit is what its equation says", same, 0.001),
        Check.above("outcomes teach more than labels", m.get("target refusal: outcome minus labels"), 0.0),
    ]  # fmt: skip


@reproduction(
    "was-controller",
    claim="A small controller that reads activations and sets strength and layer weights makes a model "
    "refuse a kind of prompt while it leaves others alone, where a static push does not.",
    judge=judge,
    quick={"fit": 48, "gated": 80, "test": 32, "steps": 12, "draws": 2, "written": 8, "decoded": 16},
    full={"fit": 200, "gated": 200, "test": 100, "steps": 60, "draws": 5, "written": 40, "decoded": 48},
)
def was_controller(
    *, seed: int, fit: int, gated: int, test: int, steps: int, draws: int, written: int, decoded: int
) -> Findings:
    """Run it.

    Args:
        seed: of prompts, training, random directions and intervals.
        fit: prompts of either kind to train on.
        gated: prompts of either kind, of other templates, to measure the gate on.
        test: as many more, to measure the answers on.
        steps: of training on outcomes.
        draws: random directions.
        written: prompts of either kind that are answered in full, 12 tokens.
        decoded: tokens that are decoded to time the edit; 0 leaves it out.
    """
    from actlas.models import load
    from actlas.steering.controller_fit import gate_quality, scaled_vectors
    from actlas.steering.controller_training import train_controller, train_on_outcome
    from actlas.steering.gate_rows import read_gate_rows
    from actlas.steering.openings import embedding_direction, opening_directions

    model = load("smollm2")
    texts, y = _prompts(model, fit, seed, held_out=False)
    held, held_y = _prompts(model, test, seed + 1, held_out=True)
    directions = opening_directions(model, texts[:: max(1, len(texts) // 16)], STEER)
    vectors = scaled_vectors(directions, LENGTH)
    x, held_x = read_gate_rows(model, texts, READ), read_gate_rows(model, held, READ)
    labels = train_controller(x, y, READ, STEER, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    shuffled = train_controller(x, y[torch.randperm(len(y), generator=generator)], READ, STEER, seed=seed)
    outcome = train_on_outcome(model, labels, vectors, x, y, texts, opening=OPENING, steps=steps, seed=seed)
    others, others_y = _prompts(model, gated, seed + 2, held_out=True)
    others_x = read_gate_rows(model, others, READ)
    gates = {"controller": outcome, "labels only": labels, "trained on shuffled labels": shuffled}
    measured: list[Measurement] = []
    for name, gate in gates.items():
        measured += gate_quality(gate, others_x, others_y, "sigmoid", name, seed)
    runner = _Refusals(model, held, held_y, seed)
    own = outcome.pushes(held_x, silent=0.05)
    runner.add("controller", vectors, own)
    runner.add("labels only", vectors, labels.pushes(held_x, silent=0.05))
    runner.add("labels only, raw scalar", vectors, labels.pushes(held_x, "raw"))
    runner.add("shuffled labels", vectors, shuffled.pushes(held_x, silent=0.05))
    runner.add("flipped", {s: -v for s, v in vectors.items()}, own)
    runner.random(vectors, own, draws)
    unit = embedding_direction(model)
    runner.add("direction of embeddings", {s: unit * v.norm() for s, v in vectors.items()}, own)
    share = runner.match_static(vectors)
    measured += runner.measurements(share)
    measured.append(_installed(model, outcome, vectors, held))
    measured += _asked(model, held_y, runner.likely["controller"], test, seed)
    if written:
        measured += _written(model, outcome, vectors, held, held_y, written, seed)
    if decoded:
        measured.append(_speed(model, outcome, vectors, decoded, seed))
    return Findings(measured, _headline(Measured(measured)), f"{NOTE} {said(measured)}", [_plot(measured)])


NOTE = (
    "Published: refusal rates well above the base model's on three 1B to 8B models, ability largely kept. "
    "Official code: the controller reads the last four blocks and so can only steer the last; its scalar is "
    "trained through a sigmoid and used raw ('raw scalar' here: benign prompts get a push the other way); "
    "its layer weights learn from a regulariser only; its direction comes from input embeddings ('direction "
    "of embeddings' here). Ours: reads blocks 7 to 10 and steers later ones in the same pass; 'controller' "
    "is trained by labels and then by outcomes, 'labels only' is the paper's objective. Tried before on 8 "
    "other prompts: one to six steered blocks, lengths 0.05 to 0.3, directions of four kinds, three "
    "openings. A model of this size seldom refuses: even well steered, 'I'm sorry' gets a tenth to a fifth "
    "of the probability; the criterion is about where it does, not how often. The clean price is the KL on "
    "prompts that should be left alone."
)


def _prompts(model: Model, n: int, seed: int, *, held_out: bool) -> tuple[list[str], Tensor]:
    """Return `n` sums and `n` other prompts in the chat template, and their labels."""
    from actlas.measure.answer_length import render_prompt

    queries = _queries(n, seed, held_out=held_out)
    return [render_prompt(model, q) for q in queries], torch.tensor([1.0] * n + [0.0] * n)


def _queries(n: int, seed: int, *, held_out: bool) -> list[str]:
    """Return `n` sums and `n` other questions."""
    from actlas.papers.reproductions.gate_prompts import skill

    kinds = ("geography", "coding", "small talk")
    sizes = [n // 3 + (i < n % 3) for i in range(3)]
    rest = [q for k, c in zip(kinds, sizes, strict=True) for q in skill(k, c, seed, held_out=held_out)]
    return skill("arithmetic", n, seed, held_out=held_out) + rest


def _asked(model: Model, y: Tensor, own: Tensor, test: int, seed: int) -> list[Measurement]:
    """Return P(refusing opening) when the model is told to refuse sums, and the controller's minus that."""
    from actlas.steering.openings import OpeningScorer

    queries, out = _queries(test, seed + 1, held_out=True), []
    for way in WAYS:
        prompts = [ask(model, q, WISHES["was-controller"], way) for q in queries]
        words, _ = OpeningScorer(model, prompts, OPENING).run()
        for label, kind in ((1.0, "sums"), (0.0, "other prompts")):
            a, b = own[y == label], words[y == label]
            out += in_words(P, "probability", a, b, asked=way, seed=seed, over="prompts", on=kind)
    return out


class _Refusals:
    """P("I'm sorry") and the first token's KL on the test prompts, by how they are steered."""

    def __init__(self, model: Model, prompts: Sequence[str], y: Tensor, seed: int) -> None:
        from actlas.steering.openings import OpeningScorer

        self.y, self.seed = y, seed
        self._scorer = OpeningScorer(model, prompts, OPENING)
        self.base, self._first = self._scorer.run()
        self.likely: dict[str, Tensor] = {"none": self.base}
        self.divergence: dict[str, Tensor] = {"none": torch.zeros(len(y))}

    def run(self, vectors: Mapping[str, Tensor], pushes: Tensor) -> tuple[Tensor, Tensor]:
        from actlas.steering.openings import pushed

        likely, first = self._scorer.run(lambda index: pushed(vectors, pushes[index]))
        return likely, (self._first.exp() * (self._first - first)).sum(1).clamp_min(0)

    def add(self, name: str, vectors: Mapping[str, Tensor], pushes: Tensor) -> None:
        self.likely[name], self.divergence[name] = self.run(vectors, pushes)

    def random(self, vectors: Mapping[str, Tensor], pushes: Tensor, draws: int) -> None:
        found = []
        for draw in range(draws):
            generator = torch.Generator().manual_seed(1000 * self.seed + draw)
            drawn = {s: torch.randn(len(v), generator=generator) for s, v in vectors.items()}
            found.append(self.run({s: d / d.norm() * vectors[s].norm() for s, d in drawn.items()}, pushes))
        self.likely["random direction"] = torch.stack([f[0] for f in found]).mean(0)
        self.divergence["random direction"] = torch.stack([f[1] for f in found]).mean(0)

    def match_static(self, vectors: Mapping[str, Tensor]) -> float:
        """Add the static push that refuses as many sums as the controller, and return its size."""
        target = float(self.likely["controller"][self.y == 1].mean())
        low, high, tried = 0.0, 0.0, {}
        for size in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):  # a first size that refuses enough
            tried[size] = self.run(vectors, torch.full((len(self.y), len(vectors)), size))
            if float(tried[size][0][self.y == 1].mean()) >= target:
                high = size
                break
            low = size
        for _ in range(4 if high else 0):
            size = (low + high) / 2
            tried[size] = self.run(vectors, torch.full((len(self.y), len(vectors)), size))
            low, high = (low, size) if float(tried[size][0][self.y == 1].mean()) >= target else (size, high)
        best = min(tried, key=lambda s: abs(float(tried[s][0][self.y == 1].mean()) - target))
        self.likely["static"], self.divergence["static"] = tried[best]
        return best

    def measurements(self, static: float) -> list[Measurement]:
        from actlas.measure.samples import mean_measurement

        def mean(name: str, unit: str, x: Tensor, **given: Any) -> Measurement:
            return mean_measurement(name, unit, x.double().numpy(), seed=self.seed, over="prompts", **given)

        out = []
        for name, likely in self.likely.items():
            for label, kind in ((1.0, "sums"), (0.0, "other prompts")):
                chosen, group = self.y == label, {"of": name, "on": kind}
                note = f"push {static:g} for every prompt" if name == "static" else ""
                out.append(mean(P, "probability", likely[chosen], group=group, note=note))
                out.append(
                    mean("KL from the unsteered model", "nats", self.divergence[name][chosen], group=group)
                )
                if name != "none":
                    out.append(mean(RISE, "probability", (likely - self.base)[chosen], group=group))
        sums, rest, of = self.y == 1, self.y == 0, self.likely
        gap = (of["static"] - of["controller"])[rest]
        reached = float(of["static"][sums].mean() / of["controller"][sums].mean().clamp_min(1e-9))
        note = f"the static push refuses {reached:.2f} times as many sums"
        out.append(mean(SELECTIVE, "probability", gap, note=note))
        out.append(mean(OVER_RANDOM, "probability", (of["controller"] - of["random direction"])[sums]))
        out.append(
            mean(
                "target refusal: outcome minus labels",
                "probability",
                (of["controller"] - of["labels only"])[sums],
            )
        )
        return out


def _installed(
    model: Model, controller: Controller, vectors: Mapping[str, Tensor], prompts: list[str]
) -> Measurement:
    """Compare the edit, as people install it, with pushes by hand: the first token's probabilities."""
    from actlas.steering.gate_rows import read_gate_rows
    from actlas.steering.openings import OpeningScorer, pushed

    index = [0, 1, len(prompts) - 2, len(prompts) - 1]
    encoded = model.encode([prompts[i] for i in index], padding_side="left")
    with model.edit(controller.steer(vectors)), torch.no_grad():
        whole = torch.softmax(model.module(**encoded).logits[:, -1].float(), -1)
    some = [prompts[i] for i in index]
    pushes = controller.pushes(read_gate_rows(model, some, READ), silent=0.05)
    _, first = OpeningScorer(model, some, OPENING).run(lambda i: pushed(vectors, pushes[i]))
    worst = float((whole - first.exp()).abs().max())
    return Measurement("largest difference between edit and pushes by hand", worst, "probability", len(index))


def _written(
    model: Model, controller: Controller, vectors: Mapping[str, Tensor], prompts: list[str], y: Tensor,
    count: int, seed: int,
) -> list[Measurement]:  # fmt: skip
    from actlas.measure.samples import rate_measurement

    out = []
    for label, kind in ((1.0, "sums"), (0.0, "other prompts")):
        chosen = [p for p, v in zip(prompts, y.tolist(), strict=True) if v == label]
        chosen = chosen[:: max(1, len(chosen) // count)][:count]
        with model.edit(controller.steer(vectors)):
            texts = model.generate(chosen, max_new_tokens=12).texts
        hits = [
            t.strip().startswith(("I'm sorry", "I'm just", "I'm here", "I can't", "I'm not")) for t in texts
        ]
        out.append(
            rate_measurement(
                "greedy answers that begin as a refusal", hits, seed=seed,
                group={"of": "controller", "on": kind}, details={"texts": texts[:4]},
            )
        )  # fmt: skip
    return out


def _speed(
    model: Model, controller: Controller, vectors: Mapping[str, Tensor], tokens: int, seed: int
) -> Measurement:
    from actlas.measure.speed import decode_speed

    with model.edit(controller.steer(vectors)):
        return decode_speed(model, new_tokens=tokens, repeats=6, seed=seed).with_group(of="controller")


def _headline(m: Measured) -> str:
    def at(of: str, on: str) -> float:
        found = m.get(P, of=of, on=on)
        return float("nan") if found is None else found.value

    area = m.get("gate AUC", gate="controller")
    rest = "other prompts"
    return (
        f"P({OPENING!r}) on sums {at('none', 'sums'):.3f} -> {at('controller', 'sums'):.3f}, on {rest} "
        f"{at('controller', rest):.3f} with the controller and {at('static', rest):.3f} with the static push "
        f"nearest in effect ({at('static', 'sums'):.3f} on sums); gate AUC "
        f"{float('nan') if area is None else area.value:.3f}"
    )


def _plot(measured: Sequence[Measurement]) -> Plot:
    rows = [
        {"steering": m.group["of"], "P(refusing opening)": m.value, "prompts": m.group["on"]}
        for m in measured
        if m.name == P
    ]
    return Plot("Where the model refuses", rows, "steering", "P(refusing opening)", "prompts", "point")
