"""Imports the modules of this room, so that saved edits and lenses find their classes."""

from actlas.nn import delta_activation, los_net, moe_x, squared_relu, switch, wide_view  # noqa: F401
