// bf16 products on Hopper's tensor cores, beside what sm90.cuh has: descriptors, wgmma, 16-byte copies with holes.
//
// A tile of 64 rows by d columns lies in shared memory as d / 64 blocks of [64 rows][128 bytes], each 1024-byte
// aligned, its 16-byte chunks exchanged by `chunk ^ row % 8`: the 128-byte swizzle. Such a block is K-major for rows
// times columns summed over columns, and MN-major ("transposed") for sums over rows, so keys and values are one tile.
#pragma once
#include "sm90.cuh"

using sm90::fence_async;
using sm90::launch_dependents;
using sm90::wait_for_previous;
using sm90::wgmma_commit;
using sm90::wgmma_wait;

constexpr int BLOCK_BYTES = 64 * 128;

__device__ inline uint32_t shared_address(const void* p) { return sm90::smem(p); }

// 128-byte swizzle; groups of eight rows are 1024 bytes apart, 64-column blocks (when transposed) BLOCK_BYTES.
__device__ inline uint64_t descriptor(uint32_t address) {
    return uint64_t(address >> 4 & 0x3fff) | uint64_t(BLOCK_BYTES >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
           uint64_t(1) << 62;
}

// No swizzle: cores of 8 rows of 16 bytes. MN-major: `far` bytes between groups of eight K, 128 between those of MN.
__device__ inline uint64_t plain_descriptor(uint32_t address, uint32_t far) {
    return uint64_t(address >> 4 & 0x3fff) | uint64_t(far >> 4) << 16 | uint64_t(128 >> 4) << 32;
}

// The same number, about which the compiler knows nothing: what is made of it in a loop is not kept in registers.
__device__ inline uint64_t opaque(uint64_t x) {
    asm volatile("" : "+l"(x));
    return x;
}
__device__ inline int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// A descriptor some bytes further on.
__device__ inline uint64_t further(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

// Byte offset of a 16-byte chunk of a block.
__device__ inline uint32_t swizzled(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

__device__ inline void wgmma_fence() { sm90::wgmma_begin(); }

// Registers that products wrote are not read before this; it stands after the wait.
template <int N>
__device__ inline void settle(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F16(d, i) F4(d, i), F4(d, i + 4), F4(d, i + 8), F4(d, i + 12)
#define F64(d, i) F16(d, i), F16(d, i + 16), F16(d, i + 32), F16(d, i + 48)
#define S32                                                                                                            \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"  \
    "%30,%31}"
#define S64                                                                                                            \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"  \
    "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57," \
    "%58,%59,%60,%61,%62,%63}"

// d[64 x 64] (+)= a[64 x 16] b[64 x 16]^T, both K-major.
__device__ inline void wgmma_scores(float (&d)[32], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " S32 ", %32, %33, p, 1, 1, 0, 0;}"
        : F16(d, 0), F16(d, 16)
        : "l"(a), "l"(b), "r"(add));
}

// d[64 x 128] += a[64 x 16] b[16 x 128], a K-major, b MN-major.
__device__ inline void wgmma_values(float (&d)[64], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " S64 ", %64, %65, 1, 1, 1, 0, 1;"
                 : F64(d, 0)
                 : "l"(a), "l"(b));
}

// d[64 x N] (+)= a b, N twice the registers; both operands K-major, or both MN-major (transposed).
template <int TRANSPOSED>
__device__ inline void wgmma(float (&d)[4], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %6, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, "
        "%4, %5, p, 1, 1, %7, %7;}"
        : F4(d, 0)
        : "l"(a), "l"(b), "r"(add), "n"(TRANSPOSED));
}

template <int TRANSPOSED>
__device__ inline void wgmma(float (&d)[8], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %10, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7}, "
        "%8, %9, p, 1, 1, %11, %11;}"
        : F4(d, 0), F4(d, 4)
        : "l"(a), "l"(b), "r"(add), "n"(TRANSPOSED));
}

template <int TRANSPOSED>
__device__ inline void wgmma(float (&d)[16], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
        "%16, %17, p, 1, 1, %19, %19;}"
        : F16(d, 0)
        : "l"(a), "l"(b), "r"(add), "n"(TRANSPOSED));
}

template <int THREADS>
__device__ inline void named_barrier(int id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
}

struct Barrier {
    uint64_t word;

    __device__ void init(int count) { sm90::init(&word, count); }
    __device__ void arrive() { sm90::arrive(&word); }
    // Arrives when this thread's copies so far have landed.
    __device__ void arrive_copies() { sm90::arrive_after_copies(&word); }
    __device__ void wait(int parity) { sm90::wait(&word, parity); }
};

// 16 bytes, or zeros when `there` is false; nothing is read then.
__device__ inline void copy16(uint32_t to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}

template <int GROUPS>
__device__ inline void wait_copies() {
    asm volatile("cp.async.commit_group;\ncp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// From shared memory, in multiples of 16 bytes; returns when the bytes have been read.
__device__ inline void copy_out(void* to, uint32_t from, int bytes) {
    asm volatile(
        "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
        "cp.async.bulk.commit_group;\n"
        "cp.async.bulk.wait_group.read 0;" ::"l"(to),
        "r"(from), "r"(bytes)
        : "memory");
}
