"""Mutants around the ranks: detection, restarts, queues, exchange, sampling, KV copies."""

from __future__ import annotations

from chaos.mutants.mutant import Mutant, Shown

DECIDE = "tests/unit/workers/agent/test_decide.py"
REGISTRAR = "tests/unit/workers/agent/test_registrar.py"
SILENCE = "tests/unit/workers/queue/test_silence.py"
WATCHDOG = "tests/unit/workers/fleet/test_watchdog.py"
RESTARTS = "tests/unit/workers/agent/test_restart_policy.py"
ENGINE_PORT = "tests/unit/workers/rank/test_engine_port.py"
LIVE_MASK = "tests/unit/workers/protocol/test_live_mask.py"
KV_COPIES = "tests/unit/workers/model/test_kv_copies.py"
SAMPLER = "tests/unit/workers/model/test_sampler.py"
PEERS = "tests/integration/workers/agent/test_peer_weights.py"
EXCHANGE = "tests/integration/workers/exchange/test_exchange_threads.py"
ROUTER = "tests/unit/workers/exchange/test_router.py"
LINKS = "tests/unit/workers/exchange/test_links.py"
WIRE = "tests/unit/workers/exchange/shm/test_wire.py"

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        name="model-of-the-files",
        guards="G3: a new rank maps what its host has loaded, though the checkpoint's files are others by now",
        file="workers/model/load.py",
        before="    served = host.served() if host is not None else None\n",
        after="    served = None\n",
        tests=("tests/integration/workers/model/test_replaced_files.py::test_a_new_rank_gets_what_its_host_serves",),
    ),
    Mutant(
        name="name-of-another-agent",
        guards="G1: an agent that was cut off, and whose name another has by now, does not overwrite that one's record",
        file="workers/agent/registrar.py",
        before="                    _require_ours(found[key], value)\n",
        after="                    pass\n",
        tests=(f"{REGISTRAR}::test_an_agent_whose_name_is_anothers_by_now_writes_nothing_and_says_so",),
    ),
    # --- detection
    Mutant(
        name="blamed-by-the-clock",
        guards="G9: a rank is given up after several observations without a heartbeat, never for elapsed time alone",
        file="workers/agent/decide.py",
        before="return heartbeat.misses >= misses and now - heartbeat.advanced_at >= after_s",
        after="return heartbeat.misses > 0 and now - heartbeat.advanced_at >= after_s",
        tests=(f"{DECIDE}::test_an_agent_that_was_itself_stopped_does_not_blame_its_ranks",),
    ),
    Mutant(
        name="blamed-for-a-pause",
        guards="G9: time in which the watcher itself was held up does not count against a rank",
        file="workers/fleet/watchdog.py",
        before="passed_s = min(now - self._watched_at, 2 * TICK_S)",
        after="passed_s = now - self._watched_at",
        tests=(f"{WATCHDOG}::test_the_watchdogs_own_lateness_evicts_no_rank",),
    ),
    Mutant(
        name="cut-off-host-blames-others",
        guards="G9: an engine whose own host is cut off for a moment gives up no rank of other hosts",
        file="workers/queue/silence.py",
        before="return len(longest) > 1 and min",
        after="return len(longest) > 9 and min",
        tests=(f"{SILENCE}::test_our_own_host_is_cut_off_where_no_other_of_several_answers",),
    ),
    Mutant(
        name="busy-rank-evicted",
        guards="G9: a rank that computes is never evicted",
        file="workers/fleet/watchdog.py",
        before="(first.turns, first.steps) or look.main_s > first.main_s",
        after="(first.turns, first.steps)",
        tests=(f"{WATCHDOG}::test_a_rank_that_works_starves_or_waits_is_not_evicted",),
    ),
    Mutant(
        name="stopped-rank-kept",
        guards="G8: a rank that the kernel holds stopped is evicted within a second",
        file="workers/fleet/watchdog.py",
        before="return stopped, DetectedBy.STOPPED if stopped.stopped_s >= STOPPED_S else None",
        after="return stopped, None",
        tests=(f"{WATCHDOG}::test_a_stopped_rank_is_evicted_soon_but_not_for_a_blink",),
    ),
    Mutant(
        name="crash-loop-at-full-speed",
        guards="G8: deaths that follow one another have the slot wait, longer each time",
        file="workers/agent/restart_policy.py",
        before="    if recent <= 1:\n",
        after="    if recent:\n",
        tests=(f"{RESTARTS}::test_deaths_that_follow_one_another_back_off",),
    ),
    Mutant(
        name="crash-loop-for-ever",
        guards="G8: a slot whose ranks keep dying is set aside",
        file="workers/agent/restart_policy.py",
        before="quarantined = recent >= policy.intensity",
        after="quarantined = False",
        tests=(f"{RESTARTS}::test_enough_deaths_in_the_window_mean_quarantine_with_a_reason",),
    ),
    # --- between engine and rank
    Mutant(
        name="let-go-without-a-record",
        guards="G9: a record that is away shows nothing: the engine keeps a rank that is assigned",
        file="elastic/engine/loop.py",
        before="named |= {spec.id for each in state.assignments.values() for spec in each.ranks}",
        shown=Shown(2, (8,), 1),
    ),
    Mutant(
        name="left-without-a-word",
        guards="G9: ranks notify an engine that it was replaced, and it takes none of them for dead",
        file="workers/rank/engine_port.py",
        before="self._answer(Farewell(*self.key, self.token, successor=token))",
        after="pass",
        shown=Shown(2, (21, 25)),
    ),
    Mutant(
        name="older-engine-obeyed",
        guards="G2: a rank does what the engine says that it has joined, and no other",
        file="workers/protocol/step_fence.py",
        before="    return token == followed\n",
        after="    return True\n",
        tests=(f"{ENGINE_PORT}::test_steps_of_another_engine_or_an_older_epoch_are_not_run",),
    ),
    Mutant(
        name="older-engine-joined",
        guards="G2: a rank never goes back to an older engine",
        file="workers/protocol/step_fence.py",
        before="    if offered < followed:\n",
        after="    if False:\n",
        tests=(f"{ENGINE_PORT}::test_a_rank_never_goes_back_to_an_older_engine",),
    ),
    Mutant(
        name="older-epoch-run",
        guards="G2: a step of an epoch that is over is not run",
        file="workers/protocol/step_fence.py",
        before="    if epoch < committed:\n",
        after="    if False:\n",
        tests=(f"{ENGINE_PORT}::test_steps_of_another_engine_or_an_older_epoch_are_not_run",),
    ),
    Mutant(
        name="zombie-not-notified",
        guards="G2: an evicted incarnation learns it, in later epochs too",
        file="workers/protocol/live_mask.py",
        before="        self._words[at] = max(self._words[at], incarnation)\n",
        tests=(f"{LIVE_MASK}::test_an_evicted_incarnation_learns_it_in_later_epochs_too",),
    ),
    Mutant(
        name="stale-blocks-taken",
        guards="G3: KV blocks come into a cache only under the number of the copy that was announced",
        file="workers/model/kv_transfer.py",
        before="    if found != wanted:\n",
        after="    if found[2:] != wanted[2:]:\n",
        tests=(f"{KV_COPIES}::test_blocks_of_another_copy_are_refused_and_leave_nothing_behind",),
    ),
    Mutant(
        name="blocks-said-too-early",
        guards="G3: KV blocks are said to be written out once the target has them, and not when they are on their way",
        file="workers/rank/engine_port.py",
        before="            self._worker.post_blocks(order, partial(self._posted.append, done))\n",
        after="            self._posted.append(done)\n",
        tests=(f"{ENGINE_PORT}::test_what_is_written_out_is_answered_once_the_target_has_it",),
    ),
    Mutant(
        name="draws-by-row",
        guards="G3: what is drawn depends on seed and position, not on the row in the batch",
        file="workers/model/sampler.py",
        before="token = choose(shaped, sampling, position)",
        after="token = choose(shaped, sampling, at)",
        tests=(f"{SAMPLER}::test_a_seeded_stream_does_not_depend_on_its_company",),
    ),
    # --- the exchange
    Mutant(
        name="masked-rank-asked",
        guards="G2: rows go to live replicas only",
        file="workers/exchange/router.py",
        before="[not excluded >> r & 1 for r in self._ranks.tolist()]",
        after="[True for r in self._ranks.tolist()]",
        tests=(f"{ROUTER}::test_rows_go_to_live_replicas_only",),
    ),
    Mutant(
        name="partial-sum",
        guards="G4: no answer is computed with a missing expert",
        file="workers/exchange/router.py",
        before=(
            "            raise _lost(layer, [e for e in wanted if not 0 <= e < len(table) or table[e] == _NO_RANK])\n"
        ),
        after="            continue\n",
        tests=(f"{EXCHANGE}::test_with_all_alive_and_without_the_only_holder",),
    ),
    Mutant(
        name="summed-as-routed",
        guards="G3: a token's experts are summed in ascending order",
        file="workers/exchange/combine.py",
        before="ids, order = topk_ids.sort(dim=-1)",
        after="ids, order = topk_ids, torch.arange(topk_ids.shape[-1]).expand_as(topk_ids)",
        tests=(f"{EXCHANGE}::test_with_all_alive_and_without_the_only_holder",),
    ),
    Mutant(
        name="death-wakes-no-rank",
        guards="G4: a rank that waits for a rank that dies wakes at once and asks a replica",
        file="workers/exchange/links.py",
        before="            if not self._closed:\n                self.doorbell.ring()\n",
        tests=(f"{LINKS}::test_the_end_of_a_link_rings_the_doorbell",),
    ),
    Mutant(
        name="stranger-linked",
        guards="G2: a link belongs to one pair of incarnations",
        file="workers/exchange/links.py",
        before="if dial.to_incarnation != self.me.incarnation or dial.rank == self.me.rank:",
        after="if dial.rank == self.me.rank:",
        tests=(f"{LINKS}::test_a_peer_that_means_another_incarnation_is_not_linked",),
    ),
    Mutant(
        name="zombie-linked",
        guards="G2: a rank that knows a newer incarnation of a peer is not linked with an older one",
        file="workers/exchange/links.py",
        before="if self._closed or (known is not None and known.peer.incarnation > link.peer.incarnation):",
        after="if self._closed:",
        tests=(f"{LINKS}::test_an_older_incarnation_does_not_replace_a_newer_one",),
    ),
    Mutant(
        name="lane-reused-in-use",
        guards="G2: a request's number is taken away before its place is used again",
        file="workers/exchange/shm/wire.py",
        before="        self.words[ASK] = 0\n        fence()\n",
        tests=(f"{WIRE}::test_a_peer_never_sees_a_half_written_request",),
    ),
    # --- agents
    Mutant(
        name="piece-unchecked",
        guards="G4: weights of another host are used once their checksum was compared",
        file="workers/model/peer_weights.py",
        before="if checksum == at.checksum and (content := _content(at, room, checksum)) == at.content:",
        after="if (content := _content(at, room, checksum)) is not None:",
        tests=(f"{PEERS}::test_a_damaged_piece_is_not_used_and_who_sent_it_is_named",),
    ),
    Mutant(
        name="replaced-preparation-counts",
        guards="G5: the end of a preparation that was replaced says nothing about its successor",
        file="workers/agent/decide.py",
        before="return revision < rank.preparing_revision",
        after="return False",
        tests=(f"{DECIDE}::test_the_end_of_a_preparation_that_was_replaced_says_nothing",),
    ),
)
