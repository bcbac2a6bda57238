"""Imports every method of this room, so that the registry knows it."""

from actlas.training import behaviour_tune, deft, prosparse, pyra, recode_edit, relufication, upcycle  # noqa: F401
