"""Records kept on disk until they are sent: segments of a folder that several processes may share.

Belongs here: the format of a segment, who owns one, adopting those of processes that died, what was refused.
Does not belong here: threads and limits (``feedback.client.outbox``), HTTP, what a record means.

A segment is ``MAGIC`` and then records, each its length and CRC-32 (8 bytes, little-endian), one byte of tag, and the
body. Its owner holds ``flock`` on it, which the kernel lets go when the owner dies; then the next process that looks
takes it over. What is acknowledged is remembered in memory only: an adopted segment is sent from its start, and ids
make the repeats harmless. Where a segment is damaged, it goes on with the next record whose CRC is right.
"""

import fcntl
import logging
import os
import secrets
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

MAGIC = b"datamoat-spool-1\n"
SEGMENT_BYTES = 8 * 1024 * 1024
REFUSED = "refused.jsonl"

_SUFFIX = ".spool"
_HEADER = struct.Struct("<II")
_log = logging.getLogger(__name__)


class Record(NamedTuple):
    """One byte that says what the body is, and the body."""

    tag: bytes
    body: bytes


def pack(record: Record) -> bytes:
    """The bytes of one record in a segment."""
    content = record.tag + record.body
    return _HEADER.pack(len(content), zlib.crc32(content)) + content


def unpack(data: bytes, limit: int | None = None) -> tuple[list[Record], int]:
    """The whole, intact records at the start of ``data``, at most ``limit``, and how many bytes they take."""
    records: list[Record] = []
    at = 0
    while len(records) != limit and (content := _content(data, at)):
        records.append(Record(content[:1], content[1:]))
        at += _HEADER.size + len(content)
    return records, at


def next_whole(data: bytes) -> int:
    """The offset of the first whole, intact record in ``data``; the length of ``data`` if there is none."""
    return next((at for at in range(len(data)) if _content(data, at)), len(data))


def _content(data: bytes, at: int) -> bytes:
    """Tag and body of the record at offset ``at``; empty if none is there that is whole and intact."""
    start = at + _HEADER.size
    if start >= len(data):
        return b""
    length, crc = _HEADER.unpack_from(data, at)
    if length > len(data) - start:
        return b""
    # Zeros, which a file system that lost power may leave, are a record of length 0 and a right CRC: none of ours.
    content = data[start : start + length]
    return content if zlib.crc32(content) == crc else b""


@dataclass(eq=False)
class _Segment:
    """One open, locked file. ``end`` and ``sent`` are offsets: up to where it is written, and acknowledged."""

    path: Path
    fd: int
    end: int = len(MAGIC)
    sent: int = len(MAGIC)
    adopted: bool = False

    def read(self, max_records: int, max_bytes: int) -> tuple[list[Record], int]:
        """The next records, at least one if any is intact, and the offset after them."""
        available = self.end - self.sent
        data = os.pread(self.fd, min(max_bytes, available), self.sent)
        records, taken = unpack(data, max_records)
        if not records and len(data) >= _HEADER.size:
            whole = _HEADER.size + _HEADER.unpack_from(data)[0]
            if len(data) < whole <= available:
                records, taken = unpack(os.pread(self.fd, whole, self.sent))
        return records, self.sent + taken

    def resume(self) -> int:
        """The offset of the next whole record after what is none; ``end`` if there is no more."""
        return self.sent + next_whole(os.pread(self.fd, self.end - self.sent, self.sent))


@dataclass(frozen=True)
class Batch:
    """Consecutive records of one segment; given back to ``Spool.done`` once they are acknowledged."""

    records: list[Record]
    _segment: _Segment
    _after: int


