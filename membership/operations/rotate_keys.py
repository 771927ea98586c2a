"""Replacing the join secret of a cluster that serves: who has another one, who listens with which, and the change.

Hosts get the new secret as one more line of their file, and say so in their records. Then the config names it, and a
process that begins to listen does so with it: the engine at once, in a new term, and each new rank process. The secret
before it opens what still listens with it, and nothing else. Once that is nothing it is retired for good: it opens
nothing, wherever its line is left, and no rotation goes back to it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator

import msgspec
from msgspec.structs import replace

from membership.base.errors import OperationConflict, PlanRefused
from membership.operations.pause import paused_words
from membership.store.codec import encode
from membership.store.interface import Compare, Put, Store
from membership.store.keys import Keys, state_from
from membership.store.records import ClusterConfig, ClusterState

NAME_DIGITS = 8
ATTEMPTS = 5  # each fails only if an incarnation is given out between its read and its write


class SecretUse(msgspec.Struct, frozen=True, kw_only=True):
    """What one process has to do with join secrets, by their names."""

    role: str
    node: str
    listens: str = ""  # with which; "": it does not listen to other hosts
    generation: int | None = None  # of that; None: it is of no generation that is known
    has: tuple[str, ...] | None = None  # all that its host has; None: it does not say (a rank, whose agent does)


class Secrets(msgspec.Struct, frozen=True, kw_only=True):
    """The join secrets of a cluster: names, which tell them apart and nothing else."""

    generation: int  # how often it has been replaced
    current: str  # "": the cluster is on one host
    before: str  # the one that it replaced
    grace: bool  # whether that still opens what listens with it
    others: tuple[str, ...]  # that some host has, and that the cluster has never used
    in_use: tuple[str, ...]  # with which something listens
    uses: tuple[SecretUse, ...]


class RotationPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a rotation would do now. `refused`: why it would be refused; "" if it would not."""

    secret: str = ""  # the one that is used afterwards
    generation: int = 0  # of that
    begun: bool = False  # the config names it already: what is left is to have all listen with it
    engine: bool = False  # whether the engine begins a new term
    ranks: tuple[int, ...] = ()  # slots whose process is replaced
    ends: bool = False  # nothing listens with the secret before: it is retired
    before: int = 0  # the last incarnation that is, or was in the rotation before
    refused: str = ""
    hint: str = ""

    @property
    def changes(self) -> bool:
        """Whether anything would change."""
        return not self.refused and (self.engine or bool(self.ranks) or self.ends or not self.begun)


def name_of(join_key: str) -> str:
    """A short name for people; "" for none."""
    return hashlib.sha256(join_key.encode()).hexdigest()[:NAME_DIGITS] if join_key else ""


def secrets_in(state: ClusterState) -> Secrets:
    """Who has which join secrets, and who listens with which."""
    config = _config(state)
    uses = tuple(_uses(state, config))
    usual = {name_of(config.join_key), *map(name_of, config.join_keys_before)}
    return Secrets(
        generation=config.join_generation,
        current=name_of(config.join_key),
        before=name_of(config.join_keys_before[-1]) if config.join_keys_before else "",
        grace=config.join_grace,
        others=tuple(sorted({name for use in uses for name in use.has or ()} - usual)),
        in_use=tuple(sorted({use.listens for use in uses} - {""})),
        uses=uses,
    )


def plan_rotation(state: ClusterState, now: float) -> RotationPlan:
    """What a rotation would do from this state. Pure; changes nothing."""
    config = _config(state)
    if not config.join_key:
        return RotationPlan(refused="this cluster is on one host: it has no join secret")
    key = config.join_key
    outdated = [rank for rank in state.ranks.values() if rank.join_key not in ("", key)]
    engine = state.engine is not None and state.engine.join_key not in ("", key)
    plan = RotationPlan(
        secret=name_of(key), generation=config.join_generation, begun=True, engine=engine, before=config.join_since
    )
    if outdated or engine:
        since = config.join_since if any(rank.incarnation <= config.join_since for rank in outdated) else 0
        before = since or max((rank.incarnation for rank in outdated), default=0)
        plan = replace(plan, ranks=tuple(sorted(rank.rank for rank in outdated)), before=before)
    elif config.join_grace:
        return replace(plan, ends=True)
    else:
        found = _new_keys(state, config)
        if not found and config.join_generation:
            return plan  # it has been replaced, and there is nothing else
        if len(found) != 1:
            return replace(plan, **_no_choice(found))
        (key,) = found
        ranks = tuple(sorted(rank.rank for rank in state.ranks.values() if rank.join_key))
        engine = state.engine is not None and bool(state.engine.join_key)
        plan = RotationPlan(
            secret=name_of(key),
            generation=config.join_generation + 1,
            engine=engine,
            ranks=ranks,
            before=state.incarnation,
        )
    return replace(plan, **_obstacle(state, key, now))


