"""The cluster that a scenario is played on: one on this machine, or one that is only known by its admin API."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import httpx
import psutil

from chaos.faults.base import Injector, NotInjected, Params, Site
from chaos.faults.catalogue import injector
from chaos.faults.site import ServedSite
from chaos.scenarios.dry_run import CHAOS, needs_of
from chaos.scenarios.script import Blow
from chaos.target import remote
from chaos.target.cluster import Cluster
from elastic.cli.client import AdminClient, Client
from membership.base.errors import ConfigError, ElasticError, NoAnswer
from membership.base.events import Event, Tail

PROBE_S = 5.0


class Stage(Protocol):
    """What a run needs of a cluster."""

    url: str
    client: Client
    site: Site
    chaos: bool  # whether failpoints can be armed while it serves

    def events(self) -> list[Event]:
        """What has been added to the history since the last time."""

    def make(self, fault: str, site: Site, victim: str, params: Params) -> Injector:
        """What deals this fault here; `site` is to be used for it."""

    def unable(self, blow: Blow, victim: str) -> str:
        """Why this fault cannot be dealt here; "" if it can."""

    def settled(self, status: Mapping[str, Any]) -> bool:
        """Whether the processes that it names are alive: the cluster may not have noticed yet."""

    def close(self) -> None:
        """Let go."""


class LocalStage:
    """A cluster on this machine: faults are dealt to its processes."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.url = cluster.url
        self.client: Client = cluster.client()
        self.site: Site = ServedSite(cluster)
        self.chaos = cluster.state.failpoints.exists()
        self._tail = Tail(cluster.state.events)

    def events(self) -> list[Event]:
        """What has been added to the history since the last time."""
        found: list[Event] = []
        while (more := self._tail.read()) is not None:
            found += more
        return found

    def make(self, fault: str, site: Site, victim: str, params: Params) -> Injector:
        """The catalogue's."""
        return injector(fault, site, victim, params)

    def unable(self, blow: Blow, victim: str) -> str:
        """Failpoints need a cluster that reads them from a file."""
        if CHAOS in needs_of(blow) and not self.chaos:
            return "failpoints are off; serve it with --chaos, or leave this step out"
        return ""

    def settled(self, status: Mapping[str, Any]) -> bool:
        """Whether all of its ranks, its engine and its agent live: a dead agent's ranks are about to end."""
        state = self.cluster.client().state()
        if state.engine is None or not state.agents:
            return False
        pids = [state.engine.pid, *(agent.pid for agent in state.agents.values())]
        return all(pid and _lives(pid) for pid in (*pids, *(each["pid"] for each in status["ranks"])))

    def close(self) -> None:
        """Let go of the store."""
        self.cluster.close()


class RemoteStage:
    """A deployment somewhere: its admin API is all there is."""

    def __init__(self, url: str, client: AdminClient) -> None:
        self.url = url
        self.client: Client = client
        self._admin = client
        self._lock = threading.Lock()
        self._new: list[Event] = []
        self._all: list[Event] = []
        self._stop = threading.Event()
        self.site: Site = RemoteSite(self)
        self.chaos = in_chaos_mode(client)
        self._follower = threading.Thread(target=self._follow, name="events", daemon=True)
        self._follower.start()

    def _follow(self) -> None:
        """Take in events as they come; a gateway that is gone is asked again, from where we were."""
        while not self._stop.is_set():
            try:
                for seen, event in enumerate(self._admin.events(True, self._stop), start=1):
                    with self._lock:
                        if seen > len(self._all):
                            self._all.append(event)
                            self._new.append(event)
            except NoAnswer:
                self._stop.wait(0.5)

    def history(self) -> list[Event]:
        """All events so far."""
        with self._lock:
            return list(self._all)

    def events(self) -> list[Event]:
        """What has been added to the history since the last time."""
        with self._lock:
            new, self._new = self._new, []
        return new

    def arm(self, failpoints: str) -> None:
        """Arm these failpoints and no others."""
        self._admin.arm(failpoints)

    def make(self, fault: str, site: Site, victim: str, params: Params) -> Injector:
        """A failpoint in the rank's step."""
        return remote.injector(fault, site, victim, params)

    def unable(self, blow: Blow, victim: str) -> str:
        """Only ranks, and only what a failpoint can do."""
        if not self.chaos:
            return "faults of a remote deployment go through its failpoints, which are off; serve it with --chaos"
        return remote.unable_remotely(blow.fault, victim)

    def settled(self, status: Mapping[str, Any]) -> bool:
        """Nothing more is known than what it says."""
        return True

    def close(self) -> None:
        """Stop following."""
        self._stop.set()
        self._follower.join(PROBE_S)


class RemoteSite:
    """What injectors may know of a deployment that is somewhere else."""

    def __init__(self, stage: RemoteStage) -> None:
        self._stage = stage

    def pid(self, victim: str) -> int:
        """There are no processes of it here."""
        raise NotInjected(f"{victim} is on another machine", hint="give --state-dir, if it is served from this one")

    def arm(self, failpoints: str) -> None:
        """Arm these failpoints and no others."""
        self._stage.arm(failpoints)

    def events(self) -> list[Event]:
        """The history so far."""
        return self._stage.history()

    def state_dir(self) -> Path:
        """There is none of it here."""
        raise NotInjected("its state directory is on another machine")

    def url(self) -> str:
        """Base URL of its API."""
        return self._stage.url


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
    """Why requests are not welcome now; "" if they are."""
    try:
        answer = httpx.get(f"{url}/readyz", timeout=PROBE_S)
        return "" if answer.is_success else "; ".join(map(str, answer.json().get("reasons") or [answer.text]))
    except (httpx.HTTPError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def model_of(url: str) -> str:
    """The name of the model that is served there."""
    try:
        return str(httpx.get(f"{url}/v1/models", timeout=PROBE_S).raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(
            f"{url} names no model: {error}", hint="is it the URL of an OpenAI-compatible API?"
        ) from error


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
