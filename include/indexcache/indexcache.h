/* indexcache: DeepSeek Sparse Attention with cross-layer index reuse (IndexCache).
 *
 * A Full layer runs the lightning indexer and selects the top-k tokens of each row; the Shared layers after it reuse its
 * indices. A plan says which layer is which, a cache keeps the indices, the operations do the work. Per layer:
 *
 *   idxc_step_begin(cache, lane, rows, step_id);            once a forward pass
 *   if (idxc_plan_layer_role(plan, layer) == IDXC_ROLE_FULL) ... compute the indexer's q, w, k ...
 *   idxc_select(cache, lane, layer, &indexer, ws, ws_size, stream);   Full: selects. Shared: nothing to do.
 *   idxc_attend(cache, lane, layer, &attention, ws, ws_size, stream);
 *
 * Words: lane, an independent copy of the buffers (a micro-batch, or a draft model); step, one forward pass over one
 * chunk of rows (indices never outlive it); index K, the indexer's own key cache; slot, a row number of a paged store,
 * page * page_size + offset.
 *
 * Conventions. Functions return a status; text about the last error is in idxc_last_error(). Nothing is printed, and no
 * panic or exception crosses this interface. Structs that start with struct_size are initialised with their _INIT macro,
 * so that headers and libraries of different age work together: 0 and NULL always mean the default. Tensors are borrowed
 * for the call. NULL handles and pointers are refused, not followed. A workspace may start at any address.
 *
 * C99 and C++11. Generated from the Rust sources: do not edit. */

#ifndef INDEXCACHE_INDEXCACHE_H
#define INDEXCACHE_INDEXCACHE_H

#include <stddef.h>
#include <stdint.h>

/**
 * ABI version of this header. A library serves every version up to its own.
 */
#define IDXC_ABI_VERSION 1

/**
 * Log level: something to look at, such as a setting that has no effect.
 */
#define IDXC_LOG_WARNING 1

/**
 * Log level: what was decided, for the record.
 */
#define IDXC_LOG_INFO 2

/**
 * Device type: host memory (DLPack `kDLCPU`).
 */
#define IDXC_DEVICE_CPU 1

/**
 * Device type: CUDA device memory (DLPack `kDLCUDA`).
 */
#define IDXC_DEVICE_CUDA 2

/**
 * Device type: page-locked host memory (DLPack `kDLCUDAHost`); read as host memory.
 */
#define IDXC_DEVICE_CUDA_HOST 3

/**
 * Type code of signed integers (DLPack `kDLInt`).
 */
#define IDXC_DTYPE_INT 0

/**
 * Type code of unsigned integers (DLPack `kDLUInt`).
 */
#define IDXC_DTYPE_UINT 1

/**
 * Type code of IEEE floats (DLPack `kDLFloat`).
 */
#define IDXC_DTYPE_FLOAT 2

/**
 * Type code of bfloat16 (DLPack `kDLBfloat`).
 */
#define IDXC_DTYPE_BFLOAT 4

/**
 * Type code of fp8 e4m3, finite (DLPack `kDLFloat8_e4m3fn`).
 */
#define IDXC_DTYPE_FLOAT8_E4M3FN 10

/**
 * Form of indices: positions within the request.
 */
#define IDXC_FORM_LOGICAL 0

/**
 * Form of indices: row numbers of the KV store (`page * page_size + offset`), valid under one block table only.
 */
#define IDXC_FORM_SLOTS 1

/**
 * Backend: the best that the build and the machine have.
 */
#define IDXC_BACKEND_AUTO 0

/**
 * Backend: host memory and host threads.
 */
#define IDXC_BACKEND_CPU 1

/**
 * Backend: a CUDA device.
 */
#define IDXC_BACKEND_CUDA 2

/**
 * Flag of `idxc_context_desc`: checked mode, to find a fault. Each CUDA call waits for its stream, copies its index arrays
 * (indices, slots, row bounds, block table) to the host and refuses what is out of range with `IDXC_ERR_INVALID`, before it
 * launches anything, as CPU calls always do. A stream that captures a graph is refused with `IDXC_ERR_UNSUPPORTED`.
 * Without the flag kernels take such an index as absent, and nothing is waited for.
 */
#define IDXC_CHECKED 1

/**
 * Role: no sparse attention.
 */
#define IDXC_ROLE_NONE 0

/**
 * Role: runs its indexer and writes the indices.
 */
#define IDXC_ROLE_FULL 1

/**
 * Role: uses the indices of the nearest Full layer before it.
 */
#define IDXC_ROLE_SHARED 2

/**
 * Rule for `index_topk_freq`: `max(layer - offset + 1, 0) % freq != 0` is Shared, default offset 2 (Transformers, vLLM,
 * SGLang, TensorRT-LLM, lmdeploy).
 */
#define IDXC_DIALECT_HF 0

/**
 * Rule for `index_topk_freq`: `max(layer - offset, 0) % freq`, default 1 (ATOM).
 */
#define IDXC_DIALECT_ATOM 1

/**
 * Rule for `index_topk_freq`: `layer <= offset || (layer - offset) % freq == 0` is Full, default 0 (older xLLM).
 */
#define IDXC_DIALECT_XLLM 2

/**
 * Rule for `index_topk_freq`: the first rule, layers counted from 1, no default (Megatron).
 */
#define IDXC_DIALECT_MEGATRON 3

/**
 * Rule for `index_topk_freq`: `max(n - 1, 0) % freq`, `n` counts the layers with an indexer (vLLM for DeepSeek-V4).
 */
#define IDXC_DIALECT_V4 4

/**
 * Rule for `index_topk_freq`: `n % freq`, `n` counts the layers with an indexer (ATOM for DeepSeek-V4).
 */
#define IDXC_DIALECT_V4_ATOM 5

/**
 * Rule for `index_topk_freq`: `max(n - offset, 0) % freq`, default 0, `n` counts the sparse layers (MiniMax-M3).
 */
#define IDXC_DIALECT_M3 6

/**
 * The field that decided: an argument of the call.
 */
#define IDXC_FIELD_ARGUMENT 0

/**
 * The field that decided: `indexer_types`.
 */
#define IDXC_FIELD_INDEXER_TYPES 1

/**
 * The field that decided: `index_topk_pattern`.
 */
#define IDXC_FIELD_TOPK_PATTERN 2

/**
 * The field that decided: `index_source_layer_ids`.
 */
#define IDXC_FIELD_SOURCE_LAYER_IDS 3

/**
 * The field that decided: `index_topk_freq`.
 */
#define IDXC_FIELD_TOPK_FREQ 4

/**
 * No field asks for reuse, or what asks is switched off: every layer is Full.
 */
#define IDXC_FIELD_DEFAULT 5

/**
 * Export: one letter a layer, for `index_topk_pattern`.
 */
#define IDXC_EXPORT_PATTERN 0

/**
 * Export: JSON list for `indexer_types`.
 */
#define IDXC_EXPORT_INDEXER_TYPES 1

/**
 * Export: JSON object with `index_topk_freq` and `index_skip_topk_offset`; `IDXC_ERR_CONFIG` if none mean this pattern.
 */
#define IDXC_EXPORT_FREQ 2

/**
 * Export: JSON list for `index_source_layer_ids`.
 */
#define IDXC_EXPORT_SOURCE_LAYERS 3

/**
 * Export: JSON object with everything the plan knows, the notes about ignored or overruled fields among it.
 */
#define IDXC_EXPORT_JSON 4

/**
 * Export: one letter for each layer with an indexer, the short form of `index_topk_pattern`.
 */
#define IDXC_EXPORT_COMPACT_PATTERN 5

/**
 * Flag of `idxc_plan_slice`: a stage that would start on a Shared layer runs it as Full instead of receiving indices.
 */
#define IDXC_FLAG_PROMOTE 1

/**
 * Flag of `idxc_model_desc`: later draft steps reuse the draft layer's own indices (`index_share_for_mtp_iteration`).
 */
#define IDXC_FLAG_MTP_SHARES 2

/**
 * Flag of `idxc_model_desc`: index K is bfloat16 instead of fp8.
 */
#define IDXC_FLAG_INDEX_K_BF16 4

/**
 * Flag of `idxc_index_k_write` and `idxc_index_q_quantize`: rotate by the orthonormal Hadamard matrix of `dim`
 * (a power of two) before quantising. Keys and queries must agree.
 */
#define IDXC_FLAG_HADAMARD 1

/**
 * Flag of `idxc_index_k_write` and `idxc_index_q_quantize`: round scales up to a power of two.
 */
#define IDXC_FLAG_POW2_SCALE 2

/**
 * Method: each step tries every flip, `layers * (layers - 1) / 2` in all.
 */
#define IDXC_SEARCH_GREEDY 0

/**
 * Method: each step tries the `few` flips that raised the loss least when they were last tried. Steps 1, 2, 4, 8, … (of
 * each stage) try every flip, which keeps that ranking fresh and shows how often the few would have missed the best.
 */
#define IDXC_SEARCH_LAZY 1

/**
 * Opaque here; the header spells it out.
 */
typedef struct idxc_api idxc_api;

/**
 * Index-cache buffers and state of all lanes. One thread at a time.
 */
typedef struct idxc_cache idxc_cache;

/**
 * One backend on one device. May be used from any number of threads at once.
 */
typedef struct idxc_context idxc_context;

/**
 * A resolved pattern with everything that follows from it. Immutable; may be used from any number of threads.
 */
typedef struct idxc_plan idxc_plan;

/**
 * A search for the layers that keep their indexer. One thread at a time.
 *
 * Starts with all layers Full. Each step turns Shared the one layer whose turn gives the lowest loss, ties to the
 * lowest layer; each pattern's Full layers are among those of the pattern before, so one search serves every share of
 * Full layers. The host measures the losses, in whatever way it runs its model:
 *
 *   idxc_search_create(&desc, &search);                     or idxc_search_resume(&desc, path, &search)
 *   idxc_search_save(search, path);                         from here on it may be killed at any moment
 *   while (idxc_search_next(search, &candidate) == IDXC_OK && candidate.pattern)
 *     idxc_search_report(search, candidate.pattern, ... the model's loss with that pattern ...);
 *   idxc_search_result(search, json, sizeof json, &size);
 *
 * What is asked next follows from the descriptor and the losses reported so far, and from nothing else.
 */
typedef struct idxc_search idxc_search;

/**
 * Outcome of a call: `IDXC_OK` or one of the `IDXC_ERR_…` numbers. The text is in `idxc_last_error()`.
 */
typedef int32_t idxc_status;

/**
 * Receives log lines. `level` is one of `IDXC_LOG_…`; `message` is NUL-terminated and valid during the call only.
 * Must not call back into the library and must not throw.
 */
