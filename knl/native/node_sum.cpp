// Sums over the ranks of one node, straight out of and into each other's buffers in shared memory.
// See knl/comm/node.py for the protocol. The squares of a sum are left too: whoever has it last in
// registers adds them up, piece by piece of the tensors, so that LARS need not read it twice.

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdint>

#include "squares.h"

#define KNL_API extern "C" __attribute__((visibility("default")))

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

// In the order of ranks, whoever adds: every rank gets the same bits. Returns the sum of squares.
template <typename Doubles>
KNL_INLINE double sum(float* const* buffers, int ranks, int first, int last, int64_t begin,
                      int64_t end) {
    Sum<Doubles> squares;
    int64_t i = begin;
    for (; i + kLine <= end; i += kLine) {
        Floats low, high;
        load(low, buffers[0] + i);
        load(high, buffers[0] + i + kLine / 2);
        __builtin_prefetch(buffers[0] + i + kAhead, 1);
        for (int r = 1; r < ranks; ++r) {
            Floats more_low, more_high;
            load(more_low, buffers[r] + i);
            load(more_high, buffers[r] + i + kLine / 2);
            low += more_low;
            high += more_high;
            __builtin_prefetch(buffers[r] + i + kAhead, 1);
        }
        for (int r = first; r < last; ++r) {
            store(buffers[r] + i, low);
            store(buffers[r] + i + kLine / 2, high);
        }
        squares.add(low, high);
    }
    for (; i < end; ++i) {
        float total = buffers[0][i];
        for (int r = 1; r < ranks; ++r) total += buffers[r][i];
        for (int r = first; r < last; ++r) buffers[r][i] = total;
        squares.add(total);
    }
    return squares.total();
}

KNL_TARGET("avx512f") double sum_piece(float* const* buffers, int ranks, int first, int last,
                                       int64_t begin, int64_t end) {
    return sum<Wide>(buffers, ranks, first, last, begin, end);
}
KNL_TARGET("avx2") double sum_piece(float* const* buffers, int ranks, int first, int last,
                                    int64_t begin, int64_t end) {
    return sum<Narrow>(buffers, ranks, first, last, begin, end);
}
KNL_TARGET("default") double sum_piece(float* const* buffers, int ranks, int first, int last,
                                       int64_t begin, int64_t end) {
    return sum<Narrow>(buffers, ranks, first, last, begin, end);
}

KNL_TARGET("avx512f") double squares_of(const float* x, int64_t n) { return squares<Wide>(x, n); }
KNL_TARGET("avx2") double squares_of(const float* x, int64_t n) { return squares<Narrow>(x, n); }
KNL_TARGET("default") double squares_of(const float* x, int64_t n) { return squares<Narrow>(x, n); }

// Of all ranks of the node: buffers[rank][element], squares[rank][piece].
struct Shared {
    float* const* buffers;
    int ranks;
    const int64_t* ends;  // of the pieces
    double* const* squares;

    int64_t begin(int64_t piece) const { return piece ? ends[piece - 1] : 0; }
};

void add_up(const Shared& s, int first, int last, int64_t piece) {
    const double sum =
        sum_piece(s.buffers, s.ranks, first, last, s.begin(piece), s.ends[piece]);
    for (int r = first; r < last; ++r) s.squares[r][piece] = sum;
}

void spread(const Shared& s, int from, int64_t piece) {
    const int64_t begin = s.begin(piece), size = s.ends[piece] - begin;
    const float* mine = s.buffers[from] + begin;
    const double sum = squares_of(mine, size);
    for (int r = 0; r < s.ranks; ++r) {
        if (r != from) std::copy(mine, mine + size, s.buffers[r] + begin);
        s.squares[r][piece] = sum;
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

// Elements that have a sum of squares of their own, at most.
KNL_API int64_t knl_piece() { return kPiece; }

// Adds pieces `first_piece` to `last_piece` of all buffers up, with all threads, and writes the sum
// into those of ranks `first` to `last`, and its squares into squares[rank][piece]. ends[p]: where
// in the buffers piece p ends and the next one begins.
KNL_API void knl_node_sum(float* const* buffers, int ranks, int first, int last,
                          const int64_t* ends, int64_t first_piece, int64_t last_piece,
                          double* const* squares) {
    const Shared shared{buffers, ranks, ends, squares};
#pragma omp parallel for schedule(static)
    for (int64_t p = first_piece; p < last_piece; ++p) add_up(shared, first, last, p);
}

// Copies these pieces of rank `from`'s buffer into all others, and their squares to all.
KNL_API void knl_node_spread(float* const* buffers, int ranks, int from, const int64_t* ends,
                             int64_t first_piece, int64_t last_piece, double* const* squares) {
    const Shared shared{buffers, ranks, ends, squares};
#pragma omp parallel for schedule(static)
    for (int64_t p = first_piece; p < last_piece; ++p) spread(shared, from, p);
}
