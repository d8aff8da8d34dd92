// Checks and times kernels/topk_sm90.cu by itself, without the library:
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -o bench kernels/bench/topk_sm90.cu
//   ./bench [check|quick|race|time|hard|profile]...
#include "../topk_sm90.cu"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#define OK(x)                                                                            \
    do {                                                                                 \
        cudaError_t e_ = (x);                                                            \
        if (e_ != cudaSuccess) printf("line %d: %s\n", __LINE__, cudaGetErrorString(e_)), fflush(stdout), exit(1); \
    } while (0)

struct Variant {
    const char* name;
    void (*kernel)(TopK);
    int cluster;
};
Variant variants[] = {{"short", topk_short, 1}, {"1", topk_1, 1}, {"4", topk_4, 4}, {"16", topk_16, 16}};

Variant& variant(const char* name) {
    for (Variant& v : variants) {
        if (!strcmp(v.name, name)) return v;
    }
    return variants[0];
}

// --- Data, made on the device.
enum { NORMAL, NARROW2, NARROW3, LEVELS, ZEROS, BIG, EQUAL, ALLZERO, RISING, FALLING, NANS, DENORMAL, MINUSINF, CLUSTERED, RELU, KINDS };
const char* kinds[] = {"normal", "[1,1.2)", "[1,1.001)", "64 levels", "99% zeros", "x1e5", "equal", "zero", "rising",
                       "falling", "nan+-inf", "denormal", "-inf", "clustered", "relu sums"};

__device__ uint32_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x >> 32 ^ x;
}

__global__ void make(void* out, int type, int64_t rows, int64_t columns, int64_t stride, int kind, int seed) {
    const int64_t n = rows * columns;
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
        const int64_t r = i / columns, c = i % columns;
        uint32_t a = mix(2 * i + (uint64_t(seed) << 40)), b = mix(2 * i + 1 + (uint64_t(seed) << 40));
        float u = (a + 0.5f) * 0x1p-32f, v = (b >> 8) * 0x1p-24f;
        float z = sqrtf(-2.0f * logf(fminf(u, 0.99999994f))) * cosf(6.2831853f * v), x = z;
        if (kind == NARROW2) x = 1.0f + 0.2f * v;
        if (kind == NARROW3) x = 1.0f + 0.001f * v;
        if (kind == LEVELS) x = float(b % 64) - 20.0f;
        if (kind == ZEROS) x = b % 100 ? (b & 256 ? 0.0f : -0.0f) : z;
        if (kind == BIG) x = z * 1e5f;
        if (kind == EQUAL) x = -3.25f;
        if (kind == ALLZERO) x = b & 1 ? 0.0f : -0.0f;
        if (kind == RISING) x = float(c) * 1e-3f - 5.0f;
        if (kind == FALLING) x = 5.0f - float(c) * 1e-3f;
        if (kind == NANS) x = b % 8 == 0 ? __uint_as_float(0x7fc00000 | (b & 0x80000000)) : b % 8 == 1 ? -INFINITY : b % 4096 == 2 ? INFINITY : z;
        if (kind == DENORMAL) x = __uint_as_float(b & 0x807fffff);
        if (kind == MINUSINF) x = b % 128 ? (b & 256 ? -INFINITY : NAN) : z;
        if (kind == RELU) {
            x = 0.0f;
            for (int h = 0; h < 8; ++h) {
                const uint32_t m = mix(8 * i + h + (uint64_t(77) << 40));
                x += fmaxf(float(m & 0xffff) + float(m >> 16) - 65535.0f, 0.0f) * (h + 1) * 1e-6f;
            }
        }
        if (kind == CLUSTERED) x = c / 4096 == (r * 7 + 3) % max(columns / 4096, int64_t(1)) ? z + 10.0f : z;
        if (type == F32) static_cast<float*>(out)[r * stride + c] = x;
        else static_cast<uint16_t*>(out)[r * stride + c] = f32_to_bf16(x);
    }
}

