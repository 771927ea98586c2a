"""The host's GPU windows: descriptors of GPU memory that its ranks write into one another. Light: no torch, no CUDA.

A window belongs to a slot. A descriptor keeps the memory, whatever becomes of the process that made it, so a rank's
successor maps the same window, and the others' mappings, pointers and graphs stay valid. What a killed process has
launched writes for some ms after its death: a successor gets pidfds of those that had its slot before and still run.
The memory of experts is kept in the same way, under numbers that stand for a slot's pieces
(`workers/rank/expert_pieces.py`).
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from workers.ipc.handover import MAX_FDS, Grant, Handover, HandoverRefused, Link, ResourceHandle
from workers.protocol.liveness import process_ended
from workers.protocol.window_client import ALL_SLOTS, WindowAsked, WindowGiven


@dataclass(frozen=True)
class Processes:
    """How processes are followed, each by a descriptor. Simulated ones have others."""

    opened: Callable[[int], int] = os.pidfd_open
    ended: Callable[[int], bool] = lambda pidfd: process_ended(pidfd, 0.0)
    close: Callable[[int], None] = os.close


class Owners:
    """The processes that have had one slot and may still run."""

    def __init__(self, processes: Processes = Processes()) -> None:
        self._processes = processes
        self._by_pid: dict[int, int] = {}

    def claimed_by(self, pid: int) -> list[int]:
        """Note an owner; those before it that still run. HandoverRefused if they are too many."""
        for other, process in list(self._by_pid.items()):
            if self._processes.ended(process):
                self._processes.close(self._by_pid.pop(other))
        before = [process for other, process in self._by_pid.items() if other != pid]
        if len(before) >= MAX_FDS:
            raise HandoverRefused(f"{len(before)} processes that had this slot still run")
        if pid not in self._by_pid:
            self._by_pid[pid] = self._processes.opened(pid)
        return before

    def close(self) -> None:
        """Forget them."""
        for process in self._by_pid.values():
            self._processes.close(process)
        self._by_pid.clear()


@dataclass
class _Window:
    """One slot's."""

    fd: int
    nbytes: int
    shape: str
    owners: Owners = field(default_factory=Owners)


class GpuWindows:
    """All windows of one host. `close` it: what no rank maps is then free."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._windows: dict[int, _Window] = {}
        self._resource = f"gpu-windows-{secrets.token_hex(8)}"
        Handover.default().serve(self._resource, self._answer)

    def handle(self) -> bytes:
        """What ranks need to reach it."""
        return msgspec.msgpack.encode(ResourceHandle(Handover.default().address, self._resource))

    @property
    def numbers(self) -> frozenset[int]:
        """Which there are."""
        with self._lock:
            return frozenset(self._windows)

    def free(self, number: int) -> None:
        """Let go of one, if it is there."""
        with self._lock:
            window = self._windows.pop(number, None)
        if window is not None:
            os.close(window.fd)
            window.owners.close()

    def close(self) -> None:
        """Let go of all."""
        Handover.default().withdraw(self._resource)
        for number in self.numbers:
            self.free(number)

    def _answer(self, link: Link, request: bytes, fds: list[int]) -> Grant:
        asked = msgspec.msgpack.decode(request, type=WindowAsked)
        with self._lock:
            if asked.slot == ALL_SLOTS:
                return Grant(msgspec.msgpack.encode(WindowGiven(0, tuple(self._windows))))
            if fds and asked.slot not in self._windows:
                self._windows[asked.slot] = _Window(os.dup(fds[0]), asked.nbytes, asked.shape)
            window = self._windows.get(asked.slot)
            if window is None:
                return Grant(msgspec.msgpack.encode(WindowGiven(0)))
            if window.shape != asked.shape:
                raise HandoverRefused(f"the window of slot {asked.slot} is for {window.shape}, not for {asked.shape}")
            before = window.owners.claimed_by(link.peer_pid) if asked.own else []
            theirs = [os.dup(fd) for fd in (window.fd, *before)]  # ours may be closed before they are sent
        return Grant(msgspec.msgpack.encode(WindowGiven(window.nbytes)), theirs, on_gone=lambda link: _close(theirs))


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
