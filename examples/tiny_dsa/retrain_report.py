"""What retrain.py found: the table of docs/training.md, and retrain.png and retrain.svg.

    python retrain_report.py
"""

import json
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "docs/measured/training"
COLUMNS = {"as it was": ("untrained", None)}
COLUMNS.update({f"{stage}, {loss}": (stage, loss) for stage in ("indexers", "model") for loss in ("own", "multi")})


def bits(results, retention, kind, column):
    """Of each seed."""
    wanted = retention, kind, *COLUMNS[column]
    return [r["bits_per_byte"] for r in results["runs"] if (r["retention"], r["kind"], r["stage"], r["loss"]) == wanted]


def places(results):
    """Retention, kind and pattern, in the order of the table."""
    found = {(r["retention"], r["kind"]): r["pattern"] for r in results["runs"] if r["stage"] == "untrained"}
    return [(*place, pattern) for place, pattern in found.items()]


def cell(values):
    if not values:
        return ""
    mean = sum(values) / len(values)
    return f"{mean:.4f} ± {(max(values) - min(values)) / 2:.4f}" if len(values) > 1 else f"{mean:.4f}"


def table(results):
    """Mean over the seeds and half of their range."""
    lines = [["Full layers", "pattern", *COLUMNS], ["---", "---", *["---:"] * len(COLUMNS)]]
    for retention, kind, pattern in places(results):
        cells = [cell(bits(results, retention, kind, column)) for column in COLUMNS]
        where = kind if retention == "1" else f"{retention} {kind}"
        lines.append([where, f"`{pattern}`", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(results, out):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    plt.rcParams.update({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "tiny_dsa"})
    shape = {"width_ratios": [5, 2], "sharey": True, "constrained_layout": True}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), **shape)
    titles = {"indexers": "1. Indexers alone", "model": "2. Then the whole model"}
    colors = {"as it was": "tab:gray", "own": "tab:orange", "multi": "tab:blue"}
    names = {"own": "own-layer loss", "multi": "multi-layer loss"}
    for ax, (stage, title) in zip(axes, titles.items()):
        # Beside the second stage's, what its training starts from.
        columns = {"as it was": "as it was", **{loss: f"{stage}, {loss}" for loss in ("own", "multi")}}
        shown = [p for p in places(results) if p[0] != "1" and bits(results, p[0], p[1], columns["multi"])]
        best = bits(results, "1", "all Full", columns["own"])
        ax.axhline(sum(best) / len(best), color="black", linewidth=0.8, label="all Full, trained as long")
        for shift, (name, column) in zip((-0.2, 0.0, 0.2), columns.items()):
            for x, (retention, kind, _) in enumerate(shown):
                values = bits(results, retention, kind, column)
                label = names.get(name, name) if x == 0 else None
                ax.plot([x + shift] * len(values), values, "o", color=colors[name], markersize=5, alpha=0.8, label=label)
        ax.set(title=title, yscale="log", xticks=range(len(shown)), xlim=(-0.6, len(shown) - 0.4))
        ax.set_xticklabels([f"{retention}\n{kind}" for retention, kind, _ in shown])
        ax.set_yticks([0.8, 1.0, 1.25, 1.5, 2.0, 2.5])
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
    axes[0].set_ylabel("held-out text (bits per byte)")
    axes[0].legend(frameon=False)
    figure.savefig(out / "retrain.png", dpi=110)
    figure.savefig(out / "retrain.svg", metadata={"Date": None})


def main():
    results = json.loads((RESULTS / "retrain.json").read_text())
    print(table(results))
    draw(results, RESULTS)


if __name__ == "__main__":
    main()
