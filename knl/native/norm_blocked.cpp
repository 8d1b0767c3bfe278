// BatchNorm in training with the ReLU and the residual sum that follow it, on activations in
// oneDNN's blocked layout, [sample][channels / block][pixel][block]. See knl/models/norm.py; the
// kernels for channels-last are in norm.cpp.
//
// A plane is one sample's pixels of one block of channels: contiguous, and as wide as a register.
// Partial sums are kept by plane and added in order: no bit depends on the number of threads.
// A pass over the planes goes backwards where the one before it went forwards: what was read or
// written last is still in the cache.

#include <xmmintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#define KNL_API extern "C" __attribute__((visibility("default")))
#define KNL_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
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

struct Moments {
    double mean[kMost], squares[kMost];  // squares: of the differences from the mean
};

KNL_INLINE void merge(Moments& into, double count, const Moments& other, double more, int block) {
    const double share = more / (count + more), weight = count * share;
    for (int c = 0; c < block; ++c) {
        const double delta = other.mean[c] - into.mean[c];
        into.mean[c] += delta * share;
        into.squares[c] += other.squares[c] + delta * delta * weight;
    }
}

// Two passes over a chunk that the cache holds: the difference of large sums would lose the variance
// of channels far from zero.
template <int block>
KNL_INLINE void moments(const float* x, int64_t pixels, Moments& out) {
    out = Moments{};
    for (int64_t begin = 0; begin < pixels; begin += kChunk) {
        const int64_t end = std::min(begin + kChunk, pixels);
        Floats<block> chains[kChains] = {};
        int64_t p = begin;
        for (; p + kChains <= end; p += kChains)
            for (int k = 0; k < kChains; ++k) {
                __builtin_prefetch(x + (p + k) * block + kAhead);
                chains[k] += load<block>(x + (p + k) * block);
            }
        for (; p < end; ++p) chains[0] += load<block>(x + p * block);
        const double count = static_cast<double>(end - begin);
        const Floats<block> mean = ((chains[0] + chains[1]) + (chains[2] + chains[3])) *
                                   static_cast<float>(1.0 / count);
        for (int k = 0; k < kChains; ++k) chains[k] = Floats<block>{};
        for (p = begin; p + kChains <= end; p += kChains)
            for (int k = 0; k < kChains; ++k) {
                const Floats<block> delta = load<block>(x + (p + k) * block) - mean;
                chains[k] += delta * delta;
            }
        for (; p < end; ++p) {
            const Floats<block> delta = load<block>(x + p * block) - mean;
            chains[0] += delta * delta;
        }
        Moments chunk{};
        add_to<block>(chunk.squares, chains);
        for (int c = 0; c < block; ++c) chunk.mean[c] = mean[c];
        merge(out, static_cast<double>(begin), chunk, count, block);
    }
}

KNL_MULTIVERSION void moments_of(const Shape& s, const float* x, int64_t plane, Moments& out) {
    x += plane * s.plane_floats();
    if (s.block == 16)
        moments<16>(x, s.pixels, out);
    else
        moments<8>(x, s.pixels, out);
}

// Of one plane; `add` may be null, and so may `signs`: for each channel a word of kSigns pixels, with
// a bit set where the ReLU lets the output pass. `scale`, `shift`: of its channels.
struct Forward {
    const float *x, *add, *scale, *shift;
    float* y;
    int32_t* signs;
    bool relu;
};

template <int block, bool stream, bool add>
KNL_INLINE void normalise(const Forward& f, int64_t pixels) {
    const Floats<block> scale = load<block>(f.scale), shift = load<block>(f.shift);
    for (int64_t begin = 0; begin < pixels; begin += kSigns) {
        const int64_t end = std::min(begin + kSigns, pixels);
        Bits<block> word{}, bit = Bits<block>{} + 1;
        for (int64_t at = begin * block; at < end * block; at += block, bit += bit) {
            __builtin_prefetch(f.x + at + kAhead);
            if (add) __builtin_prefetch(f.add + at + kAhead);
            Floats<block> value = load<block>(f.x + at) * scale + shift;
            if (add) value += load<block>(f.add + at);
            const Bits<block> keep = passes<block>(value);
            word |= keep & bit;
            store<block, stream>(f.y + at, f.relu ? masked<block>(value, keep) : value);
        }
        if (f.signs) *reinterpret_cast<Bits<block>*>(f.signs + begin / kSigns * block) = word;
    }
    if (stream) _mm_sfence();
}