// --- The definition, checked by brute force: a block a row, a bit a column.
__global__ void check(TopK p, uint32_t* bits, int* wrong) {
    __shared__ uint32_t least;
    __shared__ int last_in, first_out, bad;
    const int64_t r = blockIdx.x, words = p.columns / 32 + 1;
    bits += r * words;
    const int64_t start = p.row_start ? max(int64_t(p.row_start[r]), int64_t(0)) : 0;
    const int64_t end = p.row_end ? min(int64_t(p.row_end[r]), p.columns) : p.columns;
    const int64_t length = max(end - start, int64_t(0));
    const int32_t* out = p.out + r * p.out_row;
    const int take = int(min(length, int64_t(p.k)));
    if (threadIdx.x == 0) least = ~0u, last_in = -1, first_out = 0x7fffffff, bad = 0;
    for (int64_t i = threadIdx.x; i < words; i += blockDim.x) bits[i] = 0;
    __syncthreads();
    auto rank = [&](int64_t i) { return rank_of(load_float(p.logits, p.type, r * p.logits_row + start + i)); };
    for (int i = threadIdx.x; i < p.k; i += blockDim.x) {
        const int c = out[i];
        if (i >= take ? c != -1 : c < 0 || c >= length || (i > 0 && c <= out[i - 1])) {
            atomicExch(&bad, 1);
        } else if (i < take) {
            atomicOr(&bits[c / 32], 1u << c % 32);
            atomicMin(&least, rank(c));
        }
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < length; i += blockDim.x) {
        const bool in = bits[i / 32] >> i % 32 & 1;
        const uint32_t x = rank(i);
        if (!in && x > least) atomicExch(&bad, 2);
        if (in && x == least) atomicMax(&last_in, int(i));
        if (!in && x == least) atomicMin(&first_out, int(i));
    }
    __syncthreads();
    if (threadIdx.x == 0 && (bad || last_in > first_out)) atomicAdd(wrong, 1);
}

__global__ void differ(const int32_t* a, const int32_t* b, int64_t n, int* wrong) {
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
        if (a[i] != b[i]) *wrong = 1;
    }
}

void launch(const Variant& v, const TopK& p, int64_t rows, cudaStream_t stream) {
    v.kernel<<<unsigned(rows * v.cluster), THREADS, sizeof(Shared), stream>>>(p);
}

char* data;
const size_t DATA = size_t(5) << 29;  // 2.5 GiB
int32_t *out, *again, *starts, *ends;
uint32_t* bits;
int* wrong;
int failures = 0;

int number_wrong() {
    int n;
    OK(cudaMemcpy(&n, wrong, 4, cudaMemcpyDeviceToHost));
    return n;
}

// By sorting, on the host.
std::vector<int32_t> sorted(const TopK& p, int64_t r, int start, int end) {
    const int64_t length = std::max(std::min(int64_t(end), p.columns) - std::max(start, 0), int64_t(0));
    const int size = p.type == F32 ? 4 : 2;
    std::vector<char> raw(length * size + 4);
    if (length > 0)
        OK(cudaMemcpy(raw.data(), static_cast<const char*>(p.logits) + (r * p.logits_row + std::max(start, 0)) * size,
                      length * size, cudaMemcpyDeviceToHost));
    std::vector<float> x(length);
    for (int64_t i = 0; i < length; ++i) {
        uint32_t w;
        if (size == 4) memcpy(&w, &raw[4 * i], 4);
        else { uint16_t h; memcpy(&h, &raw[2 * i], 2); w = uint32_t(h) << 16; }
        memcpy(&x[i], &w, 4);
        if (std::isnan(x[i])) x[i] = -INFINITY;
    }
    std::vector<int32_t> order(length);
    std::iota(order.begin(), order.end(), 0);
    const int64_t take = std::min(length, int64_t(p.k));
    auto before = [&](int a, int b) { return x[a] != x[b] ? x[a] > x[b] : a < b; };
    if (take > 0 && take < length) std::nth_element(order.begin(), order.begin() + take - 1, order.end(), before);
    order.resize(take);
    std::sort(order.begin(), order.end());
    order.resize(p.k, -1);
    return order;
}

