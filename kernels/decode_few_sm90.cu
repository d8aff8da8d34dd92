// Computes: what `decode_sm90.cu` does, the same bits, for a few rows.
// Shapes:   as there, but rows of at most 262144 positions, k <= 2048; the scores of up to 8 rows.
// Idea:     latency. `few_scores`: block i takes a request's pages i, i + n, i + 2n, ..., so page numbers need no plan; a
//           warp keeps the bests of parts of its keys, 4096 of a row in all. `few_topk`: a cluster a row. The k-th best
//           of the bests is a lower bound; what reaches it, little more than k, goes to all of the cluster at once, each
//           block sending and all counting the bytes, and then every block knows the k-th best without a further
//           exchange. If the bound lets too many through, histograms that the cluster adds up find the k-th best.
// Roofline: one request of 131072 is 17.3 MB, 5.6 us of memory. The rest is latency: two launches; lengths, page numbers,
//           first pages; bests, an exchange, and some ten barriers of a block.
// Tensor cores: QGMMA
#include "decode_sm90.cuh"

namespace {

constexpr int SCORE_WARPS = 4 * GROUPS, SCORE_BLOCK = 32 * SCORE_WARPS + 32;  // And a warp that copies.
constexpr int BESTS = 2 * SCORE_WARPS;                                         // Of a row, a CTA.

// Dynamic shared memory of `few_scores`: src/backend/cuda/decode.rs has its size. The number of stages, each a page, is a
// multiple of GROUPS, as in `decode_scores`.
template <int H>
struct FewShared {
    unsigned char* keys;     // [stages][64][128], swizzled
    unsigned char* queries;  // [rows][H][128], swizzled
    float* scales;           // [stages][64]
    int4* stage;             // [stages]: first row, row after the last, page (-1 at the end), whether it was there
    uint64_t *full, *empty, *q_full;
    float* weights;          // [rows][H], halved
    int* lengths;            // [rows], 0 of rows that are not scored
    uint32_t* best;          // [rows][BESTS]

