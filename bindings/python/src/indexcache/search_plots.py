"""Pictures of a pattern search: ``python -m indexcache.search_plots REPORT… --out DIR``.

A report is what ``indexcache search`` writes. A search result (``Search.result``) will do as well: it has no baselines, no
held-out text and no overlap, so those are not drawn. Each picture comes as PNG, as SVG and as the CSV that it shows. Several
reports (of different calibration sets, say) share the curves, with their spread. Needs matplotlib.
"""

import argparse
import csv
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
from matplotlib import patheffects, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullFormatter, SymmetricalLogLocator
from matplotlib.transforms import Bbox

REPORT = "indexcache-search-report/1"
RESULT = "indexcache-search/1"
WIDTH = 6.3  # Inches: the text width of an A4 page.
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "indexcache",  # The same input gives the same bytes.
}


class ReportError(Exception):
    """A report that cannot be drawn: which file, what was expected, what is there."""


@dataclass(frozen=True)
class Series:
    """How a kind of pattern is drawn: told apart by line and marker, without colour."""

    label: str
    color: str
    line: str
    marker: str
    fill: bool = True


SERIES = {
    "greedy": Series("greedy", "black", "-", "o"),
    "greedy+swaps": Series("greedy + swaps", "#009e73", "", "*"),
    "uniform": Series("uniform", "#0072b2", "--", "s", fill=False),
    "similarity": Series("similarity", "#d55e00", "-.", "^", fill=False),
    "random": Series("random", "0.55", "", "x"),
}


@dataclass(frozen=True)
class Report:
    """What of a report is drawn, checked."""

    name: str
    layers: int
    unit: str
    pattern: str  # Whose blocks and roles are shown.
    table: List[Dict[str, Any]]
    sensitivity: List[Dict[str, Any]]
    overlap: Optional["np.ndarray[Any, Any]"]

    @classmethod
    def read(cls, path: Path) -> "Report":
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ReportError(f"{path}: {error}") from error
        form = data.get("format") if isinstance(data, dict) else None
        if form not in (REPORT, RESULT):
            raise ReportError(f'{path}: expected "format": "{REPORT}" or "{RESULT}", got {form!r}')
        try:
            return cls._of_report(path.stem, data) if form == REPORT else cls._of_result(path.stem, data)
        except (KeyError, TypeError, ValueError) as error:
            raise ReportError(f"{path}: not a whole {form}: {type(error).__name__}: {error}") from error

    @classmethod
    def _of_report(cls, name: str, data: Dict[str, Any]) -> "Report":
        layers, overlap = data["result"]["layers"], np.array(data["overlap"], dtype=float)
        if overlap.shape != (layers, layers):
            raise ValueError(f"overlap: expected {layers} x {layers} numbers, got shape {overlap.shape}")
        if not np.all((overlap >= 0) & (overlap <= 1)):
            raise ValueError("overlap: expected numbers from 0 to 1")
        pattern = cls._shown(data["result"])
        return cls(name, layers, "bits per byte", pattern, data["table"], data["sensitivity"], overlap)._checked()

    @classmethod
    def _of_result(cls, name: str, result: Dict[str, Any]) -> "Report":
        layers, base = result["layers"], result["all_full_loss"]
        keys = ("kind", "full_layers", "pattern", "calibration_loss", "held_out_loss", "seed")
        table = [dict(zip(keys, ("all-full", layers, "F" * layers, base, None, None)))]
        for step in result["steps"]:
            table.append(dict(zip(keys, ("greedy", step["full_layers"], step["pattern"], step["loss"], None, None))))
        for swap in result["swaps"][-1:]:
            table.append(dict(zip(keys, ("greedy+swaps", swap["full_layers"], swap["pattern"], swap["loss"], None, None))))
        # What the first step tried are all-Full patterns with one layer Shared.
        first = result["steps"][0]["evaluated"] if result["steps"] else []
        alone = [{**tried, "rise": tried["loss"] - base} for tried in first]
        return cls(name, layers, "loss", cls._shown(result), table, alone, None)._checked()

    @staticmethod
    def _shown(result: Dict[str, Any]) -> str:
        """The pattern of 1/4, or the last one of a search that stopped before it."""
        if "1/4" in result["patterns"]:
            return str(result["patterns"]["1/4"]["pattern"])
        return str(result["steps"][-1]["pattern"] if result["steps"] else "F" * result["layers"])

    def _checked(self) -> "Report":
        for row in self.table:
            if row["kind"] not in {"all-full", *SERIES}:
                raise ValueError(f"table: unknown kind {row['kind']!r}")
            for loss in (row["calibration_loss"], row["held_out_loss"]):
                if loss is not None and not math.isfinite(loss):
                    raise ValueError(f"table: expected finite losses, got {loss!r}")
            for pattern in (row["pattern"], self.pattern):
                if len(pattern) != self.layers or pattern[0] != "F" or not set(pattern) <= set("FS"):
                    raise ValueError(f"expected patterns of {self.layers} letters F and S from F on, got {pattern!r}")
        if not any(row["kind"] == "all-full" and row["calibration_loss"] is not None for row in self.table):
            raise ValueError("expected the loss of the all-Full pattern, got none")
        for row in self.sensitivity:
            if not (math.isfinite(row["rise"]) and 0 <= row["layer"] < self.layers):
                raise ValueError(f"sensitivity: expected a layer and its finite rise, got {row!r}")
        return self

    def points(self, kind: str, loss: str) -> List[Tuple[float, float]]:
        """Full layers and rise over all-Full of every pattern of a kind."""
        found = [(r["full_layers"], r[loss]) for r in self.table if r["kind"] == kind and r[loss] is not None]
        base = [r[loss] for r in self.table if r["kind"] == "all-full" and r[loss] is not None]
        if not base:
            return []
        # Every curve but the random dots starts from the pattern they share.
        start = [(self.layers, base[0])] if SERIES[kind].line and all(n != self.layers for n, _ in found) else []
        return [(n, value - base[0]) for n, value in start + sorted(found, reverse=True)] if found else []


