"""Scheduler: which memories are kept as keys and values, under a budget of tokens.

    scheduler = Scheduler(budget=2000, policy="benefit")
    block = scheduler.get("manual", tokens=320, build=lambda: KVBlock.build(model, text))

A request for a memory that is kept is a hit and costs nothing but the question; else its cache is built,
and kept if the policy ranks it above what would have to go. Ranks of an entry, greater is better:

    "lru"      time of its last request
    "lfu"      number of requests
    "benefit"  requests, each worth half after `half_life` further requests of anything, plus priority
    callable   any function of an `Entry`

`"lru"` always admits, as caches do. Under the others a memory does not push out one that ranks as high. A
prefill costs about as many tokens as its cache takes room, so length cancels: what counts is how often.

Source: "MemOS" (2025), MemScheduler: promotion by use frequency, recency, relevance and token cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from actlas.core.errors import InputError, did_you_mean

T = TypeVar("T")


@dataclass
class Entry:
    """What is known about one memory.

    Attributes:
        name: of the memory.
        tokens: how long it is, which is both what a prefill costs and what room it takes.
        requests: how often it was asked for.
        last: number of the last request for it.
        weight: requests, each worth half after `half_life` further requests.
        priority: given by its owner, in requests.
    """

    name: str
    tokens: int
    requests: int = 0
    last: int = 0
    weight: float = 0.0
    priority: float = 0.0


Policy = Callable[[Entry], float]
POLICIES: dict[str, Policy] = {
    "lru": lambda e: float(e.last),
    "lfu": lambda e: float(e.requests),
    "benefit": lambda e: e.weight + e.priority,
}


class Scheduler(Generic[T]):
    """Keeps what is worth keeping.

    Args:
        budget: tokens that may be kept in all.
        policy: a name, or a function that ranks an `Entry`.
        half_life: requests after which one is worth half, for `"benefit"`.

    Attributes:
        hits, misses: requests that found their memory kept, and that did not.
        built: tokens that were prefilled.
    """

    def __init__(self, budget: int, policy: str | Policy = "benefit", *, half_life: float = 100.0) -> None:
        if budget < 0:
            raise InputError(f"budget is {budget} tokens; it must be 0 or more")
        if not half_life > 0:
            raise InputError(f"half_life is {half_life:g}; it must be above 0")
        if isinstance(policy, str) and policy not in POLICIES:
            hint = did_you_mean(policy, POLICIES)
            raise InputError(f"there is no policy {policy!r}{hint} (there are {', '.join(POLICIES)})")
        self.budget, self.half_life = budget, half_life
        self._admit_all = policy == "lru"
        self._rank: Policy = POLICIES[policy] if isinstance(policy, str) else policy
        self._entries: dict[str, Entry] = {}
        self._kept: dict[str, T] = {}
        self._clock = self.hits = self.misses = self.built = 0

    @property
    def kept(self) -> list[str]:
        """Names of what is kept now."""
        return list(self._kept)

    @property
    def tokens(self) -> int:
        """Tokens that are kept now."""
        return sum(self._entries[n].tokens for n in self._kept)

    def get(self, name: str, tokens: int, build: Callable[[], T], *, priority: float = 0.0) -> T:
        """Return a memory's cache, kept or built now.

        Args:
            name: of the memory.
            tokens: its length.
            build: makes the cache.
            priority: see `Entry`.
        """
        if tokens < 1:
            raise InputError(f"the memory {name!r} has {tokens} tokens; it must have at least 1")
        entry = self._entries.setdefault(name, Entry(name, tokens))
        if entry.tokens != tokens and name in self._kept:  # revised: the kept one is stale
            del self._kept[name]
        self._clock += 1
        entry.weight = self._decayed(entry) + 1
        entry.tokens, entry.priority, entry.last = tokens, priority, self._clock
        entry.requests += 1
        if name in self._kept:
            self.hits += 1
            return self._kept[name]
        self.misses += 1
        self.built += tokens
        made = build()
        self._admit(entry, made)
        return made

    def drop(self, name: str) -> None:
        """Forget what is kept of a memory, because it was revised, archived or has expired."""
        self._kept.pop(name, None)

    def _admit(self, entry: Entry, made: T) -> None:
        if entry.tokens > self.budget:
            return
        ranks = {n: self._now(self._entries[n]) for n in self._kept}
        mine = self._now(entry)
        free, gone = self.budget - self.tokens, []
        for name in sorted(ranks, key=lambda n: ranks[n]):
            if free >= entry.tokens:
                break
            if not self._admit_all and ranks[name] >= mine:
                return
            free += self._entries[name].tokens
            gone.append(name)
        for name in gone:
            del self._kept[name]
        self._kept[entry.name] = made

    def _decayed(self, entry: Entry) -> float:
        return cast("float", entry.weight * 0.5 ** ((self._clock - entry.last) / self.half_life))

    def _now(self, entry: Entry) -> float:
        now = Entry(**{**vars(entry), "weight": self._decayed(entry)})
        return self._rank(now)
