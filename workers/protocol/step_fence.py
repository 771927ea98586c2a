"""The step fence: which messages between engine and ranks may have an effect. Pure; every caller asks here.

Four numbers fence a step, and each only rises: the engine token (a new engine), the epoch (a new view), the step, and a
slot's incarnation (a restarted rank). A step is idempotent, so its attempts need no number of their own.
"""

from __future__ import annotations

from membership.base.errors import Fenced
from membership.base.rank_id import RankId
from workers.protocol.messages import RankMessage, StepResult

FENCED_STATUS = 75
"""Exit status of a rank that found itself evicted: it was taken for dead, but was not."""

LOST_STATUS = 76
"""Exit status of a rank whose device took no more work from it."""

FULL_STATUS = 77
"""Exit status of a rank whose device has too little memory for its work."""


def follow(followed: int, offered: int) -> int:
    """The engine token that a rank obeys once the engine with `offered` asks it to. Fenced if that engine is older."""
    if offered < followed:
        raise Fenced(f"engine token {offered} is older than {followed}")
    return offered


def obeys(followed: int, token: int) -> bool:
    """Whether a rank that follows one engine acts on a message with this token."""
    return token == followed


def must_commit(committed: int, epoch: int) -> bool:
    """Whether a rank must commit `epoch` before it runs a step of it. Fenced if that epoch is over."""
    if epoch < committed:
        raise Fenced(f"epoch {committed} is committed, epoch {epoch} is over")
    return epoch > committed


def answers(message: RankMessage, rank_id: RankId, token: int) -> bool:
    """Whether the engine with this token takes the message as this rank's."""
    return message.rank_id == rank_id and message.engine_token == token


def answers_step(result: StepResult, rank_id: RankId, token: int, epoch: int, step: int) -> bool:
    """Whether the result is this rank's answer to the step in flight."""
    return answers(result, rank_id, token) and (result.epoch, result.step) == (epoch, step)


def is_evicted(incarnation: int, evicted: int) -> bool:
    """Whether an incarnation was given up, if `evicted` is the last one of its slot that was."""
    return incarnation <= evicted
