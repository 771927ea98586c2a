"""How soon is a silent host suspected, and how near does a busy one come to it? Two hosts in namespaces; takes root.

    python -m benchmarks.silent_hosts [--rounds 10] [--seconds 20] [--hogs 8]

The busy host's process has each processor taken by hogs, and holds its interpreter's lock for a while each second. Two
watchers look at the same connection: ours, at what the host's kernel acknowledges, and one that waits for beats which
the process sends as often. Exit 1 if ours would have suspected it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import cast

import msgspec

from benchmarks.false_evictions import burning
from chaos.faults.netns import Network
from chaos.workload.history import percentile
from membership.base.errors import QueueSilent
from membership.base.timing import LINK_BEAT_S, LINK_SUSPECT_MIN_S
from workers.queue.curve import new_keys
from workers.queue.handle import Handle
from workers.queue.message_queue import MessageQueue
from workers.queue.remote_reader import RemoteReader
from workers.queue.silence import OtherHosts

WAIT_S = 30.0
OURS, THEIRS = new_keys(), new_keys()
PEER = f"""
import sys, threading, time
from workers.queue.message_queue import *
ours = CurveKeys(*(a.encode() for a in sys.argv[1:3]))
queue = MessageQueue("far", MsgpackCodec(), remote=Remote(sys.argv[4], ours, frozenset([sys.argv[3].encode()])))
print(queue.export_handle().encode().hex(), flush=True)
def beat():
    while True:
        queue.enqueue(0)
        time.sleep({LINK_BEAT_S})
threading.Thread(target=beat, daemon=True).start()
while True:
    time.sleep(1.0)
    if sys.argv[5] == "busy":
        sorted(range(2_000_000, 0, -1), key=float)  # the interpreter's lock is held all the while
"""


@contextmanager
def connected(network: Network, how: str) -> Iterator[tuple[MessageQueue, RemoteReader]]:
    """A reader on host a of a queue on host b."""
    b = network["b"]
    arguments = [OURS.public.decode(), OURS.secret.decode(), THEIRS.public.decode(), b.address, how]
    command, root = [sys.executable, "-c", PEER, *arguments], Path(__file__).parent.parent
    with ExitStack() as ends:
        peer = b.run(lambda: subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, encoding="utf-8"))
        ends.callback(peer.communicate, timeout=WAIT_S)
        ends.callback(peer.kill)
        line = peer.stdout.readline() if peer.stdout is not None else ""
        handle = msgspec.structs.replace(Handle.decode(bytes.fromhex(line)), host="another host")
        far = network["a"].run(lambda: MessageQueue.create_from_handle(handle, "far", timeout_s=WAIT_S, keys=THEIRS))
        ends.callback(far.shutdown)
        far.end_on_silence(OtherHosts())
        yield far, cast(RemoteReader, far._end)


def until_suspected(network: Network) -> float:
    """Seconds from a pulled cable to the end of the queue."""
    with connected(network, "idle") as (far, _):
        far.dequeue(WAIT_S)
        network["b"].plug(up=False)
        began = time.monotonic()
        try:
            while True:
                far.dequeue(WAIT_S)
        except QueueSilent:
            return time.monotonic() - began
        finally:
            network["b"].plug(up=True)


def longest(network: Network, seconds: float) -> tuple[float, float]:
    """The longest silence of a busy host, by what its kernel acknowledges and by what its process sends."""
    arrived: list[float] = []
    with connected(network, "busy") as (far, reader):
        far.watch(lambda _: arrived.append(time.monotonic()))
        ends, silent_s = time.monotonic() + seconds, 0.0
        while time.monotonic() < ends and not reader._ended:
            if not far.pending() or far.try_dequeue() is None:
                time.sleep(0.002)
            silent_s = max(silent_s, reader._connection._silence.lasted_s)
        if reader._ended:
            sys.stdout.write(f"falsely suspected: {reader._ended}\n")
            silent_s = max(silent_s, LINK_SUSPECT_MIN_S)
    return silent_s, max(later - before for before, later in pairwise(arrived))


def main() -> None:
    """Measure both, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--hogs", type=int, default=8)
    options = parser.parse_args()
    with Network(["a", "b"]) as network:
        took = [until_suspected(network) for _ in range(options.rounds)]
        with burning(options.hogs):
            ours_s, beats_s = longest(network, options.seconds)
    busy = f"busy host, {options.hogs} hogs, {options.seconds:g} s"
    sys.stdout.write(
        f"cable pulled -> suspected: p50 {percentile(took, 0.5) * 1000:.0f} ms, largest {max(took) * 1000:.0f} ms\n"
        f"{busy}: silent for {ours_s * 1000:.0f} ms at most by its kernel,"
        f" for {beats_s * 1000:.0f} ms by its process's beats: {beats_s / max(ours_s, LINK_BEAT_S):.1f} x\n"
    )
    sys.exit(1 if ours_s >= LINK_SUSPECT_MIN_S else 0)


if __name__ == "__main__":
    main()
