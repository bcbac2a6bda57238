"""The search: measure what is worth measuring, and choose.

1. Weights. Every format is judged on held-out text; formats that lose nothing by construction are not read.
2. A short race. Each format generates with and without half of its inputs skipped. Skipped inputs can only
   cost quality: where even half of them is no faster than some measured mix of no worse quality, no level of
   them can win, and none is measured (`everything=True` measures them all the same).
3. Levels. In the formats that are left, the level of skipped inputs is bisected to the highest one that keeps
   the quality; every level tried is a row.
4. The race. All rows that fit, and the original, generate in turn; the answer is chosen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from actlas.core.edit import compose
from actlas.core.errors import InputError
from actlas.core.packed_weights import FORMATS, PackedWeights, rounding_error
from actlas.core.progress import format_seconds, progress
from actlas.models.decoder import why_not
from actlas.report.shrink.quality import Judge, Quality
from actlas.report.shrink.race import race
from actlas.report.shrink.result import Shrunk, kernel_level, new_result
from actlas.report.shrink.rows import LEAN, ORIGINAL, Effort, Goal, Measured, Mix, Row, choose, on_frontier
from actlas.report.shrink.skipping import Skipping
from actlas.report.shrink.speed import Speed
from actlas.report.shrink.weights import Layers, grid, lean_reason, original, packed_mixes

if TYPE_CHECKING:
    from actlas.core.model import Model

MOST = 0.6
"""The highest level of skipped inputs that is tried."""
PROBE = 0.5
NEAR = 1.001
"""Qualities within 0.1% of each other count as no worse: intervals are wider than that."""
LEAST_DOCUMENTS = 4


def shrink(
    model: Model | str,
    corpus: Any = None,
    *,
    keep: float | None = 0.01,
    rule: str = "upper",
    bits: float | None = None,
    most_bytes: int | None = None,
    formats: Sequence[str] = FORMATS,
    methods: Sequence[str] | None = None,
    skip: bool = True,
    everything: bool = False,
    effort: Effort = Effort(),
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
    source: str = "",
) -> Shrunk:
    """Search the fastest (or, with a limit on size, the best) way to run a model on this machine.

    Args:
        model: a language model; encoders are shrunk in size only.
        corpus: text; half of its documents calibrate, the other half is measured on. Default: the bundled
            mixture of prose, code and documentation.
        keep: the most that the perplexity may rise, as a fraction; `None`: anything.
        rule: `"upper"`: the upper end of the paired 95% interval must keep within it; `"estimate"`: the
            estimate must (PPL-p%).
        bits: the most bits of a code, on average over the blocks' weights.
        most_bytes: the most bytes of weights.
        formats: packed formats that are tried.
        methods: quantization methods that are tried where the size is limited; default: those of `rtn`,
            `gptq` and `awq` that are installed.
        skip: whether skipped inputs are tried.
        everything: measure mixes that cannot win too, for the plot.
        effort: how much is measured.
        seed: of every random choice.
        say: called with a line on what is going on.
        source: how the model is loaded again; default: its name.

    Raises:
        InputError: a budget below 0, too little text, an unknown format or method.
        ModelError: a model that cannot be judged, or without linear layers.
    """
    from actlas.data import corpus as bundled
    from actlas.models import load

    goal = Goal.checked(keep, rule, bits, most_bytes)
    documents = list(bundled("mixed", seed=seed) if corpus is None else corpus)
    if len(documents) < LEAST_DOCUMENTS:
        raise InputError(
            f"the text is {len(documents)} documents; half calibrates and half is held out, "
            f"so at least {LEAST_DOCUMENTS} are needed"
        )
    loaded = load(model) if isinstance(model, str) else model
    search = Search(loaded, documents, goal, effort, seed, say)
    search.weights(formats)
    if goal.size and search.judge.model.kind in ("causal-lm", "encoder"):
        search.quantised(methods)
    if skip:
        search.levels(everything)
    search.race()
    return search.result(source or (model if isinstance(model, str) else loaded.name))


class Search:
    """One search: its model, what was measured so far, and what it must keep."""

    def __init__(
        self,
        model: Model,
        documents: list[Any],
        goal: Goal,
        effort: Effort,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.goal, self.effort, self.seed, self.say = model, goal, effort, seed, say
        self.fit, self.held = documents[0::2], documents[1::2]
        self.judge = Judge(model, self.held, effort.tokens, effort.context, seed)
        self.layers = Layers(model)
        self.found = Measured()
        self.notes: list[str] = []
        self.speeds: dict[str, Speed] = {}
        self.lossless: set[str] = set()
        self.same: dict[float, Quality] = {}
        self.base = 1.0

    # -- 1. weights -----------------------------------------------------------------------------

    def weights(self, formats: Sequence[str]) -> None:
        """Judge the original and every packed format."""
        mixes = packed_mixes(self.layers, formats)
        with progress("quality of weight formats", total=1 + len(mixes), unit="passes") as advance:
            start = time.perf_counter()
            self.base = self.judge.base()
            spent = time.perf_counter() - start
            self.say(
                f"a pass over the held-out text takes {format_seconds(spent)}; up to {len(mixes) + 6} follow"
            )
            self.take(original(self.layers), Quality(1.0, 1.0, 1.0))
            advance()
            if (found := grid(self.layers)) is not None:
                bits, group = found
                self.note(
                    f"the weights of {self.model.name} already lie on a grid of {bits} bits in groups of "
                    f"{group}; packing them in that format loses nothing, and results near it flatter every "
                    "method"
                )
            for mix in mixes:
                same = not mix.edits or _loses_nothing(mix, self.model)
                if same:
                    self.lossless.add(mix.name)
                self.take(mix, Quality(1.0, 1.0, 1.0) if same else self.judge(mix.edits))
                advance()
        lean = [mix for mix in self.found.mixes.values() if mix.lean]
        if lean and kernel_level() == "baseline":
            self.note(
                "this processor has neither AVX2 nor AVX-512: the kernels run plain code, which is slower"
            )
        if not lean:
            reason = why_not(self.model) if self.model.kind == "causal-lm" else "it generates no text"
            self.note(
                f"the lean loop cannot run {self.model.name} ({reason}), so nothing here makes it faster: "
                "sizes and quality are measured, and speed in transformers"
            )

    def quantised(self, methods: Sequence[str] | None) -> None:
        """Judge quantization methods within the limit on size."""
        from actlas.report.shrink.quantised import quantised_mixes

        perfect = [r for r in self.found.rows.values() if self.goal.small(r) and r.quality == 1.0]
        if perfect:
            self.note(
                f"{perfect[0].name} is small enough and loses nothing, so no quantization method was tried"
            )
            return
        for mix in quantised_mixes(self, methods):
            self.take(mix, self.judge(mix.edits))

    def take(self, mix: Mix, quality: Quality) -> Row:
        """Keep a mix and its quality as a row."""
        runtime = LEAN if mix.lean else "transformers"
        row = Row(
            mix.name,
            mix.weights,
            mix.bits,
            mix.skipped,
            mix.bytes,
            runtime if self.model.kind == "causal-lm" else "forward pass",
            quality.value,
            quality.low,
            quality.high,
            quality.touched,
            fits=self.goal.small(mix) and self.goal.good(quality.value, quality.high),
        )
        self.found.add(mix, row)
        if mix.name != ORIGINAL:
            off = "" if row.fits else " (too much)" if self.goal.small(mix) else " (too large)"
            self.say(f"{mix.name}: {self.judge.what} x {quality.value:.4f}{off}")
        return row

    def note(self, line: str) -> None:
        """Keep a line for the result, and say it."""
        self.notes.append(line)
        self.say(line)

    # -- 2. and 3. skipped inputs ---------------------------------------------------------------

    def levels(self, everything: bool) -> None:
        """Find the highest level of skipped inputs that keeps the quality, where that can win."""
        dense = [
            m for m in self.found.mixes.values() if m.lean and (self.found.rows[m.name].fits or everything)
        ]
        if not dense or self.goal.keep is None:
            return
        skipping = Skipping(
            self.model,
            self.fit,
            tokens=self.effort.calibration,
            gradient_tokens=self.effort.gradients,
            seed=self.seed,
        )
        if not skipping.layers:
            self.note("no layer has a multiple of 32 inputs, so none are skipped")
            return
        half = skipping.probe(PROBE)
        probes = [replace(m, name=f"{m.name}, half skipped", edits=(*m.edits, half)) for m in dense]
        usable = [
            p for p in probes if (reason := lean_reason(self.model, p.edits)) is None or self.unusable(reason)
        ]
        if not usable:
            return
        speeds = self.run([*dense, *usable], repeats=2, what="a short race")
        for mix, probe in zip(dense, probes, strict=True):
            if probe not in usable:
                continue
            best = self.beaten(mix, speeds[probe.name].rate, speeds)
            if best is not None:
                self.note(
                    f"skipping inputs of {mix.name} cannot win: with half of them skipped it writes "
                    f"{speeds[probe.name].rate:.0f} tokens/s, and {best} {speeds[best].rate:.0f} at no worse "
                    f"quality; {'measured all the same' if everything else 'its levels were not measured'}"
                )
                if not everything:
                    continue
            self.bisect(mix, skipping)

    def unusable(self, reason: str) -> bool:
        """Note why inputs cannot be skipped."""
        line = f"inputs are not skipped: {reason}"
        if line not in self.notes:
            self.note(line)
        return False

    def beaten(self, mix: Mix, rate: float, speeds: dict[str, Speed]) -> str | None:
        """Return a measured mix that is as fast as `rate` and as good as `mix`, or `None`."""
        own = (self.found.rows[mix.name].quality or 0.0) * NEAR
        for name, row in self.found.rows.items():
            if row.fits and name in speeds and speeds[name].rate >= rate and (row.quality or 0.0) <= own:
                return name
        return None

    def bisect(self, mix: Mix, skipping: Skipping) -> None:
        """Try levels of skipped inputs until neighbours are one step apart."""
        step = self.effort.step
        low, high, at = 0, round(MOST / step) + 1, max(1, round(0.2 / step))
        with progress(f"levels of skipped inputs, {mix.name}", unit="levels") as advance:
            skipping.prepare()
            while high - low > 1:
                level = round(at * step, 6)
                edit = skipping.edit(level)
                edits = (*mix.edits, edit)
                name = f"{mix.name}, {level:.0%} skipped"
                lossless = mix.name in self.lossless  # formats that lose nothing agree at every level
                quality = self.same.get(level) if lossless else None
                if quality is None:
                    quality = self.judge(edits)
                if lossless:
                    self.same[level] = quality
                row = self.take(replace(mix, name=name, edits=edits, skipped=level), quality)
                low, high = (at, high) if row.fits else (low, at)
                at = (low + high) // 2 if high - low > 1 else at
                advance()

    # -- 4. the race ----------------------------------------------------------------------------

    def race(self) -> None:
        """Measure the speed of every row that matters."""
        keep = [m for name, m in self.found.mixes.items() if name != ORIGINAL]
        self.speeds = self.run(keep, repeats=self.effort.repeats, what="the race")

    def run(self, mixes: Sequence[Mix], *, repeats: int, what: str) -> dict[str, Speed]:
        """Race mixes against the original."""
        return race(self.model, mixes, self.held, written=self.effort.written, repeats=repeats, what=what)

    # -- the result -----------------------------------------------------------------------------

    def result(self, source: str) -> Shrunk:
        """Put everything together and choose."""
        rows = []
        for name, row in self.found.rows.items():
            s = self.speeds.get(name)
            if s is not None:
                row = replace(row, rate=s.rate, speed=s.ratio, speed_low=s.low, speed_high=s.high)
            rows.append(row)
        best = on_frontier(rows)
        chosen = choose(rows, self.goal)
        if chosen is None:
            chosen = ORIGINAL
            self.note(f"nothing measured is {self.goal.say()}; the original is kept")
        rows = [replace(r, frontier=r.name in best, chosen=r.name == chosen) for r in rows]
        mix = self.found.mixes[chosen]
        edits = mix.edits or (PackedWeights(self.layers.formats("f32")),)
        return new_result(
            self.model,
            source,
            self.goal,
            rows,
            compose(edits),
            mix,
            self.judge,
            self.base,
            self.notes,
            self.effort,
            self.seed,
        )


def _loses_nothing(mix: Mix, model: Model) -> bool:
    packed = mix.edits[0]
    return isinstance(packed, PackedWeights) and rounding_error(packed, model.module) == 0.0
