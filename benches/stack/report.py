"""Tables and plots of a run of stack.py:  python benches/stack/report.py DIR  (needs matplotlib)."""

import json
import statistics
import sys
from pathlib import Path

# arXiv 2603.12201, table 1: standard DSA over IndexCache, by context in thousands of tokens.
PAPER = {
    ("prefill", "c"): {10: 0.57 / 0.47, 60: 3.38 / 2.86, 120: 8.57 / 6.57, 200: 19.5 / 13.7},
    ("prefill", "d"): {10: 0.57 / 0.45, 60: 3.38 / 2.59, 120: 8.57 / 5.66, 200: 19.5 / 10.7},
    ("decode", "c"): {10: 84.5 / 73.5, 60: 80 / 67, 120: 77 / 63, 200: 73 / 58},
    ("decode", "d"): {10: 91 / 73.5, 60: 89.5 / 67, 120: 88 / 63, 200: 86 / 58},
}
# What was wanted: (work, arm, over): {context: ratio}.
WANTED = {
    ("prefill", "d", "a"): {200: 2.2, 60: 1.5},
    ("decode", "d", "a"): {200: 1.6},
}
STAGES = {  # As shares are shown; `select` is the indexer's scores and their top-k in one call.
    "indexer": "indexer's scores",
    "top-k": "top-k",
    "select": "scores and top-k, one call",
    "index writes": "index K and queries to fp8",
    "attention": "attention",
    "projections": "projections, norms, RoPE, KV write",
    "MoE": "MoE (first layer: MLP)",
    "head": "embedding, head",
}
GROUPS = {"projections, Full": "projections", "projections, Shared": "projections", "dense MLP": "MoE"}


def grouped(stages):
    out = {}
    for name, ms in stages.items():
        out[GROUPS.get(name, name)] = out.get(GROUPS.get(name, name), 0) + ms
    return out


def k(context):
    return context >> 10


def load(path):
    data = json.loads(Path(path).read_text())
    return {key: value for key, value in data.items() if key != "runs"}, data["runs"]


def prefills(runs):
    """{context: {arm: {seconds, low, high, stages, chunks, peak}}}."""
    out = {}
    for r in (r for r in runs if r["kind"] == "prefill"):
        out.setdefault(r["context"], {}).setdefault(r["arm"], []).append(r)
    return {c: {arm: merge(rows) for arm, rows in by.items()} for c, by in sorted(out.items())}


def merge(rows):
    seconds = [r["seconds"] for r in rows]
    stages = {}
    for r in rows:
        for chunk in r["chunks"]:
            for name, ms in grouped(chunk["stages"]).items():
                stages[name] = stages.get(name, 0) + ms / len(rows)
    return {"value": statistics.median(seconds), "all": seconds, "stages": stages,
            "peak": max(r.get("peak_bytes", 0) for r in rows)}  # fmt: skip


def decodes(runs, largest):
    """{context: {arm: {value (ms a step), all, stages, requests}}}, for one request or for the largest batch."""
    out, rows = {}, [r for r in runs if r["kind"] == "decode"]
    for context in sorted({r["context"] for r in rows}):
        here = [r for r in rows if r["context"] == context]
        requests = max(r["requests"] for r in here if r["arm"] == here[0]["arm"]) if largest else 1
        if largest and requests == 1:
            continue
        out[context] = {
            r["arm"]: {"value": r["ms"], "all": r["all_ms"], "stages": grouped(r["stages"]), "requests": requests,
                       "topk": r.get("topk", "")}
            for r in here if r["requests"] == requests
        }  # fmt: skip
    return out


def ratio(by, arm, over="a"):
    return by[over]["value"] / by[arm]["value"] if arm in by and over in by else None


def cell(x, digits=2, unit=""):
    return "–" if x is None else f"{x:.{digits}f}{unit}"


def spread(entry):
    return (max(entry["all"]) - min(entry["all"])) / entry["value"]


