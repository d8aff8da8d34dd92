// Computes: what sparse attention attends to, as `attention_probs` in attention.cu does, on Hopper's tensor cores:
//           probs[i] = sum_h exp(scale * q[h]·kv[i] - lse[h]), over its sum.
// Shapes:   q bf16 [rows, heads, 576], KV rows of 1152 or 656 bytes, lse f32 [rows, heads] -> f32 [rows, topk].
// Idea:     a block takes a row. Two warpgroups gather 64 KV rows at a time into one of two tiles (fp8 is widened to bf16
//           on the way); the third multiplies them with 64 heads, tokens on M, so that a token's heads are in four lanes.
//           Sums go to `probs` as they come, 64 heads after the others, and are divided in the end.
// Roofline: the gather, 72 KB (fp8: 41 KB) from L2 a tile, once for every 64 heads; 2 * 64 * 576 flop a token.
// Tensor cores: HGMMA
#include "attention_sm90.cuh"

constexpr int THREADS = 384, PRODUCERS = 256, HEADS = 64, STAGES = 2;

// Dynamic shared memory; `SHARED` in src/backend/cuda/probs.rs mirrors its size.
struct Shared {
    uint8_t q[TILE_BYTES];
    uint8_t kv[STAGES][TILE_BYTES];
    float sums[4];
    uint8_t live[STAGES][TOKENS];
    Barrier full[STAGES], empty[STAGES];
};
static_assert(sizeof(Shared) == 221360, "SHARED");

// Gathers tiles, all of them for each group of heads.
template <bool FP8>
__device__ inline void produce(const Attention& p, Shared& sm, const Rows& rows, int tiles, int passes) {
    const int chunk = threadIdx.x % 8, token = threadIdx.x / 8;  // And token + 32.
    int32_t index[2];
    rows.load(token, 32, index);
    for (int step = 0; step < tiles * passes; ++step) {
        const int stage = step % STAGES;
        const uint32_t to = shared_address(sm.kv[stage]);
        const uint8_t* from[2];
        rows.find(p, index, from);
        rows.load((step + 1) % tiles * TOKENS + token, 32, index);
        uint4 raw[2][4];
        float4 scales[2];
#pragma unroll
        for (int i = 0; i < 2 && FP8; ++i) load_codes(from[i], chunk, raw[i], scales[i]);
        if (step >= STAGES) sm.empty[stage].wait((step / STAGES - 1) & 1);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (FP8) {
                const uint8_t* rope = from[i] ? from[i] + 528 : p.kv;
                copy16(to + 8 * BLOCK_BYTES + swizzled(token + 32 * i, chunk), rope + chunk * 16, from[i] != nullptr);
            } else {
                copy_row(to, token + 32 * i, chunk, from[i], p.kv);
            }
            if (chunk == 0) sm.live[stage][token + 32 * i] = from[i] != nullptr;
        }
        sm.full[stage].arrive_copies();
#pragma unroll
        for (int i = 0; i < 2 && FP8; ++i) store_wide(sm.kv[stage], token + 32 * i, chunk, raw[i], scales[i]);
        fence_async();
        sm.full[stage].arrive();
    }
}

// 64 heads from `head0` on; heads that are not there are zeros. By the group of the products.
__device__ inline void load_queries(const Attention& p, Shared& sm, int64_t row, int head0) {
    named_barrier<128>(1);  // Nobody reads the last ones.
    for (int at = threadIdx.x % 128; at < HEADS * D_QK / 8; at += 128) {
        const int head = at / (D_QK / 8), c = at % (D_QK / 8);
        const bool there = head0 + head < p.heads;
        const uint16_t* from = static_cast<const uint16_t*>(p.q) + row * p.q_row + (head0 + (there ? head : 0)) * p.q_head;
        copy16(shared_address(sm.q) + c / 8 * BLOCK_BYTES + swizzled(head, c % 8), from + c * 8, there);
    }
    wait_copies<0>();
    fence_async();
    named_barrier<128>(1);
}

