// Checks and times indexer_sm90.cu by itself: `indexer_sm90 check`, `indexer_sm90 time`, and under lasting load, with the
// clock rate that goes with each time, `indexer_sm90 load [parts 0|1] [seconds] [keys]`.
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../indexer_sm90.cu"

#define OK(x)                                                                                        \
    do {                                                                                             \
        const auto e = (x);                                                                          \
        if (int(e)) std::printf("%s:%d: error %d\n", __FILE__, __LINE__, int(e)), std::exit(1);      \
    } while (0)

template <class T>
T* device(size_t n) {
    T* p;
    OK(cudaMalloc(&p, n * sizeof(T)));
    return p;
}
template <class T>
T* upload(const std::vector<T>& v) {
    T* p = device<T>(v.size());
    OK(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}

static PFN_cuTensorMapEncodeTiled_v12000 encode;

static sm90::TensorMap tensor_map(int type, int bytes, void* base, std::vector<cuuint64_t> dims, std::vector<cuuint64_t> strides,
                            std::vector<cuuint32_t> box, bool swizzle, bool nan) {
    sm90::TensorMap m;
    std::vector<cuuint32_t> one(dims.size(), 1);
    CUresult r = encode(reinterpret_cast<CUtensorMap*>(&m), CUtensorMapDataType(type), dims.size(), base, dims.data(), strides.data(),
                        box.data(), one.data(), CU_TENSOR_MAP_INTERLEAVE_NONE,
                        swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                        nan ? CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA : CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (r) std::printf("tensor map: %d\n", r), std::exit(1);
    return m;
}

__global__ void random_bytes(uint8_t* p, size_t n, uint32_t seed, int kind) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
        uint32_t x = uint32_t(i) * 2654435761u + seed;
        x = (x ^ x >> 16) * 0x7feb352du, x = (x ^ x >> 15) * 0x846ca68bu, x ^= x >> 16;
        // Normal, by Box and Muller; kind 1: all equal.
        const float r = sqrtf(-2.0f * logf(((x >> 16) + 1) / 65537.0f));
        p[i] = kind == 1 ? 0x38 : f32_to_e4m3(r * cospif((x & 0xffff) / 32768.0f));
    }
}
__global__ void random_scales(uint8_t* pages, int64_t page_bytes, int pages_n, uint32_t seed, int kind) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < pages_n * 64; i += gridDim.x * blockDim.x) {
        uint32_t x = uint32_t(i) * 747796405u + seed;
        x = (x ^ x >> 16) * 0x7feb352du, x ^= x >> 15;
        reinterpret_cast<float*>(pages + i / 64 * page_bytes + 8192)[i % 64] = kind == 1 ? 0.01f : 0.005f + 0.01f * (x >> 8) / 16777216.0f;
    }
}
__global__ void reference(Indexer ix, double* out, int64_t columns) {
    const int64_t row = blockIdx.y;
    const int64_t at = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
    if (at >= length_of(ix.map, row)) return;
    Place place;
    double sum = 0;
    if (!find(ix.map, request_of(ix.map, row), start_of(ix.map, row), at, place)) {
        out[row * columns + at] = -INFINITY;
        return;
    }
    const uint8_t* k = static_cast<const uint8_t*>(ix.keys) + place.page * ix.page_bytes + place.at * ix.row_bytes;
    for (int h = 0; h < ix.heads; ++h) {
        float dot = 0;
        for (int d = 0; d < 128; ++d) dot += e4m3_to_f32(k[d]) * e4m3_to_f32(static_cast<const uint8_t*>(ix.q)[row * ix.q_row + h * ix.q_head + d]);
        sum += double(ix.weights[row * ix.weights_row + h]) * fmaxf(dot, 0.0f);
    }
    const char* sc = static_cast<const char*>(ix.scales) + place.page * ix.scale_page_bytes + 4 * place.at;
    out[row * columns + at] = sum * *reinterpret_cast<const float*>(sc);
}

struct Case {
    int rows, heads, k, requests;
    int64_t context;
    bool causal, paged;
    int kind;  // 0 random, 1 all keys equal, 2 weights 0, 3 rising scales, 4 missing pages
};

