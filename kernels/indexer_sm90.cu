// Computes: indexer scores `ks[s] * sum_h w[t,h] * relu(q[t,h]·k[s])` on Hopper's fp8 tensor cores, and, fused, the k
//           best positions of each row, ties to the lowest, ascending, then -1. For many rows that share their keys.
// Shapes:   q e4m3 [rows, heads up to 64, 128], w f32 [rows, heads]; keys e4m3 [keys, 128] with f32 scales, contiguous
//           or in page-planar pages of 64 -> scores f32 or bf16 [rows, columns], or int32 [rows, k].
// Idea:     a block of 8 rows (4 with more than 32 heads) lies in shared memory as 256 columns, ordered so that each
//           thread of a wgmma fragment has all heads of its own queries: relu, weights and the sum over heads need no
//           exchange. One warp brings key tiles by the copy engine; two warpgroups multiply and sum up, each a tile of
//           its own. A score meets a threshold taken from a sample of its row and, if it reaches it, goes
//           to a list; the k best of a row are exactly the k best of its lists. A list that fills is cut to its k
//           best, which gives a threshold that cannot be wrong; a sample that promised too much costs its block a
//           second scoring, from no threshold. Scores never reach memory; lists take O(rows * k).
// Tensor cores: QGMMA
// Roofline: 2 * heads * 128 flop a score at the fp8 tensor rate; a tile of 64 keys x 256 columns is 512 tensor cycles
//           against about 300 issued instructions a warp scheduler.
#include <limits.h>
#include <math_constants.h>

#include "indexer_sm90.cuh"

constexpr int DIM = 128, COLUMNS = 256, KEYS = 64;
constexpr int STAGES = 8, WARPGROUPS = 2, CONSUMERS = 128 * WARPGROUPS, THREADS = CONSUMERS + 128;
constexpr int EPOCH = 16;         // Tiles between two chances to look at how full the lists are.
constexpr int HELD = 16;          // Survivors of a row that a thread may hold back.
// What may come to a list before it is looked at: all keys of two epochs, and what the 64 threads of a row hold back.
constexpr int MARGIN = 2 * EPOCH * KEYS + 64 * HELD;
constexpr int SAMPLES = 2048;     // Most sampled keys of a row.

enum Mode { FILTER, SAMPLE, LOGITS };

template <int HEADS>
struct Shape {
    static constexpr int ROWS = COLUMNS / HEADS;  // Rows of a block.
    static constexpr int OWN = ROWS / 4;          // Rows that a thread sums up.
    static constexpr int PITCH = HEADS + 4;       // Of the weights in shared memory: no two rows on one bank.
};

constexpr int BINS = 2048;
struct alignas(16) Radix {
    uint32_t histogram[BINS];
    uint32_t warp_sum[8], any[8], all[8];  // A warp's.
    int bin, want, count;
};

// Tiles `first` to `last` of rows that share a request and a start. Tiles of contiguous keys start at a multiple of 4,
// as the copy engine wants it for scales: `shift` keys before the rows do.
struct Segment {
    int row, rows, first, last, shift;
};

struct Shared {
    uint8_t q[2][COLUMNS * DIM];
    uint8_t k[STAGES][KEYS * DIM];
    float scales[STAGES][KEYS];
    uint2 held[2 * HELD][CONSUMERS];  // Score and position.
    float weights[2][8 * 36];
    Segment segments[2];
    float thresholds[2][8];
    int lengths[2][8];
    uint64_t full[STAGES], empty[STAGES], q_full[2], q_empty[2], epoch;
    uint32_t calls[4];  // Epochs in which somebody asked for a look; warps are at most two apart.
    int counts[8], totals[CONSUMERS / 32];
    Radix radix;
};
constexpr int SCORE_SHARED = sizeof(Shared) + 1024;  // Aligned by hand.
static_assert(SCORE_SHARED == 210704, "src/backend/cuda/indexer_sm90.rs");

// --- Which tiles of which rows a CTA takes; the producer goes through them and tells the consumers.

__device__ inline int shift_of(const KeyMap& m, int64_t row) {
    return m.block_table ? 0 : int(max(start_of(m, row), int64_t(0)) % 4);
}

__device__ inline int tiles_of(int length, int shift) { return length == 0 ? 0 : (length + shift + KEYS - 1) / KEYS; }

template <int HEADS, int MODE>
struct Walk {
    const IndexerSm90& p;
    const int32_t* prefix;
    int row, unit, end;

    __device__ Walk(const IndexerSm90& params) : p(params), prefix(MODE == SAMPLE ? p.sample_prefix : p.prefix) {
        if (!planned()) {
            unit = blockIdx.x, end = groups() * p.splits, row = -1;
        } else if (MODE == FILTER && p.retry) {
            row = p.again[p.ix.rows] ? blockIdx.x : int(p.ix.rows);
        } else {
            const int64_t units = prefix[p.ix.rows];
            unit = units * blockIdx.x / gridDim.x, end = units * (blockIdx.x + 1) / gridDim.x;
            int lo = 0, hi = int(p.ix.rows);  // The last row with no more than `unit` before it.
            while (hi - lo > 1) {
                const int mid = (lo + hi) / 2;
                (prefix[mid] <= unit ? lo : hi) = mid;
            }
            row = lo;
        }
    }

    __device__ bool planned() const { return MODE != LOGITS || p.prefix; }

    __device__ int groups() const { return (int(p.ix.rows) + Shape<HEADS>::ROWS - 1) / Shape<HEADS>::ROWS; }

    __device__ bool next(Segment& s) {
        if (!planned()) return next_of_grid(s);
        if (MODE == FILTER && p.retry) {
            while (row < p.ix.rows && !p.again[row]) row += gridDim.x;
            if (row >= p.ix.rows) return false;
            s = {row, p.size[row], 0, prefix[row + 1] - prefix[row], shift_of(p.ix.map, row)};
            row += gridDim.x;
            return true;
        }
        if (unit >= end) return false;
        while (prefix[row + 1] <= unit) row += p.size[row];
        s.row = row, s.rows = p.size[row], s.shift = MODE == SAMPLE ? 0 : shift_of(p.ix.map, row);
        s.first = unit - prefix[row], s.last = min(prefix[row + 1], end) - prefix[row];
        unit = prefix[row] + s.last;
        return true;
    }

