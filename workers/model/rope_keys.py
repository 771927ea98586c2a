"""Rotary embeddings in config.json: which types and parameters are computed as transformers does, and up to where.

Parameters are written in `rope_parameters`, or as older versions did in `rope_scaling` and beside it. A parameter that
transformers would skip with a warning is refused here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# type -> what it needs, what it may have. `original_max_position_embeddings` is the model's length if left out.
TYPES: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset()),
    "yarn": (
        frozenset({"factor"}),
        frozenset({"original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
                   "mscale_all_dim", "truncate"}),
    ),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
        frozenset({"original_max_position_embeddings"}),
    ),
    "longrope": (
        frozenset({"short_factor", "long_factor"}),
        frozenset({"original_max_position_embeddings", "factor", "attention_factor"}),
    ),
}  # fmt: skip
NEED_HEAD_DIM = ("dynamic", "yarn", "longrope")
LISTS = ("short_factor", "long_factor")


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that transformers takes, with their type; whatever stands in config.json."""
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(found, dict):
        return {"rope_type": repr(found)}
    given = {"rope_theta": config.get("rope_theta", 1e4), **found}
    kind = given.pop("type", "default")
    return {"rope_type": kind, **given}


def longest_as_trained(config: Mapping[str, Any]) -> int | None:
    """How many tokens a sequence may have with longrope, whose factors change beyond; None: any number.

    Where they change, transformers turns the tokens that follow by other angles than those before, and all of them by
    the other angles when they are computed again: a replayed request would not give the same tokens.
    """
    parameters = rope_parameters(config)
    if parameters["rope_type"] != "longrope":
        return None
    own = parameters.get("original_max_position_embeddings", config["max_position_embeddings"])
    return int(config.get("original_max_position_embeddings", own))


def rope_refusals(config: Mapping[str, Any], width: int | None, usual_part: float | None = None) -> Iterator[str]:
    """What of it is not served. `width`: of what can be turned, in each head; None: head_dim is not given.

    `usual_part`: which part of it is turned unless config.json says another; None: this family turns all of it.
    """
    parameters = rope_parameters(config)
    kind = parameters.pop("rope_type")
    if kind not in TYPES:
        yield f"rope_type = {kind!r}: one of {', '.join(TYPES)}"
        return
    theta = parameters.pop("rope_theta")
    if not _positive(theta):
        yield f"rope_theta = {theta!r}: a positive number"
    parts = (parameters.pop("partial_rotary_factor", None), config.get("partial_rotary_factor"), usual_part, 1)
    part = next(each for each in parts if each is not None)
    if usual_part is None and part != 1:
        yield f"partial_rotary_factor = {part!r}: only 1"
    elif not _positive(part) or part > 1 or (width and int(width * part) % 2):
        yield f"partial_rotary_factor = {part!r}: above 0, at most 1, for an even number of dimensions"
    else:
        yield from _of_type(kind, parameters, int(width * part) if width else None)
    if kind in NEED_HEAD_DIM and width is None:
        yield f"rope type {kind} without head_dim: hidden_size / num_attention_heads unless the model says otherwise"
    if "original_max_position_embeddings" in config and kind not in ("yarn", "llama3", "longrope"):
        yield f"original_max_position_embeddings: rope type {kind} has no such parameter"


def _of_type(kind: str, parameters: Mapping[str, Any], width: int | None) -> Iterator[str]:
    needed, optional = TYPES[kind]
    for name in sorted(needed - parameters.keys()):
        yield f"rope type {kind} without {name}"
    for name in sorted(parameters.keys() - needed - optional):
        yield f"{name} = {parameters[name]!r}: rope type {kind} has no such parameter"
    for name in sorted(parameters.keys() & (needed | optional)):
        yield from _value(name, parameters[name], width, required=name in needed)
    if ("mscale" in parameters) != ("mscale_all_dim" in parameters):
        yield "mscale and mscale_all_dim go together: one alone is ignored by transformers"


def _value(name: str, value: Any, width: int | None, *, required: bool) -> Iterator[str]:
    if name in LISTS:
        wanted = width // 2 if width else 0
        if not isinstance(value, list) or len(value) != wanted or not all(_positive(each) for each in value):
            yield f"{name} is not a list of {wanted} positive numbers"
    elif name == "truncate":
        if not isinstance(value, bool):
            yield f"truncate = {value!r}: true or false"
    elif not _positive(value) and (required or value is not None):
        yield f"{name} = {value!r}: a positive number"


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
