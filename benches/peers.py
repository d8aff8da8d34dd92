"""Ours beside the public CUDA kernels for the same work, in one process, taking turns.

    PYTHONPATH=bindings/python/src INDEXCACHE_LIBRARY=target/release/libindexcache.so python benches/peers.py --out DIR

Peers, each where it can be imported: DeepGEMM (wheel sgl-deep-gemm) for the logits; FlashInfer (flashinfer-python),
SGLang (sglang-kernel), vLLM and torch for the top-k; FlashMLA (sgl-flash-mla), FlashInfer and torch for sparse
attention. Times are medians of graph replays, a graph holding many calls over rotating inputs; what is allocated
inside a call counts for nobody. A peer's `select` is its logits, then its top-k.

Every candidate's result is checked, too. Top-k alone: against a stable sort of the same scores. Select: against scores
in float64 of the same quantised inputs; the best position left out may beat the worst one taken by what rounding
explains (TOLERANCE), no more. Attention: against float64 over the same, dequantised KV rows. `varies`: a second run
of the same call gave another set, or other bits.
"""
import argparse
import functools
import importlib
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import indexcache as ix

K = 2048
L2 = 50 << 20
TOLERANCE = 2e-3  # Of a row's standard deviation; tensor cores add fp8 products with about 14 bits.
CHECKED_ROWS = 8
D_QK, D_V = 576, 512
SCALE = D_QK**-0.5
ATTENTION_ERROR = 1e-2  # Of a row's norm: scores (torch), probabilities, widened fp8 and the output are bf16, 2e-3 each.


def importable():
    """Public kernels by name; what cannot be imported says why."""
    have, lack = {}, {}
    modules = {
        "DeepGEMM": "deep_gemm",
        "FlashInfer": "flashinfer.topk",
        "SGLang": "sgl_kernel",
        "vLLM": "vllm._custom_ops",
        "FlashMLA": "flash_mla",
        "FlashInfer MLA": "flashinfer.mla",
    }
    for name, module in modules.items():
        try:
            importlib.import_module(module)
            have[name] = sys.modules[module.partition(".")[0]]
        except Exception as e:  # An extension for another torch raises what it likes.
            lack[name] = f"{type(e).__name__}: {e}".splitlines()[0]
    return have, lack


class Case:
    """One piece of work: candidates that do it, each a call that takes the number of an input set."""

    def __init__(self, section, name, sets, *, flop=0, bytes=0):
        self.section, self.name, self.sets, self.flop, self.bytes = section, name, sets, flop, bytes
        self.candidates = {}

    def add(self, name, call, check):
        """`call(set)` returns indices or scores; `check(set, result)` gives the number of wrong rows, and a note."""
        self.candidates[name] = (call, check)


def timer(call, sets):
    """A graph of calls over all sets, 2 ms long or 200 calls. Gives a function that replays it: microseconds a call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
        start.record()
        call(0)
        end.record()
    end.synchronize()
    calls = max(sets, min(200, int(2 / max(start.elapsed_time(end), 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            call(i % sets)

    def replay():
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / calls

    return replay


def run(case, results, rounds=7):
    """Checks and times a case's candidates, round about."""
    replays, rows = {}, {}
    for name, (call, check) in case.candidates.items():
        row = {"section": case.section, "case": case.name, "peer": name, "sets": case.sets}
        results.append(row)
        try:
            first = call(0).clone()
            row["wrong"], row["note"] = check(0, first)
            if case.section != "logits":
                row["varies"] = differ(first, call(0))
            replays[name] = timer(call, case.sets)
            rows[name] = row
        except Exception as e:
            row["error"] = f"{type(e).__name__}: {e}".splitlines()[0][:200]
        torch.cuda.synchronize()
    times = {name: [] for name in replays}
    for i in range(rounds + 1):
        for name, replay in replays.items():
            t = replay()
            if i:  # One round to warm up.
                times[name].append(t)
    for name, t in times.items():
        row = rows[name]
        row["us"] = statistics.median(t)
        row["spread"] = (max(t) - min(t)) / row["us"]
        if case.flop:
            row["tflops"] = case.flop / row["us"] / 1e6
        if case.bytes:
            row["gbs"] = case.bytes / row["us"] / 1e3
    for row in results[-len(case.candidates) :]:
        print(line(row), flush=True)


