// Layer-wise momentum update of many tensors in one call. See knl/optim/lars.py for the forms.
//
// A norm has to be known before the update that depends on it, and memory is the limit, so:
// - The squares of the new weights are added up by the update, which has them in registers: the
//   next call finds the weights' norm made. Only gradients are read twice, and they are not either
//   where who summed them over the ranks has left their squares (node_sum.cpp).
// - Gradients come from memory once where the two readings lie close together: tensors are taken in
//   waves that fit into the threads' L2 caches, and each thread updates the very pieces whose
//   squares it has just added up. A wave costs one barrier whatever its tensors' number.

#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "squares.h"

#define KNL_API extern "C" __attribute__((visibility("default")))

namespace {

// A thread's gradients of a wave may take this share of an L2 cache: two cores share one on a KNL,
// and weights and momentum pass through it as well.
constexpr int64_t kCacheShare = 4;
constexpr int64_t kUsualCache = 1 << 20;

enum Form { kPaper, kTorch, kNus, kLarc, kSgd };

struct Settings {
    int form;
    double lr, momentum, eta, max_trust, scale;
};

struct Tensor {
    float* weight;
    const void* gradient;
    float* momentum;
    double* weight_squares;  // one sum a piece, kept by the caller between calls
    int64_t size;
    float decay;
    bool adapts;
    bool bf16;   // of the gradient; weight and momentum are float
    bool known;  // whether weight_squares are those of `weight`
    int first_piece, last_piece;
};

struct Piece {
    int tensor;
    int64_t begin, end;  // elements of the tensor
    int64_t offset;      // elements of all pieces before it
};

struct Wave {
    int first_piece, last_piece;
};

struct Squares {
    double weight, gradient;
};

template <typename Doubles>
KNL_INLINE double squares_in(const void* x, bool bf16, int64_t begin, int64_t end) {
    if (bf16) return squares<Doubles>(static_cast<const uint16_t*>(x) + begin, end - begin);
    return squares<Doubles>(static_cast<const float*>(x) + begin, end - begin);
}

KNL_TARGET("avx512f") double squares_of(const void* x, bool bf16, int64_t begin, int64_t end) {
    return squares_in<Wide>(x, bf16, begin, end);
}
KNL_TARGET("avx2") double squares_of(const void* x, bool bf16, int64_t begin, int64_t end) {
    return squares_in<Narrow>(x, bf16, begin, end);
}
KNL_TARGET("default") double squares_of(const void* x, bool bf16, int64_t begin, int64_t end) {
    return squares_in<Narrow>(x, bf16, begin, end);
}

struct Factors {
    float into_velocity;  // a
    float into_weight;    // b
    float momentum, scale, decay;
};

// v = m v + a (scale g + decay w);  w -= b v. Returns the sum of squares of the new weights.
template <typename Doubles, typename Gradient>
KNL_INLINE double update(float* w, const Gradient* g, float* v, int64_t n, const Factors f) {
    Sum<Doubles> sum;
    int64_t i = 0;
    for (; i + kLine <= n; i += kLine) {
        __builtin_prefetch(w + i + kAhead, 1);
        __builtin_prefetch(g + i + kAhead);
        __builtin_prefetch(v + i + kAhead, 1);
        Floats moved[2];
        for (int half = 0; half < 2; ++half) {
            const int64_t k = i + half * kLine / 2;
            Floats gradient, weight, velocity;
            load(gradient, g + k);
            load(weight, w + k);
            load(velocity, v + k);
            const Floats decayed = f.scale * gradient + f.decay * weight;
            velocity = f.momentum * velocity + f.into_velocity * decayed;
            moved[half] = weight - f.into_weight * velocity;
            store(v + k, velocity);
            store(w + k, moved[half]);
        }
        sum.add(moved[0], moved[1]);
    }
    for (; i < n; ++i) {
        v[i] = f.momentum * v[i] + f.into_velocity * (f.scale * widened(g[i]) + f.decay * w[i]);
        w[i] -= f.into_weight * v[i];
        sum.add(w[i]);
    }
    return sum.total();
}

template <typename Doubles>
KNL_INLINE double update_in(const Tensor& t, const Piece& p, const Factors& f) {
    const int64_t n = p.end - p.begin;
    float *w = t.weight + p.begin, *v = t.momentum + p.begin;
    if (t.bf16)
        return update<Doubles>(w, static_cast<const uint16_t*>(t.gradient) + p.begin, v, n, f);
    return update<Doubles>(w, static_cast<const float*>(t.gradient) + p.begin, v, n, f);
}

KNL_TARGET("avx512f") double update_piece(const Tensor& t, const Piece& p, const Factors& f) {
    return update_in<Wide>(t, p, f);
}
KNL_TARGET("avx2") double update_piece(const Tensor& t, const Piece& p, const Factors& f) {
    return update_in<Narrow>(t, p, f);
}
KNL_TARGET("default") double update_piece(const Tensor& t, const Piece& p, const Factors& f) {
    return update_in<Narrow>(t, p, f);
}

std::vector<Piece> split(std::vector<Tensor>& tensors) {
    std::vector<Piece> pieces;
    int64_t offset = 0;
    for (size_t t = 0; t < tensors.size(); ++t) {
        tensors[t].first_piece = static_cast<int>(pieces.size());
        for (int64_t begin = 0; begin < tensors[t].size; begin += kPiece) {
            const int64_t end = std::min(begin + kPiece, tensors[t].size);
            pieces.push_back({static_cast<int>(t), begin, end, offset});
            offset += end - begin;
        }
        tensors[t].last_piece = static_cast<int>(pieces.size());
    }
    return pieces;
}

// Elements of a wave whose gradients fit into the threads' caches.
int64_t cached_elements(int threads) {
    const long cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
    const int64_t share = (cache > 0 ? cache : kUsualCache) / kCacheShare;
    return share * threads / static_cast<int64_t>(sizeof(float));
}

// Whole tensors of at most so many elements; a larger one is a wave alone.
std::vector<Wave> waves_of(const std::vector<Tensor>& tensors, int64_t most) {
    std::vector<Wave> waves;
    int64_t elements = 0;
    for (const Tensor& tensor : tensors) {
        if (waves.empty() || elements + tensor.size > most) {
            waves.push_back({tensor.first_piece, tensor.first_piece});
            elements = 0;
        }
        waves.back().last_piece = tensor.last_piece;
        elements += tensor.size;
    }
    return waves;
}

// The pieces of a wave that are this thread's: equal numbers of elements, in order.
Wave share_of(const Wave& wave, const std::vector<Piece>& pieces, int thread, int threads) {
    if (wave.first_piece == wave.last_piece) return wave;
    const int64_t begin = pieces[wave.first_piece].offset;
    const Piece& last = pieces[wave.last_piece - 1];
    const int64_t size = last.offset + (last.end - last.begin) - begin;
    const auto first_from = [&](int n) {
        const int64_t offset = begin + size * n / threads;
        const auto found = std::lower_bound(
            pieces.begin() + wave.first_piece, pieces.begin() + wave.last_piece, offset,
            [](const Piece& piece, int64_t wanted) { return piece.offset < wanted; });
        return static_cast<int>(found - pieces.begin());
    };
    return {first_from(thread), first_from(thread + 1)};
}

Squares total(const Tensor& tensor, const std::vector<double>& gradient_squares) {
    Squares sum{0.0, 0.0};
    for (int p = tensor.first_piece; p < tensor.last_piece; ++p) {
        sum.weight += tensor.weight_squares[p - tensor.first_piece];
        sum.gradient += gradient_squares[p];
    }
    return sum;
}

// The first tensor of the wave whose norms are not finite, -1 where all are.
int broken_in(const Wave& wave, const std::vector<Piece>& pieces,
              const std::vector<Tensor>& tensors, const std::vector<double>& gradient_squares) {
    for (int p = wave.first_piece; p < wave.last_piece; p = tensors[pieces[p].tensor].last_piece) {
        const Squares sum = total(tensors[pieces[p].tensor], gradient_squares);
        if (!std::isfinite(sum.weight) || !std::isfinite(sum.gradient)) return pieces[p].tensor;
    }
    return -1;
}

double trust_of(const Settings& s, const Tensor& tensor, const Squares& sum) {
    const double w = std::sqrt(sum.weight);
    const double g = std::abs(s.scale) * std::sqrt(sum.gradient);
    if (s.form == kSgd || !tensor.adapts || !(w > 0.0) || !(g > 0.0)) return 1.0;
    const double trust = std::min(s.eta * w / (g + tensor.decay * w), s.max_trust);
    if (s.form == kLarc) return s.lr > 0.0 ? std::min(trust / s.lr, 1.0) : 1.0;
    return trust;
}

Factors factors_of(const Settings& s, const Tensor& tensor, double trust) {
    double a = 1.0, b = s.lr;
    if (s.form == kPaper) a = s.lr * trust, b = 1.0;
    if (s.form == kTorch || s.form == kLarc) a = trust;
    if (s.form == kNus) b = s.lr * trust;
    return {static_cast<float>(a), static_cast<float>(b), static_cast<float>(s.momentum),
            static_cast<float>(s.scale), tensor.decay};
}

// Those that nobody has made yet.
void add_squares(const Tensor& tensor, int number, const Piece& piece, bool given,
                 std::vector<double>& gradient_squares) {
    if (!given)
        gradient_squares[number] = squares_of(tensor.gradient, tensor.bf16, piece.begin, piece.end);
    if (!tensor.known)
        tensor.weight_squares[number - tensor.first_piece] =
            squares_of(tensor.weight, false, piece.begin, piece.end);
}

void update_pieces(const Settings& settings, const Wave& mine, const std::vector<Piece>& pieces,
                   const std::vector<Tensor>& tensors, const std::vector<double>& gradient_squares,
                   std::vector<double>& moved_squares, double* trusts) {
    int p = mine.first_piece;
    while (p < mine.last_piece) {
        const int number = pieces[p].tensor;
        const Tensor& tensor = tensors[number];
        const double trust = trust_of(settings, tensor, total(tensor, gradient_squares));
        const Factors factors = factors_of(settings, tensor, trust);
        if (p == tensor.first_piece) trusts[number] = trust;
        for (; p < mine.last_piece && p < tensor.last_piece; ++p)
            moved_squares[p] = update_piece(tensor, pieces[p], factors);
    }
}

}  // namespace

