"""Choose training data: by what a model makes of it, not by its words.

from actlas.select import by_activation

chosen = by_activation(model, lens, pool, examples, ratio=0.05)
chosen.indices, chosen.top_shared_latents
"""

from actlas.select.by_activation import Selection, SharedLatent, by_activation
from actlas.select.samples import SampleCodes, SampleRows, sample_codes, sample_rows

__all__ = [
    "SampleCodes",
    "SampleRows",
    "Selection",
    "SharedLatent",
    "by_activation",
    "sample_codes",
    "sample_rows",
]
