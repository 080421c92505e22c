"""The examples as a newcomer runs them, whole, with no network but loopback."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestration.settings import ROOT
from storage import embedded

DATA = Path(os.environ.get("DATAMOAT_DATA_DIR") or ROOT.parent / "shared" / "data")

# In a network namespace of its own even loopback is down until somebody sets it up.
LOOPBACK_UP = textwrap.dedent(
    """
    import fcntl, socket, struct, sys
    SIOCSIFFLAGS, IFF_UP, IFF_RUNNING = 0x8914, 0x1, 0x40
    with socket.socket() as probe:
        fcntl.ioctl(probe, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP | IFF_RUNNING))
    print("up", flush=True)
    sys.stdin.read()
    """
)

# Where namespaces are not allowed: every Python process refuses to talk to anything but loopback.
GUARD = textwrap.dedent(
    """
    import socket
    _connect = socket.socket.connect
    def connect(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"connection to {address} refused by the test")
        return _connect(self, address)
    socket.socket.connect = connect
    """
)


def can_unshare() -> bool:
    """Whether this machine lets us make a network namespace."""
    try:
        return subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


class Example:
    """One example in a home of its own, cut off from every network but loopback."""

    def __init__(self, name: str, home: Path) -> None:
        self.home = home
        self.namespace: subprocess.Popen[bytes] | None = None
        self.environment = {
            **os.environ,
            "EXAMPLE": name,
            "DATAMOAT_HOME": str(home),
            "DATAMOAT_DATA_DIR": str(DATA),
            "DATABASE_URL": "",
        }
        if can_unshare():
            # Holds the namespace, which all commands and the Postgres they start share, until it is closed.
            self.namespace = subprocess.Popen(
                ["unshare", "-n", sys.executable, "-c", LOOPBACK_UP],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            assert self.namespace.stdout is not None
            assert self.namespace.stdout.readline() == b"up\n"
            self.prefix = ["nsenter", f"--net=/proc/{self.namespace.pid}/ns/net"]
        else:
            guard = home / "guard"
            guard.mkdir(parents=True)
            (guard / "sitecustomize.py").write_text(GUARD)
            self.environment["PYTHONPATH"] = str(guard)
            self.prefix = []

    def moat(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.prefix, sys.executable, "-m", "orchestration.cli", *arguments],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=540,
        )

    def close(self) -> None:
        if self.namespace is not None:
            self.namespace.communicate()
        embedded.destroy(self.home)

    def report(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.home / "report.json").read_text())
        return content


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Example]]:
    """A function that makes an example by its name."""
    started: list[Example] = []

    def make(name: str) -> Example:
        started.append(Example(name, tmp_path / "home"))
        return started[-1]

    yield make
    for example in started:
        example.close()


def refusals(report: dict[str, Any], source: str) -> dict[str, int]:
    return {r["rule"]: r["rows"] for r in report["refusals"] if r["source"] == source}


def test_support(start: Callable[[str], Example]) -> None:
    example = start("support")
    done = example.moat("run")
    assert done.returncode == 0, done.stdout + done.stderr
    report = example.report()
    sources = {source["source"]: source for source in report["sources"]}
    # What examples/support/README.md says is planted.
    assert refusals(report, "tickets") == {
        "duplicate_key": 3,
        "pattern": 1,
        "required": 1,
        "valid_values": 4,
        "wrong_field_count": 2,
        "wrong_type": 3,
    }
    assert refusals(report, "products") == {"wrong_type": 1}
    assert refusals(report, "handbook") == {"broken_file": 1, "empty_file": 1, "wrong_encoding": 1}
    assert sources["tickets"]["rows_in"] == sources["tickets"]["rows_landed"] + 14
    assert sources["packages"]["documents"] > 100
    assert report["sent"]["interactions"]["created"] == 150
    assert report["sent"]["feedback"] == {"created": 302, "duplicate": 6, "refused": 5}
    assert {r["entity"] for r in report["redactions"]} >= {"EMAIL_ADDRESS", "PHONE_NUMBER", "IBAN_CODE"}
    assert report["vectors"] == report["embedded_now"] > 1_000
    assert all(dataset["rows"] > 10 for dataset in report["datasets"])
    figures = {(q["mode"], q["metric"]): q for q in report["quality"]}
    assert figures["hybrid", "nDCG@10"]["n"] == 60
    assert figures["hybrid", "nDCG@10"]["low"] > 0.4

    found = example.moat("search", "what does error code mean on a logger?", "-k", "3")
    assert found.returncode == 0, found.stderr
    rows = example.moat("sql", "select source_name from marts.source_inventory order by 1")
    assert "handbook" in rows.stdout
    secret = example.moat("sql", "select output from feedback.interaction")
    assert secret.returncode == 1
    assert "permission denied" in secret.stdout


@pytest.mark.skipif(
    not (DATA / "feedbackqa_dev").is_dir(),
    reason=f"the public data set is not in {DATA / 'feedbackqa_dev'}; set DATAMOAT_DATA_DIR",
)
def test_feedbackqa(start: Callable[[str], Example]) -> None:
    example = start("feedbackqa")
    done = example.moat("run")
    assert done.returncode == 0, done.stdout + done.stderr
    report = example.report()
    # The counts of the data set's own description.
    passages = next(source for source in report["sources"] if source["source"] == "passages")
    assert passages["rows_in"] == 1540
    assert report["sent"]["interactions"] == {"created": 876, "duplicate": 0, "refused": 0}
    assert report["sent"]["feedback"] == {"created": 1752, "duplicate": 0, "refused": 0}
    assert {f["kind"]: f["events"] for f in report["feedback"]} == {"rating": 1752}
    # 683 questions, of which two have the same text and two right passages.
    assert {q["n"] for q in report["quality"]} == {682}
    figures = {(q["mode"], q["metric"]): q for q in report["quality"]}
    assert figures["hybrid", "R@10"]["low"] > 0.5
    kto = next(dataset for dataset in report["datasets"] if dataset["dataset"] == "kto")
    assert kto["rows"] > 300
