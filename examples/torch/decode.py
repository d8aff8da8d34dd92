"""Greedy decoding with the tiny DSA model in PyTorch, the library's select and attend on torch's current stream.

    python decode.py                                  # on the GPU; a step is a CUDA graph, captured once and replayed
    python decode.py --device cpu                     # the same without a graph
    python decode.py --expect serve.json              # beside what examples/serve generated: its --json

Needs torch, numpy, safetensors and the binding in bindings/python. README.md says how to read what it prints.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import indexcache as ix

MODEL = Path(__file__).resolve().parent.parent / "tiny_dsa"
sys.path.insert(0, str(MODEL))

from model import load_config, load_model, rope_tables  # noqa: E402

LANE = 0
PAGE = 64


class Rows(NamedTuple):
    """The rows of one step: where each is in its request, what it sees, and where its own token is stored."""

    request: torch.Tensor  # int32: the row of the block table.
    slot: torch.Tensor
    end: torch.Tensor  # int32: tokens that it sees, itself among them.
    rope: tuple


class Engine:
    """The model's layers around the library's calls, as engine.cpp of examples/serve has them."""

    def __init__(self, model, context, plan, requests, max_tokens, max_rows):
        cfg, device = model.cfg, model.norm.weight.device
        self.model, self.context, self.plan, self.max_rows = model, context, plan, max_rows
        layers, pages = range(cfg["num_hidden_layers"]), requests * -(-max_tokens // PAGE)
        self.full = [plan.layer_role(layer) == ix.ROLE_FULL for layer in layers]
        # Pages of one request lie apart, as in a server that has run for a while.
        self.table = torch.arange(pages, dtype=torch.int32, device=device).view(-1, requests).T.contiguous()
        kv_row = cfg["kv_lora_rank"] + cfg["qk_rope_head_dim"]
        self.kv = [torch.zeros(pages, PAGE, kv_row, dtype=torch.bfloat16, device=device) for _ in layers]
        # Only layers that select own index K; the plan numbers them.
        slots, page_bytes = plan.get_info().index_k_slots, PAGE * (cfg["index_head_dim"] + 4)
        stores = [torch.zeros(pages, page_bytes, dtype=torch.uint8, device=device) for _ in range(slots)]
        self.index_k = [stores[plan.layer_get_info(n).index_k_slot] if full else None for n, full in enumerate(self.full)]
        self.rope = rope_tables(cfg, max_tokens, device)
        self.cache = ix.Cache(context, plan, ix.CacheDesc(max_rows=max_rows))
        self.steps = 0
        self.workspace = self.largest_workspace()

    def largest_workspace(self):
        """Enough for every step: sizes follow from shapes, so rows that are not there yet will do."""
        device, attn = self.table.device, self.model.layers[0].self_attn
        zeros = torch.zeros(self.max_rows, dtype=torch.int64, device=device)
        rows = self.rows(zeros.int(), zeros)
        q = torch.empty(self.max_rows, attn.indexer.heads, attn.indexer.dim, dtype=torch.uint8, device=device)
        weights = torch.empty(self.max_rows, attn.indexer.heads, device=device)
        attention_q = torch.empty(self.max_rows, attn.heads, attn.latent + attn.rope, device=device)
        size = max(
            self.cache.select_workspace(self.indexer(0, q, weights, rows)),
            self.cache.attend_workspace(self.attention(0, attention_q, rows)),
        )
        return torch.empty(size, dtype=torch.uint8, device=device)

    def rows(self, request, position):
        slot = self.table[request, position // PAGE] * PAGE + position % PAGE
        return Rows(request, slot, (position + 1).int(), tuple(table[position] for table in self.rope))

    def indexer(self, number, q, weights, rows):
        return ix.IndexerDesc(
            q=ix.as_dtype(q, "float8_e4m3fn"),
            weights=weights,
            k=self.index_k[number],
            block_table=self.table,
            row_request=rows.request,
            row_end=rows.end,
        )

    def attention(self, number, q, rows):
        attn = self.model.layers[number].self_attn
        return ix.AttentionDesc(
            q=q,
            kv=self.kv[number],
            block_table=self.table,
            row_request=rows.request,
            out=q.new_empty(*q.shape[:2], attn.latent),
            softmax_scale=(attn.nope + attn.rope) ** -0.5,
        )

    def forward(self, token, request, position):
        """Logits [rows, vocab]. A row sees what is stored of its request up to its own token, which is stored first."""
        model, rows = self.model, self.rows(request, position)
        stream = torch.cuda.current_stream().cuda_stream if token.is_cuda else None
        self.steps += 1
        self.cache.step_begin(LANE, len(token), self.steps)
        h = model.embed_tokens(token)
        for number, layer in enumerate(model.layers):
            h = h + self.attend(number, layer.self_attn, layer.input_layernorm(h), rows, stream)
            h = h + layer.mlp(layer.post_attention_layernorm(h))
        return F.linear(model.norm(h), model.embed_tokens.weight)

    def attend(self, number, attn, x, rows, stream):
        q_latent, q, kv = attn.project(x, rows.rope)
        ix.kv_write(self.context, ix.KvWriteDesc(kv=kv, slots=rows.slot, pages=self.kv[number]), stream)
        if self.full[number]:
            indexer = self.project_indexer(number, attn.indexer, x, q_latent, rows, stream)
            self.cache.select(LANE, number, indexer, self.workspace, stream)
        else:
            self.cache.select(LANE, number, None)  # Makes sure that there are indices of this step to reuse.
        attention = self.attention(number, attn.absorbed(q), rows)
        self.cache.attend(LANE, number, attention, self.workspace, stream)
        return attn.mixed(attention.out)

    def project_indexer(self, number, indexer, x, q_latent, rows, stream):
        q, k, weights = indexer.qkw(x, q_latent, rows.rope)
        keys = ix.IndexKWriteDesc(k=k, slots=rows.slot, pages=self.index_k[number])
        ix.index_k_write(self.context, keys, stream)
        q8 = torch.empty(q.shape, dtype=torch.uint8, device=q.device)
        queries = ix.IndexQQuantizeDesc(
            q=q,
            weights=weights,
            q_out=ix.as_dtype(q8, "float8_e4m3fn"),
            weights_out=weights,
            scale=1.0,  # `qkw` has scaled the weights.
        )
        ix.index_q_quantize(self.context, queries, stream)
        return self.indexer(number, q8, weights, rows)


class Decoder:
    """All requests, one row each a step. A step reads and writes the same memory every time and leaves nothing to the
    host, so that one CUDA graph is all of them."""

    def __init__(self, engine, prompts, decode):
        self.engine, self.decode = engine, decode
        (requests, self.context), device = prompts.shape, prompts.device
        self.text = F.pad(prompts, (0, decode), value=-1)
        self.logits = torch.empty(requests, self.context + decode, engine.model.cfg["vocab_size"], device=device)
        self.request = torch.arange(requests, dtype=torch.int32, device=device)
        self.position = torch.empty(requests, dtype=torch.int64, device=device)
        self.graph = None
        self.prefill()
        self.rewind()

    def prefill(self):
        """All of the prompts but the last token, which is the first step's row."""
        for request, prompt in enumerate(self.text[:, : self.context - 1]):
            for position in torch.arange(self.context - 1, device=prompt.device).split(self.engine.max_rows):
                whose = torch.full_like(position, request, dtype=torch.int32)
                self.engine.forward(prompt[position], whose, position)

    def rewind(self):
        self.position.fill_(self.context - 1)

    def step(self):
        """The likeliest token after each request's last one; one that is known already stays."""
        at = self.position.unsqueeze(1)
        logits = self.engine.forward(self.text.gather(1, at).squeeze(1), self.request, self.position)
        self.logits[self.request, self.position] = logits
        known = self.text.gather(1, at + 1)
        self.text.scatter_(1, at + 1, torch.where(known < 0, logits.argmax(-1, keepdim=True), known))
        self.position += 1

    def capture(self):
        """Capturing runs nothing. What torch and its libraries set up on first use, a step before this has set up."""
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    def run(self, steps):
        """Milliseconds of so many steps."""
        once = self.graph.replay if self.graph else self.step
        if not self.text.is_cuda:
            start = time.perf_counter()
            for _ in range(steps):
                once()
            return 1e3 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(steps):
            once()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def generate(self):
        """The tokens that follow each prompt."""
        self.step()
        if self.text.is_cuda:
            self.capture()
        self.run(self.decode - 1)
        return self.text[:, self.context :].clone()

    def again(self, steps):
        """Milliseconds a step of the first steps once more."""
        self.rewind()
        return self.run(steps) / steps

    def compare(self, expected):
        """Runs over `expected` in place of its own choice: where that would have been another, and by how much."""
        self.text[:, self.context :] = expected
        self.again(self.decode)
        logits = self.logits[:, self.context - 1 : -1]
        (best, second), choice = logits.topk(2).values.unbind(-1), logits.argmax(-1)
        lost = best - logits.gather(-1, expected.unsqueeze(-1)).squeeze(-1)
        differ = []
        for r, t in (choice != expected).nonzero().tolist():
            of = {"expected": expected, "chosen": choice, "lost": lost}
            differ.append({"request": r, "token": t, **{name: values[r, t].item() for name, values in of.items()}})
        return {"tokens": expected.numel(), "closest": (best - second).min().item(), "differ": differ}


