// Computes: sparse MLA as attention_sm90.cu does, for KV rows of 656 bytes and up to 8, 16, 20 or 32 heads.
// Shapes:   as there; parts of rows too, in tiles of 64 tokens.
// Idea:     operands exchanged: tokens are wgmma's M and the heads its N, so that few heads cost few products and few
//           registers. KV rows lie in shared memory as they are stored, one bulk copy each; they are an odd number of
//           16-byte chunks, so `ldmatrix` finds eight rows on different banks. A comes from registers, where two codes
//           become two f16 by one instruction, exactly; scales are put to scores, and to values in the registers.
// Roofline: 656 bytes a token and row from L2; in a multiprocessor 256 conversions a tile and warp.
// Tensor cores: HGMMA
// May spill:    attention_few_fp8_8 attention_few_fp8_16 (a few words, so that more blocks share a multiprocessor)
#include <cuda_fp16.h>

#include "attention_sm90.cuh"

constexpr int ROW = 656;
// Probabilities are 2^SHIFT times themselves, so that f16 has small ones too; up to 2^LAZY more before the maximum that they
// are relative to follows. Scales are ROOM times themselves over a power of two that none exceeds.
constexpr float SHIFT = 7.0f, LAZY = 8.0f, ROOM = 16.0f;

// Dynamic shared memory; `fp8_shared` in src/backend/cuda/attention.rs mirrors its size. HEADS are N, or fewer: what products
// read beyond them are other numbers, and sums that nobody asks for.
template <int N, int HEADS, int STAGES>
struct Few {
    uint8_t kv[STAGES][TOKENS * ROW];
    uint8_t q[D_QK / 8][HEADS][16];
    uint8_t prob[TOKENS / 8][N / 8][8][16];
    float best[4][N], norm[N], top[N], most[4];  // `norm`: what a head's scores are multiplied by, then its sums.
    __half scale[4][TOKENS];
    Barrier full[STAGES];
};
static_assert(sizeof(Few<8, 8, 1>) == 52952 && sizeof(Few<24, 20, 2>) == 111200, "fp8_shared");

#define F8(d, i) F4(d, i), F4(d, i + 4)
#define F12(d, i) F8(d, i), F4(d, i + 8)
#define RS(NAME, TYPE, N, D, LIST, A, B, P, T)                                                                         \
    template <int TRANSPOSED>                                                                                          \
    __device__ inline void NAME(float (&d)[N / 2], const uint32_t* a, uint64_t b, int add) {                           \
        asm volatile("{.reg .pred p; setp.ne.b32 p, " P ", 0;\n"                                                       \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" LIST "}, {" A "}, " B        \
                     ", p, 1, 1, " T ";}"                                                                              \
                     : D                                                                                               \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANSPOSED));                 \
    }
#define L4 "%0,%1,%2,%3"
#define L8 L4 ",%4,%5,%6,%7"
#define L12 L8 ",%8,%9,%10,%11"
#define L16 L12 ",%12,%13,%14,%15"
#define RS_ALL(NAME, TYPE)                                                                                             \
    RS(NAME, TYPE, 8, F4(d, 0), L4, "%4,%5,%6,%7", "%8", "%9", "%10")                                                  \
    RS(NAME, TYPE, 16, F8(d, 0), L8, "%8,%9,%10,%11", "%12", "%13", "%14")                                             \
    RS(NAME, TYPE, 24, F12(d, 0), L12, "%12,%13,%14,%15", "%16", "%17", "%18")                                         \
    RS(NAME, TYPE, 32, F16(d, 0), L16, "%16,%17,%18,%19", "%20", "%21", "%22")
// d[64 x N] (+)= a b: a's part of a thread in registers, b K-major, or MN-major when transposed.
RS_ALL(wgmma_f16, "f16")
RS_ALL(wgmma_bf16, "bf16")

template <bool TRANSPOSED>
__device__ inline void load_matrices(uint32_t (&x)[4], uint32_t from) {
    if (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
    }
}

