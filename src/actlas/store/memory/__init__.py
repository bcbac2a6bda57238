"""Memory as an object: text, keys and values, or parameters, with owners, versions and conversions.

| file | what |
| --- | --- |
| `kv_block` | the cache of a text: checked, moved, joined, saved |
| `cube` | one memory of any kind, with rights, life and version |
| `vault` | many of them: snapshots, roll-back, merging, disk |
| `conversions` | between text, activations and parameters |
| `scheduler` | which ones stay as keys and values |
"""

from actlas.store.memory.conversions import activate, distil, write_down, write_out
from actlas.store.memory.cube import MemoryCube, NotAllowed
from actlas.store.memory.kv_block import KVBlock
from actlas.store.memory.scheduler import Scheduler
from actlas.store.memory.vault import MemoryVault

__all__ = [
    "KVBlock",
    "MemoryCube",
    "MemoryVault",
    "NotAllowed",
    "Scheduler",
    "activate",
    "distil",
    "write_down",
    "write_out",
]
