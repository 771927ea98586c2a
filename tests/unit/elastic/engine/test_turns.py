"""Which API key's request has the next place, and what one key's flood costs another."""

from __future__ import annotations

import pytest

from chaos.simulation.kv_model import KvModel
from elastic.engine.scheduler import Scheduler
from elastic.engine.turns import OUTPUT_COST, PROMPT_COST, Turns
from elastic.protocol import Rejected
from tests.support.rank_model import TOKEN, Client, ask, config, drive, view

pytestmark = pytest.mark.unit

MEMBERS = {0: 10}


def flooded(*, taken: bool = False, **limits: object) -> tuple[Scheduler, Client, KvModel]:
    """One rank of two places, and forty prompts of one key; `taken`: an engine had them that is gone."""
    many = {"max_seqs": 2, "kv_blocks": 200, "max_waiting_requests": 1000} | limits
    scheduler, client = Scheduler(config(**many), TOKEN), Client()
    scheduler.set_view(view(1, MEMBERS), [], 0.0)
    for n in range(40):
        client.submit(scheduler, ask(f"long{n}", [5 + n] * 30, 4, ignore_eos=True, key="many", taken=taken), 0.0)
    return scheduler, client, KvModel(4)


def steps_until(scheduler: Scheduler, client: Client, ranks: KvModel, name: str) -> int:
    """How many steps until this request has ended."""
    for number in range(10_000):
        if name in client.ends:
            return number
        batch = scheduler.schedule(0.0)
        assert batch is not None
        for result in ranks.run(batch, MEMBERS):
            client.take(scheduler.apply(result, 0.0))
    raise AssertionError(f"{name} does not end")


@pytest.mark.parametrize("taken", [False, True], ids=["", "after a takeover"])
def test_a_short_request_of_another_key_has_the_next_place_that_is_free(*, taken: bool) -> None:
    """Also if all were submitted to an engine's successor, as a gateway does without knowing which of them ran."""
    steps = {}
    for key in ("many", "few"):
        scheduler, client, ranks = flooded(taken=taken)
        steps_until(scheduler, client, ranks, "long3")
        client.submit(scheduler, ask("short", [6], 1, key=key), 0.0)
        steps[key] = steps_until(scheduler, client, ranks, "short")
        drive(scheduler, ranks, client, MEMBERS)
        client.check()
    assert 10 * steps["few"] < steps["many"]


def test_streams_of_an_engine_that_is_gone_go_before_everybodys_turn() -> None:
    scheduler, _, _ = flooded(taken=True)
    scheduler.submit(ask("few", [6], 1, key="few"), 0.0)
    scheduler.submit(ask("stream", [7] * 4, 6, key="many", emitted=[8, 9]), 0.0)
    batch = scheduler.schedule(0.0)
    assert batch is not None
    assert scheduler.number_of("stream") in [chunk.seq for chunk in batch.ranks[0]]


def test_two_keys_that_flood_are_served_alike() -> None:
    """By tokens: one asks for prompts that are ten times as long."""
    scheduler, client, ranks = flooded()
    for n in range(400):
        client.submit(scheduler, ask(f"small{n}", [5 + n % 40, 6, 7], 4, ignore_eos=True, key="small"), 0.0)
    steps_until(scheduler, client, ranks, "long19")
    small = sum(name.startswith("small") for name in client.ends)
    cost = {"long": 30 * PROMPT_COST + 4 * OUTPUT_COST, "small": 3 * PROMPT_COST + 4 * OUTPUT_COST}
    assert small * cost["small"] == pytest.approx(20 * cost["long"], rel=0.1)


def test_an_interrupted_request_goes_before_everybodys_turn() -> None:
    scheduler, client, _ = flooded()
    assert scheduler.schedule(0.0) is not None
    client.submit(scheduler, ask("few", [6], 1, key="few"), 0.0)
    scheduler.lose_ranks([0], 0.0)
    scheduler.set_view(view(2, {1: 11}), [], 0.0)
    batch = scheduler.schedule(0.0)
    assert batch is not None
    assert [chunk.seq for chunk in batch.ranks[1]] == [1, 2]


def test_reserved_places_go_in_turns_too() -> None:
    """While the least served key's long request does not fit, a flood of short ones comes before one of a third key."""
    scheduler = Scheduler(config(max_seqs=8, kv_blocks=64, max_model_len=400), TOKEN)
    scheduler.set_view(view(1, MEMBERS), [], 0.0)
    scheduler.submit(ask("runs", [5] * 120, 4, key="many"), 0.0)
    scheduler.schedule(0.0)
    for name, key, tokens in (("long", "least", 160), *((f"short{n}", "many", 4) for n in range(5)), ("one", "few", 4)):
        scheduler.submit(ask(name, [6] * tokens, 4, key=key), 0.0)
    scheduler._waiting.turns.charge("few", 100)
    scheduler._waiting.turns.charge("many", 500)
    assert scheduler._waiting.first is not None
    assert scheduler._waiting.first.request.request_id == "long"
    scheduler._admit(0.0)
    assert [each.request.request_id for each in scheduler._homes[0].running] == ["runs", "one"]


@pytest.mark.parametrize("limit", [{"max_waiting_requests": 38}, {"max_waiting_tokens": 38 * 30}])
def test_one_key_does_not_fill_the_room_for_others(limit: dict[str, object]) -> None:
    scheduler, client, _ = flooded(**limit)
    assert not client.ends
    (refused,) = scheduler.submit(ask("one more", [5] * 30, 4, key="many"), 0.0)
    assert isinstance(refused, Rejected)
    assert scheduler.submit(ask("another", [5] * 30, 4, key="few"), 0.0) == []
    (refused,) = scheduler.submit(ask("one more", [5] * 30, 4, key="many"), 0.0)
    assert isinstance(refused, Rejected)


@pytest.mark.parametrize("limit", [{"max_waiting_requests": 60}, {"max_waiting_tokens": 60}])
def test_the_room_exceeds_its_limit_by_no_more_than_the_parts_of_keys_that_came_later(limit: dict[str, object]) -> None:
    limits: dict[str, object] = {"max_waiting_requests": 1000} | limit
    scheduler = Scheduler(config(**limits), TOKEN)
    for key in range(6):
        for n in range(100):
            scheduler.submit(ask(f"{key}-{n}", [5], 4, key=str(key)), 0.0)
    assert scheduler.waiting == sum(60 // n for n in range(1, 7))


def test_a_key_that_went_is_forgotten_once_the_others_have_been_served_as_much() -> None:
    """It may have been taken out of the file of keys, while there is always somebody with a request under way."""
    turns = Turns()
    for key in ("stays", "goes"):
        turns.begin(key)
    turns.charge("goes", 10)
    turns.end("goes")
    turns.begin("goes")
    assert turns.served("goes") == 10
    turns.end("goes")
    turns.charge("stays", 10)
    turns.begin("another")
    turns.end("another")
    assert turns._served == {"stays": 10}


def test_no_key_saves_up_turns() -> None:
    turns = Turns()
    for key in "ab":
        turns.begin(key)
    turns.charge("a", 100)
    turns.charge("b", 60)
    turns.end("b")
    turns.begin("c")
    assert turns.served("c") == 100, "it was not there before"
    turns.charge("a", 50)
    turns.begin("b")
    assert turns.served("b") == 100, "it paused"
    turns.end("b")
    turns.charge("c", 7)
    turns.begin("b")
    assert turns.served("b") == 107, "of the others the least served"
    for key in "abc":
        turns.end(key)
    turns.begin("a")
    assert turns.served("a") == 0, "no one was there"
