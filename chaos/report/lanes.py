"""Events of the cluster as lanes over time: the state of each rank and role, epochs, operations. Pure.

Events come from several processes, so two that are milliseconds apart may be in the wrong order: a state is accepted
only after certain others, and events of an older incarnation are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from chaos.check.evidence import Evidence
from membership.base.events import Event

JOINING = ("launching", "handshaking", "loading", "standby")
ANY = ("absent", *JOINING, "serving", "draining", "masked", "dead", "quarantined")  # states of a rank
PLACE = "place"  # no process but a disk, a host's network, memory: only its faults are known
UP = ("serving", "absent", PLACE, "up", "leading", "in office", "ready", "waiting")  # states in which nothing is wrong
ROLES = ("gateway", "engine", "engine-standby", "controller", "agent", "etcd", "supervisor")
HOLDERS = {"gateways": "gateway", "agents": "agent", "leader": "controller", "engine": "engine"}  # of keys
STORE_EVENTS = ("leader_elected", "epoch_staged", "epoch_committed", "ranks_assigned", "operation_phase")


class Span(msgspec.Struct, frozen=True, array_like=True):
    """A state from one moment to another, in seconds since the run began, and words for it."""

    since: float
    until: float
    state: str
    said: str = ""


class Lane(msgspec.Struct, frozen=True, kw_only=True):
    """The states of one rank or role, from the begin of the run to its end."""

    name: str
    spans: tuple[Span, ...]

    def at(self, when: float) -> str:
        """Its state at this time."""
        return next((span.state for span in reversed(self.spans) if span.since <= when), "absent")

    def up_after(self, when: float) -> float | None:
        """The first moment from `when` on at which nothing was wrong with it."""
        good = (span for span in self.spans if span.until > when and span.state in UP)
        return next((max(when, span.since) for span in good), None)


class Epoch(msgspec.Struct, frozen=True, kw_only=True):
    """One committed epoch."""

    epoch: int
    at: float
    ranks: tuple[int, ...]
    why: str = ""
    adopted: float = -1.0  # when the engine went on with it; -1: it never did
    pause_ms: float = 0.0
    experts_taken: int = 0


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One operation: the phases that it went through."""

    id: str
    kind: str  # scale, drain, undrain; "change" where the record does not say
    target: int
    ended: str  # done | aborted | "" (it had not ended)
    phases: tuple[Span, ...]
    error: str = ""


@dataclass
class Track:
    """A lane that is being written."""

    name: str
    zero: float
    marks: list[tuple[float, str, str]] = field(default_factory=list)
    incarnation: int = 0

    @property
    def state(self) -> str:
        """Its latest state."""
        return self.marks[-1][1] if self.marks else "absent"

    def mark(self, ts: float, state: str, said: str = "") -> None:
        """It changed to this state."""
        if state != self.state:
            self.marks.append((ts - self.zero, state, said))

    def lane(self, end: float) -> Lane:
        """Its states within the run; the one from before counts from the begin."""
        ends = [at for at, _, _ in self.marks[1:]] + [end]
        spans = (
            Span(round(max(0.0, since), 3), round(min(end, until), 3), state, said)
            for (since, state, said), until in zip(self.marks, ends, strict=True)
        )
        return Lane(name=self.name, spans=tuple(span for span in spans if span.until > span.since))


def ranks(evidence: Evidence, end: float) -> tuple[Lane, ...]:
    """One lane per rank slot, by number."""
    zero = evidence.header.started
    tracks = {
        rank: Track(f"rank {rank}", zero, [(0.0, "serving", "since before the run")])
        for rank in _serving_before(evidence)
    }
    for event in evidence.events:
        if event.rank is not None and event.kind.startswith("rank_"):
            _rank_event(tracks.setdefault(event.rank, Track(f"rank {event.rank}", zero)), event)
        elif event.kind == "epoch_committed":
            members = set(event.fields.get("ranks", ()))
            for rank, track in tracks.items():
                if rank in members and track.state in JOINING:
                    track.mark(event.ts, "serving", f"incarnation {track.incarnation}, since epoch {event.epoch}")
                elif rank not in members and track.state == "serving":
                    track.mark(event.ts, "draining", f"left out of epoch {event.epoch}")
    return tuple(tracks[rank].lane(end) for rank in sorted(tracks))


def _serving_before(evidence: Evidence) -> tuple[int, ...]:
    """The ranks that served when the run began, unless events from before show it: the first view, else 0, 1, 2, …"""
    if _knows_before(evidence):
        return ()
    listed = (line.value for line in evidence.changes if line.key.endswith("/view"))
    view = next((value for value in listed if isinstance(value, dict)), None)
    return tuple(int(each["rank"]) for each in view["members"]) if view else tuple(range(evidence.header.ranks))


