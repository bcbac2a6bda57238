"""Cross-model activation patching (CMAP): put parts of a fine-tuned model's run into its base model's run.

    z_h(base)  <-  z_h(tuned)          the same prompts through both models, chosen heads at chosen positions

If the base model then does the task, the gain of fine-tuning sits in what these heads write (`what="out"`),
or in the queries, keys or values they compute. With keys and values every token's are replaced, since the
head reads them all, and the head's output is put back at every position but its own. Both models must have
the same shape. Controls: as many random heads, and all heads.

Source: Prakash et al. 2024 (arXiv 2402.14811), section 6 and its repository's `cmap_utils.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actlas.circuits.nodes import Node, head
from actlas.circuits.prefix import KeysValues, last_columns
from actlas.circuits.sources import at
from actlas.core.errors import InputError, ModelError
from actlas.core.hooks import attach
from actlas.core.measurement import Measurement
from actlas.measure.samples import mean_measurement, rate_measurement

if TYPE_CHECKING:
    from actlas.circuits.batch import PromptPairs
    from actlas.core.model import Model

What = Literal["out", "q", "k", "v"]


class CrossModel:
    """Prompts through a base model and its tuned child, with parts of the child put into the base.

    Args:
        base, tuned: two causal language models of the same shape.
        pairs: prompts, of which the clean side is used.
        what: `"out"` (head outputs), `"q"`, `"k"` or `"v"`.
        position: of the heads, as for a node.

    Raises:
        ModelError: models of different shapes. InputError: an unknown `what`.
    """

    def __init__(
        self,
        base: Model,
        tuned: Model,
        pairs: PromptPairs,
        *,
        what: What = "out",
        position: int | str = "last",
    ) -> None:
        if what not in ("out", "q", "k", "v"):
            raise InputError(f"what is {what!r}; it must be 'out', 'q', 'k' or 'v'")
        found = base.fingerprint.differences(tuned.fingerprint)
        if found:
            raise ModelError(
                f"{base.name} and {tuned.name} differ in {', '.join(found)}; give parent and child"
            )
        if base.tower is None:
            raise ModelError(f"{base.name} has no layout, so its heads are not known")
        self.base, self.tuned, self.pairs, self.what = base, tuned, pairs, what
        self.blocks, self.heads = base.tower.n_blocks, base.tower.heads
        self._share = (
            1 if what in ("out", "q") else base.tower.heads // (base.tower.kv_heads or base.tower.heads)
        )
        self._mask = at(pairs, position) & pairs.clean["attention_mask"].bool()
        kind = "attn.z" if what == "out" else f"attn.{what}"
        self._sites = {b: base.resolve(f"blocks.{b}.{kind}")[0] for b in range(self.blocks)}
        self._outs = {b: base.resolve(f"blocks.{b}.attn.z")[0] for b in range(self.blocks)}
        self._values = self._read(tuned, self._sites)
        # Keys and values of earlier tokens change too, and so would what other tokens see of these heads.
        self._restore = what in ("k", "v")
        self._own = self._read(base, self._outs) if self._restore else {}
        first = int(self._mask.any(0).to(torch.int8).argmax())
        self._start = 0 if self._restore else first
        self._kept = None if self._restore else KeysValues.run(base, pairs.clean, first)
        if self._kept is None:
            self._start = 0

    def _read(self, model: Model, sites: dict[int, Any]) -> dict[int, Tensor]:
        trace = model.trace(dict(self.pairs.clean), [s.name for s in sites.values()])
        return {b: trace[s.name] for b, s in sites.items()}

    def logits(self, heads: Sequence[tuple[int, int]]) -> Tensor:
        """Return the base's last logits `[n, vocab]` with these heads taken from the child."""
        for block, number in heads:
            if not (0 <= block < self.blocks and 0 <= number < self.heads):
                raise InputError(f"there is no head {block}.{number} in {self.blocks} x {self.heads} heads")
        start, n = self._start, len(self.pairs)
        if self._kept is None:
            encoded = last_columns(self.base, self.pairs.clean, None, start)
        else:
            encoded = self._kept.arguments(self.base, self.pairs.clean, None, start)
        mask = self._mask[:, start:, None, None]
        with ExitStack() as stack:
            for b in sorted({block for block, _ in heads}):
                mine = sorted({h for block, h in heads if block == b})
                parts = sorted({h // self._share for h in mine})
                where = mask if not self._restore else torch.ones_like(mask)
                write = _write(self._values[b][:, start:], parts, where)
                stack.callback(attach(self.base.module, self._sites[b], write, batch=lambda: n).remove)
                if self._restore:
                    back = _write(self._own[b], mine, ~mask)
                    stack.callback(attach(self.base.module, self._outs[b], back, batch=lambda: n).remove)
            stack.enter_context(torch.no_grad())
            output = self.base._call(encoded)
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def hits(self, heads: Sequence[tuple[int, int]]) -> Tensor:
        """Return whether the answer is the base's first choice under the patch, float64 `[n]`."""
        return (self.logits(heads).argmax(1) == self.pairs.answer_ids).double().cpu()


def cmap(
    base: Model,
    tuned: Model,
    pairs: PromptPairs,
    heads: Sequence[Node],
    *,
    what: What = "out",
    controls: int = 5,
    seed: int = 0,
) -> list[Measurement]:
    """Patch heads of the tuned model into the base and measure how often the answer is right.

    Args:
        base, tuned: parent and child.
        pairs: prompts; the clean side is used.
        heads: the group, all at one position.
        what: `"out"`, `"q"`, `"k"` or `"v"`.
        controls: sets of as many random heads of the same blocks' number.
        seed: of the controls and intervals.

    Returns:
        `CMAP accuracy` of base, tuned, group, random heads and all heads; `CMAP gain` of the group and of
        random heads, and their difference, each as a share of the gap between base and tuned.

    Raises:
        InputError: no heads, or heads at several positions. ModelError: models of different shapes.
    """
    if not heads or any(n.kind != "attn.z" or n.index is None for n in heads):
        raise InputError("give at least one head, e.g. head(20, 3, 'last')")
    places = {n.position for n in heads}
    if len(places) > 1:
        raise InputError(f"the heads lie at {len(places)} positions; patch one group at a time")
    runs = CrossModel(base, tuned, pairs, what=what, position=places.pop())
    chosen = [(n.block, n.index) for n in heads if n.index is not None]
    every = [(b, h) for b in range(runs.blocks) for h in range(runs.heads)]
    pool = [x for x in every if x not in chosen]
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        [pool[i] for i in torch.randperm(len(pool), generator=generator)[: len(chosen)].tolist()]
        for _ in range(controls)
    ]
    own = {m: m_hits(model, pairs) for m, model in (("base", base), ("tuned", tuned))}
    hits = {**own, "group": runs.hits(chosen), "all heads": runs.hits(every)}
    random = torch.stack([runs.hits(x) for x in drawn]).mean(0) if drawn else None
    options: dict[str, Any] = {"seed": seed}
    found = [
        rate_measurement("CMAP accuracy", x.numpy(), group={"run": k, "what": what}, **options)
        for k, x in hits.items()
    ]
    if random is not None:
        note = f"{controls} sets of {len(chosen)} random heads"
        group = {"run": "random heads", "what": what}
        found.append(
            mean_measurement(
                "CMAP accuracy", "fraction", random.numpy(), over="prompts", group=group, note=note, **options
            )
        )
    gap = float((own["tuned"] - own["base"]).mean())
    gains = {"group": hits["group"] - own["base"], "all heads": hits["all heads"] - own["base"]}
    if random is not None:
        gains |= {"random heads": random - own["base"], "group minus random": hits["group"] - random}
    for name, gain in gains.items():
        if gap > 0:
            note = "share of the gap between base and tuned"
            group = {"run": name, "what": what}
            found.append(
                mean_measurement(
                    "CMAP gain", "fraction", (gain / gap).numpy(), over="prompts", group=group, note=note,
                    **options,
                )
            )  # fmt: skip
    return found


def m_hits(model: Model, pairs: PromptPairs) -> Tensor:
    """Return whether the answer is a model's first choice after the clean prompts, float64 `[n]`."""
    return (pairs.last_logits(model).argmax(1) == pairs.answer_ids).double().cpu()


def heads_of(labels: Sequence[tuple[int, int]], position: int | str = "last") -> list[Node]:
    """Return nodes of (block, head) pairs at one position."""
    return [head(b, h, position) for b, h in labels]


def _write(values: Tensor, parts: Sequence[int], where: Tensor) -> Any:
    index = list(parts)

    def write(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, index] = torch.where(where, values[:, :, index].to(x), x[:, :, index])
        return x

    return write
