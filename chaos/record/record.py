"""The record of a chaos run: JSON lines with the requests of clients, the injected faults, and the store's changes.

`elastic-chaos check` checks it offline and `elastic-chaos report` draws it; nothing else of the run is needed.
Times are `time.time()` seconds, except inside a RequestRecord: those are seconds of the monotonic clock; add
`Header.wall`.
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


class InjectedFault(Line, frozen=True, kw_only=True, tag="dealt"):
    """One injected fault. `healed_at` 0: it was not healed."""

    fault: Injected
    healed_at: float = 0.0


class Happened(Line, frozen=True, kw_only=True, tag="happened"):
    """One event of the cluster's own history (`membership/base/events.py`)."""

    event: Event


class Changed(Line, frozen=True, kw_only=True, tag="changed"):
    """One key of the cluster's prefix after one revision of the store, in the order of the watch.

    `listed`: it comes from a listing, at the start or after a Gap; the changes that led to it were not seen.
    """

    revision: int
    key: str
    at: float  # when the watch delivered it
    deleted: bool = False
    listed: bool = False
    create_revision: int = 0
    version: int = 0
    value: Any = None  # the record as plain data; left out for keys that hold no membership


class Gap(Line, frozen=True, kw_only=True, tag="gap"):
    """Changes between two revisions were not observed: nothing is concluded about them."""

    at: float
    after: int  # the last observed revision
    until: int = 0  # the first one known again, from a listing; 0: none until the end
    why: str = ""


class Read(Line, frozen=True, kw_only=True, tag="read"):
    """One read of the membership by a client of the store: its time span and its answer."""

    client: str
    began: float
    ended: float
    revision: int  # of the store, as the answer says
    epoch: int = 0
    view_revision: int = 0  # mod revision of the view; 0: there was none
    leader_revision: int = 0  # create revision of the leader's key
    next_revision: int = 0  # mod revision of the staged view


class Verified(Line, frozen=True, kw_only=True, tag="verified"):
    """One promise that the run itself checked at its end: whether it held, and the figures behind it."""

    promise: str  # "G1" … "G9"
    ok: bool
    said: str


AnyLine = Header | Expected | Answered | InjectedFault | Happened | Changed | Gap | Read | Verified

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
