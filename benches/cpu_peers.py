"""The CPU operations beside the same work in PyTorch, in one process, taking turns.

    cargo build --release
    PYTHONPATH=bindings/python/src INDEXCACHE_LIBRARY=target/release/libindexcache.so python benches/cpu_peers.py

PyTorch's side is matmul, ReLU, weighted sum over heads, scale and top-k; gather, two matmuls and softmax. The faster of
f32 and bf16 counts, in chunks of rows of whatever size is fastest: all logits of all heads at once would fit no cache.
Ours reads fp8 keys, and bf16 and 656-byte KV. Medians of wall time; CPU time in brackets.
"""
import argparse
import json
import statistics
import time

import numpy as np
import torch

try:
    import indexcache as ix
except ImportError:  # PyTorch alone
    ix = None

def median(call):
    """Median wall and CPU seconds of a call, after one to warm up."""
    call()
    start, wall, cpu = time.perf_counter(), [], []
    while len(wall) < 5 or time.perf_counter() - start < 0.5:
        t, c = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - t)
        cpu.append(time.process_time() - c)
    return statistics.median(wall), statistics.median(cpu)


def select(q, w, k, scale, topk, chunk):
    rows, heads, dim = q.shape
    out = []
    for r in range(0, rows, chunk):
        part = q[r : r + chunk]
        dots = (part.reshape(-1, dim) @ k.T).relu_().view(part.shape[0], heads, -1)
        scores = torch.bmm(w[r : r + chunk].unsqueeze(1), dots).squeeze(1)
        out.append((scores.float() * scale).topk(topk, dim=-1).indices)
    return torch.cat(out)


def attention(q, kv, indices, d_v, scale):
    rows = kv[indices.long()]  # [rows, topk, d_qk]
    p = ((q @ rows.transpose(1, 2)).float() * scale).softmax(-1).to(q.dtype)
    return p @ rows[..., :d_v]


def best_of(candidates):
    """The fastest of several ways to do one thing: {ms, cpu_ms, what}."""
    times = [(*median(call), what) for what, call in candidates]
    wall, cpu, what = min(times)
    return {"ms": wall * 1e3, "cpu_ms": cpu * 1e3, "what": what}


def e4m3(x):
    return ix.as_dtype(x.to(torch.float8_e4m3fn).view(torch.uint8).numpy(), "float8_e4m3fn")


def our_select(context, q, w, k, topk):
    """A call of ``select`` through a cache, as a server makes it."""
    rows, heads, dim = q.shape
    keys = len(k)
    pages = np.zeros((keys // 64, 64 * (dim + 4)), np.uint8)
    slots = np.arange(keys, dtype=np.int32)
    ix.index_k_write(context, ix.IndexKWriteDesc(k=k.numpy(), slots=slots, pages=pages))
    desc = ix.IndexerDesc(
        q=e4m3(q),
        weights=w.numpy(),
        k=pages,
        block_table=np.random.default_rng(0).permutation(keys // 64).reshape(1, -1).astype(np.int32),
        row_end=np.full(rows, keys, np.int32),
    )
    plan = ix.Plan.from_pattern(ix.ModelDesc(layers=1, topk=topk), "F")
    cache = ix.Cache(context, plan, ix.CacheDesc(max_rows=rows))
    cache.step_begin(lane=0, rows=rows, step_id=1)
    workspace = np.zeros(cache.select_workspace(desc), np.uint8)
    return lambda: cache.select(0, 0, desc, workspace)


def our_attention(context, q, kv, indices, d_v, scale):
    """The call, over bf16 or over packed KV."""
    half = lambda x: ix.as_dtype(x.to(torch.bfloat16).view(torch.uint16).numpy(), "bfloat16")
    out = ix.as_dtype(np.zeros((*q.shape[:2], d_v), np.uint16), "bfloat16")
    desc = ix.AttentionDesc(q=half(q), kv=kv, out=out, softmax_scale=scale)
    indices = indices.to(torch.int32).numpy()
    workspace = np.zeros(ix.sparse_attention_workspace(context, desc, indices, ix.FORM_SLOTS), np.uint8)
    return lambda: ix.sparse_attention(context, desc, indices, ix.FORM_SLOTS, workspace=workspace)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--keys", type=int, default=32768)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    context = ix and ix.Context(ix.ContextDesc(backend=ix.BACKEND_CPU, threads=threads))
    topk, keys, results = 2048, args.keys, []
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}

    def compare(name, flop, theirs, ours):
        row = {"name": name, "flop": flop, "torch": best_of(theirs)}
        if ix:
            row["indexcache"] = best_of(ours())
            row["speedup"] = row["torch"]["ms"] / row["indexcache"]["ms"]
        results.append(row)

    for heads, rows in [(32, 256), (64, 256), (32, 1), (64, 1)]:
        q, k = torch.randn(rows, heads, 128), torch.randn(keys, 128)
        w, scale = torch.rand(rows, heads), torch.rand(keys)
        theirs = []
        for name, dtype in dtypes.items():
            x = [t.to(dtype) for t in (q, w, k)]
            for chunk in sorted({min(rows, c) for c in (1, 4, 16)}):
                call = lambda x=x, chunk=chunk: select(*x, scale, topk, chunk)
                theirs.append((f"{name}, {chunk} rows at a time", call))
        ours = lambda: [("fp8", our_select(context, q, w, k, topk))]
        compare(f"select, {rows} x {heads} heads x {keys} keys", 2 * rows * heads * 128 * keys, theirs, ours)

    heads, d_qk, d_v, tokens = 64, 576, 512, 16384
    for rows in (16, 1):
        q, kv = torch.randn(rows, heads, d_qk), torch.randn(tokens, d_qk)
        indices = torch.stack([torch.randperm(tokens)[:topk].sort().values for _ in range(rows)])
        theirs = []
        for name, dtype in dtypes.items():
            x = q.to(dtype), kv.to(dtype)
            theirs.append((name, lambda x=x: attention(*x, indices, d_v, d_qk**-0.5)))

        def ours():
            packed = np.zeros((tokens // 64, 64, 656), np.uint8)
            slots = np.arange(tokens, dtype=np.int32)
            ix.kv_write(context, ix.KvWriteDesc(kv=kv.numpy(), slots=slots, pages=packed))
            plain = ix.as_dtype(kv.to(torch.bfloat16).view(torch.uint16).numpy(), "bfloat16")
            stores = [("bf16", plain), ("656 B", packed)]
            return [(n, our_attention(context, q, s, indices, d_v, d_qk**-0.5)) for n, s in stores]

        name = f"attention, {rows} x {heads} heads, topk {topk}"
        compare(name, 2 * rows * heads * topk * (d_qk + d_v), theirs, ours)

    if args.json:
        print(json.dumps({"torch": torch.__version__, "threads": threads, "runs": results}))
        return
    print(f"torch {torch.__version__}, {threads} threads")
    for r in results:
        print(r["name"])
        for peer in ("torch", "indexcache"):
            if peer in r:
                x = r[peer]
                rate = r["flop"] / x["ms"] / 1e6
                print(f"  {peer:<11} {x['ms']:9.3f} ms ({x['cpu_ms']:9.3f}) {rate:7.1f} GFLOP/s  {x['what']}")
        if "speedup" in r:
            print(f"  {r['speedup']:.2f} times as fast")


if __name__ == "__main__":
    main()