def blocks(pattern: str) -> List[Tuple[int, int]]:
    """Each Full layer with the end of the Shared layers that use its selection."""
    full = [layer for layer, role in enumerate(pattern) if role == "F"]
    return list(zip(full, [*full[1:], len(pattern)]))


def _plain(value: float, _: object = None) -> str:
    """A number without an exponent."""
    return f"{value:.12f}".rstrip("0").rstrip(".")


def _ticks(layers: int) -> List[int]:
    return list(range(0, layers, 1 if layers <= 24 else 5 if layers <= 50 else 10))


def overlap_figure(report: Report, overlap: "np.ndarray[Any, Any]") -> Figure:
    """Heat map of what share of a layer's own selection another layer's selection covers."""
    n = report.layers
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    axes = figure.add_subplot()
    digits = n <= 16
    # Under black digits, no darker than they can be read on.
    greys = LinearSegmentedColormap.from_list("greys", ["1", "0.42" if digits else "0"])
    image = axes.imshow(overlap, cmap=greys, vmin=0, vmax=1)
    axes.spines[["top", "right"]].set_visible(True)
    if digits:
        for (i, j), value in np.ndenumerate(overlap):
            # Two digits that fit the cell: ".57", and "1" on the diagonal.
            text = f"{value:.2f}".lstrip("0") if value < 0.995 else "1"
            axes.text(j, i, text, ha="center", va="center", size=7)
    line = 1.8 if digits else 1.2
    for color, width, layer in (("white", 2 * line, 2), ("#d55e00", line, 3)):
        for first, end in blocks(report.pattern):
            corner, size = (first - 0.5, first - 0.5), end - first
            box = Rectangle(corner, size, size, fill=False, edgecolor=color, linewidth=width, joinstyle="miter")
            axes.add_patch(box).set(zorder=layer, clip_on=False)
    full = report.pattern.count("F")
    axes.set(
        title=f"Overlap of selections; boxes: blocks of the searched pattern, {full} of {n} layers Full",
        xlabel="layer whose own selection is covered",
        ylabel="layer whose selection is reused",
        xticks=_ticks(n),
        yticks=_ticks(n),
    )
    figure.colorbar(image, ax=axes, label="share of the selection covered", shrink=0.85)
    return figure