struct Problem {
    Case c;
    Maps maps;
    IndexerSm90 p;
    std::vector<int32_t> lengths;
    int sms = 132;

    explicit Problem(const Case& c_, uint32_t seed = 1, int64_t out_bytes = 0) : c(c_) {
        const int64_t pages_a_request = (c.context + 63) / 64, pages = pages_a_request * c.requests + 3;
        uint8_t *q = device<uint8_t>(size_t(c.rows) * c.heads * 128), *store;
        random_bytes<<<1024, 256>>>(q, size_t(c.rows) * c.heads * 128, seed, 0);
        std::vector<float> w(size_t(c.rows) * c.heads);
        srand(seed);
        for (size_t i = 0; i < w.size(); ++i) {
            w[i] = c.kind == 2 ? 0.0f : (rand() / float(RAND_MAX) - 0.2f) * 1e-3f;
            if (c.kind == 0) {
                const double u = (rand() + 1.0) / (RAND_MAX + 2.0), v = rand() / (RAND_MAX + 1.0);
                w[i] = float(std::sqrt(-2 * std::log(u)) * std::cos(6.283185307179586 * v));
            }
            if (c.kind == 6) w[i] = i % c.heads == 5;
        }
        memset(&p, 0, sizeof p);
        KeyMap& m = p.ix.map;
        p.ix.page_bytes = c.paged ? 8448 : 0;
        store = device<uint8_t>(size_t(pages) * 8448);
        random_bytes<<<1024, 256>>>(store, size_t(pages) * 8448, seed + 7, c.kind == 1);
        std::vector<int32_t> table(pages_a_request * c.requests), request(c.rows), start(c.rows), end(c.rows);
        for (size_t i = 0; i < table.size(); ++i) table[i] = i + 1;
        for (size_t i = table.size(); i > 1; --i) std::swap(table[i - 1], table[rand() % i]);
        if (c.kind == 4) for (size_t i = 0; i < table.size(); i += 5) table[i] = i % 2 ? -1 : 1 << 30;
        const int each = c.rows / c.requests;
        lengths.resize(c.rows);
        for (int r = 0; r < c.rows; ++r) {
            const int in = r % each;
            lengths[r] = c.causal ? int(std::max<int64_t>(0, c.context - each + in + 1)) : int(c.context);
            if (c.kind == 5) lengths[r] = (in * 977) % (c.context + 1);
            request[r] = std::min(r / each, c.requests - 1);
            start[r] = int(request[r] * c.context);
            end[r] = c.paged ? lengths[r] : start[r] + lengths[r];
        }
        if (c.paged) {
            random_scales<<<256, 256>>>(store, 8448, pages, seed + 3, c.kind == 1);
            m.block_table = upload(table), m.row_request = upload(request), m.table_stride = pages_a_request;
            m.requests = c.requests, m.max_pages = pages_a_request, m.pages = pages, m.page = 64;
            p.ix.row_bytes = 128, p.ix.scale_page_bytes = 8448, p.ix.scales = store + 8192;
        } else {
            const int64_t keys = c.context * c.requests;
            std::vector<float> scales(keys);
            for (int64_t i = 0; i < keys; ++i) scales[i] = c.kind == 1 ? 0.01f : c.kind == 3 ? 1e-3f + 1e-7f * i : 0.005f + 0.01f * rand() / RAND_MAX;
            m.row_start = upload(start), m.keys = keys, m.page = 1, m.requests = 1;
            p.ix.row_bytes = 128, p.ix.scales = upload(scales);
        }
        m.row_end = upload(end), m.rows_per_request = each;
        p.ix.q = q, p.ix.weights = upload(w), p.ix.keys = store, p.ix.q_row = c.heads * 128, p.ix.q_head = 128, p.ix.weights_row = c.heads;
        p.ix.rows = c.rows, p.ix.heads = c.heads, p.ix.dim = 128, p.ix.fp8 = 1;
        const bool wide = c.heads > 32;
        p.block_rows = wide ? 4 : 8;
        const cuuint64_t rows = c.rows, heads = c.heads, qr = p.ix.q_row;
        maps.q = wide ? tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, q, {128, 2, rows, heads / 2}, {128, qr, 256}, {128, 2, 4, 32}, true, false)
                      : tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, q, {128, rows, heads}, {qr, 128}, {128, 8, 32}, true, false);
        const cuuint64_t in = c.paged ? 64 : m.keys, outer = c.paged ? pages : 1;
        const cuuint64_t pitch = c.paged ? 8448 : (in * 128 + 15) / 16 * 16;
        maps.keys = tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, store, {128, in, outer}, {128, pitch}, {128, 64, 1}, true, false);
        maps.scales = tensor_map(CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, const_cast<void*>(p.ix.scales), {in, outer}, {c.paged ? 8448 : (in * 4 + 15) / 16 * 16},
                                 {64, 1}, false, true);
        p.k = c.k, p.capacity = 5 * c.k / 2 + MARGIN, p.ctas = sms, p.splits = 1;
        const size_t lists = c.rows + size_t(p.block_rows) * sms;
        p.prefix = device<int32_t>(c.rows + 1), p.sample_prefix = device<int32_t>(c.rows + 1), p.size = device<int32_t>(c.rows);
        p.lead = device<int32_t>(c.rows), p.again = device<int32_t>(c.rows + 1), p.thresholds = device<float>(c.rows);
        const size_t list_bytes = std::max(lists * p.capacity * 8, size_t(c.rows) * SAMPLES * 4);
        p.lists = reinterpret_cast<uint64_t*>(device<uint8_t>(list_bytes)), p.samples = reinterpret_cast<float*>(p.lists);
        p.counts = device<int32_t>(lists), p.lengths = device<int32_t>(c.rows);
        OK(cudaMemset(p.lists, 0x55, list_bytes));
        OK(cudaMemset(p.counts, 0x55, lists * 4));
    }
    template <class K>
    void launch(K kernel, int grid, int threads, size_t shared, cudaStream_t st, bool with_maps = true) {
        OK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
        void* both[] = {&maps, &p};
        void* one[] = {&p};
        OK(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid), dim3(threads), with_maps ? both : one, shared, st));
    }
    void select(int32_t* out, cudaStream_t st = 0) {
        const bool wide = c.heads > 32;
        const size_t big = SCORE_SHARED, finish = FINISH_SHARED;
        p.out = out, p.out_row = c.k, p.retry = 0;
        launch(indexer_plan, 1, PLAN_THREADS, 0, st, false);
        launch(wide ? indexer_sample_64 : indexer_sample_32, sms, THREADS, big, st);
        launch(indexer_threshold, c.rows, ROW_THREADS, 0, st, false);
        launch(wide ? indexer_filter_64 : indexer_filter_32, sms, THREADS, big, st);
        launch(indexer_finish, c.rows, ROW_THREADS, finish, st, false);
        p.retry = 1;
        launch(wide ? indexer_filter_64 : indexer_filter_32, sms, THREADS, big, st);
        launch(indexer_finish, c.rows, ROW_THREADS, finish, st, false);
    }
    // As `idxc_indexer_logits` does it, or, with a plan, as a select of short rows does.
    void logits(float* out, int64_t columns, cudaStream_t st = 0, bool planned = false) {
        const bool wide = c.heads > 32;
        p.out = out, p.out_row = columns, p.columns = columns, p.out_type = F32, p.retry = 0;
        if (planned) {
            launch(indexer_plan, 1, PLAN_THREADS, 0, st, false);
            launch(wide ? indexer_logits_64 : indexer_logits_32, sms, THREADS, SCORE_SHARED, st);
            return;
        }
        int32_t *const prefix = p.prefix, *const lengths = p.lengths;
        p.prefix = nullptr, p.lengths = nullptr;
        const int groups = (c.rows + p.block_rows - 1) / p.block_rows;
        p.splits = std::max<int64_t>(1, std::min<int64_t>((columns + 511) / 512, (16 * sms) / groups));
        launch(wide ? indexer_logits_64 : indexer_logits_32, sms, THREADS, SCORE_SHARED, st);
        launch(indexer_logits_tail, c.rows, ROW_THREADS, 0, st, false);
        p.prefix = prefix, p.lengths = lengths;
    }
};

