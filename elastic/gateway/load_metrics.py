"""The load as of the scrape: requests that run and wait, the KV cache, how long no token has come."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from membership.store.records import ClusterState


class OpenRequests(Protocol):
    """What the engine link knows of this gateway's requests."""

    @property
    def ready(self) -> bool:
        """Whether there is an engine."""

    @property
    def open_requests(self) -> int:
        """How many have not ended."""

    def token_age_s(self) -> float:
        """Seconds since one of them grew; 0 if there are none."""


class LoadGauges(Collector):
    """The engine's numbers are the whole cluster's, as it last published them (once a second)."""

    def __init__(self, prefix: str, state: Callable[[], ClusterState], link: OpenRequests) -> None:
        self._prefix, self._state, self._link = prefix, state, link

    def collect(self) -> Iterable[Metric]:
        """Called by the registry at each scrape."""
        state, link = self._state(), self._link
        engine = state.engine_status if link.ready else None
        running, waiting = (engine.running, engine.waiting) if engine else (0, link.open_requests)
        yield self._gauge("requests_running", "Requests that have a rank.", running)
        text = "Requests that wait for a rank; without an engine, those of this gateway that wait for one."
        yield self._gauge("requests_waiting", text, waiting)
        yield self._gauge("requests_open", "Open requests of this gateway, one per choice.", link.open_requests)
        text = "Seconds since an open request of this gateway got a token; 0 if none is open."
        yield self._gauge("last_token_age_seconds", text, link.token_age_s())
        text = "Requests refused for want of room."
        shed = CounterMetricFamily(self._prefix + "requests_shed", text, labels=["reason"])
        for reason, count in (engine.shed if engine else {}).items():
            shed.add_metric([reason], count)
        yield shed
        if engine is not None:
            yield self._gauge("kv_usage_ratio", "Part of the ranks' KV blocks that requests use.", engine.kv_usage)
            text = "Requests that lost their KV blocks to older ones, and are computed again."
            yield CounterMetricFamily(self._prefix + "preemptions", text, value=engine.preemptions)
        if state.config is not None:
            size = {"block_size": str(state.config.block_size), "blocks_per_rank": str(state.config.kv_blocks)}
            info = GaugeMetricFamily(self._prefix + "kv_cache_info", "The KV cache's size.", labels=list(size))
            info.add_metric(list(size.values()), 1)
            yield info

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are known at collection."""
        return []

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        return GaugeMetricFamily(self._prefix + name, text, value=value)
