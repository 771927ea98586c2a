"""Tokenizers of all kinds that checkpoints come with, trained small, written as checkpoint directories hold them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "the quick brown fox jumps over the lazy dog", "hello world, this is a test of the gateway", "one two three four",
    "don't stop! isn't it? we've seen they're here . I'm sure , it's fine", "Grüße aus Köln, schöne Straße",
    "日本語のテキスト", "привет мир", "x = [1, 2, 3]\n\tif x: return 'a'", "  two  spaces   three",
]  # fmt: skip
Settings = dict[str, Any]
Build = Callable[[], tuple[Tokenizer, Settings]]


def _trained(backend: Tokenizer, trainer: Any) -> Tokenizer:
    backend.train_from_iterator(CORPUS * 3, trainer)
    return backend


def byte_level(prefix: bool = False, specials: tuple[str, ...] = ("<s>", "</s>")) -> Tokenizer:
    """As GPT-2: bytes written as characters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    return _trained(backend, trainer)


def gpt2() -> tuple[Tokenizer, Settings]:
    """The plainest: one special token for everything."""
    backend = byte_level(specials=("<|endoftext|>",))
    return backend, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}


def gpt2_prefixed() -> tuple[Tokenizer, Settings]:
    """A space before the text, and a cleaning up that byte-level tokenizers must not do."""
    return byte_level(prefix=True), {"eos_token": "</s>", "clean_up_tokenization_spaces": True}


def qwen() -> tuple[Tokenizer, Settings]:
    """Split by a regular expression; special and plain added tokens; their table in the settings; no bos."""
    backend = byte_level(specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    split = pre_tokenizers.Split(Regex(r"\p{N}|\s*[\r\n]+|\s+(?!\S)| ?[^\s\p{L}\p{N}]+| ?\p{L}+|\s+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.normalizer = normalizers.NFC()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    plain = [AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>", "<tool_call>")]
    backend.add_tokens(plain)
    return backend, {
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "added_tokens_decoder": _table(backend),
        "clean_up_tokenization_spaces": False,
    }


def llama3() -> tuple[Tokenizer, Settings]:
    """Puts its bos in front by a post-processor."""
    backend = byte_level(specials=("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>"))
    backend.post_processor = _with_bos(backend, "<|begin_of_text|>")
    return backend, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "clean_up_tokenization_spaces": True}


def deepseek() -> tuple[Tokenizer, Settings]:
    """Names of tokens that are not ASCII, tokens as objects, and flags that tokenizer.json overrules."""
    names = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
    backend = byte_level(specials=names)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend, {
        "bos_token": _as_object(names[0]), "eos_token": _as_object(names[1]), "add_bos_token": True,
        "add_eos_token": False,
    }  # fmt: skip


def byte_fallback(specials: tuple[str, ...] = ("<unk>", "<s>", "</s>")) -> Tokenizer:
    """As sentencepiece's: pieces with a mark for the space; what is not among them is written in bytes."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=[*specials, *pieces], limit_alphabet=40, show_progress=False
    )
    _trained(backend, trainer)
    described = json.loads(backend.to_str())  # byte pieces are no special tokens
    described["added_tokens"] = [t for t in described["added_tokens"] if t["content"] in specials]
    return Tokenizer.from_str(json.dumps(described))


def llama2() -> tuple[Tokenizer, Settings]:
    """Byte fallback, bos by a post-processor, special tokens in a map of their own."""
    backend = byte_fallback()
    backend.post_processor = _with_bos(backend, "<s>")
    return backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": True}


def mistral() -> tuple[Tokenizer, Settings]:
    """Byte fallback with control tokens and no prefix for the space."""
    backend = byte_fallback(("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"))
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.post_processor = _with_bos(backend, "<s>")
    return backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "added_tokens_decoder": {}}


def gemma() -> tuple[Tokenizer, Settings]:
    """Byte fallback without the strip: a leading space stays."""
    backend = byte_fallback(("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = _with_bos(backend, "<bos>")
    return backend, {
        "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>",
        "extra_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
    }  # fmt: skip


def unigram(scheme: str = "always") -> Tokenizer:
    """As sentencepiece's unigram models: pieces by their likelihood."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=180, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    return _trained(backend, trainer)


