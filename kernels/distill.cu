// Computes: the distillation loss KL(p || softmax(I)) of an indexer, and its gradients by q, k and the head weights.
// Shapes:   q [rows, heads, dim], k [keys, dim], weights [rows, heads]; target [rows, columns], or attention's
//           q [rows, heads, d_qk] and kv [keys, d_qk]. Rows come in chunks: scratch is [chunk, keys] or, restricted,
//           [chunk, topk] and [chunk, a range of keys].
// Idea:     tiles of keys by (row, head) vectors on the tensor cores give scores and log2 of the target; one block a
//           row normalises them and leaves g, the loss by the score. Then `grad_q` (a block owns vectors, goes over
//           keys) and `grad_k` (owns keys, goes over vectors) recompute the products, for their signs, and multiply g
//           again. bf16 goes in as it is, f32 as three bf16 that add up to it; coefficients of gradients as two or
//           three. Nothing is added in an order that a scheduler picks: the same bits every time.
// Roofline: tensor cores: (14 * dim * heads + 2 * d_qk * attention heads) flop a row and key, with mma.sync.
#include "distill.cuh"

// Registers for two blocks an SM.
#define KERNEL_2(threads) extern "C" __global__ void __launch_bounds__(threads, 2)

constexpr int THREADS = 256;
constexpr int COLUMNS = 128;  // Keys, or columns of `indices`, of a tile.
constexpr int STEP = 64;      // Dimensions of a step.
constexpr int STAGES = 3;

// --- Tensor cores.

