// Computes: the k best columns of each row, ties to the lowest, ascending, then -1.
// Shapes:   scores f32 or bf16 [rows, columns] -> int32 [rows, k]; columns row_start[r] to row_end[r] count.
// Idea:     a block a row. Radix select on order-preserving integers finds the k-th best and how many of its equals
//           are in; one more pass keeps them in column order, so there is nothing to sort and nothing to overflow.
// Roofline: five reads of the row; one would do. Portable and exact, not fast: one SM a row.
#include "topk.cuh"

constexpr int THREADS = 512;

KERNEL(THREADS) topk(PARAMS TopK p) {
    __shared__ Selection<THREADS> selection;
    const int64_t row = blockIdx.x;
    int64_t start = p.row_start ? max(int64_t(p.row_start[row]), int64_t(0)) : 0;
    int64_t end = p.row_end ? min(int64_t(p.row_end[row]), p.columns) : p.columns;
    const int64_t length = max(end - start, int64_t(0));
    int32_t* out = p.out + row * p.out_row;
    if (length <= p.k) return take_all(out, length, p.k);

    const int64_t first = row * p.logits_row + start;
    auto get = [&](int64_t i, uint32_t& rank, int32_t& column) {
        column = int32_t(i);
        rank = rank_of(load_float(p.logits, p.type, first + i));
        return true;
    };
    int ties;
    const uint32_t kth = selection.kth_best(length, p.k, get, ties);
    selection.keep(length, p.k, kth, ties, get, [&](uint32_t, int32_t column, int place) { out[place] = column; });
}
