"""What the forkserver imports before it forks ranks: all that a rank of this model imports, nothing with threads."""

from __future__ import annotations

import json
import re
from pathlib import Path

from workers.protocol.launch import RANK_MODULE

OURS = (
    "torch",
    "transformers",
    "transformers.integrations.moe",
    "safetensors.torch",
    "numpy.ma",  # which `np.unique` imports when it is first called
    "llguidance",
    "workers.model.runner",
    "workers.model.devices",
    "workers.exchange.auto",
    "workers.exchange.loop",
    "workers.exchange.shm.transport",
    "workers.protocol.live_mask",
    "workers.agent.preload:warm_transformers",
)
WORKER_CLASS = "workers.rank.worker:EPWorker"  # "module:class"; the default


def preload_for(worker_class: str, model: str, dtype: str = "auto") -> tuple[str, ...]:
    """What to import, or call ("module:function"), for ranks with this worker and this checkpoint directory."""
    base = (RANK_MODULE, worker_class.partition(":")[0])
    if worker_class != WORKER_CLASS:
        return base
    family = _family(Path(model) / "config.json")
    if not family:
        return (*base, *OURS)
    arguments = json.dumps([model, dtype])
    modeling = f"transformers.models.{family}.modeling_{family}"
    return (*base, *OURS, modeling, f"workers.model.load:prebuild:{arguments}")


def warm_transformers() -> None:
    """Have transformers make its table of weight names now: 0.1 s in every rank otherwise."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("mixtral")  # whichever: it makes the whole table


def _family(config: Path) -> str:
    """The model type; empty if it cannot be read (loading the model then says why)."""
    try:
        found = json.loads(config.read_text(encoding="utf-8")).get("model_type", "")
    except (OSError, ValueError, AttributeError):
        return ""
    return found if isinstance(found, str) and re.fullmatch(r"[a-z0-9_]+", found) else ""
