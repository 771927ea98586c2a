"""What surrounds the engine in its tests: rank processes with an agent's duties, a gateway, an engine thread."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from elastic.engine.role import run_engine
from elastic.protocol import Abort, Hello, Rejected, Submit, ToGateway, Tokens, Welcome
from membership.base.errors import Fenced
from membership.base.events import Event, EventLog
from membership.store.codec import encode
from membership.store.interface import Store
from membership.store.keys import Keys, state_from
from membership.store.records import (
    Assignment,
    ClusterConfig,
    ClusterState,
    Member,
    RankRecord,
    RankSpec,
    RankState,
    View,
)
from tests.support import ROOT
from tests.support.helpers import eventually
from tests.support.rank_process import VOCAB, next_token
from workers.protocol.messages import Sampling

CLUSTER = "test"


def cluster_config(**changes: Any) -> ClusterConfig:
    """A small cluster: few blocks, so that queueing and preemption happen."""
    base: dict[str, Any] = {"block_size": 4, "kv_blocks": 64, "max_batched_tokens": 32, "max_seqs": 8}
    base |= {
        "max_model_len": 200,
        "vocab_size": VOCAB,
        "moe_layers": 1,
        "experts": 4,
        "lease_ttl_s": 20.0,
    }  # a busy machine must not end it
    return ClusterConfig(cluster=CLUSTER, model="m", served_model_name="m", **(base | changes))


def oracle(request: Submit) -> list[int]:
    """The output that the request must have."""
    tokens = list(request.prompt)
    for _ in range(request.max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(request.prompt) :]


class StandInRank:
    """One rank process."""

    def __init__(self, rank: int, incarnation: int, block_size: int, step_s: float, mail: str = "") -> None:
        arguments = [str(rank), str(incarnation), str(block_size), str(step_s), mail]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.rank_process", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.record = RankRecord(
            rank=rank, node="n", incarnation=incarnation, pid=self.process.pid, state=RankState.STANDBY
        )

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 60.0)[0], "the stand-in rank says nothing"
        return json.loads(self.process.stdout.readline())  # type: ignore[no-any-return]

    def send(self, **words: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=60)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(timeout=60)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class StandInCluster:
    """The agent's and the controller's part, done by hand: ranks' records, attachments, views."""

    def __init__(self, store: Store, config: ClusterConfig, step_s: float = 0.002) -> None:
        self.store, self.config, self.step_s = store, config, step_s
        self.keys = Keys(CLUSTER)
        self.ranks: dict[int, StandInRank] = {}
        self.epoch = 0
        self._incarnations = 0
        self._closed: list[StandInRank] = []
        self._mail = tempfile.TemporaryDirectory()  # for KV blocks that ranks copy

    def state(self) -> ClusterState:
        revision, items = self.store.range(self.keys.prefix)
        return state_from(items, revision)

    def configure(self) -> None:
        self.store.put(self.keys.config, encode(self.config))

    def spawn(self, *ranks: int) -> None:
        """Start ranks; they are registered, but attached to no engine."""
        for rank in ranks:
            self._incarnations += 1
            self.ranks[rank] = StandInRank(
                rank, self._incarnations, self.config.block_size, self.step_s, self._mail.name
            )
        for rank in ranks:
            liveness = bytes.fromhex(self.ranks[rank].receive()["liveness"])
            self.record(rank, liveness_handle=liveness)

    def record(self, rank: int, **changes: Any) -> None:
        mine = self.ranks[rank]
        mine.record = msgspec.structs.replace(mine.record, **changes)
        self.store.put(self.keys.rank(rank, mine.record.incarnation), encode(mine.record))

    def attach(self, *ranks: int) -> None:
        """Have ranks (default: all) join the queues of the engine in office."""
        state = eventually(lambda: (s := self.state()).engine_token and s, 30.0, "an engine in office")
        assert state
        engine = state.engine
        assert engine is not None
        handles = {"broadcast": engine.broadcast_handle.hex(), "mask": engine.mask_handle.hex()}
        for rank in ranks or self.ranks:
            self.ranks[rank].send(do="attach", token=state.engine_token, **handles)
            response = bytes.fromhex(self.ranks[rank].receive()["response"])
            self.record(rank, engine_token=state.engine_token, response_handle=response)

    def commit(self, *ranks: int, experts: dict[int, Iterable[int]] | None = None) -> None:
        """Write the next view: these members; each holds all experts unless given otherwise."""
        self.epoch += 1
        self.store.put(self.keys.view, encode(self.view(self.epoch, ranks, experts)))

    def stage(self, *ranks: int) -> int:
        """Write the next view as a staged one; its revision."""
        return self.store.put(self.keys.next, encode(self.view(self.epoch + 1, ranks)))

    def view(self, epoch: int, ranks: Iterable[int], experts: dict[int, Iterable[int]] | None = None) -> View:
        members = tuple(Member(rank=r, node="n", incarnation=self.ranks[r].record.incarnation) for r in ranks)
        held = experts or dict.fromkeys(ranks, range(self.config.experts))
        placement = {rank: (tuple(held[rank]),) * self.config.moe_layers for rank in ranks}
        return View(epoch=epoch, members=members, placement=placement)

    def assign(self) -> None:
        """Assign to node "n" the ranks that it runs."""
        specs = tuple(RankSpec(rank=r, incarnation=mine.record.incarnation) for r, mine in sorted(self.ranks.items()))
        self.store.put(self.keys.assign("n"), encode(Assignment(node="n", ranks=specs)))

    def bury(self, rank: int) -> None:
        """What the agent does about a dead rank: its record goes."""
        gone = self.ranks.pop(rank)
        self.store.delete(self.keys.rank(rank, gone.record.incarnation))
        self._closed.append(gone)

    def adopted(self, timeout_s: float = 20.0) -> None:
        """Wait until the engine says that it uses the view committed last."""

        def there() -> bool:
            state = self.state()
            status = state.engine_status
            return status is not None and (status.token, status.epoch) == (state.engine_token, self.epoch)

        eventually(there, timeout_s, f"epoch {self.epoch} in use by the engine")

    def close(self) -> None:
        for rank in [*self.ranks.values(), *self._closed]:
            rank.close()
        self._mail.cleanup()


