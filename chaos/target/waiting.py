"""The one wait of the harness: it has a deadline, names what was waited for, and outlasts a store without answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from membership.base.errors import NoAnswer, WaitTimeout

T = TypeVar("T")

POLL_S = 0.01
LIMIT_S = 60.0


def until(
    ask: Callable[[], T | None],
    what: str | Callable[[], str],
    timeout_s: float = LIMIT_S,
    *,
    poll_s: float = POLL_S,
    guard: Callable[[], None] = lambda: None,
    sleep: Callable[[float], object] = time.sleep,
) -> T:
    """The first true answer; WaitTimeout names `what` did not come. `guard` is called between tries and may raise."""
    deadline = time.monotonic() + timeout_s
    while True:
        silence = ""
        try:
            if answer := ask():
                return answer
        except NoAnswer as error:
            silence = f" ({error})"
        guard()
        if time.monotonic() > deadline:
            raise WaitTimeout(f"not within {timeout_s:g} s: {what if isinstance(what, str) else what()}{silence}")
        sleep(poll_s)