__device__ inline void load4(uint32_t (&r)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
__device__ inline void load4_transposed(uint32_t (&r)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline float relu(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays NaN.

// Key of a column of a row's indices, -1 if there is none.
__device__ inline int64_t key_of(const Distill& p, int64_t row, const Span& span, int64_t column) {
    if (column >= p.topk) return -1;
    const int64_t i = p.indices[row * p.indices_row + column];
    return i >= 0 && i < span.end - span.start ? span.start + i : -1;
}

template <typename T, typename F>
__device__ inline T reduce(T x, F both, T* scratch) {
    for (int step = 16; step > 0; step /= 2) x = both(x, __shfl_xor_sync(~0u, x, step));
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    x = scratch[0];
    for (int w = 1; w < blockDim.x / 32; ++w) x = both(x, scratch[w]);
    return x;
}

// --- Packing.

KERNEL(THREADS) distill_pack(PARAMS DistillPack p) {
    const int64_t v = int64_t(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
    if (v >= p.padded_rows * p.padded_heads) return;
    const int lane = threadIdx.x % 32;
    const int64_t row = v / p.padded_heads, head = v % p.padded_heads;
    const bool there = row < p.rows && head < p.heads;
    uint16_t* to = static_cast<uint16_t*>(p.to) + v * p.padded_dim;
    const int64_t plane = p.padded_rows * p.padded_heads * p.padded_dim;
    bool good = true;
    for (int i = lane; i < p.padded_dim; i += 32) {
        float x = there && i < p.dim ? load_float(p.from, p.type, row * p.from_row + head * p.from_head + i) : 0.0f;
        if (p.flags && !finite(x)) {
            good = false;
            x = 0.0f;
        }
        for (int j = 0; j < p.planes; ++j) {
            // Cut off, not rounded: 8 bits each, 24 in all.
            const uint32_t high = __float_as_uint(x) & 0xffff0000;
            to[j * plane + i] = uint16_t(high >> 16);
            x = x - __uint_as_float(high);
        }
    }
    good = __all_sync(~0u, good);
    if (lane != 0) return;
    if (p.weights) {
        float w = there ? p.weights[row * p.weights_row + head] : 0.0f;
        if (!finite(w)) {
            good = false;
            w = 0.0f;
        }
        p.weights_to[v] = w;
    }
    if (p.flags) p.flags[v] = good ? 0.0f : __uint_as_float(0x7fc00000);
}

// --- Live rows.

KERNEL(THREADS) distill_live(PARAMS Distill p) {
    const int64_t row = int64_t(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
    if (row >= p.rows) return;
    const Span span = span_of(p, row);
    bool live = span.end > span.start;
    if (p.indices && live) {
        live = false;
        for (int64_t c = 0; c < p.topk && !live; c += 32) {
            live = __any_sync(~0u, key_of(p, row, span, c + threadIdx.x % 32) >= 0);
        }
    }
    if (threadIdx.x % 32 == 0) p.live[1 + row] = live;
}

KERNEL(1024) distill_count(PARAMS Distill p) {
    __shared__ int scratch[32];
    int n = 0;
    for (int64_t r = threadIdx.x; r < p.rows; r += blockDim.x) n += p.live[1 + r];
    n = reduce(n, [](int a, int b) { return a + b; }, scratch);
    if (threadIdx.x == 0) p.live[0] = n;
}

__device__ inline double scale_of(const Distill& p) { return double(p.layer_weight) / p.live[0]; }

KERNEL(1024) distill_loss(PARAMS Distill p) {
    __shared__ double scratch[32];
    double sum = 0.0;
    for (int64_t r = threadIdx.x; r < p.rows; r += blockDim.x) sum += p.row_loss[r];
    sum = reduce(sum, [](double a, double b) { return a + b; }, scratch);
    if (threadIdx.x > 0) return;
    if (p.live[0] > 0) {
        p.loss[0] = float(double(p.loss[0]) + scale_of(p) * sum);
    } else if (sum != 0.0) {
        p.loss[0] = __uint_as_float(0x7fc00000);
    }
}

// --- Scores and targets: tiles of 128 keys by N vectors.

template <int N, bool TARGET>
__device__ inline void tile(const Distill& p) {
    constexpr int WIDE = N >= 64 ? N / 64 : 1;      // Warps along the vectors.
    constexpr int MI = COLUMNS * WIDE / 8 / 16;     // Tiles of 16 keys of a warp,
    constexpr int NI = N / WIDE / 8;                // and of 8 vectors.
    constexpr int STAGE = (COLUMNS + N) * STEP * 2;
    constexpr int CHUNKS = STEP / 8, AT_ONCE = THREADS / CHUNKS;
    extern __shared__ __align__(128) char memory[];
    __shared__ int64_t key_rows[COLUMNS];

    const Planes &a = TARGET ? p.kv : p.k, &b = TARGET ? p.attention_q : p.q;
    const int heads = TARGET ? p.attention_heads : p.heads, padded = TARGET ? p.attention_padded : p.padded_heads;
    const int dims = TARGET ? p.attention_dim : int(p.q.head);  // Packed queries have no gaps.
    const int pairs = TARGET ? p.target_pairs : p.score_pairs;
    const int shift = __ffs(padded) - 1, per_tile = N >> shift;
    const int64_t first_column = int64_t(blockIdx.x) * COLUMNS;
    const int64_t first_row = int64_t(blockIdx.y) * per_tile;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    bool any = false;
    for (int i = 0; i < per_tile; ++i) {
        const int64_t r = first_row + i;
        if (r >= p.count) break;
        const Span span = span_of(p, p.first + r);
        any |= p.indices ? span.end > span.start : span.start < first_column + COLUMNS && span.end > first_column;
    }
    if (!any) return;
    if (threadIdx.x < COLUMNS) {
        const int64_t c = first_column + threadIdx.x;
        int64_t key = c < p.keys ? c : -1;
        if (p.indices) key = key_of(p, p.first + first_row, span_of(p, p.first + first_row), c);
        key_rows[threadIdx.x] = key;
    }
    __syncthreads();

    // Each thread copies the same chunk of every so many-th row.
    constexpr int COPIES = (COLUMNS + N) / AT_ONCE;
    const uint16_t* from[COPIES];
    bool there[COPIES];
    const int chunk = threadIdx.x % CHUNKS, copy_row = threadIdx.x / CHUNKS;
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
        const int row = i * AT_ONCE + copy_row;
        if (row < COLUMNS) {
            const int64_t key = key_rows[row];
            there[i] = key >= 0;
            from[i] = vector_at(a, there[i] ? key : 0, 0) + chunk * 8;
        } else {
            const int64_t v = row - COLUMNS, r = first_row + (v >> shift), h = v & (padded - 1);
            there[i] = r < p.count && h < heads;
            from[i] = vector_at(b, there[i] ? r : 0, there[i] ? h : 0) + chunk * 8;
        }
    }
    const uint32_t base = shared_at(memory);
    const int per_pair = dims / STEP, steps = per_pair * (pairs >> 24);
    auto fetch = [&](int step) {
        if (step < steps) {
            const int pair = pairs >> (4 * (step / per_pair)), k = step % per_pair * STEP;
            const int64_t b_off = (pair & 3) * b.plane + k, a_off = (pair >> 2 & 3) * a.plane + k;
            const uint32_t to = base + step % STAGES * STAGE;
#pragma unroll
            for (int i = 0; i < COPIES; ++i) {
                const int64_t off = i * AT_ONCE < COLUMNS ? a_off : b_off;
                copy16(to + place<CHUNKS>(i * AT_ONCE + copy_row, chunk), from[i] + off, there[i]);
            }
        }
        commit();
    };
    for (int s = 0; s < STAGES - 1; ++s) fetch(s);

    const int m0 = warp / WIDE * MI * 16, n0 = warp % WIDE * NI * 8;
    float acc[MI][NI][4] = {};
    for (int step = 0; step < steps; ++step) {
        wait<STAGES - 2>();
        __syncthreads();
        fetch(step + STAGES - 1);
        const uint32_t at = base + step % STAGES * STAGE;
#pragma unroll
        for (int kk = 0; kk < STEP / 16; ++kk) {
            uint32_t fa[MI][4];
#pragma unroll
            for (int mi = 0; mi < MI; ++mi) {
                load4(fa[mi], at + place<CHUNKS>(m0 + mi * 16 + lane % 16, kk * 2 + lane / 16));
            }
#pragma unroll
            for (int ni = 0; ni < NI; ni += 2) {
                uint32_t fb[4];
                const int row = n0 + ni * 8 + lane % 8 + lane / 16 * 8;
                load4(fb, at + place<CHUNKS>(COLUMNS + row, kk * 2 + lane / 8 % 2));
#pragma unroll
                for (int mi = 0; mi < MI; ++mi) {
                    mma(acc[mi][ni], fa[mi], fb[0], fb[1]);
                    mma(acc[mi][ni + 1], fa[mi], fb[2], fb[3]);
                }
            }
        }
    }

    // Heads are added by 32, then the sums. A thread has, of rows lane / 4 and 8 below it, columns 2 * (lane % 4) and
    // the next.
    float(*parts)[COLUMNS] = reinterpret_cast<float(*)[COLUMNS]>(memory);
    __syncthreads();
#pragma unroll
    for (int group = 0; group < NI / 4; ++group) {
        const int v0 = n0 + group * 32;
        const int64_t r = first_row + (v0 >> shift);
        float factor[8], flag = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int h = (v0 & (padded - 1)) + j / 2 * 8 + lane % 4 * 2 + j % 2;
            if (TARGET) {
                factor[j] = r < p.count && h < heads ? p.lse[(p.first + r) * p.lse_row + h] : -NOTHING;
            } else {
                factor[j] = r < p.count ? p.weights[r * padded + h] : 0.0f;
                flag += r < p.count ? p.q_flags[r * padded + h] : 0.0f;
            }
        }
#pragma unroll
        for (int mi = 0; mi < MI; ++mi) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float out;
                if (TARGET) {
                    float y[8], top = NOTHING, bad = 0.0f, sum = 0.0f;
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        y[j] = fmaf(acc[mi][group * 4 + j / 2][half * 2 + j % 2], p.softmax_scale, -factor[j]);
                        top = fmaxf(top, y[j]);
                        bad = fmaf(y[j], 0.0f, bad);
                    }
                    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
                    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2)) * LOG2E;
#pragma unroll
                    for (int j = 0; j < 8; ++j) sum += exp2_fast(fmaf(y[j], LOG2E, -top));
                    sum += bad;
                    sum += __shfl_xor_sync(~0u, sum, 1);
                    sum += __shfl_xor_sync(~0u, sum, 2);
                    out = top + log2_fast(sum);
                } else {
                    float sum = flag;
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        sum = fmaf(factor[j], relu(acc[mi][group * 4 + j / 2][half * 2 + j % 2]), sum);
                    }
                    sum += __shfl_xor_sync(~0u, sum, 1);
                    out = sum + __shfl_xor_sync(~0u, sum, 2);
                }
                if (lane % 4 == 0) parts[v0 / 32][m0 + mi * 16 + half * 8 + lane / 4] = out;
            }
        }
    }
    __syncthreads();
    const int groups = padded >> 5;
    for (int i = threadIdx.x; i < per_tile * COLUMNS; i += THREADS) {
        const int of = i / COLUMNS, c = i % COLUMNS;
        if (first_row + of >= p.count) break;
        const float* part = &parts[of * groups][c];
        float out = part[0];
        if (TARGET) {
            float top = out, sum = 0.0f;
            for (int g = 1; g < groups; ++g) top = fmaxf(top, part[g * COLUMNS]);
            if (groups > 1) {
                for (int g = 0; g < groups; ++g) sum += exp2_fast(part[g * COLUMNS] - top);
                out = top + log2_fast(sum);
            }
        } else {
            for (int g = 1; g < groups; ++g) out += part[g * COLUMNS];
            const int64_t key = key_rows[c];
            if (key >= 0) out += p.k_flags[key];
        }
        (TARGET ? p.targets : p.scores)[(first_row + of) * p.width + first_column + c] = out;
    }
}

