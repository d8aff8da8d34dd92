// Computes: nothing of use: reads memory as fast as it comes.
// Shapes:   16-byte words -> one word a block, written only if the sum happens to be `never`.
// Idea:     the ceiling that memory-bound kernels are compared with: coalesced loads, eight in flight a thread.
// Roofline: memory.
#include <cstdint>

extern "C" __global__ void __launch_bounds__(512) peak_read(const uint4* data, int64_t words, uint32_t* out) {
    const int64_t step = int64_t(gridDim.x) * 512;
    uint32_t sum = 0;
    int64_t i = int64_t(blockIdx.x) * 512 + threadIdx.x;
    for (; i + 7 * step < words; i += 8 * step) {
        uint4 x[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] = __ldcs(data + i + j * step);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum += x[j].x ^ x[j].y ^ x[j].z ^ x[j].w;
    }
    for (; i < words; i += step) sum += data[i].x;
    if (sum == 0x9e3779b9) out[blockIdx.x] = sum;
}