class Spool:
    """The records of one folder that this process owns. Its methods may be called from any thread.

    Folder and files are readable by their owner alone: they hold texts and raw ids of people.
    """

    def __init__(self, folder: Path, *, fsync: bool = True) -> None:
        """``fsync``: whether what was appended survives a power cut, not only the death of the process.

        Raises OSError where the folder cannot be used.
        """
        self.folder = folder
        self.torn_bytes = 0
        self.damaged_bytes = 0
        self._fsync = fsync
        self._lock = threading.Lock()
        self._segments: list[_Segment] = []  # oldest first
        self._active: _Segment | None = None
        self._left_alone: set[str] = set()
        self._left_bytes = 0
        with self._folder_lock():
            pass

    def append(self, packed: bytes) -> None:
        """Write packed records behind the others; all are on disk on return, none count after an OSError."""
        with self._lock:
            active = self._active
            # A file that was deleted under us would swallow what is written to it.
            if active is None or active.end >= SEGMENT_BYTES or os.fstat(active.fd).st_nlink == 0:
                active = self._create()
            try:
                _write(active.fd, packed, active.end)
                if self._fsync:
                    os.fsync(active.fd)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(active.fd, active.end)
                raise
            active.end += len(packed)

    def read(self, max_records: int, max_bytes: int) -> Batch | None:
        """The oldest records not yet done; None if there are none. What is no whole record is counted and logged.

        ``max_bytes`` is exceeded by a single record that is larger.
        """
        with self._lock:
            for segment in list(self._segments):
                while segment.sent < segment.end:
                    records, after = segment.read(max_records, max_bytes)
                    if records:
                        return Batch(records, segment, after)
                    self._skip(segment)
                if segment is not self._active or segment.end > len(MAGIC):
                    self._advance(segment, segment.end)
        return None

    def done(self, batch: Batch) -> None:
        """Forget the records of ``batch`` and the segment they end."""
        with self._lock:
            # After ``close`` or a fork the segment is no longer ours, and its descriptor may be another file's.
            if batch._segment in self._segments:
                self._advance(batch._segment, batch._after)

    def adopt(self) -> int:
        """Take over the segments of processes that have ended; returns how many."""
        with self._lock, self._folder_lock():
            ours = {segment.path for segment in self._segments}
            found = [path for path in self.folder.glob(f"*{_SUFFIX}") if path not in ours]
            adopted = [segment for path in found if (segment := self._take(path)) is not None]
            self._segments += adopted
            # Names begin with the time they were made.
            self._segments.sort(key=lambda segment: segment.path.name)
            return len(adopted)

    def refuse(self, lines: bytes) -> None:
        """Append to the file of refused records, which is never removed."""
        with self._lock, self._folder_lock():
            fd = os.open(self.folder / REFUSED, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                end = os.fstat(fd).st_size
                if end and os.pread(fd, 1, end - 1) != b"\n":
                    lines = b"\n" + lines  # a line that was cut short stays a line of its own
                _write(fd, lines, end)
                os.fsync(fd)
            finally:
                os.close(fd)

    def unsent_bytes(self) -> int:
        """What this process has yet to send, or left behind."""
        return self._left_bytes + sum(segment.end - segment.sent for segment in list(self._segments))

    def folder_bytes(self) -> int:
        """The size of everything in the folder, other processes' segments and refused records included."""
        total = 0
        # Others remove files meanwhile, and someone may remove the folder.
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    total += entry.stat(follow_symlinks=False).st_size
        return total

    def release_adopted(self) -> None:
        """Let another process adopt what this one had adopted."""
        with self._lock:
            for segment in [segment for segment in self._segments if segment.adopted]:
                self._segments.remove(segment)
                os.close(segment.fd)

    def close(self) -> None:
        """Let go of every segment; what is unsent is there for the next process, and stays in ``unsent_bytes``."""
        # A disk that hangs in another thread's call must not hold up the end of the process too.
        if not self._lock.acquire(timeout=1.0):
            return
        try:
            self._left_bytes = self.unsent_bytes()
            for segment in list(self._segments):
                if segment.sent == segment.end:
                    self._active = None
                    self._advance(segment, segment.end)
            self._forget()
        finally:
            self._lock.release()

    def before_fork(self) -> None:
        """No thread is in the middle of anything while the process is copied."""
        self._lock.acquire()

    def after_fork_in_parent(self) -> None:
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """The segments stay the parent's. Closing our copies keeps a dead parent's from looking alive."""
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        for segment in self._segments:
            os.close(segment.fd)
        self._segments, self._active = [], None

    def _skip(self, segment: _Segment) -> None:
        """Go on behind what is no whole record: a write cut short at the end, or damage before whole records."""
        at = segment.resume()
        lost, segment.sent = at - segment.sent, at
        if at == segment.end:
            self.torn_bytes += lost
            _log.warning("%s ends in %d bytes that are no whole record; they were cut", segment.path, lost)
        else:
            self.damaged_bytes += lost
            _log.error(
                "%s is damaged: %d bytes before offset %d were lost; check the disk. What follows is sent",
                segment.path,
                lost,
                at,
            )

    def _advance(self, segment: _Segment, sent: int) -> None:
        segment.sent = sent
        if sent < segment.end:
            return
        if segment is self._active:
            os.ftruncate(segment.fd, len(MAGIC))
            segment.sent = segment.end = len(MAGIC)
        else:
            segment.path.unlink(missing_ok=True)
            self._segments.remove(segment)
            os.close(segment.fd)

    def _create(self) -> _Segment:
        with self._folder_lock() as folder_fd:
            # Names sort by age, also of segments that begin within one millisecond.
            path = self.folder / f"{time.time_ns():020d}-{secrets.token_hex(8)}{_SUFFIX}"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _write(fd, MAGIC, 0)
                if self._fsync:
                    os.fsync(folder_fd)
            except OSError:
                path.unlink(missing_ok=True)
                os.close(fd)
                raise
        self._active = _Segment(path, fd)
        self._segments.append(self._active)
        return self._active

    def _take(self, path: Path) -> _Segment | None:
        """Open and lock a segment; None if its owner lives, or it is gone, empty, or not ours to read."""
        try:
            fd = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            return None
        except PermissionError:
            self._leave_alone(path, "belongs to another user")
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found, magic = os.fstat(fd), os.pread(fd, len(MAGIC), 0)
        except BlockingIOError:
            os.close(fd)
            return None
        if magic == MAGIC and found.st_nlink:
            return _Segment(path, fd, end=found.st_size, adopted=True)
        if MAGIC.startswith(magic):
            # Its owner died before it wrote a record, or has just finished with it.
            path.unlink(missing_ok=True)
        else:
            self._leave_alone(path, "is no segment of this version")
        os.close(fd)
        return None

    def _leave_alone(self, path: Path, why: str) -> None:
        if path.name not in self._left_alone:
            self._left_alone.add(path.name)
            _log.warning("%s %s; it was left alone", path, why)

    @contextmanager
    def _folder_lock(self) -> Iterator[int]:
        """Making and adopting segments exclude each other, across processes. Gives the folder's descriptor."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            # Said aloud: a child forked in this moment holds a copy of the descriptor, and with it the lock.
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
