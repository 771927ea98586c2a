"""A request under way in the engine: its tokens, how far they are computed, and where its KV blocks are."""

from __future__ import annotations

from array import array
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from elastic.engine.kv_blocks import BlockPool, blocks_for
from elastic.protocol import Rejected, Submit
from membership.base.rank_id import RankId
from membership.store.records import ClusterConfig
from workers.protocol.messages import NO_TOKEN, History, SampledToken, Score, SeqChunk, TokenLogprobs


@dataclass(slots=True, eq=False)
class Home:
    """One usable rank: its KV pool, its sequences (oldest first) and what it is computing now."""

    rank: int
    incarnation: int
    pool: BlockPool
    node: str = ""
    running: list[Sequence] = field(default_factory=list)
    in_flight: list[tuple[Sequence, SeqChunk]] = field(default_factory=list)
    setbacks: int = 0  # consecutive answers other than OK
    retry_at: float = 0.0
    fills_host: bool = False  # its rank uses all cores of its host alone: requests of one host go best to one rank

    @property
    def rank_id(self) -> RankId:
        """The process."""
        return RankId(self.rank, self.incarnation)

    @property
    def suspect(self) -> Sequence | None:
        """What it computes alone since a step failed with it, if that is in flight: should the process end now, it may
        well be for this."""
        alone = self.in_flight[0][0] if len(self.in_flight) == 1 else None
        return alone if alone is not None and alone.failures and alone.home is self else None


