"""When a rank slot may run again after a death: exponential backoff with jitter, then quarantine.

Pure: the caller passes the time and the random number, so that a simulation can replay every decision. A first death
costs no delay: most deaths are single ones. Deaths that follow one another back off, from `base_s`. After `intensity`
deaths within `window_s` restarting does not help, and the slot is set aside.
"""

from __future__ import annotations

from dataclasses import dataclass

from membership.base.endings import signal_name
from membership.base.rank_id import RankId
from membership.base.timing import CLOCK_SKEW_S
from membership.store.records import ClusterConfig, RankExit
from workers.protocol.step_fence import FENCED_STATUS, FULL_STATUS, LOST_STATUS

ENDINGS = {
    FENCED_STATUS: "found itself evicted",
    LOST_STATUS: "lost its device",
    FULL_STATUS: "ran out of device memory",
}


FULL_DEATHS = 3
"""Deaths of a slot in a row for want of device memory, after which it is set aside, whatever time its loads take. One
that could serve for the policy's window before it died begins a new row."""


def ending(status: int) -> str:
    """A process's exit status (negative: the signal) in words."""
    if status < 0:
        return f"killed by signal {-status}, {signal_name(-status)}"
    return ENDINGS.get(status, f"exited with status {status}")


@dataclass(frozen=True)
class RestartPolicy:
    """Delays and limits. A slot is quarantined at its `intensity`-th death within `window_s`."""

    base_s: float = 0.1
    factor: float = 2.0
    max_s: float = 30.0
    jitter: float = 0.5  # up to this fraction is added to a delay
    intensity: int = 6
    window_s: float = 60.0


def policy_of(config: ClusterConfig) -> RestartPolicy:
    """As the cluster is configured."""
    return RestartPolicy(intensity=config.restart_intensity, window_s=config.restart_window_s)


def counted(deaths: tuple[float, ...], last: RankExit | None) -> tuple[float, ...]:
    """The slot's deaths without those that an operator has forgiven."""
    return deaths if last is None else tuple(at for at in deaths if at > last.forgiven)


def recent_deaths(policy: RestartPolicy, deaths: tuple[float, ...], now: float) -> tuple[float, ...]:
    """The deaths that still count at `now`. One dated by a clock far ahead of ours does not: it would for too long."""
    return tuple(at for at in deaths if -CLOCK_SKEW_S <= now - at < policy.window_s)


def backoff_s(policy: RestartPolicy, recent: int, chance: float) -> float:
    """How long to hold the slot back at its `recent`-th death in the window; `chance` is uniform in [0, 1)."""
    if recent <= 1:
        return 0.0
    exponent = min(recent - 2, 32)  # beyond that every sane policy is at max_s, and floats stay finite
    delay = min(policy.max_s, policy.base_s * policy.factor**exponent)
    return delay * (1.0 + policy.jitter * chance)


FULL_SPARE_S, FULL_SPARE_MAX_S = 60.0, 1800.0
"""Until a spare is made after one that lacked device memory: doubled for each in a row, as each takes memory beside
ranks that serve until it fails."""


def full_spare_s(policy: RestartPolicy, full: int, chance: float) -> float:
    """How long no spare is made after `full` of them in a row lacked device memory; `chance` is uniform in [0, 1)."""
    return min(FULL_SPARE_MAX_S, FULL_SPARE_S * policy.factor ** min(full - 1, 32)) * (1.0 + policy.jitter * chance)


def exit_record(
    policy: RestartPolicy,
    rank: RankId,
    reason: str,
    deaths: tuple[float, ...],
    restarts: int,
    now: float,
    chance: float,
) -> RankExit:
    """The exit record for a death at `now`. `deaths` are the slot's earlier deaths, `restarts` how many ever."""
    recent = len(recent_deaths(policy, deaths, now)) + 1
    quarantined = recent >= policy.intensity
    if quarantined:
        reason = f"{reason}; {recent} deaths within {policy.window_s:g} s, slot set aside"
    return RankExit(
        rank=rank.rank,
        incarnation=rank.incarnation,
        reason=reason,
        at=now,
        restarts=restarts + 1,
        not_before=now + backoff_s(policy, recent, chance),
        quarantined=quarantined,
    )