Curve = Tuple[Series, List[Tuple[float, float]]]


def _place_labels(axes: Axes, curves: Sequence[Curve]) -> None:
    """Writes each curve's name near one of its points, where it is clearest of all curves and names."""
    figure: Any = axes.figure
    figure.draw_without_rendering()  # Settles where data lands.
    point = figure.dpi / 72
    inside = axes.get_window_extent().padded(-3 * point)
    marks = [axes.transData.transform(np.array(points, dtype=float)) for _, points in curves]
    # Each curve as a cloud of dots; random patterns are dots to begin with.
    clouds = [
        np.concatenate([m, *(np.linspace(a, b, 60) for a, b in zip(m, m[1:]) if series.line)])
        for (series, _), m in zip(curves, marks)
    ]
    taken: List[Bbox] = []
    leaders = np.empty((0, 2))
    # The fewer its points, the fewer the places for its name.
    for index in sorted(range(len(curves)), key=lambda i: len(curves[i][1])):
        series, points = curves[index]
        color = "0.3" if series.label == "random" else series.color
        label = axes.annotate(series.label, points[0], (0, 0), textcoords="offset points", color=color)
        size = np.array(label.get_window_extent().size)
        rest = np.concatenate([cloud for at, cloud in enumerate(clouds) if at != index] or [np.empty((0, 2))])
        lines = np.concatenate([rest, leaders])
        best: Tuple[float, Any] = (math.inf, None)
        for at, anchor in enumerate(marks[index]):
            if at == 0 and series.line:
                continue  # All-Full, where all curves start.
            # A name at a point that curves share would be anybody's.
            shared = 60.0 * (_within(Bbox([anchor, anchor]).padded(6 * point), rest) > 0)
            for radius in (6, 12, 20, 32, 46, 64):
                for angle in np.arange(16) * np.pi / 8:
                    way = np.array([np.cos(angle), np.sin(angle)])
                    low = anchor + way * (radius * point + size / 2) - size / 2
                    room = Bbox([low, low + size])
                    corners = np.array([room.p0, room.p1])
                    if not (inside.p0 <= corners).all() or not (corners <= inside.p1).all():
                        continue
                    if any(room.padded(3 * point).overlaps(other) for other in taken):
                        continue
                    near = np.clip(anchor, room.p0, room.p1)
                    leader = np.linspace(anchor, near, 12)[2:]
                    if any(_within(other, leader) for other in taken):
                        continue
                    cost = shared + radius / 4 + 20.0 * _within(room.padded(2 * point), clouds[index])
                    cost += 20.0 * _within(room.padded(4 * point), lines)
                    if cost >= best[0]:
                        continue
                    cost += 30.0 * sum(_within(Bbox([p, p]).padded(3 * point), lines) > 0 for p in leader)
                    if cost < best[0]:
                        best = (cost, (points[at], low - anchor, near - anchor, room))
        label.remove()
        # A crowded panel may have no room inside: then the name goes above the curve's end.
        box: Optional[Bbox]
        where, low, near, box = best[1] or (points[-1], np.array([-size[0], 6 * point]), np.zeros(2), None)
        text = axes.annotate(
            series.label, where, low / point, textcoords="offset points", color=color, ha="left", va="bottom"
        )  # fmt: skip
        text.set_path_effects([patheffects.withStroke(linewidth=2, foreground="white")])
        if np.hypot(*near) > 9 * point:
            start = axes.transData.transform(np.array([where], dtype=float))
            leaders = np.concatenate([leaders, start + np.linspace(0, 1, 30)[:, None] * near])
            line = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
            axes.annotate("", where, near / point, textcoords="offset points", arrowprops=line)
        taken.append(box or text.get_window_extent())


