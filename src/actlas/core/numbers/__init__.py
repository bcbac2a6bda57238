"""Number formats: what they can hold, codes and scales, packing, ranges, and fake quantization."""

from actlas.core.numbers.fake_quant import FakeQuant, Gradient, fake_quant
from actlas.core.numbers.floats import float_levels
from actlas.core.numbers.grids import (
    QuantParams,
    decode,
    encode,
    integers,
    params_of,
    quantize,
    ranges,
    representable,
)
from actlas.core.numbers.packing import pack, unpack
from actlas.core.numbers.ranges import Observer, gaussian_scale, lp_search, percentile
from actlas.core.numbers.spec import QuantSpec, legal_groups, nearest_group

__all__ = [
    "FakeQuant",
    "Gradient",
    "Observer",
    "QuantParams",
    "QuantSpec",
    "decode",
    "encode",
    "fake_quant",
    "float_levels",
    "gaussian_scale",
    "integers",
    "legal_groups",
    "lp_search",
    "nearest_group",
    "pack",
    "params_of",
    "percentile",
    "quantize",
    "ranges",
    "representable",
    "unpack",
]