def _knows_before(evidence: Evidence) -> bool:
    """Whether there are events from before the run."""
    return bool(evidence.events) and evidence.events[0].ts < evidence.header.started


NEXT = {  # event of a rank -> the states from which it leads to another one, and that one
    "rank_ready": (("launching",), "handshaking"),
    "rank_attached": (("launching", "handshaking"), "loading"),
    "rank_prepared": (JOINING, "standby"),
    "rank_masked": (tuple(state for state in ANY if state != "dead"), "masked"),
    "rank_died": (ANY, "dead"),
    "rank_quarantined": (ANY, "quarantined"),
    "rank_retiring": (tuple(state for state in ANY if state not in ("masked", "dead")), "draining"),
    "rank_retired": (("draining", "serving", *JOINING), "absent"),
}


def _rank_event(track: Track, event: Event) -> None:
    incarnation = int(event.fields.get("incarnation", track.incarnation))
    if incarnation < track.incarnation:
        return
    if incarnation > track.incarnation and event.kind in ("rank_spawned", "rank_ready"):
        track.incarnation = incarnation
        track.mark(event.ts, "launching", f"incarnation {incarnation}")
    before, after = NEXT.get(event.kind, ((), ""))
    if track.state in before:
        track.mark(event.ts, after, _said(event, incarnation))


def _said(event: Event, incarnation: int) -> str:
    """Words for the state that a rank's event leads to."""
    fields, name = event.fields, f"incarnation {incarnation}"
    match event.kind:
        case "rank_masked":
            return f"{name}, reported by {fields.get('source', '?')}"
        case "rank_died":
            return f"{name}, reported by {fields.get('reason') or fields.get('detected_by', '?')}"
        case "rank_quarantined":
            return str(fields.get("reason", ""))
        case "rank_retiring":
            return f"{name}, {fields.get('reason', '')}"
        case "rank_retired":
            return ""
    return name


def roles(evidence: Evidence, end: float) -> tuple[Lane, ...]:
    """One lane per role, in the order of `ROLES`."""
    found = _Roles(evidence)
    if not _knows_before(evidence):
        for name in _seen_roles(evidence):
            found.track(name)
    for event in evidence.events:
        found.process(event)
        found.election(event)
        found.etcd(event)
    for victim in {line.fault.victim for line in evidence.faults}:
        if not victim.startswith("rank "):
            found.track(victim, "up" if victim in ROLES else PLACE)
    order = {role: number for number, role in enumerate(ROLES)}
    names = sorted(found.tracks, key=lambda name: (order.get(name, len(order)), name))
    return tuple(found.tracks[name].lane(end) for name in names)


class _Roles:
    """The tracks of roles as events write them, each kind of event in a method of its own."""

    def __init__(self, evidence: Evidence) -> None:
        self.tracks: dict[str, Track] = {}
        self._zero = evidence.header.started
        self._pids: dict[int, str] = {}
        answers = [line.at for line in evidence.changes] + [read.ended for read in evidence.reads]
        self._answers = sorted(answers)  # of the store

    def track(self, name: str, state: str = "up") -> Track:
        """The role's track. If it is new, it has been in this state since before the run."""
        return self.tracks.setdefault(name, Track(name, self._zero, [(0.0, state, "")] if state else []))

    def process(self, event: Event) -> None:
        """A process of a role starts, is ready, or ends."""
        name, pid = str(event.fields.get("name", "")), int(event.fields.get("pid", 0) or 0)
        if event.kind == "role_started":
            self._pids[pid] = name
            fresh = "waiting" if name.startswith("engine") else "starting"
            self.track(name, "").mark(event.ts, fresh, f"process {pid}")
        elif event.kind == "role_died":
            self._pids[pid] = name
            self.track(name).mark(event.ts, "down", f"process {pid}: {event.fields.get('reason', '')}")
        elif ready := self.tracks.get({"forkserver_ready": "agent", "gateway_started": "gateway"}.get(event.kind, "")):
            ready.mark(event.ts, "ready", ready.marks[-1][2])

    def election(self, event: Event) -> None:
        """An engine or a controller comes into office, or leaves it."""
        controller, token = self.tracks.get("controller"), event.fields.get("token")
        pid = int(event.fields.get("pid", 0) or 0)
        if event.kind == "engine_elected" and (elected := _engine(pid, self._pids)):
            for other in self.tracks.values():
                if other.state == "in office" and other.name != elected:
                    other.mark(event.ts, "waiting", "another engine is in office")
            self.track(elected).mark(event.ts, "in office", f"process {pid}, token {token}")
        elif event.kind == "leader_elected" and controller is not None:
            controller.mark(event.ts, "leading", f"token {token}")
        elif event.kind == "leader_left" and controller is not None and controller.state != "down":
            controller.mark(event.ts, "waiting", "stands for election")

    def etcd(self, event: Event) -> None:
        """The store ends; its next answer, or an event that takes one, shows that it is back."""
        if event.kind == "etcd_died":
            etcd = self.track("etcd")
            etcd.mark(event.ts, "down", "until the first sign of it, at most")
            if back := next((at for at in self._answers if at > event.ts), 0.0):
                etcd.mark(back, "up", "")
        elif event.kind in STORE_EVENTS and (down := self.tracks.get("etcd")) is not None and down.state == "down":
            down.mark(event.ts, "up", f"first sign: {event.kind}")


