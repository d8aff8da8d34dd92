"""The search through the binding: against a plain loop, interrupted anywhere, and what it refuses."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

import indexcache as ix

LAYERS = 7


def desc(**kw):
    given = dict(layers=LAYERS, topk=128, model="model a", calibration="rows 0-1", row_lengths=[129, 4096])
    return ix.SearchDesc(**{**given, **kw})


def loss(pattern):
    """A weight a layer; layers 2 and 3 get dear together."""
    both = 7 / 9 if pattern[2:4] == "SS" else 0
    return 1 / 3 + both + sum(0.01 * (l * 3 % LAYERS) for l, role in enumerate(pattern) if role == "S")


def drive(search, most=10**9):
    asked = []
    while len(asked) < most and (candidate := search.next()) is not None:
        assert candidate == search.next()
        asked.append(candidate.pattern)
        search.report(candidate.pattern, loss(candidate.pattern))
    return asked


def plain_greedy():
    pattern, trajectory = "F" * LAYERS, []
    while pattern.count("F") > 1:
        flips = [pattern[:l] + "S" + pattern[l + 1 :] for l in range(1, LAYERS) if pattern[l] == "F"]
        pattern = min(flips, key=loss)
        trajectory.append((pattern, loss(pattern)))
    return trajectory


def test_agrees_with_a_plain_loop():
    search = ix.Search(desc())
    first = search.next()
    assert (first.pattern, first.base, first.first_changed_layer) == ("F" * LAYERS, "F" * LAYERS, 0)
    assert (first.evaluations, first.expected) == (0, 22)
    asked = drive(search)
    assert len(asked) == len(set(asked)) == LAYERS * (LAYERS - 1) // 2 + 1
    result = search.result()
    assert result["complete"] and result["all_full_loss"] == loss("F" * LAYERS)
    # Bit for bit: Python's floats come back from JSON as they were.
    assert [(s["pattern"], s["loss"]) for s in result["steps"]] == plain_greedy()
    assert result["patterns"]["1/2"]["pattern"] == next(p for p, _ in plain_greedy() if p.count("F") == 4)


def test_killed_at_any_loss(tmp_path):
    whole = ix.Search(desc())
    asked = drive(whole)
    for told in range(len(asked) + 1):
        path = tmp_path / f"{told}.jsonl"
        search = ix.Search(desc())
        search.save(path)
        assert drive(search, told) == asked[:told]
        search.destroy()
        with open(path, "ab") as journal:  # A line that was being written.
            journal.write(b'{"pattern":"FF')
        search = ix.Search.resume(desc(), path)
        search.save(path)
        assert drive(search) == asked[told:]
        assert search.result() == whole.result()


def test_the_loop_of_the_documentation(tmp_path):
    """As Search's docstring has it, in processes that die."""
    lines = ix.Search.__doc__.split("::")[1].splitlines()
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    loop = "\n".join(line[indent:] for line in lines)
    setup = (
        f"import os, sys, signal\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import indexcache as ix, test_search as t\n"
        f"desc, path, left = t.desc(), {str(tmp_path / 'search.jsonl')!r}, 5\n"
        "def mean_loss(pattern):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if left == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return t.loss(pattern)\n"
    )
    package = str(Path(ix.__file__).parents[1])
    runs = []
    while not runs or runs[-1].returncode:
        code = f"import sys; sys.path.insert(0, {package!r})\n{setup}{loop}\nprint(quarter)"
        runs.append(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE))
        assert runs[-1].returncode in (0, -9) and len(runs) < 9
    assert len(runs) == 6  # Four losses each.
    assert runs[-1].stdout.decode().strip() == next(p for p, _ in plain_greedy() if p.count("F") == 2)


def test_stages_pins_lazy_and_swaps():
    staged = ix.Search(desc(stages=[0, 4], pinned=(5,), target_full_layers=4, swap_full_layers=5))
    drive(staged)
    result = staged.result()
    assert (result["pinned"], result["stages"]) == ([0, 4, 5], [0, 4])
    assert [s["flipped"] >= 4 for s in result["steps"]] == [False, True, False]
    assert result["swap_full_layers"] == 5
    lazy = ix.Search(desc(method=ix.SEARCH_LAZY, few=1))
    asked = drive(lazy)
    result = lazy.result()
    assert result["method"] == {"name": "lazy", "few": 1}
    assert result["saved_evaluations"] == 22 - len(asked) > 0
    assert result["lazy_differs"]["compared"] == 2


def test_refusals(tmp_path):
    path = tmp_path / "search.jsonl"
    search = ix.Search(desc())
    full = "F" * LAYERS
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ix.Error, match="loss: expected a finite number"):
            search.report(full, bad)
    with pytest.raises(TypeError):
        search.report(full, None)
    with pytest.raises(TypeError):
        search.report(None, 1.0)
    with pytest.raises(ix.Error, match=f"pattern: expected {full}"):
        search.report("FS" + full[2:], 1.0)
    search.report(full, 1.0)
    search.report(full, 1.0)
    with pytest.raises(ix.Error, match="loss: expected 1.0 as reported before"):
        search.report(full, 2.0)
    search.save(path)
    with pytest.raises(ix.Error, match="which exists"):
        ix.Search(desc()).save(path)
    with pytest.raises(ix.Error, match="no other search"):
        ix.Search.resume(desc(), path)
    search.destroy()
    for call in (search.next, search.result, lambda: search.report(full, 1.0), lambda: search.save(path)):
        with pytest.raises(ix.Error, match="expected a handle, got NULL"):
            call()
    with pytest.raises(ix.Error, match='model: expected "model a" as in the journal'):
        ix.Search.resume(desc(model="model b"), path)
    with pytest.raises(ix.Error, match="calibration: expected"):
        ix.Search.resume(desc(calibration="rows 2-3"), path)
    with pytest.raises(ix.Error) as e:
        ix.Search.resume(desc(), tmp_path / "none")
    assert e.value.status == ix.ERR_IO
    for wrong in (
        dict(layers=1),
        dict(row_lengths=[]),
        dict(row_lengths=[128]),
        dict(pinned=[-1]),
        dict(pinned=[7]),
        dict(stages=[3, 2]),
        dict(method=7),
        dict(few=1),
        dict(method=ix.SEARCH_LAZY),
        dict(target_full_layers=7),
        dict(swap_full_layers=1),
        dict(model=""),
        dict(flags=1),
    ):
        with pytest.raises(ix.Error) as e:
            ix.Search(desc(**wrong))
        assert e.value.status == ix.ERR_INVALID and e.value.text.startswith("idxc_search_create: ")
    with pytest.raises(OverflowError):
        ix.Search(desc(pinned=[2**31]))
    with pytest.raises(ValueError, match="NUL"):
        ix.Search(desc(model="a\0b"))
    with pytest.raises(TypeError):
        ix.Search(desc(model=b"a"))
    with pytest.raises(TypeError):
        ix.Search(ix.ModelDesc(layers=3, topk=8))
