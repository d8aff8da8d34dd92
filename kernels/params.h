// What the host passes to the kernels: one plain struct a kernel, by value. src/backend/cuda/params.rs mirrors it; a
// test compares names and order, and both sides assert the sizes. Strides are in elements, `_bytes` in bytes.
#pragma once
#include <stdint.h>

// Element type of a float tensor.
enum { F32 = 0, BF16 = 1 };
// KV storage.
enum { KV_F32 = 0, KV_BF16 = 1, KV_FP8 = 2 };

// Where the keys of a row are. `block_table` is null for a contiguous store.
struct KeyMap {
    const int32_t* block_table;
    const int32_t* row_request;
    const int32_t* row_start;
    const int32_t* row_end;
    int64_t table_stride;
    int64_t rows_per_request;
    int64_t requests;
    int64_t max_pages;
    int64_t pages;
    int64_t page;
    int64_t keys;
};
static_assert(sizeof(KeyMap) == 88, "params.rs");

// Scoring: q [rows, heads, dim], weights [rows, heads]. A key is at `keys + page * page_bytes + at * row_bytes`, its
// scale at `scales + page * scale_page_bytes + 4 * at`; no scales means 1. Contiguous keys are all of page 0.
struct Indexer {
    const void* q;
    const float* weights;
    const void* keys;
    const void* scales;
    KeyMap map;
    int64_t q_row;
    int64_t q_head;
    int64_t weights_row;
    int64_t page_bytes;
    int64_t row_bytes;
    int64_t scale_page_bytes;
    int64_t rows;
    int32_t heads;
    int32_t dim;
    int32_t fp8;
    int32_t reserved;
};
static_assert(sizeof(Indexer) == 192, "params.rs");

struct Logits {
    Indexer ix;
    void* out;
    int64_t out_row;
    int64_t columns;
    int64_t out_type;
};
static_assert(sizeof(Logits) == 224, "params.rs");

struct TopK {
    const void* logits;
    const int32_t* row_start;
    const int32_t* row_end;
    int32_t* out;
    int64_t logits_row;
    int64_t out_row;
    int64_t columns;
    int32_t k;
    int32_t type;
};
static_assert(sizeof(TopK) == 64, "params.rs");

// Fused select. Task `row * ranges + range` keeps its survivors in list `task` (or `blockIdx.x`, with one range) of
// `capacity` entries.
struct Select {
    Indexer ix;
    int32_t* out;
    uint32_t* ranks;
    int32_t* positions;
    int32_t* counts;
    int64_t out_row;
    int64_t ranges;
    int32_t k;
    int32_t capacity;
};
static_assert(sizeof(Select) == 248, "params.rs");

// Decode: `rows` rows from row `first` on, in groups of `queries`; with `row_request`, of at most so many. Row i of them has
// its scores, as ranks, at `scores + i * scores_row` and the best of every 8 at `tops + i * tops_row` (`eights`; else what
// the blocks of `few_scores` find); rows of at most k positions are not scored. `out` null: the scores are the result, as floats in `columns` columns.
struct Decode {
    Indexer ix;
    uint32_t* scores;
    uint32_t* tops;
    int32_t* out;
    int64_t scores_row;
    int64_t tops_row;
    int64_t out_row;
    int64_t columns;
    int64_t first;
    int32_t rows;
    int32_t queries;
    int32_t k;
    int32_t stages;
    int32_t eights;
    int32_t reserved;
};
static_assert(sizeof(Decode) == 280, "params.rs");

struct IndexKWrite {
    const void* k;
    const void* slots;
    uint8_t* pages;
    int64_t k_row;
    int64_t page_bytes;
    int64_t slot_limit;
    int64_t tokens;
    int32_t k_type;
    int32_t wide_slots;
    int32_t dim;
    int32_t hadamard;
    int32_t pow2_scale;
    float norm;
};
static_assert(sizeof(IndexKWrite) == 80, "params.rs");

struct IndexQQuantize {
    const void* q;
    const float* weights;
    uint8_t* q_out;
    float* weights_out;
    int64_t q_row;
    int64_t q_head;
    int64_t weights_row;
    int64_t q_out_row;
    int64_t q_out_head;
    int64_t weights_out_row;
    int64_t vectors;
    int32_t heads;
    int32_t dim;
    int32_t q_type;
    int32_t hadamard;
    int32_t pow2_scale;
    float norm;
    float scale;
    int32_t reserved;
};
static_assert(sizeof(IndexQQuantize) == 120, "params.rs");

struct KvWrite {
    const void* kv;
    const void* slots;
    uint8_t* pages;
    int64_t kv_row;
    int64_t page_bytes;
    int64_t row_bytes;
    int64_t page;
    int64_t slot_limit;
    int64_t tokens;
    int32_t kv_type;
    int32_t wide_slots;
    int32_t format;
    int32_t d_qk;
};
static_assert(sizeof(KvWrite) == 88, "params.rs");

struct IndicesToSlots {
    const int32_t* indices;
    int32_t* slots;
    KeyMap map;
    int64_t indices_row;
    int64_t slots_row;
    int64_t k;
};
static_assert(sizeof(IndicesToSlots) == 128, "params.rs");

struct CopyRows {
    const int32_t* from;
    int32_t* to;
    int64_t from_row;
    int64_t to_row;
    int64_t k;
};
static_assert(sizeof(CopyRows) == 40, "params.rs");

struct CarryRows {
    int32_t* data;
    const int32_t* from;
    int64_t row;
    int64_t rows;
    int64_t old_rows;
    int64_t k;
};
static_assert(sizeof(CarryRows) == 48, "params.rs");

