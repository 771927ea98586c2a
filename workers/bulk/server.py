"""Sends other hosts what this one holds: ranges of its weight store, and its checkpoint's small files.

It runs in the agent, whose store holds the shards; sealed memory does not change while it is read. One thread answers:
it looks at no byte and waits for none, since what must wait for its turn (`--load-bandwidth`) is sent by `Outbox`, and
who asked gets to know at once how long that takes. Only hosts with the join secret get in.
"""

from __future__ import annotations

import heapq
import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

import msgspec
import structlog
import zmq

from membership.base.errors import ElasticError, QueueError
from workers.protocol.weight_peers import PIECE, Asked, File, Find, Place, Read, Said
from workers.queue.curve import Authenticator, serve_curve
from workers.queue.endpoints import listen_for_hosts
from workers.queue.handle import Remote
from workers.queue.remote_wire import HEARTBEAT_S, SocketThread

TURN_S = HEARTBEAT_S / 4

log = structlog.get_logger(__name__)


class Source(Protocol):
    """What there is to send."""

    def held(self, names: Sequence[str]) -> list[Place]:
        """Where these entries are, as far as they are there."""

    def read(self, shard: int, offset: int, nbytes: int) -> bytes:
        """A range of a shard. QueueError: there is none."""

    def file(self, name: str) -> bytes:
        """A small file of the checkpoint. QueueError: it is not to be had here."""

    def book(self, nbytes: int) -> float:
        """Announce that so much is sent; after how many seconds it may be."""


@dataclass
class Outbox:
    """What is to be sent later, in the order in which it is due. Pure: the time is passed in."""

    _due: list[tuple[float, int, bytes, Asked]] = field(default_factory=list)
    _numbers: count[int] = field(default_factory=count)

    def put(self, at: float, route: bytes, asked: Asked) -> None:
        """Answer this at that time."""
        heapq.heappush(self._due, (at, next(self._numbers), route, asked))

    def take(self, now: float) -> list[tuple[bytes, Asked]]:
        """What is due."""
        found = []
        while self._due and self._due[0][0] <= now:
            _, _, route, asked = heapq.heappop(self._due)
            found.append((route, asked))
        return found

    def wait_s(self, now: float) -> float:
        """Until the next one is due."""
        return max(0.0, self._due[0][0] - now) if self._due else math.inf


class BulkServer:
    """`endpoint` and `key` are for the agent's record. `close` it."""

    def __init__(self, remote: Remote, source: Source, clock: Callable[[], float] = time.monotonic) -> None:
        self._source, self._clock, self._outbox = source, clock, Outbox()
        self._io = SocketThread("bulk-server")
        try:
            self._auth = Authenticator(self._io.context, remote.allowed)
            self._router = self._io.context.socket(zmq.ROUTER)
            self._router.setsockopt(zmq.SNDHWM, 0)  # who asks limits what is under way
            serve_curve(self._router, remote.keys)
            self.endpoint = listen_for_hosts(self._router, remote.host, remote.ports)
            self.key = remote.keys.public.decode("ascii")
            self._io.start(self._turn, {self._router: self._receive, self._auth.socket: self._auth.answer})
        except BaseException:
            self._io.discard()
            raise

    def close(self) -> None:
        """Stop answering. Idempotent."""
        if not self._io.stopping:
            self._io.stop()

    # ---- socket thread

    def _receive(self) -> None:
        frames = self._router.recv_multipart(zmq.NOBLOCK)
        try:
            route, data = frames[0], frames[1]
            asked = msgspec.msgpack.decode(data, type=Asked)
        except (IndexError, msgspec.MsgspecError) as error:
            log.warning("bulk_message_malformed", frames=len(frames), error=str(error))
            return
        what = asked.what
        wait_s = self._source.book(what.nbytes) if isinstance(what, Read) and not what.urgent else 0.0
        if wait_s > 0:
            self._send(route, Said(asked.number, wait_s=wait_s))
            self._outbox.put(self._clock() + wait_s, route, asked)
        else:
            self._answer(route, asked)

    def _turn(self) -> None:
        for route, asked in self._outbox.take(self._clock()):
            self._answer(route, asked)
        self._io.turn_s = max(0.001, min(TURN_S, self._outbox.wait_s(self._clock())))

    def _answer(self, route: bytes, asked: Asked) -> None:
        what = asked.what
        try:
            if isinstance(what, Find):
                self._send(route, Said(asked.number, self._source.held(what.names)))
            elif isinstance(what, File):
                self._send(route, Said(asked.number), self._source.file(what.name))
            elif not 0 < what.nbytes <= PIECE:
                raise QueueError(f"{what.nbytes} bytes at once")
            else:
                self._send(route, Said(asked.number), self._source.read(what.shard, what.offset, what.nbytes))
        except ElasticError as error:
            self._send(route, Said(asked.number, refused=str(error)))
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the agent and its ranks
            log.error("bulk_answer_failed", error=traceback.format_exc())
            self._send(route, Said(asked.number, refused=f"{type(error).__name__}: {error}"))

    def _send(self, route: bytes, said: Said, data: bytes = b"") -> None:
        self._router.send_multipart([route, msgspec.msgpack.encode(said), data])
