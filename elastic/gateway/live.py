"""The live document, and the one stream that the page at /ui is drawn from: the status, the events, the traffic.

Only changes are sent: the document is a JSON object, and a change of it a merge patch (RFC 7396). The first patch is
the whole document. Heartbeats are left out, because they change all the time; /admin/v1/status has them.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from elastic.gateway.traffic import Traffic
from elastic.status import cluster_status
from membership.base.errors import ElasticError, RequestError
from membership.base.events import FOLLOW_POLL_S, Tail
from membership.store.mirror import Mirror
from membership.store.records import ClusterConfig, ClusterState

REFRESH_S = 1.0  # what wakes no reader of a mirror (loads, and how far a rank has loaded) is looked at this often
SILENCE_S = 5.0  # after which a comment shows that the gateway lives
RECENT_BYTES = 256 * 1024  # of the event history that a reader gets first
MAX_READERS = 8  # each holds one of the admin port's connections
STALLED_S = 5.0  # a reader that takes nothing for so long gives way to a new one

Json = dict[str, Any]


class LiveDocument:
    """Describes a state of the cluster. What has not changed since the last one is not described anew."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[object, Any]] = {}

    def of(self, state: ClusterState, now: float, trouble: str) -> Json:
        """The document. `trouble`: what is wrong with the store that the state was read from."""
        status = _plain(cluster_status(state, now, trouble))
        ranks = status.pop("ranks")
        for rank in ranks:
            rank.pop("heartbeat_age_ms", None)
        return {
            "status": status,
            "ranks": {str(rank["rank"]): rank for rank in ranks},
            "shape": self._once("shape", state.config, _shape),
            "placement": self._once("placement", state.view, lambda view: _keyed(view.placement)),
            "loads": self._once("loads", state.expert_load, lambda load: _plain(load.loads)),
            "operations": self._once("operations", state.operations, _keyed),
        }

    def _once(self, name: str, source: Any, describe: Callable[[Any], Any]) -> Any:
        if name not in self._known or self._known[name][0] is not source:
            self._known[name] = (source, {} if source is None else describe(source))
        return self._known[name][1]


def merge_patch(old: Json, new: Json) -> Json:
    """What makes `new` of `old` (RFC 7396). Neither holds a null."""
    patch: Json = {key: None for key in old if key not in new}
    for key, value in new.items():
        before = old.get(key)
        if before is value or before == value:
            continue
        both = isinstance(before, dict) and isinstance(value, dict)
        patch[key] = merge_patch(old[key], value) if both else value
    return patch


@dataclass(eq=False)
class Reader:
    """Of the stream. `sending_since`: it has not yet taken what it was sent then."""

    drop: Callable[[], None]
    sending_since: float = math.inf


class Live:
    """The stream, for several readers at a time."""

    def __init__(
        self,
        mirror: Mirror,
        events: Path,
        traffic: Traffic,
        stopping: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mirror, self._events, self._traffic, self._stopping = mirror, events, traffic, stopping
        self._clock = clock
        self._readers: set[Reader] = set()

    def make_room(self) -> None:
        """For another reader: one that has stopped reading leaves if need be. RequestError: there is none."""
        if len(self._readers) < MAX_READERS:
            return
        longest = min(self._readers, key=lambda reader: reader.sending_since)
        if self._clock() - longest.sending_since < STALLED_S:
            full = f"{MAX_READERS} readers follow this gateway already"
            raise RequestError(full, status=503, code="overloaded", retry_after_s=SILENCE_S)
        self._readers.remove(longest)
        longest.drop()

    async def stream(self, drop: Callable[[], None]) -> AsyncGenerator[bytes, None]:
        """Server-sent events: `begin`, then `patch`, `events` and `traffic` whenever there is something new.

        `drop` ends the reader's connection.
        """
        reader = Reader(drop)
        self._readers.add(reader)
        try:
            reader.sending_since = self._clock()
            yield _message("begin", {"now": time.time()})
            reader.sending_since = math.inf
            async for news in self._news():
                reader.sending_since = self._clock()
                yield news
                reader.sending_since = math.inf
        finally:
            self._readers.discard(reader)

    async def _news(self) -> AsyncGenerator[bytes, None]:
        document, tail = LiveDocument(), Tail.recent(self._events, RECENT_BYTES)
        shown: Json = {}
        seen: ClusterState | None = None
        looked_at = spoke_at = 0.0
        second = 0
        while not self._stopping():
            now, parts = time.monotonic(), []
            state = self._state()
            if isinstance(state, str):
                yield _message("trouble", {"message": state})
                return
            if state is not seen or now - looked_at >= REFRESH_S:
                seen, looked_at = state, now
                fresh = document.of(state, time.time(), self._mirror.trouble)
                if patch := merge_patch(shown, fresh):
                    parts.append(_message("patch", patch))
                shown = fresh
            if past := self._traffic.since(second):
                second = past[-1].at
                parts.append(_message("traffic", past))
            if events := tail.read():
                parts.append(_message("events", events))
            if parts or now - spoke_at >= SILENCE_S:
                spoke_at = now
                yield b"".join(parts) or b":\n\n"
            await asyncio.sleep(FOLLOW_POLL_S)

    def _state(self) -> ClusterState | str:
        """The state, or why there will be no more."""
        try:
            return self._mirror.state()
        except ElasticError as error:
            return str(error)


def message(kind: str, data: Any, at: float) -> bytes:
    """One message, sent at this time: a saved stream is a recording that the page can replay."""
    return b"event: %s\ndata: %s\nid: %.3f\n\n" % (kind.encode(), msgspec.json.encode(data), at)


def _message(kind: str, data: Any) -> bytes:
    return message(kind, data, time.time())


def _shape(config: ClusterConfig) -> Json:
    """What the grid's size, and the limits of a form, follow from."""
    return {
        "layers": config.moe_layers,
        "experts": config.experts,
        "max_ranks": config.max_ranks,
        "models": list(config.model_names),
    }


def _keyed(records: dict[Any, Any]) -> Json:
    return {str(key): _plain(record) for key, record in records.items()}


def _plain(value: Any) -> Any:
    """As JSON has it, without nulls: in a patch they mean that something is gone."""
    return _without_nulls(msgspec.to_builtins(value, str_keys=True))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return value
