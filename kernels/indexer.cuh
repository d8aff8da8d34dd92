// Scores of one row against one tile of 64 keys, shared by logits and select: `ks[s] * sum_h w[h] * relu(q[h]·k[s])`.
//
// 128 threads: thread t has key t % 64 and four heads of every eight. The tile lies in shared memory as bf16 pairs
// `[dim / 2][64]` (e4m3 fits in bf16), the queries of eight heads as floats. Sums run in the CPU backend's order (of a
// pair of dimensions the odd one first; heads in order; the key's scale last) with one rounding an fma, so the scores
// have the same bits.
#pragma once
#include <math_constants.h>

#include "common.cuh"

constexpr int SCORE_THREADS = 128;
constexpr int HEADS = 8;

// Bytes of dynamic shared memory; `launch` in src/backend/cuda mirrors it.
//   panel uint32 [dim / 2][TILE] | queries float [HEADS][dim] | relu float [HEADS][TILE]

// bf16 magnitudes under 2^-56 count as zero: no sum of products is then subnormal.
__device__ inline uint16_t flush(uint16_t bits) { return (bits & 0x7fff) < ((127 - 56) << 7) ? 0 : bits; }

struct Row {
    int64_t row, request, start;
};

// All 128 threads call. Threads t < n (of the first 64) get the score of position `from + t`, which must be of one
// tile; a position without a place in the store scores -inf.
__device__ inline float score_tile(const Indexer& ix, const Row& r, int64_t from, int n, unsigned char* shared) {
    const int dim = ix.dim, pairs = dim / 2, tid = threadIdx.x, key = tid % TILE, group = tid / TILE;
    uint32_t* panel = reinterpret_cast<uint32_t*>(shared);
    float* queries = reinterpret_cast<float*>(panel + pairs * TILE);
    float* relu = queries + HEADS * dim;

    Place place;
    const bool there = key < n && find(ix.map, r.request, r.start, from + key, place);
    if (!there) place = {0, 0};
    const char* data = static_cast<const char*>(ix.keys) + place.page * ix.page_bytes + place.at * ix.row_bytes;
    // Sixteen dimensions a step, every other step a thread.
    for (int d = 16 * group; d < dim; d += 32) {
        uint32_t out[8];
        if (!there) {
            for (int i = 0; i < 8; ++i) out[i] = 0;
        } else if (ix.fp8) {
            union {
                uint4 wide;
                uint8_t code[16];
            } x;
            if (reinterpret_cast<uintptr_t>(data) % 16 == 0) {
                x.wide = *reinterpret_cast<const uint4*>(data + d);
            } else {
                for (int i = 0; i < 16; ++i) x.code[i] = data[d + i];
            }
            for (int i = 0; i < 8; ++i) {
                uint32_t lo = __float_as_uint(e4m3_to_f32(x.code[2 * i]));
                out[i] = lo >> 16 | __float_as_uint(e4m3_to_f32(x.code[2 * i + 1]));
            }
        } else {
            const uint16_t* x = reinterpret_cast<const uint16_t*>(data) + d;
            for (int i = 0; i < 8; ++i) out[i] = flush(x[2 * i]) | uint32_t(flush(x[2 * i + 1])) << 16;
        }
        for (int i = 0; i < 8; ++i) panel[(d / 2 + i) * TILE + key] = out[i];
    }

    float sum = 0.0f;
    for (int first = 0; first < ix.heads; first += HEADS) {
        const int heads = min(HEADS, ix.heads - first);
        for (int i = tid; i < HEADS * dim; i += SCORE_THREADS) {
            const int h = i / dim, d = i % dim;
            const int64_t at = r.row * ix.q_row + (first + h) * ix.q_head + d;
            float x = 0.0f;
            if (h < heads) {
                x = ix.fp8 ? e4m3_to_f32(static_cast<const uint8_t*>(ix.q)[at])
                           : bf16_to_f32(flush(static_cast<const uint16_t*>(ix.q)[at]));
            }
            queries[i] = x;
        }
        __syncthreads();
        float acc[4] = {};
        const float2* q = reinterpret_cast<const float2*>(queries + 4 * group * dim);
        for (int d = 0; d < pairs; ++d) {
            const uint32_t k = panel[d * TILE + key];
            const float odd = __uint_as_float(k & 0xffff0000), even = __uint_as_float(k << 16);
#pragma unroll
            for (int h = 0; h < 4; ++h) {
                const float2 x = q[h * pairs + d];
                acc[h] = fmaf(even, x.x, fmaf(odd, x.y, acc[h]));
            }
        }
#pragma unroll
        for (int h = 0; h < 4; ++h) relu[(4 * group + h) * TILE + key] = acc[h] < 0.0f ? 0.0f : acc[h];  // NaN stays.
        __syncthreads();
        if (group == 0) {
            const float* w = ix.weights + r.row * ix.weights_row + first;
            for (int h = 0; h < heads; ++h) sum = fmaf(w[h], relu[h * TILE + key], sum);
        }
    }
    __syncthreads();  // The next tile may overwrite the panel.
    if (!there) return -CUDART_INF_F;
    if (!ix.scales) return sum;
    const char* scale = static_cast<const char*>(ix.scales) + place.page * ix.scale_page_bytes + 4 * place.at;
    return sum * *reinterpret_cast<const float*>(scale);
}
