"""Dispatch and combine on GPUs (`workers/exchange/cuda`), a process per GPU: microseconds, exact bits, and a death.

    python -m benchmarks.gpu_exchange [--ranks 2] [--kills 6] [--layers 16]

Prints one JSON line per result. This process plays the agent and the engine: it holds the windows' descriptors, hands
them to the ranks, and calls attempts off; it never touches CUDA. Parts:

* `layer`: the four kernels of a layer in a CUDA graph of 16 layers, by rows per rank, where experts cost nothing;
  then with experts of Qwen3-30B-A3B's shape, and those alone; and NCCL moving the same rows there and back.
* `exact`: sums over random routings, with padding and with a rank that has no rows, against a loop in fp32.
* `killed`: every rank holds all experts; one is killed with SIGKILL, by turns before it has launched its part of a step
  and in the midst of it (a dead process's kernels run on for some ms: they may finish the step). The survivor's are
  called off, it runs the step again alone, then with a successor that maps the same windows: its graph stays.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import multiprocessing as mp
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from workers.exchange.combine import ascending, combine
from workers.exchange.cuda.window import WindowShape
from workers.ipc.futex import RobustMutex

HIDDEN, INNER, EXPERTS, TOP_K, ROWS = 2048, 768, 128, 8, 128
LIMIT_S, ANSWER_S = 20.0, 120.0
REPLAYS, WARM_REPLAYS = 60, 5
EXACT_ROUNDS = 40
KILL_ROWS, KILL_LAYERS = 32, 64
PAGE_BYTES, MUTEX_AT, MUTEX_BYTES = 1 << 16, 1 << 14, 64

Layer = Callable[[], object]


def say(what: str, **fields: object) -> None:
    print(json.dumps({"what": what, **fields}), flush=True)


class Page:
    """Host memory that all processes share: the word below which calls are over, one mutex per rank."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, PAGE_BYTES)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._words = memoryview(self._memory).cast("Q")

    def call_off(self, below: int) -> None:
        self._words[0] = below

    def mutex(self, rank: int) -> RobustMutex:
        return RobustMutex(self.address + MUTEX_AT + MUTEX_BYTES * rank)


