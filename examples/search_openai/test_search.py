"""The driver against a stand-in server: the whole search, and everything that may go wrong with a server."""

import hashlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import stand_in

HERE = Path(__file__).parent
LAYERS, TOPK = 5, 4
ROWS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4], [1, 6, 1, 8, 0, 3]]
FULL = "F" * LAYERS


def loss(pattern):
    values = [stand_in.logprob(pattern, row, place) for row in ROWS for place in range(1, len(row))]
    return -math.fsum(values) / len(values)


def plain_greedy():
    pattern, trajectory = FULL, []
    while pattern.count("F") > 1:
        flips = [pattern[:l] + "S" + pattern[l + 1 :] for l in range(1, LAYERS) if pattern[l] == "F"]
        pattern = min(flips, key=loss)
        trajectory.append((pattern, loss(pattern)))
    return trajectory


EVALUATIONS = 1 + LAYERS * (LAYERS - 1) // 2


class Driver:
    """The driver's command line, in a folder of its own."""

    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
        self.journal, self.out, self.log = folder / "search.jsonl", folder / "result.json", folder / "server.txt"

    def start(self, *extra, serve=True, model="stand-in", fingerprint="rev 1", **settings):
        command = [sys.executable, str(HERE / "search.py"), "--layers", str(LAYERS), "--topk", str(TOPK)]
        command += ["--rows", str(self.folder / "rows.jsonl"), "--model", model, "--fingerprint", fingerprint]
        command += ["--url", self.url, "--journal", str(self.journal), "--out", str(self.out), *extra]
        if serve:
            command += ["--", sys.executable, str(HERE / "stand_in.py"), "serve", "model", "--port", str(self.port)]
            command += ["--hf-overrides", '{"index_topk_pattern": "{pattern}"}']
        environment = {**os.environ, "STAND_IN": json.dumps({"log": str(self.log), **settings})}
        environment["http_proxy"] = "http://127.0.0.1:9"  # Which nothing of this may use.
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, *extra, **settings):
        process = self.start("--start-timeout", "30", *extra, **settings)
        try:
            stdout, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
        assert self.servers() == [], "servers outlive the driver"
        return process.returncode, stdout, stderr

    def lines(self, what):
        text = self.log.read_text() if self.log.exists() else ""
        return [line.split()[1:] for line in text.splitlines() if line.startswith(what)]

    def servers(self):
        """Pids of what was started and still runs."""
        pids = [int(pid) for _, pid in self.lines("start")] + [int(pid) for pid, _ in self.lines("worker")]
        return [pid for pid in pids if running(pid)]

    def reported(self):
        return [json.loads(line)["pattern"] for line in self.journal.read_text().splitlines()[1:]]

    def result(self):
        return json.loads(self.out.read_text())


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited in vain")


@pytest.fixture
def driver(tmp_path):
    return Driver(tmp_path)


def test_finds_what_a_plain_loop_finds(driver):
    status, stdout, stderr = driver.run()
    assert status == 0, stderr
    result = driver.result()
    assert result["complete"] and result["all_full_loss"] == loss(FULL)
    assert [(s["pattern"], s["loss"]) for s in result["steps"]] == plain_greedy()
    assert result["model"] == "rev 1"
    tokens = json.dumps(ROWS, separators=(",", ":")).encode()
    fingerprint = "sha256:" + hashlib.sha256(tokens).hexdigest()
    assert result["calibration"] == {"fingerprint": fingerprint, "rows": 3, "shortest_row": 6}
    # One server a pattern, and each row once.
    assert [p for p, _ in driver.lines("start")] == driver.reported()
    assert len(driver.lines("row")) == len(ROWS) * EVALUATIONS
    half = next(p for p, _ in plain_greedy() if p.count("F") == 3)
    assert f" 1/2 {loss(half):.6f} {half}\n" in stdout and f"1/{EVALUATIONS} {FULL} {loss(FULL):.6f}" in stderr
    # Once more: nothing left to do.
    assert driver.run()[:2] == (0, stdout) and len(driver.lines("start")) == EVALUATIONS


