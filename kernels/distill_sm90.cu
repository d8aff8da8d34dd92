// Computes: for the distillation loss of bf16 inputs what `distill_targets_…` (dense, d_qk whole 64s up to 640) and
//           `distill_grad_…_128` in distill.cu compute.
// Shapes:   as there.
// Idea:     targets: a block keeps 128 vectors (one row of 128 heads, two of 64, four of 32) in shared memory and goes
//           over all keys that they see, 64 a tile. Two consumer warpgroups take tiles in turns, each from a ring of its own, so
//           that one's exponentials pass under the other's wgmma; a third warpgroup fills the rings by cp.async.
//           Gradients: a block is one warpgroup that owns 64 vectors or keys and goes over the others, 64 a tile, which
//           serve both products as they lie; coefficients are two bf16 in registers. Two blocks an SM fill the gaps.
// Roofline: tensor cores: 2 * d_qk * heads flop a row and key for targets, 6 * dim * heads for each gradient.
// Tensor cores: HGMMA
#include "distill.cuh"
#include "sm90.cuh"

constexpr int VECTORS = 128, KEYS = 64, STEP = 64, STAGES = 4, THREADS = 384;  // Targets.
constexpr int OWN = 64, OTHERS = 64, DIM = 128, GRAD_THREADS = 128;               // Gradients.
constexpr int STAGE_BYTES = KEYS * STEP * 2, PANEL_BYTES = VECTORS * STEP * 2;
constexpr int BEHIND = 2;  // Stages that the filling threads issue before they wait for one.

// --- wgmma of bf16.

// What this thread's copies wrote, for the tensor cores to read.
__device__ inline void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Panels of rows of 128 bytes, 16-byte chunks exchanged as `place<8>` does: the 128-byte swizzle. As sums over a row's
// bytes, or over rows; then panels of 64 rows follow each other.
__device__ inline uint64_t descriptor(uint32_t at) {
    return uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(64 * 128 >> 4) << 16 | (at & 0x3ffff) >> 4;
}

__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// d (+)= a b^T: a [64, 16], b [128, 16].
__device__ inline void wgmma(float (&d)[64], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1, 0, 0;\n}"
        : SM90_D16(0), SM90_D16(16), SM90_D16(32), SM90_D16(48)
        : "l"(a), "l"(b), "r"(int(add)));
}

// d (+)= a b^T: a [64, 16], b [64, 16].
__device__ inline void wgmma(float (&d)[32], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p, 1, 1, 0, 0;\n}"
        : SM90_D16(0), SM90_D16(16)
        : "l"(a), "l"(b), "r"(int(add)));
}

