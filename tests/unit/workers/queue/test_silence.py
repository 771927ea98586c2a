"""When another host is suspected: by acknowledgements that are owed, and by nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from membership.base.timing import LINK_BEAT_S, LINK_SUSPECT_MAX_S, LINK_SUSPECT_MIN_S
from workers.queue import silence as module
from workers.queue.silence import (
    LOOK_S,
    Acks,
    Connection,
    OtherHosts,
    Silence,
    excused,
    is_ours,
    look,
    suspect_after_s,
    suspected,
)

pytestmark = pytest.mark.unit

QUIET = Acks(owed=True, acked_s=1e6, rtt_s=0.001, jitter_s=0.001)
ACKED = Acks(owed=True, acked_s=0.0, rtt_s=0.001, jitter_s=0.001)
DONE = Acks(owed=False, acked_s=1e6, rtt_s=0.001, jitter_s=0.001)


def after(*looks: tuple[float, Acks]) -> Silence:
    """What a watcher knows after looks that are this far apart."""
    silence, now = look(Silence(), DONE, 100.0), 100.0
    for passed_s, acks in looks:
        now += passed_s
        silence = look(silence, acks, now)
    return silence


def looks_until_suspected(acks: Acks, passed_s: float = LOOK_S) -> float:
    count = 1
    while not suspected(after(*[(passed_s, acks)] * count), acks):
        count += 1
        assert count < 1000
    return count * passed_s


def test_a_host_that_acknowledges_nothing_is_suspected_in_time() -> None:
    """A beat may be due just after the cut, and the look before it just before it."""
    assert looks_until_suspected(QUIET) + LINK_BEAT_S <= 0.3


@pytest.mark.parametrize("sign", [ACKED, DONE])
def test_any_acknowledgement_begins_it_anew(sign: Acks) -> None:
    silence = after(*[(LOOK_S, QUIET)] * 8, (LOOK_S, sign))
    assert not silence.waiting
    assert not suspected(after(*[(LOOK_S, QUIET)] * 8, (LOOK_S, sign), *[(LOOK_S, QUIET)] * 8), QUIET)


def test_who_owes_nothing_is_never_suspected() -> None:
    assert not suspected(after(*[(10.0, DONE)] * 100), DONE)


def test_the_time_of_a_watcher_that_did_not_run_does_not_count() -> None:
    """It was stopped for an hour. What it sends then is not acknowledged yet at its first look, nor at the second."""
    assert not suspected(after((3600.0, QUIET), (LOOK_S, QUIET)), QUIET)
    assert not suspected(after((LOOK_S, QUIET), (3600.0, QUIET)), QUIET)


def test_a_slow_link_is_given_more_time_but_no_more_than_is_said() -> None:
    assert suspect_after_s(0.0001, 0.0001) == LINK_SUSPECT_MIN_S
    assert LINK_SUSPECT_MIN_S < suspect_after_s(0.1, 0.005) < LINK_SUSPECT_MAX_S
    assert suspect_after_s(0.2, 0.005) == LINK_SUSPECT_MAX_S
    assert suspect_after_s(0.6, 0.1) == pytest.approx(1.0), "never less than an acknowledgement takes"


@given(st.floats(0, 10), st.floats(0, 10))
def test_no_host_is_suspected_before_its_acknowledgement_can_be_there(rtt_s: float, jitter_s: float) -> None:
    assert suspect_after_s(rtt_s, jitter_s) >= max(LINK_SUSPECT_MIN_S, rtt_s + 4 * jitter_s)


@example([(0.0, QUIET), (LOOK_S, QUIET), (0.0, ACKED)])  # two looks at one moment
@given(st.lists(st.tuples(st.floats(0.0, 0.2), st.sampled_from([QUIET, ACKED, DONE])), max_size=60))
def test_it_lasts_no_longer_than_the_looks_that_saw_it(looks: list[tuple[float, Acks]]) -> None:
    silence, quiet_s = after(*looks), 0.0
    for passed_s, acks in reversed(looks):
        if acks is not QUIET:
            break
        quiet_s += passed_s
    assert silence.lasted_s <= quiet_s + 1e-9


@pytest.mark.parametrize(
    ("silences", "ours"),
    [
        ([("b", 0.2), ("c", 0.1)], True),
        ([("b", 0.2), ("c", 0.2), ("c", 0.01)], True),  # the last one was looked at less often
        ([("b", 0.2), ("c", 0.0)], False),
        ([("b", 0.2), ("b", 0.0), ("c", 0.2)], False),  # one of its ranks is heard
        ([("b", 0.2), ("b", 0.2)], False),  # one other host: nothing tells which of the two it is
        ([("b", 9.0), ("c", 0.05)], False),
        ([], False),
    ],
)
def test_our_own_host_is_cut_off_where_no_other_of_several_answers(
    silences: list[tuple[str, float]], ours: bool
) -> None:
    assert is_ours((host, Silence(1.0, s > 0, s)) for host, s in silences) is ours


def test_after_our_own_host_was_cut_off_the_others_have_the_time_until_their_kernels_send_again() -> None:
    """At intervals that double: at the latest as long after the cut as it took."""
    silence = excused(after(*[(LOOK_S, QUIET)] * 41))
    assert silence.lasted_s == pytest.approx(1.0)
    for _ in range(40):
        silence = look(silence, QUIET, silence.looked_at + LOOK_S)
        assert not suspected(silence, QUIET)
    again = look(silence, ACKED, silence.looked_at + LOOK_S)
    assert again.patience_s == 0.0, "it is heard: from now on as ever"
    for _ in range(40):
        silence = look(silence, QUIET, silence.looked_at + LOOK_S)
    assert suspected(silence, QUIET), "it is still silent"


HEARD = replace(ACKED, backing_off=True)
HELD_BACK = replace(QUIET, backing_off=True)


def test_that_time_is_theirs_also_if_they_are_heard_before_it() -> None:
    """By something that they send of themselves. Our kernel keeps back what it owes until it is time, and so they
    acknowledge nothing: host c seemed silent for 0.6 s after such a cut, and was given up where b had just gone.
    """
    silence = excused(after(*[(LOOK_S, HELD_BACK)] * 41))
    silence = look(silence, HEARD, silence.looked_at + LOOK_S)
    assert (silence.lasted_s, silence.waiting) == (0.0, False)
    for _ in range(40):
        silence = look(silence, HELD_BACK, silence.looked_at + LOOK_S)
        assert not suspected(silence, HELD_BACK)
    silence = look(silence, ACKED, silence.looked_at + LOOK_S)
    assert silence.patience_s == 0.0, "what was owed is acknowledged: from now on as ever"


def test_who_is_heard_without_such_a_cut_has_no_more_time_than_ever() -> None:
    silence = after(*[(LOOK_S, HELD_BACK)] * 4, (LOOK_S, HEARD), *[(LOOK_S, HELD_BACK)] * 20)
    assert suspected(silence, HELD_BACK)


def test_a_descriptor_that_is_no_connection_any_more_is_not_suspected() -> None:
    connection = Connection()
    assert connection.silent_s(100.0) == 0.0, "not connected yet"
    connection.made(0)  # no socket
    assert connection.silent_s(101.0) == 0.0
    assert connection.acks is None


def test_a_connection_may_end_while_it_is_asked_whether_the_cut_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Acks | None] = [QUIET]
    monkeypatch.setattr(module, "_acks", lambda fd, cookie: found[-1])
    b = Connection()
    b.made(1)
    asked = []

    def ended(now: float) -> bool:
        """Another thread looks, and finds the descriptor closed."""
        found.append(None)
        asked.append(b.look(now + LOOK_S))
        return False

    for count in range(3):
        b.silent_s(100.0 + LOOK_S * count, ended)
    assert asked
    assert set(asked) == {None}


@pytest.mark.parametrize("ours", [True, False])
def test_a_cut_of_our_own_host_is_known_by_one_thread_while_the_others_are_late(
    ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Host c's own thread looks once, before the cut, and has no processor from then on."""
    by_fd = {-1: DONE, 1: DONE, 2: DONE}
    monkeypatch.setattr(module, "_acks", lambda fd, cookie: by_fd[fd])
    others, b, c = OtherHosts(), Connection(), Connection()
    for fd, (connection, host) in enumerate([(b, "b"), (c, "c")], start=1):
        connection.made(fd)
        others.add(connection, host)
        assert connection.silent_s(100.0, others.cut_off) == 0.0
    by_fd = {1: QUIET, 2: QUIET if ours else ACKED}
    silent = [b.silent_s(100.0 + LOOK_S * count, others.cut_off) for count in range(1, 40)]
    assert any(silent) is not ours
