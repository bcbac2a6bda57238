"""Induction heads by the length of prefix that they need.

    curves = prefix_induction(model)                 # attention by prefix length, for every head
    curves.heads(0.3)                                # heads that do induction at some length
    curves.ratio(1, 4)                               # near 1: short-prefix; near 0: long-prefix head

An induction head at a token attends to what followed an earlier copy of it. Two such heads can differ in
how much has to match: a random prefix of length p is planted twice in random tokens, the second time at the
end, and the score is the attention from the end of the second copy to the token after the first (Kissane et
al. 2024, "Interpreting Attention Layer Outputs with Sparse Autoencoders", section 4.3; p = 1..9 there, 400
sequences of 128 tokens, beginning with the start token). The control is the attention to the token after
another span of the same length, drawn in the same way and not repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.errors import InputError, ModelError
from actlas.core.measurement import Measurement
from actlas.core.progress import progress
from actlas.core.streaming import windows
from actlas.measure.observing import block_sites
from actlas.measure.registry import measure
from actlas.measure.samples import mean_measurement, missing

if TYPE_CHECKING:
    from actlas.core.model import Model

LENGTHS = tuple(range(1, 10))
_BATCH = 16


@dataclass(frozen=True)
class PrefixCurves:
    """Attention of every head by prefix length.

    Attributes:
        lengths: prefix lengths.
        blocks: the number of the block on each row of the second axis.
        score, control: `[lengths, blocks, heads, sequences]`, see the module's text.
        tokens: length of the sequences.
    """

    lengths: tuple[int, ...]
    blocks: tuple[int, ...]
    score: NDArray[np.float64]
    control: NDArray[np.float64]
    tokens: int

    @property
    def excess(self) -> NDArray[np.float64]:
        """Mean score minus mean control, `[lengths, blocks, heads]`."""
        found: NDArray[np.float64] = (self.score - self.control).mean(-1)
        return found

    def heads(self, least: float = 0.3) -> list[tuple[int, int]]:
        """Return `(block, head)` of heads whose excess reaches `least` at some length, the highest first."""
        best = self.excess.max(0)
        found = [(float(best[b, h]), b, h) for b, h in np.argwhere(best >= least)]
        return [(self.blocks[b], int(h)) for _, b, h in sorted(found, key=lambda f: -f[0])]

    def curve(self, block: int, head: int) -> NDArray[np.float64]:
        """Return the excess of one head by length.

        Raises:
            InputError: no such head.
        """
        if block not in self.blocks or not 0 <= head < self.score.shape[2]:
            raise InputError(f"there is no head {block}.{head} here")
        found: NDArray[np.float64] = self.excess[:, self.blocks.index(block), head]
        return found

    def ratio(self, short: int = 1, long: int = 4) -> NDArray[np.float64]:
        """Return excess at a short prefix over excess at a long one, `[blocks, heads]`."""
        for length in (short, long):
            if length not in self.lengths:
                raise InputError(f"prefix length {length} was not measured; measured: {list(self.lengths)}")
        low, high = (self.excess[self.lengths.index(n)] for n in (short, long))
        return np.divide(low, high, out=np.full_like(low, np.nan), where=np.abs(high) > 1e-6)


@torch.no_grad()
def prefix_induction(
    model: Model,
    lengths: Sequence[int] = LENGTHS,
    *,
    sequences: int = 400,
    tokens: int = 128,
    seed: int = 0,
) -> PrefixCurves:
    """Measure every head's attention from a repeated prefix to what followed it the first time.

    Args:
        model: a causal language model whose attention patterns can be read; edits apply.
        lengths: prefix lengths p.
        sequences: for each length.
        tokens: in a sequence.
        seed: of the sequences; the same for every model of the same vocabulary.

    Raises:
        ModelError: not a causal language model, or its patterns cannot be read.
        InputError: sequences too short for the prefixes, or too long for the model.
    """
    sites = block_sites(model, "attn.pattern")
    if model.kind != "causal-lm" or not sites:
        raise ModelError(f"{model.name} ({model.kind}) has no causal attention patterns to read")
    planted = tuple(lengths)
    if not planted or min(planted) < 1 or sequences < 1:
        raise InputError(f"give prefix lengths of at least 1 and at least 1 sequence, not {list(planted)}")
    if tokens < 3 * max(planted) + 4:
        raise InputError(
            f"tokens is {tokens}; a prefix of {max(planted)} needs at least {3 * max(planted) + 4}"
        )
    if model.context_length is not None and tokens > model.context_length:
        raise InputError(f"tokens is {tokens}; {model.name} has a context of {model.context_length}")
    generator = torch.Generator().manual_seed(seed)
    shape = (len(planted), len(sites), model.n_heads or 0, sequences)
    score, control = np.zeros(shape), np.zeros(shape)
    with progress("induction by prefix length", len(planted) * sequences, "sequences") as advance:
        for i, length in enumerate(planted):
            for start in range(0, sequences, _BATCH):
                n = min(_BATCH, sequences - start)
                ids, after, decoy = planted_sequences(model, length, n, tokens, generator)
                trace = model.trace(ids, sites, attention_rows=1)
                rows = torch.arange(n)
                for j, site in enumerate(sites):
                    last = trace[site.name][:, :, -1].cpu()  # [n, heads, key]
                    score[i, j, :, start : start + n] = last[rows, :, after].T.double().numpy()
                    control[i, j, :, start : start + n] = last[rows, :, decoy].T.double().numpy()
                advance(n)
    return PrefixCurves(planted, tuple(s.block or 0 for s in sites), score, control, tokens)


def planted_sequences(
    model: Model, length: int, n: int, tokens: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids `[n, tokens]`, where the token after the first copy is, and the control's place, `[n]` each.

    The second copy is at the end. No token occurs twice otherwise, if the vocabulary is large enough.
    """
    ids = torch.stack([_random_tokens(model, tokens, generator) for _ in range(n)])
    free = tokens - 1 - length - 2 * (length + 1)  # tokens outside the three spans and the first place
    cut = torch.stack([torch.randperm(free + 1, generator=generator)[:2].sort().values for _ in range(n)])
    starts = 1 + cut + torch.tensor([0, length + 1])
    swap = torch.rand(n, generator=generator) < 0.5
    first = torch.where(swap, starts[:, 1], starts[:, 0])
    other = torch.where(swap, starts[:, 0], starts[:, 1])
    for i in range(n):
        ids[i, tokens - length :] = ids[i, first[i] : first[i] + length]
    return ids, first + length, other + length


