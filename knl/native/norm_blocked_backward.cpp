// The gradients of norm_blocked.cpp.

#include <vector>

#include "planes.h"

#define KNL_API extern "C" __attribute__((visibility("default")))
#define KNL_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))

namespace {

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

}  // namespace

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
