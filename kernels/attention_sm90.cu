// Computes: sparse MLA as attention.cu does, on Hopper's tensor cores: d_qk 576, d_v 512, bf16 queries and KV; `combine` joins
//           the parts of a row that was split, of all kernels of sparse attention.
// Shapes:   q bf16 [rows, heads, 576], KV rows of 1152 bytes, indices int32 [rows, topk], out bf16 or f32.
// Idea:     a block takes 64 heads of a row and a part of its indices. One warpgroup gathers 64 KV rows at a time into
//           one of two tiles, one has scores and softmax, two add probabilities times values, 256 columns each:
//           gathering, a tile's scores and another's values overlap.
// Roofline: 2 * 64 * (576 + 512) flop a token against the bf16 tensor rate; 72 KB from L2 a tile, and about 310 KB
//           through shared memory.
// Tensor cores: HGMMA
#include "attention_sm90.cuh"

constexpr int THREADS = 512, HEADS = 64, STAGES = 2;

// Dynamic shared memory; `WIDE_SHARED` in src/backend/cuda/attention.rs mirrors its size.
struct Shared {
    uint8_t q[TILE_BYTES];
    uint8_t kv[STAGES][TILE_BYTES];
    float fade[STAGES][HEADS], norm[HEADS];
    alignas(2) uint8_t live[STAGES][TOKENS];
    // Columns 0 to 255, and all, of a tile's rows are there; rows 0 to 31, and all, are done with; probabilities are there.
    Barrier half[STAGES], full[STAGES], half_empty[STAGES], empty[STAGES], ready[STAGES];
};
static_assert(sizeof(Shared) == 222160, "WIDE_SHARED");

// Copies bf16 rows, tile after tile.
__device__ inline void produce(const Attention& p, Shared& sm, const Rows& rows, int first, int tiles) {
    const int tid = threadIdx.x % 128, chunk = tid % 8, token0 = tid / 8;
    const uint8_t* from[4];
    int32_t index[4];  // Of the next tile.
    rows.load(first * TOKENS + token0, 16, index);
    for (int tile = 0; tile < tiles; ++tile) {
        rows.find(p, index, from);
        rows.load((first + tile + 1) * TOKENS + token0, 16, index);
        const int stage = tile % STAGES, parity = (tile / STAGES - 1) & 1;
        const uint32_t to = shared_address(sm.kv[stage]);
        if (tile >= STAGES) sm.half_empty[stage].wait(parity);
        // Scores start when the first 256 columns are there. The last 64 stay until all values are added.
#pragma unroll
        for (int i = 0; i < 2; ++i) copy_row<0, 8>(to, token0 + 16 * i, chunk, from[i], p.kv);
        if (tile >= STAGES) sm.empty[stage].wait(parity);
#pragma unroll
        for (int i = 2; i < 4; ++i) copy_row<0, 4>(to, token0 + 16 * i, chunk, from[i], p.kv);
        sm.half[stage].arrive_copies();
#pragma unroll
        for (int i = 2; i < 4; ++i) copy_row<4, 8>(to, token0 + 16 * i, chunk, from[i], p.kv);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            copy_row<8, 9>(to, token0 + 16 * i, chunk, from[i], p.kv);
            if (chunk == 0) sm.live[stage][token0 + 16 * i] = from[i] != nullptr;
        }
        sm.full[stage].arrive_copies();
        sm.full[stage].arrive();
    }
}

__device__ inline void attend(const AttentionSm90& s) {
    extern __shared__ __align__(1024) uint8_t dynamic[];
    Shared& sm = *reinterpret_cast<Shared*>(dynamic);
    const Attention& p = s.a;
    const int head_tiles = (p.heads + HEADS - 1) / HEADS;
    const int head0 = blockIdx.x % head_tiles * HEADS;
    const int64_t part = blockIdx.x / head_tiles, row = part / s.splits;
    const int split = part % s.splits, tid = threadIdx.x;
    const int group = __shfl_sync(~0u, tid / 128, 0);
    if (tid == 0) {
        for (int i = 0; i < STAGES; ++i) {
            sm.half[i].init(128);
            sm.full[i].init(256);
            sm.half_empty[i].init(8);
            sm.empty[i].init(8);
            sm.ready[i].init(128);
        }
        sm90::init_done();
    }
    wait_for_previous();
    launch_dependents();
    __syncthreads();
    const Rows rows(p, row);
    const int first = split * s.split_tiles;
    const int tiles = min(max((rows.count + TOKENS - 1) / TOKENS - first, 0), s.split_tiles);

    const int lane = tid % 32, head = tid % 128 / 32 * 16 + lane / 4;  // And head + 8, in wgmma's layout.
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
        produce(p, sm, rows, first, tiles);
    } else if (group == 1) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 104;");
        const float c = p.softmax_scale * LOG2E;
        const uint64_t query_base = descriptor(shared_address(sm.q));
        load_queries<THREADS - 128, HEADS>(p, sm.q, row, head0);
        float top[2] = {-CUDART_INF_F, -CUDART_INF_F}, sum[2] = {};
        for (int tile = 0; tile < tiles; ++tile) {
            const int stage = tile % STAGES;
            const uint32_t kv = shared_address(sm.kv[stage]);
            float x[32];
            const uint64_t keys = opaque(descriptor(kv)), queries = opaque(query_base);
            sm.half[stage].wait(tile / STAGES & 1);
            fence_async();
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 16; ++k) {
                const int at = k / 4 * BLOCK_BYTES + k % 4 * 32;
                wgmma_scores(x, further(queries, at), further(keys, at), k != 0);
            }
            wgmma_commit();
            sm.full[stage].wait(tile / STAGES & 1);
            fence_async();
            wgmma_fence();
