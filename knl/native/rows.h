// Rows of floats or of bfloat16, read as floats and written from floats. For kernels that a caller
// compiles in several versions: all is inlined into it.
//
// Halves are taken apart as they lie, in words of two: of 32 numbers first come the even ones, then
// the odd ones, which needs no instruction that moves numbers between lanes. So the numbers of a
// row have places of their own, see number_at; what is left behind the last 32 keeps its order.

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

typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), aligned(2), may_alias));
constexpr int64_t kLanes = 16;
constexpr uint32_t kUpper = 0xffff0000;

// Which number of a row of `width` has this place in a row of Ts that was read.
template <typename T>
inline int64_t number_at(int64_t place, int64_t width) {
    const int64_t lane = place % (2 * kLanes), first = place - lane;
    if (sizeof(T) == sizeof(float) || first + 2 * kLanes > width) return place;
    return first + (lane < kLanes ? 2 * lane : 2 * (lane - kLanes) + 1);
}

// A row in float: itself, or made in `room`.
KNL_INLINE const float* widened(const float* row, int64_t, float*) { return row; }

KNL_INLINE const float* widened(const Half* row, int64_t width, float* room) {
    int64_t c = 0;
    for (; c + 2 * kLanes <= width; c += 2 * kLanes) {
        const Words pairs = *reinterpret_cast<const Words*>(row + c);
        *reinterpret_cast<Words*>(room + c) = pairs << 16;
        *reinterpret_cast<Words*>(room + c + kLanes) = pairs & kUpper;
    }
    for (; c < width; ++c) {
        const uint32_t bits = static_cast<uint32_t>(row[c]) << 16;
        __builtin_memcpy(room + c, &bits, sizeof bits);
    }
    return room;
}

// GCC does not see that a row is written before it is read.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

// With a bfloat16 in the upper half: the nearest, of two the even one; a nan stays one.
template <typename Bits, typename Number>
KNL_INLINE Bits rounded(const Number& value) {
    Bits bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return value == value ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
}

// Past the caches.
template <typename T>
KNL_INLINE void write_line(T* out, const T* line) {
    constexpr int64_t part = sizeof(__m128i) / sizeof(T);
    for (int64_t k = 0; k < kLine / static_cast<int64_t>(sizeof(T)); k += part)
        _mm_stream_si128(reinterpret_cast<__m128i*>(out + k),
                         _mm_load_si128(reinterpret_cast<const __m128i*>(line + k)));
}

// Writes make(place) for each place of a row.
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
    for (; c + 2 * kLanes <= width; c += 2 * kLanes) {
        const Words even = rounded<Words>(*reinterpret_cast<const Floats*>(row + c));
        const Words odd = rounded<Words>(*reinterpret_cast<const Floats*>(row + c + kLanes));
        *reinterpret_cast<Words*>(stream ? line : out + c) = even >> 16 | (odd & kUpper);
        if (stream) write_line(out + c, line);
    }
    for (; c < width; ++c) out[c] = static_cast<Half>(rounded<uint32_t>(row[c]) >> 16);
}

#pragma GCC diagnostic pop

}  // namespace
