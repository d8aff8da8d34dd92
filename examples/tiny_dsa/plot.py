"""Draws training_log.jsonl as loss.png and loss.svg."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullLocator, StrMethodFormatter

HERE = Path(__file__).parent


def smooth(values, width=15):
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def bits(ax, rows, title):
    steps, loss = [r["step"] for r in rows], [r["bits_per_byte"] for r in rows]
    ax.plot(steps, loss, color="tab:blue", alpha=0.25, linewidth=0.8)
    ax.plot(steps, smooth(loss), color="tab:blue", label="training text, and its mean over 150 steps")
    held = [(r["step"], r["held_out_bits_per_byte"]) for r in rows if "held_out_bits_per_byte" in r]
    ax.plot(*zip(*held), "o-", color="tab:red", markersize=4, label="held-out text")
    ax.set(title=title, xlabel="step", ylabel="loss (bits per byte)")


def kl(ax, rows, title):
    values = np.array([r["kl"] for r in rows])
    steps = [r["step"] for r in rows]
    ax.fill_between(steps, values.min(1), values.max(1), color="tab:green", alpha=0.2, label="range over the 12 layers")
    ax.plot(steps, values.mean(1), color="tab:green", label="mean")
    ax.set(title=title, xlabel="step", ylabel="indexer KL (nats per token)", yscale="log")
    ax.set_yticks([0.1, 0.2, 0.5, 1, 2, 5])
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylim(0.8 * values.min(), 1.2 * values.max())
    ax.legend(frameon=False)


def main():
    log = [json.loads(line) for line in (HERE / "training_log.jsonl").read_text().splitlines()]
    stage = {name: [r for r in log if r["stage"] == name] for name in ("dense", "warmup", "sparse")}
    plt.rcParams.update({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "tiny_dsa"})
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), constrained_layout=True)
    bits(axes[0, 0], stage["dense"], "1. Dense: language-modelling loss")
    axes[0, 0].set_ylim(0.5, 2.0)
    axes[0, 0].legend(frameon=False)
    kl(axes[0, 1], stage["warmup"], "2. Warm-up: the indexer alone learns the dense attention")
    bits(axes[1, 0], stage["sparse"], "3. Sparse: language-modelling loss, top-k 128")
    axes[1, 0].set_ylim(0.5, 1.0)
    kl(axes[1, 1], stage["sparse"], "3. Sparse: KL over the selected positions")
    figure.savefig(HERE / "loss.png", dpi=110)
    figure.savefig(HERE / "loss.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