// Two e4m3 to two f16, exactly: the lower and the upper two of a word.
__device__ inline uint32_t lower(uint32_t x) {
    uint32_t y;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.rn.f16x2.e4m3x2 %0, l;}" : "=r"(y) : "r"(x));
    return y;
}
__device__ inline uint32_t upper(uint32_t x) {
    uint32_t y;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.rn.f16x2.e4m3x2 %0, h;}" : "=r"(y) : "r"(x));
    return y;
}
__device__ inline uint32_t times(uint32_t x, uint32_t y) {
    uint32_t z;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}
__device__ inline uint32_t pack_f16(float x, float y) {
    const __half2 h = __floats2half2_rn(x, y);
    return reinterpret_cast<const uint32_t&>(h);
}

// One lane of a warp that is together.
__device__ inline bool elect() {
    uint32_t one;
    asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.b32 %0, 1, 0, p;}" : "=r"(one)::"memory");
    return one;
}

// A KV row; the barrier counts its bytes.
__device__ inline void copy_bulk(uint32_t to, const void* from, int bytes, const Barrier& bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(shared_address(&bar.word))
                 : "memory");
}

// Queries as f16, a head's by the power of two that leaves its largest below 2^15, in the order in which codes come; their last
// 64 columns as bf16. `unit` is what scores are to be multiplied by for that.
template <int HEADS>
__device__ inline void store_queries(const Attention& p, int64_t row, uint8_t (&q)[D_QK / 8][HEADS][16], float* unit) {
    constexpr int MINE = (HEADS + 3) / 4;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint4 x[MINE][3];
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
        const int head = i * 4 + warp;
        const uint4* from = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.q) + row * p.q_row + head * p.q_head);
#pragma unroll
        for (int j = 0; j < 3; ++j) {
            x[i][j] = make_uint4(0, 0, 0, 0);
            if (head < p.heads && j * 32 + lane < D_QK / 8) x[i][j] = from[j * 32 + lane];
        }
    }
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
        const int head = i * 4 + warp;
        if (head >= HEADS) break;
        uint32_t most = 0;
#pragma unroll
        for (int j = 0; j < 3; ++j) {
            const uint32_t w[4] = {x[i][j].x, x[i][j].y, x[i][j].z, x[i][j].w};
#pragma unroll
            for (int k = 0; k < 4; ++k) most = __vmaxu2(most, w[k] & 0x7fff7fff);
        }
        // The exponents of bf16 and of f32 are alike. Not too small a one, so that the factor is a number for zeros too.
        const uint32_t exponent = max(__reduce_max_sync(~0u, max(most & 0xffff, most >> 16)) >> 7, 40u);
        const float factor = __uint_as_float((127 + 14 + 127 - exponent) << 23);
        if (lane == 0) unit[head] = __uint_as_float((exponent - 14) << 23);
#pragma unroll
        for (int j = 0; j < 3; ++j) {
            const int chunk = j * 32 + lane;
            if (chunk >= D_QK / 8) continue;
            const uint32_t w[4] = {x[i][j].x, x[i][j].y, x[i][j].z, x[i][j].w};
            float lo[4], hi[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                lo[k] = __uint_as_float(w[k] << 16) * factor;
                hi[k] = __uint_as_float(w[k] & 0xffff0000) * factor;
            }
            if (chunk >= D_V / 8) {
                *reinterpret_cast<uint4*>(q[chunk][head]) =
                    make_uint4(pack(lo[0], hi[0]), pack(lo[1], hi[1]), pack(lo[2], hi[2]), pack(lo[3], hi[3]));
            } else {
                // Of four columns the first two are in the lower eight of K, the others in the upper.
                *reinterpret_cast<uint2*>(q[chunk & ~1][head] + chunk % 2 * 8) =
                    make_uint2(pack_f16(lo[0], hi[0]), pack_f16(lo[2], hi[2]));
                *reinterpret_cast<uint2*>(q[chunk | 1][head] + chunk % 2 * 8) =
                    make_uint2(pack_f16(lo[1], hi[1]), pack_f16(lo[3], hi[3]));
            }
        }
    }
}

