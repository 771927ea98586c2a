"""What runs next, where, and what the answers mean: continuous batching over all ranks as pure bookkeeping.

No I/O, no clock, no threads: the engine passes events and `now` in and gets messages out. A step is idempotent, so
an answer other than OK changes nothing here, and the same chunk is simply scheduled again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from itertools import count

from elastic.engine.home_choice import unwelcome
from elastic.engine.kv_blocks import BlockPool, blocks_for
from elastic.engine.migration import Migration, Moved
from elastic.engine.prefix import Contents
from elastic.engine.reserve import Reserve
from elastic.engine.salvage import Salvage
from elastic.engine.sequence import Home, Runs, Sequence, is_complete, refusal, split_by_kind
from elastic.engine.step_budget import StepBudget, Work, shares
from elastic.engine.step_time import StepTime
from elastic.engine.turns import OUTPUT_COST
from elastic.engine.waiting import Shed, WaitingRoom
from elastic.protocol import EndToken, Rejected, Submit, Tokens
from membership.base.enums import Homes
from membership.base.errors import ElasticError
from membership.base.rank_id import RankId
from membership.base.timing import RETRY_AFTER_S
from membership.store.records import ClusterConfig, View
from workers.protocol import step_fence
from workers.protocol.messages import (
    BlocksCopied,
    CopyBlocks,
    Known,
    SampledToken,
    SeqChunk,
    StepBatch,
    StepResult,
    StepStatus,
)

Output = Tokens | Rejected

MAX_FAILURES = 3  # FAILED answers in a row, while running alone on its rank, before a rank gives a request up
MAX_FAILED_RANKS = 2  # processes that may try, or end over it: the first one may itself be at fault
_BACKOFF_S, _BACKOFF_MAX_S = 0.001, 0.1


def uncovered(view: View, masked: Iterable[int], config: ClusterConfig) -> int:
    """How many (layer, expert) pairs have no usable owner."""
    usable = set(view.ranks) - set(masked)
    owners = [layers for rank, layers in view.placement.items() if rank in usable]
    return sum(
        config.experts - len(set[int]().union(*(layers[layer] for layers in owners)))
        for layer in range(config.moe_layers)
    )


def _new(sequence: Sequence) -> bool:
    """Whether no client has had a token of it: others are streams that were interrupted, and go first."""
    return not sequence.emitted


class Scheduler:
    """Requests, KV blocks and the step in flight. One step at a time; every rank with chunks answers or is lost."""

    def __init__(self, config: ClusterConfig, engine_token: int, now: float = 0.0) -> None:
        self.config = config
        self.token = engine_token
        self.view: View | None = None
        self.masked: set[int] = set()
        self.step = 0
        self.attempt = 0
        self.uncovered = config.moe_layers * config.experts
        self._held_since: float | None = now  # since when no step may run at all
        self._covered_since = now  # since when they may, or could last
        self._homes: dict[int, Home] = {}
        copies = count(1)
        self._migration = Migration(config, engine_token, copies)
        self._salvage = Salvage(config, engine_token, copies)
        self._sequences: dict[str, Sequence] = {}  # by request id
        self._waiting = WaitingRoom(config)
        self._given_up: list[Output] = []  # since the last `expire`
        self._reserve = Reserve(config)
        self._budget = StepBudget(config.step_budget_s, config.max_batched_tokens)
        self._serving: set[int] = set()  # ranks without chunks that owe an answer, too
        self._under_way: tuple[Work, float] | None = None  # the step in flight, if its time will mean something
        self._begun: Work | None = None  # the last step, until it is known that it took too long
        self._step_time = StepTime()
        self._block_size = config.block_size
        self._arrivals = 0
        self._contents = Contents(config, "")
        self._holding: dict[RankId, Known] = {}  # of ranks that are not used yet
        self.queried_tokens = 0  # of requests that were given a home
        self.preemptions = 0  # requests that lost their blocks to older ones
        self.cached_tokens = 0  # of those, the ones that the home had already
        self.salvaged_tokens = 0  # of those, the ones that it read from a dead rank's pool

    # ---- membership

    def set_view(self, view: View, masked: Iterable[int], now: float, model: str = "") -> list[str]:
        """Use `view` from the next step on. Returns the requests that lose their home.

        KV caches stay with their ranks: only ranks that left, were masked or come back as another incarnation are lost.
        `model` names what is served by content, which no view of an engine's term changes.
        """
        if self.view is None:
            self._contents = Contents(self.config, model)
        self.view, self.masked = view, {rank for rank in masked if view.member(rank)}
        kept = {m.rank: m for m in view.members if m.rank not in self.masked}
        stay = {m.id for m in kept.values()}
        moved = self._evict(home for home in self._homes.values() if home.rank_id not in stay)
        for rank, member in sorted(kept.items()):
            if rank not in self._homes:
                self._homes[rank] = Home(rank, member.incarnation, self._pool(member.id), member.node)
        self._review_coverage(now)
        return moved

    def _pool(self, rank: RankId) -> BlockPool:
        pool = BlockPool(self.config.kv_blocks, self.config.block_size)
        pool.restore(self._holding.pop(rank, {}))
        return pool

    def holds(self, rank: RankId, known: Known) -> None:
        """A rank that served an engine before us has said what its blocks hold; it is in no view of ours yet."""
        if self.config.prefix_cache:
            self._holding[rank] = known

    def held_by(self, rank: RankId) -> int:
        """How many of its blocks hold something that is known from before us, until it is used."""
        return len(self._holding.get(rank, ()))

    def overran(self) -> None:
        """A rank that still computed, as far as could be seen, owed its answer to the step for too long."""
        if self._begun is not None and self.unanswered:
            self._budget.overran(self._begun)
            self._begun = None

    def lose_ranks(self, ranks: Iterable[int], now: float, *, ended: bool = False) -> list[str]:
        """Mask ranks of the view for good. Returns their requests, which wait at the front to be computed elsewhere.

        `ended`: their processes have certainly ended, so that what they had computed can be read from their pools.
        """
        self._under_way = None
        gone = set(ranks) & set(self.view.ranks if self.view else ())
        self.masked |= gone
        moved = self._evict((home for home in self._homes.values() if home.rank in gone), ended=ended)
        self._step_time.left(now, len(self._homes))
        self._review_coverage(now)
        return moved

    def _evict(self, homes: Iterable[Home], *, ended: bool = False) -> list[str]:
        moved = []
        for home in list(homes):
            del self._homes[home.rank]
            self._serving.discard(home.rank)  # else its successor would owe that answer
            if (suspect := home.suspect) is not None:
                suspect.failed_on.add(home.rank_id)
                if len(suspect.failed_on) >= MAX_FAILED_RANKS:
                    self._given_up.append(self._reject(suspect, 500, "ranks failed on this request alone and ended"))
            for sequence in home.running.copy():
                if ended:
                    self._salvage.lose(home, sequence)
                self._requeue(sequence)
                moved.append(sequence.request.request_id)
        return moved

    # ---- ranks that are about to leave

    def leave(self, ranks: Iterable[int]) -> None:
        """These ranks of the view are not in the next one: they get no new requests, and theirs move to the others."""
        self._migration.leave(ranks)

    @property
    def waited_for(self) -> set[int]:
        """Leaving ranks with requests that may still be moved with their KV blocks."""
        return self._migration.waited_for(self._homes)

    def copies(self, now: float) -> list[CopyBlocks]:
        """Copies to send to ranks before the next step. What has lost its home has another by then, if it fits."""
        return self._migration.orders(self._homes, now) + self.reads(now)

    def reads(self, now: float) -> list[CopyBlocks]:
        """Those of what dead ranks have left. Also beside a step, save on ranks that may still write into blocks that
        are free again, as a request of theirs in it has lost its home."""
        homes, amid = self._homes.values(), bool(self.unanswered)
        writing = {home.rank for home in homes if any(each.home is not home for each, _ in home.in_flight)}
        if self._salvage.reading and not self.held:
            (self._admit_readers if amid else self._admit)(now)
        return self._salvage.orders(self._homes, now, amid=amid, writing=writing)

    def copies_wait_s(self, now: float) -> float:
        """How long the next step waits at most for what a dead rank has left, so that its requests are in it."""
        return self._salvage.wait_s(now, self._step_time.expected_s(len(self._homes)))

    def copied(self, answer: BlocksCopied, now: float) -> list[CopyBlocks]:
        """Handle a copy's answer; return the next copies to send."""
        moves = self._migration.take(answer, self._homes, now)
        self._salvage.take(answer, self._homes, now)
        return moves + self.reads(now)

    def moved(self) -> list[Moved]:
        """Requests that have moved with their blocks since the last call."""
        moved, self._migration.moved = self._migration.moved, []
        return moved

    def salvaged(self) -> list[Moved]:
        """What need not be computed again since a rank died, since the last call."""
        done, self._salvage.done = self._salvage.done, []
        self.salvaged_tokens += sum(each.tokens for each in done)
        return done

    @property
    def reading(self) -> tuple[RankId, ...]:
        """Dead ranks whose KV pools are still needed."""
        return tuple(sorted(self._salvage.reading))

    def _review_coverage(self, now: float) -> None:
        if self.view is not None:
            self.uncovered = uncovered(self.view, self.masked, self.config)
        if self._homes and not self.uncovered:
            self._covered_since = now if self.held else self._covered_since
            self._held_since = None
        elif self._held_since is None:
            self._held_since = now

    # ---- requests

    @property
    def running(self) -> int:
        """How many requests have a home."""
        return len(self._sequences) - len(self._waiting)

    @property
    def waiting(self) -> int:
        """How many requests wait for room."""
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """How many tokens those have."""
        return self._waiting.tokens

    @property
    def shed(self) -> dict[str, int]:
        """Why -> how many requests were refused for want of room."""
        return dict(self._waiting.shed)

    @property
    def kv_usage(self) -> float:
        """Part of all ranks' KV blocks that requests use."""
        pools = [home.pool for home in self._homes.values()]
        return round(sum(pool.used for pool in pools) / max(1, sum(pool.size for pool in pools)), 4)

    @property
    def held(self) -> bool:
        """Whether no step may run, because some expert has no usable owner."""
        return self._held_since is not None

    def knows(self, request_id: str) -> bool:
        """Whether the request is still under way."""
        return request_id in self._sequences

    def number_of(self, request_id: str) -> int:
        """Its sequence's number in steps; 0 if the request is not under way."""
        sequence = self._sequences.get(request_id)
        return sequence.seq if sequence is not None else 0

    def submit(self, request: Submit, now: float) -> list[Output]:
        """Take a request on; an earlier one with the same id is dropped."""
        self.abort(request.request_id)
        if refused := refusal(request, self.config, self.token):
            return [refused]
        if len(request.emitted) >= request.max_tokens:
            return [Tokens(self.token, request.request_id, len(request.emitted), [], finish_reason="length")]
        if self._waiting.full(request) and not self.held and self.view is not None:
            self._admit(now)  # what has arrived since the last step does not wait yet
        shed = self._waiting.full(request)
        self._arrivals += 1
        sequence = Sequence.of(request, self._arrivals, now)
        self._sequences[request.request_id] = sequence
        self._waiting.turns.begin(request.key)
        self._waiting.add(sequence)
        if shed and not self._passes(sequence, now):
            self._forget(sequence)
            return [self._shed(request.request_id, shed, now)]
        return []

    def _passes(self, sequence: Sequence, now: float) -> bool:
        """Whether it has found a reserved place, before all that wait."""
        first = self._waiting.first
        if first is None or self.view is None or self.held or not self._reserve.guests([sequence], first):
            return False
        return self._place(sequence, now, guest=True)

    def abort(self, request_id: str) -> None:
        """Forget a request, if it is known. Its chunk in flight has no effect any more."""
        sequence = self._sequences.get(request_id)
        self._given_up = [each for each in self._given_up if each.request_id != request_id]
        if sequence is not None:
            self._forget(sequence)

    def expire(self, now: float, relief_at: float = -math.inf) -> list[Output]:
        """Reject what has ended ranks, or has waited for too long: for a place, or for lost experts since they were
        last on their way."""
        expired = []
        for sequence in self._sequences.values():
            since = now if sequence.stalled_since is None else max(sequence.stalled_since, self._covered_since)
            if self._held_since is not None:
                since = max(min(since, max(self._held_since, sequence.submitted)), relief_at)
            if now - since >= self.config.coverage_deadline_s:
                expired.append(sequence)
        message = f"experts were not available for {self.config.coverage_deadline_s:g} s"
        rejected, self._given_up = self._given_up, list[Output]()
        rejected += [self._reject(sequence, 503, message, RETRY_AFTER_S) for sequence in expired]
        for sequence in [] if self.held else self._waiting.late(now, self._covered_since):
            self._forget(sequence)
            rejected.append(self._shed(sequence.request.request_id, Shed.WAIT, now))
        return rejected

    def _shed(self, request_id: str, why: Shed, now: float) -> Rejected:
        """Refuse a request for want of room."""
        self._waiting.shed[why] += 1
        waiting, retry_after_s = len(self._waiting), self._waiting.retry_after_s(now)
        if self.held:
            return Rejected(self.token, request_id, 503, f"{waiting} requests wait for lost experts", retry_after_s)
        late = f" for {self.config.max_wait_s:g} s, as it did" if why is Shed.WAIT else ""
        message = f"overloaded: {waiting} requests of {self._waiting.tokens} tokens wait for a place{late}"
        return Rejected(self.token, request_id, 429, message, retry_after_s)

    def _forget(self, sequence: Sequence) -> None:
        if sequence.home is None:
            self._waiting.remove(sequence)
        sequence.leave()
        sequence.left = None
        self._waiting.turns.end(sequence.request.key)
        del self._sequences[sequence.request.request_id]

    def _reject(self, sequence: Sequence, status: int, message: str, retry_after_s: float = 0.0) -> Rejected:
        self._forget(sequence)
        return Rejected(self.token, sequence.request.request_id, status, message, retry_after_s)

    def _requeue(self, sequence: Sequence) -> None:
        """Back to the queue, in order of arrival: that is before everything that has not run yet."""
        sequence.leave()
        self._waiting.add(sequence)

    # ---- steps

    @property
    def unanswered(self) -> set[int]:
        """Ranks that have not answered the step in flight."""
        return {home.rank for home in self._homes.values() if home.in_flight or home.rank in self._serving}

    def served_by(self, ranks: Iterable[int]) -> None:
        """These ranks have no chunks in the step that begins, but run it, too, and answer."""
        self._serving = set(ranks)

    def next_retry(self) -> float | None:
        """When a rank that backs off may be tried again, if any does."""
        return min((home.retry_at for home in self._homes.values() if home.setbacks), default=None)

    def schedule(self, now: float) -> StepBatch | None:
        """The next step, or None if there is nothing to run or no rank to run it."""
        if self.unanswered:
            raise ElasticError(f"step {self.step} is not answered by ranks {sorted(self.unanswered)}")
        if self.view is None or self.held:
            return None
        self._migration.review(self._homes, now)
        self._salvage.review(self._homes, now)
        self._admit(now)
        able = [home for home in self._homes.values() if home.running and home.retry_at <= now]
        split = [split_by_kind(home.running) for home in able]
        prompting, decodes = sum(bool(each.prompts) for each in split), max((len(s.decoding) for s in split), default=0)
        prompt_tokens = self._budget.tokens(decodes, prompting, alone=len(self._sequences) == 1)
        ranks: dict[int, list[SeqChunk]] = {}
        for home, each in zip(able, split, strict=True):
            self._fill(home, each, prompt_tokens)
            if home.in_flight:
                ranks[home.rank] = [chunk for _, chunk in home.in_flight]
        if not ranks:
            return None
        self._begun = self._work()
        self._under_way = self._begun, now
        self._step_time.begin(now, len(self._homes))
        self._salvage.stepped()
        self.step += 1
        self.attempt = max(self._homes[rank].setbacks for rank in ranks)
        known = {home.rank: news for home in self._homes.values() if (news := home.pool.news())}
        return StepBatch(self.token, self.view.epoch, self.step, self.attempt, sorted(self.masked), ranks, known)

    def _admit(self, now: float) -> None:
        """Give waiting requests homes, in turns, as long as the first fits somewhere; then reserved ones."""
        while (first := self._waiting.first) and self._place(first, now):
            continue
        if first is not None and any(map(self._reserve.unused, self._homes.values())):
            guests = self._reserve.guests(self._waiting, first)
            while guests and self._place(turn := self._waiting.first_of(guests), now, guest=True):
                guests.remove(turn)

    def _admit_readers(self, now: float) -> None:
        """Beside a step only those that can go on with what a dead rank has left, and only where it is: what is full
        there may be free when the step ends, and till then nothing else can be done for them."""
        homes, left = self._homes.values(), [each for each in self._waiting if each.left is not None]
        for sequence in [each for each in left if any(self._salvage.promised(each, home) for home in homes)]:
            if not self._place(sequence, now, reading=True):
                return

    def _place(self, sequence: Sequence, now: float, *, guest: bool = False, reading: bool = False) -> bool:
        """Give a waiting request a home; False if it fits nowhere, or `reading` nowhere where it has something left.

        A home must have blocks for all tokens known so far, plus one spare for each sequence there, so that what is
        admitted is not thrown out again by the next few decode steps. What a home has of the request's beginning is not
        computed again, save the last token: only computing it yields the next one.
        """
        size = self.config.block_size
        blocks = blocks_for(len(sequence.tokens), size)
        most = 0 if sequence.unscored else (len(sequence.tokens) - 1) // size
        reusable = self._contents.extend(sequence.names, sequence.tokens)[:most]
        shared = {home.rank: home.pool.find(reusable) for home in self._homes.values()}
        every = self._homes.values()
        homes = [home for home in every if home.rank not in self._migration.leaving] or every
        fitting = [
            home
            for home in [home for home in homes if home.rank_id not in sequence.failed_on] or homes
            if (not reading or self._salvage.promised(sequence, home))
            and self._reserve.fits(
                home, home.pool.cost(blocks, shared[home.rank]), self._migration.arriving(home), guest=guest
            )
        ]
        if not fitting:
            return False
        there = {h.rank: max(size * len(shared[h.rank]), self._salvage.promised(sequence, h)) for h in fitting}
        on_host = Counter[str]()
        for each in self._homes.values():
            on_host[each.node] += len(each.running)
        home = min(fitting, key=lambda home: unwelcome(home, sequence, there[home.rank], on_host[home.node]))
        cached = len(shared[home.rank]) * size
        self._waiting.place(sequence, cached, now)
        sequence.enter(home, home.pool.take(blocks, shared[home.rank]), cached, now)
        sequence.guest = guest
        self._salvage.begin(sequence, home, now)
        self.queried_tokens += len(sequence.tokens)
        self.cached_tokens += cached
        return True

    def _fill(self, home: Home, runs: Runs, prompt_tokens: int) -> None:
        """Choose the rank's chunks: first all that decode, then `prompt_tokens` of prompts, in fair shares.

        A sequence whose chunk failed runs alone until it succeeds or is rejected: others must not fail with it.
        """
        if (suspect := next((sequence for sequence in home.running if sequence.failures), None)) is not None:
            runs = split_by_kind([suspect])
        if self._migration.busy or self._salvage.busy:
            every = (*runs.decoding, *runs.prompts)
            runs = split_by_kind(s for s in every if not self._migration.pauses(s) and not self._salvage.pauses(s))
        for sequence in runs.decoding[: self.config.max_batched_tokens]:
            self._begin(home, sequence, 1)
        prompts = sorted((each for each in runs.prompts if each.home is home), key=_new)
        budget = min(prompt_tokens, self.config.max_batched_tokens - len(home.in_flight))
        given = shares([(_new(each), each.remaining) for each in prompts], budget)
        for sequence, tokens in zip(prompts, given, strict=True):
            self._begin(home, sequence, tokens)

    def _begin(self, home: Home, sequence: Sequence, tokens: int) -> None:
        """Have so many tokens computed in the next step, if there is room for them."""
        if not tokens or sequence.home is not home:
            return
        if len(sequence.tokens) <= len(sequence.blocks) * self._block_size or self._make_room(home, sequence):
            home.in_flight.append((sequence, sequence.next_chunk(tokens)))

    def _work(self) -> Work:
        """What is in flight."""
        sizes = [[len(chunk.tokens) for sequence, chunk in home.in_flight] for home in self._homes.values()]
        tokens = [sum(size for size in each if size > 1) for each in sizes]
        return Work(max(each.count(1) for each in sizes), max(tokens), sum(map(bool, tokens)))

    def _make_room(self, home: Home, sequence: Sequence) -> bool:
        """Allocate blocks for all known tokens; evict the rank's youngest sequences, perhaps `sequence` itself."""
        missing = blocks_for(len(sequence.tokens), self.config.block_size) - len(sequence.blocks)
        if missing <= 0:
            return True
        while missing > home.pool.free - self._reserve.kept(home, sequence):
            giving = [each for each in home.running if not each.guest] if self._reserve.kept(home, sequence) else []
            victim = (giving or home.running)[-1]
            self.preemptions += 1
            self._requeue(victim)
            if victim is sequence:
                return False
        sequence.blocks.extend(home.pool.take(missing))
        return True

    def apply(self, result: StepResult, now: float) -> list[Output]:
        """Take a rank's answer in; answers to anything but the step in flight have no effect."""
        home = self._homes.get(result.rank)
        epoch = self.view.epoch if self.view else 0
        if home is None or not step_fence.answers_step(result, home.rank_id, self.token, epoch, self.step):
            return []
        in_flight, home.in_flight = home.in_flight, []
        self._serving.discard(home.rank)
        self._learn(result, now)
        self._step_time.answered(now)
        self._note_host(home, result)
        current = [(sequence, chunk) for sequence, chunk in in_flight if sequence.home is home]
        if result.status is not StepStatus.OK:
            return self._set_back(home, [sequence for sequence, _ in current], result, now)
        home.setbacks, home.retry_at = 0, 0.0
        outputs: list[Output] = []
        size = self._block_size
        sampled = {token.seq: token for token in result.tokens}
        for sequence, chunk in current:
            token = sampled.get(chunk.seq)
            if token is not None and token.error:
                outputs.append(self._reject(sequence, 400, token.error))
                continue
            if not is_complete(chunk, token):
                outputs += self._count_failure([sequence], f"rank {home.rank} returned no token")
                continue
            if chunk.score is not None and token is not None:
                sequence.scored(chunk, token.scores)
            if sequence.computed % size + (count := len(chunk.tokens)) < size:
                sequence.computed += count  # no block is full: GPUs wait for this, no calls per sequence
            else:
                self._contents.extend(sequence.names, sequence.tokens)
                sequence.advance(count)
            sequence.failures, sequence.stalled_since = 0, None
            if chunk.sample is not None and token is not None:
                outputs.append(self._append(sequence, token))
        return outputs

    def _note_host(self, home: Home, result: StepResult) -> None:
        """Whether one rank of its host makes use of all cores there."""
        for each in self._homes.values():
            if each.node == home.node:
                each.fills_host = result.fills_host and self.config.homes is Homes.TOGETHER

    def _learn(self, result: StepResult, now: float) -> None:
        """Of the time that the step took, once all have answered and nothing went wrong."""
        if result.status is not StepStatus.OK or result.retried_rows or result.suspects:
            self._under_way = None
        elif self._under_way is not None and not self.unanswered:
            work, began = self._under_way
            self._budget.learn(work, now - began)

    def _append(self, sequence: Sequence, sampled: SampledToken) -> Tokens:
        """Add one token to the output; end tokens end it and are not part of it."""
        self._waiting.turns.charge(sequence.request.key, OUTPUT_COST)
        request, token = sequence.request, sampled.token
        index = len(sequence.tokens) - len(request.prompt)  # as `emitted`, without a call
        scores, cached, queued_s = (None, 0, 0.0) if index else sequence.first_words()
        is_eos = token in self.config.eos_token_ids and not request.ignore_eos
        if is_eos or token in request.stop_token_ids:
            self._forget(sequence)
            end = EndToken(token, sampled.logprobs)
            return Tokens(self.token, request.request_id, index, [], None, "stop", cached, scores, end, queued_s)
        sequence.tokens.append(token)
        reason = "length" if index + 1 >= request.max_tokens else ""
        if reason:
            self._forget(sequence)
        logprobs = [sampled.logprobs] if sampled.logprobs is not None else None
        return Tokens(self.token, request.request_id, index, [token], logprobs, reason, cached, scores, None, queued_s)

    def _set_back(self, home: Home, sequences: list[Sequence], result: StepResult, now: float) -> list[Output]:
        """The step had no effect: back off, and count a failure of the sequences only if no peer is suspected."""
        for sequence in sequences:
            sequence.stalled_since = now if sequence.stalled_since is None else sequence.stalled_since
        if result.status in (StepStatus.CALLED_OFF, StepStatus.APART):
            return []  # the next step is at once, without the rank that it failed by, or otherwise
        home.setbacks += 1
        home.retry_at = now + min(_BACKOFF_S * 2**home.setbacks, _BACKOFF_MAX_S)
        if result.status is StepStatus.FAILED and not result.suspects:
            return self._count_failure(sequences, result.error)
        return []

    def _count_failure(self, sequences: list[Sequence], error: str) -> list[Output]:
        """Count a failure. A sequence that keeps failing alone moves to another rank, then is rejected."""
        alone = len(sequences) == 1
        for sequence in sequences:
            sequence.failures = sequence.failures + 1 if alone else max(sequence.failures, 1)
        last = error.strip().rsplit("\n", 1)[-1]
        rejected: list[Output] = []
        for sequence in sequences:
            home = sequence.home
            if home is None or sequence.failures <= MAX_FAILURES:
                continue
            sequence.failed_on.add(home.rank_id)
            others = {each.rank_id for each in self._homes.values()} - sequence.failed_on
            if len(sequence.failed_on) < MAX_FAILED_RANKS and others:
                self._requeue(sequence)
            else:
                rejected.append(self._reject(sequence, 500, f"the model failed on this request: {last}"))
        return rejected
