"""What is the binding's own: the library's place, handles, tensors without a copy, errors, threads."""

import ctypes
import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import indexcache as ix

try:
    import torch
except ImportError:
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="torch is not importable")

PACKAGE = Path(ix.__file__).resolve().parent


def overlap(context, a, b, out):
    ix.indices_overlap(context, a, b, out)
    return out


@pytest.fixture
def abo():
    return np.array([[0, 2, -1]], np.int32), np.array([[2, 3, 4]], np.int32), np.zeros(1, np.float32)


# The library


def python(code, **env):
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **env}
    r = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return r.returncode, r.stdout.decode().strip()


def test_finding_the_library(tmp_path):
    here = os.environ["INDEXCACHE_LIBRARY"]
    assert python(f"import indexcache as i; i.load({here!r}); print(i.version())", INDEXCACHE_LIBRARY="/nowhere") == (
        0,
        "1",
    )
    rc, text = python("import indexcache as i; i.version()", INDEXCACHE_LIBRARY="/nowhere")
    assert rc == 1 and "INDEXCACHE_LIBRARY names '/nowhere', which is not a file" in text
    rc, text = python("import indexcache as i; i.version()", INDEXCACHE_LIBRARY=__file__)
    assert rc == 1 and "is not the indexcache library" in text
    if not any(PACKAGE.glob("libindexcache.so*")):
        rc, text = python("import indexcache as i; i.version()", INDEXCACHE_LIBRARY="")
        assert rc == 1 and "no shared library: call indexcache.load(path), set INDEXCACHE_LIBRARY" in text
    package = tmp_path / "indexcache"
    package.mkdir()
    for f in PACKAGE.glob("*.py"):
        (package / f.name).symlink_to(f)
    # Its real place is what counts, so copy the file that looks.
    (package / "_library.py").unlink()
    (package / "_library.py").write_bytes((PACKAGE / "_library.py").read_bytes())
    (package / "libindexcache.so").symlink_to(here)
    code = "import indexcache as i; print(i.version())"
    assert python(code, INDEXCACHE_LIBRARY="", PYTHONPATH=str(tmp_path)) == (0, "1")


def test_a_second_library_is_refused():
    ix.version()
    ix.load(os.environ["INDEXCACHE_LIBRARY"])
    with pytest.raises(RuntimeError, match="already loaded"):
        ix.load("/another.so")


def test_status_names():
    assert ix.version() == ix.ABI_VERSION
    assert [ix.status_name(s) for s in (ix.OK, ix.ERR_STALE)] == ["IDXC_OK", "IDXC_ERR_STALE"]
    assert ix.status_name(-5) == "unknown status"


def test_log_callback():
    lines = []
    ix.set_log_callback(lambda level, text: lines.append((level, text)))
    ix.Plan.from_pattern(ix.ModelDesc(layers=4, topk=8), "FSFS").slice(1, 4, ix.FLAG_PROMOTE)
    ix.set_log_callback(None)
    ix.Plan.from_pattern(ix.ModelDesc(layers=4, topk=8), "FSFS").slice(1, 4, ix.FLAG_PROMOTE)
    assert lines == [(ix.LOG_WARNING, "stage 1..4: layer 1 was Shared and runs as Full")]


# Handles


def test_destroyed_handles_are_refused(abo):
    context = ix.Context(ix.ContextDesc(threads=1))
    plan = ix.Plan.from_pattern(ix.ModelDesc(layers=1, topk=3), "F")
    cache = ix.Cache(context, plan, ix.CacheDesc(max_rows=1))
    context.destroy()
    plan.destroy()
    cache.step_begin(0, 1, 1)  # The cache keeps what it needs.
    slot = cache.slot(0)
    cache.destroy()
    cache.destroy()
    slot[:] = 1  # And a view keeps the cache's memory.
    for call in (
        lambda: cache.step_begin(0, 1, 2),
        lambda: plan.get_info(),
        lambda: plan.layer_role(0),
        lambda: context.get_info(),
        lambda: overlap(context, *abo),
        lambda: ix.Cache(context, plan, ix.CacheDesc(max_rows=1)),
    ):
        with pytest.raises(ix.Error, match="expected a handle, got NULL"):
            call()


def test_objects_of_the_wrong_kind(context, abo):
    plan = ix.Plan.from_pattern(ix.ModelDesc(layers=1, topk=3), "F")
    for call in (
        lambda: ix.Cache(plan, context, ix.CacheDesc(max_rows=1)),
        lambda: ix.Cache(context, plan, ix.ModelDesc(layers=1, topk=3)),
        lambda: ix.Context(3),
        lambda: ix.topk(context, None),
        lambda: overlap(None, *abo),
        lambda: overlap(context, [[0, 1]], abo[1], abo[2]),
        lambda: overlap(context, "text", abo[1], abo[2]),
        lambda: overlap(context, np.array([["a"]]), abo[1], abo[2]),
        lambda: ix.as_dtype([1], "bfloat16"),
    ):
        with pytest.raises(TypeError):
            call()


