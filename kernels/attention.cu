// Computes: sparse MLA: out[h] = sum_i softmax_i(scale * q[h]·kv[i]) * kv[i][:d_v] over the selected tokens, a sink in
//           the denominator if given, and the log-sum-exp without it. With that, probs[i] = mean_h softmax_i.
// Shapes:   q f32 or bf16 [rows, heads, d_qk], KV rows f32, bf16 or 656 bytes, indices int32 [rows, topk].
// Idea:     a block takes a row and eight heads, a warp a head. Sixteen KV rows are gathered and widened to f32 at a
//           time; the softmax is online, in the order of the indices, so a row's bits do not depend on the others.
//           For the probabilities a block takes a row and all its heads, eight at a time, added in their order: simple,
//           and slow. attention_probs_sm90.cu is for Hopper.
// Roofline: 2 * heads * (d_qk + d_v) flop a token at the f32 FMA rate, 2 * heads * d_qk for the probabilities; any card,
//           any heads. The attention's gather repeats heads / 8 times.
#include <math_constants.h>

#include "common.cuh"

constexpr int THREADS = 256, HEADS = 8, KEYS = 16, SLICES = 4;  // d_v <= SLICES * THREADS
constexpr int MAX_TOPK = 4096;

// Bytes of dynamic shared memory; `launch` in src/backend/cuda mirrors it.
//   queries float [HEADS][d_qk] | rows float [KEYS][stride], stride = 2 more than a multiple of 32

__device__ inline int stride_of(const Attention& p) { return (p.d_qk + 31) / 32 * 32 + 2; }

// Indices of a row that may count.
__device__ inline int taken(const Attention& p, int64_t row) {
    return p.row_topk ? min(max(p.row_topk[row], 0), p.topk) : p.topk;
}

// Queries of eight heads from `head0` on.
__device__ inline void load_queries(const Attention& p, int64_t row, int head0, float* queries) {
    for (int i = threadIdx.x; i < HEADS * p.d_qk; i += THREADS) {
        const int head = head0 + i / p.d_qk;
        const int64_t at = row * p.q_row + head * p.q_head + i % p.d_qk;
        queries[i] = head < p.heads ? load_float(p.q, p.q_type, at) : 0.0f;
    }
}

// Widens the KV rows of a row's indices from `base` on, where they count; `rows` null where not. Ends in a barrier.
__device__ inline void gather(const Attention& p, int64_t row, int base, int count, const uint8_t** rows, float* kv) {
    const int tid = threadIdx.x, stride = stride_of(p);
    if (tid < KEYS) {
        const int32_t index = base + tid < count ? p.indices[row * p.indices_row + base + tid] : -1;
        Place place = {index / p.page, index % p.page};
        bool there = index >= 0 && index < p.map.keys;
        if (p.mapped) there = find(p.map, request_of(p.map, row), start_of(p.map, row), index, place);
        rows[tid] = there ? p.kv + place.page * p.page_bytes + place.at * p.row_bytes : nullptr;
    }
    __syncthreads();
    for (int i = tid; i < KEYS * p.d_qk; i += THREADS) {
        const int key = i / p.d_qk, d = i % p.d_qk;
        const uint8_t* from = rows[key];
        float x = 0.0f;
        if (from) {
            if (p.kv_format == KV_FP8) {
                if (d < 512) {
                    uint32_t scale = 0;
                    for (int b = 0; b < 4; ++b) scale |= uint32_t(from[512 + d / 128 * 4 + b]) << (8 * b);
                    x = e4m3_to_f32(from[d]) * __uint_as_float(scale);
                } else {
                    x = bf16_to_f32(from[2 * d - 496] | from[2 * d - 495] << 8);  // Byte 528 on.
                }
            } else {
                x = load_float(from, p.kv_format == KV_F32 ? F32 : BF16, d);
            }
        }
        kv[key * stride + d] = x;
    }
    __syncthreads();
}

// The dot product of this warp's head with key `j`, which lanes 2j and 2j + 1 share: even and odd dimensions, 32
// different banks.
__device__ inline float dot_of(const Attention& p, const float* queries, const float* kv, int j, int half) {
    const int h = threadIdx.x / 32, stride = stride_of(p);
    float dot = 0.0f;
    for (int d = half; d < p.d_qk; d += 2) dot = fmaf(queries[h * p.d_qk + d], kv[j * stride + d], dot);
    return dot + __shfl_xor_sync(~0u, dot, 1);
}

