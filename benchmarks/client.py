"""What a call of the Python client costs the application that makes it.

Run by hand: `python -m benchmarks.client`. Calls are made one after the other by one thread while the client's own
threads write each batch to disk with fsync and send it to a stub in a process of its own, which acknowledges
everything: what the clock says includes waiting for the interpreter's lock and, on a machine shared with others, for
a core, so the CPU time of the calling thread is given beside it. `paced` calls leave a millisecond to the
others, as requests of an application do; `burst` calls leave none. The last line is JSON.
Belongs here: measuring. Does not belong here: how fast the service is.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing.connection import Connection
from typing import Any

from feedback.client import FeedbackClient

# A prompt with instructions, a question and five passages, and its answer: 2.3 kB of JSON.
MESSAGES = [
    {"role": "system", "content": "Answer from the passages alone. " * 15},
    {"role": "user", "content": "How do I return a parcel that came damaged? " * 6},
]
OUTPUT = "Print the label in your account and drop the parcel at any shop. " * 12
RETRIEVED: list[Any] = [
    {"document_id": f"handbook/{n}.md", "rank": n, "score": 0.9 - n / 10} for n in range(1, 6)
]


class _Acknowledge(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        items = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        results = [{"id": None, "status": "created"} for _ in items]
        body = json.dumps(
            {"results": results, "created": len(items), "duplicate": 0, "conflict": 0, "invalid": 0}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def serve(ready: Connection) -> None:
    """Acknowledge everything at a free port, which is told to ``ready``, until killed."""
    server = HTTPServer(("127.0.0.1", 0), _Acknowledge)
    ready.send(server.server_port)
    server.serve_forever()


def measure(call: Callable[[], object], calls: int, pause_seconds: float) -> dict[str, float]:
    """Microseconds per call: of the clock, and of this thread's CPU."""
    took, worked = [], []
    for _ in range(calls):
        if pause_seconds:
            time.sleep(pause_seconds)
        started, cpu_started = time.perf_counter_ns(), time.thread_time_ns()
        call()
        worked.append((time.thread_time_ns() - cpu_started) / 1000)
        took.append((time.perf_counter_ns() - started) / 1000)
    return {
        "median": round(statistics.median(took), 1),
        "p99": round(statistics.quantiles(took, n=100)[98], 1),
        "max": round(max(took), 1),
        "cpu_median": round(statistics.median(worked), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What a call of the Python client costs")
    parser.add_argument("--calls", type=int, default=5000, help="per case")
    arguments = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    stub = context.Process(target=serve, args=(theirs,), daemon=True)
    stub.start()
    url = f"http://127.0.0.1:{ours.recv()}"
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        client = FeedbackClient(url, "key", spool=folder)
        calls: dict[str, Callable[[], object]] = {
            "thumb": lambda: client.thumb("an-answer", True, author_id="customer-7", reasons=["accurate"]),
            "interaction": lambda: client.interaction(
                MESSAGES, OUTPUT, model="in-house-7b", session_id="session-42", retrieved=RETRIEVED
            ),
        }
        for pace, pause_seconds in (("paced", 0.001), ("burst", 0.0)):
            for name, call in calls.items():
                figures = measure(call, arguments.calls, pause_seconds)
                client.flush(60)
                found[f"{name} {pace}"] = figures
                print(
                    f"{name:12} {pace:6} " + "  ".join(f"{what} {n:8.1f} µs" for what, n in figures.items())
                )
        client.close(60)
        status = client.status()
    stub.kill()
    print(json.dumps({"calls": status.recorded, "acknowledged": status.acknowledged, "microseconds": found}))


if __name__ == "__main__":
    main()
