// BatchNorm in training with the ReLU and the residual sum that follow it, forward and backward, in
// as few passes over the activations as their statistics allow. See knl/models/norm.py.
//
// Activations are rows (sample and pixel) of channels. Work is split into tasks of fixed size, whose
// partial sums are added in order: no bit depends on the number of threads.

#include <xmmintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#define KNL_API extern "C" __attribute__((visibility("default")))
#define KNL_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#define KNL_INLINE inline __attribute__((always_inline))

namespace {

constexpr int64_t kWidth = 256;    // channels of a task
constexpr int64_t kParts = 128;    // tasks over the rows, unless they would get too few
constexpr int64_t kLeastRows = 64;
constexpr int64_t kBlock = 32;     // rows whose channels stay in the L1 cache and are added in float
constexpr int64_t kAhead = 512;    // floats
constexpr int64_t kLine = 16;      // floats
// From so many floats on an output is written past the caches: it would not stay there, and a line
// that is written through them is read from memory first.
constexpr int64_t kStreamFrom = 1 << 20;

// Whether a ReLU follows, and from what backward finds where it was zero: without a residual the
// output is made again from the input, which backward reads anyway.
enum Relu { kNone, kFromInput, kFromOutput };

struct Task {
    int64_t part, first_row, last_row, first, width;  // `first`: channel
};

std::vector<Task> tasks_of(int64_t rows, int64_t channels) {
    const int64_t each = std::max((rows + kParts - 1) / kParts, kLeastRows);
    std::vector<Task> tasks;
    for (int64_t row = 0, part = 0; row < rows; row += each, ++part)
        for (int64_t first = 0; first < channels; first += kWidth)
            tasks.push_back({part, row, std::min(row + each, rows), first,
                             std::min(kWidth, channels - first)});
    return tasks;
}

// The hardware's own prefetching stops at pages.
inline void ask_ahead(const float* row, int64_t width) {
    for (int64_t c = 0; c < width; c += 16) __builtin_prefetch(row + c + kAhead);
}

bool streams(int64_t rows, int64_t channels, const float* out) {
    const bool aligned = reinterpret_cast<uintptr_t>(out) % (4 * sizeof(float)) == 0;
    return rows * channels >= kStreamFrom && channels % kLine == 0 && aligned;
}

// Writes make(c) for each channel c of a task's row.
template <bool stream, typename Make>
KNL_INLINE void write_row(float* out, int64_t width, const Make& make) {
    for (int64_t c = 0; stream && c < width; c += kLine) {
        alignas(64) float line[kLine];
#pragma omp simd
        for (int64_t k = 0; k < kLine; ++k) line[k] = make(c + k);
        for (int64_t k = 0; k < kLine; k += 4) _mm_stream_ps(out + c + k, _mm_load_ps(line + k));
    }
    if (stream) return;
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) out[c] = make(c);
}

struct Moments {
    double mean, squares;  // squares: of the differences from the mean
};

void merge(Moments& into, double count, const Moments& other, double more) {
    const double delta = other.mean - into.mean, all = count + more;
    into.mean += delta * more / all;
    into.squares += other.squares + delta * delta * count * more / all;
}

// Mean and squares of each channel of a task. Two passes over a block that the cache holds: the
// difference of large sums would lose the variance of channels far from zero.
KNL_MULTIVERSION void moments_of(const float* x, int64_t channels, const Task& task, Moments* out) {
    float mean[kWidth], squares[kWidth];
    std::fill(out, out + task.width, Moments{0.0, 0.0});
    for (int64_t begin = task.first_row; begin < task.last_row; begin += kBlock) {
        const int64_t end = std::min(begin + kBlock, task.last_row);
        const float share = 1.0f / static_cast<float>(end - begin);
        std::fill(mean, mean + task.width, 0.0f);
        std::fill(squares, squares + task.width, 0.0f);
        for (int64_t row = begin; row < end; ++row) {
            const float* in = x + row * channels + task.first;
            ask_ahead(in, task.width);
#pragma omp simd
            for (int64_t c = 0; c < task.width; ++c) mean[c] += in[c];
        }
#pragma omp simd
        for (int64_t c = 0; c < task.width; ++c) mean[c] *= share;
        for (int64_t row = begin; row < end; ++row) {
            const float* in = x + row * channels + task.first;
#pragma omp simd
            for (int64_t c = 0; c < task.width; ++c)
                squares[c] += (in[c] - mean[c]) * (in[c] - mean[c]);
        }
        const double before = static_cast<double>(begin - task.first_row);
        for (int64_t c = 0; c < task.width; ++c)
            merge(out[c], before, {mean[c], squares[c]}, static_cast<double>(end - begin));
    }
}

// Forward's input, what is added to its output, and the output's scale and shift by channel.
struct Source {
    const float *x, *add, *scale, *shift;
};

