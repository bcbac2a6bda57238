"""Imports the modules of this room, so that saved edits and lenses find their classes."""

from actlas.nn import (  # noqa: F401
    delta_activation,
    los_net,
    moe_x,
    small_depth,
    small_unet,
    squared_relu,
    ss_norm,
    switch,
    wide_view,
)
