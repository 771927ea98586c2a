"""Leases, elections, operations, mirrors: clients of one store who are slow, stopped, at odds, or cut off."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from random import Random
from typing import cast

from chaos.mutants.checks.between import Between, Prompt, Slow
from chaos.mutants.checks.promise import require
from chaos.simulation.world import World
from membership.base.errors import LeaseLost, OperationConflict, PlanRefused, WaitTimeout
from membership.base.events import EventLog
from membership.operations.change import Change, scale
from membership.operations.operations import propose
from membership.operations.pause import pause
from membership.planning.controller import run_controller
from membership.store.codec import encode
from membership.store.election import Election
from membership.store.in_memory import Backup, MemoryStore
from membership.store.interface import Op, Put, Store
from membership.store.keys import Keys
from membership.store.lease import LeaseKeeper
from membership.store.mirror import Mirror
from membership.store.records import ClusterState, Desired, LeaderRecord

WAIT_S = 8.0


def leases() -> None:
    """However slow the store's answers are: as long as a holder believes in its lease, the store has it."""
    random = Random(1)
    for _ in range(200):
        store = Slow()
        store.back_s = random.choice([0.0, 1.0, 2.5])
        keeper = LeaseKeeper(store, 3.0, lambda: store.now, background=False)  # noqa: B023 - called in this turn only
        for _ in range(6):
            store.there_s, store.back_s = random.uniform(0, 0.5), random.choice([0.0, 0.3, 1.5, 2.8])
            try:
                if random.random() < 0.5:
                    keeper.renew()
                if keeper.alive:
                    store.put("held", b"", keeper.lease)
                store.now += random.uniform(0, 2.0)
                believed = keeper.alive
                store.put("held", b"", keeper.lease)
            except LeaseLost as lost:
                require(not keeper.alive, f"a lease was relied on that the store had ended: {lost}")
                break
            require(not believed or store.now < 1e9, "the clock ran away")


def given_up() -> None:
    """An engine gives up ranks whose processes live on: others take their places. Who is set aside stays aside."""
    for given in ((2,), (0, 3)):
        world = World(desired=4)
        world.settle()
        world.mask(*given)
        world.settle()
        view = world.state.view
        left = [m.rank for m in view.members if m.incarnation <= 4] if view is not None else []
        require(left == [r for r in range(4) if r not in given], f"ranks {given} were given up, and {left} are left")
        world.assert_whole(4)
    world = World(desired=4)
    world.settle()
    world.kill(1, quarantined=True, backoff_s=0.0)
    world.settle()
    require(world.serving == (0, 2, 3), f"slot 1 was set aside, and {world.serving} serve")


def fence() -> None:
    """A controller is stopped just before it writes; when it goes on, another one leads. It must change nothing."""
    store = MemoryStore()
    world = World(desired=2, store=store, elected=False)
    keys, went_on = world.keys, threading.Event()
    client = Between(store)

    def deposed(ops: Sequence[Op]) -> bool:
        if not any(isinstance(op, Put) and op.key.startswith(f"{keys.prefix}assign/") for op in ops):
            return False
        store.delete(keys.leader)
        store.put(keys.leader, encode(LeaderRecord(node="b", pid=2)))
        went_on.set()
        return True

    client.before_txn = deposed
    stop = threading.Event()
    args = (cast(Store, client), keys.cluster, "a", stop, EventLog(os.devnull, "controller"), lambda: world.now)
    controller = threading.Thread(target=run_controller, args=args, daemon=True)
    controller.start()
    try:
        require(went_on.wait(WAIT_S), "the controller never wrote anything")
    finally:
        stop.set()
        controller.join(WAIT_S)
    require(not controller.is_alive(), "the controller did not stop")
    require(not world.state.assignments, "a controller that leads no more gave out ranks")


def elections() -> None:
    """Two candidates: never do both hold the office. Who has lost its lease holds it no more, and cannot act."""
    store = MemoryStore()
    first, second = (LeaseKeeper(store, 30.0, background=False) for _ in range(2))
    one = Election(store, "office", b"one", first)
    two = Election(store, "office", b"two", second)
    one.campaign(WAIT_S)
    try:
        two.campaign(0.05)
    except WaitTimeout as waited:
        require(not two.held, f"elected, though {waited}")
    require(not (one.held and two.held), "two hold the same office")
    store.revoke(first.lease)
    two.campaign(WAIT_S)
    require(two.token > one.token, "a later holder has no later token")
    require(not store.txn([one.fence()], [Put("done", b"")]).succeeded, "a former holder acted")
    require(store.txn([two.fence()], [Put("done", b"")]).succeeded, "the holder could not act")


