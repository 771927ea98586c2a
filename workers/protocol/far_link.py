"""What a rank says of its link with one rank of another host."""

from __future__ import annotations

from typing import NamedTuple


class FarLink(NamedTuple):
    """What a transport knows of its link with one peer on another host, since there is one."""

    up: bool = False
    rtt_s: float = 0.0  # as the kernel has learned it
    sent_bytes: int = 0  # that the peer's kernel has acknowledged
    retransmits: int = 0  # packets that were sent again
    suspects: int = 0  # how often its host was silent
    cuts: int = 0  # how often the link ended though both ranks lived on
