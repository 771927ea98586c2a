"""`elastic serve`: a whole cluster on one machine. A supervisor that owns etcd and one process per role.

It only starts, watches and stops processes; the controller decides about ranks. A process that dies is started again.
When the supervisor itself dies, all of them end (`membership/base/starter.py`; etcd by parent-death signal).
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import httpx
import msgspec
import structlog

from elastic.serve import chaos_mode, join_secret
from elastic.serve.api_keys import all_keys
from elastic.serve.cluster_config import cluster_config
from elastic.serve.etcd_server import EtcdServer
from elastic.serve.gpus import cpu_torch
from elastic.serve.listening import Listeners, listening, most_connections, urls_of
from elastic.serve.load_bar import LoadBar, RankLoad
from elastic.serve.log_stream import LogStream
from elastic.serve.options import DEFAULT_RANKS, ServeOptions
from elastic.serve.origins import origins_of
from elastic.serve.predecessor import Predecessor
from elastic.serve.role_fork import WaitingProcess
from elastic.serve.role_main import STORE_SEEN, Stop, StopSignal, reach_store
from elastic.serve.role_process import RoleProcess, revoke_leases
from elastic.serve.roles import Roles
from elastic.serve.state_dir import ClusterAddress, StateDir, home
from elastic.serve.store_guard import StoreGuard
from elastic.serve.stored_config import require_no_secret, write_config
from elastic.serve.tls import authorities, certificates_of, pinned
from elastic.serve.tokens import admin_token, read_admin_token
from elastic.serve.trace_export import require_no_sdk
from membership.base import descriptors, rotation
from membership.base.attempts import Attempts
from membership.base.enums import Device
from membership.base.errors import ConfigError, ElasticError, StoreError, StoreReplaced, WaitTimeout
from membership.base.events import EventLog, Tail
from membership.base.failpoints import HISTORY_ENV
from membership.base.logs import configure, write_line
from membership.base.network import Network, ports_of
from membership.base.run_dir import ENV as RUN_DIR_ENV
from membership.base.run_dir import make_run_dir, remove_run_dir, run_dir, sweep
from membership.base.timing import STABLE_S
from membership.placement.plan import thin_spread
from membership.store.credentials import NO_CREDENTIALS
from membership.store.endpoints import require_listener
from membership.store.interface import Store
from membership.store.keys import Keys, state_from
from membership.store.records import ClusterState
from workers.agent.preload import WORKER_CLASS, preload_for
from workers.agent.zygote import Zygote
from workers.ipc.cpu_priority import run_in_short_turns
from workers.model.content import stamp_files
from workers.queue.network import join_key, join_keys, require_reachable

T = TypeVar("T")
log = structlog.get_logger(__name__)

# As they are started. The standby engine has everything imported: streams do not wait for a process to start.
STOP_S = {"controller": 5.0, "agent": 15.0, "engine": 5.0, "engine-standby": 5.0, "gateway": 5.0}  # and its streams'
# So that requests can end: either engine may be the one in office.
STOPPED_TOGETHER = (("gateway",), ("engine", "engine-standby"), ("agent", "controller"))
# Where other hosts go on: its ranks are handed over while all roles are there to do it.
LEFT_TOGETHER = (("agent",), ("gateway",), ("engine", "engine-standby"), ("controller",))
MAYBE_MEMORY = ", perhaps for want of memory (in a pod: `kubectl describe pod` says OOMKilled; fewer ranks need less)"
PAUSE_S = 0.1  # between two turns that cannot even look at the processes
TROUBLES = {"rank_load_failed", "rank_prepare_failed", "rank_quarantined", "forkserver_ready"}


@dataclass(frozen=True)
class Readiness:
    """What the gateway says: whether it is ready, else what is missing, and how far ranks have loaded."""

    ready: bool = False
    missing: str = ""
    loads: tuple[RankLoad, ...] = ()

    def advanced(self, before: Readiness) -> bool:
        """Whether some rank has more bytes than it had."""
        had = {load.rank: load.bytes for load in before.loads}
        return any(load.bytes > had.get(load.rank, 0) for load in self.loads)


class Supervisor:
    """Starts, watches and stops etcd and the role processes. Use as a context manager; `run` until `stop` is set."""

    def __init__(self, options: ServeOptions, stop: Stop | None = None) -> None:
        """`stop`: ends the wait for etcd; once asked to hurry, what is being stopped is given less time."""
        self._stamps = stamp_files(options.model)
        self.config = cluster_config(options)
        if options.device is Device.CUDA and (reason := cpu_torch()):
            raise ConfigError(f"--device cuda: {reason}", hint="install a build of torch for GPUs, or use --device cpu")
        if not options.etcd and options.credentials() != NO_CREDENTIALS:
            hint = "name that etcd with --etcd, or leave out --etcd-ca, --etcd-cert, --etcd-key and --etcd-user"
            raise ConfigError("there are credentials for an etcd, but no --etcd", hint=hint)
        if options.etcd:
            options.credentials().check(secure=options.etcd[0].startswith("https:"))
        admin_token(options.admin_token)
        if options.admin_token_file is not None:
            read_admin_token(options.admin_token_file)
        all_keys(options.api_key, options.api_key_file)  # what a gateway would refuse is refused now
        certificates_of(options)
        origins_of(options)
        self._certificate = str(options.ssl_certfile.absolute()) if options.ssl_certfile else ""
        self.options = options
        self.ranks = options.ranks or DEFAULT_RANKS
        self.state = StateDir(options.state_dir or home() / self.config.cluster)
        self.keys = Keys(self.config.cluster)
        self.node = os.environ.get("ELASTIC_NODE") or socket.gethostname()
        require_node(options.only_on, self.node)
        self.etcd: EtcdServer | None = None
        self._attempts = Attempts("supervisor", also=(ElasticError,))
        self._store: Store | None = None
        self._listeners: Listeners | None = None
        self._urls: tuple[str, ...] = ("", "")
        self._roles = Roles(
            self._attempts,
            on_start=self._on_role_start,
            on_started=self._on_role_started,
            on_died=self._on_role_died,
        )
        self._pause = threading.Event()
        self._stop = stop or Stop()
        self._hurry = self._stop.hurry
        self._environment: dict[str, str] = {}
        self._network: Network | None = None
        self._network_flags: list[str] = []  # of the roles that other hosts reach
        self._zygote: Zygote | None = None
        self._waiting: dict[str, WaitingProcess] = {}
        self._opened = ExitStack()
        self._events = EventLog(self.state.events, "supervisor", limit=options.limit)
        self._history = Tail(self.state.events)

    # -- start and stop ------------------------------------------------------------------------------------------

    def __enter__(self) -> Supervisor:
        with ExitStack() as opened:
            self._listeners = opened.enter_context(listening(self.options))
            self._urls = urls_of(self._listeners, tls=self._certificate != "")
            self.state.claim()
            opened.callback(self.state.release)
            killed = self._predecessor()
            for _ in self._troubles():
                continue  # those of an earlier run
            run = make_run_dir(run_dir(self.state.path))
            opened.callback(remove_run_dir, run)
            sweep(run, newborn_s=0.0)  # what an earlier run left that was killed
            self._environment = {**chaos_mode.begin(self.state, self.options.chaos), RUN_DIR_ENV: str(run)}
            opened.callback(self.state.failpoints.unlink, missing_ok=True)
            self._check_network()
            self._start(opened, killed)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop everything in the order that lets requests finish: gateway, engine, ranks, etcd."""
        self._opened.close()

    def _stop_roles(self) -> None:
        if self._listeners is not None:
            self._listeners.close()  # the gateway has them until its requests have ended
        grace_s = {**STOP_S, "gateway": STOP_S["gateway"] + self.options.stop_grace_s}
        together: tuple[tuple[str, ...], ...] = STOPPED_TOGETHER
        if self._network is not None and self._serves_elsewhere():
            together = LEFT_TOGETHER
            grace_s["agent"] += self.options.drain_grace_s
            say("handing this host's ranks over to the others (Ctrl-C again: at once)")
        self._roles.stop(together, grace_s, self._hurry)

    def _serves_elsewhere(self) -> bool:
        """Whether ranks of other hosts can take over from ours."""
        try:
            state = self._state()
        except StoreError as error:
            log.warning("hosts_unknown", error=str(error))
            return False
        members = state.view.members if state.view is not None else ()
        staying = {node for node, agent in state.agents.items() if not agent.leaving} - {self.node}
        return any(member.node in staying for member in members)

    def _state(self) -> ClusterState:
        if self._store is None:
            return ClusterState(revision=0)
        revision, items = self._store.range(self.keys.prefix)
        return state_from(items, revision)

    def _awaited(self, attempt: Callable[[], T]) -> T:
        return reach_store(attempt, self._stop, self.options.etcd_wait_s)

    def _stop_etcd(self) -> None:
        if self.etcd is not None:
            if self._hurry.is_set() and self.etcd.started:
                self.etcd.kill()
            self.etcd.stop()

    def _log_files(self) -> dict[str, Path]:
        etcd = {} if self.options.etcd else {"etcd": EtcdServer.log_in(self.state.etcd_data)}
        return {**{name: self.state.log(name) for name in STOP_S}, **etcd}

    def _predecessor(self) -> Predecessor | None:
        """The server that was killed here, if the last one was."""
        left = self.state.left_behind()
        if left is None:
            return None
        say(f"the last server here was killed{MAYBE_MEMORY}")
        return Predecessor(left, self.node, run_dir(self.state.path))

    def _start(self, opened: ExitStack, killed: Predecessor | None) -> None:
        endpoints = self.options.etcd
        if endpoints:
            self._awaited(partial(require_listener, endpoints))  # connected only once all are forked
        else:
            self.etcd = EtcdServer(self.state.etcd_data, sockets=run_dir(self.state.path))
        environ = {**os.environ, **self._environment, HISTORY_ENV: str(self.state.events)}  # an agent's, for its ranks
        preload = preload_for(WORKER_CLASS, self.config.model, self.config.dtype)
        self._zygote = Zygote(preload, environ, self.state.log("agent"))  # at its imports while the others start
        opened.callback(self._zygote.close)
        self._fork_roles(opened)  # before there are more threads
        if self.options.log_stdout:
            opened.callback(LogStream(self._log_files(), sys.stdout.fileno()).close)
        if self.etcd is not None:
            opened.callback(self._stop_etcd)
            self.etcd.start()
            endpoints = (self.etcd.url,)
        self._store = self._awaited(self.address(endpoints).connect)
        opened.callback(self._store.close)
        if self.options.advertise and not self._network:
            self._make_secret(self._store)
        if self._network is not None:
            require_reachable(self._state(), self.node, self._network)
        ours = join_keys(self._network)
        self.config, self.ranks = write_config(self._store, self.config, self.options, say, killed, self.node, ours)
        opened.callback(self._stop_roles)
        for name in STOP_S:
            self._roles.add(self._role(name, endpoints))
        self._roles.start_due()
        self.state.publish(self.address(endpoints))
        guard = StoreGuard(self._store, self.keys.config, lambda replaced: self._on_replaced(replaced, endpoints))
        opened.callback(guard.close)

    def _fork_roles(self, opened: ExitStack) -> None:
        for name in STOP_S:
            try:
                self._waiting[name] = WaitingProcess()
            except OSError as error:  # each role gets an interpreter of its own
                log.warning("role_not_forked", name=name, error=str(error))
                return
            opened.callback(self._waiting[name].close)

    # -- watching --------------------------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Watch the processes until `stop` is set: reap, revoke, restart."""
        while not stop.is_set():
            self.tick()

    def wait_ready(
        self,
        stop: threading.Event,
        on_progress: Callable[[str], None] = lambda _: None,
        on_load: Callable[[tuple[RankLoad, ...]], None] = lambda _: None,
    ) -> None:
        """Watch until the gateway reports ready; WaitTimeout names what is missing.

        The time begins anew whenever a rank has loaded more: a model may take as long as its disk takes.
        """
        deadline = time.monotonic() + self.options.ready_timeout_s
        seen = Readiness(missing="the gateway does not answer")
        troubles: dict[str, None] = {}  # an ordered set
        while not stop.is_set():
            self.tick()
            for trouble in self._troubles():
                if trouble not in troubles:
                    troubles[trouble] = None
                    on_progress(trouble)
            before, seen = seen, self._readiness()
            on_load(seen.loads)
            if seen.ready:
                return
            if seen.missing != before.missing:
                on_progress(f"not ready yet: {seen.missing}")
            if seen.advanced(before):
                deadline = time.monotonic() + self.options.ready_timeout_s
            if time.monotonic() > deadline:
                words = "; ".join(
                    [*list(troubles)[-1:], *(f"{r.name}: {r.last_words()}" for r in self._roles if r.early_deaths)]
                )
                raise WaitTimeout(
                    f"not ready within {self.options.ready_timeout_s:.0f} s: {seen.missing}. {words}",
                    hint=f"see {self.state.log('*')}",
                )

    def tick(self) -> None:
        """Check every process once; returns within a quarter of a second, or at once when one dies.

        What cannot be done, for want of a descriptor, memory or a disk, is tried again, and holds up nothing else.
        """
        if not self._attempts.run(self._roles.turn, "roles"):
            self._pause.wait(PAUSE_S)
        if self._zygote is not None:
            self._attempts.run(self._zygote.tend, "zygote")
        if self.etcd is not None and not self.etcd.alive:
            self._attempts.run(self._restart_etcd, "start of etcd")
        self._attempts.run(self._limit_logs, "rotation of logs")

    def _limit_logs(self) -> None:
        logs = [role.log_path for role in self._roles] + ([self.etcd.log_path] if self.etcd is not None else [])
        for path in dict.fromkeys(logs):
            rotation.empty(path, self.options.limit)

    def _restart_etcd(self) -> None:
        """Serving goes on without etcd, so a failed start is only retried later."""
        self._events.emit("etcd_died", cluster=self.config.cluster)
        log.warning("etcd_died")
        if self.etcd is not None:
            self.etcd.restart()

    def _on_replaced(self, replaced: StoreReplaced, endpoints: tuple[str, ...]) -> None:
        """The store lost data. Roles refuse it by themselves; this reports it in the log and to client commands."""
        log.error("store_replaced", error=str(replaced), hint=replaced.hint)
        self._events.emit("store_replaced", cluster=self.config.cluster, error=str(replaced))
        trouble = f"{replaced}: {replaced.hint}"
        self.state.publish(msgspec.structs.replace(self.address(endpoints), trouble=trouble))

    def _on_role_died(self, role: RoleProcess, pid: int, reason: str) -> None:
        log.warning("role_died", name=role.name, pid=pid, reason=reason)
        self._events.emit("role_died", cluster=self.config.cluster, name=role.name, pid=pid, reason=reason)
        if self._store is not None:
            revoke_leases(self._store, self.keys.prefix, pid, self.node)

    def _on_role_start(self, role: RoleProcess) -> None:
        if self._store is not None:
            role.environment[STORE_SEEN] = self._store.seen

    def _on_role_started(self, role: RoleProcess) -> None:
        pid = role.process.pid if role.process else 0
        self._events.emit("role_started", cluster=self.config.cluster, name=role.name, pid=pid)

    # -- details ---------------------------------------------------------------------------------------------------

    def address(self, endpoints: tuple[str, ...]) -> ClusterAddress:
        """What client commands need to know."""
        token_file = self.options.admin_token_file
        return ClusterAddress(
            cluster=self.config.cluster,
            etcd=endpoints,
            credentials=self.options.credentials(),
            url=self._urls[0],
            admin_url=self._urls[1],
            certificate=self._certificate,
            admin_token="" if token_file else self.options.admin_token,
            admin_token_file=str(token_file.absolute()) if token_file else "",
            pid=os.getpid(),
            model=self.config.model,
            files=self.config.files,
            stamps=self._stamps,
        )

    def _role(self, name: str, endpoints: tuple[str, ...]) -> RoleProcess:
        command = name.removesuffix("-standby")
        arguments = [command, "--etcd", ",".join(endpoints), "--cluster", self.config.cluster]
        arguments += ["--state-dir", str(self.state.path), *self.options.credentials().as_flags()]
        arguments += ["--log-max-mb", str(self.options.log_max_mb), "--log-keep", str(self.options.log_keep)]
        arguments += ["--node", self.node, *self._network_flags]
        arguments += self._gateway_arguments() if name == "gateway" else []
        secrets: dict[str, str] = {}
        if name == "gateway":
            secrets = self.options.passed_on()[1] | {"ELASTIC_ADMIN_TOKEN": self.options.admin_token}
        if name in ("agent", "gateway") and self._network:
            arguments += ["--model", str(self.options.model.absolute())]
        if name == "agent":
            grace_s = self.options.drain_grace_s if self._network else 0.0  # alone it ends with everything else
            arguments += ["--spares", str(self.options.spares), "--drain-grace", f"{grace_s:.3f}s"]
            arguments += ["--capacity", str(self.options.capacity)] if self.options.capacity else []
            arguments += ["--machine", self.options.machine] if self.options.machine else []
            arguments += ["--zone", self.options.zone] if self.options.zone else []
            arguments += ["--allow-kill"] if self.options.allow_kill or self.options.chaos else []
        stable_s = min(STABLE_S, self.options.restart_window_s)  # a death that does not count for ranks does not here
        return RoleProcess(
            name, arguments, self.state.log(name), environment={**self._environment, **secrets}, stable_s=stable_s,
            forkserver=self._zygote.forkserver if self._zygote is not None and name == "agent" else None,
            listeners=self._listeners if name == "gateway" else None, waiting=self._waiting.get(name),
        )  # fmt: skip

    def _check_network(self) -> None:
        """Of the roles that other hosts reach, if there is a join secret. ConfigError: it is no good."""
        options, file = self.options, self.options.join_secret_file
        if not options.advertise:
            return
        if not options.etcd:
            hint = "start an etcd of your own, and name it with --etcd on all hosts"
            raise ConfigError("--advertise without --etcd: other hosts cannot reach the embedded etcd", hint=hint)
        ports_of(options.port_range)
        join_secret.require_ours(options.advertise)
        if file is None and not os.environ.get(join_secret.ENV):
            file = join_secret.made_secret(self.state.path)
        if file is not None or os.environ.get(join_secret.ENV):
            self._join(file)

    def _make_secret(self, store: Store) -> None:
        """The first host makes it. ConfigError: this is another one."""
        require_no_secret(store, self.keys, self.node)
        file = join_secret.make_secret(self.state.path)
        say(f"other hosts join with the secret in {file}")
        self._join(file)

    def _join(self, file: Path | None) -> None:
        """Have roles reached by other hosts. ConfigError now, not by a role."""
        options = self.options
        self._network = join_secret.network_of(options.advertise, file, self.config.cluster, options.port_range)
        self.config = msgspec.structs.replace(self.config, join_key=join_key(self._network))
        named = ["--join-secret-file", str(file.absolute())] if file is not None else []
        ports = ["--port-range", options.port_range] if options.port_range else []
        self._network_flags = ["--advertise", options.advertise, *ports, *named]

    def _gateway_arguments(self) -> list[str]:
        most = self.options.max_connections
        limit = ["--max-connections", str(most)] if most is not None else []
        return ["--stop-grace", f"{self.options.stop_grace_s:.3f}s", *limit, *self.options.passed_on()[0]]

    def _troubles(self) -> Iterator[str]:
        """Errors that keep ranks from getting ready, since the last call."""
        while (events := self._history.read()) is not None:
            for event in events:
                error = event.fields.get("error") or event.fields.get("reason")
                if event.kind in TROUBLES and error:
                    yield str(error)

    def _readiness(self) -> Readiness:
        try:
            url = self.address(()).url
            verify = pinned(self._certificate) if self._certificate else authorities(url)
            answer = httpx.get(f"{url}/readyz", timeout=2.0, trust_env=False, verify=verify)
            if answer.status_code == 200:
                return Readiness(ready=True)
            found = answer.json()
            loads = msgspec.convert(found.get("loading", []), tuple[RankLoad, ...])
            return Readiness(missing="; ".join(str(r) for r in found.get("reasons") or [answer.text]), loads=loads)
        except (httpx.HTTPError, OSError, ValueError, AttributeError, ConfigError):
            # OSError: no descriptor to be had. The last two: it is not our gateway that answers there.
            return Readiness(missing="the gateway does not answer")