def measure(decoders, repeats):
    """Milliseconds a step, the median of passes that take turns: of all steps captured, of some call by call."""
    passes = [{"captured": [], "uncaptured": []} for _ in decoders]
    for turn in range(repeats):
        for decoder, times in list(zip(decoders, passes))[:: 1 if turn % 2 == 0 else -1]:
            graph, decoder.graph = decoder.graph, None
            times["uncaptured"].append(decoder.again(min(16, decoder.decode)))
            decoder.graph = graph
            if graph:
                times["captured"].append(decoder.again(decoder.decode))
    return [{kind: statistics.median(t) if t else None for kind, t in times.items()} for times in passes]


def runs(load, model, context, device):
    """All-Full and the pattern: what each generates, how long a step takes, and how that agrees with what is expected."""
    text = torch.frombuffer(bytearray((MODEL / "heldout.txt").read_bytes()), dtype=torch.uint8).to(device, torch.int64)
    requests, length, decode = load["requests"], load["context"], load["decode"]
    if requests * length > len(text):
        sys.exit(f"heldout.txt has {len(text)} bytes, too few for {requests} requests of {length}")
    prompts = text[: requests * length].view(requests, length)
    desc = ix.ModelDesc(
        layers=model.cfg["num_hidden_layers"], topk=model.cfg["index_topk"], index_head_dim=model.cfg["index_head_dim"]
    )
    decoders, results = [], []
    for pattern in load["patterns"]:
        plan = ix.Plan.from_pattern(desc, pattern)
        engine = Engine(model, context, plan, requests, length + decode, max(load["chunk"], requests))
        decoders.append(Decoder(engine, prompts, decode))
        tokens = decoders[-1].generate()
        results.append({"pattern": pattern, "generated": [bytes(t).decode("latin-1") for t in tokens.tolist()]})
    for result, times in zip(results, measure(decoders, load["repeats"])):
        result["step_ms"] = times
    for result, decoder, expected in zip(results, decoders, load["expected"]):
        tokens = torch.tensor([list(t.encode("latin-1")) for t in expected], device=device)
        result["agreement"] = decoder.compare(tokens)
    return results


