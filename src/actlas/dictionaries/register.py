"""Imports every method of this room, so that the registry knows it."""

from actlas.dictionaries import fit, topk  # noqa: F401