    __device__ FewShared(unsigned char* raw, int stages, int rows) {
        keys = raw + (1024 - sm90::smem(raw) % 1024) % 1024;
        queries = keys + stages * TILE * DIM;
        scales = reinterpret_cast<float*>(queries + rows * H * DIM);
        stage = reinterpret_cast<int4*>(scales + stages * TILE);
        full = reinterpret_cast<uint64_t*>(stage + stages);
        empty = full + stages;
        q_full = empty + stages;
        weights = reinterpret_cast<float*>(q_full + 2);
        best = reinterpret_cast<uint32_t*>(weights + rows * H);
        lengths = reinterpret_cast<int*>(best + rows * BESTS);
    }
};

__device__ inline void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// How many bests a warp finds: of fewer keys each where few warps have any. Those of the first warps are all there are.
__device__ inline int bests_of(int length) {
    const int pages = (length + TILE - 1) / TILE, parts = gridDim.x;
    return pages <= parts ? 8 : pages <= 2 * parts ? 4 : 2;
}

template <int H>
__device__ inline void few_scores(const Decode& p, const sm90::TensorMap& k_map, const sm90::TensorMap& q_map) {
    extern __shared__ unsigned char raw[];
    const FewShared<H> s(raw, p.stages, p.rows);
    const int tid = threadIdx.x, warp = __shfl_sync(~0u, tid / 32, 0), lane = tid % 32;
    const KeyMap& map = p.ix.map;

    if (tid == 32 * SCORE_WARPS) {
        sm90::prefetch_map(k_map);
        sm90::prefetch_map(q_map);
#pragma unroll 1
        for (int i = 0; i < p.stages; ++i) {
            sm90::init(&s.full[i], 33);
            sm90::init(&s.empty[i], 4);
        }
        sm90::init(s.q_full, 1);
        sm90::init_done();
    }
    for (int i = tid; i < p.rows * BESTS; i += SCORE_BLOCK) s.best[i] = 0;
    __syncthreads();
    sm90::launch_dependents();
    if (warp == SCORE_WARPS && !map.row_request) {
        // What is read first may still be written; it may be brought near.
        const int parts = gridDim.x;
        for (int first = 0; first < p.rows; first += p.queries) {
            const int64_t request = int(p.first + first) / p.queries, page = int(blockIdx.x) + parts * lane;
            if (page < map.max_pages) prefetch(map.block_table + request * map.table_stride + page);
        }
        if (lane < p.rows) prefetch(map.row_end + p.first + lane);
    }
    sm90::wait_for_previous();

    if (warp == SCORE_WARPS) {
        if (lane == 0) {
            sm90::arrive_expect(s.q_full, p.rows * H * DIM);
            sm90::copy_box(s.queries, q_map, 0, 0, int(p.first), s.q_full);
        }
        const uint64_t policy = sm90::once();
        // A group's page numbers are read before its length is known, and while the pages of the one before are copied.
        struct Pages {
            int number, needed, at;
        };
        const int parts = gridDim.x, queries = p.queries;
        int next_at = blockIdx.x;
        auto read = [&](int first) {
            Pages x = {-1, 0, next_at};
            if (first >= p.rows) return x;
            next_at += 37;  // The next group's odd pages go to others.
            if (next_at >= parts) next_at -= parts;
            const int64_t row = p.first + first;
            const int64_t request = map.row_request ? request_of(map, row) : int(row) / queries;
            const int page = x.at + parts * lane;
            if (request >= 0 && page < map.max_pages) x.number = map.block_table[request * map.table_stride + page];
            int length = lane < queries ? decode_length(map, row + lane) : 0;
            length = __reduce_max_sync(~0u, length);
            x.needed = length > p.k ? (length + TILE - 1) / TILE : 0;
            if (x.number >= map.pages) x.number = -1;
            return x;
        };
        int stage = 0;
        uint32_t parity = 1;
        auto put = [&](const int4& is, int number) {
            sm90::wait(&s.empty[stage], parity);
            uint64_t* full = &s.full[stage];
            if (lane == 0) {
                s.stage[stage] = is;
                sm90::arrive_expect(full, number >= 0 ? TILE * DIM : 0);
                if (number >= 0) sm90::copy_box(s.keys + stage * TILE * DIM, k_map, 0, 0, number, full, policy);
            }
            if (number >= 0 && lane < 16) {
                const char* scales = static_cast<const char*>(p.ix.scales) + number * p.ix.scale_page_bytes;
                sm90::copy_16(s.scales + stage * TILE + lane * 4, scales + lane * 16);
            }
            sm90::arrive_after_copies(full);
            if (++stage == p.stages) {
                stage = 0;
                parity ^= 1;
            }
        };
        Pages now = read(0);
#pragma unroll 1
        for (int first = 0; first < p.rows; first += queries) {
            const Pages next = read(first + queries);
            int i = 0;
#pragma unroll 1
            for (; now.at + parts * i < now.needed; ++i) {
                const int number = __shfl_sync(~0u, now.number, i);
                put(make_int4(first, first + queries, now.at + parts * i, number >= 0), number);
            }
            // Each group starts at the first warpgroup.
            if (first + queries < p.rows) {
#pragma unroll 1
                for (; i % GROUPS; ++i) put(make_int4(0, 0, 0, 0), -1);
            }
            now = next;
        }
#pragma unroll 1
        for (int g = 0; g < GROUPS; ++g) put(make_int4(0, 0, -1, 0), -1);
        return;
    }

    for (int i = tid; i < p.rows * H; i += 32 * SCORE_WARPS) {
        const int h = i % H;
        float w = 0.0f;
        if (h < p.ix.heads) w = 0.5f * p.ix.weights[(p.first + i / H) * p.ix.weights_row + h];
        s.weights[i] = w;
    }
    if (tid < p.rows) {
        const int length = decode_length(map, p.first + tid);
        s.lengths[tid] = length > p.k ? length : 0;
    }
    asm volatile("bar.sync 1, %0;" ::"n"(32 * SCORE_WARPS) : "memory");
    sm90::wait(s.q_full, 0);

    // At the end, lanes 0 and 1 of a quad have a key each.
    const int key = warp % 4 * 16 + lane / 4 + lane % 2 * 8;
    const bool mine = lane % 4 < 2;
    int stage = warp / 4;
    uint32_t parity = 0;
    for (;;) {
        sm90::wait(&s.full[stage], parity);
        const int4 is = s.stage[stage];
        if (is.z < 0) break;
        const int from = is.z * TILE, at = from + key;
        const float scale = s.scales[stage * TILE + key];
#pragma unroll 1
        for (int row = is.x; row < is.y; ++row) {
            const int length = s.lengths[row];
            if (from >= length) continue;
            float d[1][H / 2];
            const uint32_t a = sm90::descriptor_low(s.keys + stage * TILE * DIM);
            const uint32_t b = sm90::descriptor_low(s.queries + row * H * DIM);
            sm90::wgmma_begin();
#pragma unroll
            for (int i = 0; i < DIM / 32; ++i) sm90::wgmma(d[0], a + 2 * i, b + 2 * i, i > 0);
            sm90::wgmma_end(d);
            // The order of `decode_scores`.
            const float2* w = reinterpret_cast<const float2*>(s.weights + row * H) + lane % 4;
            float sum[4] = {};  // Of the upper row and the lower one.
#pragma unroll
            for (int j = 0; j < H / 8; ++j) {
                const float2 x = w[4 * j];
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[i] = fmaf(i % 2 ? x.y : x.x, twice_relu(d[0][4 * j + i]), sum[i]);
            }
            float half[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                half[r] = sum[2 * r] + sum[2 * r + 1];
                half[r] += __shfl_xor_sync(~0u, half[r], 2);
            }
            const bool lower = lane % 2;
            float score = (lower ? half[1] : half[0]) + __shfl_xor_sync(~0u, lower ? half[0] : half[1], 1);
            score *= scale;
            if (!is.w) score = -INFINITY;
            uint32_t rank = at < length ? rank_of(score) : 0;
            if (mine) p.scores[row * p.scores_row + at] = rank;
            const int bests = bests_of(length);
            rank = max(rank, __shfl_xor_sync(~0u, rank, 16));
            if (bests < 8) rank = max(rank, __shfl_xor_sync(~0u, rank, 8));
            if (bests < 4) rank = max(rank, __shfl_xor_sync(~0u, rank, 4));
            if (mine && lane / 4 < bests / 2) {
                uint32_t& best = s.best[row * BESTS + warp * bests + lane / 4 * 2 + lane % 4];
                best = max(best, rank);
            }
        }
        __syncwarp();
        if (lane == 0) sm90::arrive(&s.empty[stage]);
        stage += GROUPS;
        if (stage == p.stages + warp / 4) {
            stage = warp / 4;
            parity ^= 1;
        }
    }
    __syncwarp();
#pragma unroll 1
    for (int row = 0; row < p.rows; ++row) {
        const int bests = bests_of(s.lengths[row]), i = warp * bests + lane;
        if (lane < bests && i < BESTS) p.tops[row * p.tops_row + blockIdx.x * BESTS + i] = s.best[row * BESTS + i];
    }
}

}  // namespace