class EngineThread:
    """The engine role in a thread of the test."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.path = folder / "events.jsonl"
        self.stop = threading.Event()
        self.error: Exception | None = None
        self._store = store
        self._thread = threading.Thread(target=self._run, name="engine-under-test")
        self._thread.start()

    def _run(self) -> None:
        try:
            run_engine(self._store, CLUSTER, "n", self.stop, EventLog(self.path, "engine"))
        except Exception as error:  # noqa: BLE001 - looked at by the test
            self.error = error

    def events(self, kind: str) -> list[Event]:
        return [event for event in EventLog.read(self.path) if event.kind == kind]

    def close(self) -> None:
        self.stop.set()
        self._thread.join(timeout=60.0)
        assert not self._thread.is_alive(), "the engine does not stop"
        if self.error is not None and not isinstance(self.error, Fenced):
            raise self.error


class Gateway:
    """Submits requests, and follows the engine as the real gateway does: submits again what is open."""

    def __init__(self, cluster: StandInCluster) -> None:
        self._cluster = cluster
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self.token = 0
        self.requests: dict[str, Submit] = {}
        self.outputs: dict[str, list[int]] = {}
        self.ends: dict[str, str] = {}

    def connect(self) -> None:
        """Say hello to the engine in office, and go on there with what is open."""
        state = eventually(lambda: (s := self._cluster.state()).engine and s, 30.0, "an engine's address")
        assert state
        assert state.engine is not None
        if self._socket is not None:
            self._socket.close(0)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(state.engine.address)
        self.send(Hello("g"))
        welcome = self.receive(20.0)
        assert isinstance(welcome, Welcome)
        self.token = welcome.engine_token
        for name, request in self.requests.items():
            if name not in self.ends:
                self.send(msgspec.structs.replace(request, emitted=self.outputs[name]))

    def send(self, message: Submit | Abort | Hello) -> None:
        assert self._socket is not None
        self._socket.send(msgspec.msgpack.encode(message))

    def receive(self, timeout_s: float) -> ToGateway | None:
        assert self._socket is not None
        if not self._socket.poll(int(timeout_s * 1000)):
            return None
        return msgspec.msgpack.decode(self._socket.recv(), type=ToGateway)  # type: ignore[no-any-return]

    def submit(self, count: int, length: int, prompt: int = 6, trace: str = "") -> None:
        for _ in range(count):
            name = f"r{len(self.requests)}"
            tokens = [(len(self.requests) * 7 + n) % VOCAB for n in range(prompt + len(self.requests) % 5)]
            self.requests[name] = Submit(name, tokens, Sampling(), length, ignore_eos=True, trace=trace)
            self.outputs[name] = []
            self.send(self.requests[name])

    def pump(self, until: Any, timeout_s: float = 30.0, what: str = "tokens") -> None:
        """Take messages in until a condition holds."""

        def step() -> bool:
            message = self.receive(0.05)
            while message is not None:
                self.take(message)
                message = self.receive(0)
            return bool(until())

        eventually(step, timeout_s, what, interval_s=0.0)

    def silence(self, seconds: float) -> None:
        """Take in what is on its way, then see that nothing comes for this time."""
        deadline = time.monotonic() + 10.0
        while (message := self.receive(seconds)) is not None:
            self.take(message)
            assert time.monotonic() < deadline, "tokens go on coming"

    def take(self, message: ToGateway) -> None:
        assert message.engine_token == self.token
        if isinstance(message, Tokens):
            output = self.outputs[message.request_id]
            assert message.request_id not in self.ends, "tokens after the end"
            assert message.index == len(output), f"{message.request_id}: index {message.index} after {len(output)}"
            output += message.tokens
            if message.finish_reason:
                self.ends[message.request_id] = message.finish_reason
        elif isinstance(message, Rejected):
            self.ends[message.request_id] = f"{message.status} {message.message}"

    def finish(self, timeout_s: float = 60.0) -> None:
        """Wait for all requests, and compare each with the oracle."""
        self.pump(lambda: len(self.ends) == len(self.requests), timeout_s, "all requests to end")
        for name, request in self.requests.items():
            assert (self.outputs[name], self.ends[name]) == (oracle(request), "length"), name

    def emitted(self) -> int:
        return sum(map(len, self.outputs.values()))

    def close(self) -> None:
        self._context.destroy(0)
