"""The scheduler under random histories of requests, aborts, resubmissions, deaths, view changes and bad answers."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from chaos.simulation.kv_model import KvModel, reply
from elastic.engine.scheduler import Scheduler
from tests.support.rank_model import TOKEN, Client, ask, config, drive, pool_is_whole, view
from workers.protocol.messages import BlocksCopied, CopyBlocks, StepStatus

pytestmark = pytest.mark.unit

SLOTS = 4


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    kv_blocks=st.integers(12, 30),
    max_seqs=st.integers(1, 12),  # from 8 on one place is reserved
    budget=st.integers(1, 20),
    cached=st.booleans(),
)
@example(1_000_000_000, 28, 5, 15, False)  # a read is overdue while another one of the same ranks has lost its request
def test_random_histories_lose_duplicate_and_alter_nothing(
    seed: int, kv_blocks: int, max_seqs: int, budget: int, cached: bool
) -> None:
    chance = random.Random(seed)
    changes = {"kv_blocks": kv_blocks, "max_seqs": max_seqs, "max_batched_tokens": budget, "prefix_cache": cached}
    scheduler = Scheduler(config(**changes), TOKEN)
    ranks, client, now = KvModel(4), Client(), 0.0
    epoch, incarnation, members = 0, 0, dict[int, int]()
    orders, answers = list[CopyBlocks](), list[BlocksCopied]()
    for _ in range(chance.randint(20, 150)):
        now += 0.3
        event = chance.random()
        if event < 0.25:
            prompt = [chance.randrange(50) for _ in range(chance.randint(1, 25))]
            common = min(chance.choice((0, chance.randint(1, 20))), len(prompt))
            prompt[:common] = range(4, 4 + common)
            client.submit(scheduler, ask(f"r{len(client.outputs)}", prompt, chance.randint(1, 20)), now)
        elif event < 0.35:
            epoch += 1
            kept = {r: i for r, i in members.items() if chance.random() < 0.7 and r not in scheduler.masked}
            for rank in chance.sample(range(SLOTS), 2):
                incarnation += 1
                kept.setdefault(rank, incarnation)
            members = kept
            scheduler.set_view(view(epoch, members), [r for r in members if chance.random() < 0.1], now)
        elif event < 0.4:
            _random_change_of_mind(chance, scheduler, client, now)
        elif event < 0.43:
            scheduler.leave(chance.sample(range(SLOTS), chance.randint(0, 2)))
        else:
            orders += scheduler.copies(now)
            answers += [_copy(chance, ranks, order) for order in orders]  # each rank receives all in order
            orders = _random_answers(chance, scheduler, answers, now)
            _random_step(chance, scheduler, ranks, client, members, now)
        pool_is_whole(scheduler)
    epoch += 1
    incarnation += 1
    members = {0: incarnation}
    scheduler.set_view(view(epoch, members), [], now)
    drive(scheduler, ranks, client, members, now + 10.0)
    client.check()
    pool_is_whole(scheduler)
    assert scheduler.running == scheduler.waiting == 0


def _random_change_of_mind(chance: random.Random, scheduler: Scheduler, client: Client, now: float) -> None:
    """A client goes away, or a gateway submits a request again with what it has."""
    open_requests = [name for name in client.requests if name not in client.ends]
    if not open_requests:
        return
    name = chance.choice(open_requests)
    if chance.random() < 0.3:
        scheduler.abort(name)
        del client.requests[name]
        client.ends[name] = "aborted"
    else:
        old = client.requests[name]
        again = ask(name, old.prompt, old.max_tokens, emitted=client.outputs[name].copy())
        client.take(scheduler.submit(again, now))


def _copy(chance: random.Random, ranks: KvModel, order: CopyBlocks) -> BlocksCopied:
    """A rank does its half of a copy: all of it, a part, or nothing."""
    whole = order.arriving and not order.there
    return ranks.copy(order, 100 if whole else chance.choice((1, 2, 100)), "e" * (chance.random() < 0.05))


def _random_answers(
    chance: random.Random, scheduler: Scheduler, answers: list[BlocksCopied], now: float
) -> list[CopyBlocks]:
    """Some answers of ranks come now, out of order, twice or not at all; what the scheduler asks next."""
    chance.shuffle(answers)
    come = [answers.pop() for _ in range(chance.randint(0, len(answers)))]
    come = [answer for answer in come for _ in range(chance.choice((0, 1, 1, 1, 1, 2)))]
    return [order for answer in come for order in scheduler.copied(answer, now)]


def _random_step(
    chance: random.Random, scheduler: Scheduler, ranks: KvModel, client: Client, members: dict[int, int], now: float
) -> None:
    """One step in which ranks may answer badly, twice, or die before or after they answered."""
    batch = scheduler.schedule(now)
    if batch is None:
        return
    results = ranks.run(batch, members)
    chance.shuffle(results)
    if chance.random() < 0.3:
        _random_change_of_mind(chance, scheduler, client, now)
    for result in results:
        fate = chance.random()
        if fate < 0.1:
            scheduler.lose_ranks([result.rank], now, ended=chance.random() < 0.7)
            client.take(scheduler.apply(result, now))
        elif fate < 0.2:
            status = chance.choice([StepStatus.COVERAGE_LOST, StepStatus.STALE, StepStatus.FAILED])
            client.take(scheduler.apply(reply(batch, result.rank, result.incarnation, [], status, "e", [9]), now))
        else:
            client.take(scheduler.apply(result, now))
            client.take(scheduler.apply(result, now))
