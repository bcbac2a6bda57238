// What all kernels share: vector types, the choice of an instruction set, and threads.
//
// Loops are written once with GCC/Clang vector extensions, as always-inline templates over the number of
// float lanes, and compiled for several instruction sets with ACTLAS_FOR_LEVELS; the best one that the
// processor has is chosen at run time. On other architectures (aarch64 with NEON) the baseline build is
// the only one.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define ACTLAS_X86 1
#define ACTLAS_AVX2 __attribute__((target("avx2,fma")))
#define ACTLAS_AVX512 __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")))
#endif

#define ACTLAS_INLINE [[gnu::always_inline]] inline

namespace actlas {

enum class Level { baseline = 0, avx2 = 1, avx512 = 2 };

// The best level that this processor and this build have.
Level best_level();

// Vectors of `lanes` floats, and integers of the same width.
template <std::size_t lanes> struct Vec {
    typedef float Floats __attribute__((vector_size(lanes * 4)));
    typedef std::int32_t Ints __attribute__((vector_size(lanes * 4)));
    typedef std::uint32_t Bits __attribute__((vector_size(lanes * 4)));
    typedef std::uint16_t Halves __attribute__((vector_size(lanes * 2)));
    typedef std::int8_t Bytes __attribute__((vector_size(lanes)));
};

template <class V, class T> ACTLAS_INLINE void load(V &v, const T *from) { std::memcpy(&v, from, sizeof v); }
template <class V, class T> ACTLAS_INLINE void store(T *to, const V &v) { std::memcpy(to, &v, sizeof v); }

// Defines `name(level)`, which returns NAME<lanes> compiled for the level; `parameters` and `arguments` are
// those of the template NAME, in parentheses.
#ifdef ACTLAS_X86
#define ACTLAS_FOR_LEVELS(NAME, PARAMETERS, ARGUMENTS)                                   \
    void NAME##_baseline PARAMETERS { NAME<4> ARGUMENTS; }                               \
    ACTLAS_AVX2 void NAME##_avx2 PARAMETERS { NAME<8> ARGUMENTS; }                       \
    ACTLAS_AVX512 void NAME##_avx512 PARAMETERS { NAME<16> ARGUMENTS; }                  \
    auto NAME##_for(Level level) {                                                       \
        level = std::min(level, best_level());                                           \
        return level == Level::avx512 ? NAME##_avx512 : level == Level::avx2 ? NAME##_avx2 : NAME##_baseline; \
    }
#else
#define ACTLAS_FOR_LEVELS(NAME, PARAMETERS, ARGUMENTS)                                   \
    void NAME##_baseline PARAMETERS { NAME<4> ARGUMENTS; }                               \
    auto NAME##_for(Level) { return NAME##_baseline; }
#endif

// Runs work(0) ... work(parts - 1), the first of them in this thread, and those for which the system
// grants no thread too.
template <class Work> void run_parts(std::size_t parts, const Work &work) {
    std::vector<std::thread> others;
    others.reserve(parts);
    for (std::size_t i = 1; i < parts; ++i) {
        try {
            others.emplace_back(std::cref(work), i);
        } catch (const std::system_error &) {
            work(i);
        }
    }
    work(0);
    for (auto &thread : others) thread.join();
}

// Splits 0 ... n - 1 among threads where there is enough to do; `cost` is the operations of one item.
template <class Work> void split(std::size_t n, std::size_t cost, int threads, const Work &work) {
    constexpr std::size_t kSmall = 1 << 18;  // under this, starting a thread costs more than it saves
    const std::size_t wanted = n * cost < kSmall ? 1 : static_cast<std::size_t>(std::max(threads, 1));
    const std::size_t parts = std::max<std::size_t>(1, std::min(wanted, n));
    run_parts(parts, [&](std::size_t i) { work(n * i / parts, n * (i + 1) / parts); });
}

}  // namespace actlas
