"""What a rank reads of dead ranks on GPUs: through one mapping, that of the right rank, until it is needed no more."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from membership.base.errors import RankFailed
from membership.base.rank_id import NO_SLOT, ProcessId, RankId, SpareId
from membership.base.timing import POOL_MAPPED_S
from tests.support.helpers import eventually
from workers.agent.kv_pools import KvPools
from workers.ipc.handover import HandoverRefused
from workers.model.backend import Lasting
from workers.protocol.messages import CopyBlocks
from workers.rank.left_pools import LeftPools, keep_pool

pytestmark = pytest.mark.unit

DEAD, OTHER, READER = RankId(0, 11), RankId(1, 12), RankId(2, 13)
SIZE = 4096


@dataclass
class Memory:
    """Stands for a GPU's memory of a descriptor, mapped: what is there is read through the descriptor."""

    text: bytes
    size: int
    address: int = 0
    closed: bool = False

    def close(self) -> None:
        self.closed = True


@dataclass
class Machine:
    """An agent's pools, which ranks have ended, and a GPU that maps what it is given."""

    ended: set[ProcessId] = field(default_factory=set)
    mapped: list[Memory] = field(default_factory=list)
    now: float = 0.0
    refuses: bool = False

    def __post_init__(self) -> None:
        self.pools = KvPools(self.ended.__contains__)
        self.reader = LeftPools(self.pools.handle(), self.map, lambda: self.now)

    def map(self, fd: int, nbytes: int) -> Memory:
        if self.refuses:
            raise RankFailed("no P2P between these GPUs")
        self.mapped.append(Memory(os.pread(fd, 100, 0), nbytes))
        return self.mapped[-1]

    def rank(self, key: ProcessId, text: bytes) -> None:
        """A rank whose KV cache is on a GPU has been started."""
        os.close(os.dup(self.pools.make(key)))
        fd = os.memfd_create("gpu-memory")
        os.write(fd, text)
        numbers = (NO_SLOT, key.number) if isinstance(key, SpareId) else key
        keep_pool(cast("Any", Runner(Lasting(fd, SIZE))), self.pools.handle(), *numbers)

    def read(self, source: RankId, runner: Runner, blocks: Sequence[int] = (1, 2)) -> int:
        order = CopyBlocks(7, 1, source, READER, list(blocks), arriving=True, there=[3, 4][: len(blocks)])
        return self.reader.read(cast("Any", runner), order)


class Runner:
    """Notes what it was to read, from where."""

    def __init__(self, lasting: Lasting = Lasting()) -> None:  # noqa: B008
        self.lasting, self.read = lasting, list[tuple[bytes, list[int], list[int]]]()

    @property
    def cache(self) -> Runner:
        return self

    def hand_over(self) -> Lasting:
        return self.lasting

    def fetch_in(self, blocks: list[int], pool: Memory, there: list[int]) -> int:
        assert not pool.closed
        assert pool.size == SIZE
        self.read.append((pool.text, blocks, there))
        return len(blocks)

    def read_in(self, blocks: list[int], pool: int, there: list[int]) -> int:
        self.read.append((os.pread(pool, 100, 0), blocks, there))
        return len(blocks)


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    made.rank(DEAD, b"of the dead")
    made.rank(OTHER, b"of the other")
    yield made
    made.reader.close()
    made.pools.close()


def test_a_dead_rank_s_memory_is_mapped_once_for_all_reads(machine: Machine) -> None:
    machine.ended.add(DEAD)
    runner = Runner()
    assert [machine.read(DEAD, runner), machine.read(DEAD, runner, [5])] == [2, 1]
    assert runner.read == [(b"of the dead", [1, 2], [3, 4]), (b"of the dead", [5], [3])]
    assert len(machine.mapped) == 1


def test_the_memory_of_a_rank_that_may_live_is_not_mapped(machine: Machine) -> None:
    with pytest.raises(HandoverRefused, match="not known to have ended"):
        machine.read(DEAD, Runner())
    assert not machine.mapped


def test_another_rank_s_death_takes_the_place_of_the_first(machine: Machine) -> None:
    machine.ended |= {DEAD, OTHER}
    runner = Runner()
    for source in (DEAD, OTHER, DEAD):
        machine.read(source, runner)
    assert [text for text, *_ in runner.read] == [b"of the dead", b"of the other", b"of the dead"]
    assert [memory.closed for memory in machine.mapped] == [True, True, False]


def test_what_is_not_read_any_more_is_let_go(machine: Machine) -> None:
    machine.ended.add(DEAD)
    machine.read(DEAD, Runner())
    machine.now = POOL_MAPPED_S
    machine.reader.rest()
    assert not machine.mapped[0].closed
    machine.now = POOL_MAPPED_S + 0.1
    machine.reader.rest()
    assert machine.mapped[0].closed
    machine.read(DEAD, Runner())
    assert len(machine.mapped) == 2


def test_where_our_gpu_cannot_reach_it_nothing_stays_behind(machine: Machine) -> None:
    machine.ended.add(DEAD)
    machine.refuses = True
    with pytest.raises(RankFailed):
        machine.read(DEAD, Runner())
    machine.refuses = False
    assert machine.read(DEAD, Runner()) == 2


def test_a_spare_s_memory_goes_with_it(machine: Machine) -> None:
    spare, rank = SpareId(5), RankId(3, 14)
    machine.rank(spare, b"of the spare")
    machine.pools.rename(spare, rank)
    machine.ended.add(rank)
    runner = Runner()
    machine.read(rank, runner)
    assert runner.read[0][0] == b"of the spare"


def test_a_rank_on_a_cpu_keeps_the_memfd_that_it_was_forked_with(machine: Machine) -> None:
    cpu = RankId(4, 15)
    os.write(machine.pools.make(cpu), b"on a CPU")
    keep_pool(cast("Any", Runner()), machine.pools.handle(), *cpu)
    machine.ended.add(cpu)
    runner = Runner()
    assert machine.read(cpu, runner) == 2
    assert runner.read == [(b"on a CPU", [1, 2], [3, 4])]
    assert not machine.mapped


def test_a_rank_without_an_agent_serves_on(machine: Machine) -> None:
    fd = os.memfd_create("gpu-memory")
    keep_pool(cast("Any", Runner(Lasting(fd, SIZE))), b"", *DEAD)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_the_memory_is_free_once_the_agent_and_the_reader_have_let_go(machine: Machine) -> None:
    def held() -> int:
        names = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
        return sum("gpu-memory" in os.readlink(name) for name in names if os.path.lexists(name))

    machine.ended.add(DEAD)
    machine.read(DEAD, Runner())
    eventually(lambda: held() == 2, 30.0, "the readers' descriptors to be closed")
    for key in (DEAD, OTHER):
        machine.pools.free(key)
    assert held() == 0