def test_unusable_contexts():
    with pytest.raises(ix.Error, match="backend"):
        ix.Context(ix.ContextDesc(backend=99))
    with pytest.raises(ix.Error, match="threads"):
        ix.Context(ix.ContextDesc(threads=-1))
    with pytest.raises(OverflowError):
        ix.Context(ix.ContextDesc(threads=2**40))


# Tensors


def test_strided_arrays_are_taken_as_they_are(context, rng):
    big = rng.standard_normal((6, 3, 40)).astype(np.float32)
    x, whole = big[::2, 1, 5:35], np.full((3, 50), 7, np.int32)
    ix.topk(context, ix.TopkDesc(logits=x, indices=whole[:, 10:14]))
    assert (np.sort(np.argsort(-x, axis=1)[:, :4], axis=1) == whole[:, 10:14]).all()
    assert (whole[:, :10] == 7).all() and (whole[:, 14:] == 7).all()


def test_arrays_that_would_need_a_copy_are_refused(context, abo):
    a, b, out = abo
    odd = np.zeros(20, np.uint8)[: 4 * 4 + 2].view(np.dtype([("x", np.int32), ("y", np.uint8), ("z", np.uint8)]))["x"]
    read_only = out.copy()
    read_only.flags.writeable = False
    with pytest.raises(TypeError, match="a: expected native byte order"):
        overlap(context, a.astype(">i4"), b, out)
    with pytest.raises(ValueError, match="a: expected strides in whole elements"):
        overlap(context, odd.reshape(1, 3), b, out)
    with pytest.raises(ValueError, match="overlap: expected a writable array"):
        overlap(context, a, b, read_only)
    for bad, text in (
        (a.astype(np.int64), "int64"),
        (a.astype(np.float64), "known dtype"),
        (a.astype(np.complex64), "known dtype"),
        (a > 0, "known dtype"),
        (a[:, ::-1], "negative"),
        (np.asfortranarray(np.zeros((2, 3), np.int32)), "stride"),
        (a.reshape(1, 1, 1, 1, 1, 3), "5"),
        (a[0], "dimension"),
    ):
        with pytest.raises(ix.Error, match=text) as e:
            overlap(context, bad, b, out)
        assert e.value.status == ix.ERR_INVALID and e.value.text.startswith("idxc_indices_overlap: a: ")
    with pytest.raises(ix.Error, match="a tensor, got NULL"):
        overlap(context, None, b, out)


def test_as_dtype(context, rng):
    out = np.zeros((1, 2), np.int32)
    with pytest.raises(ValueError, match="bfloat16, float8_e4m3fn, got 'float16'"):
        ix.as_dtype(out, "float16")
    for array in (out, out.astype(np.float16), out.astype(np.uint8)):
        with pytest.raises(TypeError, match="logits: as_dtype expected 16-bit integers"):
            ix.topk(context, ix.TopkDesc(logits=ix.as_dtype(array, "bfloat16"), indices=out))


def test_dtypes_of_ml_dtypes(context):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x, out = np.arange(8).astype(ml_dtypes.bfloat16).reshape(1, 8), np.zeros((1, 2), np.int32)
    ix.topk(context, ix.TopkDesc(logits=x, indices=out))
    assert out.tolist() == [[6, 7]]


