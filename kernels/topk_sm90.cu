// Computes: the k best columns of each row, ties to the lowest, ascending, then -1.
// Shapes:   scores f32 or bf16 [rows, columns] -> int32 [rows, k]; columns row_start[r] to row_end[r] count.
// Idea:     a block a row, or a cluster of blocks with a slice each. A slice that fits stays in registers. Of a longer
//           one, what reaches a bound goes to shared memory, in column order: the bound is taken from a sample of the
//           row, so that a few more than k should reach it. If too few do, or too many, histograms of the whole row
//           give one that is sure. Then radix select over what is kept, with histograms that the cluster adds up, and
//           what is in is numbered in column order: nothing is sorted.
// Roofline: one read of the row, and of the sample: 5 % more. A row that defeats its sample is read up to four times
//           more. H100, 4096 rows of 131072, f32: 0.79 ms, 2.7 TB/s (one read at 3.1 TB/s: 0.69 ms); rows of 8192 are
//           bound by instructions. docs/measured/topk has the figures.
// Tensor cores: none
#include "sm90.cuh"
#include "topk.cuh"

namespace {

using sm90::cluster_sync;
using sm90::of_cta;

constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr int QUADS = 4;                   // A thread holds so many groups of four columns,
constexpr int HELD = THREADS * QUADS * 4;  // and a block so many columns: twice the largest k.
constexpr int BINS = 2048;                 // Of a histogram.
constexpr int ALL = 0x7fffffff;
constexpr uint32_t LOWEST = 0x007fffff, HIGHEST = 0xff800000;  // Ranks of -inf and inf.

// In place of a column that does not count: no comparison with it is true, and its rank is 0.
__device__ inline float nothing() { return __uint_as_float(0xffffffff); }

__device__ inline float4 none() { return make_float4(nothing(), nothing(), nothing(), nothing()); }

// NaN ranks with -inf, zeros of either sign tie.
__device__ inline float known(float x) { return fmaxf(x, -INFINITY) + 0.0f; }

// `rank_of` for what is known, or nothing.
__device__ inline uint32_t rank_known(float x) {
    uint32_t bits = __float_as_uint(x);
    return bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000);
}

__device__ inline float score_of(uint32_t rank) {
    return __uint_as_float(rank & 0x80000000 ? rank ^ 0x80000000 : ~rank);
}

__device__ inline int byte_of(uint32_t word, int i) { return word >> 8 * i & 255; }
__device__ inline uint32_t sum_of_bytes(uint32_t word) { return __dp4a(word, 0x01010101u, 0u); }

// The columns of a row that count, in quads from the last aligned address before them.
template <class T>
struct Row {
    const T* base;
    uint32_t first, end;

    __device__ Row(const void* p, int64_t at, int64_t length) {
        const T* start = static_cast<const T*>(p) + at;
        first = uint32_t(reinterpret_cast<uintptr_t>(start) / sizeof(T) % 4);
        base = start - first;
        end = first + uint32_t(length);
    }
    __device__ uint32_t quads() const { return (end + 3) / 4; }
    __device__ bool whole(uint32_t quad) const { return 4 * quad >= first && 4 * quad + 4 <= end; }

    __device__ float4 raw(uint32_t quad) const {
        if constexpr (sizeof(T) == 4) {
            return __ldg(reinterpret_cast<const float4*>(base) + quad);
        } else {
            uint2 two = __ldg(reinterpret_cast<const uint2*>(base) + quad);
            return make_float4(__uint_as_float(two.x << 16), __uint_as_float(two.x & 0xffff0000),
                               __uint_as_float(two.y << 16), __uint_as_float(two.y & 0xffff0000));
        }
    }

    // A quad that may reach beyond the ends, or lie there.
    __device__ float4 edge(uint32_t quad) const {
        float x[4];
        for (int c = 0; c < 4; ++c) {
            uint32_t i = 4 * quad + c;
            x[c] = nothing();
            if (i >= first && i < end) x[c] = known(load_float(base, sizeof(T) == 4 ? F32 : BF16, i));
        }
        return make_float4(x[0], x[1], x[2], x[3]);
    }
};

// Ranks above `rank` are in, and the first `ties` equal to it; perhaps ALL.
struct Bound {
    uint32_t rank;
    int ties;
};

struct Shared {
    union {
        float scores[HELD];           // What is kept of a slice, in column order.
        uint32_t histogram[2][BINS];  // This block's, and the cluster's.
    };
    int32_t columns[HELD];
    int totals[2][WARPS];     // By warp.
    int from[3][16];          // By block of the cluster.
    int sums[BINS / 8 / 32];  // By warp that looks for the bin, and what it found.
    int bin, above, count;
};
static_assert(sizeof(Shared) == 65900, "mod.rs");

