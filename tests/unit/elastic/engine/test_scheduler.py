"""The scheduler, situation by situation, against a model of ranks that checks every KV cell."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from chaos.simulation.kv_model import KvModel, oracle, reply
from elastic.engine.scheduler import MAX_FAILED_RANKS, MAX_FAILURES, Scheduler, uncovered
from elastic.protocol import Rejected, Submit, Tokens
from membership.base.errors import ElasticError
from membership.store.records import View
from tests.support.rank_model import TOKEN, Client, ask, config, drive, pool_is_whole, view
from workers.protocol.messages import NO_TOKEN, Sampling, Shaping, StepBatch, StepStatus, TokenLogprobs

pytestmark = pytest.mark.unit


@pytest.fixture
def served() -> tuple[Scheduler, KvModel, Client]:
    scheduler = Scheduler(config(), TOKEN)
    scheduler.set_view(view(1, {0: 10, 1: 11}), [], 0.0)
    return scheduler, KvModel(4), Client()


def test_requests_finish_exactly_as_the_oracle_says(served: tuple[Scheduler, KvModel, Client]) -> None:
    scheduler, ranks, client = served
    for n in range(12):
        client.submit(scheduler, ask(f"r{n}", list(range(4, 5 + 2 * n)), 6 + n), 0.0)
    drive(scheduler, ranks, client, {0: 10, 1: 11})
    client.check()
    pool_is_whole(scheduler)
    assert (scheduler.running, scheduler.waiting) == (0, 0)


def test_a_long_prompt_runs_in_chunks_beside_the_decodes_of_others(served: tuple[Scheduler, KvModel, Client]) -> None:
    scheduler, ranks, client = served
    scheduler.set_view(view(2, {0: 10}), [], 0.0)
    client.submit(scheduler, ask("short", [4], 20, ignore_eos=True), 0.0)
    drive_once(scheduler, ranks, client)
    client.submit(scheduler, ask("long", list(range(20)), 2, ignore_eos=True), 0.0)
    batch = scheduler.schedule(0.0)
    assert batch is not None
    assert [len(chunk.tokens) for chunk in batch.ranks[0]] == [1, 8]
    assert [chunk.sample is None for chunk in batch.ranks[0]] == [False, True]


def drive_once(scheduler: Scheduler, ranks: KvModel, client: Client) -> StepBatch:
    batch = scheduler.schedule(0.0)
    assert batch is not None
    for result in ranks.run(batch, {0: 10, 1: 11}):
        client.take(scheduler.apply(result, 0.0))
    return batch


def test_requests_go_to_the_least_loaded_rank(served: tuple[Scheduler, KvModel, Client]) -> None:
    scheduler, ranks, client = served
    for n in range(4):
        client.submit(scheduler, ask(f"r{n}", [5 + n]), 0.0)
    batch = drive_once(scheduler, ranks, client)
    assert {rank: len(chunks) for rank, chunks in batch.ranks.items()} == {0: 2, 1: 2}


def test_a_lost_rank_s_requests_are_computed_again_elsewhere(served: tuple[Scheduler, KvModel, Client]) -> None:
    scheduler, ranks, client = served
    for n in range(4):
        client.submit(scheduler, ask(f"r{n}", [5 + n], 12, ignore_eos=True), 0.0)
    for _ in range(3):
        drive_once(scheduler, ranks, client)
    batch = scheduler.schedule(0.0)
    assert batch is not None
    late = ranks.answer(batch, 0, 10)
    client.take(scheduler.apply(ranks.answer(batch, 1, 11), 0.0))
    assert scheduler.unanswered == {0}
    assert len(scheduler.lose_ranks([0], 0.0)) == 2
    assert scheduler.apply(late, 0.0) == []
    after = scheduler.schedule(0.0)
    assert after is not None
    assert after.masked == [0]
    assert set(after.ranks) == {1}
    client.take(scheduler.apply(ranks.answer(after, 1, 11), 0.0))
    drive(scheduler, ranks, client, {1: 11})
    client.check()


def test_a_shaped_sample_comes_with_all_tokens_before_it(served: tuple[Scheduler, KvModel, Client]) -> None:
    """Also where the request is computed again elsewhere, and by an engine that got it with what was emitted."""
    scheduler, ranks, client = served
    shaped = Sampling(shaping=Shaping(repetition_penalty=1.2))
    asked = msgspec.structs.replace(ask("r", [4, 5, 6], 12, ignore_eos=True), sampling=shaped)
    client.submit(scheduler, asked, 0.0)

    def histories() -> list[int]:
        """What the step's sample gets; then its token is there."""
        (chunk,) = (chunk for chunks in drive_once(scheduler, ranks, client).ranks.values() for chunk in chunks)
        assert chunk.history is not None
        assert chunk.history.prompt == 3
        return np.frombuffer(chunk.history.tokens, np.uint32).tolist()

    for emitted in range(3):
        assert histories() == [4, 5, 6, *client.outputs["r"][:emitted]]
    scheduler.lose_ranks([0], 0.0)
    assert histories() == [4, 5, 6, *client.outputs["r"][:3]]
    client.submit(scheduler, msgspec.structs.replace(asked, emitted=client.outputs["r"][:4]), 0.0)
    assert histories() == [4, 5, 6, *client.outputs["r"][:4]]


