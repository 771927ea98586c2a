"""A role's own copy of the cluster's state, kept current by list and watch. Every role decides from this.

During a store outage the last state stays readable (serving continues under the last view), `staleness_s` grows, and
the watch resumes afterwards where it stopped, or with a new list if that revision was compacted. A replaced store
(wiped, or set back) is not followed: the last state stays for good, and `trouble` says why. Heartbeats and expert loads
are in the state too, but their changes wake no reader.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from functools import partial

import structlog
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_when_event_set,
    wait_random_exponential,
)

from membership.base import failpoints
from membership.base.attempts import is_shortage
from membership.base.errors import (
    ElasticError,
    StoreCompacted,
    StoreReplaced,
    StoreUnavailable,
    WaitTimeout,
)
from membership.base.timing import STORE_SILENCE_S
from membership.store.interface import Store, Watch, WatchEvent
from membership.store.keys import Keys, Reading
from membership.store.records import ClusterConfig, ClusterState

PROBE_EVERY_S = 1.0
CLOSE_TIMEOUT_S = 10.0
CONFIG_POLL_S = 0.5  # a stop is noticed within this
REMIND_S = 60.0
Until = int | Callable[[ClusterState], bool]

log = structlog.get_logger(__name__)


class Mirror:
    """The cluster's state as of a moment ago. Construction lists the store, so there is a state from the start."""

    def __init__(
        self,
        store: Store,
        cluster: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        probe_every_s: float = PROBE_EVERY_S,
        background: bool = True,
    ) -> None:
        self._store = store
        self._keys = Keys(cluster)
        self._clock = clock
        self._probe_every_s = probe_every_s
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._watch: Watch | None = None
        self._reading = Reading()
        self._revision = 0
        self._generation = 0
        self._state = ClusterState(revision=0)
        self._failure: Exception | None = None
        self._replaced: StoreReplaced | None = None
        self._subscribers: list[Callable[[ClusterState], None]] = []
        self._answered_at = clock()
        self._synced = False
        self._relist = True
        self._list()
        if self._failure is not None:
            raise self._failure
        self._thread = threading.Thread(target=self._run, name=f"mirror-{cluster}", daemon=True)
        if background:
            self._thread.start()

    def turn(self) -> None:
        """Without a thread (`background`): apply what has changed since the last turn. Never waits."""
        try:
            if self._watch is None:
                self._open()
            while self._watch is not None and self._take(self._watch, 0.0):
                pass
        except (StoreCompacted, StoreUnavailable) as error:
            self._lose(self._watch, error)

    def state(self) -> ClusterState:
        """Return the latest state. Raises the error that ended the mirror, if any (say, a newer schema)."""
        with self._changed:
            return self._current()

    def wait(self, until: Until, timeout_s: float, what: str = "") -> ClusterState:
        """Return the first state newer than a revision, or for which a predicate holds. WaitTimeout names `what`."""
        deadline = time.monotonic() + timeout_s
        seen = -1
        while True:
            with self._changed:
                state = self._current()
                if self._generation == seen:
                    if not self._changed.wait_for(partial(self._moved, seen), deadline - time.monotonic()):
                        stale = "" if self._synced else f"; the store has been silent for {self.staleness_s:.1f} s"
                        what = what or f"a change of cluster {self._keys.cluster} after revision {state.revision}"
                        raise WaitTimeout(f"waited {timeout_s:g} s for {what}{stale}")
                    state = self._current()
                seen = self._generation
            if state.revision > until if isinstance(until, int) else until(state):
                return state

    def poll(self, after_revision: int, timeout_s: float) -> ClusterState:
        """Return the state once it is newer than `after_revision`, or the latest one after `timeout_s`."""
        try:
            return self.wait(after_revision, timeout_s)
        except WaitTimeout:
            return self.state()

    def wait_for_config(self, stop: threading.Event) -> ClusterConfig | None:
        """The cluster's config, once it is written; None if asked to stop first."""
        remind_at = time.monotonic() + REMIND_S
        while (state := self.state()).config is None and not stop.is_set():
            self.poll(state.revision, CONFIG_POLL_S)
            if time.monotonic() >= remind_at:
                remind_at += REMIND_S
                log.warning("config_missing", cluster=self._keys.cluster, hint="run `elastic init` or `elastic serve`")
        return state.config

    def subscribe(self, callback: Callable[[ClusterState], None]) -> Callable[[], None]:
        """Call `callback` with each new state, in the mirror's thread; return a function that ends this."""
        with self._changed:
            self._subscribers.append(callback)

        def unsubscribe() -> None:
            with self._changed:
                self._subscribers.remove(callback)

        return unsubscribe

    @property
    def synced(self) -> bool:
        """Whether the store is being watched right now."""
        return self._synced

    @property
    def staleness_s(self) -> float:
        """Time since the store last answered: the state may lack what was written since then."""
        return max(0.0, self._clock() - self._answered_at)

    @property
    def trouble(self) -> str:
        """Why the state may be out of date; "" while the store answers."""
        if self._replaced is not None:
            return f"{self._replaced}: {self._replaced.hint}"
        silent_s = self.staleness_s
        if silent_s < STORE_SILENCE_S:
            return ""
        return f"the store has been silent for {silent_s:.0f} s: serving goes on, and membership is frozen"

    def close(self) -> None:
        """Stop following."""
        self._stop.set()
        with self._changed:
            watch = self._watch
            self._changed.notify_all()
        if watch is not None:
            watch.close()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            raise WaitTimeout(f"mirror of cluster {self._keys.cluster} did not stop within {CLOSE_TIMEOUT_S:g} s")

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _current(self) -> ClusterState:
        if self._failure is not None:
            raise self._failure
        return self._state

    def _moved(self, seen: int) -> bool:
        return self._generation != seen or self._failure is not None

    def _run(self) -> None:
        """Follow until closed. During an outage, retry with growing pauses."""
        try:
            while not self._stop.is_set():
                Retrying(
                    retry=retry_if_exception(_passes),
                    wait=wait_random_exponential(multiplier=0.05, max=1.0),
                    stop=stop_when_event_set(self._stop),
                    sleep=sleep_using_event(self._stop),
                    before_sleep=self._log_retry,
                    reraise=True,
                )(self._open)
                self._follow()
        except StoreReplaced as replaced:
            log.error("membership_frozen", cluster=self._keys.cluster, error=str(replaced), hint=replaced.hint)
            with self._changed:
                self._replaced = replaced
        except Exception as error:
            if not self._stop.is_set():  # state() and wait() raise it in the owner's threads
                log.exception("mirror_failed", cluster=self._keys.cluster)
                self._fail(error)

    def _open(self) -> None:
        """Start a watch; list first if the store has compacted changes after our revision.

        The watch starts *at* the last known revision, not after it: etcd before 3.4.34 / 3.5.16 loses a delete at
        exactly the compacted revision, and this way that compaction is reported. Known events are skipped.
        """
        if self._relist:
            self._list()
        failpoints.hit("mirror.before.watch")
        try:
            watch = self._store.watch(self._keys.prefix, self._revision)
        except StoreCompacted:
            self._relist = True
            raise
        self._answered_at = self._clock()
        with self._changed:
            self._watch, self._synced = watch, True

    def _follow(self) -> None:
        watch = self._watch
        if watch is None:
            return
        try:
            while not self._stop.is_set():
                self._take(watch, self._probe_every_s)
        except Exception as error:
            if not _passes(error):
                raise
            self._lose(watch, error)
        finally:
            self._lose(watch)

    def _take(self, watch: Watch, timeout_s: float) -> bool:
        """Apply the next changes; return False if none came in time."""
        before = self._clock()
        batch = watch.next(timeout_s)
        if batch is None:
            before = self._clock()
            self._store.get(self._keys.config)  # the watch is silent: check that the store still answers
        elif batch.revision > self._revision:
            self._apply(batch.events, batch.revision)
        self._answered_at = before
        return batch is not None

    def _lose(self, watch: Watch | None, error: Exception | None = None) -> None:
        """Note that the watch has ended, and why."""
        if isinstance(error, StoreCompacted):
            self._relist = True
        elif error is not None and not self._stop.is_set():
            log.warning("mirror_lost_store", cluster=self._keys.cluster, error=str(error))
        with self._changed:
            self._watch, self._synced = None, False
        if watch is not None:
            watch.close()

    def _list(self) -> None:
        failpoints.hit("mirror.before.list")
        before = self._clock()
        self._revision, items = self._store.range(self._keys.prefix)
        self._reading.list(items)
        self._answered_at = before
        self._relist = False
        self._publish()

    def _apply(self, events: Iterable[WatchEvent], revision: int) -> None:
        news = [event for event in events if event.kv.mod_revision > self._revision]
        for event in news:
            if event.kind == "put":
                self._reading.put(event.kv)
            else:
                self._reading.delete(event.kv.key)
        self._revision = revision
        self._publish(quietly=bool(news) and all(event.kv.key.startswith(self._keys.quiet) for event in news))

    def _publish(self, *, quietly: bool = False) -> None:
        try:
            state, failure = self._reading.state(self._revision), None
        except ElasticError as error:
            state, failure = self._state, error
        with self._changed:
            quietly = quietly and self._failure is failure is None
            self._state, self._failure = state, failure
            if quietly:
                return
            self._generation += 1
            self._changed.notify_all()
            subscribers = tuple(self._subscribers) if failure is None else ()
        for subscriber in subscribers:
            subscriber(state)

    def _log_retry(self, retry: RetryCallState) -> None:
        if retry.attempt_number == 1 and retry.outcome is not None:
            log.warning("mirror_reopens_watch", cluster=self._keys.cluster, error=str(retry.outcome.exception()))

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._failure = error
            self._synced = False
            self._changed.notify_all()


def _passes(error: BaseException) -> bool:
    """Whether to open another watch after it: the store was away, or this process lacked something."""
    return isinstance(error, StoreUnavailable | StoreCompacted) or is_shortage(error)
