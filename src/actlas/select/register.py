"""Imports every method of this room, so that the registry knows it."""

from actlas.select import cross_task, precision  # noqa: F401
