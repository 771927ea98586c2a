"""Events and logs have a limit: readers lose nothing by it and get nothing twice, writers never wait."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import pytest

from membership.base import rotation
from membership.base.events import LOST, EventLog, Tail
from membership.base.rotation import Limit, empty, numbered

pytestmark = pytest.mark.unit

T = 60.0
SMALL = Limit(2_000, 50)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def numbers(tail: Tail) -> list[int]:
    found: list[int] = []
    while (events := tail.read()) is not None:
        found += [event.fields["n"] for event in events]
    return found


def write(log: EventLog, first: int, last: int) -> None:
    for n in range(first, last):
        log.emit("tick", n=n, padding="x" * 50)


def test_a_full_file_gets_a_successor_and_the_oldest_goes(path: Path) -> None:
    log = EventLog(path, "r", limit=Limit(1_000, 2))
    write(log, 0, 100)
    assert {file.name for file in path.parent.iterdir()} <= {"events.jsonl", "events.jsonl.1", "events.jsonl.2"}
    assert all(numbered(path, n).stat().st_size < 1_300 for n in (1, 2))
    read = numbers(Tail(path))
    assert read == list(range(read[0], 100)), "the newest, without a gap"


def test_nothing_is_kept_if_nothing_is_to_be_kept(path: Path) -> None:
    write(EventLog(path, "r", limit=Limit(1_000, 0)), 0, 100)
    assert not numbered(path, 1).exists()


@pytest.mark.parametrize("pause", [1, 8, 40, 400])
def test_a_reader_that_comes_now_and_then_gets_each_event_once(path: Path, pause: int) -> None:
    log, tail, read = EventLog(path, "r", limit=SMALL), Tail(path), []
    for first in range(0, 400, pause):
        write(log, first, first + pause)
        read += numbers(tail)
    assert read == list(range(400))


def test_writers_and_readers_at_the_same_time(path: Path) -> None:
    """Four writers that all rotate, and two readers that follow: each event once to each, in each writer's order."""
    stop = threading.Event()
    logs = [EventLog(path, f"r{n}", limit=Limit(4_000, 99)) for n in range(4)]  # more than they write
    writers = [threading.Thread(target=write, args=(log, 0, 150)) for log in logs]
    found: list[list[tuple[str, int]]] = [[], []]

    def follow(into: list[tuple[str, int]]) -> None:
        into += [(event.role, event.fields["n"]) for event in EventLog.follow(path, stop, poll_s=0.001)]

    readers = [threading.Thread(target=follow, args=(into,)) for into in found]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join(T)
    write(logs[0], 150, 151)  # whoever writes alone also renames what is full
    stop.set()
    for thread in readers:
        thread.join(T)
    assert numbered(path, 1).exists(), "it was rotated"
    for each in found:
        assert {role: [n for r, n in each if r == role] for role in ("r0", "r1", "r2", "r3")} == {
            role: list(range(151 if role == "r0" else 150)) for role in ("r0", "r1", "r2", "r3")
        }


def test_a_file_keeps_its_place_though_newer_ones_came_while_it_was_looked_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader goes from each file to the next newer one: in a wrong order it would leave one out."""
    real = rotation.open_to_read

    def then_rotated_twice(which: Path, opened: ExitStack) -> BinaryIO | None:
        file = real(which, opened)
        if which == path:
            path.rename(numbered(path, 2))
            numbered(path, 1).write_text("newer")
            path.write_text("newest")
        return file

    path.write_text("oldest")
    monkeypatch.setattr(rotation, "open_to_read", then_rotated_twice)
    with ExitStack() as opened:
        assert [file.read() for file in rotation.kept(path, opened)] == [b"newer", b"oldest"]


def test_a_file_that_is_being_written_to_is_renamed_later(path: Path) -> None:
    log = EventLog(path, "r", limit=Limit(300, 3))
    log.emit("a")
    with path.open() as writing:
        fcntl.flock(writing, fcntl.LOCK_SH)
        write(log, 0, 20)
        assert not numbered(path, 1).exists()
    write(log, 20, 21)
    assert numbered(path, 1).exists()


def test_a_process_that_is_stopped_while_it_renames_stops_no_other(path: Path) -> None:
    log = EventLog(path, "r", limit=Limit(300, 3))
    log.emit("a")
    with path.open() as renaming:
        fcntl.flock(renaming, fcntl.LOCK_EX)
        log.emit("b")
    assert [event.kind for event in EventLog.read(path)] == ["a", "b"]


def test_a_reader_that_missed_a_whole_file_says_so_and_goes_on(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, tail = EventLog(path, "r", limit=Limit(500, 1)), Tail(path)
    write(log, 0, 2)
    assert numbers(tail) == [0, 1]
    write(log, 2, 40)
    read = numbers(tail)
    assert read == list(range(read[0], 40))
    assert read[0] > 2
    assert "events_missed" in capsys.readouterr().out
    path.write_bytes(b"")  # by hand
    assert numbers(tail) == []
    write(log, 40, 41)
    assert numbers(tail) == [40], "what was read before is not read again"


def test_lost_events_are_counted_and_reported_once_there_is_room(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(path, "r", "demo")

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        write(log, 0, 5)
    write(log, 5, 7)
    events = EventLog.read(path)
    assert [(event.kind, event.fields.get("n")) for event in events] == [("tick", 5), (LOST, None), ("tick", 6)]
    assert (events[1].fields, events[1].cluster, log.dropped) == ({"count": 5}, "demo", 5)


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENOMEM, errno.EIO, errno.EACCES])
def test_a_reader_without_a_descriptor_reads_later(path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    log, tail = EventLog(path, "r", limit=SMALL), Tail(path)
    write(log, 0, 10)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(rotation.Path, "open", refuse)
        assert tail.read() is None
    assert numbers(tail) == list(range(10))
    write(log, 10, 100)
    with monkeypatch.context() as patch:
        patch.setattr(rotation.Path, "open", refuse)
        assert tail.read() is None
    assert numbers(tail) == list(range(10, 100))


def test_a_log_that_a_process_holds_open_is_emptied_under_it(path: Path) -> None:
    with path.open("ab", buffering=0) as held:
        for n in range(4):
            held.write(b"%d" % n * 1000)
            assert empty(path, Limit(1_000, 2))
        held.write(b"more")
    assert path.read_bytes() == b"more"
    assert [numbered(path, n).read_bytes() for n in (1, 2)] == [b"3" * 1000, b"2" * 1000]
    assert not numbered(path, 3).exists()
    assert not empty(path, Limit(1_000, 2))
    assert not empty(path.with_name("none"), Limit(1_000, 2))


def test_on_a_full_disk_the_limit_matters_more_than_what_was_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    copy: Callable[..., None] = full
    monkeypatch.setattr(rotation.shutil, "copyfile", copy)
    path.write_bytes(b"x" * 2_000)
    assert empty(path, Limit(1_000, 2))
    assert path.stat().st_size == 0
