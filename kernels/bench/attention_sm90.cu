// Checks attention_sm90.cu and the kernels for few heads against sums in f64 on the host, then times it. Stand-alone:
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -o attention_sm90 attention_sm90.cu
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "../attention_sm90.cuh"

namespace wide {
#include "../attention_sm90.cu"
}
namespace wide_fp8 {
#include "../attention_fp8_sm90.cu"
}
namespace few {
#include "../attention_few_sm90.cu"
}
namespace few_fp8 {
#include "../attention_few_fp8_sm90.cu"
}

#define CK(x)                                                                        \
    do {                                                                             \
        cudaError_t e_ = (x);                                                        \
        if (e_ != cudaSuccess) {                                                     \
            printf("%s:%d %s: %s\n", __FILE__, __LINE__, #x, cudaGetErrorString(e_)); \
            fflush(stdout);                                                          \
            exit(1);                                                                 \
        }                                                                            \
    } while (0)

static uint64_t seed = 1;
static uint32_t next() {
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    return uint32_t(seed >> 33);
}
static float uniform() { return float(next() % 65536) / 32768.0f - 1.0f; }
static float normal() { return (uniform() + uniform() + uniform()) * 1.0f; }
static uint16_t host_bf16(float x) {
    uint32_t b;
    memcpy(&b, &x, 4);
    return (b + 0x7fff + ((b >> 16) & 1)) >> 16;
}
static float from_bf16(uint16_t x) {
    uint32_t b = uint32_t(x) << 16;
    float f;
    memcpy(&f, &b, 4);
    return f;
}
static float from_e4m3(uint8_t c) {
    static const std::vector<float> all = [] {
        std::vector<float> all(256);
        for (int c = 0; c < 256; ++c) {
            int e = c >> 3 & 15, m = c & 7;
            float f = e ? ldexpf(1.0f + m / 8.0f, e - 7) : ldexpf(m / 8.0f, -6);
            all[c] = c & 0x80 ? -f : f;
        }
        return all;
    }();
    return all[c];
}

__global__ void fill(uint8_t* kv, int64_t rows, int fp8) {
    const int64_t row_bytes = fp8 ? 656 : 1152;
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < rows * row_bytes / 2; i += int64_t(gridDim.x) * blockDim.x) {
        const int64_t row = i / (row_bytes / 2), at = i % (row_bytes / 2) * 2;
        uint64_t h = (i + 1) * 0x9e3779b97f4a7c15ull;
        h ^= h >> 29;
        h *= 0xbf58476d1ce4e5b9ull;
        h ^= h >> 32;
        uint16_t x;
        const float f = float(int(h & 0xffff) - 32768) / 32768.0f;
        if (!fp8 || at >= 528) {
            x = f32_to_bf16(f * 1.7f);
        } else if (at < 512) {
            x = f32_to_e4m3(f * 200.0f) | f32_to_e4m3(float(int(h >> 16 & 0xffff) - 32768) / 32768.0f * 200.0f) << 8;
        } else {
            x = at % 4 ? 0x3c00 : 0;  // 2^-7
        }
        *reinterpret_cast<uint16_t*>(kv + row * row_bytes + at) = x;
    }
}

static int sms = 132;
static bool only_wide = false;

// The kernels for few heads, as src/backend/cuda/attention.rs chooses them.
struct FewKernel {
    int fp8, heads;
    void (*kernel)(AttentionSm90);
    int threads, shared;
};
static const FewKernel few_kernels[] = {
    {0, 8, few::attention_few_8, 256, sizeof(few::Few<8>)},
    {0, 16, few::attention_few_16, 256, sizeof(few::Few<16>)},
    {0, 32, few::attention_few_32, 256, sizeof(few::Few<32>)},
    {1, 8, few_fp8::attention_few_fp8_8, 128, sizeof(few_fp8::Few<8, 8, 1>)},
    {1, 16, few_fp8::attention_few_fp8_16, 128, sizeof(few_fp8::Few<16, 16, 1>)},
    {1, 20, few_fp8::attention_few_fp8_20, 128, sizeof(few_fp8::Few<24, 20, 2>)},
    {1, 32, few_fp8::attention_few_fp8_32, 128, sizeof(few_fp8::Few<32, 32, 1>)},
};

