"""Mutants of the membership: store, controller, planner, operations."""

from __future__ import annotations

from chaos.mutants.mutant import Mutant, Shown

CONTROLLER = "tests/contract/membership/planning/test_controller.py"
ELECTION = "tests/contract/membership/store/test_election.py"
LEASE = "tests/unit/membership/store/test_lease.py"
MIRROR = "tests/contract/membership/store/test_mirror.py"
REPLACED = "tests/contract/membership/store/test_store_replaced.py"
CREDENTIALS = "tests/contract/membership/store/test_etcd_credentials.py"
CODEC = "tests/unit/membership/store/test_codec.py"
PLANNER = "tests/unit/membership/planning/test_planner.py"
LEAVING = "tests/unit/membership/planning/test_leaving.py"
TIMES = "tests/unit/membership/planning/test_own_times.py"
OPERATIONS = "tests/unit/membership/operations/test_operations.py"
CHANGE = "tests/unit/membership/operations/test_change.py"

MUTANTS: tuple[Mutant, ...] = (
    # --- writers and fences
    Mutant(
        name="unfenced-controller",
        guards="G1: a controller's transaction holds only while the leader's key has its create revision",
        file="membership/planning/controller.py",
        before="self.store.txn([election.fence(), *compares], ops,",
        after="self.store.txn(compares, ops,",
        tests=(f"{CONTROLLER}::test_a_controller_that_is_deposed_just_before_its_transaction_changes_nothing",),
    ),
    Mutant(
        name="stale-writes",
        guards="G1: what a controller replaces is unchanged since it looked",
        file="membership/planning/controller.py",
        before='    compares += [Compare(key, "mod", "<", state.revision + 1) for key in writes if key not in known]\n',
        tests=(f"{CONTROLLER}::test_a_record_that_changed_since_the_controller_looked_is_not_replaced",),
    ),
    Mutant(
        name="assignments-taken-away",
        guards="G1: ranks whose agent has taken their assignment away enter no view and are not assigned again",
        file="membership/planning/controller.py",
        before='        compares.append(Compare(keys.unassigned, "mod", "<", state.revision + 1))\n',
        after="        pass\n",
        tests=(f"{LEAVING}::test_what_was_decided_before_an_agent_took_its_assignment_away_is_not_done",),
    ),
    Mutant(
        name="any-model",
        guards="G3: a rank that has loaded another model joins no view, whatever its agent thinks of it",
        file="membership/planning/cluster_facts.py",
        before="            trouble = identity.refusal(self.state, record)\n",
        after="            pass\n",
        tests=(f"{PLANNER}::test_a_newcomer_that_its_agent_did_not_refuse_is_not_committed",),
    ),
    Mutant(
        name="two-holders",
        guards="G1: an office is taken only if it is vacant",
        file="membership/store/election.py",
        before='self._store.txn([Compare(self._key, "create", "=", 0)], [',
        after="self._store.txn([], [",
        tests=(f"{ELECTION}::test_one_wins_and_its_token_is_the_keys_create_revision[memory]",),
    ),
    Mutant(
        name="lease-from-the-answer",
        guards="G1: a lease's deadline counts from before its renewal was sent",
        file="membership/store/lease.py",
        before="max(self._deadline, before + min(ttl_s, self._ttl_s))",
        after="max(self._deadline, self._clock() + min(ttl_s, self._ttl_s))",
        tests=(f"{LEASE}::test_the_deadline_counts_from_before_the_renewal_was_sent",),
    ),
    Mutant(
        name="lease-believed",
        guards="G1: a process that relies on a lease asks its own clock whether it certainly holds",
        file="membership/store/lease.py",
        before="return not self._lost and self._clock() < self._deadline",
        after="return not self._lost",
        tests=(f"{LEASE}::test_it_gives_up_at_its_deadline_without_asking",),
    ),
    Mutant(
        name="carried-without-fence",
        guards="G1: an office goes over to another lease only if its token still holds it",
        file="membership/store/election.py",
        before="self._store.txn([ours], [Put(",
        after="self._store.txn([], [Put(",
        tests=(
            "tests/unit/membership/store/test_election.py::test_an_office_that_another_holds_does_not_go_over_to_ours",
        ),
    ),
    Mutant(
        name="lease-believed-while-carried",
        guards="G1: while it is not known which of two leases an office is under, none counts longer than the shorter",
        file="membership/store/lease.py",
        before="self._carrying, self._deadline = (*self._carrying, lease), min(self._deadline, before + ttl_s)",
        after="self._carrying = (*self._carrying, lease)",
        tests=(f"{LEASE}::test_while_it_is_not_known_where_the_keys_are_the_shorter_lease_counts",),
    ),
    Mutant(
        name="incarnation-twice",
        guards="G2: an incarnation is never given out twice, also not after all traces of its rank are gone",
        file="membership/planning/planner.py",
        before="incarnation = max([state.incarnation, *(m.incarnation",
        after="incarnation = max([0, *(m.incarnation",
        shown=Shown(2, (0, 1, 2, 3, 4, 6, 7, 8, 12, 13, 14, 15, 27, 29, 31, 32, 33, 34, 37, 39)),
    ),
    # --- what a process takes for the store's state
    Mutant(
        name="watch-from-now",
        guards="G6: a client that was cut off goes on from the revision that it has",
        file="membership/store/mirror.py",
        before="self._store.watch(self._keys.prefix, self._revision)",
        after="self._store.watch(self._keys.prefix, 0)",
        tests=(f"{MIRROR}::test_a_client_that_was_cut_off_learns_what_it_missed[MemoryStore-False]",),
    ),
    Mutant(
        name="compaction-ignored",
        guards="G6: where the store forgot what lies between, a client lists again",
        file="membership/store/mirror.py",
        before="        except StoreCompacted:\n            self._relist = True\n            raise\n",
        after="        except StoreCompacted:\n            raise\n",
        tests=(f"{MIRROR}::test_a_client_that_was_cut_off_learns_what_it_missed[PromptStore-True]",),
    ),
    Mutant(
        name="wiped-store-believed",
        guards="G6: a store of another id is refused",
        file="membership/store/provenance.py",
        before="if self._store_id and store_id != self._store_id:",
        after="if False:",
        tests=(f"{REPLACED}::test_another_store_is_refused_however_far_it_has_got",),
    ),
    Mutant(
        name="older-store-believed",
        guards="G6: a store that went back to an earlier revision is refused",
        file="membership/store/provenance.py",
        before="elif revision < floor:",
        after="elif False:",
        tests=(f"{REPLACED}::test_answers_that_overtake_each_other_or_come_from_a_member_behind_are_no_loss",),
    ),
    Mutant(
        name="new-certificates-unasked",
        guards="G6: a connection to etcd that works is not given up for certificates that etcd does not know yet",
        file="membership/store/etcd_channels.py",
        before="if (refusal := _refusal(replaced)) is not None:",
        after="if (refusal := None) is not None:",
        tests=(f"{CREDENTIALS}::test_a_slow_answer_while_certificates_are_rotated_costs_no_connection",),
    ),
    Mutant(
        name="newer-schema-read",
        guards="G1: no process acts on a record of a later schema version",
        file="membership/store/codec.py",
        before="if envelope.v > SCHEMA_VERSION:",
        after="if False:",
        tests=(f"{CODEC}::test_a_newer_schema_is_refused_with_what_to_do",),
    ),
    Mutant(
        name="strange-clocks-believed",
        guards="G4: a wait lasts as long as it was meant to, whatever the clock of the process that began it says",
        file="membership/planning/own_times.py",
        before="return now - written[1] if contradicts else known or 0.0",
        after="return 0.0",
        tests=(f"{TIMES}::test_what_appears_while_we_look_was_written_now",),
    ),
    # --- what may be committed
    Mutant(
        name="unprepared-commit",
        guards="G5: a view is committed once all its members have prepared it",
        file="membership/planning/planner.py",
        before="staged is None or facts.unprepared or facts.now",
        after="staged is None or facts.now",
        shown=Shown(1, ()),
    ),
    Mutant(
        name="unwanted-commit",
        guards="G1: a staged view is committed only with members that live and are wanted still",
        file="membership/planning/planner.py",
        before=(
            "    if not staged.members or not keep <= set(staged.members) <= keep | set(facts.ready):\n"
            "        return False\n"
        ),
        shown=Shown(248, (0, 1, 2, 5, 6)),
    ),
    Mutant(
        name="cancelled-commit",
        guards="G5: an operation that was cancelled before its commit is not committed",
        file="membership/planning/planner.py",
        before="    if operation is not None and operation.cancelled:\n        return None\n",
        shown=Shown(223, (0, 1, 3), 2),
    ),
    Mutant(
        name="orphans-left",
        guards="G4: after a loss the survivors load the experts that no rank holds any more",
        file="membership/planning/next_view.py",
        before="placement = repair(config.moe_layers, config.experts, old)",
        after="placement = old",
        shown=Shown(10, (2, 3, 50, 52), 1),
    ),
    # --- deaths and repairs
    Mutant(
        name="mask-ignored",
        guards="G2: a rank that the engine has masked is replaced although its process is alive",
        file="membership/planning/cluster_facts.py",
        before="return not self.ended(member) and member.rank not in self.masked",
        after="return not self.ended(member)",
        tests=(f"{PLANNER}::test_a_masked_rank_is_evicted_and_replaced",),
    ),
    Mutant(
        name="dead-stay-assigned",
        guards="G2: a rank that was declared dead leaves the assignments and never comes back",
        file="membership/planning/planner.py",
        before="    gone = set(facts.members) - set(facts.alive)\n    gone |=",
        after="    gone = set[Member]()\n    gone |=",
        shown=Shown(4, (44, 52)),
    ),
    Mutant(
        name="loss-not-first",
        guards="G4: a loss is committed with the remaining ranks before any new rank is waited for",
        file="membership/planning/planner.py",
        before="    if gone and keep and not (_stuck(facts) and ready):\n",
        after="    if False:\n",
        shown=Shown(10, (45,)),
    ),
    Mutant(
        name="no-backoff",
        guards="G8: a slot is not filled again before its backoff is over",
        file="membership/planning/planner.py",
        before="(last.quarantined or last.held_back_s(facts.now))",
        after="last.quarantined",
        shown=Shown(3, (0, 1, 2, 3, 4, 5, 6, 7, 9, 31, 32, 54, 55)),
    ),
    # --- operations
    Mutant(
        name="two-operations",
        guards="G5: one operation at a time",
        file="membership/operations/operations.py",
        before="    if state.active is not None:\n",
        after="    if False:\n",
        tests=(f"{OPERATIONS}::test_a_second_operation_names_the_active_one",),
    ),
    Mutant(
        name="proposals-race",
        guards="G5: of two operations that are proposed at once one wins, and a pause counts from when it is written",
        file="membership/operations/operations.py",
        before='    unchanged = [Compare(key, "mod", "<", revision + 1) for key in watched]\n',
        after="    unchanged: list[Compare] = []\n",
        tests=(
            f"{OPERATIONS}::test_of_two_proposals_at_once_one_wins",
            f"{OPERATIONS}::test_a_pause_at_the_same_moment_wins",
        ),
    ),
    Mutant(
        name="id-again",
        guards="G5: the same id is the same operation",
        file="membership/operations/operations.py",
        before="        if known is not None:\n            return _same(known, change)\n",
        tests=(f"{OPERATIONS}::test_the_same_id_is_the_same_operation",),
    ),
    Mutant(
        name="pause-ignored",
        guards="G5: no planned change begins during a pause",
        file="membership/operations/operations.py",
        before="    if state.pause is not None and state.paused(now):\n",
        after="    if False:\n",
        tests=(f"{CHANGE}::test_while_paused_nothing_planned_begins_and_losses_are_made_good",),
    ),
    Mutant(
        name="deadline-ignored",
        guards="G5: an operation that is not done by its deadline is rolled back",
        file="membership/planning/planner.py",
        before=(
            '    if _late(facts, operation):\n        return f"not done by its deadline; waited for {awaited(facts)}"\n'
        ),
        shown=Shown(9, (11, 12)),
    ),
    Mutant(
        name="rollback-keeps-the-desired-size",
        guards="G5: an operation that is rolled back leaves the desired size as it was",
        file="membership/planning/planner.py",
        before="    desired = desired_without(operation, facts.desired, len(facts.members))\n",
        after="    desired = facts.desired\n",
        shown=Shown(3, (5,)),
    ),
    Mutant(
        name="never-done",
        guards="G5: an operation ends once no departing rank is left",
        file="membership/planning/planner.py",
        before="return advance(operation, Phase.DONE, now=now) if retired or late else None",
        after="return None",
        shown=Shown(4, (30,)),
    ),
    Mutant(
        name="drained-slot-filled",
        guards="G5: a drained slot stays empty until it is undrained",
        file="membership/planning/cluster_facts.py",
        before="barred, named = set(self.desired.cordoned), ",
        after="barred, named = set[int](), ",
        shown=Shown(6, (67, 68, 72, 73, 76, 78, 79, 80, 85, 86, 87, 88, 90, 92, 95, 96)),
    ),
    Mutant(
        name="quarantine-ignored",
        guards="G8: no rank is started in a slot that is set aside",
        file="membership/planning/planner.py",
        before="(last.quarantined or last.held_back_s(facts.now))",
        after="last.held_back_s(facts.now)",
        tests=(f"{PLANNER}::test_a_quarantined_slot_stays_empty_until_the_next_scale",),
    ),
)
