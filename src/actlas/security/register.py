"""Imports every method of this room, so that the registry knows it."""

from actlas.security import authorship, monitors, output_probe, trojan  # noqa: F401