@dataclass(frozen=True)
class Left:
    """What a dead rank had computed for a request, in the pool that it left."""

    source: RankId
    node: str
    blocks: tuple[int, ...]
    tokens: int  # confirmed before it died; what else is in the last block is written again


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` is prompt + emitted; positions below `computed` are in the KV cache of `home`."""

    request: Submit
    seq: int  # also the order of arrival: lower is older
    submitted: float
    tokens: list[int]
    home: Home | None = None
    blocks: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)  # of the content of its full blocks, as far as they are needed
    computed: int = 0
    cached: int | None = None  # prompt tokens that its first home had already; None: it has had no home
    queued_s: float = 0.0  # how long it waited for its first home
    left: Left | None = None  # where it can still be read
    failures: int = 0  # consecutive FAILED answers on this home
    failed_on: set[RankId] = field(default_factory=set)  # processes that failed on it to the end, perhaps their own
    guest: bool = False  # it has a reserved place
    taken: bool = False  # it has had a place here, or an engine before may have had it: it is not refused
    stalled_since: float | None = None  # since when its rank answers something other than OK
    scores: list[TokenLogprobs] = field(default_factory=list)  # of the prompt's tokens but the first, if asked for
    packed: array[int] = field(default_factory=lambda: array("I"))  # `tokens`, as far as a history needed them

    @classmethod
    def of(cls, request: Submit, seq: int, now: float) -> Sequence:
        """A new sequence that continues after the tokens that were already emitted."""
        taken = request.taken or bool(request.emitted)
        return cls(request, seq, now, [*request.prompt, *request.emitted], taken=taken)

    @property
    def emitted(self) -> int:
        """How many output tokens there are so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def interrupted(self) -> bool:
        """Of one that waits: whether it has run here, or a client has tokens of it. A gateway cannot say whether what
        it submits to an engine's successor ran, or only waited."""
        return self.cached is not None or self.emitted > 0

    @property
    def remaining(self) -> int:
        """How many known tokens are not computed yet: 1 while decoding, more while prefilling."""
        return len(self.tokens) - self.computed

    def next_chunk(self, budget: int) -> SeqChunk:
        """The next at most `budget` tokens; the last known token yields a sample."""
        start, known = self.computed, len(self.tokens)
        end = min(start + budget, known)
        sample = self.request.sampling if end == known else None
        history = self._history() if sample is not None and sample.shaping is not None else None
        score = self._score(end) if self.request.prompt_logprobs >= 0 else None
        return SeqChunk(self.seq, start, self.tokens[start:end], self.blocks.copy(), sample, history, score)

    def first_words(self) -> tuple[list[TokenLogprobs] | None, int, float]:
        """What goes with its first token: the prompt's scores, if asked for, and what its first home had and when."""
        scores = self.scores if self.request.prompt_logprobs >= 0 else None
        return scores, self.cached or 0, self.queued_s

    def _score(self, end: int) -> Score | None:
        if not self.unscored:
            return None
        return Score(self.request.prompt[self.computed + 1 : end + 1], self.request.prompt_logprobs)

    @property
    def unscored(self) -> bool:
        """Whether the prompt is to be computed for the log probabilities of its tokens, too."""
        return self.request.prompt_logprobs >= 0 and len(self.scores) < len(self.request.prompt) - 1

    def scored(self, chunk: SeqChunk, scores: list[TokenLogprobs]) -> None:
        """Take in a chunk's scores; where the sequence began anew, they replace what there was."""
        self.scores[chunk.start :] = scores

    def _history(self) -> History:
        self.packed.extend(self.tokens[len(self.packed) :])
        return History(self.packed.tobytes(), len(self.request.prompt))

    def enter(self, home: Home, blocks: list[int], cached: int, now: float | None = None) -> None:
        """Run at this home, whose `blocks` hold its first `cached` tokens. `now`: it has waited until then."""
        if self.cached is None:
            self.cached = min(cached, len(self.request.prompt))
            self.queued_s = max(0.0, now - self.submitted) if now is not None else 0.0
        self.home, self.blocks, self.computed = home, blocks, cached
        insort(home.running, self, key=by_age)

    def move(self, home: Home, blocks: list[int]) -> None:
        """Continue at another home, whose `blocks` hold the same KV."""
        computed = self.computed
        self.leave()
        self.enter(home, blocks, computed)
        self.keep(0)

    def advance(self, count: int) -> None:
        """The next `count` tokens are in the KV cache: a rank has confirmed it."""
        before, self.computed = self.computed, self.computed + count
        self.keep(before)

    def keep(self, before: int) -> None:
        """Let others find the full blocks of what is computed; those of the first `before` tokens are known already."""
        if self.home is None:
            return
        pool = self.home.pool
        for index in range(before // pool.block_size, min(self.computed // pool.block_size, len(self.names))):
            pool.keep(self.blocks[index], self.names[index])

    def leave(self) -> None:
        """Give the blocks back and forget the home: what was computed there is lost."""
        if self.home is not None:
            self.home.pool.give_back(self.blocks)
            self.home.running.remove(self)
        self.home, self.computed, self.failures, self.stalled_since = None, 0, 0, None
        self.guest = False


def by_age(sequence: Sequence) -> int:
    """Sorts the oldest first."""
    return sequence.seq


class Runs(NamedTuple):
    """Sequences of one home, each kind in order of arrival."""

    decoding: list[Sequence]
    prompts: list[Sequence]  # with more than one token to compute


def split_by_kind(sequences: Iterable[Sequence]) -> Runs:
    """Which of them decode."""
    runs = Runs([], [])
    for each in sequences:  # GPUs wait for this: no call per sequence
        (runs.prompts if len(each.tokens) - each.computed > 1 else runs.decoding).append(each)
    return runs


def is_complete(chunk: SeqChunk, answer: SampledToken | None) -> bool:
    """Whether the answer has what the chunk asked for."""
    if chunk.sample is not None and (answer is None or answer.token == NO_TOKEN):
        return False
    return chunk.score is None or len(chunk.score.targets) == (0 if answer is None else len(answer.scores))


def refusal(request: Submit, config: ClusterConfig, token: int) -> Rejected | None:
    """Why this request can never run here, if so."""
    prompt, total = len(request.prompt), len(request.prompt) + request.max_tokens
    known = [*request.prompt, *request.emitted]
    capacity = config.kv_blocks * config.block_size
    message = ""
    if not request.prompt:
        message = "the prompt is empty"
    elif request.max_tokens < 1:
        message = f"max_tokens must be at least 1, not {request.max_tokens}"
    elif total > config.max_model_len:
        message = f"prompt ({prompt} tokens) plus max_tokens ({request.max_tokens}) exceed the context length of "
        message += f"{config.max_model_len} tokens"
    elif blocks_for(total, config.block_size) > config.kv_blocks:
        message = f"prompt ({prompt} tokens) plus max_tokens ({request.max_tokens}) exceed the KV cache of one rank "
        message += f"({capacity} tokens)"
    elif min(known) < 0 or (config.vocab_size and max(known) >= config.vocab_size):
        message = f"token ids must be between 0 and {config.vocab_size - 1}"
    return Rejected(token, request.request_id, 400, message) if message else None
