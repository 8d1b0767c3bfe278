// Sums over the ranks of one node, straight out of and into each other's buffers in shared memory.
// See knl/comm/node.py for the protocol.

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdint>

#define KNL_API extern "C" __attribute__((visibility("default")))
#define KNL_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))

namespace {

// What a rank has done with a buffer: the number of the last round it has filled it for, and of the
// last one whose share of the sum it has spread. Two cache lines: others poll them.
struct alignas(64) Count {
    uint64_t round;
};
struct Slot {
    Count filled, spread;
};
static_assert(sizeof(Slot) == 128, "knl/comm/node.py lays the slots out");

constexpr int64_t kPiece = 4096;  // floats of a thread's turn
constexpr int64_t kLine = 16;
constexpr int64_t kAhead = 512;

typedef float Line __attribute__((vector_size(64), aligned(4), may_alias));

// In the order of ranks, whoever adds: every rank gets the same bits.
KNL_MULTIVERSION void sum_piece(float* const* buffers, int ranks, int first, int last,
                                int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + kLine <= end; i += kLine) {
        Line sum = *reinterpret_cast<const Line*>(buffers[0] + i);
        __builtin_prefetch(buffers[0] + i + kAhead, 1);
        for (int r = 1; r < ranks; ++r) {
            sum += *reinterpret_cast<const Line*>(buffers[r] + i);
            __builtin_prefetch(buffers[r] + i + kAhead, 1);
        }
        for (int r = first; r < last; ++r) *reinterpret_cast<Line*>(buffers[r] + i) = sum;
    }
    for (; i < end; ++i) {
        float sum = buffers[0][i];
        for (int r = 1; r < ranks; ++r) sum += buffers[r][i];
        for (int r = first; r < last; ++r) buffers[r][i] = sum;
    }
}

bool all_reached(const Slot* const* slots, int ranks, bool spread, uint64_t round) {
    for (int r = 0; r < ranks; ++r) {
        const Count& count = spread ? slots[r]->spread : slots[r]->filled;
        if (__atomic_load_n(&count.round, __ATOMIC_ACQUIRE) < round) return false;
    }
    return true;
}

}  // namespace

KNL_API void knl_node_note(Slot* mine, int spread, uint64_t round) {
    __atomic_store_n(spread ? &mine->spread.round : &mine->filled.round, round, __ATOMIC_RELEASE);
}

// Waits at most `seconds` until all ranks have filled (or spread) this round: 1, else 0. Gives the
// core away once it has waited for a millisecond, as ranks may have to share it.
KNL_API int knl_node_wait(const Slot* const* slots, int ranks, int spread, uint64_t round,
                          double seconds) {
    using clock = std::chrono::steady_clock;
    const clock::time_point start = clock::now();
    for (;;) {
        for (int turn = 0; turn < 64; ++turn) {
            if (all_reached(slots, ranks, spread != 0, round)) return 1;
            __builtin_ia32_pause();
        }
        const std::chrono::duration<double> waited = clock::now() - start;
        if (waited.count() >= seconds) return 0;
        if (waited.count() > 1e-3) sched_yield();
    }
}

// Adds elements begin to end of all buffers up, with all threads, and writes the sum into those of
// ranks `first` to `last`.
KNL_API void knl_node_sum(float* const* buffers, int ranks, int first, int last, int64_t begin,
                          int64_t end) {
#pragma omp parallel for schedule(static)
    for (int64_t i = begin; i < end; i += kPiece)
        sum_piece(buffers, ranks, first, last, i, std::min(i + kPiece, end));
}

// Copies elements begin to end of rank `from`'s buffer into all others.
KNL_API void knl_node_spread(float* const* buffers, int ranks, int from, int64_t begin,
                             int64_t end) {
#pragma omp parallel for schedule(static)
    for (int64_t i = begin; i < end; i += kPiece)
        for (int r = 0; r < ranks; ++r)
            if (r != from)
                std::copy(buffers[from] + i, buffers[from] + std::min(i + kPiece, end),
                          buffers[r] + i);
}
