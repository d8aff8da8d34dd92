// Computes: scores and selects for decode: `ks[s] * sum_h w[t,h] * relu(q[t,h]·k[s])`, the k best of each row, ties to
//           the lowest position, ascending, then -1; or the scores alone.
// Shapes:   e4m3 q [requests * queries, heads <= 64, 128], f32 w, pages of 64 keys -> int32 [rows, k <= 4096]; 1 to 8
//           queries a request, which share its pages but have lengths of their own; or, with `row_request`, rows of any.
// Idea:     two launches. `decode_scores`: the pages of all groups, one after the other, are cut into equal parts, one a
//           multiprocessor (a group: neighbouring rows of one request, for which its pages are read once); a warp copies
//           pages into a ring of pairs in shared memory, four warpgroups turn pairs into scores (keys on M, heads on N).
//           Scores go to memory, 3 % of what is read, with the best of every 8. `decode_topk`: the k-th best of the
//           bests of groups is a lower bound of the k-th best score, so only the groups that reach it are read: little
//           more than k of them.
// Roofline: 132 bytes a token at the rate of memory; at 64 heads the tensor cores are busy for a fifth of that time. What
//           is written costs more than its share.
// Tensor cores: QGMMA
#include "decode_sm90.cuh"

constexpr int DECODE_THREADS = 128 * GROUPS + 64;  // And a warp that copies pages, and one for queries.
constexpr int DECODE_GROUPS = 512;                 // At most, a launch.
constexpr int PAIR = 2;                            // Pages a stage of the ring, of one group.

// What lies in a stage.
struct alignas(16) Stage {
    int segment;  // The CTA's how many-th group this is.
    int group;
    int page;     // The first: which of the request's pages.
    int pages;    // How many, 0 at the end; and, from bit 8 on, which of them were there to copy.
};

// Dynamic shared memory of `decode_scores`: src/backend/cuda/decode.rs has its size. The number of stages is a multiple
// of GROUPS, so that a stage always goes to the same warpgroup: no other knows which of its phases is over.
template <int H>
struct Shared {
    unsigned char* keys;     // [stages][PAIR][64][128], swizzled
    unsigned char* queries;  // [2][queries][H][128], swizzled
    float* scales;           // [stages][PAIR][64]
    Stage* stage;            // [stages]
    uint64_t *full, *empty, *q_full, *q_empty;
    float* weights;          // [2][queries][H], halved
    int* lengths;            // [2][queries], 0 of rows that are not scored
    int* first;              // [DECODE_GROUPS + 1] pages of the groups before
    int* rows;               // [DECODE_GROUPS + 1] rows of the groups before
    int* needed;             // [DECODE_GROUPS] pages with a position that is scored
    int* request;            // [DECODE_GROUPS] as in the block table, -1 of padding
    int* totals;             // [DECODE_THREADS / 32]

    __device__ Shared(unsigned char* raw, int stages, int n) {
        keys = raw + (1024 - sm90::smem(raw) % 1024) % 1024;
        queries = keys + stages * PAIR * TILE * DIM;
        scales = reinterpret_cast<float*>(queries + 2 * n * H * DIM);
        stage = reinterpret_cast<Stage*>(scales + stages * PAIR * TILE);
        full = reinterpret_cast<uint64_t*>(stage + stages);
        empty = full + stages;
        q_full = empty + stages;
        q_empty = q_full + 2;
        weights = reinterpret_cast<float*>(q_empty + 2);
        lengths = reinterpret_cast<int*>(weights + 2 * n * H);
        first = lengths + 2 * n;
        rows = first + DECODE_GROUPS + 1;
        needed = rows + DECODE_GROUPS + 1;
        request = needed + DECODE_GROUPS;
        totals = request + DECODE_GROUPS;
    }
};

// The CTA's pages, in runs of one group.
struct Walk {
    const int* first;
    int at, end, group, segment;

