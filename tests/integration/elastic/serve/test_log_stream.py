"""All roles' lines reach one stream, each once and with its role, whatever is written and whoever reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from elastic.serve.log_stream import LogStream
from membership.base import rotation
from tests.support.helpers import eventually

pytestmark = pytest.mark.integration


class Pipe:
    """Its reading end sees what has come so far."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe()
        os.set_blocking(self.read, False)
        self._seen = b""

    def lines(self) -> list[dict[str, Any]]:
        try:
            while more := os.read(self.read, 1 << 16):
                self._seen += more
        except BlockingIOError:
            pass
        return [json.loads(line) for line in self._seen.splitlines(keepends=True) if line.endswith(b"\n")]

    def wait(self, count: int) -> list[dict[str, Any]]:
        eventually(lambda: len(self.lines()) >= count, 30.0, f"{count} lines")
        return self.lines()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    os.close(made.read)
    os.close(made.write)


def say(path: Path, *lines: str) -> None:
    with path.open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


def test_each_line_has_its_role_and_comes_once(tmp_path: Path, pipe: Pipe) -> None:
    agent, etcd = tmp_path / "agent.log", tmp_path / "etcd.log"
    say(agent, "of an earlier run")
    with closing(LogStream({"agent": agent, "etcd": etcd}, pipe.write)):
        say(
            agent,
            json.dumps({"role": "rank", "rank": 1, "event": "rank_ready"}),
            "Fatal Python error: Aborted",
        )
        say(etcd, json.dumps({"level": "warn", "msg": "slow"}), "[1]")
        assert len(pipe.wait(4)) == 4
        with agent.open("a") as file:
            file.write("half a li")
            file.flush()
            say(etcd, "whole")
            assert pipe.wait(5)[4] == {"role": "etcd", "event": "whole"}
            file.write("ne")
    lines = pipe.lines()
    assert [line for line in lines if line["role"] != "etcd"] == [
        {"role": "rank", "rank": 1, "event": "rank_ready"},
        {"role": "agent", "event": "Fatal Python error: Aborted"},
        {"role": "agent", "event": "half a line"},
    ]
    assert [line for line in lines if line["role"] == "etcd"] == [
        {"role": "etcd", "level": "warn", "msg": "slow"},
        {"role": "etcd", "event": "[1]"},
        {"role": "etcd", "event": "whole"},
    ]


def test_a_log_that_is_emptied_goes_on(tmp_path: Path, pipe: Pipe) -> None:
    path = tmp_path / "agent.log"
    with closing(LogStream({"agent": path}, pipe.write)):
        say(path, "x" * 2000)
        pipe.wait(1)
        assert rotation.empty(path, rotation.Limit(1000, 1))
        say(path, "after")
        assert pipe.wait(2)[1] == {"role": "agent", "event": "after"}


def test_a_reader_that_stops_for_a_while_gets_all_of_it(tmp_path: Path, pipe: Pipe) -> None:
    """More than a pipe holds, in lines longer than it takes at once; and the end does not wait for them."""
    path = tmp_path / "agent.log"
    lines = [f"{number} {'x' * 9000}" for number in range(30)]
    with closing(LogStream({"agent": path}, pipe.write)):
        say(path, *lines)
        seen = [line["event"] for line in pipe.wait(len(lines))]
        assert seen == lines
        say(path, *lines)  # which no one reads


def test_a_line_without_an_end_is_not_kept_back_for_ever(tmp_path: Path, pipe: Pipe) -> None:
    path = tmp_path / "agent.log"
    with closing(LogStream({"agent": path}, pipe.write)):
        path.write_bytes(b"x" * (1 << 17))
        assert [len(line["event"]) for line in pipe.wait(2)] == [1 << 16, 1 << 16]
