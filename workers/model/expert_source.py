"""Single experts of a checkpoint, on demand: from the host's weight store if it has them, else from the files, or from
other hosts where there are no files.
"""

from __future__ import annotations

import re
import threading
import zlib
from collections import ChainMap, defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from membership.base.errors import ModelError
from workers.ipc.cpu_priority import usable_cores
from workers.model.checkpoint import Checkpoint, Stored, memory_of
from workers.model.packing import Pack, is_packed, plain, stays_plain
from workers.model.peer_weights import OtherHosts, PeerWeights
from workers.model.shared_weights import SIGN_TIMEOUT_S, Entry, Mapped, Session, SharedWeights, Slot, copied
from workers.model.weight_digests import expert_digest
from workers.protocol.load_progress import LoadProgress, LoadStopped
from workers.protocol.weight_client import BATCH
from workers.protocol.weight_peers import expert_name

PARAMETERS = ("gate_up_proj", "down_proj")
SHARD_BYTES = 512 << 20  # of one shard in the host's store, or of all that are written at once
MOST_READERS = 8
_EXPERT_INDEX = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class ExpertWeights:
    """One expert as right-hand sides of products (`packing.product`), views of what is stored: `gate_up` [H, 2I] and
    `down` [I, H]; or packed, [2I, H] and [H, I].
    """

    gate_up: Tensor
    down: Tensor
    mapped: bool = False  # from the host's store, without reading the checkpoint
    digest: bytes = b""  # of what was read, by content

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return int(self.gate_up.nbytes + self.down.nbytes)


class _Pace(NamedTuple):
    """What happens between two experts of a shard. Shards may be read by several threads at once."""

    lock: threading.Lock
    session: Session
    before_read: Callable[[], object]
    stop: Callable[[], bool]
    progress: LoadProgress

    def entry(self, entry: Entry) -> Entry:
        """The same, with a look around before it is filled."""

        def fill(slot: Slot, room: Tensor) -> int:
            with self.lock:
                if slot is entry.slots[0]:
                    if self.stop():
                        raise LoadStopped
                    self.before_read()
                self.session.still_reads()
            checksum = slot.fill(room)
            self.progress.add(slot.nbytes)
            return checksum

        return entry._replace(slots=[slot._replace(fill=partial(fill, slot)) for slot in entry.slots])


class Room(Protocol):
    """Memory on a device that outlives the rank, maybe with experts in it (`cuda/expert_room.py`)."""

    def expect(self, keys: Iterable[tuple[int, int]]) -> None:
        """A load of these begins: what is there of them is overwritten last."""

    def fetch(self, wanted: Mapping[tuple[int, int], bytes]) -> bool:
        """Take these, by digest, from where they are on devices; whether they all are there then."""

    def place(self, key: tuple[int, int], digest: bytes, matrices: Sequence[Tensor]) -> list[Tensor] | None:
        """The expert there; None: it has no room for it."""

    def drop(self, keys: Iterable[tuple[int, int]]) -> None:
        """They are used no more."""

    def rest(self) -> None:
        """A load is over."""


