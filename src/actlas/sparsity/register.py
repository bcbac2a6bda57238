"""Imports every method of this room, so that the registry knows it."""

from actlas.sparsity import (  # noqa: F401
    chess,
    core_clusters,
    core_neurons,
    expert_pruning,
    kv_rules,
    layer_skip,
    placing,
    ppl_sparsity,
    priced_inputs,
    r_sparse,
    spec_kv,
    spec_pc,
    token_merge,
    token_pruning,
    wina,
)
