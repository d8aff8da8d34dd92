// Computes: sparse MLA as attention_sm90.cu does, for bf16 KV rows and up to 8, 16 or 32 heads.
// Shapes:   as there; parts of rows too.
// Idea:     operands exchanged: 64 tokens are wgmma's M and the heads its N, so that few heads cost few products and
//           few registers, and two blocks share a multiprocessor: one computes while the other gathers. Scores are
//           summed over columns by both warpgroups (half each), values are 64 columns by 64 tokens, transposed.
// Roofline: memory: 1152 bytes a token and row; shared memory feeds a product in 16 cycles, 68 products a tile.
// Tensor cores: HGMMA
#include "attention_sm90.cuh"

constexpr int THREADS = 256;

// Dynamic shared memory; `bf16_shared` in src/backend/cuda/attention.rs mirrors its size.
template <int N>
struct Few {
    uint8_t kv[TILE_BYTES];  // Its last block also carries partial scores from group to group.
    uint8_t q[BLOCKS * N * 128];
    uint8_t prob[TOKENS * N * 2];  // [token / 8][head / 8][token % 8][head % 8]
    float fade[N];
    float best[2][4][N > 8 ? N / 2 : N];
    uint8_t live[TOKENS];
};
static_assert(sizeof(Few<8>) == 84320 && sizeof(Few<32>) == 115392, "bf16_shared");