def times_table(table, arms, unit, digits, work):
    text = f"| context | {' | '.join(f'({a}) {unit}' for a in arms)} | "
    text += " | ".join(f"({a}) over (a)" for a in arms if a != "a") + " | paper 1/2, 1/4 | largest spread |\n"
    text += "|---" * (2 * len(arms) + 2) + "|\n"
    for context, by in table.items():
        name = f"{k(context)}K" + (
            f" x {next(iter(by.values()))['requests']}" if "requests" in next(iter(by.values())) else ""
        )
        values = [cell(by[a]["value"] if a in by else None, digits) for a in arms]
        ratios = [cell(ratio(by, a), 2, "x") for a in arms if a != "a"]
        paper = ", ".join(cell(PAPER[work, a].get(k(context)), 2, "x") for a in "cd")
        text += (
            " | ".join([f"| {name}", *values, *ratios, paper, f"{100 * max(map(spread, by.values())):.1f} %"]) + " |\n"
        )
    return text + "\n"


def share_table(table, arms):
    stages = [s for s in STAGES if any(s in e["stages"] for by in table.values() for e in by.values())]
    text = f"| context, arm | {' | '.join(STAGES[s] for s in stages)} |\n" + "|---" * (len(stages) + 1) + "|\n"
    for context, by in table.items():
        for arm in (a for a in arms if a in by):
            whole = sum(by[arm]["stages"].values())
            cells = [f"{100 * by[arm]['stages'].get(s, 0) / whole:.0f} %" for s in stages]
            text += f"| {k(context)}K ({arm}) | {' | '.join(cells)} |\n"
    return text + "\n"


def markdown(head, runs):
    arms = sorted(head["arms"])
    text = "".join(f"{key}: {head[key]}\n" for key in ("commit", "command", "card", "torch"))
    text += f"\n{head['dims']['layers']} layers; weights {head['weights_bytes'] / 1e9:.1f} GB, "
    text += f"KV and index K of {head['pool_tokens']} tokens; chunks of {head['chunk']} rows. Arms:\n\n"
    text += "".join(f"- ({a}) {head['arms'][a]['what']}\n" for a in arms) + "\n"
    table, one, many = prefills(runs), decodes(runs, False), decodes(runs, True)
    text += "## Prefill, seconds until the first token\n\n" + times_table(table, arms, "s", 3, "prefill")
    text += "## Decode of one request, ms a step\n\n" + times_table(one, arms, "ms", 3, "decode")
    if many:
        text += "## Decode of the largest batch that fits, ms a step\n\n" + times_table(many, arms, "ms", 3, "decode")
    text += "## What was wanted\n\n| | wanted | measured |\n|---|---|---|\n"
    for (work, arm, over), by_context in WANTED.items():
        for context, want in by_context.items():
            by = (table if work == "prefill" else one).get(context << 10)
            got = ratio(by, arm, over) if by else None
            text += f"| {work} {context}K, ({arm}) over ({over}) | {want}x | {cell(got, 2, 'x')} |\n"
    worst = {}
    for what, t in (("prefill", table), ("decode of one", one), ("decode of the largest batch", many)):
        found = [(ratio(by, "b"), k(c)) for c, by in t.items() if ratio(by, "b")]
        if found:
            worst[what] = min(found)
    text += "".join(f"| {w}, least (b) over (a), at {c}K | 1.1x | {r:.2f}x |\n" for w, (r, c) in worst.items()) + "\n"
    text += "## Share of time, prefill\n\n" + share_table(table, arms)
    text += "## Share of time, decode of one request\n\n" + share_table(one, arms)
    if many:
        text += "## Share of time, decode of the largest batch\n\n" + share_table(many, arms)
    text += "## Peak memory in prefill, GB\n\n| context | " + " | ".join(f"({a})" for a in arms) + " |\n"
    text += "|---" * (len(arms) + 1) + "|\n"
    for context, by in table.items():
        text += (
            f"| {k(context)}K | " + " | ".join(f"{by[a]['peak'] / 1e9:.1f}" if a in by else "–" for a in arms) + " |\n"
        )
    chosen = [r for r in runs if "selection" in r]
    if chosen:
        text += "\nWhat the last Full layer chose for rows of a prompt's last chunk (one row in 128 looked at):\n\n"
        names = list(chosen[0]["selection"])
        text += f"| context, arm | {' | '.join(names)} |\n" + "|---" * (len(names) + 1) + "|\n"
        for (context, arm), r in sorted({(r["context"], r["arm"]): r for r in chosen}.items()):
            cells = [str(v) if isinstance(v, bool) else f"{v:.3f}" for v in r["selection"].values()]
            text += f"| {k(context)}K ({arm}) | {' | '.join(cells)} |\n"
    checks = [r for r in runs if r["kind"] == "check"]
    failed = [r["what"] for r in checks if not r["ok"]]
    text += f"\nChecks before timing: {len(checks)}, failed: {', '.join(failed) or 'none'}.\n"
    text += "\nPublic top-k in decode, all exact; the fastest was taken:\n\n"
    for r in (r for r in runs if r["kind"] == "top-k"):
        times = ", ".join(f"{name} {us:.1f}" for name, us in sorted(r["us"].items(), key=lambda item: item[1]))
        text += f"- {r['requests']} x {k(r['context'])}K: {times} µs\n"
    return text


