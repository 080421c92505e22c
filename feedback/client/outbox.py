"""From a call in the host application to an acknowledged item: a writer thread fills the spool, a sender empties it.

Belongs here: the hand-over, limits, retries without end, what happens at a fork and at exit, the status.
Does not belong here: files (``feedback.client.spool``), HTTP (``feedback.client.delivery``), what an item looks like.
"""

import atexit
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn
from weakref import WeakSet

import msgspec

from feedback.answers import Error, ItemResult
from feedback.client.delivery import BATCH_BYTES, BATCH_ITEMS, Post, RequestFailed, backoff, deliver
from feedback.client.spool import REFUSED, Batch, Record, Spool, pack

MAX_UNWRITTEN_BYTES = 32 * 1024 * 1024
LONGEST_WAIT_SECONDS = 30.0
ADOPT_SECONDS = 5.0
EXIT_SECONDS = 3.0
# How long the writer lets calls gather: fewer and larger writes, and the calls of a burst need not wake it.
LINGER_SECONDS = 0.005

INTERACTION, FEEDBACK = b"i", b"f"
# In this order within a batch: an answer before what was said about it.
PATHS = {INTERACTION: "/v1/interactions", FEEDBACK: "/v1/feedback"}

_log = logging.getLogger(__name__)


class SpoolFull(Exception):
    """The item was not taken: what waits to be written or sent has reached its limit."""


@dataclass
class SpoolStatus:
    """What this process has taken and what became of it; all but the bytes and the problem only ever grow.

    ``recorded`` calls were taken, ``written`` of them are on disk, ``full`` were refused with SpoolFull. Of the items
    sent, adopted ones included, ``acknowledged`` are in the log and ``refused`` in ``refused.jsonl`` of the folder.
    ``torn_bytes`` were cut from segments of processes that died while writing, ``damaged_bytes`` lay between whole
    records, which a disk in order does not do. ``waiting_bytes`` are yet to be sent by this process; ``folder_bytes`` is what counts against the limit. ``problem`` is what stands in the way now;
    ``stopped`` says that the service does not accept the key, and nothing is sent until a new client is made.
    """

    recorded: int = 0
    written: int = 0
    full: int = 0
    acknowledged: int = 0
    refused: int = 0
    torn_bytes: int = 0
    damaged_bytes: int = 0
    waiting_bytes: int = 0
    folder_bytes: int = 0
    stopped: bool = False
    problem: str | None = None


class _Stop(Exception):
    """The sender ends."""


