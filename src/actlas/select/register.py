"""Imports every method of this room, so that the registry knows it."""

from actlas.select import precision  # noqa: F401