void verify(const char* name, const Variant& v, TopK p, int64_t rows, const std::vector<int>* s = nullptr,
            const std::vector<int>* e = nullptr) {
    OK(cudaMemset(out, 0x55, rows * p.out_row * 4));
    p.out = out;
    launch(v, p, rows, 0);
    OK(cudaGetLastError());
    OK(cudaMemset(wrong, 0, 4));
    check<<<unsigned(rows), 512>>>(p, bits, wrong);
    OK(cudaDeviceSynchronize());
    const int n = number_wrong();
    int host = 0;
    std::vector<int32_t> got(p.k);
    for (int64_t r = 0; r < (v.name[0] == '1' && !v.name[1] && p.columns < 200000 ? std::min<int64_t>(rows, 2) : 0); ++r) {
        OK(cudaMemcpy(got.data(), out + r * p.out_row, p.k * 4, cudaMemcpyDeviceToHost));
        if (got != sorted(p, r, s ? (*s)[r] : 0, e ? (*e)[r] : int(p.columns))) ++host;
    }
    p.out = again;
    OK(cudaMemset(again, 0x55, rows * p.out_row * 4));
    OK(cudaMemset(wrong, 0, 4));
    launch(v, p, rows, 0);
    differ<<<256, 256>>>(out, again, rows * p.out_row, wrong);
    const int unstable = number_wrong();
    if (n || host || unstable) {
        if (failures++ < 40)
            printf("FAIL %s variant %s k %d columns %ld: %d of %ld rows, %d by the host, unstable %d\n", name, v.name, p.k,
                   long(p.columns), n, long(rows), host, unstable);
    }
}

void correctness(bool quick) {
    int cases = 0;
    const char* names[] = {"1", "4", "16"};
    for (int type : {F32, BF16}) {
        for (int64_t columns : {1, 100, 2049, 8192, 8193, 20001, 32768, 131072, 262147, 1000003}) {
            if (quick && columns != 100 && columns != 8193 && columns != 20001 && columns != 262147) continue;
            const int64_t rows = quick || columns > 200000 ? 4 : 12, stride = columns + (columns % 2 ? 0 : 5);
            for (int kind = 0; kind < KINDS; ++kind) {
                if (quick && kind != NORMAL && kind != ZEROS && kind != RISING) continue;
                if (columns > 200000 && kind > FALLING && kind != MINUSINF) continue;
                if (columns < 8000 && kind > ZEROS && kind != NANS) continue;
                char* at = data + (type == F32 ? 4 : 2) * (kind % 4);  // Any alignment.
                make<<<1024, 256>>>(at, type, rows, columns, stride, kind, kind + 1);
                std::vector<int> s(rows), e(rows);
                for (int64_t r = 0; r < rows; ++r) {
                    s[r] = r % 3 == 1 ? int(r) : r % 5 == 4 ? -3 : 0;
                    e[r] = r % 4 == 2 ? int(columns * 2 / 3) : r % 4 == 3 ? int(columns + 7) : int(columns - r / 2);
                }
                OK(cudaMemcpy(starts, s.data(), rows * 4, cudaMemcpyHostToDevice));
                OK(cudaMemcpy(ends, e.data(), rows * 4, cudaMemcpyHostToDevice));
                for (int k : {1, 512, 2048, 4096, 1000}) {
                    if ((quick || kind != NORMAL) && k != 2048 && (quick || k != 4096)) continue;
                    TopK p{at, starts, ends, out, stride, k + 3, columns, k, type};
                    for (const char* name : names) {
                        verify(kinds[kind], variant(name), p, rows, &s, &e), ++cases;
                    }
                    if (columns <= 8192) {
                        // For aligned rows.
                        TopK q = p;
                        q.logits = data, q.logits_row = (columns + 3) / 4 * 4;
                        make<<<1024, 256>>>(data, type, rows, columns, q.logits_row, kind, kind + 1);
                        verify(kinds[kind], variant("short"), q, rows, &s, &e), ++cases;
                        make<<<1024, 256>>>(at, type, rows, columns, stride, kind, kind + 1);
                    }
                }
            }
        }
    }
    printf("correctness: %d cases, %d failed\n", cases, failures);
    fflush(stdout);
}

