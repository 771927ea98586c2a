"""What must hold where the simulation does not look: small scenarios on the real modules, of a second or two each.

Each is green on the product as it is. Each states a promise and looks at what comes of a fault, not at how the guard
is written: so it stays true when the guard is written otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

from chaos.mutants.checks import decisions, exchange, files, membership, queues, silence, steps, streams

CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        membership.leases, membership.fence, membership.elections, membership.proposals, membership.mirrors,
        membership.given_up, membership.replaced_store, files.records, files.kv_copies,
        decisions.pauses_of_the_machine, decisions.crash_loop, silence.silent_ranks,
        streams.journal, streams.draws, streams.late_answers, steps.steps,
        exchange.rows, exchange.torn_requests, exchange.strangers, queues.older_engines, queues.evicted,
    )
}  # fmt: skip
