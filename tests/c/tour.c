/* Every function once, on a small model, with the results checked against each other. Linked, or with -DLOADED through
 * the function table of the library named by the first argument. Meant to run under valgrind too: frees all it makes. */
#include <indexcache/indexcache.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef LOADED
#include <indexcache/dynload.h>
static const idxc_api *api;
#define F(name) api->name
#else
#define F(name) name
#endif

#define NEED(condition)                                                                                \
  do {                                                                                                 \
    if (!(condition)) {                                                                                \
      fprintf(stderr, "%s:%d: %s (last error: %s)\n", __FILE__, __LINE__, #condition, F(idxc_last_error)()); \
      exit(1);                                                                                         \
    }                                                                                                  \
  } while (0)
#define OK(call) NEED((call) == IDXC_OK)

enum { ROWS = 6, HEADS = 2, DIM = 16, TOKENS = 100, PAGES = 3, TOPK = 16, D_QK = 24, D_V = 16, LANES = 2 };
enum { PAGE_BYTES = 64 * (DIM + 4) };

static int logged;
static void on_log(int32_t level, const char *message, void *user) {
  NEED(level == IDXC_LOG_INFO || level == IDXC_LOG_WARNING);
  NEED(message[0] != '\0' && user == &logged);
  ++logged;
}

static float noise(void) { /* -1 to 1 */
  static uint32_t state = 12345;
  state = state * 1664525u + 1013904223u;
  return (float)(state >> 8) / 8388608.0f - 1.0f;
}

static void fill(float *x, size_t n) {
  while (n--) *x++ = noise();
}

/* A tensor over an array; the shape lives as long as the program. */
static idxc_tensor tensor(void *data, uint8_t code, uint8_t bits, int32_t ndim, int64_t a, int64_t b, int64_t c) {
  static int64_t shapes[128][3];
  static int used;
  idxc_tensor t;
  memset(&t, 0, sizeof t);
  NEED(used < 128);
  shapes[used][0] = a;
  shapes[used][1] = b;
  shapes[used][2] = c;
  t.data = data;
  t.device.device_type = IDXC_DEVICE_CPU;
  t.ndim = ndim;
  t.dtype.code = code;
  t.dtype.bits = bits;
  t.dtype.lanes = 1;
  t.shape = shapes[used++];
  return t;
}
#define F32(data, ndim, a, b, c) tensor(data, IDXC_DTYPE_FLOAT, 32, ndim, a, b, c)
#define I32(data, ndim, a, b) tensor(data, IDXC_DTYPE_INT, 32, ndim, a, b, 0)
#define F8(data, ndim, a, b, c) tensor(data, IDXC_DTYPE_FLOAT8_E4M3FN, 8, ndim, a, b, c)

static void plans(void) {
  static const char config[] =
      "{\"model_type\": \"glm_moe_dsa\", \"num_hidden_layers\": 8, \"index_topk\": 2048, \"index_topk_freq\": 4,"
      " \"index_skip_topk_offset\": 3, \"index_n_heads\": 32, \"index_head_dim\": 128}";
  const char *types[] = {"full", "shared", "full"};
  const int64_t sources[] = {0, 2}, offset = 3;
  char text[64];
  size_t size = 0;
  idxc_model_desc model = IDXC_MODEL_DESC_INIT;
  idxc_plan_info info = IDXC_PLAN_INFO_INIT;
  idxc_layer_info layer = IDXC_LAYER_INFO_INIT;
  idxc_plan *plan = NULL, *stage = NULL;
  model.layers = 3;
  model.topk = TOPK;

  OK(F(idxc_plan_from_indexer_types)(&model, types, 3, &plan));
  OK(F(idxc_plan_export)(plan, IDXC_EXPORT_PATTERN, 0, NULL, 0, &size));
  NEED(size == 4);
  NEED(F(idxc_plan_export)(plan, IDXC_EXPORT_PATTERN, 0, text, 3, &size) == IDXC_ERR_BUFFER_TOO_SMALL && size == 4);
  OK(F(idxc_plan_export)(plan, IDXC_EXPORT_PATTERN, 0, text, sizeof text, &size));
  NEED(strcmp(text, "FSF") == 0);
  OK(F(idxc_plan_slice)(plan, 1, 3, 0, &stage));
  OK(F(idxc_plan_get_info)(stage, &info));
  NEED(info.receives_from_layer == 0 && info.first_layer == 1 && info.end_layer == 3);
  F(idxc_plan_destroy)(stage);
  F(idxc_plan_destroy)(plan);

  OK(F(idxc_plan_from_source_layers)(&model, sources, 2, &plan));
  NEED(F(idxc_plan_layer_role)(plan, 1) == IDXC_ROLE_SHARED);
  OK(F(idxc_plan_layer_get_info)(plan, 1, &layer));
  NEED(layer.role == IDXC_ROLE_SHARED && layer.source_layer == 0 && layer.index_k_slot == -1);
  F(idxc_plan_destroy)(plan);

  model.layers = 8;
  OK(F(idxc_plan_from_freq)(&model, IDXC_DIALECT_HF, 4, &offset, &plan));
  OK(F(idxc_plan_export)(plan, IDXC_EXPORT_PATTERN, 0, text, sizeof text, &size));
  NEED(strcmp(text, "FFFSSSFS") == 0);
  F(idxc_plan_destroy)(plan);

  OK(F(idxc_plan_from_hf_config)(config, sizeof config - 1, &plan));
  OK(F(idxc_plan_get_info)(plan, &info));
  NEED(info.field == IDXC_FIELD_TOPK_FREQ && info.full_layers == 4 && info.shared_layers == 4);
  F(idxc_plan_destroy)(plan);

  plan = (idxc_plan *)&model; /* cleared on failure */
  NEED(F(idxc_plan_from_pattern)(&model, "SFFFFFFF", &plan) == IDXC_ERR_CONFIG && plan == NULL);
  NEED(F(idxc_last_error)()[0] != '\0');
  F(idxc_plan_destroy)(NULL);
}

static void search(const char *program) {
  const int64_t rows[] = {2049, 5000};
  const int32_t pinned[] = {3};
  const double losses[] = {1.0, 1.5, 1.25, 2.0};
  char path[4096], json[4096];
  size_t size = 0;
  int told = 0;
  idxc_search_desc desc = IDXC_SEARCH_DESC_INIT;
  idxc_search_candidate next = IDXC_SEARCH_CANDIDATE_INIT;
  idxc_search *run = NULL;
  desc.layers = 4;
  desc.topk = 2048;
  desc.model = "a";
  desc.calibration = "b";
  desc.row_lengths = rows;
  desc.row_lengths_count = 2;
  desc.pinned = pinned;
  desc.pinned_count = 1;
  NEED(snprintf(path, sizeof path, "%s.jsonl", program) < (int)sizeof path);
  remove(path);

  OK(F(idxc_search_create)(&desc, &run));
  OK(F(idxc_search_save)(run, path));
  OK(F(idxc_search_next)(run, &next));
  NEED(strcmp(next.pattern, "FFFF") == 0 && next.expected == 4);
  OK(F(idxc_search_report)(run, next.pattern, losses[told++]));
  F(idxc_search_destroy)(run);

  OK(F(idxc_search_resume)(&desc, path, &run));
  for (;;) {
    OK(F(idxc_search_next)(run, &next));
    if (!next.pattern) break;
    NEED(next.evaluations == told && next.first_changed_layer > 0);
    OK(F(idxc_search_report)(run, next.pattern, losses[told++]));
  }
  NEED(told == 4);
  NEED(F(idxc_search_result)(run, json, 3, &size) == IDXC_ERR_BUFFER_TOO_SMALL && size > 3 && size < sizeof json);
  OK(F(idxc_search_result)(run, json, sizeof json, &size));
  NEED(strlen(json) + 1 == size && strstr(json, "FFSF") && strstr(json, "FSSF"));
  F(idxc_search_destroy)(run);
  F(idxc_search_destroy)(NULL);
  remove(path);
}

/* One row that sees two keys: scores 1 and 0, so Q = (e, 1) / (e + 1), and a target of (1, 3) / 4. */
static void distill(idxc_context *context) {
  float q[1] = {1.0f}, k[2] = {1.0f, -1.0f}, w[1] = {1.0f}, target[2] = {1.0f, 3.0f};
  float loss[1] = {100.0f}, grad_q[1] = {0.0f}, grad_k[2] = {0.0f, 0.0f}, grad_w[1] = {1.0f};
  const double first = 1.0 / (1.0 + exp(-1.0));
  const double want = 0.25 * log(0.25 / first) + 0.75 * log(0.75 / (1.0 - first));
  idxc_tensor t_q = F32(q, 3, 1, 1, 1), t_k = F32(k, 2, 2, 1, 0), t_w = F32(w, 2, 1, 1, 0);
  idxc_tensor t_target = F32(target, 2, 1, 2, 0), t_loss = F32(loss, 1, 1, 0, 0);
  idxc_tensor t_grad_q = F32(grad_q, 3, 1, 1, 1), t_grad_k = F32(grad_k, 2, 2, 1, 0), t_grad_w = F32(grad_w, 2, 1, 1, 0);
  idxc_distill_desc desc = IDXC_DISTILL_DESC_INIT;
  size_t size = 0;
  void *workspace;
  desc.q = &t_q;
  desc.k = &t_k;
  desc.weights = &t_w;
  desc.target = &t_target;
  desc.loss = &t_loss;
  desc.grad_q = &t_grad_q;
  desc.grad_k = &t_grad_k;
  desc.grad_weights = &t_grad_w;
  desc.layer_weight = 0.5f;
  OK(F(idxc_distill_workspace)(context, &desc, &size));
  workspace = malloc(size);
  NEED(F(idxc_distill)(context, &desc, workspace, size - 1, NULL) == IDXC_ERR_BUFFER_TOO_SMALL);
  OK(F(idxc_distill)(context, &desc, workspace, size, NULL));
  free(workspace);
  NEED(fabs(loss[0] - 100.0 - 0.5 * want) <= 1e-5);
  NEED(fabs(grad_q[0] - 0.5 * (first - 0.25)) <= 1e-6);
  NEED(grad_k[0] == grad_q[0] && grad_k[1] == 0.0f && fabsf(grad_w[0] - 1.0f - grad_q[0]) <= 1e-6f);
}

int main(int argc, char **argv) {
  static float k[TOKENS * DIM], q[ROWS * HEADS * DIM], w[ROWS * HEADS], w_folded[ROWS * HEADS];
  static float logits[ROWS * 128], again[ROWS * 128], k_scale[TOKENS];
  static float kv[TOKENS * D_QK], kv_pages[PAGES * 64 * D_QK], att_q[ROWS * HEADS * D_QK];
  static float out[ROWS * HEADS * D_V], out2[ROWS * HEADS * D_V], lse[ROWS * HEADS], overlap[ROWS];
  static uint8_t pages[PAGES * PAGE_BYTES], q8[ROWS * HEADS * DIM], k8[TOKENS * DIM];
  int32_t table[2] = {2, 0}, row_end[ROWS], carry[2] = {1, 4};
  int64_t slots[TOKENS];
  static int32_t picked[ROWS * TOPK], slot_form[ROWS * TOPK], exported[ROWS * TOPK], carried[2 * TOPK];
  void *workspace = NULL;
  size_t size = 0, size2 = 0;
  int i, s;
  idxc_context_desc context_desc = IDXC_CONTEXT_DESC_INIT;
  idxc_context_info context_info = IDXC_CONTEXT_INFO_INIT;
  idxc_model_desc model = IDXC_MODEL_DESC_INIT;
  idxc_cache_desc cache_desc = IDXC_CACHE_DESC_INIT;
  idxc_lane_info lane = IDXC_LANE_INFO_INIT;
  idxc_index_k_write_desc kw = IDXC_INDEX_K_WRITE_DESC_INIT;
  idxc_index_q_quantize_desc qq = IDXC_INDEX_Q_QUANTIZE_DESC_INIT;
  idxc_indexer_desc ix = IDXC_INDEXER_DESC_INIT, flat = IDXC_INDEXER_DESC_INIT;
  idxc_topk_desc tk = IDXC_TOPK_DESC_INIT;
  idxc_indices_to_slots_desc ts = IDXC_INDICES_TO_SLOTS_DESC_INIT;
  idxc_kv_write_desc vw = IDXC_KV_WRITE_DESC_INIT;
  idxc_attention_desc at = IDXC_ATTENTION_DESC_INIT;
  idxc_context *context = NULL;
  idxc_plan *plan = NULL;
  idxc_cache *cache = NULL;
  idxc_tensor t_k, t_slots, t_pages, t_q, t_w, t_q8, t_wf, t_table, t_end, t_logits, t_again, t_picked, t_k8, t_ks;
  idxc_tensor t_slot_form, t_kv, t_kvp, t_aq, t_out, t_out2, t_lse, t_overlap, t_exported, t_carry, t_carried, view;
#ifdef LOADED
  static idxc_library library;
  NEED(argc == 2);
  api = idxc_library_open(&library, argv[1]);
  if (!api) return fprintf(stderr, "%s\n", library.error), 1;
#else
  (void)argc;
  NEED(idxc_get_api(IDXC_ABI_VERSION) != NULL && idxc_get_api(0) == NULL && idxc_get_api(IDXC_ABI_VERSION + 1) == NULL);
#endif

  NEED(F(idxc_version)() == IDXC_ABI_VERSION);
  NEED(strcmp(F(idxc_status_name)(IDXC_ERR_STALE), "IDXC_ERR_STALE") == 0);
  NEED(F(idxc_status_name)(-1)[0] != '\0');
  OK(F(idxc_set_log_callback)(on_log, &logged));
  context_desc.backend = IDXC_BACKEND_CPU;
  context_desc.threads = 2;
  OK(F(idxc_context_create)(&context_desc, &context));
  OK(F(idxc_context_get_info)(context, &context_info));
  NEED(context_info.backend == IDXC_BACKEND_CPU && context_info.threads == 2 && context_info.isa[0] != '\0');
  NEED(logged > 0);
  OK(F(idxc_set_log_callback)(NULL, NULL));
  plans();
  search(argv[0]);

  model.layers = 3;
  model.topk = TOPK;
  model.mtp_layers = 1;
  model.flags = IDXC_FLAG_MTP_SHARES;
  OK(F(idxc_plan_from_pattern)(&model, "FSF", &plan));
  cache_desc.lanes = LANES;
  cache_desc.max_rows = ROWS;
  OK(F(idxc_cache_size)(plan, &cache_desc, &size));
  NEED(size >= LANES * ROWS * TOPK * sizeof(int32_t));
  OK(F(idxc_cache_create)(context, plan, &cache_desc, &cache));
  F(idxc_plan_destroy)(plan); /* the cache keeps what it needs */

  /* Index K: token s lives in page table[s / 64]. */
  fill(k, TOKENS * DIM);
  for (s = 0; s < TOKENS; ++s) slots[s] = table[s / 64] * 64 + s % 64;
  t_k = F32(k, 2, TOKENS, DIM, 0);
  t_slots = tensor(slots, IDXC_DTYPE_INT, 64, 1, TOKENS, 0, 0);
  t_pages = tensor(pages, IDXC_DTYPE_UINT, 8, 2, PAGES, PAGE_BYTES, 0);
  kw.k = &t_k;
  kw.slots = &t_slots;
  kw.pages = &t_pages;
  kw.flags = IDXC_FLAG_HADAMARD;
  OK(F(idxc_index_k_write)(context, &kw, NULL));

  fill(q, ROWS * HEADS * DIM);
  fill(w, ROWS * HEADS);
  t_q = F32(q, 3, ROWS, HEADS, DIM);
  t_w = F32(w, 2, ROWS, HEADS, 0);
  t_q8 = F8(q8, 3, ROWS, HEADS, DIM);
  t_wf = F32(w_folded, 2, ROWS, HEADS, 0);
  qq.q = &t_q;
  qq.weights = &t_w;
  qq.q_out = &t_q8;
  qq.weights_out = &t_wf;
  qq.flags = IDXC_FLAG_HADAMARD;
  OK(F(idxc_index_q_quantize)(context, &qq, NULL));

  /* Scores of paged and of contiguous keys are the same; so are top-k of them and select. */
  for (i = 0; i < ROWS; ++i) row_end[i] = TOKENS - ROWS + 1 + i;
  t_table = I32(table, 2, 1, 2);
  t_end = I32(row_end, 1, ROWS, 0);
  t_logits = F32(logits, 2, ROWS, 128, 0);
  t_again = F32(again, 2, ROWS, 128, 0);
  ix.q = &t_q8;
  ix.weights = &t_wf;
  ix.k = &t_pages;
  ix.block_table = &t_table;
  ix.row_end = &t_end;
  OK(F(idxc_paged_indexer_logits)(context, &ix, &t_logits, NULL));
  for (s = 0; s < TOKENS; ++s) {
    const uint8_t *page = pages + table[s / 64] * PAGE_BYTES;
    memcpy(k8 + s * DIM, page + (s % 64) * DIM, DIM);
    memcpy(&k_scale[s], page + 64 * DIM + (s % 64) * 4, 4);
  }
  t_k8 = F8(k8, 2, TOKENS, DIM, 0);
  t_ks = F32(k_scale, 1, TOKENS, 0, 0);
  flat = ix;
  flat.block_table = NULL;
  flat.k = &t_k8;
  flat.k_scale = &t_ks;
  OK(F(idxc_indexer_logits)(context, &flat, &t_again, NULL));
  for (i = 0; i < ROWS; ++i)
    for (s = 0; s < 128; ++s) {
      float a = logits[i * 128 + s], b = again[i * 128 + s];
      NEED(s < row_end[i] ? fabsf(a - b) <= 1e-5f : a == -INFINITY && b == -INFINITY);
    }
  t_picked = I32(picked, 2, ROWS, TOPK);
  tk.logits = &t_logits;
  tk.row_end = &t_end;
  tk.indices = &t_picked;
  OK(F(idxc_topk_workspace)(context, &tk, &size));
  workspace = realloc(workspace, size + 1);
  OK(F(idxc_topk)(context, &tk, workspace, size, NULL));

  OK(F(idxc_step_begin)(cache, 0, ROWS, 1));
  OK(F(idxc_select_workspace)(cache, &ix, &size));
  workspace = realloc(workspace, size + 1);
  OK(F(idxc_select)(cache, 0, 0, &ix, workspace, size, NULL));
  OK(F(idxc_select)(cache, 0, 1, NULL, NULL, 0, NULL));
  OK(F(idxc_indices)(cache, 0, 1, &view));
  NEED(view.ndim == 2 && view.shape[0] == ROWS && view.shape[1] == TOPK && view.byte_offset == 0);
  t_exported = I32(exported, 2, ROWS, TOPK);
  OK(F(idxc_export)(cache, 0, 1, &t_exported, NULL));
  for (i = 0; i < ROWS; ++i) {
    const int32_t *row = (const int32_t *)view.data + i * (view.strides ? view.strides[0] : TOPK);
    NEED(memcmp(row, exported + i * TOPK, sizeof(int32_t) * TOPK) == 0);
    NEED(memcmp(row, picked + i * TOPK, sizeof(int32_t) * TOPK) == 0);
  }
  OK(F(idxc_lane_get_info)(cache, 0, &lane));
  NEED(lane.rows == ROWS && lane.source_layer == 0 && lane.form == IDXC_FORM_LOGICAL && lane.step_id == 1);

  /* Attention through the cache, and by hand over slots. */
  fill(kv, TOKENS * D_QK);
  fill(att_q, ROWS * HEADS * D_QK);
  t_kv = F32(kv, 2, TOKENS, D_QK, 0);
  t_kvp = F32(kv_pages, 3, PAGES, 64, D_QK);
  vw.kv = &t_kv;
  vw.slots = &t_slots;
  vw.pages = &t_kvp;
  OK(F(idxc_kv_write)(context, &vw, NULL));
  t_aq = F32(att_q, 3, ROWS, HEADS, D_QK);
  t_out = F32(out, 3, ROWS, HEADS, D_V);
  t_lse = F32(lse, 2, ROWS, HEADS, 0);
  at.q = &t_aq;
  at.kv = &t_kvp;
  at.block_table = &t_table;
  at.out = &t_out;
  at.lse = &t_lse;
  at.softmax_scale = 0.2f;
  OK(F(idxc_attend_workspace)(cache, &at, &size));
  workspace = realloc(workspace, size + 1);
  OK(F(idxc_attend)(cache, 0, 1, &at, workspace, size, NULL));
  t_slot_form = I32(slot_form, 2, ROWS, TOPK);
  ts.indices = &t_picked;
  ts.block_table = &t_table;
  ts.slots = &t_slot_form;
  ts.page_size = 64;
  OK(F(idxc_indices_to_slots)(context, &ts, NULL));
  NEED(slot_form[0] == table[picked[0] / 64] * 64 + picked[0] % 64);
  t_out2 = F32(out2, 3, ROWS, HEADS, D_V);
  at.out = &t_out2;
  at.lse = NULL;
  at.block_table = NULL;
  OK(F(idxc_sparse_attention_workspace)(context, &at, &t_slot_form, IDXC_FORM_SLOTS, &size2));
  workspace = realloc(workspace, size2 + 1);
  OK(F(idxc_sparse_attention)(context, &at, &t_slot_form, IDXC_FORM_SLOTS, workspace, size2, NULL));
  for (i = 0; i < ROWS * HEADS * D_V; ++i) NEED(fabsf(out[i] - out2[i]) <= 1e-5f && out[i] != 0.0f);

  t_overlap = F32(overlap, 1, ROWS, 0, 0);
  OK(F(idxc_indices_overlap)(context, &t_picked, &t_exported, &t_overlap, NULL));
  for (i = 0; i < ROWS; ++i) NEED(overlap[i] == 1.0f);

  /* The host's own indexer: into the slot, or from its own memory. */
  OK(F(idxc_step_begin)(cache, 1, ROWS, 7));
  OK(F(idxc_slot)(cache, 1, &view));
  for (i = 0; i < ROWS; ++i) memset((int32_t *)view.data + i * (view.strides ? view.strides[0] : TOPK), 0xff, sizeof(int32_t) * TOPK);
  OK(F(idxc_publish)(cache, 1, 0, NULL, IDXC_FORM_LOGICAL, 0, NULL));
  OK(F(idxc_publish)(cache, 1, 2, &t_slot_form, IDXC_FORM_SLOTS, 5, NULL));
  NEED(F(idxc_attend)(cache, 1, 2, &at, workspace, size2, NULL) == IDXC_ERR_FORM);

  /* A draft lane: its own selection, carried to two rows. */
  OK(F(idxc_step_begin)(cache, 1, ROWS, 8));
  OK(F(idxc_publish)(cache, 1, 3, &t_picked, IDXC_FORM_LOGICAL, 0, NULL));
  t_carry = I32(carry, 1, 2, 0);
  OK(F(idxc_step_carry)(cache, 1, &t_carry, 9, NULL));
  t_carried = I32(carried, 2, 2, TOPK);
  OK(F(idxc_export)(cache, 1, 3, &t_carried, NULL));
  for (i = 0; i < 2; ++i) NEED(memcmp(carried + i * TOPK, picked + carry[i] * TOPK, sizeof(int32_t) * TOPK) == 0);

  free(workspace);
  distill(context);
  F(idxc_context_destroy)(context); /* before its cache: allowed */
  F(idxc_cache_destroy)(cache);
  F(idxc_cache_destroy)(NULL);
  F(idxc_context_destroy)(NULL);
#ifdef LOADED
  idxc_library_close(&library);
  idxc_library_close(&library);
#endif
  return 0;
}