typedef void (*idxc_log_callback)(int32_t level, const char *message, void *user);

/**
 * How to open a context.
 */
typedef struct idxc_context_desc {
  /**
   * `sizeof(idxc_context_desc)`, set by `IDXC_CONTEXT_DESC_INIT`.
   */
  uint32_t struct_size;
  /**
   * `IDXC_CHECKED`.
   */
  uint32_t flags;
  /**
   * One of `IDXC_BACKEND_…`.
   */
  int32_t backend;
  /**
   * CUDA and auto: ordinal of the device. CPU: 0.
   */
  int32_t device_id;
  /**
   * CPU: worker threads, 0 for all cores. Results do not depend on it. CUDA: 0.
   */
  int32_t threads;
  /**
   * 0.
   */
  int32_t reserved;
} idxc_context_desc;

/**
 * What a context turned out to be.
 */
typedef struct idxc_context_info {
  /**
   * `sizeof(idxc_context_info)`, set by `IDXC_CONTEXT_INFO_INIT`.
   */
  uint32_t struct_size;
  /**
   * 0.
   */
  uint32_t flags;
  /**
   * One of `IDXC_BACKEND_…`, never `IDXC_BACKEND_AUTO`.
   */
  int32_t backend;
  /**
   * Ordinal of the device.
   */
  int32_t device_id;
  /**
   * Worker threads of the CPU backend; CUDA: 0.
   */
  int32_t threads;
  /**
   * 0.
   */
  int32_t reserved;
  /**
   * Static string: the instruction set that the CPU backend uses, or the device's architecture, such as `sm_90`.
   */
  const char *isa;
} idxc_context_info;

/**
 * What a plan needs to know of the model besides the pattern.
 */
typedef struct idxc_model_desc {
  /**
   * `sizeof(idxc_model_desc)`, set by `IDXC_MODEL_DESC_INIT`.
   */
  uint32_t struct_size;
  /**
   * `IDXC_FLAG_MTP_SHARES`, `IDXC_FLAG_INDEX_K_BF16`.
   */
  uint32_t flags;
  /**
   * Decoder layers (`num_hidden_layers`), draft layers not counted.
   */
  int32_t layers;
  /**
   * Tokens that an indexer selects for a row (`index_topk`), 1 to 4096.
   */
  int32_t topk;
  /**
   * Draft (MTP) layers; their ids follow the decoder layers', and they are Full.
   */
  int32_t mtp_layers;
  /**
   * Dimension of index K. 0 means 128.
   */
  int32_t index_head_dim;
} idxc_model_desc;

/**
 * What a plan, or one pipeline stage of it, comes to.
 */
typedef struct idxc_plan_info {
  /**
   * `sizeof(idxc_plan_info)`, set by `IDXC_PLAN_INFO_INIT`.
   */
  uint32_t struct_size;
  /**
   * 0.
   */
  uint32_t flags;
  /**
   * Stable hash of all that this plan means on its stage: for prefix-cache and graph keys.
   */
  uint64_t fingerprint;
  /**
   * The same of the whole model, equal on all its stages: for hand-shakes.
   */
  uint64_t model_fingerprint;
  /**
   * First layer of the stage.
   */
  int32_t first_layer;
  /**
   * One past its last layer, draft layers included.
   */
  int32_t end_layer;
  /**
   * Decoder layers of the whole model; draft layers have ids from here on.
   */
  int32_t decoder_layers;
  /**
   * Draft layers of this stage.
   */
  int32_t mtp_layers;
  /**
   * 1 if later draft steps reuse the draft's own indices.
   */
  int32_t mtp_shares;
  /**
   * Full decoder layers of this stage.
   */
  int32_t full_layers;
  /**
   * Shared decoder layers of this stage.
   */
  int32_t shared_layers;
  /**
   * int32 entries in a row of indices.
   */
  int32_t topk;
  /**
   * Layers of this stage that own index K: allocate that many, and none for Shared layers.
   */
  int32_t index_k_slots;
  /**
   * The Full layer of an earlier stage whose indices must be received (`idxc_publish`) before the first layer; -1 if
   * none.
   */
  int32_t receives_from_layer;
  /**
   * The Full layer whose indices must be sent on to the next stage after the last layer; -1 if none.
   */
  int32_t sends_from_layer;
  /**
   * The Shared layer that this stage runs as Full because of `IDXC_FLAG_PROMOTE`; -1 if none.
   */
  int32_t promoted_layer;
  /**
   * Bytes of a row of indices, for buffers and hand-off.
   */
  int64_t row_bytes;
  /**
   * Bytes of index K a token on this stage.
   */
  double index_k_bytes_per_token;
  /**
   * Bytes of index K a token that the Shared layers do without.
   */
  double index_k_bytes_saved_per_token;
  /**
   * `IDXC_FIELD_…`: what decided the pattern.
   */
  int32_t field;
  /**
   * `IDXC_DIALECT_…` if a frequency decided, else -1.
   */
  int32_t dialect;
  /**
   * Number of notes (see `IDXC_EXPORT_JSON`): fields that were overruled, switched off or assumed.
   */
  int32_t notes;
  /**
   * 0.
   */
  int32_t reserved;
} idxc_plan_info;

/**
 * What one layer does.
 */
typedef struct idxc_layer_info {
  /**
   * `sizeof(idxc_layer_info)`, set by `IDXC_LAYER_INFO_INIT`.
   */
  uint32_t struct_size;
  /**
   * 0.
   */
  uint32_t flags;
  /**
   * `IDXC_ROLE_…`.
   */
  int32_t role;
  /**
   * The layer whose indices it uses (itself if Full, maybe on an earlier stage if Shared); -1 if none.
   */
  int32_t source_layer;
  /**
   * Compact number of the index K that its indexer scores; -1 unless Full.
   */
  int32_t index_k_slot;
  /**
   * The layer that writes that index K (itself, unless the model shares index K between indexers); -1 unless Full.
   */
  int32_t index_k_owner;
  /**
   * Tokens that one selected entry names: 1, or a block.
   */
  int32_t block;
  /**
   * Tokens that one row of index K stands for: 1, or a pool.
   */
  int32_t key_pool;
} idxc_layer_info;

/**
 * Where memory is. Laid out as DLPack's `DLDevice`.
 */
typedef struct idxc_device {
  /**
   * One of `IDXC_DEVICE_…`.
   */
  int32_t device_type;
  /**
   * Ordinal of the device; 0 for host memory.
   */
  int32_t device_id;
} idxc_device;

/**
 * Element type. Laid out as DLPack's `DLDataType`.
 */
typedef struct idxc_dtype {
  /**
   * One of `IDXC_DTYPE_…`.
   */
  uint8_t code;
  /**
   * Bits an element.
   */
  uint8_t bits;
  /**
   * Always 1.
   */
  uint16_t lanes;
} idxc_dtype;

/**
 * A borrowed tensor. Laid out exactly as DLPack's `DLTensor`: a `DLTensor*` can be passed as it is. Strides are in
 * elements and honoured, except that the last dimension must have stride 1; `strides` NULL means dense, row-major.
 * At most 5 dimensions.
 */
typedef struct idxc_tensor {
  /**
   * First byte of the allocation, on `device`.
   */
  void *data;
  /**
   * Where `data` is.
   */
  struct idxc_device device;
  /**
   * Number of dimensions.
   */
  int32_t ndim;
  /**
   * Element type.
   */
  struct idxc_dtype dtype;
  /**
   * `ndim` extents, on the host.
   */
  int64_t *shape;
  /**
   * `ndim` strides in elements, on the host, or NULL.
   */
  int64_t *strides;
  /**
   * Offset of the first element from `data`, in bytes.
   */
  uint64_t byte_offset;
} idxc_tensor;

/**
 * Size and memory of a cache.
 */
typedef struct idxc_cache_desc {
  /**
   * `sizeof(idxc_cache_desc)`, set by `IDXC_CACHE_DESC_INIT`.
   */
  uint32_t struct_size;
  /**
   * 0.
   */
  uint32_t flags;
  /**
   * Independent copies: one a micro-batch, and one for a draft model. 0 means 1.
   */
  int32_t lanes;
  /**
   * Largest number of rows a step, padding rows included.
   */
  int32_t max_rows;
  /**
   * int32 `[lanes, max_rows, topk]` on the context's device, for the library to write: the host's own buffer, used
   * without a copy. NULL: the library allocates.
   */
  const struct idxc_tensor *buffer;
} idxc_cache_desc;

/**
 * What to score with the lightning indexer. Used by `idxc_select`, `idxc_indexer_logits` and
 * `idxc_paged_indexer_logits`. Keys are contiguous or, with `block_table`, paged.
 */
typedef struct idxc_indexer_desc {
  /**
   * `sizeof(idxc_indexer_desc)`, set by `IDXC_INDEXER_DESC_INIT`.
   */
  uint32_t struct_size;
  /**
   * 0.
   */
  uint32_t flags;
  /**
   * e4m3 or bfloat16 `[rows, heads, dim]`.
   */
  const struct idxc_tensor *q;
  /**
   * float32 `[rows, heads]`: head weights, with every scale of the query side folded in
   * (`dim^-0.5 * heads^-0.5 * q_scale`).
   */
  const struct idxc_tensor *weights;
  /**
   * Contiguous: e4m3 or bfloat16 `[keys, dim]`. Paged: uint8 pages of 64 tokens, `64 * (dim + 4)` bytes each
   * (64 rows of e4m3, then 64 float32 scales), or bfloat16 `[pages, 64, dim]`.
   */
  const struct idxc_tensor *k;
  /**
   * float32 `[keys]`: scales of contiguous e4m3 keys; otherwise NULL.
   */
  const struct idxc_tensor *k_scale;
  /**
   * int32 `[requests, max_pages]`: page numbers of each request. NULL: keys are contiguous.
   */
  const struct idxc_tensor *block_table;
  /**
   * int32 `[rows]`, paged only: the request of each row, -1 for a padding row. NULL: rows are split evenly over
   * the requests, in order.
   */
  const struct idxc_tensor *row_request;
  /**
   * int32 `[rows]`, contiguous only: first key that the row sees. Indices count from it. NULL: 0.
   */
  const struct idxc_tensor *row_start;
  /**
   * int32 `[rows]`: one past the last key that the row sees (paged: tokens visible to the row). A row that sees
   * nothing is a padding row: its indices are -1.
   */
  const struct idxc_tensor *row_end;
} idxc_indexer_desc;

/**
 * What a lane holds.
 */
