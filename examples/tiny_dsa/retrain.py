"""Training-aware IndexCache on the tiny model: can an evenly spread pattern be trained to be as good as a searched one?

    INDEXCACHE_LIBRARY=…/libindexcache.so PYTHONPATH=../../bindings/python/src python retrain.py   # one GPU
    python retrain_report.py                                                                       # table and picture

Two losses for the indexers of the layers that stay Full: each learns its own layer's attention, or that of all the layers
it serves. Two stages, on the same text for both losses:

1. `indexers`: the model stands still and attends to everything, and only the indexers learn, from what every layer attends
   to. What a Full layer learns depends on the layers it serves and on nothing else, so one pass of the model teaches the
   indexers of every pattern at once.
2. `model`: from there, everything learns, through the selection: language modelling, and the loss over the selected.

Writes every held-out number to retrain.json in docs/measured/training as soon as it is there.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import indexcache as ix
import torch
from indexcache.distillation import Distillation

from model import load_config, load_model, nll, rope_tables
from train import batches, make_optimizers

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "docs/measured/training"
# Searched: docs/measured/search, first set.
PATTERNS = {
    "1/2": {"uniform": "FSFSFSFSFSFS", "searched": "FFSSSFSFFSSF"},
    "1/4": {"uniform": "FSSSFSSSFSSS", "searched": "FFSSSSSFSSSS"},
    "1/8": {"uniform": "FSSSSSFSSSSS", "searched": "FFSSSSSSSSSS"},
}
LOSSES = ("own", "multi")
# Rows of a batch that the indexers learn from.
QUERIES = 1024


def blocks(pattern, loss="multi"):
    """Each Full layer, and one past the last layer whose attention it learns."""
    full = [layer for layer, role in enumerate(pattern) if role == "F"]
    ends = full[1:] + [len(pattern)] if loss == "multi" else [layer + 1 for layer in full]
    return list(zip(full, ends))


class Teacher:
    """Losses of a batch of sequences by the library, on some of its rows, drawn at random: all keys, but not all queries."""

    def __init__(self, context, tokens):
        count, length = tokens.shape
        self.context = context
        self.rows = torch.randperm(count * length, device=tokens.device)[:QUERIES].sort().values
        self.ranges = {
            "row_start": (self.rows // length * length).int(),
            "row_end": (self.rows + 1).int(),
        }

    def some(self, x):
        return x.flatten(0, 1)[self.rows]

    def begin(self, q, k, w, indices=None):
        indices = None if indices is None else self.some(indices)
        q, k, w = self.some(q.bfloat16()), k.bfloat16().flatten(0, 1), self.some(w)
        return Distillation(self.context, q, k, w, **self.ranges, indices=indices)

    @torch.no_grad()
    def attention(self, attn, q, row, lse):
        """What a layer attends to, as `Distillation.add` takes it."""
        q, lse = (self.some(x.transpose(1, 2)) for x in (q, lse))
        absorbed, kv = attn.absorbed(q).bfloat16(), row.bfloat16().flatten(0, 1)
        return {"attention_q": absorbed, "kv": kv, "lse": lse, "softmax_scale": q.shape[-1] ** -0.5}


def rate(step, steps):
    """Of the peak learning rate: a rise over a tenth of the steps, and a straight line down over the last six."""
    return min(1.0, 10 * (step + 1) / steps, (steps - step) / (0.6 * steps))


def tables(model, tokens):
    length = tokens.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
    return rope_tables(model.cfg, length, tokens.device), causal


def attend(q, k, v, seen):
    """A layer's output before its projection, and the log-sum-exp of its scores."""
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen.unsqueeze(-3), float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v, scores.detach().logsumexp(-1)


@torch.no_grad()
def index_scores(q, k, w, causal):
    logits = torch.einsum("bthd,bsd->bths", q.bfloat16(), k.bfloat16())
    return (logits.relu().float() * w.unsqueeze(-1)).sum(2).masked_fill(~causal, float("-inf"))


@torch.no_grad()
def select(scores, causal, topk):
    """The best positions of each row, -1 where there are fewer, and the same as a mask."""
    best, indices = scores.topk(topk, sorted=False)
    seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, indices, True) & causal
    return indices.int().masked_fill_(best == float("-inf"), -1), seen


