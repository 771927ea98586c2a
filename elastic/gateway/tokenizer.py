"""Text to token ids and back, for the gateway: the checkpoint's `tokenizer.json` and its chat template.

It uses the `tokenizers` library directly: `transformers.AutoTokenizer` imports torch, which a light process must not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from functools import cached_property, partial, reduce
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from elastic.gateway.text import REPLACEMENT, Detokenizer, incomplete
from membership.base.errors import ModelError, RequestError
from workers.model.text_files import DAMAGED_HINT, chat_templates, named_tokens, tokenizer_settings, unnamed_tokens

if TYPE_CHECKING:
    from elastic.gateway.chat_template import ChatTemplate

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# `clean_up_tokenization_spaces` of transformers: in this order. Only these characters are in a match.
_CLEAN_UP = {" .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'"} | {
    f" {short}": short for short in ("n't", "'m", "'s", "'ve", "'re")
}
_CLEAN_UP_CHARS = "".join(_CLEAN_UP)


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
            text = path.read_text(encoding="utf-8")
            self._backend = Backend.from_str(text)
            described = json.loads(text)
            decoders = _decoder_types(described.get("decoder"))
        except Exception as error:  # what the library raises is a bare Exception
            raise ModelError(f"damaged {path}: {error}") from error
        settings = tokenizer_settings(directory)
        self.specials = named_tokens(settings)
        try:
            self._set_up(settings)
        except (TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"damaged {directory / 'tokenizer_config.json'}: {error}", hint=DAMAGED_HINT) from error
        self._templates = chat_templates(directory, settings)
        self._byte_level = "ByteLevel" in decoders
        self._prefixes = _adds_prefix(described.get("pre_tokenizer"))
        self._bytes = self._byte_pieces() if "ByteFallback" in decoders else {}
        self._added = self._backend.get_added_tokens_decoder()
        self._skipped = {number for number, token in self._added.items() if token.special}

    def _set_up(self, settings: dict[str, Any]) -> None:
        """What tokenizer_config.json changes about tokenizer.json."""
        from tokenizers import AddedToken, processors

        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = bool(settings.get("split_special_tokens"))
        listed = settings.get("added_tokens_decoder") or {}
        there = self._backend.get_added_tokens_decoder().values()
        known = set(map(repr, there))
        added = [AddedToken(**token) for _, token in sorted(listed.items(), key=lambda item: int(item[0]))]
        added = [token for token in added if repr(token) not in known]
        names = {str(token) for token in (*there, *added)}
        missing = [text for text in (*self.specials.values(), *unnamed_tokens(settings)) if text not in names]
        added += [AddedToken(text, special=True) for text in dict.fromkeys(missing)]
        clean_up = bool(settings.get("clean_up_tokenization_spaces"))
        forced = settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
        self._cleans_up = clean_up and (bool(forced) or type(self._backend.model).__name__ != "BPE")
        self._backend.add_tokens(added)
        bos = self.specials.get("bos_token", "")
        if settings.get("add_bos_token") and bos and self._backend.post_processor is None:  # else that decides
            self._backend.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, self._backend.token_to_id(bos))]
            )

    def _byte_pieces(self) -> dict[int, int]:
        found = ((number, _BYTE_PIECE.fullmatch(text)) for text, number in self._backend.get_vocab().items())
        return {number: int(byte[1], 16) for number, byte in found if byte}

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
        return bool(self._templates.get("default"))

    @property
    def spells_bytes(self) -> bool:
        """Whether a text is the bytes of its tokens, which are known: structured output needs it."""
        return (self._byte_level and not self._prefixes) or bool(self._bytes)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a prompt. `special`: with the special tokens that the model wants around it."""
        return self._encode(text, special=special)

    def token_name(self, token: int) -> str:
        """A token as the vocabulary has it."""
        return self._backend.id_to_token(token) or ""

    def decode_all(self, ids: Sequence[int]) -> str:
        """Text of the tokens, special ones included."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def encode_chat(
        self, messages: Sequence[dict[str, Any]], variables: Mapping[str, Any] = MappingProxyType({})
    ) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer. `variables`: more for the chat template."""
        if not self.has_chat_template:
            raise RequestError(
                "this model has no chat template; use /v1/completions", param="messages", code="no_chat_template"
            )
        template = self.tool_template if variables.get("tools") else self.template
        template.require(variables)
        return self._encode(template.render(messages, **variables), special=False)

    @property
    def tool_template_text(self) -> str:
        """The chat template for conversations with tools, as transformers chooses it; empty if there is none."""
        return self._templates.get("tool_use") or self._templates.get("default") or ""

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template; jinja is not imported before the first conversation."""
        from elastic.gateway.chat_template import ChatTemplate

        return ChatTemplate(self._templates["default"], self.specials)

    @cached_property
    def tool_template(self) -> ChatTemplate:
        """The chat template for conversations with tools."""
        from elastic.gateway.chat_template import ChatTemplate

        return ChatTemplate(self.tool_template_text, self.specials)

    def detokenizer(self, prompt: Sequence[int], marks: Iterable[str] = ()) -> Detokenizer:
        """For the text of an answer to `prompt`. `marks`: special tokens that the text shows."""
        shown = self._skipped.intersection(map(self._backend.token_to_id, marks))
        decode = partial(self.decode, shown=shown) if shown else self.decode
        return Detokenizer(decode, prompt, self.unsettled)

    def unsettled(self, text: str) -> int:
        """How many characters at the end of a decoded text more tokens may change."""
        return _may_be_cleaned_up(text) if self._cleans_up else incomplete(text)

    def decode(self, ids: Sequence[int], shown: Container[int] = ()) -> str:
        """Text of the tokens; special ones but those `shown` are left out, incomplete characters become U+FFFD.

        transformers turns all characters of a run of byte tokens into U+FFFD where one of them is incomplete; here they
        stay, as what was streamed cannot be taken back.
        """
        ids = [each for each in ids if each not in self._skipped or each in shown]
        mended = self._mended(ids) if self._bytes and not self._bytes.keys().isdisjoint(ids) else None
        if mended is None:
            text = str(self._backend.decode(ids, skip_special_tokens=False))
        else:
            text = str(self._backend.decoder.decode(mended))
        return clean_up(text) if self._cleans_up else text

    def _mended(self, ids: Sequence[int]) -> list[str] | None:
        """The tokens with U+FFFD for bytes that are no characters; None if all are."""
        tokens: list[str] = []
        broken = False
        for is_byte, run in groupby(ids, key=self._bytes.__contains__):
            if not is_byte:
                tokens += [text for i in run if (text := self._backend.id_to_token(i)) is not None]
                continue
            for piece in _characters(bytes(self._bytes[i] for i in run)):
                broken |= not piece
                tokens += [f"<0x{byte:02X}>" for byte in piece] or [REPLACEMENT]
        return tokens if broken else None

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token: not always whole characters."""
        piece = self._backend.id_to_token(token) or ""
        if token in self._added:
            return piece.encode()
        if self._byte_level:
            return b"".join(_BYTE_OF.get(char) or char.encode() for char in piece)
        byte = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()

    def _encode(self, text: str, special: bool) -> list[int]:
        """The fast variant works out no offsets: it holds the interpreter's lock a fifth as long."""
        return list(self._backend.encode_batch_fast([text], add_special_tokens=special)[0].ids)


