"""One function or method per C function: descriptors in, out-parameters returned, errors raised."""

import ctypes
import json as _json
import os
import threading
from ctypes import POINTER, byref, c_char_p, c_double, c_int64, c_size_t
from types import SimpleNamespace
from typing import Any, Callable, Dict, Optional, Sequence, Union

import numpy as np

from . import _abi
from ._library import check, failure, lib
from ._tensor import Borrow, Tensor, view
from .constants import BACKEND_CPU, ERR_BUFFER_TOO_SMALL, FORM_LOGICAL
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
    text,
    typed,
)

Stream = Optional[int]


def version() -> int:
    """ABI version of the library."""
    return lib().idxc_version()


def status_name(status: int) -> str:
    """Short name of a status, such as ``"IDXC_ERR_STALE"``."""
    return lib().idxc_status_name(status).decode()


def last_error() -> str:
    """Text of the last error on this thread."""
    return lib().idxc_last_error().decode()


_log: Any = None  # The library holds its address.


def set_log_callback(callback: Optional[Callable[[int, str], None]]) -> None:
    """Sends log lines (``LOG_…`` level, text) to ``callback``, from any thread; ``None``: to nobody."""
    global _log
    new = _abi.LogCallback() if callback is None else _abi.LogCallback(lambda level, text, _: callback(level, text.decode()))
    check(lib().idxc_set_log_callback(new, None))
    _log = new


class _Handle:
    """A C handle. Freed with the last reference, views of its memory among them."""

    def __init__(self, struct: Any, create: Callable[[Any], int], destroy: Callable[[Any], None]):
        self._as_parameter_: Any = None
        self.keep: Any = None  # What has to live as long.
        handle: Any = POINTER(struct)()
        check(create(byref(handle)))
        self._as_parameter_, self._destroy = handle, destroy

    def __del__(self) -> None:
        if self._as_parameter_ is not None:
            self._destroy(self._as_parameter_)


class _Owner:
    """What owns a handle. After ``destroy`` the library refuses the object: its handle is NULL."""

    _handle: Optional[_Handle]

    def destroy(self) -> None:
        """Gives the handle up. Garbage collection does so too."""
        self._handle = None


def _desc(value: Any, kind: type, borrow: Borrow) -> Any:
    return typed(value, kind, "desc")._c(borrow)


def _size(query: Callable[[Any], int]) -> int:
    size = c_size_t()
    check(query(byref(size)))
    return size.value


def _out_text(call: Callable[[Any, int, Any], int]) -> str:
    """Text of a call that takes buffer, capacity and size."""
    n = _size(lambda size: call(None, 0, size))
    buffer = ctypes.create_string_buffer(n)
    _size(lambda size: call(buffer, n, size))
    return buffer.value.decode()


def _info(struct: Any, get: Callable[[Any], int]) -> SimpleNamespace:
    """An info struct as a plain object."""
    c = struct(struct_size=ctypes.sizeof(struct))
    check(get(byref(c)))
    values = {name: getattr(c, name) for name, _ in struct._fields_ if name not in ("struct_size", "flags", "reserved")}
    return SimpleNamespace(**{n: v.decode() if isinstance(v, bytes) else v for n, v in values.items()})


def _with_workspace(
    workspace: Optional[Tensor],
    on_host: bool,
    run: Callable[[Optional[int], int], int],
    query: Callable[[Any], int],
    borrow: Borrow,
) -> None:
    """Runs with the caller's workspace or, on the host, with one made to measure."""
    if workspace is not None:
        check(run(*borrow.memory("workspace", workspace)))
        return
    status = run(None, 0)
    if status == ERR_BUFFER_TOO_SMALL and on_host:
        scratch = np.empty(_size(query), np.uint8)
        status = run(scratch.ctypes.data, scratch.nbytes)
    check(status)


class Context(_Owner):
    """One backend on one device. May be used from any number of threads at once."""

    def __init__(self, desc: Optional[ContextDesc] = None):
        borrow, api = Borrow(), lib()
        c = None if desc is None else byref(_desc(desc, ContextDesc, borrow))
        self._handle = _Handle(_abi.Context, lambda out: api.idxc_context_create(c, out), api.idxc_context_destroy)
        self._on_host = self.get_info().backend == BACKEND_CPU

    def __deepcopy__(self, memo: Any) -> "Context":
        """Itself: copies of what uses a context share it."""
        return self

    def get_info(self) -> SimpleNamespace:
        """``backend, device_id, threads, isa``."""
        return _info(_abi.ContextInfo, lambda out: lib().idxc_context_get_info(self._handle, out))


