"""What stands between the operators in every arm: norms, RoPE, routing, experts. On CUDA one Triton kernel each, as
servers fuse them; elsewhere the same in torch, which is also what the kernels are checked against."""

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # No CUDA here: the torch versions are all there is.
    triton = None

EPS = 1e-6
grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm


def norm(x, weight):
    x = x.float()
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * weight.float()


def rotate(x, table):
    """Half-split RoPE of the last axis; `table` is [rows, cos | sin], broadcast over axes between."""
    half = x.shape[-1] // 2
    while table.dim() < x.dim():
        table = table.unsqueeze(1)
    cos, sin, a, b = table[..., :half], table[..., half:], x[..., :half].float(), x[..., half:].float()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Torch:
    """The meaning of each kernel."""

    @staticmethod
    def add_norm(x, delta, weight):
        """x += delta; the norm of it."""
        if delta is not None:
            x += delta
        return norm(x, weight).to(x.dtype)

    @staticmethod
    def latents(a, dims, p, table):
        """Splits the fused projection: q latent, KV row, indexer key and head weights (None on a Shared layer)."""
        q, kv, pe, rest = a.split([dims.q_rank, dims.kv_rank, dims.rope, a.shape[1] - dims.latent], -1)
        row = torch.cat([norm(kv, p["kv_norm"]), rotate(pe, table)], -1).to(a.dtype)
        q = norm(q, p["q_norm"]).to(a.dtype)
        if not rest.shape[1]:
            return q, row, None, None
        k, w = rest.split([dims.index_dim, dims.index_heads], -1)
        k = F.layer_norm(k.float(), (dims.index_dim,), p["ik_norm"].float(), p["ik_bias"].float(), EPS)
        k = torch.cat([rotate(k[:, : dims.rope], table), k[:, dims.rope :]], -1).to(a.dtype)
        return q, row, k, w.float()

    @staticmethod
    def rope_q(b, dims, table, q):
        """Rotates the heads' rope part into the tail of the absorbed queries, and the indexer's queries in place."""
        n = dims.heads * (dims.nope + dims.rope)
        heads = b[:, :n].view(len(b), dims.heads, -1)
        q[:, : dims.heads, dims.kv_rank :] = rotate(heads[..., dims.nope :], table).to(q.dtype)
        if b.shape[1] > n:
            iq = b[:, n:].view(len(b), dims.index_heads, dims.index_dim)
            iq[..., : dims.rope] = rotate(iq[..., : dims.rope], table).to(b.dtype)

    @staticmethod
    def silu_mul(h):
        gate, up = h.chunk(2, -1)
        return (F.silu(gate.float()) * up.float()).to(h.dtype)

    @staticmethod
    def combine(y, place, weights):
        """out[t] = sum over t's experts of weight * y[place]."""
        return (y[place].float() * weights.unsqueeze(-1)).sum(1).to(y.dtype)

    @staticmethod
    def widen(pages, table, n):
        """The first `n` KV rows of a request, 656-byte rows to contiguous bf16."""
        rows = pages[table[: -(-n // 64)].long()].view(-1, 656)[:n]
        codes = rows[:, :512].contiguous().view(torch.float8_e4m3fn).float().view(n, 4, 128)
        scale = rows[:, 512:528].contiguous().view(torch.float32).unsqueeze(-1)
        rope = rows[:, 528:].contiguous().view(torch.bfloat16)
        return torch.cat([(codes * scale).view(n, 512).to(torch.bfloat16), rope], -1)

    @staticmethod
    def gather_index_k(pages, table, n):
        """The first `n` indexer keys of a request and their scales, contiguous."""
        rows = pages[table[: -(-n // 64)].long()]
        k = rows[:, : 64 * 128].reshape(-1, 128)[:n]
        return k.view(torch.float8_e4m3fn), rows[:, 64 * 128 :].contiguous().view(torch.float32).reshape(-1)[:n]

    @staticmethod
    def to_slots(indices, table):
        """Positions to row numbers through a table with an entry for each token."""
        return torch.where(indices < 0, -1, table.gather(1, indices.clamp_min(0).long()))

    @classmethod
    def experts(cls, x, router, p, dims):
        """Sigmoid router, its top experts and the shared one as one more group of the grouped products."""
        weights, ids = torch.sigmoid((x @ router.T).float()).topk(dims.active, -1)
        weights = F.pad(weights / weights.sum(-1, keepdim=True), (0, 1), value=1.0)
        ids = F.pad(ids.int(), (0, 1), value=dims.experts)
        by_expert, order = ids.flatten().sort(stable=True)
        ends = torch.searchsorted(
            by_expert, torch.arange(dims.experts + 1, device=x.device, dtype=torch.int32), right=True
        )
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=x.device)
        h = grouped(x[order // (dims.active + 1)], p["w13"], ends)
        y = grouped(cls.silu_mul(h), p["w2"], ends)
        return cls.combine(y, place.view(len(x), -1), weights)


def grouped(a, w, ends):
    """Rows of `a` in groups that end at `ends`, each by its own matrix of `w` [groups, out, in]."""
    if a.is_cuda:
        return grouped_mm(a, w.transpose(1, 2), offs=ends.int())
    out, start = a.new_empty(len(a), w.shape[1]), 0
    for g, end in enumerate(ends.tolist()):
        out[start:end] = a[start:end] @ w[g].T
        start = end
    return out


if triton:

    @triton.jit
    def _norm(x, n: tl.constexpr, weight, cols, ok):
        return x * tl.rsqrt(tl.sum(x * x, 0) / n + 1e-6) * tl.load(weight + cols, mask=ok, other=0).to(tl.float32)

    @triton.jit
    def _add_norm(x, delta, weight, out, N: tl.constexpr, B: tl.constexpr, HAS: tl.constexpr):
        row, c = tl.program_id(0).to(tl.int64) * N, tl.arange(0, B)
        ok = c < N
        v = tl.load(x + row + c, mask=ok, other=0).to(tl.float32)
        if HAS:
            v = (v + tl.load(delta + row + c, mask=ok, other=0).to(tl.float32)).to(tl.bfloat16)
            tl.store(x + row + c, v, mask=ok)
            v = v.to(tl.float32)
        tl.store(out + row + c, _norm(v, N, weight, c, ok).to(tl.bfloat16), mask=ok)

    @triton.jit
    def _latents(
        a, stride, table, q_norm, kv_norm, ik_norm, ik_bias, q, kv, ik, w,
        Q: tl.constexpr, QB: tl.constexpr, KV: tl.constexpr, R: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
        FULL: tl.constexpr,
    ):  # fmt: skip
        r = tl.program_id(0).to(tl.int64)
        a += r * stride
        c = tl.arange(0, QB)
        v = tl.load(a + c, mask=c < Q, other=0).to(tl.float32)
        tl.store(q + r * Q + c, _norm(v, Q, q_norm, c, c < Q).to(tl.bfloat16), mask=c < Q)
        c = tl.arange(0, KV)
        v = tl.load(a + Q + c).to(tl.float32)
        tl.store(kv + r * (KV + R) + c, _norm(v, KV, kv_norm, c, c < KV).to(tl.bfloat16))
        f = tl.arange(0, R // 2)
        cos, sin = tl.load(table + r * R + f), tl.load(table + r * R + R // 2 + f)
        x, y = tl.load(a + Q + KV + f).to(tl.float32), tl.load(a + Q + KV + R // 2 + f).to(tl.float32)
        out = kv + r * (KV + R) + KV + f
        tl.store(out, (x * cos - y * sin).to(tl.bfloat16))
        tl.store(out + R // 2, (y * cos + x * sin).to(tl.bfloat16))
        if FULL:
            a += Q + KV + R
            d = tl.arange(0, D)
            v = tl.load(a + d).to(tl.float32)
            mean = tl.sum(v, 0) / D
            scale = tl.rsqrt(tl.sum((v - mean) * (v - mean), 0) / D + 1e-6)
            rest = (v - mean) * scale * tl.load(ik_norm + d).to(tl.float32) + tl.load(ik_bias + d).to(tl.float32)
            tl.store(ik + r * D + d, rest.to(tl.bfloat16), mask=d >= R)
            x, y = tl.load(a + f).to(tl.float32), tl.load(a + R // 2 + f).to(tl.float32)
            x = (x - mean) * scale * tl.load(ik_norm + f).to(tl.float32) + tl.load(ik_bias + f).to(tl.float32)
            y = (y - mean) * scale * tl.load(ik_norm + R // 2 + f).to(tl.float32)
            y += tl.load(ik_bias + R // 2 + f).to(tl.float32)
            tl.store(ik + r * D + f, (x * cos - y * sin).to(tl.bfloat16))
            tl.store(ik + r * D + R // 2 + f, (y * cos + x * sin).to(tl.bfloat16))
            h = tl.arange(0, H)
            tl.store(w + r * H + h, tl.load(a + D + h).to(tl.float32))

    @triton.jit
    def _rope_q(
        b, stride, table, q, q_row, q_head,
        HEADS: tl.constexpr, HB: tl.constexpr, NOPE: tl.constexpr, KV: tl.constexpr, R: tl.constexpr,
        D: tl.constexpr, IH: tl.constexpr, FULL: tl.constexpr,
    ):  # fmt: skip
        r = tl.program_id(0).to(tl.int64)
        b += r * stride
        f = tl.arange(0, R // 2)[None, :]
        cos, sin = tl.load(table + r * R + f), tl.load(table + r * R + R // 2 + f)
        h = tl.arange(0, HB)[:, None]
        at = b + h * (NOPE + R) + NOPE + f
        x = tl.load(at, mask=h < HEADS, other=0).to(tl.float32)
        y = tl.load(at + R // 2, mask=h < HEADS, other=0).to(tl.float32)
        to = q + r * q_row + h * q_head + KV + f
        tl.store(to, (x * cos - y * sin).to(tl.bfloat16), mask=h < HEADS)
        tl.store(to + R // 2, (y * cos + x * sin).to(tl.bfloat16), mask=h < HEADS)
        if FULL:
            at = b + HEADS * (NOPE + R) + tl.arange(0, IH)[:, None] * D + f
            x, y = tl.load(at).to(tl.float32), tl.load(at + R // 2).to(tl.float32)
            tl.store(at, (x * cos - y * sin).to(tl.bfloat16))
            tl.store(at + R // 2, (y * cos + x * sin).to(tl.bfloat16))

    @triton.jit
    def _silu_mul(h, out, N: tl.constexpr, B: tl.constexpr):
        r, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * B + tl.arange(0, B)
        g = tl.load(h + r * 2 * N + c, mask=c < N, other=0).to(tl.float32)
        u = tl.load(h + r * 2 * N + N + c, mask=c < N, other=0).to(tl.float32)
        tl.store(out + r * N + c, (g * tl.sigmoid(g) * u).to(tl.bfloat16), mask=c < N)

    @triton.jit
    def _combine(y, place, weights, out, A: tl.constexpr, PITCH: tl.constexpr, N: tl.constexpr, B: tl.constexpr):
        r, c = tl.program_id(0).to(tl.int64), tl.arange(0, B)
        total = tl.zeros([B], tl.float32)
        for j in tl.static_range(A):
            at = tl.load(place + r * PITCH + j).to(tl.int64) * N
            total += tl.load(weights + r * PITCH + j) * tl.load(y + at + c, mask=c < N, other=0).to(tl.float32)
        tl.store(out + r * N + c, total.to(tl.bfloat16), mask=c < N)

    @triton.jit
    def _widen(pages, page_stride, table, out, n):
        t = tl.program_id(0) * 16 + tl.arange(0, 16)
        page = tl.load(table + tl.program_id(0) // 4).to(tl.int64)
        at, ok = pages + page * page_stride + (t % 64)[:, None] * 656, (t < n)[:, None]
        c = tl.arange(0, 512)[None, :]
        code = tl.load((at + c), mask=ok, other=0).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        scale = tl.load((at + 512).to(tl.pointer_type(tl.float32)) + c // 128, mask=ok, other=0)
        to = out + t.to(tl.int64)[:, None] * 576
        tl.store(to + c, (code * scale).to(tl.bfloat16), mask=ok)
        f = tl.arange(0, 64)[None, :]
        tl.store(to + 512 + f, tl.load((at + 528).to(tl.pointer_type(tl.bfloat16)) + f, mask=ok, other=0), mask=ok)

    @triton.jit
    def _gather_index_k(pages, table, k, scale, n):
        i = tl.program_id(0)
        page = pages + tl.load(table + i).to(tl.int64) * 8448
        c = tl.arange(0, 8192)
        tl.store(k + i.to(tl.int64) * 8192 + c, tl.load(page + c), mask=i * 64 + c // 128 < n)
        t = tl.arange(0, 64)
        s = tl.load((page + 8192).to(tl.pointer_type(tl.float32)) + t)
        tl.store(scale + i * 64 + t, s, mask=i * 64 + t < n)

    @triton.jit
    def _to_slots(indices, table, stride, out, K: tl.constexpr, B: tl.constexpr):
        r, c = tl.program_id(0), tl.program_id(1) * B + tl.arange(0, B)
        i = tl.load(indices + r * K + c)
        tl.store(out + r * K + c, tl.where(i < 0, -1, tl.load(table + r * stride + i, mask=i >= 0, other=0)))

    @triton.jit
    def _route(logits, rows, place, order, weights, offs, E: tl.constexpr, A: tl.constexpr, BP: tl.constexpr):
        """Top A of E experts of a few rows, the shared one as number E; pairs (8 a row, A + 1 used) by expert."""
        P: tl.constexpr = BP * 8
        r, e = tl.arange(0, BP)[:, None], tl.arange(0, E)[None, :]
        s = tl.sigmoid(tl.load(logits + r * E + e, mask=r < rows, other=0).to(tl.float32))
        j = tl.arange(0, 8)[None, :]
        ids = tl.where((j == A) & (r < rows), E, 2 * E) + tl.zeros([BP, 8], tl.int32)
        w = tl.where(j == A, 1.0, 0.0) + tl.zeros([BP, 8], tl.float32)
        total = tl.zeros([BP], tl.float32)
        for i in tl.static_range(A):
            best, at = tl.max(s, 1), tl.argmax(s, 1)
            total += best
            ids = tl.where((j == i) & (r < rows), at[:, None], ids)
            w = tl.where(j == i, best[:, None], w)
            s = tl.where(e == at[:, None], -1.0, s)
        w = tl.where(j < A, w / total[:, None], w)
        tl.store(weights + r * 8 + j, w)
        ids = tl.reshape(ids, [P])
        p = tl.arange(0, P)
        sorted_pairs = tl.sort(ids * P + p) % P
        tl.store(order + p, sorted_pairs)
        tl.store(place + sorted_pairs, p)
        counts = tl.histogram(ids, 4 * E)
        g = tl.arange(0, 4 * E)
        tl.store(offs + g, tl.cumsum(counts, 0) - counts, mask=g < 2 * E)

    @triton.jit
    def _experts_up(
        x, w13, order, offs, h, K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
    ):
        e, n = tl.program_id(1), tl.program_id(0) * BN + tl.arange(0, BN)
        lo, hi = tl.load(offs + e), tl.load(offs + e + 1)
        gate = w13 + e.to(tl.int64) * 2 * N * K + n[None, :] * K
        for m in range(lo, hi, BM):
            r = m + tl.arange(0, BM)
            row = tl.load(order + r, mask=r < hi, other=0) // 8
            g, u = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
            for k in range(0, K, BK):
                c = k + tl.arange(0, BK)
                a = tl.load(x + row[:, None] * K + c[None, :], mask=(r < hi)[:, None], other=0)
                g = tl.dot(a, tl.load(gate + c[:, None]), g)
                u = tl.dot(a, tl.load(gate + N * K + c[:, None]), u)
            tl.store(h + r[:, None] * N + n[None, :], (g * tl.sigmoid(g) * u).to(tl.bfloat16), mask=(r < hi)[:, None])

    @triton.jit
    def _experts_down(
        h, w2, offs, y, K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
    ):
        e, n = tl.program_id(1), tl.program_id(0) * BN + tl.arange(0, BN)
        lo, hi = tl.load(offs + e), tl.load(offs + e + 1)
        w = w2 + e.to(tl.int64) * N * K + n[None, :] * K
        for m in range(lo, hi, BM):
            r = m + tl.arange(0, BM)
            total = tl.zeros([BM, BN], tl.float32)
            for k in range(0, K, BK):
                c = k + tl.arange(0, BK)
                a = tl.load(h + r[:, None] * K + c[None, :], mask=(r < hi)[:, None], other=0)
                total = tl.dot(a, tl.load(w + c[:, None]), total)
            tl.store(y + r[:, None] * N + n[None, :], total.to(tl.bfloat16), mask=(r < hi)[:, None])

    class Triton(Torch):
        FEW = 64  # Rows up to which the experts' products are bound by the weights' bytes.

        @staticmethod
        def add_norm(x, delta, weight):
            out, n = torch.empty_like(x), x.shape[1]
            _add_norm[(len(x),)](
                x, x if delta is None else delta, weight, out, n, triton.next_power_of_2(n), delta is not None
            )
            return out

        @staticmethod
        def latents(a, dims, p, table):
            rows, full = len(a), a.shape[1] > dims.latent
            q, kv = a.new_empty(rows, dims.q_rank), a.new_empty(rows, dims.kv_rank + dims.rope)
            ik = a.new_empty(rows, dims.index_dim) if full else None
            w = a.new_empty(rows, dims.index_heads, dtype=torch.float32) if full else None
            _latents[(rows,)](
                a, a.stride(0), table, p["q_norm"], p["kv_norm"], p["ik_norm"], p["ik_bias"], q, kv, ik, w,
                dims.q_rank, triton.next_power_of_2(dims.q_rank), dims.kv_rank, dims.rope, dims.index_dim,
                dims.index_heads, full,
            )  # fmt: skip
            return q, kv, ik, w

        @staticmethod
        def rope_q(b, dims, table, q):
            full = b.shape[1] > dims.heads * (dims.nope + dims.rope)
            _rope_q[(len(b),)](
                b, b.stride(0), table, q, q.stride(0), q.stride(1), dims.heads, triton.next_power_of_2(dims.heads),
                dims.nope, dims.kv_rank, dims.rope, dims.index_dim, dims.index_heads, full,
            )  # fmt: skip

        @staticmethod
        def silu_mul(h):
            rows, n = len(h), h.shape[1] // 2
            out, block = h.new_empty(rows, n), min(triton.next_power_of_2(n), 2048)
            _silu_mul[(rows, triton.cdiv(n, block))](h, out, n, block)
            return out

        @staticmethod
        def combine(y, place, weights):
            rows, pitch = place.shape
            out, n = y.new_empty(rows, y.shape[1]), y.shape[1]
            _combine[(rows,)](y, place, weights, out, pitch, pitch, n, triton.next_power_of_2(n))
            return out

        @staticmethod
        def widen(pages, table, n):
            out = torch.empty(n, 576, dtype=torch.bfloat16, device=pages.device)
            _widen[(triton.cdiv(n, 16),)](pages, pages.stride(0), table, out, n)
            return out

        @staticmethod
        def gather_index_k(pages, table, n):
            k = torch.empty(n, 128, dtype=torch.uint8, device=pages.device)
            scale = torch.empty(n, dtype=torch.float32, device=pages.device)
            _gather_index_k[(triton.cdiv(n, 64),)](pages, table, k, scale, n)
            return k.view(torch.float8_e4m3fn), scale

        @staticmethod
        def to_slots(indices, table):
            out, k = torch.empty_like(indices), indices.shape[1]
            _to_slots[(len(indices), k // 1024)](indices, table, table.stride(0), out, k, 1024)
            return out

        @classmethod
        def experts(cls, x, router, p, dims):
            rows = len(x)
            if rows > cls.FEW:
                return super().experts(x, router, p, dims)
            bp = max(16, triton.next_power_of_2(rows))
            pairs, new = bp * 8, dict(device=x.device, dtype=torch.int32)
            place, order = torch.empty(pairs, **new), torch.empty(pairs, **new)
            offs = torch.empty(2 * dims.experts, **new)
            weights = torch.empty(pairs, dtype=torch.float32, device=x.device)
            _route[(1,)](x @ router.T, rows, place, order, weights, offs, dims.experts, dims.active, bp)
            h, y = x.new_empty(pairs, dims.expert), x.new_empty(pairs, dims.hidden)
            groups = dims.experts + 1
            _experts_up[(dims.expert // 32, groups)](
                x, p["w13"], order, offs, h, dims.hidden, dims.expert, 16, 32, 128, num_stages=4
            )
            _experts_down[(dims.hidden // 32, groups)](
                h, p["w2"], offs, y, dims.expert, dims.hidden, 16, 32, 128, num_stages=4
            )
            out = x.new_empty(rows, dims.hidden)
            block = triton.next_power_of_2(dims.hidden)
            _combine[(rows,)](y, place, weights, out, dims.active + 1, 8, dims.hidden, block)
            return out


def kernels(device):
    return Triton if device == "cuda" else Torch
