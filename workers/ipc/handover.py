"""How processes of one host meet: one listening socket per process, which hands out memory by name.

The socket is in the run directory, which no other user can enter, and keeps message boundaries. Either side checks by
the kernel's credentials that the other one is of the same user. The connection stays open and *is* the membership: it
ends when the other side closes it or dies. One thread per process serves all of them.
"""

from __future__ import annotations

import atexit
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import structlog

from membership.base.attempts import Attempts
from membership.base.errors import ConfigError, ElasticError, QueueClosed, QueueError, WaitTimeout
from membership.base.run_dir import default_run_dir, entered, make_run_dir, new_socket, sweep
from workers.ipc.peer import Peer

MAX_MESSAGE = 64 * 1024
MAX_FDS = 16
JOIN_TIMEOUT_S = 5.0
ACCEPT_PAUSE_S = 0.01
REFUSALS_EVERY_S = 60.0  # those in between are only counted
_READ = select.EPOLLIN | select.EPOLLRDHUP
log = structlog.get_logger("handover")


class HandoverRefused(QueueError):
    """The other process answered that it will not hand over; the message says why."""


class ResourceHandle(msgspec.Struct, frozen=True, array_like=True):
    """Where something is handed over. Encoded with msgpack it goes into records."""

    address: str
    resource: str


class _Hello(msgspec.Struct, frozen=True, array_like=True):
    """First message of the side that connects."""

    resource: str
    request: bytes


class _Answer(msgspec.Struct, frozen=True, array_like=True):
    """First message of the side that accepts."""

    ok: bool
    reply: bytes = b""
    error: str = ""


OnMessage = Callable[["Link", bytes, list[int]], None]
OnGone = Callable[["Link"], None]


@dataclass(frozen=True)
class Grant:
    """What a handler answers: reply bytes, descriptors (they stay the handler's), and what to do later on this link."""

    reply: bytes = b""
    fds: Sequence[int] = field(default_factory=tuple)
    on_message: OnMessage | None = None
    on_gone: OnGone | None = None


Handler = Callable[["Link", bytes, list[int]], Grant]
"""Called in the listener thread: be quick, never block. The descriptors are closed when it returns: map or dup them."""


