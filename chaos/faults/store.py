"""Faults of the store itself: etcd down, its disk slow, its history compacted, its space used up, its data gone.

Faults of any process (`kill`, `stop`, `slow`) are in `signals.py`; their victim is then "etcd". Whether a fault
happened is asked of etcd's own interface, past any proxy and not through the client under test.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cached_property

import httpx

from chaos.faults.base import ROLES, SEEN_S, Faults, NotInjected, SiteInjector, see
from chaos.faults.etcd_process import START_TIMEOUT_S, Etcd, OwnsMembers, answers, etcd_of
from chaos.faults.members import ASK_TIMEOUT_S, EtcdMembers, call, status
from elastic.serve.etcd_server import http_client
from elastic.serve.role_process import leases_of
from elastic.serve.state_dir import StateDir
from membership.base.errors import StoreCompacted, StoreError, StoreUnavailable
from membership.store.etcd import EtcdStore, connect
from membership.store.keys import Keys

FSYNC = "etcd_disk_wal_fsync_duration_seconds"
OURS = "/elastic-chaos/"  # keys that injectors write
FILLING = 1 << 20  # bytes of one value; etcd's limit of a request is 1.5 MB
ETCD = ("etcd",)

FAULTS = Faults()


class StoreInjector(SiteInjector):
    """Base of the faults of the store."""

    @cached_property
    def etcd(self) -> Etcd:
        """The site's."""
        return etcd_of(self.site)

    def _store(self) -> EtcdStore:
        """A client of our own."""
        return connect([self.etcd.url], connect_timeout_s=ASK_TIMEOUT_S)


@FAULTS.entry("etcd-down", "etcd ends in good order, and is away until healed", victims=ETCD, heals=True)
class Down(StoreInjector):
    """It shuts down in good order and stays down until healed; its data stay."""

    _before = 0  # cluster id

    def _inject(self) -> str:
        self._before = status(self.etcd.url).cluster_id
        self.etcd.down()
        if answers(self.etcd.url):
            raise NotInjected(f"something answers at {self.etcd.url}, though etcd has ended")
        return f"nothing answers at {self.etcd.url}"

    def _heal(self) -> None:
        if not self._before:
            return
        self.etcd.up()
        if status(self.etcd.url).cluster_id != self._before:
            raise NotInjected(f"etcd at {self.etcd.url} came back with other data")


@FAULTS.entry("etcd-wiped", "etcd comes back without its data", victims=ETCD, heals=False)
class Wiped(StoreInjector):
    """Its data are deleted while it is down: it comes back as another store."""

    _ended = False

    def _inject(self) -> str:
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
        if self._ended:
            self.etcd.up()


@FAULTS.entry("etcd-compacted", "etcd forgets its history", victims=ETCD, heals=False)
class Compacted(StoreInjector):
    """It forgets all overwritten values: a watch that is behind cannot go on, its client must list again."""

    def _inject(self) -> str:
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


