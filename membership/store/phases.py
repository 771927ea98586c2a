"""The phases of an operation: one table of legal transitions. Every change of a phase goes through `advance`."""

from __future__ import annotations

from msgspec.structs import replace

from membership.base.errors import IllegalPhase
from membership.store.records import Operation, Phase

TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    # A change that starts no rank skips SPAWNING and HANDSHAKING; one that changes nothing is committed at once.
    Phase.PROPOSED: frozenset({Phase.SPAWNING, Phase.LOADING, Phase.COMMITTED, Phase.ABORTED}),
    Phase.SPAWNING: frozenset({Phase.HANDSHAKING, Phase.LOADING, Phase.COMMITTED, Phase.ABORTED}),
    Phase.HANDSHAKING: frozenset({Phase.LOADING, Phase.COMMITTED, Phase.ABORTED}),
    Phase.LOADING: frozenset({Phase.READY, Phase.COMMITTED, Phase.ABORTED}),
    Phase.READY: frozenset({Phase.COMMITTED, Phase.ABORTED}),
    # From here on only forward.
    Phase.COMMITTED: frozenset({Phase.RETIRING}),
    Phase.RETIRING: frozenset({Phase.DONE}),
    Phase.DONE: frozenset(),
    Phase.ABORTED: frozenset(),
}

ORDER: tuple[Phase, ...] = tuple(phase for phase in Phase if phase is not Phase.ABORTED)


def before_commit(operation: Operation) -> bool:
    """Whether it may still be rolled back."""
    return Phase.ABORTED in TRANSITIONS[operation.phase]


def advance(operation: Operation, *phases: Phase, now: float, error: str = "", epoch: int = 0) -> Operation:
    """Return the operation after `phases`, with the time of each; IllegalPhase if a transition is not legal."""
    for phase in phases:
        if phase not in TRANSITIONS[operation.phase]:
            raise IllegalPhase(f"operation {operation.id} cannot go from {operation.phase} to {phase}")
        operation = replace(
            operation,
            phase=phase,
            progress=operation.progress if phase is Phase.ABORTED else ORDER.index(phase) / (len(ORDER) - 1),
            phase_times={**operation.phase_times, phase.value: now},
        )
    ended = not operation.active
    return replace(
        operation,
        finished=now if ended else operation.finished,
        error=error or operation.error,
        epoch=epoch or operation.epoch,
    )
