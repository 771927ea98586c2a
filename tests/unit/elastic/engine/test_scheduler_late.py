"""One engine and three ranks whose messages take time: old answers come again, ranks die, leave and come back.

Steps and copies are under way while other things happen (in `test_scheduler_random.py` each is over before the next).
The ranks are a model of KV caches that notices what was computed over another sequence's cells.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from random import Random

import pytest
from msgspec.structs import replace

from chaos.simulation.kv_model import KvModel, oracle, reply
from elastic.engine.scheduler import Output, Scheduler
from elastic.gateway.journal import Journal, Request
from elastic.protocol import Rejected, Submit, Tokens
from membership.store.records import Member, Placement, View
from tests.support.rank_model import config
from workers.protocol.messages import (
    BlocksCopied,
    CopyBlocks,
    SampledToken,
    Sampling,
    StepBatch,
    StepResult,
    StepStatus,
)

pytestmark = pytest.mark.unit

ENGINE = 7
CONFIG = replace(config(kv_blocks=60, max_seqs=6), experts=8)
EVERYTHING: Placement = {rank: (tuple(range(8)),) * 2 for rank in range(3)}
EVENTS, DRAIN_EVENTS = 600, 4000
STRANGER = 10_000  # an incarnation that was never a member
Answer = StepResult | BlocksCopied


class Cluster:
    """The scheduler, a gateway's journal, and the messages on their way between engine and ranks."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now, self.asked = 0.0, 0
        self.members = {rank: rank + 1 for rank in range(3)}
        self.epoch, self.incarnation, self.changed = 0, 3, False
        self.scheduler, self.ranks = Scheduler(CONFIG, ENGINE), KvModel(CONFIG.block_size)
        self.journal, self.got, self.requests = Journal(), dict[str, list[int]](), dict[str, Request]()
        self.journal.resubmissions(ENGINE, 0.0)
        self.inboxes = {rank: deque[StepBatch | CopyBlocks]() for rank in range(3)}
        self.answers, self.answered = deque[Answer](), list[Answer]()
        self.last_batch: StepBatch | None = None
        self.commit_view()

    def commit_view(self) -> None:
        self.epoch, self.changed = self.epoch + 1, False
        members = tuple(Member(rank=r, node="a", incarnation=i) for r, i in sorted(self.members.items()))
        self.scheduler.set_view(View(epoch=self.epoch, members=members, placement=EVERYTHING), (), self.now)

    # --- events

    def client_asks(self) -> None:
        self.asked += 1
        prompt = [self.random.randrange(50) for _ in range(self.random.randint(1, 9))]
        tokens = self.random.choice([2, 4, 24])
        request = Request(id=f"r{self.asked}", prompt=prompt, sampling=Sampling(), max_tokens=tokens, ignore_eos=True)
        self.requests[request.id], self.got[request.id] = request, []
        self.deliver(self.scheduler.submit(self.journal.admit(request, self.now), self.now))

    def gateway_reconnects(self) -> None:
        for submission in self.journal.resubmissions(ENGINE, self.now):
            self.deliver(self.scheduler.submit(submission, self.now))

    def engine_steps(self) -> None:
        if self.scheduler.unanswered:
            return
        if self.changed:
            self.commit_view()
        self.send(self.scheduler.copies(self.now))
        batch = self.scheduler.schedule(self.now)
        if batch is not None:
            self.last_batch = batch
            self.send([batch])

    def rank_works(self) -> None:
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
        self.answered.append(answer)

    def answer_arrives(self) -> None:
        if self.answers:
            self.apply(self.answers.popleft())

    def old_answer_arrives_again(self) -> None:
        old = [answer for answer in self.answered[-40:] if answer not in self.answers]
        if old:
            self.apply(self.random.choice(old))

    def stranger_answers(self) -> None:
        """A rank that prepared another view of this number, and was never a member."""
        batch = self.last_batch
        if batch is None or not self.scheduler.unanswered:
            return
        for rank, chunks in batch.ranks.items():
            nonsense = [SampledToken(chunk.seq, 49) for chunk in chunks if chunk.sample is not None]
            self.apply(reply(batch, rank, STRANGER, nonsense))

    def rank_is_to_leave(self) -> None:
        """Or none is any more."""
        self.scheduler.leave([min(self.members), max(self.members)][: self.random.randint(0, 1)])

    def rank_dies(self) -> None:
        """What it has answered is still on its way."""
        if len(self.members) > 1:
            rank = self.random.choice(list(self.members))
            del self.members[rank]
            self.inboxes[rank].clear()
            self.scheduler.lose_ranks([rank], self.now)

    def rank_comes(self) -> None:
        empty = [rank for rank in range(3) if rank not in self.members]
        if empty:
            self.incarnation += 1
            self.members[self.random.choice(empty)] = self.incarnation
            self.changed = True

    # --- messages

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
            self.deliver(self.scheduler.apply(answer, self.now))

    def deliver(self, outputs: Iterable[Output]) -> None:
        """To the gateway and its client at once."""
        for message in outputs:
            assert not isinstance(message, Rejected), message
            delta = self.journal.accept(message, self.now)
            if delta is not None:
                got = self.got[message.request_id]
                got += delta.tokens
                right, _ = oracle(self.requests[message.request_id].submission())
                assert got == right[: len(got)], f"request {message.request_id} was altered"

    def run(self) -> None:
        usual: list[Callable[[], None]] = [self.engine_steps, self.rank_works, self.rank_works, self.answer_arrives]
        rare: list[Callable[[], None]] = [
            *[self.client_asks] * 3,
            *[self.gateway_reconnects] * 2,
            *[self.old_answer_arrives_again] * 2,
            self.stranger_answers,
            self.rank_is_to_leave,
            self.rank_dies,
            *[self.rank_comes] * 2,
        ]
        for _ in range(EVENTS):
            self.now += 0.05
            self.random.choice(usual if self.random.random() < 0.9 else rare)()
        for _ in range(DRAIN_EVENTS):
            if not len(self.journal):
                break
            self.now += 0.05
            self.random.choice(usual)()
        assert not self.journal.open_requests(), "requests never ended"


