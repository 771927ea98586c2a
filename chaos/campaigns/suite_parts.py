"""What the suite consists of, and what each part must reach (figures of `make chaos`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from chaos.campaigns.suite import Goal, Part, Receipt, Stages, all_of, at_least, at_most, none_of

FAULTS = 120_000  # simulated on one host
FAULTS_OF_HOSTS = 12_000  # and over several, their network's included
FAULTS_PER_MINUTE = 20_000
REPLAYS, REPLAYS_OF_HOSTS = 500, 50
BUGS = 25
EVENTS = 6  # median of the minimised schedules
COMPUTED_S, BESIDE_S = 600.0, 2400.0  # limits of what only computes: alone; at the lowest priority beside tests
KILLS, ZOMBIES, OUTAGES, REQUESTS = 300, 40, 20, 15_000
FORMED_KILLS = 50  # while answers have a form


@dataclass(frozen=True)
class Dose:
    """How much is done. `share` 3: a third of the simulated faults. Of the soak a third is done at least: it has each
    kind of burst then, too, and the same proportions, but in it a leak looks like a process that warms up.
    """

    share: int = 1

    def of(self, whole: int) -> int:
        """This dose's part of what is simulated."""
        return -(-whole // self.share)

    def of_soak(self, whole: int) -> int:
        """This dose's part of the soak."""
        return -(-whole // min(3, self.share))


def parts(seed: int, folder: Path, pace: bool = True, dose: Dose = Dose()) -> Stages:
    """All of it, in the order in which it runs; `pace`: also its speed, alone on two idle cores."""
    drawn, record = ("--seed", str(seed), "-o", "json"), folder / "soak.jsonl"
    page, limit_s = folder / "report.html", COMPUTED_S if pace else BESIDE_S
    simulate = Part(
        "simulate", "episodes under a virtual clock",
        ("simulate", "--faults", str(dose.of(FAULTS)), "--replays", str(dose.of(REPLAYS)), *drawn),
        partial(_simulated, pace, dose), limit_s,
    )  # fmt: skip
    over_hosts = Part(
        "simulate-hosts", "the same over three hosts and their network",
        ("simulate", "--hosts", "3", "--faults", str(dose.of(FAULTS_OF_HOSTS)),
         "--replays", str(dose.of(REPLAYS_OF_HOSTS)), *drawn),
        partial(_simulated_hosts, dose), limit_s,
    )  # fmt: skip
    planted = Part("planted", "guards taken out one by one", ("planted", "-o", "json"), _planted, limit_s)
    roles = Part("roles", "each process fault for each role", ("role-matrix", "-o", "json"), _roles, 900.0)
    points = Part("failpoints", "each failpoint", ("failpoint-matrix", "-o", "json"), _points, 900.0)
    soak = Part(
        "soak", "random and nested faults under load",
        ("soak", "--kills", str(dose.of_soak(KILLS)), "--zombies", str(dose.of_soak(ZOMBIES)),
         "--outages", str(dose.of_soak(OUTAGES)), "--requests", str(dose.of_soak(REQUESTS)),
         "--ranks", "3", "--streams", "32", "--record", str(record), *drawn),
        partial(_soaked, dose), 900.0,
    )  # fmt: skip
    formed = Part(
        "structured", "ranks die while answers have to be JSON of a schema",
        ("run", "kill-structured", "-o", "json"), _formed, 900.0,
    )  # fmt: skip
    check = Part("check", "the soak's record, checked offline", ("check", str(record), "-o", "json"), _checked, 120.0)
    report = Part(
        "report", f"and drawn: {page}", ("report", str(record), "--output", str(page), "--json", "-"), _drawn, 120.0
    )
    first = ((simulate,), (over_hosts, planted)) if pace else ((simulate, over_hosts, planted),)
    return *first, (points, roles), (formed,), (soak,), (check, report)


def _simulated(pace: bool, dose: Dose, receipt: Receipt) -> Iterator[Goal]:
    seen, _, total = str(receipt["pairs"]).partition("/")
    yield at_least("faults", dose.of(FAULTS), receipt["faults"])
    if pace:
        yield at_least("faults per minute", FAULTS_PER_MINUTE, receipt["faults_per_minute"])
    yield none_of("violations", len(receipt["violations"]))
    yield at_least("seeds that replay identically", dose.of(REPLAYS), receipt["replayed"])
    if dose.share == 1:  # the last pairs are rare
        yield all_of("ordered pairs of faults", int(total), int(seen))


def _simulated_hosts(dose: Dose, receipt: Receipt) -> Iterator[Goal]:
    yield at_least("faults", dose.of(FAULTS_OF_HOSTS), receipt["faults"])
    yield none_of("violations", len(receipt["violations"]))
    yield at_least("seeds that replay identically", dose.of(REPLAYS_OF_HOSTS), receipt["replayed"])


def _planted(receipt: Receipt) -> Iterator[Goal]:
    bugs = receipt["bugs"]
    yield at_least("planted bugs", BUGS, len(bugs))
    yield all_of("caught", len(bugs), sum(bug["caught"] for bug in bugs))
    events = receipt["median_events"]
    yield at_most("events of a minimised schedule, median", EVENTS, float("inf") if events is None else events)
    yield none_of("alarms where nothing is planted", len(receipt["control"]))


def _roles(receipt: Receipt) -> Iterator[Goal]:
    yield all_of("role x fault", receipt["cells"], receipt["passed"])


def _points(receipt: Receipt) -> Iterator[Goal]:
    passed = sum(cell["ok"] for cell in receipt["results"])
    yield all_of("failpoint x {kill, raise, hang}", receipt["cells"], passed)


def _soaked(dose: Dose, receipt: Receipt) -> Iterator[Goal]:
    yield at_least("SIGKILLs of ranks", dose.of_soak(KILLS), receipt["kills"])
    yield at_least("zombies", dose.of_soak(ZOMBIES), receipt["zombies"])
    yield at_least("etcd faults", dose.of_soak(OUTAGES), receipt["outages"])
    yield at_least("requests", dose.of_soak(REQUESTS), receipt["requests"])
    for name in ("lost", "duplicated", "altered", "non_2xx"):
        yield none_of(name, receipt[name])
    yield none_of("promises broken, and leaks", len(receipt["broken"]))


def _formed(receipt: Receipt) -> Iterator[Goal]:
    yield at_least("SIGKILLs of ranks", FORMED_KILLS, receipt["faults"].get("kill", 0))
    yield at_least("structured answers, each valid", 1, receipt["requests"])
    for name in ("lost", "duplicated", "altered", "non_2xx"):
        yield none_of(name, receipt[name])
    yield none_of("promises broken", len(receipt["broken"]))


def _checked(receipt: Receipt) -> Iterator[Goal]:
    checks = [outcome for outcome in receipt["outcomes"] if outcome["promise"] != "-"]
    broken = [outcome for outcome in checks if outcome["findings"]]
    yield at_least("checks that found something to check", 7, sum(outcome["judged"] > 0 for outcome in checks))
    yield none_of("checks that found a promise broken", len(broken))


def _drawn(receipt: Receipt) -> Iterator[Goal]:
    promises = receipt["promises"]
    yield all_of("promises on the page that held", len(promises), sum(each["verdict"] == "held" for each in promises))
