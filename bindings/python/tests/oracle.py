"""What the operations mean, in plain numpy and f64."""

import numpy as np


def _e4m3_values():
    code = np.arange(256)
    sign, exponent, mantissa = np.where(code >> 7, -1.0, 1.0), (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    return np.where(code & 127 == 127, np.nan, sign * value)


E4M3 = _e4m3_values()


def e4m3_decode(codes):
    return E4M3[codes]


def e4m3_encode(x):
    """Round to nearest, ties to the even code; saturates; NaN is 0x7f."""
    x = np.asarray(x, np.float64)
    magnitude, table = np.abs(x), E4M3[:127]
    low = np.clip(np.searchsorted(table, magnitude, side="right") - 1, 0, 126)
    high = np.minimum(low + 1, 126)
    down, up = magnitude - table[low], table[high] - magnitude
    code = np.where((down < up) | ((down == up) & (low % 2 == 0)) | (low == 126), low, high)
    return np.where(np.isnan(x), 127, code | np.signbit(x) << 7).astype(np.uint8)


def bf16_encode(x):
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_decode(bits):
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def hadamard(x):
    n = x.shape[-1]
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return x @ h / np.sqrt(n)


def pow2_at_least(x):
    return np.exp2(np.ceil(np.log2(x))).astype(np.float32)


def quantize(x, rotate=False, pow2=False):
    """e4m3 codes and float32 scale of each vector (last axis)."""
    x = hadamard(np.asarray(x, np.float64)) if rotate else np.asarray(x, np.float32)
    scale = np.maximum(np.abs(x).max(-1), 1e-4).astype(np.float32) / np.float32(448)
    if pow2:
        scale = pow2_at_least(scale)
    return e4m3_encode(x.astype(np.float32) / scale[..., None]), scale


def index_k_pages(pages, dim):
    """Views of page-planar pages: codes [pages, 64, dim] and float32 scales [pages, 64]."""
    n, size = len(pages), 64 * (dim + 4)
    codes = np.ndarray((n, 64, dim), np.uint8, pages, 0, (size, dim, 1))
    return codes, np.ndarray((n, 64), np.float32, pages, 64 * dim, (size, 4))


def kv_fp8(kv):
    """The 656-byte rows of [tokens, 576]."""
    kv = np.asarray(kv, np.float32)
    latent = kv[:, :512].reshape(-1, 4, 128)
    scale = pow2_at_least(np.maximum(np.abs(latent).max(-1) / np.float32(448), np.float32(1e-4)))
    codes = e4m3_encode(latent / scale[..., None]).reshape(-1, 512)
    return np.concatenate([codes, scale.view(np.uint8), bf16_encode(kv[:, 512:]).view(np.uint8)], axis=1)


def kv_fp8_decode(rows):
    scale = np.ascontiguousarray(rows[:, 512:528]).view(np.float32)
    latent = (e4m3_decode(rows[:, :512]).reshape(-1, 4, 128) * scale[..., None]).reshape(-1, 512)
    return np.concatenate([latent, bf16_decode(np.ascontiguousarray(rows[:, 528:]).view(np.uint16))], axis=1)


def logits(q, weights, k, k_scale, start, end, columns):
    """q [rows, heads, dim], k [keys, dim] as values; -inf past a row's end."""
    out = np.full((len(q), columns), -np.inf)
    for r in range(len(q)):
        keys = k[start[r] : max(end[r], start[r])]
        score = np.maximum(np.einsum("hd,kd->hk", q[r], keys, dtype=np.float64), 0)
        out[r, : len(keys)] = (weights[r].astype(np.float64) @ score) * k_scale[start[r] : start[r] + len(keys)]
    return out


def topk(scores, k, start=None, end=None):
    rows, columns = scores.shape
    out = np.full((rows, k), -1, np.int32)
    for r in range(rows):
        s = 0 if start is None else start[r]
        e = columns if end is None else end[r]
        x = np.asarray(scores[r, s : max(e, s)], np.float64)
        x = np.where(np.isnan(x), -np.inf, x) + 0.0
        chosen = np.sort(np.argsort(-x, kind="stable")[:k])
        out[r, : len(chosen)] = chosen
    return out


def attention(q, kv, slots, scale, d_v, row_topk=None, sink=None):
    """Over slots [rows, topk] of kv [tokens, d_qk]; -1 is skipped."""
    rows, heads, _ = q.shape
    out, lse = np.zeros((rows, heads, d_v)), np.full((rows, heads), -np.inf)
    for r in range(rows):
        s = slots[r] if row_topk is None else slots[r, : row_topk[r]]
        keys = kv[s[s >= 0]].astype(np.float64)
        if len(keys) == 0:
            continue
        score = scale * (q[r].astype(np.float64) @ keys.T)
        peak = score.max(-1, keepdims=True)
        p = np.exp(score - peak)
        lse[r] = peak[:, 0] + np.log(p.sum(-1))
        extra = 0 if sink is None else np.exp(np.asarray(sink, np.float64) - peak[:, 0])
        out[r] = p @ keys[:, :d_v] / (p.sum(-1) + extra)[:, None]
    return out, lse
