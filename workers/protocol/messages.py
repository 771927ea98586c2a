"""The messages between engine and ranks. Fixed schema (msgpack); small arrays only, no tensors.

A step is idempotent: positions, KV blocks and the sampler's counter are set by the scheduler, so running the same
chunk again writes the same cells and yields the same token.

`gc=False`: what only holds numbers, bytes and lists of such is part of no cycle, and a step makes hundreds of them, for
which Python's collector would run while a GPU waits.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from membership.base.rank_id import ProcessId, RankId, labels


class Shaping(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a request adds to its logits before a token is chosen: see workers/model/shaping.py."""

    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bias: list[tuple[int, float]] = []
    allowed: bytes = b""  # token ids, uint32; empty: all
    bad_words: list[list[int]] = []
    min_tokens: int = 0
    end_tokens: list[int] = []  # barred until there are that many
    grammar: str = ""  # llguidance's, that the output follows; empty: any


class History(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A request's tokens so far, as uint32; the first `prompt` of them are its prompt."""

    tokens: bytes = b""
    prompt: int = 0


class Sampling(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How to choose the next token. `temperature` 0 is greedy. The RNG is a counter keyed by (seed, position)."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    seed: int = 0
    logprobs: int = -1  # -1: none; n: the chosen token's and the n most likely ones'
    min_p: float = 0.0  # of the likeliest token's probability; 0: off
    shaping: Shaping | None = None


class Score(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Asks for the log probabilities of the prompt's own tokens after a chunk's first, second, … token."""

    targets: list[int]
    top: int  # as `Sampling.logprobs`


class SeqChunk(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Consecutive tokens of one sequence to run in this step; `sample` is set if the last one yields a token."""

    seq: int  # unique under one engine token
    start: int  # position of tokens[0]; positions before it are in the KV cache already
    tokens: list[int]
    blocks: list[int]  # the sequence's block table, long enough for start + len(tokens)
    sample: Sampling | None = None
    history: History | None = None  # where `sample` has a shaping
    score: Score | None = None


Known = dict[int, bytes]
"""What a rank's KV blocks hold: block -> name (`elastic/engine/prefix.py`); empty: nothing that is known."""


class StepBatch(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=True):
    """One step of the whole cluster, broadcast to all ranks. Ranks that are not named only serve experts."""

    engine_token: int
    epoch: int
    step: int
    attempt: int
    masked: list[int]  # ranks of the epoch's view that must not be used
    ranks: dict[int, list[SeqChunk]]
    known: dict[int, Known] = {}  # what has become known of ranks' blocks since the last step
    traced: list[int] = []  # sequences; of a TracedStep alone. It stays in this place: versions mix in an upgrade
    together: int = 0  # not 0: all of `ranks` run it over their GPUs, with or without chunks; the first call's number


class TracedStep(StepBatch, frozen=True, array_like=True, gc=False, tag=True):
    """A step with traced sequences: ranks that run any of them say how long they took (TracedResult).

    A message of its own, so that no rank looks for traces while there are none.
    """

    @classmethod
    def of(cls, batch: StepBatch, traced: list[int]) -> TracedStep:
        """The same step."""
        return cls(**(msgspec.structs.asdict(batch) | {"traced": traced}))


class Ping(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=True):
    """Asks every rank that has joined the queue for an empty StepResult: proves the queues after a handshake.

    It tells ranks on other hosts at once which ranks are masked now; the others have the engine's page.
    """

    engine_token: int
    step: int
    masked: list[int] = []


class CopyBlocks(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=True):
    """Half of a move of KV blocks between two ranks. First the source writes its blocks out and answers; then the
    target reads them into its own `blocks` and answers.

    With `there` it is the whole: the source has ended, and the target reads its blocks `there` from the pool it left.
    """

    engine_token: int
    copy: int  # unique under one engine token
    source: RankId
    target: RankId
    blocks: list[int]
    arriving: bool = False  # the target's turn
    there: list[int] = []

    @property
    def addressee(self) -> RankId:
        """Whose turn it is."""
        return self.target if self.arriving else self.source


EngineMessage = StepBatch | TracedStep | Ping | CopyBlocks


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Natural-log probability of the chosen token, and of the most likely ones, best first."""

    logprob: float
    top: list[tuple[int, float]] = []
    rank: int = 0  # how many tokens are at least as likely; 1: it is the likeliest


NO_TOKEN = -1


class SampledToken(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What came of a chunk: the token chosen for the position after its last one, and what its `score` asked for."""

    seq: int
    token: int = NO_TOKEN
    logprobs: TokenLogprobs | None = None
    scores: list[TokenLogprobs] = []
    error: str = ""  # why the request can have no token here, by what it asks for


class StepStatus(StrEnum):
    """How a rank's part of a step ended; anything but OK yields no token and changes nothing that a retry would see."""

    OK = "ok"
    COVERAGE_LOST = "coverage_lost"  # an expert had no live owner
    STALE = "stale"  # the batch's epoch or engine token is not current on this rank
    CALLED_OFF = "called_off"  # a step of all ranks together that one of them did not finish
    APART = "apart"  # this rank cannot run such steps; `error` says why
    FAILED = "failed"  # `error` says why


class _FromRank(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What every message of a rank begins with: the sender, and the engine that it is meant for."""

    rank: int
    incarnation: int
    engine_token: int

    @property
    def rank_id(self) -> RankId:
        """The sender."""
        return RankId(self.rank, self.incarnation)


class StepResult(_FromRank, frozen=True, array_like=True, gc=False, tag=True):
    """A rank's answer to a StepBatch (only ranks with chunks answer) or to a Ping."""

    epoch: int
    step: int
    attempt: int
    status: StepStatus
    tokens: list[SampledToken] = []
    error: str = ""
    suspects: list[int] = []  # ranks that stopped answering during this step
    retried_rows: int = 0  # rows sent again to a replica
    load: bytes = b""  # uint32[moe_layers, experts]: rows routed by this rank since its last report; mostly empty
    # When the last of those rows was answered, on the monotonic clock of the rank's host; 0: there were none.
    retried_at: float = 0.0
    unlinked: list[int] = []  # ranks of the view, not masked, with which it has no link now
    # The next two of a TracedResult alone; they stay in this place: versions mix in an upgrade.
    took_s: float = 0.0
    exchange_s: float = 0.0  # of that, in which it waited for rows at other ranks and computed others' and its own
    fills_host: bool = False  # alone it makes use of all cores of its host: see `Home.fills_host`


class TracedResult(StepResult, frozen=True, array_like=True, gc=False, tag=True):
    """A rank's answer to a TracedStep that went well. Durations, since no two hosts' clocks are compared."""

    @classmethod
    def of(cls, result: StepResult, took_s: float, exchange_s: float) -> TracedResult:
        """The same answer."""
        return cls(**(msgspec.structs.asdict(result) | {"took_s": took_s, "exchange_s": exchange_s}))


class BlocksCopied(_FromRank, frozen=True, array_like=True, gc=False, tag=True):
    """A rank's answer to CopyBlocks: it has copied the first `blocks` of them, as many as fit; none if `error`."""

    copy: int
    blocks: int
    error: str = ""


class Holding(_FromRank, frozen=True, array_like=True, gc=False, tag=True):
    """A rank's first word to an engine: what its KV blocks hold, as the engines before have said."""

    known: Known


class Farewell(_FromRank, frozen=True, array_like=True, gc=False, tag=True):
    """A rank's last word to an engine that has been replaced: it leaves the queue, and follows the `successor`."""

    successor: int  # its engine token


RankMessage = StepResult | TracedResult | BlocksCopied | Holding | Farewell


def reader_id(process: ProcessId) -> str:
    """The name under which a rank process reads a queue."""
    return "{}.{}".format(*labels(process))
