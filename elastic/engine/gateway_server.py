"""The engine's server for gateways: ZeroMQ ROUTERs in a thread of its own, so that no gateway can slow a step down.

On this host only processes of this user reach it (a socket in the run directory, peer uid checked); from other hosts,
if there is a network, those that have the join secret (TCP, CURVE). What does not decode is dropped with a log.
A request belongs to the gateway that submitted it last; when that gateway is gone, its requests are aborted.
Whose it is changes when the engine takes the submission, not when that comes: what an earlier one has given goes there.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import msgspec
import structlog
import zmq

from elastic.protocol import Abort, Hello, Outputs, Rejected, Submit, ToEngine, ToGateway, Tokens, Welcome
from membership.base import failpoints
from membership.base.attempts import Attempts
from membership.base.errors import WaitTimeout
from membership.base.network import Network
from membership.base.run_dir import default_run_dir, make_run_dir, new_socket
from membership.base.timing import REMOTE_SILENCE_S
from workers.queue.curve import Authenticator, serve_curve
from workers.queue.endpoints import listen_for_hosts
from workers.queue.network import Purpose, connecting_keys, listening_keys

MAX_MESSAGE_BYTES = 16 << 20
MAX_QUEUED_MESSAGES = 100_000  # per gateway; one that reads so slowly loses its requests
_POLL_MS = 1000
RETRY_S = 0.05
HEARTBEAT_MS = 1000  # on a connection to another host: whose cable is pulled does not say that it ends

Route = tuple[zmq.Socket[Any], bytes]


class Submission(NamedTuple):
    """Where the answers to a request go. The same gateway may submit it again: then it has another number."""

    gateway: Route
    number: int
    together: bool  # with the answers to others


"""The socket on which a gateway is, and its routing id there."""

log = structlog.get_logger(__name__)


class EngineServer:
    """`take` and `send` never block; `on_message` is called in the server's thread when there is something to take."""

    def __init__(self, on_message: Callable[[], None], network: Network | None = None) -> None:
        self._path = make_run_dir(default_run_dir()) / new_socket("engine")
        self.address = f"ipc://{self._path}"
        self.remote, self.remote_key = "", b""  # where other hosts connect, if they may
        self._on_message = on_message
        self._inbox: deque[tuple[Route | Submission, Submit | Abort]] = deque()  # a submission: not reached any more
        self._outbox: deque[tuple[Submission, Tokens | Rejected]] = deque()
        self._routes: dict[str, Submission] = {}  # by request id; of the engine's thread
        self._numbers = itertools.count(1)
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._encoder = msgspec.msgpack.Encoder()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stop = threading.Event()
        self._token = 0
        self._attempts = Attempts("gateway server")
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None
        self._context = zmq.Context()
        near = self._router()
        near.set(zmq.IPC_FILTER_UID, os.geteuid())
        near.bind(self.address)
        self._sockets = [near]
        self._auth: Authenticator | None = None
        if network is not None:
            self._listen_to_hosts(network)

    def serve(self, engine_token: int) -> None:
        """Answer gateways from now on; what they have sent before waits in the socket."""
        self._token = engine_token
        self._thread = threading.Thread(target=self._run, name="engine-server", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> bool:
        """Whether `take` has something."""
        return bool(self._inbox) or self._failure is not None

    def take(self) -> list[Submit | Abort]:
        """What has come since the last call, in order. Raises what has ended the server's thread, if anything has."""
        if self._failure is not None:
            raise self._failure
        taken: list[Submit | Abort] = []
        while self._inbox:
            sender, message = self._inbox.popleft()
            there = self._routes.get(message.request_id)
            if isinstance(message, Submit) and not isinstance(sender, Submission):
                self._routes[message.request_id] = Submission(sender, next(self._numbers), message.together)
            elif there is not None and sender in (there, there.gateway):
                del self._routes[message.request_id]
            else:
                continue  # ended, or submitted again by now
            taken.append(message)
        return taken

    def send(self, outputs: Iterable[Tokens | Rejected]) -> None:
        """Hand outputs over to be sent, in order."""
        addressed = self._addressed(outputs)
        if addressed:
            self._outbox.extend(addressed)
            os.eventfd_write(self._wake, 1)

    def _addressed(self, outputs: Iterable[Tokens | Rejected]) -> list[tuple[Submission, Tokens | Rejected]]:
        addressed: list[tuple[Submission, Tokens | Rejected]] = []
        for output in outputs:
            submission = self._routes.get(output.request_id)
            if submission is None:
                continue  # aborted meanwhile
            if _ends(output):
                del self._routes[output.request_id]
            addressed.append((submission, output))
        return addressed

    def close(self) -> None:
        """Send what is handed over, then close."""
        self._stop.set()
        os.eventfd_write(self._wake, 1)
        if self._thread is not None:
            self._thread.join(timeout=5.0)
            if self._thread.is_alive():
                raise WaitTimeout("the engine's server thread did not stop within 5 s")
        for socket in (*self._sockets, *([self._auth.socket] if self._auth is not None else [])):
            socket.close()
        self._context.term()
        os.close(self._wake)
        self._path.unlink(missing_ok=True)

    def _router(self) -> zmq.Socket[Any]:
        router = self._context.socket(zmq.ROUTER)
        router.set(zmq.LINGER, 500)
        router.set(zmq.ROUTER_MANDATORY, 1)
        router.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        router.set(zmq.SNDHWM, MAX_QUEUED_MESSAGES)
        return router

    def _listen_to_hosts(self, network: Network) -> None:
        keys = listening_keys(network, Purpose.GATEWAYS)
        self._auth = Authenticator(self._context, {connecting_keys(network, Purpose.GATEWAYS).public})
        far = self._router()
        self._sockets.append(far)
        serve_curve(far, keys)
        far.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        far.set(zmq.HEARTBEAT_TIMEOUT, int(REMOTE_SILENCE_S * 1000))
        self.remote, self.remote_key = listen_for_hosts(far, network.address, network.ports), keys.public

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            log.exception("gateway_server_failed")
            self._failure = error
            self._on_message()

    def _serve(self) -> None:
        poller = zmq.Poller()
        for socket in self._sockets:
            poller.register(socket, zmq.POLLIN)
        if self._auth is not None:
            poller.register(self._auth.socket, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        while not self._stop.is_set():
            ready = dict(poller.poll(_POLL_MS))
            if self._wake in ready:
                os.eventfd_read(self._wake)
            if self._auth is not None and self._auth.socket in ready:
                self._attempts.run(self._auth.answer, "admission of a gateway")
            if not self._attempts.run(partial(self._turn, [each for each in self._sockets if each in ready])):
                self._stop.wait(RETRY_S)
        self._send_all()

    def _turn(self, readable: Iterable[zmq.Socket[Any]]) -> None:
        self._send_all()
        for socket in readable:
            self._receive_all(socket)

    def _receive_all(self, socket: zmq.Socket[Any]) -> None:
        while True:
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 2:
                log.warning("gateway_message_misshapen", frames=len(frames))
                continue
            try:
                self._receive((socket, frames[0]), self._decoder.decode(frames[1]))
            except msgspec.DecodeError as error:
                log.warning("gateway_message_malformed", error=str(error), size=len(frames[1]))

    def _receive(self, gateway: Route, message: ToEngine) -> None:
        if isinstance(message, Hello):
            failpoints.hit("engine.hello")
            self._send_to(gateway, Welcome(self._token))  # also the answer to a gateway's ping
            return
        if isinstance(message, Submit):
            failpoints.hit("engine.submit")
        else:
            failpoints.hit("engine.abort")
        self._inbox.append((gateway, message))
        self._on_message()

    def _send_all(self) -> None:
        """Each gateway gets all that is there for it in one message, if it takes that: it wakes up once."""
        together: dict[Route, list[tuple[Submission, Tokens | Rejected]]] = {}
        while self._outbox:
            submission, output = self._outbox.popleft()
            if submission.together:
                together.setdefault(submission.gateway, []).append((submission, output))
            else:
                self._send_some(submission.gateway, [(submission, output)])
        for gateway, outputs in together.items():
            self._send_some(gateway, outputs)

    def _send_some(self, gateway: Route, outputs: list[tuple[Submission, Tokens | Rejected]]) -> None:
        alone = len(outputs) == 1
        message = outputs[0][1] if alone else Outputs(self._token, [output for _, output in outputs])
        if self._send_to(gateway, message):
            return
        for submission, output in outputs:
            if not _ends(output):
                self._inbox.append((submission, Abort(output.request_id)))
                self._on_message()

    def _send_to(self, gateway: Route, message: ToGateway) -> bool:
        """False if that gateway is gone, or does not read."""
        socket, name = gateway
        try:
            socket.send_multipart([name, self._encoder.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            log.warning("gateway_send_failed", error=str(error))
            return False
        return True


def _ends(output: Tokens | Rejected) -> bool:
    return isinstance(output, Rejected) or bool(output.finish_reason)
