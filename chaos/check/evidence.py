"""The lines of a record by kind, what every check is, and its outcome: findings that quote the lines.

Pure. All checks go through the revisions together, once; each remembers only its own few tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, TypeVar

import msgspec

from chaos.record.record import (
    Answered,
    AnyLine,
    Changed,
    Expected,
    Gap,
    Happened,
    Header,
    InjectedFault,
    Read,
    Verified,
)
from chaos.workload.history import RequestRecord
from membership.base.errors import ConfigError
from membership.base.events import Event
from membership.store.keys import Keys
from membership.store.records import ClusterConfig, Record

QUOTED_FINDINGS = 100  # of one check; more are counted
QUOTED_LINES = 6  # of one finding

R = TypeVar("R", bound=Record)
Figure = int | float | str


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One broken rule: what happened, and the few lines of the record that show it."""

    promise: str
    what: str
    lines: tuple[str, ...] = ()


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one check. `judged`: number of things checked; a check with none has proven nothing."""

    promise: str  # "G1" … "G9", or "-" for the soundness of the record itself
    title: str
    judged: int = 0
    broken: int = 0
    figures: dict[str, Figure] = {}
    findings: tuple[Finding, ...] = ()  # the first ones

    @property
    def verdict(self) -> str:
        """held, broken, or no evidence."""
        return "broken" if self.broken else "held" if self.judged else "no evidence"


@dataclass(frozen=True)
class Revision:
    """All that one revision of the store changed, by the key's name without the prefix.

    `listed`: see Changed. Such a revision shows a state without the changes that led to it, so it is not checked.
    """

    number: int
    at: float
    listed: bool
    changes: dict[str, Changed]

    def put(self, name: str) -> Changed | None:
        """The key as this revision wrote it; None if it did not, or deleted it."""
        changed = self.changes.get(name)
        return None if changed is None or changed.deleted else changed


Keyspace = dict[str, Changed]
"""Name -> the key as it was last written; deleted keys are left out."""


class Evidence:
    """A record by kind of line. Events and faults are sorted by time."""

    def __init__(self, lines: Iterable[AnyLine]) -> None:
        self.count = 0  # of lines
        self.header = Header(what="", seed=0, started=0.0, wall=0.0, replay="")
        self.oracle: dict[int, RequestRecord] = {}
        self.answered: list[RequestRecord] = []
        self.faults: list[InjectedFault] = []
        self.events: list[Event] = []
        self.observed: list[Changed | Gap] = []
        self.reads: list[Read] = []
        self.verified: list[Verified] = []
        for self.count, line in enumerate(lines, 1):
            match line:
                case Changed() | Gap():
                    self.observed.append(line)
                case Read():
                    self.reads.append(line)
                case Answered():
                    self.answered.append(line.record)
                case Happened():
                    self.events.append(line.event)
                case InjectedFault():
                    self.faults.append(line)
                case Expected():
                    self.oracle[line.record.prompt] = line.record
                case Verified():
                    self.verified.append(line)
                case Header():
                    self.header = line
        self.events.sort(key=lambda event: event.ts)
        self.faults.sort(key=lambda injected: injected.fault.at)

    @cached_property
    def prefix(self) -> str:
        """Of all keys of the cluster; ConfigError if its name cannot be one."""
        return Keys(self.header.cluster or "unknown").prefix

    @cached_property
    def gaps(self) -> list[Gap]:
        """The revisions that the watch missed."""
        return [line for line in self.observed if isinstance(line, Gap)]

    @cached_property
    def changes(self) -> list[Changed]:
        """All changes of keys, in the watch's order."""
        return [line for line in self.observed if isinstance(line, Changed)]

    @cached_property
    def revisions(self) -> list[Revision]:
        """The changes by revision, in the watch's order. Keys of one listing keep the revisions that wrote them."""
        found: list[Revision] = []
        for _, lines in groupby(self.observed, key=_belongs):
            changes = {c.key.removeprefix(self.prefix): c for c in lines if isinstance(c, Changed)}
            if changes:
                first = next(iter(changes.values()))
                found.append(Revision(first.revision, first.at, first.listed, changes))
        return found

    def walk(self) -> Iterator[tuple[Keyspace, Revision]]:
        """Each revision with all keys as they were before it."""
        before: Keyspace = {}
        for revision in self.revisions:
            yield before, revision
            for name, changed in revision.changes.items():
                if changed.deleted:
                    before.pop(name, None)
                else:
                    before[name] = changed

    @cached_property
    def rank_records(self) -> list[Changed]:
        """The records that ranks have written of themselves, in order."""
        key = self.prefix + "ranks/"
        return [line for line in self.changes if line.key.startswith(key) and not line.deleted]

    @cached_property
    def config(self) -> ClusterConfig | None:
        """The cluster's constants."""
        found = (put for revision in self.revisions if (put := revision.put("config")) is not None)
        return next((typed(put, ClusterConfig) for put in found), None)

    @cached_property
    def ended(self) -> float:
        """When the last thing of the record happened."""
        times = [line.at for line in self.observed[-1:]] + [read.ended for read in self.reads[-1:]]
        times += [event.ts for event in self.events[-1:]] + [injected.fault.seen_at for injected in self.faults[-1:]]
        return max([*times, self.header.started])

    @cached_property
    def commit_events(self) -> dict[int, list[Event]]:
        """Revision -> the events that report a commit there."""
        found: dict[int, list[Event]] = {}
        for event in self.events:
            if event.kind == "epoch_committed" and "revision" in event.fields:
                found.setdefault(event.fields["revision"], []).append(event)
        return found

    @cached_property
    def _attached(self) -> dict[int, int]:
        """Incarnation -> the last engine whose queues it joined, as its agent reports."""
        found: dict[int, int] = {}
        for event in self.events:
            if event.kind == "rank_attached":
                incarnation, token = int(event.fields.get("incarnation", 0)), int(event.fields.get("token", 0))
                found[incarnation] = max(token, found.get(incarnation, 0))
        return found

    def moved_on(self, masked: Event) -> bool:
        """Whether an engine masked a rank that had left its queue for its successor's. That is no eviction."""
        latest = self._attached.get(int(masked.fields.get("incarnation", 0)), 0)
        return masked.fields.get("source") == "queue" and latest > int(masked.fields.get("token", latest))

    def wall(self, monotonic: float) -> float:
        """A time of a RequestRecord as `time.time()` seconds."""
        return monotonic + self.header.wall

    def since(self, at: float) -> str:
        """A time for people: seconds since the start."""
        return f"{at - self.header.started:+.3f} s"

    def quote(self, line: AnyLine | Revision) -> str:
        """One line of the record for people."""
        match line:
            case Changed():
                how = ", listed" if line.listed else ""
                what = f"{line.key.removeprefix(self.prefix)} {_value(line)}"
                return f"revision {line.revision} ({self.since(line.at)}{how}): {what}"
            case Revision():
                parts = (f"{name} {_value(changed)}" for name, changed in list(line.changes.items())[:4])
                return f"revision {line.number} ({self.since(line.at)}): {'; '.join(parts)}"
            case Gap():
                until = f"revision {line.until}" if line.until else "the end"
                return f"nothing was observed from revision {line.after + 1} to {until}: {line.why}"
            case Read():
                return (
                    f"{line.client} read revision {line.revision} ({self.since(line.began)} to "
                    f"{self.since(line.ended)}): epoch {line.epoch} of revision {line.view_revision}, "
                    f"leader {line.leader_revision or 'none'}, staged {line.next_revision or 'nothing'}"
                )
            case InjectedFault(fault=fault):
                healed = f", healed {self.since(line.healed_at)}" if line.healed_at else ""
                return f"{self.since(fault.at)}: {fault.fault} of {fault.victim} ({fault.proof or 'no proof'}){healed}"
            case Happened(event=event):
                rank = f" rank {event.rank}" if event.rank is not None else ""
                fields = ", ".join(f"{name} {value}" for name, value in event.fields.items())
                text = f"{self.since(event.ts)}: {event.role} says {event.kind}{rank}, epoch {event.epoch} ({fields}"
                return _short(text) + ")"
            case Answered(record=record):
                end = record.finish_reason or record.error or "no end"
                at = self.since(self.wall(record.started))
                return f"{at}: request of prompt {record.prompt} ({record.id}): {len(record.tokens)} tokens, {end}"
            case _:
                return _short(msgspec.json.encode(line).decode())


