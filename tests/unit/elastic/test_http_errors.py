"""Every error class goes to HTTP and back: the client learns what happened, and never that too much is certain."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from elastic.http_errors import BAD_REQUEST, TABLE, as_http, from_http
from membership.base import errors
from membership.base.errors import ConfigError, ElasticError, NoAnswer, RequestError, StoreReplaced, StoreUnavailable

pytestmark = pytest.mark.unit


def classes(root: type[ElasticError] = ElasticError) -> Iterator[type[ElasticError]]:
    yield root
    for each in root.__subclasses__():
        yield from classes(each)


def made(kind: type[ElasticError]) -> ElasticError:
    """An error of this class, whatever its constructor takes."""
    if issubclass(kind, RequestError):
        return kind("broken", status=400)
    error = kind.__new__(kind)
    ElasticError.__init__(error, "broken", hint="mend it")
    return error


CLASSES = sorted(set(classes()), key=lambda each: each.__name__)


def test_the_error_tree_is_what_is_tested() -> None:
    assert {each.__name__ for each in CLASSES} >= {name for name in vars(errors) if name.endswith(("Error", "Refused"))}


@pytest.mark.parametrize("kind", CLASSES)
def test_there_and_back(kind: type[ElasticError]) -> None:
    sent = as_http(made(kind))
    received = from_http(sent.status, sent.code, str(sent))
    assert "broken" in str(received)
    assert issubclass(kind, RequestError) or "mend it" in str(received)
    assert not received.definite or kind.definite, "an unknown outcome must not become a certain one"
    again = as_http(received)
    if sent.status not in BAD_REQUEST:
        assert (again.status, again.code, str(again)) == (sent.status, sent.code, str(sent))
        row = next(row for row in TABLE if isinstance(received, row.errors))
        assert issubclass(kind, row.errors)


@pytest.mark.parametrize("status", sorted(BAD_REQUEST))
def test_a_bad_request_is_the_callers_to_mend(status: int) -> None:
    assert type(from_http(status, "invalid_value", "no")) is ConfigError


def test_a_code_distinguishes_two_errors_of_one_status() -> None:
    assert type(from_http(503, "store_replaced", "gone")) is StoreReplaced
    assert type(from_http(503, "shutting_down", "later")) is NoAnswer
    assert type(from_http(418, "", "no teapot")) is ElasticError


def test_an_unknown_outcome_says_so_and_when_to_ask_again() -> None:
    sent = as_http(StoreUnavailable("no store"))
    assert (sent.status, sent.code, sent.retry_after_s) == (503, "outcome_unknown", 1.0)
    assert "whether it took effect is unknown" in str(sent)