    // Without a plan: runs of rows of one request among a block's, each cut into `splits` parts. A warp calls.
    __device__ bool next_of_grid(Segment& s) {
        constexpr int ROWS = Shape<HEADS>::ROWS;
        const KeyMap& m = p.ix.map;
        const int lane = threadIdx.x % 32;
        for (; unit < end; unit += gridDim.x, row = -1) {
            const int first = unit % groups() * ROWS, rows = min(ROWS, int(p.ix.rows) - first);
            const int split = unit / groups();
            if (row < 0) row = first;
            // A row a lane, and where it starts a run.
            const int64_t own = first + min(lane, rows - 1);
            const int request = int(request_of(m, own)), start = int(start_of(m, own));
            const int length = int(min(length_of(m, own), p.columns));
            const int request_before = __shfl_up_sync(~0u, request, 1), start_before = __shfl_up_sync(~0u, start, 1);
            const bool starts = lane == 0 || lane >= rows || request != request_before || start != start_before;
            const uint32_t runs = __ballot_sync(~0u, starts);
            while (row < first + rows) {
                const int from = row - first, n = __ffs(runs & ~((2u << from) - 1)) - 1 - from;
                const int longest = __reduce_max_sync(~0u, lane >= from && lane < from + n ? length : 0);
                s.row = row, s.rows = n, s.shift = __shfl_sync(~0u, shift_of(m, own), from);
                const int tiles = int((p.columns + s.shift + KEYS - 1) / KEYS);
                s.first = int(int64_t(tiles) * split / p.splits);
                s.last = min(int(int64_t(tiles) * (split + 1) / p.splits), tiles_of(longest, s.shift));
                row += n;
                if (s.first < s.last) return true;
            }
        }
        return false;
    }
};

// Which keys of a block's longest row are sampled: of each of n equal parts one, anywhere in it.
struct Sampling {
    int n;
    uint64_t step;  // Length of a part, in 2^-32.

    __device__ Sampling(int samples, int length) : n(samples), step(samples ? (uint64_t(length) << 32) / samples : 0) {}

    __device__ int position(int i) const {
        uint32_t x = uint32_t(i) * 0x9e3779b9u;
        x = (x ^ x >> 15) * 0x85ebca6bu;
        x ^= x >> 13;
        const uint32_t from = uint32_t(i * step >> 32), to = uint32_t((i + 1) * step >> 32);
        return int(from + __umulhi(x, to - from));
    }
};

// Sampled keys of a block whose longest row sees `length`; none if its lists take every score.
__device__ inline int samples_of(int length, int k, int all) {
    if (length <= all) return 0;
    return min(max(length / 32, 1024), SAMPLES) / KEYS * KEYS;
}

// Scores that a list takes without a threshold.
__device__ inline int takes_all(const IndexerSm90& p) { return p.capacity - MARGIN; }

// The longest row of a block that is not taken whole. A warp calls.
__device__ inline int longest_of(const IndexerSm90& p, int row, int rows) {
    const int lane = threadIdx.x % 32, length = lane < rows ? p.lengths[row + lane] : 0;
    return __reduce_max_sync(~0u, length > p.k ? length : 0);
}

// --- The k-th largest, all 256 threads of barrier ID: eleven bits a round, from the first in which the words differ.
// `each(f)` calls f(word, whether there is one), spread over the threads.

// The bin that holds the k-th, how many are wanted of it and how many it has.
template <int ID>
__device__ inline void find_bin(Radix& s, int tid, int wanted) {
    const int top = BINS / 4 - 1 - 2 * tid;  // Two quads a thread, from the top.
    const uint4* quads = reinterpret_cast<const uint4*>(s.histogram);
    const uint4 a = quads[top], b = quads[top - 1];
    const uint32_t n[8] = {a.w, a.z, a.y, a.x, b.w, b.z, b.y, b.x};
    int own = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) own += n[i];
    int above = lanes_upto(own, tid % 32);
    if (tid % 32 == 31) s.warp_sum[tid / 32] = above;
    sm90::sync<ID, 256>();
    above -= own;
    for (int w = 0; w < tid / 32; ++w) above += s.warp_sum[w];
    if (above < wanted && wanted <= above + own) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (above < wanted && wanted <= above + int(n[i])) {
                s.bin = 4 * top + 3 - i;
                s.want = wanted - above;
                s.count = n[i];
            }
            above += n[i];
        }
    }
    sm90::sync<ID, 256>();
}

// Words of at least `least` are in; of the last bin `want` of its `count`.
struct Kth {
    uint32_t least;
    int want, count;
};

// Of n words. Up to `slack` more than k may be in.
template <int ID, class Each>
__device__ inline Kth kth_word(Radix& s, int tid, int k, int n, int slack, Each each) {
    uint32_t any = 0, all = ~0u;
    each([&](uint32_t word, bool there) { any |= there ? word : 0, all &= there ? word : ~0u; });
    any = __reduce_or_sync(~0u, any), all = __reduce_and_sync(~0u, all);
    sm90::sync<ID, 256>();  // The last call's have been read.
    if (tid % 32 == 0) s.any[tid / 32] = any, s.all[tid / 32] = all;
    sm90::sync<ID, 256>();
    for (int w = 0; w < 8; ++w) any |= s.any[w], all &= s.all[w];
    int open = 32 - __clz(any ^ all);  // Bits yet to be found.
    uint32_t known = open < 32 ? ~0u << open : 0, least = any & known;
    while (open > 0) {
        const int shift = max(open - 11, 0);
        const uint32_t bins = (1u << (open - shift)) - 1;
        uint4* quads = reinterpret_cast<uint4*>(s.histogram);
        quads[tid] = quads[tid + 256] = make_uint4(0, 0, 0, 0);
        sm90::sync<ID, 256>();
        each([&](uint32_t word, bool there) {
            if (there & ((word & known) == least)) atomicAdd(&s.histogram[word >> shift & bins], 1);
        });
        sm90::sync<ID, 256>();
        find_bin<ID>(s, tid, k);
        k = s.want, n = s.count;
        least |= uint32_t(s.bin) << shift;
        known = ~0u << shift;
        open = shift;
        if (n - k <= slack) break;
    }
    return {least, k, n};
}

