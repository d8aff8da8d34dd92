"""Each stateless operation against plain numpy in f64."""

import numpy as np
import oracle
import pytest

import indexcache as ix

try:
    import torch
except ImportError:
    torch = None

I32 = np.int32


def i32(*values):
    return np.array(values, I32)


def bf16(x):
    return ix.as_dtype(oracle.bf16_encode(x), "bfloat16")


# Quantisation


def all_bf16_below_448():
    """Every finite bfloat16 of magnitude up to 448, as rows of 128 whose first element is 448: scale 1."""
    bits = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    values = oracle.bf16_decode(bits)
    bits = bits[np.isfinite(values) & (np.abs(np.nan_to_num(values, nan=1e9, posinf=1e9, neginf=1e9)) <= 448)]
    rows = np.resize(bits, (-(-len(bits) // 127), 127))
    return np.concatenate([np.full((len(rows), 1), oracle.bf16_encode(np.float32(448))), rows], axis=1)


def write_keys(context, k, dim, tokens, flags=0):
    pages = np.zeros((-(-tokens // 64), 64, dim + 4), np.uint8)
    slots = np.arange(tokens, dtype=I32)
    ix.index_k_write(context, ix.IndexKWriteDesc(k=k, slots=slots, pages=pages, flags=flags))
    codes, scales = oracle.index_k_pages(pages, dim)
    return codes.reshape(-1, dim)[:tokens], scales.reshape(-1)[:tokens]


def test_fp8_rounding_of_every_value(context):
    bits = all_bf16_below_448()
    codes, scales = write_keys(context, ix.as_dtype(bits, "bfloat16"), 128, len(bits))
    assert (scales == 1).all()
    assert (codes == oracle.e4m3_encode(oracle.bf16_decode(bits))).all()


@pytest.mark.skipif(torch is None, reason="torch is not importable: fp8 rounding is checked against numpy only")
def test_fp8_rounding_as_torch_has_it(context):
    bits = all_bf16_below_448()
    k = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    codes, _ = write_keys(context, k, 128, len(bits))
    assert (codes == k.to(torch.float8_e4m3fn).view(torch.uint8).numpy()).all()


@pytest.mark.parametrize("flags", [0, ix.FLAG_POW2_SCALE])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_index_k_bytes(context, rng, flags, dtype):
    k = (rng.standard_normal((130, 128)) * np.exp(rng.uniform(-20, 6, (130, 1)))).astype(np.float32)
    k[7] = 0
    if dtype == "bfloat16":
        k = oracle.bf16_decode(oracle.bf16_encode(k))
    codes, scales = write_keys(context, bf16(k) if dtype == "bfloat16" else k, 128, 130, flags)
    want_codes, want_scales = oracle.quantize(k, pow2=bool(flags))
    np.testing.assert_array_equal(scales, want_scales)
    np.testing.assert_array_equal(codes, want_codes)


def test_index_k_pages_are_planar_and_other_tokens_stay(context, rng):
    """Slots in any order, -1 skipped; a page is 64 rows of e4m3 and then 64 float32 scales."""
    k = rng.standard_normal((4, 128)).astype(np.float32)
    pages = np.full((3, 8448), 0xAA, np.uint8)
    slots = np.array([2 * 64 + 63, -1, 64, 5], np.int64)
    ix.index_k_write(context, ix.IndexKWriteDesc(k=k, slots=slots, pages=pages))
    codes, scales = oracle.quantize(k)
    want = np.full((3, 8448), 0xAA, np.uint8)
    for t, (page, at) in {0: (2, 63), 2: (1, 0), 3: (0, 5)}.items():
        want[page, at * 128 : (at + 1) * 128] = codes[t]
        want[page, 8192 + 4 * at : 8192 + 4 * at + 4] = scales[t : t + 1].view(np.uint8)
    np.testing.assert_array_equal(pages, want)


def test_hadamard_keeps_scores(context, rng):
    """Rotated values come back as the rotation by numpy, to fp8 precision."""
    k = rng.standard_normal((64, 64)).astype(np.float32)
    codes, scales = write_keys(context, k, 64, 64, ix.FLAG_HADAMARD)
    want = oracle.hadamard(k.astype(np.float64))
    got = oracle.e4m3_decode(codes) * scales[:, None]
    assert (np.abs(got - want) <= np.abs(want) / 16 * 1.001 + scales[:, None] * 2.0**-9).all()


@pytest.mark.parametrize("flags", [0, ix.FLAG_POW2_SCALE])
@pytest.mark.parametrize("scale", [0.0, 0.25])
def test_index_q_quantize(context, rng, flags, scale):
    q = rng.standard_normal((5, 3, 128)).astype(np.float32)
    weights = rng.standard_normal((5, 3)).astype(np.float32)
    q_out, weights_out = np.zeros((5, 3, 128), np.uint8), np.zeros((5, 3), np.float32)
    ix.index_q_quantize(
        context,
        ix.IndexQQuantizeDesc(
            q=q,
            weights=weights,
            q_out=ix.as_dtype(q_out, "float8_e4m3fn"),
            weights_out=weights_out,
            scale=scale,
            flags=flags,
        ),
    )
    codes, q_scale = oracle.quantize(q, pow2=bool(flags))
    np.testing.assert_array_equal(q_out, codes)
    np.testing.assert_allclose(weights_out, weights * (scale or (3 * 128) ** -0.5) * q_scale, rtol=3e-7)


# Scores


def indexer_inputs(rng, rows=9, heads=4, keys=200, dim=64):
    return (
        rng.integers(0, 255, (rows, heads, dim)).astype(np.uint8) & 0xBF,  # |value| below 2: no NaN
        rng.standard_normal((rows, heads)).astype(np.float32),
        rng.integers(0, 255, (keys, dim)).astype(np.uint8) & 0xBF,
        rng.uniform(0.5, 2, keys).astype(np.float32),
    )


def fp8_indexer(q, w, k, ks, **kw):
    return ix.IndexerDesc(
        q=ix.as_dtype(q, "float8_e4m3fn"), weights=w, k=ix.as_dtype(k, "float8_e4m3fn"), k_scale=ks, **kw
    )


def assert_scores(got, want, size):
    """Equal where -inf; elsewhere within float32 rounding of sums whose terms add up to ``size``."""
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
    finite = np.isfinite(want)
    assert (np.abs(got[finite] - want[finite]) <= 2e-6 * size[finite]).all()


def test_logits_fp8(context, rng):
    q, w, k, ks = indexer_inputs(rng)
    start = rng.integers(0, 50, 9).astype(I32)
    end = rng.integers(50, 201, 9).astype(I32)
    end[3] = start[3]  # A padding row.
    out = np.zeros((9, 210), np.float32)
    ix.indexer_logits(context, fp8_indexer(q, w, k, ks, row_start=start, row_end=end), out)
    qd, kd = oracle.e4m3_decode(q), oracle.e4m3_decode(k)
    want = oracle.logits(qd, w, kd, ks, start, end, 210)
    size = oracle.logits(np.abs(qd), np.abs(w), np.abs(kd), ks, start, end, 210)
    assert_scores(out, want, size)


def test_logits_bf16(context, rng):
    q, k = (rng.standard_normal(s).astype(np.float32) for s in ((6, 3, 64), (90, 64)))
    w, end = rng.standard_normal((6, 3)).astype(np.float32), i32(90, 1, 0, 37, 64, 65)
    out = np.zeros((6, 90), np.float32)
    ix.indexer_logits(context, ix.IndexerDesc(q=bf16(q), weights=w, k=bf16(k), row_end=end), out)
    qd, kd = (oracle.bf16_decode(oracle.bf16_encode(x)).astype(np.float64) for x in (q, k))
    one, zero = np.ones(90), np.zeros(6, int)
    want = oracle.logits(qd, w, kd, one, zero, end, 90)
    size = oracle.logits(np.abs(qd), np.abs(w), np.abs(kd), one, zero, end, 90)
    assert_scores(out, want, size)


def paged(rng, k, ks, requests=3, max_pages=4):
    """Pages with shuffled numbers that hold the keys k [requests * max_pages * 64, dim]."""
    dim = k.shape[1]
    table = rng.permutation(requests * max_pages).reshape(requests, max_pages).astype(I32)
    pages = np.zeros((requests * max_pages, 64, 1, dim + 4), np.uint8)
    codes, scales = oracle.index_k_pages(pages, dim)
    codes[table.reshape(-1)] = k.reshape(-1, 64, dim)
    scales[table.reshape(-1)] = ks.reshape(-1, 64)
    return pages, table


def test_paged_logits(context, rng):
    q, w, k, ks = indexer_inputs(rng, rows=8, keys=3 * 4 * 64)
    pages, table = paged(rng, k, ks)
    request, visible = i32(0, 0, 1, 1, 2, 2, -1, 1), i32(1, 256, 64, 65, 0, 200, 9, 128)
    out = np.zeros((8, 256), np.float32)
    desc = ix.IndexerDesc(
        q=ix.as_dtype(q, "float8_e4m3fn"), weights=w, k=pages, block_table=table, row_request=request, row_end=visible
    )
    ix.paged_indexer_logits(context, desc, out)
    qd, kd = oracle.e4m3_decode(q), oracle.e4m3_decode(k)
    start = np.maximum(request, 0) * 256
    end = start + np.where(request < 0, 0, visible)
    want = oracle.logits(qd, w, kd, ks, start, end, 256)
    size = oracle.logits(np.abs(qd), np.abs(w), np.abs(kd), ks, start, end, 256)
    assert_scores(out, want, size)


# Top-k


@pytest.mark.parametrize("k", [1, 5, 64, 300])
def test_topk_with_heavy_ties(context, rng, k):
    """Few distinct values, both zeros, infinities and NaN, against a stable sort."""
    values = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 2.0], np.float32)
    x = rng.choice(values, (50, 257), p=[0.4, 0.2, 0.1, 0.1, 0.02, 0.08, 0.05, 0.05])
    out = np.zeros((50, k), I32)
    ix.topk(context, ix.TopkDesc(logits=x, indices=out))
    np.testing.assert_array_equal(out, oracle.topk(x, k))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_topk_with_row_bounds(context, rng, dtype):
    x = oracle.bf16_decode(oracle.bf16_encode(rng.standard_normal((40, 500)).astype(np.float32)))
    start = rng.integers(0, 300, 40).astype(I32)
    end = rng.integers(0, 501, 40).astype(I32)
    out = np.zeros((40, 70), I32)
    logits = bf16(x) if dtype == "bfloat16" else x
    ix.topk(context, ix.TopkDesc(logits=logits, indices=out, row_start=start, row_end=end))
    np.testing.assert_array_equal(out, oracle.topk(x, 70, start, end))


def test_topk_with_a_callers_workspace(context, rng):
    x, out = rng.standard_normal((3, 100)).astype(np.float32), np.zeros((3, 9), I32)
    desc = ix.TopkDesc(logits=x, indices=out)
    ix.topk(context, desc, np.zeros(ix.topk_workspace(context, desc), np.uint8))
    np.testing.assert_array_equal(out, oracle.topk(x, 9))


# Indices


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_indices_to_slots(context, rng, page_size):
    table = rng.permutation(40).reshape(4, 10).astype(I32)
    indices = rng.integers(-1, 10 * page_size, (8, 33)).astype(I32)
    request = i32(0, 1, 2, 3, 3, 2, -1, 0)
    slots = np.zeros_like(indices)
    ix.indices_to_slots(
        context,
        ix.IndicesToSlotsDesc(
            indices=indices, slots=slots, block_table=table, row_request=request, page_size=page_size
        ),
    )
    want = table[np.maximum(request, 0)[:, None], indices // page_size] * page_size + indices % page_size
    np.testing.assert_array_equal(slots, np.where((indices < 0) | (request < 0)[:, None], -1, want))


def test_indices_to_slots_in_place_and_rows_split_evenly(context, rng):
    table = rng.permutation(8).reshape(2, 4).astype(I32)
    indices = rng.integers(0, 64, (6, 5)).astype(I32)
    want = table[np.arange(6) // 3][np.arange(6)[:, None], indices // 16] * 16 + indices % 16
    ix.indices_to_slots(
        context, ix.IndicesToSlotsDesc(indices=indices, slots=indices, block_table=table, page_size=16)
    )
    np.testing.assert_array_equal(indices, want)


def test_indices_to_slots_of_contiguous_keys(context):
    indices, slots = np.array([[0, 3, -1], [1, -1, -1]], I32), np.zeros((2, 3), I32)
    ix.indices_to_slots(context, ix.IndicesToSlotsDesc(indices=indices, slots=slots, row_start=i32(10, 20)))
    np.testing.assert_array_equal(slots, [[10, 13, -1], [21, -1, -1]])


def test_overlap(context, rng):
    def rows(width):
        out = np.full((20, width), -1, I32)
        for r in range(1, 20):
            n = rng.integers(0, width + 1)
            out[r, :n] = np.sort(rng.choice(60, n, replace=False))
        return out

    a, b, got = rows(30), rows(20), np.zeros(20, np.float32)
    ix.indices_overlap(context, a, b, got)
    sets = [(set(x[x >= 0]), set(y[y >= 0])) for x, y in zip(a, b)]
    want = [len(x & y) / len(x) if x else 1.0 for x, y in sets]
    np.testing.assert_allclose(got, want, rtol=1e-6)


# KV and attention


def test_kv_fp8_bytes(context, rng):
    kv = (rng.standard_normal((70, 576)) * np.exp(rng.uniform(-12, 4, (70, 1)))).astype(np.float32)
    kv[3] = 0
    pages = np.full((2, 64, 656), 0xAA, np.uint8)
    slots = rng.permutation(128)[:70].astype(np.int64)
    slots[5] = -1
    ix.kv_write(context, ix.KvWriteDesc(kv=kv, slots=slots, pages=pages))
    want = np.full((128, 656), 0xAA, np.uint8)
    kept = slots >= 0
    want[slots[kept]] = oracle.kv_fp8(kv)[kept]
    np.testing.assert_array_equal(pages.reshape(128, 656), want)


def test_kv_bf16(context, rng):
    kv = rng.standard_normal((10, 80)).astype(np.float32)
    pages = np.zeros((3, 16, 80), np.uint16)
    ix.kv_write(
        context, ix.KvWriteDesc(kv=kv, slots=np.arange(20, 30, dtype=I32), pages=ix.as_dtype(pages, "bfloat16"))
    )
    np.testing.assert_array_equal(pages.reshape(48, 80)[20:30], oracle.bf16_encode(kv))
    assert not pages.reshape(48, 80)[:20].any()


def attention_inputs(rng, rows=7, heads=5, tokens=192, d_qk=48, topk=40):
    indices = np.stack([rng.permutation(tokens)[:topk] for _ in range(rows)]).astype(I32)
    indices[0, ::3] = -1  # Holes count for nothing, wherever they are.
    indices[1] = -1
    return (
        rng.standard_normal((rows, heads, d_qk)).astype(np.float32),
        rng.standard_normal((tokens, d_qk)).astype(np.float32),
        indices,
    )


def run_attention(context, q, kv, indices, d_v, form=ix.FORM_LOGICAL, **kw):
    out = np.full((*q.shape[:2], d_v), np.nan, np.float32)
    lse = np.full(q.shape[:2], np.nan, np.float32)
    desc = ix.AttentionDesc(q=q, kv=kv, out=out, lse=lse, softmax_scale=0.2, **kw)
    ix.sparse_attention(context, desc, indices, form)
    return out, lse


def assert_attention(got, want, tolerance=2e-6):
    for g, w in zip(got, want):
        np.testing.assert_array_equal(np.isinf(g), np.isinf(w))
        finite = np.isfinite(w)
        np.testing.assert_allclose(g[finite], w[finite], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("row_topk", [False, True])
def test_attention_f32(context, rng, sink, row_topk):
    q, kv, indices = attention_inputs(rng)
    sink = rng.standard_normal(5).astype(np.float32) if sink else None
    row_topk = i32(40, 40, 0, 1, 20, 39, 40) if row_topk else None
    got = run_attention(context, q, kv, indices, 32, sink=sink, row_topk=row_topk)
    assert_attention(got, oracle.attention(q, kv, indices, 0.2, 32, row_topk, sink))
    assert (got[0][1] == 0).all() and np.isneginf(got[1][1]).all()


@pytest.mark.parametrize("sink", [False, True])
def test_attention_probabilities(context, rng, sink):
    q, kv, indices = attention_inputs(rng)
    row_topk = i32(40, 40, 0, 1, 20, 39, 40)
    sink = rng.standard_normal(5).astype(np.float32) if sink else None
    probs = np.full(indices.shape, np.nan, np.float32)
    run_attention(context, q, kv, indices, 32, probs=probs, row_topk=row_topk, sink=sink)
    live = (indices >= 0) & (np.arange(40) < row_topk[:, None])
    scores = 0.2 * np.einsum("rhd,rkd->rhk", q.astype(np.float64), kv[indices].astype(np.float64))
    weights = np.where(live[:, None], np.exp(scores), 0)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    np.testing.assert_allclose(probs, weights.mean(1), rtol=1e-5, atol=1e-9)
    assert (probs[~live] == 0).all() and live.any(1).sum() == 5
    with pytest.raises(ix.Error, match="lse: expected a tensor beside probs"):
        out = np.zeros((7, 5, 32), np.float32)
        ix.sparse_attention(context, ix.AttentionDesc(q=q, kv=kv, out=out, probs=probs, softmax_scale=0.2), indices)


def test_checked_mode_is_what_the_cpu_does_anyway(context, rng):
    q, kv, indices = attention_inputs(rng)
    indices[3, 5] = len(kv)
    checked = ix.Context(ix.ContextDesc(backend=ix.BACKEND_CPU, flags=ix.CHECKED))
    for c in (context, checked):
        with pytest.raises(ix.Error, match=f"indices: expected positions below {len(kv)}, got {len(kv)} in row 3"):
            run_attention(c, q, kv, indices, 32)


def test_attention_row_start(context, rng):
    q, kv, indices = attention_inputs(rng)
    start = rng.integers(0, 100, 7).astype(I32)
    store = np.concatenate([kv, rng.standard_normal((100, 48)).astype(np.float32)])
    got = run_attention(context, q, store, indices, 48, row_start=start)
    slots = np.where(indices < 0, -1, indices + start[:, None])
    assert_attention(got, oracle.attention(q, store, slots, 0.2, 48))


@pytest.mark.parametrize("layout", ["float32", "bfloat16", "fp8"])
def test_attention_paged_logical_and_slots_agree(context, rng, layout):
    q, kv, indices = attention_inputs(rng, tokens=256, d_qk=576)
    q *= 0.2
    table = rng.permutation(4).reshape(1, 4).astype(I32)
    order = (table.repeat(64) * 64 + np.tile(np.arange(64), 4)).astype(I32)
    if layout == "fp8":
        pages = np.zeros((4, 64, 1, 656), np.uint8)
        store = pages
    else:
        pages = np.zeros((4, 64, 576), np.uint16 if layout == "bfloat16" else np.float32)
        store = ix.as_dtype(pages, "bfloat16") if layout == "bfloat16" else pages
    ix.kv_write(context, ix.KvWriteDesc(kv=kv, slots=order, pages=store))
    values = {
        "float32": lambda: pages.reshape(256, 576),
        "bfloat16": lambda: oracle.bf16_decode(pages.reshape(256, 576)),
        "fp8": lambda: oracle.kv_fp8_decode(pages.reshape(256, 656)),
    }[layout]()
    slots = np.where(indices < 0, -1, order[indices]).astype(I32)
    want = oracle.attention(q, values, slots, 0.2, 512)
    logical = run_attention(context, q, store, indices, 512, block_table=table)
    assert_attention(logical, want, 5e-6)
    by_slot = run_attention(context, q, store, slots, 512, ix.FORM_SLOTS)
    for a, b in zip(logical, by_slot):
        np.testing.assert_array_equal(a, b)


def test_attention_bf16_in_and_out(context, rng):
    q, kv, indices = attention_inputs(rng)
    out = np.zeros((7, 5, 48), np.uint16)
    desc = ix.AttentionDesc(q=bf16(q), kv=bf16(kv), out=ix.as_dtype(out, "bfloat16"), softmax_scale=0.2)
    ix.sparse_attention(context, desc, indices)
    q, kv = (oracle.bf16_decode(oracle.bf16_encode(x)) for x in (q, kv))
    want, _ = oracle.attention(q, kv, indices, 0.2, 48)
    np.testing.assert_allclose(oracle.bf16_decode(out), want, rtol=2**-8, atol=1e-6)


def test_attention_with_a_callers_workspace(context, rng):
    q, kv, indices = attention_inputs(rng)
    out = np.zeros((7, 5, 48), np.float32)
    desc = ix.AttentionDesc(q=q, kv=kv, out=out, softmax_scale=0.2)
    workspace = np.zeros(ix.sparse_attention_workspace(context, desc, indices) + 3, np.uint8)[3:]  # Any alignment.
    ix.sparse_attention(context, desc, indices, workspace=workspace)
    assert_attention([out], [oracle.attention(q, kv, indices, 0.2, 48)[0]])
