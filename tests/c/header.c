/* Compiled as every C and C++ that the header promises: each initialiser, each convention. */
#include <indexcache/dynload.h>
#include <indexcache/indexcache.h>
#include <indexcache/indexcache.h> /* twice: the guard */

int main(void) {
  idxc_context_desc context_desc = IDXC_CONTEXT_DESC_INIT;
  idxc_context_info context_info = IDXC_CONTEXT_INFO_INIT;
  idxc_model_desc model_desc = IDXC_MODEL_DESC_INIT;
  idxc_plan_info plan_info = IDXC_PLAN_INFO_INIT;
  idxc_layer_info layer_info = IDXC_LAYER_INFO_INIT;
  idxc_cache_desc cache_desc = IDXC_CACHE_DESC_INIT;
  idxc_lane_info lane_info = IDXC_LANE_INFO_INIT;
  idxc_indexer_desc indexer_desc = IDXC_INDEXER_DESC_INIT;
  idxc_attention_desc attention_desc = IDXC_ATTENTION_DESC_INIT;
  idxc_index_k_write_desc index_k_write_desc = IDXC_INDEX_K_WRITE_DESC_INIT;
  idxc_index_q_quantize_desc index_q_quantize_desc = IDXC_INDEX_Q_QUANTIZE_DESC_INIT;
  idxc_topk_desc topk_desc = IDXC_TOPK_DESC_INIT;
  idxc_indices_to_slots_desc indices_to_slots_desc = IDXC_INDICES_TO_SLOTS_DESC_INIT;
  idxc_kv_write_desc kv_write_desc = IDXC_KV_WRITE_DESC_INIT;
  idxc_distill_desc distill_desc = IDXC_DISTILL_DESC_INIT;
  idxc_search_desc search_desc = IDXC_SEARCH_DESC_INIT;
  idxc_search_candidate search_candidate = IDXC_SEARCH_CANDIDATE_INIT;
  idxc_context *context = IDXC_NULL;
  idxc_status status;

  index_k_write_desc.flags = IDXC_FLAG_HADAMARD | IDXC_FLAG_POW2_SCALE;
  model_desc.flags = IDXC_FLAG_MTP_SHARES;
  status = idxc_context_create(&context_desc, &context);
  if (status != IDXC_OK) return status;
  idxc_context_destroy(context);
  return index_k_write_desc.flags != 3 || model_desc.flags != 2 || context_info.struct_size != sizeof(context_info) || plan_info.struct_size != sizeof(plan_info) ||
         layer_info.struct_size != sizeof(layer_info) || cache_desc.struct_size != sizeof(cache_desc) ||
         lane_info.struct_size != sizeof(lane_info) || indexer_desc.struct_size != sizeof(indexer_desc) ||
         attention_desc.struct_size != sizeof(attention_desc) || attention_desc.q ||
         index_q_quantize_desc.struct_size != sizeof(index_q_quantize_desc) ||
         topk_desc.struct_size != sizeof(topk_desc) || kv_write_desc.struct_size != sizeof(kv_write_desc) ||
         indices_to_slots_desc.struct_size != sizeof(indices_to_slots_desc) ||
         distill_desc.struct_size != sizeof(distill_desc) || distill_desc.grad_weights ||
         search_desc.struct_size != sizeof(search_desc) || search_candidate.struct_size != sizeof(search_candidate) ||
         idxc_get_api(IDXC_ABI_VERSION)->struct_size != sizeof(idxc_api);
}
