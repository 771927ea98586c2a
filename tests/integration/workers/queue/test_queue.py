"""MessageQueue among threads and real processes: what arrives; readers that join, are late, or die."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from membership.base.errors import MessageTooLarge, QueueClosed, QueueError, QueueTimeout, WaitTimeout
from tests.support import ROOT
from tests.support.helpers import eventually, hang
from tests.support.queue_process import ReaderProcess, describe
from workers.ipc.doorbell import Doorbell
from workers.ipc.handover import HandoverRefused
from workers.ipc.shared_memory import Segment, SegmentError
from workers.queue.message_queue import Handle, MessageQueue, MsgpackCodec, SlowReaders

pytestmark = pytest.mark.integration


class Batch(msgspec.Struct):
    step: int
    tokens: list[int]


def fill(queue: MessageQueue) -> tuple[int, SlowReaders]:
    """Send numbered messages until a reader leaves no room; how many were sent, and the error."""
    sent = 0
    while True:
        try:
            queue.enqueue(sent.to_bytes(8, "big") + bytes(1000), timeout_s=0.1)
        except SlowReaders as error:
            return sent, error
        sent += 1


def test_a_queue_for_which_there_is_no_memory_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    create = Segment.create

    def short(size: int, name: str) -> Segment:
        if name == "elastic-ep-doorbell":
            raise SegmentError("cannot create shared memory")
        return create(size, name)

    def attempt() -> int:
        with pytest.raises(SegmentError):
            MessageQueue("q")
        return len(os.listdir("/proc/self/fd"))

    monkeypatch.setattr(Segment, "create", short)
    before = attempt()
    assert [attempt() for _ in range(3)] == [before] * 3


@pytest.mark.parametrize("size", [0, 1, 7, 200, 60_000, 70_000, 1 << 20, 32 << 20])
def test_messages_of_every_size_arrive_whole(size: int) -> None:
    array = np.arange(size, dtype=np.uint8)
    with MessageQueue("q") as queue, ReaderProcess(queue, "r") as reader:
        for message in (array, array.tobytes() if size < 1 << 21 else b""):
            assert queue.enqueue(message) == 1
            assert reader.answer() == describe(message)


def test_structures_with_arrays_and_tensors_keep_values_types_and_sharing_is_read_only() -> None:
    torch = pytest.importorskip("torch")
    message = {
        "small": np.arange(3),
        "large": np.random.default_rng(0).normal(size=(300, 400)),
        "tensor": torch.arange(100_000, dtype=torch.bfloat16).reshape(100, 1000),
        "scalar": torch.tensor(3.5),
        "text": ["a", None, {1: 2}],
    }
    with MessageQueue("q") as queue, MessageQueue.create_from_handle(queue.export_handle(), "r") as reader:
        queue.enqueue(message)
        got = reader.dequeue(30)
        assert (got["small"] == message["small"]).all()
        assert (got["large"] == message["large"]).all()
        assert not got["large"].flags.writeable
        assert torch.equal(got["tensor"], message["tensor"])
        assert got["tensor"].dtype == torch.bfloat16
        assert torch.equal(got["scalar"], message["scalar"])
        assert got["text"] == message["text"]
        del got


def test_msgpack_queue_carries_its_type_and_refuses_others() -> None:
    codec = MsgpackCodec(Batch)
    with (
        MessageQueue("q", codec) as queue,
        MessageQueue.create_from_handle(queue.export_handle().encode(), "r", codec=codec) as reader,
    ):
        queue.enqueue(Batch(3, list(range(100_000))))
        assert reader.dequeue(30) == Batch(3, list(range(100_000)))
        queue.enqueue(["something else"])
        with pytest.raises(QueueError, match="does not fit"):
            reader.dequeue(30)
        queue.enqueue(Batch(4, []))
        assert reader.dequeue(30) == Batch(4, [])


def test_views_in_place_keep_their_memory_until_they_are_let_go() -> None:
    with MessageQueue("q") as queue, MessageQueue.create_from_handle(queue.export_handle(), "r") as reader:
        kept = []
        for value in range(5):
            queue.enqueue(np.full(1 << 20, value, np.uint8))
            kept.append(reader.dequeue(30))
        assert [int(a[0]) for a in kept] == [0, 1, 2, 3, 4]
        assert all((a == a[0]).all() for a in kept)
        kept.clear()


def test_an_arena_full_of_kept_views_is_an_error_that_names_the_keeper() -> None:
    with (
        MessageQueue("q", arena_bytes=4 << 20) as queue,
        MessageQueue.create_from_handle(queue.export_handle(), "keeper") as reader,
    ):
        kept = []
        for _ in range(4):
            queue.enqueue(np.zeros((1 << 20) - 4096, np.uint8))
            kept.append(reader.dequeue(30))
        with pytest.raises(SlowReaders, match="keeper") as caught:
            queue.enqueue(np.zeros(1 << 20, np.uint8), timeout_s=0.05)
        assert caught.value.readers == ("keeper",)
        with pytest.raises(MessageTooLarge):
            queue.enqueue(np.zeros(5 << 20, np.uint8))
        kept.clear()
        assert queue.enqueue(np.zeros(1 << 20, np.uint8), timeout_s=5) == 1


def test_joining_twice_does_not_count_as_two() -> None:
    with MessageQueue("q") as queue, MessageQueue.create_from_handle(queue.export_handle(), "r"):
        with pytest.raises(HandoverRefused, match="r has joined already"):
            MessageQueue.create_from_handle(queue.export_handle(), "r")
        with pytest.raises(WaitTimeout, match=r"not joined within 0\.05 s: other"):
            queue.wait_until_ready(["r", "other"], 0.05)
        assert queue.readers == ("r",)


def test_a_reader_may_leave_and_join_again_and_sees_only_what_is_sent_while_it_is_in() -> None:
    with MessageQueue("q") as queue:
        assert queue.enqueue("no reader gets this") == 0
        for turn in range(700):  # more than there are slots
            with MessageQueue.create_from_handle(queue.export_handle(), "r") as reader:
                queue.enqueue(turn)
                assert reader.dequeue(30) == turn
                assert not reader.pending()
        eventually(lambda: queue.readers == (), 30, "the last one to be gone")


def test_a_wrong_codec_and_a_dead_queue_are_refused() -> None:
    queue = MessageQueue("q")
    handle = queue.export_handle()
    with pytest.raises(HandoverRefused, match="speaks msgpack"):
        MessageQueue.create_from_handle(handle, "r", codec=MsgpackCodec())
    queue.shutdown()
    with pytest.raises(QueueError, match="no such resource"):
        MessageQueue.create_from_handle(handle, "r")
    with pytest.raises(QueueClosed, match="shut down"):
        queue.enqueue(1)
    with pytest.raises(QueueError, match="not a queue handle"):
        Handle.decode(b"\xc1nonsense")


def test_a_slow_live_reader_is_named_and_the_others_get_nothing_twice() -> None:
    with MessageQueue("q") as queue, ReaderProcess(queue, "slow") as slow, ReaderProcess(queue, "quick") as quick:
        hang(slow.process.pid)
        sent, error = fill(queue)
        assert f"slow (pid {slow.process.pid})" in str(error)
        assert error.readers == ("slow",)
        assert sent > 100
        for number in range(sent):
            assert quick.answer()[:8] == number.to_bytes(8, "big")
        assert queue.drop_reader("slow")
        assert queue.enqueue(b"goes on") == 1
        assert quick.answer() == b"goes on"
        slow.signal(signal.SIGCONT)  # finds that it was dropped, and goes
        assert slow.process.wait(30) != 0
        assert not queue.drop_reader("slow")


def test_a_reader_killed_mid_stream_never_stalls_the_writer() -> None:
    with MessageQueue("q") as queue, ReaderProcess(queue, "killed") as killed, ReaderProcess(queue, "other") as other:
        hang(killed.process.pid)
        sent, error = fill(queue)
        assert error.readers == ("killed",)
        killed.signal(signal.SIGKILL)
        assert queue.enqueue(b"after the death".ljust(1008), timeout_s=5) == 1
        assert [other.answer()[:8] for _ in range(sent)] == [number.to_bytes(8, "big") for number in range(sent)]
        assert other.answer().strip() == b"after the death"
        assert queue.readers == ("other",)


def test_a_killed_writer_is_noticed_after_all_it_wrote() -> None:
    script = (
        "import sys,time\nfrom workers.queue.message_queue import MessageQueue\n"
        "queue = MessageQueue('w')\nprint(queue.export_handle().encode().hex(), flush=True)\n"
        "queue.wait_until_ready(['r'], 20)\n"
        "for i in range(100): queue.enqueue(i)\n"
        "print('done', flush=True)\ntime.sleep(60)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert writer.stdout is not None
    with MessageQueue.create_from_handle(bytes.fromhex(writer.stdout.readline()), "r") as queue:
        assert writer.stdout.readline() == "done\n"
        writer.kill()
        writer.communicate(timeout=30)
        assert [queue.dequeue(30) for _ in range(100)] == list(range(100))
        with pytest.raises(QueueClosed, match=f"pid {writer.pid}"):
            queue.dequeue(30)
        assert queue.pending()


def test_readers_come_and_go_under_traffic_and_the_others_do_not_notice() -> None:
    stop = threading.Event()
    with MessageQueue("q") as queue, ReaderProcess(queue, "steady") as steady:
        handle = queue.export_handle()

        def come_and_go(number: int) -> None:
            while not stop.is_set():
                with MessageQueue.create_from_handle(handle, f"guest {number}") as guest:
                    numbers = [int.from_bytes(guest.dequeue(30), "big") for _ in range(5)]
                    assert numbers == list(range(numbers[0], numbers[0] + 5))
                    counts[number] += 1

        counts = [0, 0, 0]
        guests = [threading.Thread(target=come_and_go, args=(number,)) for number in range(3)]
        for guest in guests:
            guest.start()
        number = 0
        while number < 5000 or (number < 1_000_000 and any(g.is_alive() for g in guests)):
            queue.enqueue(number.to_bytes(8, "big"))
            assert steady.answer() == number.to_bytes(8, "big")
            number += 1
            if number >= 4500 and all(counts):
                stop.set()
        for guest in guests:
            guest.join(30)
        assert all(counts)


def test_shutdown_from_another_thread_ends_a_dequeue() -> None:
    with MessageQueue("q") as queue:
        reader = MessageQueue.create_from_handle(queue.export_handle(), "r")
        timer = threading.Timer(0.1, reader.shutdown)
        timer.start()
        with pytest.raises(QueueClosed):
            reader.dequeue(30)
        timer.join(30)


def test_one_doorbell_for_many_queues_and_a_deadline_for_each_wait() -> None:
    with Doorbell() as bell, MessageQueue("a") as a, MessageQueue("b") as b:
        from_a = MessageQueue.create_from_handle(a.export_handle(), "r", bell)
        from_b = MessageQueue.create_from_handle(b.export_handle(), "r", bell)
        assert not bell.wait(lambda: from_a.pending() or from_b.pending(), 0.01)
        with pytest.raises(QueueTimeout, match=r"within 0\.01 s"):
            from_a.dequeue(0.01)
        timer = threading.Timer(0.05, b.enqueue, ["hello"])
        timer.start()
        assert bell.wait(lambda: from_a.pending() or from_b.pending(), 10)
        assert from_a.try_dequeue() is None
        assert from_b.try_dequeue() == "hello"
        timer.join(30)
        from_a.shutdown()
        from_b.shutdown()


def test_no_wakeup_is_lost_between_two_processes_at_random_rhythms() -> None:
    seed = int(os.environ.get("SEED", random.SystemRandom().randrange(2**32)))
    print(f"SEED={seed}")
    chance = random.Random(seed)
    with MessageQueue("q", ring_bytes=4096) as queue, ReaderProcess(queue, "r") as reader:
        for number in range(3000):
            burst = chance.choice([1, 1, 1, 2, 7, 30])
            for _ in range(burst):
                queue.enqueue(bytes(chance.randrange(900)), timeout_s=10)
            for _ in range(burst):
                reader.answer()
            if number % 10 == 0:
                time.sleep(chance.random() * 0.0005)


def test_no_memory_is_a_clear_error_and_breaks_nothing() -> None:
    script = (
        "import resource, numpy as np\nfrom membership.base.errors import QueueError\n"
        "from workers.queue.message_queue import MessageQueue\n"
        "queue = MessageQueue('q')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try: MessageQueue('p')\n"
        "except QueueError as error: print(error, '|', error.hint)\n"
        "queue.shutdown()\n"
    )
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert outcome.returncode == 0, outcome.stderr
    assert "bytes of shared memory: File too large | free memory" in outcome.stdout


def test_a_full_host_is_an_error_of_enqueue_and_the_queue_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    with MessageQueue("q") as queue, MessageQueue.create_from_handle(queue.export_handle(), "r") as reader:
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(QueueError, match="cannot get 1048576 bytes of shared memory: No space left"):
                queue.enqueue(np.zeros((1 << 20) - 4096, np.uint8))
        queue.enqueue(np.ones(1 << 20, np.uint8))
        assert reader.dequeue(30).sum() == 1 << 20


def test_kill_minus_nine_of_the_whole_group_leaves_nothing(tmp_path: Path) -> None:
    script = (
        "import time\nfrom workers.queue.message_queue import MessageQueue\n"
        "from tests.support.queue_process import ReaderProcess\n"
        "queue = MessageQueue('q')\nreaders = [ReaderProcess(queue, str(i)) for i in range(2)]\n"
        "queue.enqueue(bytes(100_000))\n[r.answer() for r in readers]\n"
        "print(*(r.process.pid for r in readers), flush=True)\ntime.sleep(60)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert owner.stdout is not None
    pids = [owner.pid, *map(int, owner.stdout.readline().split())]
    assert len(pids) == 3
    os.killpg(owner.pid, signal.SIGKILL)
    owner.communicate(timeout=30)
    eventually(lambda: not any(os.path.exists(f"/proc/{pid}/fd/0") for pid in pids), 30, "all to be gone")
    assert not os.listdir(tmp_path)
