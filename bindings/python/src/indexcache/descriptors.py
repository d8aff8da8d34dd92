"""The C descriptors as Python classes: what goes into a call. Fields that are left out mean the default."""

import ctypes
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, FrozenSet, List, Optional, Sequence, Tuple, Type

from . import _abi
from ._tensor import Borrow, Tensor
from .constants import BACKEND_AUTO, SEARCH_GREEDY

# The elements of lists of numbers, by the C type of their field. A count follows in the C struct.
_ELEMENTS = {ctypes.POINTER(t): t for t in (ctypes.c_int32, ctypes.c_int64)}


def typed(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def text(value: str, name: str) -> bytes:
    data = typed(value, str, name).encode()
    if b"\0" in data:
        raise ValueError(f"{name}: expected text without NUL")
    return data


@dataclass
class _Desc:
    _written: ClassVar[FrozenSet[str]] = frozenset()

    def _c(self, borrow: Borrow) -> ctypes.Structure:
        """The C struct; tensors are borrowed as long as ``borrow`` lives."""
        struct, types = _struct(type(self))
        c = struct(struct_size=ctypes.sizeof(struct))
        for name, ctype in types:
            value = getattr(self, name)
            if ctype is _abi.T:
                value = borrow(name, value, name in self._written)
            elif ctype is ctypes.c_char_p:
                value = text(value, name)
            elif ctype in _ELEMENTS:
                element = _ELEMENTS[ctype]
                value = (element * len(value))(*(_abi.CHECKED[element].from_param(v) for v in value))
                setattr(c, name + "_count", len(value))
            elif ctype is not ctypes.c_float:
                value = _abi.CHECKED[ctype].from_param(value)
            setattr(c, name, value)
        return c


@lru_cache(maxsize=None)
def _struct(kind: Type[_Desc]) -> Tuple[Any, List[Tuple[str, Any]]]:
    """The C struct of a descriptor class, and the C type of each field. Asked once a class: calls are on the hot path."""
    struct = getattr(_abi, kind.__name__)
    types = dict(struct._fields_)
    return struct, [(f.name, types[f.name]) for f in fields(kind)]


@dataclass
class ContextDesc(_Desc):
    """How to open a context."""

    #: One of ``BACKEND_…``.
    backend: int = BACKEND_AUTO
    #: CUDA: ordinal of the device.
    device_id: int = 0
    #: CPU: worker threads, 0 for all cores.
    threads: int = 0
    #: ``CHECKED``: CUDA calls wait for their stream and refuse indices that are out of range, as CPU calls do anyway.
    flags: int = 0


@dataclass
class ModelDesc(_Desc):
    """What a plan needs to know of the model besides the pattern."""

    #: Decoder layers, draft layers not counted.
    layers: int
    #: Tokens that an indexer selects for a row, 1 to 4096.
    topk: int
    #: Draft (MTP) layers; their ids follow the decoder layers'.
    mtp_layers: int = 0
    #: Dimension of index K; 0 means 128.
    index_head_dim: int = 0
    #: ``FLAG_MTP_SHARES``, ``FLAG_INDEX_K_BF16``.
    flags: int = 0


@dataclass
class CacheDesc(_Desc):
    """Size and memory of a cache."""

    #: Largest number of rows a step, padding rows included.
    max_rows: int
    #: Independent copies: one a micro-batch, and one for a draft model. 0 means 1.
    lanes: int = 0
    #: int32 ``[lanes, max_rows, topk]`` to use instead of memory of the library's own.
    buffer: Optional[Tensor] = None
    flags: int = 0
    _written = frozenset({"buffer"})


@dataclass
class IndexerDesc(_Desc):
    """What to score with the lightning indexer. Keys are contiguous or, with ``block_table``, paged."""

    #: e4m3 or bfloat16 ``[rows, heads, dim]``.
    q: Tensor
    #: float32 ``[rows, heads]``, every scale of the query side folded in.
    weights: Tensor
    #: Contiguous: e4m3 or bfloat16 ``[keys, dim]``. Paged: uint8 pages of 64 tokens, ``64 * (dim + 4)`` bytes each, or
    #: bfloat16 ``[pages, 64, dim]``.
    k: Tensor
    #: int32 ``[rows]``: one past the last key that the row sees.
    row_end: Tensor
    #: float32 ``[keys]``: scales of contiguous e4m3 keys.
    k_scale: Optional[Tensor] = None
    #: int32 ``[requests, max_pages]``.
    block_table: Optional[Tensor] = None
    #: int32 ``[rows]``, paged: the request of each row, -1 for a padding row. None: split evenly.
    row_request: Optional[Tensor] = None
    #: int32 ``[rows]``, contiguous: first key that the row sees; indices count from it. None: 0.
    row_start: Optional[Tensor] = None
    flags: int = 0


@dataclass
class AttentionDesc(_Desc):
    """Sparse MLA attention, less the indices."""

    #: bfloat16 or float32 ``[rows, heads, d_qk]``.
    q: Tensor
    #: bfloat16 or float32 ``[tokens, d_qk]``, or uint8 ``[tokens, 656]``; paged: with ``[pages, page_size]`` in front.
    kv: Tensor
    #: bfloat16 or float32 ``[rows, heads, d_v]``, written.
    out: Tensor
    #: Multiplies ``q·k``.
    softmax_scale: float
    #: int32 ``[requests, max_pages]``: translates logical indices of paged KV.
    block_table: Optional[Tensor] = None
    #: int32 ``[rows]``: the request of each row, -1 for a padding row. None: split evenly.
    row_request: Optional[Tensor] = None
    #: int32 ``[rows]``, contiguous KV with logical indices: the KV row of position 0. None: 0.
    row_start: Optional[Tensor] = None
    #: int32 ``[rows]``: only the first ``row_topk[r]`` indices count. None: all.
    row_topk: Optional[Tensor] = None
    #: float32 ``[heads]``: attention sink.
    sink: Optional[Tensor] = None
    #: float32 ``[rows, heads]``, written: natural-log sum of exponentials, the sink not counted.
    lse: Optional[Tensor] = None
    #: float32 ``[rows, topk]``, written: what a row attends to, summed over heads and divided by its sum, the sink not
    #: counted: a ``target`` for ``distill``. Needs ``lse``.
    probs: Optional[Tensor] = None
    #: Number of the block table that slot-form indices must have been published under; 0: not tracked.
    table_id: int = 0
    flags: int = 0
    _written = frozenset({"out", "lse", "probs"})


@dataclass
class IndexKWriteDesc(_Desc):
    """New indexer keys and where they go."""

    #: bfloat16 or float32 ``[tokens, dim]``.
    k: Tensor
    #: int32 or int64 ``[tokens]``: ``page * 64 + offset``; -1 skips the token.
    slots: Tensor
    #: Written: pages as in ``IndexerDesc.k``.
    pages: Tensor
    #: ``FLAG_HADAMARD``, ``FLAG_POW2_SCALE``.
    flags: int = 0
    _written = frozenset({"pages"})


@dataclass
class IndexQQuantizeDesc(_Desc):
    """Indexer queries to quantise."""

    #: bfloat16 or float32 ``[rows, heads, dim]``.
    q: Tensor
    #: float32 ``[rows, heads]``: head weights as the model gives them.
    weights: Tensor
    #: e4m3 ``[rows, heads, dim]``, written.
    q_out: Tensor
    #: float32 ``[rows, heads]``, written: ``weights * scale * q_scale``. May be ``weights`` itself.
    weights_out: Tensor
    #: Folded into the weights; 0 means ``dim^-0.5 * heads^-0.5``.
    scale: float = 0.0
    #: ``FLAG_HADAMARD``, ``FLAG_POW2_SCALE``.
    flags: int = 0
    _written = frozenset({"q_out", "weights_out"})


@dataclass
class TopkDesc(_Desc):
    """Scores to choose from."""

    #: float32 or bfloat16 ``[rows, columns]``.
    logits: Tensor
    #: int32 ``[rows, k]``, written; k from 1 to 4096.
    indices: Tensor
    #: int32 ``[rows]``: first column that counts; indices count from it. None: 0.
    row_start: Optional[Tensor] = None
    #: int32 ``[rows]``: one past the last column that counts. None: all.
    row_end: Optional[Tensor] = None
    flags: int = 0
    _written = frozenset({"indices"})


@dataclass
class IndicesToSlotsDesc(_Desc):
    """Logical indices and the block table to translate them with."""

    #: int32 ``[rows, k]``, logical positions.
    indices: Tensor
    #: int32 ``[rows, k]``, written. May be ``indices`` itself.
    slots: Tensor
    #: int32 ``[requests, max_pages]``. None: contiguous.
    block_table: Optional[Tensor] = None
    #: int32 ``[rows]``: the request of each row, -1 for a padding row. None: split evenly.
    row_request: Optional[Tensor] = None
    #: int32 ``[rows]``, contiguous only. None: 0.
    row_start: Optional[Tensor] = None
    #: Tokens a page; 0 without ``block_table``.
    page_size: int = 0
    flags: int = 0
    _written = frozenset({"slots"})


@dataclass
class KvWriteDesc(_Desc):
    """New KV rows and where they go."""

    #: bfloat16 or float32 ``[tokens, d_qk]``: latent, then rope part.
    kv: Tensor
    #: int32 or int64 ``[tokens]``: ``page * page_size + offset``; -1 skips the token.
    slots: Tensor
    #: Written: uint8 ``[pages, page_size, 656]``, or bfloat16 or float32 ``[pages, page_size, d_qk]``.
    pages: Tensor
    flags: int = 0
    _written = frozenset({"pages"})


@dataclass
class DistillDesc(_Desc):
    """What teaches a Full layer's indexer the attention of one layer that it serves: ``target``, or ``attention_q``,
    ``kv`` and ``lse``. All that is written is added to."""

    #: bfloat16 or float32 ``[rows, heads, dim]``: the indexer's queries.
    q: Tensor
    #: bfloat16 or float32 ``[keys, dim]``: its keys.
    k: Tensor
    #: float32 ``[rows, heads]``: its head weights, every scale folded in.
    weights: Tensor
    #: float32 ``[1]``, added to.
    loss: Tensor
    #: float32 of the shapes of ``q``, ``k`` and ``weights``, added to. None: not wanted.
    grad_q: Optional[Tensor] = None
    grad_k: Optional[Tensor] = None
    grad_weights: Optional[Tensor] = None
    #: int32 ``[rows]``: first key that the row sees. None: 0.
    row_start: Optional[Tensor] = None
    #: int32 ``[rows]``: one past the last key that the row sees. None: all keys.
    row_end: Optional[Tensor] = None
    #: int32 ``[rows, topk]``: the loss restricted to these positions; -1 is skipped. None: over all that a row sees.
    indices: Optional[Tensor] = None
    #: float32 ``[rows, columns]``, or ``[rows, topk]`` beside ``indices``; normalised inside.
    target: Optional[Tensor] = None
    #: bfloat16 or float32 ``[rows, attention_heads, d_qk]``: the served layer's queries.
    attention_q: Optional[Tensor] = None
    #: bfloat16 or float32 ``[keys, d_qk]``: its KV rows.
    kv: Optional[Tensor] = None
    #: float32 ``[rows, attention_heads]``: natural-log sum of exponentials of its scaled scores.
    lse: Optional[Tensor] = None
    #: Multiplies ``attention_q·kv``.
    softmax_scale: float = 0.0
    #: The served layer's share of the loss: ``1 / (m + 1)``.
    layer_weight: float = 1.0
    flags: int = 0
    _written = frozenset({"loss", "grad_q", "grad_k", "grad_weights"})


@dataclass
class SearchDesc(_Desc):
    """What to search, for which model, on which calibration set. Layers are those that have an indexer."""

    #: Layers of a pattern.
    layers: int
    #: Tokens that an indexer selects for a row.
    topk: int
    #: The host's name for exactly this model, such as a hash of its weights.
    model: str
    #: The host's name for exactly the calibration rows, such as a hash of their tokens.
    calibration: str
    #: Tokens of each calibration row, all more than ``topk``.
    row_lengths: Sequence[int]
    #: Layers that stay Full, ascending. Layer 0 and the first layer of each stage always do.
    pinned: Sequence[int] = ()
    #: First layer of each pipeline stage, ascending.
    stages: Sequence[int] = ()
    #: ``SEARCH_GREEDY``, or ``SEARCH_LAZY`` with ``few`` flips a step.
    method: int = SEARCH_GREEDY
    few: int = 0
    #: Full layers to stop at; 0: when only pinned layers are Full.
    target_full_layers: int = 0
    #: Full layers of the pattern to refine by exchanges after the last step; 0: none.
    swap_full_layers: int = 0
    flags: int = 0
