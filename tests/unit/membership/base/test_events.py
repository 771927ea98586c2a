"""The event history: whole lines from many writers, readers that survive damage, following until stopped."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from membership.base.events import Event, EventLog, Tail
from membership.base.rotation import Limit

pytestmark = pytest.mark.unit

T = 60.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def test_what_is_emitted_can_be_read(path: Path) -> None:
    log = EventLog(path, "controller", "demo", clock=lambda: 12.5)
    emitted = [
        log.emit("commit", epoch=3),
        log.emit("rank_died", rank=0, reason="SIGKILL", kinds=["a", 1]),
        EventLog(path, "engine", clock=lambda: 1.0).emit("mask", cluster="other", kind_of="x"),
    ]
    assert EventLog.read(path) == emitted
    assert emitted[1] == Event(
        ts=12.5,
        role="controller",
        kind="rank_died",
        cluster="demo",
        rank=0,
        fields={"reason": "SIGKILL", "kinds": ["a", 1]},
    )
    assert emitted[2].cluster == "other"


def test_no_file_is_no_events(path: Path) -> None:
    assert EventLog.read(path) == []


def test_only_the_owner_may_read_it(path: Path) -> None:
    EventLog(path, "r").emit("a")
    assert path.stat().st_mode & 0o777 == 0o600


def test_each_event_is_one_write_to_a_file_opened_for_appending(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is what keeps lines of several processes whole."""
    opened: list[int] = []
    written: list[bytes] = []
    real_open, real_write = os.open, os.write

    def spy_open(file: Path, flags: int, mode: int) -> int:
        opened.append(flags)
        return real_open(file, flags, mode)

    def spy_write(fd: int, data: bytes) -> int:
        written.append(data)
        return real_write(fd, data)

    monkeypatch.setattr(os, "open", spy_open)
    monkeypatch.setattr(os, "write", spy_write)
    EventLog(path, "r").emit("a", text="line\nbreak" * 10_000)
    assert len(written) == 1
    assert written[0].endswith(b"\n")
    assert written[0].count(b"\n") == 1
    assert opened[0] & os.O_APPEND


def test_writers_do_not_mix(path: Path) -> None:
    def write(role: str) -> None:
        log = EventLog(path, role)
        for n in range(200):
            log.emit("tick", n=n, padding="x" * n)

    threads = [threading.Thread(target=write, args=(f"r{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(T)
    events = EventLog.read(path)
    assert {role: [e.fields["n"] for e in events if e.role == role] for role in ("r0", "r1", "r2", "r3")} == {
        role: list(range(200)) for role in ("r0", "r1", "r2", "r3")
    }


def test_a_damaged_line_is_skipped_and_an_unfinished_one_left_for_later(path: Path) -> None:
    log = EventLog(path, "r")
    first = log.emit("a")
    with open(path, "ab") as file:
        file.write(b'{"ts": 1, "role"\n[]\n\n')
    second = log.emit("b")
    with open(path, "ab") as file:
        file.write(b'{"ts": 2.0, "role": "r", "kind": "c"}')
    assert EventLog.read(path) == [first, second]
    with open(path, "ab") as file:
        file.write(b"\n")
    assert [e.kind for e in EventLog.read(path)] == ["a", "b", "c"]


def test_what_one_process_left_unfinished_costs_no_event_of_the_next(path: Path) -> None:
    EventLog(path, "agent").emit("a")
    path.write_bytes(path.read_bytes()[:-12])  # its disk was full
    EventLog(path, "controller").emit("b")
    EventLog(path, "engine").emit("c")
    assert [event.kind for event in EventLog.read(path)] == ["b", "c"]


def test_a_line_cut_short_costs_only_itself(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, real_write = EventLog(path, "r"), os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[:10]))
    log.emit("lost")
    monkeypatch.setattr(os, "write", real_write)
    log.emit("kept")
    log.emit("kept too")
    assert [e.kind for e in EventLog.read(path)] == ["kept", "events_lost", "kept too"]
    assert log.dropped == 1


def test_a_log_that_cannot_be_written_costs_events_not_the_service(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "no such directory" / "events", "r")
    log.emit("a")
    log.emit("b")
    assert log.dropped == 2


def test_follow_yields_old_and_new_until_stopped(path: Path) -> None:
    stop, got, seen = threading.Event(), list[str](), threading.Semaphore(0)

    def follow() -> None:
        for event in EventLog.follow(path, stop, poll_s=0.001):
            got.append(event.kind)
            seen.release()

    thread = threading.Thread(target=follow)  # starts before there is a file
    thread.start()
    log = EventLog(path, "r")
    for kind in ("a", "b", "c"):
        log.emit(kind)
        assert seen.acquire(timeout=T)
    stop.set()
    thread.join(T)
    assert got == ["a", "b", "c"]


def test_follow_yields_what_was_written_before_the_stop(path: Path) -> None:
    stop = threading.Event()
    EventLog(path, "r").emit("a")
    stop.set()
    follower: Iterator[Event] = EventLog.follow(path, stop)
    assert [e.kind for e in follower] == ["a"]


def test_a_reader_may_begin_near_the_end(path: Path) -> None:
    """With whole lines only, and it goes on with what is written later, in this file and in its successor."""
    log = EventLog(path, "r", limit=Limit(max_bytes=12_000, keep=2))
    for number in range(100):
        log.emit("early", number=number)
    tail = Tail.recent(path, 1000)
    read = [event.fields["number"] for event in tail.read() or ()]
    assert read == list(range(read[0], 100))
    assert 5 < len(read) < 20
    assert tail.read() is None
    for number in range(100, 300):
        log.emit("late", number=number)
    while (more := tail.read()) is not None:
        read += [event.fields["number"] for event in more]
    assert read == list(range(read[0], 300))


def test_a_reader_that_begins_near_the_end_of_a_short_history_reads_all_of_it(path: Path) -> None:
    tail = Tail.recent(path, 1000)
    assert tail.read() is None
    emitted = [EventLog(path, "r").emit("a", number=number) for number in range(3)]
    assert tail.read() == emitted
    assert Tail.recent(path, 1 << 20).read() == emitted
