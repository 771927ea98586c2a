"""How a check says that a promise is broken."""

from __future__ import annotations

from membership.base.errors import ElasticError


class PromiseBroken(ElasticError):
    """Something is not as promised."""


def require(holds: object, what: str) -> None:
    """PromiseBroken unless it holds."""
    if not holds:
        raise PromiseBroken(what)
