"""Real rank processes around an exchange, driven over a pipe: what the exchange's tests and benchmark share.

Experts are cheap, pure and not linear, so that a row computed twice, by the wrong expert or summed in another order
shows in the bits.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from membership.base.rank_id import RankId
from membership.store.records import Member, Placement, View
from workers.exchange.batch import ExpertFailed
from workers.exchange.loop import Exchange
from workers.exchange.model_side import StepContext
from workers.exchange.rows import Rows, bits
from workers.exchange.shm.transport import ShmTransport
from workers.exchange.shm.wire import AREA
from workers.ipc.doorbell import Bell, Doorbell
from workers.protocol.live_mask import LiveMask

TIMEOUT_S = 30.0


class Experts:
    """Expert e of layer l: rows * (1 + small(l, e)) + small; can be made to stall or fail at one expert."""

    def __init__(self, rank: int, placement: Placement) -> None:
        self.held = {(layer, e) for layer, held in enumerate(placement.get(rank, ())) for e in held}
        self.tile = 1 + rank % 2 * 3  # some ranks pad, some do not
        self.calls: list[tuple[int, int, int]] = []
        self.before: Callable[[int, int], None] = lambda layer, expert: None

    def holds(self, layer: int, expert: int) -> bool:
        return (layer, expert) in self.held

    def padded(self, rows: int) -> int:
        return -(-rows // self.tile) * self.tile

    def compute(self, layer: int, expert: int, rows: Tensor) -> Tensor:
        self.before(layer, expert)
        if not self.holds(layer, expert):
            raise KeyError((layer, expert))
        self.calls.append((layer, expert, len(rows)))
        return (rows.float() * (1.0 + 0.37 * expert + 0.11 * layer)).tanh().to(rows.dtype) + rows * 0.25

    def compute_many(self, layer: int, experts: Sequence[int], sizes: Sequence[int], rows: Tensor) -> Tensor:
        parts = zip(experts, rows.split(list(sizes)), strict=True)
        return torch.cat([self.compute(layer, expert, part) for expert, part in parts])


def broken(expert: int | None) -> Callable[[int, int], None]:
    """What `Experts.before` is for one broken expert, or none."""

    def before(_layer: int, at_expert: int) -> None:
        if at_expert == expert:
            raise RuntimeError(f"expert {expert} is broken here")

    return before


def spread(ranks: Iterable[int], layers: int, experts: int, copies: int) -> Placement:
    """Expert e on `copies` ranks following each other."""
    order = sorted(ranks)
    return {
        r: tuple(tuple(e for e in range(experts) if (i - e - layer) % len(order) < copies) for layer in range(layers))
        for i, r in enumerate(order)
    }


def batch(seed: int, tokens: int, top_k: int, experts: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(hidden, ids, weights), the same for the same seed."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, hidden, generator=g).to(dtype)
    ids = torch.rand(tokens, experts, generator=g).argsort(dim=1)[:, :top_k]
    return rows, ids, torch.rand(tokens, top_k, generator=g)


class RankServer:
    """One rank's process: does what the pipe says, and serves its peers in between."""

    def __init__(self, pipe: Connection, me: RankId, placement: Placement, area: int, answer_timeout_s: float) -> None:
        self.pipe = pipe
        self.rank = me.rank
        self.bell = Doorbell()
        self.bank = Experts(me.rank, placement)
        self.mask: LiveMask | None = None
        self.quorum = 0  # how many peers must have asked before any is answered, once
        self.exchange = Exchange(
            me,
            self.bank,
            self.bell,
            partial(ShmTransport, area=area),
            lambda: self.mask.masked() if self.mask else 0,
            answer_timeout_s=answer_timeout_s,
        )
        self.waker = threading.Thread(target=self._wake_on_command, daemon=True)

    def _wake_on_command(self) -> None:
        """The rank sleeps on its doorbell alone: a command on the pipe has to ring it."""
        while self.pipe.poll(TIMEOUT_S) or True:
            self.bell.ring()
            time.sleep(0.002)

    def run(self) -> None:
        self.pipe.send(self.exchange.handle())
        send_handle(self.pipe, self.bell.fileno(), os.getppid())
        self.waker.start()
        while True:
            self.bell.wait(lambda: self.exchange.pending() or self.pipe.poll(), 1.0)
            if sum(link.asked() for link in self.exchange._links.live) >= self.quorum:
                self.quorum = 0
                self.exchange.serve()
            if self.pipe.poll():
                try:
                    name, args = self.pipe.recv()
                except EOFError:
                    return
                try:
                    self.pipe.send(("ok", getattr(self, name)(*args)))
                except Exception as error:  # noqa: BLE001 - the driver raises it
                    self.pipe.send(("error", error))

    def connect(self, peers: Mapping[RankId, bytes]) -> None:
        self.exchange.connect(peers, TIMEOUT_S)

    def attach_mask(self, handle: bytes) -> None:
        self.mask = LiveMask.attach(handle)

    def steps(
        self, ctx: StepContext, work: list[tuple[int, int, int, int, int, int, str]]
    ) -> tuple[list[Rows], int, frozenset[int]]:
        """Run the layers in `work` = (layer, seed, tokens, top_k, experts, hidden, dtype)."""
        self.exchange.begin_step(ctx)
        outs = [
            bits(self.exchange.dispatch_combine(layer, *batch(seed, t, k, e, h, getattr(torch, dtype))))
            for layer, seed, t, k, e, h, dtype in work
        ]
        return outs, self.exchange.retried_rows, frozenset(self.exchange.suspects)

    def step_once_asked(self, ctx: StepContext, work: list[tuple[int, int, int, int, int, int, str]]) -> None:
        """Run layers as soon as a peer has asked for something, before answering it."""
        self.bell.wait(self.exchange.pending, TIMEOUT_S)
        try:
            self.steps(ctx, work)
        except ExpertFailed as error:
            raise RuntimeError(str(error)) from None

    def answer_once_asked_by(self, peers: int) -> None:
        """Let this many peers ask, and then answer them together."""
        self.quorum = peers

    def stop_before(self, layer: int) -> None:
        """Stop this process (SIGSTOP), once, as soon as it computes anything of that layer."""

        def before(at_layer: int, _expert: int) -> None:
            if at_layer == layer:
                self.bank.before = lambda _layer, _expert: None
                os.kill(os.getpid(), signal.SIGSTOP)

        self.bank.before = before

    def loop(self, ctx: StepContext, work: list[tuple[int, int, int, int, int, int, str]], times: int) -> int:
        """Run steps without looking at the pipe; how many."""
        for _ in range(times):
            self.steps(ctx, work)
        return times

    def load(self, placement: Placement) -> None:
        self.bank.held |= Experts(self.rank, placement).held

    def fail_at(self, expert: int) -> None:
        self.bank.before = broken(expert)

    def unload(self, layer: int, expert: int) -> None:
        self.bank.held.discard((layer, expert))

    def calls(self) -> list[tuple[int, int, int]]:
        calls, self.bank.calls = self.bank.calls, []
        return calls

    def disconnect(self, peers: list[RankId]) -> None:
        self.exchange.disconnect(peers)

    def resources(self) -> tuple[int, int]:
        """(open descriptors, threads)"""
        return len(os.listdir("/proc/self/fd")), threading.active_count()


