"""A page of memory that one process makes and others of its host map, by a handle that may stand in records.

The memory has no name: others get it over the maker's handover, and keep it when the maker ends.
"""

from __future__ import annotations

import os
import secrets
from typing import ClassVar, Self

import msgspec

from membership.base.errors import ConfigError
from workers.ipc.handover import Grant, Handover, Link, ResourceHandle
from workers.ipc.shared_memory import PAGE, Segment


class SharedPage:
    """Made by `create`, mapped by `attach`. `pid` is the maker's. Subclasses lay the page out."""

    kind: ClassVar[str]

    def __init__(self, segment: Segment, pid: int = 0, resource: str = "") -> None:
        self.pid = pid
        self._segment = segment
        self._resource = resource  # empty: another process made it

    @classmethod
    def create(cls) -> Self:
        """An empty page, for each process that has its handle."""
        page = cls(Segment.create(PAGE, f"elastic-ep-{cls.kind}"), os.getpid(), f"{cls.kind}-{secrets.token_hex(8)}")
        Handover.default().serve(page._resource, page._grant)
        return page

    @classmethod
    def attach(cls, handle: bytes, timeout_s: float = 5.0) -> Self:
        """Map the page of `handle`. QueueClosed: its maker is gone. ConfigError: it is no page's handle."""
        where = msgspec.msgpack.decode(handle, type=ResourceHandle)
        link = Handover.default().connect(where.address, where.resource, timeout_s=timeout_s)
        try:
            if not where.resource.startswith(cls.kind) or len(link.reply_fds) != 1:
                raise ConfigError(f"this is not the handle of a {cls.kind} page")
            return cls(Segment.attach(link.reply_fds[0], PAGE), link.peer_pid)
        finally:
            link.close()

    def handle(self) -> bytes:
        """What `attach` needs; only the maker has it."""
        return msgspec.msgpack.encode(ResourceHandle(Handover.default().address, self._resource))

    def close(self) -> None:
        """Unmap; the maker also stops serving the page."""
        if self._resource:
            Handover.default().withdraw(self._resource)
        self._segment.close()

    def _grant(self, link: Link, request: bytes, fds: list[int]) -> Grant:
        return Grant(fds=[self._segment.fileno()])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
