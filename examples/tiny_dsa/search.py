"""Greedy search for the pattern that costs least: which layers can reuse the selection of an earlier one.

Starts with every layer Full. Each step turns the Full layer (never layer 0) Shared whose turn gives the lowest mean
loss on fixed rows of the training text, ties to the lowest layer. The last pattern goes into config.json.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from model import load_config, load_model, nll

HERE = Path(__file__).parent


@torch.no_grad()
def mean_bits(model, rows, pattern):
    total = sum(nll(model(x[:, :-1], pattern, quantised=True)[0], x[:, 1:]).sum().item() for x in rows.split(8))
    return total / rows[:, 1:].numel() / math.log(2)


def calibration_rows(data, count, length):
    return torch.stack([data[i * (len(data) // count) :][:length] for i in range(count)]).long()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.json")
    parser.add_argument("--data", type=Path, default=HERE / "train.bin")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--rows", type=int, default=48, help="calibration rows of one full context")
    parser.add_argument("--full", type=int, default=3, help="Full layers to stop at")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg = load_config(args.config)
    model = load_model(args.out / "model.safetensors", cfg, device)
    data = torch.frombuffer(bytearray(args.data.read_bytes()), dtype=torch.uint8)
    rows = calibration_rows(data, args.rows, cfg["max_position_embeddings"]).to(device)

    pattern = "F" * cfg["num_hidden_layers"]
    steps = [{"pattern": pattern, "bits_per_byte": mean_bits(model, rows, pattern)}]
    print(steps[-1], flush=True)
    while pattern.count("F") > args.full:
        candidates = [pattern[:i] + "S" + pattern[i + 1 :] for i in range(1, len(pattern)) if pattern[i] == "F"]
        losses = [mean_bits(model, rows, candidate) for candidate in candidates]
        best = min(range(len(losses)), key=losses.__getitem__)
        pattern = candidates[best]
        steps.append({"pattern": pattern, "bits_per_byte": losses[best], "candidates": dict(zip(candidates, losses))})
        print({k: steps[-1][k] for k in ("pattern", "bits_per_byte")}, flush=True)

    (args.out / "search.json").write_text(json.dumps({"rows": args.rows, "steps": steps}, indent=1) + "\n")
    cfg["index_topk_pattern"] = pattern
    (args.out / "config.json").write_text(json.dumps(cfg, indent=2) + "\n")


if __name__ == "__main__":
    main()
