"""Held-out bits per byte of the saved weights, in float32, with index K and Q in fp8 and the KV row in bf16.

    python eval.py --pattern FFFFFFFFFFFF --windows 4     # one pattern, on the CPU
    python eval.py --reference                            # writes reference.json
    python eval.py --table                                # writes results.json (a GPU helps: it takes every window)

A pattern is one role a layer: F selects, S reuses, R selects at random. Without --pattern: the one in config.json;
`--pattern dense` attends to everything.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from model import load_config, load_model, nll

HERE = Path(__file__).parent
BUCKETS = ((0, 128), (128, 256), (256, 512), (512, 1024), (1024, 2047))
REFERENCE_POSITIONS = (0, 1, 127, 128, 511, 1023, 2046)


@torch.no_grad()
def window_logits(model, window, pattern):
    """Logits that predict bytes 1.. of one window; dense attention is taken without rounding."""
    return model(window[None, :-1], pattern, quantised=pattern is not None)[0][0]


def position_bits(model, windows, pattern):
    """Bits of each scored position, [windows, length - 1]."""
    torch.manual_seed(0)
    return torch.stack([nll(window_logits(model, x, pattern)[None], x[None, 1:])[0] for x in windows]).double() / math.log(2)


def by_bucket(bits):
    return {f"{a}-{b - 1}": bits[:, a:b].mean().item() for a, b in BUCKETS}


def table(model, windows, cfg, out):
    n = cfg["num_hidden_layers"]
    patterns = {
        "dense": None,
        "all_full": "F" * n,
        "random": "R" * n,
        "uniform_1/2": "FS" * (n // 2),
        "uniform_1/4": "FSSS" * (n // 4),
        "greedy_1/4": cfg["index_topk_pattern"],
    }
    results = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "windows": len(windows),
        "parameters": sum(p.numel() for p in model.parameters()),
        "runs": {},
    }
    for name, pattern in patterns.items():
        bits = position_bits(model, windows, pattern)
        results["runs"][name] = {"pattern": pattern, "bits_per_byte": bits.mean().item(), "by_position": by_bucket(bits)}
        print(name, pattern, results["runs"][name], flush=True)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def reference(model, windows, cfg, out):
    result = {"mean_bits_per_byte": {}, "windows": []}
    for x in windows[:4]:
        entry = {}
        for name, pattern in (("all_full", "F" * cfg["num_hidden_layers"]), ("greedy_1/4", cfg["index_topk_pattern"])):
            logits = window_logits(model, x, pattern)
            entry[name] = {
                "pattern": pattern,
                "bits_per_byte": nll(logits[None], x[None, 1:]).double().mean().item() / math.log(2),
                "first_8_logits": {str(t): logits[t, :8].tolist() for t in REFERENCE_POSITIONS},
            }
        result["windows"].append(entry)
    for name in result["windows"][0]:
        result["mean_bits_per_byte"][name] = sum(w[name]["bits_per_byte"] for w in result["windows"]) / len(result["windows"])
    (out / "reference.json").write_text(json.dumps(result, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=HERE, help="folder of config.json and model.safetensors")
    parser.add_argument("--pattern")
    parser.add_argument("--windows", type=int, help="default: all of heldout.txt")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--table", action="store_true")
    action.add_argument("--reference", action="store_true")
    args = parser.parse_args()

    device = "cuda" if args.table and torch.cuda.is_available() else "cpu"
    cfg = load_config(args.dir / "config.json")
    model = load_model(args.dir / "model.safetensors", cfg, device)
    length = cfg["max_position_embeddings"]
    data = torch.frombuffer(bytearray((HERE / "heldout.txt").read_bytes()), dtype=torch.uint8).long().to(device)
    windows = data[: len(data) // length * length].view(-1, length)[: args.windows]

    if args.table:
        table(model, windows, cfg, args.dir)
    elif args.reference:
        reference(model, windows, cfg, args.dir)
    else:
        pattern = args.pattern or cfg["index_topk_pattern"]
        bits = position_bits(model, windows, None if pattern == "dense" else pattern)
        print(json.dumps({"pattern": pattern, "windows": len(windows), "bits_per_byte": bits.mean().item(),
                          "by_position": by_bucket(bits), "by_window": bits.mean(1).tolist()}))


if __name__ == "__main__":
    main()
