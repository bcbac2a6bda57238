"""Activations on disk: harvested once, read many times.

store = harvest(model, corpus("prose"), "blocks.15.resid_post", "acts", rows=100_000)
for batch in store.batches(2048, seed=0): ...
store.query("SELECT count(*) AS n FROM tokens WHERE special")
store.top(lens, feature=7, n=20)
"""

from actlas.store.contexts import Context
from actlas.store.harvesting import harvest
from actlas.store.repairing import remake_shards, repair
from actlas.store.store import Store

__all__ = ["Context", "Store", "harvest", "remake_shards", "repair"]
