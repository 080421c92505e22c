"""How many events a second the feedback service takes durably, beside `pgbench` on the same disk and machine.

Run by hand: `python -m benchmarks.feedback` (`make bench-feedback`). It starts a durable Postgres and the service of
its own in a temporary folder; figures go to stderr, and the last line of stdout is one JSON object.

Everything shares the machine: Postgres, the service and the load. What is compared runs in turns, each after a
checkpoint, and the median of the rounds is shown. `pgbench` is the floor: one durable prepared INSERT of a row of the
same columns and size per transaction into a table with the same indexes, by as many clients as the service has
connections. Latencies at a rate count from the moment a request was due, in both.

On a machine shared with others rates move with the neighbours; processor time per event moves less: `pgbench_cpu_us` is
that of Postgres under pgbench, `events_cpu_us` that of Postgres and the service, `service_cpu_us` that of the service
alone, `load_cpu_us` that of the load.

Belongs here: measuring. Does not belong here: faults (`benchmarks.chaos`), how load is made (`benchmarks.load`).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from statistics import linear_regression, median

import psycopg

from benchmarks.load import Ledger, Load, Request, event_body, percentile
from benchmarks.processes import Postgres, Service, cpu_seconds, program

CLIENTS = 64
BATCH, BATCH_CLIENTS = 100, 16
RATE_SHARE = 0.7
# More than any service could take, so that a measurement ends by the clock and not for want of requests.
MOST_PER_SECOND = 25_000

_TABLE = """
CREATE SCHEMA bench;
CREATE TABLE bench.feedback_event (LIKE feedback.feedback_event INCLUDING ALL);
"""
# The row that the service makes of the same event.
_INSERT = """
INSERT INTO bench.feedback_event (event_id, feedback_id, op, revision, kind, name, explanation, correction, reasons,
    annotator_kind, author_role, author_ref, scope, interaction_id, session_id, occurred_at, metadata, api_key_id,
    body_sha256)
SELECT id, id, 'create', 1, 'correction', 'answer', :explanation, :correction, '{outdated source,incomplete}',
    'HUMAN', 'end_user', '0123456789abcdef0123456789abcdef', 'interaction', 'answer-0192c7a4', 'session-0192c7',
    '2026-01-31T12:00:00Z', :metadata, '0192c7a4-0000-7000-8000-000000000000', :hash
