"""The detector and the restart policy through hours of a virtual clock."""

from __future__ import annotations

from random import Random

from chaos.mutants.checks.promise import require
from membership.base.rank_id import RankId
from workers.agent.decide import Heartbeat, hung, observe
from workers.fleet.watchdog import Look, Watchdog
from workers.protocol.restart_policy import RestartPolicy, judge

AFTER_S = 3.0


def pauses_of_the_machine() -> None:
    """A whole machine stands still for a while, again and again: no rank is blamed. One that hangs is, in time."""
    random = Random(1)
    for hangs in (False, True):
        now, beat, blamed_at = 0.0, 0, 0.0
        seen, paused = Heartbeat(beat, now), False
        watchdog, look = Watchdog(), Look("S", turns=1)
        watchdog.began(1, [RankId(0, 1)], now)
        for turn in range(400):
            paused = not hangs and not paused and random.random() < 0.2
            now += random.choice([4.0, 60.0]) if paused else 0.25
            if not hangs and not paused:
                beat += 1
                look = Look("S", turns=1 + turn // 2, beats=turn, steps=turn // 3)
            seen = observe(seen, beat, now)
            blamed = hung(seen, now, after_s=AFTER_S) or bool(watchdog.watch({RankId(0, 1): look}, now))
            require(hangs or not blamed, f"at {now:.0f} s a rank was blamed for a pause of its machine")
            blamed_at = blamed_at or (now if blamed else 0.0)
        require(not hangs or 0 < blamed_at < 2 * AFTER_S, f"a rank that hangs was found after {blamed_at:.1f} s")


def crash_loop() -> None:
    """A slot whose ranks die at once is tried a few times, ever more slowly, and is set aside; a rare death costs no
    time."""
    random, policy = Random(1), RestartPolicy()
    for lives_s, quarantine in ((0.05, True), (600.0, False)):
        now, deaths, waits = 0.0, tuple[float, ...](), list[float]()
        for _ in range(50):
            now += lives_s
            last = judge(
                policy, rank=0, incarnation=len(deaths) + 1, reason="died", deaths=deaths, restarts=len(deaths),
                now=now, chance=random.random(),
            )  # fmt: skip
            deaths, waited = (*deaths, now), last.not_before - now
            waits.append(waited)
            if last.quarantined:
                break
            now += waited
        require(last.quarantined == quarantine, f"after {len(deaths)} deaths: quarantined is {last.quarantined}")
        if quarantine:
            require(len(deaths) <= 10, f"{len(deaths)} deaths until the slot was set aside")
            require(waits[1] > 0 and waits == sorted(waits) and waits[-1] > waits[1], f"it waited {waits} s")
        else:
            require(not any(waits), f"a rare death had the slot wait {waits} s")