    __device__ Walk(const int* first, int groups, int at, int end) : first(first), at(at), end(end), segment(-1) {
        int low = 0, high = groups;  // The last group that starts at or before `at`.
        while (high - low > 1) {
            const int mid = (low + high) / 2;
            (first[mid] <= at ? low : high) = mid;
        }
        group = low - 1;
    }

    // The next run of at most `most` pages of one group: its first page there, and how many; 0 at the end.
    __device__ int next(int most, int& page) {
        if (at >= end) return 0;
        if (segment < 0 || first[group + 1] <= at) {
            do ++group;
            while (first[group + 1] <= at);
            ++segment;
        }
        page = at - first[group];
        const int n = min(most, min(end, first[group + 1]) - at);
        at += n;
        return n;
    }
};

// Every CTA makes the same plan: groups of rows, the pages of each and of those before it. Returns how many groups.
template <int H>
__device__ inline int plan(const Shared<H>& s, const Decode& p, bool all, int skip) {
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const KeyMap& map = p.ix.map;
    int groups;
    if (!map.row_request) {
        groups = p.rows / p.queries;
        if (tid <= groups) s.rows[tid] = tid * p.queries;
        if (tid < groups) s.request[tid] = int(p.first) / p.queries + tid;
    } else {
        // A run of rows of one request is cut into groups, every `queries`-th row from its first.
        const bool is_row = tid < p.rows;
        const int request = is_row ? int(request_of(map, p.first + tid)) : 0;
        const bool new_run = is_row && (tid == 0 || request_of(map, p.first + tid - 1) != request);
        const unsigned runs = __ballot_sync(~0u, new_run), here = runs & ~0u >> (31 - lane);
        if (lane == 0) s.totals[warp] = runs ? warp * 32 + 31 - __clz(runs) : 0;
        __syncthreads();
        int run = __reduce_max_sync(~0u, lane < warp ? s.totals[lane] : 0);
        if (here) run = warp * 32 + 31 - __clz(here);
        const bool starts = is_row && (tid - run) % p.queries == 0;
        const unsigned all_starts = __ballot_sync(~0u, starts);
        __syncthreads();
        if (lane == 0) s.totals[warp] = __popc(all_starts);
        __syncthreads();
        const int n = lane < DECODE_THREADS / 32 ? s.totals[lane] : 0;
        const int group = __reduce_add_sync(~0u, lane < warp ? n : 0) + __popc(all_starts & ((1u << lane) - 1));
        groups = __reduce_add_sync(~0u, n);
        if (starts) {
            s.rows[group] = tid;
            s.request[group] = request;
        }
        if (tid == 0) s.rows[groups] = p.rows;
    }
    __syncthreads();
    int pages = 0;
    if (tid < groups) {
        int longest = 0;
#pragma unroll 1
        for (int row = s.rows[tid]; row < s.rows[tid + 1]; ++row) {
            const int length = decode_length(map, p.first + row);
            if (length > skip) longest = max(longest, length);
        }
        const int needed = (longest + TILE - 1) / TILE;
        s.needed[tid] = needed;
        pages = all ? int((p.columns + TILE - 1) / TILE) : needed;
    }
    int sum = lanes_upto(pages, lane);
    if (lane == 31) s.totals[warp] = sum;
    __syncthreads();
    sum += __reduce_add_sync(~0u, lane < warp ? s.totals[lane] : 0);
    if (tid < groups) s.first[tid + 1] = sum;
    if (tid == 0) s.first[0] = 0;
    __syncthreads();
    return groups;
}