def proposals() -> None:
    """Whoever asks for what and when: one operation at a time, the same id is the same one, a pause is kept."""
    store = MemoryStore()
    world = World(desired=2, store=store)
    world.settle()
    asked = world.ask(scale(3), op_id="a")
    revision = store.range("")[0]
    require(world.ask(scale(3), op_id="a").id == asked.id, "the same id is another operation")
    require(store.range("")[0] == revision, "an operation that is under way was asked for again, and begun again")
    _refused(lambda: world.ask(scale(4), op_id="b"), world.state, "while another one goes on")
    world.settle()
    require(world.serving == (0, 1, 2), f"{world.serving} serve")
    again = world.ask(scale(3), op_id="a")
    require(not again.active, "an operation that had ended was begun again")

    def meanwhile(happens: Callable[[], object]) -> Store:
        client = Between(store)
        client.before_txn = lambda ops: happens() is not None
        return cast(Store, client)

    def ask(client: Store, change: Change) -> None:
        propose(client, world.keys.cluster, change, clock=lambda: world.now)

    racing = meanwhile(lambda: world.ask(scale(5)))
    _refused(lambda: ask(racing, scale(4)), world.state, "at the same moment as another one")
    require(sum(op.active for op in world.state.operations.values()) == 1, "two operations at once")
    world.settle()
    pausing = meanwhile(lambda: pause(store, world.keys.cluster, 60.0, clock=lambda: world.now))
    _refused(lambda: ask(pausing, scale(2)), world.state, "at the same moment as a pause")
    _refused(lambda: ask(store, scale(2)), world.state, "during a pause")


def _refused(ask: Callable[[], object], before: ClusterState, when: str) -> None:
    try:
        ask()
    except (OperationConflict, PlanRefused) as refused:
        require(str(refused), "a refusal without a reason")
    else:
        require(False, f"an operation was begun {when} ({before.active})")


def mirrors() -> None:
    """A client that was cut off has, soon after, what the store has, also where the store forgot what lies between."""
    for kind, compacted in ((MemoryStore, False), (MemoryStore, True), (Prompt, True)):
        store, keys = kind(), Keys("c")
        store.put(keys.agent("gone"), b'{"v":1,"kind":"AgentRecord","data":{"node":"gone","pid":1,"started":1}}')
        store.put(keys.desired, encode(Desired(ranks=1)))
        with Mirror(store, "c", probe_every_s=0.02) as mirror:
            mirror.wait(lambda state: state.desired is not None, WAIT_S)
            _cut(store)
            store.delete(keys.agent("gone"))
            revision = store.put(keys.desired, encode(Desired(ranks=2)))
            for number in range(3):
                revision = store.put(keys.desired, encode(Desired(ranks=3 + number)))
            if compacted:
                store.compact(revision)
            store.outage = False
            state = mirror.wait(lambda s: s.desired is not None and s.desired.ranks == 5, WAIT_S, "what it missed")
            require(not state.agents, f"{set(state.agents)} are still there")
            store.put(keys.desired, encode(Desired(ranks=6)))
            mirror.wait(lambda s: s.desired is not None and s.desired.ranks == 6, WAIT_S, "what came after")


def _cut(store: MemoryStore) -> None:
    """Watches break as in an outage; the writers of this check go on."""
    store.outage = True
    store._outage = False  # others still reach it; the mirror's watch is broken for good


def _another() -> Backup:
    """The data of another store, which has been written to often enough to look right."""
    other = MemoryStore()
    for number in range(20):
        other.put(Keys("c").desired, encode(Desired(ranks=9 + number)))
    return other.backup()


def replaced_store() -> None:
    """Another store, or the same one with older data, is followed by nobody: membership stays as it was."""
    for wiped in (False, True):
        store, keys = MemoryStore(), Keys("c")
        store.put(keys.desired, encode(Desired(ranks=1)))
        older = store.backup()
        store.put(keys.desired, encode(Desired(ranks=2)))
        with Mirror(store, "c", probe_every_s=0.02) as mirror:
            store.restore(_another() if wiped else older)
            told = threading.Event()
            for _ in range(int(WAIT_S / 0.05)):
                if "replaced" in mirror.trouble or "went back" in mirror.trouble or told.wait(0.05):
                    break
            how = "was wiped" if wiped else "went back"
            require(mirror.trouble, f"a store that {how} was believed")
            desired = mirror.state().desired
            require(desired is not None and desired.ranks == 2, f"what a store that {how} says was taken for true")
