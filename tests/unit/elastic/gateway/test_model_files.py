"""Which tokenizer a gateway works with: the one that the cluster serves, or it does not start."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from elastic.gateway.model_files import kept_files
from elastic.gateway.tokenizer import Tokenizer
from membership.base.errors import ModelError
from membership.store.records import ClusterConfig
from tests.support.replaced_files import replace_text
from tests.support.tiny_tokenizer import write_tokenizer
from workers.model.content import small_files
from workers.model.text_files import chat_templates, tokenizer_settings

pytestmark = pytest.mark.unit


def a_config(model: Path) -> ClusterConfig:
    files = tuple(small_files(model).items())
    return ClusterConfig(cluster="c", model=str(model), served_model_name="m", moe_layers=1, experts=2, files=files)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "model")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_after_a_replacement_the_kept_files_are_used(model: Path, tmp_path: Path, file: str) -> None:
    config, prompt = a_config(model), [{"role": "user", "content": "the quick brown fox"}]
    first = Tokenizer(kept_files(config, tmp_path / "state")).encode_chat(prompt)
    replace_text(model, file, lambda text: text.replace("<s>", "<t>").replace("assistant", "robot"))
    assert Tokenizer(kept_files(config, tmp_path / "state")).encode_chat(prompt) == first
    with pytest.raises(ModelError, match=f"{file} in .* changed since") as caught:
        kept_files(config, tmp_path / "another gateway's")
    assert "put the files back" in caught.value.hint


@pytest.mark.parametrize("file", ["chat_template.jinja", "additional_chat_templates/default.jinja"])
def test_a_template_that_came_later_is_not_used(model: Path, tmp_path: Path, file: str) -> None:
    config, prompt = a_config(model), [{"role": "user", "content": "one"}]
    expected = Tokenizer(model).encode_chat(prompt)
    (model / file).parent.mkdir(exist_ok=True)
    (model / file).write_text("{{ 'another' }}", encoding="utf-8")
    assert Tokenizer(kept_files(config, tmp_path / "state")).encode_chat(prompt) == expected


def test_a_copy_elsewhere_of_the_same_content_is_as_good(model: Path, tmp_path: Path) -> None:
    config = a_config(Path(shutil.copytree(model, tmp_path / "other host's")))
    shutil.rmtree(config.model)
    shutil.copytree(model, config.model)
    assert small_files(kept_files(config, tmp_path / "state")) == dict(config.files)


def test_all_that_a_gateway_reads_is_kept(model: Path, tmp_path: Path) -> None:
    (model / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/rag.jinja"):
        (model / name).write_text(f"{{{{ '{name}' }}}}", encoding="utf-8")
    kept = kept_files(a_config(model), tmp_path / "state")
    settings = tokenizer_settings(kept)
    assert settings == tokenizer_settings(model)
    assert chat_templates(kept, settings) == chat_templates(model, settings)
    assert {"default", "rag"} == chat_templates(kept, settings).keys() - {"chat_template"}


def test_files_kept_of_an_earlier_model_give_way(model: Path, tmp_path: Path) -> None:
    kept_files(a_config(model), tmp_path / "state")
    replace_text(model, "tokenizer_config.json", lambda text: text.replace("assistant", "robot"))
    found = kept_files(a_config(model), tmp_path / "state")
    assert small_files(found) == small_files(model)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["model-files"], "and nothing else stays"


def test_without_room_for_a_copy_the_models_own_files_are_used_while_they_are_the_same(
    model: Path, tmp_path: Path
) -> None:
    config, full = a_config(model), tmp_path / "a file"
    full.write_text("")
    assert kept_files(config, full) == model
    (model / "chat_template.jinja").write_text("{{ 'another' }}")
    with pytest.raises(ModelError, match=r"chat_template\.jinja"):
        kept_files(config, full)


def test_a_cluster_that_names_no_files_is_served_as_before(model: Path, tmp_path: Path) -> None:
    config = ClusterConfig(cluster="c", model=str(model), served_model_name="m", moe_layers=1, experts=2)
    assert kept_files(config, tmp_path / "state") == model
