// Layer-wise momentum update of a whole model in one call. See knl/optim/lars.py for the forms.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#define KNL_API extern "C" __attribute__((visibility("default")))
// One build runs on every node: KNL takes avx512f, AMD Zen 3 and older Xeons avx2.
#define KNL_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))

namespace {

// Chunks have a fixed length, so the order in which partial norms are added, and with it every
// bit of the result, does not depend on the number of threads. 16,384 floats of weight, gradient
// and momentum (192 KiB) fit in the L2 cache of a KNL tile.
constexpr int64_t kChunk = 16384;

enum Form { kPaper, kTorch, kNus, kLarc, kSgd };

struct Chunk {
    int tensor;
    int64_t begin;
    int64_t end;
};

struct Squares {
    double weight;
    double gradient;
};

// Sums in double: a float sum over 25 M squares is off by more than 1 %.
KNL_MULTIVERSION
Squares sum_squares(const float* w, const float* g, int64_t n) {
    double ww = 0.0, gg = 0.0;
#pragma omp simd reduction(+ : ww, gg)
    for (int64_t i = 0; i < n; ++i) {
        ww += static_cast<double>(w[i]) * w[i];
        gg += static_cast<double>(g[i]) * g[i];
    }
    return {ww, gg};
}

// v = m v + a (scale g + decay w);  w -= b v
KNL_MULTIVERSION
void update(float* w, const float* g, float* v, int64_t n, float momentum, float a, float b,
            float scale, float decay) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const float velocity = momentum * v[i] + a * (scale * g[i] + decay * w[i]);
        v[i] = velocity;
        w[i] -= b * velocity;
    }
}

std::vector<Chunk> split(int tensors, const int64_t* sizes) {
    std::vector<Chunk> chunks;
    for (int t = 0; t < tensors; ++t)
        for (int64_t begin = 0; begin < sizes[t]; begin += kChunk)
            chunks.push_back({t, begin, std::min(begin + kChunk, sizes[t])});
    return chunks;
}

struct Factors {
    float into_velocity;  // a
    float into_weight;    // b
};

Factors factors(int form, double trust, double lr) {
    switch (form) {
        case kPaper: return {static_cast<float>(lr * trust), 1.0f};
        case kTorch: return {static_cast<float>(trust), static_cast<float>(lr)};
        case kNus: return {1.0f, static_cast<float>(lr * trust)};
        case kLarc: return {static_cast<float>(trust), static_cast<float>(lr)};
        default: return {1.0f, static_cast<float>(lr)};
    }
}

}  // namespace

// Updates `tensors` weights in place. Pointers are to dense float arrays of sizes[t] elements in
// one and the same memory order. decays[t] is the tensor's weight decay; adapts[t] 0 leaves its
// trust ratio at 1. The gradient is scaled by `scale` wherever it is used. trusts[t] returns the
// ratio applied. Returns -1, or the first tensor whose norm is not finite: nothing is changed then.
KNL_API int knl_lars_step(int form, int tensors, float* const* weights,
                          const float* const* gradients, float* const* momenta,
                          const int64_t* sizes, const float* decays, const uint8_t* adapts,
                          double lr, double momentum, double eta, double max_trust, double scale,
                          double* trusts) {
    const std::vector<Chunk> chunks = split(tensors, sizes);
    const int64_t count = static_cast<int64_t>(chunks.size());
    std::vector<Squares> partial(chunks.size());
    std::vector<Factors> factor(tensors);
    int broken = -1;

#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t c = 0; c < count; ++c) {
            const Chunk& k = chunks[c];
            partial[c] = sum_squares(weights[k.tensor] + k.begin, gradients[k.tensor] + k.begin,
                                     k.end - k.begin);
        }
#pragma omp single
        {
            std::vector<Squares> total(tensors, Squares{0.0, 0.0});
            for (int64_t c = 0; c < count; ++c) {
                total[chunks[c].tensor].weight += partial[c].weight;
                total[chunks[c].tensor].gradient += partial[c].gradient;
            }
            for (int t = 0; t < tensors && broken < 0; ++t) {
                const double w = std::sqrt(total[t].weight);
                const double g = std::abs(scale) * std::sqrt(total[t].gradient);
                if (!std::isfinite(w) || !std::isfinite(g)) broken = t;
                double trust = 1.0;
                if (form != kSgd && adapts[t] && w > 0.0 && g > 0.0) {
                    trust = std::min(eta * w / (g + decays[t] * w), max_trust);
                    if (form == kLarc) trust = lr > 0.0 ? std::min(trust / lr, 1.0) : 1.0;
                }
                trusts[t] = trust;
                factor[t] = factors(form, trust, lr);
            }
        }
        if (broken < 0) {
#pragma omp for schedule(static)
            for (int64_t c = 0; c < count; ++c) {
                const Chunk& k = chunks[c];
                update(weights[k.tensor] + k.begin, gradients[k.tensor] + k.begin,
                       momenta[k.tensor] + k.begin, k.end - k.begin,
                       static_cast<float>(momentum), factor[k.tensor].into_velocity,
                       factor[k.tensor].into_weight, static_cast<float>(scale), decays[k.tensor]);
            }
        }
    }
    return broken;
}