template <int N, int HEADS, int STAGES>
__device__ inline void attend(const AttentionSm90& s) {
    extern __shared__ __align__(1024) uint8_t dynamic[];
    using S = Few<N, HEADS, STAGES>;
    S& sm = *reinterpret_cast<S*>(dynamic);
    // Numbers of a thread in a product of 64 x N, heads among them, and products of 64 columns of values.
    constexpr int X = N / 2, COLUMNS = N / 4, PRODUCTS = D_V / 64;
    const Attention& p = s.a;
    const int64_t part = blockIdx.x, row = part / s.splits;
    const int tid = threadIdx.x, lane = tid % 32, warp = __shfl_sync(~0u, tid / 32, 0), eighth = lane / 4, two = lane % 4 * 2;
    if (tid == 0) {
        for (int i = 0; i < STAGES; ++i) sm.full[i].init(4);
        sm90::init_done();
    }
    wait_for_previous();
    launch_dependents();
    __syncthreads();
    const Rows rows(p, row);
    // Tokens of this part.
    const int first = part % s.splits * s.split_tiles * TOKENS, last = min(first + s.split_tiles * TOKENS, rows.count);
    const uint32_t kv = shared_address(sm.kv), q = shared_address(sm.q), prob = shared_address(sm.prob);

    // A warp fetches the 16 rows of which it has the scores; lanes below 16 look for one each.
    int32_t index[1];
    const uint8_t* from[1] = {};
    uint32_t live[STAGES] = {};  // Rows that are there, by tile.
    auto look = [&](int tile) {
        const int at = first + tile * TOKENS + warp * 16 + lane;
        index[0] = load_if(rows.indices + at, lane < 16 && at < last);
    };
    auto gather = [&](int stage) {
        const uint32_t there = __ballot_sync(~0u, from[0] != nullptr), to = kv + (stage * TOKENS + warp * 16) * ROW;
        const uint64_t mine = reinterpret_cast<uint64_t>(from[0] ? from[0] : p.kv);
        if (lane < 16 && !from[0]) {
            for (int i = 0; i < ROW / 16; ++i) {
                asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to + lane * ROW + i * 16), "r"(0) : "memory");
            }
            fence_async();
        }
        __syncwarp();
        const bool one = elect();
        if (one) sm90::arrive_expect(&sm.full[stage].word, __popc(there) * ROW);
        // A copy takes its operands from a warp, not from lanes: one after the other, but with no branches between.
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const uint64_t row = __shfl_sync(~0u, mine, i);
            if (one && (there >> i & 1)) copy_bulk(to + i * ROW, reinterpret_cast<const void*>(row), ROW, sm.full[stage]);
        }
        return there;
    };
    look(0);
