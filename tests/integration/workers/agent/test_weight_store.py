"""The host's weight store: loaded once, mapped by every rank, the same bits, and there when its loader is dead."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
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
from workers.model.runner import ModelRunner
from workers.model.shared_weights import SharedWeights, WeightsCorrupt, map_entry, write_entry
from workers.protocol.messages import Sampling, SeqChunk
from workers.protocol.weight_client import Held, WeightClient

pytestmark = pytest.mark.integration

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

    second = load_model(path, store=host.client())
    mapped, again = run(second)
    assert second.checkpoint.bytes_read == 0
    assert again.bytes_mapped == sum(w.nbytes for w in again._held.values())
    assert filled == plain
    assert mapped == plain
    assert host.store.nbytes == held
    shared = second.model.state_dict()
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, shared[name]), name
        assert tensor.dtype == shared[name].dtype, name
    assert all(w.gate_up.data_ptr() % 64 == w.down.data_ptr() % 64 == 0 for w in again._held.values())
    assert ("weights_held", {"entries": len(host.store.keys), "bytes": held}) in host.events
    assert "weights_dropped" not in host.kinds()


def test_stored_weights_cannot_be_written_to(host: Host) -> None:
    import torch

    client = host.client()
    fd, checksum = write_entry({"w": torch.ones(3, 5)})
    os.close(client.deposit("k", checksum, fd)[1])
    os.close(fd)
    held, theirs = client.find(["k", "absent"])["k"]
    try:
        for attempt in (
            lambda: mmap.mmap(theirs, held.size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
            lambda: os.pwrite(theirs, b"x", 0),
            lambda: os.ftruncate(theirs, 0),
        ):
            with pytest.raises(OSError) as refused:  # noqa: PT011 - the number is looked at
                attempt()
            assert refused.value.errno in (errno.EPERM, errno.EACCES)
        assert map_entry(theirs, held).tensors["w"].tolist() == [[1.0] * 5] * 3
    finally:
        os.close(theirs)


def test_only_sealed_memory_is_taken(host: Host) -> None:
    fd = os.memfd_create("open", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 4096)
        with pytest.raises(HandoverRefused, match="not one sealed piece"):
            host.client().deposit("k", 0, fd)
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
    fd, checksum = write_entry(wrong)
    held, theirs = host.client().deposit(made.shared._key("expert/0/3"), checksum ^ 1, fd)
    os.close(fd)
    with pytest.raises(WeightsCorrupt, match="checksum"):
        map_entry(theirs, held)
    os.close(theirs)
    result, bank = run(made)
    assert result == plain
    assert bank.bytes_mapped == 0
    dropped = [fields for kind, fields in host.events if kind == "weights_dropped"]
    assert dropped == [{"key": held.key, "reason": "checksum"}]
    assert run(load_model(path, store=host.client()))[0] == plain
    assert held.key in host.store.keys, "what was read instead is there now"


def _expert_of(loaded: LoadedModel) -> dict[str, Any]:
    made = load_model(loaded.info.path)
    weights = made.source.load(0, 3)
    made.checkpoint.close()
    return {"gate_up_proj": weights.gate_up.t(), "down_proj": weights.down.t()}


def test_a_checksum_is_compared_once(host: Host) -> None:
    import torch

    shared = SharedWeights(host.client(), "m/bf16")
    assert shared.put("a", {"w": torch.ones(4)}, b"note") is not None
    client = host.client()
    (held, fd), *_ = client.find(["m/bf16/layout1/a"]).values()
    os.close(fd)
    assert not held.verified
    shared.report()
    (held, fd), *_ = client.find(["m/bf16/layout1/a"]).values()
    assert held.verified
    assert map_entry(fd, Held(held.key, held.size, held.checksum ^ 1, verified=True)).note == b"note"
    os.close(fd)


def test_a_changed_checkpoint_is_another_one_once_the_store_is_empty(host: Host, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "mixtral")
    served, _ = run(load_model(path, store=host.client()))
    entries = len(host.store.keys)
    replace_weights(path)
    assert run(load_model(path, store=host.client()))[0] == served
    host.store.clear()
    assert host.store.nbytes == 0
    changed = load_model(path, store=host.client())
    assert changed.checkpoint.bytes_read > 0
    assert run(changed)[0] == run(load_model(path))[0] != served
    assert len(host.store.keys) == entries


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

    eventually(lambda: _memfds() == 0, 10, "the descriptors of earlier tests to be closed")
    shared = SharedWeights(host.client(), "m")
    kept = shared.put("a", {"w": torch.ones(4)})
    assert kept is not None
    assert _memfds() == 1
    host.store.close()
    eventually(lambda: _memfds() == 0, 10, "the descriptors to be closed")
    assert host.store.nbytes == 0
    assert kept.tensors["w"].tolist() == [1.0] * 4, "a mapping outlives the store"


def _memfds() -> int:
    """Descriptors of entries in this process."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            count += "elastic-ep-weights" in os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue  # closed meanwhile
    return count


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
