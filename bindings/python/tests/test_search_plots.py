"""The pictures of a search: what they show, that print can carry it, and that the same input gives the same bytes."""

import csv
import io
import itertools
import json
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest

import indexcache as ix

pytest.importorskip("matplotlib", reason="matplotlib was not found")

from matplotlib import rc_context
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from indexcache import search_plots as plots

LAYERS = 8
PATTERN = "FFSSSFSS"


def rise(pattern, scale=1.0):
    """Layer 1 is dear, 3 is better off Shared, and layers cost more the longer their selection is reused."""
    age, total = 0, 0.0
    for layer, role in enumerate(pattern):
        age = 0 if role == "F" else age + 1
        total += age * {1: 0.3, 3: -0.0004}.get(layer, 0.004)
    return scale * total


def report(scale=1.0):
    def row(kind, pattern, seed=None):
        losses = {"calibration_loss": 0.6 + rise(pattern, scale), "held_out_loss": 0.8 + rise(pattern)}
        return {"kind": kind, "full_layers": pattern.count("F"), "pattern": pattern, **losses, "seed": seed}

    steps = ["FFFSFFFF", "FFSSFFFF", "FFSSSFFF", "FFSSSFFS", PATTERN.replace("SFSS", "SSFS"), "FFSSSSSS", "FSSSSSSS"]
    uniform = ["FFFFFFFS", "FFFSFFFS", "FFSFSFSF", "FSFSFSFS", "FSSFSSFS", "FSSSFSSS", "FSSSSSSS"]
    similar = ["FFFFFFSF", "FFFFFSSF", "FFFSFSFS", "FFSSFSSS", "FFSSSSFS", "FFSSSSSS", "FSSSSSSS"]
    table = [row("all-full", "F" * LAYERS)]
    for kind, patterns in (("greedy", steps), ("uniform", uniform), ("similarity", similar)):
        table += [row(kind, pattern) for pattern in patterns]
    table += [row("random", pattern, seed) for seed, pattern in enumerate(["FSSFFSSF", "FSFSSFSF", "FFSFSSSF"])]
    table.append(row("greedy+swaps", PATTERN))
    alone = ["F" * layer + "S" + "F" * (LAYERS - layer - 1) for layer in range(1, LAYERS)]
    return {
        "format": "indexcache-search-report/1",
        "result": {"layers": LAYERS, "steps": [], "patterns": {"1/4": {"full_layers": 3, "pattern": PATTERN}}},
        "table": table,
        "overlap": [[1 - abs(i - j) / 10 for j in range(LAYERS)] for i in range(LAYERS)],
        "sensitivity": [
            {"layer": layer, "loss": 0.6 + rise(p, scale), "rise": rise(p, scale)} for layer, p in enumerate(alone, 1)
        ],
    }


@pytest.fixture
def paths(tmp_path):
    found = []
    for name, scale in (("a", 1.0), ("b", 0.9), ("c", 1.2)):
        found.append(tmp_path / f"{name}.json")
        found[-1].write_text(json.dumps(report(scale)))
    return found


def figures(paths):
    reports = [plots.Report.read(path) for path in paths]
    with rc_context(plots.STYLE):
        yield plots.overlap_figure(reports[0], reports[0].overlap)
        yield plots.loss_figure(reports)
        yield plots.sensitivity_figure(reports)


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_every_picture_comes_with_its_data(paths, tmp_path):
    written = plots.draw(paths[:1], tmp_path / "out")
    names = [f"{name}.{kind}" for name in ("overlap", "loss", "sensitivity") for kind in ("png", "svg", "csv")]
    assert [p.name for p in written] == names
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(names)
    for path in written:
        data = path.read_bytes()
        if path.suffix == ".png":
            assert data.startswith(b"\x89PNG")
        if path.suffix == ".svg":
            assert ET.fromstring(data).tag.endswith("svg")
    data = report()
    cells = {(int(r["selected_by"]), int(r["covered"])): float(r["overlap"]) for r in table(tmp_path / "out/overlap.csv")}
    assert cells == {(i, j): v for i, row in enumerate(data["overlap"]) for j, v in enumerate(row)}
    for got, want in itertools.zip_longest(table(tmp_path / "out/loss.csv"), data["table"]):
        want = {"report": "a", **{key: "" if value is None else str(value) for key, value in want.items()}}
        assert got == want
    rises = {int(r["layer"]): float(r["rise"]) for r in table(tmp_path / "out/sensitivity.csv")}
    assert rises == {r["layer"]: r["rise"] for r in data["sensitivity"]}


