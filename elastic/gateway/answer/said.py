"""What an answer, or a piece of one, says."""

from __future__ import annotations

import string
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

ID_CHARS = string.ascii_letters + string.digits
ID_LENGTH = 9  # Mistral's chat templates take no other


@dataclass(frozen=True)
class Call:
    """A tool call so far. `name` and `id` of a piece are empty, except in its first piece."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""  # JSON, as the model wrote it


class Said(NamedTuple):
    """Text by what it is."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()  # the index of each is another one


NOTHING = Said()


def gathered(pieces: Iterable[Said]) -> Said:
    """All pieces as one."""
    content, reasoning = [], []
    calls: dict[int, list[Call]] = {}
    for piece in pieces:
        content.append(piece.content)
        reasoning.append(piece.reasoning)
        for call in piece.calls:
            calls.setdefault(call.index, []).append(call)
    whole = tuple(
        Call(index, parts[0].id, parts[0].name, "".join(part.arguments for part in parts))
        for index, parts in calls.items()
    )
    return Said("".join(content), "".join(reasoning), whole)


def call_id(answer: str, number: int) -> str:
    """The id of a call of this answer, of the one shape that all chat templates take back."""
    digest = blake2b(f"{answer}-{number}".encode(), digest_size=ID_LENGTH).digest()
    return "".join(ID_CHARS[byte % len(ID_CHARS)] for byte in digest)