def differ(a, b):
    """Whether two selections are other sets, or two outputs other bits."""
    if a.dtype == torch.int32:
        a, b = a.sort(-1).values, b.sort(-1).values
    return not torch.equal(a, b)


def line(row):
    what = f"{row['section']:<8} {row['case']:<42} {row['peer']:<36}"
    return what + (row["error"] if "error" in row else f"{row['us']:10.2f} us {rate(row):>13}  {state(row)}")


# --- Inputs.


def e4m3(x):
    return x.clamp(-448, 448).to(torch.float8_e4m3fn)


def our_e4m3(x):
    return ix.as_dtype(x.view(torch.uint8), "float8_e4m3fn")


def int32(n, value):
    return torch.full((n,), value, dtype=torch.int32, device="cuda")


def scores(kind, rows, columns):
    """f32 scores of a kind: normally distributed, or what a filter may not like."""
    x = torch.randn(rows, columns, device="cuda")
    if kind == "narrow":
        return 1 + 0.2 * torch.rand_like(x)
    if kind == "64 levels":
        return (x * 16).clamp(-32, 31).round()
    if kind == "99% zeros":
        return torch.where(torch.rand_like(x) < 0.99, 0.0, x.abs())
    if kind == "x1e5":
        return x * 1e5
    if kind == "denormals":
        return x * 1e-39
    if kind == "negatives":
        return -x.abs() - 1
    if kind == "rising":
        return x * 1e-3 + torch.arange(columns, device="cuda") / columns
    if kind in ("indexer w>0", "indexer w+-"):
        sums = torch.zeros_like(x)
        for _ in range(64):
            w = torch.randn(rows, 1, device="cuda")
            sums.addcmul_(w.abs() if kind == "indexer w>0" else w, torch.randn_like(x).relu_())
        return sums
    return x


KINDS = ["narrow", "64 levels", "99% zeros", "x1e5", "denormals", "negatives", "rising", "indexer w>0", "indexer w+-"]


