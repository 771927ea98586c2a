"""The host's weight store: loaded once, mapped by every rank, the same bits, and there when its loader is dead."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.families import write_checkpoint
from tests.support.helpers import eventually
from tests.support.local_exchange import LocalExchange
from tests.support.replaced_files import replace_weights
from workers.agent.weight_store import WeightStore
from workers.ipc.handover import HandoverRefused
from workers.model.calibrations import Calibrations
from workers.model.expert_bank import LocalExpertBank
from workers.model.load import LoadedModel, load_model
from workers.model.packing import available, is_packed
from workers.model.packing import plain as unpacked
from workers.model.runner import ModelRunner
from workers.model.shared_weights import (
    LAYOUT,
    Entry,
    SharedWeights,
    Slot,
    WeightsCorrupt,
    compare,
    copied,
    entries_of,
    map_shard,
    write_shard,
)
from workers.protocol.load_progress import LoadProgress
from workers.protocol.messages import Sampling, SeqChunk
from workers.protocol.weight_client import SEALS, Held, WeightClient

pytestmark = pytest.mark.integration
WIDE = {"hidden_size": 128, "moe_intermediate_size": 64}  # wide enough to be packed

CHUNKS = [SeqChunk(1, 0, list(range(2, 40)), list(range(5)), Sampling(logprobs=5))]


class Host:
    """A store, and the events that it reported."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.store = WeightStore(lambda kind, **fields: self.events.append((kind, fields)))

    def client(self) -> WeightClient:
        return WeightClient(self.store.handle())

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    try:
        yield made
    finally:
        made.store.close()


def shard(key: str, tensors: dict[str, Any]) -> tuple[int, int]:
    """A sealed memfd and its checksum."""
    slots = [Slot(name, tensor.dtype, tuple(tensor.shape), copied(tensor)) for name, tensor in tensors.items()]
    return write_shard([Entry(key, slots, lambda parts: b"note")])


def run(loaded: LoadedModel) -> tuple[list[Any], LocalExpertBank]:
    """Everything on one rank: what it says, with log probabilities, and its bank."""
    bank = LocalExpertBank()
    runner = ModelRunner(loaded, bank, kv_blocks=16, block_size=16, max_len=256)
    try:
        bank.load_all([(layer, e) for layer in range(loaded.info.moe_layers) for e in range(loaded.info.experts)])
        runner.attach(LocalExchange(bank))
        return runner.run(CHUNKS), bank
    finally:
        runner.close()


@pytest.mark.parametrize(
    ("family", "dtype", "changes"),
    [
        ("mixtral", "float32", {"tie_word_embeddings": True}),
        ("qwen2_moe", "bfloat16", {}),
        ("qwen2_moe", "bfloat16", WIDE),
        ("deepseek_v3", "bfloat16", {}),  # keeps a module in float32, and stores a buffer
    ],
)
def test_mapped_weights_give_the_bits_of_loaded_ones(
    family: str, dtype: str, changes: dict[str, Any], host: Host, tmp_path: Path
) -> None:
    import torch

    path = write_checkpoint(tmp_path, family, dtype, **changes)
    torch.set_num_threads(1)
    plain, _ = run(load_model(path))
    first = load_model(path, store=host.client())
    assert first.checkpoint.bytes_read > 0
    filled, bank = run(first)
    assert bank.bytes_mapped == 0
    held = host.store.nbytes
    assert held >= first.checkpoint.bytes_read
    counts = {"entries": len(host.store.keys), "bytes": held, "shards": len(host.store._shards)}
    assert host.events[-1] == ("weights_held", counts), "the only rank of a host compares no checksum, and says so, too"

    second = load_model(path, store=host.client())
    mapped, again = run(second)
    assert second.checkpoint.bytes_read == 0
    assert again.bytes_mapped == sum(w.nbytes for w in again._held.values())
    assert filled == plain
    assert mapped == plain
    assert host.store.nbytes == held
    shared = second.model.state_dict()
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(unpacked(tensor), unpacked(shared[name])), name
        assert tensor.dtype == shared[name].dtype, name
    matrices = [matrix for w in again._held.values() for matrix in (w.gate_up, w.down)]
    if changes == WIDE:
        assert all(map(is_packed, matrices)) == available()
    assert all(_address(matrix) % 64 == 0 for matrix in matrices)
    assert "weights_dropped" not in host.kinds()


def _address(matrix: Any) -> int:
    import torch

    found: int = torch.ops.mkldnn.data_ptr(matrix) if is_packed(matrix) else matrix.data_ptr()
    return found


