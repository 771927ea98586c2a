"""Runs inside a planted tree and tries to catch what was planted: `python -m chaos.mutants.catch TREE CATCHER ...`.

A process of its own for each bug, so that a bug can hang, crash or leak without anybody else noticing. It proves first
that the tree is what it imported: a hunt in the genuine product would prove nothing.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from chaos.mutants.bug import SIMULATE
from chaos.mutants.checks import CHECKS
from chaos.mutants.plant import PACKAGES
from membership.base.errors import ConfigError

MINIMISER = "chaos.simulation.minimise"
SHRINK_S = 15.0  # of processor time: what is found must not depend on what else runs


class Catch(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it. `how`: the promise that broke, "" if none did. `seed`: the life in which it did.

    Not `sure`: the catcher itself did not come to its end, so that nothing is known; `how` says why.
    """

    how: str = ""
    lives: int = 0
    seed: int = 0
    seconds: float = 0.0
    events: int | None = None  # in the shortest schedule that shows it; None: not known
    sure: bool = True


def main(tree: str, catcher: str, *seeds: str) -> None:
    """Try; one line of JSON on stdout says what came of it."""
    for package in PACKAGES:
        found = Path(importlib.import_module(package).__file__ or "")
        if found.parent != Path(tree) / package:
            raise ConfigError(f"{package} was imported from {found.parent}, not from the planted tree {tree}")
    caught = _simulate([int(seed) for seed in seeds]) if catcher == SIMULATE else _check(catcher)
    sys.stdout.write(msgspec.json.encode(caught).decode() + "\n")


def _simulate(seeds: Sequence[int]) -> Catch:
    """Live until a promise breaks. A life that ends in any other error has noticed something too."""
    from chaos.simulation.life import live

    began = time.monotonic()
    for done, seed in enumerate(seeds, start=1):
        try:
            life = live(seed)
        except Exception as error:  # noqa: BLE001 - the planted bug may raise whatever it likes
            how = f"{type(error).__name__}: {error}"
            return Catch(how=how, lives=done, seed=seed, seconds=time.monotonic() - began)
        if life.violation:
            took_s = time.monotonic() - began
            return Catch(how=life.violation, lives=done, seed=seed, seconds=took_s, events=_events(life))
    return Catch(lives=len(seeds), seconds=time.monotonic() - began)


def _events(life: Any) -> int | None:
    """How many things have to happen for what broke in this life."""
    if find_spec(MINIMISER) is None:
        return None
    return len(importlib.import_module(MINIMISER).minimise(life, SHRINK_S, clock=time.process_time).happenings)


def _check(name: str) -> Catch:
    began, how = time.monotonic(), ""
    try:
        CHECKS[name]()
    except Exception as error:  # noqa: BLE001 - the same
        how = f"{type(error).__name__}: {error}"
    return Catch(how=how, seconds=time.monotonic() - began)


if __name__ == "__main__":
    main(*sys.argv[1:])