def test_a_prompts_scores_come_once_and_whole(served: tuple[Scheduler, KvModel, Client]) -> None:
    """Over several chunks, a lost rank in the middle, and a prefix that the cache has: it is computed again."""
    scheduler, ranks, client = served
    prompt = list(range(20))

    def run(name: str) -> list[Tokens]:
        asked = msgspec.structs.replace(ask(name, prompt, 3, ignore_eos=True), prompt_logprobs=1)
        client.submit(scheduler, asked, 0.0)
        heard: list[Tokens] = []
        while (batch := scheduler.schedule(0.0)) is not None:
            for result in ranks.run(batch, {0: 10, 1: 11}):
                heard += [each for each in scheduler.apply(result, 0.0) if isinstance(each, Tokens)]
            if name == "first" and 0 in batch.ranks and not heard and batch.ranks[0][0].start:
                scheduler.lose_ranks([0], 0.0)
        client.take(list(heard))
        return heard

    for name in ("first", "again"):
        first, *others = run(name)
        assert [(each.logprob, each.top) for each in first.prompt_logprobs or []] == [
            (-float(at), [(prompt[at + 1], 0.0)]) for at in range(19)
        ]
        assert (first.index, first.cached) == (0, 0)
        assert [each.prompt_logprobs for each in others] == [None, None]
    assert scheduler.masked == {0}
    client.submit(scheduler, ask("plain", prompt, 3, ignore_eos=True), 0.0)
    drive(scheduler, ranks, client, {0: 10, 1: 11})
    client.check()


def test_an_answer_without_scores_is_a_failure(served: tuple[Scheduler, KvModel, Client]) -> None:
    scheduler, ranks, client = served
    client.submit(scheduler, msgspec.structs.replace(ask("r", [4, 5, 6]), prompt_logprobs=0), 0.0)
    batch = scheduler.schedule(0.0)
    assert batch is not None
    (result,) = ranks.run(batch, {0: 10, 1: 11})
    silent = [msgspec.structs.replace(each, scores=[]) for each in result.tokens]
    assert scheduler.apply(msgspec.structs.replace(result, tokens=silent), 0.0) == []
    drive(scheduler, ranks, client, {0: 10, 1: 11})
    client.check()


def test_who_lost_its_rank_goes_before_those_that_have_not_run(served: tuple[Scheduler, KvModel, Client]) -> None:
    scheduler, ranks, client = served
    for n in range(12):  # eight run, four wait
        client.submit(scheduler, ask(f"r{n}", [5 + n], 12, ignore_eos=True), 0.0)
    drive_once(scheduler, ranks, client)
    assert scheduler.waiting == 4
    scheduler.set_view(view(2, {1: 11}), [], 0.0)
    assert [sequence.request.request_id for sequence in scheduler._waiting][:4] == ["r0", "r2", "r4", "r6"]