// With FITS every slice is known to fit into registers.
template <class T, int CLUSTER, bool FITS>
struct Pick {
    Shared& s;
    const Row<T> row;
    const unsigned lane, warp, rank;
    const uint32_t from, to;  // This block's quads.
    int parity;

    __device__ Pick(Shared& s, Row<T> row, unsigned rank, uint32_t slice)
        : s(s), row(row), lane(threadIdx.x % 32), warp(threadIdx.x / 32), rank(rank),
          from(min(rank * slice, row.quads())), to(min(from + slice, row.quads())), parity(0) {}

    // A thread's quads: warps have consecutive ranges of `per` times 32.
    __device__ uint32_t at(uint32_t base, int per, int u) const { return base + (warp * per + u) * 32 + lane; }

    // Scores, or `nothing` beyond the slice. True if they are as they came, with NaN.
    __device__ bool load(float (&x)[QUADS][4], uint32_t base, int per) const {
        const uint32_t lowest = base + warp * per * 32, beyond = lowest + per * 32;
        const bool whole = row.whole(lowest) && row.whole(beyond - 1) && beyond <= to;
        float4 q[QUADS];
        if (whole) {
#pragma unroll
            for (int u = 0; u < QUADS; ++u) q[u] = u < per ? row.raw(at(base, per, u)) : none();
        } else {
#pragma unroll
            for (int u = 0; u < QUADS; ++u) {
                const uint32_t i = at(base, per, u);
                q[u] = u < per && i < to ? row.edge(i) : none();
            }
        }
#pragma unroll
        for (int u = 0; u < QUADS; ++u) x[u][0] = q[u].x, x[u][1] = q[u].y, x[u][2] = q[u].z, x[u][3] = q[u].w;
        return whole;
    }
    __device__ void load_known(float (&x)[QUADS][4], uint32_t base, int per) const {
        if (load(x, base, per)) make_known(x, per);
    }
    __device__ static void make_known(float (&x)[QUADS][4], int per) {
#pragma unroll
        for (int u = 0; u < QUADS; ++u) {
#pragma unroll
            for (int c = 0; c < 4; ++c) x[u][c] = u < per ? known(x[u][c]) : x[u][c];
        }
    }

    // The want-th best of the ranks that `each` hands out, in this block or in the WHOLE cluster; it is no lower than
    // `lo`. Rather than look closer, lets up to `slack` more than wanted come along.
    template <bool WHOLE, class Each>
    __device__ Bound nth(uint32_t lo, int want, int slack, Each each) {
        uint32_t span = HIGHEST - lo;
        while (span) {
            const int shift = max(0, 21 - __clz(span));
            reinterpret_cast<uint4*>(s.histogram[0])[threadIdx.x % (BINS / 4)] = make_uint4(0, 0, 0, 0);
            __syncthreads();
            each([&](uint32_t rank) {
                uint32_t d = rank - lo;
                if (d <= span) atomicAdd(&s.histogram[0][d >> shift], 1);
            });
            find<WHOLE>(want);
            want -= s.above;
            lo += uint32_t(s.bin) << shift;
            span = min(span - (uint32_t(s.bin) << shift), (1u << shift) - 1);
            if (s.count - want <= slack) return {lo, ALL};
        }
        return {lo, want};
    }

