"""A real cluster for a scenario: served from this machine, or by `elastic serve` as a child process of ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from chaos.target.waiting import until
from chaos.target.warm_start import WarmProcess, WarmStart
from elastic.cli.client import StoreClient, wait_for
from elastic.serve.etcd_server import free_ports
from elastic.serve.state_dir import ClusterAddress, StateDir
from elastic.serve.tls import authorities
from membership.base import starter
from membership.base.errors import ElasticError
from membership.base.events import Event, EventLog, Tail
from membership.operations.change import Change, scale
from membership.store.interface import Store
from membership.store.records import Operation, Phase

STATUS_POLL_S = 0.05


class Cluster:
    """A cluster that is being served from this machine, known by its state directory."""

    def __init__(self, state: StateDir) -> None:
        self.state = state
        self._store: Store | None = None
        self._connecting = threading.Lock()

    def close(self) -> None:
        """Let go of the store."""
        if self._store is not None:
            self._store.close()

    @property
    def address(self) -> ClusterAddress:
        """Where it is."""
        return self.state.address()

    @property
    def url(self) -> str:
        """Base URL of the OpenAI-compatible API."""
        return self.state.address().url

    @property
    def pid(self) -> int:
        """Process id of the supervisor."""
        return self.state.address().pid

    def client(self) -> StoreClient:
        """Client of the cluster's store; connects on first use."""
        address = self.address
        with self._connecting:
            if self._store is None:
                self._store = address.connect()
        return StoreClient(self._store, address.cluster, self.state.events)

    def status(self) -> dict[str, Any]:
        """The status document."""
        return self.client().status()

    def model_name(self) -> str:
        """Name under which the model is served."""
        config = self.client().state().config
        return config.served_model_name if config else ""

    def events(self) -> list[Event]:
        """The history so far."""
        return EventLog.read(self.state.events)

    def wait_serving(
        self, ranks: int, timeout_s: float = 120.0, notify: Callable[[str], None] = lambda _: None
    ) -> dict[str, Any]:
        """Wait until requests are answered by exactly `ranks` serving ranks, none of them masked; the status then."""
        last = ""

        def serving() -> dict[str, Any] | None:
            nonlocal last
            self.require_alive()
            if not (self.state.path / "cluster.json").exists():
                return None
            status = self.status()
            states = [rank["state"] for rank in status["ranks"]]
            now = f"{status['state']}, ranks {', '.join(states) or 'none yet'}"
            if status["state"] == "serving" and states.count("serving") == ranks == len(states):
                if self._gateway_ready():
                    return status
                now += ", no gateway ready"
            if now != last:
                last = now
                notify(now)
            return None

        what = f"serving with {ranks} ranks; see {self.state.path}/logs; last seen: "
        return until(serving, lambda: what + last, timeout_s, poll_s=STATUS_POLL_S)

    def _gateway_ready(self) -> bool:
        try:
            return httpx.get(
                f"{self.url}/readyz", timeout=2.0, trust_env=False, verify=authorities(self.url)
            ).is_success
        except httpx.HTTPError:
            return False

    def scale(self, target: int, timeout_s: float = 120.0) -> Operation:
        """Scale and wait for the end; ElasticError if it was rolled back."""
        return self.change(scale(target), timeout_s)

    def change(self, change: Change, timeout_s: float = 120.0) -> Operation:
        """Have a change made and wait for the end; ElasticError if it was rolled back."""
        client = self.client()
        operation = client.propose(change, op_id=None, if_epoch=None, timeout_s=timeout_s)
        *_, operation = wait_for(client, operation, timeout_s + 10.0, threading.Event())
        if operation.phase is not Phase.DONE:
            raise ElasticError(f"{change} ended {operation.phase}: {operation.error}")
        return operation

    def wait_event(self, wanted: Callable[[Event], bool], what: str, timeout_s: float = 60.0) -> Event:
        """The first event that `wanted` accepts."""
        tail = Tail(self.state.events)
        return until(lambda: next(filter(wanted, tail.read() or ()), None), f"the event {what}", timeout_s)

    def require_alive(self) -> None:
        """ElasticError if it is served no more."""
        self.state.address()


class ServedCluster(Cluster):
    """Owns an `elastic serve` process, which ends with this one. A context manager: on exit all of it is stopped."""

    def __init__(
        self,
        model: Path,
        ranks: int | None,
        *,
        state_dir: Path | None = None,
        flags: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        ports: tuple[int, int] | None = None,
        warm: WarmStart | None = None,
    ) -> None:
        """`warm`: it is forked from there, which spares it the imports."""
        self.warm = warm
        self._temporary = tempfile.TemporaryDirectory(prefix="elastic-ep-") if state_dir is None else None
        super().__init__(StateDir(state_dir or Path(self._temporary.name if self._temporary else "")))
        self.port, self.admin_port = ports or free_ports(2)
        self._command = [
            sys.executable, "-m", "elastic.cli", "serve", str(model), *([f"--ranks={ranks}"] if ranks else []),
            "--port", str(self.port), "--admin-port", str(self.admin_port), "--state-dir", str(self.state.path), *flags,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | WarmProcess | None = None
        self._output = self.state.path / "serve.log"
        self._environ = {**os.environ, "XDG_STATE_HOME": str(self.state.path / "home"), **(environ or {})}

    def __enter__(self) -> ServedCluster:
        self.state.path.mkdir(parents=True, exist_ok=True)
        environ = {**self._environ, starter.ENV: starter.named()}
        with self._output.open("ab") as out:
            if self.warm is not None:
                self._process = self.warm.start(self._command[3:], environ, out.fileno())
            else:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, env=environ
                )
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=10.0)
        if isinstance(process, WarmProcess):
            process.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def require_alive(self) -> None:
        """ElasticError with its last words if it has ended."""
        if self._process is not None and self._process.poll() is not None:
            said = self._output.read_text(errors="replace", encoding="utf-8").strip().splitlines()[-3:]
            raise ElasticError(f"`elastic serve` ended with code {self._process.returncode}: {' | '.join(said)}")