#pragma unroll
    for (int i = 0; i < STAGES; ++i) {
        rows.find(p, index, from);
        look(i + 1);
        if (first + i * TOKENS < last) live[i] = gather(i);
    }

    store_queries<HEADS>(p, row, sm.q, sm.norm);
    if (tid < N) sm.top[tid] = -CUDART_INF_F;
    if (HEADS + tid < N) sm.norm[HEADS + tid] = 0.0f;
    fence_async();
    __syncthreads();

    float sum[COLUMNS] = {}, o[PRODUCTS][X] = {}, reach = 0x1p-100f;
    const float scale_log2 = p.softmax_scale * LOG2E;
    const uint64_t query_base = plain_descriptor(q, HEADS * 16), weight_base = plain_descriptor(prob, N * 16);
    // Rows of `ldmatrix`: for scores the warp's 16 tokens, twice, the second time a chunk further; for values 32 tokens.
    const uint32_t keys = kv + (warp * 16 + lane % 16) * ROW + lane / 16 * 16;
    const uint32_t values = kv + lane * ROW + warp * 16;

    for (int tile = 0; first + tile * TOKENS < last; ++tile) {
        const int stage = STAGES == 1 ? 0 : tile % STAGES;
        const uint32_t base = stage * (TOKENS * ROW);
        sm.full[stage].wait(tile / STAGES & 1);

        float y[X], most = 0.0f;
        uint32_t a[2][16], raw[2][4];
        {
            float x[X], scale[2] = {};
            const uint64_t queries = opaque(query_base);
            const uint8_t* scales = sm.kv[stage] + (warp * 16 + eighth) * ROW + D_V;
            auto load = [&](int column) {
                load_matrices<false>(raw[0], keys + base + column);
                load_matrices<false>(raw[1], keys + base + column + 32);
            };
            load(0);
            // 64 columns at a time; two of these share a scale, and the last are bf16.
#pragma unroll
            for (int i = 0; i < BLOCKS; ++i) {
                uint32_t(&f)[16] = a[i % 2];
                if (i && i % 2 == 0) {
                    wgmma_wait<0>();
                    settle(x);
                    most = fmaxf(most, fmaxf(fabsf(scale[0]), fabsf(scale[1])));
#pragma unroll
                    for (int k = 0; k < X; ++k) y[k] = i == 2 ? x[k] * scale[k / 2 % 2] : fmaf(x[k], scale[k / 2 % 2], y[k]);
                }
                if (i < 8) {
                    if (i % 2) {
#pragma unroll
                        for (int r = 0; r < 2; ++r) scale[r] = *reinterpret_cast<const float*>(scales + r * 8 * ROW + i / 2 * 4);
                    }
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        f[j / 2 * 4 + j % 2] = lower(raw[j / 4][j % 4]);
                        f[j / 2 * 4 + j % 2 + 2] = upper(raw[j / 4][j % 4]);
                    }
                    if (i < 7) load(i * 64 + 64);
                } else {
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        load_matrices<false>(raw[0], keys + base + D_V + 16 + j * 32);
#pragma unroll
                        for (int k = 0; k < 4; ++k) f[4 * j + k] = raw[0][k];
                    }
                }
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const uint64_t b = further(queries, (i * 8 + k * 2) * (HEADS * 16));
                    if (i < 8) {
                        wgmma_f16<0>(x, f + 4 * k, b, i % 2 || k);
                    } else {
                        wgmma_bf16<0>(x, f + 4 * k, b, k);
                    }
                }
                wgmma_commit();
                if (i < BLOCKS - 1) wgmma_wait<1>();
            }
            wgmma_wait<0>();
            settle(x);
#pragma unroll
            for (int k = 0; k < X; ++k) y[k] += x[k];
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const bool there = live[0] >> (eighth + 8 * r) & 1;
#pragma unroll
            for (int i = 0; i < X / 4; ++i) {
                if (!there) y[4 * i + 2 * r] = y[4 * i + 2 * r + 1] = -CUDART_INF_F;
            }
        }
        float next[COLUMNS];
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) {
            next[i] = fmaxf(y[i / 2 * 4 + i % 2], y[i / 2 * 4 + i % 2 + 2]);
#pragma unroll
            for (int d = 4; d < 32; d *= 2) next[i] = fmaxf(next[i], __shfl_xor_sync(~0u, next[i], d));
        }
        if (eighth == 0) {
#pragma unroll
            for (int i = 0; i < COLUMNS; i += 2) {
                *reinterpret_cast<float2*>(&sm.best[warp][i * 4 + two]) = make_float2(next[i], next[i + 1]);
            }
        }
        // Of numbers that are not negative the bits are in order.
        const uint32_t most_bits = __reduce_max_sync(~0u, __float_as_uint(most));
        if (lane == 0) sm.most[warp] = __uint_as_float(most_bits);
        __syncthreads();
        // The unit of the sums, a power of two, follows the largest scale.
        float all = sm.most[0];