def test_stored_weights_cannot_be_written_to(host: Host) -> None:
    import torch

    client = host.client()
    fd, checksum = shard("k", {"w": torch.ones(3, 5)})
    os.close(client.deposit(["k"], checksum, fd)[0][1])
    os.close(fd)
    ((held, theirs),) = client.find(["k", "absent"])
    try:
        for attempt in (
            lambda: mmap.mmap(theirs, held.size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
            lambda: os.pwrite(theirs, b"x", 0),
            lambda: os.ftruncate(theirs, 0),
        ):
            with pytest.raises(OSError) as refused:  # noqa: PT011 - the number is looked at
                attempt()
            assert refused.value.errno in (errno.EPERM, errno.EACCES)
        assert entries_of(map_shard(theirs, held), held)["k"].tensors["w"].tolist() == [[1.0] * 5] * 3
    finally:
        os.close(theirs)


def test_only_sealed_memory_is_taken(host: Host) -> None:
    fd = os.memfd_create("open", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 4096)
        with pytest.raises(HandoverRefused, match="not one sealed piece"):
            host.client().deposit(["k"], 0, fd)
    finally:
        os.close(fd)
    assert not host.store.keys


def test_the_first_deposit_wins(host: Host) -> None:
    import torch

    one, two = (SharedWeights(host.client(), "m/bf16") for _ in range(2))
    first = one.put("expert/0/0", {"w": torch.ones(4)})
    second = two.put("expert/0/0", {"w": torch.zeros(4)})
    assert first is not None
    assert second is not None
    assert second.tensors["w"].tolist() == [1.0] * 4
    assert len(host.store.keys) == 1
    assert not SharedWeights(host.client(), "m/f32").find(["expert/0/0"]), "another type is another entry"


def test_a_damaged_deposit_is_dropped_and_the_checkpoint_read(host: Host, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "mixtral")
    plain, _ = run(load_model(path))
    made = load_model(path, store=host.client())
    assert made.shared is not None
    wrong = {name: tensor.clone().zero_() for name, tensor in _expert_of(made).items()}
    key = made.shared._key("expert/0/3")
    fd, checksum = shard(key, wrong)
    ((held, theirs),) = host.client().deposit([key], checksum ^ 1, fd)
    os.close(fd)
    with pytest.raises(WeightsCorrupt, match="checksum"):
        compare(map_shard(theirs, held), held)
    os.close(theirs)
    result, bank = run(made)
    assert result == plain
    assert bank.bytes_mapped == 0
    dropped = [fields for kind, fields in host.events if kind == "weights_dropped"]
    assert dropped == [{"key": key, "reason": "checksum"}]
    assert run(load_model(path, store=host.client()))[0] == plain
    assert key in host.store.keys, "what was read instead is there now"


def _expert_of(loaded: LoadedModel) -> dict[str, Any]:
    made = load_model(loaded.info.path)
    weights = made.source.load(0, 3)
    made.checkpoint.close()
    return {"gate_up_proj": weights.gate_up.t(), "down_proj": weights.down.t()}


def test_a_checksum_is_compared_once(host: Host) -> None:
    import torch

    maker, other = (SharedWeights(host.client(), "m/bf16") for _ in range(2))
    assert maker.put("a", {"w": torch.ones(4)}, b"note") is not None
    maker.report()
    client = host.client()

    def held() -> Held:
        ((held, fd),) = client.find([f"m/bf16/layout{LAYOUT}/a"])
        os.close(fd)
        return held

    assert not held().verified, "that the store has what its maker read is for another one to see"
    assert other.find(["a"])["a"].note == b"note"
    other.report()
    assert held().verified


def test_what_is_not_read_is_not_compared_until_somebody_reads_it(host: Host) -> None:
    """Its digest is enough for who has the content elsewhere."""
    import torch

    maker, other = (SharedWeights(host.client(), "m/bf16") for _ in range(2))
    maker.put("a", {"w": torch.ones(4)}, b"note")
    asked: list[dict[str, bytes]] = []

    def unread(notes: Mapping[str, bytes]) -> bool:
        asked.append(dict(notes))
        return len(asked) == 1

    with other.session(LoadProgress()) as session:
        found, ours = session.claim(["a"], unread)
        assert (found["a"].note, ours, asked) == (b"note", [], [{"a": b"note"}])
        assert other._right == []
        found, _ = session.claim(["a"], unread)
        assert found["a"].tensors["w"].tolist() == [1.0] * 4
        assert len(other._right) == 1


def test_a_byte_that_changed_in_a_shard_is_noticed() -> None:
    import torch

    fd, checksum = shard("k", {"a": torch.ones(3), "w": torch.arange(100)})
    copy = os.memfd_create("copy", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        size = os.fstat(fd).st_size
        os.pwrite(copy, os.pread(fd, size, 0), 0)
        os.pwrite(copy, b"!", 64 + 99 * 8)
        fcntl.fcntl(copy, fcntl.F_ADD_SEALS, SEALS)
        held = Held(1, ["k"], size, checksum, verified=False)
        compare(map_shard(fd, held), held)
        with pytest.raises(WeightsCorrupt, match="checksum"):
            compare(map_shard(copy, held), held)
    finally:
        os.close(fd)
        os.close(copy)


def test_a_header_with_a_bit_that_changed_is_not_made_use_of() -> None:
    """Neither are its offsets looked at, nor is anybody asked who has the content it names."""
    import torch

    fd, checksum = shard("k", {"a": torch.ones(3), "w": torch.arange(100)})
    try:
        size = os.fstat(fd).st_size
        whole = os.pread(fd, size, 0)
        for at in range(832 + 64, size):  # what is behind the tensors
            wrong = bytearray(whole)
            wrong[at] ^= 1
            with pytest.raises(WeightsCorrupt, match="header"):
                entries_of(wrong, Held(1, ["k"], size, checksum, verified=False))
    finally:
        os.close(fd)


def test_a_damaged_header_is_reported_before_a_device_is_asked_for_what_it_names(host: Host) -> None:
    import torch

    maker, other = (SharedWeights(host.client(), "m/bf16") for _ in range(2))
    fd, checksum = shard(maker._key("a"), {"w": torch.ones(4)})
    for _, theirs in host.client().deposit([maker._key("a")], checksum ^ 1, fd):
        os.close(theirs)
    os.close(fd)
    asked: list[Mapping[str, bytes]] = []
    with other.session(LoadProgress()) as session:
        found, ours = session.claim(["a"], lambda notes: not asked.append(notes))  # type: ignore[func-returns-value]
    assert (found, ours, asked) == ({}, ["a"], [])
    assert "weights_dropped" in host.kinds()


def test_a_device_that_fails_in_the_midst_of_a_claim_leaves_no_descriptor(host: Host) -> None:
    """As where its memory ends: the rank serves on, and tries again."""
    import torch

    maker, other = (SharedWeights(host.client(), "m/bf16") for _ in range(2))
    for name in "abc":
        maker.put(name, {"w": torch.ones(4)})
    before = _memfds()

    def unread(notes: Mapping[str, bytes]) -> bool:
        raise torch.OutOfMemoryError(f"no room for {list(notes)}")

    with other.session(LoadProgress()) as session, pytest.raises(torch.OutOfMemoryError, match="no room"):
        session.claim(list("abc"), unread)
    assert _memfds() <= before


class Rank:
    """A rank's side of the store that loads in a thread of its own."""

    def __init__(self, path: Path, host: Host) -> None:
        self.progress = LoadProgress()
        self.loaded = load_model(path, store=host.client(), progress=self.progress)
        self.bank = LocalExpertBank()
        self.runner = ModelRunner(self.loaded, self.bank, kv_blocks=16, block_size=16, max_len=256)
        self.read = 0

    def load(self, before_read: Callable[[], object] = lambda: None) -> threading.Thread:
        info = self.loaded.info
        every = [(layer, expert) for layer in range(info.moe_layers) for expert in range(info.experts)]

        def load() -> None:
            self.read = self.bank.load_all(every, before_read=before_read)

        thread = threading.Thread(target=load)
        thread.start()
        return thread


def test_ranks_of_a_host_read_each_expert_once(host: Host, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "mixtral", "bfloat16")
    ranks = [Rank(path, host) for _ in range(2)]
    both = threading.Barrier(2)
    first = [True, True]

    def meet(number: int) -> None:
        if first[number]:  # neither has read all before the other begins
            first[number] = False
            both.wait(30)

    try:
        threads = [rank.load(partial(meet, number)) for number, rank in enumerate(ranks)]
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        one = ranks[0].loaded.source.expert_bytes
        assert sum(rank.read for rank in ranks) == 16 * one
        assert all(rank.read >= one for rank in ranks), "both have read"
        assert ranks[1].loaded.checkpoint.bytes_read == ranks[1].read, "and one of them the rest of the model"
        assert all(rank.bank.bytes_mapped + rank.read == 16 * one for rank in ranks)
        assert len(host.store._shards) < len(host.store.keys), "a descriptor is for several experts"
        answers = []
        for rank in ranks:
            rank.runner.attach(LocalExchange(rank.bank))
            answers.append(rank.runner.run(CHUNKS))
        assert answers[0] == answers[1] == run(load_model(path))[0]
    finally:
        for rank in ranks:
            rank.runner.close()


def test_several_readers_write_a_shard_each(host: Host, tmp_path: Path) -> None:
    """As ranks on GPUs have them; one that is told to stop leaves nothing half read."""
    stopped: list[bool] = []

    def stop_soon() -> None:
        stopped.append(True)

    path = write_checkpoint(tmp_path, "mixtral")
    first, second = Rank(path, host), Rank(path, host)
    try:
        source, one = first.loaded.source, first.loaded.source.expert_bytes
        source.readers = 3
        assert first.bank.load_all([(0, expert) for expert in range(8)], lambda: len(stopped) > 2, stop_soon) < 8 * one
        for rank in (first, second):
            thread = rank.load()
            thread.join(60)
            assert not thread.is_alive()
        assert second.bank.bytes_mapped == 16 * one
        answers = []
        for rank in (first, second):
            rank.runner.attach(LocalExchange(rank.bank))
            answers.append(rank.runner.run(CHUNKS))
        assert answers[0] == answers[1] == run(load_model(path))[0]
    finally:
        for rank in (first, second):
            rank.runner.close()


def test_what_a_rank_that_died_was_reading_is_read_by_another(host: Host) -> None:
    import torch

    dying, heir = (SharedWeights(host.client(), "m") for _ in range(2))
    session = dying.session(LoadProgress())
    with heir.session(LoadProgress()) as later:
        claims = session.__enter__()
        assert claims.claim(["a", "b"])[1] == ["a", "b"]
        assert later.claim(["a", "b"]) == ({}, [])
        claims.still_reads()
        assert later.wait(), "it still reads"
        dying.put("a", {"w": torch.ones(1)})
        assert later.wait()
        found, ours = later.claim(["a", "b"])
        assert (list(found), ours) == (["a"], [])
        session.__exit__(None, None, None)
        assert later.wait(), "it has gone"
        assert later.claim(["b"])[1] == ["b"]


def test_a_changed_checkpoint_is_another_one_once_the_store_is_empty(host: Host, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "mixtral")
    served, _ = run(load_model(path, store=host.client()))
    entries = _weights_in(host)
    replace_weights(path)
    assert run(load_model(path, store=host.client()))[0] == served
    host.store.clear()
    assert host.store.nbytes == 0
    changed = load_model(path, store=host.client())
    assert changed.checkpoint.bytes_read > 0
    assert run(changed)[0] == run(load_model(path))[0] != served
    assert _weights_in(host) == entries


def _weights_in(host: Host) -> int:
    """Entries but for what was measured of kernels, which may be known from an earlier start."""
    return sum("/calibration/" not in key for key in host.store.keys)


def test_without_the_store_a_rank_loads_by_itself(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "mixtral")
    gone = Host()
    client = gone.client()
    gone.store.close()
    assert run(load_model(path, store=client))[0] == run(load_model(path))[0]


def test_kernels_are_measured_once_per_host(host: Host) -> None:
    measured: list[str] = []

    def measure() -> tuple[int, ...]:
        measured.append("products")
        return 16, 32

    first = Calibrations(SharedWeights(host.client(), "m/bf16"), "this-kernel/model")
    assert first.of("products", measure) == first.of("products", measure) == (16, 32)
    first.keep()
    for name, times in (("this-kernel/model", 1), ("another-kernel/model", 2)):
        assert Calibrations(SharedWeights(host.client(), "m/bf16"), name).of("products", measure) == (16, 32)
        assert len(measured) == times
    alone = Calibrations()
    alone.of("products", measure)
    alone.keep()
    assert len(measured) == 3, "without a store each measures by itself"


def test_a_store_leaves_nothing(host: Host) -> None:
    import torch

    before = _memfds()
    shared = SharedWeights(host.client(), "m")
    kept = shared.put("a", {"w": torch.ones(4)})
    assert kept is not None
    eventually(lambda: len(_memfds() - before) == 1, 30, "the store's descriptor alone")
    host.store.close()
    eventually(lambda: _memfds() <= before, 30, "the descriptors to be closed")
    assert host.store.nbytes == 0
    assert kept.tensors["w"].tolist() == [1.0] * 4, "a mapping outlives the store"


def _memfds() -> set[tuple[str, int]]:
    """Descriptors of entries in this process, each with its memory: those of earlier tests may still go."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            if "elastic-ep-weights" in os.readlink(f"/proc/self/fd/{fd}"):
                found.add((fd, os.stat(f"/proc/self/fd/{fd}").st_ino))
    return found


def test_all_ranks_of_a_host_share_one_bandwidth() -> None:
    store = WeightStore(bytes_per_s=1000, clock=lambda: 50.0)
    try:
        first, second = WeightClient(store.handle()), WeightClient(store.handle())
        assert [first.book(100), second.book(400), first.book(1)] == [0.0, 0.0, pytest.approx(0.4)]
    finally:
        store.close()
    free = WeightStore()
    try:
        assert [WeightClient(free.handle()).book(1 << 40) for _ in range(3)] == [0.0, 0.0, 0.0]
    finally:
        free.close()
