"""Our metrics once more under the names of vLLM, which dashboards, autoscalers and routers ask for. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from prometheus_client.core import Metric


@dataclass(frozen=True)
class Alias:
    """vLLM's name of one of our metrics, both without prefix and suffix; `labels`: ours -> vLLM's."""

    name: str
    ours: str
    labels: dict[str, str] = field(default_factory=dict)


ALIASES = (
    Alias("num_requests_running", "requests_running"),
    Alias("num_requests_waiting", "requests_waiting"),
    Alias("kv_cache_usage_perc", "kv_usage_ratio"),
    Alias("gpu_cache_usage_perc", "kv_usage_ratio"),  # its former name, which dashboards still have
    Alias("num_preemptions", "preemptions"),
    Alias("prefix_cache_queries", "prefix_cache_queries"),
    Alias("prefix_cache_hits", "prefix_cache_hits"),
    Alias("prompt_tokens", "prompt_tokens"),
    Alias("generation_tokens", "tokens"),
    Alias("request_success", "requests_finished", {"reason": "finished_reason"}),
    Alias("time_to_first_token_seconds", "time_to_first_token_seconds"),
    Alias("inter_token_latency_seconds", "inter_token_seconds"),
    Alias("time_per_output_token_seconds", "inter_token_seconds"),  # its former name
    Alias("e2e_request_latency_seconds", "request_seconds"),
    Alias("request_queue_time_seconds", "queue_seconds"),
    Alias("cache_config_info", "kv_cache_info", {"blocks_per_rank": "num_gpu_blocks"}),
)


class Families(list[Metric]):
    """Metrics as `generate_latest` takes them."""

    def collect(self) -> Iterable[Metric]:
        """All of them."""
        return self


def with_aliases(families: Iterable[Metric], prefix: str, model: str) -> Families:
    """The metrics, and after them those that vLLM has under another name, with its label `model_name`."""
    found = Families(families)
    by_name = {each.name: each for each in found}
    for alias in ALIASES:
        if (ours := by_name.get(prefix + alias.ours)) is not None:
            found.append(_renamed(ours, f"vllm:{alias.name}", alias.labels, {"model_name": model, "engine": "0"}))
    return found


def _renamed(ours: Metric, name: str, labels: dict[str, str], more: dict[str, str]) -> Metric:
    theirs = Metric(name, ours.documentation, ours.type)
    for sample in ours.samples:
        named = {labels.get(label, label): value for label, value in sample.labels.items()}
        theirs.add_sample(name + sample.name.removeprefix(ours.name), more | named, sample.value)
    return theirs
