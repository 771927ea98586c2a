"""Files that are replaced while a host serves them: new ranks get the old content; another one has other digests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from membership.base.errors import ModelError
from tests.support.families import write_checkpoint
from tests.support.replaced_files import is_expert, put_back, replace_text, replace_weights
from workers.agent.weight_store import WeightStore
from workers.model.load import LoadedModel, load_model
from workers.protocol.weight_client import WeightClient

pytestmark = pytest.mark.integration

EXPERTS = [(layer, expert) for layer in range(2) for expert in range(8)]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "m", "mixtral", "bfloat16")


@pytest.fixture
def store() -> Iterator[WeightStore]:
    made = WeightStore()
    yield made
    made.close()


@contextmanager
def a_rank(path: Path, store: WeightStore | None = None) -> Iterator[LoadedModel]:
    loaded = load_model(path, store=WeightClient(store.handle()) if store is not None else None)
    try:
        yield loaded
    finally:
        loaded.checkpoint.close()


def content(loaded: LoadedModel, experts: list[tuple[int, int]] = EXPERTS) -> tuple[str, str, list[bytes]]:
    """Digests of all that a rank has loaded."""
    found = [weights.digest for _, weights in loaded.source.load_many(experts)]
    return loaded.config_digest, loaded.dense_digest, found


def content_of(path: Path) -> tuple[str, str, list[bytes]]:
    with a_rank(path) as loaded:
        return content(loaded)


def test_a_new_rank_gets_what_its_host_serves(checkpoint: Path, store: WeightStore) -> None:
    with a_rank(checkpoint, store) as first:
        before = content(first)
        assert first.replaced == ()
        old = replace_weights(checkpoint)
        with a_rank(checkpoint, store) as later:
            assert content(later) == before
            assert later.replaced == ("model.safetensors",)
            assert later.checkpoint.bytes_read == 0
        other = content_of(checkpoint)
        assert other[0] == before[0], "the same config"
        assert other[1] != before[1]
        assert not set(other[2]) & set(before[2])
        put_back(old)
        with a_rank(checkpoint, store) as last:
            assert (content(last), last.replaced) == (before, ())


def test_what_the_host_lacks_is_read_by_ranks_that_opened_the_old_files_and_by_no_others(
    checkpoint: Path, store: WeightStore
) -> None:
    """As a rebalance does, long after the start."""
    with a_rank(checkpoint, store) as first:
        replace_weights(checkpoint)
        with a_rank(checkpoint, store) as later:
            with pytest.raises(ModelError, match=r"model\.safetensors in .* changed since"):
                later.source.load(1, 7)
            assert first.source.load(1, 7).digest not in {b"", bytes(4)}
            assert later.source.load(1, 7).mapped
        assert content_of(checkpoint) != content(first)


def test_another_shard_is_as_it_was(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m", "mixtral", "bfloat16", shard="100KB")
    expected = content_of(path)
    with a_rank(path) as loaded:
        loaded.source.load(0, 0)
        for shard in sorted(path.glob("*.safetensors")):
            replace_weights(path, file=shard.name)
        assert content(loaded) == expected
    assert content_of(path) != expected


def test_experts_alone_may_differ(checkpoint: Path) -> None:
    before = content_of(checkpoint)
    replace_weights(checkpoint, is_expert)
    after = content_of(checkpoint)
    assert after[:2] == before[:2]
    assert not set(after[2]) & set(before[2])


def test_a_copy_is_the_same_model(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "elsewhere", copy_function=shutil.copyfile))
    assert content_of(copy) == content_of(checkpoint)


def test_another_type_is_another_model(checkpoint: Path) -> None:
    wide = load_model(checkpoint, "float32")
    try:
        assert wide.dense_digest != content_of(checkpoint)[1]
    finally:
        wide.checkpoint.close()


def test_a_file_written_in_place_whose_time_was_set_back_has_other_digests(checkpoint: Path) -> None:
    before, file = content_of(checkpoint), checkpoint / "model.safetensors"
    found = file.stat()
    with file.open("r+b") as opened:
        opened.seek(found.st_size // 2)
        opened.write(os.urandom(64))
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert content_of(checkpoint) != before


def test_another_config_is_not_put_around_the_hosts_weights(checkpoint: Path, store: WeightStore) -> None:
    with a_rank(checkpoint, store):
        replace_text(
            checkpoint, "config.json", lambda text: text.replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 1')
        )
        with pytest.raises(ModelError, match=r"config\.json in .* changed since") as caught, a_rank(checkpoint, store):
            pass
        assert "put the files back" in caught.value.hint


def test_without_what_the_host_served_the_files_count(checkpoint: Path, store: WeightStore) -> None:
    with a_rank(checkpoint, store) as first:
        before = content(first)
    replace_weights(checkpoint)
    store.clear()
    with a_rank(checkpoint, store) as later:
        assert content(later) == content_of(checkpoint) != before