@torch.no_grad()
def overwritten_prefix(
    model: Model,
    corpus: Iterable[Any],
    block: int,
    head: int,
    *,
    least: float = 0.3,
    pairs: int = 50,
    tokens: int = 128,
    max_windows: int = 100,
    seed: int = 0,
) -> list[Measurement]:
    """On text: attention of an induction head after the token two before its source is overwritten.

    Pairs (query, source) are taken where the head attends by at least `least` to a token that followed an
    earlier copy of the query's token. A head that needs a long prefix loses attention when the token before
    that copy is overwritten with a random one; the control overwrites a token elsewhere.

    Args:
        model, corpus: a causal language model and text.
        block, head: the head.
        least: attention that makes a pair.
        pairs: at most so many, one a window of `tokens` tokens.
        max_windows: stop looking after so many windows.
        seed: of the random tokens and places.

    Returns:
        `attention kept` (a fraction of the attention before) for the prefix, the control, and their paired
        difference; `nan` with a note if there is no such pair.
    """
    site = model.resolve(f"blocks.{block}.attn.pattern[head={head}]")[0]
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, list[float]] = {"prefix": [], "elsewhere": []}
    for seen, window in enumerate(windows(model, corpus, tokens)):
        if seen == max_windows or len(kept["prefix"]) == pairs:
            break
        ids = torch.tensor([window.ids])
        pattern = model.trace(ids, [site])[site.name][0]
        found = _pair(ids[0], pattern.cpu(), least)
        if found is None:
            continue
        query, source = found
        places = list(range(1, source - 2))
        if not places:
            continue
        elsewhere = places[int(torch.randint(len(places), (1,), generator=generator))]
        for name, place in (("prefix", source - 2), ("elsewhere", elsewhere)):
            changed = ids.clone()
            changed[0, place] = _random_tokens(model, 2, generator)[1]
            after = model.trace(changed, [site])[site.name][0]
            kept[name].append(float(after[query, source] / pattern[query, source]))
    group = {"block": str(block), "head": str(head)}
    if not kept["prefix"]:
        return [missing("attention kept", "fraction", "no pair with so much attention", group=group)]
    samples = {name: np.array(v) for name, v in kept.items()}
    samples["prefix minus elsewhere"] = samples["prefix"] - samples["elsewhere"]
    return [
        mean_measurement(
            "attention kept", "fraction", v, seed=seed, over="windows", group={**group, "overwritten": name}
        )
        for name, v in samples.items()
    ]