template <int H>
__device__ inline void decode_scores(const Decode& p, const sm90::TensorMap& k_map, const sm90::TensorMap& q_map) {
    extern __shared__ unsigned char raw[];
    const Shared<H> s(raw, p.stages, p.queries);
    const int tid = threadIdx.x, warp = __shfl_sync(~0u, tid / 32, 0), lane = tid % 32;
    const KeyMap& map = p.ix.map;
    const bool all = !p.out;
    const int skip = all ? 0 : p.k;

    if (tid == DECODE_THREADS - 1) {
        sm90::prefetch_map(k_map);
        sm90::prefetch_map(q_map);
#pragma unroll 1
        for (int i = 0; i < p.stages; ++i) {
            sm90::init(&s.full[i], 33);
            sm90::init(&s.empty[i], 4);
        }
        for (int i = 0; i < 2; ++i) {
            sm90::init(&s.q_full[i], 2);
            sm90::init(&s.q_empty[i], 4 * GROUPS);
        }
        sm90::init_done();
    }
    sm90::wait_for_previous();
    const int groups = plan(s, p, all, skip);
    sm90::launch_dependents();
    const int64_t total = s.first[groups];
    const int begin = int(total * blockIdx.x / gridDim.x), end = int(total * (blockIdx.x + 1) / gridDim.x);
    if (begin == end) return;

    if (warp == 4 * GROUPS) {
        // Copies pages, their scales by the lanes themselves. Page numbers are read a run ahead.
        Walk walk(s.first, groups, begin, end);
        const uint64_t policy = sm90::once();
        int stage = 0;
        uint32_t parity = 1;
        struct Run {
            int n, page, group, segment, number;
        };
        auto read = [&] {
            Run r;
            r.n = walk.next(32, r.page);
            r.group = walk.group;
            r.segment = walk.segment;
            r.number = -1;
            if (lane < r.n && r.page + lane < s.needed[r.group]) {
                r.number = map.block_table[s.request[r.group] * map.table_stride + r.page + lane];
            }
            if (r.number >= map.pages) r.number = -1;
            return r;
        };
        auto put = [&](const Stage& is, int number0, int number1) {
            sm90::wait(&s.empty[stage], parity);
            uint64_t* full = &s.full[stage];
            if (lane == 0) {
                s.stage[stage] = is;
                sm90::arrive_expect(full, ((number0 >= 0) + (number1 >= 0)) * TILE * DIM);
                unsigned char* keys = s.keys + stage * PAIR * TILE * DIM;
                if (number0 >= 0) sm90::copy_box(keys, k_map, 0, 0, number0, full, policy);
                if (number1 >= 0) sm90::copy_box(keys + TILE * DIM, k_map, 0, 0, number1, full, policy);
            }
            const int number = lane < 16 ? number0 : number1;
            if (number >= 0) {
                const char* scales = static_cast<const char*>(p.ix.scales) + number * p.ix.scale_page_bytes;
                sm90::copy_16(s.scales + stage * PAIR * TILE + lane * 4, scales + lane % 16 * 16);
            }
            sm90::arrive_after_copies(full);
            if (++stage == p.stages) {
                stage = 0;
                parity ^= 1;
            }
        };
        Run now = read();
        int last = 0;
#pragma unroll 1
        while (now.n) {
            const Run next = read();
#pragma unroll 1
            for (int i = 0; i < now.n; i += PAIR) {
                const int number0 = __shfl_sync(~0u, now.number, i), second = __shfl_sync(~0u, now.number, i + 1);
                const int pages = min(PAIR, now.n - i), number1 = pages > 1 ? second : -1;
                const int there = (number0 >= 0 ? 0x100 : 0) | (number1 >= 0 ? 0x200 : 0);
                put({now.segment, now.group, now.page + i, pages | there}, number0, number1);
            }
            last = now.segment;
            now = next;
        }
#pragma unroll 1
        for (int g = 0; g < GROUPS; ++g) put({last, 0, 0, 0}, -1, -1);
    } else if (warp == 4 * GROUPS + 1) {
        // Queries, weights and lengths of each group, two ahead.
        Walk walk(s.first, groups, begin, end);
        int page;
#pragma unroll 1
        while (walk.next(1 << 30, page)) {
            const int slot = walk.segment % 2, n = p.queries * H;
            const int first = s.rows[walk.group], rows = s.rows[walk.group + 1] - first;
            const int64_t row = p.first + first;
            sm90::wait(&s.q_empty[slot], walk.segment / 2 % 2 ^ 1);
            if (lane == 0) {
                sm90::arrive_expect(&s.q_full[slot], n * DIM);
                sm90::copy_box(s.queries + slot * n * DIM, q_map, 0, 0, int(row), &s.q_full[slot]);
            }
#pragma unroll 2
            for (int i = lane; i < rows * H; i += 32) {
                const int h = i % H;
                float w = 0.0f;
                if (h < p.ix.heads) w = 0.5f * p.ix.weights[(row + i / H) * p.ix.weights_row + h];
                s.weights[slot * n + i] = w;
            }
            if (lane < rows) {
                const int length = decode_length(map, row + lane);
                s.lengths[slot * p.queries + lane] = length > skip ? length : 0;
            }
            __syncwarp();
            if (lane == 0) sm90::arrive(&s.q_full[slot]);
        }
    } else {
        // At the end, each lane of a quad has one key of the quad's four: of page `which`, that page's `key`-th.
        const int which = lane / 2 % 2, key = warp % 4 * 16 + lane / 4 + lane % 2 * 8;
        const uint32_t keys = sm90::descriptor_low(s.keys), queries = sm90::descriptor_low(s.queries);
        int stage = warp / 4, segment = -1, rows = 0;
        uint32_t parity = 0;
        // Where this thread's key has its score and its eight their best, for the group's first row and page.
        uint32_t *scores = nullptr, *tops = nullptr;
        for (;;) {
            sm90::wait(&s.full[stage], parity);
            const Stage is = s.stage[stage];
            if (segment != is.segment) {
                // A warpgroup passes through all segments, also those of which it has no page.
                do {
                    if (segment >= 0 && lane == 0) sm90::arrive(&s.q_empty[segment % 2]);
                    ++segment;
                    sm90::wait(&s.q_full[segment % 2], segment / 2 % 2);
                } while (segment != is.segment);
                const int64_t row = s.rows[is.group];
                rows = s.rows[is.group + 1] - int(row);
                scores = p.scores + row * p.scores_row + which * TILE + key;
                tops = p.tops + row * p.tops_row + which * (TILE / 8) + warp % 4 * 2 + lane % 2;
            }
            if (is.pages == 0) break;

            const int from = is.page * TILE, at = from + which * TILE + key, first = segment % 2 * p.queries;
            const float scale = s.scales[(stage * PAIR + which) * TILE + key];
            const bool mine = which < (is.pages & 0xff), there = is.pages >> (8 + which) & 1;
            uint32_t *score_to = scores + from, *top_to = tops + is.page * (TILE / 8);
#pragma unroll 1
            for (int q = 0; q < rows; ++q) {
                const int length = s.lengths[first + q];
                if (all || from < length) {
                    float d[PAIR][H / 2];
                    const uint32_t a = keys + stage * (PAIR * TILE * DIM / 16), b = queries + (first + q) * (H * DIM / 16);
                    sm90::wgmma_begin();
#pragma unroll
                    for (int t = 0; t < PAIR; ++t) {
#pragma unroll
                        for (int i = 0; i < DIM / 32; ++i) sm90::wgmma(d[t], a + t * (TILE * DIM / 16) + 2 * i, b + 2 * i, i > 0);
                    }
                    sm90::wgmma_end(d);
                    // One order for every score: a thread's heads ascending, odd and even ones apart; then the quad.
                    const float2* w = reinterpret_cast<const float2*>(s.weights + (first + q) * H) + lane % 4;
                    float sum[PAIR][4] = {};  // Of the upper row and the lower one.
#pragma unroll
                    for (int j = 0; j < H / 8; ++j) {
                        const float2 x = w[4 * j];
#pragma unroll
                        for (int t = 0; t < PAIR; ++t) {
#pragma unroll
                            for (int i = 0; i < 4; ++i) {
                                sum[t][i] = fmaf(i % 2 ? x.y : x.x, twice_relu(d[t][4 * j + i]), sum[t][i]);
                            }
                        }
                    }
                    // The quad's lanes 0 and 1 take the first page, 2 and 3 the second; then upper row and lower one.
                    float half[2];
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const float one = sum[0][2 * r] + sum[0][2 * r + 1], two = sum[1][2 * r] + sum[1][2 * r + 1];
                        half[r] = (which ? two : one) + __shfl_xor_sync(~0u, which ? one : two, 2);
                    }
                    const bool lower = lane % 2;
                    float score = (lower ? half[1] : half[0]) + __shfl_xor_sync(~0u, lower ? half[0] : half[1], 1);
                    score *= scale;
                    if (!there || at >= length) score = -INFINITY;
                    if (all) {
                        // One NaN and one zero.
                        score = isnan(score) ? __uint_as_float(0x7fc00000) : score + 0.0f;
                        if (mine && at < p.columns) *score_to = __float_as_uint(score);
                    } else {
                        uint32_t rank = at < length ? rank_of(score) : 0;
                        if (mine) *score_to = rank;
#pragma unroll
                        for (int i = 4; i < 32; i *= 2) rank = max(rank, __shfl_xor_sync(~0u, rank, i));
                        if (mine && lane < 4) *top_to = rank;
                    }
                }
                score_to += p.scores_row;
                top_to += p.tops_row;
            }
            __syncwarp();
            if (lane == 0) sm90::arrive(&s.empty[stage]);
            stage += GROUPS;
            if (stage == p.stages + warp / 4) {
                stage = warp / 4;
                parity ^= 1;
            }
        }
    }
}