KERNEL(THREADS) distill_scores_32(PARAMS Distill p) { tile<32, false>(p); }
KERNEL(THREADS) distill_scores_64(PARAMS Distill p) { tile<64, false>(p); }
KERNEL_2(THREADS) distill_scores_128(PARAMS Distill p) { tile<128, false>(p); }
KERNEL(THREADS) distill_targets_32(PARAMS Distill p) { tile<32, true>(p); }
KERNEL(THREADS) distill_targets_64(PARAMS Distill p) { tile<64, true>(p); }
KERNEL_2(THREADS) distill_targets_128(PARAMS Distill p) { tile<128, true>(p); }

// --- Rows: the loss, and the loss by each score in place of it.

KERNEL(THREADS) distill_rows(PARAMS Distill p) {
    __shared__ double doubles[32];
    __shared__ float floats[32];
    const int64_t r = blockIdx.x, row = p.first + r;
    const Span span = span_of(p, row);
    const int64_t length = span.end - span.start;
    // Columns of `scores`: keys from `start` on, or those of `indices`.
    const int64_t n = p.indices ? p.topk : length;
    float* scores = p.scores + r * p.width + (p.indices ? 0 : span.start);
    const float* targets = p.target ? p.target + row * p.target_row : p.targets + (scores - p.scores);
    auto there = [&](int64_t c) { return !p.indices || key_of(p, row, span, c) >= 0; };
    auto larger = [](float a, float b) { return fmaxf(a, b); };
    auto plus = [](double a, double b) { return a + b; };

    bool bad = !span.ok || (p.target && !p.indices && length > p.columns);
    bool live = false;
    const float none = __uint_as_float(0xff800000);
    float top = none, shift = none;
    for (int64_t c = threadIdx.x; c < n; c += THREADS) {
        if (p.indices) {
            const int64_t i = p.indices[row * p.indices_row + c];
            bad |= i < -1 || i >= length;
        }
        if (!there(c)) continue;
        live = true;
        const float score = scores[c];
        bad |= !finite(score);
        top = fmaxf(top, score);
        if (p.target) {
            if (c < p.columns) bad |= !(targets[c] >= 0.0f && finite(targets[c]));
        } else {
            bad |= !finite(targets[c]);
            shift = fmaxf(shift, targets[c]);
        }
    }
    bad = __syncthreads_or(bad);
    live = __syncthreads_or(live);
    if (bad || !live) {
        if (threadIdx.x == 0) p.row_loss[row] = bad ? __longlong_as_double(0x7ff8000000000000) : 0.0;
        for (int64_t c = threadIdx.x; c < p.width; c += THREADS) p.scores[r * p.width + c] = 0.0f;
        return;
    }
    top = reduce(top, larger, floats);
    if (!p.target) shift = reduce(shift, larger, floats);
    // Not normalised; relative to 2^shift, if it is attention.
    auto target = [&](int64_t c) { return p.target ? targets[c] : exp2_fast(targets[c] - shift); };

    double z = 0.0, sum = 0.0, entropy = 0.0, cross = 0.0;
    for (int64_t c = threadIdx.x; c < n; c += THREADS) {
        if (!there(c)) continue;
        const float score = scores[c], t = target(c);
        z += expf(score - top);
        if (t > 0.0f) {
            const float log_t = p.target ? logf(t) : (targets[c] - shift) * LN2;
            sum += t;
            entropy += double(t) * log_t;
            cross += double(t) * score;
        }
    }
    z = reduce(z, plus, doubles);
    sum = reduce(sum, plus, doubles);
    entropy = reduce(entropy, plus, doubles);
    cross = reduce(cross, plus, doubles);
    const double log_z = top + log(z), loss = (entropy - cross) / sum - log(sum) + log_z;
    bad = !(sum > 0.0) || !isfinite(loss);
    if (threadIdx.x == 0) p.row_loss[row] = bad ? __longlong_as_double(0x7ff8000000000000) : loss;
    const double scale = scale_of(p), inverse = 1.0 / sum;
    for (int64_t c = threadIdx.x; c < n; c += THREADS) {
        float g = 0.0f;
        if (!bad && there(c)) g = float(scale * (double(expf(float(scores[c] - log_z))) - target(c) * inverse));
        scores[c] = g;
    }
    // Nothing anywhere else, so that the gradients need not look where the row begins and ends.
    const int64_t begin = p.indices ? 0 : span.start;
    for (int64_t c = threadIdx.x; c < p.width; c += THREADS) {
        if (c < begin || c >= begin + n) p.scores[r * p.width + c] = 0.0f;
    }
}

