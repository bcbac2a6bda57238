"""Imports every method of this room, so that the registry knows it."""

from actlas.training import (  # noqa: F401
    behaviour_tune,
    binarize_diffusion,
    bit_search,
    deft,
    edgeqat,
    lr_qat,
    prosparse,
    pyra,
    quest_llm,
    recode_edit,
    relufication,
    token_bits,
    upcycle,
)