def test_the_same_input_gives_the_same_bytes(paths, tmp_path):
    first = plots.draw(paths, tmp_path / "first")
    second = plots.draw(paths, tmp_path / "second")
    assert [p.name for p in first[::3]] == [*(f"overlap-{n}.png" for n in "abc"), "loss.png", "sensitivity.png"]
    for one, other in zip(first, second):
        assert one.read_bytes() == other.read_bytes(), one.name


@pytest.mark.parametrize("count", [1, 3])
def test_no_text_is_cut_or_hidden(paths, count, monkeypatch):
    drawn, draw = [], Text.draw
    monkeypatch.setattr(Text, "draw", lambda text, renderer: (drawn.append(text), draw(text, renderer)))
    for figure in figures(paths[:count]):
        drawn.clear()
        figure.savefig(io.BytesIO(), dpi=figure.dpi)
        texts = list(dict.fromkeys(t for t in drawn if t.get_visible() and t.get_text()))
        assert len(texts) > 15
        page = figure.bbox.padded(0.5)
        for text in texts:
            box = text.get_window_extent()
            assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text
            assert text.get_fontsize() >= 7
        for one, other in itertools.combinations(texts, 2):
            assert not one.get_window_extent().overlaps(other.get_window_extent()), (one, other)
        assert all(axes.get_xlabel() and axes.get_title() for axes in figure.axes if axes.get_label() != "<colorbar>")


def test_curves_have_names_and_need_no_colour(paths):
    _, figure, _ = figures(paths)
    every = {series.label for series in plots.SERIES.values()}
    for axes in figure.axes:
        assert {t.get_text() for t in axes.texts if t.get_text()} == every
    looks = [(series.line, series.marker) for series in plots.SERIES.values()]
    assert len(set(looks)) == len(looks)


def test_the_loss_curve_is_the_mean_rise_with_its_range(paths):
    _, figure, _ = figures(paths)
    calibration, held_out = figure.axes
    for axes, scales in ((calibration, (1.0, 0.9, 1.2)), (held_out, (1.0, 1.0, 1.0))):
        (greedy,) = [line for line in axes.lines if line.get_marker() == "o"]
        patterns = ["F" * LAYERS] + [r["pattern"] for r in report()["table"] if r["kind"] == "greedy"]
        assert list(greedy.get_xdata()) == list(range(LAYERS, 0, -1))
        mean = [sum(rise(p, s) for s in scales) / 3 for p in patterns]
        assert np.allclose(greedy.get_ydata(), mean, rtol=0, atol=1e-12)
        spans = [s for c in axes.collections for s in c.get_segments() if s[0][0] == s[1][0] == 1]
        ends = sorted((rise("FSSSSSSS", s) for s in scales))
        assert any(np.allclose([s[0][1], s[1][1]], [ends[0], ends[-1]], rtol=0, atol=1e-12) for s in spans)
    assert "mean and range of 3 reports" in calibration.get_ylabel() and "bits per byte" in calibration.get_ylabel()


def test_boxes_are_the_pattern_s_blocks(paths):
    assert plots.blocks(PATTERN) == [(0, 1), (1, 5), (5, 8)]
    figure, _, _ = figures(paths)
    boxes = {(p.get_x() + 0.5, p.get_width(), p.get_height()) for p in figure.axes[0].patches if isinstance(p, Rectangle)}
    assert boxes == {(0, 1, 1), (1, 4, 4), (5, 3, 3)}