#pragma unroll
        for (int w = 1; w < 4; ++w) all = fmaxf(all, sm.most[w]);
        const float unit = fmaxf(reach, __uint_as_float((__float_as_uint(fminf(all, 0x1p126f)) + 0x7fffff) & 0x7f800000));
        const float inverse = __uint_as_float((254u << 23) - __float_as_uint(unit)), shrink = reach * inverse;
        reach = unit;
        {
            const int token = warp * 16 + lane % 16, b = lane / 16 * 2;
            const float2 two_scales = *reinterpret_cast<const float2*>(sm.kv[stage] + token * ROW + D_V + b * 4);
            sm.scale[b][token] = __float2half_rn(two_scales.x * inverse * ROOM);
            sm.scale[b + 1][token] = __float2half_rn(two_scales.y * inverse * ROOM);
        }
        float fade[COLUMNS], c[COLUMNS], top[COLUMNS];
        bool change = shrink != 1.0f;
#pragma unroll
        for (int i = 0; i < COLUMNS; i += 2) {
            const int at = i * 4 + two;
            float2 best = *reinterpret_cast<float2*>(&sm.best[0][at]);
#pragma unroll
            for (int w = 1; w < 4; ++w) {
                const float2 other = *reinterpret_cast<float2*>(&sm.best[w][at]);
                best.x = fmaxf(best.x, other.x), best.y = fmaxf(best.y, other.y);
            }
            next[i] = best.x, next[i + 1] = best.y;
            const float2 units = *reinterpret_cast<float2*>(&sm.norm[at]), tops = *reinterpret_cast<float2*>(&sm.top[at]);
            c[i] = units.x * scale_log2, c[i + 1] = units.y * scale_log2;
            top[i] = tops.x, top[i + 1] = tops.y;
        }
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) {
            const float now = (next[i] - top[i]) * c[i] > LAZY ? next[i] : top[i];
            const float zero = now == -CUDART_INF_F ? 0.0f : now * c[i] - SHIFT;
            fade[i] = now == top[i] ? 1.0f : power((top[i] - now) * c[i]);
            change |= now != top[i];
            top[i] = now;
            float& e = y[i / 2 * 4 + i % 2];
            float& f = y[i / 2 * 4 + i % 2 + 2];
            e = power(e * c[i] - zero);
            f = power(f * c[i] - zero);
            sum[i] = sum[i] * fade[i] + (e + f);
        }
#pragma unroll
        for (int i = 0; i < X; i += 2) {
            *reinterpret_cast<uint32_t*>(sm.prob[warp * 2 + i / 2 % 2][i / 4][eighth] + two * 2) = pack_f16(y[i], y[i + 1]);
        }
        rows.find(p, index, from);
        look(tile + STAGES + 1);
        fence_async();
        __syncthreads();
        if (__any_sync(~0u, change)) {
            if (warp == 0 && eighth == 0) {
#pragma unroll
                for (int i = 0; i < COLUMNS; i += 2) {
                    *reinterpret_cast<float2*>(&sm.top[i * 4 + two]) = make_float2(top[i], top[i + 1]);
                }
            }
#pragma unroll
            for (int i = 0; i < X; ++i) {
                const float f = fade[i / 4 * 2 + i % 2] * shrink;
#pragma unroll
                for (int m = 0; m < PRODUCTS; ++m) o[m][i] *= f;
            }
        }
        {
            uint32_t scale[8];
            const uint64_t weights = opaque(weight_base);
            auto load = [&](int column) {
                load_matrices<true>(raw[0], values + base + column);
                load_matrices<true>(raw[1], values + base + column + 32 * ROW);
            };
            load(0);
#pragma unroll
            for (int m = 0; m < PRODUCTS; ++m) {
                uint32_t(&f)[16] = a[m % 2];
                if (m % 2 == 0) {
#pragma unroll
                    for (int k = 0; k < 8; ++k) scale[k] = *reinterpret_cast<const uint32_t*>(&sm.scale[m / 2][k * 8 + two]);
                }
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const uint32_t by_column = __byte_perm(raw[j / 4][j % 4], 0, 0x3120);
                    f[2 * j] = times(lower(by_column), scale[j]);
                    f[2 * j + 1] = times(upper(by_column), scale[j]);
                }
                if (m < PRODUCTS - 1) load(m * 64 + 64);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < 4; ++k) wgmma_f16<1>(o[m], f + 4 * k, further(weights, k * (N * 32)), 1);
                wgmma_commit();
                if (m < PRODUCTS - 1) wgmma_wait<1>();
            }
        }
        // Everybody has read the tile: another can come in its place.
        __syncthreads();
