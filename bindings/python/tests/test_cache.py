"""The per-layer loop: who selects, who reuses, what is stale."""

import ctypes
import threading

import numpy as np
import oracle
import pytest

import indexcache as ix
from indexcache import _abi
from indexcache._tensor import view

TOPK, HEADS, DIM, D_QK, D_V = 64, 4, 32, 48, 32
PATTERN = "FSSFS-S"


def plan(pattern=PATTERN, topk=TOPK, **model):
    return ix.Plan.from_pattern(ix.ModelDesc(layers=len(pattern), topk=topk, **model), pattern)


class Model:
    """Random tensors of one request of ``tokens``, one set a layer; index K and KV are paged."""

    def __init__(self, context, seed, tokens=300, layers=len(PATTERN)):
        rng = np.random.default_rng(seed)
        self.context, self.tokens = context, tokens
        pages = -(-tokens // 64)
        self.table = rng.permutation(pages).reshape(1, pages).astype(np.int32)
        at = np.arange(tokens)
        self.slots = (self.table[0, at // 64] * 64 + at % 64).astype(np.int32)
        self.q = rng.integers(0, 255, (layers, tokens, HEADS, DIM)).astype(np.uint8) & 0xBF
        self.w = rng.standard_normal((layers, tokens, HEADS)).astype(np.float32)
        self.keys = np.zeros((layers, pages, 64 * (DIM + 4)), np.uint8)
        self.attention_q = rng.standard_normal((layers, tokens, 3, D_QK)).astype(np.float32)
        self.kv = rng.standard_normal((layers, pages, 64, D_QK)).astype(np.float32)
        for layer in range(layers):
            k = rng.standard_normal((tokens, DIM)).astype(np.float32)
            ix.index_k_write(context, ix.IndexKWriteDesc(k=k, slots=self.slots, pages=self.keys[layer]))

    def indexer(self, layer, rows):
        return ix.IndexerDesc(
            q=ix.as_dtype(self.q[layer, rows], "float8_e4m3fn"),
            weights=self.w[layer, rows],
            k=self.keys[layer],
            block_table=self.table,
            row_end=np.arange(rows.start + 1, rows.stop + 1, dtype=np.int32),
        )

    def attention(self, layer, rows, out, **kw):
        kw = {"block_table": self.table, **kw}
        return ix.AttentionDesc(
            q=self.attention_q[layer, rows], kv=self.kv[layer], out=out, softmax_scale=0.15, **kw
        )

    def select_in_two_steps(self, layer, rows):
        """What ``select`` must give: logits, then top-k."""
        scores = np.zeros((rows.stop - rows.start, self.table.size * 64), np.float32)
        ix.paged_indexer_logits(self.context, self.indexer(layer, rows), scores)
        out = np.zeros((len(scores), TOPK), np.int32)
        ends = np.arange(rows.start + 1, rows.stop + 1, dtype=np.int32)
        ix.topk(self.context, ix.TopkDesc(logits=scores, indices=out, row_end=ends))
        return out


def run(model, cache, layers_plan, lane=0, chunk=100, step=0):
    """The loop over chunks of prefill and over layers; every layer's indices and attention output."""
    seen = []
    for first in range(0, model.tokens, chunk):
        rows = slice(first, min(first + chunk, model.tokens))
        step += 1
        cache.step_begin(lane, rows.stop - rows.start, step)
        for layer in range(len(PATTERN)):
            role = layers_plan.layer_role(layer)
            if role == ix.ROLE_NONE:
                continue
            cache.select(lane, layer, model.indexer(layer, rows) if role == ix.ROLE_FULL else None)
            out = np.zeros((rows.stop - rows.start, 3, D_V), np.float32)
            cache.attend(lane, layer, model.attention(layer, rows, out))
            seen.append((layer, rows, cache.indices(lane, layer).copy(), out))
    return seen


def test_shared_layers_reuse_the_nearest_full_layer(context):
    model, p = Model(context, 1), plan()
    cache = ix.Cache(context, p, ix.CacheDesc(max_rows=100))
    seen = run(model, cache, p)
    assert len(seen) == 3 * 6
    differs = 0
    for layer, rows, indices, out in seen:
        source = p.layer_get_info(layer).source_layer
        want = model.select_in_two_steps(source, rows)
        np.testing.assert_array_equal(indices, want)
        if source != layer:
            differs += (want != model.select_in_two_steps(layer, rows)).any()
        slots = np.where(indices < 0, -1, model.slots[indices])
        kv = model.kv[layer].reshape(-1, D_QK)
        attended, _ = oracle.attention(model.attention_q[layer, rows], kv, slots, 0.15, D_V)
        np.testing.assert_allclose(out, attended, rtol=1e-5, atol=1e-6)
    assert differs, "reuse must not be vacuous"


def test_select_over_contiguous_keys_is_logits_and_topk(context, rng):
    """Heavy ties: one head with weight 0 in half the rows."""
    q = rng.integers(0, 255, (50, 2, DIM)).astype(np.uint8) & 0xBF
    k = rng.integers(0, 255, (400, DIM)).astype(np.uint8) & 0xBF
    w = rng.standard_normal((50, 2)).astype(np.float32) * (np.arange(50) % 2)[:, None].astype(np.float32)
    start, end = rng.integers(0, 100, 50).astype(np.int32), rng.integers(0, 401, 50).astype(np.int32)
    end = np.maximum(start, end)
    desc = ix.IndexerDesc(
        q=ix.as_dtype(q, "float8_e4m3fn"),
        weights=w,
        k=ix.as_dtype(k, "float8_e4m3fn"),
        k_scale=np.ones(400, np.float32),
        row_start=start,
        row_end=end,
    )
    cache = ix.Cache(context, plan("F"), ix.CacheDesc(max_rows=50))
    cache.step_begin(0, 50, 1)
    cache.select(0, 0, desc, np.zeros(cache.select_workspace(desc), np.uint8))
    scores = np.zeros((50, 400), np.float32)
    ix.indexer_logits(context, desc, scores)
    want = oracle.topk(scores, TOPK, end=end - start)
    np.testing.assert_array_equal(cache.indices(0, 0), want)


def test_stale_indices_are_refused(context):
    p = plan()
    cache = ix.Cache(context, p, ix.CacheDesc(max_rows=8, lanes=2))
    model, rows = Model(context, 2), slice(200, 208)

    def stale(call, *args):
        with pytest.raises(ix.Error) as e:
            call(*args)
        assert (e.value.status, e.value.name) == (ix.ERR_STALE, "IDXC_ERR_STALE")
        return e.value.text

    stale(cache.lane_get_info, 0)
    stale(cache.slot, 0)
    cache.step_begin(0, 8, 1)
    assert "idxc_select: layer 1" in stale(cache.select, 0, 1, None)
    stale(cache.indices, 0, 0)
    cache.select(0, 0, model.indexer(0, rows))
    cache.select(0, 1, None)
    assert "layer 4 uses the indices of layer 3" in stale(cache.indices, 0, 4)
    stale(cache.indices, 1, 0)  # Lanes are apart.
    out = np.zeros((8, 3, D_V), np.float32)
    stale(cache.attend, 0, 4, model.attention(4, rows, out))
    assert not out.any()
    cache.step_begin(0, 8, 2)
    stale(cache.indices, 0, 0)
    stale(cache.export, 0, 0, np.zeros((8, TOPK), np.int32))
    with pytest.raises(ix.Error, match="step_id"):
        cache.step_begin(0, 8, 2)


def test_publish_slots_of_another_block_table(context, rng):
    p, model = plan(), Model(context, 3)
    cache = ix.Cache(context, p, ix.CacheDesc(max_rows=5))
    indices = np.sort(rng.integers(0, 300, (5, TOPK)), axis=1).astype(np.int32)
    slots = np.zeros_like(indices)
    ix.indices_to_slots(
        context, ix.IndicesToSlotsDesc(indices=indices, slots=slots, block_table=model.table, page_size=64)
    )
    rows, outs = slice(0, 5), [np.zeros((5, 3, D_V), np.float32) for _ in range(2)]
    cache.step_begin(0, 5, 1)
    cache.publish(0, 0, slots, ix.FORM_SLOTS, table_id=7)
    cache.attend(0, 1, model.attention(1, rows, outs[0], block_table=None, table_id=7))
    with pytest.raises(ix.Error) as e:
        cache.attend(0, 2, model.attention(2, rows, outs[1], block_table=None, table_id=8))
    assert e.value.status == ix.ERR_FORM
    cache.slot(0)[:] = indices  # The host's own indexer, straight into the buffer.
    cache.publish(0, 0, None)
    cache.attend(0, 1, model.attention(1, rows, outs[1]))
    np.testing.assert_array_equal(*outs)
    info = cache.lane_get_info(0)
    assert (info.rows, info.source_layer, info.form, info.step_id) == (5, 0, ix.FORM_LOGICAL, 1)


def test_stages_hand_indices_over(context):
    whole = plan()
    first, second = whole.slice(0, 2), whole.slice(2, len(PATTERN))
    assert first.get_info().sends_from_layer == second.get_info().receives_from_layer == 0
    model, rows = Model(context, 4), slice(250, 260)
    a = ix.Cache(context, first, ix.CacheDesc(max_rows=10))
    b = ix.Cache(context, second, ix.CacheDesc(max_rows=10))
    wire = np.zeros((10, TOPK), np.int32)
    a.step_begin(0, 10, 1)
    a.select(0, 0, model.indexer(0, rows))
    a.export(0, 1, wire)
    b.step_begin(0, 10, 1)
    b.publish(0, 0, wire)
    b.select(0, 2, None)
    np.testing.assert_array_equal(b.indices(0, 2), model.select_in_two_steps(0, rows))
    assert whole.slice(2, len(PATTERN), ix.FLAG_PROMOTE).get_info().promoted_layer == 2


def test_draft_iterations_carry_the_last_accepted_rows(context):
    p = plan("FS", topk=8, mtp_layers=1, flags=ix.FLAG_MTP_SHARES)
    cache = ix.Cache(context, p, ix.CacheDesc(max_rows=6))
    rows = np.arange(48, dtype=np.int32).reshape(6, 8)
    cache.step_begin(0, 6, 1)
    cache.publish(0, 2, rows)
    cache.step_carry(0, np.array([1, 4, -1], np.int32), 2)
    np.testing.assert_array_equal(cache.indices(0, 2), [rows[1], rows[4], [-1] * 8])
    with pytest.raises(ix.Error, match="from"):
        cache.step_carry(0, np.array([1, 0], np.int32), 3)


def test_a_host_owned_buffer_is_used_without_a_copy(context):
    p = plan("F", topk=8)
    buffer = np.full((2, 4, 8), 99, np.int32)
    assert ix.Cache.size(p, ix.CacheDesc(max_rows=4, lanes=2)) == buffer.nbytes
    cache = ix.Cache(context, p, ix.CacheDesc(max_rows=4, lanes=2, buffer=buffer))
    cache.step_begin(1, 3, 1)
    cache.publish(1, 0, np.full((3, 8), 5, np.int32))
    assert (buffer[1, :3] == 5).all()
    view = cache.indices(1, 0)
    assert np.shares_memory(view, buffer) and not view.flags.writeable
    del buffer, cache
    assert (view == 5).all()  # The view keeps both alive.


def test_threads_with_caches_of_their_own(context):
    p = plan()
    models = [Model(context, seed, tokens=150) for seed in range(4)]
    want = [run(m, ix.Cache(context, p, ix.CacheDesc(max_rows=50)), p, chunk=50) for m in models]
    got, errors = [None] * 4, []

    def work(i):
        try:
            cache = ix.Cache(context, p, ix.CacheDesc(max_rows=50))
            for step in (0, 100, 200):
                got[i] = run(models[i], cache, p, chunk=50, step=step)
            with pytest.raises(ix.Error, match=f"expected 0 to 0, got {i + 10}"):  # Texts are a thread's own.
                cache.slot(i + 10)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    for a, b in zip(want, got):
        for (_, _, indices, out), (_, _, indices2, out2) in zip(a, b):
            np.testing.assert_array_equal(indices, indices2)
            np.testing.assert_array_equal(out, out2)


def test_threads_take_turns_on_one_cache(context):
    p = plan("F", topk=8)
    cache = ix.Cache(context, p, ix.CacheDesc(max_rows=4, lanes=4))

    def work(lane):
        for step in range(200):
            cache.step_begin(lane, 4, step + 1)
            cache.publish(lane, 0, np.full((4, 8), lane, np.int32))
            assert (cache.indices(lane, 0) == lane).all()
        done.append(lane)

    done = []
    threads = [threading.Thread(target=work, args=(lane,)) for lane in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(done) == [0, 1, 2, 3]


def test_device_memory_is_a_torch_tensor():
    """Without a copy, what is written to the slot is what Shared layers see."""
    torch = pytest.importorskip("torch", reason="torch is not importable")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    cache = ix.Cache(ix.Context(ix.ContextDesc(backend=ix.BACKEND_CUDA)), plan("FS"), ix.CacheDesc(max_rows=3))
    cache.step_begin(0, 3, 1)
    slot = torch.as_tensor(cache.slot(0), device="cuda")
    slot.copy_(torch.arange(3 * TOPK).view(3, TOPK))
    cache.publish(0, 0, None)
    seen = torch.as_tensor(cache.indices(0, 1), device="cuda")
    assert seen.data_ptr() == slot.data_ptr() and seen.dtype == torch.int32
    assert torch.equal(seen.cpu(), torch.arange(3 * TOPK, dtype=torch.int32).view(3, TOPK))


def test_device_memory_is_described_as_torch_wants_it():
    """What torch refuses of ``__cuda_array_interface__`` is not there: its read-only flag."""
    extents = (ctypes.c_int64 * 2)(3, 4), (ctypes.c_int64 * 2)(4, 1)
    device = _abi.Device(ix.DEVICE_CUDA, 0)
    t = _abi.Tensor(4096, device, 2, _abi.DType(ix.DTYPE_INT, 32, 1), *extents, 0)
    memory = view(t, None, read_only=True).__cuda_array_interface__
    assert memory == {"data": (4096, False), "shape": (3, 4), "strides": (16, 4), "typestr": "<i4", "version": 3}
