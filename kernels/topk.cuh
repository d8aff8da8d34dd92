// Block-wide exact selection, shared by topk and select.
#pragma once
#include "common.cuh"

template <int THREADS>
struct Selection {
    uint32_t histogram[256];
    Ordered<THREADS> ordered;
    int bin, want;

    // Rank of the k-th best of `n` entries, and how many equal to it are among the k best. `get(i, rank, value)` says
    // whether entry i counts; at least k must. Radix: four rounds of eight bits from the top.
    template <class Get>
    __device__ uint32_t kth_best(int64_t n, int k, Get get, int& ties) {
        uint32_t prefix = 0;
        int wanted = k;
        for (int shift = 24; shift >= 0; shift -= 8) {
            __syncthreads();
            for (int i = threadIdx.x; i < 256; i += THREADS) histogram[i] = 0;
            __syncthreads();
            for (int64_t base = 0; base < n; base += THREADS) {
                uint32_t rank = 0;
                int32_t value;
                int64_t i = base + threadIdx.x;
                bool live = i < n && get(i, rank, value) && (shift == 24 || rank >> (shift + 8) == prefix);
                // Plateaus fall into one bin: one addition for all lanes that agree.
                int at = live ? int(rank >> shift & 255) : -1;
                unsigned peers = __match_any_sync(~0u, at);
                if (live && __ffs(peers) - 1 == threadIdx.x % 32) atomicAdd(&histogram[at], __popc(peers));
            }
            __syncthreads();
            if (threadIdx.x < 32) {
                // Lane l owns bins 255-8l … 248-8l, from the top.
                int top = 255 - 8 * int(threadIdx.x), own = 0;
                for (int b = 0; b < 8; ++b) own += histogram[top - b];
                const int upto = lanes_upto(own, threadIdx.x);
                int above = upto - own;
                if (above < wanted && wanted <= upto) {
                    int b = top;
                    while (above + int(histogram[b]) < wanted) above += histogram[b--];
                    bin = b;
                    want = wanted - above;
                }
            }
            __syncthreads();
            prefix = prefix << 8 | bin;
            wanted = want;
        }
        ties = wanted;
        return prefix;
    }

    // Hands entries over `kth`, and the first `ties` equal to it, to `put(rank, value, place)`, places ascending with
    // the entries. `put` may overwrite entry `place`: every entry up to there has been read.
    template <class Get, class Put>
    __device__ void keep(int64_t n, int k, uint32_t kth, int ties, Get get, Put put) {
        int over = 0, equal = 0;
        for (int64_t base = 0; base < n && over + min(equal, ties) < k; base += THREADS) {
            uint32_t rank = 0;
            int32_t value = 0;
            int64_t i = base + threadIdx.x;
            bool live = i < n && get(i, rank, value);
            bool gt = live && rank > kth, eq = live && rank == kth;
            int2 total, mine = ordered.before(gt, eq, total);
            mine.y += equal;
            if (gt || (eq && mine.y < ties)) put(rank, value, over + mine.x + min(mine.y, ties));
            over += total.x;
            equal += total.y;
        }
        __syncthreads();
    }
};

// The row sees at most k positions: it takes them all.
__device__ inline void take_all(int32_t* out, int64_t length, int k) {
    for (int i = threadIdx.x; i < k; i += blockDim.x) out[i] = i < length ? i : -1;
}
