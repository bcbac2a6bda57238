"""Imports every method of this room, so that the registry knows it."""

from actlas.quantize import (  # noqa: F401
    adaround_text,
    agile,
    awq,
    bcq,
    gptq,
    hessian_bits,
    kv_cache,
    llm_fp4,
    lorc,
    ostquant,
    outliertune,
    presets,
    q_diffusion,
    recogniser,
    rotate,
    rtn,
    selective_finetune,
    smoothquant,
    spqr,
)