def placement(ranks: int, copies: int, masked: int) -> tuple[list[list[int]], list[tuple[int, int] | None]]:
    """Each rank holds its share of the experts, and with 2 copies that of its left neighbour behind it."""
    share = EXPERTS // ranks
    own = [list(range(rank * share, (rank + 1) * share)) for rank in range(ranks)]
    held = [[expert for back in range(copies) for expert in own[(rank - back) % ranks]] for rank in range(ranks)]
    where: list[tuple[int, int] | None] = []
    for expert in range(EXPERTS):
        holders = [(expert // share + back) % ranks for back in range(copies)]
        live = [rank for rank in holders if not masked >> rank & 1]
        where.append((live[0], held[live[0]].index(expert)) if live else None)
    return held, where


# -- a rank ------------------------------------------------------------------------------------------------------------


class Rank:
    """One process on one GPU; does what the parent sends it."""

    def __init__(self, me: int, ranks: int, page: Page, sock: socket.socket) -> None:
        from workers.exchange.cuda.driver import host_words

        self.me, self.ranks, self._sock = me, ranks, sock
        torch.cuda.set_device(me)
        torch.zeros(1, device="cuda")
        self.called_off = host_words(page.address, PAGE_BYTES)
        self._base = 1
        page.mutex(me).lock_now()

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        data, fds, *_ = socket.recv_fds(self._sock, 1 << 16, 16)
        if not data:
            os._exit(0)  # the parent is gone
        return json.loads(data), fds

    def reply(self, **fields: object) -> None:
        self._sock.send(json.dumps(fields).encode())

    def open(self, fds: list[int], size: int, copies: int) -> None:
        """Map the windows, ours and the others'."""
        from workers.exchange.cuda.calls import DeviceCalls, Reach
        from workers.exchange.cuda.driver import Mapping

        shape = shape_of(self.ranks, copies)
        self._mapped = [Mapping(fd, size, self.me) for fd in fds]
        for fd in fds:
            os.close(fd)
        reach = Reach([each.address for each in self._mapped], self.called_off)
        self.calls = DeviceCalls(shape, self.me, EXPERTS, reach, LIMIT_S)
        self.shape = shape
        self.scales = (1 + torch.arange(EXPERTS, device="cuda") / EXPERTS / 64).bfloat16()
        self._of_place = torch.tensor(placement(self.ranks, copies, 0)[0][self.me], device="cuda")
        self._numbers = torch.arange(shape.room, device="cuda", dtype=torch.int32)

    def scaled(self, packed: Tensor, ends: Tensor) -> Tensor:
        """Experts that show whether a row was with the right one: each multiplies by a number of its own."""
        group = torch.bucketize(self._numbers, ends[1:], right=True).clamp_max_(self.shape.held - 1)
        return packed * self.scales[self._of_place[group]].unsqueeze(-1)

    def draw(self, rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, ids and weights of a step."""
        generator = torch.Generator(device="cuda").manual_seed(1000 * seed + self.me)

        def numbers(*sizes: int) -> Tensor:
            return torch.randn(*sizes, device="cuda", generator=generator)

        ids = numbers(rows, EXPERTS).topk(TOP_K).indices
        return numbers(rows, HIDDEN).bfloat16(), ids, numbers(rows, TOP_K).softmax(-1)

    def expected(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        ids, weights = ascending(ids, weights)
        return combine(hidden.unsqueeze(1) * self.scales[ids].unsqueeze(-1), weights, hidden.dtype)

    def begin(self, rows: int, masked: int = 0) -> None:
        self._base += 1 << 16
        self.calls.begin(self._base, rows, masked)

    # -- what the parent may ask

    def exact(self, seed: int) -> dict[str, object]:
        """Random steps of random sizes; now and then a rank has no rows."""
        wrong, rows_seen, failures = 0, 0, 0
        for number in range(EXACT_ROUNDS):
            pick = torch.Generator().manual_seed(seed * 1000 + number)
            padded = int(2 ** torch.randint(0, 8, (1,), generator=pick).item())
            real = [int(torch.randint(0, padded + 1, (1,), generator=pick).item()) for _ in range(self.ranks)]
            if number % 4 == 0:
                real[number // 4 % self.ranks] = 0
            given = self.draw(padded, seed * 1000 + number)
            self.begin(real[self.me])
            outs = [self.calls.call(layer, *given, self.scaled) for layer in range(8)]
            failures |= int(self.calls.failure())
            want = self.expected(*given)
            want[real[self.me] :] = 0
            wrong += sum(int((out != want).any(-1).sum()) for out in outs)
            rows_seen += 8 * real[self.me]
            self.meet()
        return {"rows": rows_seen, "wrong_rows": wrong, "failures": failures}

    def meet(self) -> None:
        """Wait until the parent has seen all ranks here."""
        torch.cuda.synchronize()
        self.reply(met=True)
        self.receive()

    def timed(self, layer: Callable[[int], object], layers: int, rows: int) -> list[float]:
        """Median and 98th percentile of the microseconds per layer in a graph; all ranks begin together."""
        self.begin(rows)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            layer(0)
        self.meet()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for number in range(layers):
                layer(number)
        took = []
        for number in range(WARM_REPLAYS + REPLAYS):
            self.begin(rows)
            self.meet()
            begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(200_000)  # so that all ranks have launched: what is timed is no host
            begun.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            if number >= WARM_REPLAYS:
                took.append(begun.elapsed_time(ended) * 1000 / layers)
        took.sort()
        return [round(took[len(took) // 2], 1), round(took[int(len(took) * 0.98)], 1)]

    def speed(self, rows: int, layers: int) -> dict[str, object]:
        given = self.draw(rows, rows)
        found: dict[str, object] = {"failures": 0}
        compute = self.real_experts()
        found["exchange_us"] = self.timed(lambda n: self.calls.call(n, *given, lambda x, _: x), layers, rows)
        found["failures"] = int(self.calls.failure())
        found["with_experts_us"] = self.timed(lambda n: self.calls.call(n, *given, compute), layers, rows)
        packed, ends = self.calls._packed, self.calls._ends.clone()
        found["experts_us"] = self.timed(lambda _: compute(packed, ends), layers, rows)
        found["nccl_us"] = self.timed(self.nccl(rows), layers, rows)
        return found

    def real_experts(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Two products with random weights, as the product computes them."""
        from workers.model.cuda.expert_products import addresses_of, multiply

        held = self.shape.held
        up = torch.randn(held, HIDDEN, 2 * INNER, device="cuda").mul_(HIDDEN**-0.5).bfloat16()
        down = torch.randn(held, INNER, HIDDEN, device="cuda").mul_(INNER**-0.5).bfloat16()
        up_at, down_at = (torch.tensor(addresses_of(list(each)), device="cuda") for each in (up, down))

        def compute(packed: Tensor, ends: Tensor) -> Tensor:
            gate, value = multiply(packed, up[0], up_at, ends).chunk(2, dim=-1)
            return multiply(torch.nn.functional.silu(gate) * value, down[0], down_at, ends)

        return compute

    def nccl(self, rows: int) -> Callable[[int], object]:
        """The same rows there and back by two collectives, evenly spread, without packing and summing."""
        import torch.distributed as dist

        if not dist.is_initialized():
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29617"}
            dist.init_process_group(
                "nccl", rank=self.me, world_size=self.ranks, device_id=torch.device("cuda", self.me)
            )
        there = torch.randn(rows * TOP_K, HIDDEN, device="cuda").bfloat16()
        back = torch.empty_like(there)

        def both(_: int) -> None:
            dist.all_to_all_single(back, there)
            dist.all_to_all_single(there, back)

        return both

    def record(self) -> dict[str, object]:
        """A step of many layers as one graph, to be run by `step`, and what must come of it."""
        self._given = hidden, ids, weights = self.draw(KILL_ROWS, 7)  # kept: the graph reads them
        stream = torch.cuda.Stream()

        def run(layer_of: Callable[[int, Tensor], Tensor]) -> Tensor:
            state = hidden
            for layer in range(KILL_LAYERS):
                state = layer_of(layer, state) + hidden * 0.5
            return state

        def call(layer: int, state: Tensor) -> Tensor:
            return self.calls.call(layer, state, ids, weights, self.scaled)

        self._wanted = run(lambda _, state: self.expected(state, ids, weights))
        with torch.cuda.stream(stream):  # kernels are loaded before they are captured; no peer is waited for
            self.calls.begin(1, 0, masked=(1 << self.ranks) - 1)
            run(call)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._result = run(call)
        torch.cuda.synchronize()
        return {}

    def step(self, base: int, masked: int) -> dict[str, object]:
        """One attempt; when its kernels had ended, on the clock of this host."""
        held, where = placement(self.ranks, 2, masked)
        self.calls.place(held, where)
        self.calls.begin(base, KILL_ROWS, masked)
        self.meet()
        begun = time.monotonic_ns()
        self._graph.replay()
        torch.cuda.synchronize()
        ended = time.monotonic_ns()
        exact = torch.equal(self._result, self._wanted)
        return {"failed": int(self.calls.failure()), "begun_ns": begun, "ended_ns": ended, "exact": exact}


def shape_of(ranks: int, copies: int) -> WindowShape:
    return WindowShape(ranks, EXPERTS // ranks * copies, ROWS, HIDDEN, TOP_K)


def rank_main(kind: type[Rank], me: int, ranks: int, page: Page, sock: socket.socket) -> None:
    rank = kind(me, ranks, page, sock)
    rank.reply(ready=True)
    while True:
        order, fds = rank.receive()
        what = order.pop("do")
        if what == "open":
            rank.open(fds, order["size"], order["copies"])
            rank.calls.place(*placement(ranks, order["copies"], 0))
            torch.cuda.synchronize()
            rank.reply()
        else:
            rank.reply(**getattr(rank, what)(**order))


# -- the parent --------------------------------------------------------------------------------------------------------


class Ranks:
    """The processes, and the descriptors of the slots' windows."""

    def __init__(self, count: int, page: Page, kind: type[Rank] = Rank) -> None:
        self.count, self.page, self._kind = count, page, kind
        self._context = mp.get_context("fork")
        self.processes: dict[int, Any] = {}
        self._socks: dict[int, socket.socket] = {}
        self.fds: list[int] = []
        self._size = 0
        for rank in range(count):
            self.start(rank)

    def start(self, rank: int) -> None:
        self.page.mutex(rank).initialise()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = self._context.Process(
            target=rank_main, args=(self._kind, rank, self.count, self.page, theirs), daemon=True
        )
        process.start()
        theirs.close()
        ours.settimeout(ANSWER_S)
        self.processes[rank], self._socks[rank] = process, ours
        self.answer(rank)

    def send(self, rank: int, fds: list[int] | None = None, **order: object) -> None:
        socket.send_fds(self._socks[rank], [json.dumps(order).encode()], fds or [])

    def answer(self, rank: int) -> dict[str, Any]:
        data = self._socks[rank].recv(1 << 16)
        if not data:
            raise SystemExit(f"rank {rank} ended")
        found: dict[str, Any] = json.loads(data)
        return found

    def all(self, **order: object) -> list[dict[str, Any]]:
        """Send it to all ranks; their answers, once they have met as often as they want to."""
        for rank in self._socks:
            self.send(rank, **order)
        while True:
            found = [self.answer(rank) for rank in self._socks]
            if not all("met" in each for each in found):
                return found
            for rank in self._socks:
                self.send(rank, go=True)

    def launch(self, ranks: Sequence[int], base: int, masked: int = 0) -> None:
        """Have them begin a step; their answers are still to come."""
        for rank in ranks:
            self.send(rank, do="step", base=base, masked=masked)
        for rank in ranks:
            self.answer(rank)
        for rank in ranks:
            self.send(rank, go=True)

    def make_windows(self, copies: int) -> None:
        """By a process that ends at once: the memory lives on in its descriptors."""
        for fd in self.fds:
            os.close(fd)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        maker = self._context.Process(target=_make, args=(theirs, self.count, copies))
        maker.start()
        theirs.close()
        ours.settimeout(ANSWER_S)
        data, self.fds, *_ = socket.recv_fds(ours, 1 << 16, 16)
        maker.join(ANSWER_S)
        self._size = json.loads(data)["size"]

    def open(self, rank: int, copies: int) -> None:
        self.send(rank, self.fds, do="open", size=self._size, copies=copies)
        self.answer(rank)

    def drop(self, rank: int) -> None:
        """After its death; returns when the kernel says that it is over."""
        self.processes.pop(rank).join(ANSWER_S)
        self._socks.pop(rank).close()

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join(ANSWER_S)


def _make(sock: socket.socket, ranks: int, copies: int) -> None:
    from workers.exchange.cuda.driver import Mapping, make_memory

    fds, size = [], 0
    for rank in range(ranks):
        torch.cuda.set_device(rank)
        torch.zeros(1, device="cuda")
        fd, size = make_memory(rank, shape_of(ranks, copies).offsets["bytes"])
        Mapping(fd, size, rank).clear()
        fds.append(fd)
    socket.send_fds(sock, [json.dumps({"size": size}).encode()], fds)
    os._exit(0)


def kill(ranks: Ranks, base: int, step_ms: float, early: bool) -> int:
    """Kill the last rank; the survivors give up, run the step again without it, and again with its successor."""
    victim, page = ranks.count - 1, ranks.page
    live = range(victim)
    before = ranks.all(do="step", base=base, masked=0)
    base += KILL_LAYERS
    ranks.launch(live if early else range(ranks.count), base)
    time.sleep(step_ms / 2000)
    killed = time.monotonic_ns()
    os.kill(ranks.processes[victim].pid, signal.SIGKILL)
    page.mutex(victim).owner_died(ANSWER_S)
    known = time.monotonic_ns()
    base += KILL_LAYERS
    page.call_off(base)
    gave_up = [ranks.answer(rank) for rank in live]
    ranks.launch(live, base, 1 << victim)
    again = [ranks.answer(rank) for rank in live]
    ranks.drop(victim)
    over = time.monotonic_ns()
    ranks.start(victim)
    ranks.open(victim, 2)
    ranks.send(victim, do="record")
    ranks.answer(victim)
    base += KILL_LAYERS
    after = ranks.all(do="step", base=base, masked=0)

    def ms(at: int) -> float:
        return round((at - killed) / 1e6, 2)

    say(
        "killed", before_its_launch=early, step_ms=round(step_ms, 2), layers=KILL_LAYERS, rows=KILL_ROWS,
        gave_up=[each["failed"] for each in gave_up],
        ms_after={
            "known": ms(known), "kernels_ended": ms(max(each["ended_ns"] for each in gave_up)),
            "run_again": ms(max(each["ended_ns"] for each in again)), "process_over": ms(over),
        },
        failed_again=[each["failed"] for each in again], failed_with_successor=[each["failed"] for each in after],
        exact_before=[each["exact"] for each in before], exact_again=[each["exact"] for each in again],
        exact_with_successor=[each["exact"] for each in after],
    )  # fmt: skip
    return base + KILL_LAYERS


def call_off(ranks: Ranks, base: int, step_ms: float) -> int:
    """No process dies: the word alone ends a step, which waits as the last rank has not launched it."""
    waiting = range(ranks.count - 1)
    ranks.launch(waiting, base)
    time.sleep(step_ms / 2000)
    written = time.monotonic_ns()
    ranks.page.call_off(base + KILL_LAYERS)
    found = [ranks.answer(rank) for rank in waiting]
    ended = [round((each["ended_ns"] - written) / 1e6, 2) for each in found]
    say("called off", kernels_ended_ms=ended, failed=[each["failed"] for each in found])
    return base + KILL_LAYERS


def deaths(ranks: Ranks, kills: int) -> None:
    ranks.make_windows(2)
    for rank in range(ranks.count):
        ranks.open(rank, 2)
    ranks.all(do="record")
    base, times = 1 << 20, []
    for _ in range(10):
        times.append([each["ended_ns"] - each["begun_ns"] for each in ranks.all(do="step", base=base, masked=0)])
        base += KILL_LAYERS
    step_ms = min(max(each) for each in times) / 1e6
    base = call_off(ranks, base, step_ms)
    for number in range(kills):
        base = kill(ranks, base, step_ms, early=number % 2 == 0)


def main() -> None:
    """Print one JSON line per result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rows", default="1,8,32,128")
    arguments = parser.parse_args()
    ranks = Ranks(arguments.ranks, Page())
    try:
        ranks.make_windows(1)
        for rank in range(ranks.count):
            ranks.open(rank, 1)
        say("exact", ranks=[found for seed in range(3) for found in ranks.all(do="exact", seed=seed)])
        for rows in map(int, arguments.rows.split(",")):
            found = ranks.all(do="speed", rows=rows, layers=arguments.layers)
            say("layer", rows_per_rank=rows, **found[0], failures_of_all=[each["failures"] for each in found])
        deaths(ranks, arguments.kills)
    finally:
        ranks.end()


if __name__ == "__main__":
    main()
