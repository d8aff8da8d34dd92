// Computes: sparse MLA: out[h] = sum_i softmax_i(scale * q[h]·kv[i]) * kv[i][:d_v] over the selected tokens, a sink in
//           the denominator if given, and the log-sum-exp without it.
// Shapes:   q f32 or bf16 [rows, heads, d_qk], KV rows f32, bf16 or 656 bytes, indices int32 [rows, topk].
// Idea:     a block takes a row and eight heads, a warp a head. Sixteen KV rows are gathered and widened to f32 at a
//           time; the softmax is online, in the order of the indices, so a row's bits do not depend on the others.
// Roofline: 2 * heads * (d_qk + d_v) flop a token at the f32 FMA rate; any card, any heads. The gather repeats
//           heads / 8 times.
#include <math_constants.h>

#include "common.cuh"

constexpr int THREADS = 256, HEADS = 8, KEYS = 16, SLICES = 4;  // d_v <= SLICES * THREADS

// Bytes of dynamic shared memory; `launch` in src/backend/cuda mirrors it.
//   queries float [HEADS][d_qk] | rows float [KEYS][stride], stride = 2 more than a multiple of 32
KERNEL(THREADS) attention(PARAMS Attention p) {
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ const uint8_t* rows[KEYS];
    __shared__ float prob[HEADS][KEYS], faded[HEADS], total[HEADS];
    const int64_t row = blockIdx.x;
    const int tid = threadIdx.x, h = tid / 32, j = tid % 32 / 2, half = tid % 2, d_qk = p.d_qk;
    const int head0 = blockIdx.y * HEADS, stride = (d_qk + 31) / 32 * 32 + 2;
    float* queries = reinterpret_cast<float*>(shared);
    float* kv = queries + HEADS * d_qk;

    for (int i = tid; i < HEADS * d_qk; i += THREADS) {
        const int head = head0 + i / d_qk;
        const int64_t at = row * p.q_row + head * p.q_head + i % d_qk;
        queries[i] = head < p.heads ? load_float(p.q, p.q_type, at) : 0.0f;
    }
    const int64_t request = p.mapped ? request_of(p.map, row) : 0, start = p.mapped ? start_of(p.map, row) : 0;
    const int count = p.row_topk ? min(max(p.row_topk[row], 0), p.topk) : p.topk;

    float acc[HEADS][SLICES] = {};
    float top = -CUDART_INF_F, sum = 0.0f;  // Of this warp's head.
    int any = 0;
    for (int base = 0; base < count; base += KEYS) {
        __syncthreads();
        if (tid < KEYS) {
            const int32_t index = base + tid < count ? p.indices[row * p.indices_row + base + tid] : -1;
            Place place = {index / p.page, index % p.page};
            bool there = index >= 0 && index < p.map.keys;
            if (p.mapped) there = find(p.map, request, start, index, place);
            rows[tid] = there ? p.kv + place.page * p.page_bytes + place.at * p.row_bytes : nullptr;
        }
        __syncthreads();
        for (int i = tid; i < KEYS * d_qk; i += THREADS) {
            const int key = i / d_qk, d = i % d_qk;
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

        // Lanes 2j and 2j + 1 share a dot product: even and odd dimensions, 32 different banks.
        float dot = 0.0f;
        for (int d = half; d < d_qk; d += 2) dot = fmaf(queries[h * d_qk + d], kv[j * stride + d], dot);
        dot += __shfl_xor_sync(~0u, dot, 1);
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
