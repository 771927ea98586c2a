"""A reader process for queue tests: joins a queue and answers each message on a queue of its own.

    python -m tests.support.queue_process HANDLE_HEX READER_ID     # prints the handle of its answers

A message `("hold", seconds)` makes it sleep before it reads on; anything else is answered by what `describe` says.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import TracebackType
from typing import Any

import numpy as np

from membership.base.starter import end_with_starter
from tests.support import ROOT
from workers.ipc.doorbell import Doorbell
from workers.queue.message_queue import MessageQueue


def describe(message: Any) -> Any:
    """Small answer that proves that the whole message arrived."""
    if isinstance(message, np.ndarray):
        return ("array", message.dtype.str, message.shape, int(message.view(np.uint8).sum(dtype=np.uint64)))
    return message


class ReaderProcess:
    """The test's side: starts it, talks to it, ends it."""

    def __init__(self, queue: MessageQueue, reader_id: str, doorbell: Doorbell | None = None) -> None:
        self.id = reader_id
        handle = queue.export_handle().encode().hex()
        command = [sys.executable, "-m", "tests.support.queue_process", handle, reader_id]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self.process.stdout is not None
        answers = bytes.fromhex(self.process.stdout.readline())
        self.answers = MessageQueue.create_from_handle(answers, "test", doorbell)
        queue.wait_until_ready([reader_id], 60)

    def answer(self, timeout_s: float = 60.0) -> Any:
        """Its next answer."""
        return self.answers.dequeue(timeout_s)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.process.pid, number)

    def close(self) -> None:
        """End it, by force."""
        self.answers.shutdown()
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.communicate(timeout=60)

    def __enter__(self) -> ReaderProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def main(handle: str, reader_id: str) -> None:
    """Answer until killed or until the writer ends."""
    with MessageQueue(f"answers-of-{reader_id}") as answers:
        print(answers.export_handle().encode().hex(), flush=True)
        answers.wait_until_ready(["test"], 60)
        with MessageQueue.create_from_handle(bytes.fromhex(handle), reader_id) as queue:
            while True:
                message = queue.dequeue(60)
                if isinstance(message, tuple) and message[0] == "hold":
                    time.sleep(message[1])
                answers.enqueue(describe(message))
                del message


if __name__ == "__main__":
    end_with_starter()
    main(sys.argv[1], sys.argv[2])