static bool uses_few(const AttentionSm90& s) { return s.a.heads <= 32 && !only_wide; }
static int head_tiles(const AttentionSm90& s) { return (s.a.heads + wide::HEADS - 1) / wide::HEADS; }

template <class K>
static void launch_one(K kernel, dim3 grid, int threads, int shared, bool early, AttentionSm90 s, cudaStream_t stream) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared, config.stream = stream;
    config.attrs = &attribute, config.numAttrs = early;
    CK(cudaLaunchKernelEx(&config, kernel, s));
}

struct Launcher {
    float* part_out = nullptr;
    float* part_lse = nullptr;
    size_t held = 0;
    void operator()(AttentionSm90 s, int64_t rows, cudaStream_t stream);
};
static bool gather_only = false;
__global__ void only_gather(PARAMS Attention p, int parts);
void Launcher::operator()(AttentionSm90 s, int64_t rows, cudaStream_t stream) {
        if (gather_only) {
            only_gather<<<rows * 32, 256, 0, stream>>>(s.a, 32);
            return;
        }
        if (s.splits > 1) {
            size_t need = rows * s.splits * s.a.heads;
            if (need > held) {
                if (part_out) cudaFree(part_out), cudaFree(part_lse);
                CK(cudaMalloc(&part_out, need * 2048));
                CK(cudaMalloc(&part_lse, need * 4));
                CK(cudaMemset(part_out, 0xff, need * 2048));
                CK(cudaMemset(part_lse, 0xff, need * 4));
                held = need;
            }
            s.part_out = part_out;
            s.part_lse = part_lse;
        }
        const bool fp8 = s.a.kv_format == KV_FP8;
        const unsigned parts = rows * s.splits;
        if (!uses_few(s)) {
            launch_one(fp8 ? wide_fp8::attention_fp8 : wide::attention_bf16, dim3(parts * head_tiles(s)), wide::THREADS,
                       fp8 ? sizeof(wide_fp8::Shared) : sizeof(wide::Shared), true, s, stream);
        } else {
            const FewKernel* k = few_kernels;
            while (k->fp8 != fp8 || k->heads < s.a.heads) ++k;
            launch_one(k->kernel, parts, k->threads, k->shared, true, s, stream);
        }
        if (s.splits > 1) launch_one(wide::attention_combine, dim3(rows, s.a.heads), 128, 0, true, s, stream);
}
static Launcher launch;

// Splits for a launch: fill the device, no part shorter than a tile.
static void cut(AttentionSm90& s, int64_t rows, int splits) {
    const int tiles = (s.a.topk + TOKENS - 1) / TOKENS, slots = uses_few(s) ? 2 * sms : sms;
    if (splits == 0) splits = std::max<int64_t>(1, std::min<int64_t>(tiles, slots / (rows * head_tiles(s))));
    s.split_tiles = (tiles + splits - 1) / splits;
    s.splits = (tiles + s.split_tiles - 1) / s.split_tiles;
}

struct Case {
    const char* name;
    int rows, heads, topk, fp8, splits;
    int holes = 0, lengths = 0, sink = 0, f32_out = 0, mapped = 0;
    float scale = 0.0417f;
};

