"""Before anything is timed: the fused kernels against torch, the arms' operators against torch and each other, a
captured step against an eager one."""

import math
import traceback

import torch

import arms
import glue
from model import PAGE, ROOM, Batch


def error(got, want):
    got, want = got.float(), want.float()
    return float((got - want).norm() / want.norm())


def expect(bench, what, value, limit):
    ok = value <= limit
    bench.keep({"kind": "check", "what": what, "value": value, "limit": limit, "ok": ok})
    if not ok or bench.args.tiny or ":" in what:
        print(f"check {what}: {value:.2e} (limit {limit:.0e}){'' if ok else ' FAILED'}", flush=True)


def run(bench):
    """What fails is in the results, and an arm that cannot run is left out."""
    for part in (glue_kernels, operators, ends):
        part(bench)
    checks = [r for r in bench.results if r["kind"] == "check"]
    print(
        f"{bench.spent():6.1f}s checks: {len(checks)}, failed: {[r['what'] for r in checks if not r['ok']]}", flush=True
    )


def each(bench):
    """The arms by name; one whose check raises is left out of all that follows."""
    for name, arm in list(bench.arms.items()):
        guard = Guard(bench, name)
        yield name, arm, guard


class Guard:
    def __init__(self, bench, name):
        self.bench, self.name = bench, name

    def __enter__(self):
        return self

    def __exit__(self, kind, e, trace):
        if e is None or not isinstance(e, Exception):
            return False
        traceback.print_exception(e)
        self.bench.keep({"kind": "left out", "arm": self.name, "why": f"{type(e).__name__}: {e}"[:300]})
        self.bench.arms.pop(self.name, None)
        return True


