"""This machine's GPUs, by the driver's own tool: no context is made, nothing is imported. What it printed is parsed by
pure functions, so they are tested without a GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import combinations

from membership.base.errors import ConfigError
from workers.exchange.cuda.window import MOST_RANKS

TOOL = "nvidia-smi"
TIMEOUT_S = 20.0
MIB = 1 << 20
QUERY = "--query-gpu=index,name,driver_version,memory.total,memory.used,uuid"
CELL = re.compile(r"\x1b\[[0-9;]*m")  # the tool underlines its heads
MODULES = ("triton", "cuda.bindings.driver")
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Gpu:
    """One of this machine's."""

    index: int
    name: str
    driver: str
    total: int  # bytes
    used: int
    uuid: str = ""


@dataclass(frozen=True)
class Gpus:
    """All of them, and which pairs reach one another: by P2P, and over what ("NV18", "PIX", ...)."""

    each: tuple[Gpu, ...] = ()
    peers: frozenset[tuple[int, int]] = frozenset()
    links: Mapping[tuple[int, int], str] | None = None
    unknown: str = ""  # why neither was to be learnt


def read_gpus(listed: str, p2p: str, topology: str, visible: str | None = None) -> Gpus:
    """Of what the tool printed. `visible`: CUDA_VISIBLE_DEVICES, if it is set; ranks count only those, from 0."""
    rows = [[cell.strip() for cell in line.split(",")] for line in listed.splitlines() if line.strip()]
    every = [Gpu(int(i), name, driver, int(t) * MIB, int(u) * MIB, uuid) for i, name, driver, t, u, uuid in rows]
    chosen = every if visible is None else _chosen(every, visible)
    number = {gpu.index: place for place, gpu in enumerate(chosen)}

    def renumbered(said: Mapping[tuple[int, int], str]) -> dict[tuple[int, int], str]:
        return {(number[a], number[b]): cell for (a, b), cell in said.items() if a in number and b in number}

    peers = frozenset(pair for pair, said in renumbered(_matrix(p2p, len(every))).items() if said == "OK")
    each = tuple(replace(gpu, index=place) for place, gpu in enumerate(chosen))
    return Gpus(each, peers, renumbered(_matrix(topology, len(every))))


def _chosen(every: list[Gpu], visible: str) -> list[Gpu]:
    """As CUDA does: by number or by the beginning of a UUID, up to the first that is not there."""
    found: list[Gpu] = []
    for name in map(str.strip, visible.split(",")):
        gpu = next((g for g in every if name and (str(g.index) == name or g.uuid.startswith(name))), None)
        if gpu is None:
            break
        found.append(gpu)
    return found


def _matrix(printed: str, count: int) -> dict[tuple[int, int], str]:
    """What is said of each pair, from rows such as "GPU0  X  NV18  0-31"."""
    found: dict[tuple[int, int], str] = {}
    for line in CELL.sub("", printed).splitlines():
        head, *cells = line.split() or [""]
        if (row := re.fullmatch(r"GPU(\d+)", head)) and len(cells) >= count and not cells[0].startswith("GPU"):
            found |= {(int(row[1]), column): cell for column, cell in enumerate(cells[:count])}
    return found


def probe() -> Gpus:
    """This machine's; none without NVIDIA's driver. ConfigError if its tool fails."""
    if shutil.which(TOOL) is None:
        return Gpus()
    try:
        listed = _said(QUERY, "--format=csv,noheader,nounits")
        p2p, topology, unknown = _topology()
        return replace(read_gpus(listed, p2p, topology, os.environ.get(VISIBLE)), unknown=unknown)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(
            f"{TOOL}: {error}", hint="is the driver loaded, and are devices given to this container?"
        ) from error


def _topology() -> tuple[str, str, str]:
    """What is between GPUs, by P2P and by links; or, last, why the tool cannot tell, as in some virtual machines. Then
    the GPUs are known all the same."""
    try:
        return _said("topo", "-p2p", "r"), _said("topo", "-m"), ""
    except (OSError, subprocess.SubprocessError) as error:
        return "", "", f"{TOOL}: {error}"


def unlinked(gpus: Gpus) -> list[tuple[int, int]]:
    """Pairs that do not reach one another's memory in both directions."""
    pairs = combinations(range(len(gpus.each)), 2)
    return [(a, b) for a, b in pairs if not {(a, b), (b, a)} <= gpus.peers]


def cpu_torch(version_of: Callable[[str], str] = version) -> str:
    """Why no rank could compute on a GPU with the torch that is installed; empty: it may."""
    with suppress(PackageNotFoundError):
        if "+cpu" in (torch := version_of("torch")):
            return f"torch {torch} computes on CPUs alone"
    return ""


def usable(version_of: Callable[[str], str] = version, found: Callable[[str], object] = find_spec) -> str:
    """Why ranks could not let rows travel between GPUs with the packages that are installed; empty: they could."""
    if reason := cpu_torch(version_of):
        return reason
    for module in MODULES:
        try:
            missing = found(module) is None
        except ModuleNotFoundError:
            missing = True
        if missing:
            return f"there is no Python package {module}"
    return ""


def exchange_slots(gpus: Gpus, ranks: int, most_ranks: int = 0) -> tuple[int, str]:
    """Slots of ranks whose rows may travel between GPUs; 0, and why, if those of so many ranks cannot.

    Each slot has a GPU of its own, and each takes memory on it. So they are as many as there are ranks, or may be
    (`most_ranks`, if it is known), and not as many as there are GPUs.
    """
    if len(gpus.each) < 2:
        return 0, f"there {'is one GPU' if gpus.each else 'is no GPU'} here"
    if (room := min(len(gpus.each), MOST_RANKS)) < ranks:
        return 0, f"{ranks} ranks share {len(gpus.each)} GPUs" if room == len(gpus.each) else _too_many(ranks)
    if (slots := min(room, max(ranks, most_ranks))) < 2:
        return 0, "there is one rank; --max-ranks says that there may be more"
    if gpus.unknown:
        return 0, f"what is between GPUs is unknown: {gpus.unknown}"
    if apart := [pair for pair in unlinked(gpus) if max(pair) < slots]:
        return 0, f"no P2P between GPUs {', '.join(f'{a} and {b}' for a, b in apart)}"
    return slots, ""


def _too_many(ranks: int) -> str:
    return f"there are {ranks} ranks, and rows travel between {MOST_RANKS} GPUs at most"


def _said(*arguments: str) -> str:
    command = [TOOL, *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=TIMEOUT_S, check=True).stdout
