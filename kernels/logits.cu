// Computes: `ks[s] * sum_h w[t,h] * relu(q[t,h]·k[s])` of every position a row sees, -inf behind them.
// Shapes:   q e4m3 or bf16 [rows, heads, dim], keys contiguous or in pages of 64 -> f32 or bf16 [rows, columns].
// Idea:     a block takes a row and every `gridDim.y`-th tile of 64 keys; see indexer.cuh. Lengths are read here, so
//           a captured launch serves any of them.
// Roofline: 2 * heads * dim flop a score at the f32 FMA rate; any card, heads 1 to 128, dim a multiple of 16 to 256.
#include "indexer.cuh"

KERNEL(SCORE_THREADS) logits(PARAMS Logits p) {
    extern __shared__ __align__(16) unsigned char shared[];
    const Row r = {int64_t(blockIdx.x), request_of(p.ix.map, blockIdx.x), start_of(p.ix.map, blockIdx.x)};
    const int64_t length = length_of(p.ix.map, r.row), out = r.row * p.out_row;
    for (int64_t from = int64_t(blockIdx.y) * TILE; from < p.columns; from += int64_t(gridDim.y) * TILE) {
        const int n = int(max(int64_t(0), min(int64_t(TILE), length - from)));
        float score = -CUDART_INF_F;
        if (n > 0) {
            float x = score_tile(p.ix, r, from, n, shared);
            // One NaN and one zero, whatever the arithmetic made.
            if (threadIdx.x < n) score = isnan(x) ? __uint_as_float(0x7fc00000) : x + 0.0f;
        }
        if (threadIdx.x < TILE && from + threadIdx.x < p.columns) {
            store_float(p.out, p.out_type, out + from + threadIdx.x, score);
        }
    }
}
