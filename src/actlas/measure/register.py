"""Imports what this room defines that can be saved, so that loading an artifact finds it."""

from actlas.measure import expert_health, neurofeedback, sparse_edits, void_edits  # noqa: F401
