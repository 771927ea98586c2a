"""G4, coverage: each committed view has every expert on its members, often enough, and a death moves no weights."""

from __future__ import annotations

from collections import Counter
from itertools import product, repeat

from chaos.check.commits import specs_of
from chaos.check.evidence import Check, Evidence, Keyspace, Revision, epoch_of, typed
from chaos.record.record import Changed, Happened
from membership.base.rank_id import RankId
from membership.placement.plan import moves
from membership.store.records import ClusterConfig, Operation, Phase, Placement, RankExit, View


class Coverage(Check):
    """The replicas of each committed view, and the weights moved after a death."""

    promise, title = "G4", "coverage"

    def __init__(self, evidence: Evidence) -> None:
        super().__init__(evidence)
        self.dead: dict[RankId, Changed] = {}  # incarnations that have died, or were masked or evicted
        self.reported = evidence.commit_events
        self.losses = 0
        self.fewest = 0

    def revision(self, before: Keyspace, revision: Revision) -> None:
        view, config = revision.put("view"), self.evidence.config
        if view is not None and not revision.listed and config is not None:
            self.judged += 1
            self._check(config, before, revision, view)
        self._note(before, revision)

    def finish(self) -> None:
        self.figures |= {"losses": self.losses, "fewest_replicas": self.fewest}

    def _check(self, config: ClusterConfig, before: Keyspace, revision: Revision, line: Changed) -> None:
        view, last = typed(line, View), before.get("view")
        if set(view.placement) != set(view.ranks):
            what = f"epoch {view.epoch} places experts on ranks {sorted(view.placement)}, its members are {view.ranks}"
            self.found(what, line)
        replicas = _replicas(config, view.placement)
        fewest = min(replicas.values(), default=0)
        self.fewest = min(self.fewest or fewest, fewest)
        due = self._due(config, before, revision, view)
        short = sorted(pair for pair, count in replicas.items() if count < due)
        if short:
            some = ", ".join(f"expert {expert} of layer {layer}" for layer, expert in short[:4])
            more = f" and {len(short) - 4} more" if len(short) > 4 else ""
            what = f"epoch {view.epoch} with {len(view.members)} ranks has {some}{more} on fewer than {due} of them"
            self.found(what, last, line)
        if last is not None:
            self._loss(config, before, revision, line)

    def _due(self, config: ClusterConfig, before: Keyspace, revision: Revision, view: View) -> int:
        """Replicas that every expert must have: the configured redundancy where the view was planned in full, else 1.

        A view is planned in full if it has newcomers, or is the first attempt of an operation while all ranks live.
        After a loss the survivors load only orphans; redundancy is restored later.
        """
        whole = min(int(config.redundancy), len(view.members))
        last = typed(before["view"], View) if "view" in before else View(epoch=0)
        if set(view.members) - set(last.members):
            return whole
        planned = _commits(revision) and not view.attempt
        alive = not any(RankId(m.rank, m.incarnation) in self.dead for m in last.members)
        return whole if planned and alive else 1

    def _loss(self, config: ClusterConfig, before: Keyspace, revision: Revision, line: Changed) -> None:
        """A view that only leaves out dead ranks must not move experts that a survivor holds."""
        view, last, staged = typed(line, View), typed(before["view"], View), before.get("next")
        gone = {RankId(m.rank, m.incarnation) for m in set(last.members) - set(view.members)}
        deaths = [self.dead[key] for key in sorted(gone) if key in self.dead]
        known = staged is not None and any(death.revision < staged.revision for death in deaths)
        if not known or set(view.members) - set(last.members) or _commits(revision):
            return
        self.losses += 1
        alive = {m.rank: last.placement[m.rank] for m in view.members}
        if min(_replicas(config, alive).values(), default=0) < 1:
            return  # orphans had to be loaded
        taken = moves(last.placement, view.placement)
        event = next(reversed(self.reported.get(line.revision, ())), None)
        said = int(event.fields.get("experts_taken", 0)) if event is not None else 0
        if taken or said:
            what = (
                f"epoch {view.epoch} follows a death with every expert on a survivor, and moved "
                f"{max(len(taken), said)} experts"
            )
            self.found(what, deaths[0], before["view"], line, Happened(event=event) if event else None)

    def _note(self, before: Keyspace, revision: Revision) -> None:
        for name, changed in revision.changes.items():
            if name.startswith("exits/") and not changed.deleted:
                died = typed(changed, RankExit)
                self.dead.setdefault(RankId(died.rank, died.incarnation), changed)
            elif name.startswith("assign/"):
                for key in specs_of(before.get(name)) - specs_of(changed):
                    self.dead.setdefault(key, changed)
        status, view = revision.put("engine-status"), before.get("view")
        masked = status.value.get("masked") if status is not None else ()
        if status is not None and masked and view is not None and status.value.get("epoch") == epoch_of(view):
            for member in typed(view, View).members:
                if member.rank in masked:
                    self.dead.setdefault(RankId(member.rank, member.incarnation), status)


def _commits(revision: Revision) -> bool:
    """Whether an operation is committed in this revision too: then it asked for the moves."""
    puts = (changed for name, changed in revision.changes.items() if name.startswith("ops/") and not changed.deleted)
    return any(typed(put, Operation).phase is Phase.COMMITTED for put in puts)


def _replicas(config: ClusterConfig, placement: Placement) -> Counter[tuple[int, int]]:
    """(layer, expert) -> number of ranks that hold it."""
    found = Counter(dict.fromkeys(product(range(config.moe_layers), range(config.experts)), 0))
    for held in placement.values():
        for layer, experts in enumerate(held):
            found.update(zip(repeat(layer), experts, strict=False))
    return found