template <int block>
KNL_INLINE void normalise(const Forward& f, int64_t pixels, bool stream) {
    if (stream)
        f.add ? normalise<block, true, true>(f, pixels) : normalise<block, true, false>(f, pixels);
    else
        f.add ? normalise<block, false, true>(f, pixels) : normalise<block, false, false>(f, pixels);
}

KNL_MULTIVERSION void normalise_plane(const Shape& s, const Forward& f, bool stream) {
    s.block == 16 ? normalise<16>(f, s.pixels, stream) : normalise<8>(f, s.pixels, stream);
}

// How backward learns where a ReLU was zero: from forward's signs where there is a residual sum,
// else from the input, which it reads anyway.
enum Relu { kNone, kFromInput, kFromSigns };

// Of one plane. `more`: a second gradient of the output, or null. With kFromSigns or `more` the
// gradient that has passed the ReLU is written to `through` and read again from there.
struct Backward {
    const float *dy, *more, *x;
    const int32_t* signs;
    const float *scale, *shift, *mean;
    float *through, *dx;
};

struct Sums {
    double gradient[kMost], product[kMost];  // product: with the input's difference from its mean
};

template <int block, Relu relu, bool more>
KNL_INLINE Floats<block> gradient_at(const Backward& b, int64_t pixel, Floats<block> x,
                                     Floats<block> scale, Floats<block> shift) {
    Floats<block> g = load<block>(b.dy + pixel * block);
    if (more) g += load<block>(b.more + pixel * block);
    if (relu == kFromInput) g = masked<block>(g, passes<block>(x * scale + shift));
    if (relu == kFromSigns) {
        const auto* words = reinterpret_cast<const Bits<block>*>(b.signs + pixel / kSigns * block);
        const int32_t bit = static_cast<int32_t>(1u << (pixel % kSigns));
        g = masked<block>(g, (*words & bit) != Bits<block>{});
    }
    return g;
}

template <int block, Relu relu, bool more, bool stream>
KNL_INLINE void reduce(const Backward& b, int64_t pixels, Sums& out) {
    const Floats<block> scale = load<block>(b.scale), shift = load<block>(b.shift);
    const Floats<block> mean = load<block>(b.mean);
    out = Sums{};
    for (int64_t begin = 0; begin < pixels; begin += kChunk) {
        const int64_t end = std::min(begin + kChunk, pixels);
        Floats<block> gradients[kChains] = {}, products[kChains] = {};
        const auto take = [&](int64_t p, int k) __attribute__((always_inline)) {
            const int64_t at = p * block;
            __builtin_prefetch(b.dy + at + kAhead);
            __builtin_prefetch(b.x + at + kAhead);
            if (more) __builtin_prefetch(b.more + at + kAhead);
            const Floats<block> x = load<block>(b.x + at);
            const Floats<block> g = gradient_at<block, relu, more>(b, p, x, scale, shift);
            if (relu == kFromSigns || more) store<block, stream>(b.through + at, g);
            gradients[k] += g;
            products[k] += g * (x - mean);
        };
        int64_t p = begin;
        for (; p + kChains <= end; p += kChains)
            for (int k = 0; k < kChains; ++k) take(p + k, k);
        for (; p < end; ++p) take(p, 0);
        add_to<block>(out.gradient, gradients);
        add_to<block>(out.product, products);
    }
    if (stream) _mm_sfence();
}

template <int block, Relu relu>
KNL_INLINE void reduce(const Backward& b, int64_t pixels, bool stream, Sums& out) {
    if (b.more)
        stream ? reduce<block, relu, true, true>(b, pixels, out)
               : reduce<block, relu, true, false>(b, pixels, out);
    else
        stream ? reduce<block, relu, false, true>(b, pixels, out)
               : reduce<block, relu, false, false>(b, pixels, out);
}

template <int block>
KNL_INLINE void reduce(Relu relu, const Backward& b, int64_t pixels, bool stream, Sums& out) {
    if (relu == kNone) reduce<block, kNone>(b, pixels, stream, out);
    if (relu == kFromInput) reduce<block, kFromInput>(b, pixels, stream, out);
    if (relu == kFromSigns) reduce<block, kFromSigns>(b, pixels, stream, out);
}