def rotate_keys(
    store: Store, cluster: str, clock: Callable[[], float] = time.time, generation: int | None = None
) -> RotationPlan:
    """Have the cluster use the other join secret that its hosts have; return what follows. PlanRefused: it is refused.

    Again, where a rotation has begun, it changes nothing until nothing listens with the secret before, which it then
    retires. `generation`: begin none beyond this.
    """
    keys = Keys(cluster)
    for _ in range(ATTEMPTS):
        revision, items = store.range(keys.prefix)
        state = state_from(items, revision)
        plan = plan_rotation(state, clock())
        config = _config(state)
        if generation is not None and generation <= config.join_generation and not plan.ends:
            return plan
        if plan.refused:
            raise PlanRefused(plan.refused, hint=plan.hint)
        if plan.begun and not plan.ends:
            return plan
        rotated = _rotated(state, plan)
        unchanged = [
            Compare(keys.config, "mod", "=", next(each.mod_revision for each in items if each.key == keys.config)),
            Compare(keys.incarnation, "mod", "=", state.incarnation_revision),
        ]
        if store.txn(unchanged, [Put(keys.config, encode(rotated))]).succeeded:
            return plan
    raise OperationConflict("the cluster has changed at each attempt to replace its join secret", hint="try again")


def _rotated(state: ClusterState, plan: RotationPlan) -> ClusterConfig:
    """The config after what is planned."""
    config = _config(state)
    if plan.ends:
        return replace(config, join_grace=False)
    (key,) = _new_keys(state, config)
    return replace(
        config,
        join_key=key,
        join_generation=plan.generation,
        join_keys_before=(*config.join_keys_before, config.join_key),
        join_grace=True,
        join_since=state.incarnation,
    )


def _config(state: ClusterState) -> ClusterConfig:
    if state.config is None:
        raise PlanRefused("the cluster has no config yet", hint="start it, or run `elastic init`")
    return state.config


def _uses(state: ClusterState, config: ClusterConfig) -> Iterator[SecretUse]:
    generations = {key: number for number, key in enumerate((*config.join_keys_before, config.join_key))}
    if (engine := state.engine) is not None:
        status = state.engine_status
        yield SecretUse(
            role="engine",
            node=engine.node,
            listens=name_of(engine.join_key),
            generation=generations.get(engine.join_key),
            has=_names(status.join_keys) if status is not None and status.token == state.engine_token else None,
        )
    for gateway in sorted(state.gateways.values(), key=lambda each: each.name):
        yield SecretUse(role=f"gateway {gateway.name}", node=gateway.node, has=_names(gateway.join_keys))
    for agent in sorted(state.agents.values(), key=lambda each: each.node):
        yield SecretUse(role="agent", node=agent.node, has=_names(agent.join_keys))
    for id_, rank in sorted(state.ranks.items()):
        yield SecretUse(
            role=f"rank {id_.rank}",
            node=rank.node,
            listens=name_of(rank.join_key),
            generation=generations.get(rank.join_key),
        )


def _names(join_keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(name_of, join_keys))


def _new_keys(state: ClusterState, config: ClusterConfig) -> set[str]:
    """Of secrets that some host has, and that the cluster has never used."""
    known = [record.join_keys for records in (state.agents, state.gateways) for record in records.values()]
    known += [state.engine_status.join_keys] if state.engine_status is not None else []
    return {key for keys in known for key in keys} - {config.join_key, *config.join_keys_before}


def _no_choice(found: set[str]) -> dict[str, str]:
    if found:
        names = ", ".join(sorted(map(name_of, found)))
        return {
            "refused": f"hosts have several other join secrets: {names}",
            "hint": "leave the current one and one other in the files of --join-secret-file",
        }
    return {
        "refused": "no host has another join secret than the one that is used",
        "hint": "write one (`elastic keys new`) as another line into the file of --join-secret-file on each host",
    }


def _obstacle(state: ClusterState, key: str, now: float) -> dict[str, str]:
    """Why the cluster cannot go over to this secret now, if it cannot."""
    if state.pause is not None and state.paused(now):
        return {"refused": paused_words(state.pause, now)}
    if (active := state.active) is not None:
        return {"refused": f"operation {active.id} is under way", "hint": "wait for it: elastic ops show ID --wait"}
    config = _config(state)
    uses = tuple(_uses(state, config))
    if lacking := _lacking(uses, name_of(key)):
        return {
            "refused": f"join secret {name_of(key)} is lacking: {lacking}",
            "hint": "write it as another line into the file of --join-secret-file there, and wait a second; a role "
            "with the one of ELASTIC_JOIN_SECRET must be started again",
        }
    opens = (config.join_key,) if key != config.join_key else config.join_keys_before[-1:] if config.join_grace else ()
    for old in map(name_of, opens):
        if any(use.listens == old for use in uses) and (lacking := _lacking(uses, old)):
            return {
                "refused": f"join secret {old}, with which processes still listen, is lacking: {lacking}",
                "hint": "put its line back into the file of --join-secret-file there, beside the new one, until the "
                "rotation has ended",
            }
    return {}


def _lacking(uses: tuple[SecretUse, ...], name: str) -> str:
    """Whose hosts say what they have, and have not this one."""
    has_not = (use for use in uses if use.has is not None and name not in use.has)
    return ", ".join(f"{use.role} on {use.node or 'its host'}" for use in has_not)
