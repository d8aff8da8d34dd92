// What the kernels of sparse attention on Hopper share: gathered tiles of KV rows, and the numbers of softmax.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <math_constants.h>

#include "common.cuh"
#include "wgmma_sm90.cuh"

constexpr int TOKENS = 64, D_QK = 576, D_V = 512, BLOCKS = D_QK / 64;
constexpr int TILE_BYTES = BLOCKS * BLOCK_BYTES;
constexpr float LOG2E = 1.4426950408889634f;

// One number, or -1; no branch, so that several are under way together.
__device__ inline int32_t load_if(const int32_t* from, bool there) {
    int32_t x;
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %2, 0;\n"
        "mov.b32 %0, -1;\n"
        "@p ld.global.b32 %0, [%1];}"
        : "=r"(x)
        : "l"(from), "r"(int(there)));
    return x;
}

// Where the rows of a block's indices are.
struct Rows {
    const int32_t* indices;
    int64_t request, start;
    int count;

    __device__ Rows(const Attention& p, int64_t row)
        : indices(p.indices + row * p.indices_row),
          request(p.mapped ? request_of(p.map, row) : 0),
          start(p.mapped ? start_of(p.map, row) : 0),
          count(p.row_topk ? min(max(p.row_topk[row], 0), p.topk) : p.topk) {}

    // Indices `at`, at + step, ...; -1 past the end.
    template <int N>
    __device__ void load(int at, int step, int32_t (&index)[N]) const {
#pragma unroll
        for (int i = 0; i < N; ++i) index[i] = load_if(indices + at + i * step, at + i * step < count);
    }

    // Their KV rows, null where there is none: what `find` in common.cuh gives.
    template <int N>
    __device__ void find(const Attention& p, const int32_t (&index)[N], const uint8_t* (&from)[N]) const {
        if (p.mapped && !p.map.block_table) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const int64_t at = start + index[i];
                from[i] = index[i] >= 0 && at >= 0 && at < p.map.keys ? p.kv + at * p.row_bytes : nullptr;
            }
            return;
        }
        const uint32_t size = p.page;
        uint32_t page[N], at[N];
        bool there[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            page[i] = uint32_t(index[i]) / size;
            at[i] = uint32_t(index[i]) - page[i] * size;
            there[i] = index[i] >= 0 && (p.mapped ? request >= 0 && page[i] < p.map.max_pages : index[i] < p.map.keys);
        }
        if (p.mapped) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const int32_t entry = load_if(p.map.block_table + request * p.map.table_stride + page[i], there[i]);
                there[i] = entry >= 0 && entry < p.map.pages;
                page[i] = entry;
            }
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            from[i] = there[i] ? p.kv + int64_t(page[i]) * p.page_bytes + int64_t(at[i]) * p.row_bytes : nullptr;
        }
    }
};

// Eight e4m3 times a scale to eight bf16.
__device__ inline uint4 widen(uint32_t a, uint32_t b, float scale) {
    const uint32_t in[4] = {a, a >> 16, b, b >> 16};
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 f = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(uint16_t(in[i]), __NV_E4M3)));
        const __nv_bfloat162 two = __floats2bfloat162_rn(f.x * scale, f.y * scale);
        out[i] = reinterpret_cast<const uint32_t&>(two);
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
}

// One of eight lanes' share of the codes of a row of 656 bytes; zeros for a row that is not there.
__device__ inline void load_codes(const uint8_t* from, int chunk, uint4 (&raw)[4], float4& scales) {
    scales = {};
#pragma unroll
    for (int b = 0; b < 4; ++b) raw[b] = {};
    if (!from) return;
    scales = *reinterpret_cast<const float4*>(from + 512);
#pragma unroll
    for (int b = 0; b < 4; ++b) raw[b] = *reinterpret_cast<const uint4*>(from + b * 128 + chunk * 16);
}

// Widened into a tile.
__device__ inline void store_wide(uint8_t* kv, int token, int chunk, const uint4 (&raw)[4], const float4& scales) {
    const float scale[4] = {scales.x, scales.y, scales.z, scales.w};
    const bool late = chunk / 4;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
        // Lanes of the two halves of a pair of blocks store their two chunks in turns: eight different chunks.
        const uint4 x = raw[b];
        uint8_t* to = kv + (2 * b + late) * BLOCK_BYTES;
        *reinterpret_cast<uint4*>(to + swizzled(token, chunk % 4 * 2 + late)) =
            widen(late ? x.z : x.x, late ? x.w : x.y, scale[b]);
        *reinterpret_cast<uint4*>(to + swizzled(token, chunk % 4 * 2 + !late)) =
            widen(late ? x.x : x.z, late ? x.y : x.w, scale[b]);
    }
}

// The same of a row of bf16, copied, blocks FIRST to LAST of it; zeros for a row that is not there. `kv` is any address that can
// be read.
template <int FIRST = 0, int LAST = BLOCKS>
__device__ inline void copy_row(uint32_t tile, int token, int chunk, const uint8_t* from, const uint8_t* kv) {
    const uint32_t to = tile + swizzled(token, chunk);
    const uint8_t* source = (from ? from : kv) + chunk * 16;
#pragma unroll
    for (int b = FIRST; b < LAST; ++b) copy16(to + b * BLOCK_BYTES, source + b * 128, from != nullptr);
}

// The block's queries; heads that are not there are left as they are. By
// THREADS of a block's, all but the first 128.
template <int THREADS, int HEADS>
__device__ inline void load_queries(const Attention& p, uint8_t* q, int64_t row, int head0) {
    constexpr int COPIES = HEADS * D_QK / 8 / THREADS;
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
        const int at = i * THREADS + threadIdx.x - 128, head = at / (D_QK / 8), c = at % (D_QK / 8);
        const bool there = head0 + head < p.heads;
        const uint16_t* from = static_cast<const uint16_t*>(p.q) + row * p.q_row + (head0 + (there ? head : 0)) * p.q_head;
        copy16(shared_address(q) + c / 8 * BLOCK_BYTES + swizzled(head, c % 8), from + c * 8, there);
    }
    wait_copies<0>();
    fence_async();
    named_barrier<THREADS>(2);
}

// A head's log-sum-exp, written, and what its sums are multiplied by: 0 for a row (or a part) of nothing.
__device__ inline float finish(const AttentionSm90& s, int64_t part, int64_t row, int head, float top, float total) {
    const Attention& p = s.a;
    if (head >= p.heads) return 0.0f;
    const bool any = top != -CUDART_INF_F || total != 0.0f;  // NaN is no maximum, but it is in the sum.
    const float lse = any ? top * p.softmax_scale + logf(total) : -CUDART_INF_F;
    if (s.splits > 1) {
        s.part_lse[part * p.heads + head] = lse;
    } else {
        if (p.lse) p.lse[row * p.lse_row + head] = lse;
        if (p.sink) total += expf(p.sink[head] - top * p.softmax_scale);
    }
    return any ? 1.0f / total : 0.0f;
}

__device__ inline uint32_t pack(float x, float y) {
    const __nv_bfloat162 b = __floats2bfloat162_rn(x, y);
    return reinterpret_cast<const uint32_t&>(b);
}

// 2^x, to 2 ulp.
__device__ inline float power(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