def teach_indexers(model, wanted, source, steps, context):
    """Stage 1: `wanted` blocks to their indexers."""
    students = {b: copy.deepcopy(model.layers[b[0]].self_attn.indexer).requires_grad_() for b in wanted}
    model.requires_grad_(False)
    parameters = [p for s in students.values() for p in s.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * rate(step, steps)
        x = next(source)[:, :-1]
        rope, causal = tables(model, x)
        teacher, live = Teacher(context, x), {}
        with torch.autocast(x.device.type, torch.bfloat16):
            h = model.embed_tokens(x)
            for number, layer in enumerate(model.layers):
                attn, normed = layer.self_attn, layer.input_layernorm(h)
                latent, row, q, k, v = attn.qkv(normed, rope, False)
                for b in wanted:
                    if b[0] == number:
                        live[b] = teacher.begin(*students[b].qkw(normed, latent, rope))
                out, lse = attend(q, k, v, causal)
                attention = teacher.attention(attn, q, row, lse)
                for b in live:
                    live[b].add(1 / (b[1] - b[0]), **attention)
                for b in [b for b in live if b[1] == number + 1]:
                    live.pop(b).loss().backward()
                h = h + attn.output(out)
                h = h + layer.mlp(layer.post_attention_layernorm(h))
        optimizer.step()
        optimizer.zero_grad()
    return students


def with_indexers(model, pattern, loss, students):
    model = copy.deepcopy(model).requires_grad_()
    for b in blocks(pattern, loss):
        model.layers[b[0]].self_attn.indexer.load_state_dict(students[b].state_dict())
    return model


def losses_of(model, pattern, loss, x, context):
    """Language-modelling loss, and each Full layer's over what it selected."""
    tokens = x[:, :-1]
    rope, causal = tables(model, tokens)
    teacher, ends, found = Teacher(context, tokens), dict(blocks(pattern, loss)), []
    h = model.embed_tokens(tokens)
    for number, (layer, role) in enumerate(zip(model.layers, pattern)):
        attn, normed = layer.self_attn, layer.input_layernorm(h)
        latent, row, q, k, v = attn.qkv(normed, rope, False)
        if role == "F":
            qkw = attn.indexer.qkw(normed, latent, rope)
            indices, seen = select(index_scores(*qkw, causal), causal, model.cfg["index_topk"])
            first, end, live = number, ends[number], teacher.begin(*qkw, indices)
        out, lse = attend(q, k, v, seen)
        if number < end:
            live.add(1 / (end - first), **teacher.attention(attn, q, row, lse))
            if number + 1 == end:
                found.append(live.loss())
        h = h + attn.output(out)
        h = h + layer.mlp(layer.post_attention_layernorm(h))
    logits = torch.nn.functional.linear(model.norm(h), model.embed_tokens.weight)
    return nll(logits, x[:, 1:]).mean(), found


def train_model(model, pattern, loss, source, steps, context):
    """Stage 2, as the sparse one of `train.py`, more gently."""
    optimizers = make_optimizers(model, "sparse", 0.01)
    for step in range(steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(step, steps)
        x = next(source)
        with torch.autocast(x.device.type, torch.bfloat16):
            lm, found = losses_of(model, pattern, loss, x, context)
        sum(found, lm).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0, foreach=True)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def held_out_bits(model, windows, pattern):
    """As `eval.py`: float32, with what a server keeps in fp8 and bf16 rounded to them."""
    model.eval()
    total = sum(nll(model(x[:, :-1], pattern, quantised=True)[0], x[:, 1:]).double().sum() for x in windows.split(8))
    model.train()
    return total.item() / windows[:, 1:].numel() / math.log(2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE / "train.bin", help="by prepare.py")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", nargs=2, type=int, default=(100, 40), help="of each stage")
    parser.add_argument("--rows", nargs=2, type=int, default=(8, 8), help="rows of 2048 bytes of a step, for each stage")
    parser.add_argument("--windows", type=int, default=48, help="of heldout.txt, evenly spaced as a search takes them")
    parser.add_argument("--retentions", nargs="*", default=["1/4"], help="of stage 2")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    context = ix.Context(ix.ContextDesc(backend=ix.BACKEND_CUDA if device == "cuda" else ix.BACKEND_CPU))
    cfg = load_config()
    base = load_model(HERE / "model.safetensors", cfg, device)
    length = cfg["max_position_embeddings"]
    train, held = (torch.frombuffer(bytearray(p.read_bytes()), dtype=torch.uint8).to(device) for p in (args.data, HERE / "heldout.txt"))
    windows = held[: len(held) // length * length].view(-1, length).long()
    windows = windows[torch.arange(args.windows, device=device) * len(windows) // args.windows]

    everything = "F" * cfg["num_hidden_layers"]
    patterns = [(r, kind, p) for r, kinds in PATTERNS.items() for kind, p in kinds.items()]
    results = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "windows": len(windows),
        "steps": dict(zip(("indexers", "model"), args.steps)),
        "tokens": {s: n * r * length for s, n, r in zip(("indexers", "model"), args.steps, args.rows)},
        "runs": [],
    }
    started = time.time()

    def report(stage, loss, seed, retention, kind, pattern, model):
        entry = {"stage": stage, "loss": loss, "seed": seed, "retention": retention, "kind": kind, "pattern": pattern}
        entry["bits_per_byte"] = held_out_bits(model, windows, pattern)
        entry["seconds"] = time.time() - started
        print(json.dumps(entry), flush=True)
        results["runs"].append(entry)
        (args.out / "retrain.json").write_text(json.dumps(results, indent=1) + "\n")

    args.out.mkdir(parents=True, exist_ok=True)
    for retention, kind, pattern in [("1", "all Full", everything), *patterns]:
        report("untrained", None, None, retention, kind, pattern, base)
    wanted = sorted({b for _, _, p in patterns for loss in LOSSES for b in blocks(p, loss)} | set(blocks(everything)))
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        source = batches(train, args.rows[0], length, 2 * seed)
        students = teach_indexers(copy.deepcopy(base), wanted, source, args.steps[0], context)
        report("indexers", "own", seed, "1", "all Full", everything, with_indexers(base, everything, "own", students))
        for retention, kind, pattern in patterns:
            for loss in LOSSES:
                model = with_indexers(base, pattern, loss, students)
                report("indexers", loss, seed, retention, kind, pattern, model)
        again = [(r, kind, p, loss) for r, kind, p in patterns if r in args.retentions for loss in LOSSES]
        for retention, kind, pattern, loss in [("1", "all Full", everything, "own"), *again]:
            model = with_indexers(base, pattern, loss, students)
            source = batches(train, args.rows[1], length, 2 * seed + 1)
            train_model(model, pattern, loss, source, args.steps[1], context)
            report("model", loss, seed, retention, kind, pattern, model)


if __name__ == "__main__":
    main()