typedef struct idxc_lane_info {
  /**
   * `sizeof(idxc_lane_info)`, set by `IDXC_LANE_INFO_INIT`.
   */
  uint32_t struct_size;
  /**
   * 0.
   */
  uint32_t flags;
  /**
   * The step's number, as given to `idxc_step_begin`.
   */
  uint64_t step_id;
  /**
   * Block table of slot-form indices; 0 if not tracked.
   */
  uint64_t table_id;
  /**
   * Rows of the step.
   */
  int32_t rows;
  /**
   * The Full layer whose indices the lane holds, -1 for none yet.
   */
  int32_t source_layer;
  /**
   * `IDXC_FORM_…`.
   */
  int32_t form;
  /**
   * 0.
   */
  int32_t reserved;
} idxc_lane_info;

/**
 * Sparse MLA attention, less the indices: those come from the cache (`idxc_attend`) or from an argument
 * (`idxc_sparse_attention`).
 */
typedef struct idxc_attention_desc {
  /**
   * `sizeof(idxc_attention_desc)`, set by `IDXC_ATTENTION_DESC_INIT`.
   */
  uint32_t struct_size;
  /**
   * 0.
   */
  uint32_t flags;
  /**
   * bfloat16 or float32 `[rows, heads, d_qk]`.
   */
  const struct idxc_tensor *q;
  /**
   * bfloat16 or float32 `[tokens, d_qk]`, or uint8 `[tokens, 656]` (512 e4m3, 4 float32 scales, 64 bfloat16).
   * Paged: the same with the page axis in front, `[pages, page_size, …]`.
   */
  const struct idxc_tensor *kv;
  /**
   * int32 `[requests, max_pages]`: translates logical indices of paged KV; NULL for contiguous KV and for slots.
   */
  const struct idxc_tensor *block_table;
  /**
   * int32 `[rows]`: the request of each row, -1 for a padding row. NULL: rows are split evenly over the requests.
   */
  const struct idxc_tensor *row_request;
  /**
   * int32 `[rows]`, contiguous KV with logical indices only: the KV row of the row's position 0. NULL: 0.
   */
  const struct idxc_tensor *row_start;
  /**
   * int32 `[rows]`: only the first `row_topk[r]` indices count. NULL: all; -1 entries never count.
   */
  const struct idxc_tensor *row_topk;
  /**
   * float32 `[heads]`: attention sink, a logit without a value. NULL: none.
   */
  const struct idxc_tensor *sink;
  /**
   * bfloat16 or float32 `[rows, heads, d_v]`, written. Values are the first `d_v` of each KV row. Zeros for a row
   * without any valid index.
   */
  const struct idxc_tensor *out;
  /**
   * float32 `[rows, heads]`, written: natural-log sum of exponentials, the sink not counted; -inf for a row without
   * any valid index. NULL: not wanted.
   */
  const struct idxc_tensor *lse;
  /**
   * The caller's number of the block table that slot-form indices were translated with (see `idxc_publish`);
   * `idxc_attend` refuses another. 0: not tracked.
   */
  uint64_t table_id;
  /**
   * Multiplies `q·k`. Must be finite and positive.
   */
  float softmax_scale;
  /**
   * 0.
   */
  uint32_t reserved;
  /**
   * float32 `[rows, topk]`, written: how much the row attends to each of its indices, summed over the heads and
   * divided by the sum, the sink not counted: a `target` for `idxc_distill`. 0 for an index that does not count. Needs
   * `lse`. NULL: not wanted.
   */
  const struct idxc_tensor *probs;
} idxc_attention_desc;

/**
 * Arguments of `idxc_index_k_write`.
 */
typedef struct idxc_index_k_write_desc {
  /**
   * `sizeof(idxc_index_k_write_desc)`, set by `IDXC_INDEX_K_WRITE_DESC_INIT`.
   */
  uint32_t struct_size;
  /**
   * `IDXC_FLAG_HADAMARD`, `IDXC_FLAG_POW2_SCALE`.
   */
  uint32_t flags;
  /**
   * bfloat16 or float32 `[tokens, dim]`: new keys, normalised and rotated.
   */
  const struct idxc_tensor *k;
  /**
   * int32 or int64 `[tokens]`: `page * 64 + offset`; -1 skips the token.
   */
  const struct idxc_tensor *slots;
  /**
   * Written: uint8 pages as in `idxc_indexer_desc.k`.
   */
  const struct idxc_tensor *pages;
} idxc_index_k_write_desc;

/**
 * Arguments of `idxc_index_q_quantize`.
 */
typedef struct idxc_index_q_quantize_desc {
  /**
   * `sizeof(idxc_index_q_quantize_desc)`, set by `IDXC_INDEX_Q_QUANTIZE_DESC_INIT`.
   */
  uint32_t struct_size;
  /**
   * `IDXC_FLAG_HADAMARD`, `IDXC_FLAG_POW2_SCALE`.
   */
  uint32_t flags;
  /**
   * bfloat16 or float32 `[rows, heads, dim]`.
   */
  const struct idxc_tensor *q;
  /**
   * float32 `[rows, heads]`: head weights as the model gives them.
   */
  const struct idxc_tensor *weights;
  /**
   * e4m3 `[rows, heads, dim]`, written.
   */
  const struct idxc_tensor *q_out;
  /**
   * float32 `[rows, heads]`, written: `weights * scale * q_scale`. May be `weights` itself.
   */
  const struct idxc_tensor *weights_out;
  /**
   * Folded into the weights. 0 means `dim^-0.5 * heads^-0.5`.
   */
  float scale;
  /**
   * 0.
   */
  uint32_t reserved;
} idxc_index_q_quantize_desc;

/**
 * Arguments of `idxc_topk`.
 */
typedef struct idxc_topk_desc {
  /**
   * `sizeof(idxc_topk_desc)`, set by `IDXC_TOPK_DESC_INIT`.
   */
  uint32_t struct_size;
  /**
   * 0.
   */
  uint32_t flags;
  /**
   * float32 or bfloat16 `[rows, columns]`.
   */
  const struct idxc_tensor *logits;
  /**
   * int32 `[rows]`: first column that counts; indices count from it. NULL: 0.
   */
  const struct idxc_tensor *row_start;
  /**
   * int32 `[rows]`: one past the last column that counts. NULL: all.
   */
  const struct idxc_tensor *row_end;
  /**
   * int32 `[rows, k]`, written; `k` from 1 to 4096.
   */
  const struct idxc_tensor *indices;
} idxc_topk_desc;

/**
 * Arguments of `idxc_indices_to_slots`.
 */
typedef struct idxc_indices_to_slots_desc {
  /**
   * `sizeof(idxc_indices_to_slots_desc)`, set by `IDXC_INDICES_TO_SLOTS_DESC_INIT`.
   */
  uint32_t struct_size;
  /**
   * 0.
   */
  uint32_t flags;
  /**
   * int32 `[rows, k]`, logical positions.
   */
  const struct idxc_tensor *indices;
  /**
   * int32 `[requests, max_pages]`. NULL: contiguous, `slot = row_start[r] + index`.
   */
  const struct idxc_tensor *block_table;
  /**
   * int32 `[rows]`: the request of each row, -1 for a padding row. NULL: rows are split evenly over the requests.
   */
  const struct idxc_tensor *row_request;
  /**
   * int32 `[rows]`, contiguous only. NULL: 0.
   */
  const struct idxc_tensor *row_start;
  /**
   * int32 `[rows, k]`, written: `table[request][i / page_size] * page_size + i % page_size`; -1 stays -1. May be
   * `indices` itself.
   */
  const struct idxc_tensor *slots;
  /**
   * Tokens a page. Unused (0) without `block_table`.
   */
  int64_t page_size;
} idxc_indices_to_slots_desc;

/**
 * Arguments of `idxc_kv_write`.
 */
typedef struct idxc_kv_write_desc {
  /**
   * `sizeof(idxc_kv_write_desc)`, set by `IDXC_KV_WRITE_DESC_INIT`.
   */
  uint32_t struct_size;
  /**
   * 0.
   */
  uint32_t flags;
  /**
   * bfloat16 or float32 `[tokens, d_qk]`: latent, then rope part.
   */
  const struct idxc_tensor *kv;
  /**
   * int32 or int64 `[tokens]`: `page * page_size + offset`; -1 skips the token.
   */
  const struct idxc_tensor *slots;
  /**
   * Written. uint8 `[pages, page_size, 656]` (d_qk 576: 512 e4m3, 4 float32 scales, 64 bfloat16), or bfloat16 or
   * float32 `[pages, page_size, d_qk]`. An axis of extent 1 before the last is accepted.
   */
  const struct idxc_tensor *pages;
} idxc_kv_write_desc;

/**
 * Arguments of `idxc_distill`.
 */
typedef struct idxc_distill_desc {
  /**
   * `sizeof(idxc_distill_desc)`, set by `IDXC_DISTILL_DESC_INIT`.
   */
  uint32_t struct_size;
  /**
   * 0.
   */
  uint32_t flags;
  /**
   * bfloat16 or float32 `[rows, heads, dim]`: queries of the Full layer's indexer, as trained, not quantised.
   */
  const struct idxc_tensor *q;
  /**
   * bfloat16 or float32 `[keys, dim]`: its keys.
   */
  const struct idxc_tensor *k;
  /**
   * float32 `[rows, heads]`: its head weights, with every scale folded in (`dim^-0.5 * heads^-0.5`).
   */
  const struct idxc_tensor *weights;
  /**
   * int32 `[rows]`: first key that the row sees; positions count from it. NULL: 0.
   */
  const struct idxc_tensor *row_start;
  /**
   * int32 `[rows]`: one past the last key that the row sees. NULL: all keys. A row that sees nothing takes no part
   * and nothing of it is read.
   */
  const struct idxc_tensor *row_end;
  /**
   * int32 `[rows, topk]`, positions in any order: the loss restricted to them. -1 is skipped, a row of nothing else
   * takes no part, and a position that is there twice counts twice. NULL: the dense loss, over all that a row sees.
   */
  const struct idxc_tensor *indices;
  /**
   * float32 `[rows, columns]` by position, or `[rows, topk]` beside `indices`: what the served layer attends to,
   * summed over its heads. Not negative, and not 0 for all that a row sees; normalised inside. NULL: computed from
   * the next three.
   */
  const struct idxc_tensor *target;
  /**
   * bfloat16 or float32 `[rows, attention_heads, d_qk]`: queries of the served layer. NULL with `target`.
   */
  const struct idxc_tensor *attention_q;
  /**
   * bfloat16 or float32 `[keys, d_qk]`: its KV rows. NULL with `target`.
   */
  const struct idxc_tensor *kv;
  /**
   * float32 `[rows, attention_heads]`: natural-log sum of exponentials of its scaled scores, as
   * `idxc_sparse_attention` gives it. NULL with `target`.
   */
  const struct idxc_tensor *lse;
  /**
   * float32 `[1]`, added to.
   */
  const struct idxc_tensor *loss;
  /**
   * float32 `[rows, heads, dim]`, added to. NULL: not wanted.
   */
  const struct idxc_tensor *grad_q;
  /**
   * float32 `[keys, dim]`, added to. NULL: not wanted.
   */
  const struct idxc_tensor *grad_k;
  /**
   * float32 `[rows, heads]`, added to. NULL: not wanted.
   */
  const struct idxc_tensor *grad_weights;
  /**
   * Multiplies `attention_q·kv`. Finite and positive; unused with `target`.
   */
  float softmax_scale;
  /**
   * The served layer's share of the loss: `1 / (m + 1)` for a Full layer and the `m` Shared ones that it serves.
   * Finite and positive.
   */
  float layer_weight;
} idxc_distill_desc;

