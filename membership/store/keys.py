"""The key of each record, and the way back: from keys and values to the typed state of the cluster."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from membership.base.errors import ConfigError, SchemaError
from membership.base.rank_id import RankId
from membership.store import records
from membership.store.codec import decode
from membership.store.interface import KeyValue
from membership.store.records import ClusterState, Record

ROOT = "/elastic-ep/"

Place = tuple[str, str, str | int | RankId]
"""Name under the cluster's prefix, rest of the key, the rest as key of its family."""

_SINGLES: dict[str, tuple[str, type[Record]]] = {
    "config": ("config", records.ClusterConfig),
    "checkpoint": ("checkpoint", records.Checkpoint),
    "desired": ("desired", records.Desired),
    "pause": ("pause", records.Pause),
    "rebalance": ("rebalance", records.RebalanceRequest),
    "kill": ("kill", records.KillRequest),
    "view": ("view", records.View),
    "next": ("next", records.View),
    "engine": ("engine", records.EngineRecord),
    "engine-status": ("engine_status", records.EngineStatus),
    "expert-load": ("expert_load", records.ExpertLoad),
    "incarnation": ("incarnation", records.Counter),
}
_FAMILIES: dict[str, tuple[str, type[Record]]] = {
    "agents": ("agents", records.AgentRecord),
    "assign": ("assignments", records.Assignment),
    "ranks": ("ranks", records.RankRecord),
    "exits": ("exits", records.RankExit),
    "heartbeats": ("heartbeats", records.Heartbeats),
    "gateways": ("gateways", records.GatewayRecord),
    "ops": ("operations", records.Operation),
}
_REVISIONS = {
    "view": ("view_revision", "mod_revision"),
    "next": ("next_revision", "mod_revision"),
    "incarnation": ("incarnation_revision", "mod_revision"),
    "leader": ("leader_revision", "create_revision"),
    "engine": ("engine_token", "create_revision"),
}


def _segment(name: str, what: str) -> str:
    if not name or "/" in name:
        raise ConfigError(f"{what} {name!r} must be non-empty and without '/'")
    return name


class Keys:
    """The keys of one cluster. ConfigError: a name in it is empty or has a '/', or the cluster's begins with a '.'."""

    def __init__(self, cluster: str) -> None:
        self.cluster = cluster
        if cluster.startswith("."):  # it names a directory, too: `.` would be that of all clusters
            raise ConfigError(f"cluster name {cluster!r} begins with a '.'", hint="name it with --cluster")
        self.prefix = prefix = f"{ROOT}{_segment(cluster, 'cluster name')}/"
        self.config = prefix + "config"
        self.checkpoint = prefix + "checkpoint"
        self.desired = prefix + "desired"
        self.pause = prefix + "pause"
        self.rebalance = prefix + "rebalance"
        self.kill = prefix + "kill"
        self.view = prefix + "view"  # the committed one
        self.next = prefix + "next"  # the staged view
        self.leader = prefix + "leader"  # LeaderRecord; its create revision is the fencing token
        self.engine = prefix + "engine"  # its create revision is the engine token
        self.engine_status = prefix + "engine-status"
        self.expert_load = prefix + "expert-load"
        self.agents = prefix + "agents/"
        self.assignments = prefix + "assign/"
        self.unassigned = prefix + "unassigned"  # the node whose agent took its assignment away last
        self.all_heartbeats = prefix + "heartbeats/"
        self.incarnation = prefix + "incarnation"  # Counter: the last incarnation given out
        # Prefixes of records on which no process acts: their changes wake no reader of a mirror.
        self.quiet = (self.all_heartbeats, self.expert_load)

    def agent(self, node: str) -> str:
        """AgentRecord."""
        return f"{self.agents}{_segment(node, 'node name')}"

    def assign(self, node: str) -> str:
        """Assignment."""
        return f"{self.assignments}{_segment(node, 'node name')}"

    def rank(self, rank: int, incarnation: int) -> str:
        """RankRecord."""
        return f"{self.prefix}ranks/{rank}/{incarnation}"

    def exit(self, rank: int) -> str:
        """RankExit."""
        return f"{self.prefix}exits/{rank}"

    def heartbeats(self, node: str) -> str:
        """Heartbeats."""
        return f"{self.all_heartbeats}{_segment(node, 'node name')}"

    def gateway(self, name: str) -> str:
        """GatewayRecord."""
        return f"{self.prefix}gateways/{_segment(name, 'gateway name')}"

    def op(self, operation: str) -> str:
        """Operation."""
        return f"{self.prefix}ops/{_segment(operation, 'operation id')}"