KERNEL(SCORE_BLOCK) few_scores_16(PARAMS Decode p, PARAMS sm90::TensorMap k, PARAMS sm90::TensorMap q) {
    few_scores<16>(p, k, q);
}
KERNEL(SCORE_BLOCK) few_scores_32(PARAMS Decode p, PARAMS sm90::TensorMap k, PARAMS sm90::TensorMap q) {
    few_scores<32>(p, k, q);
}
KERNEL(SCORE_BLOCK) few_scores_64(PARAMS Decode p, PARAMS sm90::TensorMap k, PARAMS sm90::TensorMap q) {
    few_scores<64>(p, k, q);
}

// --- Selection: a cluster a row. Runs of 128 positions go to its CTAs in turn.

namespace {

using sm90::cluster_sync;
using sm90::of_cta;

constexpr int PICK_THREADS = 512, PICK_WARPS = PICK_THREADS / 32;
constexpr int CLUSTER = 16;         // As many as a CTA has warps.
constexpr int RUN = 128;            // A warp's, four neighbours a lane.
constexpr int POSITIONS = 1 << 18;  // Of a row, at most.
constexpr int LIST = 352;           // Of a CTA's candidates; more, and histograms of the cluster's take their place.
constexpr int LEVELS = 2048;        // Of a histogram.
constexpr int PAIRED = 128;         // So many candidates are counted out one against the other.
constexpr int ROUND = CLUSTER * PICK_WARPS * RUN;  // Positions between a thread's fours.
static_assert(CLUSTER == PICK_WARPS);

// src/backend/cuda/decode.rs has its size. Behind it, the fours of each thread: 8192 bytes a round.
struct PickShared {
    uint2 list[CLUSTER][LIST];       // Candidates by CTA: rank and position. All CTAs have all.
    uint2 own[LIST];                 // This CTA's.
    uint32_t bins[2][LEVELS];        // Zero at first; [1] becomes the cluster's, if it has any.
    uint32_t runs[POSITIONS / RUN];  // What is in, by run; then what is in before.
    uint4 marks[POSITIONS / RUN / CLUSTER];  // What is in of this CTA's runs, a bit each.
    uint2 few[PAIRED];
    uint64_t listed;
    uint32_t counts[CLUSTER];
    uint32_t warp[PICK_WARPS];
    uint32_t low, high;
    int bin, want, in_bin, found, staged;
    uint2 cut;
    uint4 fours[];  // [rounds][PICK_THREADS]
};
static_assert(sizeof(PickShared) == 75696, "decode.rs");

// In are ranks above `rank`, and equal ones up to and with `position`.
struct Cut {
    uint32_t rank;
    int position;
    __device__ bool in(uint32_t x, int at) const { return x > rank || (x == rank && at <= position); }
};

// What is written to another CTA and counted by a barrier of that CTA.

__device__ inline uint32_t in_cta(const void* p, int rank) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(sm90::smem(p)), "r"(rank));
    return there;
}
__device__ inline void send(uint32_t to, uint2 x, uint32_t bar) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(to),
                 "r"(x.x), "r"(x.y), "r"(bar)
                 : "memory");
}
__device__ inline void send(uint32_t to, uint32_t x, uint32_t bar) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to), "r"(x), "r"(bar)
                 : "memory");
}
__device__ inline void announce(uint32_t bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.relaxed.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ inline void wait_for_cluster(uint64_t* bar) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(sm90::smem(bar))
        : "memory");
}