#pragma unroll
        for (int i = 0; i < STAGES - 1; ++i) live[i] = live[i + 1];
        live[STAGES - 1] = first + (tile + STAGES) * TOKENS < last ? gather(stage) : 0;
        wgmma_wait<0>();
#pragma unroll
        for (int m = 0; m < PRODUCTS; ++m) settle(o[m]);
    }

#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
#pragma unroll
        for (int d = 4; d < 32; d *= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], d);
        if (eighth == 0) sm.best[warp][i / 2 * 8 + two + i % 2] = sum[i];
    }
    __syncthreads();
    if (warp == 0 && eighth == 0) {
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) {
            const int h = i / 2 * 8 + two + i % 2;
            float total = 0.0f;
#pragma unroll
            for (int w = 0; w < 4; ++w) total += sm.best[w][h];
            sm.norm[h] = finish(s, part, row, h, sm.top[h] * sm.norm[h], total * 0x1p-7f) * (reach * (0x1p-7f / ROOM));
        }
    }
    __syncthreads();
    // Out through the tile's memory, a head at a time; heads are 16 bytes more than their columns apart.
    static_assert(HEADS * (D_V * 4 + 16) <= offsetof(S, best), "outputs over rows, queries and probabilities");
    const bool wide = s.splits > 1 || p.out_type == F32;
    const int bytes = wide ? D_V * 4 : D_V * 2, pitch = bytes + 16;
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
        const int h = i / 2 * 8 + two + i % 2;
        if (h >= HEADS) continue;
        const float norm = sm.norm[h];
#pragma unroll
        for (int m = 0; m < PRODUCTS; ++m) {
            const int column = m * 64 + warp * 16 + eighth * 2;
            const float x = norm == 0.0f ? 0.0f : o[m][i / 2 * 4 + i % 2] * norm;
            const float z = norm == 0.0f ? 0.0f : o[m][i / 2 * 4 + i % 2 + 2] * norm;
            if (wide) {
                *reinterpret_cast<float2*>(sm.kv[0] + h * pitch + column * 4) = make_float2(x, z);
            } else {
                *reinterpret_cast<uint32_t*>(sm.kv[0] + h * pitch + column * 2) = pack(x, z);
            }
        }
    }
    fence_async();
    __syncthreads();
    if (tid < p.heads && !(s.splits > 1 && sm.norm[tid] == 0.0f)) {
        uint8_t* to = s.splits > 1 ? reinterpret_cast<uint8_t*>(s.part_out + (part * p.heads + tid) * D_V)
                                   : static_cast<uint8_t*>(p.out) + (row * p.out_row + tid * p.out_head) * (wide ? 4 : 2);
        copy_out(to, kv + tid * pitch, bytes);
    }
}

#define FEW_FP8(N, HEADS, STAGES, BLOCKS_PER_SM)                                                                       \
    extern "C" __global__ void __launch_bounds__(128, BLOCKS_PER_SM)                                                   \
        attention_few_fp8_##HEADS(PARAMS AttentionSm90 p) {                                                           \
        attend<N, HEADS, STAGES>(p);                                                                                   \
    }
// A tile a block and as many blocks as registers allow; where they allow only two anyway, two tiles if they fit.
FEW_FP8(8, 8, 1, 4)
FEW_FP8(16, 16, 1, 3)
FEW_FP8(24, 20, 2, 2)
FEW_FP8(32, 32, 1, 2)
