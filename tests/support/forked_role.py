"""Programs for the tests of forked roles: `python -m tests.support.forked_role start|gone|orphan LOG`.

`start` starts a fork as a role and prints how it ended; `gone` does so after the fork's death; `orphan` prints the pid
of one that waits, and dies by SIGKILL. What runs as the role prints what it finds itself in.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from contextlib import closing
from pathlib import Path

import msgspec

from elastic.serve import role_process
from elastic.serve.listening import LISTEN_FDS, Listeners
from elastic.serve.role_fork import WaitingProcess
from elastic.serve.role_process import RoleProcess

NO_TEXT = os.fsdecode(b"\xff")


def main() -> None:
    """One of them."""
    if len(sys.argv) != 3:
        return _look()
    what, log = sys.argv[1], Path(sys.argv[2])
    role_process.ENTRY = "tests.support.forked_role"
    signal.signal(signal.SIGTERM, lambda *_: None)  # as a supervisor has it
    with log.open("rb"), socket.socket() as api, socket.socket() as admin, closing(WaitingProcess()) as waiting:
        if what == "orphan":
            os.write(1, b"%d" % waiting.pid)
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "gone":
            os.kill(waiting.pid, signal.SIGKILL)
            os.waitid(os.P_PID, waiting.pid, os.WEXITED | os.WNOWAIT)
        role = RoleProcess(
            "role", [NO_TEXT], log, environment={"MORE": NO_TEXT}, listeners=Listeners(api, admin), waiting=waiting
        )
        role.start(0.0)
        print(role.process.wait(timeout=60.0) if role.process is not None else "none")


def _look() -> None:
    found = {
        "arguments": [os.fsencode(each).hex() for each in sys.argv[1:]],
        "more": os.environb[b"MORE"].hex(),
        "sockets": [os.readlink(f"/proc/self/fd/{fd}").partition(":")[0] for fd in os.environ[LISTEN_FDS].split(",")],
        "files": sum(int(fd) > 2 for fd in os.listdir("/proc/self/fd")) - 1,  # the directory itself
        "leads": os.getsid(0) == os.getpid(),
        "terminable": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        "title": Path("/proc/self/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace"),
    }
    print(msgspec.json.encode(found).decode())
    raise SystemExit(7)


if __name__ == "__main__":
    main()
