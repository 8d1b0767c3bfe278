// BatchNorm in training with the ReLU and the residual sum that follow it, forward and backward, in
// as few passes over the activations as their statistics allow. See knl/models/norm.py.
//
// Activations are rows (sample and pixel) of channels, in float or bfloat16; all that is computed
// from them is float or double, and what is written is rounded once. Within kernels channels go by
// their places in a row (rows.h). Work is split into tasks of fixed size, whose partial sums are
// added in order: no bit depends on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "rows.h"

#define KNL_API extern "C" __attribute__((visibility("default")))
#define KNL_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))

namespace {

constexpr int64_t kParts = 128;    // tasks over the rows, unless they would get too few
constexpr int64_t kLeastRows = 64;
constexpr int64_t kBlock = 32;     // rows whose channels stay in the L1 cache and are added in float
// From so many bytes on an output is written past the caches: it would not stay there, and a line
// that is written through them is read from memory first.
constexpr int64_t kStreamFrom = 1 << 22;

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

bool streams(int64_t rows, int64_t channels, int64_t size, const void* out) {
    const bool aligned = reinterpret_cast<uintptr_t>(out) % sizeof(__m128i) == 0;
    return rows * channels * size >= kStreamFrom && channels * size % kLine == 0 && aligned;
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
template <typename T>
KNL_INLINE void moments_of(const T* x, int64_t channels, const Task& task, Moments* out) {
    alignas(64) float room[kWidth], mean[kWidth], squares[kWidth];
    std::fill(out, out + task.width, Moments{0.0, 0.0});
    for (int64_t begin = task.first_row; begin < task.last_row; begin += kBlock) {
        const int64_t end = std::min(begin + kBlock, task.last_row);
        const float share = 1.0f / static_cast<float>(end - begin);
        std::fill(mean, mean + task.width, 0.0f);
        std::fill(squares, squares + task.width, 0.0f);
        for (int64_t row = begin; row < end; ++row) {
            ask_ahead(x + row * channels + task.first, task.width);
            const float* in = widened(x + row * channels + task.first, task.width, room);
#pragma omp simd
            for (int64_t c = 0; c < task.width; ++c) mean[c] += in[c];
        }
#pragma omp simd
        for (int64_t c = 0; c < task.width; ++c) mean[c] *= share;
        for (int64_t row = begin; row < end; ++row) {
            const float* in = widened(x + row * channels + task.first, task.width, room);
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
template <typename T>
struct Source {
    const T *x, *add;
    const float *scale, *shift;
};

template <bool relu, bool residual, bool stream, typename T>
KNL_INLINE void normalise(const Source<T>& from, T* y, int64_t channels, const Task& task) {
    alignas(64) float rooms[2][kWidth];
    for (int64_t row = task.first_row; row < task.last_row; ++row) {
        const int64_t at = row * channels + task.first;
        ask_ahead(from.x + at, task.width);
        if (residual) ask_ahead(from.add + at, task.width);
        const float* x = widened(from.x + at, task.width, rooms[0]);
        const float* add = residual ? widened(from.add + at, task.width, rooms[1]) : nullptr;
        write_row<stream>(y + at, task.width, [&](int64_t c) __attribute__((always_inline)) {
            const int64_t k = task.first + c;
            float value = x[c] * from.scale[k] + from.shift[k];
            if (residual) value += add[c];
            return relu && value < 0.0f ? 0.0f : value;  // nan stays
        });
    }
    if (stream) _mm_sfence();
}

template <bool stream, typename T>
KNL_INLINE void normalise(const Source<T>& from, T* y, bool relu, int64_t channels,
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

// What backward reads and knows: gradient of the output, input, output (kFromOutput alone).
template <typename T>
struct Given {
    const T *dy, *x, *y;
    const float *scale, *shift, *mean;
};

// A row of it in float, its channels counted from the task's first.
struct Row {
    const float *dy, *x, *y;
    const float *scale, *shift, *mean;
};

template <Relu relu, typename T>
KNL_INLINE Row row_of(const Given<T>& given, int64_t at, const Task& task, float (*rooms)[kWidth]) {
    ask_ahead(given.dy + at, task.width);
    ask_ahead(given.x + at, task.width);
    if (relu == kFromOutput) ask_ahead(given.y + at, task.width);
    return {widened(given.dy + at, task.width, rooms[0]),
            widened(given.x + at, task.width, rooms[1]),
            relu == kFromOutput ? widened(given.y + at, task.width, rooms[2]) : nullptr,
            given.scale + task.first, given.shift + task.first, given.mean + task.first};
}

template <Relu relu>
KNL_INLINE float through(const Row& row, int64_t c) {
    const float gradient = row.dy[c];  // whatever comes of it: a vector has no branches
    if (relu == kNone) return gradient;
    const float value = relu == kFromOutput ? row.y[c] : row.x[c] * row.scale[c] + row.shift[c];
    return value <= 0.0f ? 0.0f : gradient;
}

struct Sums {
    double gradient, product;  // product: with the input's difference from its mean
};

template <Relu relu, typename T>
KNL_INLINE void reduce(const Given<T>& given, int64_t channels, const Task& task, Sums* out) {
    alignas(64) float rooms[3][kWidth], gradient[kWidth], product[kWidth];
    std::fill(out, out + task.width, Sums{0.0, 0.0});
    for (int64_t begin = task.first_row; begin < task.last_row; begin += kBlock) {
        std::fill(gradient, gradient + task.width, 0.0f);
        std::fill(product, product + task.width, 0.0f);
        for (int64_t n = begin; n < std::min(begin + kBlock, task.last_row); ++n) {
            const Row row = row_of<relu>(given, n * channels + task.first, task, rooms);
#pragma omp simd
            for (int64_t c = 0; c < task.width; ++c) {
                const float g = through<relu>(row, c);
                gradient[c] += g;
                product[c] += g * (row.x[c] - row.mean[c]);
            }
        }
        for (int64_t c = 0; c < task.width; ++c) {
            out[c].gradient += gradient[c];
            out[c].product += product[c];
        }
    }
}

// dx = a g + b (x - mean) + d, channel by channel
struct Line {
    std::vector<float> a, b, d;
};

template <Relu relu, bool stream, typename T>
KNL_INLINE void spread(const Given<T>& given, const Line& line, T* dx, T* dadd, int64_t channels,
                       const Task& task) {
    alignas(64) float rooms[3][kWidth];
    const float* const a = line.a.data() + task.first;
    const float* const b = line.b.data() + task.first;
    const float* const d = line.d.data() + task.first;
    for (int64_t n = task.first_row; n < task.last_row; ++n) {
        const int64_t at = n * channels + task.first;
        const Row row = row_of<relu>(given, at, task, rooms);
        write_row<stream>(dx + at, task.width, [&](int64_t c) __attribute__((always_inline)) {
            return a[c] * through<relu>(row, c) + b[c] * (row.x[c] - row.mean[c]) + d[c];
        });
        if (relu != kFromOutput) continue;
        write_row<stream>(dadd + at, task.width, [&](int64_t c) __attribute__((always_inline)) {
            return through<relu>(row, c);
        });
    }
    if (stream) _mm_sfence();
}

template <bool stream, typename T>
KNL_INLINE void spread(Relu relu, const Given<T>& given, const Line& line, T* dx, T* dadd,
                       int64_t channels, const Task& task) {
    if (relu == kNone) spread<kNone, stream>(given, line, dx, dadd, channels, task);
    if (relu == kFromInput) spread<kFromInput, stream>(given, line, dx, dadd, channels, task);
    if (relu == kFromOutput) spread<kFromOutput, stream>(given, line, dx, dadd, channels, task);
}

// A task of each kind, for each type of activations; templates cannot have versions.
#define KNL_TASKS(T)                                                                              \
    KNL_MULTIVERSION void moments_task(const T* x, int64_t channels, const Task& task,            \
                                       Moments* out) {                                            \
        moments_of(x, channels, task, out);                                                       \
    }                                                                                             \
    KNL_MULTIVERSION void normalise_task(const Source<T>& from, T* y, bool relu, bool stream,     \
                                         int64_t channels, const Task& task) {                    \
        if (stream) return normalise<true>(from, y, relu, channels, task);                        \
        normalise<false>(from, y, relu, channels, task);                                          \
    }                                                                                             \
    KNL_MULTIVERSION void reduce_task(Relu relu, const Given<T>& given, int64_t channels,         \
                                      const Task& task, Sums* out) {                              \
        if (relu == kNone) reduce<kNone>(given, channels, task, out);                             \
        if (relu == kFromInput) reduce<kFromInput>(given, channels, task, out);                   \
        if (relu == kFromOutput) reduce<kFromOutput>(given, channels, task, out);                 \
    }                                                                                             \
    KNL_MULTIVERSION void spread_task(Relu relu, bool stream, const Given<T>& given,              \
                                      const Line& line, T* dx, T* dadd, int64_t channels,         \
                                      const Task& task) {                                         \
        if (stream) return spread<true>(relu, given, line, dx, dadd, channels, task);             \
        spread<false>(relu, given, line, dx, dadd, channels, task);                               \
    }
KNL_TASKS(float)
KNL_TASKS(Half)

// y = scale x + shift, and the mean of x, by the channels' places in rows of Ts.
struct Affine {
    std::vector<float> scale, shift, mean;
};

template <typename T>
Affine affine_of(int64_t channels, const float* weight, const float* bias, const float* mean,
                 const float* inverse) {
    Affine affine{std::vector<float>(channels), std::vector<float>(channels),
                  std::vector<float>(channels)};
    for (int64_t p = 0; p < channels; ++p) {
        const int64_t c = number_at<T>(p, channels);
        affine.scale[p] = weight[c] * inverse[c];
        affine.shift[p] = bias[c] - mean[c] * affine.scale[p];
        affine.mean[p] = mean[c];
    }
    return affine;
}

template <typename T>
void forward(const T* x, const T* add, T* y, int64_t rows, int64_t channels, const float* weight,
             const float* bias, double eps, double momentum, bool relu, float* running_mean,
             float* running_var, float* mean, float* inverse) {
    const std::vector<Task> tasks = tasks_of(rows, channels);
    const int64_t count = static_cast<int64_t>(tasks.size());
    std::vector<Moments> partial((tasks.back().part + 1) * channels);

#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < count; ++t)
        moments_task(x, channels, tasks[t],
                     &partial[tasks[t].part * channels + tasks[t].first]);

    std::vector<Moments> total(channels, Moments{0.0, 0.0});
    for (const Task& task : tasks)
        for (int64_t c = task.first; c < task.first + task.width; ++c)
            merge(total[c], static_cast<double>(task.first_row), partial[task.part * channels + c],
                  static_cast<double>(task.last_row - task.first_row));
    for (int64_t p = 0; p < channels; ++p) {
        const int64_t c = number_at<T>(p, channels);
        const double unbiased = total[p].squares / static_cast<double>(rows - 1);
        mean[c] = static_cast<float>(total[p].mean);
        inverse[c] = static_cast<float>(
            1.0 / std::sqrt(total[p].squares / static_cast<double>(rows) + eps));
        running_mean[c] += static_cast<float>(momentum * (total[p].mean - running_mean[c]));
        running_var[c] += static_cast<float>(momentum * (unbiased - running_var[c]));
    }

    const bool stream = streams(rows, channels, sizeof(T), y);
    const Affine affine = affine_of<T>(channels, weight, bias, mean, inverse);
    const Source<T> from{x, add, affine.scale.data(), affine.shift.data()};

#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < count; ++t)
        normalise_task(from, y, relu, stream, channels, tasks[t]);
}

template <typename T>
void backward(const T* dy, const T* x, const T* y, int64_t rows, int64_t channels,
              const float* weight, const float* bias, const float* mean, const float* inverse,
              bool relu, T* dx, T* dadd, float* dweight, float* dbias) {
    const std::vector<Task> tasks = tasks_of(rows, channels);
    const int64_t count = static_cast<int64_t>(tasks.size());
    const Relu kind = !relu ? kNone : y ? kFromOutput : kFromInput;
    std::vector<Sums> partial((tasks.back().part + 1) * channels);
    const Affine affine = affine_of<T>(channels, weight, bias, mean, inverse);
    const Given<T> given{dy, x, y, affine.scale.data(), affine.shift.data(), affine.mean.data()};

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
    for (int64_t p = 0; p < channels; ++p) {
        const int64_t c = number_at<T>(p, channels);
        const double a = static_cast<double>(weight[c]) * inverse[c], n = static_cast<double>(rows);
        line.a[p] = static_cast<float>(a);
        line.b[p] = static_cast<float>(-a * inverse[c] * inverse[c] * total[p].product / n);
        line.d[p] = static_cast<float>(-a * total[p].gradient / n);
        dweight[c] = static_cast<float>(total[p].product * inverse[c]);
        dbias[c] = static_cast<float>(total[p].gradient);
    }
    const bool stream = streams(rows, channels, sizeof(T), dx);

#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < count; ++t)
        spread_task(kind, stream, given, line, dx, dadd, channels, tasks[t]);
}

}  // namespace

// y = weight (x - mean) / sqrt(variance + eps) + bias, plus `add` where it is not null, then ReLU
// where wanted. All of [rows][channels]. Returns the batch's mean and 1 / sqrt(variance + eps), and
// moves the running statistics by `momentum` (of the variance: the unbiased one).
KNL_API void knl_norm_forward(const float* x, const float* add, float* y, int64_t rows,
                              int64_t channels, const float* weight, const float* bias, double eps,
                              double momentum, int relu, float* running_mean, float* running_var,
                              float* mean, float* inverse) {
    forward(x, add, y, rows, channels, weight, bias, eps, momentum, relu != 0, running_mean,
            running_var, mean, inverse);
}

KNL_API void knl_norm_forward_bf16(const Half* x, const Half* add, Half* y, int64_t rows,
                                   int64_t channels, const float* weight, const float* bias,
                                   double eps, double momentum, int relu, float* running_mean,
                                   float* running_var, float* mean, float* inverse) {
    forward(x, add, y, rows, channels, weight, bias, eps, momentum, relu != 0, running_mean,
            running_var, mean, inverse);
}

// The gradients of forward's x, weight and bias, and of `add` where there was one and a ReLU (y and
// dadd are null else; without a ReLU the gradient of `add` is dy). `mean`, `inverse`: forward's.
KNL_API void knl_norm_backward(const float* dy, const float* x, const float* y, int64_t rows,
                               int64_t channels, const float* weight, const float* bias,
                               const float* mean, const float* inverse, int relu, float* dx,
                               float* dadd, float* dweight, float* dbias) {
    backward(dy, x, y, rows, channels, weight, bias, mean, inverse, relu != 0, dx, dadd, dweight,
             dbias);
}

KNL_API void knl_norm_backward_bf16(const Half* dy, const Half* x, const Half* y, int64_t rows,
                                    int64_t channels, const float* weight, const float* bias,
                                    const float* mean, const float* inverse, int relu, Half* dx,
                                    Half* dadd, float* dweight, float* dbias) {
    backward(dy, x, y, rows, channels, weight, bias, mean, inverse, relu != 0, dx, dadd, dweight,
             dbias);
}
