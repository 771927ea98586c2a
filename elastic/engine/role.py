"""The engine role: waits to be elected, serves, and stands down when it is replaced.

The elected engine holds the key `engine`; its create revision is the token that all messages carry. Its lease is
renewed as long as the store knows it: an outage of the store ends no service, only a successor does.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import structlog

from elastic.engine.gateway_server import EngineServer
from elastic.engine.loop import Engine, Peers
from elastic.engine.status_writer import StatusWriter
from elastic.engine.unrecorded import Unrecorded
from membership.base import failpoints, loop_watchdog
from membership.base.attempts import is_shortage
from membership.base.errors import Fenced, LeaseLost, StoreReplaced, StoreUnavailable, WaitTimeout
from membership.base.events import EventLog
from membership.base.network import Network
from membership.store.codec import encode
from membership.store.election import Election
from membership.store.interface import Store
from membership.store.keys import Keys
from membership.store.lease import LeaseKeeper
from membership.store.mirror import Mirror
from membership.store.records import ClusterState, EngineRecord
from workers.fleet.fleet import Fleet
from workers.queue.handle import this_host
from workers.queue.network import join_key, join_keys, require_joined, require_reachable

CAMPAIGN_SLICE_S = 1.0
REMIND_S = 60.0

log = structlog.get_logger(__name__)


class Term:
    """Until when an engine campaigns and serves: `stop`, or another join secret, with which it has to listen anew.

    One that does not have that secret goes on as it is: ranks and gateways keep the one before beside it.
    """

    def __init__(self, stop: threading.Event, network: Network | None) -> None:
        self._stop, self._network = stop, network
        self._join_key = join_key(network)
        self.outdated = False

    def note(self, state: ClusterState) -> None:
        """The mirror has a new state; called in its thread."""
        config = state.config
        if config is not None and config.join_key != self._join_key and config.join_key in join_keys(self._network):
            self.outdated = True

    def is_set(self) -> bool:
        """Whether it has ended."""
        return self.outdated or self._stop.is_set()

    def wait(self, timeout: float) -> None:
        """Until the process is to stop, or for this time."""
        self._stop.wait(timeout)


def run_terms(
    store: Store,
    cluster: str,
    node: str,
    stop: threading.Event,
    events: EventLog,
    network: Network | None = None,
    report: Callable[[str], None] = lambda lacking: None,
) -> None:
    """Serve term after term until `stop`: an engine that was replaced, or whose lease was lost, stands by again.

    So does one that cannot begin its term because the store is unavailable. It stays the same process: to start
    another would make requests wait for a second. `report` gets "" once it can take over.
    """
    while not stop.is_set():
        try:
            run_engine(store, cluster, node, stop, events, network, report)
        except Fenced as fenced:
            log.warning("engine_stood_down", reason=str(fenced))
        except StoreReplaced as replaced:  # no engine can be elected; the active one serves on
            log.error("store_replaced", error=str(replaced), hint=replaced.hint)
            while not stop.wait(REMIND_S):
                log.error("store_replaced", error=str(replaced), hint=replaced.hint)
        except Exception as error:
            if not isinstance(error, StoreUnavailable) and not is_shortage(error):
                raise
            log.warning("engine_standby_failed", error=str(error))
            stop.wait(timeout=CAMPAIGN_SLICE_S)


def run_engine(
    store: Store,
    cluster: str,
    node: str,
    stop: threading.Event,
    events: EventLog,
    network: Network | None = None,
    report: Callable[[str], None] = lambda lacking: None,
) -> None:
    """Stand by, then serve for one term, until `stop` or another join secret. Fenced if another engine took over."""
    with Mirror(store, cluster) as mirror, ExitStack() as opened:
        config = mirror.wait_for_config(stop)
        if config is None:
            return
        network = require_joined(config, network)
        require_reachable(mirror.state(), node, network)
        term, fleet = Term(stop, network), Fleet(network=network)
        opened.callback(fleet.close)
        known = Unrecorded()
        opened.callback(known.close)
        if network is not None:
            known.note(mirror.state())
            opened.callback(mirror.subscribe(known.note))
        server = EngineServer(fleet.ring, network)
        opened.callback(server.close)
        opened.callback(mirror.subscribe(fleet.note))
        opened.callback(mirror.subscribe(term.note))  # before the engine's: it looks up then
        term.note(mirror.state())
        keys = Keys(cluster)
        report("")
        elected = _get_elected(store, keys, _record(node, fleet, server, network), config.lease_ttl_s, term)
        if elected is None:
            return
        keeper, token = elected
        opened.callback(keeper.close)
        events.emit("engine_elected", cluster=cluster, token=token, pid=os.getpid())
        fleet.open(token)
        mirror.wait(lambda state: state.revision >= token, timeout_s=config.launch_deadline_s, what="our own election")
        joined = partial(join_keys, network)
        status = StatusWriter(store, keys, token, lambda: keeper.lease, fleet.ring, joined)
        opened.callback(status.close)
        keeper.on_carried = status.rewrite
        engine = Engine(config, token, Peers(mirror, fleet, server, status, events, known.gone))
        known.on_change = engine.look_again
        opened.callback(mirror.subscribe(engine.on_membership))
        server.serve(token)
        gc.collect()
        gc.freeze()  # these objects stay: the collector need not scan them between steps
        try:
            with loop_watchdog.watched():
                engine.run(term)
            if term.outdated:
                events.emit("engine_rekeyed", cluster=cluster, token=token)
        except Fenced as fenced:
            events.emit("engine_stood_down", cluster=cluster, token=token, reason=str(fenced))
            raise


def _record(node: str, fleet: Fleet, server: EngineServer, network: Network | None) -> EngineRecord:
    return EngineRecord(
        node=node,
        pid=os.getpid(),
        address=server.address,
        broadcast_handle=fleet.broadcast_handle,
        mask_handle=fleet.mask_handle,
        host=this_host(),
        remote=server.remote,
        remote_key=server.remote_key,
        join_key=join_key(network),
    )


def _get_elected(
    store: Store, keys: Keys, record: EngineRecord, ttl_s: float, stop: Term
) -> tuple[LeaseKeeper, int] | None:
    """Campaign until elected, with a new lease where the old one ran out meanwhile; None if stopped first."""
    while not stop.is_set():
        try:
            keeper = LeaseKeeper(store, ttl_s, persistent=True)
        except StoreUnavailable as error:
            log.warning("engine_lease_failed", error=str(error))
            stop.wait(timeout=CAMPAIGN_SLICE_S)
            continue
        with loop_watchdog.watched():
            token = _campaign(Election(store, keys.engine, encode(record), keeper), keeper, stop)
        if token:
            return keeper, token
        keeper.close()
    return None


def _campaign(election: Election, keeper: LeaseKeeper, stop: Term) -> int:
    """Our token; 0 if stopped, or if the lease has ended."""
    while not stop.is_set():
        loop_watchdog.heartbeat()
        failpoints.hit("engine.before.campaign")
        try:
            return election.campaign(CAMPAIGN_SLICE_S)
        except WaitTimeout:
            continue  # another engine is active: stand by
        except LeaseLost as lost:
            log.info("engine_lease_lost", error=str(lost))
            return 0
        except StoreUnavailable as error:
            log.warning("engine_campaign_failed", error=str(error))
            stop.wait(timeout=CAMPAIGN_SLICE_S)
    return 0
