#include "gather.hpp"

namespace actlas {
namespace {

constexpr std::size_t kAhead = 6;  // rows fetched ahead, to hide the latency of memory
constexpr std::size_t kLine = 64;

template <std::size_t lanes> ACTLAS_INLINE void widen(typename Vec<lanes>::Floats &v, const float *from) {
    load(v, from);
}

struct Bfloat {
    std::uint16_t bits;
};
template <std::size_t lanes> ACTLAS_INLINE void widen(typename Vec<lanes>::Floats &v, const Bfloat *from) {
    typename Vec<lanes>::Halves halves;
    load(halves, from);
    v = (typename Vec<lanes>::Floats)(__builtin_convertvector(halves, typename Vec<lanes>::Bits) << 16);
}

// Exponent and mantissa move to their places and a multiplication moves the bias, also of denormals.
struct Half {
    std::uint16_t bits;
};
template <std::size_t lanes> ACTLAS_INLINE void widen(typename Vec<lanes>::Floats &v, const Half *from) {
    using Floats = typename Vec<lanes>::Floats;
    using Bits = typename Vec<lanes>::Bits;
    typename Vec<lanes>::Halves halves;
    load(halves, from);
#ifdef ACTLAS_X86
    if constexpr (lanes > 4) {  // every processor with AVX2 has F16C
        asm("vcvtph2ps %1, %0" : "=v"(v) : "v"(halves));
        return;
    }
#endif
    const Bits h = __builtin_convertvector(halves, Bits);
    Floats x = (Floats)((h & 0x7fffu) << 13) * 0x1p112f;
    const Bits beyond = (Bits)(x >= 65536.0f) & 0x7f800000u;  // infinity and NaN
    v = (Floats)((Bits)x | beyond | ((h & 0x8000u) << 16));
}

template <std::size_t lanes> ACTLAS_INLINE void widen(typename Vec<lanes>::Floats &v, const std::int8_t *from) {
    typename Vec<lanes>::Bytes bytes;
    load(bytes, from);
    v = __builtin_convertvector(__builtin_convertvector(bytes, typename Vec<lanes>::Ints),
                                typename Vec<lanes>::Floats);
}

template <std::size_t lanes, class T>
ACTLAS_INLINE void gather_block(const T *source, std::size_t d, std::size_t stride, const float *scales,
                                const std::int64_t *indices, std::size_t begin, std::size_t end, float *out) {
    typename Vec<lanes>::Floats v;
    for (std::size_t r = begin; r < end; ++r) {
        if (r + kAhead < end) {
            const char *next = reinterpret_cast<const char *>(source + indices[r + kAhead] * stride);
            for (std::size_t b = 0; b < d * sizeof(T); b += kLine) __builtin_prefetch(next + b, 0, 2);
        }
        const T *from = source + indices[r] * stride;
        float *to = out + r * d;
        const float scale = scales ? scales[indices[r]] : 1.0f;
        std::size_t c = 0;
        for (; c + lanes <= d; c += lanes) {
            widen<lanes>(v, from + c);
            if (scales) v *= scale;
            store(to + c, v);
        }
        if (c < d) {
            T rest[lanes] = {};
            float wide[lanes];
            std::memcpy(rest, from + c, (d - c) * sizeof(T));
            widen<lanes>(v, rest);
            if (scales) v *= scale;
            store(wide, v);
            std::memcpy(to + c, wide, (d - c) * sizeof(float));
        }
    }
}

template <std::size_t lanes>
ACTLAS_INLINE void gather_any(const void *source, Number number, std::size_t d, std::size_t stride,
                              const float *scales, const std::int64_t *indices, std::size_t begin,
                              std::size_t end, float *out) {
    switch (number) {
        case Number::float32:
            return gather_block<lanes>(static_cast<const float *>(source), d, stride, scales, indices, begin, end, out);
        case Number::float16:
            return gather_block<lanes>(static_cast<const Half *>(source), d, stride, scales, indices, begin, end, out);
        case Number::bfloat16:
            return gather_block<lanes>(static_cast<const Bfloat *>(source), d, stride, scales, indices, begin, end,
                                       out);
        case Number::int8:
            return gather_block<lanes>(static_cast<const std::int8_t *>(source), d, stride, scales, indices, begin,
                                       end, out);
    }
}
ACTLAS_FOR_LEVELS(gather_any,
                  (const void *source, Number number, std::size_t d, std::size_t stride, const float *scales,
                   const std::int64_t *indices, std::size_t begin, std::size_t end, float *out),
                  (source, number, d, stride, scales, indices, begin, end, out))

}  // namespace

void gather_rows(const void *source, Number number, std::size_t d, std::size_t stride, const float *scales,
                 const std::int64_t *indices, std::size_t count, float *out, int threads, Level level) {
    const auto loop = gather_any_for(level);
    split(count, d, threads, [&](std::size_t begin, std::size_t end) {
        loop(source, number, d, stride, scales, indices, begin, end, out);
    });
}

}  // namespace actlas