static int failures = 0;
static void check(const Case& c) {
    const int tokens = 4096, page = 64, row_bytes = c.fp8 ? 656 : 1152, requests = 2;
    std::vector<uint8_t> kv(size_t(tokens) * row_bytes);
    for (int t = 0; t < tokens; ++t) {
        uint8_t* r = &kv[size_t(t) * row_bytes];
        if (c.fp8) {
            for (int i = 0; i < 512; ++i) {
                uint8_t code = next();
                r[i] = (code & 0x7f) == 0x7f ? code - 1 : code;
                if ((r[i] & 0x7f) > 0x60) r[i] -= 0x20;
            }
            for (int i = 0; i < 4; ++i) {
                float s = (0.05f + 0.1f * (next() % 256) / 256.0f);
                memcpy(r + 512 + 4 * i, &s, 4);
            }
        }
        for (int i = c.fp8 ? 512 : 0; i < 576; ++i) {
            uint16_t b = host_bf16(normal());
            memcpy(r + (c.fp8 ? 528 + 2 * (i - 512) : 2 * i), &b, 2);
        }
    }
    auto value = [&](int t, int i) -> double {
        const uint8_t* r = &kv[size_t(t) * row_bytes];
        if (c.fp8 && i < 512) {
            float s;
            memcpy(&s, r + 512 + i / 128 * 4, 4);
            return double(from_e4m3(r[i])) * s;
        }
        uint16_t b;
        memcpy(&b, r + (c.fp8 ? 528 + 2 * (i - 512) : 2 * i), 2);
        return from_bf16(b);
    };
    std::vector<double> wide(size_t(tokens) * 576);
    for (int t = 0; t < tokens; ++t) for (int i = 0; i < 576; ++i) wide[size_t(t) * 576 + i] = value(t, i);
    std::vector<uint16_t> q(size_t(c.rows) * c.heads * 576);
    for (auto& x : q) x = host_bf16(normal());
    // Logical positions of request row % 2 go through a table of shuffled pages.
    std::vector<int32_t> table(requests * 32), request(c.rows), indices(size_t(c.rows) * c.topk), lengths(c.rows);
    for (int i = 0; i < 64; ++i) table[i] = i;
    for (int i = 63; i > 0; --i) std::swap(table[i], table[next() % (i + 1)]);
    for (int r = 0; r < c.rows; ++r) request[r] = r % requests;
    const int limit = c.mapped ? 2048 : tokens;
    const int odd[] = {0, 1, 2, 63, 64, 65, 127, 129, 2047, 100000, -5};
    for (int r = 0; r < c.rows; ++r) {
        lengths[r] = odd[r % 11];
        for (int j = 0; j < c.topk; ++j) {
            int32_t x = next() % limit;
            if (c.holes == 1 && next() % 3 == 0) x = -1;
            if (c.holes == 1 && next() % 50 == 0) x = limit + next() % 1000;
            if (c.holes == 1 && next() % 50 == 0) x = 0x7fffffff - next() % 1000;
            if (c.holes == 2 || (c.holes == 1 && r % 4 == 1)) x = -1;
            if (c.holes == 3 && (j < 70 || j % 128 > 64)) x = -1;
            indices[size_t(r) * c.topk + j] = x;
        }
    }
    std::vector<float> sink(c.heads);
    for (auto& x : sink) x = normal() * 3;

    uint8_t *dq, *dkv, *dout;
    int32_t *di, *dt, *dr, *dl;
    float *ds, *dlse;
    const size_t outs = size_t(c.rows) * c.heads * 512, out_bytes = outs * (c.f32_out ? 4 : 2);
    CK(cudaMalloc(&dq, q.size() * 2));
    CK(cudaMalloc(&dkv, kv.size()));
    CK(cudaMalloc(&dout, out_bytes));
    CK(cudaMalloc(&di, indices.size() * 4));
    CK(cudaMalloc(&dt, table.size() * 4));
    CK(cudaMalloc(&dr, request.size() * 4));
    CK(cudaMalloc(&dl, lengths.size() * 4));
    CK(cudaMalloc(&ds, sink.size() * 4));
    CK(cudaMalloc(&dlse, size_t(c.rows) * c.heads * 4));
    CK(cudaMemcpy(dq, q.data(), q.size() * 2, cudaMemcpyDefault));
    CK(cudaMemcpy(dkv, kv.data(), kv.size(), cudaMemcpyDefault));
    CK(cudaMemcpy(di, indices.data(), indices.size() * 4, cudaMemcpyDefault));
    CK(cudaMemcpy(dt, table.data(), table.size() * 4, cudaMemcpyDefault));
    CK(cudaMemcpy(dr, request.data(), request.size() * 4, cudaMemcpyDefault));
    CK(cudaMemcpy(dl, lengths.data(), lengths.size() * 4, cudaMemcpyDefault));
    CK(cudaMemcpy(ds, sink.data(), sink.size() * 4, cudaMemcpyDefault));

    AttentionSm90 s = {};
    Attention& p = s.a;
    p.q = dq, p.kv = dkv, p.indices = di, p.out = dout, p.lse = dlse;
    p.row_topk = c.lengths ? dl : nullptr;
    p.sink = c.sink ? ds : nullptr;
    p.q_head = 576, p.q_row = 576 * c.heads, p.out_head = 512, p.out_row = 512 * c.heads, p.lse_row = c.heads;
    p.indices_row = c.topk;
    p.row_bytes = row_bytes, p.page_bytes = int64_t(page) * row_bytes, p.page = page;
    p.map.keys = tokens, p.map.page = page, p.map.rows_per_request = 1, p.map.requests = requests;
    p.map.max_pages = 32, p.map.pages = tokens / page, p.map.table_stride = 32;
    if (c.mapped) p.mapped = 1, p.map.block_table = dt, p.map.row_request = dr;
    p.softmax_scale = c.scale;
    p.heads = c.heads, p.d_qk = 576, p.d_v = 512, p.topk = c.topk;
    p.q_type = BF16, p.kv_format = c.fp8 ? KV_FP8 : KV_BF16, p.out_type = c.f32_out ? F32 : BF16;
    cut(s, c.rows, c.splits);

    std::vector<uint8_t> out(out_bytes), again(out_bytes);
    std::vector<float> lse(size_t(c.rows) * c.heads);
    int unstable = 0;
    for (int run = 0; run < 4; ++run) {
        CK(cudaMemset(dout, 0x7f, out_bytes));
        CK(cudaMemset(dlse, 0x7f, lse.size() * 4));
        launch(s, c.rows, 0);
        CK(cudaGetLastError());
        CK(cudaDeviceSynchronize());
        CK(cudaMemcpy(run ? again.data() : out.data(), dout, out_bytes, cudaMemcpyDefault));
        if (run && memcmp(out.data(), again.data(), out_bytes)) ++unstable;
    }
    CK(cudaMemcpy(lse.data(), dlse, lse.size() * 4, cudaMemcpyDefault));

    double worst = 0, worst_lse = 0, norm = 0, off = 0;
    int bad = 0;
    std::mutex sums;
    auto compare = [&](int r) {
        double worst_here = 0, worst_lse_here = 0, norm_here = 0, off_here = 0;
        int bad_here = 0;
        const int count = c.lengths ? std::min(std::max(lengths[r], 0), c.topk) : c.topk;
        std::vector<int> use;
        for (int j = 0; j < count; ++j) {
            int x = indices[size_t(r) * c.topk + j];
            if (x < 0 || x >= limit) continue;
            use.push_back(c.mapped ? table[r % 2 * 32 + x / page] * page + x % page : x);
        }
        for (int h = 0; h < c.heads; h += (c.heads > 8 ? 5 : 1)) {
            if (c.rows > 8 && r > 4 && r % 7) continue;
            std::vector<double> w(use.size()), qd(576), mean(512);
            for (int i = 0; i < 576; ++i) qd[i] = from_bf16(q[(size_t(r) * c.heads + h) * 576 + i]);
            double top = -INFINITY, sum = 0;
            for (size_t j = 0; j < use.size(); ++j) {
                const double* k = &wide[size_t(use[j]) * 576];
                double d[4] = {};
                for (int i = 0; i < 576; ++i) d[i % 4] += qd[i] * k[i];
                w[j] = (d[0] + d[1] + d[2] + d[3]) * c.scale;
                top = std::max(top, w[j]);
            }
            for (auto& x : w) sum += x = exp(x - top);
            const double denom = sum + (c.sink ? exp(sink[h] - top) : 0.0);
            const float got_lse = lse[size_t(r) * c.heads + h];
            if (use.empty()) {
                bad_here += got_lse != -INFINITY;
            } else {
                worst_lse_here = std::max(worst_lse_here, fabs(got_lse - (top + log(sum))));
                bad_here += !(got_lse == got_lse);
            }
            for (size_t j = 0; j < use.size(); ++j) {
                const double* v = &wide[size_t(use[j]) * 576];
                for (int i = 0; i < 512; ++i) mean[i] += w[j] * v[i];
            }
            for (int i = 0; i < 512; ++i) {
                const double o = use.empty() ? 0.0 : mean[i] / denom;
                const size_t at = (size_t(r) * c.heads + h) * 512 + i;
                float got;
                if (c.f32_out) memcpy(&got, &out[at * 4], 4); else { uint16_t b; memcpy(&b, &out[at * 2], 2); got = from_bf16(b); }
                if (!(got == got) || (use.empty() && got != 0.0f)) ++bad_here;
                worst_here = std::max(worst_here, fabs(got - o));
                off_here += (got - o) * (got - o);
                norm_here += o * o;
            }
        }
        std::lock_guard<std::mutex> held(sums);
        worst = std::max(worst, worst_here), worst_lse = std::max(worst_lse, worst_lse_here);
        norm += norm_here, off += off_here, bad += bad_here;
    };
    std::vector<std::thread> threads;
    for (int i = 0; i < 16; ++i) {
        threads.emplace_back([&, i] { for (int r = i; r < c.rows; r += 16) compare(r); });
    }
    for (auto& t : threads) t.join();
    const double relative = norm > 0 ? sqrt(off / norm) : 0;
    const bool ok = bad == 0 && unstable == 0 && relative < 6e-3 && worst_lse < (c.fp8 ? 1e-2 : 1e-3);
    failures += !ok;
    printf("%-4s %-34s rows %d heads %d topk %d %s splits %d: max abs %.2e rel %.2e lse %.2e bad %d unstable %d\n", ok ? "ok" : "FAIL",
           c.name, c.rows, c.heads, c.topk, c.fp8 ? "fp8" : "bf16", s.splits, worst, relative, worst_lse, bad, unstable);
    fflush(stdout);
    for (void* x : {(void*)dq, (void*)dkv, (void*)dout, (void*)di, (void*)dt, (void*)dr, (void*)dl, (void*)ds, (void*)dlse}) cudaFree(x);
}