def readers_for(device: str) -> int:
    """How many threads read experts at once. One where cores compute: they have other work, and packing is theirs."""
    if device == "cpu":
        return 1
    return max(1, min(MOST_READERS, usable_cores() // (2 * max(1, torch.cuda.device_count()))))


class ExpertSource:
    """Knows which tensors make up each expert, and assembles one at a time, unless the host's store has it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        fill: Callable[[ExpertSource], object],
        shared: SharedWeights | None = None,
        expert_bytes: int = 0,
        progress: LoadProgress | None = None,
    ) -> None:
        self.others: OtherHosts | None = None  # from which experts are taken, as their files are not here
        self.pack: Pack = stays_plain  # see `Backend.pack`
        self.room: Room | None = None  # on a GPU, if it has been opened
        self.readers = readers_for(device.type)
        self._progress = progress or LoadProgress()
        self.expert_bytes = expert_bytes  # of one expert in one layer
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._fill = fill  # calls `add` for all; only once something has to be read
        self._filled = False
        self._filling = threading.Lock()
        self._shared = shared
        self._fused: dict[tuple[int, str], str] = {}  # (layer, parameter) -> a tensor with all experts
        self._parts: dict[tuple[int, int, str], list[tuple[str, str]]] = defaultdict(list)  # -> (pattern, tensor)
        self._converters: dict[str, Any] = {}  # parameter -> transformers' rule that merges its parts

    def add(self, layer: int, parameter: str, name: str, pattern: str | None, converter: Any) -> None:
        """Note that tensor `name` belongs to `parameter` of the experts of MoE layer `layer`."""
        if pattern is None:
            self._fused[layer, parameter] = name
            return
        match = _EXPERT_INDEX.search(name)
        if match is None:
            raise ModelError(f"cannot tell which expert {name} belongs to", hint="is this a supported family?")
        self._parts[layer, int(match.group(1)), parameter].append((pattern, name))
        self._converters[parameter] = converter

    def load(self, layer: int, expert: int) -> ExpertWeights:
        """Get expert `expert` of MoE layer `layer`, and nothing else."""
        ((_, weights),) = self.load_many([(layer, expert)])
        return weights

    def load_many(
        self,
        wanted: Iterable[tuple[int, int]],
        before_read: Callable[[], object] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Generator[tuple[tuple[int, int], ExpertWeights]]:
        """Get experts one after the other, until `stop`; `before_read` is called before each that is read.

        In order, save that what another rank of the host is reading comes later: they divide the reading. Without
        `before_read` it is urgent.
        """
        left = list(wanted)
        self._progress.expect(len(left) * self.expert_bytes)
        if self.room is not None:
            self.room.expect(left)
        if self._shared is None:
            for key in left:
                if before_read is not None:
                    before_read()
                yield key, self._placed(key, self._entry(*key).alone(), mapped=False)
                self._progress.add(self.expert_bytes)
            return
        with (
            self._shared.session(self._progress) as session,
            self._peers(session, stop, urgent=before_read is None) as peers,
        ):
            pace, barren = _Pace(threading.Lock(), session, before_read or (lambda: None), stop, self._progress), 0
            while left and not stop():
                some = left[: max(1, min(BATCH, len(left) // 4, SHARD_BYTES // max(1, self.expert_bytes)))]
                names = {expert_name(*key): key for key in some}
                found, ours = session.claim(list(names), partial(self._on_devices, names))
                barren = 0 if found or ours else barren + len(some)
                if barren >= len(left):  # other ranks read all that is left
                    barren, ours = 0, [] if session.wait(SIGN_TIMEOUT_S) else list(names)
                try:
                    entries = [self._entry(*names[name]) for name in ours] if peers is None else peers.entries(ours)
                    read = self._read(entries, pace, 1 if peers is not None else self.readers)
                except LoadStopped:
                    return
                if self.room is not None:  # many at once, where bytes were compared before
                    self.room.fetch({names[name]: mapped.note for name, mapped in found.items()})
                there = [name for name in names if name in found or name in read]
                left = left[len(some) :] + [key for name, key in names.items() if name not in there]
                self._progress.add(len(found.keys() - read) * self.expert_bytes)
                for name in there:
                    key = names[name]
                    yield key, self._placed(key, read.get(name) or found[name], mapped=name in found)
            self._shared.report()

    def _on_devices(self, keys: Mapping[str, tuple[int, int]], digests: Mapping[str, bytes]) -> bool:
        """Whether all of these are in our room now, so that their bytes on the host are not looked at."""
        return self.room is not None and self.room.fetch({keys[name]: digest for name, digest in digests.items()})

    def _peers(
        self, session: Session, stop: Callable[[], bool], *, urgent: bool
    ) -> AbstractContextManager[PeerWeights | None]:
        if self.others is None or self._shared is None:
            return nullcontext()
        return closing(PeerWeights(self._shared, session, self.others, self._progress.mark, stop, urgent=urgent))

    def _read(self, entries: list[Entry], pace: _Pace, readers: int) -> dict[str, Mapped]:
        """Read experts straight into the host's store if that has room. What comes from other hosts takes one reader:
        `PeerWeights` is for one thread.
        """
        if not entries:
            return {}
        kept = self._filled_shards([pace.entry(entry) for entry in entries], readers)
        return {entry.name: kept.get(entry.name) or entry.alone() for entry in entries}

    def _filled_shards(self, entries: list[Entry], readers: int) -> dict[str, Mapped]:
        """One shard, or one per reader: new memory, its content and its checksum take a core a second per GB or so."""
        if self._shared is None:
            return {}
        if readers == 1:
            return self._shared.fill(entries)
        parts = [part for first in range(readers) if (part := entries[first::readers])]
        with ThreadPoolExecutor(readers, "read-experts") as pool:
            return dict(ChainMap(*pool.map(self._shared.fill, parts)))

    def _entry(self, layer: int, expert: int) -> Entry:
        with self._filling:
            if not self._filled:
                self._fill(self)
                self._filled = True
        slots = [self._slot(layer, expert, name)._replace(pack=self.pack) for name in PARAMETERS]
        return Entry(expert_name(layer, expert), slots, expert_digest)

    def dropped(self, keys: Iterable[tuple[int, int]]) -> None:
        """These experts are used no more."""
        if self.room is not None:
            self.room.drop(keys)

    def _placed(self, key: tuple[int, int], found: Mapped, *, mapped: bool) -> ExpertWeights:
        matrices = [found.tensors[name] for name in PARAMETERS]
        there = self.room.place(key, found.note, [plain(m) for m in matrices]) if self.room is not None else None
        gate_up, down = [m.t() for m in there] if there is not None else [self._operand(m) for m in matrices]
        return ExpertWeights(gate_up, down, mapped, found.note)

    def _operand(self, matrix: Tensor) -> Tensor:
        if self._device.type == "cpu" and is_packed(matrix):
            return matrix
        return plain(matrix).to(self._device).t()

    def _slot(self, layer: int, expert: int, parameter: str) -> Slot:
        fused = self._fused.get((layer, parameter))
        if fused is not None:
            return self._direct(parameter, [self._checkpoint.stored(fused, expert)])
        parts = self._parts.get((layer, expert, parameter))
        if not parts:
            raise ModelError(f"the checkpoint lacks {parameter} of expert {expert} in MoE layer {layer}")
        names = dict(parts)
        if (order := self._row_wise(parameter, names)) is not None:
            return self._direct(parameter, [self._checkpoint.stored(names[pattern]) for pattern in order])
        merged = self._merge(parameter, {pattern: [self._checkpoint.read(name)] for pattern, name in parts})
        return Slot(parameter, self._dtype, tuple(merged.shape), copied(merged))

    def _row_wise(self, parameter: str, names: Mapping[str, str]) -> list[str] | None:
        """The patterns in the order in which the rows of their tensors make up the parameter; None: it is not so."""
        from transformers.core_model_loading import Concatenate, MergeModulelist

        rule = self._converters[parameter]
        patterns: list[str] = list(rule.source_patterns)
        kinds = [(type(op), getattr(op, "dim", None)) for op in rule.operations]
        usual = kinds == [(MergeModulelist, 0)] and len(patterns) == 1
        usual |= kinds == [(MergeModulelist, 0), (Concatenate, 1)]
        return patterns if usual and names.keys() == set(patterns) else None

    def _direct(self, parameter: str, parts: Sequence[Stored]) -> Slot:
        """A slot that is read from the file, part after part."""
        rows = sum(part.shape[0] for part in parts)

        def fill(room: Tensor) -> int:
            checksum, first = 0, 0
            for part in parts:
                target = room[first : first + part.shape[0]]
                first += part.shape[0]
                if part.dtype == room.dtype:
                    checksum = self._checkpoint.read_into(part, memory_of(target), checksum)
                else:
                    made = torch.empty(part.shape, dtype=part.dtype)
                    self._checkpoint.read_into(part, memory_of(made))
                    checksum = zlib.crc32(memory_of(target.copy_(made)), checksum)
            return checksum

        return Slot(parameter, self._dtype, (rows, *parts[0].shape[1:]), fill)

    def _merge(self, parameter: str, tensors: dict[str, Any]) -> Tensor:
        """Apply transformers' merge rule to the parts of a single expert."""
        converter = self._converters[parameter]
        missing = [pattern for pattern in converter.source_patterns if pattern not in tensors]
        if missing:
            raise ModelError(f"the checkpoint lacks {missing[0]} of an expert", hint="is it complete?")
        ordered = {pattern: tensors[pattern] for pattern in converter.source_patterns}
        for operation in converter.operations:
            ordered = operation.convert(
                ordered, source_patterns=converter.source_patterns, target_patterns=converter.target_patterns
            )
        (merged,) = ordered.values()
        result: Tensor = (merged[0] if isinstance(merged, list) else merged)[0]
        return result
