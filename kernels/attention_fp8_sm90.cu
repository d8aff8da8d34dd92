// Computes: what attention_sm90.cu does, of KV rows of 656 bytes, for many heads.
// Shapes:   as there; `attention_combine` is there, too.
// Idea:     a block takes 64 heads of a row and a part of its indices, two tiles of 64 rows. One warpgroup loads three quarters of
//           a tile's rows and widens them to bf16, one has scores and softmax, two add probabilities times values, 256
//           columns each, and widen the last quarter while they wait. A lane finds a KV row for the eight that load it.
// Roofline: 2 * 64 * (576 + 512) flop a token against the bf16 tensor rate; 41 KB from L2 a tile. Widening is 27
//           instructions for eight values and thread, some 900 of a scheduler's issue slots a tile, and sets the pace.
// Tensor cores: HGMMA
#include "attention_sm90.cuh"

constexpr int THREADS = 512, HEADS = 64, STAGES = 2;

// Dynamic shared memory; `WIDE_SHARED` in src/backend/cuda/attention.rs mirrors its size.
struct Shared {
    uint8_t q[TILE_BYTES];
    uint8_t kv[STAGES][TILE_BYTES];
    float fade[STAGES][HEADS], norm[HEADS];
    alignas(16) uint8_t live[STAGES][TOKENS / 4];  // `tell`.
    // A tile's rows are there, and are done with; its probabilities are there.
    Barrier full[STAGES], empty[STAGES], ready[STAGES];
};
static_assert(sizeof(Shared) == 222032, "WIDE_SHARED");

// KV rows of tiles, as the threads of a group copy them: eight lanes a row, rows 16 apart, so 4 N rows a warp. A lane finds one of
// the warp's rows, a tile ahead, and the others get it from there.
template <int N>
struct WarpRows {
    const uint8_t *now, *next;  // One row of a tile and of the tile after it, null where there is none.
    int32_t index[1];           // Of the tile after these.
    int group, token;

    // Of groups of 16 rows from `first` on.
    __device__ WarpRows(int first) : group(first) {
        const int lane = threadIdx.x % 32;
        token = (group + lane / 4 % N) * 16 + threadIdx.x % 128 / 32 * 4 + lane % 4;
    }
    __device__ void load(const Rows& rows, int tile) { rows.load(tile * TOKENS + token, 0, index); }
    __device__ const uint8_t* find(const Attention& p, const Rows& rows) const {
        const uint8_t* from[1];
        rows.find(p, index, from);
        return from[0];
    }
    // This thread's i-th row.
    static __device__ const uint8_t* mine(const uint8_t* held, int i) {
        const int lane = i * 4 + threadIdx.x % 32 / 8;
        return reinterpret_cast<const uint8_t*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(held), lane));
    }
    // Which of them are there: four bits for each four tokens of a tile, in a byte.
    __device__ void tell(uint8_t* live) const {
        const uint32_t there = __ballot_sync(~0u, now != nullptr);
        const int lane = threadIdx.x % 32;
        if (lane < N) live[(group + lane) * 4 + threadIdx.x % 128 / 32] = there >> (4 * lane) & 15;
    }
};

// One of eight lanes' share of N blocks of 64 columns of a row's codes: eight of each.
template <int N>
struct Codes {
    uint2 raw[N];
    float scale[N / 2];

    // Blocks from `block` on; zeros for a row that is not there.
    __device__ void load(const uint8_t* from, int block, int chunk) {
#pragma unroll
        for (int b = 0; b < N; ++b) raw[b] = {}, scale[b / 2] = 0.0f;
        if (!from) return;
#pragma unroll
        for (int i = 0; i < N / 4; ++i) {
            const float2 two = reinterpret_cast<const float2*>(from + D_V + block * 2)[i];
            scale[2 * i] = two.x, scale[2 * i + 1] = two.y;
        }
#pragma unroll
        for (int b = 0; b < N; ++b) raw[b] = *reinterpret_cast<const uint2*>(from + (block + b) * 64 + chunk * 8);
    }
    // Widened.
    __device__ void store(uint8_t* tile, int token, int block, int chunk) const {
        uint8_t* to = tile + block * BLOCK_BYTES + swizzled(token, chunk);
#pragma unroll
        for (int b = 0; b < N; ++b) {
            *reinterpret_cast<uint4*>(to + b * BLOCK_BYTES) = widen(raw[b].x, raw[b].y, scale[b / 2]);
        }
    }
};

// The rope of a row, or zeros.
__device__ inline void copy_rope(const Attention& p, uint8_t* tile, int token, int chunk, const uint8_t* from) {
    const uint32_t to = shared_address(tile) + 8 * BLOCK_BYTES + swizzled(token, chunk);
    copy16(to, (from ? from + 528 : p.kv) + chunk * 16, from != nullptr);
}