// d (+)= a b: a [64, 16] in registers, b [16, 128].
__device__ inline void wgmma(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"
        : SM90_D16(0), SM90_D16(16), SM90_D16(32), SM90_D16(48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
}

// Nothing reads what products wrote before this, which stands after the wait.
template <int N>
__device__ inline void settled(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// --- Targets.

template <int PADDED>
__device__ inline void targets(const Distill& p) {
    constexpr int ROWS = VECTORS / PADDED, NI = PADDED / 8;
    extern __shared__ __align__(1024) char memory[];
    const int panels = p.attention_dim / STEP, count = int(p.count);
    char* const rings = memory + panels * PANEL_BYTES;
    uint64_t* const full = reinterpret_cast<uint64_t*>(rings + 2 * STAGES * STAGE_BYTES);  // [2][STAGES]
    uint64_t* const empty = full + 2 * STAGES;
    // The longest rows of a causal chunk, its last, begin first.
    const int first_row = int(gridDim.x - 1 - blockIdx.x) * ROWS;

    int64_t begin = p.keys, end = 0;
    for (int r = first_row; r < min(first_row + ROWS, count); ++r) {
        const Span span = span_of(p, p.first + r);
        if (span.end <= span.start) continue;
        begin = min(begin, span.start / KEYS * KEYS);
        end = max(end, span.end);
    }
    if (begin >= end) return;
    const int tiles = int((end - begin + KEYS - 1) / KEYS);

    for (int i = threadIdx.x; i < VECTORS * panels * 8; i += THREADS) {
        const int chunk = i % (panels * 8), v = i / (panels * 8), r = first_row + v / PADDED, h = v % PADDED;
        const bool there = r < count && h < p.attention_heads;
        const uint16_t* from = vector_at(p.attention_q, there ? r : 0, there ? h : 0) + chunk * 8;
        copy16(shared_at(memory) + chunk / 8 * PANEL_BYTES + place<8>(v, chunk % 8), from, there);
    }
    if (threadIdx.x < 2 * STAGES) {
        sm90::init(&full[threadIdx.x], 64);
        sm90::init(&empty[threadIdx.x], 4);
    }
    commit();
    wait<0>();
    fence_async();
    __syncthreads();

    const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    if (group == 2) {
        // Half of the threads a ring.
        const int ring = warp / 2, row = threadIdx.x % 64 / 8, chunk = threadIdx.x % 8;
        const uint32_t to = shared_at(rings) + ring * STAGES * STAGE_BYTES;
        uint64_t *const filled = full + ring * STAGES, *const used = empty + ring * STAGES;
        int step = 0;
        for (int tile = ring; tile < tiles; tile += 2) {
            const int64_t key = begin + tile * KEYS + row;
            const uint16_t* from = vector_at(p.kv, key, 0) + chunk * 8;
            for (int panel = 0; panel < panels; ++panel, ++step) {
                const int stage = step % STAGES;
                if (step >= STAGES) sm90::wait(&used[stage], (step / STAGES - 1) & 1);
#pragma unroll
                for (int i = 0; i < KEYS / 8; ++i) {
                    const bool there = key + i * 8 < p.keys;
                    const uint16_t* at = there ? from + i * 8 * p.kv.row + panel * STEP : from;
                    copy16(to + stage * STAGE_BYTES + place<8>(row + i * 8, chunk), there ? at : p.kv.data, there);
                }
                commit();
                if (step < BEHIND) continue;
                wait<BEHIND>();
                fence_async();
                sm90::arrive(&filled[(step - BEHIND) % STAGES]);
            }
        }
        wait<0>();
        fence_async();
        for (int s = max(step - BEHIND, 0); s < step; ++s) sm90::arrive(&filled[s % STAGES]);
        return;
    }

    // A thread has, of keys lane / 4 and 8 below it, columns 2 * (lane % 4) and the next of each 8.
    float lse[VECTORS / 4];
#pragma unroll
    for (int i = 0; i < VECTORS / 4; ++i) {
        const int v = i / 2 * 8 + lane % 4 * 2 + i % 2, r = first_row + v / PADDED, h = v % PADDED;
        lse[i] = r < count && h < p.attention_heads ? p.lse[(p.first + r) * p.lse_row + h] : -NOTHING;
    }
    uint64_t *const filled = full + group * STAGES, *const used = empty + group * STAGES;
    const uint64_t keys = descriptor(shared_at(rings) + group * STAGES * STAGE_BYTES);
    const uint64_t vectors = descriptor(shared_at(memory));
    int step = 0;
    for (int tile = group; tile < tiles; tile += 2) {
        float acc[64];
        for (int panel = 0; panel < panels; ++panel, ++step) {
            const int stage = step % STAGES;
            sm90::wait(&filled[stage], step / STAGES & 1);
            sm90::wgmma_begin();
#pragma unroll
            for (int k = 0; k < STEP / 16; ++k) {
                wgmma(acc, keys + (stage * STAGE_BYTES + k * 32) / 16, vectors + (panel * PANEL_BYTES + k * 32) / 16,
                      panel > 0 || k > 0);
            }
            wgmma_commit();
            if (panel > 0) {
                wgmma_wait<1>();
                if (lane == 0) sm90::arrive(&used[(step - 1) % STAGES]);
            }
        }
        wgmma_wait<0>();
        if (lane == 0) sm90::arrive(&used[(step - 1) % STAGES]);
        settled(acc);

        const int64_t key = begin + tile * KEYS + warp * 16 + lane / 4;
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float top = NOTHING, bad = 0.0f, sum = 0.0f;
#pragma unroll
                for (int i = 0; i < 2 * NI; ++i) {
                    const int v = row * 2 * NI + i;
                    float& y = acc[v / 2 * 4 + half * 2 + v % 2];
                    y = fmaf(y, p.softmax_scale, -lse[v]);
                    top = fmaxf(top, y);
                    bad = fmaf(y, 0.0f, bad);
                }
                top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
                top = fmaxf(top, __shfl_xor_sync(~0u, top, 2)) * LOG2E;
#pragma unroll
                for (int i = 0; i < 2 * NI; ++i) {
                    const int v = row * 2 * NI + i;
                    sum += exp2_fast(fmaf(acc[v / 2 * 4 + half * 2 + v % 2], LOG2E, -top));
                }
                sum += bad;
                sum += __shfl_xor_sync(~0u, sum, 1);
                sum += __shfl_xor_sync(~0u, sum, 2);
                const int r = first_row + row;
                if (lane % 4 == 0 && r < count) p.targets[r * p.width + key + half * 8] = top + log2_fast(sum);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) distill_targets_32_sm90(PARAMS Distill p) { targets<32>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) distill_targets_64_sm90(PARAMS Distill p) { targets<64>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) distill_targets_128_sm90(PARAMS Distill p) { targets<128>(p); }

// --- Gradients.

// As `grad` in distill.cu.
template <bool OF_KEYS>
__device__ inline void grad(const Distill& p) {
    constexpr int PANEL = 64 * 128, NI = OTHERS / 8, KI = OTHERS / 16, COEFFICIENTS = 2 * 64 + OTHERS;
    extern __shared__ __align__(1024) char memory[];
    float* const coefficients = reinterpret_cast<float*>(memory + 6 * PANEL);
    const uint32_t o_base = shared_at(memory), x_base = o_base + 2 * PANEL, c_base = o_base + 6 * PANEL;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int padded = p.padded_heads, shift = __ffs(padded) - 1;
    const int count = int(p.count), vectors = count << shift;
    const int first_own = blockIdx.x * OWN + (OF_KEYS ? int(p.first_key) : 0);
    const int keys = int(OF_KEYS ? p.first_key + p.own_keys : p.keys);
    const int own_row = first_own >> shift;
    const uint16_t* const mine = static_cast<const uint16_t*>(OF_KEYS ? p.k.data : p.q.data);
    const uint16_t* const others = static_cast<const uint16_t*>(OF_KEYS ? p.q.data : p.k.data);

    int begin = 0, end = 0;
    if (OF_KEYS) {
        const int rows = (count + int(p.parts) - 1) / int(p.parts);
        begin = min(int(blockIdx.y) * rows, count) << shift;
        end = min(int(blockIdx.y + 1) * rows, count) << shift;
    } else {
        begin = keys;
        for (int r = own_row; r < min(((first_own + OWN - 1) >> shift) + 1, count); ++r) {
            const Span span = span_of(p, p.first + r);
            if (span.end <= span.start) continue;
            begin = min(begin, int(span.start) / OTHERS * OTHERS);
            end = max(end, int(span.end));
        }
        if (begin >= end) return;
    }
    // The next tile of which anything counts.
    auto next = [&](int at) {
        for (; OF_KEYS && at < end; at += OTHERS) {
            for (int r = at >> shift; r <= (at + OTHERS - 1) >> shift && r < count; ++r) {
                const Span span = span_of(p, p.first + r);
                if (span.start < first_own + OWN && span.end > first_own) return at;
            }
        }
        return at;
    };
    // 64 rows of 256 bytes as two panels.
    auto copy = [&](uint32_t to, const uint16_t* from, int first, int limit) {
#pragma unroll
        for (int i = 0; i < 64 * 16 / GRAD_THREADS; ++i) {
            const int row = threadIdx.x / 16 + i * (GRAD_THREADS / 16), chunk = threadIdx.x % 16;
            const bool there = first + row < limit;
            copy16(to + chunk / 8 * PANEL + place<8>(row, chunk % 8),
                   from + int64_t(there ? first + row : 0) * DIM + chunk * 8, there);
        }
    };
    auto fetch = [&](int at, int stage) {
        if (at < end) {
            copy(x_base + stage * 2 * PANEL, others, at, OF_KEYS ? vectors : keys);
            // Of keys: g by row, of two at most, and owned key, then weights; else g by row and key.
            const int i = threadIdx.x, part = i / 16, four = i % 16 * 4;
            const float* from = p.scores;
            bool there = false;
            if (OF_KEYS && part < 2) {
                there = at + 32 * part < end;
                if (there) from = p.by_key + ((at + 32 * part) >> shift) * p.key_width + blockIdx.x * OWN + four;
            } else if (OF_KEYS) {
                there = at + four < end;
                if (there) from = p.weights + at + four;
            } else {
                there = own_row + part < count;
                if (there) from += (own_row + part) * p.width + at + four;
            }
            if (i < COEFFICIENTS / 4) copy16(c_base + (stage * COEFFICIENTS + i * 4) * 4, from, there);
        }
        commit();
    };

    copy(o_base, mine, first_own, OF_KEYS ? keys : vectors);
    const int mine_at = first_own + warp * 16 + lane / 4;
    float out[64] = {}, by_weight[2] = {};
    int at = next(begin);
    fetch(at, 0);
    for (int stage = 0; at < end; stage ^= 1) {
        const int following = next(at + OTHERS);
        fetch(following, stage ^ 1);
        wait<1>();
        fence_async();
        __syncthreads();
        const uint64_t o = descriptor(o_base), x = descriptor(x_base + stage * 2 * PANEL);

        float s[32];
        sm90::wgmma_begin();
#pragma unroll
        for (int k = 0; k < DIM / 16; ++k) {
            const int offset = (k / 4 * PANEL + k % 4 * 32) / 16;
            wgmma(s, o + offset, x + offset, k > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        settled(s);

        // [ni][0, 1]: first owned, others 2 * (lane % 4) and the next; [2, 3]: the owned 8 further.
        const float* const c = coefficients + stage * COEFFICIENTS;
        if constexpr (OF_KEYS) {
            float g[2][2];
#pragma unroll
            for (int i = 0; i < 4; ++i) g[i / 2][i % 2] = c[i / 2 * 64 + warp * 16 + lane / 4 + i % 2 * 8];
#pragma unroll
            for (int ni = 0; ni < NI; ++ni) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    float& t = s[ni * 4 + j];
                    t = t > 0.0f ? g[ni / 4][j / 2] * c[128 + ni * 8 + lane % 4 * 2 + j % 2] : 0.0f;
                }
            }
        } else {
            const float* g = c + (((first_own + warp * 16) >> shift) - own_row) * OTHERS + lane % 4 * 2;
#pragma unroll
            for (int ni = 0; ni < NI; ++ni) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    float& t = s[ni * 4 + j];
                    by_weight[j / 2] = fmaf(g[ni * 8 + j % 2], fmaxf(t, 0.0f), by_weight[j / 2]);
                    t = t > 0.0f ? g[ni * 8 + j % 2] : 0.0f;
                }
            }
        }
        uint32_t t[2][KI][4];
#pragma unroll
        for (int k = 0; k < KI; ++k) {
#pragma unroll
            for (int plane = 0; plane < 2; ++plane) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    float* two = &s[(k * 2 + j / 2) * 4 + j % 2 * 2];
                    t[plane][k][j] = pack_high(two[0], two[1]);
                }
            }
        }
        float sum[64];
        sm90::wgmma_begin();
        // The small halves first: the tensor cores cut sums off.
#pragma unroll
        for (int plane = 1; plane >= 0; --plane) {
#pragma unroll
            for (int k = 0; k < KI; ++k) wgmma(sum, t[plane][k], x + k * 16 * 128 / 16, plane < 1 || k > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        settled(sum);
#pragma unroll
        for (int i = 0; i < 64; ++i) out[i] += sum[i];
        __syncthreads();
        at = following;
    }

    const auto result = [&](int d, int i, int j) { return out[d * 4 + i * 2 + j]; };
    if constexpr (OF_KEYS) {
        store_share<DIM>(p, keys, mine_at, result);
    } else {
        add_to_row<DIM>(p, mine_at, by_weight, result);
    }
}

extern "C" __global__ void __launch_bounds__(GRAD_THREADS, 2) distill_grad_q_sm90(PARAMS Distill p) { grad<false>(p); }
extern "C" __global__ void __launch_bounds__(GRAD_THREADS, 2) distill_grad_k_sm90(PARAMS Distill p) { grad<true>(p); }