    // The bin with the want-th best.
    template <bool WHOLE>
    __device__ void find(int want) {
        const uint32_t* histogram = s.histogram[0];
        if constexpr (WHOLE && CLUSTER > 1) {
            histogram = s.histogram[1];
            cluster_sync();
            // Each block adds up its share of the bins and hands the sums to all.
            if (threadIdx.x < BINS / 4) {
                const unsigned peer = threadIdx.x % CLUSTER;
                const int quad = rank * (BINS / 4 / CLUSTER) + threadIdx.x / CLUSTER;
                uint4 n = reinterpret_cast<uint4*>(of_cta(s.histogram[0], peer))[quad];
#pragma unroll
                for (int d = 1; d < CLUSTER; d *= 2) {
                    n.x += __shfl_xor_sync(~0u, n.x, d);
                    n.y += __shfl_xor_sync(~0u, n.y, d);
                    n.z += __shfl_xor_sync(~0u, n.z, d);
                    n.w += __shfl_xor_sync(~0u, n.w, d);
                }
                reinterpret_cast<uint4*>(of_cta(s.histogram[1], peer))[quad] = n;
            }
            cluster_sync();
        } else {
            __syncthreads();
        }
        // A thread takes eight bins, from the top; the warps that have none wait.
        const int top = BINS / 8 - 1 - int(threadIdx.x);
        const uint4* bins = reinterpret_cast<const uint4*>(histogram) + 2 * top;
        int own = 0, upto = 0;
        if (top >= 0) {
            const uint4 low = bins[0], high = bins[1];
            own = high.w + high.z + high.y + high.x + low.w + low.z + low.y + low.x;
            upto = own;
#pragma unroll
            for (int d = 1; d < 32; d *= 2) {
                const int other = __shfl_up_sync(~0u, upto, d);
                if (lane >= d) upto += other;
            }
            if (lane == 31) s.sums[warp] = upto;
        }
        __syncthreads();
        if (top >= 0) {
            int above = __reduce_add_sync(~0u, lane < warp ? s.sums[lane] : 0) + upto - own;
            if (above < want && want <= above + own) {
                const uint4 low = bins[0], high = bins[1];
                const uint32_t counts[8] = {high.w, high.z, high.y, high.x, low.w, low.z, low.y, low.x};
                int i = 0, count = counts[0];
#pragma unroll
                for (int next = 1; next < 8; ++next) {
                    if (above + count < want) above += count, count = counts[next], i = next;
                }
                s.bin = 8 * top + 7 - i, s.above = above, s.count = count;
            }
        }
        __syncthreads();
    }

    // Sum over the warps before this one; of all in `sum`.
    __device__ int warps_before(int own, int& sum) {
        if (lane == 0) s.totals[parity][warp] = own;
        __syncthreads();
        const int n = lane < WARPS ? s.totals[parity][lane] : 0;
        parity ^= 1;  // The next call writes while this one's are read.
        sum = __reduce_add_sync(~0u, n);
        return __reduce_add_sync(~0u, lane < warp ? n : 0);
    }

    // Sum over the blocks before this one; of all in `sum`, the most in `most`. Each caller has a slot of its own.
    __device__ int blocks_before(int slot, int own, int& sum, int& most) {
        if (threadIdx.x < CLUSTER) *of_cta(&s.from[slot][rank], threadIdx.x) = own;
        cluster_sync();
        int before = 0;
        sum = most = 0;
#pragma unroll
        for (int i = 0; i < CLUSTER; ++i) {
            const int n = s.from[slot][i];
            if (i < rank) before += n;
            sum += n, most = max(most, n);
        }
        return before;
    }

    // Flags of a thread's columns: a bit each, in a byte a quad.
    template <class V, class Is>
    __device__ static uint32_t flags_of(const V (&x)[QUADS][4], int per, Is is) {
        uint32_t flags = 0;
#pragma unroll
        for (int u = 0; u < QUADS; ++u) {
            if (u < per) {
#pragma unroll
                for (int c = 0; c < 4; ++c) flags |= is(x[u][c]) ? 1u << (8 * u + c) : 0u;
            }
        }
        return flags;
    }

    // Where flags come in column order, which is by warp, quad, lane: how many before the warp; before the lane in each
    // quad, and in each quad of the warp, a byte a quad.
    struct Places {
        int warp;
        uint32_t lanes, quads;

        __device__ int first(int u) const {
            return warp + byte_of(lanes, u) + sum_of_bytes(quads & ((1u << 8 * u) - 1));
        }
        __device__ int end() const { return warp + sum_of_bytes(quads); }
    };

    // In this block or in the WHOLE cluster; `total` is of the block.
    template <bool WHOLE>
    __device__ Places places(uint32_t flags, int slot, int& total) {
        uint32_t n = flags - (flags >> 1 & 0x05050505);
        n = (n & 0x03030303) + (n >> 2 & 0x03030303);
        const uint32_t upto = lanes_upto(n, lane);
        const uint32_t quads = __shfl_sync(~0u, upto, 31);
        int before = warps_before(sum_of_bytes(quads), total), sum, most;
        if constexpr (WHOLE && CLUSTER > 1) before += blocks_before(slot, total, sum, most);
        return {before, upto - n, quads};
    }

    template <class V>
    __device__ static uint32_t reach(const V (&x)[QUADS][4], int per, V bound) {
        return flags_of(x, per, [&](V y) { return y >= bound; });
    }

