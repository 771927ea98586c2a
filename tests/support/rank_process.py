"""A stand-in for a rank, as a process of its own: real queues, a real liveness page, and a pretended model.

The next token is a hash of the whole sequence, which it reads back from its KV cells, so a wrong block, position or
token anywhere shows in the output. It obeys JSON lines on stdin: attach, answer (the status to give), masked, load (it
answers nothing until it is loaded), stop.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import queue
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from membership.base.errors import QueueClosed
from membership.base.rank_id import RankId
from membership.base.starter import end_with_starter
from workers.ipc.doorbell import Doorbell
from workers.protocol.live_mask import LiveMask
from workers.protocol.liveness import LivenessPage
from workers.protocol.messages import (
    BlocksCopied,
    CopyBlocks,
    EngineMessage,
    Ping,
    RankMessage,
    SampledToken,
    SeqChunk,
    StepBatch,
    StepResult,
    StepStatus,
    TracedResult,
    TracedStep,
    reader_id,
)
from workers.queue.message_queue import MessageQueue, MsgpackCodec

VOCAB = 1000


def next_token(tokens: list[int]) -> int:
    """The pretended model: depends on every token before."""
    return int.from_bytes(hashlib.blake2b(repr(tokens).encode()).digest()[:4]) % VOCAB


class StandIn:
    """One rank."""

    def __init__(self, rank: int, incarnation: int, block_size: int, step_s: float, mail: str) -> None:
        self.mail = mail
        self.rank, self.incarnation, self.block_size, self.step_s = rank, incarnation, block_size, step_s
        self.doorbell = Doorbell()
        self.page = LivenessPage.create()
        self.doorbell.on_slept = self.page.slept
        self.commands: queue.Queue[dict[str, Any]] = queue.Queue()
        self.cells: dict[tuple[int, int], tuple[int, int]] = {}
        self.silent = False
        self.status = StepStatus.OK
        self.token = 0
        self.evicted = False
        self.hang = ""
        self.load = ExitStack()
        self.steps: MessageQueue | None = None
        self.answers: MessageQueue | None = None
        self.mask: LiveMask | None = None

    def say(self, **words: Any) -> None:
        print(json.dumps(words), flush=True)

    def listen(self) -> None:
        for line in sys.stdin:
            self.commands.put(json.loads(line))
            self.doorbell.ring()
        self.commands.put({"do": "stop"})
        self.doorbell.ring()

    def run(self) -> None:
        threading.Thread(target=self.listen, daemon=True).start()
        self.say(liveness=self.page.handle().hex())
        while True:
            self.doorbell.wait(self.pending, 0.5)
            while not self.commands.empty():
                command = self.commands.get(timeout=1)
                if command["do"] == "stop":
                    return
                self.obey(command)
            self.work()

    def pending(self) -> bool:
        return not self.commands.empty() or (self.steps is not None and self.steps.pending())

    def obey(self, command: dict[str, Any]) -> None:
        if command["do"] == "attach":
            self.attach(command)
        elif command["do"] == "answer":
            self.status = StepStatus(command["status"])
            self.say(done=True)
        elif command["do"] == "masked":
            self.say(masked=self.mask.masked() if self.mask is not None else -1)

        elif command["do"] == "evicted":
            mask = self.mask
            self.say(evicted=self.evicted or (mask is not None and mask.evicted(self.rank, self.incarnation)))
        elif command["do"] == "load":
            self.load.enter_context(self.page.load_progress.loading())
            self.say(done=True)
        elif command["do"] == "loaded":
            self.load.close()
        elif command["do"] == "pace":
            self.step_s = command["step_s"]
        elif command["do"] == "hang":
            self.hang = command["how"]
        elif command["do"] == "copy nothing":
            self.silent = True
            self.say(done=True)

    def attach(self, command: dict[str, Any]) -> None:
        self.leave()
        self.token = command["token"]
        self.mask = LiveMask.attach(bytes.fromhex(command["mask"]))
        self.steps = MessageQueue.create_from_handle(
            bytes.fromhex(command["broadcast"]),
            reader_id=reader_id(RankId(self.rank, self.incarnation)),
            doorbell=self.doorbell,
            codec=MsgpackCodec(EngineMessage),
            timeout_s=5.0,
        )
        self.answers = MessageQueue(f"answers-{self.rank}", MsgpackCodec(RankMessage))
        self.say(response=self.answers.export_handle().encode().hex())

    def leave(self) -> None:
        for held in (self.steps, self.answers):
            if held is not None:
                held.shutdown()
        if self.mask is not None:
            self.mask.close()
        self.steps = self.answers = self.mask = None

    def work(self) -> None:
        while self.steps is not None and self.answers is not None and not self.page.load.loading:
            try:
                message = self.steps.try_dequeue()
            except QueueClosed:
                self.evicted = self.mask is not None and self.mask.evicted(self.rank, self.incarnation)
                self.leave()
                return
            if message is None:
                return
            if isinstance(message, Ping):
                self.answers.enqueue(self.reply(0, message.step, 0, StepStatus.OK, []), timeout_s=1.0)
            elif isinstance(message, CopyBlocks):
                if message.addressee == (self.rank, self.incarnation) and not self.silent:
                    self.answers.enqueue(self.copy(message), timeout_s=1.0)
            elif message.ranks.get(self.rank):
                self.answers.enqueue(self.step(message), timeout_s=1.0)

    def step(self, batch: StepBatch) -> StepResult:
        if self.hang == "free":  # natively, the interpreter's lock given back
            ctypes.CDLL(None).pause()
        elif self.hang == "locked":
            ctypes.PyDLL(None).pause()
        elif self.hang == "busy":
            until = time.monotonic() + 3.0
            while time.monotonic() < until:
                pass
            self.hang = ""
        if self.step_s > 0:
            time.sleep(self.step_s)
        if self.status is not StepStatus.OK:
            return self.reply(batch.epoch, batch.step, batch.attempt, self.status, [])
        tokens = [token for chunk in batch.ranks[self.rank] if (token := self.chunk(chunk)) is not None]
        result = self.reply(batch.epoch, batch.step, batch.attempt, StepStatus.OK, tokens)
        return TracedResult.of(result, self.step_s, self.step_s / 2) if isinstance(batch, TracedStep) else result

    def chunk(self, chunk: SeqChunk) -> SampledToken | None:
        if self.step_s < 0:  # answer at once: the benchmark's ranks
            return SampledToken(chunk.seq, chunk.tokens[-1]) if chunk.sample is not None else None
        for offset, token in enumerate(chunk.tokens):
            self.cells[self.cell(chunk, chunk.start + offset)] = (chunk.start + offset, token)
        if chunk.sample is None:
            return None
        stored = [self.cells[self.cell(chunk, position)] for position in range(chunk.start + len(chunk.tokens))]
        if [position for position, _ in stored] != list(range(len(stored))):
            return SampledToken(chunk.seq, VOCAB)  # another sequence's cells: a token that no oracle expects
        return SampledToken(chunk.seq, next_token([token for _, token in stored]))

    def cell(self, chunk: SeqChunk, position: int) -> tuple[int, int]:
        block, offset = divmod(position, self.block_size)
        return chunk.blocks[block], offset

    def copy(self, order: CopyBlocks) -> BlocksCopied:
        """Half of a move, by a file that only the two ranks know. No dead rank leaves a pool here."""
        if order.there:
            return BlocksCopied(self.rank, self.incarnation, self.token, order.copy, 0, "no pool was left")
        (source, incarnation), (target, _) = order.source, order.target
        path = Path(self.mail) / f"{source}.{incarnation}-{target}"
        if order.arriving:
            number, cells = json.loads(path.read_text())
            if number != order.copy:
                return BlocksCopied(self.rank, self.incarnation, self.token, order.copy, 0, "another's")
            for index, offset, position, token in cells:
                self.cells[order.blocks[index], offset] = (position, token)
        else:
            cells = [
                (index, offset, *self.cells[block, offset])
                for index, block in enumerate(order.blocks)
                for offset in range(self.block_size)
                if (block, offset) in self.cells
            ]
            path.write_text(json.dumps((order.copy, cells)))
        return BlocksCopied(self.rank, self.incarnation, self.token, order.copy, len(order.blocks))

    def reply(self, epoch: int, step: int, attempt: int, status: StepStatus, tokens: list[SampledToken]) -> StepResult:
        return StepResult(self.rank, self.incarnation, self.token, epoch, step, attempt, status, tokens)


def main() -> None:
    rank, incarnation, block_size, step_s, mail = sys.argv[1:]
    stand_in = StandIn(int(rank), int(incarnation), int(block_size), float(step_s), mail)
    try:
        stand_in.run()
    finally:
        stand_in.leave()


if __name__ == "__main__":
    end_with_starter()
    main()