class Outbox:
    """Takes items in microseconds and sees to it that the service gets them, in the order of the calls.

    Taken is not yet on disk: the writer follows within milliseconds, and a process that is killed before loses those
    few. Written is safe from the end of the process (with ``fsync``, of the machine) and is sent by this process, or
    by the next that opens ``folder``.
    """

    def __init__(self, folder: Path, post: Post, *, max_bytes: int, fsync: bool) -> None:
        self._folder = folder
        self._post = post
        self._max_bytes = max_bytes
        self._spool = Spool(folder, fsync=fsync)
        self._spool.adopt()
        self._closed = False
        self._begin()
        _outboxes.add(self)
        self._start()

    def _begin(self) -> None:
        """The state of a process that has taken nothing yet."""
        self._changed = threading.Condition()  # guards what follows, and tells those who wait for progress
        self._taken: list[bytes] = []
        self._unwritten_bytes = 0
        self._status = SpoolStatus(folder_bytes=self._spool.folder_bytes())
        self._problems: dict[str, str] = {}
        self._threads: list[threading.Thread] = []
        self._adopt_at = 0.0
        self._wake_writer = threading.Event()
        self._wake_sender = threading.Event()
        self._stopping = threading.Event()

    def _start(self) -> None:
        self._threads = [
            threading.Thread(target=self._run, args=(name, step), name=_thread_name(name), daemon=True)
            for name, step in (("writer", self._write), ("sender", self._send))
        ]
        for thread in self._threads:
            thread.start()

    def put(self, tag: bytes, body: bytes) -> None:
        """Take one item; no disk and no network on the calling thread. Raises SpoolFull."""
        packed = pack(Record(tag, body))
        with self._changed:
            if self._closed:
                raise RuntimeError("the feedback client is closed; make calls before close()")
            unwritten = self._unwritten_bytes + len(packed)
            if unwritten > MAX_UNWRITTEN_BYTES or unwritten + self._status.folder_bytes > self._max_bytes:
                self._status.full += 1
                raise SpoolFull(self._why_full(unwritten))
            self._taken.append(packed)
            self._unwritten_bytes = unwritten
            self._status.recorded += 1
            if not self._threads:  # the first call after a fork
                self._start()
        self._wake_writer.set()

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until all that was taken before is on disk; False if it is not by then."""
        with self._changed:
            recorded = self._status.recorded
            return self._changed.wait_for(lambda: self._status.written >= recorded, timeout_seconds)

    def close(self, timeout_seconds: float) -> bool:
        """Take no more, wait until the service has acknowledged all, and end; False if it had not by then."""
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            if self._closed:
                return self._complete()
            self._closed = True
            self._changed.wait_for(lambda: self._complete() or self._status.stopped, timeout_seconds)
            complete = self._complete()
        self._stopping.set()
        self._wake_writer.set()
        self._wake_sender.set()
        for thread in self._threads:
            thread.join(max(1.0, deadline - time.monotonic()))
        self._spool.close()
        _outboxes.discard(self)
        status = self.status()
        if status.written < status.recorded:
            lost = status.recorded - status.written
            _log.error("%d feedback items were never written to %s: %s", lost, self._folder, status.problem)
        return complete

    def status(self) -> SpoolStatus:
        with self._changed:
            return replace(
                self._status,
                torn_bytes=self._spool.torn_bytes,
                damaged_bytes=self._spool.damaged_bytes,
                waiting_bytes=self._spool.unsent_bytes(),
                problem="; ".join(self._problems.values()) or None,
            )

    def _complete(self) -> bool:
        return self._status.written == self._status.recorded and not self._spool.unsent_bytes()

    def _why_full(self, unwritten: int) -> str:
        problem = f" ({'; '.join(self._problems.values())})" if self._problems else ""
        if unwritten > MAX_UNWRITTEN_BYTES:
            return f"{MAX_UNWRITTEN_BYTES} bytes wait to be written to {self._folder}{problem}; make room on its disk"
        return (
            f"{self._folder} holds {self._status.folder_bytes} of at most {self._max_bytes} bytes{problem}; see to it "
            f"that the service is reachable, empty {REFUSED} if it is large, or raise max_spool_bytes"
        )

    def _write(self) -> None:
        """What the writer does each time it is woken: everything taken since goes to disk in one write."""
        self._wake_writer.wait()
        self._stopping.wait(LINGER_SECONDS)
        self._wake_writer.clear()
        last = self._stopping.is_set()
        with self._changed:
            taken, self._taken = self._taken, []
        if taken:
            try:
                self._spool.append(b"".join(taken))
            except BaseException:
                with self._changed:
                    self._taken[:0] = taken
                self._wake_writer.set()
                raise
            self._progress(written=len(taken), unwritten_bytes=-sum(map(len, taken)))
            self._wake_sender.set()
        if last:
            raise _Stop

    def _send(self) -> None:
        """What the sender does each time it is woken, or has waited: adopt, then send until nothing is left."""
        if time.monotonic() >= self._adopt_at:
            self._spool.adopt()
            self._adopt_at = time.monotonic() + ADOPT_SECONDS
        while (batch := self._spool.read(BATCH_ITEMS, BATCH_BYTES)) is not None:
            self._send_batch(batch)
        if self._stopping.is_set():
            raise _Stop
        self._progress()
        self._wake_sender.wait(ADOPT_SECONDS)
        self._wake_sender.clear()

    def _send_batch(self, batch: Batch) -> None:
        acknowledged, refused = 0, []
        for tag, path in PATHS.items():
            bodies = [record.body for record in batch.records if record.tag == tag]
            for body, result in zip(bodies, deliver(self._post_until_answered, path, bodies), strict=True):
                if result.error is None:
                    acknowledged += 1
                else:
                    refused.append(_refused_line(path, body, result.error))
        if refused:
            # Before they leave the spool: killed in between, a line is there twice rather than never.
            self._spool.refuse(b"".join(refused))
            _log.warning("%d feedback items were refused; see %s", len(refused), self._folder / REFUSED)
        self._spool.done(batch)
        self._progress(acknowledged=acknowledged, refused=len(refused))

    def _post_until_answered(self, path: str, bodies: Sequence[bytes]) -> list[ItemResult] | Error:
        attempt = 0
        while not self._stopping.is_set():
            try:
                answered = self._post(path, bodies)
            except RequestFailed as error:
                if error.status in (401, 403):
                    self._give_up(error)
                self._report("sender", str(error))
                self._stopping.wait(max(backoff(attempt, LONGEST_WAIT_SECONDS), error.wait_seconds))
                attempt += 1
            else:
                self._report("sender", None)
                return answered
        raise _Stop

    def _give_up(self, error: RequestFailed) -> NoReturn:
        """The key is not accepted: keep taking and writing, for a client that is made with another key."""
        self._report("sender", f"{error}; nothing is sent until a client is made with a key that is accepted")
        with self._changed:
            self._status.stopped = True
            self._changed.notify_all()
        self._spool.release_adopted()
        raise _Stop

    def _progress(
        self, *, written: int = 0, unwritten_bytes: int = 0, acknowledged: int = 0, refused: int = 0
    ) -> None:
        """Count what was done, look at how full the folder is now, and tell those who wait."""
        folder_bytes = self._spool.folder_bytes()
        with self._changed:
            self._status.written += written
            self._unwritten_bytes += unwritten_bytes
            self._status.acknowledged += acknowledged
            self._status.refused += refused
            self._status.folder_bytes = folder_bytes
            self._changed.notify_all()

    def _run(self, name: str, step: Callable[[], None]) -> None:
        """Repeat ``step`` until it raises _Stop. Whatever else goes wrong is reported, and tried again later."""
        attempt = 0
        while True:
            try:
                step()
            except _Stop:
                return
            except Exception as error:
                # Also what nobody foresaw: a thread that died would keep from the host that nothing is sent.
                self._report(name, f"{type(error).__name__}: {error}")
                if self._stopping.wait(backoff(attempt, LONGEST_WAIT_SECONDS)):
                    return
                attempt += 1
            else:
                if attempt:
                    self._report(name, None)
                attempt = 0

    def _report(self, name: str, problem: str | None) -> None:
        """Log when a thread runs into a problem and when it is over, not each attempt between."""
        with self._changed:
            before = self._problems.pop(name, None)
            if problem is not None:
                self._problems[name] = problem
        if problem is not None and before is None:
            _log.warning("feedback is kept in %s for now: %s", self._folder, problem)
        elif problem is None and before is not None:
            _log.info("feedback from %s flows again", self._folder)

    def before_fork(self) -> None:
        self._spool.before_fork()

    def after_fork_in_parent(self) -> None:
        self._spool.after_fork_in_parent()

    def after_fork_in_child(self) -> None:
        """What was taken is the parent's to write; the child starts anew with its first call."""
        self._spool.after_fork_in_child()
        self._begin()