KERNEL(DECODE_THREADS) decode_scores_16(PARAMS Decode p, PARAMS sm90::TensorMap k, PARAMS sm90::TensorMap q) {
    decode_scores<16>(p, k, q);
}
KERNEL(DECODE_THREADS) decode_scores_32(PARAMS Decode p, PARAMS sm90::TensorMap k, PARAMS sm90::TensorMap q) {
    decode_scores<32>(p, k, q);
}
KERNEL(DECODE_THREADS) decode_scores_64(PARAMS Decode p, PARAMS sm90::TensorMap k, PARAMS sm90::TensorMap q) {
    decode_scores<64>(p, k, q);
}

// --- Selection: a CTA a row. One multiprocessor does it all, so what counts is the number of instructions.

constexpr int SELECT_THREADS = 1024;
constexpr int BINS = 2 * SELECT_THREADS;
constexpr int FEW = 128;                      // So many candidates are counted out one against the other.
constexpr int CANDIDATES = 16384;
constexpr int EIGHTS = 9216;                  // Whose best reaches the bound.
constexpr int WINDOW = 128 * SELECT_THREADS;  // Positions put in order at a time.

// src/backend/cuda/decode.rs has its size.
struct SelectShared {
    uint32_t ranks[CANDIDATES];
    int32_t positions[CANDIDATES];
    int32_t eights[EIGHTS];
    uint32_t over[WINDOW / 32];   // Positions above the k-th best,
    uint32_t equal[WINDOW / 32];  // and equal to it.
    uint32_t bins[BINS];
    uint32_t few[FEW];
    uint32_t warp[SELECT_THREADS / 32];
    uint32_t low, high;
    int bin, want, in_bin, found, eights_n, candidates;
};
static_assert(sizeof(SelectShared) == 209568, "decode.rs");

