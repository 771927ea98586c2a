"""A small byte-level BPE tokenizer for tests, written as a checkpoint directory would hold it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world, this is a test of the gateway", "one two three"]
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_tokenizer(directory: Path, *, chat_template: str | None = TEMPLATE, specials: Sequence[str] = ()) -> Path:
    """Write tokenizer.json and tokenizer_config.json; return the directory. `specials`: more special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(CORPUS * 3, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    settings: dict[str, object] = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True}
    settings["additional_special_tokens"] = list(specials)
    if chat_template:
        settings["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
