"""Imports every method of this room, so that the registry knows it."""

from actlas.circuits import das, fit, head_knob, knob  # noqa: F401