// Sum over the warp's lanes before this one.
__device__ inline uint32_t lanes_before(uint32_t x, uint32_t& all) {
    const uint32_t sum = lanes_upto(x, threadIdx.x % 32);
    all = __shfl_sync(~0u, sum, 31);
    return sum - x;
}

// Sum over the threads before this one. All threads call, after a barrier since the last time.
__device__ inline uint32_t threads_before(SelectShared& s, uint32_t x, uint32_t& all) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t of_warp;
    const uint32_t before = lanes_before(x, of_warp);
    if (lane == 0) s.warp[warp] = of_warp;
    __syncthreads();
    const uint32_t total = s.warp[lane];
    all = __reduce_add_sync(~0u, total);
    return before + __reduce_add_sync(~0u, lane < warp ? total : 0);
}

// Where this lane's `n` entries go in an unordered list.
__device__ inline int take(int* count, int n) {
    uint32_t all;
    const int before = lanes_before(n, all);
    int start = 0;
    if (threadIdx.x % 32 == 0 && all) start = atomicAdd(count, all);
    return __shfl_sync(~0u, start, 0) + before;
}

// Rank of the k-th best of `n`, and how many of its equals are among the k best. Ranks outside [low, high] do not count.
// With `near` a lower bound will do for the rank, but where too many are equal it is exact.
__device__ __noinline__ uint2 kth_best(SelectShared& s, const uint32_t* ranks, int n, int k, uint32_t low, uint32_t high,
                                       bool near) {
    const int tid = threadIdx.x;
    for (;;) {
        const int shift = max(0, 21 - __clz(high - low));  // 2048 bins cover the range.
        __syncthreads();
        s.bins[tid] = s.bins[tid + SELECT_THREADS] = 0;
        if (tid == 0) s.found = 0;
        __syncthreads();
#pragma unroll 4
        for (int i = tid; i < n; i += SELECT_THREADS) {
            const uint32_t above = ranks[i] - low;
            if (above <= high - low) atomicAdd(&s.bins[above >> shift], 1);
        }
        __syncthreads();
        // From the top, two bins a thread.
        const int top = BINS - 1 - 2 * tid;
        const uint32_t a = s.bins[top], b = s.bins[top - 1];
        uint32_t all;
        const uint32_t before = threads_before(s, a + b, all), want = k;
        if (before < want && want <= before + a + b) {
            const bool first = want <= before + a;
            s.bin = first ? top : top - 1;
            s.want = want - before - (first ? 0 : a);
            s.in_bin = first ? a : b;
        }
        __syncthreads();
        low += uint32_t(s.bin) << shift;
        high = min(high, low + ((1u << shift) - 1));
        k = s.want;
        const int count = s.in_bin;
        if (shift == 0 || (near && count <= FEW)) return make_uint2(low, k);
        if (count > FEW) continue;
#pragma unroll 4
        for (int i = tid; i < n; i += SELECT_THREADS) {
            const uint32_t rank = ranks[i];
            if (rank - low <= high - low) s.few[atomicAdd(&s.found, 1)] = rank;
        }
        __syncthreads();
        if (tid < count) {
            const uint32_t rank = s.few[tid];
            int over = 0, equal = 0;
#pragma unroll 4
            for (int i = 0; i < count; ++i) {
                over += s.few[i] > rank;
                equal += s.few[i] == rank;
            }
            if (over < k && k <= over + equal) {  // Threads with the same rank write the same.
                s.low = rank;
                s.want = k - over;
            }
        }
        __syncthreads();
        return make_uint2(s.low, s.want);
    }
}

