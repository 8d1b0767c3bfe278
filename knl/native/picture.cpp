// Pictures as they come from a decoder to what a network reads. See knl/data/picture.py.
//
// A loader thread makes one picture at a time, so nothing here is parallel. Pixels are interleaved,
// red, green, blue.

#include <xmmintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define KNL_API extern "C" __attribute__((visibility("default")))
#define KNL_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#define KNL_INLINE inline __attribute__((always_inline))

namespace {

constexpr int64_t kColours = 3;
constexpr int64_t kRows = 4;  // made together
typedef float Pixel __attribute__((vector_size(16)));  // the fourth number is not used

// For each output the first input that counts, and the weights of it and those that follow.
struct Taps {
    int64_t most;  // of any output
    std::vector<int64_t> first, count;
    std::vector<float> weights;  // [outputs, most]
};

// The triangle filter, as wide as the shrinking asks for: PIL's antialiased BILINEAR, whose inputs
// end where the box ends.
Taps taps_of(double start, double length, int64_t inputs, int64_t outputs) {
    const double scale = length / outputs, wide = std::max(scale, 1.0);
    const int64_t low = std::max<int64_t>(0, std::floor(start));
    const int64_t high = std::min<int64_t>(inputs, std::ceil(start + length));
    Taps taps;
    taps.most = 2 * static_cast<int64_t>(std::ceil(wide)) + 1;
    taps.first.resize(outputs);
    taps.count.resize(outputs);
    taps.weights.assign(outputs * taps.most, 0.0f);
    for (int64_t i = 0; i < outputs; ++i) {
        const double centre = start + (i + 0.5) * scale;
        const int64_t first = std::clamp<int64_t>(std::floor(centre - wide + 0.5), low, high - 1);
        const int64_t last = std::clamp<int64_t>(std::floor(centre + wide + 0.5), first + 1, high);
        int64_t count = std::min(last - first, taps.most);
        float* weights = &taps.weights[i * taps.most];
        double sum = 0.0;
        for (int64_t k = 0; k < count; ++k) {
            const double away = std::abs((first + k + 0.5 - centre) / wide);
            weights[k] = static_cast<float>(std::max(0.0, 1.0 - away));
            sum += weights[k];
        }
        if (sum <= 0.0) weights[0] = 1.0f, sum = 1.0;
        while (count > 1 && weights[count - 1] == 0.0f) --count;  // a plain crop has one tap
        for (int64_t k = 0; k < count; ++k) weights[k] = static_cast<float>(weights[k] / sum);
        taps.first[i] = first;
        taps.count[i] = count;
    }
    return taps;
}

// row = sum over k of weights[k] * the k-th picture row; so many of them in one pass.
template <int taps, bool add>
KNL_INLINE void mix_some(const uint8_t* picture, int64_t stride, const float* weights,
                         int64_t width, float* row) {
    for (int64_t c = 0; c < width; ++c) {
        float sum = add ? row[c] : 0.0f;
        for (int k = 0; k < taps; ++k) sum += weights[k] * picture[k * stride + c];
        row[c] = sum;
    }
}

KNL_MULTIVERSION
void mix_rows(const uint8_t* picture, int64_t stride, const float* weights, int64_t count,
              int64_t width, float* row) {
    switch (std::min<int64_t>(count, 4)) {
        case 1: mix_some<1, false>(picture, stride, weights, width, row); break;
        case 2: mix_some<2, false>(picture, stride, weights, width, row); break;
        case 3: mix_some<3, false>(picture, stride, weights, width, row); break;
        default: mix_some<4, false>(picture, stride, weights, width, row);
    }
    for (int64_t k = 4; k < count; ++k)
        mix_some<1, true>(picture + k * stride, stride, weights + k, width, row);
}

inline Pixel load(const float* from) {
    Pixel pixel;
    std::memcpy(&pixel, from, sizeof pixel);
    return pixel;
}

// kRows output rows, `made_stride` apart, from as many mixed ones, which lie `stride` apart and
// whose first pixel is the picture's column `left`. Each pixel is written with a fourth number, over
// which the next one is.
KNL_MULTIVERSION
void mix_columns(const float* rows, int64_t stride, int64_t left, const Taps& taps, bool flip,
                 Pixel scale, Pixel shift, float* made, int64_t made_stride) {
    const int64_t size = taps.first.size(), step = flip ? -1 : 1;
    int64_t x = flip ? size - 1 : 0;
    for (int64_t i = 0; i < size; ++i, x += step) {
        const float* weights = &taps.weights[x * taps.most];
        const float* from = rows + (taps.first[x] - left) * kColours;
        Pixel sums[kRows] = {};
        for (int64_t k = 0; k < taps.count[x]; ++k)
            for (int64_t r = 0; r < kRows; ++r)
                sums[r] += weights[k] * load(from + r * stride + k * kColours);
        for (int64_t r = 0; r < kRows; ++r) {
            const Pixel pixel = sums[r] * scale + shift;
            std::memcpy(made + r * made_stride + i * kColours, &pixel, sizeof pixel);
        }
    }
}

// Past the caches where it can be: another thread reads it much later, and a line that is written
// through them is read from memory first.
void put_row(const float* row, int64_t count, float* out) {
    int64_t c = 0;
    if (reinterpret_cast<uintptr_t>(out) % (4 * sizeof(float)) == 0)
        for (; c + 4 <= count; c += 4) _mm_stream_ps(out + c, _mm_loadu_ps(row + c));
    std::memcpy(out + c, row + c, (count - c) * sizeof(float));
}

}  // namespace