class Plan(_Owner):
    """A resolved pattern with everything that follows from it. Immutable; may be used from any number of threads."""

    def __init__(self) -> None:
        raise TypeError("Plan: make one with Plan.from_pattern, from_indexer_types, from_freq, … or slice")

    @classmethod
    def _make(cls, create: Callable[[Any], int]) -> "Plan":
        self = cls.__new__(cls)
        self._handle = _Handle(_abi.Plan, create, lib().idxc_plan_destroy)
        return self

    @classmethod
    def from_pattern(cls, model: ModelDesc, pattern: str) -> "Plan":
        """From ``index_topk_pattern``: one ``F``, ``S`` or ``-`` a decoder layer."""
        m, letters = _desc(model, ModelDesc, Borrow()), text(pattern, "pattern")
        return cls._make(lambda out: lib().idxc_plan_from_pattern(byref(m), letters, out))

    @classmethod
    def from_indexer_types(cls, model: ModelDesc, types: Sequence[str]) -> "Plan":
        """From ``indexer_types``: ``"full"`` or ``"shared"``, one a decoder layer."""
        m, n = _desc(model, ModelDesc, Borrow()), len(types)
        c = (c_char_p * n)(*(text(t, "types") for t in types))
        return cls._make(lambda out: lib().idxc_plan_from_indexer_types(byref(m), c, n, out))

    @classmethod
    def from_freq(cls, model: ModelDesc, dialect: int, freq: int, offset: Optional[int] = None) -> "Plan":
        """From ``index_topk_freq`` and ``index_skip_topk_offset`` under a ``DIALECT_…`` rule."""
        m = _desc(model, ModelDesc, Borrow())
        o = None if offset is None else byref(_abi.Int64.from_param(offset))
        return cls._make(lambda out: lib().idxc_plan_from_freq(byref(m), dialect, freq, o, out))

    @classmethod
    def from_source_layers(cls, model: ModelDesc, layers: Sequence[int]) -> "Plan":
        """From the list of its Full layers, ascending."""
        m, n = _desc(model, ModelDesc, Borrow()), len(layers)
        c = (c_int64 * n)(*(_abi.Int64.from_param(layer) for layer in layers))
        return cls._make(lambda out: lib().idxc_plan_from_source_layers(byref(m), c, n, out))

    @classmethod
    def from_hf_config(cls, json: Union[str, bytes]) -> "Plan":
        """From the text of a Hugging Face ``config.json``."""
        data = json.encode() if isinstance(json, str) else typed(json, bytes, "json")
        return cls._make(lambda out: lib().idxc_plan_from_hf_config(data, len(data), out))

    def slice(self, first: int, end: int, flags: int = 0) -> "Plan":
        """The plan of a pipeline stage: layers ``first … end - 1``. ``flags``: ``FLAG_PROMOTE`` or 0."""
        return self._make(lambda out: lib().idxc_plan_slice(self._handle, first, end, flags, out))

    def get_info(self) -> SimpleNamespace:
        """The fields of ``idxc_plan_info``: ``fingerprint, full_layers, shared_layers, topk, index_k_slots, …``."""
        return _info(_abi.PlanInfo, lambda out: lib().idxc_plan_get_info(self._handle, out))

    def layer_role(self, layer: int) -> int:
        """``ROLE_…``."""
        role = lib().idxc_plan_layer_role(self._handle, layer)
        if role < 0:
            raise failure()
        return role

    def layer_get_info(self, layer: int) -> SimpleNamespace:
        """``role, source_layer, index_k_slot, index_k_owner, block, key_pool``."""
        return _info(_abi.LayerInfo, lambda out: lib().idxc_plan_layer_get_info(self._handle, layer, out))

    def export(self, format: int, dialect: int = 0) -> str:
        """The plan as ``EXPORT_…`` text; ``dialect`` (``DIALECT_…``) counts for ``EXPORT_FREQ`` only."""
        api = lib()
        return _out_text(lambda *out: api.idxc_plan_export(self._handle, format, dialect, *out))


