"""Faults in what a host's processes share: damaged shared memory, a reader that does not read, a message too large.

Shared memory is damaged where the product has a check, and the fault exercises that check:

* an answer whose tag has a flipped bit: the asking rank compares the whole tag, refuses the answer, asks a replica;
* a liveness page whose mutex names another thread: the kernel then reports no death, but the pidfd does;
* a request that is half-written because its writer died: its number is published last, so no reader takes it.

A bit flip in the rows themselves goes unnoticed (as in any memory without ECC) and is not injected here.
"""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from chaos.faults.base import POLL_S, SEEN_S, Faults, NotInjected, SiteInjector, poll, see
from chaos.faults.process import Hold, ProcessInjector
from elastic.gateway.schema import MAX_BODY_BYTES
from elastic.serve.api_keys import client_headers

ANSWER_S = 0.02  # a live peer has answered by then; a rank may be kept stopped ten times as long
REPORTED_S = 0.15  # an event of a step is in the history by then
TRY_S = 20.0
PAUSE_S = 0.003
OWNER_BIT = 1 << 4  # of the thread id in the mutex

RANK = ("rank",)

FAULTS = Faults()


def memory_of(pid: int, name: str) -> list[tuple[str, Path]]:
    """The shared segments of a process whose names begin with `name`: full name and path of the descriptor."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except FileNotFoundError:
            continue
        if target.startswith(f"/memfd:{name}"):
            found.append((target.removeprefix("/memfd:").partition(" ")[0], entry))
    return found


@contextmanager
def mapped(path: Path) -> Iterator[memoryview]:
    """A shared segment, writable, while the block lasts."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        memory = mmap.mmap(fd, 0)
    finally:
        os.close(fd)
    view = memoryview(memory)
    try:
        yield view
    finally:
        view.release()
        memory.close()


@FAULTS.entry(
    "bit-flip-answer", "a bit flips in the tag of an answer between ranks", victims=RANK, heals=True, needs=("load",)
)
class AnswerFlip(ProcessInjector):
    """A bit flips in the tag of an answer that a rank is about to read. Repeated until an unread answer is caught."""

    def _affect(self, hold: Hold) -> str:
        from workers.exchange.link import Tag  # imports torch
        from workers.exchange.shm import wire

        rank, tries, deadline = int(self.victim.split()[1]), 0, time.monotonic() + TRY_S
        step_at = wire.ANSWER_AT + 8 * Tag._fields.index("step")
        with ExitStack() as opened:
            lanes = self._lanes(hold, rank, opened)
            while time.monotonic() < deadline:
                tries += 1
                known = len(self.site.events())
                for flipped in self._flip(hold, lanes, wire.ASK, wire.ANSWER, step_at):
                    if poll(lambda: self._retried(rank, known), REPORTED_S, POLL_S * 5):  # noqa: B023 - asked at once
                        return f"{flipped}; event rows_retried of rank {rank} in the history (try {tries})"
                time.sleep(PAUSE_S)
        raise NotInjected(f"no answer to {self.victim} was caught unread in {tries} tries", hint="it needs load")

    def _lanes(self, hold: Hold, rank: int, opened: ExitStack) -> list[tuple[int, memoryview, memoryview]]:
        """For each peer: its rank, the lane in which we ask it, and the lane in which it answers."""
        lanes = []
        for name, asking in memory_of(hold.pid, f"elastic-ep-lane-{rank}-"):
            peer = int(name.rpartition("-")[2])
            for _, answering in memory_of(self.site.pid(f"rank {peer}"), f"elastic-ep-lane-{peer}-{rank}"):
                lanes.append((peer, opened.enter_context(mapped(asking)), opened.enter_context(mapped(answering))))
        if not lanes:
            raise NotInjected(f"{self.victim} exchanges nothing with other ranks of this host")
        return lanes

    def _flip(
        self, hold: Hold, lanes: list[tuple[int, memoryview, memoryview]], ask: int, answer: int, at: int
    ) -> Iterator[str]:
        """Stop the asking rank, flip the answers to its open requests, resume it."""
        flipped = []
        try:
            hold.stop()
            until = time.monotonic() + ANSWER_S
            for peer, asking, answering in lanes:
                asks, answers = asking[: 8 * 16].cast("Q"), answering[: 8 * 16].cast("Q")
                if not asks[ask] or answers[answer] == asks[ask]:
                    continue  # no request is open, or it was answered before and may have been read
                while answers[answer] != asks[ask] and time.monotonic() < until:
                    time.sleep(POLL_S / 4)
                if answers[answer] != asks[ask]:
                    continue
                before = answering[at]
                answering[at] = before ^ 1
                if answering[at] == before ^ 1:
                    flipped.append(f"bit 0 of the step in the answer of rank {peer} reads back flipped")
        finally:
            hold.send(signal.SIGCONT)
        yield from flipped

    def _retried(self, rank: int, known: int) -> bool:
        return any(event.kind == "rows_retried" and event.rank == rank for event in self.site.events()[known:])

    def _restore(self, hold: Hold) -> None:
        hold.send(signal.SIGCONT)


