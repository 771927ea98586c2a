"""When a link that was cut is made again: pure, for `transport.py`. The side that had made it does so."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from membership.base.timing import LINK_DIAL_S, LINK_RETRY_MAX_S, LINK_RETRY_S
from workers.protocol.exchange_handle import TcpHandle

DATA_HOLDS_S = 60.0  # a data connection that lasts as long holds


@dataclass(frozen=True)
class Redial:
    """One peer that this side has linked with."""

    to: TcpHandle
    linked_at: float
    attempts: int = 0  # since a link last held
    due: float = math.inf  # when the next attempt begins, or the one under way is given up
    trying: bool = False
    data_ended_at: float = -math.inf  # its last data connection did
    data_broke: bool = False  # it ended soon after another one had


def data_ended(before: Redial, now: float) -> Redial:
    """Its data connection has ended, and the link with it."""
    return replace(before, data_ended_at=now, data_broke=now - before.data_ended_at <= DATA_HOLDS_S)


def with_data(known: Redial, now: float) -> bool:
    """Whether to ask for a data connection. Not soon after two have ended: what is between the hosts may take such
    connections and not keep them, and each end is one of the link.
    """
    return not known.data_broke or now - known.data_ended_at > DATA_HOLDS_S


def linked(before: Redial, now: float) -> Redial:
    """An attempt has succeeded. The pauses stay as long as they were until the link has held."""
    return replace(before, linked_at=now, due=math.inf, trying=False)


def cut(before: Redial, now: float) -> Redial:
    """The link, or the attempt to make it, has ended."""
    held = not before.trying and now - before.linked_at > LINK_RETRY_MAX_S
    attempts = 0 if held else before.attempts
    pause_s = min(LINK_RETRY_MAX_S, LINK_RETRY_S * 2.0 ** min(attempts, 16))
    return replace(before, attempts=attempts + 1, due=now + pause_s, trying=False)


def begin(before: Redial, now: float) -> Redial:
    """An attempt begins."""
    return replace(before, due=now + LINK_DIAL_S, trying=True)
