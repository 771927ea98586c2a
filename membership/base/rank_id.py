"""The identity of one rank process: its slot and its incarnation. A restart fills the same slot under a new one."""

from __future__ import annotations

from typing import NamedTuple


class RankId(NamedTuple):
    """`rank` is the slot, stable and never renumbered; `incarnation` is unique and rises over the cluster's life."""

    rank: int
    incarnation: int