// Widens three quarters of fp8 rows, tile after tile.
__device__ inline void widen_rows(const Attention& p, Shared& sm, const Rows& rows, int first, int tiles) {
    const int tid = threadIdx.x % 128, chunk = tid % 8, token = tid / 8;
    WarpRows<3> of(0);
    Codes<8> codes[3];  // Of the next tile.
    of.load(rows, first);
    of.now = of.find(p, rows);
    of.load(rows, first + 1);
#pragma unroll
    for (int i = 0; i < 3; ++i) codes[i].load(of.mine(of.now, i), 0, chunk);
    for (int tile = 0; tile < tiles; ++tile) {
        const int stage = tile % STAGES;
        if (tile >= STAGES) sm.empty[stage].wait((tile / STAGES - 1) & 1);
#pragma unroll
        for (int i = 0; i < 3; ++i) copy_rope(p, sm.kv[stage], token + 16 * i, chunk, of.mine(of.now, i));
        of.tell(sm.live[stage]);
        sm.full[stage].arrive_copies();
        // Here, because to wait for the index is to wait for the codes, too.
        of.next = of.find(p, rows);
        of.load(rows, first + tile + 2);
        // A row's registers take the next tile's codes as soon as they are stored.
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            codes[i].store(sm.kv[stage], token + 16 * i, 0, chunk);
            asm volatile("" ::: "memory");
            codes[i].load(of.mine(of.next, i), 0, chunk);
        }
        fence_async();
        sm.full[stage].arrive();
        of.now = of.next;
    }
}

// The other quarter of a tile, a half of the columns each, by the groups that add values.
struct Quarter {
    WarpRows<1> of{3};

    __device__ void put(const Attention& p, Shared& sm, const Rows& rows, int first, int tile, int w) {
        const int tid = opaque(int(threadIdx.x)) % 128, chunk = tid % 8, token = 48 + tid / 8;
        const int stage = tile % STAGES;
        of.now = of.find(p, rows);
        of.load(rows, first + tile + 1);
        const uint8_t* from = of.mine(of.now, 0);
        Codes<4> codes;
        codes.load(from, 4 * w, chunk);
        if (tile >= STAGES) sm.empty[stage].wait((tile / STAGES - 1) & 1);
        if (w == 0) {
            copy_rope(p, sm.kv[stage], token, chunk, from);
            of.tell(sm.live[stage]);
            sm.full[stage].arrive_copies();
        }
        codes.store(sm.kv[stage], token, 4 * w, chunk);
        fence_async();
        sm.full[stage].arrive();
    }
};

// Scores of a tile of 2 N tokens, in wgmma's layout, to weights of base 2 relative to `top` (unscaled), of each of a thread's two
// heads; `live` is what `tell` left. `sum` is the thread's own. `top` follows the largest score only when that has grown
// 2^8 times as heavy, so that sums seldom have to fade; weights are at most that.
template <int N>
__device__ inline void soften(float (&x)[N], const uint32_t (&live)[N / 8], int lane, float c, float (&top)[2],
                              float (&sum)[2], float (&fade)[2]) {
    uint32_t all = live[0];
#pragma unroll
    for (int i = 1; i < N / 8; ++i) all &= live[i];
    if (all != 0x0f0f0f0f) {
#pragma unroll
        for (int j = 0; j < N / 4; ++j) {
            const uint32_t two = live[j / 2] >> (j % 2 * 16 + lane % 4 / 2 * 8 + lane % 2 * 2);
            if (!(two & 1)) x[4 * j] = x[4 * j + 2] = -CUDART_INF_F;
            if (!(two & 2)) x[4 * j + 1] = x[4 * j + 3] = -CUDART_INF_F;
        }
    }
    float next[2] = {top[0], top[1]};
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
        next[0] = fmaxf(next[0], fmaxf(x[4 * j], x[4 * j + 1]));
        next[1] = fmaxf(next[1], fmaxf(x[4 * j + 2], x[4 * j + 3]));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        next[r] = fmaxf(next[r], __shfl_xor_sync(~0u, next[r], 1));
        next[r] = fmaxf(next[r], __shfl_xor_sync(~0u, next[r], 2));
        if (top[r] != -CUDART_INF_F && !((next[r] - top[r]) * c > 8.0f)) next[r] = top[r];
        const float base = next[r] == -CUDART_INF_F ? 0.0f : next[r] * c;
        fade[r] = power(top[r] * c - base);
        float add = 0.0f;
#pragma unroll
        for (int j = 0; j < N / 4; ++j) {
            x[4 * j + 2 * r] = power(x[4 * j + 2 * r] * c - base);
            x[4 * j + 2 * r + 1] = power(x[4 * j + 2 * r + 1] * c - base);
            add += x[4 * j + 2 * r] + x[4 * j + 2 * r + 1];
        }
        sum[r] = sum[r] * fade[r] + add;
        top[r] = next[r];
    }
}

// The weights as bf16, [heads][tokens], swizzled; a warp's 16 heads from 16 * warp on.
template <int N>
__device__ inline void store_weights(uint32_t to, int warp, int lane, const float (&x)[N]) {
    const int row = warp * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < N / 4; j += 2) {
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to + swizzled(row, j + lane / 16)),
                     "r"(pack(x[4 * j], x[4 * j + 1])), "r"(pack(x[4 * j + 2], x[4 * j + 3])),
                     "r"(pack(x[4 * j + 4], x[4 * j + 5])), "r"(pack(x[4 * j + 6], x[4 * j + 7]))
                     : "memory");
    }
}

