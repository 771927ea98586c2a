"""The protocol of exchange on GPUs (`workers/exchange/cuda/kernels.cu`) as a small machine, explored in all its orders.

Each rank runs dispatch, collect, reply and combine of each layer in moves that others' may come between; the engine
begins attempts, notices a death and calls off. Promised in every order: a live rank reads only rows that were written
for that call of that attempt, reports no success if it has left out a row, none waits for ever, and without a fault no
attempt fails. `Rules` break one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple


class Phase(IntEnum):
    """What a rank's kernels do next in a layer."""

    WRITE_QUESTIONS = 0
    PUBLISH_QUESTIONS = 1
    AWAIT_QUESTIONS = 2
    READ_QUESTIONS = 3
    WRITE_ANSWERS = 4
    PUBLISH_ANSWERS = 5
    AWAIT_ANSWERS = 6
    READ_ANSWERS = 7


class Kind(IntEnum):
    """What is in a window, by owner, bank and writer."""

    ASKED = 0
    QUESTION = 1
    ANSWERED = 2
    ANSWER = 3


class Death(IntEnum):
    """Of the last rank."""

    NONE = 0
    HAPPENED = 1
    KNOWN = 2  # to the engine; its kernels may still run
    OVER = 3  # the kernel says that the process has ended
    REPLACED = 4  # its slot has a successor


NEVER, WRONG = 0, -1  # no call; computed from rows that were not those asked about
ORDER = tuple(Phase)
Memory = tuple[int, ...]  # the call that each word and each set of rows is of


def number_of(call: int) -> int:
    """What kernels compare. Which attempt it is of, and whether it has rows, is in the lower bits."""
    return call >> 16


def _call(number: int, attempt: int, rows: bool = True) -> int:
    return number << 16 | attempt << 1 | rows


class Kernels(NamedTuple):
    """What one process has launched for an attempt."""

    attempt: int
    base: int
    masked: int
    layer: int
    phase: Phase
    published: int = 0  # to how many peers, in this phase
    failed: bool = False
    ended: bool = False
    cut: bool = False  # it has left out rows
    wrong: int = 0  # bits of askers whose rows were not those that they asked about


class State(NamedTuple):
    """Everything at one moment."""

    ranks: tuple[Kernels, ...]
    memory: Memory
    attempt: int
    masked: int
    abort: bool = False
    death: Death = Death.NONE
    zombie: Kernels | None = None  # what a rank that is masked still runs
    called_off: bool = False  # without any reason, once
    steps: int = 0  # that succeeded


@dataclass(frozen=True)
class Rules:
    """What makes it right. A test breaks one at a time."""

    banks: int = 2
    order: tuple[Phase, ...] = ORDER
    base_rises: bool = True
    masked_are_not_awaited: bool = True
    aborts: bool = True
    gives_up_by_failing: bool = True  # whoever leaves out a row has first said that the attempt failed
    reuse_waits: bool = True  # a slot has a successor only once its process is over


@dataclass(frozen=True)
class Setting:
    """`sends[layer][rank]`: the ranks that it has rows for. That many `steps` must succeed."""

    sends: Sequence[Sequence[frozenset[int]]]
    steps: int = 1
    may_die: bool = False
    may_abort: bool = False
    replaced: bool = False  # a dead rank's slot has a successor in the attempt after that
    rules: Rules = Rules()

    @property
    def count(self) -> int:
        return len(self.sends[0])

    @property
    def victim(self) -> int:
        return self.count - 1

    def place(self, kind: Kind, owner: int, bank: int, writer: int) -> int:
        """Where it is in the memory."""
        return ((kind * self.count + owner) * self.rules.banks + bank) * self.count + writer

    def begun(self, attempt: int, masked: int) -> Kernels:
        base = 1 + (attempt - 1 if self.rules.base_rises else 0) * len(self.sends)
        return Kernels(attempt, base, masked if self.rules.masked_are_not_awaited else 0, 0, self.rules.order[0])


class Violation(AssertionError):
    """A promise is broken; the message has the moves that lead there."""


def explore(setting: Setting) -> int:
    """Visit every state; how many there are. Violation at the first one that breaks a promise."""
    nothing = (NEVER,) * (len(Kind) * setting.count**2 * setting.rules.banks)
    first = State(tuple(setting.begun(1, 0) for _ in range(setting.count)), nothing, 1, 0)
    came_from: dict[State, tuple[State | None, str]] = {first: (None, "begin")}
    stack = [first]
    while stack:
        state = stack.pop()
        moved = False
        try:
            for what, after in _moves(setting, state):
                moved = True
                if after not in came_from:
                    came_from[after] = (state, what)
                    stack.append(after)
        except Violation as broken:
            raise Violation(f"{broken}: {_path(came_from, state)}") from None
        if not moved and state.steps < setting.steps:
            raise Violation(f"a rank waits for ever: {_path(came_from, state)}")
    return len(came_from)


