"""Plants small changes in the modules that decide, one after another, and shows those that no unit test notices.

    python -m tests.support.mutation [--seed N] [--share N] [--only WORD]

Each change lives only in the memory of a forked child, which has what others wrote imported already and runs the
module's nearest tests: the tree is never touched, and most changes take a second. Of a large module a sample is drawn
by the seed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from itertools import islice
from types import CodeType

import pytest

from tests.support import ROOT
from tests.support.mutants import Mutant, explained, mutants

# Imported by each child anew; etcd3's own modules can only be imported our way (membership/store/etcd3_compat.py).
EACH_ANEW = ("membership", "workers", "elastic", "chaos", "tests", "etcd3", "__main__", "__mp_main__")
OPTIONS = ("-x", "-q", "-n0", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore")
SLOWER = 4  # a change that makes the tests take this many times as long hangs: it is caught
GRACE_S = 20.0
UNIT = "tests/unit/"
# What decides, and its nearest tests, the quick ones first.
TARGETS: dict[str, tuple[str, ...]] = {
    "membership/planning/planner.py": ("membership/planning",),
    "membership/planning/cluster_facts.py": ("membership/planning",),
    "membership/planning/rebalance.py": ("membership/planning",),
    "membership/planning/own_times.py": ("membership/planning",),
    "membership/planning/identity.py": ("membership/planning",),
    "membership/planning/next_view.py": ("membership/planning",),
    "membership/planning/node_selection.py": ("membership/planning",),
    "membership/store/lease.py": ("membership/store/test_lease.py", "workers/agent/test_registrar.py"),
    "membership/store/election.py": ("membership/store/test_election.py",),
    "workers/agent/decide.py": ("workers/agent/test_decide.py",),
    "workers/fleet/watchdog.py": ("workers/fleet",),
    "workers/exchange/router.py": ("workers/exchange/test_router.py",),
    "elastic/gateway/journal.py": ("elastic/gateway/test_journal.py", "elastic/gateway/test_engine_link.py"),
    "elastic/engine/adoption.py": ("elastic/engine/test_adoption.py",),
    "elastic/engine/migration.py": ("elastic/engine/test_migration.py", "elastic/engine/test_loop.py"),
    "elastic/engine/scheduler.py": ("elastic/engine",),
    "elastic/engine/sequence.py": ("elastic/engine",),
    "elastic/engine/waiting.py": ("elastic/engine/test_waiting.py", "elastic/engine"),
    "elastic/engine/prefix.py": ("elastic/engine/test_prefix.py", "elastic/engine"),
    "elastic/engine/kv_blocks.py": ("elastic/engine",),
}


class Planted(MetaPathFinder):
    """Imports the changed source in place of the module's own."""

    def __init__(self, mutant: Mutant) -> None:
        self.name, self.path, self.source = mutant.file[:-3].replace("/", "."), str(ROOT / mutant.file), mutant.source

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Only this module is changed."""
        if fullname != self.name:
            return None
        planted = self

        class Loader(SourceFileLoader):
            def get_code(self, fullname: str) -> CodeType:
                return compile(planted.source, planted.path, "exec", dont_inherit=True)

        return importlib.util.spec_from_file_location(fullname, self.path, loader=Loader(fullname, self.path))


class First:
    """A pytest plugin that keeps the first failure."""

    def __init__(self) -> None:
        self.failed = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test that failed, in its setup and teardown too."""
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A module that cannot be imported any more."""
        if report.failed and not self.failed:
            self.failed = report.nodeid


def attempt(mutant: Mutant | None, tests: Sequence[str], limit_s: float) -> tuple[str, list[str]]:
    """Run the tests in a child. The first that failed, "" if none did; and the modules of others that were imported."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setpgid(0, 0)
            os.close(reading)
            _run_in_child(mutant, tests, writing)
        finally:
            os._exit(1)
    os.close(writing)
    said, until = b"", time.monotonic() + limit_s
    try:
        while select.select([reading], [], [], max(until - time.monotonic(), 0))[0]:
            if not (piece := os.read(reading, 1 << 16)):
                break
            said += piece
            if said.endswith(b"\n"):
                break
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not said.endswith(b"\n"):
        return ("hangs" if time.monotonic() >= until else "crashes"), []
    failed, *modules = said.decode().rstrip("\n").split("|")
    return failed, modules


def _run_in_child(mutant: Mutant | None, tests: Sequence[str], writing: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    if mutant is not None:
        sys.meta_path.insert(0, Planted(mutant))
    first = First()
    status = pytest.main([*OPTIONS, *(UNIT + test for test in tests)], plugins=[first])
    failed = first.failed if status == pytest.ExitCode.TESTS_FAILED else "" if status == 0 else f"status {status}"
    others = sorted(name for name in sys.modules if name.partition(".")[0] not in EACH_ANEW)
    os.write(writing, ("|".join([failed, *([] if mutant else others)]) + "\n").encode())


def hunt(file: str, seed: int, share: int) -> tuple[int, int, int]:
    """Try a sample of this module's changes. How many were tried, caught and explained."""
    tests, known = TARGETS[file], explained()
    began = time.monotonic()
    failed, modules = attempt(None, tests, 300)
    if failed:
        raise RuntimeError(f"{file}: its tests fail without any change: {failed}")
    limit_s = SLOWER * (time.monotonic() - began) + GRACE_S
    for name in modules:  # so that no child need import them again
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - a module may refuse in any way; it is only slower then
            sys.stderr.write(f"{name}: {error}\n")
    sample = list(islice(mutants(file, seed), share))
    caught = explains = 0
    for mutant in sorted(sample, key=lambda each: (each.line, each.after)):
        if any(each.explains(mutant) for each in known):
            explains += 1
        elif attempt(mutant, tests, limit_s)[0]:
            caught += 1
        else:
            print(f"SURVIVED {file}:{mutant.line}\n  - {mutant.before}\n  + {mutant.after}", flush=True)
    took_s = time.monotonic() - began
    print(f"{file}: {caught} of {len(sample)} caught, {explains} explained; {took_s:.0f} s", flush=True)
    return len(sample), caught, explains


def main() -> int:
    """0 if every change was caught or is explained."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--share", type=int, default=40, help="changes per module")
    parser.add_argument("--only", default="", help="modules whose path has this word")
    asked = parser.parse_args()
    print(f"seed {asked.seed}, {asked.share} changes per module", flush=True)
    done = [hunt(file, asked.seed, asked.share) for file in TARGETS if asked.only in file]
    tried, caught, explains = (sum(column) for column in zip(*done, strict=True))
    print(f"all: {caught} of {tried} caught, {explains} explained, {tried - caught - explains} survived", flush=True)
    return int(tried > caught + explains)


if __name__ == "__main__":
    sys.exit(main())
