// What the two families of decode kernels share.
#pragma once
#include "common.cuh"
#include "sm90.cuh"

constexpr int DIM = 128;
constexpr int GROUPS = 4;  // Warpgroups that score.

// Positions of a row.
__device__ inline int decode_length(const KeyMap& m, int64_t row) {
    if (m.row_request && request_of(m, row) < 0) return 0;
    return int(max(int64_t(0), min(int64_t(m.row_end[row]), m.max_pages * TILE)));
}

// Twice relu, which leaves NaN alone, unlike a maximum, and runs at the rate of additions.
__device__ inline float twice_relu(float x) { return x + fabsf(x); }

// Four neighbours.
union Four {
    uint4 all;
    uint32_t rank[4];
};

__device__ inline uint4 max4(const uint4& a, const uint4& b) {
    return make_uint4(max(a.x, b.x), max(a.y, b.y), max(a.z, b.z), max(a.w, b.w));
}

// All threads' range of ranks, from those of each thread, whose `low` is one less: a rank of 0, none, does not count. Ends after
// a barrier; `lowest` is ~0 and `highest` 0 before.
__device__ inline void join_range(uint32_t& lowest, uint32_t& highest, uint32_t& low, uint32_t& high, int lane) {
    low = __reduce_min_sync(~0u, low);
    high = __reduce_max_sync(~0u, high);
    if (lane == 0) {
        atomicMin(&lowest, low);
        atomicMax(&highest, high);
    }
    __syncthreads();
    low = lowest + 1;
    high = highest;
}
