"""Imports every method of this room, so that the registry knows it."""

from actlas.merge import experts, ties  # noqa: F401
