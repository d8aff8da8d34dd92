// Computes: index rows: logical positions to slots, copies, the move to accepted rows between draft steps, overlap.
// Shapes:   int32 [rows, k]; overlap f32 [rows].
// Idea:     one element a thread, a row a block; overlap searches one ascending row in the other.
// Roofline: memory, 8 bytes an index (and the block table, from L2).
#include "common.cuh"

constexpr int THREADS = 256;

// `slots` may be `indices` itself.
KERNEL(THREADS) indices_to_slots(PARAMS IndicesToSlots p) {
    const int64_t row = blockIdx.x, request = request_of(p.map, row), start = start_of(p.map, row);
    for (int64_t j = threadIdx.x; j < p.k; j += THREADS) {
        const int32_t position = p.indices[row * p.indices_row + j];
        Place place;
        const bool there = find(p.map, request, start, position, place);
        p.slots[row * p.slots_row + j] = there ? int32_t(place.page * p.map.page + place.at) : -1;
    }
}

KERNEL(THREADS) copy_rows(PARAMS CopyRows p) {
    const int64_t row = blockIdx.x;
    for (int64_t j = threadIdx.x; j < p.k; j += THREADS) p.to[row * p.to_row + j] = p.from[row * p.from_row + j];
}

// In place: row i takes old row from[i], which ascends, so i <= from[i]: a thread that walks down its column reads
// every row before it is overwritten. A number that is no old row leaves -1.
KERNEL(THREADS) carry_rows(PARAMS CarryRows p) {
    const int64_t j = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (j >= p.k) return;
    for (int64_t i = 0; i < p.rows; ++i) {
        const int64_t old = p.from[i];
        p.data[i * p.row + j] = old >= 0 && old < p.old_rows ? p.data[old * p.row + j] : -1;
    }
}

// Live entries of a row with a -1 tail.
__device__ int64_t live(const int32_t* row, int64_t k) {
    int64_t lo = 0, hi = k;
    while (lo < hi) {
        const int64_t mid = (lo + hi) / 2;
        if (row[mid] >= 0) {
            lo = mid + 1;
        } else {
            hi = mid;
        }
    }
    return lo;
}

KERNEL(THREADS) overlap(PARAMS Overlap p) {
    __shared__ int both;
    const int64_t row = blockIdx.x;
    const int32_t *own = p.own + row * p.own_row, *reused = p.reused + row * p.reused_row;
    const int64_t n = live(own, p.own_k), m = live(reused, p.reused_k);
    if (threadIdx.x == 0) both = 0;
    __syncthreads();
    int mine = 0;
    for (int64_t j = threadIdx.x; j < n; j += THREADS) {
        const int32_t wanted = own[j];
        int64_t lo = 0, hi = m;
        while (lo < hi) {
            const int64_t mid = (lo + hi) / 2;
            if (reused[mid] < wanted) {
                lo = mid + 1;
            } else {
                hi = mid;
            }
        }
        mine += lo < m && reused[lo] == wanted;
    }
    atomicAdd(&both, mine);
    __syncthreads();
    if (threadIdx.x == 0) p.out[row] = n == 0 ? 1.0f : float(both) / float(n);
}
