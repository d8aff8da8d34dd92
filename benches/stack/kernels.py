"""Adds shapes that a run of stack.py has not to its times:  python benches/stack/kernels.py times.json peers.json...

They are of `benches/peers.py`, for `indexcache bench stack --simulate`: select and attend at other numbers of heads, ours and
the fastest public candidate whose result is right. Attention in prefill is over bf16 rows there, without widening them.
Select in decode is left out: its time is that of reading index K, however many heads there are.
"""

import json
import re
import sys
from pathlib import Path

CONTEXT, TOPK = 32768, 2048  # Of what a decode case does not name.


def shape(section, case):
    """A case as times.json has it, or None for what is no stage of a decoder."""
    if section == "prefill" and (m := re.fullmatch(r"(\d+) x (\d+)( causal)?, (\d+) heads", case)):
        rows, keys, heads = int(m[1]), int(m[2]), int(m[4])
        # Where every row sees all keys: as many pairs as a chunk this far has under the causal mask.
        context = keys if m[3] else keys + rows // 2
        return {"stage": "select", "phase": "prefill", "rows": rows, "context": context, "heads": heads}
    if section == "attend" and (m := re.fullmatch(r"(\d+) x (\d+) heads, KV (\d+), ascending", case)):
        return {"stage": "attend", "phase": "prefill", "rows": int(m[1]), "context": int(m[3]), "heads": int(m[2])}
    if section == "attend decode" and (m := re.fullmatch(r"fp8 (\d+) x 1 queries x (\d+) heads", case)):
        return {"stage": "attend", "phase": "decode", "rows": int(m[1]), "context": CONTEXT, "heads": int(m[2])}
    return None


def points(runs):
    """The fastest right one of each side, by shape."""
    best = {}
    for run in runs:
        at = shape(run["section"], run["case"])
        if at is None or run.get("wrong") or "us" not in run:
            continue
        by = "indexcache" if run["peer"] == "indexcache" else "public"
        key = tuple((at | {"by": by, "topk": TOPK}).items())
        best[key] = min(run["us"], best.get(key, run["us"]))
    return [dict(key) | {"us": round(us, 3)} for key, us in best.items()]


def main():
    path, *reports = map(Path, sys.argv[1:])
    file = json.loads(path.read_text())
    kind = lambda time: tuple(time.get(key) for key in ("stage", "phase", "by", "heads"))
    there = {kind(time) for time in file["times"]}
    for report in reports:
        peers = json.loads(report.read_text())
        more = [time for time in points(peers["runs"]) if kind(time) not in there]
        if more:
            file["times"] += more
            file["command"] += f"; other heads: {peers['command']}, commit {peers['commit']}"
    lines = {name: ",\n    ".join(map(json.dumps, file.pop(name))) for name in ("times", "arms")}
    text = json.dumps(file, indent=2)[:-2]
    for name, rows in lines.items():
        text += f',\n  "{name}": [\n    {rows}\n  ]'
    path.write_text(text + "\n}\n")


if __name__ == "__main__":
    main()