// Sum over the threads before this one, of `x`, whose sum over the warp's lanes up to this one is `sum`. After a barrier.
__device__ inline uint32_t before(PickShared& s, uint32_t x, uint32_t sum) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 31) s.warp[warp] = sum;
    __syncthreads();
    return __reduce_add_sync(~0u, lane < warp ? s.warp[lane % PICK_WARPS] : 0) + sum - x;
}

// The bin with the want-th from the top, in s.bin, which was -1 and stays so if there are fewer. Ends with a barrier.
__device__ __noinline__ void find_bin(PickShared& s, const uint32_t* bins, int want) {
    const int top = LEVELS / 4 - 1 - int(threadIdx.x);
    const uint4 n = reinterpret_cast<const uint4*>(bins)[top];
    const uint32_t own = n.x + n.y + n.z + n.w;
    int above = int(before(s, own, lanes_upto(own, int(threadIdx.x % 32))));
    if (above < want && want <= above + int(own)) {
        int bin = 4 * top + 3, count = n.w;
        if (above + count < want) above += count, --bin, count = n.z;
        if (above + count < want) above += count, --bin, count = n.y;
        if (above + count < want) above += count, --bin, count = n.x;
        s.bin = bin;
        s.want = want - above;
        s.in_bin = count;
    }
    __syncthreads();
}

