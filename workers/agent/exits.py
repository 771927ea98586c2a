"""The deaths in this node's rank slots: how each process ended, and what follows by the restart policy.

A death is noticed at once; the process's exit status comes a little later.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from msgspec.structs import replace

from membership.base.endings import OomKills
from membership.base.rank_id import RankId
from membership.store.records import RankExit
from workers.agent.restart_policy import FULL_DEATHS, RestartPolicy, counted, ending, exit_record, recent_deaths


class Exits:
    """The deaths and exit records that the store may not have yet."""

    def __init__(
        self, policy: RestartPolicy, chance: random.Random | None = None, oom_kills: OomKills | None = None
    ) -> None:
        self._policy = policy
        self._deaths: dict[int, tuple[float, ...]] = {}
        self._full: dict[int, tuple[float, ...]] = {}  # the last of them in a row, if for want of device memory
        self._records: dict[int, RankExit] = {}
        self._endings: dict[RankId, str] = {}
        self._chance = chance or random.Random()  # spreads restarts; nothing else rests on it
        self._oom_kills = oom_kills or OomKills()
        self._killed: set[RankId] = set()  # by us

    def killed(self, key: RankId) -> None:
        """We end this rank ourselves: its signal needs no explanation."""
        self._killed.add(key)

    def died(
        self,
        key: RankId,
        reason: str,
        stored: Mapping[int, RankExit],
        now: float,
        prepared_at: float = 0.0,
        *,
        refused: bool = False,
        device_full: bool = False,
    ) -> RankExit:
        """The exit record of a rank that is dead; `stored` are the records in the store. `device_full`: it ended for
        want of its device's memory. `prepared_at`: since when it could serve; 0.0: it never could."""
        slot = key.rank
        last = self._records.get(slot) or stored.get(slot)
        deaths = counted(self._deaths.get(slot, ()), stored.get(slot))
        if (how := self._endings.get(key)) is not None:
            reason = f"{how}; {reason}"
        restarts = last.restarts if last else 0
        record = exit_record(self._policy, key, reason, deaths, restarts, now, self._chance.random())
        served = 0.0 < prepared_at <= now - self._policy.window_s  # so long that what its slot needs did fit
        before = () if served else counted(self._full.get(slot, ()), stored.get(slot))
        self._full[slot] = full = (*before, now) if device_full else ()
        if len(full) >= FULL_DEATHS and not record.quarantined:
            record = replace(record, quarantined=True, reason=f"{reason}; {len(full)} times in a row, slot set aside")
        if refused:
            record = replace(record, refused=True, quarantined=True)
        self._deaths[slot] = (*recent_deaths(self._policy, deaths, now), now)
        self._records[slot] = record
        return record

    def ended(self, key: RankId, status: int) -> RankExit | None:
        """The exit status has come: the record with it, if the rank's was written without."""
        cause = "" if key in self._killed else self._oom_kills.of_a_death(status)
        self._endings[key] = how = ending(status) + cause
        written = self._records.get(key.rank)
        if written is None or written.incarnation != key.incarnation or written.refused:
            return None
        self._records[key.rank] = record = replace(written, reason=f"{how}; {written.reason}")
        return record
