"""Whether the host at the other end of a TCP connection has fallen silent, by what its kernel acknowledges.

ZeroMQ's own thread sends something each LINK_BEAT_S, and the other host's kernel acknowledges it. Neither needs the
interpreter, nor a processor for the process there: a host that is only busy, and a process that hangs or is stopped,
still acknowledge. A host without power, or a cable that is pulled in either direction, does not.

If no other host acknowledges, of two or more, it is our own that is cut off: to give up all others would cost their
ranks for a matter of a moment. `OtherHosts` sees to that.
"""

from __future__ import annotations

import math
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import zmq

from membership.base.timing import LINK_BEAT_S, LINK_SUSPECT_MAX_S, LINK_SUSPECT_MIN_S, REMOTE_SILENCE_S

LOOK_S = 0.025  # between two looks
_TCP_INFO = struct.Struct("8B24I4Q")  # the beginning of the kernel's struct tcp_info
_ATTEMPTS, _UNACKED, _LAST_ACK_MS, _RTT_US, _JITTER_US = 2, 12, 20, 23, 24  # places in it
_RETRANSMITS, _SENT_BYTES = 31, 34
_COOKIE = 57  # SO_COOKIE: a number that no other socket of this host has or had


@dataclass(frozen=True)
class Acks:
    """What our kernel knows of a connection at one moment."""

    owed: bool  # something was sent and is not acknowledged
    acked_s: float  # since anything was acknowledged
    rtt_s: float  # learned by the kernel, with its variation
    jitter_s: float
    sent_bytes: int = 0  # that were acknowledged
    retransmits: int = 0
    backing_off: bool = False  # what is owed was sent again in vain; it is sent next after twice the time


@dataclass(frozen=True)
class Silence:
    """How long a host has been silent by the looks so far. Time without looks does not count."""

    looked_at: float = -math.inf
    waiting: bool = False  # what was sent is not acknowledged
    lasted_s: float = 0.0
    patience_s: float = 0.0  # how much longer than usual it may last, since our own host was cut off meanwhile


def suspect_after_s(rtt_s: float, jitter_s: float) -> float:
    """How long a host may be silent: twice what an acknowledgement takes at most, within limits, but never less than
    it takes.
    """
    slowest_s = rtt_s + 4 * jitter_s
    return max(LINK_SUSPECT_MIN_S, slowest_s, min(LINK_SUSPECT_MAX_S, 2 * slowest_s))


def look(before: Silence, acks: Acks, now: float) -> Silence:
    """What a look at `now` changes."""
    passed_s = now - before.looked_at
    if not acks.owed or acks.acked_s <= passed_s:
        keeps = acks.owed and acks.backing_off  # it lives, and cannot acknowledge what it is not sent yet
        return Silence(now, patience_s=before.patience_s if keeps else 0.0)
    if not before.waiting:
        return replace(before, looked_at=now, waiting=True)
    return replace(before, looked_at=now, lasted_s=before.lasted_s + min(passed_s, 2 * LOOK_S))


def excused(silence: Silence) -> Silence:
    """Our own host is cut off. A kernel sends again at intervals that double: so it may take after the cut, too."""
    return replace(silence, patience_s=2 * silence.lasted_s + LINK_SUSPECT_MAX_S)


def suspected(silence: Silence, acks: Acks) -> bool:
    """Whether rows must go around that host."""
    return silence.waiting and silence.lasted_s >= max(silence.patience_s, suspect_after_s(acks.rtt_s, acks.jitter_s))


def is_ours(silences: Iterable[tuple[str, Silence]]) -> bool:
    """Whether our own host is cut off, given (host, its silence) of each connection: of two others or more, all are
    silent, if not all for as long as would make them suspected. Of a host's connections one may be newer than others.
    """
    by_host: dict[str, list[Silence]] = {}
    for host, silence in silences:
        by_host.setdefault(host, []).append(silence)
    longest = [
        max(each.lasted_s for each in seen) if all(each.waiting for each in seen) else 0.0 for seen in by_host.values()
    ]
    return len(longest) > 1 and min(longest) >= LINK_SUSPECT_MIN_S / 2