// Of n different keys: the least that is in.
template <int ID, class Each>
__device__ inline uint64_t kth_key(Radix& s, int tid, int k, int n, Each each) {
    const Kth high = kth_word<ID>(s, tid, k, n, 0, [&](auto f) {
        each([&](uint64_t key, bool there) { f(uint32_t(key >> 32), there); });
    });
    if (high.want == high.count) return uint64_t(high.least) << 32;
    const Kth low = kth_word<ID>(s, tid, high.want, high.count, 0, [&](auto f) {
        each([&](uint64_t key, bool there) { f(uint32_t(key), there & (uint32_t(key >> 32) == high.least)); });
    });
    return uint64_t(high.least) << 32 | low.least;
}

// Larger is better: score, then the lower position.
__device__ inline uint64_t key_of(float score, int position) {
    return uint64_t(rank_of(score)) << 32 | uint32_t(~position);
}
__device__ inline float score_of(uint64_t key) {
    const uint32_t rank = uint32_t(key >> 32);
    return __uint_as_float(rank & 0x80000000 ? rank ^ 0x80000000 : ~rank);
}
// The least score above.
__device__ inline float next_up(float score) { return score_of(uint64_t(rank_of(score) + 1) << 32); }

// --- Producers.

// What a block's consumers need beside keys, by one warp.
template <int HEADS, int MODE>
__device__ inline void bring_queries(
    const sm90::TensorMap* maps, const IndexerSm90& p, Shared& s, const Segment& sg, uint32_t n) {
    using S = Shape<HEADS>;
    const int lane = threadIdx.x % 32;
    const uint32_t half = n % 2;
    sm90::wait(&s.q_empty[half], n / 2 % 2 ^ 1);
    if (lane == 0) {
        sm90::arrive_expect(&s.q_full[half], COLUMNS * DIM);
        if (HEADS == 64) {
            sm90::copy_box(s.q[half], maps[0], 0, 0, sg.row, 0, &s.q_full[half]);
        } else {
            sm90::copy_box(s.q[half], maps[0], 0, sg.row, 0, &s.q_full[half]);
        }
    }
    for (int i = lane; i < COLUMNS; i += 32) {
        const int row = i / HEADS, head = i % HEADS;
        const bool there = row < sg.rows && head < p.ix.heads;
        const float weight = there ? p.ix.weights[(sg.row + row) * p.ix.weights_row + head] : 0.0f;
        const bool twice = (HEADS == 64 ? head / 2 : head) % 2 == 0;  // See `relu`.
        s.weights[half][row * S::PITCH + head] = twice ? 0.5f * weight : weight;
    }
    if (lane == 0) s.segments[half] = sg;
    if (lane < S::ROWS) {
        const int row = sg.row + lane;
        int length = 0;
        if (lane < sg.rows) length = p.lengths ? p.lengths[row] : int(min(length_of(p.ix.map, row), p.columns));
        if (MODE == FILTER) {
            if (length <= p.k) length = 0;
            s.thresholds[half][lane] = length == 0 ? CUDART_NAN_F : p.retry ? -CUDART_INF_F : p.thresholds[row];
        }
        s.lengths[half][lane] = length;
    }
    sm90::arrive(&s.q_full[half]);
}

// No more segments: one without rows.
__device__ inline void bring_end(Shared& s, uint32_t n) {
    const uint32_t half = n % 2;
    sm90::wait(&s.q_empty[half], n / 2 % 2 ^ 1);
    if (threadIdx.x % 32 == 0) {
        sm90::arrive_expect(&s.q_full[half], 0);
        s.segments[half].rows = 0;
    }
    sm90::arrive(&s.q_full[half]);
}

// One warp brings queries and key tiles by the copy engine.
template <int HEADS, int MODE>
__device__ inline void produce(const sm90::TensorMap* maps, const IndexerSm90& p, Shared& s) {
    const int lane = threadIdx.x % 32;
    const KeyMap& m = p.ix.map;
    Walk<HEADS, MODE> walk(p);
    Segment sg;
    uint32_t tile = 0, n = 0;
    for (; walk.next(sg); ++n) {
        bring_queries<HEADS, MODE>(maps, p, s, sg, n);
        const int64_t request = request_of(m, sg.row), start = start_of(m, sg.row);
        const int32_t* table = m.block_table ? m.block_table + request * m.table_stride : nullptr;
        for (int base = sg.first; base < sg.last; base += 32) {
            // A page number a lane; one that is no page fills the tile as the map says, its scales with NaN.
            const int at = base + lane;
            int page = -1;
            if (table && at < sg.last && at < m.max_pages) page = table[at];
            for (int i = 0; i < min(32, sg.last - base); ++i, ++tile) {
                const int y = table ? 0 : int(start) - sg.shift + (base + i) * KEYS;
                const int z = table ? __shfl_sync(~0u, page, i) : 0;
                if (lane == 0) {
                    const uint32_t stage = tile % STAGES;
                    sm90::wait(&s.empty[stage], tile / STAGES % 2 ^ 1);
                    sm90::arrive_expect(&s.full[stage], KEYS * DIM + KEYS * 4);
                    sm90::copy_box(s.k[stage], maps[1], 0, y, z, &s.full[stage]);
                    sm90::copy_box(s.scales[stage], maps[2], y, z, &s.full[stage]);
                }
                __syncwarp();
            }
        }
    }
    bring_end(s, n);
}

