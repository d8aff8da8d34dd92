// What several kernel families share: element types, the map from positions to slots, block-wide counting.
// Everything here gives the same bits as the CPU backend; the build turns contraction of a*b+c off.
#pragma once
#include "params.h"

#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
#define PARAMS __grid_constant__ const

constexpr int TILE = 64;  // Keys in a page of index K, and in a tile of contiguous keys.

__device__ inline float bf16_to_f32(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

// Nearest, ties to even; NaN stays NaN.
__device__ inline uint16_t f32_to_bf16(float x) {
    uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return (bits >> 16) | 0x40;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Exact: the exponent bias moves from 7 to 127 by a multiplication, which normalises subnormals.
__device__ inline float e4m3_to_f32(uint8_t code) {
    uint32_t magnitude = code & 0x7f, sign = uint32_t(code & 0x80) << 24;
    if (magnitude == 0x7f) return __uint_as_float(sign | 0x7fc00000);
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 20) * 0x1p120f));
}

// Nearest, ties to even, saturating at 448; NaN stays NaN.
__device__ inline uint8_t f32_to_e4m3(float x) {
    uint32_t sign = (__float_as_uint(x) >> 24) & 0x80, a = __float_as_uint(x) & 0x7fffffff;
    uint32_t code;
    if (a > 0x7f800000) {
        code = 0x7f;
    } else if (a >= 0x43e00000) {  // 448
        code = 0x7e;
    } else if (a < 0x3c800000) {  // 2^-6, the smallest normal: below it codes count steps of 2^-9
        code = __float_as_uint(__uint_as_float(a) * 512.0f + 12582912.0f) & 0x1f;
    } else {
        code = ((a + 0x7ffff + ((a >> 20) & 1)) >> 20) - (120 << 3);
    }
    return sign | code;
}

// Sum over the warp's lanes up to this one, `lane`.
template <class T, class L>
__device__ inline T lanes_upto(T x, L lane) {
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const T other = __shfl_up_sync(~0u, x, d);
        if (lane >= d) x += other;
    }
    return x;
}

__device__ inline bool finite(float x) { return (__float_as_uint(x) & 0x7fffffff) < 0x7f800000; }

__device__ inline float load_float(const void* p, int type, int64_t i) {
    return type == F32 ? static_cast<const float*>(p)[i] : bf16_to_f32(static_cast<const uint16_t*>(p)[i]);
}

__device__ inline void store_float(void* p, int type, int64_t i, float x) {
    if (type == F32) {
        static_cast<float*>(p)[i] = x;
    } else {
        static_cast<uint16_t*>(p)[i] = f32_to_bf16(x);
    }
}

__device__ inline int64_t load_slot(const void* p, int wide, int64_t i) {
    return wide ? static_cast<const int64_t*>(p)[i] : static_cast<const int32_t*>(p)[i];
}

// Scores as integers in the same order, all above 0: NaN with -inf at the bottom, zeros of either sign equal.
__device__ inline uint32_t rank_of(float score) {
    uint32_t bits = __float_as_uint(score + 0.0f);
    if ((bits & 0x7fffffff) > 0x7f800000) bits = 0xff800000;
    return bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000);
}

// --- Rows and slots. Numbers in device memory cannot be refused, so whatever is out of range is treated as absent.

// The request of a row, -1 for padding and for numbers that are no request. Contiguous rows are of request 0.
__device__ inline int64_t request_of(const KeyMap& m, int64_t row) {
    if (!m.block_table) return 0;
    int64_t request = m.row_request ? m.row_request[row] : row / m.rows_per_request;
    return request >= 0 && request < m.requests ? request : -1;
}

__device__ inline int64_t start_of(const KeyMap& m, int64_t row) {
    return m.row_start ? m.row_start[row] : 0;
}

// How many positions a row sees, never more than the store or its table has.
__device__ inline int64_t length_of(const KeyMap& m, int64_t row) {
    if (request_of(m, row) < 0) return 0;
    int64_t start = start_of(m, row), most = m.block_table ? m.max_pages * m.page : m.keys;
    if (start < 0) return 0;
    int64_t end = m.row_end ? min(int64_t(m.row_end[row]), most) : most;
    return max(end - start, int64_t(0));
}

// Page and place in it of a row's position; false if there is none.
struct Place {
    int64_t page, at;
};
__device__ inline bool find(const KeyMap& m, int64_t request, int64_t start, int64_t position, Place& out) {
    if (position < 0 || request < 0) return false;
    if (!m.block_table) {
        out = {0, start + position};
        return out.at >= 0 && out.at < m.keys;
    }
    int64_t i = position / m.page;
    if (i >= m.max_pages) return false;
    out = {m.block_table[request * m.table_stride + i], position % m.page};
    return out.page >= 0 && out.page < m.pages;
}

// --- Block-wide counting, in thread order. All threads of the block must call.

template <int THREADS>
struct Ordered {
    int2 warp[THREADS / 32];

    // How many threads before this one have `a`, and `b`; `total` of each.
    __device__ int2 before(bool a, bool b, int2& total) {
        const unsigned lane = threadIdx.x % 32, below = (1u << lane) - 1;
        const unsigned all_a = __ballot_sync(~0u, a), all_b = __ballot_sync(~0u, b);
        __syncthreads();  // The last call's totals have been read.
        if (lane == 0) warp[threadIdx.x / 32] = make_int2(__popc(all_a), __popc(all_b));
        __syncthreads();
        int2 sum = make_int2(0, 0), mine = sum;
        for (int w = 0; w < THREADS / 32; ++w) {
            if (w == threadIdx.x / 32) mine = sum;
            sum.x += warp[w].x;
            sum.y += warp[w].y;
        }
        total = sum;
        return make_int2(mine.x + __popc(all_a & below), mine.y + __popc(all_b & below));
    }
};
