"""The error tree of the whole project. `definite`: the thing certainly did not happen.

A caller may retry after a definite error; after an indefinite one it must read back first (a timed-out
transaction is *unknown*).
"""

from __future__ import annotations


class ElasticError(Exception):
    """Root of all errors this project raises on purpose. `hint`: what the operator should do next."""

    definite: bool = True

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(ElasticError):
    """What the user asked for cannot work: a bad flag, model or environment. Retrying the same is useless."""


class WaitTimeout(ElasticError):
    """A wait passed its deadline. The message names what was waited for, and in which phase."""

    definite = False


class NoAnswer(ElasticError):
    """The other side did not answer; whether it did what was asked is unknown."""

    definite = False


class StoreError(ElasticError):
    """The membership store could not do what was asked."""


class StoreUnavailable(StoreError, NoAnswer):
    """The store did not answer; whether a write took effect is unknown."""

    definite = False  # StoreError, which comes first, would say otherwise


class StoreFull(StoreUnavailable):
    """The store has no room (or is overloaded) and refused. Nothing was changed; a retry may succeed."""

    definite = True


class StoreDenied(StoreUnavailable):
    """The store does not accept our user, or denies it this. Nothing was changed; once mended, a retry may succeed."""

    definite = True


class StoreCompacted(StoreError):
    """The revision asked for is gone; list again, then watch from there."""


class StoreReplaced(StoreError):
    """The store lost data that we have seen in it (wiped, or set back). Nothing was changed; it must not be used."""


class SchemaError(StoreError):
    """A stored record cannot be read by this version: damaged, of another kind, or written by a newer version."""


class LeaseLost(StoreError):
    """The lease expired or was revoked: what it guarded is no longer ours."""


class Fenced(ElasticError):
    """We acted under a token, epoch or incarnation that is no longer current. Nothing took effect; stand down."""


class DeviceLost(ElasticError):
    """What a rank computes on takes no more work from its process, whatever is asked of it: the process has to end."""


class DeviceFull(DeviceLost):
    """Likewise, since it has too little memory for that work: a new process would need as much."""


class OutOfDeviceMemory(ElasticError):
    """What a rank computes on has too little memory for this."""


class OperationConflict(ElasticError):
    """Another operation is active; the message names it."""


class PlanRefused(ElasticError):
    """The planner will not do this; the message says why."""


class IllegalPhase(ElasticError):
    """An operation cannot go from the phase it is in to the one asked for."""


class RankError(ElasticError):
    """A rank failed in a way its peers survive."""


class RankDied(RankError):
    """The rank's process is gone. Replies already received stay valid."""


class RankFailed(RankError):
    """The rank is alive and answered with an error; the message carries its traceback."""


class RankFull(RankFailed):
    """It lacks its device's memory for that: a new process would need as much."""


class NoResources(RankError):
    """The machine had no process, memory or descriptor to be had. Nothing was started; the rank is not to blame."""


class PeerTimeout(RankError, WaitTimeout):
    """A rank neither answered nor died nor was masked before the deadline; the message names it."""

    definite = False


class QueueError(ElasticError):
    """A message queue could not do what was asked."""


class QueueClosed(QueueError):
    """The queue was shut down, or its writer is gone."""


class QueueSilent(QueueClosed):
    """The writer, on another host, has fallen silent. `silent_s`: for how long it had been by then."""

    silent_s: float = 0.0


class QueueTimeout(QueueError, WaitTimeout):
    """Nothing came (or no room was made) before the deadline."""

    definite = True


class MessageTooLarge(QueueError):
    """The message exceeds what this queue may carry."""


class CalledOff(ElasticError):
    """A step that all ranks run together was given up by one of them; its results mean nothing."""


class CoverageLost(ElasticError):
    """Some expert has no live replica: no answer may be computed until it is repaired."""


class ModelError(ConfigError):
    """The checkpoint cannot be served: missing, damaged, of the wrong type, or not a Mixture-of-Experts model."""


class JournalError(ElasticError):
    """An engine's output for a request has a gap or contradicts what was already sent: it must not reach the client."""


class RequestError(ElasticError):
    """A client's request cannot be served. `status` is the HTTP status that fits; `param` names the offending field."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str = "",
        code: str = "",
        retry_after_s: float = 0.0,
        hint: str = "",
    ) -> None:
        super().__init__(message, hint=hint)
        self.status, self.param, self.code, self.retry_after_s = status, param, code, retry_after_s
