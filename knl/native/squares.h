// Sums of squares of floats, of what is in memory and of what a kernel has in registers, the same
// to the bit: a gradient's are made by whoever has it at hand, and used by LARS.
#pragma once

#include <cstdint>

#define KNL_INLINE inline __attribute__((always_inline))
// One build runs on every node: KNL takes avx512f, AMD Zen 3 and older Xeons avx2. Each version is
// written out, because a sum's vectors are to be as wide as the registers (Sum).
#define KNL_TARGET(isa) __attribute__((target(isa)))

// A tensor has a sum for each so many elements. Pieces have a fixed length, so the order in which
// squares are added, and with it every bit of the result, does not depend on the number of threads.
// Many a thread, so that all get alike.
constexpr int64_t kPiece = 4096;
// Elements: a cache line of floats, and how far ahead one is asked for. The hardware's own
// prefetching leaves a fifth of the bandwidth unused, and 512 still a tenth on a Zen 5 that has its
// memory to itself; where others use it too, 1024 is too far. An L1 cache holds three such streams.
constexpr int64_t kLine = 16;
constexpr int64_t kAhead = 768;

typedef float Floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef double Wide __attribute__((vector_size(64)));    // a register of AVX-512
typedef double Narrow __attribute__((vector_size(32)));  // and of AVX2

KNL_INLINE float widened(float value) { return value; }

KNL_INLINE float widened(uint16_t bf16) {  // the upper half of a float
    const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

KNL_INLINE void load(Floats& to, const float* from) { to = *reinterpret_cast<const Floats*>(from); }

KNL_INLINE void load(Floats& to, const uint16_t* from) {
    const Halves halves = *reinterpret_cast<const Halves*>(from);
    to = reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
}

KNL_INLINE void store(float* to, const Floats& from) { *reinterpret_cast<Floats*>(to) = from; }

// In double: a float sum over 25 M squares is off by more than 1 %. Each lane adds on its own, in
// the same order whoever adds. `Doubles`: a register's worth. A sum in wider vectors would live on
// the stack, where each addition waits for the stores of the one before: on AVX2 an update took
// twice as long.
template <typename Doubles>
struct Sum {
    static constexpr int kParts = kLine * sizeof(double) / sizeof(Doubles);
    static constexpr int kLanes = kLine / kParts;
    Doubles lanes[kParts] = {};
    double rest = 0.0;

    KNL_INLINE void add(const Floats& first, const Floats& second) {
        const Wide line[2] = {__builtin_convertvector(first, Wide),
                              __builtin_convertvector(second, Wide)};
        Doubles parts[kParts];
        __builtin_memcpy(parts, line, sizeof parts);
        for (int k = 0; k < kParts; ++k) lanes[k] += parts[k] * parts[k];
    }
    KNL_INLINE void add(float value) { rest += static_cast<double>(value) * value; }
    KNL_INLINE double total() const {
        double sum = rest;
        for (int k = 0; k < kLine; ++k) sum += lanes[k / kLanes][k % kLanes];
        return sum;
    }
};

template <typename Doubles, typename Number>
KNL_INLINE double squares(const Number* x, int64_t n) {
    Sum<Doubles> sum;
    int64_t i = 0;
    for (; i + kLine <= n; i += kLine) {
        __builtin_prefetch(x + i + kAhead);
        Floats first, second;
        load(first, x + i);
        load(second, x + i + kLine / 2);
        sum.add(first, second);
    }
    for (; i < n; ++i) sum.add(widened(x[i]));
    return sum.total();
}
