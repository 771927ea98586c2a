"""The request journal: whatever engines send, a request's output has no gap, no duplicate and one end."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.gateway.journal import Delta, Journal, Request, RequestState
from elastic.protocol import Abort, Rejected, Tokens
from membership.base.errors import JournalError
from workers.protocol.messages import Sampling, TokenLogprobs

pytestmark = pytest.mark.unit

ENGINE = 7


def request(max_tokens: int = 8, request_id: str = "r") -> Request:
    return Request(id=request_id, prompt=[1, 2, 3], sampling=Sampling(), max_tokens=max_tokens)


def journal_with(*requests: Request) -> Journal:
    journal = Journal()
    for each in requests:
        journal.admit(each, now=1.0)
    journal.resubmissions(ENGINE, now=2.0)
    return journal


def tokens(index: int, values: list[int], reason: str = "", token: int = ENGINE, request_id: str = "r") -> Tokens:
    return Tokens(engine_token=token, request_id=request_id, index=index, tokens=values, finish_reason=reason)


def test_tokens_are_accepted_in_order_and_duplicates_are_dropped() -> None:
    each = request()
    journal = journal_with(each)
    assert journal.accept(tokens(0, [10, 11]), 3.0) == Delta((10, 11))
    assert journal.accept(tokens(0, [10, 11]), 3.0) is None
    assert journal.accept(tokens(1, [11, 12]), 4.0) == Delta((12,))
    assert each.emitted == [10, 11, 12]
    assert each.progress_at == 4.0


def test_only_an_engine_may_have_taken_a_request() -> None:
    """It stays so when that engine is gone: its successor is told that the answer may have begun."""
    journal = Journal()
    assert not journal.admit(request(), now=1.0).taken
    assert [each.taken for each in journal.resubmissions(ENGINE, now=2.0)] == [False]
    journal.detach()
    assert [each.taken for each in journal.resubmissions(ENGINE + 1, now=3.0)] == [True]
    assert not journal.admit(request(request_id="s"), now=4.0).taken
    assert [each.taken for each in journal.resubmissions(ENGINE + 2, now=5.0)] == [True, True]


def test_what_was_cached_is_counted_with_the_first_token_only() -> None:
    journal = journal_with(request())
    message = Tokens(ENGINE, "r", 0, [10, 11], cached=2)
    assert journal.accept(message, 3.0) == Delta((10, 11), cached=2)
    assert journal.accept(Tokens(ENGINE, "r", 0, [10, 11, 12], cached=3), 3.0) == Delta((12,))


def test_a_prompts_log_probabilities_are_asked_for_until_they_are_here() -> None:
    each = request()
    each.prompt_logprobs = 1
    journal = journal_with(each)
    assert each.submission().prompt_logprobs == 1
    scores = [TokenLogprobs(-1.0), TokenLogprobs(-2.0)]
    for wrong in (None, scores[:1]):
        with pytest.raises(JournalError, match="without the log probabilities of the prompt"):
            journal.accept(msgspec.structs.replace(tokens(0, [10]), prompt_logprobs=wrong), 3.0)
    assert journal.accept(msgspec.structs.replace(tokens(0, [10]), prompt_logprobs=scores), 3.0) == Delta(
        (10,), prompt_logprobs=tuple(scores)
    )
    (again,) = journal.resubmissions(ENGINE + 1, 4.0)
    assert (again.prompt_logprobs, again.emitted) == (-1, [10])


def test_logprobs_follow_their_tokens() -> None:
    journal = journal_with(request())
    journal.accept(tokens(0, [10]), 3.0)
    chances = [TokenLogprobs(-1.0), TokenLogprobs(-2.0)]
    message = Tokens(engine_token=ENGINE, request_id="r", index=0, tokens=[10, 11], logprobs=chances)
    assert journal.accept(message, 3.0) == Delta((11,), (TokenLogprobs(-2.0),))
    with pytest.raises(JournalError, match="1 logprobs for 2 tokens"):
        journal.accept(Tokens(ENGINE, "r", 2, [12, 13], [TokenLogprobs(-1.0)]), 3.0)


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (tokens(3, [13]), "gap after 2"),
        (tokens(-1, [13]), "gap after 2"),
        (tokens(3, [], "stop"), "gap after 2"),
        (tokens(0, [10, 99, 12]), "differ"),
        (tokens(2, [12, 13, 14]), "more than max_tokens=4"),
        (tokens(0, [10], "stop"), "ends after 1 tokens, but 2"),
    ],
)
def test_a_contradiction_is_an_error_and_changes_nothing(message: Tokens, complaint: str) -> None:
    each = request(max_tokens=4)
    journal = journal_with(each)
    journal.accept(tokens(0, [10, 11]), 3.0)
    with pytest.raises(JournalError, match=complaint):
        journal.accept(message, 4.0)
    assert (each.emitted, each.state, each.progress_at) == ([10, 11], RequestState.OPEN, 3.0)


def test_there_is_one_terminal_event() -> None:
    each = request()
    journal = journal_with(each)
    assert journal.accept(tokens(0, [10], "stop"), 3.0) == Delta((10,), None, "stop")
    assert each.state is RequestState.FINISHED
    assert journal.accept(tokens(0, [10], "stop"), 3.0) is None
    assert journal.accept(tokens(1, [], "stop"), 3.0) is None
    assert not journal.reject(Rejected(ENGINE, "r", 503, "late"))
    assert journal.close("r") is None
    assert not journal.fail("r")
    assert len(journal) == 0


def test_the_last_allowed_token_ends_the_request_even_if_the_engine_does_not_say_so() -> None:
    journal = journal_with(request(max_tokens=2))
    assert journal.accept(tokens(0, [10, 11]), 3.0) == Delta((10, 11), None, "length")


def test_only_the_current_engine_counts() -> None:
    journal = journal_with(request())
    assert journal.accept(tokens(0, [10], token=6), 3.0) is None
    assert not journal.reject(Rejected(6, "r", 503, "stale"))
    journal.detach()
    assert journal.accept(tokens(0, [10]), 3.0) is None
    assert journal.accept(tokens(0, [10], token=0), 3.0) is None, "0 is no engine, not one whose token is 0"


def test_resubmission_carries_what_was_emitted() -> None:
    first, second = request(), request(request_id="s")
    journal = journal_with(first, second)
    journal.accept(tokens(0, [10, 11]), 3.0)
    journal.accept(tokens(0, [5], "stop", request_id="s"), 3.0)
    submits = journal.resubmissions(8, now=9.0)
    assert [(s.request_id, s.prompt, s.emitted) for s in submits] == [("r", [1, 2, 3], [10, 11])]
    assert first.progress_at == 9.0
    assert journal.accept(tokens(2, [12]), 9.5) is None, "the old engine is no longer listened to"
    assert journal.accept(tokens(2, [12], token=8), 9.5) == Delta((12,))


def test_rejection_and_closing_end_a_request() -> None:
    first, second = request(), request(request_id="s")
    journal = journal_with(first, second)
    assert journal.reject(Rejected(ENGINE, "r", 503, "no room"))
    assert journal.close("s") == Abort("s")
    assert (first.state, second.state) == (RequestState.REJECTED, RequestState.CLOSED)


def test_an_id_is_admitted_once() -> None:
    journal = journal_with(request())
    with pytest.raises(JournalError, match="open already"):
        journal.admit(request(), 2.0)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=30), st.integers(0, 2**32))
def test_any_mix_of_duplicates_losses_and_engine_changes_gives_the_reference_output(
    reference: list[int], seed: int
) -> None:
    """An unreliable engine that is replaced at random: the client sees exactly the reference, then one end."""
    chance = Random(seed)
    each = request(max_tokens=len(reference) + 1)
    journal = journal_with(each)
    token, seen, ends = ENGINE, [], []
    while not ends:
        action = chance.choice(["send", "send", "send", "gap", "replace", "zombie"])
        if action == "replace":
            token += 1
            (submit,) = journal.resubmissions(token, 0.0)
            assert submit.emitted == seen
            continue
        low, high = (len(seen) + 1, len(reference)) if action == "gap" else (0, len(seen))
        if low > high:
            continue
        start = chance.randint(low, high)
        end = chance.randint(start, len(reference))
        reason = "stop" if end == len(reference) else ""
        message = tokens(start, reference[start:end], reason, token - (action == "zombie"))
        if action == "gap":
            with pytest.raises(JournalError):
                journal.accept(message, 0.0)
            continue
        delta = journal.accept(message, 0.0)
        if action == "zombie":
            assert delta is None
        elif delta is not None:
            seen += delta.tokens
            ends += [delta.finish_reason] if delta.finish_reason else []
    assert (seen, ends) == (reference, ["stop"])
    assert len(journal) == 0