def test_the_command_of_the_guide(driver):
    """As docs/search.md has it, but for the sizes, the port and what `vllm` is."""
    guide = (HERE.parents[1] / "docs/search.md").read_text(encoding="utf-8")
    (code,) = [b.partition("```")[0] for b in guide.split("```sh\n")[1:] if "vllm serve" in b.partition("```")[0]]
    for told, used in (("--layers 61", f"--layers {LAYERS}"), ("--topk 2048", f"--topk {TOPK}"), ("--target-full-layers 16", ""),
                       ("8000", str(driver.port)), ("python ", f"{sys.executable} ")):  # fmt: skip
        assert told in code
        code = code.replace(told, used)
    (driver.folder / "examples").symlink_to(HERE.parent)
    vllm = driver.folder / "bin/vllm"
    vllm.parent.mkdir()
    vllm.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE / "stand_in.py"} "$@"\n')
    vllm.chmod(0o755)
    environment = {**os.environ, "PATH": f"{vllm.parent}:{os.environ['PATH']}"}
    ran = subprocess.run(["sh", "-euc", code], cwd=driver.folder, env=environment, stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 0, ran.stderr
    assert [(s["pattern"], s["loss"]) for s in driver.result()["steps"]] == plain_greedy()


def test_a_server_that_takes_patterns_while_it_runs(driver):
    command = [sys.executable, str(HERE / "stand_in.py"), "--port", str(driver.port)]
    server = subprocess.Popen(command)
    try:
        process = driver.start("--reload", f"{driver.url}/reload", serve=False)
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr
        assert [(s["pattern"], s["loss"]) for s in driver.result()["steps"]] == plain_greedy()
    finally:
        server.kill()
        server.wait()


def test_strategies_reach_the_search(driver):
    options = ["--pinned", "3", "--stages", "0,2", "--lazy", "1", "--target-full-layers", "4", "--swap-full-layers", "4"]
    status, _, stderr = driver.run(*options)
    assert status == 0, stderr
    result = driver.result()
    names = ("pinned", "stages", "method", "target_full_layers", "swap_full_layers")
    assert [result[name] for name in names] == [[0, 2, 3], [0, 2], {"name": "lazy", "few": 1}, 4, 4]


@pytest.mark.parametrize("fault", ["crash", "busy", "torn"])
def test_a_server_that_fails_once(driver, fault):
    status, _, stderr = driver.run(fault=fault, at=10, once=True, worker=True)
    assert status == 0, stderr
    assert [(s["pattern"], s["loss"]) for s in driver.result()["steps"]] == plain_greedy()
    assert len(driver.lines("start")) == EVALUATIONS + 1 and "attempt 1 of 3" in stderr


def test_a_server_that_keeps_failing(driver):
    status, _, stderr = driver.run(fault="crash", at=7)
    assert status == 1 and not driver.out.exists()
    third = driver.lines("row")[7][0]
    assert f"search: {third}: no loss in 3 attempts; the last: " in stderr
    # Two patterns, then three attempts at the third.
    assert len(driver.reported()) == 2 and len(driver.lines("start")) == 2 + 3
    # Repaired, it goes on.
    status, _, stderr = driver.run()
    assert status == 0 and stderr.startswith(f"3/{EVALUATIONS} {third} ")
    assert [(s["pattern"], s["loss"]) for s in driver.result()["steps"]] == plain_greedy()


def test_a_server_that_does_not_start(driver):
    status, _, stderr = driver.run(fault="no start", worker=True)
    assert status == 1 and "no loss in 3 attempts" in stderr
    assert "the server ended with status 1" in stderr and "out of memory, say" in stderr
    assert driver.reported() == []
    status, _, stderr = driver.run("--start-timeout", "0.3", fault="never healthy")
    assert status == 1 and "not healthy within 0.3 s" in stderr and "HTTP status 503" in stderr


@pytest.mark.parametrize(
    "fault, why",
    [
        ("null", "expected a finite log-probability of token 5, got None"),
        ("nan", "expected a finite log-probability of token 5, got nan"),
        ("minus infinity", "expected a finite log-probability of token 5, got -9999.0"),
        ("text", "expected a finite log-probability of token 5, got -1.5"),
        ("short", "expected log-probabilities of 9 prompt tokens, got 7 numbers"),
        ("no echo", "expected log-probabilities of 9 prompt tokens, got 1 numbers"),
        ("no logprobs", "expected a list in choices[0].logprobs.token_logprobs, as echo gives it, got None"),
        ("other tokens", "expected prompt_token_ids as sent, got [1, 3"),
        ("token added", "expected usage.prompt_tokens of 9, got 10"),
        ("list", "expected one choice, got [{"),
    ],
)
def test_a_reply_that_is_no_loss_is_never_reported(driver, fault, why):
    status, _, stderr = driver.run(fault=fault, at=3)
    assert status == 1 and f"search: the server's reply: {why}" in stderr
    # Not tried again: it would say the same.
    assert driver.reported() == [FULL] and len(driver.lines("start")) == 2


def test_a_server_that_ignores_its_pattern(driver):
    status, _, stderr = driver.run(fault="pattern ignored")
    assert status == 1 and "FSFFF: the server gives exactly the all-Full loss" in stderr
    assert driver.reported() == [FULL]


def test_a_request_that_the_server_refuses(driver):
    status, _, stderr = driver.run(model="another")
    assert status == 1 and "HTTP status 404" in stderr and "`another` does not exist" in stderr
    assert len(driver.lines("start")) == 1


@pytest.mark.parametrize("rows", [1, 5, 9, 20])
def test_killed_at_any_moment(driver, rows):
    process = driver.start(worker=True)
    until(lambda: len(driver.lines("row")) >= rows)
    process.kill()
    process.communicate()
    before = driver.reported()
    # Its server ends without it, and the worker too.
    until(lambda: driver.servers() == [])
    head, rest = len(driver.lines("start")), driver.run(worker=True)
    assert rest[0] == 0, rest[2]
    assert driver.reported()[: len(before)] == before and len(set(driver.reported())) == EVALUATIONS
    assert not set(before) & {p for p, _ in driver.lines("start")[head:]}
    assert [(s["pattern"], s["loss"]) for s in driver.result()["steps"]] == plain_greedy()


def test_another_server_at_the_same_place(driver):
    with socket.create_server(("127.0.0.1", driver.port)):
        status, _, stderr = driver.run("--start-timeout", "0.3")
    assert status == 1 and f"search: {driver.url}: another server answers here; stop it first" in stderr
    assert driver.lines("start") == [] and driver.reported() == []


def test_another_model_or_other_rows(driver):
    driver.run(fault="crash", at=3)
    status, _, stderr = driver.run(fingerprint="rev 2")
    assert status == 1 and 'model: expected "rev 1" as in the journal' in stderr
    (driver.folder / "rows.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    status, _, stderr = driver.run()
    assert status == 1 and "calibration: expected" in stderr
    assert driver.reported() == [FULL]


@pytest.mark.parametrize(
    "rows, why",
    [
        ("[1, 2, 3, 4, 5]\n[1, 2, 3, 4]\n", "rows.jsonl:2: expected more tokens than top-k (4), got 4: a shorter row"),
        ("[1, 2, 3, 4, 5.0]\n", "rows.jsonl:1: expected a JSON list of token ids, got [1, 2, 3, 4, 5.0]"),
        ("[1, 2, 3, 4, -5]\n", "rows.jsonl:1: expected a JSON list of token ids"),
        ("[1, 2, 3, 4, true]\n", "rows.jsonl:1: expected a JSON list of token ids"),
        ('{"tokens": [1]}\n', "rows.jsonl:1: expected a JSON list of token ids"),
        ("[1, 2, 3, 4, 5]\nthe\n", "rows.jsonl:2: expected a JSON list of token ids, got the"),
        ("", "row_lengths: expected a calibration row or more"),
    ],
)
def test_rows_that_will_not_do(driver, rows, why):
    (driver.folder / "rows.jsonl").write_text(rows)
    status, _, stderr = driver.run()
    assert status == 1 and why in stderr
    assert driver.lines("start") == [] and not driver.journal.exists()


@pytest.mark.parametrize(
    "arguments, why",
    [
        ([], "expected either a command after -- or --reload"),
        (["--reload", "http://127.0.0.1:1", "--", "vllm", "{pattern}"], "expected either a command after -- or --reload"),
        (["--", sys.executable, "serve"], "expected {pattern} in the command after --"),
        (["--", "no-such-server", "{pattern}"], "no-such-server was not found"),
        (["--url", "127.0.0.1:80", "--", "vllm", "{pattern}"], "--url: expected http://HOST:PORT, got 127.0.0.1:80"),
    ],
)
def test_command_lines_that_will_not_do(driver, arguments, why):
    process = driver.start(*arguments, serve=False)
    _, stderr = process.communicate()
    assert process.returncode == 2 and why in stderr


def test_a_server_that_ignores_sigterm_is_killed(tmp_path):
    """By its keeper, which is all that is left when a driver is killed."""
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(1000)"
    )
    run = "import keeper, sys; keeper.GRACE = 0.2; sys.exit(keeper.keep(sys.argv[1:]))"
    command = [sys.executable, "-c", run, sys.executable, "-c", code]
    pipe = subprocess.PIPE
    keeper = subprocess.Popen(command, cwd=HERE, stdin=pipe, stdout=pipe, start_new_session=True)
    assert keeper.stdout.readline() == b"up\n"
    keeper.stdin.close()
    assert keeper.wait() == -signal.SIGKILL
    assert keeper.stdout.read() == b""  # Nobody is left that could write there.
