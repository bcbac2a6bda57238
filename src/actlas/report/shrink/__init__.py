"""Shrink a model on the machine it will run on: search, measure, choose, save.

    from actlas.report.shrink import shrink

    found = shrink("smollm2", keep=0.01)            # the fastest mix within 1% perplexity
    found.save("shrunk")                            # actlas generate shrunk/ PROMPT

A mix is a format of the weights with a level of skipped inputs, or quantised layers; see `search.py`.
"""

from actlas.report.shrink.result import Shrunk, is_shrunk, load_record
from actlas.report.shrink.rows import Effort, Goal, Mix, Row
from actlas.report.shrink.search import shrink

__all__ = ["Effort", "Goal", "Mix", "Row", "Shrunk", "is_shrunk", "load_record", "shrink"]