def test_an_answer_has_no_effect_on_a_request_that_was_aborted_or_submitted_again_meanwhile(
    served: tuple[Scheduler, KvModel, Client],
) -> None:
    scheduler, ranks, client = served
    for name in ("aborted", "again", "kept"):
        client.submit(scheduler, ask(name, [4, 8], 6, ignore_eos=True), 0.0)
    batch = scheduler.schedule(0.0)
    assert batch is not None
    results = ranks.run(batch, {0: 10, 1: 11})
    scheduler.abort("aborted")
    del client.requests["aborted"]
    client.submit(scheduler, ask("again", [4, 8], 6, ignore_eos=True), 0.0)
    for result in results:
        client.take(scheduler.apply(result, 0.0))
    assert {name: len(tokens) for name, tokens in client.outputs.items()} == {"aborted": 0, "again": 0, "kept": 1}
    drive(scheduler, ranks, client, {0: 10, 1: 11})
    client.check()


def test_the_first_token_says_how_long_a_request_waited_for_a_rank(served: tuple[Scheduler, KvModel, Client]) -> None:
    scheduler, ranks, _ = served
    scheduler.set_view(view(2, {0: 10}), [], 0.0)
    scheduler.submit(ask("r", [5], 3, ignore_eos=True), 1.0)
    told = []
    for now in (3.5, 4.0, 5.0):
        batch = scheduler.schedule(now)
        assert batch is not None
        told += [each for result in ranks.run(batch, {0: 10}) for each in scheduler.apply(result, now)]
    assert [each.queued_s for each in told if isinstance(each, Tokens)] == [2.5, 0.0, 0.0]


def test_logprobs_come_with_the_token_that_has_them(served: tuple[Scheduler, KvModel, Client]) -> None:
    scheduler, ranks, _ = served
    scheduler.submit(ask("r", [5], 3, ignore_eos=True), 0.0)
    told: list[Tokens] = []
    for logprobs in (None, TokenLogprobs(-1.5, [(7, -1.5)]), None):
        batch = scheduler.schedule(0.0)
        assert batch is not None
        (result,) = ranks.run(batch, {0: 10, 1: 11})
        result.tokens[0] = msgspec.structs.replace(result.tokens[0], logprobs=logprobs)
        told += [each for each in scheduler.apply(result, 0.0) if isinstance(each, Tokens)]
    assert [each.logprobs for each in told] == [None, [TokenLogprobs(-1.5, [(7, -1.5)])], None]


def test_the_use_of_the_kv_cache_is_that_of_all_ranks_together(served: tuple[Scheduler, KvModel, Client]) -> None:
    scheduler, ranks, client = served
    assert scheduler.kv_usage == 0
    client.submit(scheduler, ask("r", [5] * 8, 30, ignore_eos=True), 0.0)
    drive_once(scheduler, ranks, client)
    pools = [home.pool for home in scheduler._homes.values()]
    assert pools[0].used > 0 == pools[1].used
    assert scheduler.kv_usage == pytest.approx(pools[0].used / (2 * pools[0].size), abs=1e-4)


def test_running_out_of_blocks_preempts_the_youngest(served: tuple[Scheduler, KvModel, Client]) -> None:
    scheduler, ranks, client = served
    scheduler.set_view(view(2, {0: 10}), [], 0.0)
    for n in range(3):
        client.submit(scheduler, ask(f"r{n}", [5 + n] * 8, 30, ignore_eos=True), 0.0)
    order = []
    while (batch := scheduler.schedule(0.0)) is not None:
        client.take([o for r in ranks.run(batch, {0: 10}) for o in scheduler.apply(r, 0.0)])
        order += [name for name in client.ends if name not in order]
        pool_is_whole(scheduler)
    assert order == ["r0", "r1", "r2"]
    assert scheduler.preemptions > 0
    client.check()


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (ask("a", []), "empty"),
        (ask("a", [1], 0), "at least 1"),
        (ask("a", [1] * 40, 9), "context length of 48"),
        (ask("a", [1, 50]), "between 0 and 49"),
        (ask("a", [1, -1]), "between 0 and 49"),
    ],
)
def test_what_can_never_run_is_refused(served: tuple[Scheduler, KvModel, Client], request_: Submit, words: str) -> None:
    (refused,) = served[0].submit(request_, 0.0)
    assert isinstance(refused, Rejected)
    assert refused.status == 400
    assert words in refused.message


