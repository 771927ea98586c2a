"""What clients saw, as series over time: tokens per second, gaps between tokens, requests in lanes. Pure.

A soak has millions of tokens; a page shows buckets, and of single gaps only the `MOST_STALLS` longest.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from chaos.workload.history import RequestRecord, percentile

MOST_BUCKETS = 3000
MOST_STALLS = 4000
BUCKETS_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
PER_DECADE = 10  # bins of a histogram

Floats = npt.NDArray[np.float64]


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """One number per bucket of time. Gaps count where they end; 0 means that none ended there."""

    bucket_s: float
    tokens_per_s: tuple[float, ...]
    gap_p50_ms: tuple[float, ...]
    gap_p99_ms: tuple[float, ...]
    gap_max_ms: tuple[float, ...]


class Requests(msgspec.Struct, frozen=True, kw_only=True):
    """All requests, column by column, by the time they began; times in milliseconds."""

    lanes: int  # the most requests that were under way at a time
    lane: tuple[int, ...]
    began: tuple[int, ...]  # since the run began
    first: tuple[int, ...]  # until the first token; -1: there was none
    lasted: tuple[int, ...]  # until the last token
    prompt: tuple[int, ...]
    wrong: tuple[int, ...]  # indices of those that were lost, duplicated or altered


class Stalls(msgspec.Struct, frozen=True, kw_only=True):
    """The longest gaps, column by column, by the time they ended."""

    request: tuple[int, ...]  # index into Requests
    ended: tuple[int, ...]  # milliseconds since the run began
    ms: tuple[float, ...]


class Histogram(msgspec.Struct, frozen=True, kw_only=True):
    """Counts in bins of equal width on a log scale; bin i reaches from edges[i] to edges[i + 1]."""

    edges: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What all clients saw together."""

    tokens: int
    seconds: float  # from the first request to the last token
    series: Series
    requests: Requests
    stalls: Stalls
    gap_p50_ms: float
    gap_p99_ms: float
    gap_max_ms: float
    steady_p50_ms: float  # of the fault-free run; 0: there was none
    steady_p99_ms: float
    first_p50_ms: float
    first_p99_ms: float
    lasted_p50_ms: float
    lasted_p99_ms: float
    gap_counts: Histogram
    steady_counts: Histogram
    lasted_counts: Histogram


@dataclass(frozen=True)
class Gaps:
    """All gaps, by the time they ended (seconds since the run began)."""

    ended: Floats
    ms: Floats
    request: npt.NDArray[np.int64]

    def next_token(self, since: float) -> float | None:
        """When the first token after that came to a stream that had one before."""
        at = int(np.searchsorted(self.ended, since))
        return float(self.ended[at]) if at < self.ended.size else None

    def largest(self, since: float, until: float) -> float:
        """The longest gap that any stream had open between the two times, in ms."""
        first = int(np.searchsorted(self.ended, since))
        inside = (self.ended[first:] - self.ms[first:] / 1000.0) <= until
        found = self.ms[first:][inside]
        return float(found.max()) if found.size else 0.0


def seen(
    history: Sequence[RequestRecord],  # by the time they began
    oracle: Sequence[RequestRecord],
    zero: float,
    duration_s: float,
    wrong: Sequence[int],
) -> tuple[Seen, Gaps]:
    """The series, and all gaps. `zero`: when the run began, on the clock of the records."""
    times = [np.asarray(record.token_times, np.float64) - zero for record in history]
    tokens = np.concatenate([*times, np.empty(0)])
    gaps = _gaps(times)
    steady = sorted(gap for record in oracle for gap in record.gaps_ms())
    first, lasted = (
        sorted((record.token_times[i] - record.started) * 1000.0 for record in history if record.token_times)
        for i in (0, -1)
    )
    ordered = np.sort(gaps.ms)
    gap_ms = ordered.tolist()
    began = history[0].started - zero if history else 0.0
    clients = Seen(
        tokens=int(tokens.size),
        seconds=round(max(0.0, float(tokens.max()) - began), 3) if tokens.size else 0.0,
        series=_series(tokens, gaps, duration_s),
        requests=_requests(history, times, zero, wrong),
        stalls=_stalls(gaps, percentile(steady, 0.99)),
        gap_max_ms=round(max(gap_ms, default=0.0), 1),
        **_p50_p99(gap=gap_ms, steady=steady, first=first, lasted=lasted),
        gap_counts=histogram(ordered),
        steady_counts=histogram(np.asarray(steady, np.float64)),
        lasted_counts=histogram(np.asarray(lasted, np.float64)),
    )
    return clients, gaps


