// Hopper's own instructions, as far as the kernels here use them: mbarriers, bulk and tensor copies, e4m3 wgmma.
#pragma once
#include <stdint.h>

namespace sm90 {

// A CUtensorMap: 128 bytes that only the driver and the copy engine read.
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

__device__ inline uint32_t smem(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// --- mbarriers. A phase ends when `count` arrivals and all announced bytes are in.

__device__ inline void init(uint64_t* bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem(bar)), "r"(count) : "memory");
}

// After `init`, before the barriers are used by copies.
__device__ inline void init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void arrive(uint64_t* bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem(bar)) : "memory");
}

__device__ inline void arrive_expect(uint64_t* bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem(bar)), "r"(bytes) : "memory");
}

__device__ inline void wait(uint64_t* bar, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(smem(bar)),
        "r"(parity)
        : "memory");
}

// --- Copies to shared memory that report to a mbarrier.

// An L2 policy for data that is read once.
__device__ inline uint64_t once() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ inline void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// A box of a three-dimensional tensor. The map lies in the kernel's parameters.
__device__ inline void copy_box(void* to, const TensorMap& map, int x, int y, int z, uint64_t* bar) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
        ::"r"(smem(to)), "l"(&map), "r"(x), "r"(y), "r"(z), "r"(smem(bar))
        : "memory");
}

__device__ inline void copy_box(void* to, const TensorMap& map, int x, int y, int z, uint64_t* bar, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3, %4}], [%5], %6;"
        ::"r"(smem(to)), "l"(&map), "r"(x), "r"(y), "r"(z), "r"(smem(bar)), "l"(policy)
        : "memory");
}

// 16 bytes, by the thread itself, and an arrival when all its copies so far are in.
__device__ inline void copy_16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem(to)), "l"(from) : "memory");
}

__device__ inline void arrive_after_copies(uint64_t* bar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem(bar)) : "memory");
}

// --- Programmatic dependent launch.

__device__ inline void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Returns when the kernel before has ended and its writes are seen.
__device__ inline void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// --- Clusters.

__device__ inline void cluster_sync() {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
}

// Of the CTA `rank`, what `p` is of this one.
template <class T>
__device__ inline T* of_cta(T* p, int rank) {
    return static_cast<T*>(__cluster_map_shared_rank(p, rank));
}

// --- wgmma, e4m3 by e4m3 into f32: 64 rows of A by N rows of B, both with 128 bytes of K in rows of 128 bytes, 128-byte
// swizzle, the tiles on 1024-byte boundaries.

// The low half of a tile's descriptor: the address, to which 16-byte steps can be added. The high half is the same for all.
__device__ inline uint32_t descriptor_low(const void* tile) { return (smem(tile) & 0x3ffff) >> 4 | 1u << 16; }
__device__ inline uint64_t descriptor(uint32_t low) { return uint64_t(1u << 30 | 1024 >> 4) << 32 | low; }

__device__ inline void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// What ordinary stores wrote to shared memory, for the tensor cores to read.
__device__ inline void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int T, int N>
__device__ inline void wgmma_end(float (&d)[T][N]) {
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < T * N; ++i) asm volatile("" : "+f"(d[i / N][i % N])::"memory");
}

#define SM90_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SM90_D16(i) SM90_D4(i), SM90_D4(i + 4), SM90_D4(i + 8), SM90_D4(i + 12)

// d = (add ? d : 0) + A·B over 32 of K.
__device__ inline void wgmma(float (&d)[8], uint32_t a, uint32_t b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 "
        "{%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1;\n}\n"
        : SM90_D4(0), SM90_D4(4)
        : "l"(descriptor(a)), "l"(descriptor(b)), "r"(add));
}

__device__ inline void wgmma(float (&d)[16], uint32_t a, uint32_t b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1;\n}\n"
        : SM90_D16(0)
        : "l"(descriptor(a)), "l"(descriptor(b)), "r"(add));
}

__device__ inline void wgmma(float (&d)[32], uint32_t a, uint32_t b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1;\n}\n"
        : SM90_D16(0), SM90_D16(16)
        : "l"(descriptor(a)), "l"(descriptor(b)), "r"(add));
}

}  // namespace sm90