class Cache(_Owner):
    """Index-cache buffers and state of all lanes. Calls from several threads take turns."""

    def __init__(self, context: Context, plan: Plan, desc: CacheDesc):
        borrow, api = Borrow(), lib()
        context, plan = typed(context, Context, "context"), typed(plan, Plan, "plan")
        c = _desc(desc, CacheDesc, borrow)
        self._handle = _Handle(
            _abi.Cache,
            lambda out: api.idxc_cache_create(context._handle, plan._handle, byref(c), out),
            api.idxc_cache_destroy,
        )
        self._handle.keep = borrow  # desc.buffer among them.
        self._on_host = context._on_host
        self._lock = threading.Lock()

    @staticmethod
    def size(plan: Plan, desc: CacheDesc) -> int:
        """Bytes that a cache of this size holds."""
        c = _desc(desc, CacheDesc, Borrow())
        plan = typed(plan, Plan, "plan")
        return _size(lambda out: lib().idxc_cache_size(plan._handle, byref(c), out))

    def step_begin(self, lane: int, rows: int, step_id: int) -> None:
        """Begins a forward pass of ``rows`` rows; whatever the lane held is stale from here on."""
        with self._lock:
            check(lib().idxc_step_begin(self._handle, lane, rows, step_id))

    def step_carry(self, lane: int, from_: Tensor, step_id: int, stream: Stream = None) -> None:
        """Begins the next draft iteration; row ``i`` keeps what row ``from_[i]`` selected (int32 ``[rows]``)."""
        borrow = Borrow()
        with self._lock:
            check(lib().idxc_step_carry(self._handle, lane, borrow("from", from_), step_id, stream))

    def select_workspace(self, desc: IndexerDesc) -> int:
        """Bytes of workspace that ``select`` needs."""
        borrow = Borrow()
        c = _desc(desc, IndexerDesc, borrow)
        with self._lock:
            return _size(lambda out: lib().idxc_select_workspace(self._handle, byref(c), out))

    def select(
        self,
        lane: int,
        layer: int,
        desc: Optional[IndexerDesc],
        workspace: Optional[Tensor] = None,
        stream: Stream = None,
    ) -> None:
        """The indexer's step of one layer. Full: writes the lane's indices. Shared: checks that they are there;
        ``desc`` may be None. ``workspace``: uint8 ``[bytes]``; None: made for the call (host memory only)."""
        borrow, api = Borrow(), lib()
        c = None if desc is None else byref(_desc(desc, IndexerDesc, borrow))
        with self._lock:
            _with_workspace(
                workspace,
                self._on_host,
                lambda ws, size: api.idxc_select(self._handle, lane, layer, c, ws, size, stream),
                lambda out: api.idxc_select_workspace(self._handle, c, out),
                borrow,
            )

    def slot(self, lane: int) -> Any:
        """The lane's buffer for this step, int32 ``[rows, topk]``, to write before ``publish``. Not a copy: a numpy
        array, or on a device an object with ``__cuda_array_interface__``, which ``torch.as_tensor`` takes."""
        with self._lock:
            return self._view(lambda cache, out: lib().idxc_slot(cache, lane, out), read_only=False)

    def publish(
        self,
        lane: int,
        layer: int,
        indices: Optional[Tensor],
        form: int = FORM_LOGICAL,
        table_id: int = 0,
        stream: Stream = None,
    ) -> None:
        """Puts int32 ``[rows, topk]`` indices in place of a ``select``; None: they were written to ``slot``."""
        borrow = Borrow()
        with self._lock:
            check(lib().idxc_publish(self._handle, lane, layer, borrow("indices", indices), form, table_id, stream))

    def indices(self, lane: int, layer: int) -> Any:
        """The indices that ``layer`` uses, int32 ``[rows, topk]``: a view as of ``slot``, not to be written. The
        lane's next Full layer overwrites it."""
        with self._lock:
            return self._view(lambda cache, out: lib().idxc_indices(cache, lane, layer, out), read_only=True)

    def export(self, lane: int, layer: int, out: Tensor, stream: Stream = None) -> None:
        """Copies the indices that ``layer`` uses to int32 ``[rows, topk]``."""
        borrow = Borrow()
        with self._lock:
            check(lib().idxc_export(self._handle, lane, layer, borrow("out", out, written=True), stream))

    def lane_get_info(self, lane: int) -> SimpleNamespace:
        """``step_id, table_id, rows, source_layer, form``."""
        with self._lock:
            return _info(_abi.LaneInfo, lambda out: lib().idxc_lane_get_info(self._handle, lane, out))

    def attend_workspace(self, desc: AttentionDesc) -> int:
        """Bytes of workspace that ``attend`` needs."""
        borrow = Borrow()
        c = _desc(desc, AttentionDesc, borrow)
        with self._lock:
            return _size(lambda out: lib().idxc_attend_workspace(self._handle, byref(c), out))

    def attend(
        self,
        lane: int,
        layer: int,
        desc: AttentionDesc,
        workspace: Optional[Tensor] = None,
        stream: Stream = None,
    ) -> None:
        """Sparse MLA attention of one layer over the indices it uses. ``workspace``: as for ``select``."""
        borrow, api = Borrow(), lib()
        c = byref(_desc(desc, AttentionDesc, borrow))
        with self._lock:
            _with_workspace(
                workspace,
                self._on_host,
                lambda ws, size: api.idxc_attend(self._handle, lane, layer, c, ws, size, stream),
                lambda out: api.idxc_attend_workspace(self._handle, c, out),
                borrow,
            )

    def _view(self, get: Callable[[Any, Any], int], read_only: bool) -> Any:
        handle, t = self._handle, _abi.Tensor()
        check(get(handle, byref(t)))
        return view(t, handle, read_only)