template <bool relu, bool residual, bool stream>
KNL_INLINE void normalise(const Source& from, float* y, int64_t channels, const Task& task) {
    for (int64_t row = task.first_row; row < task.last_row; ++row) {
        const int64_t at = row * channels + task.first;
        ask_ahead(from.x + at, task.width);
        if (residual) ask_ahead(from.add + at, task.width);
        write_row<stream>(y + at, task.width, [&](int64_t c) __attribute__((always_inline)) {
            const int64_t k = task.first + c;
            float value = from.x[at + c] * from.scale[k] + from.shift[k];
            if (residual) value += from.add[at + c];
            return relu && value < 0.0f ? 0.0f : value;  // nan stays
        });
    }
    if (stream) _mm_sfence();
}

template <bool stream>
KNL_INLINE void normalise(const Source& from, float* y, bool relu, int64_t channels,
                          const Task& task) {
    if (from.add && relu)
        normalise<true, true, stream>(from, y, channels, task);
    else if (from.add)
        normalise<false, true, stream>(from, y, channels, task);
    else if (relu)
        normalise<true, false, stream>(from, y, channels, task);
    else
        normalise<false, false, stream>(from, y, channels, task);
}

KNL_MULTIVERSION void normalise_task(const Source& from, float* y, bool relu, bool stream,
                                     int64_t channels, const Task& task) {
    if (stream)
        normalise<true>(from, y, relu, channels, task);
    else
        normalise<false>(from, y, relu, channels, task);
}

// What backward reads and knows: gradient of the output, input, output (kFromOutput alone).
struct Given {
    const float *dy, *x, *y;
    const float *scale, *shift, *mean;
};

template <Relu relu>
KNL_INLINE float through(const Given& given, int64_t at, int64_t c) {
    const float gradient = given.dy[at];  // whatever comes of it: a vector has no branches
    if (relu == kNone) return gradient;
    const float value =
        relu == kFromOutput ? given.y[at] : given.x[at] * given.scale[c] + given.shift[c];
    return value <= 0.0f ? 0.0f : gradient;
}

struct Sums {
    double gradient, product;  // product: with the input's difference from its mean
};

template <Relu relu>
KNL_INLINE void reduce(const Given& given, int64_t channels,
                                                  const Task& task, Sums* out) {
    float gradient[kWidth], product[kWidth];
    std::fill(out, out + task.width, Sums{0.0, 0.0});
    for (int64_t begin = task.first_row; begin < task.last_row; begin += kBlock) {
        std::fill(gradient, gradient + task.width, 0.0f);
        std::fill(product, product + task.width, 0.0f);
        for (int64_t row = begin; row < std::min(begin + kBlock, task.last_row); ++row) {
            const int64_t at = row * channels + task.first;
            ask_ahead(given.dy + at, task.width);
            ask_ahead(given.x + at, task.width);
            if (relu == kFromOutput) ask_ahead(given.y + at, task.width);
#pragma omp simd
            for (int64_t c = 0; c < task.width; ++c) {
                const float g = through<relu>(given, at + c, task.first + c);
                gradient[c] += g;
                product[c] += g * (given.x[at + c] - given.mean[task.first + c]);
            }
        }
        for (int64_t c = 0; c < task.width; ++c) {
            out[c].gradient += gradient[c];
            out[c].product += product[c];
        }
    }
}

KNL_MULTIVERSION void reduce_task(Relu relu, const Given& given, int64_t channels,
                                  const Task& task, Sums* out) {
    if (relu == kNone) reduce<kNone>(given, channels, task, out);
    if (relu == kFromInput) reduce<kFromInput>(given, channels, task, out);
    if (relu == kFromOutput) reduce<kFromOutput>(given, channels, task, out);
}

// dx = a g + b (x - mean) + d, channel by channel
struct Line {
    std::vector<float> a, b, d;
};

template <Relu relu, bool stream>
KNL_INLINE void spread(const Given& given, const Line& line, float* dx, float* dadd,
                       int64_t channels, const Task& task) {
    const float *a = line.a.data(), *b = line.b.data(), *d = line.d.data();
    for (int64_t row = task.first_row; row < task.last_row; ++row) {
        const int64_t at = row * channels + task.first;
        ask_ahead(given.dy + at, task.width);
        ask_ahead(given.x + at, task.width);
        if (relu == kFromOutput) ask_ahead(given.y + at, task.width);
        write_row<stream>(dx + at, task.width, [&](int64_t c) __attribute__((always_inline)) {
            const int64_t k = task.first + c;
            const float g = through<relu>(given, at + c, k);
            return a[k] * g + b[k] * (given.x[at + c] - given.mean[k]) + d[k];
        });
        if (relu != kFromOutput) continue;
        write_row<stream>(dadd + at, task.width, [&](int64_t c) __attribute__((always_inline)) {
            return through<relu>(given, at + c, task.first + c);
        });
    }
    if (stream) _mm_sfence();
}

template <bool stream>
KNL_INLINE void spread(Relu relu, const Given& given, const Line& line, float* dx, float* dadd,
                       int64_t channels, const Task& task) {
    if (relu == kNone) spread<kNone, stream>(given, line, dx, dadd, channels, task);
    if (relu == kFromInput) spread<kFromInput, stream>(given, line, dx, dadd, channels, task);
    if (relu == kFromOutput) spread<kFromOutput, stream>(given, line, dx, dadd, channels, task);
}

