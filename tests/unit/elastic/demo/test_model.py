"""The shipped demo checkpoint is complete and can be written out; corpus and tokenizer are reproducible."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic.demo.model import FILES, shipped_demo_model, write_demo_model
from membership.base.errors import ConfigError
from workers.model.families import read_model_info

pytestmark = pytest.mark.unit


def test_written_copy_is_the_shipped_one(tmp_path: Path) -> None:
    lines: list[str] = []
    write_demo_model(tmp_path / "m", report=lines.append)
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == sorted(FILES)
    for name in FILES:
        assert (tmp_path / "m" / name).read_bytes() == (shipped_demo_model() / name).read_bytes()
    assert lines
    info = read_model_info(tmp_path / "m")
    assert (info.experts, info.top_k, info.hidden, info.layers, info.eos_token_ids) == (8, 2, 128, 4, (1,))
    assert info.max_position >= 2048
    assert 6e6 < (tmp_path / "m" / "model.safetensors").stat().st_size < 8e6


def test_does_not_overwrite(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ConfigError, match="not an empty directory"):
        write_demo_model(tmp_path)
    with pytest.raises(ConfigError, match="not an empty directory"):
        write_demo_model(tmp_path / "mine", retrain=True)


def test_tokenizer_and_chat_template() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shipped_demo_model())
    text = "def f(x):\n    return 'ümlaut'  # 10%"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    messages = [{"role": "system", "content": "A"}, {"role": "user", "content": "B"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == "<s>A\n\nB\n\n"


def test_retraining_starts_from_the_same_corpus_and_tokenizer() -> None:
    import json

    from elastic.demo.training import documents, train_tokenizer

    texts = documents()
    assert len(texts) > 150
    again = json.loads(train_tokenizer(texts).backend_tokenizer.to_str())
    shipped = json.loads((shipped_demo_model() / "tokenizer.json").read_text())
    if len(texts) != 205:  # other Python versions bring other texts
        pytest.skip(f"trained on Python 3.11's 205 documents, this Python has {len(texts)}")
    assert again["model"]["vocab"] == shipped["model"]["vocab"]
