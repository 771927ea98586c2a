"""Rows of `recovery.py` that stop a rank, or kill the agent, the engine or the controller."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median

import psutil

from benchmarks.recovery_cluster import Scene, scene
from benchmarks.recovery_ranks import RANKS, STREAMS
from benchmarks.recovery_report import Report, say
from chaos.faults import Killed, kill
from membership.base.errors import ElasticError, WaitTimeout
from membership.base.events import Event
from membership.store import codec
from membership.store.keys import Keys
from membership.store.records import LeaderRecord

TTL_S = 2.0
AS_A_CONTROLLER_STARTS = (
    "import elastic.cli.main, elastic.cli.roles, elastic.serve.role_main, "
    "membership.planning.controller, membership.store.etcd"
)


def of_role(event: Event, pid: int) -> bool:
    """Whether the supervisor reports this process's end."""
    return event.kind == "role_died" and event.fields.get("pid") == pid


def kill_role(scene: Scene, name: str, pid: int) -> tuple[int, Killed]:
    """SIGKILL a role at a random moment, and prove it: where in the history that was, and the proof."""
    scene.pause()
    mark = scene.history.mark()
    killed = kill(pid)
    died = scene.history.wait(mark, f"the end of the {name}, process {pid}", lambda e: of_role(e, pid))
    if "SIGKILL" not in str(died.fields.get("reason")):
        raise ElasticError(f"the {name} ended otherwise: {died.fields}")
    return mark, killed


def ended(pid: int) -> bool:
    """Whether there is no such process, or only its remains."""
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
            in "ZX"
        )
    except (FileNotFoundError, ProcessLookupError):
        return True


def zygote(scene: Scene) -> int:
    """The process that keeps what ranks import."""
    family = psutil.Process(scene.cluster.pid).children()
    return next(child.pid for child in family if child.cmdline()[0].startswith("elastic-ep::zygote"))


def row_agent(report: Report, kills: int, seed: int) -> None:
    """SIGKILL of the agent, which ends its ranks: full strength again by its successor.

    Each time once more with the zygote killed before, so that what it keeps has to be imported anew.
    """
    took: dict[str, list[float]] = {"kept": [], "anew": []}
    with scene(RANKS, STREAMS, seed, steady_s=1.0) as at:
        for number, imports in ((number, imports) for number in range(kills) for imports in took):
            if imports == "anew":
                kill(zygote(at))
            state, found = at.state(), took[imports]
            (agent,) = state.agents.values()
            ranks = [at.pid_of(rank) for rank in range(RANKS)]
            mark, killed = kill_role(at, "agent", agent.pid)
            full = at.history.wait_adopted(mark, RANKS, "after the agent's death")
            left = [pid for pid in ranks if not ended(pid)]
            if left:
                raise ElasticError(f"ranks outlived their agent: {left}")
            found.append((at.history.when(full) - killed.at) * 1000)
            report.receipt(
                "agent", kill=number, pid=agent.pid, signal=9, full_ms=found[-1], ranks_ended=ranks, imports=imports
            )
            say(f"agent {number}: full after {found[-1]:.0f} ms, imports {imports}")
            at.until_streaming()
    report.add("full strength again, agent restarted", f"{STREAMS} streams", "4 / 8 s", took["kept"], 0)
    report.add("the same, imports anew (no zygote)", f"{STREAMS} streams", "", took["anew"], 0)
    report.note(f"the zygote: {median(took['anew']) / median(took['kept']):.1f} x sooner at full strength again")
    report.ended("agent", at.verdict)


def row_stop(report: Report, kills: int, seed: int) -> None:
    """SIGSTOP of a rank until it is masked: with requests of its own (watchdog), and in an idle cluster (lease)."""
    for streams, condition, target in ((STREAMS, "under load", "1 s"), (0, "idle, TTL 2 s", "3 s")):
        found, signs = [], Counter[str]()
        with scene(RANKS, streams, seed, steady_s=1.0, RECOVERY_TTL_S=TTL_S) as at:
            for number in range(kills):
                rank = number % RANKS
                pid = at.pid_of(rank)
                at.pause()
                mark, began = at.history.mark(), time.monotonic()
                os.kill(pid, signal.SIGSTOP)
                until_stopped(pid)
                masked = at.history.wait(
                    mark, f"mask of rank {rank}", lambda e, r=rank: e.kind == "rank_masked" and e.rank == r
                )
                found.append((at.history.when(masked) - began) * 1000)
                signs[masked.fields["source"]] += 1
                at.history.wait_adopted(mark, RANKS, f"after rank {rank} was stopped")
                deadline = time.monotonic() + 30.0
                while not ended(pid):  # the process that fences it also ends it
                    if time.monotonic() > deadline:
                        raise WaitTimeout(f"the stopped rank {rank} (pid {pid}) is still there after 30 s")
                    time.sleep(0.01)
                report.receipt(
                    "stop", kill=number, rank=rank, pid=pid, signal=19, streams=streams, masked_ms=found[-1],
                    source=masked.fields["source"],
                )  # fmt: skip
                say(f"stop {number}: masked after {found[-1]:.0f} ms by {masked.fields['source']}")
        report.add("SIGSTOP -> fenced", condition, f"<= {target}", found, 0)
        report.note(f"stop, {condition}: noticed by {dict(signs)}")
        report.ended(f"stop, {condition}", at.verdict)


