// Checks and times kernels/decode_sm90.cu and kernels/decode_few_sm90.cu alone. Build and run:
//   nvcc -std=c++17 -O3 -lineinfo -gencode=arch=compute_90a,code=sm_90a -o decode_sm90 kernels/bench/decode_sm90.cu
//   ./decode_sm90 [small] [check] [topk] [time] [profile]
// Scores against an f64 reference; selections against a sort of the kernel's own scores; every case twice, same bits.
// FEW=0 PICKS=0: without the kernels for a few rows, or for others than src/backend/cuda/decode.rs has it.
#include <cuda.h>
#include <cuda_runtime.h>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../decode_few_sm90.cu"
#include "../decode_sm90.cu"

#define OK(x)                                                                                     \
    do {                                                                                          \
        cudaError_t e_ = (x);                                                                     \
        if (e_ != cudaSuccess) {                                                                  \
            printf("%s:%d %s\n", __FILE__, __LINE__, cudaGetErrorString(e_));                     \
            exit(2);                                                                              \
        }                                                                                         \
    } while (0)

constexpr int64_t PAGE_BYTES = TILE * (DIM + 4);
static int sms, failures;

template <class T>
struct Dev {
    T* p = nullptr;
    size_t n = 0;
    Dev() = default;
    Dev(size_t n) : n(n) { OK(cudaMalloc(&p, std::max<size_t>(n, 1) * sizeof(T))); }
    Dev(const std::vector<T>& v) : Dev(v.size()) { set(v); }
    Dev(Dev&& o) : p(o.p), n(o.n) { o.p = nullptr; }
    Dev& operator=(Dev&& o) {
        std::swap(p, o.p);
        std::swap(n, o.n);
        return *this;
    }
    ~Dev() { cudaFree(p); }
    void set(const std::vector<T>& v) { OK(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice)); }
    std::vector<T> get() const {
        std::vector<T> v(n);
        OK(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
        return v;
    }
};

__device__ inline uint32_t hash(uint64_t x) {
    x ^= x >> 31;
    x *= 0x7fb5d329728ea185ull;
    x ^= x >> 27;
    x *= 0x81dadef4bc2dd44dull;
    return uint32_t(x >> 32);
}

// About normal: the sum of four uniforms.
__device__ inline float normal(uint64_t i, uint64_t seed) {
    float x = 0;
    for (int j = 0; j < 4; ++j) x += hash(4 * i + j + (seed << 40)) * 0x1p-32f - 0.5f;
    return x * 1.732f;
}

__global__ void fill_codes(uint8_t* p, int64_t n, uint64_t seed) {
    for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < n; i += 256ll * gridDim.x) {
        p[i] = f32_to_e4m3(4.0f * normal(i, seed));
    }
}

__global__ void fill_pages(uint8_t* pages, int64_t n, uint64_t seed) {
    for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < n * PAGE_BYTES / 4; i += 256ll * gridDim.x) {
        uint32_t word = 0;
        if (i * 4 % PAGE_BYTES < TILE * DIM) {
            // A fast one: bits of a hash, exponents kept small.
            word = hash(i + (seed << 40)) & 0xbfbfbfbf;
        } else {
            word = __float_as_uint(0.5f + hash(i + (seed << 40)) * 0x1p-32f);
        }
        reinterpret_cast<uint32_t*>(pages)[i] = word;
    }
}

__global__ void read_all(const uint4* p, int64_t n, uint32_t* out) {
    uint32_t x = 0;
    int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x, step = int64_t(gridDim.x) * blockDim.x;
    for (; i + 3 * step < n; i += 4 * step) {
        uint4 a = __ldcs(p + i), b = __ldcs(p + i + step), c = __ldcs(p + i + 2 * step), d = __ldcs(p + i + 3 * step);
        x ^= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
    }
    if (x == 0x12345678) *out = x;
}