#pragma unroll
            for (int k = 16; k < D_QK / 16; ++k) {
                const int at = k / 4 * BLOCK_BYTES + k % 4 * 32;
                wgmma_scores(x, further(queries, at), further(keys, at), k != 0);
            }
            wgmma_commit();
            uint32_t live[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) live[j] = *reinterpret_cast<uint16_t*>(&sm.live[stage][8 * j + lane % 4 * 2]);
            wgmma_wait<0>();
            settle(x);
            uint32_t all = live[0];
#pragma unroll
            for (int j = 1; j < 8; ++j) all &= live[j];
            if (__any_sync(~0u, all != 0x0101)) {
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    if (!(live[j] & 0xff)) x[4 * j] = x[4 * j + 2] = -CUDART_INF_F;
                    if (!(live[j] >> 8)) x[4 * j + 1] = x[4 * j + 3] = -CUDART_INF_F;
                }
            }
            float next[2] = {top[0], top[1]};
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                next[0] = fmaxf(next[0], fmaxf(x[4 * j], x[4 * j + 1]));
                next[1] = fmaxf(next[1], fmaxf(x[4 * j + 2], x[4 * j + 3]));
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                next[r] = fmaxf(next[r], __shfl_xor_sync(~0u, next[r], 1));
                next[r] = fmaxf(next[r], __shfl_xor_sync(~0u, next[r], 2));
                const float base = next[r] == -CUDART_INF_F ? 0.0f : next[r] * c;
                const float fade = power(top[r] * c - base);
                float add = 0.0f;
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    x[4 * j + 2 * r] = power(x[4 * j + 2 * r] * c - base);
                    x[4 * j + 2 * r + 1] = power(x[4 * j + 2 * r + 1] * c - base);
                    add += x[4 * j + 2 * r] + x[4 * j + 2 * r + 1];
                }
                sum[r] = sum[r] * fade + add;
                top[r] = next[r];
                if (lane % 4 == 0) sm.fade[stage][head + 8 * r] = fade;
            }
            // The probabilities take the place of the keys' last 64 columns, which no value has, once the whole group
            // is done with them.
            named_barrier<128>(1);
            uint8_t* prob = sm.kv[stage] + 8 * BLOCK_BYTES + lane % 4 * 4;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                *reinterpret_cast<uint32_t*>(prob + swizzled(head, j)) = pack(x[4 * j], x[4 * j + 1]);
                *reinterpret_cast<uint32_t*>(prob + swizzled(head + 8, j)) = pack(x[4 * j + 2], x[4 * j + 3]);
            }
            fence_async();
            sm.ready[stage].arrive();
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int h = head0 + head + 8 * r;
            float total = sum[r] + __shfl_xor_sync(~0u, sum[r], 1);
            total += __shfl_xor_sync(~0u, total, 2);
            if (lane % 4 == 0) sm.norm[head + 8 * r] = finish(s, part, row, h, top[r], total);
        }
        named_barrier<THREADS - 128>(2);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
        const int w = group - 2;
        load_queries<THREADS - 128, HEADS>(p, sm.q, row, head0);
        float o[2][64] = {};  // Columns of the first and the second 128.
        for (int tile = 0; tile < tiles; ++tile) {
            const int stage = tile % STAGES;
            const uint32_t kv = shared_address(sm.kv[stage]);
            sm.ready[stage].wait(tile / STAGES & 1);
            const float fade[2] = {sm.fade[stage][head], sm.fade[stage][head + 8]};
            fence_async();
            if (__any_sync(~0u, fade[0] != 1.0f || fade[1] != 1.0f)) {
#pragma unroll
                for (int i = 0; i < 128; ++i) o[i / 64][i % 64] *= fade[i / 2 % 2];
            }
            const uint64_t weights = descriptor(kv + 8 * BLOCK_BYTES), values = descriptor(kv + w * 4 * BLOCK_BYTES);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < TOKENS / 16; ++k) {
                wgmma_values(o[0], further(weights, k * 32), further(values, k * 2048));
                wgmma_values(o[1], further(weights, k * 32), further(values, k * 2048 + 2 * BLOCK_BYTES));
                if (k % 2) wgmma_commit();
            }
            wgmma_wait<1>();
            if (lane == 0) sm.half_empty[stage].arrive();
            wgmma_wait<0>();
            settle(o[0]);
            settle(o[1]);
            if (lane == 0) sm.empty[stage].arrive();
        }
        named_barrier<THREADS - 128>(2);
        // Out through a tile's memory, a head's 256 columns at a time: the registers' own order would touch eight heads
        // with each store. Heads are some bytes more than their columns apart, on different banks.
        const bool wide = s.splits > 1 || p.out_type == F32;
        const int bytes = wide ? 1024 : 512, pitch = wide ? 1056 : 528;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float norm = sm.norm[head + 8 * r];
            uint8_t* to = sm.kv[w] + (head + 8 * r) * pitch + lane % 4 * (wide ? 8 : 4);
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                float* x = &o[i / 16][4 * i % 64 + 2 * r];
                x[0] = norm == 0.0f ? 0.0f : x[0] * norm;
                x[1] = norm == 0.0f ? 0.0f : x[1] * norm;
            }
            if (wide) {
#pragma unroll
                for (int i = 0; i < 32; ++i) {
                    const float* x = &o[i / 16][4 * i % 64 + 2 * r];
                    *reinterpret_cast<float2*>(to + 32 * i) = make_float2(x[0], x[1]);
                }
            } else {
#pragma unroll
                for (int i = 0; i < 32; ++i) {
                    const float* x = &o[i / 16][4 * i % 64 + 2 * r];
                    *reinterpret_cast<uint32_t*>(to + 16 * i) = pack(x[0], x[1]);
                }
            }
        }
        fence_async();
        named_barrier<128>(3 + w);
        const int one = tid % 128, h = head0 + one;
        if (one < HEADS && h < p.heads && !(s.splits > 1 && sm.norm[one] == 0.0f)) {
            uint8_t* to = s.splits > 1 ? reinterpret_cast<uint8_t*>(s.part_out + (part * p.heads + h) * D_V)
                                       : static_cast<uint8_t*>(p.out) + (row * p.out_row + h * p.out_head) * (wide ? 4 : 2);
            copy_out(to + w * bytes, shared_address(sm.kv[w]) + one * pitch, bytes);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_bf16(PARAMS AttentionSm90 p) { attend(p); }

// A block takes a head of a row; each thread four columns. Parts are added in their order.
extern "C" __global__ void __launch_bounds__(128) attention_combine(PARAMS AttentionSm90 s) {
    const Attention& p = s.a;
    const int64_t row = blockIdx.x;
    const int head = blockIdx.y, lane = threadIdx.x % 32;
    const int64_t first = row * s.splits * p.heads + head;
    wait_for_previous();
    launch_dependents();
    float weight[2], top = -CUDART_INF_F, sum = 0.0f;  // Of parts lane and lane + 32.
    bool any = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int split = i * 32 + lane;
        weight[i] = split < s.splits ? s.part_lse[first + int64_t(split) * p.heads] : -CUDART_INF_F;
        any |= weight[i] != -CUDART_INF_F;
        top = fmaxf(top, weight[i]);
    }
    any = __any_sync(~0u, any);
#pragma unroll
    for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        weight[i] = weight[i] == -CUDART_INF_F ? 0.0f : expf(weight[i] - top);
        sum += weight[i];
    }
