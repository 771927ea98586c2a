"""Another user of the host, who tries everything: `python stranger.py UID`, as root; it becomes that user at once.

Uses nothing of ours, and no more rights than any user has. Each line on its stdin is a JSON object: `inodes` of the
sockets that are worth an attack, and the `pids`, `files`, `open` ports, `admin` port and `run` directory of a cluster.
It finds the listeners among them in /proc/net, and remembers their names: what is free again is taken. After a round it
answers with a line; then it goes on with the names by itself, until the next one. At the end of its stdin it says what
it managed, and what it tried.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

LISTENING_UNIX, LISTENING_TCP = "00010000", "0A"
TYPES = (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM)
LOCAL = {"tcp": "127.0.0.1", "tcp6": "::1"}
PAUSE_S = 0.001
CONTROLS = ("status", "events", "scale", "drain", "pause", "failpoints")


@dataclass
class Stranger:
    """What it knows, and what came of it."""

    inodes: set[str] = field(default_factory=set)
    pids: list[int] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    open: list[int] = field(default_factory=list)
    admin: int = 0
    run: str = "/"  # where paths begin that are not absolute
    names: set[tuple[str, str]] = field(default_factory=set)  # of listeners that are or were there: (family, name)
    managed: set[str] = field(default_factory=set)
    tried: Counter[str] = field(default_factory=Counter)
    seen: dict[int, str] = field(default_factory=dict)  # command lines

    def attempt(self, what: str, deed: Callable[[], object]) -> None:
        """Do it; that it works is a breach."""
        self.tried[what.split()[0]] += 1
        try:
            deed()
        except (OSError, http.client.HTTPException):
            return
        self.managed.add(what)

    def look(self) -> None:
        """Remember which listeners there are."""
        with open("/proc/net/unix") as table:
            for row in table.read().splitlines()[1:]:
                _, _, _, flags, _, _, inode, *path = row.split(maxsplit=7)
                if flags == LISTENING_UNIX and inode in self.inodes and path:
                    abstract = path[0].startswith("@")
                    self.names.add(("abstract", path[0][1:]) if abstract else ("unix", os.path.join(self.run, path[0])))
        for family in LOCAL:
            with open(f"/proc/net/{family}") as table:
                for row in table.read().splitlines()[1:]:
                    local, state, inode = (row.split()[column] for column in (1, 3, 9))
                    if state == LISTENING_TCP and inode in self.inodes:
                        self.names.add((family, str(int(local.rpartition(":")[2], 16))))

    def attack_names(self) -> None:
        """Reach, take or remove each listener that there is or was."""
        self.look()
        for family, name in self.names:
            if family == "unix":
                self.attack_path(name)
            elif family == "abstract":
                self.attack_address(socket.AF_UNIX, "\0" + name, f"abstract {name}")
            elif int(name) not in self.open:
                inet = socket.AF_INET if family == "tcp" else socket.AF_INET6
                self.attack_address(inet, (LOCAL[family], int(name)), f"port {name}")
            else:
                self.attempt(f"take port {name}", lambda port=int(name): listen(socket.AF_INET, ("127.0.0.1", port)))

    def attack_all(self) -> None:
        """Everything once."""
        self.attack_names()
        for path in self.files:
            self.attempt(f"list {path}", lambda path=path: os.listdir(path))
            for flags in (os.O_RDONLY, os.O_WRONLY):
                self.attempt(f"open {path}", lambda path=path, flags=flags: os.close(os.open(path, flags)))
        for pid in self.pids:
            self.attack_process(pid)
        for control in CONTROLS if self.admin else ():
            self.attempt(f"control {control}", lambda control=control: self.control(control))

    def attack_address(self, family: int, address: object, name: str) -> None:
        """Reach who listens there, or listen there."""
        for kind in TYPES if family == socket.AF_UNIX else TYPES[:1]:
            self.attempt(f"reach {name}", lambda kind=kind: connect(family, kind, address))
        self.attempt(f"take {name}", lambda: listen(family, address))

    def attack_path(self, path: str) -> None:
        """The same, and remove what is there, or its directory."""
        self.attack_address(socket.AF_UNIX, path, path)
        folder = os.path.dirname(path)
        self.attempt(f"look {folder}", lambda: os.listdir(folder))
        self.attempt(f"look {path}", lambda: os.stat(path))
        self.attempt(f"remove {path}", lambda: os.unlink(path))
        self.attempt(f"replace {path}", lambda: os.symlink("/dev/null", path))
        for target in (path, folder):
            self.attempt(f"move {target}", lambda target=target: os.rename(target, target + ".x"))
            self.attempt(f"open {target}", lambda target=target: os.chmod(target, 0o777))

    def attack_process(self, pid: int) -> None:
        """Signal it, or read what it knows."""
        for number in (signal.SIGTERM, signal.SIGSTOP):
            self.attempt(f"signal {pid}", lambda number=number: os.kill(pid, number))
        for name in ("environ", "mem", "maps"):
            self.attempt(f"read {pid}/{name}", lambda name=name: read(f"/proc/{pid}/{name}"))
        self.attempt(f"list {pid}/fd", lambda: os.listdir(f"/proc/{pid}/fd"))
        try:
            self.seen[pid] = read(f"/proc/{pid}/cmdline").replace("\0", " ")
        except OSError:
            return

    def control(self, what: str) -> None:
        """Use the admin API without its token: OSError if that is refused."""
        connection = http.client.HTTPConnection("127.0.0.1", self.admin, timeout=1.0)
        try:
            method = "GET" if what in ("status", "events") else "PUT" if what == "failpoints" else "POST"
            body = None if method == "GET" else json.dumps({"target": 1, "ranks": [0]})
            headers = {"Authorization": "Bearer guess", "Content-Type": "application/json"}
            connection.request(method, f"/admin/v1/{what}", body, headers)
            if connection.getresponse().status in (401, 403):
                raise PermissionError(what)
        finally:
            connection.close()

    def report(self) -> str:
        """As a line."""
        names = sorted(f"{family} {name}" for family, name in self.names)
        facts = {"managed": sorted(self.managed), "tried": self.tried, "names": names, "seen": list(self.seen.values())}
        return json.dumps(facts)


def connect(family: int, kind: int, address: object) -> None:
    """To somebody."""
    with socket.socket(family, kind) as sock:
        sock.settimeout(1.0)
        sock.connect(address)  # type: ignore[arg-type]


def listen(family: int, address: object) -> None:
    """In somebody's place."""
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)  # type: ignore[arg-type]
        sock.listen()


def read(path: str) -> str:
    """The beginning of a file. OSError if there is nothing to read, as of a process that has just ended."""
    with open(path, errors="replace") as file:
        if not (text := file.read(4096)):
            raise OSError(f"{path} is empty")
        return text


def become(uid: int) -> None:
    """For good. What is imported later is loaded before: that user may not be able to read it."""
    "localhost".encode("idna")
    os.nice(5)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def main() -> None:
    """Until the end of stdin."""
    become(int(sys.argv[1]))
    stranger, orders = Stranger(), os.fdopen(0, "rb", buffering=0)
    while True:
        if select.select([orders], [], [], PAUSE_S)[0]:
            order = orders.readline()
            if not order:
                break
            known = json.loads(order)
            stranger.inodes |= set(known.pop("inodes"))
            for name, value in known.items():
                setattr(stranger, name, value)
            stranger.attack_all()
            print("tried", flush=True)
        stranger.attack_names()
    print(stranger.report(), flush=True)


if __name__ == "__main__":
    main()
