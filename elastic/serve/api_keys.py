"""API keys as an operator gives them: on the command line, or in a file of `NAME:KEY` lines. Kept as digests only.

So no log line, traceback, status or event can show one. A name may have several keys (to change one without a gap),
which share its limits.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from membership.base.errors import ConfigError
from membership.base.text_file import text_of

ENV = "ELASTIC_API_KEY"
NAME, KEY, LIMIT = r"[A-Za-z0-9._-]{1,64}", r"[!-~]{1,512}", r"[a-z_]+=[0-9]{1,12}"
LINE = re.compile(rf"(?P<name>{NAME}):(?P<key>{KEY})(?P<limits>(?:\s+{LIMIT})*)")
HINT = "write one per line: NAME:KEY [requests_in_flight=N] [requests_per_minute=N] [tokens_per_minute=N]"


class KeyLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the requests of one name may take together; 0: no limit."""

    requests_in_flight: int = 0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0


NO_LIMITS = KeyLimits()


@dataclass(frozen=True)
class ApiKey:
    """A key's digest, the name under which it is counted, and that name's limits."""

    name: str
    digest: bytes
    limits: KeyLimits = NO_LIMITS


def digest_of(key: str) -> bytes:
    """What is kept of a key, and compared."""
    return hashlib.sha256(key.encode()).digest()


def plain_keys(keys: Iterable[str]) -> list[ApiKey]:
    """Keys without names: they are counted as key-1, key-2, …; ConfigError unless a request's header can carry them."""
    found = []
    for number, key in enumerate(keys, 1):
        if not re.fullmatch(KEY, key):
            raise ConfigError(
                f"API key {number} is empty, too long, or has characters that a header cannot carry",
                hint="use ASCII letters, digits and -._~+/= for --api-key and ELASTIC_API_KEY",
            )
        found.append(ApiKey(f"key-{number}", digest_of(key)))
    return found


def read_keys(path: Path) -> list[ApiKey]:
    """The keys of a file. ConfigError names the line that is wrong, never what is in it."""
    lines = text_of("--api-key-file", path).splitlines()
    given = [(number, text) for number, line in enumerate(lines, 1) if (text := line.strip()) and text[0] != "#"]
    if not given:
        raise ConfigError(f"--api-key-file {path} has no keys", hint=HINT)
    return _unambiguous([_key(f"--api-key-file {path}, line {number}", text) for number, text in given])


def all_keys(keys: Iterable[str], path: Path | None) -> list[ApiKey]:
    """Those of the command line and those of the file."""
    return _unambiguous([*plain_keys(keys), *(read_keys(path) if path is not None else ())])


def client_headers() -> dict[str, str]:
    """What our own clients of the API send: the first key of ELASTIC_API_KEY, if there is one."""
    keys = os.environ.get(ENV, "").split()
    return {"Authorization": f"Bearer {keys[0]}"} if keys else {}


def _key(where: str, text: str) -> ApiKey:
    match = LINE.fullmatch(text)
    if match is None:
        raise ConfigError(f"{where}: it is not a key", hint=HINT)
    limits = dict(each.split("=") for each in match["limits"].split())
    if unknown := sorted(limits.keys() - set(KeyLimits.__struct_fields__)):
        raise ConfigError(f"{where}: there is no limit {unknown[0]!r}", hint=HINT)
    stated = KeyLimits(**{name: int(value) for name, value in limits.items()})
    return ApiKey(match["name"], digest_of(match["key"]), stated)


def _unambiguous(keys: list[ApiKey]) -> list[ApiKey]:
    """The keys, each with its name's limits. ConfigError: a key has two names, or a name two different limits."""
    names: dict[bytes, str] = {}
    limits: dict[str, KeyLimits] = {}
    for each in keys:
        if names.setdefault(each.digest, each.name) != each.name:
            raise ConfigError(f"one API key has two names: {names[each.digest]} and {each.name}")
        if each.limits != NO_LIMITS and limits.setdefault(each.name, each.limits) != each.limits:
            raise ConfigError(f"the API keys of {each.name} state different limits", hint="state them once")
    return [ApiKey(each.name, each.digest, limits.get(each.name, NO_LIMITS)) for each in keys]