/**
 * What to search, for which model, on which calibration set.
 *
 * Layers are the decoder layers that have an indexer, numbered from 0: where a model has others between them, patterns
 * are in the short form of `index_topk_pattern` (`IDXC_EXPORT_COMPACT_PATTERN`). Draft layers do not count.
 */
typedef struct idxc_search_desc {
  /**
   * `sizeof(idxc_search_desc)`, set by `IDXC_SEARCH_DESC_INIT`.
   */
  uint32_t struct_size;
  /**
   * 0.
   */
  uint32_t flags;
  /**
   * Layers of a pattern, 2 to 4096.
   */
  int32_t layers;
  /**
   * Tokens that an indexer selects for a row, also where it selects them in blocks.
   */
  int32_t topk;
  /**
   * UTF-8, not empty: the host's name for exactly this model, such as a hash of its weights. A search does not resume
   * under another name.
   */
  const char *model;
  /**
   * UTF-8, not empty: the host's name for exactly the calibration rows, such as a hash of their tokens. As above.
   */
  const char *calibration;
  /**
   * Tokens of each calibration row, `row_lengths_count` of them. All must be more than `topk`: in shorter rows every
   * layer selects everything, so reuse is exact there and the loss says nothing.
   */
  const int64_t *row_lengths;
  /**
   * Calibration rows, 1 or more.
   */
  size_t row_lengths_count;
  /**
   * Layers that stay Full, ascending, `pinned_count` of them. Layer 0 and the first layer of each stage always do.
   */
  const int32_t *pinned;
  /**
   * 0: no others.
   */
  size_t pinned_count;
  /**
   * First layer of each pipeline stage, ascending, `stages_count` of them; layer 0 may be left out. The steps then
   * take turns, stage by stage, and each tries the flips of its own stage only: so many times fewer evaluations, and
   * no stage ever needs another's indices.
   */
  const int32_t *stages;
  /**
   * 0: one stage.
   */
  size_t stages_count;
  /**
   * `IDXC_SEARCH_GREEDY` or `IDXC_SEARCH_LAZY`.
   */
  int32_t method;
  /**
   * `IDXC_SEARCH_LAZY`: flips that a step tries, 1 or more. Otherwise 0.
   */
  int32_t few;
  /**
   * Full layers to stop at. 0: stop when only pinned layers are Full.
   */
  int32_t target_full_layers;
  /**
   * Full layers of the pattern to refine after the last step: the Full and the Shared layer of one stage whose
   * exchange lowers the loss most are exchanged, until no exchange lowers it. 0: no refinement.
   */
  int32_t swap_full_layers;
} idxc_search_desc;

/**
 * A pattern to measure. The strings are the search's, and valid until the next `idxc_search_report` or
 * `idxc_search_destroy` on it.
 */
typedef struct idxc_search_candidate {
  /**
   * `sizeof(idxc_search_candidate)`, set by `IDXC_SEARCH_CANDIDATE_INIT`.
   */
  uint32_t struct_size;
  /**
   * 0.
   */
  uint32_t flags;
  /**
   * One `F` or `S` a layer; NULL when the search is complete.
   */
  const char *pattern;
  /**
   * The pattern that the search has got to, of which `pattern` is a small change; NULL when the search is complete.
   */
  const char *base;
  /**
   * Losses reported so far.
   */
  int64_t evaluations;
  /**
   * Losses that the whole search takes. Exact, except that refinement counts with the round it is in or will begin
   * with: each exchange adds another.
   */
  int64_t expected;
  /**
   * The first layer whose role differs from `base`. What enters it (hidden states, and the indices of the last Full
   * layer before it) is what enters it under `base`: a host that kept that from one run of `base` starts here, with
   * the same result. 0 for the all-Full pattern, which comes first; -1 when the search is complete.
   */
  int32_t first_changed_layer;
  /**
   * 0.
   */
  int32_t reserved;
} idxc_search_candidate;

/**
 * Success.
 */
#define IDXC_OK 0

/**
 * An argument has the wrong value, shape, dtype, stride or device. Nothing was changed.
 */
#define IDXC_ERR_INVALID 1

/**
 * A model config or pattern is refused; the text says what to change.
 */
#define IDXC_ERR_CONFIG 2

/**
 * Indices were asked for that no Full layer has written in this step.
 */
#define IDXC_ERR_STALE 3

/**
 * Slot-form indices met another block table than the one they were translated with.
 */
#define IDXC_ERR_FORM 4

/**
 * A caller's buffer or workspace is too small; the text gives the size needed.
 */
#define IDXC_ERR_BUFFER_TOO_SMALL 5

/**
 * The backend cannot do this.
 */
#define IDXC_ERR_UNSUPPORTED 6

/**
 * No usable device or driver.
 */
#define IDXC_ERR_NO_DEVICE 7

/**
 * The library carries no kernels for this device.
 */
#define IDXC_ERR_NO_KERNEL_IMAGE 8

/**
 * Memory could not be had.
 */
#define IDXC_ERR_OUT_OF_MEMORY 9

/**
 * The device driver reported an error.
 */
#define IDXC_ERR_DRIVER 10

/**
 * The library broke one of its own promises; please report it with the text.
 */
#define IDXC_ERR_PANIC 11

/**
 * A file could not be read or written; the text has the system's reason.
 */
#define IDXC_ERR_IO 12

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * ABI version of the library (`IDXC_ABI_VERSION` of the header it was built with).
 *
 * - Ownership: nothing changes hands.
 * - Threads: any.
 * - Stream: none.
 * - Graph capture: allowed; host only.
 * - Errors: none.
 */
uint32_t idxc_version(void);

/**
 * Short name of a status, such as `"IDXC_ERR_STALE"`; `"unknown status"` for a number that is none.
 *
 * - Ownership: the string is static.
 * - Threads: any.
 * - Stream: none.
 * - Graph capture: allowed; host only.
 * - Errors: none.
 */
const char *idxc_status_name(idxc_status status);

/**
 * Text of the last error on the calling thread: function, argument, expected, got. Empty if there was none.
 * A successful call leaves it as it is.
 *
 * - Ownership: the library's; valid until the calling thread's next failing call.
 * - Threads: any; each thread has its own text.
 * - Stream: none.
 * - Graph capture: allowed; host only.
 * - Errors: none.
 */
const char *idxc_last_error(void);

/**
 * Sends log lines of the whole library to `callback` (NULL: to nobody, which is also how it starts). The library
 * never prints.
 *
 * - Ownership: `user` stays the caller's and must outlive the registration.
 * - Threads: any; `callback` may be called from any thread that calls the library, one call at a time.
 * - Stream: none.
 * - Graph capture: allowed; host only.
 * - Errors: `IDXC_ERR_PANIC` only.
 */
idxc_status idxc_set_log_callback(idxc_log_callback callback,
                                  void *user);

/**
 * Opens a backend. `desc` NULL means `IDXC_CONTEXT_DESC_INIT`: CUDA device 0 if it can be used, else all cores.
 *
 * CUDA: uses the calling thread's current context if that is on the device (and it must then outlive this one), else
 * the device's primary context. All kernels are loaded here. Every later call leaves the calling thread's current
 * context as it was.
 *
 * - Ownership: `*out` is the caller's, for `idxc_context_destroy`. Caches keep what they need of it alive themselves.
 * - Threads: any; the handle may be used from many threads at once.
 * - Stream: none.
 * - Graph capture: not allowed; starts threads and allocates.
 * - Errors: `IDXC_ERR_INVALID` (a field), `IDXC_ERR_NO_DEVICE`, `IDXC_ERR_NO_KERNEL_IMAGE` (built without CUDA, or no
 *   kernels for the card), `IDXC_ERR_OUT_OF_MEMORY`. `*out` is NULL after an error.
 */
idxc_status idxc_context_create(const struct idxc_context_desc *desc,
                                struct idxc_context **out);

/**
 * Closes a context. NULL is fine. Caches created from it stay usable.
 *
 * - Ownership: takes `context`, which must not be used again.
 * - Threads: any, when no other thread is in a call with this handle.
 * - Stream: none.
 * - Graph capture: not allowed.
 * - Errors: none.
 */
void idxc_context_destroy(struct idxc_context *context);

/**
 * What the context runs on.
 *
 * - Ownership: `info` is the caller's; strings in it are static.
 * - Threads: any.
 * - Stream: none.
 * - Graph capture: allowed; host only.
 * - Errors: `IDXC_ERR_INVALID`.
 */
idxc_status idxc_context_get_info(const struct idxc_context *context, struct idxc_context_info *info);

/**
 * Makes a plan from `index_topk_pattern`: one `F`, `S` or `-` a decoder layer, in `pattern`.
 *
 * - Ownership: `*out` is the caller's, for `idxc_plan_destroy`.
 * - Threads: any.
 * - Stream: none.
 * - Graph capture: not allowed; allocates.
 * - Errors: `IDXC_ERR_CONFIG` (length, letter, first layer Shared, topk …), `IDXC_ERR_INVALID` (pointer, descriptor).
 *   `*out` is NULL after an error.
 */
idxc_status idxc_plan_from_pattern(const struct idxc_model_desc *model,
                                   const char *pattern,
                                   struct idxc_plan **out);

/**
 * Makes a plan from `indexer_types`: `types[0 … count - 1]`, each `"full"` or `"shared"`, one a decoder layer.
 *
 * - Ownership: `*out` is the caller's, for `idxc_plan_destroy`.
 * - Threads: any.
 * - Stream: none.
 * - Graph capture: not allowed; allocates.
 * - Errors: as `idxc_plan_from_pattern`.
 */
idxc_status idxc_plan_from_indexer_types(const struct idxc_model_desc *model,
                                         const char *const *types,
                                         size_t count,
                                         struct idxc_plan **out);