def until_stopped(pid: int) -> None:
    """The proof: all threads of the process are in state T."""
    deadline = time.monotonic() + 5.0
    while True:
        stats = (
            Path(f"/proc/{pid}/task/{task}/stat").read_text(encoding="utf-8", errors="replace")
            for task in os.listdir(f"/proc/{pid}/task")
        )
        if all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats):
            return
        if time.monotonic() > deadline:
            raise WaitTimeout(f"process {pid} did not stop")


def row_engine(report: Report, kills: int, seed: int) -> None:
    """SIGKILL of the engine until streams go on: every one of them, by what clients saw."""
    deaths: list[tuple[Killed, float]] = []
    with scene(RANKS, STREAMS, seed) as at:
        for _ in range(kills):
            engine = at.state().engine
            if engine is None:
                raise ElasticError("there is no engine")
            mark, killed = kill_role(at, "engine", engine.pid)
            adopted = at.history.wait(mark, "the next engine's view", lambda e: e.kind == "epoch_adopted")
            say(f"engine {len(deaths)}: view adopted after {(at.history.when(adopted) - killed.at) * 1000:.0f} ms")
            time.sleep(0.5)  # so that the streams' first new tokens belong to this death
            at.until_streaming()
            deaths.append((killed, time.monotonic()))
    first, last = [], []
    for number, (killed, until) in enumerate(deaths):
        back = [
            max((b - a, b) for a, b in pairs)[1] - killed.at
            for record in at.records
            if (pairs := [
                (a, b) for a, b in zip(record.token_times, record.token_times[1:], strict=False)
                if b > killed.at and a < killed.at + 0.25 and b < until
            ])
        ]  # fmt: skip
        if not back:
            raise ElasticError(f"no stream was under way at the engine's death {number}")
        first.append(min(back) * 1000)
        last.append(max(back) * 1000)
        report.receipt(
            "engine", kill=number, pid=killed.pid, signal=9, first_ms=first[-1], last_ms=last[-1], streams=len(back)
        )
    report.add("engine killed -> streams go on", f"the last of {STREAMS} streams", "500 / 1500 ms", last, 0)
    report.add("- the first of them", f"{STREAMS} streams", "", first, 0)
    report.ended("engine", at.verdict)


def row_controller(report: Report, kills: int, seed: int) -> None:
    """SIGKILL of the leading controller: the largest token gap until there is another leader.

    Its supervisor starts a new one meanwhile, which costs a core. So each kill is paired with a start of such a process
    and no kill: what the machine does, and what the death does.
    """
    deaths: list[tuple[Killed, float]] = []
    starts: list[float] = []
    with scene(RANKS, STREAMS, seed, steady_s=30.0) as at:
        keys = Keys(at.state().config.cluster)  # type: ignore[union-attr]
        for _ in range(kills):
            leader = codec.decode(at.cluster.read(keys.leader), LeaderRecord)
            mark, killed = kill_role(at, "controller", leader.pid)
            elected = at.history.wait(mark, "another leader", lambda e: e.kind == "leader_elected")
            deaths.append((killed, at.history.when(elected)))
            say(f"controller {len(deaths)}: another after {(deaths[-1][1] - killed.at) * 1000:.0f} ms")
            at.pause()
            starts.append(time.monotonic())
            subprocess.run([sys.executable, "-c", AS_A_CONTROLLER_STARTS], check=True, timeout=60)
    found = []
    for number, (killed, elected_at) in enumerate(deaths):
        beyond = at.beyond(at.gaps(killed.at, elected_at))
        found += [] if beyond is None else [beyond]
        report.receipt(
            "controller", kill=number, pid=killed.pid, signal=9, beyond_ms=beyond,
            elected_ms=(elected_at - killed.at) * 1000, steady_p99_ms=at.steady_p99_ms(),
        )  # fmt: skip
    window_s = sum(elected_at - killed.at for killed, elected_at in deaths) / max(1, len(deaths))
    report.add("controller killed -> data-plane stall", "largest gap beyond steady p99", "0 / 0", found)
    started = [gap for since in starts if (gap := at.beyond(at.gaps(since, since + window_s))) is not None]
    report.add("- the same when such a process starts and none is killed", f"windows of {window_s:.2f} s", "", started)
    report.add("- the same with neither (chance)", f"windows of {window_s:.2f} s", "", at.control(window_s))
    report.ended("controller", at.verdict)