def _characters(data: bytes) -> Iterable[bytes]:
    """The pieces of `data` that are UTF-8, and an empty one for each that is not."""
    while data:
        try:
            data.decode()
        except UnicodeDecodeError as error:
            if error.start:
                yield data[: error.start]
            yield b""
            data = data[error.end :]
        else:
            yield data
            return


def clean_up(text: str) -> str:
    """`text` without the spaces that some tokenizers leave before punctuation."""
    return reduce(lambda so_far, pair: so_far.replace(*pair), _CLEAN_UP.items(), text)


def _may_be_cleaned_up(text: str) -> int:
    """How many characters at the end may be changed by what follows: those after the last that is in no match."""
    return len(text) - len(text.rstrip(_CLEAN_UP_CHARS + REPLACEMENT))


def _decoder_types(decoder: Any) -> set[str]:
    if not isinstance(decoder, dict):
        return set()
    inner = (_decoder_types(each) for each in decoder.get("decoders", ()))
    return {str(decoder.get("type")), *(kind for kinds in inner for kind in kinds)}


def _adds_prefix(splitter: Any) -> bool:
    """Whether a byte-level tokenizer puts a space before each text."""
    each = (splitter or {}).get("pretokenizers") or [splitter or {}]
    return any(part.get("type") == "ByteLevel" and part.get("add_prefix_space") for part in each)


def _byte_alphabet() -> dict[str, bytes]:
    """How byte-level tokenizers write bytes as characters: printable ones as themselves, the rest from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(b): bytes([b]) for b in plain} | {chr(256 + n): bytes([b]) for n, b in enumerate(rest)}


_BYTE_OF = _byte_alphabet()
