"""Merge: several changes of one model's weights made into one.

| file | what |
| --- | --- |
| `ties` | merge saved edits or fine-tuned models: TIES, average, sum; task vectors |

The arithmetic of TIES is in `actlas.core.ties`, because other rooms merge too.
"""