// A warpgroup gathers sampled keys, two threads a key. What was asked for is handed on three tiles later.
template <int HEADS>
__device__ inline void produce_sample(const sm90::TensorMap* maps, const IndexerSm90& p, Shared& s) {
    constexpr int BEHIND = 3;
    const int tid = threadIdx.x % 128, key = tid / 2, side = tid % 2;
    const KeyMap& m = p.ix.map;
    Walk<HEADS, SAMPLE> walk(p);
    Segment sg;
    uint32_t tile = 0, n = 0;
    const auto hand_on = [&](uint32_t t) {
        sm90::fence_async();
        sm90::arrive(&s.full[t % STAGES]);
    };
    for (; walk.next(sg); ++n) {
        if (tid < 32) bring_queries<HEADS, SAMPLE>(maps, p, s, sg, n);
        const int64_t request = request_of(m, sg.row), start = start_of(m, sg.row);
        const int length = longest_of(p, sg.row, sg.rows);
        const Sampling sampling(samples_of(length, p.k, takes_all(p)), length);
        const int32_t* table = m.block_table ? m.block_table + request * m.table_stride : nullptr;
        const auto place_of = [&](int t, Place& at) {
            if (t >= sg.last) return false;
            const int position = sampling.position(t * KEYS + key);
            at = {0, start + position};
            if (!table) return at.at < m.keys;
            if (position / KEYS >= m.max_pages) return false;
            at = {table[position / KEYS], position % KEYS};
            return at.page >= 0 && at.page < m.pages;
        };
        Place next;
        bool found = place_of(sg.first, next);
        for (int t = sg.first; t < sg.last; ++t, ++tile) {
            const Place at = next;
            const bool there = found;
            found = place_of(t + 1, next);
            const uint32_t stage = tile % STAGES;
            sm90::wait(&s.empty[stage], tile / STAGES % 2 ^ 1);
            const char* data = static_cast<const char*>(p.ix.keys);
            if (there) data += at.page * p.ix.page_bytes + at.at * p.ix.row_bytes;
            for (int c = 4 * side; c < 4 * side + 4; ++c) {
                sm90::copy_16_if(&s.k[stage][key * DIM + ((c ^ key % 8) << 4)], data + 16 * c, there);
            }
            if (side == 0) {
                if (there) {
                    const char* scales = static_cast<const char*>(p.ix.scales);
                    sm90::copy_4(&s.scales[stage][key], scales + at.page * p.ix.scale_page_bytes + 4 * at.at);
                } else {
                    s.scales[stage][key] = CUDART_NAN_F;
                }
            }
            sm90::copies_commit();
            if (tile >= BEHIND) {
                sm90::copies_wait<BEHIND>();
                hand_on(tile - BEHIND);
            }
        }
    }
    sm90::copies_wait<0>();
    for (uint32_t t = tile - min(tile, uint32_t(BEHIND)); t < tile; ++t) hand_on(t);
    if (tid < 32) bring_end(s, n);
}

// --- Consumers.

template <int HEADS, int MODE>
struct Consumer {
    using S = Shape<HEADS>;
    const IndexerSm90& p;
    Shared& s;
    const int tid = threadIdx.x, warpgroup = sm90::uniform(tid / 128), warp = tid / 32 % 4, lane = tid % 32;
    const int group = lane / 4, column = lane % 4;
    Segment sg;
    float weights[2][32];
    float threshold[S::OWN];
    int length[S::OWN];
    int64_t out_row[S::OWN];
    int shortest;           // Of the rows that threads of this warp score.
    uint32_t next[S::OWN];  // Where in shared memory this thread's next survivor waits; row e's HELD places further.
    uint32_t first, last;   // The first of these, and the last with room for a tile's.
    uint32_t strict;        // Bit i: an equal of threshold i comes too late.
    uint32_t epoch = 0;     // Counts on over segments.
    Sampling sampling{0, 0};

    __device__ Consumer(const IndexerSm90& params, Shared& shared) : p(params), s(shared) {
        first = sm90::smem(&s.held[0][tid]), last = first + (HELD - 2) * HELD_STEP;
        asm volatile("" : "+r"(first), "+r"(last));  // Kept, not made anew for each tile.
    }

    // Of the block; the thread's own rows are `column * OWN` and the next.
    __device__ int own(int e) const { return column * S::OWN + e; }

