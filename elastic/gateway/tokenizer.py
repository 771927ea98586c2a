"""Text to token ids and back, for the gateway: the checkpoint's `tokenizer.json` and its chat template.

It uses the `tokenizers` library directly: `transformers.AutoTokenizer` imports torch, which a light process must not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from membership.base.errors import ModelError, RequestError

if TYPE_CHECKING:
    import jinja2

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class Tokenizer:
    """A checkpoint's tokenizer. Thread-safe: encoding may run outside the event loop."""

    def __init__(self, directory: Path) -> None:
        from tokenizers import Tokenizer as Backend

        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"no tokenizer.json in {directory}",
                hint="save the model's fast tokenizer there: AutoTokenizer.from_pretrained(...).save_pretrained(DIR)",
            )
        try:
            self._backend = Backend.from_file(str(path))
            decoder = json.loads(path.read_text()).get("decoder")
        except Exception as error:  # what the library raises is a bare Exception
            raise ModelError(f"damaged {path}: {error}") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self._settings = _read_json(directory / "tokenizer_config.json")
        self._template_text = _chat_template(directory, self._settings)
        self._byte_level = "ByteLevel" in _decoder_types(decoder)
        self.specials = {name: text for name in _SPECIALS if (text := _token_text(self._settings.get(name)))}
        self._special_ids = {self._backend.token_to_id(text) for text in self.specials.values()}

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: a text of n tokens has at most n times as many."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint has a chat template."""
        return bool(self._template_text)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the model wants around it."""
        ids = self._encode(text, special=True)
        bos = self._backend.token_to_id(self.specials.get("bos_token", ""))
        if self._settings.get("add_bos_token") and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer."""
        import jinja2

        if not self.has_chat_template:
            raise RequestError(
                "this model has no chat template; use /v1/completions", param="messages", code="no_chat_template"
            )
        try:
            text = self._template.render(messages=list(messages), add_generation_prompt=True, **self.specials)
        except jinja2.TemplateError as error:
            raise RequestError(f"the model's chat template refuses this: {error}", param="messages") from error
        return self._encode(text, special=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the tokens; special ones are left out, incomplete characters become U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token: not always whole characters."""
        piece = self._backend.id_to_token(token) or ""
        if token in self._special_ids:
            return piece.encode()
        if self._byte_level:
            return b"".join(_BYTE_OF.get(char) or char.encode() for char in piece)
        byte = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()

    def _encode(self, text: str, special: bool) -> list[int]:
        """The fast variant works out no offsets: it holds the interpreter's lock a fifth as long."""
        return list(self._backend.encode_batch_fast([text], add_special_tokens=special)[0].ids)

    @cached_property
    def _template(self) -> jinja2.Template:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(self._template_text)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ModelError(f"damaged {path}: {error}") from error


def _chat_template(directory: Path, settings: dict[str, Any]) -> str:
    """The template: in a file of its own (newer checkpoints) or among the settings, there perhaps one of several."""
    separate = directory / "chat_template.jinja"
    if separate.is_file():
        return separate.read_text()
    found = settings.get("chat_template") or ""
    if isinstance(found, list):
        by_name = {each["name"]: each["template"] for each in found}
        found = by_name.get("default", "")
    return str(found)


def _token_text(value: Any) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")


def _decoder_types(decoder: Any) -> set[str]:
    if not isinstance(decoder, dict):
        return set()
    inner = (_decoder_types(each) for each in decoder.get("decoders", ()))
    return {str(decoder.get("type")), *(kind for kinds in inner for kind in kinds)}


def _byte_alphabet() -> dict[str, bytes]:
    """How byte-level tokenizers write bytes as characters: printable ones as themselves, the rest from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(b): bytes([b]) for b in plain} | {chr(256 + n): bytes([b]) for n, b in enumerate(rest)}


_BYTE_OF = _byte_alphabet()