// Narrows [low, high] to the bin of the want-th highest of the keys that `each` hands out, this CTA's or the WHOLE
// cluster's, where there are so many; `want` becomes its number in the bin. Returns how many are in the bin. `bins` are zero.
template <bool WHOLE, class Each>
__device__ inline int narrow(PickShared& s, uint32_t* bins, uint32_t& low, uint32_t& high, int& want, int rank, Each each) {
    const int tid = threadIdx.x, shift = max(0, 21 - __clz(high - low));
    each([&](uint32_t key) {
        if (key - low <= high - low) atomicAdd(&bins[(key - low) >> shift], 1);
    });
    const uint32_t* sums = bins;
    if constexpr (WHOLE) {
        cluster_sync();
        // A CTA adds up its share of the bins and hands the sums to all.
        const int peer = tid % CLUSTER, quad = rank * (LEVELS / 4 / CLUSTER) + tid / CLUSTER;
        uint4 n = reinterpret_cast<uint4*>(of_cta(bins, peer))[quad];
#pragma unroll
        for (int d = 1; d < CLUSTER; d *= 2) {
            n.x += __shfl_xor_sync(~0u, n.x, d);
            n.y += __shfl_xor_sync(~0u, n.y, d);
            n.z += __shfl_xor_sync(~0u, n.z, d);
            n.w += __shfl_xor_sync(~0u, n.w, d);
        }
        reinterpret_cast<uint4*>(of_cta(s.bins[1], peer))[quad] = n;
        cluster_sync();
        sums = s.bins[1];
    } else {
        __syncthreads();
    }
    find_bin(s, sums, want);
    low += uint32_t(s.bin) << shift;
    high = min(high, low + ((1u << shift) - 1));
    want = s.want;
    return s.in_bin;
}

// The want best of what `each` hands out: ranks in [low, high], and positions. `bins` are zero.
template <bool WHOLE, class Each>
__device__ inline Cut best(PickShared& s, uint32_t* bins, uint32_t low, uint32_t high, int want, int rank, Each each) {
    const int tid = threadIdx.x;
    // By rank, then among equals by position, the first being the highest.
#pragma unroll 1
    for (bool tied = false;; tied = true) {
        const uint32_t equal = low;
        uint32_t from = tied ? 0 : low, to = tied ? POSITIONS - 1 : high;
        int n;
#pragma unroll 1
        for (;;) {
            n = narrow<WHOLE>(s, bins, from, to, want, rank, [&](auto put) {
                each([&](uint32_t x, int at) {
                    if (!tied) put(x);
                    else if (x == equal) put(POSITIONS - 1 - at);
                });
            });
            if (from == to || n == want || (!WHOLE && !tied && n <= PAIRED)) break;
            __syncthreads();
            reinterpret_cast<uint4*>(bins)[tid] = make_uint4(0, 0, 0, 0);
            __syncthreads();
        }
        if (tied) return {equal, POSITIONS - 1 - int(from)};  // What is at a position is one: they are all in.
        if (n == want) return {from - 1, -1};
        if (WHOLE || n > PAIRED) {
            low = from;
            __syncthreads();
            reinterpret_cast<uint4*>(bins)[tid] = make_uint4(0, 0, 0, 0);
            __syncthreads();
            continue;
        }
        each([&](uint32_t x, int at) {
            if (x - from <= to - from) s.few[atomicAdd(&s.found, 1)] = make_uint2(x, at);
        });
        __syncthreads();
        if (tid < n) {
            const uint2 own = s.few[tid];
            int better = 0;
#pragma unroll 4
            for (int i = 0; i < n; ++i) {
                const uint2 other = s.few[i];
                better += other.x > own.x || (other.x == own.x && other.y < own.y);
            }
            if (better == want - 1) s.cut = own;
        }
        __syncthreads();
        return {s.cut.x, int(s.cut.y)};
    }
}

}  // namespace

