"""How fast the queue copes: one-way rate, joining, dead readers, killed ranks, and what a kill -9 leaves."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from statistics import median

from benchmarks.mq_transports import ROOT, line
from membership.base.run_dir import default_run_dir, remove_run_dir
from workers.protocol.liveness import DeathWatcher, LivenessPage
from workers.queue.message_queue import MessageQueue, SlowReaders

Fault = tuple[str, float, str, float | None, str]
"""Measure, value, unit, target, which direction is better."""

COUNTER = """
import sys
from workers.queue.message_queue import MessageQueue
with MessageQueue("answers") as answers:
    print(answers.export_handle().encode().hex(), flush=True)
    answers.wait_until_ready(["parent"], 30)
    queue = MessageQueue.create_from_handle(bytes.fromhex(sys.argv[1]), sys.argv[2])
    while True:
        for _ in range(int(sys.argv[3])): queue.dequeue(60)
        answers.enqueue(b"all")
"""
RANK = """
import sys, time
from workers.protocol.liveness import LivenessPage
ballast = bytearray(int(sys.argv[1]) << 20)
for at in range(0, len(ballast), 4096): ballast[at] = 1
page = LivenessPage.create()
print(page.handle().hex(), flush=True)
time.sleep(600)
"""
GROUP = """
import time
from workers.queue.message_queue import MessageQueue
from benchmarks.mq_transports import Ours
ours = Ours(4)
for _ in range(10): ours.send(bytes(100_000)); ours.receive()
print(ours.queue.export_handle().address, *(a for a in ours.addresses), flush=True)
time.sleep(600)
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A process in a group of its own."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True, encoding="utf-8")


def one_way(messages: int) -> float:
    """200-byte messages per second to one reader, as fast as it takes them."""
    with MessageQueue("bench") as sender:
        reader = start(COUNTER, sender.export_handle().encode().hex(), "r", messages)
        with MessageQueue.create_from_handle(bytes.fromhex(line(reader)), "parent") as answers:
            sender.wait_until_ready(["r"], 30)
            rates = []
            for _ in range(3):
                begin = time.perf_counter()
                for _ in range(messages):
                    sender.enqueue(bytes(200))
                answers.dequeue(60)
                rates.append(messages / (time.perf_counter() - begin))
            reader.kill()
            reader.communicate(timeout=10)
    return median(rates)


def joining(times: int) -> float:
    """Milliseconds for one more reader to join a queue that is in use."""
    found = []
    stop = threading.Event()

    def traffic(sender: MessageQueue, steady: MessageQueue) -> None:
        while not stop.wait(0.001):
            sender.enqueue(bytes(200))
            steady.dequeue(10)

    with (
        MessageQueue("bench") as sender,
        MessageQueue.create_from_handle(sender.export_handle(), "steady") as steady,
    ):
        thread = threading.Thread(target=traffic, args=(sender, steady))
        thread.start()
        for _ in range(times):
            begin = time.perf_counter()
            guest = MessageQueue.create_from_handle(sender.export_handle(), "guest")
            found.append((time.perf_counter() - begin) * 1000)
            guest.shutdown()
            while "guest" in sender.readers:
                time.sleep(0.001)
        stop.set()
        thread.join(10)
    return median(found)


def dead_reader(times: int) -> tuple[float, float]:
    """Milliseconds that an enqueue takes whose only obstacle was just killed, and the CPU time in it."""
    took, burnt = [], []
    for _ in range(times):
        with MessageQueue("bench") as sender:
            reader = start(COUNTER, sender.export_handle().encode().hex(), "r", 1 << 30)
            with MessageQueue.create_from_handle(bytes.fromhex(line(reader)), "parent"):
                sender.wait_until_ready(["r"], 30)
                os.kill(reader.pid, signal.SIGSTOP)
                try:
                    while True:
                        sender.enqueue(bytes(200), timeout_s=0.0)
                except SlowReaders:
                    os.kill(reader.pid, signal.SIGKILL)
                begin, cpu = time.perf_counter(), time.thread_time()
                sender.enqueue(bytes(200), timeout_s=5.0)
                took.append((time.perf_counter() - begin) * 1000)
                burnt.append((time.thread_time() - cpu) * 1000)
            reader.communicate(timeout=10)
    return max(took), max(burnt)


def noticing(times: int, megabytes: int) -> float:
    """Milliseconds from SIGKILL of a rank of this size until its watcher calls."""
    found = []
    for _ in range(times):
        rank = start(RANK, megabytes)
        with LivenessPage.attach(bytes.fromhex(line(rank))) as page:
            deaths: queue.Queue[float] = queue.Queue()
            watcher = DeathWatcher(page, lambda _, deaths=deaths: deaths.put(time.perf_counter()))
            time.sleep(0.05)
            begin = time.perf_counter()
            os.kill(rank.pid, signal.SIGKILL)
            found.append((deaths.get(timeout=10) - begin) * 1000)
            watcher.stop()
        rank.communicate(timeout=10)
    return median(found)


def remains() -> int:
    """Names in /dev/shm, files in /tmp and sockets that a kill -9 of a whole group of processes leaves for good.

    Sockets in the run directory are removed by the next process that has one there, which this one is.
    """

    def names() -> set[str]:
        return {f"/dev/shm/{n}" for n in os.listdir("/dev/shm")} | set(os.listdir("/tmp"))

    before = names()
    owner = start(GROUP)
    addresses = line(owner).split()
    os.killpg(owner.pid, signal.SIGKILL)
    owner.communicate(timeout=10)
    time.sleep(0.3)
    remove_run_dir(default_run_dir())
    return sum(map(os.path.exists, addresses)) + len([name for name in names() - before if "elastic" in name])


def measure_faults(quick: bool) -> Iterator[Fault]:
    """All of them."""
    times = 3 if quick else 10
    yield "one way, 200 B, one reader", one_way(50_000 if quick else 200_000) / 1000, "k/s", 115.0, "higher"
    yield "a reader joins", joining(times * 3), "ms", 2.0, "lower"
    took, burnt = dead_reader(times)
    yield "enqueue past a dead reader (worst)", took, "ms", 5.0, "lower"
    yield "CPU burnt in it (worst)", burnt, "ms", 5.0, "lower"
    yield "killed rank of 20 MB noticed", noticing(times, 0), "ms", 3.0, "lower"
    yield "killed rank of 512 MB noticed", noticing(times, 512), "ms", 3.0, "lower"
    yield "names left after kill -9 of all", float(remains()), "", 0.0, "lower"