def test_a_fall_is_an_open_marker(paths):
    _, _, figure = figures(paths[:1])
    (axes,) = figure.axes
    dots = {round(line.get_xdata()[0]): line for line in axes.lines if line.get_marker() == "o"}
    assert {layer for layer, dot in dots.items() if dot.get_markerfacecolor() == "white"} == {3}
    assert {layer: dot.get_ydata()[0] for layer, dot in dots.items()} == {
        r["layer"]: abs(r["rise"]) for r in report()["sensitivity"]
    }
    low, high = axes.get_ylim()
    assert all(low < dot.get_ydata()[0] < high for dot in dots.values())


def test_a_search_s_own_result_will_do(tmp_path):
    desc = ix.SearchDesc(layers=5, topk=8, model="m", calibration="c", row_lengths=[9], swap_full_layers=2)
    search = ix.Search(desc)
    while (candidate := search.next()) is not None:
        search.report(candidate.pattern, 1.5 + rise(candidate.pattern + "FFF"))
    path = tmp_path / "result.json"
    path.write_text(json.dumps(search.result()))
    written = plots.draw([path], tmp_path / "out")
    assert [p.name for p in written[::3]] == ["loss.png", "sensitivity.png"]
    greedy = [r for r in table(tmp_path / "out/loss.csv") if r["kind"] == "greedy"]
    steps = search.result()["steps"]
    assert [(r["pattern"], float(r["calibration_loss"])) for r in greedy] == [(s["pattern"], s["loss"]) for s in steps]
    rises = {int(r["layer"]): float(r["rise"]) for r in table(tmp_path / "out/sensitivity.csv")}
    assert rises == {e["layer"]: e["loss"] - 1.5 for e in steps[0]["evaluated"]}
    # Before the first loss there is nothing to draw.
    path.write_text(json.dumps(ix.Search(desc).result()))
    with pytest.raises(plots.ReportError, match="expected the loss of the all-Full pattern"):
        plots.draw([path], tmp_path / "none")


def broken(change):
    data = report()
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    "content, why",
    [
        ("{", "Expecting property name"),
        ("[]", 'expected "format"'),
        ('{"format": "indexcache-search-journal/1"}', "got 'indexcache-search-journal/1'"),
        (broken(lambda d: d.pop("overlap")), "KeyError: 'overlap'"),
        (broken(lambda d: d["overlap"].pop()), "expected 8 x 8 numbers, got shape"),
        (broken(lambda d: d["overlap"][0].__setitem__(1, 1.5)), "expected numbers from 0 to 1"),
        (broken(lambda d: d["overlap"][0].__setitem__(1, math.nan)), "expected numbers from 0 to 1"),
        (broken(lambda d: d["table"].pop(0)), "loss of the all-Full pattern"),
        (broken(lambda d: d["table"][1].update(calibration_loss=math.nan)), "expected finite losses, got nan"),
        (broken(lambda d: d["table"][1].update(kind="other")), "unknown kind 'other'"),
        (broken(lambda d: d["table"][1].update(pattern="FF")), "expected patterns of 8 letters"),
        (broken(lambda d: d["sensitivity"][0].update(rise=None)), "TypeError"),
    ],
)
def test_refusals(tmp_path, capsys, content, why):
    path = tmp_path / "report.json"
    path.write_text(content)
    assert plots.main([str(path), "--out", str(tmp_path / "out")]) == 1
    output = capsys.readouterr()
    assert output.out == "" and why in output.err and str(path) in output.err
    assert not (tmp_path / "out").exists()


def test_reports_that_do_not_belong_together(paths, tmp_path):
    data = report()
    data["result"]["layers"] = 2
    data.update(overlap=[[1, 1], [1, 1]], sensitivity=[], table=[{**data["table"][0], "pattern": "FF", "full_layers": 2}])
    data["result"]["patterns"] = {"1/4": {"pattern": "FS"}}
    paths[1].write_text(json.dumps(data))
    with pytest.raises(plots.ReportError, match="expected 8 layers, bits per byte as in .*a.json, got 2 layers"):
        plots.draw(paths, tmp_path / "out")
    with pytest.raises(plots.ReportError, match="different file names"):
        plots.draw([paths[0], paths[0]], tmp_path / "out")