// Shrinks or magnifies the box (left, top, width, height; in pixels, may be fractions) of a
// picture [rows, columns, 3] to `out` [size, size, 3], mirrors it where `flip`, and takes each
// colour times `scale` plus `shift` [3].
KNL_API void knl_picture_resize(const uint8_t* picture, int64_t rows, int64_t columns,
                                const double* box, int64_t size, int32_t flip, const float* scale,
                                const float* shift, float* out) {
    const Taps across = taps_of(box[0], box[2], columns, size);
    const Taps down = taps_of(box[1], box[3], rows, size);
    const int64_t left = across.first[0];
    int64_t right = left;
    for (int64_t i = 0; i < size; ++i) right = std::max(right, across.first[i] + across.count[i]);
    const int64_t width = (right - left) * kColours, made_width = size * kColours;
    const Pixel scales = {scale[0], scale[1], scale[2], 0.0f};
    const Pixel shifts = {shift[0], shift[1], shift[2], 0.0f};
    // A pixel is loaded and written with a fourth number.
    const int64_t stride = width + 1, made_stride = made_width + 1;
    thread_local std::vector<float> mixed, made;
    mixed.assign(kRows * stride, 0.0f);
    made.assign(kRows * made_stride, 0.0f);
    for (int64_t begin = 0; begin < size; begin += kRows) {
        // The last rows are made again where kRows does not divide the size.
        const int64_t y = std::max<int64_t>(0, std::min(begin, size - kRows));
        for (int64_t r = 0; r < kRows; ++r)
            mix_rows(picture + (down.first[y + r] * columns + left) * kColours, columns * kColours,
                     &down.weights[(y + r) * down.most], down.count[y + r], width,
                     mixed.data() + r * stride);
        mix_columns(mixed.data(), stride, left, across, flip != 0, scales, shifts, made.data(),
                    made_stride);
        for (int64_t r = 0; r < kRows; ++r)
            put_row(made.data() + r * made_stride, made_width, out + (y + r) * made_width);
    }
    _mm_sfence();
}

// pixels [count, 3]: each becomes matrix [3, 3] times it, plus shift [3].
KNL_API KNL_MULTIVERSION void knl_picture_colour(float* pixels, int64_t count, const float* matrix,
                                                 const float* shift) {
    for (int64_t i = 0; i < count; ++i) {
        float* pixel = pixels + i * kColours;
        const float red = pixel[0], green = pixel[1], blue = pixel[2];
        for (int64_t c = 0; c < kColours; ++c) {
            const float* row = matrix + c * kColours;
            pixel[c] = row[0] * red + row[1] * green + row[2] * blue + shift[c];
        }
    }
}