/**
 * Makes a plan from `index_topk_freq` and `index_skip_topk_offset` under the rule of `dialect` (`IDXC_DIALECT_…`).
 * `offset` NULL means the dialect's default.
 *
 * - Ownership: `*out` is the caller's, for `idxc_plan_destroy`.
 * - Threads: any.
 * - Stream: none.
 * - Graph capture: not allowed; allocates.
 * - Errors: as `idxc_plan_from_pattern`.
 */
idxc_status idxc_plan_from_freq(const struct idxc_model_desc *model,
                                int32_t dialect,
                                int64_t freq,
                                const int64_t *offset,
                                struct idxc_plan **out);

/**
 * Makes a plan from the list of its Full layers, ascending (`index_source_layer_ids`, or a list of layers that keep
 * their indexer).
 *
 * - Ownership: `*out` is the caller's, for `idxc_plan_destroy`.
 * - Threads: any.
 * - Stream: none.
 * - Graph capture: not allowed; allocates.
 * - Errors: as `idxc_plan_from_pattern`.
 */
idxc_status idxc_plan_from_source_layers(const struct idxc_model_desc *model,
                                         const int64_t *layers,
                                         size_t count,
                                         struct idxc_plan **out);

/**
 * Makes a plan from the text of a Hugging Face `config.json`. Which field decided is in `idxc_plan_info.field`; what
 * was overruled, switched off or assumed is in the notes, and sent to the log callback as warnings.
 *
 * - Ownership: `json` (`size` bytes, need not end in NUL) is the caller's; `*out` is the caller's, for
 *   `idxc_plan_destroy`.
 * - Threads: any.
 * - Stream: none.
 * - Graph capture: not allowed; allocates.
 * - Errors: `IDXC_ERR_CONFIG` (not JSON, fields that are missing, wrong or disagree), `IDXC_ERR_INVALID` (pointer).
 *   `*out` is NULL after an error.
 */
idxc_status idxc_plan_from_hf_config(const char *json,
                                     size_t size,
                                     struct idxc_plan **out);

/**
 * Makes the plan of a pipeline stage: layers `first … end - 1`, which keep their ids. `flags`: `IDXC_FLAG_PROMOTE`, or 0.
 * Cut all stages with the same flags, so that both ends of a hand-off agree.
 *
 * - Ownership: `*out` is the caller's, for `idxc_plan_destroy`; it does not depend on `plan`.
 * - Threads: any.
 * - Stream: none.
 * - Graph capture: not allowed; allocates.
 * - Errors: `IDXC_ERR_INVALID` (argument named). `*out` is NULL after an error.
 */
idxc_status idxc_plan_slice(const struct idxc_plan *plan,
                            int32_t first,
                            int32_t end,
                            uint32_t flags,
                            struct idxc_plan **out);

/**
 * Frees a plan. NULL is fine. Caches made with it stay usable.
 *
 * - Ownership: takes `plan`, which must not be used again.
 * - Threads: any, when no other thread is in a call with this handle.
 * - Stream: none.
 * - Graph capture: allowed; host only.
 * - Errors: none.
 */
void idxc_plan_destroy(struct idxc_plan *plan);

/**
 * What the plan comes to.
 *
 * - Ownership: `info` is the caller's.
 * - Threads: any.
 * - Stream: none.
 * - Graph capture: allowed; host only.
 * - Errors: `IDXC_ERR_INVALID`.
 */
idxc_status idxc_plan_get_info(const struct idxc_plan *plan, struct idxc_plan_info *info);

/**
 * Role of a layer, `IDXC_ROLE_…`; -1 for a NULL plan or a layer that is not the plan's. For the hot path.
 *
 * - Ownership: nothing changes hands.
 * - Threads: any.
 * - Stream: none.
 * - Graph capture: allowed; host only.
 * - Errors: -1 as above; the text is in `idxc_last_error()`.
 */
int32_t idxc_plan_layer_role(const struct idxc_plan *plan, int32_t layer);

/**
 * What one layer does.
 *
 * - Ownership: `info` is the caller's.
 * - Threads: any.
 * - Stream: none.
 * - Graph capture: allowed; host only.
 * - Errors: `IDXC_ERR_INVALID` (a layer that is not the plan's).
 */
idxc_status idxc_plan_layer_get_info(const struct idxc_plan *plan,
                                     int32_t layer,
                                     struct idxc_layer_info *info);

/**
 * Writes the plan in somebody's spelling (`IDXC_EXPORT_…`), as NUL-terminated text. `dialect` (`IDXC_DIALECT_…`) counts
 * for `IDXC_EXPORT_FREQ` only. `*size` receives the bytes needed, NUL included; with `buffer` NULL and `capacity` 0 that
 * is all that happens.
 *
 * - Ownership: `buffer` is the caller's.
 * - Threads: any.
 * - Stream: none.
 * - Graph capture: allowed; host only.
 * - Errors: `IDXC_ERR_INVALID`, `IDXC_ERR_CONFIG` (not expressible that way), `IDXC_ERR_BUFFER_TOO_SMALL` (`*size` is set).
 */
idxc_status idxc_plan_export(const struct idxc_plan *plan,
                             int32_t format,
                             int32_t dialect,
                             char *buffer,
                             size_t capacity,
                             size_t *size);

/**
 * Bytes of device memory that a cache of this size holds (`desc->buffer` is not looked at).
 *
 * - Ownership: everything stays the caller's.
 * - Threads: any.
 * - Stream: none.
 * - Graph capture: allowed; host only.
 * - Errors: `IDXC_ERR_INVALID` (argument named).
 */
idxc_status idxc_cache_size(const struct idxc_plan *plan, const struct idxc_cache_desc *desc, size_t *size);

/**
 * Makes an index cache for one model on one rank. Layers whose selection the library's own operations cannot do (blocks
 * of tokens, pooled keys) are named to the log callback: the host's kernels serve them, through `idxc_publish`.
 *
 * - Ownership: `*out` is the caller's, for `idxc_cache_destroy`. It keeps what it needs of `context` and `plan` alive.
 *   `desc->buffer` stays the caller's and must outlive the cache.
 * - Threads: any; the cache itself is for one thread at a time.
 * - Stream: none.
 * - Graph capture: not allowed; allocates. Addresses never change after it.
 * - Errors: `IDXC_ERR_INVALID` (argument named), `IDXC_ERR_OUT_OF_MEMORY`. `*out` is NULL after an error.
 */
idxc_status idxc_cache_create(const struct idxc_context *context,
                              const struct idxc_plan *plan,
                              const struct idxc_cache_desc *desc,
                              struct idxc_cache **out);

/**
 * Frees a cache. NULL is fine.
 *
 * - Ownership: takes `cache`, which must not be used again; a host-owned buffer stays the host's.
 * - Threads: any, when no other thread is in a call with this handle.
 * - Stream: CUDA: work that uses the cache must have finished.
 * - Graph capture: not allowed.
 * - Errors: none.
 */
void idxc_cache_destroy(struct idxc_cache *cache);

/**
 * Begins a forward pass of `rows` rows (padding rows included) on a lane. Whatever the lane held is stale from here
 * on. `step_id` is the host's number for the pass; it must differ from the lane's current one.
 *
 * - Ownership: nothing changes hands.
 * - Threads: the cache's.
 * - Stream: none; host only.
 * - Graph capture: allowed; captured work keeps the rows of the capture, and a replay needs no call.
 * - Errors: `IDXC_ERR_INVALID` (lane, rows above `max_rows`, a repeated step number).
 */
idxc_status idxc_step_begin(struct idxc_cache *cache,
                            int32_t lane,
                            int32_t rows,
                            uint64_t step_id);

/**
 * Begins the next draft iteration on a lane that holds an MTP layer's indices, and keeps them: row `i` of the new step
 * uses what row `from[i]` of the last one selected. For plans with `index_share_for_mtp_iteration` only; indices never
 * pass from the target model to a draft. In this step `idxc_select` on that MTP layer does nothing (the host still
 * writes the layer's index K).
 *
 * `from`: int32 `[rows]` on the context's device, strictly ascending, then -1 for padding rows: the last *accepted*
 * row of each request, not the last padded one.
 *
 * - Ownership: everything stays the caller's.
 * - Threads: the cache's.
 * - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
 * - Graph capture: allowed.
 * - Errors: `IDXC_ERR_INVALID` (argument named; not an MTP layer's indices; a plan that does not share),
 *   `IDXC_ERR_STALE` (nothing to carry).
 */
idxc_status idxc_step_carry(struct idxc_cache *cache,
                            int32_t lane,
                            const struct idxc_tensor *from,
                            uint64_t step_id,
                            void *stream);

/**
 * Bytes of workspace that `idxc_select` needs for these shapes, or for smaller ones. Data pointers may be NULL.
 *
 * - Ownership: everything stays the caller's.
 * - Threads: the cache's.
 * - Stream: none.
 * - Graph capture: allowed; host only.
 * - Errors: `IDXC_ERR_INVALID` (argument named).
 */
idxc_status idxc_select_workspace(const struct idxc_cache *cache,
                                  const struct idxc_indexer_desc *desc,
                                  size_t *size);

/**
 * The indexer's step of one layer. On a Full layer: scores the row's tokens, writes the `topk` best to the lane, exact,
 * ties to the lowest position, ascending, then -1. On a Shared layer: does nothing but check that the indices it will
 * reuse are there; `desc` may be NULL. A row that sees at most `topk` tokens takes them all, unscored.
 *
 * Never holds more than O(rows * topk) scores; on Hopper up to 8192 a row where no row can see more, and for decode (at
 * most 8 rows a request; with `row_request` on average), which has kernels of its own there, up to 128 MiB of them.
 *
 * - Ownership: everything stays the caller's; `workspace` is scratch during the call (CUDA: until `stream` is done).
 * - Threads: the cache's.
 * - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
 * - Graph capture: allowed; which layers are Full is fixed by the plan, lengths are read on the device.
 * - Errors: `IDXC_ERR_INVALID` (argument named; CPU, `IDXC_CHECKED`: a page or length out of range, before anything is written),
 *   `IDXC_ERR_STALE` (a Shared layer without indices, or no step), `IDXC_ERR_BUFFER_TOO_SMALL` (workspace),
 *   `IDXC_ERR_UNSUPPORTED` (see `idxc_cache_create`).
 */
idxc_status idxc_select(struct idxc_cache *cache,
                        int32_t lane,
                        int32_t layer,
                        const struct idxc_indexer_desc *desc,
                        void *workspace,
                        size_t workspace_size,
                        void *stream);

