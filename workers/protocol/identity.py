"""What a rank says that it has loaded, for its agent to compare with what the cluster serves."""

from __future__ import annotations

import msgspec


class Identity(msgspec.Struct, frozen=True):
    """`parts`: everything that decides a bit of its output, name -> digest or value (`RankRecord.identity`)."""

    parts: dict[str, str] = {}
    replaced: tuple[str, ...] = ()  # files that changed since this host loaded them; the rank got the old content
    devices: int = 1  # that the ranks of its host take in turn, by their slots; a spare by its number
