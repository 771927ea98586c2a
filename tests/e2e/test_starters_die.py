"""Who starts a cluster as a child takes it along: a terminal that is closed, SIGKILL and a crash leave no process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.helpers import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

DEMO = ["-m", "elastic.cli", "demo", "--ranks", "2", "--seed", "1"]
CHAOS = ["-c", "from chaos.cli.main import main; main()"]
SUITE = [*CHAOS, "suite", "--only", "failpoints", "--out"]
RUN = [*CHAOS, "run", "kill-rank", "--seed", "1"]
EVERYTHING = 11  # supervisor, etcd, zygote, forkserver, controller, agent, two engines, gateway, two ranks
ENDED_S = 60.0


class Family:
    """A command that starts a cluster, and all that descends from it, known by the directory that they are in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.command: subprocess.Popen[bytes] | None = None
        self._terminal: int | None = None

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """On a terminal of its own."""
        self._terminal, theirs = os.openpty()
        self.command = subprocess.Popen(
            ["setsid", "--ctty", sys.executable, *arguments], stdin=theirs, stdout=theirs, stderr=theirs,
            env={**os.environ, "TMPDIR": str(self.folder)}, cwd=self.folder,
        )  # fmt: skip
        os.close(theirs)
        os.set_blocking(self._terminal, False)
        return self.command

    def _read_terminal(self) -> None:
        """What was written: a terminal that is full blocks who writes."""
        with suppress(BlockingIOError):
            while self._terminal is not None and os.read(self._terminal, 1 << 16):
                continue

    def close_terminal(self) -> None:
        if self._terminal is not None:
            os.close(self._terminal)
            self._terminal = None

    def members(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.cwd() == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def wait_for(self, number: int) -> None:
        """Until the command has so many descendants."""

        def there() -> bool:
            self._read_terminal()
            return len(self.members()) > number

        eventually(there, 120.0, f"{number} processes", interval_s=0.1)

    def wait_gone(self) -> None:
        """Until none is left."""
        eventually(lambda: not self.members(), ENDED_S, "the end of all that was started", interval_s=0.2)


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    made = Family(tmp_path)
    yield made
    made.close_terminal()
    for process in made.members():
        process.kill()
    if made.command is not None:
        made.command.wait(timeout=10.0)


def test_a_terminal_that_is_closed(family: Family) -> None:
    started = family.start(*DEMO)
    family.wait_for(EVERYTHING)
    family.close_terminal()
    family.wait_gone()
    assert started.wait(timeout=10.0) != 0
    assert not list(family.folder.glob("elastic-ep-*")), "it cleans up"


@pytest.mark.parametrize(
    ("command", "end", "so_far"),
    [(DEMO, signal.SIGKILL, EVERYTHING), (RUN, signal.SIGSEGV, 1)],
    ids=["demo-SIGKILL", "run-crash-at-the-start"],
)
def test_it_is_killed_or_crashes(family: Family, command: list[str], end: signal.Signals, so_far: int) -> None:
    started = family.start(*command)
    family.wait_for(so_far)
    started.send_signal(end)
    family.wait_gone()


def test_a_suite_is_killed_whose_parts_have_clusters(family: Family) -> None:
    started = family.start(*SUITE, str(family.folder / "out"))
    family.wait_for(5)
    started.kill()
    family.wait_gone()
