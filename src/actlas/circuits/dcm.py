"""Desiderata-based component masking (DCM): which heads of a group carry one piece of information.

    z_h  <-  m_h z_h(base) + (1 - m_h) z_h(source)          at one position, for every head of the group
    minimise  -logit(target) + lam sum_h (1 - m_h)          m in [0, 1], Adam; in the end m_h < 0.5 is patched

A desideratum says what the answer should become if the heads carry a piece of information: the source
prompt differs from the base prompt in it, and the target is the answer that would follow. Heads that need
not be patched to reach the target are not (the penalty). The mask is learned on one part of the triples and
judged on another, beside patching the whole group, random heads of equal number, and nothing.

Source: Davies et al. 2023 (arXiv 2307.03637); Prakash et al. 2024 (arXiv 2402.14811), section 5 and its
repository's `DCM.py` (lam 0.01, Adam 0.1, mask rounded at 0.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actlas.circuits.pair_rows import encode_left
from actlas.circuits.prefix import KeysValues, last_columns, only_columns
from actlas.core.errors import InputError
from actlas.core.hooks import attach
from actlas.core.measurement import Measurement
from actlas.data.single_token import Tokens
from actlas.measure.samples import rate_measurement

if TYPE_CHECKING:
    from actlas.circuits.nodes import Node
    from actlas.core.model import Model

Triple = tuple[str, str, str]


@dataclass(frozen=True, eq=False)
class HeadMask:
    """What DCM learned.

    Attributes:
        group: the heads that were masked.
        mask: `[heads]` float32 in [0, 1]; 1 keeps the base's output, 0 takes the source's.
        measurements: how often the target comes out on test triples under the rounded mask, the whole group,
            random heads of equal number, and nothing.
    """

    group: tuple[Node, ...]
    mask: Tensor
    measurements: tuple[Measurement, ...] = ()

    @property
    def chosen(self) -> tuple[Node, ...]:
        """The heads that are patched after rounding."""
        return tuple(n for n, m in zip(self.group, self.mask.tolist(), strict=True) if m < 0.5)


def dcm(
    model: Model,
    triples: Sequence[Triple],
    group: Sequence[Node],
    *,
    lam: float = 0.01,
    lr: float = 0.1,
    epochs: int = 2,
    batch: int = 8,
    held_out: float = 0.5,
    controls: int = 5,
    name: str = "",
    seed: int = 0,
) -> HeadMask:
    """Learn which heads of a group must be patched to reach the desideratum's targets.

    Args:
        model: a causal language model with a layout and a tokenizer.
        triples: (base prompt, source prompt, target answer), all of equally many tokens; the target is one
            token.
        group: heads, all at the same position counted from the end (`head(20, 3, "last")`).
        lam: price of each patched head, in logits.
        lr, epochs, batch: of Adam.
        held_out: share of the triples that only judge.
        controls: random subsets of the group as large as what was chosen.
        name: of the desideratum, for the measurements.
        seed: of the split, the batches and the controls.

    Raises:
        InputError: too few triples, prompts of different lengths, targets of several tokens, or a group
            that is not made of heads at one position.
    """
    heads = tuple(group)
    _check(model, triples, heads, held_out, epochs)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(triples), generator=generator).tolist()
    cut = max(1, min(len(triples) - 1, round(len(triples) * (1 - held_out))))
    fit, test = ([triples[i] for i in part] for part in (order[:cut], order[cut:]))
    runs = MaskedRuns.of(model, fit, heads)
    mask = learn(runs, lam=lam, lr=lr, epochs=epochs, batch=batch, generator=generator)
    learned = HeadMask(heads, mask.cpu())
    tests = MaskedRuns.of(model, test, heads)
    hits = {
        "mask": tests.hits((learned.mask >= 0.5).float()),
        "whole group": tests.hits(torch.zeros(len(heads))),
    }
    hits["nothing"] = tests.hits(torch.ones(len(heads)))
    found = [
        rate_measurement("DCM target rate", x.numpy(), seed=seed, group={"desideratum": name, "patched": k})
        for k, x in hits.items()
    ]
    count = len(learned.chosen)
    if controls and 0 < count < len(heads):
        rates = []
        for _ in range(controls):
            some = torch.ones(len(heads))
            some[torch.randperm(len(heads), generator=generator)[:count]] = 0
            rates.append(tests.hits(some).double().mean())
        found.append(
            Measurement(
                "DCM target rate", float(torch.stack(rates).mean()), "fraction", len(test),
                float(min(rates)), float(max(rates)), "range over random subsets of the group", seed,
                group={"desideratum": name, "patched": "random heads"}, note=f"{count} of {len(heads)} heads",
            )
        )  # fmt: skip
    found.append(
        Measurement(
            "DCM heads", float(count), "count", len(heads), seed=seed, group={"desideratum": name},
            details={"heads": [n.label for n in learned.chosen]},
        )
    )  # fmt: skip
    return HeadMask(heads, learned.mask, tuple(found))


def learn(
    runs: MaskedRuns,
    *,
    lam: float = 0.01,
    lr: float = 0.1,
    epochs: int = 2,
    batch: int = 8,
    generator: torch.Generator,
) -> Tensor:
    """Return the mask `[heads]` that reaches the targets of some runs at the smallest price; see `dcm`."""
    mask = torch.ones(len(runs.group), device=runs.targets.device).requires_grad_()
    optimiser = torch.optim.Adam([mask], lr=lr)
    for _ in range(epochs):
        for rows in torch.randperm(len(runs.targets), generator=generator).split(batch):
            optimiser.zero_grad()
            with torch.enable_grad():
                logits = runs.logits(mask, rows, columns=runs.targets[rows][:, None])
                (-logits[:, 0].mean() + lam * (1 - mask).sum()).backward()
            optimiser.step()
            with torch.no_grad():
                mask.clamp_(0, 1)
    return mask.detach()


class MaskedRuns:
    """Base prompts whose heads are mixed with those of source prompts at one position.

    Columns left of that position are run once and kept.
    """

    def __init__(
        self,
        model: Model,
        base: dict[str, Tensor],
        source: dict[str, Tensor],
        targets: Tensor,
        group: Sequence[Node],
    ) -> None:
        same = base["input_ids"].shape == source["input_ids"].shape
        if not same or not torch.equal(base["attention_mask"], source["attention_mask"]):
            raise InputError("base and source prompts must have equally many tokens, pair by pair")
        self.model, self.group, self.base, self.targets = model, group, base, targets
        self.width = base["input_ids"].shape[1]
        place = group[0].position
        self.column = self.width - 1 if place == "last" else self.width + int(place)
        self.sites = {b: model.resolve(f"blocks.{b}.attn.z")[0] for b in sorted({n.block for n in group})}
        trace = model.trace(source, [s.name for s in self.sites.values()])
        self.sources = {b: trace[s.name][:, self.column] for b, s in self.sites.items()}
        self._kept = KeysValues.run(model, base, self.column)

    @classmethod
    def of(cls, model: Model, triples: Sequence[Triple], group: Sequence[Node]) -> MaskedRuns:
        """Return the runs of triples of texts.

        Raises:
            InputError: prompts of different lengths, or a target of several tokens.
        """
        base, source = (encode_left(model, [t[i] for t in triples]) for i in (0, 1))
        tokens = Tokens(model.tokenizer)
        ids = [tokens.one(t[0], t[2]) for t in triples]
        known = [i for i in ids if i is not None]
        if len(known) < len(ids):
            raise InputError(f"the target {triples[ids.index(None)][2]!r} must be one token after its prompt")
        return cls(model, base, source, torch.tensor(known, device=model.device), group)

    def logits(self, mask: Tensor, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """Return the last logits `[rows, vocab or k]` with each head mixed by its mask."""
        start = self.column if self._kept is not None else 0
        if self._kept is None:
            encoded = last_columns(self.model, self.base, rows, start)
        else:
            encoded = self._kept.arguments(self.model, self.base, rows, start)

        def mix(block: int) -> object:
            mine = [(i, n.index) for i, n in enumerate(self.group) if n.block == block]

            def write(x: Tensor) -> Tensor:
                weight = x.new_ones(x.shape[2])
                weight = weight.index_put(
                    (torch.tensor([h for _, h in mine]),), mask[[i for i, _ in mine]].to(x)
                )[:, None]
                at = self.column - start
                mixed = weight * x[:, at] + (1 - weight) * self.sources[block][rows].to(x)
                return torch.cat([x[:, :at], mixed[:, None], x[:, at + 1 :]], 1)

            return write

        with ExitStack() as stack:
            for b, site in self.sites.items():
                function = mix(b)
                stack.callback(
                    attach(self.model.module, site, function, batch=lambda: len(rows)).remove  # type: ignore[arg-type]
                )
            narrow = stack.enter_context(only_columns(self.model, columns))
            output = self.model._call(encoded)
        logits: Tensor = output.logits[:, -1].float()
        return logits if narrow or columns is None else logits.gather(1, columns)

    def hits(self, mask: Tensor, batch: int = 32) -> Tensor:
        """Return whether the target is the first choice, bool `[n]`."""
        found = []
        with torch.no_grad():
            for rows in torch.arange(len(self.targets)).split(batch):
                found.append(self.logits(mask, rows).argmax(1) == self.targets[rows])
        return torch.cat(found).cpu()


def _check(
    model: Model, triples: Sequence[Triple], group: Sequence[Node], held_out: float, epochs: int
) -> None:
    if len(triples) < 2:
        raise InputError(f"{len(triples)} triples cannot be split into learning and test; give at least 2")
    if not 0 < held_out < 1 or epochs < 1:
        raise InputError(
            f"held_out={held_out}, epochs={epochs}: give a share between 0 and 1, and at least 1"
        )
    if not group:
        raise InputError("the group has no heads; give at least one")
    for node in group:
        model.resolve(node.site)
        if node.kind != "attn.z" or node.index is None:
            raise InputError(f"DCM masks heads, not {node.site}")
    places = {n.position for n in group}
    place = next(iter(places))
    if len(places) > 1 or (not isinstance(place, int) and place != "last"):
        raise InputError("the heads of a group share one position, 'last' or a negative number")