static uint8_t* pool;
static const int64_t POOL = int64_t(3) << 30;

// The rows of the indices, read and nothing else: a block takes 64 of a row's, a warp a KV row at a time.
__global__ void __launch_bounds__(256) only_gather(PARAMS Attention p, int parts) {
    const int64_t row = blockIdx.x / parts;
    const int first = blockIdx.x % parts * 64, lane = threadIdx.x % 32, chunks = int(p.row_bytes / 16);
    uint4 x[8][3] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int32_t index = p.indices[row * p.indices_row + first + threadIdx.x / 32 * 8 + i];
        const uint4* from = reinterpret_cast<const uint4*>(p.kv + int64_t(index) * p.row_bytes);
#pragma unroll
        for (int c = 0; c < 3; ++c) if (c * 32 + lane < chunks) x[i][c] = from[c * 32 + lane];
    }
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < 24; ++i) sum += x[i / 3][i % 3].x ^ x[i / 3][i % 3].y ^ x[i / 3][i % 3].z ^ x[i / 3][i % 3].w;
    if (sum == 0x12345678) p.lse[0] = 1.0f;
}
// Indices of rows, `order`: 0 random, 1 ascending, 2 ascending and 90 % of them the same for 64 neighbours.
static const std::vector<int32_t>& chosen(int rows, int topk, int64_t tokens, int order) {
    static std::vector<int32_t> indices;
    static std::tuple<int, int, int64_t, int> held;
    if (held == std::make_tuple(rows, topk, tokens, order)) return indices;
    held = {rows, topk, tokens, order};
    indices.resize(size_t(rows) * topk);
    std::vector<std::thread> threads;
    for (int block = 0; block < 16; ++block) {
        threads.emplace_back([=] {
            std::vector<int32_t> common(topk);
            std::mt19937_64 random(block + 1);
            const int first = rows * block / 16, last = rows * (block + 1) / 16;
            for (int r = first; r < last; ++r) {
                int32_t* to = &indices[size_t(r) * topk];
                // One of each stretch of tokens / topk.
                for (int j = 0; j < topk; ++j) to[j] = int32_t((j * tokens + int64_t(random() % tokens)) / topk);
                if (order == 2) {
                    if ((r - first) % 64 == 0) std::copy(to, to + topk, common.begin());
                    for (int j = 0; j < topk; ++j) if (random() % 10) to[j] = common[j];
                }
                if (order == 0) std::shuffle(to, to + topk, random);
            }
        });
    }
    for (auto& t : threads) t.join();
    return indices;
}

