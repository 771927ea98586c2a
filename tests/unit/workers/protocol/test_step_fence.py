"""The step fence: older engines, epochs, steps and incarnations have no effect."""

from __future__ import annotations

import pytest

from membership.base.errors import Fenced
from membership.base.rank_id import RankId
from workers.protocol.messages import Farewell, StepResult, StepStatus
from workers.protocol.step_fence import answers, answers_step, follow, is_evicted, must_commit, obeys

pytestmark = pytest.mark.unit

ME, TOKEN, EPOCH, STEP = RankId(2, 12), 20, 3, 7


def result(rank: RankId = ME, token: int = TOKEN, epoch: int = EPOCH, step: int = STEP, attempt: int = 0) -> StepResult:
    return StepResult(*rank, token, epoch, step, attempt, StepStatus.OK)


def test_a_rank_follows_newer_engines_only() -> None:
    assert [follow(20, 20), follow(20, 21)] == [20, 21]
    with pytest.raises(Fenced, match="engine token 19 is older than 20"):
        follow(20, 19)


@pytest.mark.parametrize("token", [19, 21])
def test_only_the_engine_that_is_followed_is_obeyed(token: int) -> None:
    assert obeys(20, 20)
    assert not obeys(20, token)


def test_epochs_are_never_taken_back() -> None:
    assert not must_commit(3, 3)
    assert must_commit(3, 4)
    with pytest.raises(Fenced, match="epoch 3 is committed"):
        must_commit(3, 2)


def test_any_attempt_of_the_step_in_flight_counts() -> None:
    assert all(answers_step(result(attempt=attempt), ME, TOKEN, EPOCH, STEP) for attempt in range(3))


@pytest.mark.parametrize(
    "other",
    [
        result(rank=RankId(2, 11)),
        result(rank=RankId(1, 12)),
        result(token=19),
        result(token=21),
        result(epoch=2),
        result(epoch=4),
        result(step=6),
        result(step=-1),
    ],
)
def test_no_other_answer_counts(other: StepResult) -> None:
    assert not answers_step(other, ME, TOKEN, EPOCH, STEP)


def test_messages_count_from_one_incarnation_to_one_engine() -> None:
    assert answers(Farewell(*ME, TOKEN, successor=21), ME, TOKEN)
    assert not answers(Farewell(2, 11, TOKEN, successor=21), ME, TOKEN)
    assert not answers(Farewell(*ME, 19, successor=20), ME, TOKEN)


def test_an_eviction_holds_for_the_incarnation_and_all_before_it() -> None:
    assert [is_evicted(incarnation, evicted=5) for incarnation in (4, 5, 6)] == [True, True, False]
