"""The record of a chaos run: JSON lines with all that clients saw, what was done, and what the store said.

`elastic-chaos check` judges it offline and `elastic-chaos report` draws it; nothing else of the run is needed.
All times are `time.time()` seconds but those inside a RequestRecord, which are seconds of the
monotonic clock: add `Header.wall`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from chaos.faults.base import Injected
from chaos.workload.history import RequestRecord
from membership.base.errors import ConfigError
from membership.base.events import Event

VERSION = 1


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="line"):
    """Base of everything in the file."""


class Header(Line, frozen=True, kw_only=True, tag="header"):
    """The first line: what was run. `replay` is the command that runs it again."""

    what: str  # "soak", "scenario rolling-kills", …
    seed: int
    started: float
    wall: float  # wall clock minus monotonic clock
    replay: str
    cluster: str = ""
    ranks: int = 0
    model: str = ""
    version: int = VERSION


class Expected(Line, frozen=True, kw_only=True, tag="expected"):
    """The fault-free answer to one prompt: the oracle."""

    record: RequestRecord


class Answered(Line, frozen=True, kw_only=True, tag="answered"):
    """One request of the run as its client saw it."""

    record: RequestRecord


class Dealt(Line, frozen=True, kw_only=True, tag="dealt"):
    """One fault. `healed_at` 0: there was nothing to take back."""

    fault: Injected
    healed_at: float = 0.0


class Happened(Line, frozen=True, kw_only=True, tag="happened"):
    """One event of the cluster's own history (`membership/base/events.py`)."""

    event: Event


class Changed(Line, frozen=True, kw_only=True, tag="changed"):
    """One key of the cluster's prefix after one revision of the store, as a watch told it, in the watch's order.

    `listed`: a listing told it, at the start or after a Gap; what led to it was not seen.
    """

    revision: int
    key: str
    at: float  # when the watch told it
    deleted: bool = False
    listed: bool = False
    create_revision: int = 0
    version: int = 0
    value: Any = None  # the record as plain data; left out for keys that hold no membership


class Gap(Line, frozen=True, kw_only=True, tag="gap"):
    """What was written between two revisions was not told: nothing may be concluded from it, nor against it."""

    at: float
    after: int  # the last revision that was told
    until: int = 0  # the first one known again, from a listing; 0: nothing was told any more
    why: str = ""


class Read(Line, frozen=True, kw_only=True, tag="read"):
    """One look at the membership by a client of the store: when it was asked and answered, and what it was told."""

    client: str
    began: float
    ended: float
    revision: int  # of the store, as the answer says
    epoch: int = 0
    view_revision: int = 0  # mod revision of the view; 0: there was none
    leader_revision: int = 0  # create revision of the leader's key
    next_revision: int = 0  # mod revision of the staged view


class Verified(Line, frozen=True, kw_only=True, tag="verified"):
    """What the run itself found at its end: one promise, whether it held, and the figures behind it."""

    promise: str  # "G1" … "G9"
    ok: bool
    said: str


AnyLine = Header | Expected | Answered | Dealt | Happened | Changed | Gap | Read | Verified

_decoder: msgspec.json.Decoder[AnyLine] = msgspec.json.Decoder(AnyLine)


def write(path: Path, lines: Iterable[AnyLine]) -> None:
    """Write a whole record; the header comes first."""
    encoder = msgspec.json.Encoder()
    with path.open("wb") as file:
        for line in lines:
            file.write(encoder.encode(line) + b"\n")


def read(path: Path) -> Iterator[AnyLine]:
    """The lines of a record; ConfigError naming the line that is none."""
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            try:
                yield _decoder.decode(text)
            except msgspec.MsgspecError as error:
                raise ConfigError(f"{path}:{number}: {error}", hint="is it a record of elastic-chaos?") from error