def test_a_request_larger_than_the_pool_is_refused() -> None:
    scheduler = Scheduler(config(kv_blocks=3), TOKEN)
    assert scheduler.submit(ask("fits", [1] * 6, 6), 0.0) == []
    (refused,) = scheduler.submit(ask("a", [1] * 7, 6), 0.0)
    assert isinstance(refused, Rejected)
    assert "KV cache of one rank (12 tokens)" in refused.message


def test_resubmission_goes_on_after_what_was_emitted(served: tuple[Scheduler, KvModel, Client]) -> None:
    scheduler, ranks, client = served
    whole = ask("r", [4, 9], 10, ignore_eos=True)
    expected, _ = oracle(whole)
    client.outputs["r"] = expected[:6]
    client.submit(scheduler, ask("r", [4, 9], 10, ignore_eos=True, emitted=expected[:6]), 0.0)
    drive(scheduler, ranks, client, {0: 10, 1: 11})
    assert (client.outputs["r"], client.ends["r"]) == (expected, "length")
    (end,) = scheduler.submit(ask("r2", [4, 9], 3, emitted=expected[:3]), 0.0)
    assert end == Tokens(TOKEN, "r2", 3, [], finish_reason="length")


def test_answers_to_another_step_token_epoch_or_incarnation_have_no_effect(
    served: tuple[Scheduler, KvModel, Client],
) -> None:
    scheduler, ranks, client = served
    client.submit(scheduler, ask("r", [4]), 0.0)
    batch = scheduler.schedule(0.0)
    assert batch is not None
    good = ranks.answer(batch, 0, 10)
    for field in ("engine_token", "epoch", "step", "incarnation"):
        wrong = msgspec.structs.replace(good, **{field: getattr(good, field) + 1})
        assert scheduler.apply(wrong, 0.0) == []
    assert scheduler.unanswered == {0}
    assert len(scheduler.apply(good, 0.0)) == 1
    assert scheduler.apply(good, 0.0) == [], "the same answer counts once"


def test_a_step_is_not_scheduled_over_an_unanswered_one(served: tuple[Scheduler, KvModel, Client]) -> None:
    scheduler, _, client = served
    client.submit(scheduler, ask("r", [4]), 0.0)
    scheduler.schedule(0.0)
    with pytest.raises(ElasticError, match=r"ranks \[0\]"):
        scheduler.schedule(0.0)


@pytest.mark.parametrize("status", [StepStatus.COVERAGE_LOST, StepStatus.STALE, StepStatus.FAILED])
def test_an_unsuccessful_answer_runs_the_same_chunk_again(
    served: tuple[Scheduler, KvModel, Client], status: StepStatus
) -> None:
    scheduler, ranks, client = served
    client.submit(scheduler, ask("r", [4, 5]), 0.0)
    first = scheduler.schedule(0.0)
    assert first is not None
    assert scheduler.apply(reply(first, 0, 10, status=status), 0.0) == []
    assert scheduler.schedule(0.0) is None, "backs off"
    retry = scheduler.next_retry()
    assert retry is not None
    again = scheduler.schedule(retry)
    assert again is not None
    assert (again.ranks, again.step, again.attempt) == (first.ranks, first.step + 1, 1)
    client.take(scheduler.apply(ranks.answer(again, 0, 10), retry))
    drive(scheduler, ranks, client, {0: 10, 1: 11}, retry)
    client.check()


