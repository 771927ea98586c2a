"""A rank's way to the windows of its host's slots: GPU memory whose descriptors its agent keeps. Light: no torch.

Windows belong to slots, not to processes: the first rank that needs one makes it, whosever it is, and every later
process maps the same memory. The agent's side is `workers/agent/gpu_windows.py`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec

from membership.base.errors import ConfigError, QueueError, WaitTimeout
from membership.base.timing import WINDOW_TIMEOUT_S
from workers.ipc.handover import Handover, Link, ResourceHandle
from workers.protocol.liveness import process_ended

ALL_SLOTS = -1
PIECES = 1 << 12  # of a slot's memory of experts at most: a piece is kept under slot * PIECES + its number


class WindowAsked(msgspec.Struct, frozen=True, array_like=True):
    """Rank to agent: give me this slot's window. With a descriptor: or keep this one, if there is none yet."""

    slot: int  # ALL_SLOTS: only say which have one
    shape: str  # what decides its layout; all ranks of a host agree on it
    own: bool  # whether the asker is the rank in that slot
    nbytes: int = 0  # of the descriptor that comes along


class WindowGiven(msgspec.Struct, frozen=True, array_like=True):
    """Agent to rank, with the window's descriptor, then one pidfd of each process that had the slot and still runs."""

    nbytes: int  # 0: there is no window yet
    slots: tuple[int, ...] = ()  # that have one, if that was the question


@contextmanager
def window_of(handle: bytes, asked: WindowAsked, make: Callable[[], tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The descriptor of a slot's window, and its size. `make` gives new memory likewise, if there is none yet.

    Of its own slot a rank gets the window once those that had it before are over: what they have launched may write
    until then. WaitTimeout if they are not; HandoverRefused, QueueClosed, WaitTimeout as the agent answers.
    """
    link = _ask(handle, asked)
    try:
        if not link.reply_fds:
            link.close()
            fd, nbytes = make()
            try:
                link = _ask(handle, msgspec.structs.replace(asked, nbytes=nbytes), [fd])
            finally:
                os.close(fd)
        if not link.reply_fds:
            raise QueueError(f"the window of slot {asked.slot} came without a descriptor")
        found, *before = link.reply_fds
        deadline = time.monotonic() + WINDOW_TIMEOUT_S
        for process in before:
            if not process_ended(process, max(0.0, deadline - time.monotonic())):
                raise WaitTimeout(f"who had slot {asked.slot} before still runs after {WINDOW_TIMEOUT_S} s")
        yield found, msgspec.msgpack.decode(link.reply, type=WindowGiven).nbytes
    finally:
        link.close()


def slots_of(handle: bytes) -> tuple[int, ...]:
    """Which slots have a window now. Errors as of `window_of`."""
    link = _ask(handle, WindowAsked(ALL_SLOTS, "", own=False))
    try:
        return msgspec.msgpack.decode(link.reply, type=WindowGiven).slots
    finally:
        link.close()


def _ask(handle: bytes, asked: WindowAsked, fds: Sequence[int] = ()) -> Link:
    if not handle:
        raise ConfigError("this rank's parent keeps no windows")
    where = msgspec.msgpack.decode(handle, type=ResourceHandle)
    request = msgspec.msgpack.encode(asked)
    return Handover.default().connect(where.address, where.resource, request, fds, timeout_s=WINDOW_TIMEOUT_S)