class Link:
    """One connection between two processes. `on_gone` runs once, in the listener thread, unless this side closed it."""

    def __init__(self, owner: Handover, sock: socket.socket, on_message: OnMessage | None, on_gone: OnGone | None):
        self._owner = owner
        self._sock = sock
        self.on_message = on_message
        self.on_gone = on_gone
        self.peer = Peer.of(sock)
        self.peer_pid = self.peer.pid
        self.reply = b""
        self.reply_fds: list[int] = []
        self.gone = False

    def fileno(self) -> int:
        """The socket's descriptor, -1 once closed."""
        return self._sock.fileno()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send one message (meant for rare control messages); never blocks."""
        try:
            socket.send_fds(self._sock, [data], list(fds), socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except BlockingIOError as error:
            raise QueueError(f"process {self.peer_pid} does not read its link: message not sent") from error
        except OSError as error:
            raise QueueClosed(f"link to process {self.peer_pid} is gone: {error.strerror}") from error

    def dismiss(self) -> None:
        """Have the other side close, and keep the link until it has (then `on_gone` runs as for any end)."""
        with suppress(OSError):  # gone already
            self._sock.shutdown(socket.SHUT_WR)

    def peer_closed(self) -> bool:
        """Whether the other side is gone, asked of the kernel now (the listener may not have got to it yet)."""
        poller = select.poll()
        poller.register(self._sock, select.POLLRDHUP)
        return bool(poller.poll(0))

    def release_fds(self) -> None:
        """Close the descriptors that came with the reply; once they are mapped."""
        while self.reply_fds:
            os.close(self.reply_fds.pop())

    def close(self) -> None:
        """The other side sees the end. Safe from any thread, and twice."""
        self.gone = True
        self.release_fds()
        self._owner._shut(self)


class Handover:
    """This process's listener. Use `Handover.default()`; make another only in tests."""

    _default: Handover | None = None
    _default_lock = threading.Lock()

    def __init__(self) -> None:
        directory = make_run_dir(default_run_dir())
        sweep(directory)  # what killed processes left
        self._path = directory / new_socket("handover")
        self.address = str(self._path)
        self._listener = _listen(self._path)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._epoll.register(self._stop, select.EPOLLIN)
        self._lock = threading.Lock()
        self._links: dict[int, Link] = {}
        self._resources: dict[str, Handler] = {}
        self._closed = False
        self._refused, self._refusals_from = 0, 0.0  # since the last warning; when the next one is due
        self._attempts = Attempts("handover")
        self._thread = threading.Thread(target=self._run, name="handover", daemon=True)
        self._thread.start()

    @classmethod
    def default(cls) -> Handover:
        """The process-wide one, started on first use and closed at exit. A forked child gets its own."""
        with cls._default_lock:
            if cls._default is None or cls._default._closed:
                cls._default = cls()
            return cls._default

    def serve(self, resource: str, handler: Handler) -> None:
        """Answer connections for `resource` with `handler`."""
        with self._lock:
            if resource in self._resources:
                raise QueueError(f"resource {resource} is served already")
            self._resources[resource] = handler

    def withdraw(self, resource: str) -> None:
        """Stop answering for `resource`; links already granted are their owner's to close."""
        with self._lock:
            self._resources.pop(resource, None)

    def connect(
        self,
        address: str,
        resource: str,
        request: bytes = b"",
        fds: Sequence[int] = (),
        *,
        timeout_s: float = JOIN_TIMEOUT_S,
        on_message: OnMessage | None = None,
        on_gone: OnGone | None = None,
    ) -> Link:
        """Ask the process at `address` for `resource`. The link carries `reply` and `reply_fds` (`release_fds` them).

        QueueClosed: that process or resource is gone. HandoverRefused: it said no, or it or its directory belongs to
        another user. WaitTimeout: it did not answer.
        """
        sock, path = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET), Path(address)
        try:
            sock.settimeout(timeout_s)
            with entered(path.parent) as inside:
                sock.connect(str(inside / path.name))
            link = Link(self, sock, on_message, on_gone)
            if refusal := link.peer.refusal():
                raise HandoverRefused(refusal)
            socket.send_fds(sock, [msgspec.msgpack.encode(_Hello(resource, request))], list(fds), socket.MSG_NOSIGNAL)
            data, link.reply_fds = _receive(sock)
        except TimeoutError as error:
            sock.close()
            raise WaitTimeout(f"process behind {address} did not answer for {resource} in {timeout_s} s") from error
        except OSError as error:
            sock.close()
            raise QueueClosed(f"process behind {address} ({resource}) is gone: {error.strerror}") from error
        except ConfigError as error:
            sock.close()
            raise HandoverRefused(str(error), hint=error.hint) from error
        except ElasticError:
            sock.close()
            raise
        answer = msgspec.msgpack.decode(data, type=_Answer) if data else _Answer(False, error="it went away")
        if not answer.ok:
            link.close()
            raise HandoverRefused(f"{resource}: {answer.error}")
        link.reply = answer.reply
        try:
            self._watch(link)
        except OSError:
            link.close()
            raise
        return link

    def close(self) -> None:
        """Stop the listener and end all links."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            links = list(self._links.values())
        os.eventfd_write(self._stop, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=JOIN_TIMEOUT_S)
        for link in links:
            link.close()
        with suppress(OSError):  # then a sweep removes it
            self._path.unlink()
        self._close_files()

    def _close_files(self) -> None:
        for link in list(self._links.values()):
            link._sock.close()
        self._links.clear()
        self._listener.close()
        self._epoll.close()
        os.close(self._stop)

    # ---- listener thread

    def _run(self) -> None:
        while not self._closed:
            for fd, _ in self._epoll.poll(60.0):
                if fd == self._listener.fileno():
                    if not self._attempts.run(self._accept, "accept"):
                        time.sleep(ACCEPT_PAUSE_S)  # do not spin on the pending connection; links are served on
                elif fd != self._stop:
                    self._serve_link(fd)

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        with ExitStack() as undo:
            undo.callback(sock.close)
            link = Link(self, sock, self._first_message, None)
            if refusal := link.peer.refusal():
                return self._note_refusal(refusal)
            self._watch(link)
            undo.pop_all()

    def _note_refusal(self, reason: str) -> None:
        self._refused += 1
        if time.monotonic() >= self._refusals_from:
            log.warning("link_refused", error=reason, refused=self._refused)
            self._refused, self._refusals_from = 0, time.monotonic() + REFUSALS_EVERY_S

    def _serve_link(self, fd: int) -> None:
        link = self._links.get(fd)
        if link is None:
            return
        try:
            data, fds = _receive(link._sock, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:  # reset: the peer died with unread messages
            data, fds = b"", []
        try:
            if not data:
                self._end(link)
            elif link.on_message is not None:
                link.on_message(link, data, fds)
        except Exception:  # a callback's fault must not deafen the whole process
            log.exception("link_callback_failed", peer=link.peer_pid)
        finally:
            for received in fds:
                os.close(received)

    def _end(self, link: Link) -> None:
        closed_here, link.gone = link.gone, True
        with self._lock:
            self._links.pop(link.fileno(), None)
            link._sock.close()  # leaves the epoll set by itself
        if link.on_gone is not None and not closed_here:
            link.on_gone(link)

    def _first_message(self, link: Link, data: bytes, fds: list[int]) -> None:
        link.on_message = None
        grant = Grant()
        try:
            hello = msgspec.msgpack.decode(data, type=_Hello)
            handler = self._resources.get(hello.resource)
            if handler is None:
                raise HandoverRefused("no such resource here (any more)")
            grant = handler(link, hello.request, fds)
            answer = _Answer(True, grant.reply)
        except (ElasticError, msgspec.MsgspecError, OSError) as error:
            answer = _Answer(False, error=str(error))
        link.on_message, link.on_gone = grant.on_message, grant.on_gone
        try:
            link.send(msgspec.msgpack.encode(answer), grant.fds)
        except QueueError:
            return self._end(link)
        if not answer.ok:
            link.dismiss()

    def _watch(self, link: Link) -> None:
        link._sock.setblocking(False)
        with self._lock:
            if self._closed:
                link._sock.close()
                raise QueueClosed("this process's handover is closed")
            self._epoll.register(link.fileno(), _READ)
            self._links[link.fileno()] = link

    def _shut(self, link: Link) -> None:
        """End it now; the listener thread, which may be reading from it, closes the descriptor."""
        with self._lock:
            if self._links.get(link.fileno()) is not link or self._closed:
                link._sock.close()
            else:
                with suppress(OSError):
                    link._sock.shutdown(socket.SHUT_RDWR)


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(str(path))
        listener.listen(512)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _receive(sock: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    data, fds, message_flags, _ = socket.recv_fds(sock, MAX_MESSAGE, MAX_FDS, flags | socket.MSG_CMSG_CLOEXEC)
    if message_flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        for fd in fds:
            os.close(fd)
        raise OSError(0, "message or descriptors truncated")
    return data, fds


def _after_fork() -> None:
    """A copied socket would hide its owner's death from the other side: the child closes all of them at once.

    Their names are their owner's, and stay.
    """
    inherited, Handover._default, Handover._default_lock = Handover._default, None, threading.Lock()
    if inherited is not None and not inherited._closed:
        inherited._closed = True
        inherited._close_files()


def close_default() -> None:
    """End this process's handover. Called at exit; by itself where a process leaves by `os._exit`."""
    if Handover._default is not None:
        Handover._default.close()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(close_default)
