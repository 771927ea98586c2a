"""Planted bugs around the ranks: detection, restarts, queues, exchange, sampling, KV copies."""

from __future__ import annotations

from chaos.planted.bug import Bug

BUGS: tuple[Bug, ...] = (
    # --- who is blamed
    Bug(
        name="blamed-by-the-clock",
        guards="G9: a rank is given up for several observations without a beat, never for the time that passed alone",
        file="workers/agent_state.py",
        before="return heartbeat.misses >= misses and now - heartbeat.advanced_at >= after_s",
        after="return heartbeat.misses > 0 and now - heartbeat.advanced_at >= after_s",
        caught_by="pauses_of_the_machine",
    ),
    Bug(
        name="blamed-for-a-pause",
        guards="G9: time in which the watcher itself was held up does not count against a rank",
        file="workers/watchdog.py",
        before="passed_s = min(now - self._watched_at, 2 * TICK_S)",
        after="passed_s = now - self._watched_at",
        caught_by="pauses_of_the_machine",
    ),
    Bug(
        name="busy-rank-evicted",
        guards="G9: a rank that computes is never evicted",
        file="workers/watchdog.py",
        before="(first.turns, first.steps) or look.main_s > first.main_s",
        after="(first.turns, first.steps)",
        caught_by="silent_ranks",
    ),
    Bug(
        name="stopped-rank-kept",
        guards="G8: a rank that the kernel holds stopped is evicted within a second",
        file="workers/watchdog.py",
        before='return stopped, "stopped" if stopped.stopped_s >= STOPPED_S else ""',
        after='return stopped, ""',
        caught_by="silent_ranks",
    ),
    Bug(
        name="crash-loop-at-full-speed",
        guards="G8: deaths that follow one another have the slot wait, longer each time",
        file="workers/restart.py",
        before="    if recent <= 1:\n",
        after="    if recent:\n",
        caught_by="crash_loop",
    ),
    Bug(
        name="crash-loop-for-ever",
        guards="G8: a slot whose ranks keep dying is set aside",
        file="workers/restart.py",
        before="quarantined = recent >= policy.intensity",
        after="quarantined = False",
        caught_by="crash_loop",
    ),
    # --- between engine and rank
    Bug(
        name="let-go-without-a-record",
        guards="G9: a record that is away shows nothing: the engine keeps a rank that is assigned",
        file="elastic/engine_core.py",
        before="named |= {(spec.rank, spec.incarnation) for each in state.assignments.values() for spec in each.ranks}",
    ),
    Bug(
        name="older-engine-obeyed",
        guards="G2: a rank does what the engine says that it has joined, and no other",
        file="workers/engine_port.py",
        before="if message.engine_token == self.token:",
        after="if True:",
        caught_by="older_engines",
    ),
    Bug(
        name="older-engine-joined",
        guards="G2: a rank never goes back to an older engine",
        file="workers/engine_port.py",
        before="        if token < self.token:\n",
        after="        if False:\n",
        caught_by="older_engines",
    ),
    Bug(
        name="older-epoch-run",
        guards="G2: a step of an epoch that is over is not run",
        file="workers/engine_port.py",
        before="            if batch.epoch < self.epoch:\n",
        after="            if False:\n",
        caught_by="older_engines",
    ),
    Bug(
        name="zombie-not-told",
        guards="G2: an incarnation that was given up finds that out, in later epochs too",
        file="workers/livemask.py",
        before="        self._words[at] = max(self._words[at], incarnation)\n",
        caught_by="evicted",
    ),
    Bug(
        name="stale-blocks-taken",
        guards="G3: KV blocks come into a cache only under the number of the copy that was announced",
        file="workers/kv_transfer.py",
        before="    if found != wanted:\n",
        after="    if found[2:] != wanted[2:]:\n",
        caught_by="kv_copies",
    ),
    Bug(
        name="draws-by-row",
        guards="G3: what is drawn depends on seed and position, not on the row in the batch",
        file="workers/model/sampler.py",
        before="token = choose(values, sampling, position)",
        after="token = choose(values, sampling, row)",
        caught_by="draws",
    ),
    # --- the exchange
    Bug(
        name="masked-rank-asked",
        guards="G2: rows go to live replicas only",
        file="workers/exchange/router.py",
        before="[not excluded >> r & 1 for r in self._ranks.tolist()]",
        after="[True for r in self._ranks.tolist()]",
        caught_by="rows",
    ),
    Bug(
        name="partial-sum",
        guards="G4: no answer is computed with a missing expert",
        file="workers/exchange/router.py",
        before=(
            "            raise _lost(layer, [e for e in wanted if not 0 <= e < len(table) or table[e] == _NOBODY])\n"
        ),
        after="            continue\n",
        caught_by="rows",
    ),
    Bug(
        name="summed-as-routed",
        guards="G3: a token's experts are summed in ascending order",
        file="workers/exchange/combine.py",
        before="ids, order = topk_ids.sort(dim=-1)",
        after="ids, order = topk_ids, torch.arange(topk_ids.shape[-1]).expand_as(topk_ids)",
        caught_by="rows",
    ),
    Bug(
        name="death-wakes-nobody",
        guards="G4: who waits for a rank that dies wakes at once, and asks a replica",
        file="workers/exchange/links.py",
        before="            if not self._closed:\n                self._doorbell.ring()\n",
        caught_by="rows",
    ),
    Bug(
        name="stranger-linked",
        guards="G2: a link belongs to one pair of incarnations",
        file="workers/exchange/links.py",
        before="if dial.to_incarnation != self._incarnation or dial.rank == self._rank:",
        after="if dial.rank == self._rank:",
        caught_by="strangers",
    ),
    Bug(
        name="zombie-linked",
        guards="G2: a rank that knows a newer incarnation of a peer is not linked with an older one",
        file="workers/exchange/links.py",
        before="if self._closed or (known is not None and known.incarnation > link.incarnation):",
        after="if self._closed:",
        caught_by="strangers",
    ),
    Bug(
        name="lane-reused-in-use",
        guards="G2: a request's number is taken away before its place is used again",
        file="workers/exchange/wire.py",
        before="        self._words[ASK] = 0\n        fence()\n",
        caught_by="torn_requests",
    ),
)