    __device__ void load_weights(uint32_t half) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            // 32 heads: those of row 2 * column + e. 64: of row `column` the even ones, the odd ones.
#pragma unroll
            for (int j = 0; j < 32; j += 4) {
                if (HEADS == 64) {
                    const float4 x = *reinterpret_cast<const float4*>(&s.weights[half][column * S::PITCH + 32 * e + j]);
                    weights[0][16 * e + j / 2] = x.x, weights[1][16 * e + j / 2] = x.y;
                    weights[0][16 * e + j / 2 + 1] = x.z, weights[1][16 * e + j / 2 + 1] = x.w;
                } else {
                    const float* own = &s.weights[half][(2 * column + e) * S::PITCH + j];
                    const float4 x = *reinterpret_cast<const float4*>(own);
                    weights[e][j] = x.x, weights[e][j + 1] = x.y, weights[e][j + 2] = x.z, weights[e][j + 3] = x.w;
                }
            }
        }
    }

    __device__ uint64_t* list(int row) const {
        const int64_t cta = p.retry ? 0 : blockIdx.x;
        return p.lists + (sg.row + row + S::ROWS * cta) * p.capacity;
    }

    static constexpr int HELD_STEP = CONSUMERS * 8;  // Bytes from one survivor of a thread to its next.

    // What a warp's threads hold goes to the lists.
    __device__ void flush() {
#pragma unroll
        for (int e = 0; e < S::OWN; ++e) {
            const int held = (next[e] - first) / HELD_STEP;
            int before = held;  // With the lanes of the same row before this one.
            for (int d = 4; d < 32; d *= 2) {
                const int other = __shfl_up_sync(~0u, before, d);
                if (lane >= d) before += other;
            }
            int at = 0;
            if (group == 7 && before > 0) {
                at = atomicAdd(&s.counts[own(e)], before);
                // Enough for a strict threshold, or too many.
                const bool call = (at < p.k && at + before >= p.k) || at + before > takes_all(p);
                if (call) atomicExch(&s.calls[epoch % 4], epoch);
            }
            at = __shfl_sync(~0u, at, 28 + column) + before - held;
            uint64_t* to = list(own(e)) + at;
            // Loads before stores, eight at a time: the warpgroup's next product waits for this warp.
#pragma unroll 1
            for (int done = 0; __any_sync(~0u, done < held); done += 8) {
                uint64_t key[8];
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const uint2 x = s.held[e * HELD + done + i][tid];
                    key[i] = key_of(__uint_as_float(x.x), x.y);
                }
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    if (done + i < held) to[done + i] = key[i];
                }
            }
            next[e] = first;
        }
    }

    // The k best of a list stay, and the threshold is the next above the last of them.
    __device__ float cut(int row) {
        uint64_t* keys = list(row);
        const int n = s.counts[row];
        const auto each = [&](auto f) {
            for (int i = tid; i < n; i += CONSUMERS) f(keys[i], true);
        };
        const uint64_t kth = kth_key<1>(s.radix, tid, p.k, n, each);
        int kept = 0;
        for (int base = 0; base < n; base += CONSUMERS) {
            const uint64_t key = base + tid < n ? keys[base + tid] : 0;
            const bool in = base + tid < n && key >= kth;
            const uint32_t mask = __ballot_sync(~0u, in);
            if (lane == 0) s.totals[tid / 32] = __popc(mask);
            sm90::sync<1, CONSUMERS>();
            int at = kept + __popc(mask & ((1u << lane) - 1));
            for (int w = 0; w < CONSUMERS / 32; ++w) {
                if (w < tid / 32) at += s.totals[w];
                kept += s.totals[w];
            }
            if (in) keys[at] = key;  // No further than what has been read.
            sm90::sync<1, CONSUMERS>();
        }
        if (tid == 0) s.counts[row] = kept;
        return next_up(score_of(kth));
    }

    // All consumers are between two tiles, and scored everything before: may thresholds rise, must lists be cut?
    __device__ void look(uint32_t half) {
        sm90::sync<1, CONSUMERS>();
        bool full = false;
#pragma unroll
        for (int r = 0; r < S::ROWS; ++r) full |= s.counts[r] > takes_all(p);
        int seen[S::OWN];
#pragma unroll
        for (int e = 0; e < S::OWN; ++e) seen[e] = s.counts[own(e)];
        sm90::sync<1, CONSUMERS>();
#pragma unroll
        for (int e = 0; e < S::OWN; ++e) {
            // Enough reach it at lower positions: from here on an equal comes too late.
            if (!(strict >> e & 1) && seen[e] >= p.k) threshold[e] = next_up(threshold[e]), strict |= 1u << e;
        }
        if (!full) return;
        for (int r = 0; r < S::ROWS; ++r) {
            if (s.counts[r] <= takes_all(p)) continue;
            const float cut_at = cut(r);
#pragma unroll
            for (int e = 0; e < S::OWN; ++e) {
                if (own(e) == r) threshold[e] = cut_at, strict |= 1u << e;
            }
        }
        sm90::sync<1, CONSUMERS>();
        load_weights(half);  // Not kept over the cuts.
    }


    // Of every second head twice as much, by the pipe of the sums; `bring_queries` halves its weight. Both keep NaN.
    static __device__ float relu(float x, int j) {
        if (j % 2 == 0) return x + fabsf(x);
        float y;
        asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
        return y;
    }

    // Survivors of a tile at `begin`. With INSIDE, all rows see all of it.
    template <bool INSIDE>
    __device__ void keep(int begin, const float (&score)[2][S::OWN]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int at = begin + 16 * warp + group + 8 * i;
#pragma unroll
            for (int e = 0; e < S::OWN; ++e) {
                // NaN ranks with -inf.
                bool in = (score[i][e] >= threshold[e]) | (threshold[e] == -CUDART_INF_F);
                if (!INSIDE) in &= uint32_t(at) < uint32_t(length[e]);
                if (in) {
                    sm90::store_2(next[e] + e * HELD * HELD_STEP, __float_as_uint(score[i][e]), at);
                    next[e] += HELD_STEP;
                }
            }
        }
    }

    // Scores of two keys for each of the thread's rows, of the tile at `begin`.
    __device__ void put(int begin, float scale0, float scale1, const float (&acc)[128]) {
        float sum[2][2] = {};
#pragma unroll
        for (int j = 0; j < 32; ++j) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int e = 0; e < 2; ++e) sum[i][e] = fmaf(weights[e][j], relu(acc[4 * j + 2 * i + e], j), sum[i][e]);
            }
        }
        float score[2][S::OWN];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int e = 0; e < S::OWN; ++e) {
                score[i][e] = (S::OWN == 2 ? sum[i][e] : sum[i][0] + sum[i][1]) * (i ? scale1 : scale0);
            }
        }
        const bool inside = begin >= 0 && begin + KEYS <= shortest;
        if (MODE == FILTER) {
            if (inside) {
                keep<true>(begin, score);
            } else {
                keep<false>(begin, score);
            }
            bool many = false;
#pragma unroll
            for (int e = 0; e < S::OWN; ++e) many |= next[e] > last;
            if (__any_sync(~0u, many)) flush();
        }