// One thread a score.
__global__ void reference(Decode p, double* out, int64_t columns) {
    const int64_t row = blockIdx.y, at = blockIdx.x * 128ll + threadIdx.x;
    if (at >= columns) return;
    double sum = -INFINITY;
    Place place;
    if (at < length_of(p.ix.map, row) && find(p.ix.map, request_of(p.ix.map, row), 0, at, place)) {
        sum = 0;
        const uint8_t* k = static_cast<const uint8_t*>(p.ix.keys) + place.page * p.ix.page_bytes + place.at * DIM;
        for (int h = 0; h < p.ix.heads; ++h) {
            const uint8_t* q = static_cast<const uint8_t*>(p.ix.q) + row * p.ix.q_row + h * p.ix.q_head;
            double dot = 0;
            for (int d = 0; d < DIM; ++d) dot += double(e4m3_to_f32(q[d])) * e4m3_to_f32(k[d]);
            sum += double(p.ix.weights[row * p.ix.weights_row + h]) * (dot < 0 ? 0 : dot);
        }
        sum *= *reinterpret_cast<const float*>(static_cast<const char*>(p.ix.scales) +
                                               place.page * p.ix.scale_page_bytes + 4 * place.at);
    }
    out[row * columns + at] = sum;
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

static sm90::TensorMap make_map(const void* base, uint64_t y, uint64_t z, uint64_t y_bytes, uint64_t z_bytes, uint32_t box_y,
                          uint32_t box_z) {
    static Encode encode = [] {
        void* f = nullptr;
        cudaDriverEntryPointQueryResult r;
        OK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &r));
        return reinterpret_cast<Encode>(f);
    }();
    sm90::TensorMap map;
    cuuint64_t shape[3] = {DIM, y, z}, strides[2] = {y_bytes, z_bytes};
    cuuint32_t box[3] = {DIM, box_y, box_z}, steps[3] = {1, 1, 1};
    CUresult r = encode(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<void*>(base),
                        shape, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (r != CUDA_SUCCESS) {
        printf("cuTensorMapEncodeTiled: %d\n", int(r));
        exit(2);
    }
    return map;
}

using Scores = void (*)(Decode, sm90::TensorMap, sm90::TensorMap);

static bool no_pdl = getenv("NO_PDL") != nullptr;

template <class... Params>
static void launch(void (*kernel)(Params...), int grid, int threads, size_t shared, cudaStream_t stream, bool early,
                   const Params&... params) {
    OK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    OK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100));
    cudaLaunchConfig_t c = {};
    c.gridDim = grid;
    c.blockDim = threads;
    c.dynamicSmemBytes = shared;
    c.stream = stream;
    cudaLaunchAttribute a = {};
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
    c.attrs = &a;
    c.numAttrs = early && !no_pdl;
    OK(cudaLaunchKernelEx(&c, kernel, params...));
}

static int most_stages = getenv("STAGES") ? atoi(getenv("STAGES")) : 8;

struct Call : Decode {
    sm90::TensorMap k_map, q_map, all_map;  // `all_map`: of all rows at once, if they are few.
};

// Most rows that are few, for scores and for top-k.
static int few_rows = getenv("FEW") ? atoi(getenv("FEW")) : 4, few_picks = getenv("PICKS") ? atoi(getenv("PICKS")) : 8;

