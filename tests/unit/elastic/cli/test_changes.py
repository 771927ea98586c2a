"""Which ranks a command is about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
from typer.testing import CliRunner

from elastic.cli.changes import ranks_of
from elastic.cli.connection import Connection
from elastic.cli.main import app
from membership.base.errors import ConfigError

pytestmark = pytest.mark.unit


class Known:
    """A connection to a cluster of which the status is known."""

    @contextmanager
    def client(self) -> Iterator[Known]:
        yield self

    def status(self) -> dict[str, Any]:
        return {"ranks": [{"rank": rank, "node": node} for rank, node in enumerate(["a", "b", "", "b"])]}


KNOWN = cast(Connection, Known())


def test_all_ranks_of_a_host() -> None:
    assert ranks_of(KNOWN, "b") == [1, 3]


def test_a_host_that_has_none_is_told_from_those_that_have() -> None:
    with pytest.raises(ConfigError, match="no rank is on a host named c") as refused:
        ranks_of(KNOWN, "c")
    assert refused.value.hint == "ranks are on: a, b"


@pytest.mark.parametrize("words", [[], ["0", "--node", "b"]], ids=["neither", "both"])
def test_a_drain_is_of_ranks_or_of_a_host(words: list[str]) -> None:
    done = CliRunner().invoke(app, ["drain", *words])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: name ranks, or a host")
