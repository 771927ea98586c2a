"""Faults of the store itself: etcd down, its disk slow, its history forgotten, its room used up, its data gone.

What every process may suffer (`kill`, `stop`, `slow`) is in `signals.py`; the victim is then called "etcd". Whether
a fault happened is asked of etcd's own interface, past any proxy and not through the client that is under test.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from contextlib import closing
from functools import cached_property

import httpx

from chaos.faults.base import Injected, NotInjected, Site
from chaos.faults.etcd_process import START_TIMEOUT_S, Etcd, OwnsMembers, answers, etcd_of
from chaos.faults.fault import ROLES, Fault, Params
from chaos.faults.members import ASK_TIMEOUT_S, EtcdMembers, call, status
from chaos.faults.process import SEEN_S, see
from elastic.serve.role_process import leases_of
from elastic.serve.state_dir import StateDir
from membership.base.errors import StoreCompacted, StoreError, StoreUnavailable
from membership.store.etcd import EtcdStore, connect
from membership.store.keys import Keys

FSYNC = "etcd_disk_wal_fsync_duration_seconds"
OURS = "/elastic-chaos/"  # keys that injectors write
FILLING = 1 << 20  # bytes of one value; etcd's limit of a request is 1.5 MB


class OnStore(ABC):
    """Base of the faults of the store: `_deal` does it and returns the proof, `_heal` takes back what was dealt."""

    name = ""

    def __init__(self, site: Site, victim: str, params: Params) -> None:
        self.site, self.victim, self.params = site, victim, params
        self._dealt = False

    @cached_property
    def etcd(self) -> Etcd:
        """The site's."""
        return etcd_of(self.site)

    def inject(self) -> Injected:
        """Deal it and see that it happened; NotInjected, and healed, if it did not."""
        at, self._dealt = time.time(), True
        try:
            proof = self._deal()
        except BaseException:
            self.heal()
            raise
        return Injected(fault=self.name, victim=self.victim, at=at, seen_at=time.time(), proof=proof)

    def heal(self) -> None:
        """Take back what was dealt, once."""
        if self._dealt:
            self._heal()
            self._dealt = False

    @abstractmethod
    def _deal(self) -> str:
        """Deal it; the proof that it happened, in words."""

    def _heal(self) -> None:  # noqa: B027 - of most faults nothing can be taken back
        """Nothing, unless the fault says otherwise. It may have been dealt in part only."""

    def _store(self) -> EtcdStore:
        """A client of our own."""
        return connect([self.etcd.url], connect_timeout_s=ASK_TIMEOUT_S)


class Down(OnStore):
    """It ends in good order and stays away until healed; its data stay."""

    name = "etcd-down"

    _before = 0  # cluster id

    def _deal(self) -> str:
        self._before = status(self.etcd.url).cluster_id
        self.etcd.down()
        if answers(self.etcd.url):
            raise NotInjected(f"something answers at {self.etcd.url}, though etcd has ended")
        return f"nothing answers at {self.etcd.url}"

    def _heal(self) -> None:
        """Start it again with its data."""
        if not self._before:
            return
        self.etcd.up()
        if status(self.etcd.url).cluster_id != self._before:
            raise NotInjected(f"etcd at {self.etcd.url} came back with other data")


class Wiped(OnStore):
    """Its data are deleted while it is down: it comes back as another store. Nothing brings them back."""

    name = "etcd-wiped"
    _ended = False

    def _deal(self) -> str:
        before = status(self.etcd.url)
        self._ended = True
        self.etcd.down()
        shutil.rmtree(self.etcd.data)
        self.etcd.up()
        after = status(self.etcd.url)
        if after.cluster_id == before.cluster_id:
            raise NotInjected(f"etcd at {self.etcd.url} still says that it is {before.cluster_id:x}")
        return (
            f"etcd was {before.cluster_id:x} at revision {before.revision}, "
            f"and is {after.cluster_id:x} at revision {after.revision}"
        )

    def _heal(self) -> None:
        """See that it runs, if we were interrupted."""
        if self._ended:
            self.etcd.up()