#pragma unroll
        for (int i = 0; MODE != FILTER && i < 2; ++i) {
            const int at = begin + 16 * warp + group + 8 * i;
            const int position = MODE == SAMPLE ? sampling.position(at) : at;
#pragma unroll
            for (int e = 0; e < S::OWN; ++e) {
                if (MODE == SAMPLE) {
                    if (own(e) < sg.rows) {
                        float* to = p.samples + (sg.row + own(e)) * int64_t(SAMPLES) + at;
                        *to = position < length[e] ? fmaxf(score[i][e], -CUDART_INF_F) : -CUDART_INF_F;
                    }
                } else if (inside || uint32_t(at) < uint32_t(length[e])) {
                    // One zero; what the arithmetic makes NaN is one already.
                    store_float(p.out, p.out_type, out_row[e] + at, score[i][e] + 0.0f);
                }
            }
        }
    }

    __device__ void run() {
        uint32_t base = 0;          // Tiles of earlier segments.
        uint32_t mine = warpgroup;  // This warpgroup's next tile, counted like those.
        const uint32_t keys = sm90::uniform(sm90::descriptor_low(s.k[0]));
        float acc[128];
        for (uint32_t n = 0;; ++n) {
            const uint32_t half = n % 2;
            sm90::wait(&s.q_full[half], n / 2 % 2);
            const Segment& told = s.segments[half];
            sg = {sm90::uniform(told.row), sm90::uniform(told.rows), sm90::uniform(told.first),
                  sm90::uniform(told.last), sm90::uniform(told.shift)};
            if (sg.rows == 0) break;
            load_weights(half);
            strict = 0;
            shortest = INT_MAX;
#pragma unroll
            for (int e = 0; e < S::OWN; ++e) {
                length[e] = s.lengths[half][own(e)];
                threshold[e] = s.thresholds[half][own(e)];
                next[e] = first;
                if (MODE != FILTER || !isnan(threshold[e])) shortest = min(shortest, length[e]);
                out_row[e] = (sg.row + own(e)) * p.out_row;
            }
            shortest = sm90::uniform_min(shortest);
            if (MODE == SAMPLE) {
                const int longest = longest_of(p, sg.row, sg.rows);
                sampling = Sampling(samples_of(longest, p.k, takes_all(p)), longest);
            }
            if (MODE == FILTER) {
                if (tid < S::ROWS) s.counts[tid] = 0;
                sm90::sync<1, CONSUMERS>();
            }
            const uint32_t q = sm90::uniform(sm90::descriptor_low(s.q[half]));
            const int tiles = sg.last - sg.first;
            for (int from = 0; from < tiles; from += EPOCH, ++epoch) {
                const uint32_t end = base + min(from + EPOCH, tiles);
                for (; mine < end; mine += WARPGROUPS) {
                    const uint32_t stage = mine % STAGES, k = keys + stage * (KEYS * DIM >> 4);
                    sm90::wait(&s.full[stage], mine / STAGES % 2);
                    sm90::wgmma_begin();
                    sm90::wgmma_256<false>(acc, k, q);
                    sm90::wgmma_256<true>(acc, k + 2, q + 2);
                    sm90::wgmma_256<true>(acc, k + 4, q + 4);
                    sm90::wgmma_256<true>(acc, k + 6, q + 6);
                    sm90::wgmma_commit();
                    const float* scales = &s.scales[stage][16 * warp + group];
                    const float scale0 = scales[0], scale1 = scales[8];
                    sm90::wgmma_wait<0>();
                    if (lane == 0) sm90::arrive(&s.empty[stage]);
                    put((sg.first + int(mine - base)) * KEYS - sg.shift, scale0, scale1, acc);
                }
                if (MODE == FILTER) {
                    // Whether anybody asked for a look in the epoch before this one: all warps know the same.
                    bool called = false;
                    if (epoch > 0) {
                        sm90::wait(&s.epoch, (epoch - 1) % 2);
                        called = s.calls[(epoch - 1) % 4] == epoch - 1;
                    }
                    __syncwarp();
                    if (lane == 0) sm90::arrive(&s.epoch);
                    if (called) look(half);
                }
            }
            base += tiles;
            sm90::arrive(&s.q_empty[half]);  // Every lane has read the segment's description.
            if (MODE == FILTER) {
                bool any = false;
#pragma unroll
                for (int e = 0; e < S::OWN; ++e) any |= next[e] != first;
                if (__any_sync(~0u, any)) flush();
                sm90::sync<1, CONSUMERS>();
                if (tid < sg.rows) {
                    p.counts[sg.row + tid + S::ROWS * (p.retry ? 0 : int(blockIdx.x))] = s.counts[tid];
                }
            }
        }
    }
};
template <int HEADS, int MODE>
__device__ inline void score(const sm90::TensorMap* maps, const IndexerSm90& p) {
    extern __shared__ unsigned char raw[];
    Shared& s = *reinterpret_cast<Shared*>(raw + (1024 - sm90::smem(raw) % 1024) % 1024);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            sm90::init(&s.full[i], MODE == SAMPLE ? 128 : 1);
            sm90::init(&s.empty[i], 4);
        }
        sm90::init(&s.epoch, CONSUMERS / 32);
        for (uint32_t& call : s.calls) call = ~0u;
        for (int i = 0; i < 2; ++i) {
            sm90::init(&s.q_full[i], 1 + 32);
            sm90::init(&s.q_empty[i], CONSUMERS);
        }
        sm90::init_done();
    }
    __syncthreads();
    if (threadIdx.x >= CONSUMERS) {
        sm90::registers_down<MODE == SAMPLE ? 72 : MODE == LOGITS ? 56 : 40>();
        if (MODE == SAMPLE) {
            produce_sample<HEADS>(maps, p, s);
        } else if (threadIdx.x < CONSUMERS + 32) {
            produce<HEADS, MODE>(maps, p, s);
        }
    } else {
        sm90::registers_up<MODE == SAMPLE ? 216 : MODE == LOGITS ? 224 : 232>();
        Consumer<HEADS, MODE>(p, s).run();
    }
}

struct Maps {
    sm90::TensorMap q, keys, scales;
};

#define SCORER(name, heads, mode)                                                                   \
    KERNEL(THREADS) name(PARAMS Maps maps, PARAMS IndexerSm90 p) { score<heads, mode>(&maps.q, p); }
SCORER(indexer_filter_32, 32, FILTER)
SCORER(indexer_filter_64, 64, FILTER)
SCORER(indexer_sample_32, 32, SAMPLE)
SCORER(indexer_sample_64, 64, SAMPLE)
SCORER(indexer_logits_32, 32, LOGITS)
SCORER(indexer_logits_64, 64, LOGITS)

// --- The plan: blocks of rows that share a request and a start, and how many tiles lie before each.

constexpr int PLAN_THREADS = 512, BLOCK_ROWS = 8;

