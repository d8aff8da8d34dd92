// Computes: nothing of use: multiplies one tile by itself as fast as the tensor cores can.
// Shapes:   per warpgroup 64 x 256 x (128 bytes of fp8 or bf16), `rounds` times, both operands in shared memory.
// Idea:     the ceiling that matrix-bound kernels are compared with, at the clock that random data leaves.
// Tensor cores: QGMMA, HGMMA
// Roofline: tensor cores; two warpgroups take turns, so one waits for its group of products while the other runs.
#include <cstdint>

// A tile of 128-byte rows in the 128-byte swizzle.
__device__ uint64_t descriptor(const void* tile) {
    const uint64_t address = __cvta_generic_to_shared(tile);
    return (address & 0x3ffff) >> 4 | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

#define D128 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define OPERANDS \
    F4(0), F4(4), F4(8), F4(12), F4(16), F4(20), F4(24), F4(28), \
    F4(32), F4(36), F4(40), F4(44), F4(48), F4(52), F4(56), F4(60), \
    F4(64), F4(68), F4(72), F4(76), F4(80), F4(84), F4(88), F4(92), \
    F4(96), F4(100), F4(104), F4(108), F4(112), F4(116), F4(120), F4(124)

struct E4m3 {
    static constexpr uint32_t KEEP = 0x8f8f8f8f, SET = 0x30303030;  // Random signs, magnitudes of 0.5 to 1.9.
    static __device__ void multiply(float (&d)[128], uint64_t a, uint64_t b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3 {" D128 "}, %128, %129, 1, 1, 1;"
                     : OPERANDS : "l"(a), "l"(b));
    }
};
struct Bf16 {
    static constexpr uint32_t KEEP = 0x80ff80ff, SET = 0x3f003f00;
    static __device__ void multiply(float (&d)[128], uint64_t a, uint64_t b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" D128 "}, %128, %129, 1, 1, 1, 0, 0;"
                     : OPERANDS : "l"(a), "l"(b));
    }
};

template <class Type>
__device__ void peak(int64_t rounds, float* out) {
    __shared__ __align__(1024) uint32_t a[2][64 * 32], b[256 * 32];
    auto random = [](uint32_t i) { return (i * 2654435761u ^ i >> 7) * 2246822519u >> 3; };
    for (int i = threadIdx.x; i < 2 * 64 * 32; i += 256) a[0][i] = (random(i) & Type::KEEP) | Type::SET;
    for (int i = threadIdx.x; i < 256 * 32; i += 256) b[i] = (random(i + 9999) & Type::KEEP) | Type::SET;
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    float d[128];
#pragma unroll
    for (int i = 0; i < 128; ++i) d[i] = 0.0f;
    const uint64_t da = descriptor(a[threadIdx.x / 128]), db = descriptor(b);
    for (int64_t r = 0; r < rounds; ++r) {
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < 4; ++k) Type::multiply(d, da + 2 * k, db + 2 * k);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 128; ++i) sum += d[i];
    out[blockIdx.x * 256 + threadIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(256, 1) peak_fp8(int64_t rounds, float* out) { peak<E4m3>(rounds, out); }
extern "C" __global__ void __launch_bounds__(256, 1) peak_bf16(int64_t rounds, float* out) { peak<Bf16>(rounds, out); }
