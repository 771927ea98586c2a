"""The chart's Grafana dashboards, written by `make docs` from the tables of panels below."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path("helm/elastic-ep/files/dashboards")
PROMETHEUS = {"type": "prometheus", "uid": "${datasource}"}
HISTORY = "From the event history: in one pod the gateway's, with many pods the sum of what each role's pod says."
SHARED = "Each gateway shows the whole cluster's: the maximum is taken, not the sum."
WIDTH, HEIGHT, COLUMNS = 8, 7, 3


@dataclass(frozen=True)
class Panel:
    """`queries`: legend -> PromQL, in which RELEASE stands for the labels of the release that is looked at."""

    title: str
    unit: str
    queries: dict[str, str]
    about: str = ""


def rate(metric: str, by: str = "") -> str:
    """Per second, of all gateways together."""
    return f"sum{f' by ({by}) ' if by else ''}(rate(elastic_ep_{metric}{{RELEASE}}[$__rate_interval]))"


def shared_rate(metric: str, by: str = "") -> str:
    """Per second, of a counter that is the cluster's."""
    return f"max{f' by ({by}) ' if by else ''}(rate(elastic_ep_{metric}{{RELEASE}}[$__rate_interval]))"


def most(metric: str, by: str = "") -> str:
    """Of a gauge that is the cluster's."""
    return f"max{f' by ({by}) ' if by else ''}(elastic_ep_{metric}{{RELEASE}})"


def quantile(part: float, metric: str, by: str = "") -> str:
    """Of a histogram."""
    return f"histogram_quantile({part}, {rate(f'{metric}_bucket', f'le, {by}' if by else 'le')})"


def quantiles(metric: str) -> dict[str, str]:
    """Of a histogram in seconds."""
    return {f"{part:.0%}": quantile(part, metric) for part in (0.5, 0.95, 0.99)}


