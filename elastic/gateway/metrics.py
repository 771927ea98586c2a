"""What Prometheus reads from a gateway: its streams' latencies, and the cluster's shape and past as of the scrape."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from elastic.gateway.event_metrics import PREFIX, HistoryMetrics
from elastic.gateway.key_ring import KeyRing
from elastic.gateway.load_metrics import LoadGauges, OpenRequests
from elastic.gateway.metric_aliases import with_aliases
from elastic.gateway.traffic import Traffic
from elastic.status import LinkStatus, NodeStatus, RankStatus, cluster_status
from membership.store.records import ClusterState, RankState

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class GatewayMetrics:
    """One gateway's registry (its own, so that several gateways fit into one process)."""

    def __init__(
        self,
        state: Callable[[], ClusterState],
        history: Path,
        cluster: str,
        keys: KeyRing | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._state = state
        self._aliased = ""
        self.traffic = Traffic()
        self._registry = CollectorRegistry()
        self._history = HistoryMetrics(PREFIX, history, cluster, self._registry)
        self._registry.register(ClusterGauges(state))
        self._registry.register(KeyCounters(keys or KeyRing()))
        self.first_token_s = self._histogram("time_to_first_token_seconds", "From a request's arrival to its token 0.")
        self.inter_token_s = self._histogram("inter_token_seconds", "Between tokens of one stream.")
        self.max_gap_s = self._histogram("stream_max_gap_seconds", "Longest gap between two tokens of a stream.")
        self.tokens = Counter(PREFIX + "tokens", "Tokens sent to clients.", registry=self._registry)
        self.prompt_tokens = Counter(PREFIX + "prompt_tokens", "Tokens of prompts.", registry=self._registry)
        self.queue_s = self._histogram("queue_seconds", "From a request's submission until it got a rank.")
        self.request_s = self._histogram("request_seconds", "From a request's arrival to its end.")
        text = "Requests by their end: stop, length, abort (the client went away), refused (by the engine), error."
        self.finished = Counter(PREFIX + "requests_finished", text, ["reason"], registry=self._registry)
        for reason in ("stop", "length", "abort", "refused", "error"):
            self.finished.labels(reason)

    def follow_load(self, link: OpenRequests, aliased: str = "") -> None:
        """Also show the load; `aliased`: and all under vLLM's names, for this model."""
        self._registry.register(LoadGauges(PREFIX, self._state, link))
        self._aliased = aliased

    def timer(self) -> StreamTimer:
        """Start timing a stream."""
        return StreamTimer(self, self._clock)

    def exposition(self) -> bytes:
        """Everything, in Prometheus' text format."""
        self._history.update(self._state().operations.values())
        if not self._aliased:
            return generate_latest(self._registry)
        return generate_latest(with_aliases(self._registry.collect(), PREFIX, self._aliased))

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(PREFIX + name, text, buckets=LATENCY_BUCKETS_S, registry=self._registry)


class StreamTimer:
    """The pace of one choice's tokens."""

    def __init__(self, metrics: GatewayMetrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._begun = self._last = clock()
        self._started = self._ended = False
        self._max_gap_s = 0.0

    def tokens(self, count: int, queued_s: float = 0.0) -> None:
        """Count tokens that arrived now. Of several at once, only the first one waited. `queued_s`: for a rank."""
        if not count:
            return
        now = self._clock()
        gap_s, self._last = now - self._last, now
        self._metrics.traffic.sent(count, gap_s if self._started else 0.0)
        if self._started:
            self._metrics.inter_token_s.observe(gap_s)
            self._max_gap_s = max(self._max_gap_s, gap_s)
        else:
            self._metrics.first_token_s.observe(gap_s)
            self._metrics.queue_s.observe(queued_s)
            self._started = True
        for _ in range(count - 1):
            self._metrics.inter_token_s.observe(0.0)
        self._metrics.tokens.inc(count)

    def end(self, reason: str) -> None:
        """The choice has ended, for this reason unless it had before."""
        if self._ended:
            return
        self._ended = True
        self._metrics.traffic.ended()
        self._metrics.finished.labels(reason).inc()
        self._metrics.request_s.observe(self._clock() - self._begun)
        if self._started:
            self._metrics.max_gap_s.observe(self._max_gap_s)


class ClusterGauges(Collector):
    """The cluster's shape, computed from the store's state at each scrape."""

    def __init__(self, state: Callable[[], ClusterState]) -> None:
        self._state = state

    def collect(self) -> Iterable[Metric]:
        """Called by the registry at each scrape."""
        state = self._state()
        status = cluster_status(state, time.time())
        ranks = GaugeMetricFamily(PREFIX + "ranks", "Rank slots by state.", labels=["state"])
        tally = Tally(rank.state for rank in status.ranks)
        for kind in RankState:
            ranks.add_metric([kind.value], tally[kind])
        yield ranks
        yield _gauge("membership_epoch", "The committed epoch.", status.epoch)
        slow = sum(rank.slow for rank in status.ranks)
        yield _gauge("ranks_slow", "Serving ranks far slower than the others (flagged, not evicted).", slow)
        covered = status.coverage
        yield _gauge("expert_live_replicas_min", "Live replicas of the expert with fewest.", covered.min_live_replicas)
        yield _gauge("experts_uncovered", "(layer, expert) pairs without a live replica.", covered.uncovered)
        yield from _nodes(status.nodes)
        if status.imbalance is not None:
            text = "The busiest rank's measured expert load over the mean rank's, averaged over the layers."
            yield _gauge("expert_imbalance_ratio", text, status.imbalance)
        restarts = CounterMetricFamily(PREFIX + "worker_restarts", "Deaths in a rank slot.", labels=["rank"])
        for rank, last in sorted(state.exits.items()):
            restarts.add_metric([str(rank)], last.restarts)
        yield restarts
        steps = CounterMetricFamily(PREFIX + "steps", "Steps of the active engine, by outcome.", labels=["outcome"])
        for outcome, count in (state.engine_status.steps if state.engine_status else {}).items():
            steps.add_metric([outcome], count)
        yield steps
        salvaged = state.engine_status.salvaged_tokens if state.engine_status else 0
        yield _counter("kv_salvaged_tokens", "Tokens whose KV blocks were read from dead ranks' pools.", salvaged)
        yield from _links(status.links)
        yield from _gpus(status.ranks)
        if status.prefix_cache is not None:
            queries, hits = "Prompt tokens of requests that got a rank.", "Those of them that its prefix cache had."
            yield _counter("prefix_cache_queries", queries, status.prefix_cache.queried_tokens)
            yield _counter("prefix_cache_hits", hits, status.prefix_cache.cached_tokens)

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are known at collection."""
        return []


class KeyCounters(Collector):
    """What was asked with each API key, by its name. The keys themselves are not known here."""

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys

    def collect(self) -> Iterable[Metric]:
        """Called by the registry at each scrape."""
        text = "Requests that were refused for want of a known API key."
        yield CounterMetricFamily(PREFIX + "requests_unauthorized", text, value=self._keys.unauthorized)
        answers = CounterMetricFamily(PREFIX + "key_requests", "Requests by API key.", labels=["key", "status"])
        tokens = CounterMetricFamily(PREFIX + "key_tokens", "Tokens by API key.", labels=["key", "kind"])
        open_now = GaugeMetricFamily(PREFIX + "key_requests_in_flight", "Open requests by API key.", labels=["key"])
        text = "Seconds that requests waited for a rank, by API key."
        queued = CounterMetricFamily(PREFIX + "key_queue_seconds", text, labels=["key"])
        for name, account in self._keys.accounts.items():
            queued.add_metric([name], account.queued_s)
            for status, count in account.answers.items():
                answers.add_metric([name, str(status)], count)
            tokens.add_metric([name, "prompt"], account.prompt_tokens)
            tokens.add_metric([name, "generation"], account.generation_tokens)
            open_now.add_metric([name], account.in_flight)
        yield from (answers, tokens, open_now, queued)

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are known at collection."""
        return []


def _nodes(nodes: Iterable[NodeStatus]) -> Iterable[Metric]:
    """What the end of each host would cost."""
    text = "(layer, expert) pairs that the end of this host's machine would leave without a live replica."
    sole = GaugeMetricFamily(PREFIX + "node_sole_experts", text, labels=["node"])
    text = "1: no rank is on this host, planned or ending, nor a role in charge."
    safe = GaugeMetricFamily(PREFIX + "node_safe_to_delete", text, labels=["node"])
    for node in nodes:
        sole.add_metric([node.node], node.sole_experts)
        safe.add_metric([node.node], node.safe_to_delete)
    yield from (sole, safe)


def _gpus(ranks: Iterable[RankStatus]) -> Iterable[Metric]:
    """One series per rank that computes on one; ranks of the same GPU report the same memory."""
    labels = ["rank", "node", "gpu", "uuid"]
    used = GaugeMetricFamily(PREFIX + "gpu_memory_used_bytes", "Of a rank's GPU, by all processes.", labels=labels)
    total = GaugeMetricFamily(PREFIX + "gpu_memory_total_bytes", "Of a rank's GPU.", labels=labels)
    graphs = GaugeMetricFamily(PREFIX + "gpu_graphs", "Kinds of steps that a rank has recorded.", labels=labels)
    direct = GaugeMetricFamily(
        PREFIX + "gpu_exchange_ready", "1: a rank's rows may travel between GPUs, 0: host memory only.", labels=labels
    )
    for rank in ranks:
        if (gpu := rank.gpu) is not None:
            where = [str(rank.rank), rank.node, str(gpu.index), gpu.uuid]
            used.add_metric(where, gpu.used_gb * 1e9)
            total.add_metric(where, gpu.total_gb * 1e9)
            graphs.add_metric(where, gpu.graphs)
            direct.add_metric(where, float(gpu.exchange == "cuda"))
    return (used, total, graphs, direct)


def _links(links: Iterable[LinkStatus]) -> Iterable[Metric]:
    """One series per pair of hosts and role."""
    labels = ["role", "node", "peer_node"]
    wanted = GaugeMetricFamily(PREFIX + "links", "Connections to another host that are wanted.", labels=labels)
    up = GaugeMetricFamily(PREFIX + "links_up", "Those of them that are up.", labels=labels)
    rtt = GaugeMetricFamily(PREFIX + "link_rtt_seconds", "Longest round trip of them.", labels=labels)
    sent = CounterMetricFamily(PREFIX + "link_sent_bytes", "Bytes that the other host has acknowledged.", labels=labels)
    again = CounterMetricFamily(PREFIX + "link_retransmits", "Packets that were sent again.", labels=labels)
    suspects = CounterMetricFamily(PREFIX + "link_suspects", "How often the other host was silent.", labels=labels)
    for link in links:
        where = [link.role, link.node, link.peer_node]
        wanted.add_metric(where, link.links)
        up.add_metric(where, link.up)
        rtt.add_metric(where, link.rtt_ms / 1e3)
        sent.add_metric(where, link.sent_bytes)
        again.add_metric(where, link.retransmits)
        suspects.add_metric(where, link.suspects)
    return (wanted, up, rtt, sent, again, suspects)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, value=value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)
