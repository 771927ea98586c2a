"""A TCP proxy between clients and a server that delays, throttles, loses, drops, cuts or resets, as set at run time.

It shows what users of TCP see of a bad network. A lost packet is a pause of the whole connection until the
retransmission; a black hole keeps the bytes (they arrive after healing, as retransmissions would). Faults that only
packets can show (a SYN without an answer, a link that is down) need `chaos.faults.netns`.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Coroutine
from typing import Any, Literal, TypeVar

import msgspec

from membership.base.errors import ElasticError, WaitTimeout

CALL_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5.0
PIECE = 65536
PIECES_IN_FLIGHT = 256
SLICE_S = 0.05  # under a bandwidth limit: one piece of this duration at a time
RST_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, for 0 s
Direction = Literal["up", "down"]  # to the server, to the client
Flight = asyncio.Queue[tuple[float, bytes]]  # pieces under way, each with the time at which it is due
T = TypeVar("T")


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """What happens to the bytes of one direction."""

    delay_s: float = 0.0
    jitter_s: float = 0.0  # additional delay, drawn for each piece from 0 to this; the order stays
    bytes_per_s: float = 0.0  # 0: no limit
    loss: float = 0.0  # share of pieces that are retransmitted: they and all behind them are late by `stall_s`
    stall_s: float = 0.2  # Linux's least retransmission timeout
    hole: bool = False  # read and not passed on
    cut_after: int | None = None  # bytes of each connection, counted from now; then it ends


class Faults(msgspec.Struct, frozen=True, kw_only=True):
    """The faults of the proxy; none by default."""

    up: Way = Way()
    down: Way = Way()
    reset: bool = False  # every connection that is open, and each new one
    refuse: bool = False  # new connections are refused; open ones stay


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """What the proxy has done since it started."""

    accepted: int = 0
    up: int = 0  # bytes passed on
    down: int = 0
    stalled: int = 0  # pieces that were "lost"
    reset: int = 0  # connections
    cut: int = 0


class TcpProxy:
    """Owns a listening socket and a thread. A context manager."""

    def __init__(self, host: str, port: int, *, seed: int = 0, name: str = "") -> None:
        self._target = (host, port)
        self._chances = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"tcp-proxy-{name or port}", daemon=True)
        self._server: asyncio.Server | None = None
        self._connections: dict[_Connection, asyncio.Task[None]] = {}
        self._changed = asyncio.Condition()
        self._counters: dict[str, int] = dict.fromkeys(Counters.__struct_fields__, 0)
        self.faults = Faults()
        self.port = 0

    @property
    def url(self) -> str:
        """Where clients connect instead."""
        return f"http://127.0.0.1:{self.port}"

    def counters(self) -> Counters:
        """What it has done so far."""
        return Counters(**self._counters)

    def set(self, faults: Faults) -> None:
        """From now on these, instead of those before."""
        self._call(self._set(faults))

    def __enter__(self) -> TcpProxy:
        self._thread.start()
        try:
            self._call(self._listen())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if self._loop.is_closed():
            return
        try:
            self._call(self._end())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CALL_TIMEOUT_S)
            self._loop.close()

    # --- in its thread

    def count(self, what: str, by: int = 1) -> None:
        """Add to a counter."""
        self._counters[what] += by

    def way(self, direction: Direction) -> Way:
        """What happens now to bytes of a direction."""
        return self.faults.up if direction == "up" else self.faults.down

    def lost(self, way: Way) -> bool:
        """Draw whether a piece is lost."""
        return way.loss > 0 and self._chances.random() < way.loss

    def late_s(self, way: Way) -> float:
        """Draw how late a piece is."""
        return way.delay_s + (self._chances.uniform(0.0, way.jitter_s) if way.jitter_s else 0.0)

    async def passable(self, direction: Direction) -> None:
        """Wait until bytes of a direction are passed on."""
        if self.way(direction).hole:
            async with self._changed:  # waiting tasks are cancelled when the proxy ends
                await self._changed.wait_for(lambda: not self.way(direction).hole)

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(CALL_TIMEOUT_S)
        except TimeoutError:
            future.cancel()
            raise WaitTimeout(f"the proxy of {self._target} did not answer within {CALL_TIMEOUT_S:g} s") from None

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def _set(self, faults: Faults) -> None:
        async with self._changed:
            self.faults = faults
            self._changed.notify_all()
        for connection in self._connections:
            connection.begin(faults)
        if faults.refuse and self._server is not None:
            self._server.close()
            self._server = None
        elif not faults.refuse and self._server is None:
            await self._listen()

    async def _end(self) -> None:
        if self._server is not None:
            self._server.close()
        tasks = list(self._connections.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.count("accepted")
        connection = _Connection(self, reader, writer)
        task = self._loop.create_task(connection.run(self._target))
        self._connections[connection] = task
        task.add_done_callback(lambda _: self._connections.pop(connection))
        connection.begin(self.faults)


class _Connection:
    """One client's connection, and ours to the server."""

    def __init__(self, proxy: TcpProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy, self._client = proxy, (reader, writer)
        self._writers = [writer]
        self._room: dict[Direction, int | None] = {}  # bytes until the cut

    def begin(self, faults: Faults) -> None:
        """These faults from now on."""
        self._room = {"up": faults.up.cut_after, "down": faults.down.cut_after}
        if faults.reset:
            self._proxy.count("reset")
            self._reset()

    async def run(self, target: tuple[str, int]) -> None:
        """Pass bytes both ways until both ends have ended, or one breaks."""
        try:
            await self._proxy.passable("up")
            if self._client[1].transport.is_closing():
                return  # it was reset as it came
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                server = await asyncio.open_connection(*target)
            self._writers.append(server[1])
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pass("up", self._client[0], server[1]))
                both.create_task(self._pass("down", server[0], self._client[1]))
        except* _Cut:
            self._proxy.count("cut")
        except* OSError:
            self._reset()  # both ends see the same end
        finally:
            for writer in self._writers:
                writer.close()

    async def _pass(self, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pieces wait in a queue until they are due, so that delay does not reduce bandwidth."""
        flight: Flight = asyncio.Queue(PIECES_IN_FLIGHT)
        async with asyncio.TaskGroup() as both:
            both.create_task(self._take(direction, reader, flight))
            both.create_task(self._give(direction, flight, writer))

    async def _take(self, direction: Direction, reader: asyncio.StreamReader, flight: Flight) -> None:
        clock, due, piece = asyncio.get_running_loop().time, 0.0, b"more"
        while piece:
            piece = await reader.read(PIECE)
            way = self._proxy.way(direction)
            due = max(due, clock() + self._proxy.late_s(way))
            if piece and self._proxy.lost(way):
                self._proxy.count("stalled")
                due += way.stall_s
            await flight.put((due, piece))

    async def _give(self, direction: Direction, flight: Flight, writer: asyncio.StreamWriter) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            due, piece = await flight.get()
            await asyncio.sleep(max(0.0, due - clock()))
            await self._proxy.passable(direction)
            if not piece:
                return writer.write_eof()
            while piece:
                some, piece = await self._next(direction, piece)
                writer.write(some)
                await writer.drain()
                self._proxy.count(direction, len(some))
                if self._room[direction] == 0:
                    raise _Cut(f"cut after its {direction} bytes")

    async def _next(self, direction: Direction, piece: bytes) -> tuple[bytes, bytes]:
        """What may be passed on now, and the rest."""
        await self._proxy.passable(direction)
        size = len(piece)
        if limit := self._proxy.way(direction).bytes_per_s:
            size = min(size, max(1, int(limit * SLICE_S)))
            await asyncio.sleep(size / limit)
        room = self._room[direction]
        if room is not None:
            size = min(size, room)
            self._room[direction] = room - size
        return piece[:size], piece[size:]

    def _reset(self) -> None:
        """End both connections by RST."""
        for writer in self._writers:
            sock = writer.get_extra_info("socket")
            if not writer.transport.is_closing():
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
            writer.transport.abort()


class _Cut(ElasticError):
    """A connection has passed on as many bytes as `cut_after` allows."""