// 48 registers: beside a block of `few_scores_64` a multiprocessor has no more.
extern "C" __global__ void __cluster_dims__(CLUSTER) __maxnreg__(48) few_topk(PARAMS Decode p) {
    extern __shared__ __align__(16) unsigned char pick_raw[];
    PickShared& s = *reinterpret_cast<PickShared*>(pick_raw);
    const int tid = threadIdx.x, warp = __shfl_sync(~0u, tid / 32, 0), lane = tid % 32, k = p.k;
    const int rank = int(__clusterRelativeBlockRank()), of = blockIdx.x / CLUSTER;
    const int64_t row = p.first + of;
    const uint4 zero = make_uint4(0, 0, 0, 0);
    if (tid == 0) {
        s.low = ~0u;
        s.high = 0;
        s.found = s.staged = 0;
        s.bin = -1;
        sm90::init(&s.listed, CLUSTER);
        sm90::init_done();
    }
    reinterpret_cast<uint4*>(s.bins[0])[tid] = reinterpret_cast<uint4*>(s.bins[1])[tid] = zero;
    reinterpret_cast<uint4*>(s.runs)[tid] = zero;
    if (tid < POSITIONS / RUN / CLUSTER) s.marks[tid] = zero;
    __syncthreads();
    // All of the cluster is there to be written to.
    __cluster_barrier_arrive_relaxed();
    __cluster_barrier_wait();
    sm90::launch_dependents();

    // Of a thread's fours, number u: its run, its first position.
    auto run = [&](int u) { return (u * PICK_WARPS + warp) * CLUSTER + rank; };
    auto at = [&](int u) { return run(u) * RUN + 4 * lane; };
    auto four = [&](int u) {
        Four x;
        x.all = s.fours[u * PICK_THREADS + tid];
        return x;
    };

    sm90::wait_for_previous();
    // Scores and bests are read before the length is known.
#pragma unroll 1
    for (int u = 0; at(u) < p.columns; ++u) {
        sm90::copy_16(&s.fours[u * PICK_THREADS + tid], p.scores + of * p.scores_row + at(u));
    }
    const int length = decode_length(p.ix.map, row), rounds = (length + ROUND - 1) / ROUND;
    // Each of a thread's eight is the best of those 4096 apart.
    const int n_tops = p.eights ? (length + TILE - 1) / TILE * (TILE / 8) : int(p.tops_row);
    Four tops[2] = {{zero}, {zero}};
#pragma unroll 2
    for (int i = 4 * tid; i < p.tops_row; i += 8 * PICK_THREADS) {
#pragma unroll
        for (int u = 0; u < 2; ++u) {
            const int from = i + 4 * u * PICK_THREADS;
            uint4 x = zero;
            if (from < p.tops_row) x = *reinterpret_cast<const uint4*>(p.tops + of * p.tops_row + from);
            if (from < n_tops) tops[u].all = max4(tops[u].all, x);
        }
    }
    int32_t* out = p.out + row * p.out_row;
    if (length <= k) {
        for (int i = rank * PICK_THREADS + tid; i < k; i += CLUSTER * PICK_THREADS) out[i] = i < length ? i : -1;
        return;
    }

    // A lower bound of the k-th best, from one histogram of the bests; 1 if they are too few.
    uint32_t low = ~0u, high = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        low = min(low, tops[i / 4].rank[i % 4] - 1);  // 0 is none.
        high = max(high, tops[i / 4].rank[i % 4]);
    }
    join_range(s.low, s.high, low, high, lane);
    const int shift = max(0, 21 - __clz(high - low));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint32_t top = tops[i / 4].rank[i % 4];
        if (top) atomicAdd(&s.bins[0][(top - low) >> shift], 1);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");  // A thread's own fours.
    __syncthreads();
    find_bin(s, s.bins[0], k);
    const uint32_t bound = s.bin < 0 ? 1 : low + (uint32_t(s.bin) << shift);

    // What reaches it, in any order.
    uint32_t reach = 0;
#pragma unroll 2
    for (int u = 0; u < rounds; ++u) {
        const Four x = four(u);
        unsigned mask = 0;
#pragma unroll
        for (int c = 0; c < 4; ++c) mask |= unsigned(x.rank[c] >= bound) << c;
        const int left = length - at(u);
        if (left < 4) mask &= (1 << max(left, 0)) - 1;
        reach |= mask << 4 * u;
    }
    const uint32_t many = __popc(reach);
    uint32_t to = lanes_upto(many, lane), start = 0;
    if (lane == 31) start = atomicAdd(&s.staged, to);
    to += __shfl_sync(~0u, start, 31) - many;
