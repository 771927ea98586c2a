"""One engine and three ranks whose messages take their time: old answers come again, ranks die, leave and come back.

The scheduler is the product's; ranks are a model of KV caches (`chaos/simulation/ranks.py`) that finds what was
computed over another sequence's cells. Here a step or a copy is under way while other things happen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from random import Random

from chaos.mutants.checks.promise import require
from chaos.mutants.checks.serving import SERVED
from chaos.simulation.ranks import Ranks, oracle, reply
from elastic.engine.scheduler import Output, Scheduler
from elastic.gateway.journal import Journal, Request
from elastic.protocol import Rejected
from membership.store.records import Member, Placement, View
from workers.protocol.messages import (
    BlocksCopied,
    CopyBlocks,
    SampledToken,
    Sampling,
    StepBatch,
    StepResult,
    StepStatus,
)

ENGINE = 7
LIVES, MOMENTS = 40, 600
EVERYTHING: Placement = {rank: (tuple(range(8)),) * 2 for rank in range(3)}
Answer = StepResult | BlocksCopied


class _Life:
    """What is on its way, and what has been said so far."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now, self.asked = 0.0, 0
        self.members = {rank: rank + 1 for rank in range(3)}
        self.epoch, self.given_out, self.changed = 0, 3, False
        self.scheduler, self.ranks = Scheduler(SERVED, ENGINE), Ranks(SERVED.block_size)
        self.journal, self.got, self.requests = Journal(), dict[str, list[int]](), dict[str, Request]()
        self.journal.resubmissions(ENGINE, 0.0)
        self.inboxes = {rank: deque[StepBatch | CopyBlocks]() for rank in range(3)}
        self.answers, self.said = deque[Answer](), list[Answer]()
        self.batch: StepBatch | None = None  # the last one
        self.view()

    def view(self) -> None:
        """The next epoch, with whoever is there."""
        self.epoch, self.changed = self.epoch + 1, False
        members = tuple(Member(rank=r, node="a", incarnation=i) for r, i in sorted(self.members.items()))
        self.scheduler.set_view(View(epoch=self.epoch, members=members, placement=EVERYTHING), (), self.now)

    # --- things that happen

    def request(self) -> None:
        """A client asks."""
        self.asked += 1
        prompt = [self.random.randrange(50) for _ in range(self.random.randint(1, 9))]
        tokens = self.random.choice([2, 4, 24])
        request = Request(id=f"r{self.asked}", prompt=prompt, sampling=Sampling(), max_tokens=tokens, ignore_eos=True)
        self.requests[request.id], self.got[request.id] = request, []
        self.take(self.scheduler.submit(self.journal.admit(request, self.now), self.now))

    def resubmit(self) -> None:
        """The gateway's connection broke: it submits all that is open again."""
        for submission in self.journal.resubmissions(ENGINE, self.now):
            self.take(self.scheduler.submit(submission, self.now))

    def step(self) -> None:
        """The engine goes on, if the last step is answered."""
        if not self.scheduler.unanswered:
            if self.changed:
                self.view()
            self.send(self.scheduler.copies(self.now))
            batch = self.scheduler.schedule(self.now)
            if batch is not None:
                self.batch = batch
                self.send([batch])

    def rank(self) -> None:
        """A rank does the oldest thing that it was asked."""
        rank = self.random.choice(list(self.inboxes))
        if not self.inboxes[rank] or rank not in self.members:
            return
        message, incarnation = self.inboxes[rank].popleft(), self.members[rank]
        answer: Answer
        if isinstance(message, CopyBlocks):
            if message.addressee != (rank, incarnation):
                return
            answer = self.ranks.copy(message, piece=2, error="broken" if self.random.random() < 0.05 else "")
        elif self.random.random() < 0.1:
            answer = reply(message, rank, incarnation, [], StepStatus.COVERAGE_LOST, "experts are lost", [2])
        else:
            answer = self.ranks.answer(message, rank, incarnation)
        self.answers.append(answer)
        self.said.append(answer)

    def hear(self) -> None:
        """The engine hears of the oldest answer."""
        if self.answers:
            self.apply(self.answers.popleft())

    def again(self) -> None:
        """What a rank said a while ago comes once more: whether it was heard before or not, it has no effect now."""
        old = [answer for answer in self.said[-40:] if answer not in self.answers]
        if old:
            self.apply(self.random.choice(old))

    def stranger(self) -> None:
        """A rank answers that prepared another view of this number, and was never a member."""
        batch = self.batch
        if batch is None or not self.scheduler.unanswered:
            return
        for rank, chunks in batch.ranks.items():
            nonsense = [SampledToken(chunk.seq, 49) for chunk in chunks if chunk.sample is not None]
            self.apply(reply(batch, rank, 10_000, nonsense))

    def leave(self) -> None:
        """A rank is about to leave, or is not any more."""
        self.scheduler.leave([min(self.members), max(self.members)][: self.random.randint(0, 1)])

    def die(self) -> None:
        """A rank dies; what it had said is still on its way."""
        if len(self.members) > 1:
            rank = self.random.choice(list(self.members))
            del self.members[rank]
            self.inboxes[rank].clear()
            self.scheduler.lose_ranks([rank], self.now)

    def come(self) -> None:
        """A new incarnation takes an empty slot."""
        empty = [rank for rank in range(3) if rank not in self.members]
        if empty:
            self.given_out += 1
            self.members[self.random.choice(empty)] = self.given_out
            self.changed = True

    # --- how

    def send(self, messages: Iterable[StepBatch | CopyBlocks]) -> None:
        """To all ranks, as the engine's queue does."""
        for message in messages:
            for rank in self.members:
                if isinstance(message, CopyBlocks) or rank in message.ranks:
                    self.inboxes[rank].append(message)

    def apply(self, answer: Answer) -> None:
        if isinstance(answer, BlocksCopied):
            self.send(self.scheduler.copied(answer, self.now))
        else:
            self.take(self.scheduler.apply(answer, self.now))

    def take(self, outputs: Iterable[Output]) -> None:
        """The gateway hears of it at once, and the client."""
        for message in outputs:
            require(not isinstance(message, Rejected), f"{message} was refused")
            delta = None if isinstance(message, Rejected) else self.journal.accept(message, self.now)
            if delta is not None:
                got = self.got[message.request_id]
                got += delta.tokens
                right, _ = oracle(self.requests[message.request_id].submission())
                require(got == right[: len(got)], f"request {message.request_id} was altered: {got}, not {right}")

    def live(self) -> None:
        """Things happen; then only what has to, until all requests have ended."""
        usual = [self.step, self.rank, self.rank, self.hear] * 8
        seldom = [
            self.request,
            self.request,
            self.request,
            self.resubmit,
            self.resubmit,
            self.again,
            self.again,
            self.stranger,
            self.leave,
        ]
        seldom += [self.die, self.come, self.come]
        for _ in range(MOMENTS):
            self.now += 0.05
            self.random.choice(usual if self.random.random() < 0.9 else seldom)()
        for _ in range(4000):
            if not len(self.journal):
                break
            self.now += 0.05
            self.random.choice(usual)()
        late = [request.id for request in self.journal.open_requests()]
        require(not late, f"requests {late} never ended")


def steps() -> None:
    """Whatever comes late, twice or from who is gone: each client gets what it should, and gets all of it."""
    for seed in range(LIVES):
        _Life(seed).live()