def _within(box: Bbox, dots: "np.ndarray[Any, Any]") -> int:
    return int(((dots >= box.p0) & (dots <= box.p1)).all(axis=1).sum())


def _loss_panel(axes: Axes, reports: Sequence[Report], loss: str) -> List[Curve]:
    axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    curves: List[Curve] = []
    for kind, series in SERIES.items():
        found = [report.points(kind, loss) for report in reports]
        flat = [point for points in found for point in points]
        if not flat:
            continue
        face = series.color if series.fill else "white"
        if kind == "random":
            axes.plot(*zip(*flat), series.marker, color=series.color, markersize=4, zorder=1)
            curves.append((series, flat))
            continue
        by_size: Dict[float, List[float]] = {}
        for n, value in flat:
            by_size.setdefault(n, []).append(value)
        sizes = sorted(by_size, reverse=True)
        mean = [math.fsum(by_size[n]) / len(by_size[n]) for n in sizes]
        if len(reports) > 1:
            low, high = [min(by_size[n]) for n in sizes], [max(by_size[n]) for n in sizes]
            axes.vlines(sizes, low, high, color=series.color, linewidth=1.2)
            axes.plot(sizes, low, "_", sizes, high, "_", color=series.color, markersize=5)
        look: Any = {"color": series.color, "markerfacecolor": face, "markersize": 8 if series.marker == "*" else 4}
        look["markevery"] = -(-len(sizes) // 24)  # Not one blot.
        axes.plot(sizes, mean, linestyle=series.line or "none", marker=series.marker, linewidth=1.3, **look)
        curves.append((series, list(zip(sizes, mean))))
    return curves


def loss_figure(reports: Sequence[Report]) -> Figure:
    """Loss against the number of Full layers: greedy and every baseline, on both texts."""
    n = reports[0].layers
    panels = [
        (title, loss)
        for title, loss in (("calibration text", "calibration_loss"), ("held-out text", "held_out_loss"))
        if any(report.points(kind, loss) for report in reports for kind in SERIES)
    ]
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    drawn = []
    for axes, (title, loss) in zip(every, panels):
        drawn.append(_loss_panel(axes, reports, loss))
        base = [r[loss] for report in reports for r in report.table if r["kind"] == "all-full" and r[loss] is not None]
        low, high = f"{min(base):.3f}", f"{max(base):.3f}"
        axes.set(
            title=f"{title}: all Full {low}" + ("" if low == high else f" to {high}"),
            xlabel=f"Full layers, of {n}",
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.set_xlim(n + 0.03 * n, 1 - 0.05 * n)
        axes.margins(y=0.12)
    # From nearly nothing to the largest rise: two decades, and linear below them because rises may be negative.
    rises = [abs(y) for curves in drawn for _, points in curves for _, y in points]
    top = math.floor(math.log10(max([*rises, 1e-9])))
    linear = 10.0 ** (top - 2)
    for axes in every:
        axes.set_yscale("symlog", linthresh=linear, linscale=0.6)
        axes.set_ylim(min(axes.get_ylim()[0], -0.9 * linear))  # Names fit below the flat part.
        axes.set_yticks([0.0, *(10.0**k for k in range(top - 2, top + 1))])
        axes.yaxis.set_major_formatter(_plain)
        axes.yaxis.set_minor_locator(SymmetricalLogLocator(base=10, linthresh=linear, subs=list(range(2, 10))))
    notes = [f"linear up to {_plain(linear)}"]
    if len(reports) > 1:
        notes.append(f"mean and range of {len(reports)} reports")
    every[0].set_ylabel(f"rise over all Full ({reports[0].unit})\n{'; '.join(notes)}")
    for axes, curves in zip(every, drawn):
        _place_labels(axes, curves)
    return figure


def sensitivity_figure(reports: Sequence[Report]) -> Figure:
    """What each layer costs when it alone is Shared, on a logarithmic scale; a fall is an open marker."""
    n = reports[0].layers
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = figure.add_subplot()
    shift = 0.5 / max(len(reports), 2)
    for index, report in enumerate(reports):
        at = (index - (len(reports) - 1) / 2) * shift
        for row in report.sensitivity:
            face = "black" if row["rise"] > 0 else "white"
            axes.plot(row["layer"] + at, abs(row["rise"]), "o", color="black", markerfacecolor=face, markersize=4.5)
    axes.set_yscale("log")
    values = [abs(r["rise"]) for report in reports for r in report.sensitivity if r["rise"]]
    if values:
        axes.set_ylim(10 ** math.floor(math.log10(min(values)) - 0.01), 10 ** math.ceil(math.log10(max(values)) + 0.01))
    axes.yaxis.set_major_formatter(_plain)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    letters = n <= 24 and len({report.pattern for report in reports}) == 1
    axes.set_xticks(_ticks(n), [f"{i}\n{reports[0].pattern[i]}" if letters else str(i) for i in _ticks(n)])
    axes.set_xlim(-0.7, n - 0.3)
    what = "layer; below it, its role in the searched pattern" if letters else "layer"
    axes.set(
        title="Loss when one layer alone is Shared: filled, higher than all Full; open, lower",
        xlabel=what,
        ylabel=f"change ({reports[0].unit})",
    )
    return figure


def _save(figure: Figure, out: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> List[Path]:
    figure.savefig(out.with_suffix(".png"), dpi=200)
    figure.savefig(out.with_suffix(".svg"), metadata={"Date": None})
    with out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return [out.with_suffix(suffix) for suffix in (".png", ".svg", ".csv")]


def draw(paths: Sequence[Path], out: Path) -> List[Path]:
    """Draws all pictures of these reports into ``out``; the files written."""
    reports = [Report.read(Path(path)) for path in paths]
    for report, path in zip(reports, paths):
        if (report.layers, report.unit) != (reports[0].layers, reports[0].unit):
            expected, got = (f"{r.layers} layers, {r.unit}" for r in (reports[0], report))
            raise ReportError(f"{path}: expected {expected} as in {paths[0]}, got {got}")
    if len({report.name for report in reports}) != len(reports):
        raise ReportError("reports need different file names, which name their pictures")
    out.mkdir(parents=True, exist_ok=True)
    written: List[Path] = []
    with rc_context(STYLE):
        for report in reports:
            if report.overlap is None:
                continue
            name = "overlap" if len(reports) == 1 else f"overlap-{report.name}"
            cells = [(i, j, value) for (i, j), value in np.ndenumerate(report.overlap)]
            figure = overlap_figure(report, report.overlap)
            written += _save(figure, out / name, ("selected_by", "covered", "overlap"), cells)
        columns = ("kind", "full_layers", "pattern", "calibration_loss", "held_out_loss", "seed")
        table = [(r.name, *(row.get(c) for c in columns)) for r in reports for row in r.table]
        written += _save(loss_figure(reports), out / "loss", ("report", *columns), table)
        if not any(r.sensitivity for r in reports):
            return written
        each = [(r.name, row["layer"], row["loss"], row["rise"]) for r in reports for row in r.sensitivity]
        written += _save(sensitivity_figure(reports), out / "sensitivity", ("report", "layer", "loss", "rise"), each)
    return written


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m indexcache.search_plots", description="Pictures of a pattern search.")
    parser.add_argument("reports", type=Path, nargs="+", metavar="REPORT", help=f"{REPORT} or {RESULT}")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where PNG, SVG and CSV go")
    options = parser.parse_args(arguments)
    try:
        for path in draw(options.reports, options.out):
            print(path)
    except (ReportError, OSError) as error:
        print(f"search_plots: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