_outboxes: WeakSet[Outbox] = WeakSet()


def _thread_name(name: str) -> str:
    return f"feedback {name}"


def _refused_line(path: str, body: bytes, error: Error) -> bytes:
    line = {
        "refused_at": datetime.now(UTC).isoformat(),
        "path": path,
        "error": msgspec.to_builtins(error),
        "item": json.loads(body),
    }
    return json.dumps(line).encode() + b"\n"


def _at_exit() -> None:
    deadline = time.monotonic() + EXIT_SECONDS
    for outbox in list(_outboxes):
        outbox.close(max(0.0, deadline - time.monotonic()))


def _each(act: Callable[[Outbox], None]) -> Callable[[], None]:
    def act_on_each() -> None:
        for outbox in list(_outboxes):
            act(outbox)

    return act_on_each


def _not_of_a_sender(record: logging.LogRecord) -> bool:
    return record.threadName != _thread_name("sender")


# httpx tells of every request at level INFO: an application's log is no place for each batch we send.
logging.getLogger("httpx").addFilter(_not_of_a_sender)
atexit.register(_at_exit)
os.register_at_fork(
    before=_each(Outbox.before_fork),
    after_in_parent=_each(Outbox.after_fork_in_parent),
    after_in_child=_each(Outbox.after_fork_in_child),
)
