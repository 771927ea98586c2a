"""What a client reads: whatever is lost, repeated or late on the way, its stream is the one that it should be."""

from __future__ import annotations

from random import Random

from chaos.mutants.checks.promise import require
from chaos.mutants.checks.serving import SERVED
from chaos.simulation.ranks import Ranks, oracle
from elastic.engine.scheduler import Output, Scheduler
from elastic.gateway.journal import Journal, Request
from elastic.protocol import Rejected, Submit, Tokens
from membership.base.errors import JournalError
from membership.store.records import Member, View
from workers.protocol.messages import Sampling, StepBatch, StepResult

ENGINE, FORMER = 7, 5


def journal() -> None:
    """Messages of the engine are lost, repeated and swapped; a former engine has its say too. What the client has is
    always the beginning of what it should get, and only its own engine ends it.
    """
    random = Random(1)
    for _ in range(300):
        truth = [random.randrange(50) for _ in range(20)]
        book, got, ended = Journal(), list[int](), False
        book.admit(Request(id="r", prompt=[1], sampling=Sampling(), max_tokens=len(truth)), 0.0)
        book.resubmissions(ENGINE, 0.0)
        sent = [Tokens(ENGINE, "r", i, truth[i : i + 2]) for i in range(0, 20, 2)]
        for message in _disturbed(sent, random):
            if random.random() < 0.2:
                other = [random.randrange(50) for _ in range(2)]
                require(book.accept(Tokens(FORMER, "r", len(got), other), 0.0) is None, "a former engine was heard")
                require(not book.reject(Rejected(FORMER, "r", 500, "no")), "a former engine ended a request")
            try:
                delta = book.accept(message, 0.0)
            except JournalError:
                continue  # refused: the stream goes on once the request was submitted again
            if delta is not None:
                require(not ended, "a stream goes on after its end")
                got += delta.tokens
                ended = bool(delta.finish_reason)
            require(got == truth[: len(got)], f"the client has {got}, not the beginning of {truth}")
            require(ended == (len(got) == len(truth)), f"ended is {ended} after {len(got)} of {len(truth)} tokens")


def _disturbed(sent: list[Tokens], random: Random) -> list[Tokens]:
    arrives = [message for message in sent for _ in range(random.choice([1, 1, 1, 1, 0, 2]))]
    for at in range(len(arrives) - 1):
        if random.random() < 0.1:
            arrives[at], arrives[at + 1] = arrives[at + 1], arrives[at]
    return arrives


def late_answers() -> None:
    """Every answer that a rank ever gave comes again, later, to the same engine and to the one after it."""
    view = View(epoch=1, members=(Member(rank=0, node="a", incarnation=1),), placement={0: ((*range(8),),) * 2})
    said: list[StepResult] = []
    for token in (ENGINE, ENGINE + 2):
        scheduler, ranks, got = Scheduler(SERVED, token), Ranks(SERVED.block_size), dict[str, list[int]]()
        scheduler.set_view(view, (), 0.0)
        requests = [
            Submit(
                request_id=f"r{n}", prompt=[token, *range(9 * n)], sampling=Sampling(), max_tokens=9, ignore_eos=True
            )
            for n in range(3)
        ]
        for request in requests:
            _note(scheduler.submit(request, 0.0), got)
        for _ in range(100):
            batch = scheduler.schedule(0.0)
            if batch is None:
                break
            for answer in said:
                if _other(answer, batch):
                    _note(scheduler.apply(answer, 0.0), got)
            answer = ranks.answer(batch, 0, 1)
            _note(scheduler.apply(answer, 0.0), got)
            said.append(answer)
        for request in requests:
            right, _ = oracle(request)
            require(got.get(request.request_id) == right, f"{got.get(request.request_id)} came of it, not {right}")


def _other(answer: StepResult, batch: StepBatch) -> bool:
    return (answer.engine_token, answer.step) != (batch.engine_token, batch.step)


def _note(outputs: list[Output], got: dict[str, list[int]]) -> None:
    for output in outputs:
        if isinstance(output, Tokens):
            got.setdefault(output.request_id, []).extend(output.tokens)


def draws() -> None:
    """A seeded stream is the same alone and among others, and when its steps are run again elsewhere."""
    import torch

    from workers.model.sampler import sample

    logits = torch.randn(12, 40, generator=torch.Generator().manual_seed(3))
    settings = [Sampling(temperature=1.3, seed=11), *[Sampling(temperature=1.0, seed=n) for n in range(3)]]

    def stream(company: int, at: int) -> list[int]:
        """The first request's tokens at 12 positions, each step with some others, as row number `at`."""
        tokens = []
        for position in range(12):
            order = [*range(1, company + 1)]
            order.insert(at, 0)
            rows = torch.stack([logits[(position + 5 * who) % 12] for who in order])
            drawn = sample(rows, [settings[who] for who in order], [position + 30 * who for who in order])
            tokens.append(drawn[at][0])
        return tokens

    alone = stream(0, 0)
    require(len(set(alone)) > 3, f"nothing was drawn: {alone}")
    require(alone == stream(0, 0), "the same steps gave other tokens when they were run again")
    require(alone == stream(3, 2), "a stream depends on who else is in its step")