/**
 * Describes the lane's buffer for this step, int32 `[rows, topk]`, for the host to write before `idxc_publish`.
 *
 * - Ownership: memory, shape and strides are the cache's; valid until the lane's next step.
 * - Threads: the cache's.
 * - Stream: none.
 * - Graph capture: allowed; host only.
 * - Errors: `IDXC_ERR_INVALID`, `IDXC_ERR_STALE` (no step).
 */
idxc_status idxc_slot(const struct idxc_cache *cache,
                      int32_t lane,
                      struct idxc_tensor *out);

/**
 * Puts indices in place of an `idxc_select`: the host's own indexer computed them, or they were received from the
 * pipeline stage before (`layer` is then the Full layer that selected them). `indices`: int32 `[rows, topk]`, -1 for
 * none, any order; NULL means that the host wrote the buffer of `idxc_slot` itself.
 *
 * - Ownership: everything stays the caller's; another tensor than the slot is copied.
 * - Threads: the cache's.
 * - Stream: CUDA: the copy runs on `stream`. CPU: done on return, `stream` is ignored.
 * - Graph capture: allowed.
 * - Errors: `IDXC_ERR_INVALID` (argument named; a Shared layer of this stage), `IDXC_ERR_STALE` (no step).
 */
idxc_status idxc_publish(struct idxc_cache *cache,
                         int32_t lane,
                         int32_t layer,
                         const struct idxc_tensor *indices,
                         int32_t form,
                         uint64_t table_id,
                         void *stream);

/**
 * Describes the indices that `layer` uses, its own or reused: int32 `[rows, topk]`. Their form is in
 * `idxc_lane_get_info`.
 *
 * - Ownership: memory, shape and strides are the cache's; valid until the lane's next step, and overwritten by the
 *   next Full layer.
 * - Threads: the cache's.
 * - Stream: none.
 * - Graph capture: allowed; host only. The address never changes.
 * - Errors: `IDXC_ERR_INVALID`, `IDXC_ERR_STALE` (the layer's source has not written them in this step).
 */
idxc_status idxc_indices(const struct idxc_cache *cache,
                         int32_t lane,
                         int32_t layer,
                         struct idxc_tensor *out);

/**
 * Copies the indices that `layer` uses into the host's memory, for the pipeline stage after (see
 * `idxc_plan_info.sends_from_layer`). `out`: int32 `[rows, topk]`. Their form and source are in `idxc_lane_get_info`.
 *
 * - Ownership: everything stays the caller's.
 * - Threads: the cache's.
 * - Stream: CUDA: the copy runs on `stream`. CPU: done on return, `stream` is ignored.
 * - Graph capture: allowed.
 * - Errors: `IDXC_ERR_INVALID` (argument named), `IDXC_ERR_STALE`.
 */
idxc_status idxc_export(const struct idxc_cache *cache,
                        int32_t lane,
                        int32_t layer,
                        const struct idxc_tensor *out,
                        void *stream);

/**
 * What the lane holds: step, rows, whose indices, in which form.
 *
 * - Ownership: `info` is the caller's.
 * - Threads: the cache's.
 * - Stream: none.
 * - Graph capture: allowed; host only.
 * - Errors: `IDXC_ERR_INVALID`, `IDXC_ERR_STALE` (no step).
 */
idxc_status idxc_lane_get_info(const struct idxc_cache *cache, int32_t lane, struct idxc_lane_info *info);

/**
 * Bytes of workspace that `idxc_attend` needs for these shapes, or for smaller ones. Data pointers may be NULL.
 *
 * - Ownership: everything stays the caller's.
 * - Threads: the cache's.
 * - Stream: none.
 * - Graph capture: allowed; host only.
 * - Errors: `IDXC_ERR_INVALID` (argument named).
 */
idxc_status idxc_attend_workspace(const struct idxc_cache *cache,
                                  const struct idxc_attention_desc *desc,
                                  size_t *size);

/**
 * Sparse MLA attention of one layer over the indices it uses, its own or reused. See `idxc_sparse_attention`.
 *
 * - Ownership: everything stays the caller's; `workspace` is scratch during the call (CUDA: until `stream` is done).
 * - Threads: the cache's.
 * - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
 * - Graph capture: allowed.
 * - Errors: `IDXC_ERR_INVALID` (argument named; CPU, `IDXC_CHECKED`: an index out of range), `IDXC_ERR_STALE` (no indices for this
 *   layer), `IDXC_ERR_FORM` (slots of another block table), `IDXC_ERR_BUFFER_TOO_SMALL` (workspace),
 *   `IDXC_ERR_UNSUPPORTED` (see `idxc_cache_create`).
 */
idxc_status idxc_attend(const struct idxc_cache *cache,
                        int32_t lane,
                        int32_t layer,
                        const struct idxc_attention_desc *desc,
                        void *workspace,
                        size_t workspace_size,
                        void *stream);

/**
 * Quantises new indexer keys and writes them to their pages. A host calls it for Full layers only: Shared layers own
 * no index K.
 *
 * Fp8 pages: per token `scale = max(max|k|, 1e-4) / 448`, as servers store it, and values `k / scale` rounded to nearest
 * even.
 * For bfloat16 pages use `idxc_kv_write`.
 *
 * - Ownership: everything stays the caller's.
 * - Threads: any; two calls must not write the same slots at once.
 * - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
 * - Graph capture: allowed.
 * - Errors: `IDXC_ERR_INVALID` (argument named; CPU, `IDXC_CHECKED`: a slot out of range, before anything is written).
 */
idxc_status idxc_index_k_write(const struct idxc_context *context,
                               const struct idxc_index_k_write_desc *desc,
                               void *stream);

/**
 * Quantises indexer queries to e4m3, one scale per row and head, and folds that scale and `scale` into the head
 * weights.
 *
 * - Ownership: everything stays the caller's.
 * - Threads: any.
 * - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
 * - Graph capture: allowed.
 * - Errors: `IDXC_ERR_INVALID` (argument named).
 */
idxc_status idxc_index_q_quantize(const struct idxc_context *context,
                                  const struct idxc_index_q_quantize_desc *desc,
                                  void *stream);

/**
 * Lightning-indexer scores over contiguous keys:
 * `logits[r, s] = k_scale[j] * sum_h weights[r, h] * max(q[r, h]·k[j], 0)`, `j = row_start[r] + s`.
 * Columns past the row's end are -inf.
 *
 * The same bits come out on every CPU and, but for float8 of 128 dimensions on Hopper, on every card. There tensor cores
 * multiply, which cut products some 13 bits below the largest of 32: scores are off by 1e-4 to 1e-3 of their norm. They are
 * the same on every run and whatever the other rows are, but decode calls (see `idxc_select`) may round otherwise than
 * others. `idxc_select` is exact by the scores that the same call gives here in float32.
 *
 * - Ownership: everything stays the caller's.
 * - Threads: any.
 * - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
 * - Graph capture: allowed.
 * - Errors: `IDXC_ERR_INVALID` (argument named; CPU, `IDXC_CHECKED`: a row range outside the keys).
 */
idxc_status idxc_indexer_logits(const struct idxc_context *context,
                                const struct idxc_indexer_desc *desc,
                                const struct idxc_tensor *logits,
                                void *stream);

/**
 * Lightning-indexer scores over paged keys: as `idxc_indexer_logits`, with
 * `j = block_table[request, s / 64] * 64 + s % 64`. Decode with several queries a request and prefill chunks are both
 * just rows.
 *
 * - Ownership: everything stays the caller's.
 * - Threads: any.
 * - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
 * - Graph capture: allowed.
 * - Errors: `IDXC_ERR_INVALID` (argument named; CPU, `IDXC_CHECKED`: a page or length out of range).
 */
idxc_status idxc_paged_indexer_logits(const struct idxc_context *context,
                                      const struct idxc_indexer_desc *desc,
                                      const struct idxc_tensor *logits,
                                      void *stream);

/**
 * Bytes of workspace that `idxc_topk` needs for these shapes, or for smaller ones. Data pointers may be NULL.
 *
 * - Ownership: everything stays the caller's.
 * - Threads: any.
 * - Stream: none.
 * - Graph capture: allowed; host only.
 * - Errors: `IDXC_ERR_INVALID` (argument named).
 */
idxc_status idxc_topk_workspace(const struct idxc_context *context,
                                const struct idxc_topk_desc *desc,
                                size_t *size);

/**
 * The `k` best columns of each row: exact; ties go to the lowest column; ascending, then -1.
 *
 * NaN counts as -inf, and -0 equals +0. A row of fewer than `k` columns takes them all.
 *
 * - Ownership: everything stays the caller's; `workspace` is scratch during the call (CUDA: until `stream` is done).
 * - Threads: any; each call needs its own workspace.
 * - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
 * - Graph capture: allowed.
 * - Errors: `IDXC_ERR_INVALID` (argument named), `IDXC_ERR_BUFFER_TOO_SMALL` (workspace).
 */
idxc_status idxc_topk(const struct idxc_context *context,
                      const struct idxc_topk_desc *desc,
                      void *workspace,
                      size_t workspace_size,
                      void *stream);

/**
 * Translates logical indices to slots of a paged or contiguous KV store; -1 stays -1.
 *
 * - Ownership: everything stays the caller's.
 * - Threads: any.
 * - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
 * - Graph capture: allowed.
 * - Errors: `IDXC_ERR_INVALID` (argument named; CPU, `IDXC_CHECKED`: an index past its request's pages).
 */
idxc_status idxc_indices_to_slots(const struct idxc_context *context,
                                  const struct idxc_indices_to_slots_desc *desc,
                                  void *stream);

/**
 * Writes new KV rows to their pages, quantising them for the 656-byte fp8 layout: per 128 latent values one scale,
 * `max(max|v| / 448, 1e-4)` rounded up to a power of two, as servers store it.
 *
 * - Ownership: everything stays the caller's.
 * - Threads: any; two calls must not write the same slots at once.
 * - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
 * - Graph capture: allowed.
 * - Errors: `IDXC_ERR_INVALID` (argument named; CPU, `IDXC_CHECKED`: a slot out of range, before anything is written).
 */
idxc_status idxc_kv_write(const struct idxc_context *context,
                          const struct idxc_kv_write_desc *desc,
                          void *stream);

/**
 * Bytes of workspace that `idxc_sparse_attention` needs for these shapes, or for smaller ones. Data pointers may be
 * NULL.
 *
 * - Ownership: everything stays the caller's.
 * - Threads: any.
 * - Stream: none.
 * - Graph capture: allowed; host only.
 * - Errors: `IDXC_ERR_INVALID` (argument named).
 */