def test_a_request_that_always_fails_is_given_up_and_others_are_not(served: tuple[Scheduler, KvModel, Client]) -> None:
    scheduler, ranks, client = served
    scheduler.set_view(view(2, {0: 10}), [], 0.0)
    for name, prompt in (("good", [5]), ("poison", [13]), ("also good", [6])):
        client.submit(scheduler, ask(name, prompt, 8, ignore_eos=True), 0.0)
    now, attempts = 0.0, 0
    while (batch := scheduler.schedule(now)) is not None:
        if any(chunk.tokens[0] == 13 and chunk.start == 0 for chunk in batch.ranks[0]):
            attempts += 1
            client.take(scheduler.apply(reply(batch, 0, 10, status=StepStatus.FAILED, error="x\nBoom: no"), now))
        else:
            client.take(scheduler.apply(ranks.answer(batch, 0, 10), now))
        now += 1.0
    assert attempts == MAX_FAILURES + 1
    assert client.ends.pop("poison") == "500 the model failed on this request: Boom: no"
    del client.requests["poison"]
    client.check()


@pytest.mark.parametrize(("ill", "end"), [({0}, "length"), ({0, 1}, "500 the model failed on this request: x")])
def test_a_failing_request_is_tried_on_one_other_rank(
    served: tuple[Scheduler, KvModel, Client], ill: set[int], end: str
) -> None:
    scheduler, ranks, client = served
    client.submit(scheduler, ask("r", [4], 3, ignore_eos=True), 0.0)
    now = 0.0
    while (batch := scheduler.schedule(now)) is not None:
        for rank in batch.ranks:
            failed = reply(batch, rank, 10 + rank, status=StepStatus.FAILED, error="x")
            client.take(scheduler.apply(failed if rank in ill else ranks.answer(batch, rank, 10 + rank), now))
        now += 1.0
    assert client.ends["r"] == end


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize(("deadly", "end"), [(1, "length"), (99, "500 ranks failed on this request alone and ended")])
def test_a_request_over_which_rank_after_rank_ends_is_given_up(slots: int, deadly: int, end: str) -> None:
    """As when each lacks device memory for it: a step fails, so does the next with it alone, and the process ends."""
    members = {rank: 10 + rank for rank in range(slots)}
    scheduler, ranks, client, now, deaths, failed = Scheduler(config(), TOKEN), KvModel(4), Client(), 0.0, 0, False
    scheduler.set_view(view(1, members), [], now)
    client.submit(scheduler, ask("good", [5], 8, ignore_eos=True), now)
    client.submit(scheduler, ask("deadly", [13], 8, ignore_eos=True), now)
    for epoch in range(2, 60):
        client.take(scheduler.expire(now))
        batch = scheduler.schedule(now)
        for rank, chunks in batch.ranks.items() if batch is not None else ():
            assert batch is not None
            if deaths == deadly or all((chunk.start, chunk.tokens[0]) != (0, 13) for chunk in chunks):
                client.take(scheduler.apply(ranks.answer(batch, rank, members[rank]), now))
            elif not failed:
                failed = True
                client.take(scheduler.apply(reply(batch, rank, members[rank], status=StepStatus.FAILED), now))
            elif len(chunks) == 1:
                deaths, failed = deaths + 1, False
                scheduler.lose_ranks([rank], now)
                members |= {rank: 100 + epoch}
            else:
                pytest.fail("what failed did not run alone")
        scheduler.set_view(view(epoch, members), [], now)
        now += 1.0
    assert client.ends == {"good": "length", "deadly": end}
    assert deaths == min(deadly, MAX_FAILED_RANKS)


def test_failures_with_a_suspected_peer_are_not_the_request_s_fault(served: tuple[Scheduler, KvModel, Client]) -> None:
    scheduler, ranks, client = served
    client.submit(scheduler, ask("r", [4]), 0.0)
    now = 0.0
    for _ in range(10):
        batch = scheduler.schedule(now)
        assert batch is not None
        assert scheduler.apply(reply(batch, 0, 10, status=StepStatus.FAILED, suspects=[1]), now) == []
        now += 1.0
    drive(scheduler, ranks, client, {0: 10, 1: 11}, now)
    client.check()


