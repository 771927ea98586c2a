"""The live mask: a page that the engine writes and all its ranks map. It says at once which ranks must not be used.

Within an epoch ranks are only added to it. Beside the mask stands, for each rank, the last incarnation that its engine
has given up: one that is still alive finds there that it was evicted, in any later epoch too. The writer
rings the ranks' doorbells after a change; readers look at the page whenever they wake. Its memory has no name;
ranks get it over the engine's handover.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from types import TracebackType

import msgspec

from membership.base.errors import ConfigError
from workers.ipc import handover
from workers.ipc.fence import fence
from workers.ipc.handover import Grant, Handover
from workers.ipc.shared_memory import PAGE, Segment
from workers.protocol.step_fence import is_evicted

MAX_RANKS = 256
_WORDS = MAX_RANKS // 64  # 64-bit words of the set; the generation follows, then each rank's last evicted incarnation


class MaskHandle(msgspec.Struct, frozen=True, array_like=True):
    """Where to get the page."""

    address: str
    resource: str


class LiveMask:
    """A set of masked ranks. Made by `create` (the one writer) or `attach` (readers)."""

    def __init__(self, segment: Segment, resource: str = "") -> None:
        self._segment = segment
        self._resource = resource
        self._words = segment.view(0, 8 * (_WORDS + 1 + MAX_RANKS), "Q")
        self._known = (-1, 0)

    @classmethod
    def create(cls) -> LiveMask:
        """An empty mask, served to whoever has its handle."""
        mask = cls(Segment.create(PAGE, "elastic-ep-livemask"), f"livemask-{secrets.token_hex(8)}")
        Handover.default().serve(mask._resource, mask._grant)
        return mask

    @classmethod
    def attach(cls, handle: bytes, timeout_s: float = 5.0) -> LiveMask:
        """Map the page of `handle`. It stays as it is when its engine goes."""
        where = msgspec.msgpack.decode(handle, type=MaskHandle)
        link = Handover.default().connect(where.address, where.resource, timeout_s=timeout_s)
        try:
            if len(link.reply_fds) != 1:
                raise ConfigError("this is not the handle of a live mask")
            return cls(Segment.attach(link.reply_fds[0], PAGE))
        finally:
            link.close()

    def handle(self) -> bytes:
        """What `attach` needs."""
        return msgspec.msgpack.encode(MaskHandle(Handover.default().address, self._resource))

    @property
    def generation(self) -> int:
        """Rises with each change."""
        return self._words[_WORDS]

    def masked(self) -> int:
        """The set as bits: bit r is set if rank r is masked."""
        generation = self._words[_WORDS]
        fence()
        if generation != self._known[0]:
            self._known = (generation, sum(self._words[i] << 64 * i for i in range(_WORDS)))
        return self._known[1]

    def mask(self, rank: int) -> None:
        """Add a rank."""
        self._write(self._bits([rank]) | self._now())

    def evict(self, rank: int, incarnation: int) -> None:
        """This incarnation, and any before it, is given up for good."""
        self._bits([rank])
        at = _WORDS + 1 + rank
        self._words[at] = max(self._words[at], incarnation)

    def evicted(self, rank: int, incarnation: int) -> bool:
        """Whether this incarnation was given up."""
        return is_evicted(incarnation, self._words[_WORDS + 1 + rank])

    def reset(self, ranks: Iterable[int] = ()) -> None:
        """Make these the whole set: a new epoch begins."""
        self._write(self._bits(ranks))

    def close(self) -> None:
        """Unmap; the writer also stops serving the page."""
        if self._resource:
            Handover.default().withdraw(self._resource)
        self._segment.close()

    def _now(self) -> int:
        return sum(self._words[i] << 64 * i for i in range(_WORDS))

    def _bits(self, ranks: Iterable[int]) -> int:
        bits = 0
        for rank in ranks:
            if not 0 <= rank < MAX_RANKS:
                raise ConfigError(f"rank {rank} does not fit in a live mask of {MAX_RANKS} ranks")
            bits |= 1 << rank
        return bits

    def _write(self, bits: int) -> None:
        for i in range(_WORDS):
            self._words[i] = bits >> 64 * i & (2**64 - 1)
        fence()
        self._words[_WORDS] += 1

    def _grant(self, link: handover.Link, request: bytes, fds: list[int]) -> Grant:
        return Grant(fds=[self._segment.fileno()])

    def __enter__(self) -> LiveMask:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
