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