// --- Restricted: g by column to g by key, of a range of keys. An index that is there twice counts twice, in the order of
// the columns.

constexpr int MAX_TOPK = 4096, RANGE = 8192;

KERNEL(THREADS) distill_scatter(PARAMS Distill p) {
    constexpr uint32_t NONE = ~0u;  // Is no column, and no g.
    // By key: the first column that names it, then the bits of g.
    __shared__ uint32_t keys[RANGE];
    __shared__ uint32_t again[MAX_TOPK / 32];
    const int64_t r = blockIdx.x, row = p.first + r;
    const Span span = span_of(p, row);
    const float* g = p.scores + r * p.width;
    const int topk = int(p.topk), width = int(p.key_width);
    // Keys count from the first of the range; less than 0: not in it.
    auto key = [&](int c) {
        const int64_t s = key_of(p, row, span, c) - p.first_key;
        return s < width ? int(max(s, int64_t(-1))) : -1;
    };
    for (int s = threadIdx.x; s < width; s += THREADS) keys[s] = NONE;
    for (int i = threadIdx.x; i < MAX_TOPK / 32; i += THREADS) again[i] = 0;
    __syncthreads();
    for (int c = threadIdx.x; c < topk; c += THREADS) {
        const int s = key(c);
        if (s >= 0) atomicMin(&keys[s], uint32_t(c));
    }
    __syncthreads();
    // The first column of each key leads; the others are marked.
    uint32_t leads = 0;
    bool marked = false;
    for (int i = 0, c = threadIdx.x; c < topk; ++i, c += THREADS) {
        const int s = key(c);
        if (s < 0) continue;
        if (keys[s] == c) {
            leads |= 1u << i;
        } else {
            atomicOr(&again[c / 32], 1u << c % 32);
            marked = true;
        }
    }
    const bool twice = __syncthreads_or(marked);
    for (int i = 0, c = threadIdx.x; c < topk; ++i, c += THREADS) {
        if (!(leads >> i & 1)) continue;
        const int s = key(c);
        float sum = g[c];
        for (int w = 0; twice && w * 32 < topk; ++w) {
            for (uint32_t bits = again[w]; bits; bits &= bits - 1) {
                const int other = w * 32 + __ffs(bits) - 1;
                if (key(other) == s) sum += g[other];
            }
        }
        keys[s] = __float_as_uint(sum);
    }
    __syncthreads();
    float* out = p.by_key + r * p.key_width;
    for (int s = threadIdx.x; s < width; s += THREADS) out[s] = keys[s] == NONE ? 0.0f : __uint_as_float(keys[s]);
}