    // Flags what is above `bound`, and the first `ties` equal to it, of which `equal` came before.
    template <bool WHOLE, class V>
    __device__ uint32_t reach_first(const V (&x)[QUADS][4], int per, V bound, int ties, int& equal) {
        const uint32_t above = flags_of(x, per, [&](V y) { return y > bound; });
        uint32_t same = flags_of(x, per, [&](V y) { return y == bound; });
        int total;
        const Places p = places<WHOLE>(same, 0, total);
#pragma unroll
        for (int u = 0; u < QUADS; ++u) {
            const int room = max(ties - equal - p.first(u), 0);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const uint32_t bit = 1u << (8 * u + c);
                if (__popc(same & (bit - 1) & 255u << 8 * u) >= room) same &= ~bit;
            }
        }
        equal += total;
        return above | same;
    }

    // put(u, c, place) for what is flagged.
    template <class Put>
    __device__ static void put_flagged(uint32_t flags, const Places& p, int per, Put put) {
#pragma unroll
        for (int u = 0; u < QUADS; ++u) {
            if (u < per) {
                int place = p.first(u);
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    if (flags & 1u << (8 * u + c)) put(u, c, place++);
                }
            }
        }
    }

    // What reaches the bound to shared memory, but of its equals, unless ALL are wanted, only as many as can be of use.
    // Returns how many that is; there may be no room for so many.
    __device__ int collect(Bound b, int k) {
        // NaN, which ranks with -inf, is seen in the careful form only.
        const bool all = b.ties == ALL && b.rank > LOWEST;
        const float bound = score_of(b.rank), sure = all ? bound : score_of(b.rank + 1);
        int kept = 0, equal = 0;
        float next[QUADS][4];
        bool raw = load(next, from, QUADS);
        for (uint32_t base = from; base < to; base += THREADS * QUADS) {
            float x[QUADS][4];
#pragma unroll
            for (int u = 0; u < QUADS; ++u) {
#pragma unroll
                for (int c = 0; c < 4; ++c) x[u][c] = next[u][c];
            }
            if (raw && !all) make_known(x, QUADS);
            raw = load(next, base + THREADS * QUADS, QUADS);  // On its way while these are looked at.
            const uint32_t flags =
                all || equal >= k ? reach(x, QUADS, sure) : reach_first<false>(x, QUADS, bound, k, equal);
            int total;
            Places p = places<false>(flags, 0, total);
            p.warp += kept;
            kept += total;
            if (p.end() > HELD) continue;
            const int first = int(4 * at(base, QUADS, 0) - row.first);
            put_flagged(flags, p, QUADS, [&](int u, int c, int place) {
                s.scores[place] = x[u][c];
                s.columns[place] = first + 128 * u + c;
            });
        }
        __syncthreads();
        return kept;
    }

    // A bound that a few more than k of the row should reach, from a sample, by four standard deviations if there is room.
    __device__ Bound guess(int k) {
        const uint32_t inner = row.quads() - 2;  // Those at the ends may not be whole.
        const int per = inner > (1 << 16) ? QUADS : 1;
        const int log = __ffs(THREADS * per) - 1;
        float4 quad[QUADS];
#pragma unroll
        for (int u = 0; u < QUADS; ++u) {
            // One of each stretch, not always the same.
            const uint32_t i = u * THREADS + threadIdx.x, stretch = uint32_t(uint64_t(i) * inner >> log);
            if (u < per) quad[u] = row.raw(1 + stretch + __umulhi(i * 0x9e3779b9u, inner >> log));
        }
        const float share = float(4 * THREADS * per) / float(row.end - row.first), mean = k * share;
        const float room = 0.8f * HELD * share;
        const int want = max(int(min(mean + 4.0f * sqrtf(mean) + 2.0f, room)), 1);
        Bound b = nth<false>(LOWEST, want, want / 8, [&](auto count) {
#pragma unroll
            for (int u = 0; u < QUADS; ++u) {
                if (u < per) {
                    count(rank_known(known(quad[u].x)));
                    count(rank_known(known(quad[u].y)));
                    count(rank_known(known(quad[u].z)));
                    count(rank_known(known(quad[u].w)));
                }
            }
        });
        // Equals that should all find room need no care.
        if (want + s.count - b.ties < room) b.ties = ALL;
        return b;
    }

    // A bound that at least k reach, and no more than there is room for.
    __device__ Bound measure(int k) {
        return nth<true>(LOWEST, k, HELD - k, [&](auto count) {
            for (uint32_t base = from; base < to; base += THREADS * QUADS) {
                float x[QUADS][4];
                load_known(x, base, QUADS);
#pragma unroll
                for (int u = 0; u < QUADS; ++u) {
#pragma unroll
                    for (int c = 0; c < 4; ++c) count(rank_known(x[u][c]));
                }
            }
        });
    }

    // Whether at least k of the row were found, and all are there.
    __device__ bool enough(int kept, int k) {
        int sum = kept, most = kept;
        if constexpr (CLUSTER > 1) blocks_before(1, kept, sum, most);
        return sum >= k && most <= HELD;
    }

    __device__ void run(int32_t* out, int k, uint32_t slice) {
        uint32_t ranks[QUADS][4];
        uint32_t lo = LOWEST;
        int per;
        const bool direct = FITS || slice <= THREADS * QUADS;
        if (direct) {
            float x[QUADS][4];
            per = (slice + THREADS - 1) / THREADS;
            load_known(x, from, per);
#pragma unroll
            for (int u = 0; u < QUADS; ++u) {
#pragma unroll
                for (int c = 0; c < 4; ++c) ranks[u][c] = rank_known(x[u][c]);
            }
        } else {
            if constexpr (CLUSTER > 1) cluster_sync();  // The others must run before they are written to.
            Bound bound = guess(k);
            int n;
            for (bool guessed = true;; guessed = false) {
                n = collect(bound, k);
                if (!guessed || enough(n, k)) break;
                bound = measure(k);
            }
            lo = bound.rank;
            per = (n + THREADS * 4 - 1) / (THREADS * 4);
#pragma unroll
            for (int u = 0; u < QUADS; ++u) {
                const int i = 4 * at(0, per, u);
                float4 q = make_float4(0, 0, 0, 0);
                if (u < per && i < n) q = *reinterpret_cast<const float4*>(s.scores + i);
                ranks[u][0] = u < per && i < n ? rank_known(known(q.x)) : 0;
                ranks[u][1] = u < per && i + 1 < n ? rank_known(known(q.y)) : 0;
                ranks[u][2] = u < per && i + 2 < n ? rank_known(known(q.z)) : 0;
                ranks[u][3] = u < per && i + 3 < n ? rank_known(known(q.w)) : 0;
            }
            __syncthreads();  // Histograms go there now.
        }
        const Bound b = nth<true>(lo, k, 0, [&](auto count) {
#pragma unroll
            for (int u = 0; u < QUADS; ++u) {
                if (u < per) {
#pragma unroll
                    for (int c = 0; c < 4; ++c) count(ranks[u][c]);
                }
            }
        });
        const int first = int(4 * at(from, per, 0) - row.first), held = 4 * at(0, per, 0);
        auto put = [&](int u, int c, int place) {
            out[place] = direct ? first + 128 * u + c : s.columns[held + 128 * u + c];
        };
        int equal = 0, total;
        const uint32_t flags =
            b.ties == ALL ? reach(ranks, per, b.rank) : reach_first<true>(ranks, per, b.rank, b.ties, equal);
        put_flagged(flags, places<true>(flags, 2, total), per, put);
    }
};

