"""The whole decoder of the paper's 30B model with random weights on one GPU: standard DSA on public kernels, the same
on this library, and IndexCache on both, taking turns in one process.

    PYTHONPATH=bindings/python/src INDEXCACHE_LIBRARY=target/release/libindexcache.so \\
        python benches/stack/stack.py --out DIR

Prefill: whole prompts in chunks, seconds until the next token is known. Decode: steps in CUDA graphs. Results are
written after every measurement, and `report.py` makes tables and plots of them.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import arms
import glue
import indexcache as ix
from model import PAGE, ROOM, TINY, Batch, Dims, Model, Pool

RESERVE = 8 << 30  # Bytes left to activations, the public kernels' scores and the graphs.
STEPS = 8  # Decode steps between two events.

ARMS = {
    "a": ("standard DSA, public kernels", "public", "full"),
    "b": ("standard DSA, indexcache", "indexcache", "full"),
    "c": ("IndexCache 1/2, indexcache", "indexcache", "half"),
    "d": ("IndexCache 1/4, indexcache", "indexcache", "quarter"),
    "e": ("IndexCache 1/4, public kernels", "public", "quarter"),
}


def pattern(name, layers):
    text = {"full": "F" * layers, "half": arms.HALF, "quarter": arms.QUARTER}[name]
    return text[:layers]


class Bench:
    def __init__(self, args):
        self.args, self.device, self.started = args, args.device, time.time()
        dims = TINY if args.tiny else Dims()
        self.dims = dims = dataclasses.replace(dims, layers=args.layers or dims.layers)
        torch.manual_seed(0)
        if self.device == "cuda":
            torch.cuda.set_device(0)
            torch.empty(1, device="cuda")  # The library takes the context that is current.
        self.context = ix.Context(ix.ContextDesc(backend=ix.BACKEND_CUDA if self.device == "cuda" else ix.BACKEND_CPU))
        self.model = Model(dims, self.device, max(args.contexts) + ROOM)
        self.sync()
        if self.device == "cuda":
            free = torch.cuda.mem_get_info()[0] - RESERVE
            capacity = free // Pool.token_bytes(dims)
        else:
            capacity = 4 * max(args.contexts)
        self.pool = Pool(dims, min(capacity, args.pool or capacity), self.device)
        self.arms, shared = {}, arms.Shared()
        for name in args.arms:
            _, by, plan = ARMS[name]
            kind = arms.Public if by == "public" else arms.Ours
            text = pattern(plan, dims.layers)
            try:
                self.arms[name] = kind(self.context, dims, text, self.device, args.chunk, self.model.k, shared)
            except Exception as e:
                print(f"arm {name} left out: {type(e).__name__}: {e}", flush=True)
                continue
        self.results = []
        args.out.mkdir(parents=True, exist_ok=True)
        head = {
            "commit": args.commit,
            "command": "benches/stack/stack.py " + " ".join(sys.argv[1:]),
            "card": card() if self.device == "cuda" else "none",
            "torch": torch.__version__,
            "dims": dataclasses.asdict(dims),
            "chunk": args.chunk,
            "arms": {n: {"what": ARMS[n][0], "by": ARMS[n][1], "pattern": a.pattern} for n, a in self.arms.items()},
            "pool_tokens": self.pool.pages * PAGE,
            "weights_bytes": sum(t.numel() * t.element_size() for t in tensors(self.model.w)),
            "setup_seconds": round(time.time() - self.started, 1),
        }
        self.head = head
        print(json.dumps({k: v for k, v in head.items() if k not in ("arms", "dims")}), flush=True)

    def sync(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

    def keep(self, row):
        self.results.append(row)
        lines = ",\n".join(json.dumps(r) for r in self.results)
        text = json.dumps(self.head)[:-1] + f', "runs": [\n{lines}\n]}}\n'
        (self.args.out / "stack.json").write_text(text)

    def spent(self):
        return time.time() - self.started

    def late(self):
        return self.args.seconds and self.spent() > self.args.seconds

    def attempt(self, what, call, *args):
        """One measurement, again if memory ran out by how it was cut up; a failure is written down."""
        for again in (True, False):
            if self.late():
                return
            try:
                return call(*args)
            except Exception as e:
                print(f"{what}: {type(e).__name__}: {e}"[:300], flush=True)
                if "out of memory" not in str(e) or not again:
                    self.keep({"kind": "failed", "what": what, "why": str(e)[:300]})
                    return
            self.sync()
            torch.cuda.empty_cache()

    # --- Prefill.

    def prefill(self, name, context, keep=True, ends_only=False):
        """One prompt from the first chunk to the next token. `ends_only`: its first and last chunk, to warm up."""
        arm, model, pool = self.arms[name], self.model, self.pool
        table = pool.tables(1, context + ROOM)
        tokens = by_token(table)
        ids = torch.randint(self.dims.vocabulary, (context,), device=self.device)
        clock, chunks = Clock(self.device), []
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.sync()
        begun = time.perf_counter()
        starts = range(0, context, self.args.chunk)
        for start in starts if not ends_only else dict.fromkeys((starts[0], starts[-1])):
            stop = min(start + self.args.chunk, context)
            pages = -(-stop // PAGE)
            batch = Batch(
                decode=False,
                table=table[:, :pages],
                tokens=tokens,
                end=torch.arange(start + 1, stop + 1, dtype=torch.int32, device=self.device),
                longest=stop,
            )
            clock.mark("")
            x, delta = model.forward(ids[start:stop], batch, arm, pool, clock.mark)
            if stop == context:
                model.next_token(x, delta, slice(-1, None))
            clock.mark("head")
            chunks.append({"rows": stop - start, "end": stop})
        self.sync()
        seconds = time.perf_counter() - begun
        for chunk, stages in zip(chunks, clock.read()):
            chunk["ms"] = round(sum(stages.values()), 4)
            chunk["stages"] = {k: round(v, 4) for k, v in stages.items()}
        row = {"kind": "prefill", "arm": name, "context": context, "seconds": seconds, "chunks": chunks}
        if self.device == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
        if keep:
            if isinstance(arm, arms.Ours):
                row["selection"] = selection(arm.indices(self.dims.layers - 1, chunks[-1]["rows"]), batch.end)
            self.keep(row)
        total = {}
        for chunk in chunks:
            for k, v in chunk["stages"].items():
                total[k] = total.get(k, 0) + v
        shares = " ".join(f"{k} {v:.0f}" for k, v in sorted(total.items(), key=lambda kv: -kv[1]))
        peak = row.get("peak_bytes", 0) / 1e9
        if ends_only:
            return x, delta
        print(f"{self.spent():6.1f}s prefill {name} {context}: {seconds:.3f} s, events {sum(total.values())/1e3:.3f} s,"
              f" peak {peak:.1f} GB; ms: {shares}", flush=True)  # fmt: skip
        return x, delta

    # --- Decode.

    def batch(self, requests, context):
        table = self.pool.tables(requests, context + ROOM)
        return Batch(
            decode=True,
            table=table,
            tokens=by_token(table),
            end=torch.full((requests,), context + 1, dtype=torch.int32, device=self.device),
            longest=context + ROOM,
        )

    def first_ids(self, requests):
        """A token for each request, so that they go different ways through the experts."""
        return torch.arange(requests, device=self.device) * 37 % self.dims.vocabulary

    def step(self, name, batch, ids, mark=lambda stage: None):
        x, delta = self.model.forward(ids, batch, self.arms[name], self.pool, mark)
        ids.copy_(self.model.next_token(x, delta))
        batch.end += 1
        mark("head")
        return x

    def capture(self, name, requests, context, marks=False):
        """A graph of one step; gives a function that sets lengths back and replays `n` steps."""
        batch = self.batch(requests, context)
        first = self.first_ids(requests)
        ids = first.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(name, batch, ids)
        stream.synchronize()
        graph, clock = torch.cuda.CUDAGraph(), Clock("cuda", external=True)
        with torch.cuda.graph(graph, stream=stream):
            clock.mark("")
            x = self.step(name, batch, ids, clock.mark if marks else lambda stage: None)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def run(n):
            batch.end.fill_(context + 1)
            ids.copy_(first)
            start.record()
            for _ in range(n):
                graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / n

        run.clock, run.graph, run.batch, run.ids, run.x = clock, graph, batch, ids, x
        return run

    def decodes(self, context):
        """One request, the largest batch, and for the simulator some between."""
        largest = self.largest(context)
        for requests in sorted({1, largest, *(n for n in self.args.requests if n < largest)}):
            if requests:
                self.pool.copy_first(self.pool.tables(requests, context + ROOM))
                some = None if requests in (1, largest) else "ad"
                names = [n for n in self.arms if some is None or n in some]
                self.attempt(f"decode {requests} x {context}", self.decode, context, requests, names)

    def decode(self, context, requests, names, rounds=5):
        runs = {}
        choice = None
        for name in names:
            arm = self.arms[name]
            if isinstance(arm, arms.Public):
                choice = choice or self.fastest_topk(arm, requests, context)
                arm.decode_topk = choice
            runs[name] = self.capture(name, requests, context)
        times = {name: [] for name in runs}
        for i in range(rounds + 1):
            for name, run in runs.items():
                t = run(STEPS)
                if i:
                    times[name].append(t)
        for name, t in times.items():
            marked = self.capture(name, requests, context, marks=True)
            stages = []
            for _ in range(5):
                whole = marked(1)
                stages.append(marked.clock.read()[0])
            middle = {k: statistics.median(s[k] for s in stages) for k in stages[0]}
            row = {
                "kind": "decode", "arm": name, "context": context, "requests": requests, "ms": statistics.median(t),
                "all_ms": t, "marked_ms": whole, "stages": middle, "topk": getattr(self.arms[name], "decode_topk", ""),
            }  # fmt: skip
            self.keep(row)
            shares = " ".join(f"{k} {v:.2f}" for k, v in sorted(middle.items(), key=lambda kv: -kv[1]))
            print(f"{self.spent():6.1f}s decode {name} {requests} x {context}: {row['ms']:.3f} ms "
                  f"({min(t):.3f} to {max(t):.3f}), marked {whole:.2f}; {shares}", flush=True)  # fmt: skip
            del marked
        del runs

    def fastest_topk(self, arm, requests, context):
        """The public top-k to stand for this shape: all of them are exact, this one is the fastest."""
        batch, best = self.batch(requests, context), {}
        logits = torch.randn(requests, -(-batch.longest // 256) * 256, device="cuda")
        for name, call in arms.DECODE_TOPK.items():
            try:
                best[name] = time_graph(lambda: call(arm, logits, batch), 20)
            except Exception as e:
                print(f"top-k {name}: {type(e).__name__}: {e}"[:200], flush=True)
        choice = min(best, key=best.get)
        self.keep({"kind": "top-k", "requests": requests, "context": context, "us": best})
        return choice

    def largest(self, context):
        return min(self.pool.pages // -(-(context + ROOM) // PAGE), glue_few(self.device))


def glue_few(device):
    return glue.Triton.FEW if device == "cuda" else 4


def time_graph(call, calls):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(4):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times[1:])


class Clock:
    """Events between stages. `mark("")` begins a part, `mark(stage)` ends a piece of that stage."""

    def __init__(self, device, external=False):
        self.device, self.marks = device, []
        self.options = {"external": True} if external else {}

    def mark(self, stage):
        if self.device == "cuda":
            now = torch.cuda.Event(enable_timing=True, **self.options)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((stage, now))

    def read(self):
        """Milliseconds by stage of each part."""
        parts, last = [], None
        for stage, now in self.marks:
            if stage == "":
                parts.append({})
            else:
                ms = last.elapsed_time(now) if self.device == "cuda" else (now - last) * 1e3
                parts[-1][stage] = parts[-1].get(stage, 0) + ms
            last = now
        return parts


def selection(indices, end):
    """What the last Full layer chose, for the rows that had a choice: is it a selection as of scores without structure?"""
    some = torch.linspace(0, len(end) - 2, min(64, len(end) - 1), device=end.device).long()
    some = some[end[some] > indices.shape[1]]
    one, other = indices[some].long(), indices[some + 1].long()
    seen = end[some].unsqueeze(1).double()
    alike = [torch.isin(a, b).double().mean() for a, b in zip(one, other)]
    return {
        "distinct": bool((one.diff(dim=1) > 0).all()),
        "mean place": float((one / seen).mean()),  # 0.5 of what a row sees, if spread evenly.
        "spread": float((one / seen).std()),  # 0.29, if spread evenly.
        "alike with the next row": float(torch.stack(alike).mean()),
        "of what a row sees": float((indices.shape[1] / seen).mean()),
    }


def by_token(table):
    return (table.unsqueeze(-1) * PAGE + torch.arange(PAGE, dtype=torch.int32, device=table.device)).view(
        len(table), -1
    )


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif tree is not None:
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors(child)


def card():
    smi = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(smi, capture_output=True, text=True).stdout.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for stack.json")
    parser.add_argument("--contexts", nargs="+", type=int, default=[n << 10 for n in (200, 60, 120, 10)])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list("adbec"), help="in the order of their turns")
    parser.add_argument(
        "--only", nargs="+", choices=["check", "prefill", "decode"], default=["check", "prefill", "decode"]
    )
    parser.add_argument(
        "--requests", nargs="+", type=int, default=[2, 4, 8, 16], help="more decode batches, of (a) and (d)"
    )
    parser.add_argument(
        "--repeat", type=int, nargs="+", default=[2, 3, 3, 5], help="prompts of each length for each arm"
    )
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--layers", type=int, help="fewer than the model's, for a trial")
    parser.add_argument("--pool", type=int, help="tokens of KV at most")
    parser.add_argument("--seconds", type=float, help="begin nothing new after that long")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a small model, for a trial")
    parser.add_argument("--commit", default="", help="of the library, to be written down")
    args = parser.parse_args()
    with torch.inference_mode():
        bench = Bench(args)
        if "check" in args.only:
            import check

            check.run(bench)
        if "prefill" in args.only:
            for context in (min(args.contexts), max(args.contexts)):
                for name in bench.arms:
                    bench.attempt(f"warm {name} {context}", bench.prefill, name, context, False, True)
        repeat = args.repeat + args.repeat[-1:] * len(args.contexts)
        for turn in range(max(1, *repeat)):
            for context, turns in zip(args.contexts, repeat):
                if turn < turns and "prefill" in args.only:
                    for name in bench.arms:
                        bench.attempt(f"prefill {name} {context}", bench.prefill, name, context)
                if turn == 0 and "decode" in args.only and bench.device == "cuda":
                    bench.decodes(context)
        print(f"{bench.spent():.1f} s in all", flush=True)


if __name__ == "__main__":
    main()