// Four rows' numbers.
__device__ inline void store_rows(int32_t* to, int row, int rows, int a, int b, int c, int d) {
    if (row + 3 < rows) {
        *reinterpret_cast<int4*>(to + row) = make_int4(a, b, c, d);
    } else {
        const int x[4] = {a, b, c, d};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (row + i < rows) to[row + i] = x[i];
        }
    }
}

// A thread a block.
KERNEL(PLAN_THREADS) indexer_plan(PARAMS IndexerSm90 p) {
    __shared__ int2 warp_sum[PLAN_THREADS / 32];
    const KeyMap& m = p.ix.map;
    const int rows = int(p.ix.rows), tid = threadIdx.x, lane = tid % 32, per_block = p.block_rows;
    int2 before = make_int2(0, 0);
    for (int base = 0; base < rows; base += PLAN_THREADS * per_block) {
        const int first = base + tid * per_block, n = min(per_block, rows - first);
        int request[BLOCK_ROWS], start[BLOCK_ROWS], length[BLOCK_ROWS];
#pragma unroll
        for (int i = 0; i < BLOCK_ROWS; ++i) {
            if (i < n) {
                request[i] = int(request_of(m, first + i)), start[i] = int(start_of(m, first + i));
                length[i] = int(length_of(m, first + i));
            }
        }
        // Runs of one request and start, from the last: what lies before each row, in tiles, and its run.
        int size[BLOCK_ROWS] = {}, lead[BLOCK_ROWS] = {};
        int2 own[BLOCK_ROWS] = {};
        int2 sum = make_int2(0, 0);
        int longest = 0, joined = 0;
#pragma unroll
        for (int i = BLOCK_ROWS - 1; i >= 0; --i) {
            if (i >= n) continue;
            if (length[i] > p.k) longest = max(longest, length[i]);
            ++joined;
            if (i > 0 && request[i] == request[i - (i > 0)] && start[i] == start[i - (i > 0)]) continue;
            own[i].x = tiles_of(longest, shift_of(m, first + i));
            own[i].y = samples_of(longest, p.k, takes_all(p)) / KEYS;
            size[i] = joined;
            sum.x += own[i].x, sum.y += own[i].y;
            longest = joined = 0;
        }
#pragma unroll
        for (int i = 0; i < BLOCK_ROWS; ++i) lead[i] = size[i] || i == 0 ? first + i : lead[i - (i > 0)];
        int2 upto = sum;
        for (int d = 1; d < 32; d *= 2) {
            const int x = __shfl_up_sync(~0u, upto.x, d), y = __shfl_up_sync(~0u, upto.y, d);
            if (lane >= d) upto.x += x, upto.y += y;
        }
        if (lane == 31) warp_sum[tid / 32] = upto;
        __syncthreads();
        int2 total = lane < PLAN_THREADS / 32 ? warp_sum[lane] : make_int2(0, 0);
        int2 mine = lane < tid / 32 ? total : make_int2(0, 0);
        mine.x = __reduce_add_sync(~0u, mine.x), mine.y = __reduce_add_sync(~0u, mine.y);
        total.x = __reduce_add_sync(~0u, total.x), total.y = __reduce_add_sync(~0u, total.y);
        int2 at[BLOCK_ROWS];
        at[0] = make_int2(before.x + mine.x + upto.x - sum.x, before.y + mine.y + upto.y - sum.y);
#pragma unroll
        for (int i = 1; i < BLOCK_ROWS; ++i) at[i] = make_int2(at[i - 1].x + own[i - 1].x, at[i - 1].y + own[i - 1].y);
#pragma unroll
        for (int i = 0; i < BLOCK_ROWS; i += 4) {
            if (i >= per_block) break;
            store_rows(p.prefix, first + i, rows, at[i].x, at[i + 1].x, at[i + 2].x, at[i + 3].x);
            store_rows(p.sample_prefix, first + i, rows, at[i].y, at[i + 1].y, at[i + 2].y, at[i + 3].y);
            store_rows(p.size, first + i, rows, size[i], size[i + 1], size[i + 2], size[i + 3]);
            store_rows(p.lead, first + i, rows, lead[i], lead[i + 1], lead[i + 2], lead[i + 3]);
            store_rows(p.again, first + i, rows, 0, 0, 0, 0);
            store_rows(p.lengths, first + i, rows, length[i], length[i + 1], length[i + 2], length[i + 3]);
        }
        before.x += total.x, before.y += total.y;
        __syncthreads();
    }
    if (tid == 0) p.prefix[rows] = before.x, p.sample_prefix[rows] = before.y, p.again[rows] = 0;
}

// --- Thresholds and the finish: one CTA a row.

constexpr int ROW_THREADS = 256;

// Rank in the sample of the score that about k of the row reach, far enough down that fewer are very unlikely.
KERNEL(ROW_THREADS) indexer_threshold(PARAMS IndexerSm90 p) {
    __shared__ Radix radix;
    const int row = blockIdx.x, tid = threadIdx.x, lead = p.lead[row];
    const int length = p.lengths[row], longest = longest_of(p, lead, p.size[lead]);
    const int samples = samples_of(longest, p.k, takes_all(p));
    float threshold = -CUDART_INF_F;
    if (samples > 0 && length > p.k) {
        const float* from = p.samples + int64_t(row) * SAMPLES;
        uint32_t ranks[SAMPLES / ROW_THREADS];
#pragma unroll
        for (int i = 0; i < SAMPLES / ROW_THREADS; ++i) {
            const int at = i * ROW_THREADS + tid;
            ranks[i] = at < samples ? rank_of(from[at]) : 0;
        }
        const auto each = [&](auto f) {
#pragma unroll
            for (int i = 0; i < SAMPLES / ROW_THREADS; ++i) {
                f(ranks[i], i * ROW_THREADS + tid < samples);
            }
        };
        const float expected = float(samples) / float(longest) * p.k;
        const int rank = int(expected + 5.0f * sqrtf(expected) + 2.0f);
        if (rank < samples) {
            const Kth kth = kth_word<0>(radix, tid, rank, samples, rank / 32, each);
            threshold = score_of(uint64_t(kth.least) << 32);
        }
    }
    if (tid == 0) p.thresholds[row] = threshold;
}