KNL_MULTIVERSION void reduce_plane(const Shape& s, Relu relu, const Backward& b, bool stream,
                                   Sums& out) {
    s.block == 16 ? reduce<16>(relu, b, s.pixels, stream, out)
                  : reduce<8>(relu, b, s.pixels, stream, out);
}

// dx = a g + b (x - mean) + d, channel by channel: `pa`, `pb`, `pd` of one block of channels
template <int block, Relu relu, bool stream>
KNL_INLINE void spread(const Backward& b, const float* pa, const float* pb, const float* pd,
                       int64_t pixels) {
    const Floats<block> scale = load<block>(b.scale), shift = load<block>(b.shift);
    const Floats<block> mean = load<block>(b.mean), a = load<block>(pa), slope = load<block>(pb);
    const Floats<block> d = load<block>(pd);
    for (int64_t p = 0; p < pixels; ++p) {
        const int64_t at = p * block;
        __builtin_prefetch(b.dy + at + kAhead);
        __builtin_prefetch(b.x + at + kAhead);
        const Floats<block> x = load<block>(b.x + at);
        const Floats<block> g = gradient_at<block, relu, false>(b, p, x, scale, shift);
        store<block, stream>(b.dx + at, a * g + slope * (x - mean) + d);
    }
    if (stream) _mm_sfence();
}

template <int block, bool stream>
KNL_INLINE void spread(Relu relu, const Backward& b, const float* pa, const float* pb,
                       const float* pd, int64_t pixels) {
    if (relu == kFromInput)
        spread<block, kFromInput, stream>(b, pa, pb, pd, pixels);
    else
        spread<block, kNone, stream>(b, pa, pb, pd, pixels);
}

KNL_MULTIVERSION void spread_plane(const Shape& s, Relu relu, const Backward& b, bool stream,
                                   const float* pa, const float* pb, const float* pd) {
    if (s.block == 16)
        stream ? spread<16, true>(relu, b, pa, pb, pd, s.pixels)
               : spread<16, false>(relu, b, pa, pb, pd, s.pixels);
    else
        stream ? spread<8, true>(relu, b, pa, pb, pd, s.pixels)
               : spread<8, false>(relu, b, pa, pb, pd, s.pixels);
}

bool streams(const Shape& s, const float* out) {
    return s.planes() * s.plane_floats() >= kStreamFrom &&
           reinterpret_cast<uintptr_t>(out) % (4 * sizeof(float)) == 0;
}

template <typename Number>
Number* moved(Number* from, int64_t count) {
    return from ? from + count : nullptr;
}

}  // namespace

// Rows of `affine`: mean, 1 / sqrt(variance + eps), and scale and shift of y = scale x + shift.

// `affine` of a batch. Moves the running statistics by `momentum` (of the variance: the unbiased
// one).
KNL_API void knl_norm_blocked_statistics(const float* x, int64_t samples, int64_t blocks,
                                         int64_t pixels, int64_t block, const float* weight,
                                         const float* bias, double eps, double momentum,
                                         float* running_mean, float* running_var, float* affine) {
    const Shape s{samples, blocks, pixels, static_cast<int>(block)};
    const int64_t channels = blocks * block;
    const double count = static_cast<double>(samples * pixels);
    float *mean = affine, *inverse = mean + channels, *scale = inverse + channels;
    float* shift = scale + channels;
    std::vector<Moments> partial(s.planes());
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < s.planes(); ++n) {
        const int64_t plane = s.planes() - 1 - n;
        moments_of(s, x, plane, partial[plane]);
    }
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
        Moments total{};
        for (int64_t n = 0; n < samples; ++n)
            merge(total, static_cast<double>(n * pixels), partial[n * blocks + b],
                  static_cast<double>(pixels), s.block);
        for (int k = 0; k < s.block; ++k) {
            const int64_t c = b * block + k;
            const double unbiased = total.squares[k] / (count - 1.0);
            mean[c] = static_cast<float>(total.mean[k]);
            inverse[c] = static_cast<float>(1.0 / std::sqrt(total.squares[k] / count + eps));
            running_mean[c] += static_cast<float>(momentum * (total.mean[k] - running_mean[c]));
            running_var[c] += static_cast<float>(momentum * (unbiased - running_var[c]));
            scale[c] = weight[c] * inverse[c];
            shift[c] = bias[c] - mean[c] * scale[c];
        }
    }
}

