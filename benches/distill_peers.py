"""The distillation loss on a GPU beside the same work in PyTorch, in one process, taking turns.

    cargo build --release
    PYTHONPATH=bindings/python/src INDEXCACHE_LIBRARY=target/release/libindexcache.so python benches/distill_peers.py

One causal sequence; an indexer of 32 heads of 128 and a served layer of 128 heads of 576, all bf16; loss, and gradients
by q, k and the head weights. Two kinds of call: the target computed from the layer's queries, KV rows and log-sum-exp,
and the target given (float32 [rows, keys]). PyTorch's side is what one would write: the indexer's products of all heads
at once under autograd, with the target from groups of attention heads, so that 8K fits at all. `compile`: the same
functions under torch.compile, for each length anew. Medians of CUDA events, largest memory beyond the inputs, and errors against float64
(of gradients in bf16, as autograd wants them).
"""
import argparse
import json
import statistics

import torch

import indexcache as ix
from indexcache.distillation import Distillation

HEADS, DIM, ATTENTION_HEADS, D_QK = 32, 128, 128, 576
SCALE = D_QK**-0.5
GROUP = 16  # Attention heads at a time in PyTorch.


def inputs(n, seed=0):
    torch.manual_seed(seed)
    def make(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    x = dict(q=make(n, HEADS, DIM), k=make(n, DIM), attention_q=make(n, ATTENTION_HEADS, D_QK), kv=make(n, D_QK))
    x["weights"] = torch.randn(n, HEADS, device="cuda") * (HEADS * DIM) ** -0.5
    x["row_end"] = torch.arange(1, n + 1, device="cuda", dtype=torch.int32)
    x["lse"] = torch.empty(n, ATTENTION_HEADS, device="cuda")
    for r in range(0, n, 128):
        for h in range(0, ATTENTION_HEADS, GROUP):
            s = (x["attention_q"][r : r + 128, h : h + GROUP] @ x["kv"][: r + 128].T).float() * SCALE
            seen = torch.arange(r + 128, device="cuda")[None, None] < x["row_end"][r : r + 128, None, None]
            x["lse"][r : r + 128, h : h + GROUP] = s.masked_fill_(~seen, -torch.inf).logsumexp(-1)
    return x


def target_of(attention_q, kv, lse):
    """[rows, keys], not normalised."""
    p = 0
    for h in range(0, attention_q.shape[1], GROUP):
        s = (attention_q[:, h : h + GROUP] @ kv.T).float() * SCALE
        p = p + torch.exp(s - lse[:, h : h + GROUP, None]).sum(1)
    return p


def torch_loss(q, k, weights, target, seen):
    d = torch.relu(q @ k.T)  # [rows, heads, keys]
    scores = torch.einsum("ths,th->ts", d.float(), weights).masked_fill(~seen, -torch.inf)
    p = target.masked_fill(~seen, 0)
    p = p / p.sum(-1, keepdim=True)
    log_q = scores.log_softmax(-1).masked_fill(~seen, 0)
    return (torch.xlogy(p, p) - p * log_q).sum(-1).mean()


def torch_step(x, given, loss_of=torch_loss, target=target_of):
    q, k, w = (x[n].detach().requires_grad_() for n in ("q", "k", "weights"))
    n = len(q)
    seen = torch.arange(n, device="cuda")[None] < x["row_end"][:, None]
    p = given if given is not None else target(x["attention_q"], x["kv"], x["lse"])
    loss = loss_of(q, k, w, p, seen)
    return (loss.detach(), *torch.autograd.grad(loss, (q, k, w)))


def our_step(context, x, given, indices=None):
    q, k, w = (x[n].detach().requires_grad_() for n in ("q", "k", "weights"))
    training = Distillation(context, q, k, w, row_end=x["row_end"], indices=indices)
    if given is not None:
        training.add(1.0, target=given)
    else:
        training.add(1.0, attention_q=x["attention_q"], kv=x["kv"], lse=x["lse"], softmax_scale=SCALE)
    loss = training.loss()
    return (loss.detach(), *torch.autograd.grad(loss, (q, k, w)))


def exact(x, given):
    """In float64, some rows at a time."""
    q, k, w = (x[n].double() for n in ("q", "k", "weights"))
    n, rows = len(q), 128
    grads, loss = [torch.zeros_like(t) for t in (q, k, w)], 0
    for r in range(0, n, rows):
        part = slice(r, r + rows)
        seen = torch.arange(n, device="cuda")[None] < x["row_end"][part, None]
        if given is None:
            p = 0
            for h in range(ATTENTION_HEADS):
                s = x["attention_q"][part, h].double() @ x["kv"].double().T * SCALE
                p = p + torch.exp(s - x["lse"][part, h, None].double())
        else:
            p = given[part].double()
        p = p * seen
        p = p / p.sum(-1, keepdim=True)
        d = q[part] @ k.T
        log_q = torch.einsum("ths,th->ts", d.relu(), w[part]).masked_fill(~seen, -torch.inf).log_softmax(-1)
        loss += (torch.xlogy(p, p) - torch.where(seen, p * log_q, 0)).sum() / n
        g = (log_q.exp() - p) / n
        grads[2][part] = torch.einsum("ts,ths->th", g, d.relu())
        t = g[:, None] * w[part][..., None] * (d > 0)
        grads[0][part] = t @ k
        grads[1] += torch.einsum("ths,thd->sd", t, q[part])
    return loss, *grads


def measure(call, times):
    """Median milliseconds and largest memory beyond what was there; None where memory runs out."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        call()
        spent = []
        for _ in range(times):
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            a.record()
            call()
            b.record()
            b.synchronize()
            spent.append(a.elapsed_time(b))
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return dict(ms=None, out_of_memory=True)
    peak = torch.cuda.max_memory_allocated() - before
    return dict(ms=round(statistics.median(spent), 3), fastest=round(min(spent), 3), peak_gib=round(peak / 2**30, 2))


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    args.add_argument("--times", type=int, default=5)
    args.add_argument("--kinds", nargs="+", default=["attention", "given"])
    args.add_argument("--no-compile", action="store_true")
    args.add_argument("--no-errors", action="store_true")
    args.add_argument("--out")
    args = args.parse_args()
    context = ix.Context(ix.ContextDesc(backend=ix.BACKEND_CUDA))
    compiled = None if args.no_compile else [torch.compile(f, dynamic=False) for f in (torch_loss, target_of)]
    results = []
    for n in args.lengths:
        x = inputs(n)
        for kind in args.kinds:
            given = None if kind == "attention" else torch.rand(n, n, device="cuda")
            ways = {"ours": lambda: our_step(context, x, given), "eager": lambda: torch_step(x, given)}
            if compiled:
                ways["compile"] = lambda: torch_step(x, given, *compiled)
            for name, call in ways.items():
                line = dict(keys=n, kind=kind, what=name, **measure(call, args.times))
                if n == 4096 and not args.no_errors:
                    names = ("loss", "grad_q", "grad_k", "grad_weights")
                    want = exact(x, given)
                    line["error"] = {
                        k: float(f"{((a.double() - b).norm() / b.norm()).item():.2e}")
                        for k, a, b in zip(names, call(), want)
                    }
                results.append(line)
                print(json.dumps(line), flush=True)
    if args.out:
        with open(args.out, "w") as f:
            json.dump(dict(device=torch.cuda.get_device_name(), torch=torch.__version__, results=results), f, indent=1)


if __name__ == "__main__":
    main()