KERNEL(THREADS) attention(PARAMS Attention p) {
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ const uint8_t* rows[KEYS];
    __shared__ float prob[HEADS][KEYS], faded[HEADS], total[HEADS];
    const int64_t row = blockIdx.x;
    const int tid = threadIdx.x, h = tid / 32, j = tid % 32 / 2, half = tid % 2, d_qk = p.d_qk;
    const int head0 = blockIdx.y * HEADS, stride = stride_of(p), count = taken(p, row);
    float* queries = reinterpret_cast<float*>(shared);
    float* kv = queries + HEADS * d_qk;

    load_queries(p, row, head0, queries);
    float acc[HEADS][SLICES] = {};
    float top = -CUDART_INF_F, sum = 0.0f;  // Of this warp's head.
    int any = 0;
    for (int base = 0; base < count; base += KEYS) {
        __syncthreads();
        gather(p, row, base, count, rows, kv);
        const float dot = dot_of(p, queries, kv, j, half);
        const bool live = rows[j] != nullptr;
        const float score = live ? dot * p.softmax_scale : -CUDART_INF_F;
        float best = score > top ? score : top;  // NaN is passed over here and shows in the sum.
        for (int d = 16; d > 0; d /= 2) {
            const float other = __shfl_xor_sync(~0u, best, d);
            best = other > best ? other : best;
        }
        const float weight = live ? expf(score - (best == -CUDART_INF_F ? 0.0f : best)) : 0.0f;
        float part = half == 0 ? weight : 0.0f;
        for (int d = 16; d > 0; d /= 2) part += __shfl_xor_sync(~0u, part, d);
        const float fade = top == best ? 1.0f : expf(top - best);
        sum = sum * fade + part;
        top = best;
        any |= __any_sync(~0u, live);
        if (half == 0) prob[h][j] = weight;
        if (tid % 32 == 0) faded[h] = fade;
        __syncthreads();

#pragma unroll
        for (int s = 0; s < SLICES; ++s) {
            const int d = tid + s * THREADS;
            if (d >= p.d_v) break;
#pragma unroll
            for (int g = 0; g < HEADS; ++g) acc[g][s] *= faded[g];
            for (int key = 0; key < KEYS; ++key) {
                const float v = kv[key * stride + d];
#pragma unroll
                for (int g = 0; g < HEADS; ++g) acc[g][s] = fmaf(prob[g][key], v, acc[g][s]);
            }
        }
    }

    const int head = head0 + h;
    if (tid % 32 == 0 && head < p.heads) {
        if (p.lse) p.lse[row * p.lse_row + head] = any ? top + logf(sum) : -CUDART_INF_F;
        total[h] = any ? sum + (p.sink ? expf(p.sink[head] - top) : 0.0f) : CUDART_INF_F;  // Empty rows give zeros.
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < SLICES; ++s) {
        const int d = tid + s * THREADS;
        if (d >= p.d_v) break;
#pragma unroll
        for (int g = 0; g < HEADS; ++g) {
            if (head0 + g >= p.heads) break;
            store_float(p.out, p.out_type, row * p.out_row + (head0 + g) * p.out_head + d, acc[g][s] / total[g]);
        }
    }
}

// Un-normalised probabilities stay in shared memory until their sum is known.
KERNEL(THREADS) attention_probs(PARAMS AttentionProbs s) {
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ const uint8_t* rows[KEYS];
    __shared__ float weights[MAX_TOPK], prob[HEADS][KEYS], sums[THREADS / 32];
    const Attention& p = s.a;
    const int64_t row = blockIdx.x;
    const int tid = threadIdx.x, h = tid / 32, j = tid % 32 / 2, half = tid % 2;
    const int count = taken(p, row);
    float* queries = reinterpret_cast<float*>(shared);
    float* kv = queries + HEADS * p.d_qk;

    for (int i = tid; i < p.topk; i += THREADS) weights[i] = 0.0f;
    for (int base = 0; base < count; base += KEYS) {
        __syncthreads();
        gather(p, row, base, count, rows, kv);
        for (int head0 = 0; head0 < p.heads; head0 += HEADS) {
            load_queries(p, row, head0, queries);
            __syncthreads();
            const float dot = dot_of(p, queries, kv, j, half);
            const float lse = head0 + h < p.heads ? p.lse[row * p.lse_row + head0 + h] : -CUDART_INF_F;
            // No head, or one whose scores are all -inf: nothing to add.
            const bool live = rows[j] != nullptr && lse != -CUDART_INF_F;
            if (half == 0) prob[h][j] = live ? expf(dot * p.softmax_scale - lse) : 0.0f;
            __syncthreads();
            if (tid < KEYS && base + tid < count) {
                for (int g = 0; g < HEADS; ++g) weights[base + tid] += prob[g][tid];
            }
        }
    }
    __syncthreads();
    float sum = 0.0f;
    for (int i = tid; i < count; i += THREADS) sum += weights[i];
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    if (tid % 32 == 0) sums[tid / 32] = sum;
    __syncthreads();
    sum = 0.0f;
    for (int w = 0; w < THREADS / 32; ++w) sum += sums[w];
    for (int i = tid; i < p.topk; i += THREADS) {
        s.probs[row * s.probs_row + i] = weights[i] == 0.0f ? 0.0f : weights[i] / sum;
    }
}