// How many sums of squares a tensor of `size` elements has.
KNL_API int64_t knl_lars_pieces(int64_t size) { return (size + kPiece - 1) / kPiece; }

// Updates `count` weights in place. Pointers are to dense arrays of sizes[t] elements in one and
// the same memory order: floats, but for the gradients with bf16[t] set. weight_squares[t] is room
// for knl_lars_pieces(sizes[t]) sums, kept from call to call; known[t] says that the weights are as
// the last call left them. decays[t] is the tensor's weight decay; adapts[t] 0 leaves its trust
// ratio at 1. The gradient is scaled by `scale` wherever it is used. trusts[t] returns the ratio
// applied. `squares`, where it is not null: those of the gradients, a sum a piece, tensor after
// tensor; then nothing is read twice. Returns -1, or the first tensor whose norm is not finite: it
// and those of its wave and after are left as they were, and no weight_squares are known.
KNL_API int knl_lars_update(int form, int count, float* const* weights,
                            const void* const* gradients, float* const* momenta,
                            double* const* weight_squares, const int64_t* sizes,
                            const float* decays, const uint8_t* adapts, const uint8_t* bf16,
                            const uint8_t* known, double lr, double momentum, double eta,
                            double max_trust, double scale, double* trusts,
                            const double* squares) {
    const Settings settings{form, lr, momentum, eta, max_trust, scale};
    std::vector<Tensor> tensors;
    tensors.reserve(count);
    for (int t = 0; t < count; ++t)
        tensors.push_back({weights[t], gradients[t], momenta[t], weight_squares[t], sizes[t],
                           decays[t], adapts[t] != 0, bf16[t] != 0, known[t] != 0, 0, 0});
    const std::vector<Piece> pieces = split(tensors);
    std::vector<double> gradient_squares(pieces.size()), moved_squares(pieces.size());
    if (squares) std::copy(squares, squares + pieces.size(), gradient_squares.begin());
    std::vector<Wave> waves;
    int broken = -1;

#pragma omp parallel
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
#pragma omp single
        waves = waves_of(tensors, squares ? INT64_MAX : cached_elements(threads));
        for (const Wave& wave : waves) {
            const Wave mine = share_of(wave, pieces, thread, threads);
            for (int p = mine.first_piece; p < mine.last_piece; ++p)
                add_squares(tensors[pieces[p].tensor], p, pieces[p], squares, gradient_squares);
#pragma omp barrier
            // Every thread judges the whole wave, so that all leave it alike without another wait.
            const int found = broken_in(wave, pieces, tensors, gradient_squares);
            if (found >= 0) {
                if (thread == 0) broken = found;
                break;
            }
            update_pieces(settings, mine, pieces, tensors, gradient_squares, moved_squares,
                          trusts);
        }
    }
    // Not before: other threads may still have been adding up the old ones.
    for (const Tensor& t : tensors)
        std::copy(moved_squares.begin() + t.first_piece, moved_squares.begin() + t.last_piece,
                  t.weight_squares);
    return broken;
}
