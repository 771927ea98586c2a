"""A process that has the heavy imports done and does nothing but fork: a rank from it is at its first forward at once.

Ours and not multiprocessing's, for three reasons. Every child of multiprocessing's holds the pipe that keeps its
forkserver alive, so that one stopped rank keeps it; it runs the parent's `__main__` again in every child, which for a
console script means importing the CLI; and it cannot pass a pidfd, so a pid may mean another process when we signal it.

The server must stay single-threaded (fork copies one thread; a lock held by another would stay locked for ever), so
nothing with threads may be preloaded: no grpc, no ZeroMQ context, no CUDA. It counts its threads and refuses to serve
otherwise. It ends with its owner: it first gives its children, who see their death pipes close, a moment to go.

This file is the server's side; `workers/agent/forkserver_client.py` is its owner's.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import setproctitle

from workers.ipc.cpu_priority import run_in_usual_turns

MAX_MESSAGE = 256 * 1024
MAX_FDS = 8
CHILDREN_GRACE_S = 2.0
POLL_MS = 60_000
PR_SET_PDEATHSIG = 1
# Threads of libraries that see to it themselves that a fork is safe: jemalloc (which pyarrow brings, and transformers
# imports pyarrow where it is installed) stops its background thread in the child by pthread_atfork.
FORK_SAFE_THREADS = frozenset({"jemalloc_bg_thd"})


class Serve(msgspec.Struct, frozen=True, tag=True):
    """Owner to server, first: import these, then serve."""

    preload: tuple[str, ...]


class Fork(msgspec.Struct, frozen=True, tag=True):
    """Owner to server: run `target` ("module:function") with this payload and the descriptors that came along.

    `outlives`: it has another owner, and goes on when the server ends.
    """

    request: int
    target: str
    payload: bytes
    outlives: bool = False


class Serving(msgspec.Struct, frozen=True, tag=True):
    """Server to owner, once: the imports are done. `error` says why it cannot serve."""

    error: str = ""
    import_s: float = 0.0


class Forked(msgspec.Struct, frozen=True, tag=True):
    """Server to owner: here is the process; its pidfd came along."""

    request: int
    pid: int


class NotForked(msgspec.Struct, frozen=True, tag=True):
    """Server to owner: there is no process, since the machine had none, or no memory or descriptor, to be had."""

    request: int
    error: str


class Exited(msgspec.Struct, frozen=True, tag=True):
    """Server to owner: a child ended; `status` as subprocess.Popen.returncode (negative: the signal)."""

    pid: int
    status: int


ToServer = Serve | Fork
ToOwner = Serving | Forked | NotForked | Exited


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Have the kernel send us `number` (0: nothing) when the parent (the thread that made us) ends; leave if it has."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(1)


_preloaded: set[str] = set()  # in this process, or in the one that it is a fork of


def preload(modules: Sequence[str]) -> None:
    """Import what ranks need, and make ("module:function", a JSON list of its arguments may follow after another colon)
    what would otherwise be made lazily in each of them.

    Without the collector, which would look at all that is imported by then again and again: a fifth of the time.
    """
    gc.disable()
    for entry in modules:
        if entry in _preloaded:
            continue
        _preloaded.add(entry)
        name, _, call = entry.partition(":")
        function, _, arguments = call.partition(":")
        module = importlib.import_module(name)
        if function:
            getattr(module, function)(*msgspec.json.decode(arguments or "[]"))
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
        torch.nn.functional.linear(torch.ones(1, 1), torch.ones(1, 1))
        if torch.cuda.is_initialized():
            raise RuntimeError("the forkserver has initialised CUDA: children could not use the device")
    unsafe = [name for name in _other_threads() if name not in FORK_SAFE_THREADS]
    if unsafe:
        raise RuntimeError(f"the forkserver has threads {unsafe} after importing {', '.join(modules)}: cannot fork")
    gc.enable()
    gc.collect()
    gc.freeze()  # children then do not touch, and so not copy, the pages of what was imported


def _other_threads() -> list[str]:
    """The names of this process's threads, the calling one left out."""
    others = [task for task in Path("/proc/self/task").iterdir() if int(task.name) != os.getpid()]
    return [(task / "comm").read_text(encoding="utf-8", errors="replace").strip() for task in others]