class Search(_Owner):
    """A search for the layers that keep their indexer, and its journal. Calls from several threads take turns.

    ::

        search = ix.Search.resume(desc, path) if os.path.exists(path) else ix.Search(desc)
        search.save(path)
        while (candidate := search.next()) is not None:
            search.report(candidate.pattern, mean_loss(candidate.pattern))
        quarter = search.result()["patterns"]["1/4"]["pattern"]
    """

    def __init__(self, desc: SearchDesc):
        self._begin(desc, lambda c, out: lib().idxc_search_create(c, out))

    @classmethod
    def resume(cls, desc: SearchDesc, path: Union[str, "os.PathLike[str]"]) -> "Search":
        """Goes on with the search whose journal ``path`` is. ``desc`` must be what it began with."""
        self, place = cls.__new__(cls), text(os.fspath(path), "path")
        self._begin(desc, lambda c, out: lib().idxc_search_resume(c, place, out))
        return self

    def _begin(self, desc: SearchDesc, create: Callable[[Any, Any], int]) -> None:
        c = _desc(desc, SearchDesc, Borrow())
        self._handle = _Handle(_abi.Search, lambda out: create(byref(c), out), lib().idxc_search_destroy)
        self._lock = threading.Lock()

    def next(self) -> Optional[SimpleNamespace]:
        """What to measure: ``pattern, base, first_changed_layer, evaluations, expected``; the same until its loss is
        reported. None when the search is complete."""
        with self._lock:
            candidate = _info(_abi.SearchCandidate, lambda out: lib().idxc_search_next(self._handle, out))
        return candidate if candidate.pattern is not None else None

    def report(self, pattern: str, loss: float) -> None:
        """Takes the loss of the pattern that ``next`` gave: its mean over all calibration rows. On the disk when this
        returns, if there is a journal."""
        letters, value = text(pattern, "pattern"), c_double(loss)
        with self._lock:
            check(lib().idxc_search_report(self._handle, letters, value))

    def save(self, path: Union[str, "os.PathLike[str]"]) -> None:
        """Makes the new file ``path`` the search's journal; does nothing if it is that already."""
        place = text(os.fspath(path), "path")
        with self._lock:
            check(lib().idxc_search_save(self._handle, place))

    def result(self) -> Dict[str, Any]:
        """What the search has found so far."""
        with self._lock:
            return _json.loads(_out_text(lambda *out: lib().idxc_search_result(self._handle, *out)))


def _context(context: Context) -> Optional[_Handle]:
    return typed(context, Context, "context")._handle


def _op(function: str, context: Context, kind: type, desc: Any, stream: Stream, **written: Tensor) -> None:
    borrow = Borrow()
    c = _desc(desc, kind, borrow)
    tensors = [borrow(name, value, written=True) for name, value in written.items()]
    check(getattr(lib(), function)(_context(context), byref(c), *tensors, stream))


def index_k_write(context: Context, desc: IndexKWriteDesc, stream: Stream = None) -> None:
    """Quantises new indexer keys and writes them to their pages."""
    _op("idxc_index_k_write", context, IndexKWriteDesc, desc, stream)


def index_q_quantize(context: Context, desc: IndexQQuantizeDesc, stream: Stream = None) -> None:
    """Quantises indexer queries to e4m3 and folds the scales into the head weights."""
    _op("idxc_index_q_quantize", context, IndexQQuantizeDesc, desc, stream)


def indexer_logits(context: Context, desc: IndexerDesc, logits: Tensor, stream: Stream = None) -> None:
    """Lightning-indexer scores over contiguous keys, to float32 ``[rows, columns]``; -inf past a row's end."""
    _op("idxc_indexer_logits", context, IndexerDesc, desc, stream, logits=logits)