constexpr int KEPT = 20;      // Survivors of a row that a thread keeps in registers.
constexpr int MOST = 4096;    // The largest k.
constexpr int WINDOW = 4096;  // Words of a map with a bit a position, at most.
// Each thread counts up to 16 words in a row: a word between them keeps threads on different banks.
__device__ constexpr int skewed(int word) { return word + word / 16; }

struct Finish {
    uint32_t map[WINDOW + WINDOW / 16];
    uint16_t before[WINDOW + WINDOW / 16];  // Bits of earlier words.
    int32_t out[MOST];
};
constexpr int FINISH_SHARED = sizeof(Finish);
static_assert(FINISH_SHARED == 42496, "src/backend/cuda/indexer_sm90.rs");

extern "C" __global__ void __launch_bounds__(ROW_THREADS, 3) indexer_finish(PARAMS IndexerSm90 p) {
    extern __shared__ __align__(16) unsigned char found[];
    Finish& s = *reinterpret_cast<Finish*>(found);
    __shared__ Radix radix;
    __shared__ int warp_sum[ROW_THREADS / 32];
    const int row = blockIdx.x, tid = threadIdx.x, lane = tid % 32;
    if (p.retry && !p.again[p.ix.rows]) return;
    const int lead = p.lead[row];
    if (p.retry && !p.again[lead]) return;
    const int length = p.lengths[row];
    int32_t* out = static_cast<int32_t*>(p.out) + row * p.out_row;
    if (length <= p.k) {
        if (!p.retry) {
            for (int i = tid; i < p.k; i += ROW_THREADS) out[i] = i < length ? i : -1;
        }
        return;
    }
    // The CTAs that scored it: CTA c has the units from `units * c / ctas`.
    const int64_t units = p.prefix[p.ix.rows], first = p.prefix[lead], last = p.prefix[lead + 1];
    const auto cta_of = [&](int64_t unit) {
        int64_t c = int64_t(float(unit) / float(units) * float(p.ctas));
        while (units * (c + 1) < (unit + 1) * p.ctas) ++c;
        while (units * c >= (unit + 1) * p.ctas) --c;
        return int(c);
    };
    const int from = p.retry ? 0 : cta_of(first), to = p.retry ? 0 : cta_of(last - 1);
    int total = 0;
    for (int c = from; c <= to; ++c) total += p.counts[row + p.block_rows * c];
    if (total < p.k) {
        if (tid == 0) p.again[lead] = 1, p.again[p.ix.rows] = 1;
        return;
    }
    uint64_t keys[KEPT];
    const auto load = [&](int begin) {
#pragma unroll
        for (int j = 0; j < KEPT; ++j) keys[j] = 0;  // No key is 0.
        for (int c = from; c <= to; ++c) {
            const int id = row + p.block_rows * c, n = p.counts[id];
            const uint64_t* list = p.lists + int64_t(id) * p.capacity;
#pragma unroll
            for (int j = 0; j < KEPT; ++j) {
                const int i = begin + j * ROW_THREADS + tid;
                if (uint32_t(i) < uint32_t(n)) keys[j] = list[i];
            }
            begin -= n;
        }
    };
    // More than the registers hold are read anew each time.
    const int batches = (total + KEPT * ROW_THREADS - 1) / (KEPT * ROW_THREADS);
    if (batches == 1) load(0);
    const auto each = [&](auto f) {
        for (int b = 0; b < batches; ++b) {
            if (batches > 1) load(b * KEPT * ROW_THREADS);
#pragma unroll
            for (int j = 0; j < KEPT; ++j) f(keys[j], uint32_t(keys[j] >> 32) != 0);
        }
    };
    const uint64_t kth = kth_key<0>(radix, tid, p.k, total, each);
    // Ascending: a bit for each, a window of positions at a time; a position's place is the number of bits before it.
    int written = 0;
    for (int start = 0; start < length; start += 32 * WINDOW) {
        const int words = min(WINDOW, (length - start + 31) / 32);
        for (int i = tid; i < skewed(words); i += ROW_THREADS) s.map[i] = 0;
        __syncthreads();
        each([&](uint64_t key, bool) {
            const uint32_t at = ~uint32_t(key) - start;
            if ((key >= kth) & (at < 32 * WINDOW)) atomicOr(&s.map[skewed(at / 32)], 1u << at % 32);
        });
        __syncthreads();
        const int share = (words + ROW_THREADS - 1) / ROW_THREADS;
        const int begin = min(words, tid * share), end = min(words, begin + share);
        int own = 0;
        for (int i = begin; i < end; ++i) own += __popc(s.map[skewed(i)]);
        const int upto = lanes_upto(own, lane);
        if (lane == 31) warp_sum[tid / 32] = upto;
        __syncthreads();
        int before = written + upto - own;
        for (int w = 0; w < ROW_THREADS / 32; ++w) {
            if (w < tid / 32) before += warp_sum[w];
            written += warp_sum[w];
        }
        for (int i = begin; i < end; ++i) {
            s.before[skewed(i)] = uint16_t(before);
            before += __popc(s.map[skewed(i)]);
        }
        __syncthreads();
        each([&](uint64_t key, bool) {
            const uint32_t at = ~uint32_t(key) - start;
            if ((key >= kth) & (at < 32 * WINDOW)) {
                const int word = skewed(at / 32);
                s.out[s.before[word] + __popc(s.map[word] & ((1u << at % 32) - 1))] = int(start + at);
            }
        });
        __syncthreads();
    }
    for (int i = tid; i < p.k; i += ROW_THREADS) out[i] = s.out[i];
}

// Columns behind a row's end.
KERNEL(ROW_THREADS) indexer_logits_tail(PARAMS IndexerSm90 p) {
    const int64_t row = blockIdx.x, length = length_of(p.ix.map, row);
    for (int64_t i = length + threadIdx.x; i < p.columns; i += ROW_THREADS) {
        store_float(p.out, p.out_type, row * p.out_row + i, -CUDART_INF_F);
    }
}
