"""Imports every method of this room, so that the registry knows it."""

from actlas.explain import deletion  # noqa: F401
