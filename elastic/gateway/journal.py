"""The request journal: each open request and the tokens it emitted, so that any engine can continue it.

Pure. It makes the death of an engine harmless: the gateway submits every open request again, with its emitted tokens,
to the next engine, and drops late output of the old one. A client's stream gets each index once, in order.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from elastic.protocol import Abort, EndToken, Rejected, Submit, Tokens
from membership.base.errors import JournalError
from workers.protocol.messages import Sampling, TokenLogprobs


class RequestState(StrEnum):
    """OPEN, or how it ended."""

    OPEN = "open"
    FINISHED = "finished"  # the engine or max_tokens ended it
    REJECTED = "rejected"  # the engine refused it, or the gateway gave up
    CLOSED = "closed"  # the client went away, or the gateway has seen enough


class Request(msgspec.Struct, kw_only=True):
    """One sequence to generate, and what is known of it."""

    id: str
    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    prompt_logprobs: int = -1  # as in Submit, until they are here
    trace: str = ""  # as in Submit
    key: str = ""  # as in Submit
    emitted: list[int] = []
    sent: bool = False  # to an engine, which may have taken it
    state: RequestState = RequestState.OPEN
    admitted_at: float = 0.0
    progress_at: float = 0.0  # when it was admitted, submitted or last grew

    def submission(self) -> Submit:
        """The submission with which an engine continues it."""
        return Submit(
            request_id=self.id,
            prompt=self.prompt,
            sampling=self.sampling,
            max_tokens=self.max_tokens,
            emitted=list(self.emitted),
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            prompt_logprobs=self.prompt_logprobs,
            taken=self.sent,
            trace=self.trace,
            together=True,
            key=self.key,
        )


class Delta(msgspec.Struct, frozen=True):
    """What one message added to a request. With a finish reason it is the request's last."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: str = ""
    cached: int = 0  # prompt tokens that were not computed; with the first token only
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None  # with the first token, if asked for
    end: EndToken | None = None
    queued_s: float = 0.0  # as in Tokens


class Journal:
    """All open requests of one gateway."""

    def __init__(self) -> None:
        self.engine_token = 0  # 0: no engine; nothing is accepted
        self._open: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open_requests(self) -> list[Request]:
        """All open requests, oldest first."""
        return list(self._open.values())

    def request(self, request_id: str) -> Request:
        """An open request."""
        return self._open[request_id]

    def admit(self, request: Request, now: float) -> Submit:
        """Take responsibility for a request; return its submission to the engine."""
        if request.id in self._open:
            raise JournalError(f"request {request.id} is open already")
        request.admitted_at = request.progress_at = now
        self._open[request.id] = request
        return self._submission(request)

    def resubmissions(self, engine_token: int, now: float) -> list[Submit]:
        """Switch to this engine: from now on only its output counts. Return a submission for every open request."""
        self.engine_token = engine_token
        for request in self._open.values():
            request.progress_at = now
        return [self._submission(request) for request in self._open.values()]

    def detach(self) -> None:
        """Accept nothing until the next `resubmissions`."""
        self.engine_token = 0

    def accept(self, message: Tokens, now: float) -> Delta | None:
        """What is new in the message; None if nothing is, or if it is not from our engine or not about an open request.

        JournalError if it would leave a gap or contradicts what was emitted; the request stays open and unchanged.
        """
        request = self._addressed(message)
        if request is None:
            return None
        fresh = self._fresh(request, message)
        full = len(request.emitted) + len(fresh) >= request.max_tokens
        reason = message.finish_reason or ("length" if full else "")
        if not fresh and not reason:
            return None
        cached, queued_s = (0, 0.0) if request.emitted else (message.cached, message.queued_s)
        request.emitted.extend(fresh)
        request.progress_at = now
        if reason:
            self._end(request, RequestState.FINISHED)
        logprobs = message.logprobs
        new_logprobs = None if logprobs is None else tuple(logprobs[len(logprobs) - len(fresh) :])
        scores = message.prompt_logprobs if request.prompt_logprobs >= 0 else None
        request.prompt_logprobs = -1
        new_scores = None if scores is None else tuple(scores)
        return Delta(tuple(fresh), new_logprobs, reason, cached, new_scores, message.end, queued_s)

    def reject(self, message: Rejected) -> bool:
        """Whether this message ended an open request."""
        request = self._addressed(message)
        if request is None:
            return False
        self._end(request, RequestState.REJECTED)
        return True

    def fail(self, request_id: str) -> bool:
        """Give up on a request; whether it was open."""
        return self._close(request_id, RequestState.REJECTED)

    def close(self, request_id: str) -> Abort | None:
        """End a request from the client's side; return the abort to send if it was still open."""
        return Abort(request_id) if self._close(request_id, RequestState.CLOSED) else None

    def _submission(self, request: Request) -> Submit:
        submission = request.submission()
        request.sent = request.sent or self.engine_token != 0
        return submission

    def _addressed(self, message: Tokens | Rejected) -> Request | None:
        ours = self.engine_token != 0 and message.engine_token == self.engine_token
        return self._open.get(message.request_id) if ours else None

    def _close(self, request_id: str, state: RequestState) -> bool:
        request = self._open.get(request_id)
        if request is not None:
            self._end(request, state)
        return request is not None

    def _end(self, request: Request, state: RequestState) -> None:
        request.state = state
        del self._open[request.id]

    def _fresh(self, request: Request, message: Tokens) -> list[int]:
        """The tokens of the message that were not emitted yet."""
        if wrong := _wrong(request, message):
            raise JournalError(f"request {request.id}, engine {message.engine_token}: {wrong}")
        return message.tokens[len(request.emitted) - message.index :]


def _wrong(request: Request, message: Tokens) -> str:
    """What contradicts the request so far; empty if nothing does."""
    known, end = len(request.emitted), message.index + len(message.tokens)
    if not 0 <= message.index <= known:
        return f"tokens from index {message.index} leave a gap after {known} emitted ones"
    overlap = min(end, known)
    if message.tokens[: overlap - message.index] != request.emitted[message.index : overlap]:
        return f"tokens {message.index}..{overlap - 1} differ from the ones already emitted"
    if end > request.max_tokens:
        return f"{end} tokens are more than max_tokens={request.max_tokens}"
    if message.finish_reason and end < known:
        return f"ends after {end} tokens, but {known} were emitted"
    if message.logprobs is not None and len(message.logprobs) != len(message.tokens):
        return f"{len(message.logprobs)} logprobs for {len(message.tokens)} tokens"
    scores = message.prompt_logprobs
    if request.prompt_logprobs >= 0 and (scores is None or len(scores) != len(request.prompt) - 1):
        return "tokens came without the log probabilities of the prompt"
    return ""