#pragma unroll 1
    for (; reach; reach &= reach - 1) {
        const int i = __ffs(reach) - 1;
        const uint32_t* of_round = reinterpret_cast<const uint32_t*>(&s.fours[i / 4 * PICK_THREADS + tid]);
        if (to < LIST) s.own[to] = make_uint2(of_round[i % 4], at(i / 4) + i % 4);
        ++to;
    }
    __syncthreads();
    const int own = s.staged;
    {
        // To all of the cluster, a warp a CTA.
        const int sent = own <= LIST ? own : 0;
        const uint32_t bar = in_cta(&s.listed, warp), list = in_cta(s.list[rank], warp);
        if (lane == 0) {
            announce(bar, 8 * sent + 4);
            send(in_cta(&s.counts[rank], warp), own, bar);
        }
#pragma unroll 2
        for (int i = lane; i < sent; i += 32) send(list + 8 * i, s.own[i], bar);
    }
    wait_for_cluster(&s.listed);
    const bool listed = __reduce_max_sync(~0u, s.counts[lane % CLUSTER]) <= LIST;
    Cut cut;
    if (listed) {
        const int n = s.counts[warp];
        auto each = [&](auto f) {
#pragma unroll 2
            for (int i = lane; i < n; i += 32) f(s.list[warp][i].x, int(s.list[warp][i].y));
        };
        cut = best<false>(s, s.bins[1], bound, high, k, rank, each);
        each([&](uint32_t x, int at) {
            if (cut.in(x, at)) atomicAdd(&s.runs[at / RUN], 1);
        });
        if (tid < own && cut.in(s.own[tid].x, s.own[tid].y)) {
            const int at = s.own[tid].y;
            atomicOr(reinterpret_cast<uint32_t*>(&s.marks[at / RUN / CLUSTER]) + at % RUN / 32, 1u << at % 32);
        }
        __syncthreads();
    } else {
        __syncthreads();
        reinterpret_cast<uint4*>(s.bins[0])[tid] = zero;
        __syncthreads();
        cut = best<true>(s, s.bins[0], bound, high, k, rank, [&](auto f) {
#pragma unroll 1
            for (int u = 0; u < rounds; ++u) {
                const Four x = four(u);
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    if (at(u) + c < length) f(x.rank[c], at(u) + c);
                }
            }
        });
#pragma unroll 1
        for (int u = 0; u < rounds; ++u) {
            const Four x = four(u);
            int in = 0;
#pragma unroll
            for (int c = 0; c < 4; ++c) in += at(u) + c < length && cut.in(x.rank[c], at(u) + c);
            in = __reduce_add_sync(~0u, in);
            if (lane < CLUSTER) of_cta(s.runs, lane)[run(u)] = in;
        }
        cluster_sync();
    }

    // Ascending: how many are in before each run.
    uint4 n = reinterpret_cast<const uint4*>(s.runs)[tid];
    const uint32_t of_thread = n.x + n.y + n.z + n.w, first = before(s, of_thread, lanes_upto(of_thread, lane));
    n = make_uint4(first, first + n.x, first + n.x + n.y, first + n.x + n.y + n.z);
    reinterpret_cast<uint4*>(s.runs)[tid] = n;
    __syncthreads();
    if (listed) {
        if (tid < own && cut.in(s.own[tid].x, s.own[tid].y)) {
            const int at = s.own[tid].y, word = at % RUN / 32;
            const uint4 marks = s.marks[at / RUN / CLUSTER];
            const uint32_t own_word = word == 0 ? marks.x : word == 1 ? marks.y : word == 2 ? marks.z : marks.w;
            int place = s.runs[at / RUN] + __popc(own_word & ((1u << at % 32) - 1));
            if (word > 0) place += __popc(marks.x);
            if (word > 1) place += __popc(marks.y);
            if (word > 2) place += __popc(marks.z);
            out[place] = at;
        }
    } else {
#pragma unroll 1
        for (int u = 0; u < rounds; ++u) {
            const Four x = four(u);
            unsigned mask = 0;
#pragma unroll
            for (int c = 0; c < 4; ++c) mask |= unsigned(at(u) + c < length && cut.in(x.rank[c], at(u) + c)) << c;
            int place = s.runs[run(u)] + lanes_upto(uint32_t(__popc(mask)), lane) - __popc(mask);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                if (mask >> c & 1) out[place++] = at(u) + c;
            }
        }
    }
}
