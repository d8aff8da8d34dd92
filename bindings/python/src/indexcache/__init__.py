"""DeepSeek Sparse Attention with cross-layer index reuse (IndexCache).

One function or method per C function, under its name without the prefix: ``idxc_plan_from_pattern`` is
``Plan.from_pattern``, ``idxc_select`` is ``Cache.select``, ``idxc_topk`` is ``topk``. What it does is said in
``indexcache.h``; here descriptors are classes, out-parameters are returned, and a status other than OK raises ``Error``.

Tensors are numpy arrays, anything with ``__dlpack__``, or ``as_dtype`` of one; never copied. ``stream`` is a CUDA stream
handle as an integer (None: the NULL stream; ignored by the CPU backend).
"""

from ._calls import (
    Cache,
    Context,
    Plan,
    Search,
    distill,
    distill_workspace,
    index_k_write,
    index_q_quantize,
    indexer_logits,
    indices_overlap,
    indices_to_slots,
    kv_write,
    last_error,
    paged_indexer_logits,
    set_log_callback,
    sparse_attention,
    sparse_attention_workspace,
    status_name,
    topk,
    topk_workspace,
    version,
)
from ._library import Error, load
from ._tensor import Tensor, as_dtype
from .constants import *  # noqa: F403
from .descriptors import (
    AttentionDesc,
    CacheDesc,
    ContextDesc,
    DistillDesc,
    IndexerDesc,
    IndexKWriteDesc,
    IndexQQuantizeDesc,
    IndicesToSlotsDesc,
    KvWriteDesc,
    ModelDesc,
    SearchDesc,
    TopkDesc,
)
