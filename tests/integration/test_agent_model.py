"""The agent with real workers: from a checkpoint on disk to tokens, and a new rank in a dead one's place."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from membership.codec import encode
from membership.events import EventLog
from membership.memory import MemoryStore
from membership.placement import plan
from membership.types import ClusterConfig, ClusterState, EngineRecord, Member, View
from tests.agent_scene import KEYS, Scene
from tests.families import write_checkpoint
from tests.helpers import eventually
from workers.agent import run_agent
from workers.livemask import LiveMask
from workers.messages import EngineMessage, Sampling, SeqChunk, StepBatch, StepResult, StepStatus
from workers.model.info import read_model_info
from workers.queue import MessageQueue, MsgpackCodec

pytestmark = pytest.mark.integration

RANKS = 2
CHUNK = SeqChunk(seq=1, start=0, tokens=[1, 2, 3], blocks=[0], sample=Sampling())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "mixtral")


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
        self.answers: dict[tuple[int, int], MessageQueue] = {}
        self.number = 0

    def prepare(self, epoch: int, *keys: tuple[int, int]) -> None:
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

    def step(self, epoch: int, *keys: tuple[int, int]) -> list[int]:
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
    a, b, later = (0, 1), (1, 2), (1, 3)
    with ExitStack() as stack:
        scene.assign(a, b)
        driver = Driver(scene, stack)
        driver.prepare(1, a, b)
        first = driver.step(1, a, b)
        assert first[0] == first[1], "the same sequence on every rank"
        assert driver.step(1, a, b) == first, "a step may be run again"
        os.kill(scene.state().ranks[b].pid, signal.SIGKILL)
        scene.until(lambda s: b not in s.ranks, "the death told")
        scene.assign(a, later)
        driver.prepare(2, a, later)
        assert driver.step(2, a, later) == first
        eventually(lambda: len(scene.events("rank_ready")) == 3, 5, "the events")
        again = next(event for event in scene.events("rank_ready") if event.fields["incarnation"] == 3)
        print(f"a rank from the warm forkserver was ready after {again.fields['took_ms']} ms")