def bucket_s(duration_s: float) -> float:
    """The narrowest bucket of which a run needs no more than `MOST_BUCKETS`."""
    return next((each for each in BUCKETS_S if duration_s / each <= MOST_BUCKETS), duration_s / MOST_BUCKETS)


def histogram(values: Floats) -> Histogram:
    """Counts of milliseconds on a log scale, from 1 ms (which also has all that is below it)."""
    if not values.size:
        return Histogram()
    bins = np.maximum(0, np.floor(np.log10(np.maximum(values, 1.0)) * PER_DECADE)).astype(np.int64)
    counts = np.bincount(bins)
    edges = tuple(round(float(10 ** (i / PER_DECADE)), 3) for i in range(counts.size + 1))
    return Histogram(edges=edges, counts=tuple(int(count) for count in counts))


def _gaps(times: Sequence[Floats]) -> Gaps:
    ended = np.concatenate([*(each[1:] for each in times), np.empty(0)])
    ms = np.concatenate([*(np.diff(each) * 1000.0 for each in times), np.empty(0)])
    request = np.repeat(np.arange(len(times)), [max(0, each.size - 1) for each in times])
    order = np.argsort(ended, kind="stable")
    return Gaps(ended[order], ms[order], request[order])


def _series(tokens: Floats, gaps: Gaps, duration_s: float) -> Series:
    width = bucket_s(duration_s)
    count = max(1, int(np.ceil(duration_s / width)))
    rate = np.bincount(_bucket(tokens, width, count), minlength=count) / width
    where = _bucket(gaps.ended, width, count)
    order = np.lexsort((gaps.ms, where))
    ordered, sizes = gaps.ms[order], np.bincount(where, minlength=count)
    starts = np.cumsum(sizes) - sizes

    def quantile(q: float) -> tuple[float, ...]:
        at = starts + np.minimum(np.maximum(sizes - 1, 0), (q * sizes).astype(np.int64))
        return tuple(round(float(ordered[i]), 1) if n else 0.0 for i, n in zip(at, sizes, strict=True))

    return Series(
        bucket_s=width,
        tokens_per_s=tuple(round(float(each), 1) for each in rate),
        gap_p50_ms=quantile(0.5),
        gap_p99_ms=quantile(0.99),
        gap_max_ms=quantile(1.0),
    )


def _bucket(times: Floats, width: float, count: int) -> npt.NDArray[np.int64]:
    return np.clip((times / width).astype(np.int64), 0, count - 1)


def _requests(history: Sequence[RequestRecord], times: Sequence[Floats], zero: float, wrong: Sequence[int]) -> Requests:
    began = [record.started - zero for record in history]
    ends = [float(each[-1]) if each.size else start for each, start in zip(times, began, strict=True)]
    lane, lanes = _lanes(began, ends)
    return Requests(
        lanes=lanes,
        lane=lane,
        began=tuple(_ms(each) for each in began),
        first=tuple(_ms(float(t[0]) - start) if t.size else -1 for t, start in zip(times, began, strict=True)),
        lasted=tuple(_ms(end - start) for end, start in zip(ends, began, strict=True)),
        prompt=tuple(record.prompt for record in history),
        wrong=tuple(wrong),
    )


def _lanes(began: Sequence[float], ends: Sequence[float]) -> tuple[tuple[int, ...], int]:
    """For each request, in order of their beginning, the lowest lane that is free; and how many it takes."""
    lane, free, busy, lanes = list[int](), list[int](), list[tuple[float, int]](), 0
    for start, end in zip(began, ends, strict=True):
        while busy and busy[0][0] <= start:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if not free:
            heapq.heappush(free, lanes)
            lanes += 1
        lane.append(heapq.heappop(free))
        heapq.heappush(busy, (end, lane[-1]))
    return tuple(lane), lanes


def _stalls(gaps: Gaps, at_least_ms: float) -> Stalls:
    longest = np.flatnonzero(gaps.ms >= at_least_ms)
    if longest.size > MOST_STALLS:
        longest = np.sort(longest[np.argsort(gaps.ms[longest], kind="stable")[-MOST_STALLS:]])
    return Stalls(
        request=tuple(int(each) for each in gaps.request[longest]),
        ended=tuple(_ms(float(each)) for each in gaps.ended[longest]),
        ms=tuple(round(float(each), 1) for each in gaps.ms[longest]),
    )


def _p50_p99(**values: Sequence[float]) -> dict[str, float]:
    """`NAME_p50_ms` and `NAME_p99_ms` of each."""
    return {
        f"{name}_p{percent}_ms": round(percentile(each, percent / 100), 1)
        for name, each in values.items()
        for percent in (50, 99)
    }


def _ms(seconds: float) -> int:
    return round(seconds * 1000.0)
