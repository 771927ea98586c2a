"""Where a campaign runs: a cluster on this machine, or a deployment that is only known by its admin API."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import httpx
import msgspec
import psutil

from chaos.faults import step
from chaos.faults.base import Injector, NotInjected, Params, Site
from chaos.faults.catalogue import injector
from chaos.faults.site import ServedSite
from chaos.record.record import Header
from chaos.record.recorder import Recorder
from chaos.scenarios.script import CHAOS
from chaos.target.cluster import Cluster
from elastic.cli.client import AdminClient, Client
from elastic.serve.api_keys import client_headers
from elastic.serve.tls import authorities
from membership.base.errors import ConfigError, ElasticError, NoAnswer, StoreUnavailable
from membership.base.events import Event, Tail
from membership.store.interface import Store

PROBE_S = 5.0
BY_FAILPOINT = {"kill": "kill", "segv": "segv"}  # faults by a signal that a failpoint's action injects just as well
REMOTE_FAULTS = (*BY_FAILPOINT, *step.FAULTS)


class Target(Protocol):
    """What a campaign needs of a cluster."""

    @property
    def url(self) -> str:
        """Base URL of its API."""

    @property
    def client(self) -> Client:
        """Its operations."""

    @property
    def site(self) -> Site:
        """What injectors may know of it."""

    @property
    def chaos(self) -> bool:
        """Whether failpoints can be armed while it serves."""

    def model(self) -> str:
        """Name of the model that it serves."""

    def events(self) -> list[Event]:
        """What has been added to the history since the last time."""

    def injector(self, fault: str, site: Site, victim: str, params: Params) -> Injector:
        """The injector of this fault here; it uses `site`."""

    def unable(self, fault: str, victim: str, needs: Collection[str]) -> str:
        """Why this fault, with what it needs, cannot be injected here; "" if it can."""

    def settled(self, status: Mapping[str, Any]) -> bool:
        """Whether the processes that it names are alive: the cluster may not have noticed a death yet."""

    def recorder(self, what: str, seed: int, replay: str, *, watched: bool) -> AbstractContextManager[Recorder]:
        """A context manager with the record of a run. `watched`: it also follows the store, where it can be reached."""

    def close(self) -> None:
        """Release the connections."""


class LocalTarget:
    """A cluster on this machine: faults are injected into its processes."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.site: Site = ServedSite(cluster)
        self._tail = Tail(cluster.state.events)

    @property
    def url(self) -> str:
        return self.cluster.url

    @property
    def client(self) -> Client:
        return self.cluster.client()

    @property
    def chaos(self) -> bool:
        """Whether it was served with --chaos."""
        return self.cluster.state.failpoints.exists()

    def model(self) -> str:
        return self.cluster.model_name()

    def events(self) -> list[Event]:
        found: list[Event] = []
        while (more := self._tail.read()) is not None:
            found += more
        return found

    def injector(self, fault: str, site: Site, victim: str, params: Params) -> Injector:
        return injector(fault, site, victim, params)

    def unable(self, fault: str, victim: str, needs: Collection[str]) -> str:
        """Failpoints need a cluster that reads them from a file."""
        if CHAOS in needs and not self.chaos:
            return "failpoints are off; serve it with --chaos, or leave this step out"
        return ""

    def settled(self, status: Mapping[str, Any]) -> bool:
        """Whether all of its ranks, its engine and its agents live: a dead agent's ranks are about to end."""
        state = self.cluster.client().state()
        if state.engine is None or not state.agents:
            return False
        pids = [state.engine.pid, *(agent.pid for agent in state.agents.values())]
        return all(pid and is_alive(pid) for pid in (*pids, *(each["pid"] for each in status["ranks"])))

    @contextmanager
    def recorder(self, what: str, seed: int, replay: str, *, watched: bool) -> Iterator[Recorder]:
        """The record; it follows the store if it is `watched`."""
        recorder = Recorder.of(self.cluster, what=what, seed=seed, replay=replay)
        with recorder if watched else nullcontext():
            yield recorder

    def close(self) -> None:
        self.cluster.close()


