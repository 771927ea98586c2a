"""Origins whose pages may use the API: as they are given, or as vLLM takes them."""

from __future__ import annotations

import pytest

from elastic.serve.options import ApiOptions
from elastic.serve.origins import origins_of

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("given", "origins"),
    [
        ((), ()),
        (("*",), ("*",)),
        (('["https://a", "https://b"]', "https://c"), ("https://a", "https://b", "https://c")),
        (("http://[::1]:3000",), ("http://[::1]:3000",)),
        ((' ["http://[::1]:3000"]',), ("http://[::1]:3000",)),
    ],
)
def test_origins_are_one_by_one_or_a_list(given: tuple[str, ...], origins: tuple[str, ...]) -> None:
    """An address of IPv6 has brackets, too, and is no list."""
    assert origins_of(ApiOptions(allowed_origins=given)).origins == origins