// --- Gradients.

// OF_KEYS: blocks own 16 * warps keys and go over vectors of rows from part to part; else they own vectors and go over
// keys. Owned vectors O stay in shared memory; S = O X^T for a tile X of the others, T = g where S > 0, out += T X.
// Tensor cores cut sums off: those of a tile begin at 0, and are added up outside.
template <bool OF_KEYS, int PLANES, int DIM, int TILE_ROWS>
__device__ inline void grad(const Distill& p) {
    constexpr int PITCH = DIM / 8, NI = TILE_ROWS / 8, KI = TILE_ROWS / 16;
    constexpr int X_PLANE = TILE_ROWS * DIM * 2, X_STAGE = PLANES * X_PLANE;
    constexpr int T_PLANES = PLANES == 1 ? 2 : 3;
    static_assert(TILE_ROWS <= 32, "a tile of vectors is of one row");
    extern __shared__ __align__(128) char memory[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = blockDim.x / 2, threads = blockDim.x;
    const int padded = p.padded_heads, shift = __ffs(padded) - 1;
    const Planes &mine = OF_KEYS ? p.k : p.q, &others = OF_KEYS ? p.q : p.k;
    // Keys and vectors of a chunk are fewer than 2^31.
    const int vectors = int(p.count) << shift, keys = int(OF_KEYS ? p.first_key + p.own_keys : p.keys);
    const int first_own = blockIdx.x * own + (OF_KEYS ? int(p.first_key) : 0);

    // Range of the others: vectors of a part of the rows, or keys (columns) that the rows see.
    int begin = 0, end = 0;
    if (OF_KEYS) {
        const int count = int(p.count), rows = (count + int(p.parts) - 1) / int(p.parts);
        begin = min(int(blockIdx.y) * rows, count) << shift;
        end = min(int(blockIdx.y + 1) * rows, count) << shift;
    } else {
        begin = keys;
        for (int r = first_own >> shift; r < min(((first_own + own - 1) >> shift) + 1, int(p.count)); ++r) {
            const Span span = span_of(p, p.first + r);
            if (span.end <= span.start) continue;
            begin = p.indices ? 0 : min(begin, int(span.start) / TILE_ROWS * TILE_ROWS);
            end = p.indices ? int(p.topk) : max(end, int(span.end));
        }
        if (begin >= end) return;
    }
    // The next tile of which anything counts.
    auto next = [&](int at) {
        for (; OF_KEYS && at < end; at += TILE_ROWS) {
            for (int r = at >> shift; r <= (at + TILE_ROWS - 1) >> shift && r < p.count; ++r) {
                const Span span = span_of(p, p.first + r);
                if (span.start < first_own + own && span.end > first_own) return at;
            }
        }
        return at;
    };

    const uint32_t o_base = shared_at(memory), x_base = o_base + PLANES * own * DIM * 2;
    // Coefficients of a stage. Of keys: g by owned key, then weights; else g by row and key.
    const int per_stage = own + TILE_ROWS;
    float* const coefficients = reinterpret_cast<float*>(memory + PLANES * own * DIM * 2 + 2 * X_STAGE);
    const uint32_t c_base = shared_at(coefficients);
    for (int i = threadIdx.x; i < PLANES * own * PITCH; i += threads) {
        const int plane = i / (own * PITCH), row = i / PITCH % own, chunk = i % PITCH;
        const int v = first_own + row;
        const bool some = v < (OF_KEYS ? keys : vectors);
        const uint16_t* from =
            static_cast<const uint16_t*>(mine.data) + plane * mine.plane + int64_t(some ? v : 0) * DIM;
        copy16(o_base + plane * own * DIM * 2 + place<PITCH>(row, chunk), from + chunk * 8, some);
    }
    const int own_row = first_own >> shift;
    auto fetch = [&](int at, int stage) {
        if (at < end) {
            for (int i = threadIdx.x; i < PLANES * TILE_ROWS * PITCH; i += threads) {
                const int plane = i / (TILE_ROWS * PITCH), row = i / PITCH % TILE_ROWS, chunk = i % PITCH;
                int v = at + row;
                if (!OF_KEYS && p.indices) {
                    v = int(key_of(p, p.first + own_row, span_of(p, p.first + own_row), v));
                } else if (v >= (OF_KEYS ? vectors : keys)) {
                    v = -1;
                }
                const uint16_t* from =
                    static_cast<const uint16_t*>(others.data) + plane * others.plane + int64_t(max(v, 0)) * DIM;
                copy16(x_base + stage * X_STAGE + plane * X_PLANE + place<PITCH>(row, chunk), from + chunk * 8, v >= 0);
            }
            const uint32_t c_at = c_base + stage * per_stage * 4;
            if (OF_KEYS) {
                const float* g = p.by_key + (at >> shift) * p.key_width + blockIdx.x * own;
                for (int i = threadIdx.x; i < per_stage / 4; i += threads) {
                    copy16(c_at + i * 16, i < own / 4 ? g + i * 4 : p.weights + at + i * 4 - own, true);
                }
            } else {
                constexpr int CHUNKS = TILE_ROWS / 4;
                for (int i = threadIdx.x; i < ((own - 1) >> shift) * CHUNKS + CHUNKS; i += threads) {
                    const int r = own_row + i / CHUNKS;
                    const float* g = p.scores + min(r, int(p.count) - 1) * p.width + at;
                    copy16(c_at + i * 16, g + i % CHUNKS * 4, r < p.count);
                }
            }
        }
        commit();
    };

    // Owned by this thread: this, and 8 further. A warp's vectors are of one row.
    const int warp_at = warp * 16, mine_at = first_own + warp_at + lane / 4;
    float out[DIM / 8][4] = {};
    float by_weight[2] = {};

    int at = next(begin);
    fetch(at, 0);
    for (int stage = 0; at < end; stage ^= 1) {
        const int following = next(at + TILE_ROWS);
        fetch(following, stage ^ 1);
        wait<1>();
        __syncthreads();
        const uint32_t x = x_base + stage * X_STAGE;

        float s[NI][4] = {};
        const int pairs = PLANES == 1 ? 1 : p.score_pairs >> 24;
        for (int pair = 0; pair < pairs; ++pair) {
            const int code = PLANES == 1 ? 0 : p.score_pairs >> (4 * pair), of_q = code & 3, of_k = code >> 2 & 3;
            const uint32_t o_at = o_base + (OF_KEYS ? of_k : of_q) * own * DIM * 2;
            const uint32_t x_at = x + (OF_KEYS ? of_q : of_k) * X_PLANE;
#pragma unroll
            for (int kk = 0; kk < DIM / 16; ++kk) {
                uint32_t fa[4];
                load4(fa, o_at + place<PITCH>(warp_at + lane % 16, kk * 2 + lane / 16));
#pragma unroll
                for (int ni = 0; ni < NI; ni += 2) {
                    uint32_t fb[4];
                    load4(fb, x_at + place<PITCH>(ni * 8 + lane % 8 + lane / 16 * 8, kk * 2 + lane / 8 % 2));
                    mma(s[ni], fa, fb[0], fb[1]);
                    mma(s[ni + 1], fa, fb[2], fb[3]);
                }
            }
        }

        // T in place of S. [ni][0, 1]: first owned, others 2 * (lane % 4) and the next; [2, 3]: second owned.
        const float* const c = coefficients + stage * per_stage;
        float g[OF_KEYS ? 2 : NI][OF_KEYS ? 1 : 2];
        if constexpr (OF_KEYS) {
#pragma unroll
            for (int i = 0; i < 2; ++i) g[i][0] = c[warp_at + 8 * i + lane / 4];
        } else {
            const float* row = c + (((first_own + warp_at) >> shift) - own_row) * TILE_ROWS + lane % 4 * 2;
#pragma unroll
            for (int ni = 0; ni < NI; ++ni) {
                g[ni][0] = row[ni * 8];
                g[ni][1] = row[ni * 8 + 1];
            }
        }
#pragma unroll
        for (int ni = 0; ni < NI; ++ni) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float& x = s[ni][j];
                if constexpr (OF_KEYS) {
                    x = x > 0.0f ? g[j / 2][0] * c[own + ni * 8 + lane % 4 * 2 + j % 2] : 0.0f;
                } else {
                    by_weight[j / 2] = fmaf(g[ni][j % 2], fmaxf(x, 0.0f), by_weight[j / 2]);
                    x = x > 0.0f ? g[ni][j % 2] : 0.0f;
                }
            }
        }
        uint32_t t[KI][T_PLANES][4];
#pragma unroll
        for (int kk = 0; kk < KI; ++kk) {
#pragma unroll
            for (int i = 0; i < T_PLANES; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    float* two = &s[kk * 2 + j / 2][j % 2 * 2];
                    t[kk][i][j] = pack_high(two[0], two[1]);
                }
            }
        }