static bool check(const Case& c) {
    Problem x(c);
    const int64_t columns = (c.context + 15) / 16 * 16;
    float* logits = device<float>(c.rows * columns);
    double* ref = device<double>(c.rows * columns);
    int32_t* out = device<int32_t>(size_t(c.rows) * c.k);
    OK(cudaMemset(logits, 0x77, c.rows * columns * 4));
    x.logits(logits, columns);
    OK(cudaDeviceSynchronize());
    reference<<<dim3((c.context + 127) / 128, c.rows), 128>>>(x.p.ix, ref, columns);
    OK(cudaDeviceSynchronize());
    std::vector<float> l(c.rows * columns);
    std::vector<double> r(c.rows * columns);
    OK(cudaMemcpy(l.data(), logits, l.size() * 4, cudaMemcpyDeviceToHost));
    OK(cudaMemcpy(r.data(), ref, r.size() * 8, cudaMemcpyDeviceToHost));
    double err = 0, norm = 0;
    long odd = 0;
    for (int row = 0; row < c.rows; ++row)
        for (int64_t i = 0; i < columns; ++i) {
            const double a = l[row * columns + i], b = i < x.lengths[row] ? r[row * columns + i] : -INFINITY;
            if (b == -INFINITY) { odd += i < x.lengths[row] ? !(a == b || std::isnan(a)) : a != b; continue; }
            if (!(std::fabs(a) < 1e30)) { ++odd; continue; }
            err += (a - b) * (a - b), norm += b * b;
        }
    if (c.kind == 6) {
        double bias = 0, big = 0;
        long n = 0;
        for (int64_t i = 0; i < c.context; ++i) {
            const double a = l[i], b = r[i];
            if (b > 0 && (i < 40)) std::printf("%.9g %.9g %.2e\n", a, b, (a - b) / b);
            if (b > 0) bias += (a - b), big += b, ++n;
        }
        std::printf("bias %.3e\n", bias / big);
    }
    std::vector<std::vector<int32_t>> runs;
    for (int n = 0; n < 3; ++n) {
        OK(cudaMemset(out, 0x66, size_t(c.rows) * c.k * 4));
        x.select(out);
        OK(cudaDeviceSynchronize());
        runs.emplace_back(size_t(c.rows) * c.k);
        OK(cudaMemcpy(runs.back().data(), out, runs.back().size() * 4, cudaMemcpyDeviceToHost));
    }
    std::vector<int32_t> again(c.rows + 1);
    OK(cudaMemcpy(again.data(), x.p.again, again.size() * 4, cudaMemcpyDeviceToHost));
    int wrong = 0, first = -1;
    std::vector<std::pair<uint32_t, int32_t>> keys;
    for (int row = 0; row < c.rows; ++row) {
        std::vector<int32_t> want(c.k, -1);
        const int n = x.lengths[row];
        if (n <= c.k) {
            for (int i = 0; i < n; ++i) want[i] = i;
        } else {
            keys.clear();
            for (int i = 0; i < n; ++i) {
                float s = l[row * columns + i];
                if (std::isnan(s)) s = -INFINITY;
                uint32_t bits;
                s += 0.0f;
                memcpy(&bits, &s, 4);
                keys.push_back({~(bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000)), i});
            }
            std::nth_element(keys.begin(), keys.begin() + c.k - 1, keys.end());
            for (int i = 0; i < c.k; ++i) want[i] = keys[i].second;
            std::sort(want.begin(), want.end());
        }
        if (memcmp(want.data(), &runs[0][size_t(row) * c.k], c.k * 4)) { ++wrong; if (first < 0) first = row; }
    }
    const bool same = runs[0] == runs[1] && runs[0] == runs[2];
    std::printf("rows %d heads %d k %d ctx %ld req %d %s%s kind %d: logits err %.2e odd %ld | select wrong %d (first %d) same %d again %d\n", c.rows, c.heads, c.k,
                (long)c.context, c.requests, c.paged ? "paged" : "contig", c.causal ? " causal" : "", c.kind, norm ? std::sqrt(err / norm) : std::sqrt(err), odd, wrong, first, same, again[c.rows]);
    std::fflush(stdout);
    OK(cudaDeviceReset());
    return !wrong && same && !odd;
}