static void run(Call& p, cudaStream_t stream, int what = 3) {
    const int heads = p.ix.heads <= 16 ? 16 : p.ix.heads <= 32 ? 32 : 64, parts = std::min(sms, 128);
    const int64_t longest = std::min(1 << 18, 2048 * parts);
    const bool picks = p.out && p.rows <= few_picks && p.k <= 2048 && p.columns <= longest, few = picks && p.rows <= few_rows;
    Call q = p;
    size_t shared;
    q.eights = !few;
    if (few) {
        q.stages = 8;
        q.tops_row = parts * BESTS;
        if (p.ix.map.row_request) q.queries = 1;
        q.q_map = q.all_map;
        shared = 1024 + p.rows * (heads * (DIM + 4) + 4 * BESTS + 4) + 16 + q.stages * (PAGE_BYTES + 32);
        const Scores kernel = heads == 16 ? few_scores_16 : heads == 32 ? few_scores_32 : few_scores_64;
        if (what & 1) launch(kernel, parts, SCORE_BLOCK, shared, stream, true, static_cast<Decode&>(q), q.k_map, q.q_map);
    } else {
        const Scores kernel = heads == 16 ? decode_scores_16 : heads == 32 ? decode_scores_32 : decode_scores_64;
        const int fixed = 1024 + 2 * p.queries * (heads * (DIM + 4) + 4) + 32 + 4 * (4 * DECODE_GROUPS + 2 + DECODE_THREADS / 32);
        const int stage = PAIR * PAGE_BYTES + sizeof(Stage) + 16;
        q.stages = std::min(most_stages, (232448 - fixed) / stage) / GROUPS * GROUPS;
        shared = fixed + q.stages * stage;
        if (what & 1) launch(kernel, sms, DECODE_THREADS, shared, stream, true, static_cast<Decode&>(q), q.k_map, q.q_map);
    }
    if (!(what & 2) || !p.out) return;
    if (picks) {
        OK(cudaFuncSetAttribute(few_topk, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
        shared = sizeof(PickShared) + (p.columns + ROUND - 1) / ROUND * PICK_THREADS * 16;
        launch(few_topk, p.rows * CLUSTER, PICK_THREADS, shared, stream, true, static_cast<Decode&>(q));
    } else {
        launch(decode_topk, p.rows, SELECT_THREADS, sizeof(SelectShared), stream, true, static_cast<Decode&>(q));
    }
}

static uint32_t rank_on_host(float x) {
    if (std::isnan(x)) x = -INFINITY;
    x += 0.0f;
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits >> 31 ? ~bits : bits | 0x80000000;
}

static std::vector<int> best(const float* scores, int n, int k) {
    std::vector<int> order(n);
    for (int i = 0; i < n; ++i) order[i] = i;
    if (n > k) {
        std::vector<uint32_t> rank(n);
        for (int i = 0; i < n; ++i) rank[i] = rank_on_host(scores[i]);
        std::nth_element(order.begin(), order.begin() + k, order.end(),
                         [&](int a, int b) { return rank[a] != rank[b] ? rank[a] > rank[b] : a < b; });
        order.resize(k);
        std::sort(order.begin(), order.end());
    }
    order.resize(k, -1);
    return order;
}

static void expect(bool ok, const std::string& what) {
    if (!ok) ++failures;
    if (!ok && failures < 40) printf("FAIL %s\n", what.c_str());
}

// --- Selection from given scores.

static void check_topk() {
    std::mt19937 rng(7);
    std::normal_distribution<float> normal;
    int cases = 0;
    const int before = failures;
    for (int n : {1, 511, 513, 2047, 2048, 2049, 8191, 16383, 16384, 16385, 20001, 40000, 65536, 65537, 131072, 131073, 300001, 1000003}) {
        std::vector<float> base(n);
        for (float& x : base) x = normal(rng);
        struct Kind {
            const char* name;
            std::function<float(int)> f;
        };
        const Kind kinds[] = {
            {"random", [&](int i) { return base[i]; }},
            {"narrow", [&](int i) { return 1.0f + std::fmod(std::fabs(base[i]) * 0.0005f, 0.001f); }},
            {"64 levels", [&](int i) { return std::floor(base[i] * 8); }},
            {"99% zero", [&](int i) { return base[i] > 2.4f ? base[i] : 0.0f; }},
            {"zeros of both signs", [&](int i) { return base[i] > 0 ? 0.0f : -0.0f; }},
            {"all equal", [&](int) { return 3.5f; }},
            {"large", [&](int i) { return base[i] * 1e5f; }},
            {"denormal", [&](int i) { return base[i] * 1e-40f; }},
            {"negative", [&](int i) { return -std::fabs(base[i]) - 1; }},
            {"rising", [&](int i) { return float(i); }},
            {"falling", [&](int i) { return float(-i); }},
            {"hot region", [&](int i) { return base[i] + (i > n / 2 && i < n / 2 + 3000 ? 50 : 0); }},
            {"NaN and infinity", [&](int i) { return base[i] > 1.5f ? NAN : base[i] < -1.5f ? -INFINITY : base[i]; }},
        };
        const int64_t pages = (n + 63) / 64, columns = pages * 64;
        for (const Kind& kind : kinds) {
            std::vector<float> scores(columns, 1e30f);
            std::vector<uint32_t> tops(columns / 8, 0), few_tops(std::min(sms, 128) * BESTS, 0), ranks(columns, 0);
            for (int i = 0; i < n; ++i) {
                scores[i] = kind.f(i);
                ranks[i] = rank_on_host(scores[i]);
                tops[i / 8] = std::max(tops[i / 8], ranks[i]);
                // As `few_scores` finds them: by CTA, warp, and row of the warp's part of the product.
                const int parts = std::min(sms, 128), page = i / 64, bests = pages <= parts ? 8 : pages <= 2 * parts ? 4 : 2;
                const int warp = page / parts % GROUPS * 4 + i % 64 / 16, at = i % 8 % (bests / 2) * 2 + i / 8 % 2;
                uint32_t& best = few_tops[page % parts * BESTS + warp * bests + at];
                best = std::max(best, ranks[i]);
            }
            Dev<uint32_t> d_scores(ranks);
            Dev<uint32_t> d_tops(tops), d_few_tops(few_tops);
            Dev<int> table(std::vector<int>(pages, 0)), end(std::vector<int>(1, n));
            for (int k : {1, 512, 2048, 4096}) {
                if (n > 100000 && k == 512) continue;
                Dev<int> out(size_t(k) + 1), again(size_t(k) + 1);
                Call p = {};
                p.ix.map.block_table = table.p;
                p.ix.map.row_end = end.p;
                p.ix.map.table_stride = p.ix.map.max_pages = pages;
                p.ix.map.rows_per_request = p.ix.map.requests = 1;
                p.ix.map.pages = 1;
                p.ix.map.page = 64;
                p.scores = d_scores.p;
                p.tops = d_tops.p;
                p.scores_row = columns;
                p.tops_row = columns / 8;
                p.columns = columns;
                p.rows = p.queries = 1;
                p.k = k;
                p.out_row = k + 1;
                std::vector<int> want = best(scores.data(), n, k);
                want.push_back(0x77777777);
                for (int with : {0, 1, 2}) {
                    few_rows = with == 1, few_picks = with > 0;
                    p.tops = with == 1 ? d_few_tops.p : d_tops.p;
                    if (with && (k > 2048 || n > 1 << 18)) continue;
                    for (Dev<int>* o : {&out, &again}) {
                        OK(cudaMemset(o->p, 0x77, (k + 1) * 4));
                        p.out = o->p;
                        run(p, 0, 2);
                        OK(cudaDeviceSynchronize());
                    }
                    const std::vector<int> got = out.get();
                    expect(got == want, std::string("topk ") + kind.name + " n " + std::to_string(n) + " k " + std::to_string(k) + (with ? with == 1 ? " few" : " picked" : ""));
                    expect(got == again.get(), std::string("topk repeated ") + kind.name);
                    ++cases;
                }
            }
        }
    }
    printf("topk from given scores: %d cases, %d failures\n", cases, failures - before);
}

// --- The whole.

struct Problem {
    int requests, queries, heads, k;
    int64_t per, pages;
    Dev<uint8_t> q, pool;
    Dev<float> w;
    Dev<uint32_t> scores, tops;
    Dev<int> table, end, out;
    std::vector<int> lengths;
    Call p = {};

    // `pool_pages` in the pool, 0: those of all requests and a few; the pool is its own or `given`.
    Problem(int requests, int queries, int heads, int k, std::vector<int> lengths, int64_t max_len, int64_t pool_pages = 0,
            const Dev<uint8_t>* given = nullptr)
        : requests(requests), queries(queries), heads(heads), k(k), per((max_len + 63) / 64),
          pages(pool_pages ? pool_pages : requests * per + 3), q(size_t(requests) * queries * heads * DIM),
          pool(given ? 0 : size_t(pages) * PAGE_BYTES), w(size_t(requests) * queries * heads),
          scores(size_t(requests) * queries * per * 64),
          tops(size_t(requests) * queries * std::max<int64_t>(per * 8, 4096)), table(size_t(requests) * per), end(size_t(requests) * queries),
          out(size_t(requests) * queries * k), lengths(lengths) {
        std::mt19937 rng(1);
        const uint8_t* keys = given ? given->p : pool.p;
        fill_codes<<<1024, 256>>>(q.p, q.n, 1);
        if (!given) fill_pages<<<8192, 256>>>(pool.p, pages, 2);
        std::normal_distribution<float> normal(0.1f);
        std::vector<float> weights(w.n);
        for (float& x : weights) x = normal(rng);
        w.set(weights);
        std::vector<int> order(pages), t(table.n);
        for (int64_t i = 0; i < pages; ++i) order[i] = int(i);
        std::shuffle(order.begin(), order.end(), rng);
        for (size_t i = 0; i < t.size(); ++i) t[i] = order[i % pages];
        table.set(t);
        end.set(lengths);
        const int rows = requests * queries;
        p.ix.q = q.p;
        p.ix.weights = w.p;
        p.ix.keys = keys;
        p.ix.scales = keys + TILE * DIM;
        p.ix.q_row = heads * DIM;
        p.ix.q_head = DIM;
        p.ix.weights_row = heads;
        p.ix.page_bytes = p.ix.scale_page_bytes = PAGE_BYTES;
        p.ix.row_bytes = DIM;
        p.ix.rows = rows;
        p.ix.heads = heads;
        p.ix.dim = DIM;
        p.ix.fp8 = 1;
        p.ix.map.block_table = table.p;
        p.ix.map.row_end = end.p;
        p.ix.map.table_stride = p.ix.map.max_pages = per;
        p.ix.map.rows_per_request = queries;
        p.ix.map.requests = requests;
        p.ix.map.pages = pages;
        p.ix.map.page = 64;
        const int padded = heads <= 16 ? 16 : heads <= 32 ? 32 : 64;
        p.k_map = make_map(keys, TILE, pages, DIM, PAGE_BYTES, TILE, 1);
        p.q_map = make_map(q.p, heads, rows, DIM, heads * DIM, padded, queries);
        p.all_map = make_map(q.p, heads, rows, DIM, heads * DIM, padded, std::min(rows, 8));
        p.scores = scores.p;
        p.tops = tops.p;
        p.out = out.p;
        p.scores_row = p.columns = per * 64;
        p.tops_row = per * 8;
        p.out_row = k;
        p.rows = rows;
        p.queries = queries;
        p.k = k;
    }

    // Rows of any requests, -1: padding.
    Dev<int> row_request;
    void map_rows(const std::vector<int>& requests_of_rows) {
        const int rows = requests * queries;
        row_request = Dev<int>(requests_of_rows);
        for (int r = 0; r < rows; ++r) {
            if (requests_of_rows[r] < 0) lengths[r] = 0;
        }
        p.ix.map.row_request = row_request.p;
        p.queries = std::min(rows, heads > 32 ? 4 : 8);
        p.q_map = make_map(q.p, heads, rows, DIM, heads * DIM, heads <= 16 ? 16 : heads <= 32 ? 32 : 64, p.queries);
    }

    void check(const std::string& name, bool numbers = true) {
        const int rows = requests * queries;
        const int64_t columns = per * 64;
        OK(cudaMemset(scores.p, 0x7f, scores.n * 4));
        OK(cudaMemset(tops.p, 0xff, tops.n * 4));
        OK(cudaMemset(out.p, 0x77, out.n * 4));
        run(p, 0);
        OK(cudaDeviceSynchronize());
        const std::vector<uint32_t> own = scores.get();
        const std::vector<int> got = out.get();
        // All scores through the other way; the same bits.
        Dev<float> all_scores(scores.n);
        Call l = p;
        l.out = nullptr;
        l.scores = reinterpret_cast<uint32_t*>(all_scores.p);
        run(l, 0);
        OK(cudaDeviceSynchronize());
        const std::vector<float> all = all_scores.get();
        double worst = 0;
        std::vector<double> want;
        if (numbers) {
            Dev<double> ref(scores.n);
            reference<<<dim3((columns + 127) / 128, rows), 128>>>(p, ref.p, columns);
            OK(cudaDeviceSynchronize());
            want = ref.get();
        }
        int bad = 0;
        for (int r = 0; r < rows; ++r) {
            const int n = int(std::min<int64_t>(std::max(lengths[r], 0), columns));
            const float* a = &all[r * columns];
            for (int64_t i = n; i < columns; ++i) bad += a[i] != -INFINITY;
            for (int i = 0; i < n && n > k; ++i) bad += rank_on_host(a[i]) != own[r * columns + i];
            if (numbers) {
                double norm = 0, difference = 0;
                const double* w = &want[r * columns];
                for (int i = 0; i < n; ++i) {
                    if (std::isinf(w[i])) {
                        bad += a[i] != w[i];
                        continue;
                    }
                    if (std::isnan(w[i])) {
                        bad += !std::isnan(a[i]);
                        continue;
                    }
                    norm += w[i] * w[i];
                    difference += (a[i] - w[i]) * (a[i] - w[i]);
                }
                if (norm > 0 && n >= 64) worst = std::max(worst, std::sqrt(difference / norm));
                else if (norm == 0) bad += difference > 0;
            }
            const std::vector<int> exact = best(a, n, k);
            bad += memcmp(exact.data(), &got[r * k], k * 4) != 0;
        }
        for (int i = 0; i < 5; ++i) {
            OK(cudaMemset(out.p, 0x66, out.n * 4));
            run(p, 0);
            OK(cudaDeviceSynchronize());
            bad += out.get() != got;
        }
        expect(bad == 0 && !(worst > 5e-4), name);
        printf("%-60s bad %d, error %.1e\n", name.c_str(), bad, worst);
    }
};

// What compute-sanitizer gets through.
static void check_small() {
    using V = std::vector<int>;
    Problem(3, 2, 64, 512, V{700, 600, 0, 513, 511, 20000}, 20000).check("small", false);
    Problem(5, 1, 24, 512, V{1, 17000, 600, 0, 513}, 17000).check("small, 24 heads", false);
    Problem x(2, 3, 64, 512, V{700, 600, 600, 513, 511, 20000}, 20000);
    x.map_rows(V{1, 1, -1, 1, 0, 0});
    x.check("small, rows of any requests", false);
}

static void check_all() {
    using V = std::vector<int>;
    for (int heads : {64, 32, 16, 4, 24, 48}) Problem(3, 1, heads, 2048, V{5000, 20000, 2049}, 20000).check("3 requests, heads " + std::to_string(heads));
    Problem(1, 1, 64, 2048, V{131072}, 131072).check("1 x 131072");
    Problem(1, 1, 32, 2048, V{32768}, 32768).check("1 x 32768");
    Problem(9, 1, 64, 512, V{0, 1, 511, 512, 513, 777, 64, 4096, -5}, 4096).check("lengths about k");
    Problem(4, 2, 64, 2048, V{5000, 5001, 0, 1, 2047, 2048, 70001, 2049}, 70080).check("2 queries");
    for (int n : {3, 5, 8}) {
        V lengths;
        for (int i = 0; i < 4 * n; ++i) lengths.push_back(3000 * (i / n) + i % n + 1000);
        Problem(4, n, n == 5 ? 32 : 64, 1024, lengths, 12000).check(std::to_string(n) + " queries");
    }
    {
        V lengths(300);
        for (int i = 0; i < 300; ++i) lengths[i] = i * 7919 % 3000;
        Problem(300, 1, 32, 512, lengths, 3000).check("300 short requests");
        V one(64, 700);
        one[37] = 131072;
        Problem(64, 1, 64, 512, one, 131072, 4096).check("one long among 63 short");
    }
    Problem(1, 1, 64, 2048, V{1000000}, 1000000).check("1 x 1000000");
    {
        Problem x(2, 1, 64, 2048, V{30000, 9000}, 30000);
        std::vector<int> t = x.table.get();
        for (size_t i = 0; i < t.size(); i += 7) t[i] = i % 2 ? -1 : int(x.pages) + 5;
        x.table.set(t);
        x.check("stale table entries");
    }
    {
        Problem x(2, 1, 64, 2048, V{30000, 9000}, 30000);
        OK(cudaMemset(x.w.p, 0, x.w.n * 4));
        x.check("all weights zero");
        Problem y(2, 1, 64, 2048, V{30000, 9000}, 30000);
        OK(cudaMemset(y.pool.p, 0x38, y.pool.n));
        y.check("all keys equal");
        Problem z(2, 1, 64, 2048, V{30000, 9000}, 30000);
        OK(cudaMemset(z.pool.p + 100 * PAGE_BYTES, 0x7f, 50 * PAGE_BYTES));
        z.check("NaN keys");
    }
    for (int heads : {64, 32, 16}) {
        V of{0, 0, 0, -1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, -1, -1, 0, 2}, lengths;
        for (size_t i = 0; i < of.size(); ++i) lengths.push_back(3000 + 700 * int(i) % 9000);
        Problem x(4, 5, heads, 1024, lengths, 12000);
        x.map_rows(of);
        x.check("rows of any requests, heads " + std::to_string(heads));
        V many(510), of_many(510);
        for (int i = 0; i < 510; ++i) many[i] = i * 7919 % 3000, of_many[i] = i % 31 ? i / 7 % 255 : -1;
        Problem y(255, 2, heads, 512, many, 3000);
        y.map_rows(of_many);
        y.check("510 rows of any requests");
    }
    {
        Problem x(1, 1, 64, 2048, V{131072}, 131072);
        x.map_rows(V{0});
        x.check("one row, mapped");
        Problem y(1, 1, 64, 2048, V{131072}, 131072);
        y.map_rows(V{-1});
        y.check("one row of padding");
    }
    printf("%s\n", failures ? "FAILED" : "ALL CHECKS PASSED");
}

// Two calls, for a profiler.
static void profile(int requests, int length) {
    Problem x(requests, 1, 64, 2048, std::vector<int>(requests, length), length);
    for (int i = 0; i < 2; ++i) run(x.p, 0);
    OK(cudaDeviceSynchronize());
}

// --- Times: graphs of calls on rotating inputs, median of replays.

static double time_graph(int calls, const std::function<void(int, cudaStream_t)>& call) {
    cudaStream_t stream;
    OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < calls; ++i) call(i, stream);
    OK(cudaStreamEndCapture(stream, &graph));
    OK(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t a, b;
    OK(cudaEventCreate(&a));
    OK(cudaEventCreate(&b));
    std::vector<float> times;
    for (int i = 0; i < 12; ++i) {
        OK(cudaEventRecord(a, stream));
        OK(cudaGraphLaunch(exec, stream));
        OK(cudaEventRecord(b, stream));
        OK(cudaEventSynchronize(b));
        float ms;
        OK(cudaEventElapsedTime(&ms, a, b));
        if (i >= 3) times.push_back(ms * 1000 / calls);
    }
    std::sort(times.begin(), times.end());
    OK(cudaGraphExecDestroy(exec));
    OK(cudaGraphDestroy(graph));
    OK(cudaStreamDestroy(stream));
    return times[times.size() / 2];
}

static void time_all() {
    const int64_t pool_pages = 64 * 2048 + 3;
    const Dev<uint8_t> pool(pool_pages * PAGE_BYTES);
    fill_pages<<<8192, 256>>>(pool.p, pool_pages, 2);
    double ceiling;
    {
        Dev<uint32_t> out(1);
        const double us = time_graph(3, [&](int, cudaStream_t s) {
            read_all<<<sms * 8, 512, 0, s>>>(reinterpret_cast<const uint4*>(pool.p), pool.n / 16, out.p);
        });
        ceiling = pool.n / us / 1e6;
        printf("read the pool in order: %.1f us, %.3f TB/s\n", us, ceiling);
    }
    printf("%-44s %9s %9s %9s %7s %6s\n", "case", "scores us", "topk us", "select us", "TB/s", "share");
    struct Case {
        int requests, queries, heads, length;
    };
    for (const Case& c : {Case{64, 1, 64, 131072}, {64, 1, 32, 131072}, {16, 1, 64, 131072}, {16, 1, 32, 131072},
                          {1, 1, 64, 131072}, {1, 1, 32, 131072}, {1, 1, 64, 32768}, {1, 1, 32, 32768}, {1, 1, 64, 204800},
                          {2, 1, 64, 204800}, {4, 1, 64, 204800}, {8, 1, 64, 204800}, {1, 2, 64, 131072}, {2, 1, 64, 131072},
                          {4, 1, 64, 131072}, {8, 1, 64, 131072}, {8, 1, 64, 32768}, {16, 1, 64, 32768}, {64, 1, 64, 32768},
                          {64, 1, 64, 8192}, {64, 1, 64, 4096}, {16, 2, 64, 131072}, {16, 4, 32, 131072}, {1, 1, 64, 65536},
                          {1, 1, 64, 16384}, {1, 1, 64, 8192}, {1, 1, 64, 4096}}) {
        const int64_t per = (c.length + 63) / 64, each = c.requests * per;
        // Copies of the block table with other pages, so that nothing comes from L2.
        const int sets = int(std::max<int64_t>(1, std::min<int64_t>(16, pool_pages / each)));
        Problem x(c.requests, c.queries, c.heads, 2048, std::vector<int>(c.requests * c.queries, c.length), c.length, pool_pages, &pool);
        std::vector<int> order(pool_pages), t(sets * each);
        for (int64_t i = 0; i < pool_pages; ++i) order[i] = int(i);
        std::shuffle(order.begin(), order.end(), std::mt19937(3));
        for (size_t i = 0; i < t.size(); ++i) t[i] = order[i % pool_pages];
        Dev<int> tables(t);
        const int calls = std::max(sets, 4);
        double us[3];
        for (int what : {1, 2, 3}) {
            us[what - 1] = time_graph(calls, [&](int i, cudaStream_t s) {
                Call p = x.p;
                p.ix.map.block_table = tables.p + i % sets * each;
                run(p, s, what);
            });
        }
        const double bytes = double(each) * PAGE_BYTES;
        char name[80];
        snprintf(name, sizeof name, "%d x %d, %d heads, %d queries, %d sets", c.requests, c.length, c.heads, c.queries, sets);
        printf("%-44s %9.2f %9.2f %9.2f %7.3f %5.1f%%\n", name, us[0], us[1], us[2], bytes / us[2] / 1e6,
               100 * bytes / us[2] / 1e6 / ceiling);
        fflush(stdout);
    }
}

int main(int argc, char** argv) {
    setvbuf(stdout, nullptr, _IOLBF, 0);
    cudaDeviceProp d;
    OK(cudaGetDeviceProperties(&d, 0));
    sms = d.multiProcessorCount;
    printf("%s, %d SMs, shared %zu, driver map ok\n", d.name, sms, d.sharedMemPerBlockOptin);
    for (int i = 1; i < argc; ++i) {
        if (!strcmp(argv[i], "small")) check_small();
        if (!strcmp(argv[i], "profile")) profile(1, 131072);
        if (!strcmp(argv[i], "profile64")) profile(64, 131072);
        if (!strcmp(argv[i], "check")) check_all();
        if (!strcmp(argv[i], "topk")) check_topk();
        if (!strcmp(argv[i], "time")) time_all();
    }
    return failures != 0;
}
