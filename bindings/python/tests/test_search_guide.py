"""docs/search.md: its Python runs as it stands there, and its table of costs is what the search says."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import indexcache as ix

DOCS = Path(__file__).parents[3] / "docs"
GUIDE = (DOCS / "search.md").read_text(encoding="utf-8")
LAYERS = 61


def block(language, word):
    """The one block of code that has this word."""
    (found,) = [b for b in GUIDE.split(f"```{language}\n")[1:] if word in b.partition("```")[0]]
    return found.partition("```")[0]


def loss(pattern):
    """The longer a selection is reused the dearer, and some layers more than others."""
    age = total = 0
    for layer, role in enumerate(pattern):
        age = 0 if role == "F" else age + 1
        total += age * (1 + layer * 7 % 13)
    return 2.0 + total / 1024


def plain_greedy(layers, target):
    pattern = "F" * layers
    while pattern.count("F") > target:
        flips = [pattern[:l] + "S" + pattern[l + 1 :] for l in range(1, layers) if pattern[l] == "F"]
        pattern = min(flips, key=loss)
    return pattern


MODEL = """
import os, signal
from test_search_guide import loss
rows, weights_hash, calibration_hash, left = [[0] * 2049], "w", "c", 700
def mean_loss(candidate):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(candidate.pattern)
"""


def test_the_loop(tmp_path):
    """In processes that are killed."""
    (tmp_path / "my_model.py").write_text(MODEL)
    (tmp_path / "find_pattern.py").write_text(block("python", "my_model"))
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(ix.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "find_pattern.py"]
    runs = [subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) for _ in range(3)]
    # 699 losses each, of 1711.
    assert [run.returncode for run in runs] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["complete"] and result["evaluations"] == 1711
    assert result["patterns"]["1/4"]["pattern"] == plain_greedy(LAYERS, 16)


class ToyModel:
    """States that remember everything that led to them."""

    def __init__(self):
        self.layers_run = 0

    def embed(self, row):
        return tuple(row)

    def layer(self, layer, role, state):
        self.layers_run += 1
        return (hash((layer, ord(role), *state)),)

    def loss(self, state, row):
        return (state[0] % 1000003) / 1000003 * len(row)


def test_starting_in_the_middle_changes_nothing():
    code = {}
    exec(block("python", "class MeanLoss"), code)
    rows, layers = [[1, 2, 3], [4, 5, 6, 7]], 9
    results, work = [], []
    for fresh in (False, True):
        model = ToyModel()
        mean_loss = code["MeanLoss"](model, rows)
        desc = ix.SearchDesc(layers=layers, topk=2, model="m", calibration="c", row_lengths=[3, 4], swap_full_layers=4)
        search = ix.Search(desc)
        while (candidate := search.next()) is not None:
            if fresh:
                mean_loss = code["MeanLoss"](model, rows)
            search.report(candidate.pattern, mean_loss(candidate))
        results.append(search.result())
        work.append(model.layers_run)
    assert results[0] == results[1]
    assert work[1] == results[0]["evaluations"] * layers * len(rows)
    assert work[0] < 0.8 * work[1]


def test_the_table_of_costs():
    section = GUIDE.partition("## What it costs")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert len(lines) == 3
    for line in lines:
        layers, *told = (int(cell) for cell in line.strip("| ").split("|"))
        quarter, stage = -(-layers // 4), [layers * i // 4 for i in range(4)]
        lazy = dict(method=ix.SEARCH_LAZY, few=8, target_full_layers=quarter)
        for kw, number in zip(
            ({}, dict(target_full_layers=quarter), dict(target_full_layers=quarter, stages=stage), lazy, {**lazy, "stages": stage}),
            told,
        ):  # fmt: skip
            desc = ix.SearchDesc(layers=layers, topk=2048, model="m", calibration="c", row_lengths=[4096], **kw)
            assert ix.Search(desc).next().expected == number, (line, kw)
        assert told[0] == 1 + layers * (layers - 1) // 2 and len(told) == 5


def test_the_small_model_s_numbers():
    """Those of the reports that are beside the guide."""
    reports = [json.loads(path.read_text()) for path in sorted((DOCS / "measured/search").glob("set-*.json"))]
    assert len(reports) == 3
    found = {}
    for row in (row for report in reports for row in report["table"]):
        found.setdefault((row["kind"], row["full_layers"]), set()).add(f"{row['held_out_loss']:.4f}")
    section = GUIDE.partition("## What a small model shows")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    assert rows[0][1:] == ["all Full", "greedy", "similarity", "uniform"] and len(rows) == 7
    for layers, *told in rows[2:]:
        for kind, text in zip(("all-full", "greedy", "similarity", "uniform"), told):
            numbers = sorted(found.get((kind, int(layers)), ())) if text or kind == "all-full" else []
            assert text == "–".join(dict.fromkeys([*numbers[:1], *numbers[-1:]])), (layers, kind)
    quarters = {report["result"]["patterns"]["1/4"]["pattern"] for report in reports}
    assert quarters == {"FFSSSSSFSSSS"} and "`FFSSSSSFSSSS`" in section


def test_the_pictures_are_of_those_reports(tmp_path):
    plots = pytest.importorskip("indexcache.search_plots", reason="matplotlib was not found")
    drawn = plots.draw(sorted((DOCS / "measured/search").glob("set-*.json")), tmp_path)
    # The data byte for byte; the pictures' bytes depend on matplotlib's version.
    for path in drawn:
        committed = DOCS / "measured/search" / path.name
        assert committed.exists()
        if path.suffix == ".csv":
            assert path.read_bytes() == committed.read_bytes()
