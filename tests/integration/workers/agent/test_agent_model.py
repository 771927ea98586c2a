"""The agent with real workers: from a checkpoint on disk to tokens, and a new rank in a dead one's place."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from membership.base.events import Event, EventLog
from membership.base.rank_id import RankId
from membership.placement.plan import plan
from membership.store.codec import encode
from membership.store.in_memory import MemoryStore
from membership.store.records import ClusterConfig, ClusterState, EngineRecord, Member, View
from tests.support.agent_scene import KEYS, Scene
from tests.support.families import write_checkpoint
from tests.support.helpers import eventually
from workers.agent.agent import run_agent
from workers.model.families import read_model_info
from workers.protocol.live_mask import LiveMask
from workers.protocol.messages import EngineMessage, Sampling, SeqChunk, StepBatch, StepResult, StepStatus
from workers.queue.message_queue import MessageQueue, MsgpackCodec

pytestmark = pytest.mark.integration

RANKS = 2
CHUNK = SeqChunk(seq=1, start=0, tokens=[1, 2, 3], blocks=[0], sample=Sampling())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", "mixtral")


@pytest.fixture
def scene(checkpoint: Path, tmp_path: Path) -> Iterator[Scene]:
    info = read_model_info(str(checkpoint))
    with ExitStack() as stack:
        store = MemoryStore()
        stack.callback(store.close)
        config = ClusterConfig(
            cluster="c", model=str(checkpoint), served_model_name="m", moe_layers=info.moe_layers, experts=info.experts,
            vocab_size=info.vocab_size, max_model_len=256, kv_blocks=32,
        )  # fmt: skip
        store.put(KEYS.config, encode(config))
        stop = threading.Event()
        made = Scene(store, tmp_path / "events.jsonl")
        agent = threading.Thread(target=run_agent, args=(store, "c", "n", stop, EventLog(made.path, "agent", "c")))
        agent.start()
        stack.callback(agent.join, 40)
        stack.callback(stop.set)
        yield made


class Driver:
    """A small engine: one step at a time."""

    def __init__(self, scene: Scene, stack: ExitStack) -> None:
        self.scene, self.stack = scene, stack
        self.steps = stack.enter_context(MessageQueue("steps", codec=MsgpackCodec(EngineMessage)))
        self.mask = stack.enter_context(LiveMask.create())
        handle = self.steps.export_handle().encode()
        record = EngineRecord(node="n", pid=1, address="", broadcast_handle=handle, mask_handle=self.mask.handle())
        scene.store.put(KEYS.engine, encode(record))
        self.token = scene.state().engine_token
        self.answers: dict[RankId, MessageQueue] = {}
        self.number = 0

    def prepare(self, epoch: int, *keys: RankId) -> None:
        """Have `keys` registered, attached, and prepared for a view of exactly them."""
        self.scene.until_registered(*keys)
        model = self.scene.state().config
        assert model is not None
        placement = plan(model.moe_layers, model.experts, [rank for rank, _ in keys], model.redundancy)
        members = tuple(Member(rank=rank, node="n", incarnation=incarnation) for rank, incarnation in keys)
        revision = self.scene.store.put(KEYS.next, encode(View(epoch=epoch, members=members, placement=placement)))

        def done(state: ClusterState) -> bool:
            records = [state.ranks[key] for key in keys]
            assert not any(record.prepare_error for record in records), records
            return all(r.prepared_revision == revision and r.engine_token == self.token for r in records)

        state = self.scene.until(done, f"epoch {epoch} prepared", 60)
        assert len({state.ranks[key].fingerprint for key in keys}) == 1
        for key in keys:
            if key not in self.answers:
                queue = MessageQueue.create_from_handle(
                    state.ranks[key].response_handle, f"engine-{self.token}", codec=MsgpackCodec(StepResult)
                )
                self.answers[key] = self.stack.enter_context(queue)

    def step(self, epoch: int, *keys: RankId) -> list[int]:
        """Run the chunk on each of `keys` in one step: their tokens."""
        self.number += 1
        chunks = {rank: [CHUNK] for rank, _ in keys}
        self.steps.enqueue(StepBatch(self.token, epoch, self.number, 0, [], chunks))
        tokens = []
        for key in keys:
            result = self.answers[key].dequeue(timeout_s=30)
            assert (result.status, result.error) == (StepStatus.OK, "")
            tokens.append(result.tokens[0].token)
        return tokens


def test_ranks_serve_a_real_model_and_a_dead_one_is_replaced(scene: Scene) -> None:
    a, b, later = RankId(0, 1), RankId(1, 2), RankId(1, 3)
    with ExitStack() as stack:
        scene.assign(a, b)
        driver = Driver(scene, stack)
        driver.prepare(1, a, b)
        first = driver.step(1, a, b)
        assert first[0] == first[1], "the same sequence on every rank"
        assert driver.step(1, a, b) == first, "a step may be run again"
        os.kill(scene.state().ranks[b].pid, signal.SIGKILL)
        scene.until(lambda s: b not in s.ranks, "the death published")
        scene.assign(a, later)
        driver.prepare(2, a, later)
        assert driver.step(2, a, later) == first
        eventually(lambda: len(scene.events("rank_ready")) == 3, 30, "the events")
        again = next(event for event in scene.events("rank_ready") if event.fields["incarnation"] == 3)
        print(f"a rank from the warm forkserver was ready after {again.fields['took_ms']} ms")


def test_weights_outlive_their_ranks_and_are_there_once(scene: Scene, checkpoint: Path) -> None:
    """Both ranks that loaded are killed, the file is turned to zeros, and new ranks say the same: from the store."""
    a, b, later, last = RankId(0, 1), RankId(1, 2), RankId(1, 3), RankId(0, 4)
    with ExitStack() as stack:
        scene.assign(a, b)
        driver = Driver(scene, stack)
        driver.prepare(1, a, b)
        first = driver.step(1, a, b)
        assert sum(event.fields["bytes_loaded"] for event in prepared(scene, 1, 2)) > 0
        store = scene.events("weights_held")[-1].fields
        assert store["node"] == "n"
        overwrite(checkpoint / "model.safetensors")

        os.kill(scene.state().ranks[b].pid, signal.SIGKILL)
        scene.until(lambda s: b not in s.ranks, "the death published")
        driver.prepare(2, a)
        (survivor,) = prepared(scene, 2, 1)
        moved = survivor.fields["bytes_loaded"] + survivor.fields["bytes_mapped"]
        assert moved == 0, "every expert had its replica where it was needed"
        assert driver.step(2, a) == first[:1]

        scene.assign(a, later)
        driver.prepare(3, a, later)
        assert driver.step(3, a, later) == first
        os.kill(scene.state().ranks[a].pid, signal.SIGKILL)
        scene.until(lambda s: a not in s.ranks, "the death published")
        scene.assign(later, last)
        driver.prepare(4, later, last)
        assert driver.step(4, later, last) == first
        for event in [*prepared(scene, 3, 2), *prepared(scene, 4, 2)]:
            assert event.fields["bytes_loaded"] == 0, "nothing is read while the store has it"
        new = [e for e in prepared(scene, 3, 2) if e.rank == later[0]] + [
            e for e in prepared(scene, 4, 2) if not e.rank
        ]
        assert all(event.fields["bytes_mapped"] > 0 for event in new)

        maps = [weight_maps(scene.state().ranks[key].pid) for key in (later, last)]
        both = maps[0].keys() & maps[1].keys()
        assert sum(maps[0][inode] for inode in both) > store["bytes"] / 2, "the same memory in both"
        assert scene.events("weights_held")[-1].fields["bytes"] == store["bytes"]


def prepared(scene: Scene, epoch: int, count: int) -> list[Event]:
    """The events of ranks that are prepared for the view of `epoch` (the views were staged in this order)."""

    def found() -> list[Event]:
        events = scene.events("rank_prepared")
        revisions = sorted({event.fields["revision"] for event in events})
        return [e for e in events if len(revisions) >= epoch and e.fields["revision"] == revisions[epoch - 1]]

    return eventually(lambda: found() if len(found()) == count else [], 30, f"{count} events of epoch {epoch}")


def overwrite(file: Path) -> None:
    """Zeros in place; size and times stay, so that to a rank it is the same checkpoint."""
    found = file.stat()
    with file.open("r+b") as opened:
        opened.write(bytes(found.st_size))
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


def weight_maps(pid: int) -> dict[int, int]:
    """Size of each mapped entry of the weight store, by the inode of its memory."""
    sizes: dict[int, int] = {}
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "memfd:elastic-ep-weights" in line:
            span, rights, _, _, inode, *_ = line.split()
            assert rights.startswith("r--"), line
            start, end = (int(edge, 16) for edge in span.split("-"))
            sizes[int(inode)] = sizes.get(int(inode), 0) + end - start
    return sizes
