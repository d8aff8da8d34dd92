// Computes: rotation by the orthonormal Hadamard matrix if asked, scale max(amax, 1e-4) / 448 (a power of two if asked),
//           e4m3 codes; keys go to their pages, the queries' scale into the head weights.
// Shapes:   keys [tokens, dim] -> pages of 64 * dim codes, then 64 f32 scales; queries [rows, heads, dim] -> the same.
// Idea:     a warp a vector, kept in shared memory for the butterflies, which run in the CPU backend's order.
// Roofline: memory: dim * (2 + 1) bytes a bf16 vector. Looking for slots named twice reads tokens^2 / 16 slots more, from L2.
#include "quant.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32, MAX_DIM = 256;

// The vector as floats in shared memory, rotated; returns its scale. The warp calls.
__device__ float prepare(const void* from, int type, int64_t at, int dim, bool rotate, bool pow2, float norm, float* x) {
    const int lane = threadIdx.x % 32;
    for (int d = lane; d < dim; d += 32) x[d] = load_float(from, type, at + d);
    __syncwarp();
    if (rotate) {
        for (int half = 1; half < dim; half *= 2) {
            for (int i = lane; i < dim / 2; i += 32) {
                const int at = i / half * 2 * half + i % half;
                const float a = x[at], b = x[at + half];
                x[at] = a + b;
                x[at + half] = a - b;
            }
            __syncwarp();
        }
        for (int d = lane; d < dim; d += 32) x[d] *= norm;
        __syncwarp();
    }
    float amax = 0.0f;
    for (int d = lane; d < dim; d += 32) {
        if (finite(x[d])) amax = fmaxf(amax, fabsf(x[d]));
    }
    const float scale = warp_amax(amax, 1e-4f) / 448.0f;
    return pow2 ? pow2_at_least(scale) : scale;
}

KERNEL(THREADS) index_k_write(PARAMS IndexKWrite p) {
    __shared__ float values[WARPS][MAX_DIM];
    __shared__ int64_t own[WRITE_TOKENS];
    __shared__ int dead[WRITE_TOKENS];
    own_slots(p.slots, p.wide_slots, p.tokens, p.slot_limit, own, dead);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* x = values[warp];
    for (int i = warp; i < WRITE_TOKENS; i += WARPS) {
        const int64_t slot = own[i], token = int64_t(blockIdx.x) * WRITE_TOKENS + i;
        if (slot < 0) continue;
        const float scale = prepare(p.k, p.k_type, token * p.k_row, p.dim, p.hadamard, p.pow2_scale, p.norm, x);
        uint8_t* page = p.pages + slot / TILE * p.page_bytes;
        const int at = slot % TILE;
        for (int d = lane; d < p.dim; d += 32) page[at * p.dim + d] = quantize(x[d], scale);
        if (lane == 0) reinterpret_cast<float*>(page + TILE * p.dim)[at] = scale;
        __syncwarp();
    }
}

KERNEL(THREADS) index_q_quantize(PARAMS IndexQQuantize p) {
    __shared__ float values[WARPS][MAX_DIM];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t vector = int64_t(blockIdx.x) * WARPS + warp;
    if (vector >= p.vectors) return;
    const int64_t row = vector / p.heads, head = vector % p.heads;
    float* x = values[warp];
    const float scale = prepare(
        p.q, p.q_type, row * p.q_row + head * p.q_head, p.dim, p.hadamard, p.pow2_scale, p.norm, x);
    uint8_t* out = p.q_out + row * p.q_out_row + head * p.q_out_head;
    for (int d = lane; d < p.dim; d += 32) out[d] = quantize(x[d], scale);
    if (lane == 0) {
        p.weights_out[row * p.weights_out_row + head] = p.weights[row * p.weights_row + head] * p.scale * scale;
    }
}
