"""Many injectors on one site: what one arms leaves the others' alone, and what has happened stays past."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chaos.campaigns.shared_site import SharedSite
from chaos.faults.base import NotInjected
from membership.base.errors import StoreUnavailable
from membership.base.events import Event

pytestmark = pytest.mark.unit


class FakeSite:
    """Answers as set, and keeps what was armed."""

    def __init__(self) -> None:
        self.armed: list[str] = []
        self.answers: list[int | Exception] = []

    def pid(self, victim: str) -> int:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def arm(self, failpoints: str) -> None:
        self.armed.append(failpoints)

    def events(self) -> list[Event]:
        return []

    def state_dir(self) -> Path:
        return Path()

    def url(self) -> str:
        return ""


def test_shares_of_the_failpoints() -> None:
    site = FakeSite()
    shared = SharedSite(site)
    held, raising = shared.share(), shared.share()
    held.arm("controller.after.loading=hang")
    raising.arm("rank.step@1=1*raise")
    held.arm("")
    raising.arm("")
    assert site.armed == [
        "controller.after.loading=hang",
        "controller.after.loading=hang;rank.step@1=1*raise",
        "rank.step@1=1*raise",
        "",
    ]


def test_what_has_happened_once_does_not_happen_again_because_others_arm() -> None:
    site = FakeSite()
    shared = SharedSite(site)
    raising, hanging = shared.share(), shared.share()
    raising.arm("rank.step@1=1*raise")
    raising.settle()
    hanging.arm("rank.step@2=1*hang")
    hanging.settle()
    again = shared.share()
    again.arm("rank.step@1=1*raise")
    assert site.armed == ["rank.step@1=1*raise", "rank.step@2=1*hang", "rank.step@2=1*hang;rank.step@1=1*raise"]
    again.settle()
    same = shared.share()
    same.arm("rank.step@1=1*raise")
    assert site.armed[-1] == "rank.step@2=1*hang;rank.step@1=1*raise"
    assert len(site.armed) == 4, "armed anew, though the words are the same"


def test_a_process_that_is_just_being_started_is_waited_for() -> None:
    site = FakeSite()
    site.answers = [NotInjected("no process"), NotInjected("no process"), os.getpid()]
    slept: list[float] = []
    assert SharedSite(site, slept.append).share().pid("rank 1") == os.getpid()
    assert len(slept) == 2


def test_while_the_store_is_away_the_last_known_process_holds() -> None:
    site = FakeSite()
    site.answers = [os.getpid()]
    shared = SharedSite(site)
    shared.remember("rank 1")
    site.answers = [StoreUnavailable("no answer")]
    shared.remember("rank 1")
    assert shared.share().pid("rank 1") == os.getpid()
    with pytest.raises(StoreUnavailable):
        shared.share().pid("rank 2")