def t5() -> tuple[Tokenizer, Settings]:
    """Unigram that cleans up spaces, with added tokens that swallow those around them."""
    backend = unigram()
    backend.add_tokens([AddedToken("<mark>", lstrip=True, rstrip=True), AddedToken("<Mixed>", normalized=True)])
    return backend, {"eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": True}


def unigram_plain() -> tuple[Tokenizer, Settings]:
    """Unigram without a space in front."""
    return unigram("never"), {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}


def wordpiece(cleanup: bool) -> Tokenizer:
    """As BERT's: words and their continuations."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=cleanup)
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]"], show_progress=False
    )
    return _trained(backend, trainer)


def bert() -> tuple[Tokenizer, Settings]:
    """Cleans up twice, and puts tokens at both ends."""
    backend = wordpiece(cleanup=True)
    ends = [(text, backend.token_to_id(text)) for text in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return backend, {
        "unk_token": "[UNK]", "sep_token": "[SEP]", "cls_token": "[CLS]", "pad_token": "[PAD]",
        "clean_up_tokenization_spaces": True,
    }  # fmt: skip


def wordpiece_cleaned() -> tuple[Tokenizer, Settings]:
    """Cleans up as transformers does, over the whole text."""
    return wordpiece(cleanup=False), {"unk_token": "[UNK]", "clean_up_tokenization_spaces": True}


def word_ends() -> tuple[Tokenizer, Settings]:
    """As the first GPT: the end of a word is marked, a space is not."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=260, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    settings = {"unk_token": "<unk>", "clean_up_tokenization_spaces": True}
    settings["clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"] = True
    return _trained(backend, trainer), settings


def late_tokens() -> tuple[Tokenizer, Settings]:
    """Added tokens that only the settings know; special ones are split in prompts."""
    backend = byte_level()
    size = backend.get_vocab_size()
    table = {str(size): _as_object("<late>") | {"special": True}, str(size + 1): _as_object("<plain>")}
    for entry in table.values():
        del entry["__type"]
    return backend, {
        "eos_token": "<eos-of-settings>", "bos_token": "<s>", "image_token": "<image>", "added_tokens_decoder": table,
        "split_special_tokens": True,
    }  # fmt: skip


WILD: dict[str, Build] = {
    build.__name__: build
    for build in (
        gpt2, gpt2_prefixed, qwen, llama3, deepseek, llama2, mistral, gemma, t5, unigram_plain, bert, wordpiece_cleaned,
        word_ends, late_tokens,
    )
}  # fmt: skip
MAPPED = ("llama2", "llama3")  # these have special_tokens_map.json, too


def write_wild_tokenizer(directory: Path, name: str) -> Path:
    """Write what a checkpoint's directory holds of it; return the directory."""
    backend, settings = WILD[name]()
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    _write(directory / "tokenizer_config.json", settings)
    if name in MAPPED:
        specials = {key: _as_object(text) for key, text in settings.items() if key in ("bos_token", "unk_token")}
        for entry in specials.values():
            del entry["__type"]
        _write(directory / "special_tokens_map.json", specials | {"eos_token": settings["eos_token"]})
    return directory


def _write(path: Path, content: Settings) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _as_object(text: str) -> Settings:
    return {
        "__type": "AddedToken", "content": text, "lstrip": False, "normalized": False, "rstrip": False,
        "single_word": False,
    }  # fmt: skip


def _table(backend: Tokenizer) -> Settings:
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {
        str(number): {flag: getattr(token, flag) for flag in flags}
        for number, token in backend.get_added_tokens_decoder().items()
    }


def _with_bos(backend: Tokenizer, bos: str) -> Any:
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