class Reading:
    """The typed state of one cluster, updated key by key: a change decodes only its own record.

    Unknown keys are ignored: a newer version may have written them.
    """

    def __init__(self) -> None:
        self._fields: dict[str, Any] = {attribute: {} for attribute, _ in _FAMILIES.values()}
        self._own: set[str] = set()  # families not shared with a returned state: these may be changed in place
        self._seen: dict[str, int] = {}  # key -> mod revision
        self._places: dict[str, Place] = {}  # of the keys that there are: each incarnation has keys of its own
        self._unreadable: dict[str, SchemaError] = {}

    def list(self, items: Iterable[KeyValue]) -> None:
        """Replace all keys. Records that have not changed are not decoded again."""
        there = {kv.key: kv for kv in items}
        for key in self._seen.keys() - there.keys():
            self.delete(key)
        for key, kv in there.items():
            if self._seen.get(key) != kv.mod_revision:
                self.put(kv)

    def put(self, kv: KeyValue) -> None:
        """Update one key. If it cannot be decoded, `state` raises until it is put again or deleted."""
        self._seen[kv.key] = kv.mod_revision
        try:
            self._put(kv)
        except SchemaError as error:
            self._unreadable[kv.key] = error
        else:
            self._unreadable.pop(kv.key, None)

    def _put(self, kv: KeyValue) -> None:
        name, rest, place = self._places.get(kv.key) or self._places.setdefault(kv.key, _parsed(kv.key))
        if not rest:
            if (numbered := _REVISIONS.get(name)) is not None:
                self._fields[numbered[0]] = getattr(kv, numbered[1])
            if (single := _SINGLES.get(name)) is not None:
                record = _decoded(kv, single[1])
                self._fields[single[0]] = record.value if isinstance(record, records.Counter) else record
        elif (family := _FAMILIES.get(name)) is not None:
            self._family(family[0])[place] = _decoded(kv, family[1])

    def delete(self, key: str) -> None:
        """Remove one key."""
        self._seen.pop(key, None)
        self._unreadable.pop(key, None)
        if (known := self._places.pop(key, None)) is None:
            return  # it was never added
        name, rest, place = known
        if rest and name in _FAMILIES:
            self._family(_FAMILIES[name][0]).pop(place, None)
        elif not rest:
            for table in (_REVISIONS, _SINGLES):
                self._fields.pop(table.get(name, ("",))[0], None)

    def _family(self, attribute: str) -> dict[Any, Record]:
        """Return a family's records, copied first if a returned state shares them."""
        if attribute not in self._own:
            self._own.add(attribute)
            self._fields[attribute] = dict(self._fields[attribute])
        found: dict[Any, Record] = self._fields[attribute]
        return found

    def state(self, revision: int) -> ClusterState:
        """Return the state as of `revision`; SchemaError names a key that cannot be decoded."""
        for error in self._unreadable.values():
            raise error
        self._own.clear()
        return ClusterState(revision=revision, **self._fields)


def kind_of(key: str) -> type[Record] | None:
    """The kind of record at a key; None: its value is no part of the state."""
    name, rest, _ = _parsed(key)
    found = _FAMILIES.get(name) if rest else _SINGLES.get(name)
    return found[1] if found is not None else None


def state_from(items: Iterable[KeyValue], revision: int) -> ClusterState:
    """Return the typed state of the one cluster that `items` (all keys under its prefix) describe."""
    reading = Reading()
    reading.list(items)
    return reading.state(revision)


def _parsed(key: str) -> Place:
    name, _, rest = key.removeprefix(ROOT).partition("/")[2].partition("/")
    return name, rest, _family_key(key, name, rest) if rest and name in _FAMILIES else rest


def _family_key(key: str, name: str, rest: str) -> str | int | RankId:
    try:
        if name == "ranks":
            rank, incarnation = rest.split("/")
            return RankId(int(rank), int(incarnation))
        return int(rest) if name == "exits" else rest
    except ValueError as error:
        raise SchemaError(f"malformed key {key!r}") from error


def _decoded(kv: KeyValue, kind: type[Record]) -> Record:
    try:
        return decode(kv.value, kind)
    except SchemaError as error:
        raise SchemaError(f"{kv.key}: {error}", hint=error.hint) from error
