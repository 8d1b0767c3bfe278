// Rows of floats or of bfloat16, read as floats and written from floats. For kernels that a caller
// compiles in several versions: all is inlined into it.

#pragma once

#include <emmintrin.h>

#include <cstdint>

#define KNL_INLINE inline __attribute__((always_inline))

namespace {

typedef uint16_t Half;  // bfloat16: the upper half of a float

constexpr int64_t kWidth = 256;   // the most numbers of a row
constexpr int64_t kLine = 64;     // bytes
constexpr int64_t kAhead = 2048;  // bytes

// The hardware's own prefetching stops at pages.
template <typename T>
KNL_INLINE void ask_ahead(const T* row, int64_t width) {
    const char* bytes = reinterpret_cast<const char*>(row) + kAhead;
    for (int64_t at = 0; at < width * static_cast<int64_t>(sizeof(T)); at += kLine)
        __builtin_prefetch(bytes + at);
}

// Explicit vectors: those that the compiler finds for halves are slower.
typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));
typedef Half Halves __attribute__((vector_size(32), aligned(2), may_alias));
constexpr int64_t kLanes = 16;

// A row in float: itself, or made in `room`.
KNL_INLINE const float* widened(const float* row, int64_t, float*) { return row; }

KNL_INLINE const float* widened(const Half* row, int64_t width, float* room) {
    int64_t c = 0;
    for (; c + kLanes <= width; c += kLanes)
        *reinterpret_cast<Words*>(room + c) =
            __builtin_convertvector(*reinterpret_cast<const Halves*>(row + c), Words) << 16;
    for (; c < width; ++c) {
        const uint32_t bits = static_cast<uint32_t>(row[c]) << 16;
        __builtin_memcpy(room + c, &bits, sizeof bits);
    }
    return room;
}

// GCC does not see that a row is written before it is read.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

// To nearest, ties to even; a nan stays one.
template <typename Bits, typename Number>
KNL_INLINE Bits narrowed(const Number& value) {
    Bits bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return value == value ? rounded : bits >> 16 | 0x40;
}

// Past the caches.
template <typename T>
KNL_INLINE void write_line(T* out, const T* line) {
    constexpr int64_t part = sizeof(__m128i) / sizeof(T);
    for (int64_t k = 0; k < kLine / static_cast<int64_t>(sizeof(T)); k += part)
        _mm_stream_si128(reinterpret_cast<__m128i*>(out + k),
                         _mm_load_si128(reinterpret_cast<const __m128i*>(line + k)));
}

// Writes make(c) for each number c of a row.
template <bool stream, typename Make>
KNL_INLINE void write_row(float* out, int64_t width, const Make& make) {
    for (int64_t c = 0; stream && c < width; c += kLanes) {
        alignas(64) float line[kLanes];
#pragma omp simd
        for (int64_t k = 0; k < kLanes; ++k) line[k] = make(c + k);
        write_line(out + c, line);
    }
    if (stream) return;
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) out[c] = make(c);
}

template <bool stream, typename Make>
KNL_INLINE void write_row(Half* out, int64_t width, const Make& make) {
    alignas(64) float row[kWidth];
    alignas(64) Half line[2 * kLanes];
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) row[c] = make(c);
    int64_t c = 0;
    for (; c + kLanes <= width; c += kLanes) {
        const Floats values = *reinterpret_cast<const Floats*>(row + c);
        Half* const to = stream ? line + c % (2 * kLanes) : out + c;
        *reinterpret_cast<Halves*>(to) = __builtin_convertvector(narrowed<Words>(values), Halves);
        if (stream && c % (2 * kLanes)) write_line(out + c - kLanes, line);
    }
    for (; c < width; ++c) out[c] = static_cast<Half>(narrowed<uint32_t>(row[c]));
}

#pragma GCC diagnostic pop

}  // namespace
