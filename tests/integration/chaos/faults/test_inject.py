"""Injectors of process faults, on a small process of our own: what they claim is what it feels, and it heals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from safetensors import SafetensorError, safe_open

from chaos.faults import clock, disk
from chaos.faults.base import Injector, NotInjected
from chaos.faults.catalogue import injector
from chaos.faults.checkpoint import copy_model
from chaos.faults.oom import delegated
from elastic.demo.model import write_demo_model
from membership.base.events import Event, EventLog
from tests.support.helpers import eventually
from workers.protocol.liveness import DeathWatcher, LivenessPage

pytestmark = pytest.mark.integration

CHILD = """
import os, sys, time
from workers.protocol.liveness import LivenessPage
page = LivenessPage.create()
for line in sys.stdin:
    try:
        said = eval(line)
    except (OSError, MemoryError) as error:
        said = f"{type(error).__name__} {getattr(error, 'errno', '')}".strip()
    print(said, flush=True)
"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


class Child:
    """A process that answers what it is asked, and the site on which it is every victim."""

    def __init__(self, folder: Path, environ: Mapping[str, str] | None = None, wrapper: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            bufsize=1, env={**os.environ, **(environ or {})},
        )  # fmt: skip
        assert self.ask("1 + 1") == "2"

    def send(self, expression: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{expression}\n")

    def receive(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, expression: str) -> str:
        self.send(expression)
        return self.receive()

    def end(self) -> None:
        self.process.kill()
        with self.process:  # closes the pipes and reaps
            pass

    def pid(self, victim: str) -> int:
        return self.process.pid

    def arm(self, failpoints: str) -> None:
        raise NotInjected("it passes none")

    def events(self) -> list[Event]:
        return EventLog.read(self.folder / "events.jsonl")

    def state_dir(self) -> Path:
        return self.folder

    def url(self) -> str:
        return ""


Start = Callable[..., Child]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as started:

        def begin(environ: Mapping[str, str] | None = None, wrapper: tuple[str, ...] = ()) -> Child:
            child = Child(tmp_path, environ, wrapper)
            started.callback(child.end)
            return child

        yield begin


def healed(fault: Injector) -> None:
    """Taken back, and once more, which changes nothing."""
    fault.heal()
    fault.heal()


@pytest.mark.parametrize(("name", "number"), [("kill", signal.SIGKILL), ("segv", signal.SIGSEGV)])
def test_deadly_signals_are_proven_by_the_kernel(start: Start, name: str, number: signal.Signals) -> None:
    child = start()
    fault = injector(name, child, "engine")
    injected = fault.inject()
    assert (injected.fault, injected.victim, injected.pid) == (name, "engine", child.process.pid)
    assert "pidfd says gone" in injected.proof
    assert name == "kill" or "killed by SIGSEGV" in injected.proof
    assert child.process.wait(timeout=30) == -number
    healed(fault)
    with pytest.raises(NotInjected, match="gone already"):
        injector("stop", child, "engine").inject()


def test_stopped_it_does_nothing_until_healed(start: Start) -> None:
    child = start()
    fault = injector("stop", child, "rank 1")
    fault.inject()
    child.send("'awake'")
    assert psutil.Process(child.process.pid).status() == psutil.STATUS_STOPPED
    healed(fault)
    assert child.receive() == "awake"
    child.process.kill()
    child.process.wait(timeout=30)
    fault.heal()  # a process that is dead by then needs no healing


def test_slow_it_gets_a_tenth_of_the_processor(start: Start) -> None:
    child = start()

    def share(while_s: float) -> float:
        """The share of a processor that a loop has which takes as much as it can get."""
        began, before = time.monotonic(), psutil.Process(child.process.pid).cpu_times().user
        time.sleep(while_s)
        return (psutil.Process(child.process.pid).cpu_times().user - before) / (time.monotonic() - began)

    child.send(
        "[0 for end in [time.monotonic() + 1.5] for _ in iter(lambda: time.monotonic() < end, False)] and 'over'"
    )
    fault = injector("slow", child, "engine")
    assert "stopped in" in fault.inject().proof
    assert share(0.5) < 0.4
    healed(fault)
    assert child.receive() == "over"
    assert not any(thread.name.startswith("slow-") for thread in threading.enumerate())


def test_with_no_descriptor_left_it_opens_nothing(start: Start) -> None:
    child = start()
    fault = injector("fd-exhaustion", child, "gateway")
    assert "reads back" in fault.inject().proof
    assert child.ask("os.open('/dev/null', os.O_RDONLY)") == "OSError 24"
    healed(fault)
    assert child.ask("os.open('/dev/null', os.O_RDONLY)").isdigit()


def test_with_no_address_space_left_it_gets_no_memory(start: Start) -> None:
    child = start()
    fault = injector("oom", child, "engine", {"how": "starve"})
    assert "reads back" in fault.inject().proof
    assert child.ask("len(bytearray(100 << 20))") == "MemoryError"
    healed(fault)
    assert child.ask("len(bytearray(100 << 20))") == str(100 << 20)
    assert "pidfd says gone" in injector("oom", child, "engine", {"how": "limit"}).inject().proof


@pytest.mark.skipif(delegated() is None, reason="no memory cgroup was delegated to us")
def test_the_kernels_oom_killer_kills_it(start: Start) -> None:
    child = start()
    child.send(
        "[bytearray(1 << 20) for end in [time.monotonic() + 9] for _ in iter(lambda: time.monotonic() < end, 0)]"
    )
    fault = injector("oom", child, "engine", {"how": "cgroup"})
    assert "1 OOM kill" in fault.inject().proof
    assert child.process.wait(timeout=30) == -signal.SIGKILL
    healed(fault)
    assert not list((delegated() or Path()).glob("elastic-ep-oom-*"))


def has_ended(process: psutil.Process) -> bool:
    """Whether it has, though its parent may not have taken note."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_host_goes_with_each_process_on_it(start: Start) -> None:
    child = start()
    below = int(child.ask("__import__('subprocess').Popen(['sleep', '60']).pid"))
    orphan = psutil.Process(below)
    assert "all 2 processes" in injector("host-death", child, "agent").inject().proof
    eventually(lambda: has_ended(orphan), 30.0, "its child to be gone")


def test_a_parents_death_needs_children(start: Start) -> None:
    with pytest.raises(NotInjected, match="has no children"):
        injector("parent-death", start(), "forkserver").inject()


def test_a_damaged_liveness_page_leaves_the_pidfd_to_report_the_death(start: Start) -> None:
    child = start()
    died: list[str] = []
    page = LivenessPage.attach(bytes.fromhex(child.ask("page.handle().hex()")))
    watcher = DeathWatcher(page, died.append)
    try:
        fault = injector("bit-flip-liveness", child, "rank 0")
        assert "reads back flipped" in fault.inject().proof
        child.process.kill()
        assert eventually(lambda: died, 30.0, "the death to be reported") == ["pidfd"]
        healed(fault)
    finally:
        watcher.stop()
        page.close()


def test_a_clock_that_jumps_and_drifts(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(clock, "NOTICED_S", 0.2)
        with pytest.raises(NotInjected, match="looking at its clock"):
            injector("clock-jump", start(), "agent").inject()  # it was not started so
    child = start(clock.environment(tmp_path))
    ahead = "str(time.time())"
    child.send(f"[time.time() for _ in range(20) if not time.sleep(0.02)] and {ahead}")
    fault = injector("clock-jump", child, "controller", {"seconds": 3600, "rate": 0.5})
    assert "+3600.0 s from ours" in fault.inject().proof
    child.receive()
    before, told = time.time(), float(child.ask(ahead))
    assert 3600 <= told - before < 3600 + 60
    as_grpc = "str(eval('time.time()', {'__name__': 'grpc._channel', 'time': time}))"  # its deadlines are times
    assert is_now(child, as_grpc)
    child.send(f"[time.time() for _ in range(20) if not time.sleep(0.02)] and {ahead}")
    healed(fault)
    child.receive()
    assert is_now(child, ahead)


def is_now(child: Child, clock: str) -> bool:
    """Whether its clock says what ours says, however long the answer takes."""
    before, told = time.time(), float(child.ask(clock))
    return before - 1.0 < told < time.time() + 1.0


@needs_root
def test_a_full_disk_takes_nothing_until_healed(start: Start, tmp_path: Path) -> None:
    child = start()
    with pytest.raises(NotInjected, match="no small file system"):  # the machine's own disk is never filled
        injector("disk-full", child, "state-dir").inject()
    with disk.small_disk(tmp_path, 4):
        fault = injector("disk-full", child, "state-dir")
        assert "ENOSPC" in fault.inject().proof
        assert child.ask(f"open({str(tmp_path / 'more')!r}, 'wb', 0).write(bytes(4096))") == "OSError 28"
        healed(fault)
        assert child.ask(f"open({str(tmp_path / 'more')!r}, 'wb', 0).write(bytes(4096))") == "4096"


@needs_root
def test_only_a_dev_shm_of_its_own_is_filled(start: Start) -> None:
    with pytest.raises(NotInjected, match="machine's /dev/shm"):
        injector("shm-full", start(), "shm").inject()
    child = start(wrapper=disk.OWN_SHM)
    fault = injector("shm-full", child, "shm")
    fault.inject()
    assert child.ask("open('/dev/shm/more', 'wb', 0).write(bytes(4096))") == "OSError 28"
    assert not Path("/dev/shm/more").exists()
    healed(fault)
    assert child.ask("open('/dev/shm/more', 'wb', 0).write(bytes(4096))") == "4096"


def test_damaged_checkpoints_and_their_healing(start: Start, tmp_path: Path) -> None:
    child = start()
    write_demo_model(tmp_path / "model")
    with pytest.raises(NotInjected, match="not a copy"):
        injector("checkpoint-truncated", child, "checkpoint", {"folder": tmp_path / "model"}).inject()
    folder = copy_model(tmp_path / "model", tmp_path / "copy")
    (file,) = folder.glob("*.safetensors")
    whole = file.read_bytes()
    fault = injector("checkpoint-truncated", child, "checkpoint", {"folder": folder})
    fault.inject()
    with pytest.raises(SafetensorError), safe_open(file, "np"):
        pass
    healed(fault)
    fault = injector("checkpoint-wrong-hash", child, "checkpoint", {"folder": folder})
    fault.inject()
    assert sum(a != b for a, b in zip(whole, file.read_bytes(), strict=True)) == 1
    healed(fault)
    assert file.read_bytes() == whole
