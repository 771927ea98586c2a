"""The directory in which a one-machine cluster keeps its address, events, logs and etcd data.

It is private: owned by us, mode 0700. A directory that is not ours to make so, such as a volume of Kubernetes (root's,
and all users of the pod may write to it) or /tmp, is not touched: then we have a private one of our own in it.

`cluster.json` (mode 0600: it holds the admin token) is how client commands find a running cluster; `.last` beside
the default directories points at the one served last.
"""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec
import structlog

from elastic.serve.tokens import read_admin_token
from membership.base.errors import ConfigError
from membership.base.run_dir import entered
from membership.store.credentials import NO_CREDENTIALS, Credentials
from membership.store.keys import Keys
from workers.model.content import Stamps

if TYPE_CHECKING:
    from membership.store.etcd import EtcdStore


MODEL_FILES = "model-files"
LAST = ".last"  # no cluster has such a name: checkpoints are called `last`
HINT = "choose another --state-dir, one that you may write to; its mode becomes 0700"
log = structlog.get_logger(__name__)


class ClusterAddress(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach a cluster: enough for a client command."""

    cluster: str
    etcd: tuple[str, ...] = ()
    credentials: Credentials = NO_CREDENTIALS  # for etcd: names of files, no secrets
    url: str = ""
    admin_url: str = ""
    certificate: str = ""  # file of the ports' certificate, if they have one
    admin_token: str = ""
    admin_token_file: str = ""  # where it is instead, if it may change
    pid: int = 0
    model: str = ""  # the checkpoint's directory
    files: tuple[tuple[str, str], ...] = ()  # as `ClusterConfig.files`
    stamps: Stamps = {}  # of its weight files, at the start
    trouble: str = ""  # why the store must not be asked any more: it was wiped, or holds older data

    def token(self) -> str:
        """The admin token as it is now. ConfigError: its file cannot be used."""
        return read_admin_token(Path(self.admin_token_file)) if self.admin_token_file else self.admin_token

    def connect(self, *, seen: str = "") -> EtcdStore:
        """Connect to the cluster's store: see `membership.store.etcd.connect`."""
        from membership.store.etcd import connect  # gRPC takes long to import, and the admin port does without

        return connect(self.etcd, self.credentials, prefix=Keys(self.cluster).prefix, seen=seen)


def home() -> Path:
    """Where state directories are by default: $XDG_STATE_HOME/elastic-ep, else ~/.local/state/elastic-ep."""
    if named := os.environ.get("XDG_STATE_HOME"):
        return Path(named) / "elastic-ep"
    try:
        return Path.home() / ".local" / "state" / "elastic-ep"
    except RuntimeError as error:
        raise ConfigError(
            "this user has no home directory to keep a cluster's files in",
            hint="give --state-dir, or set HOME or XDG_STATE_HOME",
        ) from error


def _private_part(given: Path) -> Path:
    """`given`, or our own directory in it if it is another's, or all may write to it."""
    try:
        info = given.stat()
    except OSError:
        return given
    if not stat.S_ISDIR(info.st_mode):
        return given
    theirs = os.geteuid() == 0 and (given / "cluster.json").exists()  # root may look at another user's cluster
    private = info.st_uid == os.geteuid() or theirs
    return given if private and not info.st_mode & stat.S_IWOTH else given / f"elastic-ep-{os.geteuid()}"


def _why(error: OSError) -> str:
    """What is wrong with the path that the error names, and whose it is."""
    path = Path(os.fsdecode(error.filename or ""))
    with suppress(OSError):
        while not path.exists() and path != path.parent:
            path = path.parent
        if not path.is_dir():
            return f"{path} is not a directory"
        owner = path.stat().st_uid
        if isinstance(error, PermissionError) and owner != os.geteuid():
            return f"{path} belongs to user {owner}, and we, user {os.geteuid()}, may not write to it"
    return f"{error.strerror} ({error.filename})"


class StateDir:
    """One cluster's directory. Only the supervisor writes `cluster.json`; each role appends to the event log."""

    def __init__(self, given: Path) -> None:
        """`given`: as the user named it. Its owner and mode decide whether `path` is that one or one of ours in it."""
        self.path = _private_part(given)
        self._own_name = self.path != given
        self._lock: IO[str] | None = None

    @classmethod
    def last_served(cls) -> StateDir:
        """The directory of the cluster served last on this machine; ConfigError if there was none."""
        pointer = home() / LAST
        try:
            return cls(Path(os.fsdecode(pointer.read_bytes())))
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(
                "no cluster was served from this machine yet",
                hint="start one with `elastic serve MODEL`, or name one with --state-dir, --admin or --etcd",
            ) from None

    @property
    def events(self) -> Path:
        """The cluster's one event history, JSON lines."""
        return self.path / "events.jsonl"

    @property
    def model_files(self) -> Path:
        """Config and tokenizer of what the cluster serves: a gateway's copy, or an agent's from another host."""
        return self.path / MODEL_FILES

    @property
    def failpoints(self) -> Path:
        """What faults the roles read, if the cluster is served with --chaos; else there is no such file."""
        return self.path / "failpoints"

    @property
    def etcd_data(self) -> Path:
        """Data directory of the embedded etcd."""
        return self.path / "etcd"

    def log(self, role: str) -> Path:
        """Where a role's stderr goes."""
        return self.path / "logs" / f"{role}.log"

    def make(self) -> None:
        """Make it private, and make it if it is missing. ConfigError if that cannot be, or it takes no files."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.path.stat().st_uid == os.geteuid():
                self.path.chmod(0o700)
            with entered(self.path if self._own_name else self.path.resolve()):  # the given one may be a link
                (self.path / "logs").mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot keep state in {self.path}: {_why(error)}", hint=HINT) from error

    def claim(self) -> None:
        """Own the directory until `release` or exit; ConfigError if another supervisor owns it."""
        self.make()
        try:
            self._lock = (self.path / "lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot keep state in {self.path}: {_why(error)}", hint=HINT) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ConfigError(
                f"another `elastic serve` uses {self.path}", hint="stop it, or choose another --state-dir"
            ) from None

    def left_behind(self) -> ClusterAddress | None:
        """The address of a server that was killed here; None: the last one stopped. Ask after `claim`."""
        try:
            return self.address()
        except ConfigError:
            return None

    def release(self) -> None:
        """Forget the address and let others claim the directory; events, logs and etcd data stay."""
        (self.path / "cluster.json").unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def publish(self, address: ClusterAddress) -> None:
        """Write `cluster.json` for client commands, and make this the directory served last."""
        target = self.path / "cluster.json"
        draft = self.path / f".cluster.json.{os.getpid()}"
        draft.touch(mode=0o600)
        draft.write_bytes(msgspec.json.encode(address))
        draft.replace(target)
        try:
            home().mkdir(parents=True, exist_ok=True)
            (home() / LAST).write_bytes(os.fsencode(self.path.resolve()))
        except (ConfigError, OSError) as error:  # a convenience: commands find the cluster by --state-dir
            log.warning("last_served_not_noted", error=str(error), hint=f"name it: --state-dir {self.path}")

    def address(self) -> ClusterAddress:
        """Read `cluster.json`; ConfigError if no cluster is being served from here, or it cannot be read."""
        file = self.path / "cluster.json"
        try:
            with file.open("rb") as opened:
                self._require_trusted(opened.fileno(), file)
                return msgspec.json.decode(opened.read(), type=ClusterAddress)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{file} is damaged: {error}", hint="start `elastic serve` again, or reach the cluster by --admin"
            ) from error
        except PermissionError as error:
            raise ConfigError(
                f"{file} is another user's", hint="run this as that user, or give --admin and --admin-token"
            ) from error
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(
                f"no cluster is being served from {self.path}",
                hint="start one with `elastic serve MODEL --state-dir DIR`, or name another with --state-dir",
            ) from None

    def _require_trusted(self, fd: int, file: Path) -> None:
        """ConfigError if another user wrote it: they would choose whom we ask, and see our token."""
        writer = os.fstat(fd).st_uid
        looking = os.geteuid() == 0 and not self._own_name and writer == self.path.stat().st_uid
        if writer != os.geteuid() and not looking:
            raise ConfigError(f"{file} was written by user {writer}", hint="choose another --state-dir, one of yours")
