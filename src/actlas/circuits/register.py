"""Imports every method of this room, so that the registry knows it."""

from actlas.circuits import circuit_search, classify_heads, das, dla, fit, head_knob, knob, node_effects  # noqa: F401
