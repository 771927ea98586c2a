"""Entries of the weight store from other hosts, for a load whose files this host lacks.

Nothing is used before it was compared. A shard's header, which is fetched first, has the checksum of each tensor, and
these make the entry's digest: a host whose digest is not the one that the cluster serves is refused before a byte of it
is fetched, and so is one that packs otherwise than this host (`packing.py`). Then each tensor's bytes are compared with
its checksum as they arrive, straight in the host's store; where they are packed they are unpacked once, block by block,
as the digest is of plain bytes. A host that is silent, or whose bytes are wrong, is left out for the rest of the load,
and the others are asked for what is missing: tensor by tensor, so that what is there stays, and each is packed or plain
as who sent it has it. Some pieces are asked for ahead.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import zmq
from torch import Tensor

from membership.base.errors import ModelError
from membership.base.network import Network
from workers.bulk.client import SILENT_S, BulkLink, PeerLost
from workers.model.checkpoint import memory_of
from workers.model.packing import plain_blocks, takes
from workers.model.shared_weights import (
    SUFFIX_BYTES,
    Entry,
    Header,
    Session,
    SharedWeights,
    Slot,
    StoredAt,
    WeightsCorrupt,
    header_of,
    header_size,
)
from workers.model.weight_digests import Part, dense_digest, expert_digest
from workers.protocol.load_progress import LoadStopped
from workers.protocol.weight_peers import DENSE, PIECE, Peer, Place, Read

AHEAD = 12  # pieces that are asked for before they are needed
ASK_EVERY_S = 0.5


@dataclass(frozen=True)
class OtherHosts:
    """How they are reached, and for how long a load waits for one that has an entry."""

    network: Network
    patience_s: float
    silent_s: float = SILENT_S


class _Piece(NamedTuple):
    """At most PIECE bytes of a tensor."""

    name: str
    slot: str
    offset: int


@dataclass
class _Holder:
    """A host's copy of an entry."""

    host: _Host
    shard: int
    tensors: dict[str, StoredAt]


@dataclass
class _Host:
    link: BulkLink
    headers: dict[tuple[int, int], Header] = field(default_factory=dict)  # by number and checksum of the shard

    @property
    def node(self) -> str:
        return self.link.peer.node


