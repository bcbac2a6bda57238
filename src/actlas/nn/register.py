"""Imports the modules of this room, so that saved edits and lenses find their classes."""

from actlas.nn import los_net, moe_x, switch, wide_view  # noqa: F401