def glue_kernels(bench):
    """Each fused kernel against its meaning in torch."""
    if bench.model.k is glue.Torch:
        return
    dims, device, k, t = bench.dims, bench.device, bench.model.k, glue.Torch
    new = dict(dtype=torch.bfloat16, device=device)
    for rows in (1, 7, 300):
        x, delta = torch.randn(rows, dims.hidden, **new), torch.randn(rows, dims.hidden, **new)
        w = torch.randn(dims.hidden, **new)
        expect(bench, f"add_norm {rows}", error(k.add_norm(x.clone(), delta, w), t.add_norm(x.clone(), delta, w)), 2e-3)
        table = bench.model.rope[torch.randint(100, (rows,), device=device)]
        p = dict(bench.model.w["layers"][0])
        p["ik_bias"] = torch.randn_like(p["ik_bias"])
        for width in (dims.latent, dims.latent + dims.index_dim + dims.index_heads):
            a = torch.randn(rows, width, **new)
            for name, got, want in zip("q kv ik w".split(), k.latents(a, dims, p, table), t.latents(a, dims, p, table)):
                if want is not None:
                    expect(bench, f"latents {rows} {width} {name}", error(got, want), 3e-3)
        b = torch.randn(rows, dims.heads * (dims.nope + dims.rope) + dims.index_heads * dims.index_dim, **new)
        b2, q, q2 = b.clone(), torch.zeros(rows, 64, 576, **new), torch.zeros(rows, 64, 576, **new)
        k.rope_q(b, dims, table, q), t.rope_q(b2, dims, table, q2)
        expect(bench, f"rope_q {rows} heads", error(q, q2), 3e-3)
        expect(bench, f"rope_q {rows} indexer", error(b, b2), 3e-3)
        h = torch.randn(rows, 2 * dims.expert, **new)
        expect(bench, f"silu_mul {rows}", error(k.silu_mul(h), t.silu_mul(h)), 3e-3)
    p = bench.model.w["layers"][1]
    for rows in (1, 3, 24, 64, 300):
        x = torch.randn(rows, dims.hidden, **new)
        got = k.experts(x, p["router"], p, dims)
        weights, ids = torch.sigmoid((x @ p["router"].T).float()).topk(dims.active, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        r = rows - 1  # One row, expert by expert.
        want = torch.zeros(dims.hidden, device=device)
        for w, e in [*zip(weights[r].tolist(), ids[r].tolist()), (1.0, dims.experts)]:
            h = t.silu_mul((x[r : r + 1].float() @ p["w13"][e].float().T))
            want += w * (h @ p["w2"][e].float().T)[0]
        expect(bench, f"experts {rows}", error(got[r], want), 1e-2)


def fill(bench, arm, context):
    """Both caches of layer 0 from random rows."""
    dims, device = bench.dims, bench.device
    table = bench.pool.tables(1, context + PAGE)
    tokens = (table.unsqueeze(-1) * PAGE + torch.arange(PAGE, dtype=torch.int32, device=device)).view(1, -1)
    batch = Batch(False, table, tokens, torch.arange(1, context + 1, dtype=torch.int32, device=device), context)
    batch.place(bench.model.rope)
    new = dict(dtype=torch.bfloat16, device=device)
    for start in range(0, context, bench.args.chunk):
        stop = min(start + bench.args.chunk, context)
        part = Batch(False, table, tokens, batch.end[start:stop], stop, batch.slots[start:stop])
        arm.write_kv(torch.randn(stop - start, dims.kv_rank + dims.rope, **new), part, bench.pool.kv[0])
        q = torch.randn(stop - start, dims.index_heads, dims.index_dim, **new)
        w = torch.randn(stop - start, dims.index_heads, device=device)
        k = torch.randn(stop - start, dims.index_dim, **new)
        q, w = arm.write_index(q, w, k, part, bench.pool.index_k[0])
    return table, tokens, q, w


def operators(bench):
    """Selection and attention of layer 0 on the same inputs: all arms against torch, in float32 on the fp8 codes."""
    dims, device = bench.dims, bench.device
    context = min(max(bench.args.contexts), 4 * bench.args.chunk - 77)
    for decode in (False, True):
        for name, arm, guard in each(bench):
            with guard:
                torch.manual_seed(1)
                table, tokens, q, w = fill(bench, arm, context)
                rows = 1 if decode else len(q)
                q, w = q[-rows:].contiguous(), w[-rows:].contiguous()
                end = torch.arange(context - rows + 1, context + 1, dtype=torch.int32, device=device)
                pages = -(-context // PAGE)
                batch = Batch(decode, table[:, :pages].contiguous(), tokens, end, context)
                arm.begin(batch)
                aq = arm.queries(rows)
                torch.manual_seed(2)
                aq[:, : dims.heads] = torch.randn(rows, dims.heads, 576, dtype=torch.bfloat16, device=device)
                arm.select(0, q, w, batch, bench.pool.index_k[0], lambda stage: None)
                out = arm.attend(0, aq, batch, bench.pool.kv[0], lambda stage: None)[:, : dims.heads]
                keys, scale = glue.Torch.gather_index_k(bench.pool.index_k[0], table[0], context)
                kv = glue.Torch.widen(bench.pool.kv[0], table[0], context).float()
                missed = worst = 0.0
                for r in sorted({0, rows // 3, rows - 1}):
                    n = int(end[r])
                    dots = keys[:n].float() @ q[r].view(torch.float8_e4m3fn).float().T
                    scores = (dots.relu() @ w[r]) * scale[:n]
                    want = scores.topk(min(dims.topk, n)).indices
                    if isinstance(arm, arms.Ours):
                        got = arm.indices(0, rows)[r].long()
                    elif decode:
                        got = torch.isin(tokens[0], arm.slots[r]).nonzero().view(-1)
                    else:
                        got = arm.kept[r].long()
                    got = got[got >= 0]
                    missed = max(missed, 1 - float(torch.isin(got, want).sum()) / len(want))
                    logits = (aq[r, : dims.heads].float() @ kv[got].T) * dims.scale
                    worst = max(worst, error(out[r], logits.softmax(-1) @ kv[got, : dims.kv_rank]))
                kind = "decode" if decode else "prefill"
                expect(bench, f"{name} {kind} selection, share missed", missed, 2e-3 if device == "cuda" else 0.0)
                expect(bench, f"{name} {kind} attention", worst, 1e-2)


def ends(bench):
    """Whole passes keep their size; in the first layers arms of one pattern agree, and a replayed step is the eager.

    Only the first layers: random routers have near-ties, rounding breaks them, and a row that went to another expert is
    another row from there on. After 47 layers two runs of the public arm differ by half their size."""
    context = min(max(bench.args.contexts), bench.args.chunk + 1000)
    outs = {}
    for name, _, guard in each(bench):
        with guard:
            torch.manual_seed(3)
            x, delta = bench.prefill(name, context, keep=False)
            size = float((x + delta).float().std())
            expect(bench, f"{name} prefill, residual stream is sane: |log2 of its size|", abs(math.log2(size)), 3)
    bench.model.depth = min(3, bench.dims.layers)
    for name, _, guard in each(bench):
        with guard:
            torch.manual_seed(3)
            x, delta = bench.prefill(name, context, keep=False)
            outs[name] = (x + delta).float()
    agree(bench, f"prefill of {context}", outs)
    for requests in (1, min(16, bench.largest(context))):
        bench.pool.copy_first(bench.pool.tables(requests, context + ROOM))
        outs = {}
        for name, arm, guard in each(bench):
            with guard:
                outs[name] = bench.step(name, bench.batch(requests, context), bench.first_ids(requests)).float()
                if bench.device == "cuda":
                    run = bench.capture(name, requests, context)
                    run(1)
                    # Public top-k gives its set in another order each time, so sums round in another way.
                    limit = 0 if isinstance(arm, arms.Ours) else AGREE
                    value = typical(run.x, outs[name])
                    if requests > 1 or not limit:
                        expect(bench, f"{name} decode of {requests}: replayed and eager", value, limit)
        if requests > 1:
            agree(bench, f"decode of {requests}", outs)
    bench.model.depth = bench.dims.layers


AGREE = 4e-2


def typical(got, want):
    """The median row's error: a near-tie of a router, broken by rounding, sends a row to another expert."""
    got, want = got.float(), want.float()
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).median())


def agree(bench, what, outs):
    for one in outs:
        for other in outs:
            if one < other and bench.arms[one].pattern == bench.arms[other].pattern:
                expect(bench, f"{what}: {one} and {other}", typical(outs[one], outs[other]), AGREE)
