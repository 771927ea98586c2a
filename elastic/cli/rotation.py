"""Having a cluster go over to another join secret while it serves: `elastic keys rotate`.

Once the config names it (`membership/operations/rotate_keys.py`), the engine begins a new term by itself. What is left
are rank processes that listen with the one before: a rollout replaces them. An interrupted rotation is continued by
running it again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from elastic.cli.client import POLL_S, Client
from elastic.cli.rollout import is_unfinished, rollout
from membership.base.errors import ElasticError, NoAnswer, PlanRefused, WaitTimeout
from membership.operations.rotate_keys import RotationPlan
from membership.store.records import Operation

ROUNDS = 3  # a rank may be started with the secret before while others are replaced, where a host has lost the new one


def rotate(client: Client, timeout_s: float, stop: threading.Event) -> Iterator[Operation]:
    """Go over to the other secret; yields the present operation whenever it has changed.

    Returns early once `stop` is set. Raises PlanRefused, what `rollout` raises, and WaitTimeout if the engine does not
    begin anew within `timeout_s`.
    """
    before = client.plan_rotation()
    if lacks_its_end(client, before):
        yield from rollout(client, before.before, timeout_s, stop)
        if stop.is_set():
            return
    elif before.refused:
        raise PlanRefused(before.refused, hint=before.hint)
    client.rotate_keys(before.generation)
    for _ in range(ROUNDS):
        plan = _after_engine(client, timeout_s, stop)
        if stop.is_set() or not plan.ranks:
            return
        if plan.refused:
            raise PlanRefused(plan.refused, hint=plan.hint)
        yield from rollout(client, plan.before, timeout_s, stop)
    ranks = _after_engine(client, timeout_s, stop).ranks
    if ranks and not stop.is_set():
        named = ", ".join(map(str, ranks))
        raise ElasticError(f"ranks {named} were started with the old join secret again", hint="see: elastic keys ls")


def lacks_its_end(client: Client, plan: RotationPlan) -> bool:
    """Whether all listen with the new secret, and the rollout that saw to it was interrupted just before its end."""
    return plan.begun and not plan.ranks and not plan.engine and is_unfinished(client, plan.before)


def _after_engine(client: Client, timeout_s: float, stop: threading.Event) -> RotationPlan:
    """What is left once the engine listens with the new secret. If that is nothing, the one before is retired."""
    deadline, awaited = time.monotonic() + timeout_s, "the engine still listens with the old join secret"
    while True:
        silence = ""
        try:
            plan = client.plan_rotation()
            if stop.is_set() or not (plan.engine or plan.ends):
                return plan
            if plan.ends:
                awaited = "the old join secret is not seen to be retired"
                client.rotate_keys(plan.generation)
        except NoAnswer as error:
            silence = f" ({error})"
        if time.monotonic() > deadline:
            raise WaitTimeout(
                f"{awaited} after {timeout_s:g} s{silence}",
                hint="see: elastic keys ls; then run elastic keys rotate again",
            )
        stop.wait(POLL_S)
