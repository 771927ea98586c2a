"""How long `elastic-chaos check` takes for a long record, and how that grows: `python -m benchmarks.check_speed`.

The record is made up, and good: scales up and down with their transactions, reads between them, requests, a death each
time. Twice the lines must take about twice the time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

from chaos.check.checker import check_record, table
from chaos.record.record import Answered, AnyLine, Changed, Expected, Header, Read, read, write
from chaos.workload.history import RequestRecord

RANKS, LAYERS, EXPERTS = 4, 4, 8
READS = 12  # for each round of a scale, which takes some twenty changes
REQUESTS = 2
TOKENS = tuple("abcdefgh" * 4)


class MadeUp:
    """A store that only ever does what it should."""

    def __init__(self) -> None:
        self.revision, self.now = 1, 1000.0
        self._keys: dict[str, tuple[int, int]] = {}  # key -> create revision, version

    def put(self, *values: tuple[str, Any]) -> Iterator[Changed]:
        """One transaction; None deletes."""
        self.revision += 1
        self.now += 0.001
        for name, value in values:
            key = "/elastic-ep/made-up/" + name
            if value is None:
                del self._keys[key]
                yield Changed(revision=self.revision, key=key, at=self.now, deleted=True)
                continue
            created, version = self._keys.get(key, (self.revision, 0))
            self._keys[key] = created, version + 1
            yield Changed(
                revision=self.revision, key=key, at=self.now, create_revision=created, version=version + 1, value=value,
            )  # fmt: skip


def lines() -> Iterator[AnyLine]:
    """The record, without an end."""
    store = MadeUp()
    yield Header(what="made up", seed=0, started=1000.0, wall=1000.0, replay="", cluster="made-up", ranks=RANKS)
    yield Expected(record=RequestRecord(prompt=0, started=0.0, tokens=TOKENS, finish_reason="stop"))
    config = {"cluster": "made-up", "model": "/m", "served_model_name": "m", "moe_layers": LAYERS, "experts": EXPERTS}
    yield from store.put(("config", config))
    yield from store.put(("engine", {"node": "a", "pid": 1}))
    engine = store.revision
    yield from store.put(("leader", {"node": "a", "pid": 1}))
    leader = store.revision
    held = {str(rank): [list(range(EXPERTS))] * LAYERS for rank in range(RANKS)}
    members: list[dict[str, Any]] = []
    for epoch in count(1):
        newcomer = {"rank": epoch % RANKS, "node": "a", "incarnation": epoch}
        members = sorted([*(m for m in members if m["rank"] != newcomer["rank"]), newcomer], key=lambda m: m["rank"])
        yield from _round(store, epoch, members, held, engine, leader)


def _round(
    store: MadeUp, epoch: int, members: list[dict[str, Any]], held: dict[str, Any], engine: int, leader: int
) -> Iterator[AnyLine]:
    """A newcomer takes the place of the rank in its slot; a view is staged, prepared and committed."""
    specs = [{"rank": m["rank"], "incarnation": m["incarnation"]} for m in members]
    yield from store.put(("incarnation", {"value": epoch}), ("assign/a", {"node": "a", "ranks": specs}))
    view = {"epoch": epoch, "members": members, "placement": {str(m["rank"]): held[str(m["rank"])] for m in members}}
    yield from store.put(("next", view))
    staged = store.revision
    for member in members:
        name = f"ranks/{member['rank']}/{member['incarnation']}"
        yield from store.put((name, {**member, "pid": 1, "state": "standby", "prepared_revision": staged}))
    yield from store.put(("view", view), ("next", None))
    committed = store.revision
    yield from store.put(("engine-status", {"token": engine, "epoch": epoch}))
    if epoch > RANKS:
        yield from store.put((f"ranks/{epoch % RANKS}/{epoch - RANKS}", None))
    for number in range(READS):
        store.now += 0.001
        yield Read(
            client=f"reader {number % 3}", began=store.now, ended=store.now + 0.0005, revision=store.revision,
            epoch=epoch, view_revision=committed, leader_revision=leader,
        )  # fmt: skip
    for number in range(REQUESTS):
        times = tuple(store.now - 1000.0 + 0.015 * i for i in range(len(TOKENS)))
        yield Answered(
            record=RequestRecord(
                prompt=0, id=f"{epoch}-{number}", started=times[0], tokens=TOKENS, token_times=times,
                finish_reason="stop",
            )
        )  # fmt: skip


def main() -> None:
    """Print the time for half of the lines and for all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=1_000_000)
    wanted = parser.parse_args().lines
    with tempfile.TemporaryDirectory(prefix="elastic-ep-check-") as folder:
        path = Path(folder) / "record.jsonl"
        for part in (wanted // 2, wanted):
            write(path, islice(lines(), part))
            began, cpu = time.perf_counter(), time.process_time()
            verdict = check_record(read(path))
            took, cpu = time.perf_counter() - began, time.process_time() - cpu
            size = path.stat().st_size / 1e6
            sys.stdout.write(
                f"{part} lines, {size:.0f} MB: {took:.1f} s ({cpu:.1f} s of CPU), {part / took:.0f} lines per s\n"
            )
    sys.stdout.write("\n".join(table(verdict)) + "\n")


if __name__ == "__main__":
    main()
