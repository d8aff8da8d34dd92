"""Times for `indexcache bench stack --simulate` from a run of stack.py:  python benches/stack/times.py DIR"""

import json
import statistics
import sys
from pathlib import Path

from report import load

# Of the same kind of card, by `indexcache bench indexer` (docs/measured/peers).
CEILINGS = {"read_gb_s": 3079, "fp8_tflop_s": 1745, "bf16_tflop_s": 924}


def config(dims):
    return {
        "model_type": "glm_moe_dsa",
        "hidden_size": dims["hidden"],
        "intermediate_size": dims["dense"],
        "moe_intermediate_size": dims["expert"],
        "n_routed_experts": dims["experts"],
        "num_experts_per_tok": dims["active"],
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 47,
        "num_attention_heads": dims["heads"],
        "q_lora_rank": dims["q_rank"],
        "kv_lora_rank": dims["kv_rank"],
        "qk_nope_head_dim": dims["nope"],
        "qk_rope_head_dim": dims["rope"],
        "v_head_dim": dims["v"],
        "vocab_size": dims["vocabulary"],
        "index_n_heads": dims["index_heads"],
        "index_head_dim": dims["index_dim"],
        "index_topk": dims["topk"],
        "torch_dtype": "bfloat16",
    }


class Points:
    """Values by key; the median of them stands."""

    def __init__(self, head):
        self.head, self.at = head, {}

    def add(self, us, stage, phase, rows, by=None, context=None):
        dims, key = self.head["dims"], {"stage": stage, "phase": phase, "rows": rows}
        if by:
            key["by"] = by
        if context:
            key |= {
                "context": context,
                "heads": dims["index_heads" if stage == "select" else "heads"],
                "topk": dims["topk"],
            }
        self.at.setdefault(tuple(key.items()), []).append(us)

    def step(self, stages, arm, phase, rows, context, scale):
        """One pass: milliseconds by stage, each over all layers that have it."""
        letters, by = arm["pattern"], arm["by"]
        full, shared = letters.count("F"), letters.count("S")
        ms = {name: value * scale * 1e3 for name, value in stages.items()}
        chosen = ms.get("select", 0) + ms.get("indexer", 0) + ms.get("top-k", 0)
        self.add(chosen / full, "select", phase, rows, by, context)
        self.add(ms["attention"] / len(letters), "attend", phase, rows, by, context)
        self.add(ms["dense MLP"], "dense_mlp", phase, rows)
        if len(letters) > 1:
            self.add(ms["MoE"] / (len(letters) - 1), "moe", phase, rows)
        if shared:
            own = ms["projections, Shared"] / shared
            self.add(own, "projections", phase, rows)
            self.add(
                max(ms["projections, Full"] / full - own, 0) + ms["index writes"] / full, "indexer", phase, rows, by
            )

    def times(self):
        return [
            dict(key) | {"us": round(statistics.median(values), 3)} for key, values in sorted(self.at.items(), key=str)
        ]


def main():
    folder = Path(sys.argv[1])
    head, runs = load(folder / "stack.json")
    points, arms = Points(head), {}
    for r in runs:
        if r["kind"] not in ("prefill", "decode"):
            continue
        arm = head["arms"][r["arm"]]
        if r["kind"] == "prefill":
            for chunk in r["chunks"]:
                points.step(chunk["stages"], arm, "prefill", chunk["rows"], chunk["end"], 1)
            points.add(r["chunks"][-1]["stages"]["head"] * 1e3, "head", "prefill", 1)
            key, us = (arm["by"], arm["pattern"], "prefill", r["context"], r["context"]), r["seconds"] * 1e6
        else:
            scale = r["ms"] / sum(
                r["stages"].values()
            )  # The marks in the graph take time; the step without them counts.
            points.step(r["stages"], arm, "decode", r["requests"], r["context"], scale)
            points.add(r["stages"]["head"] * scale * 1e3, "head", "decode", r["requests"])
            key, us = (arm["by"], arm["pattern"], "decode", r["context"], r["requests"]), r["ms"] * 1e3
        arms.setdefault(key, []).append(us)
    out = {name: head[name] for name in ("card", "commit", "command")}
    out |= {"ceilings": CEILINGS, "config": config(head["dims"])}
    names = ("by", "pattern", "phase", "context", "rows")
    arms = [dict(zip(names, key)) | {"us": round(statistics.median(us), 1)} for key, us in arms.items()]
    text = json.dumps(out, indent=2)[:-2]
    for name, rows in (("times", points.times()), ("arms", arms)):
        text += f',\n  "{name}": [\n    ' + ",\n    ".join(json.dumps(row) for row in rows) + "\n  ]"
    (folder / "times.json").write_text(text + "\n}\n")


if __name__ == "__main__":
    main()
