"""G4, coverage: each committed view has every expert on its members, often enough, and a death moves no weights."""

from __future__ import annotations

from collections import Counter
from itertools import product, repeat

from chaos.check.commits import specs_of
from chaos.check.evidence import Evidence, Keyspace, Outcome, Revision, Trial, epoch_of, typed
from chaos.record.record import Changed, Happened
from membership.base.events import Event
from membership.placement.plan import moves
from membership.store.records import ClusterConfig, Operation, Phase, Placement, RankExit, View


def check_coverage(evidence: Evidence) -> Outcome:
    """Every commit, and what those after a death have moved."""
    return _Coverage(evidence).judge()


class _Coverage:
    """Goes through the revisions with who is dead and masked."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.trial = Trial("G4", "coverage", evidence)
        self.dead: dict[tuple[int, int], Changed] = {}  # incarnations that have died, or were masked or evicted
        self.told = {e.fields["revision"]: e for e in evidence.events if _commit_event(e)}
        self.losses = 0
        self.fewest = 0

    def judge(self) -> Outcome:
        """The outcome, once all is gone through."""
        config = self.evidence.config
        for before, revision in self.evidence.walk():
            view = revision.put("view")
            if view is not None and not revision.listed and config is not None:
                self.trial.judged += 1
                self._judge(config, before, revision, view)
            self._note(before, revision)
        self.trial.figures |= {"losses": self.losses, "fewest_replicas": self.fewest}
        return self.trial.outcome()

    def _judge(self, config: ClusterConfig, before: Keyspace, revision: Revision, line: Changed) -> None:
        view, last = typed(line, View), before.get("view")
        if set(view.placement) != set(view.ranks):
            what = f"epoch {view.epoch} places experts on ranks {sorted(view.placement)}, its members are {view.ranks}"
            self.trial.found(what, line)
        replicas = _replicas(config, view.placement)
        fewest = min(replicas.values(), default=0)
        self.fewest = min(self.fewest or fewest, fewest)
        due = self._due(config, before, revision, view)
        short = sorted(pair for pair, count in replicas.items() if count < due)
        if short:
            some = ", ".join(f"expert {expert} of layer {layer}" for layer, expert in short[:4])
            more = f" and {len(short) - 4} more" if len(short) > 4 else ""
            what = f"epoch {view.epoch} with {len(view.members)} ranks has {some}{more} on fewer than {due} of them"
            self.trial.found(what, last, line)
        if last is not None:
            self._loss(config, before, revision, line)

    def _due(self, config: ClusterConfig, before: Keyspace, revision: Revision, view: View) -> int:
        """How many replicas every expert must have: as redundancy says where the view was planned in full.

        So is one with newcomers, and an operation's first attempt while all live. After a loss the survivors load
        orphans only; the rest comes back later.
        """
        whole = min(int(config.redundancy), len(view.members))
        last = typed(before["view"], View) if "view" in before else View(epoch=0)
        if set(view.members) - set(last.members):
            return whole
        planned = _commits(revision) and not view.attempt
        alive = not any((m.rank, m.incarnation) in self.dead for m in last.members)
        return whole if planned and alive else 1

    def _loss(self, config: ClusterConfig, before: Keyspace, revision: Revision, line: Changed) -> None:
        """A view that leaves out the dead, and nothing else, has nobody load what a survivor holds."""
        view, last, staged = typed(line, View), typed(before["view"], View), before.get("next")
        gone = {(m.rank, m.incarnation) for m in set(last.members) - set(view.members)}
        deaths = [self.dead[key] for key in sorted(gone) if key in self.dead]
        known = staged is not None and any(death.revision < staged.revision for death in deaths)
        if not known or set(view.members) - set(last.members) or _commits(revision):
            return
        self.losses += 1
        alive = {m.rank: last.placement[m.rank] for m in view.members}
        if min(_replicas(config, alive).values(), default=0) < 1:
            return  # orphans had to be loaded
        taken = moves(last.placement, view.placement)
        event = self.told.get(line.revision)
        said = int(event.fields.get("experts_taken", 0)) if event is not None else 0
        if taken or said:
            what = (
                f"epoch {view.epoch} follows a death with every expert on a survivor, and moved "
                f"{max(len(taken), said)} experts"
            )
            self.trial.found(what, deaths[0], before["view"], line, Happened(event=event) if event else None)

    def _note(self, before: Keyspace, revision: Revision) -> None:
        for name, changed in revision.changes.items():
            if name.startswith("exits/") and not changed.deleted:
                died = typed(changed, RankExit)
                self.dead.setdefault((died.rank, died.incarnation), changed)
            elif name.startswith("assign/"):
                for key in specs_of(before.get(name)) - specs_of(changed):
                    self.dead.setdefault(key, changed)
        status, view = revision.put("engine-status"), before.get("view")
        masked = status.value.get("masked") if status is not None else ()
        if status is not None and masked and view is not None and status.value.get("epoch") == epoch_of(view):
            for member in typed(view, View).members:
                if member.rank in masked:
                    self.dead.setdefault((member.rank, member.incarnation), status)


def _commit_event(event: Event) -> bool:
    return event.kind == "epoch_committed" and "revision" in event.fields


def _commits(revision: Revision) -> bool:
    """Whether an operation is committed here too: what moves is what it asked for."""
    puts = (changed for name, changed in revision.changes.items() if name.startswith("ops/") and not changed.deleted)
    return any(typed(put, Operation).phase is Phase.COMMITTED for put in puts)


def _replicas(config: ClusterConfig, placement: Placement) -> Counter[tuple[int, int]]:
    """(layer, expert) -> how many ranks hold it."""
    found = Counter(dict.fromkeys(product(range(config.moe_layers), range(config.experts)), 0))
    for held in placement.values():
        for layer, experts in enumerate(held):
            found.update(zip(repeat(layer), experts, strict=False))
    return found