def table(load, results, device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    lines = [f"{load['requests']} requests of {load['context']} bytes, {load['decode']} generated each; {name}", ""]

    def line(what, values):
        lines.append("  " + what.ljust(22) + "".join(str(v).ljust(24) for v in values).rstrip())

    line("pattern", [r["pattern"] for r in results])
    first = results[0]["step_ms"]
    for kind, what in (("captured", "step, one graph"), ("uncaptured", "step, call by call")):
        if first[kind]:
            ms = [r["step_ms"][kind] for r in results]
            line(what, [f"{t:.3f} ms" + (f", {ms[0] / t:.2f}x" if i else "") for i, t in enumerate(ms)])
    if load["expected"]:
        agreements = [r["agreement"] for r in results]
        line("tokens as expected", [f"{a['tokens'] - len(a['differ'])} of {a['tokens']}" for a in agreements])
        line("closest decision", [f"{a['closest']:.1e}" for a in agreements])
        for r in results:
            for d in r["agreement"]["differ"]:
                lines.append(
                    f"    {r['pattern']}: request {d['request']}, token {d['token']}: {bytes([d['chosen']])} is ahead of "
                    f"{bytes([d['expected']])} by {d['lost']:.1e}"
                )
    for r in results:
        lines += ["", f"request 0 goes on, {r['pattern']}:", f"  {r['generated'][0].encode('latin-1')!r}"]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--pattern", help="beside all-Full; default: the one in the model's config.json")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--context", type=int, default=96, help="bytes of prompt each")
    parser.add_argument("--decode", type=int, default=512, help="bytes to generate for each")
    parser.add_argument("--chunk", type=int, default=256, help="prompt bytes a step")
    parser.add_argument("--repeats", type=int, default=3, help="measured passes")
    parser.add_argument("--expect", type=Path, help="report of `serve --json`: its load and patterns, and what it generated")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.context < 2 or min(args.requests, args.decode, args.chunk, args.repeats) < 1:
        parser.error("--context takes at least 2, all other numbers at least 1")

    cfg, device = load_config(), torch.device(args.device)
    load = {key: getattr(args, key) for key in ("requests", "context", "decode", "chunk", "repeats")}
    load["patterns"] = ["F" * cfg["num_hidden_layers"], args.pattern or cfg["index_topk_pattern"]]
    load["expected"] = []
    if args.expect:
        report = json.loads(args.expect.read_text())
        load.update({key: report[key] for key in ("requests", "context", "decode")})
        load["patterns"] = [run["pattern"] for run in report["runs"]]
        load["expected"] = [run["generated"] for run in report["runs"]]
    context = ix.Context(ix.ContextDesc(backend=ix.BACKEND_CUDA if device.type == "cuda" else ix.BACKEND_CPU))
    with torch.inference_mode():
        results = runs(load, load_model(MODEL / "model.safetensors", cfg, device), context, device)
    print(json.dumps({"device": args.device, "runs": results}) if args.json else table(load, results, device))


if __name__ == "__main__":
    main()
