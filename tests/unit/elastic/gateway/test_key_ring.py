"""API keys: whose a request is, what each name may take, and a file that changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic.gateway.key_ring import Account, KeyRing
from elastic.serve.api_keys import KeyLimits
from membership.base.errors import ConfigError, RequestError

pytestmark = pytest.mark.unit


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def refused(ring: KeyRing, header: str) -> RequestError:
    with pytest.raises(RequestError) as raised:
        ring.account(header)
    return raised.value


def test_without_keys_each_client_may_ask() -> None:
    assert KeyRing().account("") is None
    assert KeyRing().account("Bearer whatever") is None


def test_a_key_names_its_account() -> None:
    ring = KeyRing(["one", "two"])
    found = [ring.account(header) for header in ("Bearer two", "bearer one", "Bearer  one ")]
    assert [account.name for account in found if account] == ["key-2", "key-1", "key-1"]


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Bearer on", "Bearer onee", "one", "Basic one", "Bearer \u00e9"]
)
def test_what_is_no_key_is_refused_and_not_repeated(header: str) -> None:
    ring = KeyRing(["one"])
    error = refused(ring, header)
    assert (error.status, error.code, ring.unauthorized) == (401, "invalid_api_key", 1)
    assert "one" not in str(error)


def test_a_changed_file_counts_from_the_next_request_on(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# people\n\nann:secret-a\nbob:secret-b requests_in_flight=1\n")
    ring = KeyRing(["plain"], path)
    ann, bob = ring.account("Bearer secret-a"), ring.account("Bearer secret-b")
    assert ann is not None
    assert bob is not None
    bob.enter(0.0)
    path.write_text("bob:secret-b requests_in_flight=2\nbob:newer-b\n")
    assert refused(ring, "Bearer secret-a").status == 401
    assert ring.account("Bearer secret-b") is ring.account("Bearer newer-b") is bob
    assert ring.account("Bearer plain") is not None
    bob.enter(0.0)
    with pytest.raises(RequestError, match="bob has reached its limit of 2 requests in flight"):
        bob.enter(0.0)


@pytest.mark.parametrize("damage", ["", "# nothing\n", "no colon", "ann:secret-a\nann:secret-b x=1\n"])
def test_a_file_that_cannot_be_used_changes_nothing(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "keys"
    path.write_text("ann:secret-a\n")
    ring = KeyRing([], path)
    path.write_text(damage)
    assert ring.account("Bearer secret-a") is not None
    path.unlink()
    assert ring.account("Bearer secret-a") is not None
    path.write_text("ann:secret-c\n")
    assert ring.account("Bearer secret-c") is not None
    assert refused(ring, "Bearer secret-a").status == 401


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no keys"),
        ("ann secret-a", "line 1: it is not a key"),
        ("# x\nann:secret-a extra", "line 2: it is not a key"),
        ("ann:", "line 1"),
        ("a b:secret-a", "line 1"),
        ("ann:secret-a requests=1", "no limit 'requests'"),
        ("ann:secret-a\nbob:secret-a", "two names: ann and bob"),
        ("ann:secret-a tokens_per_minute=1\nann:secret-b tokens_per_minute=2", "state different limits"),
    ],
)
def test_a_file_is_refused_at_the_start_without_showing_a_key(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as raised:
        KeyRing([], path)
    assert "secret-" not in f"{raised.value} {raised.value.hint}"


@pytest.mark.parametrize("key", ["", "with space", "line\nbreak", "\u00e9"])
def test_a_key_that_no_header_can_carry_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ConfigError) as raised:
        KeyRing(["good", key])
    assert "API key 2" in str(raised.value)
    assert not key or key not in str(raised.value)


def limited(**limits: int) -> Account:
    account = Account("ann", 0.0)
    account.limit(KeyLimits(**limits), 0.0)
    return account


def wait_s(account: Account, now: float) -> float:
    """How long a request would have to wait; 0: it was let in."""
    try:
        account.enter(now)
    except RequestError as error:
        return error.retry_after_s
    return 0.0


def test_requests_a_minute_come_back_steadily() -> None:
    account = limited(requests_per_minute=2)
    waited_s = [wait_s(account, now) for now in (0.0, 0.0, 0.0, 29.0, 30.5, 31.0)]
    assert waited_s == pytest.approx([0, 0, 30.0, 1.0, 0, 29.0])
    assert [wait_s(account, now) for now in (1000.0, 1000.0, 1000.0)] == [0, 0, 30.0]


def test_tokens_a_minute_are_paid_back_before_the_next_request() -> None:
    account = limited(tokens_per_minute=60)
    assert wait_s(account, 0.0) == 0
    account.prompt(50)
    account.generated(40)
    assert wait_s(account, 0.0) == pytest.approx(31.0)
    assert wait_s(account, 31.5) == 0


def test_what_was_used_without_a_limit_is_not_held_against_it() -> None:
    account = limited()
    account.prompt(1_000_000)
    account.limit(KeyLimits(tokens_per_minute=10), 5.0)
    assert wait_s(account, 5.0) == 0


def test_a_limit_that_stays_is_not_refilled_by_reading_the_file_again() -> None:
    account = limited(requests_per_minute=1)
    assert wait_s(account, 0.0) == 0
    account.limit(KeyLimits(requests_per_minute=1), 0.0)
    assert wait_s(account, 0.0) == 60.0


def test_a_place_in_flight_is_given_back() -> None:
    account = limited(requests_in_flight=1)
    assert [wait_s(account, 0.0), wait_s(account, 0.0)] == [0, 1.0]
    account.leave()
    assert wait_s(account, 0.0) == 0