def _path(came_from: dict[State, tuple[State | None, str]], state: State | None) -> str:
    moves: list[str] = []
    while state is not None:
        state, what = came_from[state]
        moves.append(what)
    return ", ".join(reversed(moves))


def _moves(setting: Setting, state: State) -> Iterator[tuple[str, State]]:
    if state.steps == setting.steps:
        return
    yield from _faults(setting, state)
    for rank, kernels in enumerate(state.ranks):
        if kernels.ended:
            continue
        if state.abort:
            ended = kernels._replace(failed=setting.rules.gives_up_by_failing, ended=True, cut=True)
            yield f"{rank} sees the abort", state._replace(ranks=_with(state.ranks, rank, ended))
        for what, memory, after in _step(setting, state, rank, kernels):
            yield f"{rank} {what}", state._replace(ranks=_with(state.ranks, rank, after), memory=memory)
    if state.zombie is not None:
        for what, memory, after in _step(setting, state, setting.victim, state.zombie):
            yield f"zombie {what}", state._replace(zombie=None if after.ended else after, memory=memory)
    yield from _next_attempt(setting, state)


def _faults(setting: Setting, state: State) -> Iterator[tuple[str, State]]:
    if setting.may_die and state.death == Death.NONE:
        yield "death", state._replace(death=Death.HAPPENED)
    if state.death == Death.HAPPENED:
        yield "the engine knows", state._replace(death=Death.KNOWN, abort=setting.rules.aborts)
    if state.death == Death.KNOWN:
        yield "the process is over", _over(setting, state)
    if setting.may_abort and not state.called_off and not state.abort:
        yield "called off", state._replace(abort=True, called_off=True)


# -- the engine, and what happens to processes -------------------------------------------------------------------------


def _over(setting: Setting, state: State) -> State:
    """Nothing of the dead process runs any more."""
    if state.masked >> setting.victim & 1:
        return state._replace(death=Death.OVER, zombie=None)
    ended = state.ranks[setting.victim]._replace(failed=True, ended=True)
    return state._replace(death=Death.OVER, ranks=_with(state.ranks, setting.victim, ended))


def _next_attempt(setting: Setting, state: State) -> Iterator[tuple[str, State]]:
    """Begun when each live rank has reported; a dead one never does, so first its death must be known."""
    rules, victim = setting.rules, setting.victim
    dead = state.death in (Death.HAPPENED, Death.KNOWN, Death.OVER)
    unmasked = not state.masked >> victim & 1
    reports = [k for r, k in enumerate(state.ranks) if not state.masked >> r & 1 and not (dead and r == victim)]
    ended = [kernels for kernels in reports if kernels.ended]
    if len(ended) < len(reports) or (state.death == Death.HAPPENED and unmasked):
        return
    if any(kernels.cut and not kernels.failed for kernels in ended):
        raise Violation("rows that were left out are taken for a result")
    failed = state.abort or any(kernels.failed for kernels in ended) or (dead and unmasked)
    steps = state.steps + (not failed)
    reusable = Death.OVER if rules.reuse_waits else Death.KNOWN
    reuse = setting.replaced and state.death in (Death.KNOWN, Death.OVER) and state.death >= reusable
    masked = 1 << victim if dead and not reuse else 0
    zombie = state.zombie
    if dead and unmasked and state.death == Death.KNOWN and not state.ranks[victim].ended:
        zombie = state.ranks[victim]
    attempt = state.attempt + 1
    begun = setting.begun(attempt, masked)
    idle = begun._replace(ended=True)
    ranks = tuple(idle if masked >> rank & 1 else begun for rank in range(setting.count))
    yield (
        "again" if failed else "done",
        State(
            ranks, state.memory, attempt, masked, False, Death.REPLACED if reuse and dead else state.death, zombie,
            state.called_off, steps,
        ),
    )  # fmt: skip


# -- a rank's kernels --------------------------------------------------------------------------------------------------


def _with(items: tuple[Kernels, ...], at: int, item: Kernels) -> tuple[Kernels, ...]:
    return (*items[:at], item, *items[at + 1 :])


Move = tuple[str, Memory, Kernels]


def _step(setting: Setting, state: State, me: int, kernels: Kernels) -> Iterator[Move]:
    """The next move, none while it waits."""
    peers = [rank for rank in range(setting.count) if rank != me and not kernels.masked >> rank & 1]
    phase, memory = kernels.phase, state.memory
    if not peers:  # what it has to do for itself alone is not modelled
        yield "all alone", memory, kernels._replace(ended=True)
    elif phase in (Phase.WRITE_QUESTIONS, Phase.WRITE_ANSWERS):
        yield phase.name, _rows_written(setting, memory, me, kernels, peers), _after(setting, kernels)
    elif phase in (Phase.PUBLISH_QUESTIONS, Phase.PUBLISH_ANSWERS):
        peer = peers[kernels.published]
        memory = _published(setting, memory, me, kernels, peer)
        last = kernels.published + 1 == len(peers)
        after = _after(setting, kernels) if last else kernels._replace(published=kernels.published + 1)
        yield f"{phase.name} to {peer}", memory, after
    elif phase in (Phase.AWAIT_QUESTIONS, Phase.AWAIT_ANSWERS):
        yield from _awaited(setting, state, me, kernels, peers)
    else:
        yield phase.name, memory, _rows_read(setting, state, me, kernels, peers)


