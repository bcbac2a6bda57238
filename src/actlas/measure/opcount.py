"""Count what a forward pass computes, operator by operator, on the real tensors it makes.

    count_operations(module, args, kwargs) -> (list[OpCount], output)

A `TorchDispatchMode` sees every operator that reaches PyTorch's dispatcher, so nothing can be
skipped silently: each one is *counted* (matrix products, convolutions, attention, pooling),
*free by convention* (pointwise functions, norms, reductions, views, copies, look-ups), or
*uncounted*, and the last are listed by name. Forward hooks say which module an operator ran in.

Conventions (those of Dollar et al., "Fast and Accurate Model Scaling", and of its `pycls` code):

* one multiply-add is one unit; FLOPs are twice that; biases, norms and pointwise functions are 0;
* activation elements are the output elements of convolutions, matrix products, windowed pooling,
  and the attention tensors (q, k, v, scores, head outputs); norms and pointwise functions are 0;
* attention is counted as the full query x key square, whatever a causal kernel leaves out;
* a matrix product with inner dimension 1 is an outer product, that is, pointwise.

Attention scores that eager code makes are recognised by dataflow: a matrix product whose output
reaches a softmax through pointwise operators and views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass
class OpCount:
    """What one call of one operator contributed.

    Attributes:
        module: qualified name of the innermost module it ran in (`""` is the root).
        op: operator name, e.g. `"aten.mm"`.
        macs: multiply-adds.
        activations: output elements that count as activations, attention scores left out.
        scores: attention-score elements (a fused kernel never writes them to memory).
        counted: False for an operator whose work is not known to this file.
    """

    module: str
    op: str
    macs: int = 0
    activations: int = 0
    scores: int = 0
    counted: bool = True


def _product(out: Tensor, inner: int) -> tuple[int, int, int]:
    return (0, 0, 0) if inner == 1 else (out.numel() * inner, out.numel(), 0)


def _convolution(out: Tensor, args: tuple[Any, ...]) -> tuple[int, int, int]:
    x, weight, transposed = args[0], args[1], bool(args[6])
    per_point = weight[0].numel()
    return ((x if transposed else out).numel() * per_point, out.numel(), 0)


def _attention(args: tuple[Any, ...]) -> tuple[int, int, int]:
    """Query [..., heads, n, d] x key [..., heads, m, d], then pattern x value [..., heads, m, e]."""
    query, key, value = args[0], args[1], args[2]
    scores = query[..., 0].numel() * key.shape[-2]
    out = query[..., 0].numel() * value.shape[-1]
    return scores * query.shape[-1] + out * key.shape[-2], out, scores


Count = Callable[[Any, tuple[Any, ...]], tuple[int, int, int]]
_COUNTED: dict[str, Count] = {
    "mm": lambda out, a: _product(out, a[0].shape[-1]),
    "_int_mm": lambda out, a: _product(out, a[0].shape[-1]),
    "_scaled_mm": lambda out, a: _product(out, a[0].shape[-1]),
    "_weight_int8pack_mm": lambda out, a: _product(out, a[0].shape[-1]),
    "addmm": lambda out, a: _product(out, a[1].shape[-1]),
    "_addmm_activation": lambda out, a: _product(out, a[1].shape[-1]),
    "bmm": lambda out, a: _product(out, a[0].shape[-1]),
    "baddbmm": lambda out, a: _product(out, a[1].shape[-1]),
    "mv": lambda out, a: _product(out, a[0].shape[-1]),
    "addmv": lambda out, a: _product(out, a[1].shape[-1]),
    "dot": lambda out, a: _product(out, a[0].shape[-1]),
    "linear": lambda out, a: _product(out, a[0].shape[-1]),
    "_grouped_mm": lambda out, a: _product(out, a[0].shape[-1]),
    "convolution": _convolution,
    "_scaled_dot_product_flash_attention_for_cpu": lambda out, a: _attention(a),
    "_scaled_dot_product_flash_attention": lambda out, a: _attention(a),
    "_scaled_dot_product_efficient_attention": lambda out, a: _attention(a),
    "_scaled_dot_product_cudnn_attention": lambda out, a: _attention(a),
    "_scaled_dot_product_fused_attention_overrideable": lambda out, a: _attention(a),
}
_POOLING = ("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
_COUNTED |= {name: lambda out, a: (0, out.numel(), 0) for name in _POOLING}
_COUNTED |= {f"{name}_with_indices": lambda out, a: (0, out[0].numel(), 0) for name in _POOLING[:3]}

# Free by convention. Pointwise operators and views are recognised by their tags.
_FREE = frozenset(
    """
    native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit
    _native_batch_norm_legit_no_training _batch_norm_with_update cudnn_batch_norm _fused_rms_norm rms_norm
    _softmax _log_softmax _safe_softmax logsumexp mean sum prod var var_mean std amax amin aminmax max min
    argmax argmin any all norm linalg_vector_norm cumsum cumprod logcumsumexp count_nonzero
    adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool1d _adaptive_avg_pool3d embedding index
    index_select gather take index_put index_put_ scatter scatter_ scatter_add scatter_add_ index_add
    index_add_ masked_fill masked_fill_ masked_scatter masked_select nonzero where topk sort argsort
    searchsorted bucketize bincount histc one_hot unique_consecutive _unique2 isin cat stack clone copy_
    _to_copy _unsafe_view contiguous repeat repeat_interleave roll flip rot90 tril triu split
    split_with_sizes unsafe_split chunk constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d
    replication_pad2d pixel_shuffle pixel_unshuffle channel_shuffle im2col unfold empty empty_like
    empty_strided new_empty new_empty_strided new_zeros new_ones new_full zeros zeros_like ones ones_like
    full full_like fill_ zero_ arange linspace scalar_tensor eye rand randn rand_like randn_like randint
    bernoulli bernoulli_ uniform_ normal_ native_dropout lift_fresh lift_fresh_copy detach alias
    _local_scalar_dense equal is_nonzero resize_ set_ _assert_async _assert_scalar _nested_tensor_from_mask
    _fused_dropout _thnn_fused_lstm_cell _thnn_fused_gru_cell record_stream transpose_ t_ squeeze_ unsqueeze_
    view_as
    """.split()  # noqa: SIM905 - a list literal of these would fill a page
)
_SOFTMAX = frozenset({"_softmax", "_safe_softmax", "_log_softmax"})


def _free(name: str, func: Any) -> bool:
    return name in _FREE or func.is_view or torch.Tag.pointwise in func.tags


class _Counter(TorchDispatchMode):
    """Writes one OpCount for every operator that is not free; follows products into softmaxes."""

    def __init__(self, stack: list[str]) -> None:
        super().__init__()
        self.stack = stack
        self.found: list[OpCount] = []
        self.origin = WeakTensorKeyDictionary()  # tensor -> the product that it is a pointwise function of

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        known = func.namespace in ("aten", "prims")
        count = _COUNTED.get(name) if known else None
        if count is not None:
            macs, activations, scores = count(out, args)
            entry = OpCount(self.stack[-1], f"aten.{name}", macs, activations, scores)
            self.found.append(entry)
            if name in ("bmm", "baddbmm", "mm"):
                self.origin[out] = entry
        elif known and _free(name, func):
            self._follow(name, args, out)
        else:
            self.found.append(OpCount(self.stack[-1], f"{func.namespace}.{name}", counted=False))
        return out

    def _follow(self, name: str, args: tuple[Any, ...], out: Any) -> None:
        sources = [self.origin[a] for a in tree_leaves(args) if isinstance(a, Tensor) and a in self.origin]
        if not sources:
            return
        if name in _SOFTMAX:
            for entry in sources:
                if entry.op != "aten.mm":  # a plain linear layer before a softmax is a router or a classifier
                    entry.scores, entry.activations = entry.scores + entry.activations, 0
            return
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.origin[leaf] = sources[0]


@contextmanager
def _decomposed() -> Iterator[None]:
    """Keep recurrent and transformer layers from running as one opaque fused operator."""
    fast = torch.backends.mha.get_fastpath_enabled()
    native = torch.backends.mkldnn.set_flags(False, None, None, None)[0]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.backends.mkldnn.set_flags(native, None, None, None)


@contextmanager
def _module_stack(module: nn.Module) -> Iterator[list[str]]:
    """Yield a list whose last entry is the name of the module that is running."""
    stack = [""]
    handles = []
    for name, part in module.named_modules():
        if name:
            handles.append(part.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
            handles.append(part.register_forward_hook(lambda *_: stack.pop() and None, always_call=True))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def count_operations(
    module: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> tuple[list[OpCount], Any]:
    """Run `module(*args, **kwargs)` once without gradients and count its operators.

    Fused recurrent and transformer kernels are switched off for this one pass, so that their parts
    are seen. All hooks are removed again, also after an exception.

    Returns:
        one OpCount for each call that is not free by convention, and the module's output.
    """
    with torch.no_grad(), _decomposed(), _module_stack(module) as stack, _Counter(stack) as counter:
        out = module(*args, **(kwargs or {}))
    return counter.found, out
