// BatchNorm in training with the ReLU and the residual sum that follow it, on activations in
// oneDNN's blocked layout: forward. See planes.h for the layout and knl/models/blocked_norm.py for the
// callers; the kernels for channels-last are in norm.cpp.

#include <cmath>
#include <vector>

#include "planes.h"

#define KNL_API extern "C" __attribute__((visibility("default")))
#define KNL_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))

namespace {

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