template <class T, int CLUSTER, bool FITS>
__device__ inline void pick(const TopK& p) {
    extern __shared__ __align__(16) char memory[];
    const int64_t number = blockIdx.x / CLUSTER;
    const unsigned rank = blockIdx.x % CLUSTER;
    const int64_t start = p.row_start ? max(int64_t(p.row_start[number]), int64_t(0)) : 0;
    const int64_t end = p.row_end ? min(int64_t(p.row_end[number]), p.columns) : p.columns;
    const int64_t length = max(end - start, int64_t(0));
    int32_t* out = p.out + number * p.out_row;
    if (length <= p.k) {
        if (rank == 0) take_all(out, length, p.k);
        return;
    }
    const Row<T> row(p.logits, number * p.logits_row + start, length);
    const uint32_t slice = (row.quads() + 32 * CLUSTER - 1) / (32 * CLUSTER) * 32;
    Pick<T, CLUSTER, FITS>(*reinterpret_cast<Shared*>(memory), row, rank, slice).run(out, p.k, slice);
}

}  // namespace

#define ENTRY(name, cluster, fits, blocks_per_sm)                                                                   \
    extern "C" __global__ void __cluster_dims__(cluster, 1, 1) __launch_bounds__(THREADS, blocks_per_sm)            \
        name(PARAMS TopK p) {                                                                                       \
        p.type == F32 ? pick<float, cluster, fits>(p) : pick<uint16_t, cluster, fits>(p);                           \
    }

ENTRY(topk_short, 1, true, 3)  // At most HELD columns, rows on multiples of four.
ENTRY(topk_1, 1, false, 2)
ENTRY(topk_4, 4, false, 1)
ENTRY(topk_16, 16, false, 1)
