// What the kernels of the distillation loss share: copies to shared memory, rows, numbers of softmax.
#pragma once
#include "common.cuh"

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
// Of heads that are padding: finite, far below every score, and a power of two, so that its multiples are exact.
constexpr float NOTHING = -0x1p100f;

// --- Copies, and where they go in shared memory.

__device__ inline uint32_t shared_at(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ inline void copy16(uint32_t to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0));
}
__device__ inline void commit() { asm volatile("cp.async.commit_group;"); }
template <int N>
__device__ inline void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Byte offset of 16 bytes in a tile whose rows are `PITCH` chunks of 16 bytes, so that neither rows nor columns of 8x8
// matrices share banks.
template <int PITCH>
__device__ inline uint32_t place(int row, int chunk) {
    return uint32_t((row * PITCH + (chunk ^ (row & 7))) * 16);
}

__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float log2_fast(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline const uint16_t* vector_at(const Planes& p, int64_t row, int64_t head) {
    return static_cast<const uint16_t*>(p.data) + row * p.row + head * p.head;
}

// --- Rows.

// Keys that a row sees; `ok`: its bounds are right.
struct Span {
    int64_t start, end;
    bool ok;
};
__device__ inline Span span_of(const Distill& p, int64_t row) {
    const int64_t start = start_of(p.map, row), end = p.map.row_end ? p.map.row_end[row] : p.keys;
    const bool ok = start >= 0 && start <= p.keys && end <= p.keys;
    if (start < 0 || end <= start) return {0, 0, ok};
    return {start, max(start, min(end, p.keys)), ok};
}

// --- Gradients.

// What is left of two numbers when their bf16, which it gives, are taken away.
__device__ inline uint32_t pack_high(float& x, float& y) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(y), "f"(x));
    x = x - __uint_as_float(packed << 16);
    y = y - __uint_as_float(packed & 0xffff0000);
    return packed;
}

// Adds what a thread has of vectors `first`, first + 8, ... to the gradients: of q `out(d, i, j)`, vector i and
// dimension d * 8 + lane % 4 * 2 + j, without its weight; and its share of those of the weights.
template <int DIM, int N, typename F>
__device__ inline void add_to_row(const Distill& p, int first, float (&by_weight)[N], F out) {
    const int padded = p.padded_heads, shift = __ffs(padded) - 1, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        by_weight[i] += __shfl_xor_sync(~0u, by_weight[i], 1);
        by_weight[i] += __shfl_xor_sync(~0u, by_weight[i], 2);
        const int v = first + 8 * i, r = v >> shift, h = v & (padded - 1);
        const int64_t row = p.first + r;
        if (r >= p.count || h >= p.heads || !p.live[1 + row] || isnan(p.row_loss[row])) continue;
        if (p.grad_weights && lane % 4 == 0) p.grad_weights[row * p.grad_weights_row + h] += by_weight[i];
        if (!p.grad_q) continue;
        const float w = p.weights[v];
        float* to = p.grad_q + row * p.grad_q_row + h * p.grad_q_head;
#pragma unroll
        for (int d = 0; d < DIM / 8; ++d) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int at = d * 8 + lane % 4 * 2 + j;
                if (at < p.dim) to[at] += w * out(d, i, j);
            }
        }
    }
}

// What a thread has of keys `first` and first + 8, `out(d, i, j)` as above, to the block's share of their gradients.
template <int DIM, typename F>
__device__ inline void store_share(const Distill& p, int keys, int first, F out) {
    const int lane = threadIdx.x % 32;
    float* to = p.partial + blockIdx.y * p.own_keys * DIM;
#pragma unroll
    for (int d = 0; d < DIM / 8; ++d) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int key = first + 8 * i;
            if (key >= keys) continue;
            *reinterpret_cast<float2*>(to + (key - p.first_key) * DIM + d * 8 + lane % 4 * 2) =
                make_float2(out(d, i, 0), out(d, i, 1));
        }
    }
}