#pragma unroll
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    float4 out = {};
    for (int base = 0; base < s.splits; base += 16) {
        float4 x[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const int split = min(base + i, s.splits - 1);
            x[i] = *reinterpret_cast<const float4*>(s.part_out + (first + int64_t(split) * p.heads) * D_V + threadIdx.x * 4);
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const float w = __shfl_sync(~0u, base < 32 ? weight[0] : weight[1], (base + i) % 32);
            if (w == 0.0f) continue;  // An empty part has written nothing.
            out.x += w * x[i].x;
            out.y += w * x[i].y;
            out.z += w * x[i].z;
            out.w += w * x[i].w;
        }
    }
    if (p.lse && threadIdx.x == 0) p.lse[row * p.lse_row + head] = any ? top + logf(sum) : -CUDART_INF_F;
    const float norm = any ? 1.0f / (sum + (p.sink ? expf(p.sink[head] - top) : 0.0f)) : 0.0f;
    const int64_t to = row * p.out_row + head * p.out_head + threadIdx.x * 4;
    if (p.out_type == F32) {
        *reinterpret_cast<float4*>(static_cast<float*>(p.out) + to) =
            make_float4(out.x * norm, out.y * norm, out.z * norm, out.w * norm);
    } else {
        *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.out) + to) =
            make_uint2(pack(out.x * norm, out.y * norm), pack(out.z * norm, out.w * norm));
    }
}
