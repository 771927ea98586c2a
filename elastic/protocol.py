"""Messages between gateway and engine over ZeroMQ (gateway: DEALER, engine: ROUTER); msgpack, fixed schema.

The gateway owns the request: it may submit it again, with what was emitted, to another engine at any time. The engine
owns nothing. Both drop messages that carry another engine token than the one they know. `gc=False` as between engine
and ranks (`workers/protocol/messages.py`).
"""

from __future__ import annotations

import msgspec

from workers.protocol.messages import Sampling, TokenLogprobs


class Submit(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=True):
    """Run this request; continue after `emitted`. Submitting the same id again replaces the earlier submission."""

    request_id: str
    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    emitted: list[int] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    prompt_logprobs: int = -1  # of the prompt's own tokens, before the first token: as `Sampling.logprobs`
    taken: bool = False  # an engine may have it already: it is not refused for want of room
    trace: str = ""  # W3C traceparent of the gateway's span, if that is sampled
    together: bool = False  # the gateway takes several outputs in one message: `Outputs`
    key: str = ""  # the name of the API key that it was asked for with: keys take turns


class Abort(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=True):
    """The client went away, or the gateway has seen enough (stop string)."""

    request_id: str


class Hello(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=True):
    """First message of a gateway on a connection; the engine answers Welcome."""

    gateway: str


class Welcome(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=True):
    """The engine is ready for submissions of this gateway."""

    engine_token: int


class EndToken(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The eos or stop token that ended an output."""

    token: int
    logprobs: TokenLogprobs | None = None


class Tokens(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=True):
    """Tokens index, index+1, … of the request's output (0 = first generated token, emitted ones counted)."""

    engine_token: int
    request_id: str
    index: int
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str = ""  # "" while running, else "stop" (eos or stop token, which is not in tokens) | "length"
    cached: int = 0  # prompt tokens that were not computed, as the prefix cache had them; with index 0 only
    prompt_logprobs: list[TokenLogprobs] | None = None  # of all but its first token; with index 0, if asked for
    end: EndToken | None = None
    queued_s: float = 0.0  # how long it waited for its first rank; with index 0 only


class Rejected(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=True):
    """The request cannot be run (now). `status` is the HTTP status that fits; `retry_after_s` > 0 asks to retry."""

    engine_token: int
    request_id: str
    status: int
    message: str
    retry_after_s: float = 0.0


class Outputs(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=True):
    """What one gateway's requests got at once, in order: a step gives each of them a token."""

    engine_token: int
    outputs: list[Tokens | Rejected]


ToEngine = Hello | Submit | Abort
ToGateway = Welcome | Tokens | Rejected | Outputs