@FAULTS.entry(
    "bit-flip-liveness", "a bit flips in a liveness page: the kernel does not report the rank's death", victims=RANK,
    heals=True,
)  # fmt: skip
class LivenessFlip(ProcessInjector):
    """A bit flips in the rank's liveness page: the mutex that it holds names another thread as its owner."""

    _flipped = False

    def _affect(self, hold: Hold) -> str:
        with mapped(self._page(hold)) as page:
            before = page[0]
            page[0] = before ^ OWNER_BIT
            self._flipped = True
            if page[0] == before:
                raise NotInjected(f"the mutex of {self.victim} reads back as it was")
        values = f"{before:#x} is now {before ^ OWNER_BIT:#x}"
        return f"bit 4 of the mutex in the liveness page reads back flipped ({values})"

    def _page(self, hold: Hold) -> Path:
        pages = memory_of(hold.pid, "elastic-ep-liveness")
        if not pages:
            raise NotInjected(f"{self.victim} has no liveness page")
        return pages[0][1]

    def _restore(self, hold: Hold) -> None:
        if self._flipped and not hold.gone():
            with mapped(self._page(hold)) as page:
                page[0] ^= OWNER_BIT
        self._flipped = False


@FAULTS.entry("torn-write", "a rank dies in the middle of writing a request to its peers", victims=RANK, heals=False)
class TornWrite(ProcessInjector):
    """A rank dies in the middle of writing a request: half a header is in memory, its number is not published."""

    def _affect(self, hold: Hold) -> str:
        from workers.exchange.shm import wire

        rank, half = int(self.victim.split()[1]), 6 * 8
        with ExitStack() as opened:
            lanes = [opened.enter_context(mapped(path)) for _, path in memory_of(hold.pid, f"elastic-ep-lane-{rank}-")]
            if not lanes:
                raise NotInjected(f"{self.victim} exchanges nothing with other ranks of this host")
            hold.stop()
            for lane in lanes:
                lane[8 * wire.ASK : 8 * wire.ASK + 8] = bytes(8)
                lane[wire.ASK_AT : wire.ASK_AT + half] = b"\xa5" * half
            torn = [not any(lane[8 * wire.ASK : 8 * wire.ASK + 8]) and lane[wire.ASK_AT] == 0xA5 for lane in lanes]
            hold.send(signal.SIGKILL)
            if not all(torn) or not hold.gone(SEEN_S):
                raise NotInjected(f"{self.victim} did not die with half a request written")
        return f"half a header reads back in {len(torn)} lanes; pidfd says gone"

    def _restore(self, hold: Hold) -> None:
        hold.send(signal.SIGCONT)


@FAULTS.entry("dead-reader", "a reader of the engine's queue does not read", victims=RANK, heals=True, needs=("load",))
class DeadReader(ProcessInjector):
    """A reader of the engine's step queue is alive and does not read; the writer must not wait for it forever."""

    def _affect(self, hold: Hold) -> str:
        from workers.queue.ring import places

        with ExitStack() as opened:
            rings = [
                opened.enter_context(mapped(path)) for _, path in memory_of(self.site.pid("engine"), "elastic-ep-queue")
            ]
            hold.stop()
            before = [places(ring) for ring in rings]

            def left_behind() -> bool:
                for (head, tails), ring in zip(before, rings, strict=True):
                    head_now, tails_now = places(ring)
                    if head_now > head and any(tails_now.get(slot, tail) == tail for slot, tail in tails.items()):
                        return True
                return False

            see(left_behind, "the queue of steps going on without a reader (it needs load)")
        return "/proc says stopped (T); the writer of the queue of steps went on, one reader's place stands still"

    def _restore(self, hold: Hold) -> None:
        hold.resume()


@FAULTS.entry(
    "oversize", "a request larger than the gateway takes", victims=("gateway",), heals=True, params={"extra_bytes": 1}
)
class Oversize(SiteInjector):
    """A request larger than the gateway accepts; it must be refused for its size. There is nothing to heal."""

    def _inject(self) -> str:
        size = MAX_BODY_BYTES + int(self.params["extra_bytes"])
        try:
            answer = httpx.post(
                f"{self.site.url()}/v1/completions",
                content=b" " * size,
                headers=client_headers(),
                timeout=SEEN_S,
                trust_env=False,
            )
        except httpx.HTTPError as error:
            raise NotInjected(f"a request of {size} bytes was not answered: {error!r}") from error
        if answer.status_code != httpx.codes.REQUEST_ENTITY_TOO_LARGE:
            raise NotInjected(f"a request of {size} bytes was answered with {answer.status_code}")
        return f"{size} bytes sent, answered with 413: {answer.json()['error']['code']}"
