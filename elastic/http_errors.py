"""The one table of errors and HTTP statuses: the gateway renders an error by it, a client turns the answer back.

Errors of the OpenAI API are RequestErrors, which carry a status of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from membership.base.errors import (
    ConfigError,
    ElasticError,
    Fenced,
    NoAnswer,
    OperationConflict,
    PlanRefused,
    RequestError,
    StoreReplaced,
    WaitTimeout,
)

UNKNOWN = "whether it took effect is unknown: look at the operations, or ask again with the same op_id"


@dataclass(frozen=True)
class HttpError:
    """`errors` (and their subclasses) become this status and code; a client that receives them raises `raised`."""

    status: int
    code: str
    errors: tuple[type[ElasticError], ...]
    raised: type[ElasticError]
    note: str = ""  # added to the message
    retry_after_s: float = 0.0


# The first row that fits applies. Of two rows with one status, a client that knows no code takes the first.
TABLE = (
    HttpError(404, "not_found", (ConfigError,), ConfigError),
    HttpError(409, "conflict", (OperationConflict,), OperationConflict),
    HttpError(412, "stale_epoch", (Fenced,), Fenced),
    HttpError(422, "plan_refused", (PlanRefused,), PlanRefused),
    HttpError(503, "outcome_unknown", (NoAnswer, WaitTimeout), NoAnswer, UNKNOWN, retry_after_s=1.0),
    HttpError(503, "store_replaced", (StoreReplaced,), StoreReplaced),
    HttpError(500, "", (ElasticError,), ElasticError),
)
# Statuses that only a RequestError has: the request itself, or its token, is wrong.
BAD_REQUEST = frozenset({400, 401, 403})


def as_http(error: ElasticError) -> RequestError:
    """The error as a RequestError with its HTTP status and code."""
    if isinstance(error, RequestError):
        return error
    message = message_of(error)
    row = next(row for row in TABLE if isinstance(error, row.errors))
    if row.note and row.note not in message:
        message += f"; {row.note}"
    return RequestError(message, status=row.status, code=row.code, retry_after_s=row.retry_after_s)


def from_http(status: int, code: str, message: str) -> ElasticError:
    """The error that an HTTP answer stands for. A status that is not in the table is an ElasticError."""
    if status in BAD_REQUEST:
        return ConfigError(message)
    rows = [row for row in TABLE if row.status == status]
    exact = [row for row in rows if row.code == code]
    return (exact or rows or TABLE[-1:])[0].raised(message)


def message_of(error: ElasticError) -> str:
    """Message and hint in one line."""
    return f"{error} ({error.hint})" if error.hint else str(error)