idxc_status idxc_sparse_attention_workspace(const struct idxc_context *context,
                                            const struct idxc_attention_desc *desc,
                                            const struct idxc_tensor *indices,
                                            int32_t form,
                                            size_t *size);

/**
 * Sparse MLA attention: each row attends to the KV rows that its indices name.
 * `out[r, h] = sum_i softmax_i(softmax_scale * q[r, h]·kv[i]) * kv[i][:d_v]`; a sink adds `exp(sink[h])` to the
 * denominator.
 *
 * - Ownership: everything stays the caller's; `workspace` is scratch during the call (CUDA: until `stream` is done).
 * - Threads: any; each call needs its own workspace.
 * - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
 * - Graph capture: allowed.
 * - Errors: `IDXC_ERR_INVALID` (argument named; CPU, `IDXC_CHECKED`: an index out of range), `IDXC_ERR_BUFFER_TOO_SMALL` (workspace).
 */
idxc_status idxc_sparse_attention(const struct idxc_context *context,
                                  const struct idxc_attention_desc *desc,
                                  const struct idxc_tensor *indices,
                                  int32_t form,
                                  void *workspace,
                                  size_t workspace_size,
                                  void *stream);

/**
 * How much of each row of `a` is also in `b`: `overlap[r] = |a[r] ∩ b[r]| / |a[r]|`, 1 for a row of `a` without any
 * index. A diagnostic of how alike two layers select; the paper found that it does not choose layers well.
 *
 * `a`, `b`: int32 `[rows, k]` (widths may differ), each row ascending with a -1 tail. `overlap`: float32 `[rows]`.
 *
 * - Ownership: everything stays the caller's.
 * - Threads: any.
 * - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
 * - Graph capture: allowed.
 * - Errors: `IDXC_ERR_INVALID` (argument named; CPU: a row that does not ascend).
 */
idxc_status idxc_indices_overlap(const struct idxc_context *context,
                                 const struct idxc_tensor *a,
                                 const struct idxc_tensor *b,
                                 const struct idxc_tensor *overlap,
                                 void *stream);

/**
 * Bytes of workspace that `idxc_distill` needs for these shapes, or for smaller ones. On the CPU they do not grow with
 * the number of keys; on CUDA they hold one or two float32 for each key (with `indices`: index, and key for `grad_k`) of
 * 1024 rows. Data pointers may be NULL.
 *
 * - Ownership: everything stays the caller's.
 * - Threads: any.
 * - Stream: none.
 * - Graph capture: allowed; host only.
 * - Errors: `IDXC_ERR_INVALID` (argument named).
 */
idxc_status idxc_distill_workspace(const struct idxc_context *context,
                                   const struct idxc_distill_desc *desc,
                                   size_t *size);

/**
 * Training-aware IndexCache: one served layer's part of the multi-layer distillation loss of a Full layer's indexer
 * (arXiv 2603.12201, Eq. 1), and its gradients.
 *
 * With scores `I[t, s] = sum_h weights[t, h] * max(q[t, h]·k[s], 0)`, their softmax `Q[t] = softmax(I[t])` and the
 * served layer's attention `P[t, s] = sum_h exp(softmax_scale * attention_q[t, h]·kv[s] - lse[t, h])`, divided by its
 * sum, both over the positions that row `t` sees or over its `indices`, adds to `loss`
 * `layer_weight * mean_t sum_s P[t, s] * (ln P[t, s] - ln Q[t, s])`, where `0 ln 0 = 0`. The mean is over the rows that
 * have a position. The gradients are those of this loss by `q`, `k` and `weights`; that of `max(x, 0)` at 0 is 0.
 *
 * All outputs are added to. A Full layer that serves itself and `m` Shared layers is `m + 1` calls with its own `q`, `k`
 * and `weights`, each as soon as that layer's attention is there, so memory does not grow with `m`; nor does it ever
 * hold a number for each row and key. The same bits come out every time, on the CPU with every number of threads.
 *
 * - Ownership: everything stays the caller's; `workspace` is scratch during the call (CUDA: until `stream` is done).
 * - Threads: any; each call needs its own workspace and outputs.
 * - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
 * - Graph capture: allowed.
 * - Errors: `IDXC_ERR_INVALID` (argument named; CPU: an index or range outside what the row sees, an input that is NaN
 *   or infinite where a row uses it, a target below 0 or without a sum, scores that overflow; nothing was written),
 *   `IDXC_ERR_BUFFER_TOO_SMALL` (workspace). CUDA cannot refuse what is in device memory, but for indices and ranges under
 *   `IDXC_CHECKED`: it makes `loss` NaN, reaches no address, and the row that has it adds to no gradient.
 */
idxc_status idxc_distill(const struct idxc_context *context,
                         const struct idxc_distill_desc *desc,
                         void *workspace,
                         size_t workspace_size,
                         void *stream);

/**
 * Begins a search.
 *
 * - Ownership: `*out` is the caller's, for `idxc_search_destroy`. Nothing of `desc` is kept.
 * - Threads: any; the search itself is for one thread at a time.
 * - Stream: none.
 * - Graph capture: not allowed; allocates.
 * - Errors: `IDXC_ERR_INVALID` (field named; a calibration row that is not longer than `topk`). `*out` is NULL after an
 *   error.
 */
idxc_status idxc_search_create(const struct idxc_search_desc *desc,
                               struct idxc_search **out);

/**
 * Tells what to measure: the same candidate until its loss is reported, and `pattern` NULL when the search is complete.
 * The loss is the mean over all calibration rows, the same rows each time; lower is better.
 *
 * - Ownership: `candidate` is the caller's; its strings are the search's, see there.
 * - Threads: the search's.
 * - Stream: none.
 * - Graph capture: allowed; host only.
 * - Errors: `IDXC_ERR_INVALID`.
 */
idxc_status idxc_search_next(const struct idxc_search *search,
                             struct idxc_search_candidate *candidate);

/**
 * Takes the loss of the pattern that `idxc_search_next` gave: `pattern` is that string, or one equal to it. If the
 * search has a journal, the loss is on the disk when this returns. Reporting a loss again is fine if it is the same.
 *
 * - Ownership: nothing changes hands; the candidate's strings are no longer valid.
 * - Threads: the search's.
 * - Stream: none.
 * - Graph capture: not allowed; allocates, and may write a file.
 * - Errors: `IDXC_ERR_INVALID` (a loss that is NaN or infinite, or not the one reported before; a pattern that was not
 *   asked for), `IDXC_ERR_CONFIG` (text that is no pattern), `IDXC_ERR_IO` (the journal could not be written; report
 *   again). An error changes nothing.
 */
idxc_status idxc_search_report(struct idxc_search *search,
                               const char *pattern,
                               double loss);

/**
 * Makes the new file `path` the search's journal: it receives all losses reported so far, and each later one before
 * `idxc_search_report` returns, so the process may be killed at any moment. Does nothing if `path` is the search's
 * journal already. The file is locked as long as this process, or one forked from it, has the search.
 *
 * - Ownership: `path` (UTF-8) is the caller's; the file is the search's until `idxc_search_destroy`.
 * - Threads: the search's.
 * - Stream: none.
 * - Graph capture: not allowed; writes a file.
 * - Errors: `IDXC_ERR_INVALID` (`path` exists: `idxc_search_resume` goes on with a search), `IDXC_ERR_IO`. An error
 *   leaves the search, and the journal it had, as they were.
 */
idxc_status idxc_search_save(struct idxc_search *search,
                             const char *path);

/**
 * Goes on with the search whose journal `path` is, from the last loss that was reported to it; `path` is the journal of
 * the search that is made. Nothing is asked for twice, and the result is that of a search that was never interrupted.
 *
 * - Ownership: `*out` is the caller's, for `idxc_search_destroy`. Nothing of `desc` is kept. The file as for
 *   `idxc_search_save`.
 * - Threads: any; the search itself is for one thread at a time.
 * - Stream: none.
 * - Graph capture: not allowed; allocates, reads a file and may write it.
 * - Errors: `IDXC_ERR_INVALID` (as `idxc_search_create`; `desc` is not what the search began with, field named;
 *   another search has the file open; the file is not a journal, or damaged anywhere but in a last line that was being
 *   written), `IDXC_ERR_IO` (no such file, …). `*out` is NULL and the file unchanged after an error.
 */
idxc_status idxc_search_resume(const struct idxc_search_desc *desc,
                               const char *path,
                               struct idxc_search **out);

/**
 * Writes what the search has found so far as a JSON object, NUL-terminated; `complete` in it says whether that is all.
 * `*size` receives the bytes needed, NUL included; with `buffer` NULL and `capacity` 0 that is all that happens.
 *
 * `patterns` has the pattern of every share of Full layers, `"1/2"`, `"1/4"`, `"1/8"` (rounded up to whole layers) and
 * `"n/layers"` in lowest terms, for `index_topk_pattern`. `steps` has each step's flip with all losses that it
 * compared, `swaps` the exchanges of the refinement (the last one's `pattern` is the refined one; none: nothing was
 * better). `evaluations`, `saved_evaluations` (flips that plain greedy would have tried) and `lazy_differs` (steps of
 * `IDXC_SEARCH_LAZY` that tried all flips to compare, and those at which the few had missed the best) tell the cost.
 *
 * - Ownership: `buffer` is the caller's.
 * - Threads: the search's.
 * - Stream: none.
 * - Graph capture: allowed; host only.
 * - Errors: `IDXC_ERR_INVALID`, `IDXC_ERR_BUFFER_TOO_SMALL` (`*size` is set).
 */
idxc_status idxc_search_result(const struct idxc_search *search,
                               char *buffer,
                               size_t capacity,
                               size_t *size);

/**
 * Ends a search. NULL is fine. Its journal stays, complete up to the last report, for `idxc_search_resume`.
 *
 * - Ownership: takes `search`, which must not be used again.
 * - Threads: any, when no other thread is in a call with this handle.
 * - Stream: none.
 * - Graph capture: not allowed; closes a file.
 * - Errors: none.
 */
void idxc_search_destroy(struct idxc_search *search);

/**
 * Every function of this header, by place: the only symbol that a host which loads the library with `dlopen` has to
 * look up. Entries are only ever appended; check `struct_size` before using one that is newer than your minimum.
 *
 * Returns NULL if the library is older than `version` (pass `IDXC_ABI_VERSION`).
 *
 * - Ownership: the table is static.
 * - Threads: any.
 * - Stream: none.
 * - Graph capture: allowed; host only.
 * - Errors: NULL as above; the text is in `idxc_last_error()`.
 */
const struct idxc_api *idxc_get_api(uint32_t version);