// Writes the marked positions: those above the k-th best and the first `ties` equal to it, ascending, of the window
// that starts at `from`. `before`: how many over and equal there were in the windows before; returned with this one's.
__device__ __noinline__ uint2 emit(SelectShared& s, int from, uint32_t ties, int32_t* out, uint2 before) {
    const int tid = threadIdx.x;
    __syncthreads();
    uint32_t n = 0, all;  // Fewer than k over, at most a window equal.
#pragma unroll
    for (int i = 0; i < 4; ++i) n += (__popc(s.over[4 * tid + i]) << 18) + __popc(s.equal[4 * tid + i]);
    n = threads_before(s, n, all);
    uint32_t x = before.x + (n >> 18), y = before.y + (n & 0x3ffff);
#pragma unroll 1
    for (int i = 4 * tid; i < 4 * tid + 4; ++i) {
        const uint32_t higher = s.over[i];
#pragma unroll 1
        for (uint32_t bits = higher | s.equal[i]; bits; bits &= bits - 1) {
            const bool is_over = higher & bits & -bits;
            if (is_over || y < ties) out[x + min(y, ties)] = from + i * 32 + __ffs(bits) - 1;
            x += is_over;
            y += !is_over;
        }
    }
    __syncthreads();
    return make_uint2(before.x + (all >> 18), before.y + (all & 0x3ffff));
}