FROM (SELECT uuidv7() AS id) AS minted ON CONFLICT (event_id) DO NOTHING;
"""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass
class Bench:
    """The processes, the ledger of all that was acknowledged, and every round's figures by name."""

    folder: Path
    postgres: Postgres
    url: str
    service: Service
    seconds: int
    ledger: Ledger = field(default_factory=Ledger)
    figures: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def note(self, **figures: float) -> None:
        for name, value in figures.items():
            if isfinite(value):
                self.figures[name].append(value)

    def median(self, name: str) -> float:
        return median(self.figures[name])

    def processor(self) -> tuple[float, float, float]:
        """Processor seconds used so far by Postgres, by the service and by this process."""
        return cpu_seconds(self.postgres.pid), cpu_seconds(self.service.process.pid), time.process_time()

    def checkpoint(self) -> None:
        """Let each measurement begin with the same debts: none."""
        with psycopg.connect(self.url, autocommit=True) as conn:
            conn.execute("CHECKPOINT")

    def requests(self, size: int = 1) -> list[Request]:
        return self.service.target.events(self.seconds * MOST_PER_SECOND // size, size)

    def load(self, requests: list[Request], *, rate: float | None = None, connections: int = CLIENTS) -> Load:
        """Send for ``seconds``, into the ledger. Raises SystemExit if anything was refused."""
        target = self.service.target
        load = Load(target, requests, connections=connections, rate=rate, ledger=self.ledger)
        self.checkpoint()
        gc.collect()
        gc.disable()  # a pause of the load would look like one of the service
        try:
            load.run(self.seconds)
        finally:
            gc.enable()
        if load.unanswered or not load.answers or set(self.ledger.statuses) - {200, 201}:
            raise SystemExit(
                f"the service answered {dict(self.ledger.statuses)} and left {load.unanswered} without an answer; "
                f"its log ends:\n{self.service.log()}"
            )
        return load


def fdatasync_ms(folder: Path, times: int = 200) -> float:
    """The median time that writing one page of 8 KB through to the disk takes, in ms."""
    sync = getattr(os, "fdatasync", os.fsync)
    waits = []
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        for _ in range(times):
            os.pwrite(file.fileno(), os.urandom(8192), 0)
            started = time.perf_counter()
            sync(file.fileno())
            waits.append(time.perf_counter() - started)
    return median(waits) * 1000


def pgbench(bench: Bench, rate: float | None = None) -> tuple[float, float, float]:
    """(transactions a second, p50 ms, p99 ms) of durable inserts by ``CLIENTS`` connections."""
    event = json.loads(event_body(random.Random(0)))
    variables = {
        "explanation": event["explanation"],
        "correction": event["correction"],
        "metadata": json.dumps(event["metadata"]),
        "hash": "0" * 64,
    }
    script = bench.folder / "insert.sql"
    script.write_text(" ".join(_INSERT.split()))
    command = [program("pgbench"), "-n", "-M", "prepared", "-f", script, "-c", CLIENTS, "-j", 2]
    command += ["-T", bench.seconds, "--log", f"--log-prefix={bench.folder}/pgbench"]
    if rate is not None:
        command.append(f"--rate={rate:.0f}")
    for name, value in variables.items():
        command += ["-D", f"{name}={value}"]
    bench.checkpoint()
    done = subprocess.run([*map(str, command), bench.url], capture_output=True, text=True, check=False)
    if done.returncode != 0 or "number of failed transactions: 0 " not in done.stdout:
        raise SystemExit(f"pgbench failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    waits = []
    for log in bench.folder.glob("pgbench.*"):
        waits += [int(line.split()[2]) / 1000 for line in log.read_text().splitlines()]
        log.unlink()
    speed = next(line for line in done.stdout.splitlines() if line.startswith("tps = "))
    return float(speed.split()[2]), percentile(waits, 0.5), percentile(waits, 0.99)


def per_event(before: tuple[float, ...], after: tuple[float, ...], events: float) -> list[float]:
    """Microseconds of each processor time per event."""
    return [(end - start) / events * 1e6 for start, end in zip(before, after, strict=True)]


def ceiling(bench: Bench) -> float:
    """Requests a second that the HTTP server and this load reach when nothing is stored."""
    health = bench.service.target.request(b"", path="/healthz", method="GET")
    load = Load(
        bench.service.target,
        iter(lambda: health, None),
        connections=CLIENTS,
        note=lambda *_: None,
    )
    return load.run(min(bench.seconds, 3)).per_second


def one_round(bench: Bench) -> None:
    """Everything that is compared, once, one after the other."""
    bench.note(fdatasync_ms=fdatasync_ms(bench.postgres.data))
    bench.note(http_ceiling_per_s=ceiling(bench))

    before = bench.processor()
    speed, p50, p99 = pgbench(bench)
    bench.note(pgbench_cpu_us=per_event(before, bench.processor(), speed * bench.seconds)[0])
    bench.note(pgbench_per_s=speed, pgbench_saturated_p50_ms=p50, pgbench_saturated_p99_ms=p99)
    singles = bench.requests()
    before = bench.processor()
    load = bench.load(singles)
    postgres, service, own = per_event(before, bench.processor(), load.answers)
    bench.note(events_cpu_us=postgres + service, service_cpu_us=service, load_cpu_us=own)
    sent = singles[: load.answers]
    bench.note(
        events_per_s=load.per_second,
        saturated_p50_ms=load.wait(0.5),
        saturated_p99_ms=load.wait(0.99),
        ratio_pgbench=load.per_second / speed,
    )
    say(
        f"  saturated: {load.per_second:,.0f} events/s, p50 {load.wait(0.5):.1f} ms, p99 {load.wait(0.99):.1f}; "
        f"pgbench {speed:,.0f}/s, p50 {p50:.1f}, p99 {p99:.1f}"
    )

    # Half of a retry storm: events answered long ago among new ones, in any order.
    fresh = bench.requests()
    mixed = [one for pair in zip(fresh, random.sample(sent, len(sent)), strict=False) for one in pair]
    slower = bench.load(mixed)
    bench.note(duplicates_slowdown_pct=100 * (1 - slower.per_second / load.per_second))
    say(f"  half duplicates: {slower.per_second:,.0f} events/s")

    rate = RATE_SHARE * load.per_second
    speed, p50, p99 = pgbench(bench, rate)
    bench.note(pgbench_p50_ms=p50, pgbench_p99_ms=p99)
    steady = bench.load(fresh[len(mixed) // 2 :][: int(rate * bench.seconds * 2)], rate=rate)
    bench.note(rate_per_s=rate, p50_ms=steady.wait(0.5), p99_ms=steady.wait(0.99))
    say(
        f"  at {rate:,.0f}/s: p50 {steady.wait(0.5):.1f} ms, p99 {steady.wait(0.99):.1f}; "
        f"pgbench p50 {p50:.1f}, p99 {p99:.1f}"
    )

    batches = bench.load(bench.requests(BATCH), connections=BATCH_CLIENTS)
    bench.note(batch_events_per_s=batches.per_second * BATCH, batch_p99_ms=batches.wait(0.99))
    say(f"  batches of {BATCH}: {batches.per_second * BATCH:,.0f} events/s, p99 {batches.wait(0.99):.0f} ms")


def memory(bench: Bench, seconds: float) -> None:
    """Resident memory of the service under a steady load: its peak, and the slope of the second half."""
    rate = bench.median("rate_per_s")
    samples: list[tuple[float, float]] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(max(0.2, seconds / 600)):
            samples.append((time.monotonic() / 60, bench.service.memory_mb()))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        requests = bench.service.target.endless()
        load = Load(bench.service.target, requests, connections=CLIENTS, rate=rate, ledger=bench.ledger)
        load.run(seconds)
    finally:
        done.set()
        thread.join()
    settled = samples[len(samples) // 2 :]
    slope = linear_regression(*zip(*settled, strict=True)).slope if len(settled) > 1 else 0.0
    bench.note(peak_mb=max(megabytes for _, megabytes in samples), memory_slope_mb_per_min=slope)
    say(
        f"  memory over {seconds:.0f} s at {rate:,.0f}/s: peak {bench.median('peak_mb'):.0f} MB, {slope:+.2f} MB/min"
    )


def real_disk(folder: Path) -> None:
    """Refuse a folder that lies in memory: a sync there costs nothing."""
    kinds = {}
    mounts = Path("/proc/mounts")
    if mounts.exists():
        kinds = {line.split()[1]: line.split()[2] for line in mounts.read_text().splitlines()}
    place = next((p for p in (folder, *folder.parents) if str(p) in kinds), None)
    if place is not None and kinds[str(place)] in ("tmpfs", "ramfs"):
        raise SystemExit(f"{folder} lies in memory ({place}): name a folder on a real disk with --folder")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.feedback",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=int, default=5, help="of each measurement (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="medians are over these (%(default)s)")
    parser.add_argument(
        "--memory-seconds",
        type=float,
        default=30,
        help="of steady load for memory; 600 shows a leak (%(default)s)",
    )
    parser.add_argument("--workers", type=int, help="of the service; its own default unless given")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="on the disk to measure")
    options = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="datamoat-bench-", dir=options.folder))
    # The server's account must pass through it; what it holds is protected by itself.
    folder.chmod(0o711)
    postgres = Postgres(folder / "home")
    try:
        postgres.start()
        real_disk(postgres.data.resolve())
        url = postgres.new_database()
        with psycopg.connect(url) as conn:
            conn.execute(_TABLE)
        with Service(url, folder, options.workers) as service:
            bench = Bench(folder, postgres, url, service, seconds=1)
            say("warming up")
            bench.load(bench.requests())
            bench.seconds = options.seconds
            for number in range(options.rounds):
                say(f"round {number + 1} of {options.rounds}")
                one_round(bench)
            memory(bench, options.memory_seconds)
        with psycopg.connect(url) as conn:
            lost, duplicates = bench.ledger.check(conn)
    finally:
        postgres.destroy()
        shutil.rmtree(folder)
    result = {name: round(bench.median(name), 3) for name in bench.figures}
    result |= {"acknowledged": bench.ledger.acknowledged, "lost": lost, "duplicates": duplicates}
    for name, value in result.items():
        say(f"{name:28} {value:,}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