// Median of 7 replays of a graph with many launches, over so many sets of rows that they miss L2.
double time(const Variant& v, TopK p, int64_t rows, bool cold) {
    const size_t set = size_t(rows) * p.logits_row * (p.type == F32 ? 4 : 2);
    const int sets = cold ? int(std::max<size_t>(1, std::min<size_t>(DATA / set, 200000000 / set + 1))) : 1;
    const int launches = set > 1000000000 ? 2 : set > 100000000 ? 4 : std::max(100, sets);
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t a, b;
    OK(cudaStreamCreate(&stream));
    OK(cudaEventCreate(&a));
    OK(cudaEventCreate(&b));
    OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    for (int i = 0; i < launches; ++i) {
        TopK q = p;
        q.logits = static_cast<const char*>(p.logits) + (i % sets) * set;
        launch(v, q, rows, stream);
    }
    OK(cudaStreamEndCapture(stream, &graph));
    OK(cudaGraphInstantiate(&exec, graph, 0));
    std::vector<float> times;
    for (int i = 0; i < 8; ++i) {
        OK(cudaEventRecord(a, stream));
        OK(cudaGraphLaunch(exec, stream));
        OK(cudaEventRecord(b, stream));
        OK(cudaEventSynchronize(b));
        float ms;
        OK(cudaEventElapsedTime(&ms, a, b));
        if (i) times.push_back(ms * 1e3f / launches);
    }
    std::sort(times.begin(), times.end());
    OK(cudaGraphExecDestroy(exec));
    OK(cudaGraphDestroy(graph));
    OK(cudaStreamDestroy(stream));
    return times[times.size() / 2];
}

void fill(int type, int64_t columns, int kind) {
    const int64_t rows = (size_t(1) << 31) / (columns * 4);
    make<<<4096, 256>>>(data, type, rows, columns, columns, kind, 1);
    OK(cudaDeviceSynchronize());
}

void timing() {
    printf("us, cold unless (warm); GB/s of one read\n");
    for (int64_t columns : {131072, 32768, 8192}) {
        fill(F32, columns, NORMAL);
        for (int64_t rows : {4096, 512, 64, 30, 7, 1}) {
            printf("%5ld x %6ld f32:", long(rows), long(columns));
            for (const Variant& v : variants) {
                if (v.kernel == topk_short && columns > HELD) continue;
                if (v.cluster > 1 && (rows * v.cluster > 132 || columns <= HELD)) continue;
                TopK p{data, nullptr, nullptr, out, columns, 2048, columns, 2048, F32};
                const double us = time(v, p, rows, true);
                printf("  %s %.1f", v.name, us);
                if (rows > 1000) printf(" (%.0f GB/s)", rows * columns * 4 / us * 1e-3);
                if (rows <= 64) printf(" (%.1f)", time(v, p, rows, false));
            }
            printf("\n");
            fflush(stdout);
        }
    }
}

// As src/backend/cuda/mod.rs chooses.
Variant& chosen(int64_t rows, int64_t columns) {
    if (columns <= HELD) return variant("short");
    return variant(columns > 32768 && rows <= 7 ? "16" : rows <= 30 ? "4" : "1");
}

