"""The identity of a checkpoint's files: content decides, a stamp only notices; what was opened is read as it was."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from membership.base.errors import ModelError
from tests.support.replaced_files import put_back, replace_text, replace_weights
from workers.model.checkpoint import Checkpoint
from workers.model.content import FileStamp, changed_files, name_of, small_files, stamp_files
from workers.model.shared_weights import Entry, Slot, copied
from workers.model.weight_digests import dense_digest, expert_digest, table

pytestmark = pytest.mark.unit

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
VALUES = torch.arange(64, dtype=torch.bfloat16).reshape(8, 8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "m"
    directory.mkdir()
    save_file({"a": VALUES}, directory / FILE)
    for name in ("config.json", "tokenizer.json"):
        (directory / name).write_text("{}")
    return directory


def test_a_copy_has_other_stamps_and_the_same_content(root: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile))
    assert small_files(copy) == small_files(root)
    assert sorted(small_files(root)) == ["config.json", "tokenizer.json"]
    assert name_of(stamp_files(copy)) != name_of(stamp_files(root))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_small_file_of_other_content_is_another_one(root: Path, file: str) -> None:
    before = small_files(root)
    (root / file).write_text("{ }")
    assert small_files(root) != before


def test_replaced_new_and_missing_files_are_named(root: Path) -> None:
    before = stamp_files(root)
    assert changed_files(before, stamp_files(root)) == []
    old = replace_weights(root)
    (root / INDEX).write_text("{}")
    assert changed_files(before, stamp_files(root)) == [FILE, INDEX]
    put_back(old)
    (root / INDEX).unlink()
    assert changed_files(before, stamp_files(root)) == []
    (root / "config.json").unlink()
    assert changed_files(before, stamp_files(root)) == ["config.json"]


def test_a_file_that_was_replaced_is_read_as_it_was(root: Path) -> None:
    checkpoint = Checkpoint(root, stamp_files(root))
    try:
        replace_weights(root)
        assert torch.equal(checkpoint.read("a"), VALUES)
    finally:
        checkpoint.close()


def test_a_shard_is_read_as_it_was_though_another_was_read_before(root: Path) -> None:
    """It was opened when it was first needed: by then it could be another model's."""
    save_file({"b": VALUES + 1}, root / "second.safetensors")
    (root / INDEX).write_text(f'{{"weight_map": {{"a": "{FILE}", "b": "second.safetensors"}}}}')
    checkpoint = Checkpoint(root, stamp_files(root))
    try:
        assert torch.equal(checkpoint.read("a"), VALUES)
        replace_weights(root, file="second.safetensors")
        assert torch.equal(checkpoint.read("b"), VALUES + 1)
    finally:
        checkpoint.close()


def test_a_file_that_is_written_to_is_not_read_on(root: Path) -> None:
    checkpoint = Checkpoint(root, stamp_files(root))
    try:
        assert torch.equal(checkpoint.read("a"), VALUES)
        with (root / FILE).open("r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(b"xx")
        os.utime(root / FILE, ns=(1, 1))
        with pytest.raises(ModelError, match=f"{FILE} in .* changed") as caught:
            checkpoint.read("a")
        assert "put the files back" in caught.value.hint
        os.truncate(root / FILE, 100)
        with pytest.raises(ModelError, match="changed"):
            checkpoint.read("a", 1)
    finally:
        checkpoint.close()


def test_files_that_are_not_those_of_the_stamps_are_not_read(root: Path) -> None:
    before = stamp_files(root)
    replace_weights(root)
    checkpoint = Checkpoint(root, before)
    try:
        with pytest.raises(ModelError, match="changed"):
            checkpoint.read("a")
    finally:
        checkpoint.close()


def test_an_index_that_was_replaced_is_not_used(root: Path) -> None:
    (root / INDEX).write_text(f'{{"weight_map": {{"a": "{FILE}"}}}}')
    checkpoint = Checkpoint(root, stamp_files(root))
    try:
        replace_text(root, INDEX, lambda text: text.replace('"a"', '"c"'))
        with pytest.raises(ModelError, match=r"index\.json in .* changed"):
            checkpoint.read("c")
    finally:
        checkpoint.close()


def test_a_stamp_outlives_the_last_link(root: Path) -> None:
    with (root / FILE).open("rb") as file:
        before = FileStamp.of(os.fstat(file.fileno()))
        (root / FILE).unlink()
        assert FileStamp.of(os.fstat(file.fileno())) == before


def dense(tensors: dict[str, torch.Tensor]) -> bytes:
    """The digest of these tensors, as a load makes it: they are read into contiguous memory."""
    slots = [Slot(name, each.dtype, tuple(each.shape), copied(each)) for name, each in tensors.items()]
    return Entry("dense", slots, dense_digest).alone().note


def expert(*tensors: torch.Tensor) -> bytes:
    """The same of an expert's parts."""
    slots = [Slot(str(number), each.dtype, tuple(each.shape), copied(each)) for number, each in enumerate(tensors)]
    return Entry("expert", slots, expert_digest).alone().note


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_other_values_types_shapes_or_names_have_other_digests(dtype: torch.dtype) -> None:
    base = {"w": torch.ones(4, 6, dtype=dtype), "b": torch.tensor(1.0, dtype=dtype), "none": torch.empty(0)}
    one_bit = base["w"].clone()
    one_bit[3, 5] += 2**-7
    others = [
        base | {"w": one_bit}, base | {"w": base["w"].view(6, 4)}, base | {"w": base["w"].double()},
        base | {"v": base["b"]}, {"w": base["b"], "b": base["w"], "none": base["none"]},
    ]  # fmt: skip
    assert len({dense(each) for each in [base, *others]}) == 6
    assert dense(dict(reversed(base.items()))) == dense(base)
    assert dense(base | {"w": torch.ones(6, 4, dtype=dtype).t()}) == dense(base), "as it is laid out"


def test_an_experts_digest_is_of_all_its_parts_in_order() -> None:
    up, down = torch.ones(4, 2), torch.zeros(2, 4)
    found = {expert(*parts) for parts in ([up, down], [down, up], [up], [up, down + 2**-20])}
    assert len(found) == 4
    assert expert() != bytes(4), "zeros stand for an expert that is not known"
    assert table({(1, 0): b"abcd"}, layers=2, experts=2) == (bytes(8), b"abcd" + bytes(4))