def _engine(pid: int, pids: Mapping[int, str]) -> str:
    """Which of the two engines this process is: one without an event is the other one. "" if that is not certain."""
    unknown = {"engine", "engine-standby"} - set(pids.values())
    return pids.get(pid) or (unknown.pop() if len(unknown) == 1 else "")


def _seen_roles(evidence: Evidence) -> set[str]:
    """The roles that have keys in the store."""
    names = (line.key.split("/")[3] for line in evidence.changes if line.key.count("/") >= 3)
    found = {role for name in names if (role := HOLDERS.get(name))}
    return found | {"etcd"} if found else set()


def epochs(evidence: Evidence) -> tuple[Epoch, ...]:
    """All committed epochs. Those from before the run have negative times; the last of them holds at its begin."""
    found: dict[int, Epoch] = {}
    for event in evidence.events:
        if event.kind == "epoch_committed":
            found[event.epoch] = Epoch(
                epoch=event.epoch, at=_since(evidence, event), ranks=tuple(event.fields.get("ranks", ())),
                why=str(event.fields.get("reason", "")), experts_taken=int(event.fields.get("experts_taken", 0)),
            )  # fmt: skip
    for event in evidence.events:
        if event.kind == "epoch_adopted":
            at, pause_ms = _since(evidence, event), float(event.fields.get("pause_ms", 0.0))
            # A controller that dies between its commit and its event reports nothing: then this is the proof.
            known = found.get(event.epoch) or Epoch(epoch=event.epoch, at=at, ranks=())
            if known.adopted < 0:
                found[event.epoch] = msgspec.structs.replace(known, adopted=at, pause_ms=pause_ms)
    return tuple(found[epoch] for epoch in sorted(found))


def _since(evidence: Evidence, event: Event) -> float:
    return round(event.ts - evidence.header.started, 3)


def operations(evidence: Evidence, end: float) -> tuple[Change, ...]:
    """All operations with the times of their phases: from the store's record where it was watched, else from events."""
    zero = evidence.header.started
    phases: dict[str, dict[str, float]] = {}
    facts: dict[str, dict[str, object]] = {}
    for event in evidence.events:
        if event.kind == "operation_phase":
            name = str(event.fields.get("operation", ""))
            phases.setdefault(name, {}).setdefault(str(event.fields.get("phase")), event.ts)
            facts.setdefault(name, {}).update(target=event.fields.get("target", 0), error=event.fields.get("error", ""))
    for line in evidence.changes:
        if "/ops/" in line.key and isinstance(line.value, dict):
            name, known = line.key.rpartition("/")[2], line.value
            phases.setdefault(name, {}).update(known.get("phase_times", {}))
            facts.setdefault(name, {}).update({key: known[key] for key in ("kind", "target", "error") if key in known})
    found = [_change(name, times, facts[name], zero, end) for name, times in phases.items()]
    return tuple(sorted((each for each in found if each.phases), key=lambda each: each.phases[0].since))


def _change(name: str, times: dict[str, float], facts: dict[str, object], zero: float, end: float) -> Change:
    entered = sorted((ts - zero, phase) for phase, ts in times.items())
    ended = entered[-1][1] if entered[-1][1] in ("done", "aborted") else ""
    ends = [at for at, _ in entered[1:]] + [end]
    spans = (
        Span(round(max(0.0, since), 3), round(until, 3), phase)
        for (since, phase), until in zip(entered, ends, strict=True)
        if phase not in ("done", "aborted") and until >= 0
    )
    return Change(
        id=name,
        kind=str(facts.get("kind", "change")),
        target=int(str(facts.get("target", 0))),
        ended=ended,
        phases=tuple(spans),
        error=str(facts.get("error", "")),
    )