KNL_MULTIVERSION void spread_task(Relu relu, bool stream, const Given& given, const Line& line,
                                  float* dx, float* dadd, int64_t channels, const Task& task) {
    if (stream)
        spread<true>(relu, given, line, dx, dadd, channels, task);
    else
        spread<false>(relu, given, line, dx, dadd, channels, task);
}

// Scale and shift of y = scale x + shift.
void affine_of(int64_t channels, const float* weight, const float* bias, const float* mean,
               const float* inverse, std::vector<float>& scale, std::vector<float>& shift) {
    for (int64_t c = 0; c < channels; ++c) {
        scale[c] = weight[c] * inverse[c];
        shift[c] = bias[c] - mean[c] * scale[c];
    }
}

}  // namespace

// y = weight (x - mean) / sqrt(variance + eps) + bias, plus `add` where it is not null, then ReLU
// where wanted. All of [rows][channels]. Returns the batch's mean and 1 / sqrt(variance + eps), and
// moves the running statistics by `momentum` (of the variance: the unbiased one).
KNL_API void knl_norm_forward(const float* x, const float* add, float* y, int64_t rows,
                              int64_t channels, const float* weight, const float* bias, double eps,
                              double momentum, int relu, float* running_mean, float* running_var,
                              float* mean, float* inverse) {
    const std::vector<Task> tasks = tasks_of(rows, channels);
    const int64_t count = static_cast<int64_t>(tasks.size());
    std::vector<Moments> partial((tasks.back().part + 1) * channels);
    std::vector<float> scale(channels), shift(channels);

#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < count; ++t)
        moments_of(x, channels, tasks[t], &partial[tasks[t].part * channels + tasks[t].first]);

    std::vector<Moments> total(channels, Moments{0.0, 0.0});
    for (const Task& task : tasks)
        for (int64_t c = task.first; c < task.first + task.width; ++c)
            merge(total[c], static_cast<double>(task.first_row), partial[task.part * channels + c],
                  static_cast<double>(task.last_row - task.first_row));
    for (int64_t c = 0; c < channels; ++c) {
        const double unbiased = total[c].squares / static_cast<double>(rows - 1);
        mean[c] = static_cast<float>(total[c].mean);
        inverse[c] = static_cast<float>(
            1.0 / std::sqrt(total[c].squares / static_cast<double>(rows) + eps));
        running_mean[c] += static_cast<float>(momentum * (total[c].mean - running_mean[c]));
        running_var[c] += static_cast<float>(momentum * (unbiased - running_var[c]));
    }
    affine_of(channels, weight, bias, mean, inverse, scale, shift);

    const bool stream = streams(rows, channels, y);
    const Source from{x, add, scale.data(), shift.data()};

#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < count; ++t)
        normalise_task(from, y, relu != 0, stream, channels, tasks[t]);
}

// The gradients of forward's x, weight and bias, and of `add` where there was one and a ReLU (y and
// dadd are null else; without a ReLU the gradient of `add` is dy). `mean`, `inverse`: forward's.
KNL_API void knl_norm_backward(const float* dy, const float* x, const float* y, int64_t rows,
                               int64_t channels, const float* weight, const float* bias,
                               const float* mean, const float* inverse, int relu, float* dx,
                               float* dadd, float* dweight, float* dbias) {
    const std::vector<Task> tasks = tasks_of(rows, channels);
    const int64_t count = static_cast<int64_t>(tasks.size());
    const Relu kind = !relu ? kNone : y ? kFromOutput : kFromInput;
    std::vector<Sums> partial((tasks.back().part + 1) * channels);
    std::vector<float> scale(channels), shift(channels);
    affine_of(channels, weight, bias, mean, inverse, scale, shift);
    const Given given{dy, x, y, scale.data(), shift.data(), mean};

#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < count; ++t)
        reduce_task(kind, given, channels, tasks[t],
                    &partial[tasks[t].part * channels + tasks[t].first]);

    std::vector<Sums> total(channels, Sums{0.0, 0.0});
    for (int64_t part = 0; part <= tasks.back().part; ++part)
        for (int64_t c = 0; c < channels; ++c) {
            total[c].gradient += partial[part * channels + c].gradient;
            total[c].product += partial[part * channels + c].product;
        }
    Line line{std::vector<float>(channels), std::vector<float>(channels),
              std::vector<float>(channels)};
    for (int64_t c = 0; c < channels; ++c) {
        const double a = static_cast<double>(weight[c]) * inverse[c], n = static_cast<double>(rows);
        line.a[c] = static_cast<float>(a);
        line.b[c] = static_cast<float>(-a * inverse[c] * inverse[c] * total[c].product / n);
        line.d[c] = static_cast<float>(-a * total[c].gradient / n);
        dweight[c] = static_cast<float>(total[c].product * inverse[c]);
        dbias[c] = static_cast<float>(total[c].gradient);
    }
    const bool stream = streams(rows, channels, dx);

#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < count; ++t)
        spread_task(kind, stream, given, line, dx, dadd, channels, tasks[t]);
}