struct Overlap {
    const int32_t* own;
    const int32_t* reused;
    float* out;
    int64_t own_row;
    int64_t reused_row;
    int64_t own_k;
    int64_t reused_k;
};
static_assert(sizeof(Overlap) == 56, "params.rs");

// Sparse attention. With `mapped` the indices are logical and go through `map`, else they are slots below
// `map.keys`. A KV row is at `kv + page * page_bytes + at * row_bytes`.
struct Attention {
    const void* q;
    const uint8_t* kv;
    const int32_t* indices;
    const int32_t* row_topk;
    const float* sink;
    void* out;
    float* lse;
    KeyMap map;
    int64_t q_row;
    int64_t q_head;
    int64_t indices_row;
    int64_t out_row;
    int64_t out_head;
    int64_t lse_row;
    int64_t page_bytes;
    int64_t row_bytes;
    int64_t page;
    float softmax_scale;
    int32_t heads;
    int32_t d_qk;
    int32_t d_v;
    int32_t topk;
    int32_t mapped;
    int32_t q_type;
    int32_t kv_format;
    int32_t out_type;
    int32_t reserved;
};
static_assert(sizeof(Attention) == 256, "params.rs");

// Probabilities [rows, topk] of an attention whose `lse` is written.
struct AttentionProbs {
    Attention a;
    float* probs;
    int64_t probs_row;
};
static_assert(sizeof(AttentionProbs) == 272, "params.rs");

// `attention_sm90`: a row's indices are cut into `splits` parts of `split_tiles` tiles of 64. With several parts, each
// leaves its output f32 [rows, splits, heads, d_v] and log-sum-exp [rows, splits, heads] to `attention_combine`.
struct AttentionSm90 {
    Attention a;
    float* part_out;
    float* part_lse;
    int32_t splits;
    int32_t split_tiles;
};
static_assert(sizeof(AttentionSm90) == 280, "params.rs");

// Vectors for the tensor cores: bf16, padded with zeros; their planes add up to the values. In elements.
struct Planes {
    const void* data;
    int64_t plane;
    int64_t row;
    int64_t head;
};
static_assert(sizeof(Planes) == 32, "params.rs");

// Splits vectors [rows, heads, dim] into planes [padded_rows, padded_heads, padded_dim], and copies their `weights`. With
// `flags`, what is not finite becomes 0 and its vector's flag NaN; else it stays what it is.
struct DistillPack {
    const void* from;
    void* to;
    float* flags;
    const float* weights;
    float* weights_to;
    int64_t weights_row;
    int64_t from_row;
    int64_t from_head;
    int64_t rows;
    int64_t padded_rows;
    int32_t heads;
    int32_t padded_heads;
    int32_t dim;
    int32_t padded_dim;
    int32_t type;
    int32_t planes;
};
static_assert(sizeof(DistillPack) == 104, "params.rs");

// Distillation of `count` rows from `first` on. Vectors of q and attention_q, and packed `weights`, count from `first`. `scores` and `targets`
// are [count, width]: by key or, with `indices`, by column. The gradient by the keys takes `own_keys` from `first_key` on: `partial` is
// [parts, own_keys, dim], and `by_key` is `scores` or, with `indices`, [count, key_width] of these keys.
struct Distill {
    KeyMap map;
    Planes q;
    Planes k;
    Planes attention_q;
    Planes kv;
    const float* weights;
    const float* lse;
    const float* target;
    const int32_t* indices;
    float* loss;
    float* grad_q;
    float* grad_k;
    float* grad_weights;
    float* scores;
    float* targets;
    float* by_key;
    float* partial;
    float* q_flags;
    float* k_flags;
    double* row_loss;
    int32_t* live;
    int64_t lse_row;
    int64_t target_row;
    int64_t indices_row;
    int64_t grad_q_row;
    int64_t grad_q_head;
    int64_t grad_k_row;
    int64_t grad_weights_row;
    int64_t rows;
    int64_t first;
    int64_t count;
    int64_t keys;
    int64_t columns;
    int64_t topk;
    int64_t width;
    int64_t first_key;
    int64_t own_keys;
    int64_t key_width;
    int64_t parts;
    int32_t score_pairs;
    int32_t target_pairs;
    int32_t heads;
    int32_t padded_heads;
    int32_t dim;
    int32_t attention_heads;
    int32_t attention_padded;
    int32_t attention_dim;
    float softmax_scale;
    float layer_weight;
};
static_assert(sizeof(Distill) == 528, "params.rs");

// The indexer on Hopper (indexer_sm90.cu). `prefix` and `sample_prefix` [rows + 1] count tiles of keys and of sampled
// keys before each row; `size` [rows] is how many rows share a block, at its first row; `lead` [rows] is that row;
// `again` [rows + 1] marks blocks to score once more, its last entry that there are any. Survivors of a row and CTA c
// are list `row + rows of a block * c` of `capacity` entries.
struct IndexerSm90 {
    Indexer ix;
    void* out;
    int64_t out_row;
    int64_t columns;
    int32_t* prefix;
    int32_t* sample_prefix;
    int32_t* size;
    int32_t* lead;
    int32_t* again;
    float* samples;
    float* thresholds;
    uint64_t* lists;
    int32_t* counts;
    int32_t* lengths;
    int32_t out_type;
    int32_t k;
    int32_t capacity;
    int32_t retry;
    int32_t block_rows;
    int32_t splits;
    int32_t ctas;
    int32_t reserved;
};
static_assert(sizeof(IndexerSm90) == 328, "params.rs");