def test_a_request_that_can_have_no_token_is_refused_at_once_and_alone(
    served: tuple[Scheduler, KvModel, Client],
) -> None:
    scheduler, ranks, client = served
    client.submit(scheduler, ask("r", [4]), 0.0)
    batch = scheduler.schedule(0.0)
    assert batch is not None
    answer = ranks.answer(batch, 0, 10)
    (token,) = answer.tokens
    stuck = msgspec.structs.replace(token, token=NO_TOKEN, error="no token may follow")
    (refused,) = scheduler.apply(msgspec.structs.replace(answer, tokens=[stuck]), 0.0)
    assert isinstance(refused, Rejected)
    assert (refused.status, refused.message) == (400, "no token may follow")
    assert scheduler.schedule(0.0) is None, "it is not tried again"


def test_an_ok_answer_without_the_token_is_a_failure(served: tuple[Scheduler, KvModel, Client]) -> None:
    scheduler, ranks, client = served
    client.submit(scheduler, ask("r", [4]), 0.0)
    batch = scheduler.schedule(0.0)
    assert batch is not None
    assert scheduler.apply(reply(batch, 0, 10), 0.0) == []
    drive(scheduler, ranks, client, {0: 10, 1: 11})
    client.check()


def test_lost_coverage_holds_all_steps_and_then_rejects(served: tuple[Scheduler, KvModel, Client]) -> None:
    scheduler, ranks, client = served
    client.submit(scheduler, ask("early", [4]), 0.0)
    drive_once(scheduler, ranks, client)
    scheduler.set_view(view(2, {0: 10, 1: 11}, covered=False), [], 100.0)
    assert scheduler.held
    assert scheduler.uncovered == 2
    client.submit(scheduler, ask("late", [4]), 120.0)
    assert scheduler.schedule(125.0) is None
    assert scheduler.expire(129.9) == []
    (early,) = scheduler.expire(130.0)
    assert isinstance(early, Rejected)
    assert (early.request_id, early.status) == ("early", 503)
    assert early.retry_after_s > 0
    scheduler.set_view(view(3, {0: 10}), [], 149.0)
    assert scheduler.expire(200.0) == []
    drive(scheduler, ranks, client, {0: 10})
    assert client.outputs["late"] == oracle(client.requests["late"])[0]


def test_a_rank_that_answers_coverage_lost_for_too_long_costs_its_requests_a_503(
    served: tuple[Scheduler, KvModel, Client],
) -> None:
    scheduler, _, client = served
    client.submit(scheduler, ask("r", [4]), 0.0)
    for now in (5.0, 20.0, 34.0):
        assert scheduler.expire(now) == []
        batch = scheduler.schedule(now)
        assert batch is not None
        scheduler.apply(reply(batch, 0, 10, status=StepStatus.COVERAGE_LOST), now)
    (rejected,) = scheduler.expire(35.0)
    assert isinstance(rejected, Rejected)
    assert rejected.status == 503


def test_uncovered_counts_pairs_without_a_usable_owner() -> None:
    both = View(epoch=1, members=view(1, {0: 1, 1: 2}).members, placement={0: ((0, 1), (0,)), 1: ((1,), (0, 1))})
    assert [uncovered(both, masked, config()) for masked in ([], [0], [1], [0, 1])] == [0, 1, 1, 4]
    assert Scheduler(config(), TOKEN).uncovered == 4, "before the first view"


def test_a_returning_incarnation_starts_with_an_empty_cache(served: tuple[Scheduler, KvModel, Client]) -> None:
    scheduler, ranks, client = served
    for n in range(2):
        client.submit(scheduler, ask(f"r{n}", [5 + n], 9, ignore_eos=True), 0.0)
    drive_once(scheduler, ranks, client)
    assert len(scheduler.set_view(view(2, {0: 10, 1: 99}), [], 0.0)) == 1
    drive(scheduler, ranks, client, {0: 10, 1: 99})
    client.check()
