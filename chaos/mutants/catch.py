"""Runs inside a mutant's tree and tries to catch it: `python -m chaos.mutants.catch TREE simulate|pytest ARGUMENT...`.

Each attempt is a process of its own: a mutant may hang, crash or leak without harming any other. It first proves that
the tree is what it imports, because a hunt in the genuine product would prove nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from chaos.mutants.mutant import SIMULATE, Shown
from chaos.mutants.tree import PACKAGES, TESTS, require_tests
from membership.base.errors import ConfigError, ElasticError
from membership.base.starter import end_with_starter

if TYPE_CHECKING:
    import pytest


PYTEST = "pytest"
MINIMISE_LIMIT_S = 15.0  # of processor time: the result must not depend on what else runs
PYTEST_OPTIONS = ("-q", "--tb=no", "-p", "no:cacheprovider", "-o", "addopts=")


class Catch(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one attempt. `how`: the promise that broke, "" if none did.

    If not `sure`, the attempt itself went wrong and proves nothing; `how` says why.
    """

    how: str = ""
    lives: int = 0
    shown: Shown | None = None  # the shortest schedule that shows it
    seconds: float = 0.0
    cpu_s: float = 0.0  # of processors, of this process from its start and of what it started
    events: int | None = None  # in the shortest schedule that shows it; None: unknown
    sure: bool = True


def main(tree: str, catcher: str, *arguments: str) -> None:
    """Try to catch the mutant; the last line of stdout is the `Catch` as JSON. ConfigError outside the tree."""
    for package in PACKAGES if catcher == SIMULATE else (*PACKAGES, TESTS):
        spec = find_spec(package)
        found = Path(spec.origin if spec and spec.origin else "").parent
        if found != Path(tree) / package:
            raise ConfigError(f"{package} would be imported from {found}, not from the mutant's tree {tree}")
    began = time.monotonic()
    caught = (
        _simulate(msgspec.json.decode(arguments[0], type=list[Shown]))
        if catcher == SIMULATE
        else _run_tests(tree, arguments)
    )
    caught = msgspec.structs.replace(caught, seconds=time.monotonic() - began, cpu_s=sum(os.times()[:4]))
    sys.stdout.write("\n" + msgspec.json.encode(caught).decode() + "\n")


def _simulate(runs: Sequence[Shown]) -> Catch:
    """Run simulations until one finds a violation. One that ends in any other error has noticed something too."""
    from chaos.simulation.episode import run_episode
    from chaos.simulation.minimise import minimise

    for done, run in enumerate(runs, start=1):
        try:
            episode = run_episode(run.seed, run.keep, timing=run.timing, hosts=run.hosts, gpus=run.gpus)
        except Exception as error:  # noqa: BLE001 - the mutant may raise anything
            return Catch(how=f"{type(error).__name__}: {error}", lives=done, shown=run)
        if episode.violation and run.keep is not None:
            return Catch(how=episode.violation, lives=done, shown=run, events=len(episode.steps))
        if episode.violation:
            shortest = minimise(episode, MINIMISE_LIMIT_S, clock=time.process_time)
            shown = Shown(run.seed, shortest.keep, shortest.timing, run.hosts, run.gpus)
            return Catch(how=episode.violation, lives=done, shown=shown, events=len(shortest.events))
    return Catch(lives=len(runs))


class _Outcomes:
    """A pytest plugin that notes why tests failed, and apart from that what went wrong around them."""

    def __init__(self) -> None:
        self.failed: dict[str, str] = {}  # test id -> the promise that broke
        self.wrong: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A module that cannot be imported catches nothing."""
        if report.failed:
            self.wrong.append(f"{report.nodeid} cannot be collected: {report.longreprtext.strip().splitlines()[-1]}")

    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> None:
        """Only a failed assertion, or an error that the product raises on purpose, says that a promise broke."""
        import pytest

        if call.excinfo is None:
            return
        error = call.excinfo.value
        first = (str(error).strip().splitlines() or [""])[0]
        how = f"{item.nodeid.rpartition('::')[2]}: {type(error).__name__}: {first}"
        if call.when == "call" and isinstance(error, AssertionError | ElasticError | pytest.fail.Exception):
            self.failed[item.nodeid] = how
        elif call.when != "teardown" or item.nodeid not in self.failed:
            self.wrong.append(f"{how} ({call.when})")


def _run_tests(tree: str, names: Sequence[str]) -> Catch:
    """Each of the named tests must fail, and for the right reason; a name without parameters means any of them."""
    require_tests(Path(tree))
    try:
        import pytest
    except ImportError as error:
        raise ConfigError(f"mutants are caught by pytest: {error}", hint="pip install 'elastic-ep[dev]'") from error
    outcomes = _Outcomes()
    status = pytest.main([*PYTEST_OPTIONS, f"--rootdir={tree}", *names], plugins=[outcomes])
    if status == pytest.ExitCode.OK and not outcomes.wrong:
        return Catch()
    hits = {name: [how for id, how in outcomes.failed.items() if id.partition("[")[0] == name or id == name]
            for name in names}  # fmt: skip
    if status == pytest.ExitCode.TESTS_FAILED and not outcomes.wrong and all(hits.values()):
        return Catch(how="; ".join(each[0] for each in hits.values()))
    passed = [f"{name} does not notice" for name, each in hits.items() if not each]
    why = outcomes.wrong or [*passed, *outcomes.failed.values()]  # a long answer is cut
    return Catch(how="; ".join(why) or f"pytest: {status}", sure=False)


if __name__ == "__main__":
    end_with_starter()
    main(*sys.argv[1:])
