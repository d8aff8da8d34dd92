"""docs/training.md: its Python runs as it stands there, and its table is what the experiment measured."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import indexcache as ix

ROOT = Path(__file__).parents[3]
GUIDE = (ROOT / "docs/training.md").read_text(encoding="utf-8")

RUN = """
from test_training import small, text
pattern, model = "FSSF", small("glm")
def batches(name):
    return [(text() + i) % 64 for i in range(3)]
"""


def test_the_loop(tmp_path):
    pytest.importorskip("torch", reason="torch is not importable: nothing to train with")
    pytest.importorskip("transformers", reason="transformers is not importable: no DSA model to patch")
    (code,) = [b.partition("```")[0] for b in GUIDE.split("```python\n")[1:]]
    (tmp_path / "my_run.py").write_text(RUN)
    (tmp_path / "train.py").write_text(code)
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(ix.__file__).parents[1])])
    # On the CPU, where the model is made.
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plan = ix.Plan.from_hf_config((tmp_path / "trained/config.json").read_text())
    assert plan.export(ix.EXPORT_PATTERN) == "FSSF"


def test_the_table():
    spec = importlib.util.spec_from_file_location("retrain_report", ROOT / "examples/tiny_dsa/retrain_report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    assert report.table(json.loads((report.RESULTS / "retrain.json").read_text())) in GUIDE