// A group's 256 columns from `column` on, times `norm`, to the output or a part of it through shared memory, a head at a time:
// the registers' own order would touch eight heads with each store. There, heads are some bytes more than their columns
// apart, on different banks; nobody else uses the memory any more.
constexpr int LEAVING_BYTES = 64 * (1024 + 32);
__device__ inline void leave(const AttentionSm90& s, int64_t part, int64_t row, int head0, int column, float (&o)[2][64],
                             const float* norms, uint8_t* memory, int barrier) {
    const Attention& p = s.a;
    const int tid = threadIdx.x % 128, lane = tid % 32, head = tid / 32 * 16 + lane / 4;
    const bool wide = s.splits > 1 || p.out_type == F32;
    const int size = wide ? 4 : 2, pitch = 256 * size + (wide ? 32 : 16);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float norm = norms[head + 8 * r];
        uint8_t* to = memory + (head + 8 * r) * pitch + lane % 4 * (2 * size);
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
    named_barrier<128>(barrier);
    const int h = head0 + tid;
    if (tid < 64 && h < p.heads && !(s.splits > 1 && norms[tid] == 0.0f)) {
        uint8_t* to = s.splits > 1 ? reinterpret_cast<uint8_t*>(s.part_out + (part * p.heads + h) * D_V)
                                   : static_cast<uint8_t*>(p.out) + (row * p.out_row + h * p.out_head) * size;
        copy_out(to + column * size, shared_address(memory) + tid * pitch, 256 * size);
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
            sm.full[i].init(640);
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

    const int lane = tid % 32, warp = tid % 128 / 32, head = warp * 16 + lane / 4;  // And head + 8, in wgmma's layout.
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 104;");
        widen_rows(p, sm, rows, first, tiles);
    } else if (group == 1) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
        const float c = p.softmax_scale * LOG2E;
        load_queries<THREADS - 128, HEADS>(p, sm.q, row, head0);
        const uint64_t query_base = descriptor(shared_address(sm.q));
        float top[2] = {-CUDART_INF_F, -CUDART_INF_F}, sum[2] = {};
        float x[TOKENS / 2];
        for (int tile = 0; tile < tiles; ++tile) {
            const int stage = tile % STAGES;
            const uint32_t kv = shared_address(sm.kv[stage]);
            const uint64_t keys = opaque(descriptor(kv)), queries = opaque(query_base);
            sm.full[stage].wait(tile / STAGES & 1);
            fence_async();
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < D_QK / 16; ++k) {
                const int at = k / 4 * BLOCK_BYTES + k % 4 * 32;
                wgmma_scores(x, further(queries, at), further(keys, at), k != 0);
            }
            wgmma_commit();
            wgmma_wait<0>();
            settle(x);
            uint32_t live[TOKENS / 16];
#pragma unroll
            for (int i = 0; i < TOKENS / 16; ++i) live[i] = *reinterpret_cast<const uint32_t*>(&sm.live[stage][4 * i]);
            float fade[2];
            soften(x, live, lane, c, top, sum, fade);
            if (lane % 4 == 0) sm.fade[stage][head] = fade[0], sm.fade[stage][head + 8] = fade[1];
            // The probabilities take the place of the keys' last 64 columns, which no value has, once the whole group
            // is done with them.
            named_barrier<128>(1);
            store_weights(kv + 8 * BLOCK_BYTES, warp, lane, x);
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
        Quarter quarter;
        quarter.of.load(rows, first);
        load_queries<THREADS - 128, HEADS>(p, sm.q, row, head0);
        for (int tile = 0; tile < min(STAGES, tiles); ++tile) quarter.put(p, sm, rows, first, tile, w);
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
            const uint64_t weights = descriptor(kv + 8 * BLOCK_BYTES);
            const uint64_t values = descriptor(kv + w * 4 * BLOCK_BYTES);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < TOKENS / 16; ++k) {
                wgmma_values(o[0], further(weights, k * 32), further(values, k * 2048));
                wgmma_values(o[1], further(weights, k * 32), further(values, k * 2048 + 2 * BLOCK_BYTES));
            }
            wgmma_commit();
            wgmma_wait<0>();
            settle(o[0]);
            settle(o[1]);
            __syncwarp();
            if (lane == 0) sm.empty[stage].arrive();
            if (tile + STAGES < tiles) quarter.put(p, sm, rows, first, tile + STAGES, w);
        }
        named_barrier<THREADS - 128>(2);
        static_assert(2 * LEAVING_BYTES <= sizeof(sm.kv), "");
        leave(s, part, row, head0, w * 256, o, sm.norm, sm.kv[0] + w * LEAVING_BYTES, 3 + w);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_fp8(PARAMS AttentionSm90 p) { attend(p); }
