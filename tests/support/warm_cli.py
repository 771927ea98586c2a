"""Commands in processes forked from an interpreter that has everything imported: an environment costs no start.

    cli = WarmCli({"LC_ALL": "C"})
    ended = cli.run(Request(program="elastic", arguments=(b"status",), environ={}, cwd="/", stdout=Stdout.FULL))

What an interpreter decides as it starts is decided there: one WarmCli per locale. Streams are made anew in each child,
as a fresh interpreter makes them from its descriptors.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path

import msgspec

from membership.base.starter import end_with_starter
from tests.support import ROOT

MAX = 1 << 20
PRELOAD = (
    "chaos.cli.main", "elastic.cli.main", "elastic.cli.client", "elastic.cli.doctor", "elastic.cli.rollout",
    "elastic.engine.role", "elastic.gateway.app", "elastic.serve.supervisor", "elastic.demo.model",
    "membership.planning.controller", "workers.agent.agent", "chaos.mutants.hunt", "chaos.mutants.catalogue",
    "chaos.simulation.campaign", "importlib.readers", "encodings.idna",
)  # fmt: skip
SLOW = ("torch", "transformers")
PROGRAMS = {"elastic": "elastic.cli.main", "elastic-chaos": "chaos.cli.main"}


class Stdout(StrEnum):
    """Where a command's output goes."""

    FILE = "file"
    CLOSED = "closed"
    FULL = "full"


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One command, and what it is started in. Its arguments are bytes, as the kernel has them."""

    program: str
    arguments: tuple[bytes, ...]
    environ: dict[str, str]
    cwd: str
    remove_cwd: bool = False
    umask: int = 0o022
    uid: int = 0
    stdout: Stdout = Stdout.FILE
    limit_s: int = 30


class Ended(msgspec.Struct, frozen=True):
    """How it ended: negative is a signal, SIGALRM that it took too long."""

    status: int
    stdout: bytes
    stderr: bytes
    slow_imports: tuple[str, ...]  # what takes seconds to import, and was


class WarmCli:
    """Owns the warm interpreter. A context manager."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.warm_cli", str(theirs.fileno())],
                env={**os.environ, **environ}, cwd=ROOT, pass_fds=[theirs.fileno()],
            )  # fmt: skip

    def run(self, request: Request) -> Ended:
        """Run it to its end."""
        self._link.settimeout(120.0 + request.limit_s)
        self._link.send(msgspec.msgpack.encode(request))
        return msgspec.msgpack.decode(self._link.recv(MAX), type=Ended)

    def close(self) -> None:
        """End it."""
        self._link.close()
        self._process.wait(timeout=60.0)


def serve(link: socket.socket) -> None:
    """Fork for each request until the other end is closed."""
    for name in PRELOAD:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    while data := link.recv(MAX):
        request = msgspec.msgpack.decode(data, type=Request)
        out, err, slow = (os.memfd_create(name) for name in ("out", "err", "slow"))
        pid = os.fork()
        if pid == 0:
            link.close()
            _run(request, out, err, slow)
        _, status = os.waitpid(pid, 0)
        ended = Ended(
            os.waitstatus_to_exitcode(status), _all(out), _all(err), tuple(_all(slow).decode().split())
        )  # fmt: skip
        link.send(msgspec.msgpack.encode(ended))


def _all(file: int) -> bytes:
    with open(file, "rb") as opened:
        opened.seek(0)
        return opened.read()[: MAX // 4]


def _run(request: Request, out: int, err: int, slow: int) -> None:
    """In the child: never returns."""
    status = 70
    try:
        signal.alarm(request.limit_s)
        _enter(request, out, err)
        sys.argv = [request.program, *map(os.fsdecode, request.arguments)]
        main: Callable[[], None] = importlib.import_module(PROGRAMS[request.program]).main
        main()
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:  # noqa: BLE001 - the last frame of a process
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream and stream.flush()
            except OSError:
                status = 120  # as the interpreter has it
        os.write(slow, " ".join(name for name in SLOW if name in sys.modules).encode())
        os._exit(status)


def _enter(request: Request, out: int, err: int) -> None:
    os.environ.clear()
    os.environ.update(request.environ)
    os.umask(request.umask)
    os.chdir(request.cwd)
    if request.remove_cwd:
        Path(request.cwd).rmdir()
    encoding, errors = sys.stdout.encoding, sys.stdout.errors
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(err, 2)
    sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    if request.stdout is Stdout.CLOSED:
        os.close(1)
        sys.stdout = None  # type: ignore[assignment]
    else:
        os.dup2(out if request.stdout is Stdout.FILE else os.open("/dev/full", os.O_WRONLY), 1)
        sys.stdout = open(1, "w", encoding=encoding, errors=errors, closefd=False)  # noqa: SIM115
    if request.uid:
        os.setgroups([])
        os.setresgid(request.uid, request.uid, request.uid)
        os.setresuid(request.uid, request.uid, request.uid)


if __name__ == "__main__":
    end_with_starter()
    serve(socket.socket(fileno=int(sys.argv[1])))
