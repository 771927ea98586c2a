"""Faults, each with proof that it happened. Only processes whose ids the cluster itself reported are touched."""

from __future__ import annotations

import os
import select
import signal
import time
from dataclasses import dataclass

from membership.errors import ElasticError, WaitTimeout


@dataclass(frozen=True)
class Killed:
    """A SIGKILL that was delivered and seen to work. Times are `time.time()` seconds, but for `at`."""

    pid: int
    sent_at: float
    gone_at: float
    at: float = 0.0  # when it was sent, on the monotonic clock, which processes of one host share


def kill(pid: int, timeout_s: float = 5.0) -> Killed:
    """SIGKILL `pid` and wait until the kernel says it is gone; ElasticError if there was no such process."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        raise ElasticError(f"process {pid} is gone already: nothing was injected") from None
    try:
        sent_at, at = time.time(), time.monotonic()
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        if not poller.poll(timeout_s * 1000):
            raise WaitTimeout(f"process {pid} did not die within {timeout_s} s of SIGKILL")
        return Killed(pid, sent_at, time.time(), at)
    finally:
        os.close(pidfd)
