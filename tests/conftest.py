"""Fixtures that every test gets: nothing may leak, and what is random prints its seed.

The leak check compares the process's children, threads, open files and /dev/shm before and after each test. What a
wider-scoped fixture holds is there before and after, so only what the test itself left behind is reported.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import psutil
import pytest
import structlog

from membership.base import starter
from membership.base.run_dir import default_run_dir, remove_run_dir
from tests.support.own_shm import take_own_shm
from workers.ipc.handover import Handover, close_default

take_own_shm()
gc.disable()  # until everything is imported: see `pytest_collection_finish`
os.environ[starter.ENV] = starter.named()  # every role and cluster that a test starts ends with this process
os.environ["TRITON_INTERPRET"] = "0" if Path("/dev/nvidiactl").exists() else "1"  # before anything imports triton
for proxy in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
    os.environ.pop(proxy, None)  # the tests' own clients ask this machine only
_cache = tempfile.TemporaryDirectory(prefix="elastic-ep-cache-")  # of this process, and gone with it
os.environ["ELASTIC_CACHE_DIR"] = _cache.name
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, what the tests start would ignore it too
hypothesis.settings.register_profile("any machine", deadline=None)  # how fast it is, is nothing that a test proves
hypothesis.settings.load_profile("any machine")
SETTLE_S = 20.0  # on a busy machine a process takes long to end
# Owned by the process, not by a test: started once on first use and stopped at exit.
PROCESS_WIDE_THREADS = ("handover", "asyncio_", "ThreadPoolExecutor", "pytest_timeout", "tqdm_monitor")
PROCESS_WIDE_CHILDREN = ("multiprocessing.resource_tracker",)
PROCESS_WIDE_FILES = ("anon_inode:[eventpoll]", "anon_inode:[eventfd]", "/dev/urandom", "/dev/null", "memfd:handover")


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector need not look at it again and again, nor while it is imported."""
    gc.enable()
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Holdings:
    """What this process holds right now."""

    children: dict[int, str]
    threads: frozenset[str]
    files: Counter[str]
    shm: frozenset[str]

    @classmethod
    def now(cls) -> Holdings:
        """Look at /proc."""
        return cls(_children(), _threads(), _files(), frozenset(os.listdir("/dev/shm")))

    def left_since(self, before: Holdings) -> list[str]:
        """What is here now and was not before, one line each."""
        return [
            *(
                f"child process: {pid} {self.children[pid]}"
                for pid in sorted(self.children.keys() - before.children.keys())
            ),
            *(f"thread: {t}" for t in sorted(self.threads - before.threads)),
            *(f"open file: {f} (x{n})" for f, n in sorted((self.files - before.files).items())),
            *(f"/dev/shm/{s}" for s in sorted(self.shm - before.shm) if not _strangers(s)),
        ]


def _children() -> dict[int, str]:
    """Our children by pid alone: what a process says of its command line changes while it starts."""
    found: dict[int, str] = {}
    if not _any_children():
        return found
    for child in psutil.Process().children(recursive=True):
        try:
            command = " ".join(child.cmdline())
            if child.status() != psutil.STATUS_ZOMBIE and not any(p in command for p in PROCESS_WIDE_CHILDREN):
                found[child.pid] = command[:120]
        except psutil.NoSuchProcess:
            continue
    return found


def _any_children() -> bool:
    """The usual case, known without a look at every process of the machine."""
    try:
        return any(Path(f"/proc/self/task/{thread}/children").read_text() for thread in os.listdir("/proc/self/task"))
    except FileNotFoundError:  # a thread has just ended
        return True


def _threads() -> frozenset[str]:
    return frozenset(
        f"{t.name} ({t.ident})" for t in threading.enumerate() if not t.name.startswith(PROCESS_WIDE_THREADS)
    )


def _files() -> Counter[str]:
    found: Counter[str] = Counter()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
        except FileNotFoundError:
            continue
        kind = target.split(":[")[0] if target.startswith(("socket:", "pipe:")) else target
        if not kind.startswith(PROCESS_WIDE_FILES):
            found[kind] += 1
    return found


@pytest.fixture(autouse=True, scope="session")
def process_wide_handover() -> Iterator[None]:
    """The process's one handover socket is no test's leak: have it before the first test looks."""
    Handover.default()
    yield
    close_default()
    remove_run_dir(default_run_dir())


def _strangers(name: str) -> bool:
    """Whether a process that is not ours uses this entry of /dev/shm: then it is not our leak."""
    ours = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    for process in psutil.process_iter():
        try:
            if process.pid not in ours and name in Path(f"/proc/{process.pid}/maps").read_text():
                return True
        except (OSError, psutil.Error):
            continue
    return False


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Fail a test that leaves a process, thread, open file or /dev/shm entry behind, or another way of logging."""
    before, logging_as, root = Holdings.now(), structlog.get_config()["processors"], logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    if structlog.get_config()["processors"] != logging_as:
        structlog.reset_defaults()
        root.handlers[:] = handlers
        root.setLevel(level)
        pytest.fail("left behind: logs that go elsewhere (membership.base.logs.configure, which is of a process)")
    deadline = time.monotonic() + SETTLE_S
    left = Holdings.now().left_since(before)
    if left:
        gc.collect()  # an error that a test provoked holds its frames, and what they opened, in a cycle
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = Holdings.now().left_since(before)
    if left:
        pytest.fail("left behind:\n  " + "\n  ".join(left))
