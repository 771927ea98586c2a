"""The gateway's connection to the engine that holds the token, and the open requests that wait for its tokens.

One socket per engine and connection. Whenever the engine or the connection is replaced, every open request is submitted
again as the journal has it; a client only sees a pause. No wait here is endless: without an engine, or without
progress, a request fails with a 503 that says so.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType
from typing import Any

import msgspec
import structlog
import zmq
import zmq.asyncio

from elastic.gateway.engine_socket import EngineSocket, engine_socket, is_near
from elastic.gateway.journal import Delta, Journal, Request
from elastic.protocol import Hello, Outputs, Rejected, ToEngine, ToGateway, Tokens, Welcome
from elastic.serve.options import ApiOptions
from membership.base import failpoints
from membership.base.errors import ConfigError, JournalError, QueueError, RequestError
from membership.base.network import Network
from membership.base.timing import ENGINE_SILENCE_S, ENGINE_WAIT_S, MAX_WAIT_S, STALL_S
from membership.store.records import ClusterState, EngineRecord
from workers.queue.network import refusing_retired

TICK_S = 0.2

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class LinkSettings:
    """Deadlines and caps."""

    engine_wait_s: float = ENGINE_WAIT_S  # how long a request waits for an engine
    stall_s: float = STALL_S  # how long a request with a place may go without a token while there is one
    ping_every_s: float = 1.0
    silence_s: float = ENGINE_SILENCE_S  # an engine that answers no ping for this long is connected to anew
    resubmit_after_s: float = 5.0  # how long faulty output is ignored after its request was submitted again
    max_faults: int = 3


@dataclass(frozen=True)
class Target:
    """An engine: its token and its record."""

    token: int
    record: EngineRecord

    @property
    def address(self) -> str:
        """Where this gateway connects."""
        return self.record.address if is_near(self.record) else self.record.remote


class EngineRefusal(RequestError):
    """The engine did not take a request on: nothing of it has begun, so it may be asked again."""


@dataclass(frozen=True)
class Fault:
    """A request's output was faulty `times` times in a row, last at `at`; it was submitted again then."""

    times: int
    at: float
    error: JournalError


Taker = Callable[[int, Delta], bool]


class Generation:
    """The requests behind one response, as one stream of (position, Delta). Leaving the block aborts what is open.

    Waking a task for a token costs more than the token. So there may be a `taker`: while the reader has nothing to do,
    it gets what ends nothing at once, and says whether it took it; what it does not take goes to the reader.
    """

    def __init__(self, link: EngineLink, requests: Sequence[Request], timeout_s: float) -> None:
        self.taker: Taker | None = None
        self._link = link
        self._position = {request.id: position for position, request in enumerate(requests)}
        self._requests = requests
        self._running = {request.id for request in requests}
        self._timeout_s = timeout_s
        self._inbox: deque[tuple[str, Delta | Exception]] = deque()
        self._wake: asyncio.Future[None] | None = None
        self._waits_since = 0.0
        self._watcher: asyncio.TimerHandle | None = None

    def __enter__(self) -> Generation:
        try:
            self._link.open(self, self._requests)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for request in self._requests:
            self._link.close(request.id)

    def deliver(self, request_id: str, update: Delta | RequestError) -> None:
        """Called by the link."""
        if not (isinstance(update, Delta) and self._taken(self._position[request_id], update)):
            self._inbox.append((request_id, update))
            self._awake()

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Everything that arrives until each request has ended; RequestError if one fails."""
        loop = asyncio.get_running_loop()
        self._watch(loop)
        try:
            while self._running or self._inbox:
                if not self._inbox:
                    self._wake, self._waits_since = loop.create_future(), loop.time()
                    await self._wake
                    continue
                request_id, update = self._inbox.popleft()
                if isinstance(update, Exception):
                    raise update
                if update.finish_reason:
                    self._running.discard(request_id)
                yield self._position[request_id], update
        finally:
            if self._watcher is not None:
                self._watcher.cancel()

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Fail the wait that is under way once it is too long. One timer for all of them: there is one per token."""
        left_s = self._timeout_s
        if self._wake is not None and not self._wake.done():
            left_s -= loop.time() - self._waits_since
            if left_s <= 0:
                self._wake.set_exception(RequestError(f"no news of the request for {self._timeout_s:g} s", status=503))
                return
        self._watcher = loop.call_later(left_s, self._watch, loop)

    def stop(self, position: int) -> None:
        """Stop one of the requests; nothing more of it will arrive."""
        request_id = self._requests[position].id
        self._link.close(request_id)
        self._inbox = deque(each for each in self._inbox if each[0] != request_id)
        self._running.discard(request_id)
        if not self._running:
            self._awake()

    def _taken(self, position: int, delta: Delta) -> bool:
        """Whether the taker has it. What it raises is for the reader: other responses go on."""
        if self.taker is None or delta.finish_reason or self._wake is None or self._wake.done():
            return False
        self._waits_since = self._wake.get_loop().time()
        try:
            return self.taker(position, delta)
        except Exception as error:  # noqa: BLE001 - raised by the reader
            self._inbox.append((self._requests[position].id, error))  # also if it stopped the last request before
            self._awake()
            return True

    def _awake(self) -> None:
        """Have the reader look for what is new."""
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


