"""A small stand-in for a server, for the tests: answers as vLLM does, with losses that follow from its pattern.

python stand_in.py --port 8000 --hf-overrides '{"index_topk_pattern": "FSFF"}'
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# What a layer costs when it is Shared, the more the longer its selection has been reused.
COSTS = [0.0, 0.7, 0.02, 0.01, 0.3, 0.02, 0.11, 0.05]


def logprob(pattern, row, place, topk=4):
    """Of the token at `place`. Up to top-k tokens, every layer selects all: the pattern makes no difference."""
    base = -1.0 - (row[place] * 7 + row[place - 1] * 3) % 11 / 8
    if place <= topk:
        return base
    age, cost = 0, 0.0
    for layer, role in enumerate(pattern):
        age = 0 if role == "F" else age + 1
        cost += age * COSTS[layer % len(COSTS)]
    return base - cost * (1 + row[place] % 3)


# How it misbehaves: {"log": FILE, "fault": NAME, "at": N, "once": BOOL, "worker": BOOL}. The log has a line for each start
# and for each row asked for.
SETTINGS = json.loads(os.environ.get("STAND_IN", "{}"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, reply=None):
        body = b"" if reply is None else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        known = self.path == "/health"
        self.answer(503 if SETTINGS.get("fault") == "never healthy" else 200 if known else 404)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/reload":
            self.server.pattern = body["index_topk_pattern"]
            return self.answer(200)
        fault = SETTINGS.get("fault") if record("row", self.server.pattern) >= SETTINGS.get("at", 0) else None
        if fault == "crash" and (not SETTINGS.get("once") or once()):
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "busy" and once():
            return self.answer(503, {"error": "busy"})
        if body["model"] != self.server.model:
            return self.answer(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        row, pattern = body["prompt"], self.server.pattern
        if fault == "pattern ignored":
            pattern = "F" * len(pattern)
        assert body["echo"] and body["logprobs"] >= 1 and body["max_tokens"] >= 1
        values = [None, *(logprob(pattern, row, place) for place in range(1, len(row))), -0.5]
        choice = {"index": 0, "text": "", "logprobs": {"token_logprobs": values}, "prompt_token_ids": row}
        reply = {"object": "text_completion", "choices": [choice], "usage": {"prompt_tokens": len(row)}}
        if fault == "null":
            values[5] = None
        if fault == "nan":
            values[5] = float("nan")
        if fault == "minus infinity":
            values[5] = -9999.0
        if fault == "text":
            values[5] = "-1.5"
        if fault == "short":
            del values[-3:]
        if fault == "no echo":
            values[:] = [-0.5]
        if fault == "no logprobs":
            choice["logprobs"] = None
        if fault == "other tokens":
            choice["prompt_token_ids"] = [1, *row]
        if fault == "token added":
            choice["prompt_token_ids"], reply["usage"] = None, {"prompt_tokens": len(row) + 1}
        if fault == "list":
            reply = [reply]
        if fault == "torn" and once():
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode()[:50])
            self.close_connection = True
            return None
        return self.answer(200, reply)


def record(what, pattern):
    """Lines of the log that are like this one, before it."""
    with open(SETTINGS.get("log", os.devnull), "a+") as log:
        log.seek(0)
        before = sum(line.startswith(what) for line in log)
        log.write(f"{what} {pattern} {os.getpid()}\n")
    return before


def once():
    """True the first time that a server of this log asks."""
    try:
        open(SETTINGS["log"] + ".once", "x").close()
        return True
    except FileExistsError:
        return False


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("command", nargs="*")  # "serve" and the model, as `vllm` has them.
    parser.add_argument("--served-model-name", default="stand-in")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--hf-overrides", type=json.loads, default={})
    options = parser.parse_args()
    pattern = options.hf_overrides.get("index_topk_pattern", "")
    if SETTINGS.get("worker"):
        # A worker that outlives its parent, if it is let.
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        record("worker", worker.pid)
    if SETTINGS.get("fault") == "no start":
        sys.exit("out of memory, say")
    server = ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
    server.pattern, server.model = pattern, options.served_model_name
    record("start", pattern)
    server.serve_forever()


if __name__ == "__main__":
    main()
