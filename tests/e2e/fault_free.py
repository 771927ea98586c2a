"""What each request of the usual workload yields without a fault: the same bits on any number of ranks. Asked once."""

from __future__ import annotations

from chaos.target.cluster import ServedCluster
from chaos.workload.history import RequestRecord
from chaos.workload.streams import Workload

_known: dict[str, dict[int, RequestRecord]] = {}


def fault_free(cluster: ServedCluster) -> dict[int, RequestRecord]:
    """By the number of the request; from the first cluster that served this model, before anything was done to it."""
    model = cluster.model_name()
    if model not in _known:
        records = Workload(cluster.url, model).run_once()
        assert all(record.complete for record in records), [record.error for record in records if not record.complete]
        _known[model] = {record.prompt: record for record in records}
    return _known[model]