class Connection:
    """What is known of one of ZeroMQ's connections. Its own thread asks about it; others may look on its behalf."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fd, self._cookie = -1, b""
        self._silence = Silence()
        self.acks: Acks | None = None  # at the last look

    @property
    def looked_at(self) -> float:
        """When the last look was."""
        return self._silence.looked_at

    def made(self, fd: int) -> None:
        """ZeroMQ has connected. The descriptor is ZeroMQ's, and may be closed at any time."""
        with self._lock:
            self._fd, self._cookie = fd, _cookie(fd)
            self._silence = Silence()

    def look(self, now: float) -> tuple[Silence, Acks] | None:
        """What a look shows, or the last one if that is recent; None if nothing can be seen. From any thread."""
        with self._lock:
            if self._fd >= 0 and now - self._silence.looked_at >= LOOK_S / 2:
                self.acks = _acks(self._fd, self._cookie)
                if self.acks is None:
                    self._fd = -1  # it has ended; a next one is reported
                else:
                    self._silence = look(self._silence, self.acks, now)
            return (self._silence, self.acks) if self._fd >= 0 and self.acks is not None else None

    def silent_s(self, now: float, cut_off: Callable[[float], bool] = lambda now: False) -> float:
        """How long its host is silent, if that makes it suspected; else 0, also if nothing can be seen. `cut_off`:
        whether our own host is, rather.
        """
        seen = self.look(now)
        if seen is None or not seen[0].waiting:
            return 0.0
        silence, acks = seen
        if cut_off(now) and silence.lasted_s >= LINK_SUSPECT_MIN_S:  # at each look: the excuse grows with the cut
            with self._lock:
                self._silence = silence = excused(self._silence)
        return silence.lasted_s if suspected(silence, acks) else 0.0


class OtherHosts:
    """The hosts that one process has connections with. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connections: dict[Connection, str] = {}

    def add(self, connection: Connection, host: str) -> None:
        """A connection with that host counts from now on."""
        with self._lock:
            self._connections[connection] = host

    def discard(self, connection: Connection) -> None:
        """It has ended."""
        with self._lock:
            self._connections.pop(connection, None)

    def cut_off(self, now: float) -> bool:
        """Whether all of them are silent, so that it is us who are cut off.

        It looks itself: the threads of the other connections may be late, and their hosts would seem to be answering.
        """
        with self._lock:
            looks = [(host, connection.look(now)) for connection, host in self._connections.items()]
        return is_ours((host, seen[0]) for host, seen in looks if seen is not None)


def beat(connection: zmq.Socket[bytes], each_s: float = LINK_BEAT_S) -> None:
    """Have ZeroMQ send something over this socket's connections that often, and end one that answers nothing."""
    connection.setsockopt(zmq.HEARTBEAT_IVL, int(each_s * 1000))
    connection.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(REMOTE_SILENCE_S * 1000))


def _acks(fd: int, cookie: bytes) -> Acks | None:
    """None if this is not that connection any more."""
    try:
        seen = socket.socket(fileno=fd)
    except OSError:
        return None
    try:
        if seen.getsockopt(socket.SOL_SOCKET, _COOKIE, 8) != cookie:
            return None
        info = _TCP_INFO.unpack(seen.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size))
    except OSError:
        return None
    finally:
        seen.detach()
    return Acks(
        owed=info[_UNACKED] > 0,
        acked_s=info[_LAST_ACK_MS] / 1e3,
        rtt_s=info[_RTT_US] / 1e6,
        jitter_s=info[_JITTER_US] / 1e6,
        sent_bytes=info[_SENT_BYTES],
        retransmits=info[_RETRANSMITS],
        backing_off=info[_ATTEMPTS] > 0,
    )


def _cookie(fd: int) -> bytes:
    try:
        seen = socket.socket(fileno=fd)
    except OSError:
        return b""
    try:
        return seen.getsockopt(socket.SOL_SOCKET, _COOKIE, 8)
    except OSError:
        return b""
    finally:
        seen.detach()