#pragma unroll
        for (int d = 0; d < DIM / 8; d += 2) {
            float sum[2][4] = {};
            // The smallest first, as for scores.
#pragma unroll
            for (int plane = PLANES - 1; plane >= 0; --plane) {
#pragma unroll
                for (int kk = 0; kk < KI; ++kk) {
                    uint32_t fb[4];
                    load4_transposed(fb, x + plane * X_PLANE + place<PITCH>(kk * 16 + lane % 16, d + lane / 16));
#pragma unroll
                    for (int i = T_PLANES - plane - 1; i >= 0; --i) {
                        mma(sum[0], t[kk][i], fb[0], fb[1]);
                        mma(sum[1], t[kk][i], fb[2], fb[3]);
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < 8; ++j) out[d + j / 4][j % 4] += sum[j / 4][j % 4];
        }
        __syncthreads();
        at = following;
    }

    const auto result = [&](int d, int i, int j) { return out[d][i * 2 + j]; };
    if constexpr (OF_KEYS) {
        store_share<DIM>(p, keys, mine_at, result);
    } else {
        add_to_row<DIM>(p, mine_at, by_weight, result);
    }
}

// By dimension, and planes of q and k: own rows and tile as large as 99 KB of shared memory and the registers allow.
KERNEL_2(256) distill_grad_q_128(PARAMS Distill p) { grad<false, 1, 128, 32>(p); }
KERNEL(256) distill_grad_q_256(PARAMS Distill p) { grad<false, 1, 256, 32>(p); }
KERNEL(128) distill_grad_q_128_f32(PARAMS Distill p) { grad<false, 3, 128, 32>(p); }
KERNEL(64) distill_grad_q_256_f32(PARAMS Distill p) { grad<false, 3, 256, 16>(p); }
KERNEL_2(256) distill_grad_k_128(PARAMS Distill p) { grad<true, 1, 128, 32>(p); }
KERNEL(256) distill_grad_k_256(PARAMS Distill p) { grad<true, 1, 256, 32>(p); }
KERNEL(128) distill_grad_k_128_f32(PARAMS Distill p) { grad<true, 3, 128, 32>(p); }
KERNEL(64) distill_grad_k_256_f32(PARAMS Distill p) { grad<true, 3, 256, 16>(p); }

// The parts, in their order.
KERNEL(THREADS) distill_add_k(PARAMS Distill p) {
    const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x, padded = p.k.row;
    const int64_t key = i / padded, d = i % padded;
    if (key >= p.own_keys || d >= p.dim) return;
    float sum = 0.0f;
    for (int64_t part = 0; part < p.parts; ++part) sum += p.partial[(part * p.own_keys + key) * padded + d];
    p.grad_k[(p.first_key + key) * p.grad_k_row + d] += sum;
}
