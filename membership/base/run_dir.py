"""The run directory: where the processes of a cluster have their Unix sockets, and which no other user may enter.

Its mode is 0700 and its owner is us, so apart from root no other user can reach a socket in it, or put one of theirs in
the place of one whose process died. Both are checked before a socket is bound in it, and whenever one is connected to,
then on the very directory that is used (`entered`).

A cluster's is `run_dir(state_dir)`; its processes find it in ELASTIC_RUN_DIR. A socket's name is random (`new_socket`)
unless there is one only, as the embedded etcd's: `run_dir(state_dir) / "etcd.sock"`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import socket
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

from membership.base.errors import ConfigError

ENV = "ELASTIC_RUN_DIR"
MAX_PATH = 107  # bytes of a socket's path (sockaddr_un)
LONGEST_NAME = 32  # bytes of a socket's name in the directory
NEWBORN_S = 5.0  # the file of a socket is there a moment before the kernel knows the socket behind it


def run_dir(state_dir: Path) -> Path:
    """The run directory of the cluster with this state directory: in it, or where the paths of sockets are shorter.

    The same for each process of a user with the same environment. It need not exist yet.
    """
    state = state_dir.resolve()
    digest = hashlib.sha256(os.fsencode(state)).hexdigest()[:16]
    return _first_that_fits(chain([state / "run"], _elsewhere(f"{_name()}-{digest}")))


def default_run_dir() -> Path:
    """This process's: that of its cluster, or the user's own if it belongs to none."""
    given = os.environ.get(ENV, "")
    return Path(given) if given else _first_that_fits(_elsewhere(_name()))


def make_run_dir(directory: Path) -> Path:
    """Make it if it is missing. ConfigError if it is not private, or if no sockets can be made in it."""
    try:
        with suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        with entered(directory), socket.socket(socket.AF_UNIX) as probe:
            path = directory / new_socket("probe")
            probe.bind(str(path))
            path.unlink()
    except OSError as error:
        raise ConfigError(
            f"no socket can be made in the run directory {directory}: {error.strerror or error}",
            hint="choose a --state-dir on a local file system that you may write to",
        ) from error
    return directory


def new_socket(kind: str) -> str:
    """A name for a socket."""
    return f"{kind}-{secrets.token_hex(8)}.sock"


@contextmanager
def entered(directory: Path) -> Iterator[Path]:
    """A short path that means this very directory, whatever is moved to its place: for a socket in it.

    ConfigError if it is not ours, or not ours alone. OSError if there is none.
    """
    try:
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except PermissionError as error:
        raise ConfigError(f"user {os.geteuid()} may not enter {directory}{_owner_of(directory)}", hint=_HINT) from error
    except NotADirectoryError as error:
        raise ConfigError(f"{directory} is no directory, or a link to one", hint="remove it") from error
    try:
        _require_private(directory, os.fstat(fd))
        yield Path(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def sweep(directory: Path, newborn_s: float = NEWBORN_S) -> None:
    """Remove the sockets of processes that are gone, save those that were made within `newborn_s`."""
    with suppress(FileNotFoundError), entered(directory) as inside:
        for entry in os.scandir(inside):
            with suppress(FileNotFoundError):  # its owner was faster
                info = entry.stat(follow_symlinks=False)
                if stat.S_ISSOCK(info.st_mode) and time.time() - info.st_ctime >= newborn_s and _is_dead(entry.path):
                    os.unlink(entry.path)


def remove_run_dir(directory: Path, newborn_s: float = 0.0) -> None:
    """Remove it and what was left in it, unless a process that still lives has a socket in it.

    `newborn_s`: as of `sweep`, where others may be about to begin.
    """
    sweep(directory, newborn_s)
    with suppress(OSError):
        directory.rmdir()


_HINT = "run all processes of a cluster as one user; another user needs a --state-dir of their own, with a short path"


def _require_private(directory: Path, info: os.stat_result) -> None:
    if info.st_uid != os.geteuid():
        raise ConfigError(f"{directory} belongs to user {info.st_uid}, we are user {os.geteuid()}", hint=_HINT)
    if info.st_mode & 0o077:
        mode = stat.S_IMODE(info.st_mode)
        raise ConfigError(f"other users may enter {directory} (mode {mode:04o})", hint=f"chmod 700 {directory}")


def _owner_of(directory: Path) -> str:
    try:
        return f", which belongs to user {os.lstat(directory).st_uid}"
    except OSError:
        return ""  # nor may we look at it


def _is_dead(path: str) -> bool:
    """Whether no process has this socket. It is asked as what none of ours is, so that a live one does not notice."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as asking:
        return asking.connect_ex(path) == errno.ECONNREFUSED


def _name() -> str:
    return f"elastic-ep-{os.geteuid()}"


def _elsewhere(name: str) -> Iterator[Path]:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and os.path.isdir(runtime) and os.stat(runtime).st_uid == os.geteuid():  # not so after `su`
        yield Path(runtime).resolve() / name
    yield Path(tempfile.gettempdir()) / name
    yield Path("/tmp") / name  # noqa: S108 - it is made with mode 0700, and checked


def _first_that_fits(candidates: Iterable[Path]) -> Path:
    for candidate in candidates:
        fits = len(os.fsencode(candidate)) + 1 + LONGEST_NAME <= MAX_PATH
        if fits and "," not in str(candidate):  # to gRPC, a comma ends the path
            return candidate
    raise ConfigError("no directory has a path that is short enough for sockets", hint="set TMPDIR to a shorter one")