class RemoteTarget:
    """A deployment on other machines: its admin API is all there is. Faults of its ranks go through failpoints."""

    def __init__(self, url: str, client: AdminClient) -> None:
        self.url = url
        self.client: Client = client
        self._admin = client
        self._lock = threading.Lock()
        self._seen = 0  # events that `events` has returned
        self._all: list[Event] = []
        self._stop = threading.Event()
        self.site: Site = RemoteSite(self)
        self.chaos = in_chaos_mode(client)
        self._follower = threading.Thread(target=self._follow, name="events", daemon=True)
        self._follower.start()

    def _follow(self) -> None:
        """Take in events as they come. If the gateway dies, ask again and skip what is known.

        The other gateway may have fewer of the old ones: known is an event by its content, not by its number.
        """
        known: set[bytes] = set()
        while not self._stop.is_set():
            try:
                for event in self._admin.events(True, self._stop):
                    content = msgspec.json.encode(event)
                    if content not in known:
                        known.add(content)
                        with self._lock:
                            self._all.append(event)
            except NoAnswer:
                self._stop.wait(0.5)

    def model(self) -> str:
        try:
            answer = httpx.get(f"{self.url}/v1/models", headers=client_headers(), timeout=PROBE_S, trust_env=False)
            answer.raise_for_status()
            return str(answer.json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            hint = "is it the URL of an OpenAI-compatible API?"
            raise ConfigError(f"{self.url} names no model: {error}", hint=hint) from error

    def history(self) -> list[Event]:
        with self._lock:
            return list(self._all)

    def events(self) -> list[Event]:
        with self._lock:
            new, self._seen = self._all[self._seen :], len(self._all)
        return new

    def arm(self, failpoints: str) -> None:
        self._admin.arm(failpoints)

    def injector(self, fault: str, site: Site, victim: str, params: Params) -> Injector:
        """A failpoint in the rank's next step; NotInjected if that cannot be done."""
        if why := unable_remotely(fault, victim):
            raise NotInjected(why)
        if fault in BY_FAILPOINT:
            return step.AtStep(fault, step.POINT, BY_FAILPOINT[fault], site, victim, {"times": 1})
        return step.FAULTS[fault].injector(site, victim, params)

    def unable(self, fault: str, victim: str, needs: Collection[str]) -> str:
        """Only ranks, and only what a failpoint can do."""
        if not self.chaos:
            return "faults of a remote deployment go through its failpoints, which are off; serve it with --chaos"
        return unable_remotely(fault, victim)

    def settled(self, status: Mapping[str, Any]) -> bool:
        """Nothing more is known than what it says."""
        return True

    @contextmanager
    def recorder(self, what: str, seed: int, replay: str, *, watched: bool) -> Iterator[Recorder]:
        """The record of what the run itself sees: the store is out of reach."""
        now, status = time.time(), self.client.status()
        header = Header(
            what=what, seed=seed, replay=replay, cluster=status["cluster"], started=now,
            wall=now - time.monotonic(), ranks=status["desired"],
        )  # fmt: skip
        recorder = Recorder(_no_store, header)
        yield recorder
        recorder.happened(self.history())

    def close(self) -> None:
        self._stop.set()
        self._follower.join(PROBE_S)


def _no_store() -> Store:
    raise StoreUnavailable("the store of a remote deployment is out of reach")


class RemoteSite:
    """What injectors may know of a remote deployment."""

    def __init__(self, target: RemoteTarget) -> None:
        self._target = target

    def pid(self, victim: str) -> int:
        raise NotInjected(f"{victim} is on another machine", hint="give --state-dir, if it is served from this one")

    def arm(self, failpoints: str) -> None:
        self._target.arm(failpoints)

    def events(self) -> list[Event]:
        return self._target.history()

    def state_dir(self) -> Path:
        raise NotInjected("its state directory is on another machine")

    def url(self) -> str:
        return self._target.url


def unable_remotely(fault: str, victim: str) -> str:
    """Why this fault cannot be injected on another machine; "" if it can."""
    if not victim.startswith("rank "):
        return f"{victim} is on another machine; only ranks can have faults there, or give --state-dir"
    if fault not in REMOTE_FAULTS:
        return f"{fault} needs its machine; on another one there are {', '.join(REMOTE_FAULTS)}"
    return ""


def in_chaos_mode(client: AdminClient) -> bool:
    """Whether it was served with --chaos."""
    try:
        client.failpoints()
    except NoAnswer:
        raise
    except ElasticError:
        return False
    return True


def unready(url: str) -> str:
    """Why the deployment answers no requests now; "" if it does."""
    try:
        answer = httpx.get(f"{url}/readyz", timeout=PROBE_S, trust_env=False, verify=authorities(url))
        return "" if answer.is_success else "; ".join(map(str, answer.json().get("reasons") or [answer.text]))
    except (httpx.HTTPError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
