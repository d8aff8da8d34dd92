"""indexcache.h in ctypes: structs and the function table. ``tests/test_abi.py`` holds it to the header."""

import operator
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_size_t,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
    sizeof,
)
from typing import Any, ClassVar, List, Tuple


def checked(ctype):
    """``ctype`` as an argument that refuses what it cannot hold; ctypes would cut it off silently."""

    def from_param(cls, value):
        value = operator.index(value)
        if ctype(value).value != value:
            raise OverflowError(f"{value} does not fit a {'' if ctype(-1).value < 0 else 'u'}int{8 * sizeof(ctype)}")
        return ctype(value)

    return type(ctype.__name__, (ctype,), {"from_param": classmethod(from_param)})


CHECKED = {t: checked(t) for t in (c_int32, c_int64, c_uint32, c_uint64)}
Int32, Int64, UInt32, UInt64 = CHECKED.values()
SIZE = UInt64  # size_t: the library is 64-bit only.

LogCallback = CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


class Device(Structure):
    _fields_ = [("device_type", c_int32), ("device_id", c_int32)]


class DType(Structure):
    _fields_ = [("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16)]


class Tensor(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("device", Device),
        ("ndim", c_int32),
        ("dtype", DType),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


# Handles: different types, so that ctypes refuses one in the place of another.
class Context(Structure):
    pass


class Plan(Structure):
    pass


class Cache(Structure):
    pass


class Search(Structure):
    pass


T = POINTER(Tensor)
HEAD = [("struct_size", c_uint32), ("flags", c_uint32)]


class CacheDesc(Structure):
    _fields_ = [*HEAD, ("lanes", c_int32), ("max_rows", c_int32), ("buffer", T)]


class IndexerDesc(Structure):
    _fields_ = [
        *HEAD,
        ("q", T),
        ("weights", T),
        ("k", T),
        ("k_scale", T),
        ("block_table", T),
        ("row_request", T),
        ("row_start", T),
        ("row_end", T),
    ]


class LaneInfo(Structure):
    _fields_ = [
        *HEAD,
        ("step_id", c_uint64),
        ("table_id", c_uint64),
        ("rows", c_int32),
        ("source_layer", c_int32),
        ("form", c_int32),
        ("reserved", c_int32),
    ]


class AttentionDesc(Structure):
    _fields_ = [
        *HEAD,
        ("q", T),
        ("kv", T),
        ("block_table", T),
        ("row_request", T),
        ("row_start", T),
        ("row_topk", T),
        ("sink", T),
        ("out", T),
        ("lse", T),
        ("table_id", c_uint64),
        ("softmax_scale", c_float),
        ("reserved", c_uint32),
        ("probs", T),
    ]


class ContextDesc(Structure):
    _fields_ = [
        *HEAD,
        ("backend", c_int32),
        ("device_id", c_int32),
        ("threads", c_int32),
        ("reserved", c_int32),
    ]


class ContextInfo(Structure):
    _fields_ = [
        *HEAD,
        ("backend", c_int32),
        ("device_id", c_int32),
        ("threads", c_int32),
        ("reserved", c_int32),
        ("isa", c_char_p),
    ]


class IndexKWriteDesc(Structure):
    _fields_ = [*HEAD, ("k", T), ("slots", T), ("pages", T)]


class IndexQQuantizeDesc(Structure):
    _fields_ = [
        *HEAD,
        ("q", T),
        ("weights", T),
        ("q_out", T),
        ("weights_out", T),
        ("scale", c_float),
        ("reserved", c_uint32),
    ]


class TopkDesc(Structure):
    _fields_ = [*HEAD, ("logits", T), ("row_start", T), ("row_end", T), ("indices", T)]


class IndicesToSlotsDesc(Structure):
    _fields_ = [
        *HEAD,
        ("indices", T),
        ("block_table", T),
        ("row_request", T),
        ("row_start", T),
        ("slots", T),
        ("page_size", c_int64),
    ]


class KvWriteDesc(Structure):
    _fields_ = [*HEAD, ("kv", T), ("slots", T), ("pages", T)]


class DistillDesc(Structure):
    _fields_ = [
        *HEAD,
        ("q", T),
        ("k", T),
        ("weights", T),
        ("row_start", T),
        ("row_end", T),
        ("indices", T),
        ("target", T),
        ("attention_q", T),
        ("kv", T),
        ("lse", T),
        ("loss", T),
        ("grad_q", T),
        ("grad_k", T),
        ("grad_weights", T),
        ("softmax_scale", c_float),
        ("layer_weight", c_float),
    ]


class ModelDesc(Structure):
    _fields_ = [
        *HEAD,
        ("layers", c_int32),
        ("topk", c_int32),
        ("mtp_layers", c_int32),
        ("index_head_dim", c_int32),
    ]


class PlanInfo(Structure):
    _fields_ = [
        *HEAD,
        ("fingerprint", c_uint64),
        ("model_fingerprint", c_uint64),
        ("first_layer", c_int32),
        ("end_layer", c_int32),
        ("decoder_layers", c_int32),
        ("mtp_layers", c_int32),
        ("mtp_shares", c_int32),
        ("full_layers", c_int32),
        ("shared_layers", c_int32),
        ("topk", c_int32),
        ("index_k_slots", c_int32),
        ("receives_from_layer", c_int32),
        ("sends_from_layer", c_int32),
        ("promoted_layer", c_int32),
        ("row_bytes", c_int64),
        ("index_k_bytes_per_token", c_double),
        ("index_k_bytes_saved_per_token", c_double),
        ("field", c_int32),
        ("dialect", c_int32),
        ("notes", c_int32),
        ("reserved", c_int32),
    ]


class LayerInfo(Structure):
    _fields_ = [
        *HEAD,
        ("role", c_int32),
        ("source_layer", c_int32),
        ("index_k_slot", c_int32),
        ("index_k_owner", c_int32),
        ("block", c_int32),
        ("key_pool", c_int32),
    ]


class SearchDesc(Structure):
    _fields_ = [
        *HEAD,
        ("layers", c_int32),
        ("topk", c_int32),
        ("model", c_char_p),
        ("calibration", c_char_p),
        ("row_lengths", POINTER(c_int64)),
        ("row_lengths_count", c_size_t),
        ("pinned", POINTER(c_int32)),
        ("pinned_count", c_size_t),
        ("stages", POINTER(c_int32)),
        ("stages_count", c_size_t),
        ("method", c_int32),
        ("few", c_int32),
        ("target_full_layers", c_int32),
        ("swap_full_layers", c_int32),
    ]


class SearchCandidate(Structure):
    _fields_ = [
        *HEAD,
        ("pattern", c_char_p),
        ("base", c_char_p),
        ("evaluations", c_int64),
        ("expected", c_int64),
        ("first_changed_layer", c_int32),
        ("reserved", c_int32),
    ]


P = POINTER
STREAM, MEMORY = c_void_p, c_void_p

# Name, result, arguments; in the table's order.
FUNCTIONS: List[Tuple[Any, ...]] = [
    ("idxc_version", c_uint32),
    ("idxc_status_name", c_char_p, Int32),
    ("idxc_last_error", c_char_p),
    ("idxc_set_log_callback", c_int32, LogCallback, c_void_p),
    ("idxc_context_create", c_int32, P(ContextDesc), P(P(Context))),
    ("idxc_context_destroy", None, P(Context)),
    ("idxc_context_get_info", c_int32, P(Context), P(ContextInfo)),
    ("idxc_plan_from_pattern", c_int32, P(ModelDesc), c_char_p, P(P(Plan))),
    ("idxc_plan_from_indexer_types", c_int32, P(ModelDesc), P(c_char_p), SIZE, P(P(Plan))),
    ("idxc_plan_from_freq", c_int32, P(ModelDesc), Int32, Int64, P(c_int64), P(P(Plan))),
    ("idxc_plan_from_source_layers", c_int32, P(ModelDesc), P(c_int64), SIZE, P(P(Plan))),
    ("idxc_plan_from_hf_config", c_int32, c_char_p, SIZE, P(P(Plan))),
    ("idxc_plan_slice", c_int32, P(Plan), Int32, Int32, UInt32, P(P(Plan))),
    ("idxc_plan_destroy", None, P(Plan)),
    ("idxc_plan_get_info", c_int32, P(Plan), P(PlanInfo)),
    ("idxc_plan_layer_role", c_int32, P(Plan), Int32),
    ("idxc_plan_layer_get_info", c_int32, P(Plan), Int32, P(LayerInfo)),
    ("idxc_plan_export", c_int32, P(Plan), Int32, Int32, c_char_p, SIZE, P(c_size_t)),
    ("idxc_cache_size", c_int32, P(Plan), P(CacheDesc), P(c_size_t)),
    ("idxc_cache_create", c_int32, P(Context), P(Plan), P(CacheDesc), P(P(Cache))),
    ("idxc_cache_destroy", None, P(Cache)),
    ("idxc_step_begin", c_int32, P(Cache), Int32, Int32, UInt64),
    ("idxc_step_carry", c_int32, P(Cache), Int32, T, UInt64, STREAM),
    ("idxc_select_workspace", c_int32, P(Cache), P(IndexerDesc), P(c_size_t)),
    ("idxc_select", c_int32, P(Cache), Int32, Int32, P(IndexerDesc), MEMORY, SIZE, STREAM),
    ("idxc_slot", c_int32, P(Cache), Int32, T),
    ("idxc_publish", c_int32, P(Cache), Int32, Int32, T, Int32, UInt64, STREAM),
    ("idxc_indices", c_int32, P(Cache), Int32, Int32, T),
    ("idxc_export", c_int32, P(Cache), Int32, Int32, T, STREAM),
    ("idxc_lane_get_info", c_int32, P(Cache), Int32, P(LaneInfo)),
    ("idxc_attend_workspace", c_int32, P(Cache), P(AttentionDesc), P(c_size_t)),
    ("idxc_attend", c_int32, P(Cache), Int32, Int32, P(AttentionDesc), MEMORY, SIZE, STREAM),
    ("idxc_index_k_write", c_int32, P(Context), P(IndexKWriteDesc), STREAM),
    ("idxc_index_q_quantize", c_int32, P(Context), P(IndexQQuantizeDesc), STREAM),
    ("idxc_indexer_logits", c_int32, P(Context), P(IndexerDesc), T, STREAM),
    ("idxc_paged_indexer_logits", c_int32, P(Context), P(IndexerDesc), T, STREAM),
    ("idxc_topk_workspace", c_int32, P(Context), P(TopkDesc), P(c_size_t)),
    ("idxc_topk", c_int32, P(Context), P(TopkDesc), MEMORY, SIZE, STREAM),
    ("idxc_indices_to_slots", c_int32, P(Context), P(IndicesToSlotsDesc), STREAM),
    ("idxc_kv_write", c_int32, P(Context), P(KvWriteDesc), STREAM),
    ("idxc_sparse_attention_workspace", c_int32, P(Context), P(AttentionDesc), T, Int32, P(c_size_t)),
    ("idxc_sparse_attention", c_int32, P(Context), P(AttentionDesc), T, Int32, MEMORY, SIZE, STREAM),
    ("idxc_indices_overlap", c_int32, P(Context), T, T, T, STREAM),
    ("idxc_search_create", c_int32, P(SearchDesc), P(P(Search))),
    ("idxc_search_next", c_int32, P(Search), P(SearchCandidate)),
    ("idxc_search_report", c_int32, P(Search), c_char_p, c_double),
    ("idxc_search_save", c_int32, P(Search), c_char_p),
    ("idxc_search_resume", c_int32, P(SearchDesc), c_char_p, P(P(Search))),
    ("idxc_search_result", c_int32, P(Search), c_char_p, SIZE, P(c_size_t)),
    ("idxc_search_destroy", None, P(Search)),
    ("idxc_distill_workspace", c_int32, P(Context), P(DistillDesc), P(c_size_t)),
    ("idxc_distill", c_int32, P(Context), P(DistillDesc), MEMORY, SIZE, STREAM),
]


class Api(Structure):
    _fields_: ClassVar[Any] = [
        ("struct_size", c_uint32),
        ("version", c_uint32),
        *((name, CFUNCTYPE(*types)) for name, *types in FUNCTIONS),
    ]
