"""Imports every method of this room, so that the registry knows it."""

from actlas.circuits import (  # noqa: F401
    circuit_search,
    classify_heads,
    das,
    dla,
    fit,
    fit_features,
    head_knob,
    knob,
)
