"""An engine for gateway tests: real ZeroMQ, scripted tokens. It answers as the protocol says, or as a test wants it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from elastic.protocol import Abort, EndToken, Hello, Rejected, Submit, ToEngine, ToGateway, Tokens, Welcome
from membership.base.network import Network
from membership.base.run_dir import default_run_dir, make_run_dir, new_socket
from workers.protocol.messages import TokenLogprobs
from workers.queue.curve import Authenticator, serve_curve
from workers.queue.network import Purpose, connecting_keys, listening_keys

Answer = Callable[[Submit], list[int]]
Mangle = Callable[[ToGateway], list[ToGateway]]


@dataclass
class Running:
    """A request being answered, one token at a time."""

    peer: bytes
    submit: Submit
    tokens: list[int]
    sent: int


class ScriptedEngine:
    """Runs in a thread until closed. `pause_after`: how many tokens of each request it gives out before it waits."""

    def __init__(
        self,
        token: int,
        answer: Answer,
        *,
        address: str = "",
        network: Network | None = None,
        pause_after: int | None = None,
        mangle: Mangle = lambda message: [message],
        reject: Callable[[Submit], Rejected | None] = lambda submit: None,
    ) -> None:
        self.token = token
        self.address = address or f"ipc://{make_run_dir(default_run_dir()) / new_socket('engine')}"
        self.network = network  # it is on another host, and listens there at `address`
        self.pause_after = pause_after
        self.mute = False  # deaf and dumb, but connected
        self.submits: list[Submit] = []
        self.aborts: list[str] = []
        self.hellos = 0
        self._answer, self._mangle, self._reject = answer, mangle, reject
        self._running: dict[str, Running] = {}
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._encoder = msgspec.msgpack.Encoder()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scripted-engine", daemon=True)

    def __enter__(self) -> ScriptedEngine:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def running(self) -> list[Running]:
        """The requests that are being answered."""
        return list(self._running.values())

    def close(self) -> None:
        """Vanish at once, as a killed engine does."""
        self._stop.set()
        self._thread.join(60.0)

    def _run(self) -> None:
        context = zmq.Context()
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        auth = self._admit(context, self.network) if self.network is not None else None
        self._socket.bind(self.address)
        while not self._stop.is_set():
            while auth is not None and auth.socket.poll(0):
                auth.answer()
            while not self.mute and self._socket.poll(2):
                peer, body = self._socket.recv_multipart()
                self._on(peer, self._decoder.decode(body))
            if self.mute:
                time.sleep(0.002)
            else:
                self._step()
        context.destroy(linger=0)
        Path(self.address.removeprefix("ipc://")).unlink(missing_ok=True)

    def _admit(self, context: zmq.Context[zmq.Socket[bytes]], network: Network) -> Authenticator:
        serve_curve(self._socket, listening_keys(network, Purpose.GATEWAYS))
        return Authenticator(context, {connecting_keys(network, Purpose.GATEWAYS).public})

    def _on(self, peer: bytes, message: ToEngine) -> None:
        if isinstance(message, Hello):
            self.hellos += 1
            self._send(peer, Welcome(self.token))
        elif isinstance(message, Abort):
            self.aborts.append(message.request_id)
            self._running.pop(message.request_id, None)
        else:
            self.submits.append(message)
            refused = self._reject(message)
            if refused is not None:
                self._send(peer, refused)
                return
            tokens = self._answer(message)[: message.max_tokens]
            self._running[message.request_id] = Running(peer, message, tokens, len(message.emitted))

    def _step(self) -> None:
        """One token of each request."""
        for running in list(self._running.values()):
            if self.pause_after is not None and running.sent >= self.pause_after:
                continue
            index = running.sent
            fresh = running.tokens[index : index + 1]
            running.sent += len(fresh)
            last = running.sent >= len(running.tokens)
            full = running.sent >= running.submit.max_tokens
            reason = ("length" if full else "stop") if last else ""
            logprobs = [_logprobs(token, running.submit) for token in fresh]
            wanted = running.submit.sampling.logprobs >= 0
            name = running.submit.request_id
            submit = running.submit
            scored = index == 0 and submit.prompt_logprobs >= 0
            scores = [score_of(each, submit.prompt_logprobs) for each in submit.prompt[1:]]
            message = Tokens(
                self.token, name, index, fresh, logprobs if wanted else None, reason,
                prompt_logprobs=scores if scored else None,
                end=EndToken(1, TokenLogprobs(-0.5)) if reason == "stop" and wanted else None,
            )  # fmt: skip
            self._send(running.peer, message)
            if last:
                self._running.pop(name, None)

    def _send(self, peer: bytes, message: ToGateway) -> None:
        for each in self._mangle(message):
            self._socket.send_multipart([peer, self._encoder.encode(each)])


def score_of(token: int, top: int) -> TokenLogprobs:
    """What it says of a prompt's token: it is the likeliest."""
    return TokenLogprobs(-token / 100, [(token + n, -(token + n) / 100) for n in range(top)], 1)


def _logprobs(token: int, submit: Submit) -> TokenLogprobs:
    return TokenLogprobs(-0.5, [(token + n, -0.5 - n) for n in range(submit.sampling.logprobs)])