template <class F>
static float median(F f, int n = 9, int each = 1) {
    cudaStream_t st;
    OK(cudaStreamCreate(&st));
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    OK(cudaStreamBeginCapture(st, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < each; ++i) f(st);
    OK(cudaStreamEndCapture(st, &graph));
    OK(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t a, b;
    OK(cudaEventCreate(&a));
    OK(cudaEventCreate(&b));
    std::vector<float> t;
    for (int i = 0; i < n + 2; ++i) {
        OK(cudaEventRecord(a, st));
        OK(cudaGraphLaunch(exec, st));
        OK(cudaEventRecord(b, st));
        OK(cudaEventSynchronize(b));
        float ms;
        OK(cudaEventElapsedTime(&ms, a, b));
        if (i > 1) t.push_back(ms / each);
    }
    std::sort(t.begin(), t.end());
    return t[t.size() / 2];
}

static void time_one(const Case& c, bool parts) {
    Problem x(c);
    int32_t* out = device<int32_t>(size_t(c.rows) * c.k);
    double pairs = 0;
    for (int n : x.lengths) pairs += n;
    const double tf = pairs * c.heads * 256 * 1e-9;
    const float s = median([&](cudaStream_t st) { x.select(out, st); });
    std::printf("heads %d rows %d ctx %ld%s%s kind %d: select %.3f ms (%.0f TF)", c.heads, c.rows, (long)c.context, c.causal ? " causal" : "", c.paged ? " paged" : "", c.kind, s, tf / s);
    if (c.context * c.rows < (1ll << 31)) {
        float* l = device<float>(c.rows * c.context);
        const float t = median([&](cudaStream_t st) { x.logits(l, c.context, st); });
        std::printf(", logits %.3f ms (%.0f TF)", t, tf / t);
    }
    if (parts) {
        const bool wide = c.heads > 32;
        const size_t big = SCORE_SHARED, finish = FINISH_SHARED;
        x.select(out);
        OK(cudaDeviceSynchronize());
        x.p.out = out, x.p.out_row = c.k, x.p.retry = 0;
        std::printf(" | plan %.4f", median([&](cudaStream_t st) { x.launch(indexer_plan, 1, PLAN_THREADS, 0, st, false); }));
        std::printf(" sample %.4f", median([&](cudaStream_t st) { x.launch(wide ? indexer_sample_64 : indexer_sample_32, x.sms, THREADS, big, st); }));
        std::printf(" threshold %.4f", median([&](cudaStream_t st) { x.launch(indexer_threshold, c.rows, ROW_THREADS, 0, st, false); }));
        std::printf(" filter %.4f", median([&](cudaStream_t st) { x.launch(wide ? indexer_filter_64 : indexer_filter_32, x.sms, THREADS, big, st); }));
        std::printf(" finish %.4f", median([&](cudaStream_t st) { x.launch(indexer_finish, c.rows, ROW_THREADS, finish, st, false); }));
        const size_t lists = c.rows + size_t(x.p.block_rows) * x.sms;
        std::vector<int32_t> counts(lists);
        OK(cudaMemcpy(counts.data(), x.p.counts, lists * 4, cudaMemcpyDeviceToHost));
        long total = 0, most = 0;
        for (int n : counts) if (n >= 0 && n < 1 << 20) total += n, most = std::max<long>(most, n);
        std::printf(" | survivors a row %.0f, longest list %ld", double(total) / c.rows, most);
    }
    std::printf("\n");
    std::fflush(stdout);
    OK(cudaDeviceReset());
}

// Each SM's own clock and the card's, to tell cycles from clock rate: under lasting load the card is at its power limit.
struct Stamp {
    unsigned long long clock, time;
};
__global__ void stamp(Stamp* to) {
    uint32_t sm;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
    asm volatile("mov.u64 %0, %%clock64;\nmov.u64 %1, %%globaltimer;" : "=l"(to[sm].clock), "=l"(to[sm].time)::"memory");
}

struct Timing {
    double ms, mhz;
};

// Medians of 15 graph replays after `seconds` of nothing else.
template <class F>
static Timing under_load(F f, double seconds = 1.0) {
    constexpr int RUNS = 15, SMS = 256;
    cudaStream_t st;
    OK(cudaStreamCreate(&st));
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    OK(cudaStreamBeginCapture(st, cudaStreamCaptureModeThreadLocal));
    f(st);
    OK(cudaStreamEndCapture(st, &graph));
    OK(cudaGraphInstantiate(&exec, graph, 0));
    const auto start = std::chrono::steady_clock::now();
    const auto since = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
    while (since() < seconds) {
        for (int i = 0; i < 8; ++i) OK(cudaGraphLaunch(exec, st));
        OK(cudaStreamSynchronize(st));
    }
    Stamp* stamps = device<Stamp>(2 * RUNS * SMS);
    OK(cudaMemsetAsync(stamps, 0, 2 * RUNS * SMS * sizeof(Stamp), st));
    OK(cudaGraphLaunch(exec, st));
    for (int i = 0; i < RUNS; ++i) {
        stamp<<<132, 32, 0, st>>>(stamps + 2 * i * SMS);
        OK(cudaGraphLaunch(exec, st));
        stamp<<<132, 32, 0, st>>>(stamps + (2 * i + 1) * SMS);
    }
    OK(cudaStreamSynchronize(st));
    std::vector<Stamp> host(2 * RUNS * SMS);
    OK(cudaMemcpy(host.data(), stamps, host.size() * sizeof(Stamp), cudaMemcpyDeviceToHost));
    std::vector<double> ms, mhz;
    for (int i = 0; i < RUNS; ++i) {
        for (int sm = 0; sm < SMS; ++sm) {
            const Stamp &a = host[2 * i * SMS + sm], &b = host[(2 * i + 1) * SMS + sm];
            if (!a.time || !b.time) continue;
            ms.push_back((b.time - a.time) * 1e-6);
            mhz.push_back((b.clock - a.clock) * 1e3 / double(b.time - a.time));
            break;
        }
    }
    std::sort(ms.begin(), ms.end()), std::sort(mhz.begin(), mhz.end());
    return {ms[ms.size() / 2], mhz[mhz.size() / 2]};
}

static void load_one(const Case& c, bool parts, double seconds) {
    Problem x(c);
    int32_t* out = device<int32_t>(size_t(c.rows) * c.k);
    const bool wide = c.heads > 32;
    double pairs = 0;
    for (int n : x.lengths) pairs += n;
    const double tiles = pairs / 64 / x.p.block_rows / x.sms;
    const auto show = [&](const char* what, Timing t) {
        std::printf(" | %s %.4f ms %.0f MHz %.1f kcyc", what, t.ms, t.mhz, t.ms * t.mhz);
        std::fflush(stdout);
        return t;
    };
    std::printf("heads %d rows %d ctx %ld%s:", c.heads, c.rows, (long)c.context, c.causal ? " causal" : "");
    show("select", under_load([&](cudaStream_t st) { x.select(out, st); }, seconds));
    const auto filter = [&](cudaStream_t st) { x.launch(wide ? indexer_filter_64 : indexer_filter_32, x.sms, THREADS, SCORE_SHARED, st); };
    x.select(out);
    OK(cudaDeviceSynchronize());
    x.p.out = out, x.p.out_row = c.k, x.p.retry = 0;
    const Timing t = show("filter", under_load(filter, parts ? seconds : seconds / 4));
    std::printf(" %.1f cyc a tile", t.ms * t.mhz * 1e3 / tiles);
    if (parts) {
        show("plan", under_load([&](cudaStream_t st) { x.launch(indexer_plan, 1, PLAN_THREADS, 0, st, false); }, 0.1));
        show("sample", under_load([&](cudaStream_t st) { x.launch(wide ? indexer_sample_64 : indexer_sample_32, x.sms, THREADS, SCORE_SHARED, st); }, 0.1));
        show("threshold", under_load([&](cudaStream_t st) { x.launch(indexer_threshold, c.rows, ROW_THREADS, 0, st, false); }, 0.1));
        x.select(out);
        x.p.retry = 0;
        show("finish", under_load([&](cudaStream_t st) { x.launch(indexer_finish, c.rows, ROW_THREADS, FINISH_SHARED, st, false); }, 0.1));
        if (c.context * c.rows < (1ll << 31)) {
            float* l = device<float>(c.rows * c.context);
            show("logits", under_load([&](cudaStream_t st) { x.logits(l, c.context, st); }, seconds));
            if (c.context <= 8192) show("planned logits", under_load([&](cudaStream_t st) { x.logits(l, c.context, st, true); }, seconds));
        }
    }
    std::printf("\n");
    OK(cudaDeviceReset());
}

int main(int argc, char** argv) {
    OK(cudaFree(nullptr));
    cudaDriverEntryPointQueryResult found;
    OK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", reinterpret_cast<void**>(&encode), 12000, cudaEnableDefault, &found));
    const std::string mode = argc > 1 ? argv[1] : "check";
    if (mode == "dots") return !check({8, 32, 256, 1, 10000, false, true, 6});
    if (mode == "loop") {
        for (int heads : {32, 64}) {
            Problem x({4096, heads, 2048, 1, 131072, false, true, 0});
            int32_t* out = device<int32_t>(size_t(4096) * 2048);
            for (int i = 0; i < 200; ++i) x.select(out);
            OK(cudaDeviceSynchronize());
        }
        return 0;
    }
    if (mode == "load") {
        const bool parts = argc > 2 && atoi(argv[2]);
        const double seconds = argc > 3 ? atof(argv[3]) : 1.0;
        for (int heads : {32, 64}) {
            for (int context : {131072, 32768, 8192}) {
                if (argc > 4 && atoi(argv[4]) != context) continue;
                load_one({4096, heads, 2048, 1, context, context == 8192, true, 0}, parts, seconds);
            }
        }
        return 0;
    }
    if (mode == "one") return time_one({4096, 32, 2048, 1, 131072, false, true, 0}, false), 0;
    if (mode == "first") return !check({64, 32, 256, 1, 10000, true, true, 0});
    if (mode == "small") {
        bool ok = true;
        for (int heads : {32, 64}) ok &= check({24, heads, 128, 2, 5000, true, true, 0}), ok &= check({24, heads, 128, 1, 5000, false, false, 1});
        return !ok;
    }
    if (mode == "check") {
        bool ok = true;
        for (int heads : {32, 64}) {
            for (bool paged : {true, false}) {
                ok &= check({100, heads, 512, 1, 20000, true, paged, 0});
                ok &= check({96, heads, 2048, 3, 9001, true, paged, 0});
                ok &= check({33, heads, 512, 1, 30000, false, paged, 1});
                ok &= check({40, heads, 512, 1, 30000, false, paged, 2});
                ok &= check({70, heads, 1024, 7, 12345, false, paged, 5});
            }
            ok &= check({48, heads, 2048, 1, 131072, true, true, 0});
            ok &= check({16, heads, 2048, 1, 200001, true, false, 3});
            ok &= check({40, heads, 1024, 2, 20000, false, true, 4});
            ok &= check({600, heads, 2048, 1, 8192, true, true, 0});
        }
        ok &= check({50, 4, 512, 2, 7777, true, true, 0}), ok &= check({50, 16, 4096, 1, 17777, true, false, 0}), ok &= check({50, 48, 512, 1, 17777, true, true, 0});
        std::printf(ok ? "ALL GOOD\n" : "FAILED\n");
        return !ok;
    }
    for (int heads : {32, 64}) {
        time_one({4096, heads, 2048, 1, 131072, false, true, 0}, true);
        time_one({4096, heads, 2048, 1, 32768, false, true, 0}, true);
        time_one({4096, heads, 2048, 1, 8192, true, true, 0}, true);
        time_one({4096, heads, 2048, 1, 131072, false, true, 1}, true);
        time_one({4096, heads, 2048, 1, 131072, false, true, 2}, true);
    }
    return 0;
}