class EngineLink:
    """All methods run in the event loop's thread. `run` sends and receives, and never returns by itself."""

    def __init__(
        self,
        gateway: str,
        settings: LinkSettings | None = None,
        *,
        network: Network | None = None,
        max_open: int = ApiOptions.max_open_requests,
        clock: Callable[[], float] = time.monotonic,
        note: Callable[..., Any] = lambda kind, **fields: None,
    ) -> None:
        """`network`: the engine may be on another host. `max_open`: requests, of which each choice is one."""
        self.journal = Journal()
        self.settings = settings or LinkSettings()
        self.ready = False
        self.was_ready = False
        self.refusal = ""  # set when no more requests are taken
        self.trouble = ""  # why the engine cannot be connected to
        self._gateway = gateway
        self._network = network
        self._max_open = max_open
        self._clock = clock
        self._note = note
        self._target: Target | None = None
        self._moved: asyncio.Future[None] | None = None
        self._idle: asyncio.Future[None] | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._last_message_at = self._down_since = self._token_at = clock()
        self._generations: dict[str, Generation] = {}
        self._max_wait_s = MAX_WAIT_S  # for a place on a rank; as the cluster's config says
        self._faults: dict[str, Fault] = {}  # by request
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToGateway)

    # -- requests --------------------------------------------------------------------------------------------------

    def generation(self, requests: Sequence[Request]) -> Generation:
        """A response's requests; enter the block to submit them."""
        settings = self.settings
        patience_s = settings.engine_wait_s + self._max_wait_s + settings.stall_s + settings.silence_s
        return Generation(self, requests, patience_s)

    def open(self, generation: Generation, requests: Sequence[Request]) -> None:
        """Admit requests; they are submitted now, or as soon as there is an engine."""
        if self.refusal:
            raise RequestError(self.refusal, status=503, code="shutting_down", retry_after_s=1.0)
        if len(requests) > self._max_open:
            message = f"{len(requests)} choices at once are more than this gateway takes, {self._max_open}"
            raise RequestError(message, code="invalid_value")
        if len(self.journal) + len(requests) > self._max_open:
            message = f"{len(self.journal)} requests are open: this gateway takes {self._max_open}"
            raise RequestError(message, status=503, code="overloaded", retry_after_s=1.0)
        for request in requests:
            failpoints.hit("gateway.before.submit")
            submit = self.journal.admit(request, self._clock())
            self._generations[request.id] = generation
            if self.ready:
                self._send(submit)

    def close(self, request_id: str) -> None:
        """Forget a request; abort it at the engine if it was still open."""
        abort = self.journal.close(request_id)
        if abort is not None and self.ready:
            failpoints.hit("gateway.before.abort")
            self._send(abort)
        self._forget(request_id)

    def fail_open(self, error: RequestError) -> None:
        """End every open request with an error."""
        for request in self.journal.open_requests():
            self._fail(request.id, error)

    async def drained(self, timeout_s: float) -> bool:
        """Wait until no request is open; False if some still are after `timeout_s`."""
        if len(self.journal):
            self._idle = asyncio.get_running_loop().create_future()
            await asyncio.wait({self._idle}, timeout=timeout_s)
        return not len(self.journal)

    def down_s(self) -> float:
        """Seconds without an engine; 0 while there is one."""
        return 0.0 if self.ready else self._clock() - self._down_since

    def stuck_s(self) -> float:
        """Seconds in which an engine that answers pings sent no token for any open request; 0 if there are none."""
        return self.token_age_s() if self.ready else 0.0

    @property
    def open_requests(self) -> int:
        """How many requests have not ended."""
        return len(self.journal)

    def token_age_s(self) -> float:
        """Seconds since an open request got a token, or was admitted if none has; 0 if none is open."""
        requests = self.journal.open_requests()
        return self._clock() - max(self._token_at, requests[0].admitted_at) if requests else 0.0

    # -- the engine ------------------------------------------------------------------------------------------------

    def on_state(self, state: ClusterState) -> None:
        """Connect to the engine that the store names. While it names none, keep the connection."""
        if state.config is not None:
            self._max_wait_s = state.config.max_wait_s
            self._network = refusing_retired(state.config, self._network)
        if state.engine is None:
            return
        target = Target(state.engine_token, state.engine)
        if target != self._target:
            self._target = target
            if self._moved is not None and not self._moved.done():
                self._moved.set_result(None)

    async def run(self) -> None:
        """Talk to the current engine until cancelled."""
        context = zmq.asyncio.Context()
        expiry = asyncio.create_task(self._expire(), name="request-expiry")
        try:
            while True:
                self._moved = asyncio.get_running_loop().create_future()
                if self._target is None:
                    await asyncio.wait(
                        {self._moved, expiry}, timeout=self.settings.silence_s, return_when="FIRST_COMPLETED"
                    )
                else:
                    await self._session(context, self._target, self._moved, expiry)
                if expiry.done():
                    await expiry
        finally:
            expiry.cancel()
            await asyncio.gather(expiry, return_exceptions=True)
            context.destroy(linger=0)

    async def _session(
        self, context: zmq.asyncio.Context, target: Target, moved: asyncio.Future[None], expiry: asyncio.Task[None]
    ) -> None:
        """One connection to one engine, until it breaks, falls silent or is superseded."""
        self._last_message_at = self._clock()
        jobs: list[asyncio.Future[Any]] = []
        routing_id = f"{self._gateway[:200]}/{secrets.token_hex(8)}"  # new: what is still sent to the last one is lost
        try:
            with engine_socket(context, target.record, routing_id.encode(), self._network) as engine:
                for job in (self._follow(engine), self._listen(engine.socket, target), self._ping()):
                    jobs.append(asyncio.ensure_future(job))
                try:
                    done, _ = await asyncio.wait({*jobs, moved, expiry}, return_when="FIRST_COMPLETED")
                    for ended in done:
                        await ended  # a bug ends the gateway; a broken connection, or too few descriptors, does not
                finally:
                    self._detach(target)
                    for each in jobs:
                        each.cancel()
                    await asyncio.gather(*jobs, return_exceptions=True)
        except (zmq.ZMQError, OSError, ConfigError, QueueError) as error:
            if str(error) != self.trouble:
                log.warning("engine_unreachable", address=target.address, error=str(error))
            self.trouble = str(error)
            await asyncio.wait({moved, expiry}, timeout=self.settings.ping_every_s, return_when="FIRST_COMPLETED")

    async def _follow(self, engine: EngineSocket) -> None:
        """Use a connection from when the other end is known until it ends."""
        await engine.connected()
        self._socket, self.trouble = engine.socket, ""
        self._hello()
        await engine.disconnected()

    def _detach(self, target: Target) -> None:
        self._socket = None
        self.journal.detach()
        if self.ready:
            self.ready, self._down_since = False, self._clock()
            self._note("engine_lost", engine_token=target.token, open_requests=len(self.journal))
            log.warning("engine_lost", token=target.token, open_requests=len(self.journal))

    async def _ping(self) -> None:
        """Until it has been silent for too long. While this loop itself was late nothing was received."""
        while (asked := self._clock()) - self._last_message_at < self.settings.silence_s:
            self._hello()
            await asyncio.sleep(self.settings.ping_every_s)
            self._last_message_at += max(0.0, self._clock() - asked - self.settings.ping_every_s)
        log.warning("engine_silent", silent_s=round(self._clock() - self._last_message_at, 1))

    def _hello(self) -> None:
        if self._socket is not None:
            failpoints.hit("gateway.before.hello")
            self._send(Hello(self._gateway))

    async def _listen(self, socket: zmq.asyncio.Socket, target: Target) -> None:
        while True:
            frames = await socket.recv_multipart()
            try:
                message = self._decoder.decode(frames[-1])
            except msgspec.MsgspecError as error:
                log.warning("engine_message_malformed", error=str(error))
                continue
            self._receive(message, target)

    def _receive(self, message: ToGateway, target: Target) -> None:
        """Only messages of the engine that was connected to count, and under the token that it was then named with."""
        if self._socket is not None and message.engine_token == target.token:
            self._last_message_at = self._clock()
            self._handle(message)

    def _handle(self, message: ToGateway) -> None:
        if isinstance(message, Welcome):
            if not self.ready:
                self._attach(message.engine_token)
        elif isinstance(message, Outputs):
            for output in message.outputs:
                self._handle(output)
        elif isinstance(message, Tokens):
            self._on_tokens(message)
        elif self.journal.reject(message):
            self._deliver(message.request_id, _refused(message))

    def _attach(self, engine_token: int) -> None:
        self.ready = self.was_ready = True
        self._faults.clear()
        self._token_at = self._clock()
        submits = self.journal.resubmissions(engine_token, self._clock())
        for submit in submits:
            self._send(submit)
        self._note("engine_attached", engine_token=engine_token, resubmitted=len(submits))
        log.info("engine_attached", token=engine_token, resubmitted=len(submits))

    def _on_tokens(self, message: Tokens) -> None:
        try:
            delta = self.journal.accept(message, self._clock())
        except JournalError as error:
            self._on_fault(self.journal.request(message.request_id), error)
            return
        if delta is not None:
            self._token_at = self._clock()
            self._deliver(message.request_id, delta)

    def _on_fault(self, request: Request, error: JournalError) -> None:
        """Submit again what the journal has: the engine replaces its copy. Messages under way may be faulty as well."""
        fault = self._faults.get(request.id)
        if fault is not None and request.progress_at > fault.at:
            fault = None
        if fault is not None and self._clock() - fault.at < self.settings.resubmit_after_s:
            return
        times = 1 if fault is None else fault.times + 1
        log.error("engine_output_faulty", request=request.id, times=times, error=str(error))
        if times > self.settings.max_faults:
            self._fail(request.id, RequestError(f"the engine's output is faulty: {error}", status=500))
            return
        self._faults[request.id] = Fault(times, self._clock(), error)
        self._send(request.submission())

    # -- details ---------------------------------------------------------------------------------------------------

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.expire(self._clock())

    def expire(self, now: float) -> None:
        """Fail requests that have waited too long."""
        settings = self.settings
        for request in self.journal.open_requests():
            fault = self._faults.get(request.id)
            if self.ready and fault is not None and request.progress_at <= fault.at:
                self._on_fault(request, fault.error)  # submitted again, in vain
            waited_s = now - max(request.admitted_at, self._down_since)
            if not self.ready and waited_s > settings.engine_wait_s:
                message = f"no engine for {waited_s:.0f} s"
                self._fail(request.id, RequestError(message, status=503, code="no_engine", retry_after_s=5.0))
            elif self.ready and now - request.progress_at > (stall_s := self._stall_s(request)):
                message = f"no token from the engine for {stall_s:g} s"
                self._fail(request.id, RequestError(message, status=503, code="stalled", retry_after_s=5.0))

    def _stall_s(self, request: Request) -> float:
        """How long it may go without a token. Before the first it may wait for a place, for which the engine has a
        limit of its own."""
        return self.settings.stall_s + (0.0 if request.emitted else self._max_wait_s)

    def _fail(self, request_id: str, error: RequestError) -> None:
        generation = self._generations.get(request_id)
        self.close(request_id)
        if generation is not None:
            generation.deliver(request_id, error)

    def _deliver(self, request_id: str, update: Delta | RequestError) -> None:
        self._generations[request_id].deliver(request_id, update)
        if isinstance(update, RequestError) or update.finish_reason:
            self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        self._generations.pop(request_id, None)
        self._faults.pop(request_id, None)
        if self._idle is not None and not self._idle.done() and not len(self.journal):
            self._idle.set_result(None)

    def _send(self, message: ToEngine) -> None:
        if self._socket is not None:
            sent: Any = self._socket.send(self._encoder.encode(message))
            sent.add_done_callback(_report)


def _report(sent: asyncio.Future[Any]) -> None:
    if not sent.cancelled() and sent.exception() is not None:
        log.warning("engine_send_failed", error=str(sent.exception()))


def _refused(message: Rejected) -> EngineRefusal:
    status = message.status if 400 <= message.status < 600 else 503
    code = "overloaded" if status == HTTPStatus.TOO_MANY_REQUESTS else ""
    return EngineRefusal(message.message, status=status, code=code, retry_after_s=message.retry_after_s)