class Paged:
    """Decode: page-planar fp8 keys of `requests` requests, pages in any order."""

    def __init__(self, requests, keys, heads, sets):
        pages = requests * keys // 64
        self.q = [e4m3(torch.randn(requests, heads, 128, device="cuda")) for _ in range(sets)]
        self.w = torch.randn(requests, heads, device="cuda")
        self.table = torch.randperm(pages, device="cuda").to(torch.int32).view(requests, keys // 64)
        self.end = int32(requests, keys)
        self.pages = []
        for _ in range(sets):
            p = torch.empty(pages, 64 * 132, dtype=torch.uint8, device="cuda")
            for part in p.split(1 << 14):  # A part at a time: the floats would take four times the memory.
                n = len(part)
                part[:, :8192] = e4m3(torch.randn(n, 8192, device="cuda")).view(torch.uint8)
                part[:, 8192:] = (0.5 + torch.rand(n, 64, device="cuda")).view(torch.uint8).view(n, 256)
            self.pages.append(p)

    def reference(self, i, row):
        """Scores of one row, in float64."""
        p = self.pages[i][self.table[row].long()]
        k = p[:, :8192].contiguous().view(torch.float8_e4m3fn).view(-1, 128)
        scale = p[:, 8192:].contiguous().view(torch.float32).view(-1)
        return weighted(self.q[i][row], self.w[row], k, scale)

    def desc(self, i):
        return ix.IndexerDesc(
            q=our_e4m3(self.q[i]), weights=self.w, k=self.pages[i], block_table=self.table, row_end=self.end
        )


class Contiguous:
    """Prefill: the last `rows` of a context, its keys contiguous."""

    def __init__(self, rows, keys, heads, causal):
        self.q = e4m3(torch.randn(rows, heads, 128, device="cuda"))
        self.w = torch.randn(rows, heads, device="cuda")
        self.k = e4m3(torch.randn(keys, 128, device="cuda"))
        self.scale = 0.5 + torch.rand(keys, device="cuda")
        self.start = int32(rows, 0)
        self.end = torch.arange(keys - rows + 1, keys + 1, dtype=torch.int32, device="cuda")
        if not causal:
            self.end.fill_(keys)
        self.flop = 2 * heads * 128 * int(self.end.sum())

    def reference(self, _, row):
        n = int(self.end[row])
        return weighted(self.q[row], self.w[row], self.k[:n], self.scale[:n])

    def desc(self, _):
        return ix.IndexerDesc(
            q=our_e4m3(self.q), weights=self.w, k=our_e4m3(self.k), k_scale=self.scale, row_end=self.end
        )


class Attend:
    """Sparse attention over a store of bf16 or 656-byte KV rows: q [rows, heads, 576], and slots [rows, K] a set."""

    def __init__(self, rows, heads, tokens, fp8, slots):
        self.rows, self.heads, self.fp8, self.slots = rows, heads, fp8, slots
        self.q = torch.randn(rows, heads, D_QK, device="cuda").bfloat16()
        self.kv = store(tokens, fp8)

    @property
    def flop(self):
        return 2 * self.rows * self.heads * K * (D_QK + D_V)

    @property
    def bytes(self):
        return self.rows * K * self.kv[0].numel() * self.kv.element_size()

    def reference(self, i, row):
        """Output of one row, in float64."""
        kv = dequantised(self.kv[self.slots[i][row].long()]).double()
        return (self.q[row].double() @ kv.T * SCALE).softmax(-1) @ kv[:, :D_V]


_stores = {}  # Filling one takes longer than a case.


def store(tokens, fp8):
    if (tokens, fp8) not in _stores:
        _stores.clear()
        kv = torch.empty(tokens, D_QK, dtype=torch.bfloat16, device="cuda").normal_()
        if fp8:
            pages = torch.empty(tokens // 64, 64, 656, dtype=torch.uint8, device="cuda")
            slots = torch.arange(tokens, dtype=torch.int32, device="cuda")
            for part, at in zip(kv.split(1 << 14), slots.split(1 << 14)):  # It looks for slots named twice.
                ix.kv_write(Ours.context(), ix.KvWriteDesc(kv=part, slots=at, pages=pages), Ours.stream())
            kv = pages.view(tokens, 656)
        _stores[tokens, fp8] = kv
    return _stores[tokens, fp8]


def dequantised(kv):
    """KV rows as bf16 or, of 656 bytes, as float32."""
    if kv.dtype != torch.uint8:
        return kv
    scale = kv[..., 512:528].contiguous().view(torch.float32)
    latent = kv[..., :512].contiguous().view(torch.float8_e4m3fn).float().unflatten(-1, (4, 128)) * scale.unsqueeze(-1)
    return torch.cat([latent.flatten(-2), kv[..., 528:].contiguous().view(torch.bfloat16).float()], -1)


def distinct(rows, tokens, order):
    """K tokens a row: in random order, ascending, or ascending with 90 % shared by 64 neighbours."""
    part = max(1, (1 << 28) // tokens)
    rows_of = [torch.rand(min(part, rows - at), tokens, device="cuda").topk(K).indices for at in range(0, rows, part)]
    slots = torch.cat(rows_of).to(torch.int32)
    if order == "90 % shared":
        shared = K * 9 // 10
        slots[:, :shared] = slots[::64, :shared].repeat_interleave(64, 0)[:rows]
    return slots if order == "random" else slots.sort(-1).values


def weighted(q, w, k, scale):
    dots = (k.double() @ q.double().T).relu_()
    return (dots @ w.double()) * scale.double()


# --- Checks.


def wrong_topk(logits, end):
    """Sets against a stable sort: equal values may stand for each other, but the note says if all were the lowest."""

    def check(_, indices):
        wrong, lowest = 0, True
        rows = sorted({0, len(logits) - 1} | set(range(0, len(logits), max(1, len(logits) // CHECKED_ROWS))))
        for r in rows:
            row = logits[r, : int(end[r])]
            want = row.sort(descending=True, stable=True)
            got = indices[r].long().sort().values
            inside = bool((got >= 0).all() and (got < len(row)).all()) and got.unique().numel() == K
            same = inside and torch.equal(row[got].sort(descending=True).values, want.values[:K])
            wrong += not same
            lowest &= bool(same and torch.equal(got, want.indices[:K].sort().values))
        return wrong, "" if lowest or wrong else "ties not lowest"

    return check


def wrong_select(inputs):
    """Sets against float64 scores; the note is by how much the best one left out beats the worst one taken."""

    def check(i, indices):
        wrong, worst = 0, 0.0
        rows = len(indices)
        for r in sorted({0, rows - 1} | set(range(0, rows, max(1, rows // CHECKED_ROWS)))):
            row = inputs.reference(i, r)
            got = indices[r].long()
            if not ((got >= 0).all() and (got < len(row)).all()) or got.unique().numel() != K:
                wrong += 1
                continue
            left = row.clone()
            left[got] = -torch.inf
            gap = float((left.max() - row[got].min()) / row.std())
            worst = max(worst, gap)
            wrong += gap > TOLERANCE
        return wrong, f"gap {worst:.0e}"

    return check


def close_logits(inputs):
    """Scores against float64; the note is the error relative to the reference's norm."""

    def check(i, logits):
        want = inputs.reference(i, 0)
        error = float((logits[0, : len(want)].double() - want).norm() / want.norm())
        return int(error > TOLERANCE), f"error {error:.0e}"

    return check


def close_attention(x):
    """Outputs against float64; the note is the largest error relative to its row's norm."""

    def check(i, out):
        wrong, worst = 0, 0.0
        for r in sorted({0, x.rows - 1} | set(range(0, x.rows, max(1, x.rows // CHECKED_ROWS)))):
            want = x.reference(i, r)
            error = float((out[r, : x.heads].double() - want).norm() / want.norm())
            worst = max(worst, error)
            wrong += not error <= ATTENTION_ERROR
        return wrong, f"error {worst:.0e}"

    return check


# --- Candidates.


def public_topk(have, rows):
    """Public top-k by name: functions of scores and row ends."""
    zeros, found = int32(rows, 0), {}
    if "FlashInfer" in have:
        module = sys.modules["flashinfer.topk"]  # The package has a function of that name, too.

        def flashinfer(x, end, **options):
            if x.is_contiguous():
                return module.top_k_ragged_transform(x, zeros, end, K, **options)
            # DeepGEMM pads rows; the function that takes them also translates, here each position to itself.
            return module.top_k_page_table_transform(x, positions, end, K, row_to_batch=zeros, **options)

        positions = torch.arange(1 << 17, dtype=torch.int32, device="cuda").view(1, -1)
        found["FlashInfer"] = flashinfer
        found["FlashInfer deterministic"] = lambda x, end: flashinfer(x, end, deterministic=True)
        found["FlashInfer tie-small"] = lambda x, end: flashinfer(x, end, deterministic=True, tie_break=1)
        if rows <= 64:  # Not what it takes on Hopper by itself, but it runs.
            clusters = module.topk_clusters_ragged_transform
            found["FlashInfer clusters"] = lambda x, end: clusters(x, end, zeros, K)
    if "SGLang" in have:
        found["SGLang fast_topk"] = lambda x, end: have["SGLang"].fast_topk_v2(x, end, K)
    if "vLLM" in have:
        workspace = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")

        def vllm(name):
            def call(x, end):
                out = torch.empty(rows, K, dtype=torch.int32, device="cuda")
                if name == "top_k_per_row_prefill":
                    torch.ops._C.top_k_per_row_prefill(x, zeros, end, out, rows, *x.stride(), K)
                else:
                    getattr(torch.ops._C, name)(x, end, out, workspace, K, x.shape[1])
                return out

            return call

        found["vLLM per row"] = vllm("top_k_per_row_prefill")
        found["vLLM persistent"] = vllm("persistent_topk")
        if rows <= 32:
            found["vLLM cooperative"] = vllm("cooperative_topk")
    return found


def public_attention(have, x, queries):
    """Public sparse attention by name: functions of a set's number. `queries` of a request, 0 for prefill."""
    found = {}
    heads = 64 if x.heads <= 64 else 128
    if "FlashMLA" in have and heads in (64, 128):
        mla = have["FlashMLA"]
        name = "FlashMLA" if heads == x.heads else f"FlashMLA, padded to {heads}"
        q = torch.zeros(x.rows, heads, D_QK, dtype=torch.bfloat16, device="cuda")  # Padding costs it nothing here.
        q[:, : x.heads] = x.q
        if queries == 0 and not x.fp8:
            found[name] = lambda i: mla.flash_mla_sparse_fwd(
                q, x.kv.unsqueeze(1), x.slots[i].unsqueeze(1), SCALE, use_legacy=True
            )[0]
        if queries and x.fp8:
            schedule, _ = mla.get_mla_metadata()  # The first call fills it: once a step, for all layers.
            pages = x.kv.view(-1, 64, 1, 656)
            found[name] = lambda i: mla.flash_mla_with_kvcache(
                q.view(-1, queries, heads, D_QK),
                pages,
                None,
                None,
                D_V,
                schedule,
                softmax_scale=SCALE,
                is_fp8_kvcache=True,
                indices=x.slots[i].view(-1, queries, K),
                use_legacy=True,
            )[0].view(x.rows, heads, D_V)
    if "FlashInfer MLA" in have and not x.fp8:
        module = sys.modules["flashinfer.mla"]
        workspace = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
        ends = torch.arange(x.rows + 1, dtype=torch.int32, device="cuda")
        q_nope, q_pe = (part.contiguous() for part in x.q.split((D_V, D_QK - D_V), -1))
        latent, rope = (part.unsqueeze(1) for part in x.kv.split((D_V, D_QK - D_V), -1))

        def flashinfer(slots):
            """Pages of one token; the schedule of the host's is not timed."""
            wrapper = module.BatchMLAPagedAttentionWrapper(workspace, backend="fa3")
            wrapper.plan(
                qo_indptr=ends,
                kv_indptr=ends * K,
                kv_indices=slots.flatten(),
                kv_len_arr=int32(x.rows, K),
                num_heads=x.heads,
                head_dim_ckv=D_V,
                head_dim_kpe=D_QK - D_V,
                page_size=1,
                causal=False,
                sm_scale=SCALE,
                q_data_type=torch.bfloat16,
                kv_data_type=torch.bfloat16,
            )
            return lambda: wrapper.run(q_nope=q_nope, q_pe=q_pe, ckv_cache=latent, kpe_cache=rope)

        runs = [flashinfer(slots) for slots in x.slots]
        found["FlashInfer fa3, pages of 1"] = lambda i: runs[i]()

    def eager(i):
        out = torch.empty(x.rows, x.heads, D_V, dtype=torch.bfloat16, device="cuda")
        for at in range(0, x.rows, 128):
            kv = dequantised(x.kv[x.slots[i][at : at + 128].long()]).bfloat16()
            p = (x.q[at : at + 128] @ kv.mT).float().mul_(SCALE).softmax(-1)
            out[at : at + 128] = p.bfloat16() @ kv[..., :D_V]
        return out

    found["torch gather and matmul"] = eager
    return found


class Ours:
    """The library through its C functions, on torch's stream and over torch's memory."""

    @staticmethod
    @functools.cache
    def context():
        return ix.Context(ix.ContextDesc(backend=ix.BACKEND_CUDA))

    @staticmethod
    def stream():
        return torch.cuda.current_stream().cuda_stream

    def select(self, inputs, rows):
        out = torch.empty(1, rows, K, dtype=torch.int32, device="cuda")
        plan = ix.Plan.from_pattern(ix.ModelDesc(layers=1, topk=K), "F")
        cache = ix.Cache(self.context(), plan, ix.CacheDesc(max_rows=rows, buffer=out))
        cache.step_begin(lane=0, rows=rows, step_id=1)
        workspace = torch.empty(max(cache.select_workspace(inputs.desc(0)), 1), dtype=torch.uint8, device="cuda")

        def call(i):
            cache.select(0, 0, inputs.desc(i), workspace, self.stream())
            return out[0]

        return call

    def logits(self, inputs, rows, columns):
        out = torch.empty(rows, columns, device="cuda")
        write = ix.paged_indexer_logits if isinstance(inputs, Paged) else ix.indexer_logits

        def call(i):
            write(self.context(), inputs.desc(i), out, self.stream())
            return out

        return call

    def topk(self, sets, end):
        out = torch.empty(len(end), K, dtype=torch.int32, device="cuda")
        descs = [ix.TopkDesc(logits=x, indices=out, row_end=end) for x in sets]
        size = max(max(ix.topk_workspace(self.context(), d) for d in descs), 1)
        workspace = torch.empty(size, dtype=torch.uint8, device="cuda")

        def call(i):
            ix.topk(self.context(), descs[i], workspace, self.stream())
            return out

        return call

    def attention(self, x):
        out = torch.empty(x.rows, x.heads, D_V, dtype=torch.bfloat16, device="cuda")
        kv = x.kv.view(-1, 64, x.kv.shape[-1])
        desc = ix.AttentionDesc(q=x.q, kv=kv, out=out, softmax_scale=SCALE)
        size = max(ix.sparse_attention_workspace(self.context(), desc, x.slots[0], ix.FORM_SLOTS), 1)
        workspace = torch.empty(size, dtype=torch.uint8, device="cuda")

        def call(i):
            ix.sparse_attention(self.context(), desc, x.slots[i], ix.FORM_SLOTS, workspace, self.stream())
            return out

        return call


# --- Sections.


def prefill(have, ours, results, shapes=((8192, True), (32768, False), (131072, False)), rows=4096, all_heads=(32, 64)):
    for heads in all_heads:
        for keys, causal in shapes:
            x = Contiguous(rows, keys, heads, causal)
            name = f"{rows} x {keys}{' causal' if causal else ''}, {heads} heads"
            scored = Case("logits", name, 1, flop=x.flop)
            case = Case("prefill", name, 1, flop=x.flop)
            if "DeepGEMM" in have:
                dg = have["DeepGEMM"]
                logits = lambda _: dg.fp8_mqa_logits(x.q, (x.k, x.scale), x.w, x.start, x.end, clean_logits=False)
                scored.add("DeepGEMM", logits, close_logits(x))
                for peer, topk in public_topk(have, rows).items():
                    case.add(f"DeepGEMM + {peer}", lambda i, topk=topk: topk(logits(i), x.end), wrong_select(x))
            scored.add("indexcache", ours.logits(x, rows, keys), close_logits(x))
            case.add("indexcache", ours.select(x, rows), wrong_select(x))
            run(scored, results)
            run(case, results)


def decode(have, ours, results, all_requests=(1, 16, 64), all_keys=(32768, 131072), all_heads=(32, 64)):
    for heads in all_heads:
        for requests in all_requests:
            for keys in all_keys:
                bytes = requests * keys * 132
                sets = min(max(-(-2 * L2 // bytes), 1), 64)
                x = Paged(requests, keys, heads, sets)
                name = f"{requests} x {keys}, {heads} heads"
                scored = Case("logits", "paged " + name, sets, bytes=bytes)
                case = Case("decode", name, sets, bytes=bytes)
                if "DeepGEMM" in have:
                    dg = have["DeepGEMM"]
                    lens, sms = x.end.view(-1, 1), torch.cuda.get_device_properties(0).multi_processor_count
                    schedule = dg.get_paged_mqa_logits_metadata(lens, 64, sms)  # Once a step, for all layers.

                    def logits(i):
                        kv = x.pages[i].view(-1, 64, 1, 132)
                        return dg.fp8_paged_mqa_logits(
                            x.q[i].unsqueeze(1), kv, x.w, lens, x.table, schedule, keys, clean_logits=False
                        )

                    scored.add("DeepGEMM", logits, close_logits(x))
                    for peer, topk in public_topk(have, requests).items():
                        case.add(f"DeepGEMM + {peer}", lambda i, topk=topk: topk(logits(i), x.end), wrong_select(x))
                scored.add("indexcache", ours.logits(x, requests, keys), close_logits(x))
                case.add("indexcache", ours.select(x, requests), wrong_select(x))
                run(scored, results)
                run(case, results)


def topk_case(have, ours, results, section, kind, rows, columns):
    bytes = rows * columns * 4
    sets = min(max(-(-2 * L2 // bytes), 1), 16)
    xs, end = [scores(kind, rows, columns) for _ in range(sets)], int32(rows, columns)
    case = Case(section, f"{rows} x {columns}{', ' + kind if kind else ''}", sets, bytes=bytes)
    check = wrong_topk(xs[0], end)
    for peer, topk in public_topk(have, rows).items():
        case.add(peer, lambda i, topk=topk: topk(xs[i], end), check)
    if not kind:
        case.add("torch.topk", lambda i: xs[i].topk(K, sorted=False).indices, check)
    case.add("indexcache", ours.topk(xs, end), check)
    run(case, results)


def topk(have, ours, results, all_rows=(1, 64, 4096), all_columns=(8192, 32768, 131072)):
    for rows in all_rows:
        for columns in all_columns:
            topk_case(have, ours, results, "top-k", "", rows, columns)


def hard(have, ours, results, shapes=((1, 131072), (64, 131072), (1024, 32768))):
    for rows, columns in shapes:
        for kind in KINDS:
            topk_case(have, ours, results, "hard", kind, rows, columns)


def attend_case(have, ours, results, section, name, x, queries):
    work = {"bytes": x.bytes} if queries else {"flop": x.flop}
    case = Case(section, name, len(x.slots), **work)
    for peer, call in public_attention(have, x, queries).items():
        case.add(peer, call, close_attention(x))
    case.add("indexcache", ours.attention(x), close_attention(x))
    run(case, results)


def attend(have, ours, results, rows=4096, all_tokens=(32768, 131072), few=(8, 16, 20, 32)):
    """Prefill over bf16 rows; few heads on ascending indices, which is what select gives."""
    for tokens in all_tokens:
        for order in ("random", "ascending", "90 % shared"):
            slots = [distinct(rows, tokens, order)]
            for heads in (64, 128) + (few if order == "ascending" else ()):
                x = Attend(rows, heads, tokens, False, slots)
                attend_case(have, ours, results, "attend", f"{rows} x {heads} heads, KV {tokens}, {order}", x, 0)


def attend_decode(have, ours, results, all_requests=(1, 16, 64), context=32768, few=(8, 16, 20, 32)):
    """Each request has 32768 tokens, in pages of 64 anywhere in a store much larger than L2, and so has each set."""
    for fp8 in (True, False):
        width = 656 if fp8 else 2 * D_QK
        for requests in all_requests:
            for queries in (1, 2) if fp8 else (1,):
                rows = requests * queries
                sets = min(max(-(-2 * L2 // (rows * K * width)), 1), 64)
                tokens = 64 * context
                first = torch.arange(rows, device="cuda").unsqueeze(1) // queries * (context // 64)
                slots = []
                for _ in range(sets):
                    table = torch.randperm(tokens // 64, device="cuda").to(torch.int32)
                    logical = distinct(rows, context, "ascending").long()
                    slots.append(table[first + logical // 64] * 64 + (logical % 64).to(torch.int32))
                for heads in (64, 128) + (few if queries == 1 else ()):
                    x = Attend(rows, heads, tokens, fp8, slots)
                    kind = "fp8" if fp8 else "bf16"
                    name = f"{kind} {requests} x {queries} queries x {heads} heads"
                    attend_case(have, ours, results, "attend decode", name, x, queries)


def rate(row):
    return f"{row['tflops']:.0f} TFLOP/s" if "tflops" in row else f"{row['gbs']:.0f} GB/s" if "gbs" in row else ""


def state(row):
    wrong, exact = f"{row['wrong']} ROWS WRONG", "" if row["note"].startswith("error") else "exact"
    parts = [wrong if row["wrong"] else exact, "varies" if row.get("varies") else "", row["note"]]
    return ", ".join(part for part in parts if part)


def markdown(results, head):
    """Each case's fastest peer whose result is right, beside ours; then everything."""
    text = "\n".join(f"{key}: {value}" for key, value in head.items()) + "\n\n"
    text += "| | work | fastest right peer | µs | indexcache, µs | times as fast |\n|---|---|---|---:|---:|---:|\n"
    done = [r for r in results if "us" in r]
    for section, case in dict.fromkeys((r["section"], r["case"]) for r in done):
        rows = [r for r in done if (r["section"], r["case"]) == (section, case)]
        ours = [r for r in rows if r["peer"] == "indexcache"]
        peers = [r for r in rows if r["peer"] != "indexcache" and not r["wrong"]]
        if ours and peers:
            best, us = min(peers, key=lambda r: r["us"]), ours[0]["us"]
            text += f"| {section} | {case} | {best['peer']} | {best['us']:.2f} | {us:.2f} | {best['us'] / us:.2f} |\n"
    for section in dict.fromkeys(r["section"] for r in results):
        text += f"\n## {section}\n\n| work | | µs | rate | result |\n|---|---|---:|---:|---|\n"
        for r in (r for r in results if r["section"] == section):
            peer = f"**{r['peer']}**" if r["peer"] == "indexcache" else r["peer"]
            cells = ["", "", r["error"]] if "error" in r else [f"{r['us']:.2f}", rate(r), state(r)]
            text += " | ".join([f"| {r['case']}", peer, *cells]) + " |\n"
    return text


SECTIONS = {
    "prefill": prefill,
    "decode": decode,
    "topk": topk,
    "hard": hard,
    "attend": attend,
    "attend-decode": attend_decode,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for peers.json and peers.md")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--commit", default="", help="of the library, to be written down")
    args = parser.parse_args()
    torch.manual_seed(0)
    have, lack = importable()
    smi = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    head = {
        "commit": args.commit,
        "command": "benches/peers.py " + " ".join(a for a in sys.argv[1:]),
        "card": subprocess.run(smi, capture_output=True, text=True).stdout.strip(),
        "torch": torch.__version__,
        **{name: getattr(module, "__version__", "?") for name, module in have.items()},
        **{name: f"not imported: {why}" for name, why in lack.items()},
    }
    print(*(f"{key}: {value}" for key, value in head.items()), sep="\n", flush=True)
    results, ours = [], Ours()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        SECTIONS[name](have, ours, results)
        # After each: a run that is stopped leaves what it has.
        lines = ",\n".join(json.dumps(row) for row in results)
        (args.out / "peers.json").write_text(json.dumps(head)[:-1] + f', "runs": [\n{lines}\n]}}\n')
        (args.out / "peers.md").write_text(markdown(results, head))


if __name__ == "__main__":
    main()