BOARDS: dict[str, tuple[str, tuple[Panel, ...]]] = {
    "service": (
        "what clients get",
        (
            Panel("Requests", "short", {
                "running": most("requests_running"), "waiting": most("requests_waiting"),
                "open at {{pod}}": "sum by (pod) (elastic_ep_requests_open{RELEASE})",
            }, SHARED),
            Panel("Tokens", "wps", {"generated": rate("tokens_total"), "of prompts": rate("prompt_tokens_total")}),
            Panel("Until the first token", "s", quantiles("time_to_first_token_seconds")),
            Panel("Between tokens", "s", quantiles("inter_token_seconds")),
            Panel("Longest gap in a stream", "s", quantiles("stream_max_gap_seconds")),
            Panel("Wait for a rank", "s", quantiles("queue_seconds")),
            Panel("Whole requests", "s", quantiles("request_seconds")),
            Panel("Ends", "reqps", {"{{reason}}": rate("requests_finished_total", "reason")}),
            Panel("Since the last token", "s", {"{{pod}}": most("last_token_age_seconds", "pod")}),
            Panel("Refused", "reqps", {
                "no room: {{reason}}": shared_rate("requests_shed_total", "reason"),
                "no known key": rate("requests_unauthorized_total"),
            }),
            Panel("Answers by key", "reqps", {"{{key}} {{status}}": rate("key_requests_total", "key, status")}),
            Panel("Tokens by key", "wps", {"{{key}} {{kind}}": rate("key_tokens_total", "key, kind")}),
            Panel("Open by key", "short", {"{{key}}": "sum by (key) (elastic_ep_key_requests_in_flight{RELEASE})"}),
            Panel("Wait for a rank by key", "s", {"{{key}}": rate("key_queue_seconds_total", "key")}),
        ),
    ),
    "cluster": (
        "ranks, epochs, recoveries, links",
        (
            Panel("Ranks by state", "short", {"{{state}}": most("ranks", "state")}, SHARED),
            Panel("Epoch", "short", {"epoch": most("membership_epoch")}),
            Panel("Deaths in the last hour", "short", {
                "rank {{rank}}": "max by (rank) (increase(elastic_ep_worker_restarts_total{RELEASE}[1h]))",
            }),
            Panel("Slow ranks", "short", {"slow": most("ranks_slow")}),
            Panel("Steps", "ops", {"{{outcome}}": shared_rate("steps_total", "outcome")}),
            Panel("Changes of membership", "ops", {"{{outcome}}": rate("reconfigurations_total", "outcome")}, HISTORY),
            Panel("Phases of a change, 95%", "s", {
                "{{trigger}}: {{phase}}": quantile(0.95, "reconfiguration_seconds", "phase, trigger"),
            }, HISTORY),
            Panel("Detection of a loss, 95%", "s", {
                "{{source}}": quantile(0.95, "detection_seconds", "source"),
            }, HISTORY),
            Panel("Recovery from a loss", "s", quantiles("recovery_seconds"), HISTORY),
            Panel("Requests that moved", "reqps", {"{{how}}": rate("requests_migrated_total", "how")}, HISTORY),
            Panel("Kept from acting", "ops", {"{{what}}": rate("fenced_total", "what")}, HISTORY),
            Panel("Links", "short", {
                "{{role}} {{node}} to {{peer_node}}: up": most("links_up", "role, node, peer_node"),
                "{{role}} {{node}} to {{peer_node}}: wanted": most("links", "role, node, peer_node"),
            }, SHARED),
            Panel("Round trips", "s", {"{{node}} to {{peer_node}}": most("link_rtt_seconds", "node, peer_node")}),
            Panel("Sent", "Bps", {
                "{{node}} to {{peer_node}}": shared_rate("link_sent_bytes_total", "node, peer_node"),
            }),
            Panel("Trouble of links", "ops", {
                "sent again, {{node}} to {{peer_node}}": shared_rate("link_retransmits_total", "node, peer_node"),
                "silent, {{node}} to {{peer_node}}": shared_rate("link_suspects_total", "node, peer_node"),
                "cut": rate("link_cuts_total"),
            }),
        ),
    ),
    "capacity": (
        "KV cache and experts",
        (
            Panel("KV cache in use", "percentunit", {"of all ranks": most("kv_usage_ratio")}, SHARED),
            Panel("KV blocks of a rank", "short", {
                "{{blocks_per_rank}} blocks of {{block_size}}": most("kv_cache_info", "blocks_per_rank, block_size"),
            }),
            Panel("Preempted", "reqps", {"requests": shared_rate("preemptions_total")}),
            Panel("Prompt tokens from the prefix cache", "percentunit", {
                "hits": f"{shared_rate('prefix_cache_hits_total')} / {shared_rate('prefix_cache_queries_total')}",
            }),
            Panel("Tokens read from dead ranks", "wps", {"tokens": shared_rate("kv_salvaged_tokens_total")}),
            Panel("Replicas of the expert with fewest", "short", {
                "replicas": "min(elastic_ep_expert_live_replicas_min{RELEASE})",
            }),
            Panel("Experts without a replica", "short", {"experts": most("experts_uncovered")}),
            Panel("Experts that one host's end would leave without", "short", {
                "{{node}}": most("node_sole_experts", "node"),
                "{{node}} is safe to delete": most("node_safe_to_delete", "node"),
            }, SHARED),
            Panel("Busiest rank over the mean", "short", {"load of experts": most("expert_imbalance_ratio")}),
            Panel("Weights that moved", "Bps", {"{{trigger}}": rate("weight_bytes_moved_total", "trigger")}, HISTORY),
            Panel("GPU memory in use", "bytes", {
                "{{node}} GPU {{gpu}}": most("gpu_memory_used_bytes", "node, gpu"),
                "{{node}} GPU {{gpu}}: there is": most("gpu_memory_total_bytes", "node, gpu"),
            }, SHARED),
            Panel("Steps recorded as graphs", "short", {"rank {{rank}}": most("gpu_graphs", "rank")}, SHARED),
            Panel("Rows may travel between GPUs", "short", {"rank {{rank}}": most("gpu_exchange_ready", "rank")}),
            Panel("Weights in memory", "bytes", {"{{node}}": most("weight_store_bytes", "node")}, HISTORY),
        ),
    ),
}  # fmt: skip


def boards() -> Iterator[tuple[Path, str]]:
    """Where each dashboard is, and its JSON."""
    for name, (about, panels) in BOARDS.items():
        yield FOLDER / f"{name}.json", json.dumps(_board(name, about, panels), indent=1) + "\n"


def _board(name: str, about: str, panels: tuple[Panel, ...]) -> dict[str, Any]:
    return {
        "uid": f"elastic-ep-{name}",
        "title": f"elastic-ep {name}",
        "description": about,
        "tags": ["elastic-ep"],
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource(), _variable("namespace", ""), _variable("job", 'namespace="$namespace"')]},
        "panels": [_panel(number, panel) for number, panel in enumerate(panels)],
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}


def _variable(name: str, within: str) -> dict[str, Any]:
    query = f"label_values(elastic_ep_membership_epoch{{{within}}}, {name})"
    return {"name": name, "type": "query", "datasource": PROMETHEUS, "query": query, "refresh": 2, "label": name}


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(number, COLUMNS)
    release = 'namespace="$namespace",job="$job"'
    targets = [
        {"refId": chr(65 + index), "expr": query.replace("RELEASE", release), "legendFormat": legend}
        for index, (legend, query) in enumerate(panel.queries.items())
    ]
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": PROMETHEUS,
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": targets,
    }
