"""The same selection in PyTorch on the CPU: matmul, ReLU, weighted sum over heads, scale, top-k.

Run with `python benches/cpu_peers.py [--threads N] [--json]`. The faster of f32 and bf16 counts, and rows are cut
into chunks of whatever size is fastest for PyTorch, since all logits of all heads at once would not fit in the caches.
"""
import argparse
import json
import statistics
import time

import torch


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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--keys", type=int, default=32768)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dim, topk, keys = 128, 2048, args.keys
    results = []
    for heads, rows in [(32, 256), (32, 1), (64, 1)]:
        q, k = torch.randn(rows, heads, dim), torch.randn(keys, dim)
        w, scale = torch.rand(rows, heads), torch.rand(keys)
        best = None
        for dtype in (torch.float32, torch.bfloat16):
            x = [t.to(dtype) for t in (q, w, k)]
            for chunk in sorted({min(rows, c) for c in (1, 4, 16)}):
                wall, cpu = median(lambda: select(*x, scale, topk, chunk))
                if best is None or wall < best["ms"] / 1e3:
                    best = {"ms": wall * 1e3, "cpu_ms": cpu * 1e3, "dtype": str(dtype)[6:], "chunk": chunk}
        best.update(op="select", rows=rows, heads=heads, keys=keys, topk=topk)
        best["gflops"] = 2 * rows * heads * dim * keys / best["ms"] / 1e6
        results.append(best)
    for rows in (16, 1):
        heads, d_qk, d_v, tokens = 64, 576, 512, 16384
        q, kv = torch.randn(rows, heads, d_qk), torch.randn(tokens, d_qk)
        indices = torch.stack([torch.randperm(tokens)[:topk].sort().values for _ in range(rows)])
        best = None
        for dtype in (torch.float32, torch.bfloat16):
            x = q.to(dtype), kv.to(dtype)
            wall, cpu = median(lambda: attention(*x, indices, d_v, d_qk**-0.5))
            if best is None or wall < best["ms"] / 1e3:
                best = {"ms": wall * 1e3, "cpu_ms": cpu * 1e3, "dtype": str(dtype)[6:]}
        best.update(op="attention", rows=rows, heads=heads, topk=topk)
        best["gflops"] = 2 * rows * heads * topk * (d_qk + d_v) / best["ms"] / 1e6
        results.append(best)
    if args.json:
        print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "runs": results}))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for r in results:
        what = ", ".join(f"{k} {v}" for k, v in r.items() if k not in ("op", "ms", "cpu_ms", "gflops"))
        times = f"{r['ms']:10.3f} ms ({r['cpu_ms']:.3f} of CPU time)"
        print(f"{r['op']:<10} {times} {r['gflops']:8.1f} GFLOP/s  ({what})")


if __name__ == "__main__":
    main()