class Exporter:
    """A DLPack exporter of either age, over a numpy array; counts what it has lent."""

    lent = 0

    def __init__(self, array, versioned, flags=0, major=1):
        from indexcache import _abi
        from indexcache._tensor import Borrow, _Versioned

        self.array, self.versioned, borrow = array, versioned, Borrow()
        tensor = borrow("x", array).contents
        if versioned:
            managed = _Versioned(major, 0, None, None, flags, tensor)
        else:

            class Managed(ctypes.Structure):
                _fields_ = [("tensor", _abi.Tensor), ("manager_ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]

            managed = Managed(tensor, None, None)
        self.keep = borrow, managed

        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def destructor(_):
            self.lent -= 1

        self.destructor = destructor

    def __dlpack_device__(self):
        return (1, 0)

    def __dlpack__(self, **kw):
        if not self.versioned and kw:
            raise TypeError("no keyword arguments")
        self.lent += 1
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        self.name = b"dltensor_versioned" if self.versioned else b"dltensor"
        return new(ctypes.addressof(self.keep[1]), self.name, ctypes.cast(self.destructor, ctypes.c_void_p))


@pytest.mark.parametrize("versioned", [False, True])
def test_dlpack_is_borrowed_for_the_call(context, abo, versioned):
    a, b, out = (Exporter(x, versioned) for x in abo)
    overlap(context, a, b, out)
    assert abo[2][0] == 0.5
    with pytest.raises(ix.Error):
        overlap(context, a, b, a)
    gc.collect()
    assert (a.lent, b.lent, out.lent) == (0, 0, 0)


def test_a_buffer_is_borrowed_as_long_as_the_cache(context):
    buffer = Exporter(np.zeros((1, 2, 3), np.int32), True)
    plan = ix.Plan.from_pattern(ix.ModelDesc(layers=1, topk=3), "F")
    cache = ix.Cache(context, plan, ix.CacheDesc(max_rows=2, buffer=buffer))
    cache.step_begin(0, 2, 1)
    view = cache.slot(0)
    cache.destroy()
    assert buffer.lent == 1
    del view
    assert buffer.lent == 0


def test_dlpack_flags(context, abo):
    a, b, out = abo
    with pytest.raises(BufferError, match="a: expected the tensor's own memory"):
        overlap(context, Exporter(a, True, flags=2), b, out)
    with pytest.raises(ValueError, match="overlap: expected a writable tensor"):
        overlap(context, a, b, Exporter(out, True, flags=1))
    with pytest.raises(BufferError, match="DLPack 1, got 2"):
        overlap(context, Exporter(a, True, major=2), b, out)
    overlap(context, Exporter(a, True, flags=1), b, out)


@needs_torch
def test_torch_tensors(context):
    for dtype in (torch.float32, torch.bfloat16):
        x, out = torch.randn(5, 64).to(dtype), torch.zeros(5, 9, dtype=torch.int32)
        ix.topk(context, ix.TopkDesc(logits=x[:, 3:], indices=out))
        best = torch.sort(x[:, 3:], dim=1, descending=True, stable=True).indices[:, :9]
        assert torch.equal(out.long(), torch.sort(best, dim=1).values)
    q, q_out = torch.randn(2, 3, 64), torch.zeros(2, 3, 64, dtype=torch.float8_e4m3fn)
    w = torch.ones(2, 3)
    try:
        q_out.__dlpack__()
    except Exception:  # torch before it exported fp8.
        q_out = ix.as_dtype(q_out.view(torch.uint8), "float8_e4m3fn")
    ix.index_q_quantize(context, ix.IndexQQuantizeDesc(q=q, weights=w, q_out=q_out, weights_out=w, scale=1.0))
    codes = q_out.array.view(torch.float8_e4m3fn) if isinstance(q_out, tuple) else q_out
    assert torch.allclose(codes.float() * w[..., None], q, rtol=2**-4, atol=0.02)
    with pytest.raises(BufferError):  # Would lose the gradient.
        ix.topk(context, ix.TopkDesc(logits=torch.randn(5, 64, requires_grad=True), indices=torch.zeros(5, 9)))


# Workspaces


def test_workspaces(context, rng):
    plan = ix.Plan.from_pattern(ix.ModelDesc(layers=2, topk=4), "FS")
    cache = ix.Cache(context, plan, ix.CacheDesc(max_rows=2))
    k = np.zeros((100, 32), np.uint8)
    desc = ix.IndexerDesc(
        q=ix.as_dtype(np.zeros((2, 1, 32), np.uint8), "float8_e4m3fn"),
        weights=np.ones((2, 1), np.float32),
        k=ix.as_dtype(k, "float8_e4m3fn"),
        k_scale=np.ones(100, np.float32),
        row_end=np.array([100, 50], np.int32),
    )
    cache.step_begin(0, 2, 1)
    size = cache.select_workspace(desc)
    if size:
        with pytest.raises(ix.Error, match=str(size)) as e:
            cache.select(0, 0, desc, np.zeros(size - 1, np.uint8))
        assert e.value.status == ix.ERR_BUFFER_TOO_SMALL
    with pytest.raises(ValueError, match="workspace: expected one dimension without gaps"):
        cache.select(0, 0, desc, np.zeros(2 * size + 4, np.uint8)[::2])
    cache.select(0, 0, desc)
    assert cache.indices(0, 0).tolist() == [[0, 1, 2, 3]] * 2  # All scores are 0: ties go to the lowest position.


def test_slots_out_of_range_are_refused_before_anything_is_written(context, rng):
    pages = np.zeros((1, 64 * 36), np.uint8)
    k = rng.standard_normal((2, 32)).astype(np.float32)
    for slots in ([0, 64], [0, -2], [0, 2**31 - 1]):
        with pytest.raises(ix.Error, match="slots"):
            ix.index_k_write(context, ix.IndexKWriteDesc(k=k, slots=np.array(slots, np.int32), pages=pages))
    assert not pages.any()


def test_indices_out_of_range_are_refused(context, rng):
    q, kv, out = (rng.standard_normal(s).astype(np.float32) for s in ((1, 1, 16), (10, 16), (1, 1, 16)))
    desc = ix.AttentionDesc(q=q, kv=kv, out=out, softmax_scale=1.0)
    for bad in (10, -2, 2**31 - 1):
        with pytest.raises(ix.Error, match="indices"):
            ix.sparse_attention(context, desc, np.array([[0, bad]], np.int32))
    for scale in (0.0, float("nan"), float("inf"), -1.0):
        desc.softmax_scale = scale
        with pytest.raises(ix.Error, match="softmax_scale"):
            ix.sparse_attention(context, desc, np.array([[0]], np.int32))