def require_node(wanted: str, node: str) -> None:
    """ConfigError on a node of another name."""
    if wanted and node != wanted:
        raise ConfigError(
            f"this is {node}, and only {wanted} serves: a second one would be a cluster of its own",
            hint="a StatefulSet has replicas: 1 here; for more ranks: elastic scale N",
        )


def run_serve(options: ServeOptions) -> None:
    """Serve until SIGTERM or Ctrl-C; print on stderr what is awaited and the addresses."""
    configure("supervisor")
    require_no_sdk()
    chaos_mode.check(options.chaos)
    run_in_short_turns()  # etcd and all roles inherit it, as they do the limit of open files
    most_connections(descriptors.raise_limit(), options.max_connections)  # what a gateway would refuse is refused now
    with StopSignal() as stop, Supervisor(options, stop) as supervisor:
        where, name = supervisor.address(()), supervisor.config.served_model_name
        if options.chaos:
            say(chaos_mode.WARNING.format(supervisor.state.failpoints))
        say(f"starting {supervisor.config.cluster} with {supervisor.ranks} ranks; state in {supervisor.state.path}")
        if unmet := thin_spread(supervisor.config.redundancy, supervisor.ranks):
            say(unmet)
        with LoadBar() as bar:
            supervisor.wait_ready(stop, on_progress=say, on_load=bar.show)
        if not stop.is_set():
            say(f"ready: OpenAI API at {where.url}/v1, model {name!r}, admin at {where.admin_url}")
        supervisor.run(stop)
        say("stopping")


def say(line: str) -> None:
    """A line for the person at the terminal, if there still is one; stdout stays for data."""
    write_line(sys.stderr, line)
