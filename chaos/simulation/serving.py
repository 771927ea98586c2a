"""Engines, a gateway and its clients over the simulated world; scheduler, migration, adoption, journal as shipped.

What is modelled here is only what lies between them: ranks that answer or die in a step, engines that look at the store
late or were replaced and do not know, messages that arrive late. A rank follows the newest engine that it has heard of;
a client's stream is what its gateway's journal let through.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random

from msgspec.structs import replace

from chaos.simulation.ranks import EOS, Ranks, oracle, reply
from chaos.simulation.world import CONFIG, Rank, World, require
from elastic.adoption import adoption, leaving, of_member
from elastic.journal import Journal, Request
from elastic.protocol import Rejected, Submit
from elastic.scheduler import Output, Scheduler
from membership.codec import encode
from membership.placement import coverage
from membership.store import Compare, Put
from membership.types import EngineStatus, View
from workers.messages import CopyBlocks, Sampling, StepBatch, StepResult, StepStatus

SERVED = replace(
    CONFIG, block_size=4, kv_blocks=12, max_batched_tokens=9, max_seqs=4, max_model_len=48, eos_token_ids=(EOS,),
    vocab_size=50, coverage_deadline_s=30.0,
)  # fmt: skip


@dataclass
class Engine:
    """One engine process. It knows of the world what it last looked at."""

    token: int
    scheduler: Scheduler
    lost: set[Rank] = field(default_factory=set)
    outbox: deque[Output] = field(default_factory=deque)  # on its way to the gateway

    @property
    def view(self) -> View:
        """The view that it uses."""
        return self.scheduler.view or View(epoch=0)


@dataclass(kw_only=True)
class Served(World):
    """A world in which clients are served. Whatever happens, `check` must hold, and in the end `assert_served`."""

    tokens: int = 0  # that clients got
    refused: int = 0  # requests that ended with a 503: experts were missing for too long
    asked: int = 0
    faults: int = 0
    mortality: float = 0.0  # of a rank in a step

    def __post_init__(self) -> None:
        self.kv = Ranks(self.config.block_size)
        self.engines: list[Engine] = []  # the last is in office, others may not know that they are not
        self.late: list[StepResult] = []
        self.heard: dict[Rank, int] = {}  # rank -> the engine that it follows
        self.journal = Journal()
        self.requests: dict[str, Submit] = {}
        self.outputs: dict[str, list[int]] = {}
        self.ends: dict[str, str] = {}
        super().__post_init__()

    # --- engines

    def start_engine(self) -> None:
        """A new engine takes office; the one before does not know yet."""
        super().start_engine()
        token = self.state.engine_token
        self.engines = [*self.engines[-1:], Engine(token, Scheduler(self.config, token, self.now))]

    def kill_engine(self) -> None:
        """The engine in office dies with all that was on its way; its successor starts."""
        self.engines.pop()
        self.start_engine()

    def engine_acts(self) -> bool:
        """The engine in office looks, runs a step, and is heard."""
        engine = self.engines[-1]
        return any([self.look(engine), self.step(engine), self.deliver(engine)])

    def look(self, engine: Engine) -> bool:
        """The engine reads the store, and says how it stands; whether that is anything new."""
        state, scheduler = self.state, engine.scheduler
        if state.engine_token != engine.token:
            self.engines.remove(engine)  # it was fenced
            return True
        self._hear(engine)
        ready = {rank for rank, token in self.heard.items() if token == engine.token and rank in self.processes}
        engine.lost |= {of_member(m) for m in engine.view.members if of_member(m) in self.gone}
        self._lose(engine, [rank for rank in map(of_member, engine.view.members) if rank not in self.processes])
        newer = adoption(state, engine.view.epoch, ready, engine.lost)
        if newer is not None and not newer.waiting_for:
            scheduler.set_view(newer.view, newer.masked, self.now)
        elif engine.view.epoch:
            scheduler.leave(leaving(engine.view, state))
        engine.outbox.extend(scheduler.expire(self.now))
        return self._report(engine)

    def _report(self, engine: Engine) -> bool:
        """Write the status, if it says something new and the engine is in office still."""
        state, view = self.state, engine.view
        if not view.epoch:
            return False
        staged = state.next is not None and state.next.epoch == view.epoch + 1
        told = EngineStatus(
            token=engine.token,
            epoch=view.epoch,
            masked=tuple(sorted(engine.scheduler.masked)),
            vacated_revision=state.next_revision if staged and not engine.scheduler.waited_for else 0,
        )
        if told == state.engine_status:
            return False
        fence = Compare(self.keys.engine, "create", "=", engine.token)
        return self.store.txn([fence], [Put(self.keys.engine_status, encode(told))]).succeeded

    def _hear(self, engine: Engine) -> None:
        """Ranks join the newest engine's queues; they never go back to an older one."""
        for rank in self.processes:
            self.heard[rank] = max(self.heard.get(rank, 0), engine.token)

    def _lose(self, engine: Engine, ranks: Iterable[Rank]) -> None:
        """The engine notices deaths, by futex or pidfd: it masks the ranks at once."""
        gone = [rank for rank in ranks if rank[0] not in engine.scheduler.masked]
        engine.lost.update(gone)
        engine.scheduler.lose_ranks([rank for rank, _ in gone], self.now)

    def step(self, engine: Engine, chance: Random | None = None) -> bool:
        """One step of an engine, in which ranks may die before or after they answer. Whether it ran one."""
        scheduler = engine.scheduler
        members = dict(map(of_member, engine.view.members))
        if not scheduler.unanswered:
            self._copy(engine, scheduler.copies(self.now))
            batch = scheduler.schedule(self.now)
            if batch is None:
                return False
            self._run(engine, batch, members, chance)
        self._lose(engine, [(r, members[r]) for r in scheduler.unanswered if (r, members[r]) not in self.processes])
        return True

    def _run(self, engine: Engine, batch: StepBatch, members: dict[int, int], chance: Random | None) -> None:
        for rank in batch.ranks:
            key = (rank, members[rank])
            if key not in self.processes or self.heard.get(key) != engine.token:
                continue  # dead, or it follows another engine: it drops the batch
            fate = self._fate(engine, key, chance)
            if fate == "dies":
                continue
            alive = [r for r in members if (r, members[r]) in self.processes and r not in batch.masked]
            whole = coverage(engine.view.placement, alive, self.config.experts).min_live_replicas >= 1
            dead = [r for r in members if r not in alive and r not in batch.masked]
            if whole:
                answer = self.kv.answer(batch, rank, key[1])
            else:  # the commit gate: no token without every expert
                answer = reply(batch, rank, key[1], [], StepStatus.COVERAGE_LOST, "experts are lost", dead)
            if fate == "hangs":
                self.late.append(answer)
                self._lose(engine, [key])
            else:
                engine.outbox.extend(engine.scheduler.apply(answer, self.now))

    def _fate(self, engine: Engine, key: Rank, chance: Random | None) -> str:
        """What becomes of a rank in a step: it may die before or after it answers, or hang and be given up alive."""
        fate = chance.random() if chance is not None else 1.0
        if chance is None or fate >= self.mortality:
            return ""
        self.faults += 1
        if fate < 0.3 * self.mortality:
            return "hangs"
        self.kill(key[0], backoff_s=chance.choice([0.0, 0.3]))
        return "dies" if fate < 0.7 * self.mortality else ""

    def speak_late(self) -> None:
        """Whoever was given up alive wakes, and says what it had to say: nobody may heed it."""
        for answer in self.late:
            for engine in self.engines:
                require(not engine.scheduler.apply(answer, self.now), f"a late answer of rank {answer.rank} was heeded")
        self.late.clear()

    def _copy(self, engine: Engine, orders: Iterable[CopyBlocks]) -> None:
        """Ranks copy KV blocks at once, or never if they are dead."""
        waiting = deque(orders)
        while waiting:
            order = waiting.popleft()
            if order.addressee in self.processes and self.heard.get(order.addressee) == engine.token:
                waiting.extend(engine.scheduler.copied(self.kv.copy(order, piece=2), self.now))

    # --- the gateway and its clients

    def request(self, prompt: list[int], max_tokens: int) -> None:
        """A client asks for something."""
        self.asked += 1
        request = Request(id=f"r{self.asked}", prompt=prompt, sampling=Sampling(), max_tokens=max_tokens)
        self.requests[request.id], self.outputs[request.id] = request.submission(), []
        self._submit([self.journal.admit(request, self.now)])

    def deliver(self, engine: Engine, most: int = 1 << 30) -> bool:
        """The oldest messages of an engine reach the gateway; whether anything came of it."""
        turned = engine is self.engines[-1] and self.journal.engine_token != engine.token
        if turned:
            self._submit(self.journal.resubmissions(engine.token, self.now))
        count = min(most, len(engine.outbox))
        for _ in range(count):
            self._take(engine.outbox.popleft())
        return turned or bool(count)

    def reconnect(self) -> bool:
        """The gateway's connection breaks: it submits everything again; what was on its way may come all the same."""
        if self.journal.engine_token == self.engines[-1].token:
            self._submit(self.journal.resubmissions(self.journal.engine_token, self.now))
            return len(self.journal) > 0
        return False

    def _submit(self, submissions: Iterable[Submit]) -> None:
        engine = self.engines[-1]
        if self.journal.engine_token == engine.token:
            for submission in submissions:
                engine.outbox.extend(engine.scheduler.submit(submission, self.now))

    def _take(self, message: Output) -> None:
        name = message.request_id
        if isinstance(message, Rejected):
            if self.journal.reject(message):
                require(message.status == 503, f"request {name} ended with {message.status}: {message.message}")
                self.ends[name] = "refused"
                self.refused += 1
            return
        delta = self.journal.accept(message, self.now)
        if delta is not None:
            require(name not in self.ends, f"request {name} goes on after its end")
            self.outputs[name] += delta.tokens
            self.tokens += len(delta.tokens)
            expected, _ = oracle(self.requests[name])
            right = expected[: len(self.outputs[name])] == self.outputs[name]
            require(right, f"request {name} was altered: {self.outputs[name]}, not {expected}")
            if delta.finish_reason:
                self.ends[name] = delta.finish_reason

    def assert_served(self) -> None:
        """Every request has ended as it should, or was refused for missing experts."""
        for name, request in self.requests.items():
            require(name in self.ends, f"request {name} was lost after {len(self.outputs[name])} tokens")
            got = (self.outputs[name], self.ends[name])
            require(self.ends[name] == "refused" or got == oracle(request), f"request {name} ended as {got}")
