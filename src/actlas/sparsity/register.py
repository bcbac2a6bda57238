"""Imports every method of this room, so that the registry knows it."""

from actlas.sparsity import expert_pruning, layer_skip, ppl_sparsity  # noqa: F401