static std::vector<const char*> filters;  // All of them are in the names of what is timed.
static void time(const char* name, int requests, int queries, int heads, int64_t tokens, int fp8, int order, int splits, bool prefill) {
    for (const char* f : filters) if (!strstr(name, f)) return;
    const int topk = 2048, rows = requests * queries, row_bytes = fp8 ? 656 : 1152;
    const int64_t stores = prefill ? 1 : requests;
    const int sets = prefill ? 1 : int(std::max<int64_t>(1, std::min<int64_t>(64, POOL / (stores * tokens * row_bytes))));
    static int filled = -1;
    if (filled != fp8) {
        fill<<<1056, 256>>>(pool, POOL / row_bytes, fp8);
        CK(cudaDeviceSynchronize());
        filled = fp8;
    }
    std::vector<int32_t> indices = chosen(rows, topk, tokens, order);
    if (!prefill) for (int r = 0; r < rows; ++r) for (int j = 0; j < topk; ++j) indices[size_t(r) * topk + j] += int32_t(r / queries * tokens);
    int32_t* di;
    uint16_t *dq, *dout;
    float* dlse;
    CK(cudaMalloc(&di, indices.size() * 4));
    CK(cudaMalloc(&dq, size_t(rows) * heads * 1152));
    CK(cudaMalloc(&dout, size_t(rows) * heads * 1024));
    CK(cudaMalloc(&dlse, size_t(rows) * heads * 4));
    CK(cudaMemcpy(di, indices.data(), indices.size() * 4, cudaMemcpyDefault));
    fill<<<1056, 256>>>(reinterpret_cast<uint8_t*>(dq), int64_t(rows) * heads, 0);
    AttentionSm90 s = {};
    Attention& p = s.a;
    p.q = dq, p.indices = di, p.out = dout, p.lse = dlse;
    p.q_head = 576, p.q_row = 576 * heads, p.out_head = 512, p.out_row = 512 * heads, p.lse_row = heads, p.indices_row = topk;
    p.row_bytes = row_bytes, p.page_bytes = int64_t(64) * row_bytes, p.page = 64;
    p.map.keys = stores * tokens;
    p.softmax_scale = 0.0417f, p.heads = heads, p.d_qk = 576, p.d_v = 512, p.topk = topk;
    p.q_type = BF16, p.kv_format = fp8 ? KV_FP8 : KV_BF16, p.out_type = BF16;
    cut(s, rows, splits);
    cudaStream_t stream;
    CK(cudaStreamCreate(&stream));
    const int launches = prefill ? 3 : std::max(sets, 16);
    p.kv = pool;
    launch(s, rows, stream);
    CK(cudaStreamSynchronize(stream));
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    for (int i = 0; i < launches; ++i) {
        p.kv = pool + int64_t(i % sets) * stores * tokens * row_bytes;
        launch(s, rows, stream);
    }
    CK(cudaStreamEndCapture(stream, &graph));
    CK(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t a, b;
    cudaEventCreate(&a), cudaEventCreate(&b);
    CK(cudaGraphLaunch(exec, stream));
    std::vector<float> times;
    for (int i = 0; i < 7; ++i) {
        cudaEventRecord(a, stream);
        CK(cudaGraphLaunch(exec, stream));
        cudaEventRecord(b, stream);
        CK(cudaStreamSynchronize(stream));
        float ms;
        cudaEventElapsedTime(&ms, a, b);
        times.push_back(ms * 1000 / launches);
    }
    std::sort(times.begin(), times.end());
    const double us = times[3], flop = 2.0 * rows * heads * topk * (576 + 512), bytes = double(rows) * topk * row_bytes;
    printf("%-40s splits %2d: %9.2f us (min %.2f)  %6.1f TF  gather %7.1f GB/s\n", name, s.splits, us, times[0], flop / us / 1e6, bytes / us / 1e3);
    fflush(stdout);
    cudaGraphExecDestroy(exec), cudaGraphDestroy(graph), cudaStreamDestroy(stream);
    cudaFree(di), cudaFree(dq), cudaFree(dout), cudaFree(dlse);
}

int main(int argc, char** argv) {
    const std::string what = argc > 1 ? argv[1] : "all";
    filters.assign(argv + std::min(argc, 2), argv + argc);
    auto allow = [](auto kernel, int threads, size_t bytes) {
        CK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
        int blocks;
        CK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, bytes));
        printf("shared %zu blocks %d\n", bytes, blocks);
    };
    allow(wide::attention_bf16, wide::THREADS, sizeof(wide::Shared));
    allow(wide_fp8::attention_fp8, wide::THREADS, sizeof(wide_fp8::Shared));
    for (const FewKernel& k : few_kernels) allow(k.kernel, k.threads, k.shared);
    if (what == "check" || what == "all") {
        check({"one tile", 1, 64, 64, 0, 1});
        check({"two tiles", 1, 64, 128, 0, 1});
        check({"three tiles", 1, 64, 192, 0, 1});
        check({"many rows", 40, 64, 2048, 0, 1});
        check({"one tile", 1, 64, 64, 1, 1});
        check({"fp8", 3, 64, 1024, 1, 1});
        check({"128 heads, f32 out", 3, 128, 512, 0, 1, 0, 0, 1, 1});
        check({"holes, sink", 9, 64, 576, 0, 1, 1, 0, 1});
        check({"holes, mapped, f32", 9, 20, 600, 1, 1, 1, 0, 1, 1, 1});
        check({"nothing", 2, 64, 256, 0, 1, 2, 0, 1});
        check({"holes by tile", 2, 64, 1000, 0, 1, 3});
        check({"lengths", 22, 64, 300, 0, 1, 0, 1, 1});
        check({"lengths split", 22, 64, 2048, 1, 8, 0, 1, 1});
        check({"lengths, holes, mapped, split", 22, 7, 4096, 0, 16, 1, 1, 1, 0, 1});
        check({"heads 1", 3, 1, 100, 1, 2, 1});
        check({"heads 8", 3, 8, 2048, 1, 32, 1, 0, 1});
        check({"heads 20", 3, 20, 2048, 0, 0});
        check({"heads 100", 3, 100, 2048, 0, 0});
        check({"heads 128 split", 2, 128, 2048, 1, 32, 0, 0, 1, 1});
        for (int fp8 : {0, 1}) {
            for (int tiles : {1, 2, 3, 4, 5, 7}) check({"128", 3, 128, 64 * tiles, fp8, 1});
            check({"128, many rows", 300, 128, 2048, fp8, 1});
            check({"128, holes, sink, mapped, f32", 9, 96, 600, fp8, 1, 1, 0, 1, 1, 1});
            check({"128, lengths", 22, 65, 300, fp8, 1, 0, 1, 1});
            check({"128, lengths, split", 22, 128, 2048, fp8, 8, 0, 1, 1});
            check({"128, holes by tile", 2, 127, 1000, fp8, 1, 3});
            check({"128, nothing", 2, 128, 256, fp8, 1, 2, 0, 1});
            check({"128, nothing, split", 2, 128, 256, fp8, 4, 2, 0, 1});
            if (!fp8) check({"128, large scores", 2, 128, 2048, fp8, 4, 0, 0, 0, 0, 0, 2.0f});
        }
        check({"nothing, split", 2, 64, 256, 1, 4, 2, 0, 1});
        for (int heads : {1, 5, 8, 9, 16, 19, 20, 21, 32}) {
            for (int fp8 : {0, 1}) {
                check({"few", 3, heads, 128, fp8, 1});
                check({"few, holes", 9, heads, 600, fp8, 1, 1, 0, 1, 1, 1});
                check({"few, lengths, split", 22, heads, 1024, fp8, 8, 0, 1, 1});
            }
        }
        check({"few, large scores", 2, 16, 2048, 0, 4, 0, 0, 0, 0, 0, 2.0f});
        check({"few, nothing", 2, 16, 300, 0, 1, 2, 0, 1});
        check({"few, nothing, split", 2, 8, 300, 1, 4, 2, 0, 1});
        only_wide = true;
        check({"padded, holes", 9, 20, 600, 1, 1, 1, 0, 1, 1, 1});
        check({"padded", 3, 8, 2048, 0, 32, 1, 0, 1});
        only_wide = false;
        check({"large scores", 2, 64, 2048, 0, 4, 0, 0, 0, 0, 0, 2.0f});
        printf("%d failures\n", failures);
        fflush(stdout);
    }
    if (what == "time" || what == "all") {
        CK(cudaMalloc(&pool, POOL));
        for (int heads : {8, 16, 20, 32, 64, 128}) {
            for (int fp8 : {1, 0}) {
                for (int requests : {1, 16, 64}) {
                    char name[64];
                    snprintf(name, 64, "decode %s B%d h%d", fp8 ? "fp8" : "bf16", requests, heads);
                    time(name, requests, 1, heads, 32768, fp8, 1, 0, false);
                    if (requests == 64 && heads >= 64 && fp8) {
                        snprintf(name, 64, "decode fp8 B64 q2 h%d", heads);
                        time(name, requests, 2, heads, 32768, fp8, 1, 0, false);
                    }
                    if (requests == 1 && fp8 && (heads == 8 || heads >= 64)) time("  16 splits", 1, 1, heads, 32768, 1, 1, 16, false);
                }
            }
        }
        gather_only = true;
        for (int fp8 : {1, 0}) {
            for (int requests : {1, 16, 64}) {
                char name[64];
                snprintf(name, 64, "only gather %s B%d", fp8 ? "fp8" : "bf16", requests);
                time(name, requests, 1, 8, 32768, fp8, 1, 1, false);
            }
        }
        time("only gather prefill bf16 kv131072", 4096, 1, 8, 131072, 0, 1, 1, true);
        time("only gather prefill fp8 kv131072", 4096, 1, 8, 131072, 1, 1, 1, true);
        gather_only = false;
        time("prefill bf16 h8 kv131072 asc", 4096, 1, 8, 131072, 0, 1, 1, true);
        time("prefill bf16 h20 kv131072 asc", 4096, 1, 20, 131072, 0, 1, 1, true);
        time("prefill fp8 h8 kv131072 asc", 4096, 1, 8, 131072, 1, 1, 1, true);
        time("prefill fp8 h16 kv131072 asc", 4096, 1, 16, 131072, 1, 1, 1, true);
        time("prefill fp8 h20 kv131072 asc", 4096, 1, 20, 131072, 1, 1, 1, true);
        time("prefill fp8 h32 kv131072 asc", 4096, 1, 32, 131072, 1, 1, 1, true);
        time("prefill fp8 h20 kv131072 random", 4096, 1, 20, 131072, 1, 0, 1, true);
        time("prefill fp8 h20 kv131072 90 % shared", 4096, 1, 20, 131072, 1, 2, 1, true);
        time("prefill fp8 h20 8192 rows kv200000 asc", 8192, 1, 20, 200000, 1, 1, 1, true);
        for (int tokens : {32768, 131072}) {
            for (int order : {0, 1, 2}) {
                for (int heads : {64, 128}) {
                    const char* orders[] = {"random", "asc", "shared"};
                    char name[64];
                    snprintf(name, 64, "prefill bf16 h%d kv%d %s", heads, tokens, orders[order]);
                    time(name, 4096, 1, heads, tokens, 0, order, 1, true);
                }
            }
        }
        time("prefill fp8 h64 kv32768 asc", 4096, 1, 64, 32768, 1, 1, 1, true);
        time("prefill fp8 h128 kv32768 asc", 4096, 1, 128, 32768, 1, 1, 1, true);
    }
    return failures != 0;
}