@FAULTS.entry(
    "etcd-slow-disk", "each sync of etcd's log takes `delay_s` seconds longer", victims=ETCD, heals=True,
    needs=("strace", "root"), params={"delay_s": 0.2},
)  # fmt: skip
class SlowDisk(StoreInjector):
    """Each fdatasync of its log takes `delay_s` longer, injected from outside by strace."""

    _tracer: subprocess.Popen[bytes] | None = None
    _starter: ThreadPoolExecutor | None = None  # its death, and so this process's, is the tracer's

    def _inject(self) -> str:
        delay_s, url = float(self.params["delay_s"]), self.etcd.url
        pid = self.site.pid("etcd")
        what = f"inject=fdatasync:delay_enter={round(delay_s * 1e6)}"
        if shutil.which("strace") is None:
            raise NotInjected("there is no strace here", hint="install strace: it slows etcd's disk")
        command = ["setpriv", "--pdeathsig", "TERM", "strace", "-qq", "-f", "-p", str(pid), "-o", "/dev/null"]
        command += ["-e", "trace=fdatasync", "-e", what]
        before = fsyncs(url)
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="tracer-owner")
        self._tracer = tracer = self._starter.submit(_started, command).result(SEEN_S)
        with closing(self._store()) as store:
            mean_s = 0.0
            deadline = time.monotonic() + SEEN_S + 10 * delay_s
            while mean_s < 0.8 * delay_s:  # syncs before the tracer was attached were quick
                if tracer.poll() is not None or time.monotonic() > deadline:
                    raise NotInjected(f"etcd's disk is not slow: {mean_s:.3f} s per fsync; {self._said()}")
                before = fsyncs(url)
                store.put(OURS + "slow-disk", b"")
                after = fsyncs(url)
                mean_s = (after[1] - before[1]) / max(1, after[0] - before[0])
            store.delete(OURS + "slow-disk")
        return f"{FSYNC}: {mean_s * 1000:.0f} ms in the mean of the last {after[0] - before[0]:.0f}"

    def _heal(self) -> None:
        tracer, self._tracer = self._tracer, None
        if tracer is not None:
            tracer.terminate()
            tracer.wait(SEEN_S)
            if tracer.stderr is not None:
                tracer.stderr.close()
        if self._starter is not None:
            self._starter.shutdown()

    def _said(self) -> str:
        tracer = self._tracer
        if tracer is None or tracer.poll() is None or tracer.stderr is None:
            return "strace runs"
        return tracer.stderr.read().decode(errors="replace").strip() or f"strace ended with {tracer.returncode}"


def _started(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)


def fsyncs(url: str) -> tuple[float, float]:
    """Number of times etcd has synced its log to disk, and the seconds that took in all, by its own metric."""
    try:
        with http_client(url, ASK_TIMEOUT_S) as client:
            lines = client.get("/metrics").text.splitlines()
    except httpx.HTTPError as error:
        raise StoreUnavailable(f"etcd at {url} did not give its metrics: {error!r}") from error
    found = dict(line.split() for line in lines if line.startswith((f"{FSYNC}_sum", f"{FSYNC}_count")))
    return float(found[f"{FSYNC}_count"]), float(found[f"{FSYNC}_sum"])


@FAULTS.entry(
    "etcd-full", "etcd's room is used up: it refuses all writes", victims=ETCD, heals=True,
    needs=("an etcd with little room (--quota-backend-bytes)",), params={"most_bytes": 64 << 20},
)  # fmt: skip
class Full(StoreInjector):
    """Its space is used up: it refuses writes and new leases until healed. Its quota must be small."""

    def _inject(self) -> str:
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
        """Free space and clear the alarm, which etcd does not do by itself."""
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


@FAULTS.entry(
    "etcd-leader", "another member of etcd leads; with `kill`, because the leader is dead", victims=ETCD, heals=True,
    needs=("an etcd of several members that the scenario owns",), params={"kill": False},
)  # fmt: skip
class LeaderMoved(StoreInjector):
    """Another member leads, by a transfer or because the leader was killed."""

    @cached_property
    def _members(self) -> EtcdMembers:
        if not isinstance(self.site, OwnsMembers):
            raise NotInjected("this etcd is no EtcdMembers of the scenario's", hint="see chaos.faults.members")
        return self.site.members

    def _inject(self) -> str:
        old = self._members.leader()
        was, others = old.status().member_id, [each for each in self._members.members if each is not old]
        if self.params["kill"]:
            old.kill()
        else:
            call(old.url, "maintenance/transfer-leadership", {"targetID": str(others[0].status().member_id)})
        see(lambda: all(each.status().leader not in (0, was) for each in others), "another leader", START_TIMEOUT_S)
        return f"{old.name} ({was:x}) led, {others[0].status().leader:x} leads"

    def _heal(self) -> None:
        if not isinstance(self.site, OwnsMembers):
            return
        for member in self._members.members:
            if not member.server.alive:
                member.restart()


@FAULTS.entry("lease-revoked", "the leases of a role end under it", victims=ROLES, heals=False, params={"node": ""})
class LeasesRevoked(StoreInjector):
    """The leases of a live role are revoked, as if they had expired."""

    def _inject(self) -> str:
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
