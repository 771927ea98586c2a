"""Scheduler tests: modelled ranks (chaos/simulation/ranks.py) and a gateway that checks every token index."""

from __future__ import annotations

from collections import Counter
from itertools import chain

from chaos.simulation.kv_model import EOS, KvModel, oracle
from elastic.engine.scheduler import Output, Scheduler
from elastic.protocol import Rejected, Submit
from membership.store.records import ClusterConfig, Member, View
from workers.protocol.messages import Sampling

TOKEN = 77


def config(**changes: object) -> ClusterConfig:
    base: dict[str, object] = {"block_size": 4, "kv_blocks": 12, "max_batched_tokens": 9, "max_seqs": 4}
    base |= {"max_model_len": 48, "eos_token_ids": (EOS,), "vocab_size": 50, "coverage_deadline_s": 30.0}
    return ClusterConfig(
        cluster="c",
        model="m",
        served_model_name="m",
        moe_layers=2,
        experts=2,
        **(base | changes),  # type: ignore[arg-type]
    )


def view(epoch: int, members: dict[int, int], *, covered: bool = True) -> View:
    """A view of rank -> incarnation; every member holds all experts, or the first holds only one."""
    layers = ((0, 1), (0, 1)) if covered else ((0,), (0,))
    placed = tuple(Member(rank=r, node="n", incarnation=i) for r, i in members.items())
    return View(epoch=epoch, members=placed, placement=dict.fromkeys(members, layers))


class Client:
    """What gateways have got: checks that indices have no gap and no duplicate, and that each request ends once."""

    def __init__(self) -> None:
        self.requests: dict[str, Submit] = {}
        self.outputs: dict[str, list[int]] = {}
        self.ends: dict[str, str] = {}

    def submit(self, scheduler: Scheduler, request: Submit, now: float) -> None:
        self.requests[request.request_id] = request
        self.outputs.setdefault(request.request_id, [])
        self.take(scheduler.submit(request, now))

    def take(self, outputs: list[Output]) -> None:
        for output in outputs:
            assert output.request_id not in self.ends, "an output after the end"
            if isinstance(output, Rejected):
                self.ends[output.request_id] = f"{output.status} {output.message}"
                continue
            assert output.index == len(self.outputs[output.request_id]), "a gap or a duplicate"
            self.outputs[output.request_id] += output.tokens
            if output.finish_reason:
                self.ends[output.request_id] = output.finish_reason

    def check(self) -> None:
        for name, request in self.requests.items():
            assert (self.outputs[name], self.ends.get(name)) == oracle(request), name


def ask(name: str, prompt: list[int], max_tokens: int = 5, **more: object) -> Submit:
    return Submit(name, prompt, Sampling(), max_tokens, **more)  # type: ignore[arg-type]


def drive(scheduler: Scheduler, ranks: KvModel, client: Client, members: dict[int, int], now: float = 0.0) -> int:
    """Run steps until nothing is left; returns how many. Whatever ranks are to copy is copied at once."""
    steps = 0
    while (batch := scheduler.schedule(now)) is not None or scheduler.reading:
        for result in ranks.run(batch, members) if batch is not None else []:
            client.take(scheduler.apply(result, now))
        orders = scheduler.copies(now)
        while orders:
            orders = [more for order in orders for more in scheduler.copied(ranks.copy(order), now)]
        steps += 1
        assert steps < 5000, "the requests do not finish"
        now += 1.0
    return steps


def pool_is_whole(scheduler: Scheduler) -> None:
    for home in scheduler._homes.values():
        pool, held = home.pool, [set(sequence.blocks) for sequence in home.running]
        assert [len(blocks) for blocks in held] == [len(sequence.blocks) for sequence in home.running]
        users = Counter(chain(chain.from_iterable(held), scheduler._migration.reserved(home)))
        assert [users[block] for block in range(pool.size)] == pool._users
        assert sorted([*users, *pool._idle, *pool._free]) == list(range(pool.size))
        assert pool.used == len(users)
        assert {block: name for name, block in pool._holder.items()} == pool._content
        assert pool._idle.keys() <= pool._content.keys() <= users.keys() | pool._idle.keys()