def paged_indexer_logits(context: Context, desc: IndexerDesc, logits: Tensor, stream: Stream = None) -> None:
    """As ``indexer_logits``, over paged keys."""
    _op("idxc_paged_indexer_logits", context, IndexerDesc, desc, stream, logits=logits)


def topk_workspace(context: Context, desc: TopkDesc) -> int:
    """Bytes of workspace that ``topk`` needs."""
    borrow, handle = Borrow(), _context(context)
    c = _desc(desc, TopkDesc, borrow)
    return _size(lambda out: lib().idxc_topk_workspace(handle, byref(c), out))


def topk(context: Context, desc: TopkDesc, workspace: Optional[Tensor] = None, stream: Stream = None) -> None:
    """The k best columns of each row: exact, ties to the lowest column, ascending, then -1. ``workspace``: as for
    ``Cache.select``."""
    borrow, api, handle = Borrow(), lib(), _context(context)
    c = byref(_desc(desc, TopkDesc, borrow))
    _with_workspace(
        workspace,
        context._on_host,
        lambda ws, size: api.idxc_topk(handle, c, ws, size, stream),
        lambda out: api.idxc_topk_workspace(handle, c, out),
        borrow,
    )


def indices_to_slots(context: Context, desc: IndicesToSlotsDesc, stream: Stream = None) -> None:
    """Translates logical indices to slots; -1 stays -1."""
    _op("idxc_indices_to_slots", context, IndicesToSlotsDesc, desc, stream)


def kv_write(context: Context, desc: KvWriteDesc, stream: Stream = None) -> None:
    """Writes new KV rows to their pages, quantising them for the 656-byte layout."""
    _op("idxc_kv_write", context, KvWriteDesc, desc, stream)


def sparse_attention_workspace(
    context: Context, desc: AttentionDesc, indices: Tensor, form: int = FORM_LOGICAL
) -> int:
    """Bytes of workspace that ``sparse_attention`` needs."""
    borrow, handle = Borrow(), _context(context)
    c, i = _desc(desc, AttentionDesc, borrow), borrow("indices", indices)
    return _size(lambda out: lib().idxc_sparse_attention_workspace(handle, byref(c), i, form, out))


def sparse_attention(
    context: Context,
    desc: AttentionDesc,
    indices: Tensor,
    form: int = FORM_LOGICAL,
    workspace: Optional[Tensor] = None,
    stream: Stream = None,
) -> None:
    """Sparse MLA attention over the KV rows that int32 ``[rows, topk]`` indices name. ``workspace``: as for
    ``Cache.select``."""
    borrow, api, handle = Borrow(), lib(), _context(context)
    c, i = byref(_desc(desc, AttentionDesc, borrow)), borrow("indices", indices)
    _with_workspace(
        workspace,
        context._on_host,
        lambda ws, size: api.idxc_sparse_attention(handle, c, i, form, ws, size, stream),
        lambda out: api.idxc_sparse_attention_workspace(handle, c, i, form, out),
        borrow,
    )


def indices_overlap(context: Context, a: Tensor, b: Tensor, overlap: Tensor, stream: Stream = None) -> None:
    """How much of each row of ``a`` is also in ``b`` (int32 ``[rows, k]``), to float32 ``[rows]``."""
    borrow = Borrow()
    args = borrow("a", a), borrow("b", b), borrow("overlap", overlap, written=True)
    check(lib().idxc_indices_overlap(_context(context), *args, stream))


def distill_workspace(context: Context, desc: DistillDesc) -> int:
    """Bytes of workspace that ``distill`` needs."""
    borrow, handle = Borrow(), _context(context)
    c = _desc(desc, DistillDesc, borrow)
    return _size(lambda out: lib().idxc_distill_workspace(handle, byref(c), out))


def distill(context: Context, desc: DistillDesc, workspace: Optional[Tensor] = None, stream: Stream = None) -> None:
    """Adds one served layer's part of the multi-layer distillation loss of a Full layer's indexer, and its gradients.
    ``workspace``: as for ``Cache.select``. With autograd: ``indexcache.distillation``."""
    borrow, api, handle = Borrow(), lib(), _context(context)
    c = byref(_desc(desc, DistillDesc, borrow))
    _with_workspace(
        workspace,
        context._on_host,
        lambda ws, size: api.idxc_distill(handle, c, ws, size, stream),
        lambda out: api.idxc_distill_workspace(handle, c, out),
        borrow,
    )