def _after(setting: Setting, kernels: Kernels) -> Kernels:
    """In the next phase, or the next layer; ended after the last one."""
    order = setting.rules.order
    at = order.index(kernels.phase) + 1
    if at < len(order):
        return kernels._replace(phase=order[at], published=0)
    layer = kernels.layer + 1
    if layer == len(setting.sends):
        return kernels._replace(ended=True)
    return kernels._replace(layer=layer, phase=order[0], published=0, wrong=0)


def _bank(setting: Setting, kernels: Kernels) -> int:
    return (kernels.base + kernels.layer) % setting.rules.banks


def _with_calls(memory: Memory, places: Sequence[int], calls: Sequence[int]) -> Memory:
    changed = list(memory)
    for place, call in zip(places, calls, strict=True):
        changed[place] = call
    return tuple(changed)


def _rows_written(setting: Setting, memory: Memory, me: int, kernels: Kernels, peers: Sequence[int]) -> Memory:
    call, sends = _call(kernels.base + kernels.layer, kernels.attempt), setting.sends[kernels.layer]
    if kernels.phase == Phase.WRITE_QUESTIONS:
        asked = [setting.place(Kind.QUESTION, peer, _bank(setting, kernels), me) for peer in peers if peer in sends[me]]
        return _with_calls(memory, asked, [call] * len(asked))
    askers = [peer for peer in peers if me in sends[peer]]
    answers = [WRONG if kernels.wrong >> peer & 1 else call for peer in askers]
    return _with_calls(memory, [setting.place(Kind.ANSWER, peer, 0, me) for peer in askers], answers)


def _published(setting: Setting, memory: Memory, me: int, kernels: Kernels, peer: int) -> Memory:
    number, sends = kernels.base + kernels.layer, setting.sends[kernels.layer]
    if kernels.phase == Phase.PUBLISH_QUESTIONS:
        call = _call(number, kernels.attempt, peer in sends[me])
        return _with_calls(memory, [setting.place(Kind.ASKED, peer, _bank(setting, kernels), me)], [call])
    if me not in sends[peer]:
        return memory
    return _with_calls(memory, [setting.place(Kind.ANSWERED, peer, 0, me)], [_call(number, kernels.attempt)])


def _awaited(setting: Setting, state: State, me: int, kernels: Kernels, peers: Sequence[int]) -> Iterator[Move]:
    number = kernels.base + kernels.layer
    if kernels.phase == Phase.AWAIT_QUESTIONS:
        places = [setting.place(Kind.ASKED, me, _bank(setting, kernels), peer) for peer in peers]
    else:
        holders = [peer for peer in peers if peer in setting.sends[kernels.layer][me]]
        places = [setting.place(Kind.ANSWERED, me, 0, peer) for peer in holders]
    numbers = [number_of(state.memory[place]) for place in places]
    if any(found > number for found in numbers):
        if state.death == Death.NONE and not state.abort:
            raise Violation(f"{me} is overtaken in call {number}")
        yield "is overtaken", state.memory, kernels._replace(failed=True, ended=True)
    elif all(found == number for found in numbers):
        yield kernels.phase.name, state.memory, _after(setting, kernels)


def _rows_read(setting: Setting, state: State, me: int, kernels: Kernels, peers: Sequence[int]) -> Kernels:
    """Violation if a live rank finds rows of another call than its own."""
    memory, bank, number = state.memory, _bank(setting, kernels), kernels.base + kernels.layer
    if kernels.phase == Phase.READ_QUESTIONS:
        writers = [peer for peer in peers if memory[setting.place(Kind.ASKED, me, bank, peer)] & 1]
        found = {peer: memory[setting.place(Kind.QUESTION, me, bank, peer)] for peer in writers}
    else:
        holders = [peer for peer in peers if peer in setting.sends[kernels.layer][me]]
        found = {peer: memory[setting.place(Kind.ANSWER, me, 0, peer)] for peer in holders}
    wrong = [peer for peer, call in found.items() if call != _call(number, kernels.attempt)]
    is_dead = kernels is state.zombie or (me == setting.victim and state.death in (Death.HAPPENED, Death.KNOWN))
    if wrong and not is_dead:
        raise Violation(f"{me} reads rows of another call from {wrong} ({kernels.phase.name}, call {number})")
    return _after(setting, kernels._replace(wrong=sum(1 << peer for peer in wrong)))
