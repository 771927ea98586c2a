"""What the planner does, as text for people and for a test: commands on a simulated cluster and their output.

A transcript has comments (`# …`), commands (`$ …`) and, below each command, its output. `replay` runs the commands
again. A command is a method of `_Commands`; without a `$ cluster …` there are 4 ranks on node a. Times are seconds
since the command began; a rank is written rank/incarnation, what it holds layer | layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import takewhile

from msgspec.structs import replace

from elastic.cli.render import plan_view
from membership.base.errors import ElasticError
from membership.operations.change import Change, describe_change, drain, scale, undrain
from membership.operations.dry_run import plan_change
from membership.operations.operations import cancel
from membership.planning.planner import Effect
from membership.store.records import ClusterState, Desired, ExpertLoad, Member, Phase, Placement, RankSpec, View
from tests.support.world import CONFIG, World

EXPERT_BYTES = 1000


def replay(text: str) -> str:
    """The same comments and commands, with what the commands give now."""
    commands, lines = _Commands(), list[str]()
    for line in text.splitlines():
        if line.startswith("$ "):
            name, *arguments = line.removeprefix("$ ").removeprefix("elastic ").split()
            lines += [line, *getattr(commands, name)(*arguments)]
        elif line.startswith("#") or (not line and lines):
            lines.append(line)
    return "\n".join(lines) + "\n"


class _RecordingWorld(World):
    """A world that writes down each effect of its controller."""

    def __post_init__(self) -> None:
        self.lines: list[str] = []
        self.began = self.now
        super().__post_init__()

    def controller_acts(self, state: ClusterState | None = None, token: int = 0) -> bool:
        """Act, and record the effects."""
        before, done = self.state, len(self.effects)
        acted = super().controller_acts(state, token)
        for effect in self.effects[done:]:
            seconds = math.floor((self.now - self.began) * 10) / 10
            self.lines += [
                f"{seconds:+.1f} s  {effect.reason}",
                *(f"        {line}" for line in _lines_of(effect, before)),
            ]
        return acted

    def take(self) -> list[str]:
        """Return the lines recorded since the last call."""
        lines, self.lines, self.began = self.lines, [], self.now
        return lines


class _Commands:
    """Each method is a command; it returns the lines below it."""

    def __init__(self) -> None:
        self.world = _RecordingWorld()
        self.operations = 0
        self.cluster()

    # --- the cluster

    def cluster(self, ranks: str = "4", *options: str) -> list[str]:
        """`cluster N [on a,b] [max M] [starting]`: N ranks that serve, or have yet to be started."""
        named = dict(zip(options[::2], options[1::2], strict=False))
        config = replace(CONFIG, expert_bytes=EXPERT_BYTES, max_ranks=int(named.get("max", CONFIG.max_ranks)))
        self.world = _RecordingWorld(desired=int(ranks), config=config, nodes=tuple(named.get("on", "a").split(",")))
        if "starting" not in options:
            self.world.settle()
        self.world.take()
        return []

    def view(self) -> list[str]:
        """The members and what each holds."""
        view = self.world.state.view or View(epoch=0)
        return [f"epoch {view.epoch}", *(f"  {_holds(m, view.placement)} on {m.node}" for m in view.members)]

    def run(self, until: str = "until", what: str = "", which: str = "") -> list[str]:
        """`run [until PHASE | until epoch N | until attempt N]`: all act until then, or nothing is left to do."""
        self.world.settle(until=lambda: self._reached(what, which))
        return self.world.take() or ["nothing to do"]

    def _reached(self, what: str, which: str) -> bool:
        state = self.world.state
        if what == "attempt":
            return state.next is not None and state.next.attempt + 1 == int(which)
        if what == "epoch":
            return state.view is not None and state.view.epoch == int(which)
        return what != "" and any(op.phase is Phase(what) and op.active for op in state.operations.values())

    # --- change requests

    def scale(self, target: str, flag: str = "", value: str = "60") -> list[str]:
        """`elastic scale N [--plan | --timeout S]`."""
        return self._ask(scale(int(target)), flag, value)

    def drain(self, *arguments: str) -> list[str]:
        """`elastic drain RANK… [--plan | --timeout S]`."""
        return self._name(drain, *arguments)

    def undrain(self, *arguments: str) -> list[str]:
        """`elastic undrain RANK… [--plan | --timeout S]`."""
        return self._name(undrain, *arguments)

    def _name(self, change: Callable[..., Change], *arguments: str) -> list[str]:
        ranks = list(map(int, takewhile(str.isdecimal, arguments)))
        return self._ask(change(*ranks), *arguments[len(ranks) :])

    def _ask(self, change: Change, flag: str = "", value: str = "60") -> list[str]:
        if flag == "--plan":
            return plan_view(plan_change(change, self.world.state)).splitlines()
        try:
            operation = self.world.ask(change, timeout_s=float(value), op_id=f"op{self.operations + 1}")
        except ElasticError as refused:
            return [f"error: {refused}"]
        self.operations += 1
        return [f"{operation.id}: {describe_change(operation)}, {operation.phase}"]

    def ops(self, what: str, name: str) -> list[str]:
        """`elastic ops cancel ID`."""
        try:
            operation = {"cancel": cancel}[what](self.world.store, CONFIG.cluster, name, "a test")
        except ElasticError as refused:
            return [f"error: {refused}"]
        return [f"{operation.id}: cancelled by {operation.cancelled}"]

    def operation(self) -> list[str]:
        """The last operation's end."""
        op = self.world.state.operations[f"op{self.operations}"]
        return [
            f"{op.id}: {describe_change(op)} (from {op.previous}), {op.phase}",
            *([f"  {op.error}"] if op.error else []),
        ]

    # --- what goes wrong

    def kill(self, *ranks: str) -> list[str]:
        """`kill RANK… [backoff S]`: the processes die; their slots may be filled again after S seconds."""
        last = ranks.index("backoff") if "backoff" in ranks else len(ranks)
        for rank in ranks[:last]:
            self.world.kill(int(rank), backoff_s=float([*ranks[last + 1 :], "0.3"][0]))
        return []

    def quarantine(self, rank: str) -> list[str]:
        """The process died, once too often."""
        self.world.kill(int(rank), quarantined=True)
        return []

    def hang(self, rank: str) -> list[str]:
        """The engine masks a rank that does not answer."""
        self.world.mask(int(rank))
        return []

    def mute(self, rank: str) -> list[str]:
        """A rank that starts in that slot never registers."""
        self.world.mute.add(int(rank))
        return []

    def unable(self, *ranks: str) -> list[str]:
        """Ranks in these slots cannot prepare anything from now on; without slots: all can again."""
        self.world.bad = {int(rank) for rank in ranks}
        return []

    def agent(self, what: str, node: str) -> list[str]:
        """`agent dies NODE`, its ranks too; `agent starts NODE`: a new agent of the node; `agent leaves NODE`."""
        {"dies": self.world.stop_agent, "starts": self.world.start_agent, "leaves": self.world.leave}[what](node)
        return []

    def load(self, rank: str) -> list[str]:
        """The experts of a rank get 20 times the load of the others, from now on."""
        view = self.world.state.view or View(epoch=0)
        loads = tuple(
            tuple(160 if e in held else 8 for e in range(CONFIG.experts)) for held in view.placement[int(rank)]
        )
        self.world.put(self.world.keys.expert_load, ExpertLoad(at=self.world.now, loads=loads))
        return []