class Compacted(OnStore):
    """It forgets all that was overwritten: who was behind cannot follow any more, and must list anew."""

    name = "etcd-compacted"

    def _deal(self) -> str:
        with closing(self._store()) as store:
            revision = max(store.put(OURS + "compaction", b"") for _ in range(2))
            store.delete(OURS + "compaction")
            store.compact(revision)
            try:
                with closing(store.watch(OURS, 1)) as watch:
                    watch.next(ASK_TIMEOUT_S)
            except StoreCompacted as error:
                return str(error)
        raise NotInjected("a watch from revision 1 was served: nothing was compacted")


class SlowDisk(OnStore):
    """Each fdatasync of its log takes so much longer. strace does it, from outside."""

    name = "etcd-slow-disk"

    _tracer: subprocess.Popen[bytes] | None = None

    def _deal(self) -> str:
        delay_s, url = float(self.params["delay_s"]), self.etcd.url
        pid = self.site.pid("etcd")
        what = f"inject=fdatasync:delay_enter={round(delay_s * 1e6)}"
        command = ["strace", "-qq", "-f", "-p", str(pid), "-o", "/dev/null", "-e", "trace=fdatasync", "-e", what]
        before = fsyncs(url)
        try:
            self._tracer = subprocess.Popen(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        except FileNotFoundError as error:
            raise NotInjected("there is no strace here", hint="install strace: it slows etcd's disk") from error
        with closing(self._store()) as store:
            mean_s = 0.0
            deadline = time.monotonic() + SEEN_S + 10 * delay_s
            while mean_s < 0.8 * delay_s:  # those before the tracer was there were quick
                if self._tracer.poll() is not None or time.monotonic() > deadline:
                    raise NotInjected(f"etcd's disk is not slow: {mean_s:.3f} s per fsync; {self._said()}")
                before = fsyncs(url)
                store.put(OURS + "slow-disk", b"")
                after = fsyncs(url)
                mean_s = (after[1] - before[1]) / max(1, after[0] - before[0])
            store.delete(OURS + "slow-disk")
        return f"{FSYNC}: {mean_s * 1000:.0f} ms in the mean of the last {after[0] - before[0]:.0f}"

    def _heal(self) -> None:
        """End the tracer, which lets etcd go."""
        tracer, self._tracer = self._tracer, None
        if tracer is not None:
            tracer.terminate()
            tracer.wait(SEEN_S)
            if tracer.stderr is not None:
                tracer.stderr.close()

    def _said(self) -> str:
        tracer = self._tracer
        if tracer is None or tracer.poll() is None or tracer.stderr is None:
            return "strace runs"
        return tracer.stderr.read().decode(errors="replace").strip() or f"strace ended with {tracer.returncode}"


def fsyncs(url: str) -> tuple[float, float]:
    """How many times etcd has written its log to disk, and how long that took altogether, by its own metric."""
    try:
        lines = httpx.get(f"{url}/metrics", timeout=ASK_TIMEOUT_S, trust_env=False).text.splitlines()
    except httpx.HTTPError as error:
        raise StoreUnavailable(f"etcd at {url} did not give its metrics: {error!r}") from error
    found = dict(line.split() for line in lines if line.startswith((f"{FSYNC}_sum", f"{FSYNC}_count")))
    return float(found[f"{FSYNC}_count"]), float(found[f"{FSYNC}_sum"])


class Full(OnStore):
    """Its room is used up: it refuses all writes, and new leases, until healed. It must have been given little room."""

    name = "etcd-full"

    def _deal(self) -> str:
        url, most = self.etcd.url, int(self.params["most_bytes"])
        filling = bytes(FILLING)
        with closing(self._store()) as store:
            for number in range(1 + most // FILLING):
                try:
                    store.put(f"{OURS}filling/{number:06}", filling)
                except StoreError as error:
                    if alarms := call(url, "maintenance/alarm", {"action": "GET"}).get("alarms"):
                        return f"etcd's alarm: {alarms[0]['alarm']}; a put: {error}"
                    raise NotInjected(f"etcd refused the filling, without an alarm: {error}") from error
        raise NotInjected(f"{most} bytes did not fill etcd", hint="give it --quota-backend-bytes")

    def _heal(self) -> None:
        """Make room, and have etcd take writes again: an alarm stays until somebody takes it back."""
        url = self.etcd.url
        with closing(self._store()) as store:
            for kv in store.range(OURS + "filling/")[1]:
                store.delete(kv.key)
        revision = status(url).revision
        try:
            call(url, "kv/compaction", {"revision": str(revision), "physical": True})
        except StoreUnavailable as error:
            if "compacted" not in str(error):  # nothing was written since the last time
                raise
        call(url, "maintenance/defragment")
        for alarm in call(url, "maintenance/alarm", {"action": "GET"}).get("alarms", ()):
            call(url, "maintenance/alarm", {"action": "DEACTIVATE", **alarm})
        with closing(self._store()) as store:
            store.put(OURS + "room", b"")
            store.delete(OURS + "room")


class LeaderMoved(OnStore):
    """Another member leads, by order or because the leader was killed."""

    name = "etcd-leader"

    @cached_property
    def _members(self) -> EtcdMembers:
        if not isinstance(self.site, OwnsMembers):
            raise NotInjected("this etcd is no EtcdMembers of the scenario's", hint="see chaos.faults.members")
        return self.site.members

    def _deal(self) -> str:
        old = self._members.leader()
        was, others = old.status().member_id, [each for each in self._members.members if each is not old]
        if self.params["kill"]:
            old.kill()
        else:
            call(old.url, "maintenance/transfer-leadership", {"targetID": str(others[0].status().member_id)})
        see(lambda: all(each.status().leader not in (0, was) for each in others), "another leader", START_TIMEOUT_S)
        return f"{old.name} ({was:x}) led, {others[0].status().leader:x} leads"

    def _heal(self) -> None:
        """Start the member that was killed."""
        if not isinstance(self.site, OwnsMembers):
            return
        for member in self._members.members:
            if not member.server.alive:
                member.restart()


class LeasesRevoked(OnStore):
    """The leases of a role end under it, as if they had run out. It lives."""

    name = "lease-revoked"

    def _deal(self) -> str:
        address = StateDir(self.site.state_dir()).address()
        pid, node = self.site.pid(self.victim), str(self.params["node"] or socket.gethostname())
        with closing(self._store()) as store:
            leases = leases_of(store, Keys(address.cluster).prefix, pid, node)
            if not leases:
                raise NotInjected(f"{self.victim}, process {pid}, has no lease")
            for lease in leases:
                store.revoke(lease)
        url = self.etcd.url
        for lease in leases:
            if (left := int(call(url, "lease/timetolive", {"ID": str(lease)})["TTL"])) >= 0:
                raise NotInjected(f"lease {lease:x} of {self.victim} still has {left} s")
        return f"etcd knows no lease {', '.join(f'{lease:x}' for lease in leases)} of process {pid}"


ETCD = ("etcd",)
FAULTS = {
    "etcd-down": Fault(about="etcd ends in good order, and is away until healed", victims=ETCD, heals=True, make=Down),
    "etcd-wiped": Fault(about="etcd comes back without its data", victims=ETCD, heals=False, make=Wiped),
    "etcd-compacted": Fault(about="etcd forgets its history", victims=ETCD, heals=False, make=Compacted),
    "etcd-slow-disk": Fault(
        about="each write of etcd's log takes so much longer", victims=ETCD, heals=True, make=SlowDisk,
        needs=("strace", "root"), params={"delay_s": 0.2},
    ),
    "etcd-full": Fault(
        about="etcd's room is used up: it refuses all writes", victims=ETCD, heals=True, make=Full,
        needs=("an etcd with little room (--quota-backend-bytes)",), params={"most_bytes": 64 << 20},
    ),
    "etcd-leader": Fault(
        about="another member of etcd leads; with `kill`, because the leader is dead", victims=ETCD, heals=True,
        make=LeaderMoved, needs=("an etcd of several members that the scenario owns",), params={"kill": False},
    ),
    "lease-revoked": Fault(
        about="the leases of a role end under it", victims=ROLES, heals=False, make=LeasesRevoked, params={"node": ""},
    ),
}  # fmt: skip
