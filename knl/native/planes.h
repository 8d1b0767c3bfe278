// Planes of oneDNN's blocked layout, [sample][channels / block][pixel][block], for the kernels of
// norm_blocked.cpp and norm_blocked_backward.cpp. All is inlined into what a caller compiles in several
// versions.
//
// A plane is one sample's pixels of one block of channels: contiguous, and as wide as a register.
// Partial sums are kept by plane and added in order: no bit depends on the number of threads.
// A pass over the planes goes backwards where the one before it went forwards: what was read or
// written last is still in the cache.

#pragma once

#include <xmmintrin.h>

#include <algorithm>
#include <cstdint>

#define KNL_INLINE inline __attribute__((always_inline))

namespace {

constexpr int kMost = 16;         // channels of a block, at most
constexpr int64_t kChunk = 128;   // pixels that stay in the L1 cache and are added in float
constexpr int64_t kSigns = 32;    // pixels whose signs make up a word of each channel
constexpr int kChains = 4;        // independent sums, to hide the latency of an addition
constexpr int64_t kAhead = 512;   // floats
// From so many floats on an output is written past the caches: it would not stay there, and a line
// that is written through them is read from memory first.
constexpr int64_t kStreamFrom = 1 << 20;

template <int block>
struct Vector {
    typedef float Floats __attribute__((vector_size(block * 4), aligned(4), may_alias));
    typedef int32_t Bits __attribute__((vector_size(block * 4), aligned(4), may_alias));
};
template <int block>
using Floats = typename Vector<block>::Floats;
template <int block>
using Bits = typename Vector<block>::Bits;

struct Shape {
    int64_t samples, blocks, pixels;
    int block;
    int64_t planes() const { return samples * blocks; }
    int64_t plane_floats() const { return pixels * block; }
    int64_t plane_signs() const { return (pixels + kSigns - 1) / kSigns * block; }
    int64_t channel_of(int64_t plane) const { return plane % blocks * block; }
};

template <int block>
KNL_INLINE Floats<block> load(const float* from) {
    return *reinterpret_cast<const Floats<block>*>(from);
}

template <int block, bool stream>
KNL_INLINE void store(float* to, Floats<block> value) {
    if (!stream) {
        *reinterpret_cast<Floats<block>*>(to) = value;
        return;
    }
    alignas(64) float line[block];
    *reinterpret_cast<Floats<block>*>(line) = value;
    for (int k = 0; k < block; k += 4) _mm_stream_ps(to + k, _mm_load_ps(line + k));
}

// All bits of the channels that a ReLU lets pass; nan counts as above zero.
template <int block>
KNL_INLINE Bits<block> passes(Floats<block> value) {
    return ~reinterpret_cast<Bits<block>>(value <= Floats<block>{});
}

template <int block>
KNL_INLINE Floats<block> masked(Floats<block> value, Bits<block> keep) {
    return reinterpret_cast<Floats<block>>(reinterpret_cast<Bits<block>>(value) & keep);
}

template <int block>
KNL_INLINE void add_to(double* total, const Floats<block>* chains) {
    alignas(64) float line[block];
    *reinterpret_cast<Floats<block>*>(line) = (chains[0] + chains[1]) + (chains[2] + chains[3]);
    for (int c = 0; c < block; ++c) total[c] += line[c];
}

inline bool streams(const Shape& s, const float* out) {
    return s.planes() * s.plane_floats() >= kStreamFrom &&
           reinterpret_cast<uintptr_t>(out) % (4 * sizeof(float)) == 0;
}

template <typename Number>
Number* moved(Number* from, int64_t count) {
    return from ? from + count : nullptr;
}

}  // namespace