class Server:
    """The forking side: one thread, one poll."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.children: dict[int, int] = {}  # pidfd -> pid
        self.others: set[int] = set()  # pidfds of children that have another owner
        self.poll = select.poll()
        self.poll.register(link.fileno(), select.POLLIN)

    def serve(self) -> None:
        """Fork on request and report ends until the owner is gone."""
        while True:
            for fd, _ in self.poll.poll(POLL_MS):
                if fd in self.children:
                    self._reap(fd)
                elif not self._serve_owner():
                    return self._end_children()

    def _serve_owner(self) -> bool:
        data, fds, flags, _ = socket.recv_fds(self.link, MAX_MESSAGE, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        if not data:
            return False
        request = msgspec.msgpack.decode(data, type=ToServer)
        if isinstance(request, Fork):
            try:
                if flags & socket.MSG_CTRUNC:
                    raise OSError(errno.EMFILE, "no room for its descriptors")
                self._fork(request, fds)
            except OSError as error:  # the children that there are must live on
                self._send(NotForked(request.request, f"cannot fork: {error.strerror}"), [])
        for fd in fds:
            os.close(fd)  # only the child keeps them: a copy here, or in the next child, would hide an end of file
        return True

    def _fork(self, request: Fork, fds: list[int]) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._close_inherited()
            run_child(request, fds, parent)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        self.children[pidfd] = pid
        if request.outlives:
            self.others.add(pidfd)
        self.poll.register(pidfd, select.POLLIN)
        self._send(Forked(request.request, pid), [pidfd])

    def _reap(self, pidfd: int) -> None:
        pid = self.children.pop(pidfd)
        self.others.discard(pidfd)
        self.poll.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self._send(Exited(pid, os.waitstatus_to_exitcode(status)), [])

    def _send(self, message: ToOwner, fds: list[int]) -> None:
        with suppress(BrokenPipeError, ConnectionError):  # the owner is gone: the next receive says so
            socket.send_fds(self.link, [msgspec.msgpack.encode(message)], fds)

    def _close_inherited(self) -> None:
        self.link.close()
        for pidfd in self.children:
            os.close(pidfd)

    def _end_children(self) -> None:
        self.poll.unregister(self.link.fileno())
        deadline = time.monotonic() + CHILDREN_GRACE_S
        while self.children.keys() - self.others and (left := deadline - time.monotonic()) > 0:
            for fd, _ in self.poll.poll(left * 1000):
                self._reap(fd)
        for pidfd in self.children.keys() - self.others:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def run_child(request: Fork, fds: list[int], parent: int) -> None:
    """In the forked child: run the target and leave; never returns."""
    status = 1
    try:
        if not request.outlives:
            die_with_parent(parent)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        module, _, name = request.target.partition(":")
        target: Callable[[bytes, list[int]], None] = getattr(importlib.import_module(module), name)
        target(request.payload, fds)
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:  # noqa: BLE001 - the last frame of a process: report and leave, whatever it was
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """The server's program: the owner's socket is argv[1], the owner's pid argv[2], the server's name argv[3]."""
    owner = int(sys.argv[2])
    die_with_parent(owner)  # nothing reads the socket while we import
    run_in_usual_turns()
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[3], on_serving=lambda: die_with_parent(owner, 0))


def serve_link(payload: bytes, fds: list[int]) -> None:
    """A forkserver's target: be another one, with what is imported, for the process at the other end of the socket.

    `payload`: the environment of what it will fork, as a JSON object; `fds`: the socket, and the file for its output.
    """
    link, output = fds
    os.environ.clear()
    os.environ.update(msgspec.json.decode(payload, type=dict[str, str]))
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    serve(socket.socket(fileno=link), "forkserver")


def serve(link: socket.socket, name: str, on_serving: Callable[[], object] = lambda: None) -> None:
    """Import what the owner names, then fork for it until its end of the socket is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is our owner's to decide about
    setproctitle.setproctitle(f"elastic-ep::{name}")
    first = link.recv(MAX_MESSAGE)
    if not first:
        return
    begun = time.monotonic()
    try:
        preload(msgspec.msgpack.decode(first, type=Serve).preload)
    except Exception as error:  # noqa: BLE001 - whatever an import raises is the answer
        link.send(msgspec.msgpack.encode(Serving(error=f"{type(error).__name__}: {error}")))
        return
    link.send(msgspec.msgpack.encode(Serving(import_s=time.monotonic() - begun)))
    on_serving()
    Server(link).serve()