/** Initialiser of `idxc_context_desc`: all defaults. */
#define IDXC_CONTEXT_DESC_INIT { sizeof(idxc_context_desc), 0, 0, 0, 0, 0 }

/** Initialiser of `idxc_context_info`: all defaults. */
#define IDXC_CONTEXT_INFO_INIT { sizeof(idxc_context_info), 0, 0, 0, 0, 0, NULL }

/** Initialiser of `idxc_model_desc`: all defaults. */
#define IDXC_MODEL_DESC_INIT { sizeof(idxc_model_desc), 0, 0, 0, 0, 0 }

/** Initialiser of `idxc_plan_info`: all defaults. */
#define IDXC_PLAN_INFO_INIT { sizeof(idxc_plan_info), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }

/** Initialiser of `idxc_layer_info`: all defaults. */
#define IDXC_LAYER_INFO_INIT { sizeof(idxc_layer_info), 0, 0, 0, 0, 0, 0, 0 }

/** Initialiser of `idxc_cache_desc`: all defaults. */
#define IDXC_CACHE_DESC_INIT { sizeof(idxc_cache_desc), 0, 0, 0, NULL }

/** Initialiser of `idxc_indexer_desc`: all defaults. */
#define IDXC_INDEXER_DESC_INIT { sizeof(idxc_indexer_desc), 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL }

/** Initialiser of `idxc_lane_info`: all defaults. */
#define IDXC_LANE_INFO_INIT { sizeof(idxc_lane_info), 0, 0, 0, 0, 0, 0, 0 }

/** Initialiser of `idxc_attention_desc`: all defaults. */
#define IDXC_ATTENTION_DESC_INIT { sizeof(idxc_attention_desc), 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0, 0, NULL }

/** Initialiser of `idxc_index_k_write_desc`: all defaults. */
#define IDXC_INDEX_K_WRITE_DESC_INIT { sizeof(idxc_index_k_write_desc), 0, NULL, NULL, NULL }

/** Initialiser of `idxc_index_q_quantize_desc`: all defaults. */
#define IDXC_INDEX_Q_QUANTIZE_DESC_INIT { sizeof(idxc_index_q_quantize_desc), 0, NULL, NULL, NULL, NULL, 0, 0 }

/** Initialiser of `idxc_topk_desc`: all defaults. */
#define IDXC_TOPK_DESC_INIT { sizeof(idxc_topk_desc), 0, NULL, NULL, NULL, NULL }

/** Initialiser of `idxc_indices_to_slots_desc`: all defaults. */
#define IDXC_INDICES_TO_SLOTS_DESC_INIT { sizeof(idxc_indices_to_slots_desc), 0, NULL, NULL, NULL, NULL, NULL, 0 }

/** Initialiser of `idxc_kv_write_desc`: all defaults. */
#define IDXC_KV_WRITE_DESC_INIT { sizeof(idxc_kv_write_desc), 0, NULL, NULL, NULL }

/** Initialiser of `idxc_distill_desc`: all defaults. */
#define IDXC_DISTILL_DESC_INIT { sizeof(idxc_distill_desc), 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0 }

/** Initialiser of `idxc_search_desc`: all defaults. */
#define IDXC_SEARCH_DESC_INIT { sizeof(idxc_search_desc), 0, 0, 0, NULL, NULL, NULL, 0, NULL, 0, NULL, 0, 0, 0, 0, 0 }

/** Initialiser of `idxc_search_candidate`: all defaults. */
#define IDXC_SEARCH_CANDIDATE_INIT { sizeof(idxc_search_candidate), 0, NULL, NULL, 0, 0, 0, 0 }

/** The functions above, for hosts that load the library at run time; see `idxc_get_api`. */
struct idxc_api {
  /** Bytes of this table in the library: a function past its end does not exist there. */
  uint32_t struct_size;
  /** ABI version of the library. */
  uint32_t version;
  uint32_t (*idxc_version)(void);
  const char *(*idxc_status_name)(idxc_status status);
  const char *(*idxc_last_error)(void);
  idxc_status (*idxc_set_log_callback)(idxc_log_callback callback, void *user);
  idxc_status (*idxc_context_create)(const struct idxc_context_desc *desc, struct idxc_context **out);
  void (*idxc_context_destroy)(struct idxc_context *context);
  idxc_status (*idxc_context_get_info)(const struct idxc_context *context, struct idxc_context_info *info);
  idxc_status (*idxc_plan_from_pattern)(const struct idxc_model_desc *model, const char *pattern, struct idxc_plan **out);
  idxc_status (*idxc_plan_from_indexer_types)(const struct idxc_model_desc *model, const char *const *types, size_t count, struct idxc_plan **out);
  idxc_status (*idxc_plan_from_freq)(const struct idxc_model_desc *model, int32_t dialect, int64_t freq, const int64_t *offset, struct idxc_plan **out);
  idxc_status (*idxc_plan_from_source_layers)(const struct idxc_model_desc *model, const int64_t *layers, size_t count, struct idxc_plan **out);
  idxc_status (*idxc_plan_from_hf_config)(const char *json, size_t size, struct idxc_plan **out);
  idxc_status (*idxc_plan_slice)(const struct idxc_plan *plan, int32_t first, int32_t end, uint32_t flags, struct idxc_plan **out);
  void (*idxc_plan_destroy)(struct idxc_plan *plan);
  idxc_status (*idxc_plan_get_info)(const struct idxc_plan *plan, struct idxc_plan_info *info);
  int32_t (*idxc_plan_layer_role)(const struct idxc_plan *plan, int32_t layer);
  idxc_status (*idxc_plan_layer_get_info)(const struct idxc_plan *plan, int32_t layer, struct idxc_layer_info *info);
  idxc_status (*idxc_plan_export)(const struct idxc_plan *plan, int32_t format, int32_t dialect, char *buffer, size_t capacity, size_t *size);
  idxc_status (*idxc_cache_size)(const struct idxc_plan *plan, const struct idxc_cache_desc *desc, size_t *size);
  idxc_status (*idxc_cache_create)(const struct idxc_context *context, const struct idxc_plan *plan, const struct idxc_cache_desc *desc, struct idxc_cache **out);
  void (*idxc_cache_destroy)(struct idxc_cache *cache);
  idxc_status (*idxc_step_begin)(struct idxc_cache *cache, int32_t lane, int32_t rows, uint64_t step_id);
  idxc_status (*idxc_step_carry)(struct idxc_cache *cache, int32_t lane, const struct idxc_tensor *from, uint64_t step_id, void *stream);
  idxc_status (*idxc_select_workspace)(const struct idxc_cache *cache, const struct idxc_indexer_desc *desc, size_t *size);
  idxc_status (*idxc_select)(struct idxc_cache *cache, int32_t lane, int32_t layer, const struct idxc_indexer_desc *desc, void *workspace, size_t workspace_size, void *stream);
  idxc_status (*idxc_slot)(const struct idxc_cache *cache, int32_t lane, struct idxc_tensor *out);
  idxc_status (*idxc_publish)(struct idxc_cache *cache, int32_t lane, int32_t layer, const struct idxc_tensor *indices, int32_t form, uint64_t table_id, void *stream);
  idxc_status (*idxc_indices)(const struct idxc_cache *cache, int32_t lane, int32_t layer, struct idxc_tensor *out);
  idxc_status (*idxc_export)(const struct idxc_cache *cache, int32_t lane, int32_t layer, const struct idxc_tensor *out, void *stream);
  idxc_status (*idxc_lane_get_info)(const struct idxc_cache *cache, int32_t lane, struct idxc_lane_info *info);
  idxc_status (*idxc_attend_workspace)(const struct idxc_cache *cache, const struct idxc_attention_desc *desc, size_t *size);
  idxc_status (*idxc_attend)(const struct idxc_cache *cache, int32_t lane, int32_t layer, const struct idxc_attention_desc *desc, void *workspace, size_t workspace_size, void *stream);
  idxc_status (*idxc_index_k_write)(const struct idxc_context *context, const struct idxc_index_k_write_desc *desc, void *stream);
  idxc_status (*idxc_index_q_quantize)(const struct idxc_context *context, const struct idxc_index_q_quantize_desc *desc, void *stream);
  idxc_status (*idxc_indexer_logits)(const struct idxc_context *context, const struct idxc_indexer_desc *desc, const struct idxc_tensor *logits, void *stream);
  idxc_status (*idxc_paged_indexer_logits)(const struct idxc_context *context, const struct idxc_indexer_desc *desc, const struct idxc_tensor *logits, void *stream);
  idxc_status (*idxc_topk_workspace)(const struct idxc_context *context, const struct idxc_topk_desc *desc, size_t *size);
  idxc_status (*idxc_topk)(const struct idxc_context *context, const struct idxc_topk_desc *desc, void *workspace, size_t workspace_size, void *stream);
  idxc_status (*idxc_indices_to_slots)(const struct idxc_context *context, const struct idxc_indices_to_slots_desc *desc, void *stream);
  idxc_status (*idxc_kv_write)(const struct idxc_context *context, const struct idxc_kv_write_desc *desc, void *stream);
  idxc_status (*idxc_sparse_attention_workspace)(const struct idxc_context *context, const struct idxc_attention_desc *desc, const struct idxc_tensor *indices, int32_t form, size_t *size);
  idxc_status (*idxc_sparse_attention)(const struct idxc_context *context, const struct idxc_attention_desc *desc, const struct idxc_tensor *indices, int32_t form, void *workspace, size_t workspace_size, void *stream);
  idxc_status (*idxc_indices_overlap)(const struct idxc_context *context, const struct idxc_tensor *a, const struct idxc_tensor *b, const struct idxc_tensor *overlap, void *stream);
  idxc_status (*idxc_search_create)(const struct idxc_search_desc *desc, struct idxc_search **out);
  idxc_status (*idxc_search_next)(const struct idxc_search *search, struct idxc_search_candidate *candidate);
  idxc_status (*idxc_search_report)(struct idxc_search *search, const char *pattern, double loss);
  idxc_status (*idxc_search_save)(struct idxc_search *search, const char *path);
  idxc_status (*idxc_search_resume)(const struct idxc_search_desc *desc, const char *path, struct idxc_search **out);
  idxc_status (*idxc_search_result)(const struct idxc_search *search, char *buffer, size_t capacity, size_t *size);
  void (*idxc_search_destroy)(struct idxc_search *search);
  idxc_status (*idxc_distill_workspace)(const struct idxc_context *context, const struct idxc_distill_desc *desc, size_t *size);
  idxc_status (*idxc_distill)(const struct idxc_context *context, const struct idxc_distill_desc *desc, void *workspace, size_t workspace_size, void *stream);
};

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* INDEXCACHE_INDEXCACHE_H */
