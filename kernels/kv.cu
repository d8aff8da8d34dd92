// Computes: KV rows to their pages: the 656-byte row (512 e4m3 with a power-of-two scale per 128, 64 bf16), bf16 or f32.
// Shapes:   f32 or bf16 [tokens, d_qk] -> pages [pages, page, width].
// Idea:     a warp a token; the scale of 128 values is a reduction over the warp's registers.
// Roofline: memory: 1152 bytes in, 656 out a token. Looking for slots named twice reads tokens^2 / 16 slots more, from L2.
#include "quant.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;

// As the CPU widens bf16: a signalling NaN becomes a quiet one.
__device__ inline float quiet(float x) { return isnan(x) ? __uint_as_float(__float_as_uint(x) | 0x400000) : x; }

KERNEL(THREADS) kv_write(PARAMS KvWrite p) {
    __shared__ int64_t own[WRITE_TOKENS];
    __shared__ int dead[WRITE_TOKENS];
    own_slots(p.slots, p.wide_slots, p.tokens, p.slot_limit, own, dead);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = warp; i < WRITE_TOKENS; i += WARPS) {
        const int64_t slot = own[i], from = (int64_t(blockIdx.x) * WRITE_TOKENS + i) * p.kv_row;
        if (slot < 0) continue;
        uint8_t* out = p.pages + slot / p.page * p.page_bytes + slot % p.page * p.row_bytes;
        if (p.format != KV_FP8) {
            const int type = p.format == KV_F32 ? F32 : BF16;
            for (int d = lane; d < p.d_qk; d += 32) {
                const float x = load_float(p.kv, p.kv_type, from + d);
                store_float(out, type, d, p.kv_type == BF16 ? quiet(x) : x);
            }
            continue;
        }
        for (int tile = 0; tile < 4; ++tile) {
            float x[4], amax = 0.0f;
            for (int j = 0; j < 4; ++j) {
                x[j] = load_float(p.kv, p.kv_type, from + 128 * tile + 4 * lane + j);
                if (finite(x[j])) amax = fmaxf(amax, fabsf(x[j]));
            }
            const float scale = pow2_at_least(fmaxf(warp_amax(amax, 0.0f) / 448.0f, 1e-4f));
            // A row is 656 bytes after another of the host's choosing: only single bytes are sure to be aligned.
            for (int j = 0; j < 4; ++j) out[128 * tile + 4 * lane + j] = quantize(x[j], scale);
            if (lane < 4) out[512 + 4 * tile + lane] = __float_as_uint(scale) >> (8 * lane);
        }
        for (int j = 0; j < 2; ++j) {
            const int d = 2 * lane + j;
            const uint16_t bits = f32_to_bf16(load_float(p.kv, p.kv_type, from + 512 + d));
            out[528 + 2 * d] = bits;
            out[529 + 2 * d] = bits >> 8;
        }
    }
}
