"""Pages of which other origins may use the API from a browser (CORS): what the flags say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from elastic.serve.options import ApiOptions
from membership.base.errors import ConfigError


@dataclass(frozen=True)
class Origins:
    """Without `origins` there are none."""

    origins: tuple[str, ...]
    methods: tuple[str, ...]
    headers: tuple[str, ...]


def origins_of(api: ApiOptions) -> Origins:
    """What `--allowed-origins` and its like say. ConfigError: one of them is no list."""
    return Origins(
        _listed("--allowed-origins", api.allowed_origins),
        _listed("--allowed-methods", api.allowed_methods),
        _listed("--allowed-headers", api.allowed_headers),
    )


def _listed(flag: str, given: Sequence[str]) -> tuple[str, ...]:
    """What was given one by one, or as vLLM takes it: one list in JSON. An origin may be `http://[::1]:3000`."""
    try:
        return tuple(
            name
            for each in given
            for name in (msgspec.json.decode(each, type=list[str]) if each.lstrip().startswith("[") else [each])
        )
    except (msgspec.MsgspecError, UnicodeEncodeError) as error:
        raise ConfigError(
            f"{flag} {' '.join(given)!r} is no list of strings: {error}", hint='write ["A", "B"], or repeat the flag'
        ) from error