KERNEL(SELECT_THREADS) decode_topk(PARAMS Decode p) {
    extern __shared__ __align__(16) unsigned char select_raw[];
    SelectShared& s = *reinterpret_cast<SelectShared*>(select_raw);
    const int tid = threadIdx.x, lane = tid % 32, k = p.k;
    const int64_t row = p.first + blockIdx.x;
    const int length = decode_length(p.ix.map, row);
    int32_t* out = p.out + row * p.out_row;
    const uint32_t* ranks = p.scores + int64_t(blockIdx.x) * p.scores_row;  // 0 from `length` to the end of its page.
    const uint32_t* tops = p.tops + int64_t(blockIdx.x) * p.tops_row;
    if (tid == 0) {
        s.low = ~0u;
        s.high = 0;
    }
    __syncthreads();
    sm90::wait_for_previous();
    if (length <= k) {
        for (int i = tid; i < k; i += SELECT_THREADS) out[i] = i < length ? i : -1;
        return;
    }

    // The ranks of a short row; else bounds, each the best of every 8192nd eight, or 4096th.
    const bool direct = length <= CANDIDATES;
    const int n_tops = (length + 7) / 8, rounds = direct ? 1 : (n_tops + 16 * SELECT_THREADS - 1) / (16 * SELECT_THREADS);
    const int n_read = direct ? length : n_tops;
    const uint4* read = reinterpret_cast<const uint4*>(direct ? ranks : tops);
    Four x[4], bounds[2] = {};
    auto load = [&](int round) {
#pragma unroll
        for (int u = 0; u < 4; ++u) {
            const int at = (round * 4 + u) * SELECT_THREADS + tid;
            x[u].all = make_uint4(0, 0, 0, 0);
            if (4 * at < n_read) x[u].all = read[at];
        }
    };
    uint4* shared_ranks = reinterpret_cast<uint4*>(s.ranks) + tid;
    uint4* shared_tops = reinterpret_cast<uint4*>(s.positions) + tid;  // Positions come later.
    uint32_t low = ~0u, high = 0;
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
        load(round);
        bounds[0].all = max4(bounds[0].all, max4(x[0].all, x[2].all));
        bounds[1].all = max4(bounds[1].all, max4(x[1].all, x[3].all));
    }
    const bool fold = k <= 2 * SELECT_THREADS;
    if (direct) {
#pragma unroll
        for (int u = 0; u < 4; ++u) {
            shared_ranks[u * SELECT_THREADS] = x[u].all;
#pragma unroll
            for (int i = 0; i < 4; ++i) low = min(low, x[u].rank[i] - 1);  // 0 is none.
        }
    } else {
#pragma unroll
        for (int u = 0; u < 4; ++u) shared_tops[u * SELECT_THREADS] = x[u].all;
        if (fold) bounds[0].all = max4(bounds[0].all, bounds[1].all);
        shared_ranks[0] = bounds[0].all;
        shared_ranks[SELECT_THREADS] = bounds[1].all;
#pragma unroll
        for (int i = 0; i < 4; ++i) low = min(low, min(bounds[0].rank[i] - 1, bounds[1].rank[i] - 1));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) high = max(high, max(bounds[0].rank[i], bounds[1].rank[i]));
    join_range(s.low, s.high, low, high, lane);

    int n = direct ? CANDIDATES : (fold ? 4 : 8) * SELECT_THREADS;
    uint2 best = make_uint2(0, 0);  // The k-th best, and its equals.
    bool listed = direct, known = direct;
    if (direct || min(n_tops, n) >= k) best = kth_best(s, s.ranks, n, k, low, high, !direct);
    const uint32_t bound = best.x;
    if (!direct && bound) {
        // At least k ranks reach the bound. If too many do, those above it say whether its equals matter.
#pragma unroll 1
        for (uint32_t least = bound; least <= bound + 1; ++least) {
            __syncthreads();
            if (tid == 0) s.eights_n = s.candidates = 0;
            __syncthreads();
#pragma unroll 1
            for (int round = 0; round < rounds; ++round) {
                if (rounds > 1) load(round);
                uint32_t mask = 0;
#pragma unroll
                for (int u = 0; u < 4; ++u) {
                    if (rounds == 1) x[u].all = shared_tops[u * SELECT_THREADS];
#pragma unroll
                    for (int i = 0; i < 4; ++i) mask |= x[u].rank[i] >= least ? 1u << (4 * u + i) : 0;
                }
                const int many = __popc(mask);
                int to = take(&s.eights_n, many);
                if (to + many > EIGHTS) mask = 0;
#pragma unroll 1
                for (; mask; mask &= mask - 1) {
                    const int i = __ffs(mask) - 1;
                    s.eights[to++] = ((round * 4 + i / 4) * SELECT_THREADS + tid) * 4 + i % 4;
                }
            }
            __syncthreads();
            if (s.eights_n > EIGHTS) continue;
            // Half an eight a thread, five of them at a time.
            const int items = 2 * s.eights_n;
#pragma unroll 1
            for (int base = tid; base - tid < items; base += 5 * SELECT_THREADS) {
                Four y[5];
                int at[5], many = 0;
#pragma unroll
                for (int u = 0; u < 5; ++u) {
                    const int i = base + u * SELECT_THREADS;
                    y[u].all = make_uint4(0, 0, 0, 0);
                    at[u] = 0;
                    if (i < items) {
                        at[u] = s.eights[i / 2] * 8 + i % 2 * 4;
                        y[u].all = *reinterpret_cast<const uint4*>(ranks + at[u]);
                    }
                }
#pragma unroll
                for (int i = 0; i < 20; ++i) many += y[i / 4].rank[i % 4] >= least;
                int to = take(&s.candidates, many);
                if (!many || to + many > CANDIDATES) continue;
#pragma unroll
                for (int i = 0; i < 20; ++i) {
                    if (y[i / 4].rank[i % 4] >= least) {
                        s.ranks[to] = y[i / 4].rank[i % 4];
                        s.positions[to++] = at[i / 4] + i % 4;
                    }
                }
            }
            __syncthreads();
            n = s.candidates;
            listed = n >= k && n <= CANDIDATES;
            known = n < k;  // Then the bound is the k-th best.
            if (listed || known) break;
            if (rounds == 1) {
#pragma unroll
                for (int u = 0; u < 4; ++u) {
                    const int i = u * SELECT_THREADS + tid;
                    if (4 * i < n_tops) shared_tops[u * SELECT_THREADS] = reinterpret_cast<const uint4*>(tops)[i];
                }
            }
        }
        if (known) best = make_uint2(bound, k - n);
    }
    uint2 before = make_uint2(0, 0);
    if (listed) {
        if (!direct) best = kth_best(s, s.ranks, n, k, bound, high, false);
#pragma unroll 1
        for (int from = 0; from < length; from += WINDOW) {
            reinterpret_cast<uint4*>(s.over)[tid] = reinterpret_cast<uint4*>(s.equal)[tid] = make_uint4(0, 0, 0, 0);
            __syncthreads();
#pragma unroll 1
            for (int i = tid; i < n; i += SELECT_THREADS) {
                const uint32_t rank = s.ranks[i], at = (direct ? i : s.positions[i]) - from;
                if (rank >= best.x && at < WINDOW) atomicOr(&(rank > best.x ? s.over : s.equal)[at / 32], 1u << at % 32);
            }
            before = emit(s, from, best.y, out, before);
        }
        return;
    }
    // A row that bounds do not thin out: all its ranks, as often as it takes.
    if (!known) best = kth_best(s, ranks, length, k, bound, high, false);
#pragma unroll 1
    for (int from = 0; from < length; from += WINDOW) {
#pragma unroll 4
        for (int i = tid; i < WINDOW; i += SELECT_THREADS) {
            const uint32_t rank = from + i < length ? ranks[from + i] : 0;
            const unsigned higher = __ballot_sync(~0u, rank > best.x), same = __ballot_sync(~0u, rank == best.x);
            if (lane == 0) {
                s.over[i / 32] = higher;
                s.equal[i / 32] = same;
            }
        }
        before = emit(s, from, best.y, out, before);
    }
}