// Words of `signs` for knl_norm_blocked_apply.
KNL_API int64_t knl_norm_blocked_signs(int64_t samples, int64_t blocks, int64_t pixels,
                                       int64_t block) {
    const Shape s{samples, blocks, pixels, static_cast<int>(block)};
    return s.planes() * s.plane_signs();
}

// y = scale x + shift, by channel, plus `add` where it is not null, then ReLU where wanted. `signs`:
// where the ReLU let the output pass, for backward; or null.
KNL_API void knl_norm_blocked_apply(const float* x, const float* add, float* y, int64_t samples,
                                    int64_t blocks, int64_t pixels, int64_t block,
                                    const float* scale, const float* shift, int relu,
                                    int32_t* signs) {
    const Shape s{samples, blocks, pixels, static_cast<int>(block)};
    const bool stream = streams(s, y);
#pragma omp parallel for schedule(static)
    for (int64_t plane = 0; plane < s.planes(); ++plane) {
        const int64_t at = plane * s.plane_floats(), c = s.channel_of(plane);
        const Forward f{x + at, moved(add, at), scale + c, shift + c, y + at,
                        moved(signs, plane * s.plane_signs()), relu != 0};
        normalise_plane(s, f, stream);
    }
}

// The gradients of x, weight and bias. `dy`, `more` (or null): gradients of the output, which count
// together. `signs`: forward's, where a residual was added before a ReLU, else null. `through`: the
// gradient that has passed the ReLU, the residual's, written where there are `signs` or a `more`.
KNL_API void knl_norm_blocked_backward(const float* dy, const float* more, const float* x,
                                       const int32_t* signs, int64_t samples, int64_t blocks,
                                       int64_t pixels, int64_t block, const float* affine,
                                       const float* weight, int relu, float* through, float* dx,
                                       float* dweight, float* dbias) {
    const Shape s{samples, blocks, pixels, static_cast<int>(block)};
    const int64_t channels = blocks * block;
    const double count = static_cast<double>(samples * pixels);
    const Relu kind = !relu ? kNone : signs ? kFromSigns : kFromInput;
    const float *mean = affine, *inverse = mean + channels, *scale = inverse + channels;
    const float* shift = scale + channels;
    std::vector<Sums> partial(s.planes());
    std::vector<float> a(channels), b(channels), d(channels);
    const bool stream = streams(s, dx);
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < s.planes(); ++n) {
        const int64_t plane = s.planes() - 1 - n;
        const int64_t at = plane * s.plane_floats(), c = s.channel_of(plane);
        const Backward given{dy + at,   moved(more, at),
                             x + at,    moved(signs, plane * s.plane_signs()),
                             scale + c, shift + c,
                             mean + c,  moved(through, at),
                             nullptr};
        reduce_plane(s, kind, given, stream, partial[plane]);
    }
#pragma omp parallel for schedule(static)
    for (int64_t k = 0; k < blocks; ++k) {
        Sums total{};
        for (int64_t n = 0; n < samples; ++n)
            for (int j = 0; j < s.block; ++j) {
                total.gradient[j] += partial[n * blocks + k].gradient[j];
                total.product[j] += partial[n * blocks + k].product[j];
            }
        for (int j = 0; j < s.block; ++j) {
            const int64_t c = k * block + j;
            const double slope = static_cast<double>(weight[c]) * inverse[c];
            const double spread = inverse[c] * static_cast<double>(inverse[c]);
            a[c] = static_cast<float>(slope);
            b[c] = static_cast<float>(-slope * spread * total.product[j] / count);
            d[c] = static_cast<float>(-slope * total.gradient[j] / count);
            dweight[c] = static_cast<float>(total.product[j] * inverse[c]);
            dbias[c] = static_cast<float>(total.gradient[j]);
        }
    }
    const Relu left = through ? kNone : kind;  // for the second reading
#pragma omp parallel for schedule(static)
    for (int64_t plane = 0; plane < s.planes(); ++plane) {
        const int64_t at = plane * s.plane_floats(), c = s.channel_of(plane);
        const Backward given{(through ? through : dy) + at, nullptr,  x + at,  nullptr, scale + c,
                             shift + c,                     mean + c, nullptr, dx + at};
        spread_plane(s, left, given, stream, &a[c], &b[c], &d[c]);
    }
}