@measure(
    "prefix-induction",
    summary="which heads copy after a repeated prefix, and how long it must be",
    unit="fraction",
    needs=("causal-lm",),
    data="none",
    quick={"sequences": 8, "tokens": 64},
    source="Kissane et al. 2024, section 4.3",
)
def prefix_induction_measures(
    model: Model, *, seed: int = 0, sequences: int = 50, tokens: int = 128, most: int = 10
) -> list[Measurement]:
    """Return the excess attention of the `most` strongest heads at the longest prefix, with their curves."""
    curves = prefix_induction(model, sequences=sequences, tokens=tokens, seed=seed)
    found = []
    for block, head in curves.heads(-1.0)[:most]:
        j = curves.blocks.index(block)
        found.append(
            mean_measurement(
                "prefix-induction",
                "fraction",
                (curves.score - curves.control)[-1, j, head],
                seed=seed,
                over="sequences",
                group={"layer": str(block), "head": str(head)},
                note=f"prefix of {curves.lengths[-1]} in {tokens} tokens; attention minus that to a decoy",
                details={"lengths": list(curves.lengths), "curve": curves.curve(block, head).tolist()},
            )
        )
    return found


def _pair(ids: Tensor, pattern: Tensor, least: float) -> tuple[int, int] | None:
    """Return (query, source) of most attention whose source follows an earlier copy of the query."""
    n = len(ids)
    copies = torch.zeros(n, n, dtype=torch.bool)
    copies[:, 1:] = ids.unsqueeze(1) == ids[:-1].unsqueeze(0)  # [query, source]
    allowed = copies & (torch.arange(n).unsqueeze(1) > torch.arange(n).unsqueeze(0)) & (torch.arange(n) >= 4)
    attention = torch.where(allowed, pattern, torch.zeros_like(pattern))
    best = int(attention.argmax())
    query, source = divmod(best, n)
    return (query, source) if float(attention[query, source]) >= least else None


def _random_tokens(model: Model, n: int, generator: torch.Generator) -> Tensor:
    """Return `n` ordinary tokens, different where the vocabulary allows; first the start token, if any."""
    size = model.vocab_size
    if size is None:
        raise ModelError(f"{model.name} has no vocabulary to draw tokens from")
    special = torch.tensor(getattr(model.tokenizer, "all_special_ids", None) or [], dtype=torch.long)
    ordinary = torch.arange(size)[~torch.isin(torch.arange(size), special)]
    drawn = (
        torch.randperm(len(ordinary), generator=generator)[:n]
        if len(ordinary) >= n
        else torch.randint(len(ordinary), (n,), generator=generator)
    )
    ids = ordinary[drawn]
    start = getattr(model.tokenizer, "bos_token_id", None)
    if start is not None:
        ids[0] = start
    return ids