class Check:
    """One check of one promise. `run` calls `revision` for every revision, then `finish`, then `outcome`."""

    promise = "-"
    title = ""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.judged = self.broken = 0
        self.figures: dict[str, Figure] = {}
        self.findings: list[Finding] = []

    def revision(self, before: Keyspace, revision: Revision) -> None:
        """Check one revision; `before`: all keys as they were before it."""

    def finish(self) -> None:
        """Check what can only be checked when all revisions are known."""

    def found(self, what: str, *lines: AnyLine | Revision | None) -> None:
        """Report a broken rule; `lines` show it."""
        self.broken += 1
        if len(self.findings) < QUOTED_FINDINGS:
            quoted = tuple(self.evidence.quote(line) for line in lines[:QUOTED_LINES] if line is not None)
            self.findings.append(Finding(promise=self.promise, what=what, lines=quoted))

    def outcome(self) -> Outcome:
        """The result so far."""
        return Outcome(
            promise=self.promise, title=self.title, judged=self.judged, broken=self.broken, figures=self.figures,
            findings=tuple(self.findings),
        )  # fmt: skip


def run(evidence: Evidence, *kinds: type[Check]) -> list[Outcome]:
    """Run checks over a record."""
    checks = [kind(evidence) for kind in kinds]
    for before, revision in evidence.walk():
        for check in checks:
            check.revision(before, revision)
    for check in checks:
        check.finish()
    return [check.outcome() for check in checks]


