"""Imports every method of this room, so that the registry knows it."""

from actlas.training import behaviour_tune, upcycle  # noqa: F401