template <int N>
__device__ inline void attend(const AttentionSm90& s) {
    extern __shared__ __align__(1024) uint8_t dynamic[];
    Few<N>& sm = *reinterpret_cast<Few<N>*>(dynamic);
    // Of a thread: scores, those it turns into probabilities, and heads among these.
    constexpr int SCORES = N / 2, OWN = N > 8 ? SCORES / 2 : SCORES, COLUMNS = OWN / 2, OWN_HEADS = N > 8 ? N / 2 : N;
    const Attention& p = s.a;
    const int64_t part = blockIdx.x, row = part / s.splits;
    const int tid = threadIdx.x, lane = tid % 32, warp = tid % 128 / 32, w = __shfl_sync(~0u, tid / 128, 0);
    wait_for_previous();
    launch_dependents();
    const Rows rows(p, row);
    const int first = part % s.splits * s.split_tiles;
    const int tiles = min(max((rows.count + TOKENS - 1) / TOKENS - first, 0), s.split_tiles);

    const int chunk = tid % 8, token0 = tid / 8;
    const uint8_t* from[2];
    int32_t index[2];  // Of the next tile.
    rows.load(first * TOKENS + token0, 32, index);
    for (int i = tid; i < N * D_QK / 8; i += THREADS) {
        const int head = i / (D_QK / 8), c = i % (D_QK / 8);
        const bool there = head < p.heads;
        const uint16_t* source = static_cast<const uint16_t*>(p.q) + row * p.q_row + (there ? head : 0) * p.q_head + c * 8;
        copy16(shared_address(sm.q) + c / 8 * (N * 128) + swizzled(head, c % 8), source, there);
    }
    rows.find(p, index, from);
    rows.load((first + 1) * TOKENS + token0, 32, index);

    const float c = p.softmax_scale * LOG2E;
    const uint32_t kv = shared_address(sm.kv), q = shared_address(sm.q), prob = shared_address(sm.prob);
    // A group sums every other 16 columns, and has half of the values' columns.
    const uint64_t key_base = descriptor(kv + w * 32), query_base = descriptor(q + w * 32);
    const uint64_t value_base = descriptor(kv + w * 4 * BLOCK_BYTES), weight_base = plain_descriptor(prob, N * 16);
    float* exchange = reinterpret_cast<float*>(sm.kv + 8 * BLOCK_BYTES);
    const bool owner = N > 8 || w == 0;
    float o[4][SCORES] = {}, top[COLUMNS], sum[COLUMNS];
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) top[i] = -CUDART_INF_F, sum[i] = 0.0f;

    for (int tile = 0; tile < tiles; ++tile) {
        if (tile > 0) __syncthreads();
        const int token = opaque(token0);
#pragma unroll
        for (int i = 0; i < 2; ++i) copy_row(kv, token + 32 * i, chunk, from[i], p.kv);
        if (chunk == 0) {
            sm.live[token0] = from[0] != nullptr;
            sm.live[token0 + 32] = from[1] != nullptr;
        }
        rows.find(p, index, from);
        rows.load((first + tile + 2) * TOKENS + token0, 32, index);
        wait_copies<0>();
        fence_async();
        __syncthreads();

        float x[SCORES];
        const uint64_t keys = opaque(key_base), queries = opaque(query_base);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < D_QK / 32; ++i) {
            wgmma<0>(x, further(keys, i / 2 * BLOCK_BYTES + i % 2 * 64), further(queries, i / 2 * (N * 128) + i % 2 * 64),
                     i != 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        settle(x);
        __syncthreads();
        const int member = opaque(tid) % 128, lane = member % 32, warp = member / 32;  // As outside; see `opaque`.
        // Each group sends the other its share of the scores that the other owns.
        if (N > 8) {
#pragma unroll
            for (int i = 0; i < OWN; ++i) exchange[(1 - w) * OWN * 128 + i * 128 + member] = w ? x[i] : x[(OWN + i) % SCORES];
        } else if (w == 1) {
#pragma unroll
            for (int i = 0; i < OWN; ++i) exchange[i * 128 + member] = x[i];
        }
        __syncthreads();
        if (owner) {
            const bool live[2] = {sm.live[warp * 16 + lane / 4] != 0, sm.live[warp * 16 + lane / 4 + 8] != 0};
            float y[OWN], next[COLUMNS];
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                y[i] = (w && N > 8 ? x[(OWN + i) % SCORES] : x[i]) + exchange[(N > 8 ? w : 0) * OWN * 128 + i * 128 + member];
                if (!live[i / 2 % 2]) y[i] = -CUDART_INF_F;
            }
#pragma unroll
            for (int i = 0; i < COLUMNS; ++i) {
                next[i] = fmaxf(y[i / 2 * 4 + i % 2], y[i / 2 * 4 + i % 2 + 2]);
#pragma unroll
                for (int d = 4; d < 32; d *= 2) next[i] = fmaxf(next[i], __shfl_xor_sync(~0u, next[i], d));
                if (lane < 4) sm.best[w][warp][i / 2 * 8 + lane * 2 + i % 2] = next[i];
            }
            named_barrier<128>(1 + w);
#pragma unroll
            for (int i = 0; i < COLUMNS; ++i) {
                const int head = i / 2 * 8 + lane % 4 * 2 + i % 2;
                next[i] = top[i];
#pragma unroll
                for (int other = 0; other < 4; ++other) next[i] = fmaxf(next[i], sm.best[w][other][head]);
                const float base = next[i] == -CUDART_INF_F ? 0.0f : next[i] * c;
                const float fade = power(top[i] * c - base);
                float& a = y[i / 2 * 4 + i % 2];
                float& b = y[i / 2 * 4 + i % 2 + 2];
                a = power(a * c - base);
                b = power(b * c - base);
                sum[i] = sum[i] * fade + (a + b);
                top[i] = next[i];
                if (warp == 0 && lane < 4) sm.fade[(N > 8 ? w : 0) * OWN_HEADS + head] = fade;
            }
#pragma unroll
            for (int i = 0; i < OWN; i += 2) {
                const int token = warp * 16 + lane / 4 + i / 2 % 2 * 8, eight = (N > 8 ? w : 0) * (OWN_HEADS / 8) + i / 4;
                *reinterpret_cast<uint32_t*>(sm.prob + token / 8 * (N * 16) + eight * 128 + token % 8 * 16 + lane % 4 * 4) =
                    pack(y[i], y[i + 1]);
            }
            fence_async();
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            const float fade[2] = {sm.fade[j * 8 + lane % 4 * 2], sm.fade[j * 8 + lane % 4 * 2 + 1]};
#pragma unroll
            for (int b = 0; b < 4; ++b) {
#pragma unroll
                for (int i = 0; i < 4; ++i) o[b][4 * j + i] *= fade[i % 2];
            }
        }
        const uint64_t values = opaque(value_base), weights = opaque(weight_base);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < TOKENS / 16; ++k) {
#pragma unroll
            for (int b = 0; b < 4; ++b) {
                wgmma<1>(o[b], further(values, b * BLOCK_BYTES + k * 2048), further(weights, k * (N * 32)), 1);
            }
        }
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int b = 0; b < 4; ++b) settle(o[b]);
    }

    wait_copies<0>();
    __syncthreads();
    if (owner) {
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) {
#pragma unroll
            for (int d = 4; d < 32; d *= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], d);
            if (lane < 4) sm.best[w][warp][i / 2 * 8 + lane * 2 + i % 2] = sum[i];
        }
        named_barrier<128>(1 + w);
        if (warp == 0 && lane < 4) {
#pragma unroll
            for (int i = 0; i < COLUMNS; ++i) {
                const int head = i / 2 * 8 + lane * 2 + i % 2, h = (N > 8 ? w : 0) * OWN_HEADS + head;
                float total = (sm.best[w][0][head] + sm.best[w][1][head]) + (sm.best[w][2][head] + sm.best[w][3][head]);
                sm.fade[h] = finish(s, part, row, h, top[i], total);
            }
        }
    }
    __syncthreads();
    // Out through the tile's memory, a head at a time; heads are 16 bytes more than their columns apart.
    const bool wide = s.splits > 1 || p.out_type == F32;
    const int bytes = wide ? D_V * 4 : D_V * 2, pitch = bytes + 16;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int h = j * 8 + lane % 4 * 2 + i % 2, column = w * 256 + warp * 16 + lane / 4 + i / 2 * 8;
            const float norm = sm.fade[h];
#pragma unroll
            for (int b = 0; b < 4; ++b) {
                const float x = norm == 0.0f ? 0.0f : o[b][4 * j + i] * norm;
                if (wide) {
                    *reinterpret_cast<float*>(sm.kv + h * pitch + (column + b * 64) * 4) = x;
                } else {
                    *reinterpret_cast<__nv_bfloat16*>(sm.kv + h * pitch + (column + b * 64) * 2) = __float2bfloat16_rn(x);
                }
            }
        }
    }
    fence_async();
    __syncthreads();
    if (tid < p.heads && !(s.splits > 1 && sm.fade[tid] == 0.0f)) {
        uint8_t* to = s.splits > 1 ? reinterpret_cast<uint8_t*>(s.part_out + (part * p.heads + tid) * D_V)
                                   : static_cast<uint8_t*>(p.out) + (row * p.out_row + tid * p.out_head) * (wide ? 4 : 2);
        copy_out(to, kv + tid * pitch, bytes);
    }
}

#define FEW(N)                                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_few_##N(PARAMS AttentionSm90 p) { attend<N>(p); }
FEW(8)
FEW(16)
FEW(32)