def _lines_of(effect: Effect, before: ClusterState) -> Iterator[str]:
    """What an effect writes, a line each."""
    placed = before.view.placement if before.view else {}
    if effect.operation is not None:
        known = before.operations[effect.operation.id].phase_times
        went = [phase for phase in effect.operation.phase_times if phase not in known] or [effect.operation.phase.value]
        yield f"{effect.operation.id}: {', '.join(went)}"
    if effect.unstage and before.next is not None:
        yield f"unstage epoch {before.next.epoch}"
    if effect.stage is not None:
        yield f"stage epoch {effect.stage.epoch}"
        for member in effect.stage.members:
            yield f"  {_holds(member, effect.stage.placement)}{_loads(member.rank, placed, effect.stage.placement)}"
    if effect.commit is not None:
        yield f"commit epoch {effect.commit.epoch}"
    if effect.desired is not None:
        yield f"desired: {_desired(effect.desired)}"
    for assignment in effect.assignments:
        yield f"node {assignment.node} runs {_names(assignment.ranks) or 'nothing'}"


def _names(ranks: tuple[Member | RankSpec, ...]) -> str:
    return " ".join(f"{each.rank}/{each.incarnation}" for each in ranks)


def _desired(desired: Desired) -> str:
    slots = f" in slots {' '.join(map(str, desired.slots))}" if desired.slots else ""
    drained = f", drained {' '.join(map(str, desired.cordoned))}" if desired.cordoned else ""
    return f"{desired.ranks} ranks{slots}{drained}"


def _holds(member: Member, placement: Placement) -> str:
    return f"{member.rank}/{member.incarnation} holds {_experts(placement[member.rank])}"


def _loads(rank: int, before: Placement, after: Placement) -> str:
    held = before.get(rank, ((),) * len(after[rank]))
    more = tuple(tuple(e for e in now if e not in was) for was, now in zip(held, after[rank], strict=True))
    return f", loads {_experts(more)}" if any(more) else ""


def _experts(layers: tuple[tuple[int, ...], ...]) -> str:
    return " | ".join(" ".join(map(str, experts)) or "-" for experts in layers)
