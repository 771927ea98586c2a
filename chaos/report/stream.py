"""A run as the stream that the live page is drawn from, so that the page can replay it (`gateway/ui/replay.js`).

The cluster's document is made of the record's changes of the store exactly as a gateway makes it of the store itself.
What a record leaves out (loads, links, counters) is not in it; traffic is that of the run's own clients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import merge
from typing import Any

import msgspec

from chaos.check.evidence import Evidence
from chaos.record.record import AnyLine, Changed
from elastic.gateway.live import LiveDocument, merge_patch, message
from elastic.gateway.traffic import Second
from membership.store.codec import encode
from membership.store.interface import KeyValue
from membership.store.keys import Reading, kind_of
from membership.store.records import EngineRecord

TOGETHER_S = 0.05  # changes within this time are one patch: a transaction's, and what follows at once
Sent = tuple[float, str, Any]  # when, kind, data


def recording(lines: Iterable[AnyLine]) -> Iterator[bytes]:
    """The messages, in the order of their times."""
    evidence = Evidence(lines)
    started = evidence.header.started
    changes = [line for line in evidence.observed if isinstance(line, Changed)]
    began = min([started, *(line.at for line in changes)])
    yield message("begin", {"now": began}, began)
    happened: Iterator[Sent] = ((max(began, event.ts), "events", [event]) for event in evidence.events)
    for at, kind, data in merge(_patches(changes), happened, _traffic(evidence), key=lambda sent: sent[0]):
        yield message(kind, data, at)


def _patches(changes: list[Changed]) -> Iterator[Sent]:
    """What changed of the document, of changes in the order of the watch."""
    reading, document = Reading(), LiveDocument()
    shown: dict[str, Any] = {}
    for number, line in enumerate(changes):
        if line.deleted:
            reading.delete(line.key)
        elif line.value is not None:
            reading.put(_key_value(line))
        if number + 1 < len(changes) and changes[number + 1].at < line.at + TOGETHER_S:
            continue
        fresh = document.of(reading.state(line.revision), line.at, "")
        if patch := merge_patch(shown, fresh):
            yield line.at, "patch", patch
        shown = fresh


def _key_value(line: Changed) -> KeyValue:
    """The key as the store had it, save for what a record leaves out."""
    kind, value = kind_of(line.key), b""
    if kind is not None:
        left_out = {"address": "", "broadcast_handle": "", "mask_handle": ""} if kind is EngineRecord else {}
        value = encode(msgspec.convert({**left_out, **line.value}, kind, str_keys=True))
    return KeyValue(
        key=line.key, value=value, create_revision=line.create_revision, mod_revision=line.revision,
        version=line.version,
    )  # fmt: skip


def _traffic(evidence: Evidence) -> Iterator[Sent]:
    """What the clients got in each second, sent when that is over."""
    seconds: dict[int, Second] = {}
    for record in evidence.answered:
        last = None
        for at in record.token_times:
            second = seconds.setdefault(int(at + evidence.header.wall), Second(at=int(at + evidence.header.wall)))
            second.tokens += 1
            second.gap_ms = max(second.gap_ms, 0.0 if last is None else round((at - last) * 1000, 1))
            last = at
        if record.ended:
            at = int(record.ended + evidence.header.wall)
            seconds.setdefault(at, Second(at=at)).ended += 1
    for at in sorted(seconds):
        yield at + 1.0, "traffic", [seconds[at]]
