"""Imports every method of this room, so that the registry knows it."""

from actlas.dictionaries import (  # noqa: F401
    attention_output,
    attribution,
    baselines,
    batch_topk,
    conversations,
    crosscoder,
    fit,
    gated,
    gradient,
    head_weights,
    itda,
    jumprelu,
    matryoshka,
    reconstruction_slices,
    relu,
    special_tokens,
    supervised,
    topk,
    transcoder,
    transcoder_edits,
)