COLOURS = {"a": "#888888", "b": "#1f77b4", "c": "#2ca02c", "d": "#d62728", "e": "#ff7f0e"}


def plots(head, runs, folder):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = sorted(head["arms"])
    tables = {"prefill": prefills(runs), "decode, 1 request": decodes(runs, False)}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, (what, table) in zip(axes, tables.items()):
        for arm in (a for a in arms if a != "a"):
            points = [(k(c), ratio(by, arm)) for c, by in table.items() if ratio(by, arm)]
            axis.plot(*zip(*points), "o-", color=COLOURS[arm], label=f"({arm}) {head['arms'][arm]['what']}")
        for arm in "cd":
            points = PAPER[what.partition(",")[0], arm]
            label = f"paper, IndexCache {'1/2' if arm == 'c' else '1/4'} over its own standard DSA"
            axis.plot(points.keys(), points.values(), "x--", color=COLOURS[arm], alpha=0.5, label=label)
        axis.axhline(1, color=COLOURS["a"], linewidth=1)
        axis.set(title=what, xlabel="context, thousands of tokens", ylabel="times as fast as (a)")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7, loc="upper left")
    what = f"30B DSA model, {head['dims']['layers']} layers, one {head['card'].partition(',')[0]}"
    figure.suptitle(f"{what}; (a) is standard DSA on public kernels", fontsize=10)
    figure.tight_layout()
    save(figure, folder, "speedup")

    figure, axes = plt.subplots(1, 2, figsize=(13, 4.6))
    shades = dict(zip(STAGES, ["#b30000", "#d62728", "#ff9896", "#1f77b4", "#2ca02c", "#98df8a", "#9467bd", "#c7c7c7"]))
    for axis, (what, table) in zip(axes, tables.items()):
        at, ticks, names = 0, [], []
        for context, by in table.items():
            unit = sum(by["a"]["stages"].values()) if "a" in by else sum(next(iter(by.values()))["stages"].values())
            for arm in (a for a in arms if a in by):
                base = 0
                for stage, colour in shades.items():
                    height = 100 * by[arm]["stages"].get(stage, 0) / unit
                    axis.bar(
                        at, height, bottom=base, color=colour, width=0.85, label=STAGES[stage] if at == 0 else None
                    )
                    base += height
                ticks.append(at), names.append(f"{arm}\n{k(context)}K" if arm == arms[len(arms) // 2] else arm)
                at += 1
            at += 0.7
        axis.set(title=what, ylabel="% of (a)'s time at that context")
        axis.set_xticks(ticks, names)
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in shades.values()]
    figure.legend(handles, [STAGES[s] for s in shades], loc="lower center", ncol=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    save(figure, folder, "shares")


def save(figure, folder, name):
    for kind in ("png", "svg"):
        figure.savefig(folder / f"{name}.{kind}", dpi=130, metadata={"Date": None} if kind == "svg" else None)


def main():
    folder = Path(sys.argv[1])
    head, runs = load(folder / "stack.json")
    (folder / "stack.md").write_text(markdown(head, runs))
    plots(head, runs, folder)


if __name__ == "__main__":
    main()
