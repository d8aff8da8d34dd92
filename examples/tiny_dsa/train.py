"""Trains the model as DSA is trained: dense, then the indexer alone, then sparse. Needs one GPU and train.bin.

    python train.py            # all three stages, then model.safetensors
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from model import Model, bf16_tensors, load_config, nll

HERE = Path(__file__).parent
STAGES = ("dense", "warmup", "sparse")


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al., 2024); matrices of one shape go through as one batch."""

    def __init__(self, params, lr, momentum=0.95):
        by_shape = {}
        for p in params:
            by_shape.setdefault(p.shape, []).append(p)
        super().__init__([{"params": group} for group in by_shape.values()], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, beta = group["params"], group["momentum"]
            grad = torch.stack([p.grad for p in params])
            buffer = self.state[params[0]].setdefault("buffer", torch.zeros_like(grad))
            buffer.lerp_(grad, 1 - beta)
            update = orthogonalise(grad.lerp(buffer, beta))
            scale = group["lr"] * max(1.0, update.shape[1] / update.shape[2]) ** 0.5
            torch._foreach_sub_(params, list((update.float() * scale).unbind(0)))


def orthogonalise(m):
    x = m.bfloat16()
    x = x.transpose(1, 2) if m.shape[1] > m.shape[2] else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.transpose(1, 2) if m.shape[1] > m.shape[2] else x


def make_optimizers(model, stage, lr):
    """Muon for the matrices of the model proper; Adam for embedding, norms and the indexer."""
    main = [(n, p) for n, p in model.named_parameters() if ".indexer." not in n]
    indexer = [p for n, p in model.named_parameters() if ".indexer." in n]
    for p in indexer:
        p.requires_grad_(stage != "dense")
    for _, p in main:
        p.requires_grad_(stage != "warmup")

    adam = []
    if stage != "dense":
        adam.append({"params": indexer, "lr": 3e-3 if stage == "warmup" else 1e-3})
    # The sparse stage goes on from where the dense one decayed to.
    fine = 0.1 if stage == "sparse" else 1.0
    if stage != "warmup":
        adam.append({"params": [p for n, p in main if p.dim() == 1 or "embed" in n], "lr": 3e-3 * fine})
    optimizers = [torch.optim.AdamW(adam, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]
    if stage != "warmup":
        optimizers.append(Muon([p for n, p in main if p.dim() == 2 and "embed" not in n], lr * fine))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def schedule(stage, step, steps):
    """Factor on the learning rate: rise, hold, then a straight line down."""
    rise = min(1.0, (step + 1) / 50)
    end = 0.1 if stage == "dense" else 0.0
    fall = min(1.0, (steps - step) / (0.6 * steps))
    return rise * (end + (1 - end) * fall)


def batches(data, rows, length, seed):
    """Endless rows of length + 1 bytes from random places."""
    generator = torch.Generator().manual_seed(seed)
    span = torch.arange(length + 1, device=data.device)
    while True:
        starts = torch.randint(len(data) - length, (rows, 1), generator=generator)
        yield data[starts.to(data.device) + span].long()


@torch.no_grad()
def held_out_bits(model, data, length, pattern):
    model.eval()
    windows = data[: len(data) // length * length].view(-1, length).long()[:64]
    total = sum(nll(model(x[:, :-1], pattern)[0], x[:, 1:]).sum().item() for x in windows.split(16))
    model.train()
    return total / windows[:, 1:].numel() / math.log(2)


def train_stage(model, stage, steps, rows, lr, train, held, cfg, log, save):
    optimizers = make_optimizers(model, stage, lr)
    pattern = "F" * cfg["num_hidden_layers"] if stage == "sparse" else None
    length = cfg["max_position_embeddings"]
    started, source = time.time(), batches(train, rows, length, STAGES.index(stage))
    for step in range(steps):
        factor = schedule(stage, step, steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
        x = next(source)
        with torch.autocast(x.device.type, torch.bfloat16):
            logits, kl = model(x[:, :-1], pattern, with_kl=stage != "dense")
            lm = nll(logits, x[:, 1:]).mean()
            loss = sum((layer for layer in kl if layer is not None), lm)
        loss.backward()
        if stage != "warmup":
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0, foreach=True)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            entry = {"stage": stage, "step": step, "bits_per_byte": lm.item() / math.log(2), "lr_factor": factor}
            if stage != "dense":
                entry["kl"] = [layer.item() for layer in kl]
            if step % 500 == 0 or step == steps - 1:
                with torch.autocast(x.device.type, torch.bfloat16):
                    entry["held_out_bits_per_byte"] = held_out_bits(model, held, length, pattern)
                save()
            entry["seconds"] = time.time() - started
            log.write(json.dumps(entry) + "\n")
            log.flush()
            if step % 100 == 0 or step == steps - 1:
                print({k: sum(v) / len(v) if k == "kl" else v for k, v in entry.items()}, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.json")
    parser.add_argument("--data", type=Path, default=HERE / "train.bin")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="later stages start from the saved earlier one")
    parser.add_argument("--steps", nargs=3, type=int, default=(6000, 300, 1200), help="of each stage")
    parser.add_argument("--rows", nargs=3, type=int, default=(24, 16, 16), help="rows of a step, for each stage")
    parser.add_argument("--lr", type=float, default=0.03, help="Muon's peak learning rate")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    cfg = load_config(args.config)
    train, held = (torch.frombuffer(bytearray(p.read_bytes()), dtype=torch.uint8).to(device) for p in (args.data, HERE / "heldout.txt"))
    model = Model(cfg).to(device)
    for layer in model.layers:
        layer.compile()

    first = STAGES.index(args.stages[0])
    if first > 0:
        model.load_state_dict(torch.load(args.out / f"{STAGES[first - 1]}.pt", map_location=device))
    with open(args.out / "training_log.jsonl", "w" if first == 0 else "a") as log:
        for stage in args.stages:
            i = STAGES.index(stage)
            train_stage(model, stage, args.steps[i], args.rows[i], args.lr, train, held, cfg, log,
                        lambda: torch.save(model.state_dict(), args.out / f"{stage}.pt"))
    if args.stages[-1] == "sparse":
        save_file(bf16_tensors(model), args.out / "model.safetensors")


if __name__ == "__main__":
    main()
