"""Imports every method of this room, so that the registry knows it.

A new method is one import here and one file beside this one.
"""

from actlas.steering import (  # noqa: F401
    abstain,
    cluster_fit,
    controller_fit,
    edit_tuning,
    fit,
    hypercube,
    neuron_adjust,
    neuron_fit,
    rome,
    wise,
)