def _main(pipe: Connection, me: RankId, placement: Placement, area: int, answer_timeout_s: float) -> None:
    torch.set_num_threads(1)
    RankServer(pipe, me, placement, area, answer_timeout_s).run()


class RankProcess:
    """The driver's side of one rank."""

    def __init__(
        self, context: Any, me: RankId, placement: Placement, area: int = AREA, answer_timeout_s: float = TIMEOUT_S
    ) -> None:
        self.me = me
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=_main, args=(child, me, placement, area, answer_timeout_s), daemon=True)
        self.process.start()
        child.close()
        self.handle: bytes = self._recv()
        fd = recv_handle(self.pipe)
        self.bell = Bell.attach(fd)
        os.close(fd)

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def _recv(self) -> Any:
        if not self.pipe.poll(TIMEOUT_S):
            raise TimeoutError(f"rank {self.me.rank} sent no answer")
        return self.pipe.recv()

    def send(self, name: str, *args: Any) -> None:
        self.pipe.send((name, args))

    def result(self) -> Any:
        kind, value = self._recv()
        if kind == "error":
            raise value
        return value

    def call(self, name: str, *args: Any) -> Any:
        self.send(name, *args)
        return self.result()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(TIMEOUT_S)

    def close(self) -> None:
        self.kill()
        self.pipe.close()
        self.process.close()
        self.bell.close()


class RankGroup:
    """Some ranks that are linked with each other."""

    def __init__(self, context: Any, placement: Placement, **options: Any) -> None:
        self.context = context
        self.placement = placement
        self.options = options
        self.ranks: dict[int, RankProcess] = {}
        self.incarnation = 0
        self.mask = LiveMask.create()
        self.step = 0
        for rank in sorted(placement):
            self.spawn(rank)
        self.link()

    def spawn(self, rank: int, placement: Placement | None = None) -> RankProcess:
        self.incarnation += 1
        placement = self.placement if placement is None else placement
        process = RankProcess(self.context, RankId(rank, self.incarnation), placement, **self.options)
        self.ranks[rank] = process
        process.call("attach_mask", self.mask.handle())
        return process

    def link(self) -> None:
        self.all("connect", self.handles())

    def handles(self) -> dict[RankId, bytes]:
        return {process.me: process.handle for process in self.ranks.values()}

    def all(self, name: str, *args: Any) -> dict[int, Any]:
        for process in self.ranks.values():
            process.send(name, *args)
        return {r: p.result() for r, p in self.ranks.items()}

    def lose(self, rank: int) -> None:
        """What an engine does when it finds a rank unusable."""
        self.mask.mask(rank)
        for process in self.ranks.values():
            process.bell.ring()

    def context_of(self, masked: int = 0) -> StepContext:
        self.step += 1
        members = tuple(Member(rank=r, node="n", incarnation=p.me.incarnation) for r, p in self.ranks.items())
        return StepContext(View(epoch=1, members=members, placement=self.placement), 7, self.step, 1, masked)

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for process in self.ranks.values():
            process.close()
        self.mask.close()
