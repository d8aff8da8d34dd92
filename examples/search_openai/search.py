"""Greedy search for index_topk_pattern, measured through an OpenAI-style server.

    python search.py --layers 61 --topk 2048 --rows rows.jsonl --model NAME --fingerprint REVISION \\
        --url http://127.0.0.1:8000 --journal search.jsonl --out result.json \\
        -- vllm serve DIR --port 8000 --hf-overrides '{"index_topk_pattern": "{pattern}"}'

The command after -- starts the server. It is run anew for each pattern, which takes the place of {pattern}. A server that
can change its pattern while it runs is told instead: --reload URL receives {"index_topk_pattern": "..."} by POST.

The loss is the mean negative log-probability, in nats, of every token but the first of each calibration row. The server has
to return the log-probabilities of a prompt from /v1/completions (echo with logprobs), as vLLM and SGLang do.

Every loss is in the journal before the next is measured: the same command goes on from there, whatever ended the last one.
"""

import argparse
import hashlib
import http.client
import json
import math
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import indexcache as ix

ATTEMPTS = 3  # At one pattern.
KEEPER = Path(__file__).with_name("keeper.py")
MINUS_INFINITY = -9999.0  # What vLLM writes for it: JSON has none.


class Unusable(Exception):
    """What another attempt would not change."""


class Unavailable(Exception):
    """The server is down, busy or slow: another attempt may do."""


# ---- The loss ----


def read_rows(path, topk):
    """The calibration rows: a JSON list of token ids a line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, list) or not all(type(token) is int and token >= 0 for token in row):
            raise Unusable(f"{path}:{number}: expected a JSON list of token ids, got {line[:60]}")
        if len(row) <= topk:
            why = "a shorter row selects everything in every layer, so reuse is exact there and the loss says nothing"
            raise Unusable(f"{path}:{number}: expected more tokens than top-k ({topk}), got {len(row)}: {why}")
        rows.append(row)
    return rows


def request(url, body=None, timeout=10):
    """What comes back from a GET, or from a POST of JSON."""
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    # Straight to the server: a proxy may answer for one that is down.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(asked, timeout=timeout) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        said = error.read(1000).decode(errors="replace").strip()
        kind = Unavailable if error.code in (408, 429) or error.code >= 500 else Unusable
        raise kind(f"{url}: HTTP status {error.code}: {said}") from error
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(f"{url}: {error!r}") from error


def prompt_logprobs(reply, row):
    """The log-probabilities of all tokens of a row but the first, out of a completion's JSON."""

    def expect(condition, what, got):
        if not condition:
            raise Unusable(f"the server's reply: expected {what}, got {str(got)[:200]}")

    def field(name, holder):
        return holder.get(name) if isinstance(holder, dict) else None

    choices = field("choices", reply)
    expect(isinstance(choices, list) and len(choices) == 1, "one choice", reply)
    # Servers that say what they scored must have scored the row: no token added, none cut off.
    scored = field("prompt_token_ids", choices[0])
    expect(scored is None or scored == row, "prompt_token_ids as sent", scored)
    count = field("prompt_tokens", field("usage", reply))
    expect(count is None or count == len(row), f"usage.prompt_tokens of {len(row)}", count)
    found = field("token_logprobs", field("logprobs", choices[0]))
    expect(isinstance(found, list), "a list in choices[0].logprobs.token_logprobs, as echo gives it", found)
    # The prompt's, and that of the one token generated, if it is echoed as well.
    lengths = (len(row), len(row) + 1)
    expect(len(found) in lengths, f"log-probabilities of {len(row)} prompt tokens", f"{len(found)} numbers")
    for place, value in enumerate(found[1 : len(row)], 1):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        known = number and math.isfinite(value) and value > MINUS_INFINITY
        expect(known, f"a finite log-probability of token {place}", value)
    return found[1 : len(row)]


