"""Streams whose bytes are only noted with their time as they come, and read at the end.

A client that reads each token at once (`chaos/workload/streams.py`) takes 0.2 ms of one core for it: too long beside
steps of 3 ms with 32 streams, where its own queue would be measured. All requests are greedy and of a fixed length.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import h11

from chaos.workload.background import Background
from chaos.workload.history import RequestRecord
from chaos.workload.streams import Seen

PIECE_BYTES = 1 << 16
PAUSE_S = 0.05  # of a stream after a request that brought nothing
END_S = 120.0


@dataclass
class _Noted:
    """One request: when which bytes came."""

    prompt: int
    started: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    ended: float = 0.0
    error: str = ""

    def read(self, connection: h11.Connection) -> RequestRecord:
        """What its client would have seen, on a connection that has sent it."""
        seen, line = Seen(error=self.error), b""
        for at, piece in self.pieces:
            connection.receive_data(piece)
            while (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                if isinstance(event, h11.Response):
                    seen.status = event.status_code
                    seen.error = seen.error or ("" if event.status_code == 200 else f"HTTP {event.status_code}")
                elif isinstance(event, h11.Data):
                    *lines, line = (line + bytes(event.data)).split(b"\n")
                    for each in lines:
                        seen.read(each.decode("utf-8"), at)
                elif isinstance(event, h11.ConnectionClosed):
                    break
        return RequestRecord(
            prompt=self.prompt, started=self.started, ended=self.ended, id=seen.id, error=seen.error,
            status=seen.status, token_times=tuple(seen.times), tokens=tuple(seen.tokens),
            finish_reason=seen.finish_reason if seen.done else "",
        )  # fmt: skip


class RawStreams:
    """So many streams, each of which begins its next request when one ends."""

    def __init__(self, url: str, model: str, prompts: Sequence[Sequence[int]], streams: int, tokens: int) -> None:
        self._where = urlsplit(url)
        self._model, self._prompts, self._streams, self._tokens = model, prompts, streams, tokens
        self._next = 0
        self._limit: int | None = None
        self._noted: list[_Noted] = []
        self._open: dict[int, _Noted] = {}
        self._background = Background("raw streams", self._run)

    def once(self) -> list[RequestRecord]:
        """Each prompt once."""
        self._limit = len(self._prompts)
        asyncio.run(self._run())
        return self._records()

    def start(self) -> None:
        """Stream in a thread until `stop`."""
        self._background.start()

    def stop(self) -> list[RequestRecord]:
        """Begin no more requests, wait for those under way, and read all. WaitTimeout, or what ended the streams."""
        self._background.stop(END_S, lambda: f"streams {sorted(self._open)}")
        return self._records()

    @property
    def answered(self) -> int:
        """How many requests have ended."""
        return len(self._noted)

    def flowing(self) -> int:
        """How many streams have begun to get tokens of their present request."""
        return sum(len(noted.pieces) > 1 for noted in list(self._open.values()))

    def _records(self) -> list[RequestRecord]:
        return [noted.read(self._sent(noted.prompt)[0]) for noted in self._noted]

    def _sent(self, prompt: int) -> tuple[h11.Connection, bytes]:
        """A connection that has sent the request of this prompt, and what that is."""
        body = {
            "model": self._model, "prompt": self._prompts[prompt], "max_tokens": self._tokens, "temperature": 0,
            "ignore_eos": True, "stream": True, "logprobs": 0,
        }  # fmt: skip
        content = json.dumps(body).encode()
        headers = {
            "Host": self._where.netloc, "Content-Type": "application/json", "Content-Length": str(len(content)),
            "Connection": "close",
        }  # fmt: skip
        connection = h11.Connection(h11.CLIENT)
        request = h11.Request(method="POST", target="/v1/completions", headers=list(headers.items()))
        parts = [connection.send(each) or b"" for each in (request, h11.Data(data=content), h11.EndOfMessage())]
        return connection, b"".join(parts)

    async def _run(self) -> None:
        await asyncio.gather(*(self._stream(number) for number in range(self._streams)))

    async def _stream(self, number: int) -> None:
        while not self._background.stopping.is_set() and (self._limit is None or self._next < self._limit):
            prompt, self._next = self._next % len(self._prompts), self._next + 1
            noted = self._open[number] = _Noted(prompt, time.monotonic())
            try:
                await self._note(noted)
            except OSError as error:
                noted.error = f"{type(error).__name__}: {error}"
            noted.ended = time.monotonic()
            self._noted.append(noted)
            del self._open[number]
            if len(noted.pieces) < 2:
                await asyncio.sleep(PAUSE_S)

    async def _note(self, noted: _Noted) -> None:
        _, sent = self._sent(noted.prompt)
        reader, writer = await asyncio.open_connection(self._where.hostname, self._where.port)
        try:
            writer.write(sent)
            while piece := await reader.read(PIECE_BYTES):
                noted.pieces.append((time.monotonic(), piece))
        finally:
            writer.close()