void other_k() {
    printf("us, cold: k 512, 1024, 2048, 4096\n");
    fill(F32, 131072, NORMAL);
    for (int64_t rows : {4096, 64, 1}) {
        printf("%5ld x 131072 f32:", long(rows));
        for (int k : {512, 1024, 2048, 4096}) {
            TopK p{data, nullptr, nullptr, out, 131072, k, 131072, k, F32};
            printf("  %.1f", time(chosen(rows, 131072), p, rows, true));
        }
        printf("\n");
    }
}

void hard() {
    printf("hard inputs, us cold: 4096, 64, 1 rows\n");
    for (int type : {F32, BF16}) {
        for (int64_t columns : {131072, 32768, 8192}) {
            double easy[3];
            for (int kind = 0; kind < KINDS; ++kind) {
                if (type == BF16 && kind != NORMAL && kind != ZEROS && kind != RELU) continue;
                fill(type, columns, kind);
                printf("%6ld %s %-10s:", long(columns), type == F32 ? "f32" : "bf16", kinds[kind]);
                int i = 0;
                for (int64_t rows : {4096, 64, 1}) {
                    TopK p{data, nullptr, nullptr, out, columns, 2048, columns, 2048, type};
                    const double us = time(chosen(rows, columns), p, rows, true);
                    if (kind == NORMAL) easy[i] = us;
                    printf("  %.1f (x %.2f)", us, us / easy[i++]);
                }
                printf("\n");
                fflush(stdout);
            }
        }
    }
}

// One launch of each kernel on ties, and no others of weight: for racecheck.
void race() {
    for (const Variant& v : variants) {
        const int64_t columns = v.kernel == topk_short ? 3000 : 9001 * v.cluster;
        make<<<64, 256>>>(data, F32, 1, columns, columns, ZEROS, 1);
        TopK p{data, nullptr, nullptr, out, columns, 512, columns, 512, F32};
        launch(v, p, 1, 0);
        OK(cudaDeviceSynchronize());
        printf("topk_%s ran\n", v.name);
        fflush(stdout);
    }
}

void profile() {
    for (int64_t columns : {131072, 32768, 8192}) {
        fill(F32, columns, NORMAL);
        TopK p{data, nullptr, nullptr, out, columns, 2048, columns, 2048, F32};
        launch(chosen(4096, columns), p, 4096, 0);
        OK(cudaDeviceSynchronize());
    }
}

int main(int argc, char** argv) {
    OK(cudaMalloc(&data, DATA));
    for (int32_t** p : {&out, &again}) OK(cudaMalloc(p, 4096 * 4100 * 4));
    for (int32_t** p : {&starts, &ends}) OK(cudaMalloc(p, 1 << 20));
    OK(cudaMalloc(&bits, 4 << 20));
    OK(cudaMalloc(&wrong, 4));
    for (Variant& v : variants) {
        OK(cudaFuncSetAttribute(v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(Shared))));
        if (v.cluster > 8) OK(cudaFuncSetAttribute(v.kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
        int blocks = 0;
        if (v.cluster == 1) {
            OK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, v.kernel, THREADS, sizeof(Shared)));
        } else {
            cudaLaunchConfig_t config{};
            config.gridDim = dim3(v.cluster), config.blockDim = dim3(THREADS), config.dynamicSmemBytes = sizeof(Shared);
            OK(cudaOccupancyMaxActiveClusters(&blocks, v.kernel, &config));
        }
        cudaFuncAttributes a;
        OK(cudaFuncGetAttributes(&a, v.kernel));
        printf("topk_%s: %d registers, %zu B local, %d %s\n", v.name, a.numRegs, a.localSizeBytes, blocks,
               v.cluster == 1 ? "blocks an SM" : "clusters");
    }
    for (int i = 1; i < argc; ++i) {
        const std::string what = argv[i];
        if (what == "check") correctness(false);
        if (what == "quick") correctness(true);
        if (what == "time") timing(), other_k();
        if (what == "hard") hard();
        if (what == "race") race();
        if (what == "profile") profile();
    }
    return failures != 0;
}