template <bool FP8>
__device__ inline void weigh(const AttentionProbs& s) {
    extern __shared__ __align__(1024) uint8_t dynamic[];
    Shared& sm = *reinterpret_cast<Shared*>(dynamic);
    const Attention& p = s.a;
    const int64_t row = blockIdx.x;
    const int tid = threadIdx.x;
    if (tid == 0) {
        for (int i = 0; i < STAGES; ++i) {
            sm.full[i].init(2 * PRODUCERS);
            sm.empty[i].init(4);
        }
        sm90::init_done();
    }
    __syncthreads();
    const Rows rows(p, row);
    const int tiles = (rows.count + TOKENS - 1) / TOKENS, passes = (p.heads + HEADS - 1) / HEADS;
    float* out = s.probs + row * s.probs_row;
    if (tid < PRODUCERS) {
        produce<FP8>(p, sm, rows, tiles, passes);
        return;
    }

    const int lane = tid % 32, warp = tid % 128 / 32;
    const int token = warp * 16 + lane / 4;  // And token + 8; of the heads, lane % 4 * 2 + {0, 1} of every eight.
    const float c = p.softmax_scale * LOG2E;
    float total = 0.0f;
    for (int pass = 0; pass < passes; ++pass) {
        load_queries(p, sm, row, pass * HEADS);
        float lse[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const int head = pass * HEADS + i / 2 * 8 + lane % 4 * 2 + i % 2;
            lse[i] = head < p.heads ? p.lse[row * p.lse_row + head] * LOG2E : CUDART_INF_F;
            if (lse[i] == -CUDART_INF_F) lse[i] = CUDART_INF_F;  // All its scores are -inf: nothing to add.
        }
        for (int tile = 0; tile < tiles; ++tile) {
            const int step = pass * tiles + tile, stage = step % STAGES;
            const uint64_t keys = opaque(descriptor(shared_address(sm.kv[stage])));
            const uint64_t queries = opaque(descriptor(shared_address(sm.q)));
            float x[32];
            sm.full[stage].wait(step / STAGES & 1);
            fence_async();
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < D_QK / 16; ++k) {
                const int at = k / 4 * BLOCK_BYTES + k % 4 * 32;
                wgmma_scores(x, further(keys, at), further(queries, at), k != 0);
            }
            wgmma_commit();
            const bool live[2] = {sm.live[stage][token] != 0, sm.live[stage][token + 8] != 0};
            wgmma_wait<0>();
            settle(x);
            __syncwarp();
            if (lane == 0) sm.empty[stage].arrive();
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float sum = 0.0f;
#pragma unroll
                for (int j = 0; j < 16; ++j) sum += power(x[j / 2 * 4 + 2 * i + j % 2] * c - lse[j]);
                sum += __shfl_xor_sync(~0u, sum, 1);
                sum += __shfl_xor_sync(~0u, sum, 2);
                if (!live[i]) sum = 0.0f;
                const int column = tile * TOKENS + token + 8 * i;
                if (lane % 4 == 0 && column < p.topk) {
                    total += sum;
                    out[column] = pass == 0 ? sum : out[column] + sum;  // The same thread's each time.
                }
            }
        }
    }
    for (int d = 4; d < 32; d *= 2) total += __shfl_xor_sync(~0u, total, d);
    if (lane == 0) sm.sums[warp] = total;
    named_barrier<128>(1);
    total = sm.sums[0] + sm.sums[1] + sm.sums[2] + sm.sums[3];
    for (int i = tid % 128; i < p.topk; i += 128) {
        const float weight = i < tiles * TOKENS ? out[i] : 0.0f;
        out[i] = weight == 0.0f ? 0.0f : weight / total;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_probs_bf16(PARAMS AttentionProbs s) { weigh<false>(s); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_probs_fp8(PARAMS AttentionProbs s) { weigh<true>(s); }
