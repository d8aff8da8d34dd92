// Quantising vectors to e4m3, shared by keys, queries and KV rows; the CPU backend's bits.
#pragma once
#include "common.cuh"

constexpr int WRITE_TOKENS = 8;  // Tokens a block: a warp each.

// The smallest power of two not less than a positive, finite x.
__device__ inline float pow2_at_least(float x) {
    float up = __uint_as_float((__float_as_uint(x) + 0x7fffff) & 0xff800000);
    return finite(up) ? up : __uint_as_float(0x7f7fffff);
}

// x / scale keeps a NaN's sign, as the CPU's division does.
__device__ inline uint8_t quantize(float x, float scale) { return f32_to_e4m3(isnan(x) ? x : x / scale); }

// Largest finite magnitude over the warp's values, at least `floor`.
__device__ inline float warp_amax(float mine, float floor) {
    for (int d = 16; d > 0; d /= 2) mine = fmaxf(mine, __shfl_xor_sync(~0u, mine, d));
    return fmaxf(mine, floor);
}

// Where two tokens name one slot, the later one stays: slots of this block's tokens, -1 for those that a later token
// overwrites and for those outside the store. All threads call; the result is in shared memory. `near` has a bit for the
// remainder of each own slot, so that of the later tokens few get as far as being compared.
__device__ inline void own_slots(const void* slots, int wide, int64_t tokens, int64_t limit, int64_t* own, int* dead) {
    constexpr int BITS = 1024, AT_ONCE = 4;
    __shared__ uint32_t near[BITS / 32];
    const int64_t first = int64_t(blockIdx.x) * WRITE_TOKENS;
    for (int i = threadIdx.x; i < BITS / 32; i += blockDim.x) near[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < WRITE_TOKENS; i += blockDim.x) {
        int64_t slot = first + i < tokens ? load_slot(slots, wide, first + i) : -1;
        if (slot >= limit) slot = -1;
        own[i] = slot;
        dead[i] = 0;
        if (slot >= 0) atomicOr(&near[slot % BITS / 32], 1u << slot % 32);
    }
    __syncthreads();
    for (int64_t t = first + 1 + threadIdx.x; t < tokens; t += AT_ONCE * blockDim.x) {
        int64_t later[AT_ONCE];
        for (int j = 0; j < AT_ONCE; ++j) {
            const int64_t at = t + j * blockDim.x;
            later[j] = at < tokens ? load_slot(slots, wide, at) : -1;
        }
        for (int j = 0; j < AT_ONCE; ++j) {
            const int64_t slot = later[j];
            if (slot < 0 || !(near[slot % BITS / 32] >> slot % 32 & 1)) continue;
            for (int i = 0; i < WRITE_TOKENS && first + i < t + j * blockDim.x; ++i) {
                if (own[i] == slot) atomicOr(&dead[i], 1);
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < WRITE_TOKENS; i += blockDim.x) {
        if (dead[i]) own[i] = -1;
    }
    __syncthreads();
}