@pytest.mark.parametrize("seed", range(12))
def test_each_client_gets_all_of_its_tokens_whatever_comes_late_or_twice(seed: int) -> None:
    Cluster(seed).run()


def test_answers_of_all_earlier_steps_and_engines_have_no_effect() -> None:
    """Each answer that a rank ever gave comes again, to the same engine and to the one after it."""
    view = View(epoch=1, members=(Member(rank=0, node="a", incarnation=1),), placement={0: EVERYTHING[0]})
    answered: list[StepResult] = []
    for token in (ENGINE, ENGINE + 2):
        scheduler, ranks, got = Scheduler(CONFIG, token), KvModel(CONFIG.block_size), dict[str, list[int]]()
        scheduler.set_view(view, (), 0.0)
        requests = [
            Submit(f"r{n}", [token, *range(9 * n)], Sampling(), max_tokens=9, ignore_eos=True) for n in range(3)
        ]
        outputs = [output for request in requests for output in scheduler.submit(request, 0.0)]
        while (batch := scheduler.schedule(0.0)) is not None:
            for old in answered:
                if (old.engine_token, old.step) != (batch.engine_token, batch.step):
                    outputs += scheduler.apply(old, 0.0)
            answer = ranks.answer(batch, 0, 1)
            outputs += scheduler.apply(answer, 0.0)
            answered.append(answer)
            assert len(answered) < 200, "the requests do not finish"
        for output in outputs:
            assert isinstance(output, Tokens)
            got.setdefault(output.request_id, []).extend(output.tokens)
        assert got == {request.request_id: oracle(request)[0] for request in requests}