def typed(changed: Changed, kind: type[R]) -> R:
    """A key's value as the record it is; ConfigError naming the key if it is none."""
    try:
        return msgspec.convert(changed.value, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"revision {changed.revision}: {changed.key} is no {kind.__name__}: {error}") from error


def epoch_of(view: Changed | None) -> int:
    """The epoch of a view; 0 if there is none. (Called too often to decode a whole View each time.)"""
    return int(view.value["epoch"]) if view is not None and not view.deleted else 0


def _belongs(line: Changed | Gap) -> tuple[int, bool] | None:
    return (line.revision, line.listed) if isinstance(line, Changed) else None


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _value(changed: Changed) -> str:
    """A key's value, as short as it can be said."""
    value: Any = changed.value
    if changed.deleted:
        return "deleted"
    if not isinstance(value, dict):
        return "written"
    if "members" in value or "placement" in value:
        ranks = " ".join(f"{m['rank']}/{m['incarnation']}" for m in value.get("members", ()))
        return f"= epoch {value.get('epoch')} with ranks {ranks or 'none'}"
    if "phase" in value or {"id", "kind", "target"} <= value.keys():
        ended = f": {value['error']}" if value.get("error") else ""
        return f"= {value['kind']} to {value['target']}, {value.get('phase', 'proposed')}{ended}"
    if changed.key.endswith(("/leader", "/engine")):
        return f"= token {changed.create_revision}, node {value.get('node')}, pid {value.get('pid')}"
    if "/assign/" in changed.key:
        return "= ranks " + (" ".join(f"{s['rank']}/{s['incarnation']}" for s in value.get("ranks", ())) or "none")
    return "= " + _short(", ".join(f"{k} {v}" for k, v in value.items()), 120)
