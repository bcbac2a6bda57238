"""Explain one answer: which parts of an input a model's output rests on.

    found = integrated_gradients(model, "The capital of France is", (" Paris", " Rome"))
    found.top(3)                          # [(' France', 2.9), ...]
    found.measurements                    # how far the attributions are from adding up

An explanation says how well it satisfies its own identity (attributions add up to the change of the
output) and is measured by what happens when the parts that it names are erased, beside random parts.
"""

from actlas.explain.deletion import deletion
from actlas.explain.integrated_gradients import IntegratedGradients, integrated_gradients

__all__ = ["IntegratedGradients", "deletion", "integrated_gradients"]