def mean_loss(options, rows):
    """Rows go one by one: what a batch holds besides would change the last digits."""
    found = []
    for number, row in enumerate(rows):
        body = {"model": options.model, "prompt": row, "max_tokens": 1, "temperature": 1.0}
        body.update(echo=True, logprobs=1, return_token_ids=True)
        text = request(f"{options.url}/v1/completions", body, options.request_timeout)
        try:
            reply = json.loads(text)
        except ValueError as error:  # Cut off, most likely.
            raise Unavailable(f"the server's reply to row {number}: expected JSON, got {text[:200]!r}") from error
        found += prompt_logprobs(reply, row)
    return -math.fsum(found) / len(found)


# ---- The server ----


def wait_until_healthy(url, limit, ended=lambda: None):
    deadline, wait = time.monotonic() + limit, 0.05
    while True:
        try:
            request(f"{url}/health", timeout=min(limit, 10))
            return
        except (Unavailable, Unusable) as error:
            ended()
            if time.monotonic() > deadline:
                raise Unavailable(f"not healthy within {limit:g} s: {error}") from error
        time.sleep(wait)
        wait = min(2 * wait, 1.0)


class Restarted:
    """A server that is started for each pattern."""

    def __init__(self, options):
        self.options, self.keeper = options, None
        self.log = options.journal.with_name(options.journal.name + ".server.log")

    def serve(self, pattern):
        self.stop()
        self.wait_until_gone()
        command = [word.replace("{pattern}", pattern) for word in self.options.command]
        with self.log.open("ab") as log:
            log.write(f"\n==== {pattern}\n".encode())
            self.keeper = subprocess.Popen(
                [sys.executable, str(KEEPER), *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until_healthy(self.options.url, self.options.start_timeout, self.check)

    def check(self):
        if self.keeper.poll() is not None:
            last = " | ".join(self.log.read_text(errors="replace").splitlines()[-3:])
            raise Unavailable(f"the server ended with status {self.keeper.returncode}; last in {self.log}: {last}")

    def stop(self):
        if self.keeper is not None:
            self.keeper.stdin.close()
            self.keeper.wait()
            self.keeper = None

    def wait_until_gone(self):
        """Whatever still answers would be taken for the server of the next pattern."""
        place = urlsplit(self.options.url)
        deadline = time.monotonic() + self.options.start_timeout
        while True:
            try:
                socket.create_connection(
                    (place.hostname, place.port or (443 if place.scheme == "https" else 80)), timeout=10
                ).close()
            except OSError:
                return
            if time.monotonic() > deadline:
                raise Unusable(f"{self.options.url}: another server answers here; stop it first")
            time.sleep(0.2)


class Reloaded:
    """A server that somebody else runs, and that takes a pattern while it does."""

    def __init__(self, options):
        self.options = options

    def serve(self, pattern):
        request(self.options.reload, {"index_topk_pattern": pattern}, self.options.start_timeout)
        wait_until_healthy(self.options.url, self.options.start_timeout)

    def stop(self):
        pass


# ---- The search ----


def measure(server, options, rows, pattern):
    failures = []
    while len(failures) < ATTEMPTS:
        try:
            # A server that failed is not trusted with the next attempt.
            server.serve(pattern)
            return mean_loss(options, rows)
        except Unavailable as error:
            failures.append(str(error))
            print(f"{pattern}: attempt {len(failures)} of {ATTEMPTS}: {error}", file=sys.stderr)
    raise Unusable(f"{pattern}: no loss in {ATTEMPTS} attempts; the last: {failures[-1]}")


def run(options, server):
    rows = read_rows(options.rows, options.topk)
    tokens = json.dumps(rows, separators=(",", ":")).encode()
    desc = ix.SearchDesc(
        layers=options.layers,
        topk=options.topk,
        model=options.fingerprint,
        calibration="sha256:" + hashlib.sha256(tokens).hexdigest(),
        row_lengths=[len(row) for row in rows],
        pinned=options.pinned,
        stages=options.stages,
        method=ix.SEARCH_LAZY if options.lazy else ix.SEARCH_GREEDY,
        few=options.lazy,
        target_full_layers=options.target_full_layers,
        swap_full_layers=options.swap_full_layers,
    )
    search = ix.Search.resume(desc, options.journal) if options.journal.exists() else ix.Search(desc)
    search.save(options.journal)
    while (candidate := search.next()) is not None:
        pattern, begin = candidate.pattern, time.monotonic()
        loss = measure(server, options, rows, pattern)
        if pattern.count("S") == 1 and loss == search.result()["all_full_loss"]:
            why = "it does not use the pattern (a nested config wants a nested override), or this layer has no indexer"
            raise Unusable(f"{pattern}: the server gives exactly the all-Full loss, {loss!r}: {why}")
        search.report(pattern, loss)
        done, seconds = candidate.evaluations + 1, time.monotonic() - begin
        print(f"{done}/{candidate.expected} {pattern} {loss:.6f} ({seconds:.0f} s)", file=sys.stderr)
    result = search.result()
    part = options.out.with_name(options.out.name + ".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(options.out)
    print(f"{'all Full':>8} {result['all_full_loss']:.6f}")
    for retention, found in result["patterns"].items():
        print(f"{retention:>8} {found['loss']:.6f} {found['pattern']}")


def parse(arguments):
    def layers(text):
        return [int(layer) for layer in text.split(",")]

    arguments, command = list(arguments), []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, command = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options] (--reload URL | -- COMMAND ...)",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--layers", type=int, required=True, metavar="N", help="decoder layers that have an indexer")
    add("--topk", type=int, required=True, metavar="N", help="index_topk of the model")
    add("--rows", type=Path, required=True, metavar="FILE", help="calibration rows: a JSON list of token ids a line")
    add("--model", required=True, metavar="NAME", help="the model's name in requests")
    add("--fingerprint", required=True, metavar="TEXT", help="your name for exactly these weights: a revision or a hash")
    add("--url", required=True, help="where the server answers, without /v1")
    add("--journal", type=Path, required=True, metavar="FILE", help="the search so far; begun if it does not exist")
    add("--out", type=Path, required=True, metavar="FILE", help="the result, as JSON")
    add("--reload", metavar="URL", help="where a running server takes its pattern")
    add("--pinned", type=layers, default=[], metavar="L,L", help="layers that stay Full, besides layer 0")
    add("--stages", type=layers, default=[], metavar="L,L", help="first layers of pipeline stages")
    add("--lazy", type=int, default=0, metavar="FEW", help="try only so many flips at most steps")
    add("--target-full-layers", type=int, default=0, metavar="N", help="Full layers to stop at")
    add("--swap-full-layers", type=int, default=0, metavar="N", help="refine the pattern of N Full layers by exchanges")
    add("--start-timeout", type=float, default=1800, metavar="S", help="limit for a start or a reload [1800]")
    add("--request-timeout", type=float, default=600, metavar="S", help="limit for one row [600]")
    options = parser.parse_args(arguments)
    options.url, options.command = options.url.rstrip("/"), command
    if urlsplit(options.url).scheme not in ("http", "https") or not urlsplit(options.url).hostname:
        parser.error(f"--url: expected http://HOST:PORT, got {options.url}")
    if bool(command) == bool(options.reload):
        parser.error("expected either a command after -- or --reload")
    if command and not any("{pattern}" in word for word in command):
        parser.error("expected {pattern} in the command after --")
    if command and shutil.which(command[0]) is None:
        parser.error(f"{command[0]} was not found")
    return options


def main(arguments):
    options = parse(arguments)
    server = Reloaded(options) if options.reload else Restarted(options)
    try:
        run(options, server)
        return 0
    except (Unusable, ix.Error, OSError) as error:
        print(f"search: {error}", file=sys.stderr)
        return 1
    finally:
        server.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
