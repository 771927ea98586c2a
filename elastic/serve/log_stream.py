"""The logs of all roles on one stream, as JSON lines that name the role: for where the output of one process is all
that is kept, as of a pod. The files stay what they are; this reads them as they grow.

A reader that does not read holds up nothing: its lines wait in the files, and are lost when those are emptied.
"""

from __future__ import annotations

import os
import select
import stat
import threading
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from membership.base.attempts import Attempts
from membership.base.errors import WaitTimeout

PERIOD_S = 0.25
CLOSE_TIMEOUT_S = 15.0
AT_ONCE = 1 << 20  # bytes of one file that are read at a time
LONGEST = 1 << 16  # bytes of a line; what is longer is several
SAFE = select.PIPE_BUF  # a pipe that takes anything takes this much
REST_TIMEOUT_S = 1.0  # of a line that has been begun

log = structlog.get_logger(__name__)


@dataclass
class _Source:
    """A file, and how far it is copied."""

    role: str
    path: Path
    position: int

    def lines(self, *, last: bool) -> list[bytes]:
        """Whole lines that are new; at last, what is left. A file that was emptied is read from its start."""
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self.position:
                    self.position = 0
                file.seek(self.position)
                found = file.read(AT_ONCE)
        except FileNotFoundError:
            return []
        whole = found[: found.rfind(b"\n") + 1] or (found[:LONGEST] if last or len(found) >= LONGEST else b"")
        return whole.splitlines(keepends=True)


class LogStream:
    """Copies until it is closed, in a thread of its own."""

    def __init__(self, files: dict[str, Path], fd: int) -> None:
        """`files`: by the role's name. What they contain so far is of an earlier run."""
        self._sources = [_Source(role, path, _size(path)) for role, path in files.items()]
        self._fd = fd
        self._poll = None if stat.S_ISREG(os.fstat(fd).st_mode) else select.poll()
        if self._poll is not None:
            self._poll.register(fd, select.POLLOUT)
        self._attempts = Attempts("log stream")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-stream", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Copy what is left, and end."""
        self._stop.set()
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            raise WaitTimeout(f"the copy of the logs did not end within {CLOSE_TIMEOUT_S:g} s")

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self._attempts.run(self._copy)
        self._attempts.once(lambda: self._copy(last=True), "the last lines of the logs")

    def _copy(self, *, last: bool = False) -> None:
        for source in self._sources:
            for line in source.lines(last=last):
                if not self._write(as_json(source.role, line)):
                    return
                source.position += len(line)

    def _write(self, data: bytes) -> bool:
        """False: it is not read now. Of a line that is begun the rest is lost if its reader stops."""
        for start in range(0, len(data), SAFE):
            if self._poll is not None and not self._poll.poll(REST_TIMEOUT_S * 1000 if start else 0):
                return start > 0
            part = data[start : start + SAFE]
            while part:
                part = part[os.write(self._fd, part) :]
        return True


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def as_json(role: str, line: bytes) -> bytes:
    """The line with the role: as it is if it names one, with the role added if it is JSON, else as an event."""
    text = line.strip()
    try:
        found = msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict):
        found = {"event": text.decode(errors="replace")}
    return text + b"\n" if "role" in found else msgspec.json.encode({"role": role, **found}) + b"\n"
