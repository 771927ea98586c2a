"""What clients saw, request by request, and its comparison with a fault-free run of the same prompts.

Pure. A request is *lost* if it did not end, or ended with a token missing; *duplicated* if a token came twice;
*altered* if anything else differs from the fault-free run. One request counts once, under the first that holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One streamed request as its client saw it. Times are seconds of one monotonic clock."""

    prompt: int  # index of the prompt, the key into the oracle
    started: float
    id: str = ""  # of the response
    token_times: tuple[float, ...] = ()
    tokens: tuple[str, ...] = ()
    finish_reason: str = ""
    error: str = ""
    status: int = 200  # of the HTTP answer; 0: there was none
    ended: float = 0.0  # 0: not known

    @property
    def complete(self) -> bool:
        """Whether it ended as a request should."""
        return bool(self.finish_reason) and not self.error

    def gaps_ms(self) -> list[float]:
        """Milliseconds between consecutive tokens."""
        return [(b - a) * 1000.0 for a, b in zip(self.token_times, self.token_times[1:], strict=False)]


class Difference(msgspec.Struct, frozen=True):
    """One request that is not what it should be: `kind` is lost, duplicated or altered."""

    prompt: int
    kind: str
    explanation: str


class Verdict(msgspec.Struct, frozen=True):
    """All differences between a history and its oracle."""

    requests: int
    differences: tuple[Difference, ...]

    def count(self, kind: str) -> int:
        """How many requests were lost, duplicated or altered."""
        return sum(d.kind == kind for d in self.differences)

    def explained(self, most: int) -> list[str]:
        """The first `most` differences, a line each."""
        return [f"request {d.prompt} {d.kind}: {d.explanation}" for d in self.differences[:most]]

    @property
    def ok(self) -> bool:
        """Nothing differs, and there was something to compare."""
        return self.requests > 0 and not self.differences


def is_subsequence(short: Sequence[str], long: Sequence[str]) -> bool:
    """Whether `short` can be had from `long` by leaving tokens out."""
    rest = iter(long)
    return all(token in rest for token in short)


def difference(seen: RequestRecord, expected: RequestRecord) -> Difference | None:
    """How `seen` differs from the fault-free `expected`, or None."""
    if not seen.complete:
        why = seen.error or "the stream ended without a finish reason"
        return Difference(seen.prompt, "lost", f"after {len(seen.tokens)} of {len(expected.tokens)} tokens: {why}")
    if seen.tokens == expected.tokens and seen.finish_reason == expected.finish_reason:
        return None
    pairs = enumerate(zip(seen.tokens, expected.tokens, strict=False))
    where = next((i for i, (a, b) in pairs if a != b), min(len(seen.tokens), len(expected.tokens)))
    what = (
        f"token {where}: got {seen.tokens[where : where + 3]!r}, expected {expected.tokens[where : where + 3]!r}; "
        f"{len(seen.tokens)} tokens ({seen.finish_reason}), expected {len(expected.tokens)} ({expected.finish_reason})"
    )
    if len(seen.tokens) < len(expected.tokens) and is_subsequence(seen.tokens, expected.tokens):
        return Difference(seen.prompt, "lost", what)
    if len(seen.tokens) > len(expected.tokens) and is_subsequence(expected.tokens, seen.tokens):
        return Difference(seen.prompt, "duplicated", what)
    return Difference(seen.prompt, "altered", what)


def broke_off(seen: RequestRecord, expected: RequestRecord) -> bool:
    """Whether it ended early, and all that it brought is right: what a gateway's death may do to its streams."""
    return not seen.complete and seen.tokens == expected.tokens[: len(seen.tokens)]


def compare(history: Iterable[RequestRecord], oracle: Mapping[int, RequestRecord]) -> Verdict:
    """Hold every request against the fault-free run of its prompt."""
    records = list(history)
    found = [difference(record, oracle[record.prompt]) for record in records]
    return Verdict(len(records), tuple(d for d in found if d is not None))


def percentile(values: Sequence[float], q: float) -> float:
    """The value below which a share `q` (0..1) of `values` lies; 0.0 if there are none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


class Saved(msgspec.Struct, frozen=True):
    """A history file: the runs' records and their oracle."""

    history: tuple[RequestRecord, ...]
    oracle: dict[int, RequestRecord]


def save(path: Path, history: Iterable[RequestRecord], oracle: Mapping[int, RequestRecord]) -> None:
    """Write a history with its oracle as JSON, for `elastic-chaos check`."""
    path.write_bytes(msgspec.json.encode(Saved(tuple(history), dict(oracle))))


def load(path: Path) -> Saved:
    """Read what `save` wrote."""
    return msgspec.json.decode(path.read_bytes(), type=Saved)
