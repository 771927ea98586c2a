"""Which client is asking, by its API key, and whether it may: requests in flight, requests and tokens a minute.

The file of keys is looked at with each request: a key that was added or taken out counts from the next request on. A
file that cannot be used changes nothing, and is logged.
"""

from __future__ import annotations

import hmac
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from elastic.http_errors import message_of
from elastic.serve.api_keys import NO_LIMITS, ApiKey, KeyLimits, all_keys, digest_of
from elastic.serve.tls import stamp_of
from membership.base.errors import ConfigError, RequestError

MINUTE_S = 60.0
BUSY_RETRY_S = 1.0

log = structlog.get_logger(__name__)


class Bucket:
    """So much a minute, all of it at once if it was not used: what is spent comes back steadily. May fall below 0."""

    def __init__(self, per_minute: int, now: float) -> None:
        self._per_minute, self._level, self._at = per_minute, float(per_minute), now

    def limit(self, per_minute: int, now: float) -> None:
        """Another limit from now on."""
        self._fill(now)
        self._level += per_minute - self._per_minute
        self._per_minute = per_minute

    def wait_s(self, now: float) -> float:
        """Seconds until there is one to spend; 0: there is, or there is no limit."""
        self._fill(now)
        return max(0.0, (1.0 - self._level) / self._per_minute * MINUTE_S) if self._per_minute else 0.0

    def spend(self, amount: float) -> None:
        """Take so much out, if it is limited at all."""
        if self._per_minute:
            self._level -= amount

    def _fill(self, now: float) -> None:
        gained = (now - self._at) / MINUTE_S * self._per_minute
        self._level, self._at = min(self._level + gained, float(self._per_minute)), now


class Account:
    """What the requests of one name have taken."""

    def __init__(self, name: str, now: float) -> None:
        self.name = name
        self.in_flight = 0
        self.answers: Counter[int] = Counter()  # by HTTP status
        self.prompt_tokens = self.generation_tokens = 0
        self.queued_s = 0.0  # that its requests have waited for ranks, together
        self._limits = NO_LIMITS
        self._requests, self._tokens = Bucket(0, now), Bucket(0, now)

    def limit(self, limits: KeyLimits, now: float) -> None:
        """Other limits from now on."""
        self._limits = limits
        self._requests.limit(limits.requests_per_minute, now)
        self._tokens.limit(limits.tokens_per_minute, now)

    def enter(self, now: float) -> None:
        """A request begins; RequestError (429) if it is one too many."""
        most = self._limits.requests_in_flight
        if most and self.in_flight >= most:
            raise self._too_many(f"{most} requests in flight", BUSY_RETRY_S)
        for bucket, what in (
            (self._requests, f"{self._limits.requests_per_minute} requests a minute"),
            (self._tokens, f"{self._limits.tokens_per_minute} tokens a minute"),
        ):
            if wait_s := bucket.wait_s(now):
                raise self._too_many(what, wait_s)
        self._requests.spend(1)
        self.in_flight += 1

    def leave(self) -> None:
        """It has ended."""
        self.in_flight -= 1

    def prompt(self, tokens: int) -> None:
        """A request's prompt has so many tokens."""
        self.prompt_tokens += tokens
        self._tokens.spend(tokens)

    def generated(self, tokens: int, queued_s: float = 0.0) -> None:
        """So many were generated, of a request that waited for a rank for so long if these are its first."""
        self.queued_s += queued_s
        self.generation_tokens += tokens
        self._tokens.spend(tokens)

    def _too_many(self, limit: str, retry_after_s: float) -> RequestError:
        message = f"{self.name} has reached its limit of {limit}"
        return RequestError(message, status=429, code="rate_limit_exceeded", retry_after_s=retry_after_s)


class KeyRing:
    """All keys, and an account for each of their names. Without any key, each client may ask."""

    def __init__(
        self, keys: Sequence[str] = (), path: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """ConfigError: the keys, or the file, cannot be used."""
        self._plain, self._path, self._clock = tuple(keys), path, clock
        self._keys: list[ApiKey] = []
        self._stamp: object = None
        self.accounts: dict[str, Account] = {}
        self.unauthorized = 0  # requests without a key that counts
        self._stamp = self._stamp_now()
        self._take(all_keys(self._plain, path))

    def account(self, authorization: str) -> Account | None:
        """Whose key this Authorization header bears; None if none is needed. RequestError (401) if it bears none."""
        self._reload()
        if not self._keys:
            return None
        scheme, _, key = authorization.partition(" ")
        given = digest_of(key.strip())
        found = [
            each.name for each in self._keys if hmac.compare_digest(each.digest, given)
        ]  # each of them is compared
        if found and scheme.lower() == "bearer":
            return self.accounts[found[0]]
        self.unauthorized += 1
        what = "this API key is not known" if authorization else "there is no API key"
        raise RequestError(f"{what}: send Authorization: Bearer KEY", status=401, code="invalid_api_key")

    def _reload(self) -> None:
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._take(all_keys(self._plain, self._path))
        except ConfigError as error:
            log.error("api_keys_kept", error=message_of(error))
        else:
            log.info("api_keys_read", names=sorted(self.accounts))

    def _take(self, keys: list[ApiKey]) -> None:
        now = self._clock()
        known, limits = self.accounts, {each.name: each.limits for each in keys}
        self.accounts = {name: known.get(name) or Account(name, now) for name in limits}
        for name, account in self.accounts.items():
            account.limit(limits[name], now)
        self._keys = keys

    def _stamp_now(self) -> object:
        """What changes whenever the file does."""
        return None if self._path is None else stamp_of(self._path)
