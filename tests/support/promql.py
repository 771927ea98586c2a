"""As much of PromQL as the chart's alerts use, over recorded series. The grammar is promql-parser's; what a query means
is here, as Prometheus documents it, but for the extrapolation of `rate` to the ends of its range.

test_helm_alerts.py holds it against Prometheus itself where promtool is installed.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
Recording = Mapping[tuple[str, Labels], list[tuple[float, float]]]  # name and labels -> (when, value), in order
STALE_S = 300.0  # a sample counts as the present value for so long
CALCULATE: dict[str, Callable[[float, float], float]] = {"-": operator.sub, "/": operator.truediv}
COMPARE: dict[str, Callable[[float, float], bool]] = {">": operator.gt, "<": operator.lt, "==": operator.eq}
AGGREGATE: dict[str, Callable[[list[float]], float]] = {"max": max, "min": min, "sum": math.fsum}


def parsed(query: str) -> Any:
    """The query's tree. ValueError: Prometheus would refuse it."""
    import promql_parser  # not at the top: a checkout whose .venv is older still collects its tests

    return promql_parser.parse(query)


def selectors(tree: Any) -> Iterator[Any]:
    """Each vector selector in the tree."""
    kind = type(tree).__name__
    if kind == "VectorSelector":
        yield tree
    elif kind == "MatrixSelector":
        yield tree.vector_selector
    for part in (*getattr(tree, "args", ()), *(getattr(tree, each, None) for each in ("expr", "lhs", "rhs"))):
        if part is not None:
            yield from selectors(part)


def groupings(tree: Any) -> Iterator[str]:
    """Each label by which the tree groups."""
    if type(tree).__name__ == "AggregateExpr" and tree.modifier is not None:
        yield from tree.modifier.labels
    for part in (*getattr(tree, "args", ()), *(getattr(tree, each, None) for each in ("expr", "lhs", "rhs"))):
        if part is not None:
            yield from groupings(part)


def fires(query: str, hold_s: float, recording: Recording, times: Iterable[float]) -> list[Labels]:
    """The labels of alerts that fire at the last of these times: they were there all through `hold_s`."""
    tree, since = parsed(query), {}
    at = 0.0
    for at in times:
        found = evaluate(tree, recording, at)
        since = {labels: since.get(labels, at) for labels in found}
    return [labels for labels, begun in since.items() if at - begun >= hold_s]


def evaluate(tree: Any, recording: Recording, at: float) -> Any:
    """A vector, or a number."""
    kind = type(tree).__name__
    if kind == "NumberLiteral":
        return tree.val
    if kind == "ParenExpr":
        return evaluate(tree.expr, recording, at)
    if kind == "VectorSelector":
        return {
            labels: samples[-1][1]
            for labels, samples in _selected(tree, recording, at, STALE_S).items()
        }  # fmt: skip
    if kind == "AggregateExpr":
        return _aggregated(tree, evaluate(tree.expr, recording, at))
    if kind == "BinaryExpr":
        return _binary(tree, evaluate(tree.lhs, recording, at), evaluate(tree.rhs, recording, at))
    if kind == "Call":
        return _called(tree, recording, at)
    raise ValueError(f"no alert or dashboard has had {kind} until now, so it is not evaluated here: {tree}")


def _called(tree: Any, recording: Recording, at: float) -> Vector:
    name = tree.func.name
    if name == "absent":
        equal = [each for each in tree.args[0].matchers.matchers if str(each.op) == "MatchOp.Equal"]
        return {} if evaluate(tree.args[0], recording, at) else {frozenset((m.name, m.value) for m in equal): 1.0}
    if name in ("rate", "increase"):
        [ranged] = tree.args
        range_s = ranged.range.total_seconds()
        selected = _selected(ranged.vector_selector, recording, at, range_s)
        per = 1.0 if name == "rate" else range_s
        return {labels: _rate(samples) * per for labels, samples in selected.items() if len(samples) > 1}
    if name == "histogram_quantile":
        return _quantiles(evaluate(tree.args[0], recording, at), evaluate(tree.args[1], recording, at))
    raise ValueError(f"no alert or dashboard has had {name}() until now, so it is not evaluated here")


def _selected(tree: Any, recording: Recording, at: float, within_s: float) -> dict[Labels, list[tuple[float, float]]]:
    found = {}
    for (name, labels), samples in recording.items():
        recent = [each for each in samples if at - within_s < each[0] <= at]
        if name == tree.name and recent and all(_matches(each, dict(labels)) for each in tree.matchers.matchers):
            found[labels] = recent
    return found


def _matches(matcher: Any, labels: Mapping[str, str]) -> bool:
    value = labels.get(matcher.name, "")
    alike = value == matcher.value or ("Re" in str(matcher.op) and re.fullmatch(matcher.value, value) is not None)
    return alike is (str(matcher.op) in ("MatchOp.Equal", "MatchOp.Re"))


def _rate(samples: list[tuple[float, float]]) -> float:
    """Per second; a counter that is lower than before has begun again at 0."""
    values = [value for _, value in samples]
    risen = math.fsum(b - a if b >= a else b for a, b in pairwise(values))
    return risen / (samples[-1][0] - samples[0][0])


def _aggregated(tree: Any, vector: Vector) -> Vector:
    groups: dict[Labels, list[float]] = {}
    by = tree.modifier is None or str(tree.modifier.type).endswith("By")
    named = set(tree.modifier.labels) if tree.modifier is not None else set()
    for labels, value in vector.items():
        kept = frozenset(each for each in labels if (each[0] in named) is by)
        groups.setdefault(kept, []).append(value)
    return {labels: AGGREGATE[str(tree.op)](values) for labels, values in groups.items()}


def _binary(tree: Any, left: Any, right: Any) -> Vector:
    name = str(tree.op)
    if name == "unless":
        return {labels: value for labels, value in left.items() if labels not in right}
    pairs = {
        labels: (value, right[labels] if isinstance(right, dict) else right)
        for labels, value in left.items()
        if not isinstance(right, dict) or labels in right
    }
    if name in COMPARE:
        return {labels: a for labels, (a, b) in pairs.items() if COMPARE[name](a, b)}
    return {labels: CALCULATE[name](a, b) if b or name != "/" else math.nan for labels, (a, b) in pairs.items()}


def _quantiles(part: float, buckets: Vector) -> Vector:
    """Of each histogram, with a straight line within the bucket."""
    histograms: dict[Labels, list[tuple[float, float]]] = {}
    for labels, count in buckets.items():
        rest = frozenset(each for each in labels if each[0] != "le")
        histograms.setdefault(rest, []).append((float(dict(labels)["le"]), count))
    return {labels: _quantile(part, sorted(counts)) for labels, counts in histograms.items()}


def _quantile(part: float, counts: list[tuple[float, float]]) -> float:
    rank, below, lower = part * counts[-1][1], 0.0, 0.0
    for upper, count in counts:
        if count >= rank and counts[-1][1] > 0:
            return lower if math.isinf(upper) else lower + (upper - lower) * (rank - below) / (count - below)
        below, lower = count, upper
    return math.nan
