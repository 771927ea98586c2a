"""A process that sends other hosts the shards that it was given, and kills itself in the middle of that.

    python -m tests.support.weight_peer READS   with shards on its standard input

It prints where it listens. `Killed` is the test's side.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import msgspec

from membership.base.network import Network
from workers.agent.weight_store import WeightStore
from workers.bulk.server import BulkServer
from workers.protocol.weight_peers import Peer, Place
from workers.queue.network import Purpose, remote_of

NETWORK = Network("127.0.0.1", "c", b"a secret of two hosts of a test")


class Given(msgspec.Struct):
    """What it holds: where entries are, and the bytes of each shard."""

    places: list[Place]
    shards: dict[int, bytes]


class Short:
    """A source that ends its process at the read of that number."""

    def __init__(self, given: Given, reads: int) -> None:
        self._given, self._left = given, reads

    def held(self, names: Sequence[str]) -> list[Place]:
        return [place for place in self._given.places if place.name in names]

    def read(self, shard: int, offset: int, nbytes: int) -> bytes:
        self._left -= 1
        if self._left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._given.shards[shard][offset : offset + nbytes]

    def file(self, name: str) -> bytes:
        return b""

    def book(self, nbytes: int) -> float:
        return 0.0


class Killed(AbstractContextManager["Killed"]):
    """The process, with what `store` holds."""

    def __init__(self, store: WeightStore, names: Sequence[str], reads: int) -> None:
        places = [place for name in names for place in store.held([name])]
        shards = {place.shard: store.read(place.shard, 0, place.size) for place in places}
        command = [sys.executable, "-m", "tests.support.weight_peer", str(reads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._given = msgspec.msgpack.encode(Given(places, shards))
        self.peer = Peer("", "", "")

    def __enter__(self) -> Self:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("no pipes")
        stdin.write(self._given)
        stdin.close()
        endpoint, key = stdout.readline().decode().split()
        self.peer = Peer("killed", endpoint, key)
        return self

    def ended_by(self, timeout_s: float) -> int:
        """Its exit status."""
        return self._process.wait(timeout_s)

    def __exit__(self, *exc: Any) -> None:
        self._process.kill()
        self._process.wait(60)
        if self._process.stdout is not None:
            self._process.stdout.close()


def main() -> None:
    """Serve until the end of this process."""
    given = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Given)
    server = BulkServer(remote_of(NETWORK, Purpose.WEIGHTS), Short(given, int(sys.argv[1])))
    sys.stdout.write(f"{server.endpoint} {server.key}\n")
    sys.stdout.flush()
    signal.pause()


if __name__ == "__main__":
    main()