class PeerWeights:
    """The entries of one load. For one thread; `close` it."""

    def __init__(
        self,
        shared: SharedWeights,
        session: Session,
        others: OtherHosts,
        advanced: Callable[[], object],
        stop: Callable[[], bool] = lambda: False,
        *,
        urgent: bool = False,
    ) -> None:
        """`advanced` is called with each piece, and while a host has promised one. LoadStopped once `stop` says so."""
        self._shared, self._session, self._others, self._stop = shared, session, others, stop
        self._mark, self._urgent = advanced, urgent
        self._pause = threading.Event()  # never set
        self._opened = ExitStack()
        self._context = self._opened.enter_context(zmq.Context(io_threads=1))
        self._hosts: dict[Peer, _Host] = {}
        self._wrong: dict[Peer, str] = {}  # whose bytes or digests are, and why: not asked again
        self._lost: dict[Peer, str] = {}  # asked again only where no other host has an entry
        self._digests: dict[str, bytes] = {}
        self._holders: dict[str, list[_Holder]] = {}
        self._ahead: deque[_Piece] = deque()
        self._asked: dict[_Piece, tuple[_Host, int]] = {}
        self._packing: dict[tuple[str, str], bytes] = {}  # of entry and slot, as it was sent

    def close(self) -> None:
        """Let go of all connections."""
        for host in self._hosts.values():
            host.link.close()
        self._opened.close()

    def entries(self, names: Sequence[str]) -> list[Entry]:
        """These entries (at most BATCH); filling one fetches it. ModelError: no host has one of them."""
        self._forget_ahead()
        for name in names:
            self._holders.pop(name, None)
        self._look_for(names)
        made = [self._entry(name) for name in names]
        self._ahead.extend(
            _Piece(entry.name, slot.name, offset)
            for entry in made
            for slot in entry.slots
            for offset in range(0, slot.nbytes, PIECE)
        )
        self._shared.takes(self._session.number, sorted({self._holder(name).host.node for name in names}))
        return made

    # --- who has what

    def _look_for(self, names: Sequence[str]) -> None:
        """Until each has a holder; hosts that come meanwhile are asked, too."""
        deadline = time.monotonic() + self._others.patience_s
        self._ask_for(names, leave_out={**self._wrong, **self._lost})
        while missing := [name for name in names if not self._holders.get(name)]:
            if self._stop():
                raise LoadStopped
            if time.monotonic() > deadline:
                asked = ", ".join(sorted(host.node for host in self._hosts.values())) or "no other"
                why = "; ".join(sorted({*self._wrong.values(), *self._lost.values()}))
                raise ModelError(
                    f"this host's disk lacks {missing[0]}, and so do other hosts (asked: {asked}{why and '; '}{why})",
                    hint="copy the checkpoint to this host, or wait until a host that has it serves",
                )
            self._pause.wait(ASK_EVERY_S)
            self._ask_for(missing, leave_out=self._wrong)

    def _ask_for(self, names: Sequence[str], leave_out: Mapping[Peer, str]) -> None:
        self._session.still_reads()  # other ranks of this host wait as long as we do
        wanted = self._shared.wanted(names)
        self._digests |= dict(zip(names, wanted.digests, strict=True))
        for peer in wanted.peers:
            if peer in leave_out:
                continue
            self._session.still_reads()
            try:
                host = self._hosts.get(peer) or self._meet(peer)
                found = host.link.find([self._shared.on_any_host(name) for name in names])
                self._note(host, found, names)
            except (PeerLost, WeightsCorrupt) as error:
                self._leave_out(peer, names[0], error)

    def _meet(self, peer: Peer) -> _Host:
        link = BulkLink(peer, self._others.network, self._context, self._others.silent_s)
        self._hosts[peer] = made = _Host(link)
        return made

    def _note(self, host: _Host, found: Sequence[Place], names: Sequence[str]) -> None:
        named = {self._shared.on_any_host(name): name for name in names}
        for place in found:
            if place.name not in named:
                raise PeerLost(f"node {host.node} answered with {place.name}, which was not asked for")
            name, header = named[place.name], self._header(host, place)
            tensors = {at.name: at for at in header.places if at.entry.partition("/")[2] == place.name}
            self._require(host, name, tensors)
            self._holders.setdefault(name, []).append(_Holder(host, place.shard, tensors))

    def _header(self, host: _Host, place: Place) -> Header:
        key = place.shard, place.checksum
        if key not in host.headers:
            tail = self._end(host, place, min(place.size, PIECE // 16))
            if (whole := header_size(tail)) > len(tail):
                if whole > min(place.size, PIECE):
                    raise WeightsCorrupt(f"node {host.node} has a header of {whole} bytes in a shard of {place.size}")
                tail = self._end(host, place, whole)
            try:
                host.headers[key] = header_of(tail, place.checksum)
            except WeightsCorrupt as error:
                raise WeightsCorrupt(f"node {host.node} has a shard of which {error}") from error
        return host.headers[key]

    def _end(self, host: _Host, place: Place, nbytes: int) -> memoryview:
        if not SUFFIX_BYTES <= nbytes <= place.size:
            raise WeightsCorrupt(f"node {host.node} has a shard of {place.size} bytes")
        number = host.link.ask(Read(place.shard, place.size - nbytes, nbytes, self._urgent))
        data = host.link.take(number, self._advanced)
        if len(data) != nbytes:
            raise WeightsCorrupt(f"node {host.node} sent {len(data)} bytes instead of {nbytes}")
        return data

    def _require(self, host: _Host, name: str, tensors: dict[str, StoredAt]) -> None:
        """WeightsCorrupt unless it is what the cluster serves; before that is known, what another host has."""
        digest = _noted(name)([at.part() for at in tensors.values()])
        if self._digests[name] not in (b"", digest):
            raise WeightsCorrupt(f"node {host.node} has another {name} than the cluster serves")
        if not all(takes(at.kind, at.shape, at.packing) for at in tensors.values()):
            raise WeightsCorrupt(f"node {host.node} has packed {name} for another torch or processor")
        for other in self._holders.get(name, []):
            if {key: at.part() for key, at in other.tensors.items()} != {key: at.part() for key, at in tensors.items()}:
                raise WeightsCorrupt(f"node {host.node} has another {name} than node {other.host.node}")

    def _leave_out(self, peer: Peer, name: str, error: ModelError | PeerLost) -> None:
        """What it has is not used, nor what it was asked for."""
        kept = self._lost if isinstance(error, PeerLost) else self._wrong
        if peer not in kept:
            self._shared.wrong(peer.node, name, str(error))
        kept[peer] = str(error)
        self._asked = {piece: asked for piece, asked in self._asked.items() if asked[0].link.peer != peer}
        for held in self._holders.values():
            held[:] = [each for each in held if each.host.link.peer != peer]
        if (host := self._hosts.pop(peer, None)) is not None:
            host.link.close()

    # --- taking it

    def _entry(self, name: str) -> Entry:
        tensors = self._holder(name).tensors
        slots = [
            Slot(key, at.kind, at.shape, partial(self._fill, name, key), partial(self._sent_as, name, key))
            for key, at in tensors.items()
        ]
        return Entry(name, slots, _noted(name))

    def _holder(self, name: str) -> _Holder:
        """Of one entry always the same while it is there; of many entries, each host has its share."""
        if not self._holders.get(name):
            self._look_for([name])
        held = self._holders[name]
        return held[zlib.crc32(name.encode()) % len(held)]

    def _fill(self, name: str, slot: str, room: Tensor) -> int:
        """Fetch a tensor, from another host if the first one cannot give it."""
        memory = memory_of(room)
        while True:
            holder = self._holder(name)
            try:
                checksum = self._fetch(holder, name, slot, memory)
            except PeerLost as error:
                self._leave_out(holder.host.link.peer, name, error)
                continue
            at = holder.tensors[slot]
            if checksum == at.checksum and (content := _content(at, room, checksum)) == at.content:
                self._packing[name, slot] = at.packing
                return content
            wrong = WeightsCorrupt(f"node {holder.host.node} sent {slot} of {name} with a wrong checksum")
            self._leave_out(holder.host.link.peer, name, wrong)

    def _sent_as(self, name: str, slot: str, _: Tensor) -> bytes:
        return self._packing.pop((name, slot))

    def _fetch(self, holder: _Holder, name: str, slot: str, memory: memoryview) -> int:
        checksum = 0
        for offset in range(0, len(memory), PIECE):
            piece = _Piece(name, slot, offset)
            room = memory[offset : offset + PIECE]
            asked = self._asked.pop(piece, None)
            if asked is not None and asked[0] is not holder.host:  # who has it has changed since
                asked[0].link.forget(asked[1])
                asked = None
            host, number = asked or self._ask_now(holder, piece)
            if self._ahead and self._ahead[0] == piece:
                self._ahead.popleft()
            self._ask_ahead()
            data = host.link.take(number, self._advanced)
            if len(data) != len(room):
                raise PeerLost(f"node {host.node} sent {len(data)} bytes instead of {len(room)}")
            room[:] = data
            checksum = zlib.crc32(room, checksum)
            self._advanced()
        return checksum

    def _advanced(self) -> None:
        if self._stop():
            raise LoadStopped
        self._mark()
        self._session.still_reads()

    def _ask_now(self, holder: _Holder, piece: _Piece) -> tuple[_Host, int]:
        at = holder.tensors[piece.slot]
        nbytes = min(PIECE, at.nbytes - piece.offset)
        return holder.host, holder.host.link.ask(Read(holder.shard, at.offset + piece.offset, nbytes, self._urgent))

    def _ask_ahead(self) -> None:
        while self._ahead and len(self._asked) < AHEAD:
            piece = self._ahead.popleft()
            if self._holders.get(piece.name):
                self._asked[piece] = self._ask_now(self._holder(piece.name), piece)

    def _forget_ahead(self) -> None:
        self._ahead.clear()
        for host, number in self._asked.values():
            host.link.forget(number)
        self._asked.clear()


def _content(at: StoredAt, room: Tensor, checksum: int) -> int:
    """The checksum of a tensor's plain bytes, given that of its bytes."""
    if not at.packing:
        return checksum
    content = 0
    for block in plain_blocks(room):
        content = zlib.crc32(memory_of(block), content)
    return content


def _noted(name: str) -> Callable[[Sequence[Part]], bytes]:
    return dense_digest if name == DENSE else expert_digest
