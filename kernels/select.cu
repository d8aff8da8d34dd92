// Computes: scores and selects in one: the k best positions of each row, ties to the lowest, ascending, then -1.
// Shapes:   as logits.cu -> int32 [rows, k]. Scores never reach memory.
// Idea:     a block scores a row's tiles in order and appends to a list only what beats a threshold that at least k
//           earlier positions reach (later equals cannot win). A full list is cut to its k best, in place and in
//           order, which raises the threshold: about k*ln(L/k) of L scores are ever stored, and memory is O(k) a
//           block. Few rows are cut into ranges of tiles; `select_merge` keeps the best of the ranges' lists.
// Roofline: that of logits.cu; any input, flat or rising, costs at most one more pass over the list per k scores.
#include "indexer.cuh"
#include "topk.cuh"

KERNEL(SCORE_THREADS) select_rows(PARAMS Select p) {
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ Selection<SCORE_THREADS> selection;
    const int64_t list = int64_t(blockIdx.x) * p.capacity;
    uint32_t* ranks = p.ranks + list;
    int32_t* positions = p.positions + list;
    auto get = [&](int64_t i, uint32_t& rank, int32_t& position) {
        rank = ranks[i];
        position = positions[i];
        return true;
    };
    for (int64_t task = blockIdx.x; task < p.ix.rows * p.ranges; task += gridDim.x) {
        const int64_t row = task / p.ranges, range = task % p.ranges;
        const Row r = {row, request_of(p.ix.map, row), start_of(p.ix.map, row)};
        const int64_t length = length_of(p.ix.map, row);
        int32_t* out = p.out + row * p.out_row;
        if (length <= p.k) {
            if (range == 0) take_all(out, length, p.k);
            continue;
        }
        const int64_t tiles = (length + TILE - 1) / TILE;
        uint32_t threshold = 0;
        int count = 0;
        auto cut = [&] {
            int ties;
            threshold = selection.kth_best(count, p.k, get, ties);
            selection.keep(count, p.k, threshold, ties, get, [&](uint32_t rank, int32_t position, int place) {
                ranks[place] = rank;
                positions[place] = position;
            });
            count = p.k;
        };
        for (int64_t tile = tiles * range / p.ranges; tile < tiles * (range + 1) / p.ranges; ++tile) {
            const int64_t from = tile * TILE;
            const int n = int(min(int64_t(TILE), length - from));
            const uint32_t rank = rank_of(score_tile(p.ix, r, from, n, shared));
            const bool in = threadIdx.x < n && rank > threshold;
            int2 total, before = selection.ordered.before(in, false, total);
            if (in) {
                ranks[count + before.x] = rank;
                positions[count + before.x] = int32_t(from + threadIdx.x);
            }
            count += total.x;
            if (count > p.capacity - TILE) cut();
        }
        if (count > p.k) cut();
        __syncthreads();
        if (p.ranges > 1) {
            if (threadIdx.x == 0) p.counts[task] = count;
            continue;
        }
        for (int i = threadIdx.x; i < p.k; i += SCORE_THREADS) out[i] = positions[i];
        __syncthreads();  // Before the next row overwrites the list.
    }
}

constexpr int MERGE_THREADS = 512;

// The row's best are among its ranges' best. Lists follow one another by position.
KERNEL(MERGE_THREADS) select_merge(PARAMS Select p) {
    __shared__ Selection<MERGE_THREADS> selection;
    const int64_t row = blockIdx.x;
    if (length_of(p.ix.map, row) <= p.k) return;
    auto at = [&](int64_t i) { return (row * p.ranges + i / p.k) * p.capacity + i % p.k; };
    auto get = [&](int64_t i, uint32_t& rank, int32_t& position) {
        if (i % p.k >= p.counts[row * p.ranges + i / p.k]) return false;
        rank = p.ranks[at(i)];
        position = p.positions[at(i)];
        return true;
    };
    int32_t* out = p.out + row * p.out_row;
    const int64_t n = p.ranges * p.k;
    int ties;
    const uint32_t kth = selection.kth_best(n, p.k, get, ties);
    selection.keep(n, p.k, kth, ties, get, [&](uint32_t, int32_t position, int place) { out[place] = position; });
}
