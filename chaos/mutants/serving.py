"""Mutants between clients and ranks: journal, scheduler, moves."""

from __future__ import annotations

from chaos.mutants.mutant import Mutant, Shown

JOURNAL = "tests/unit/elastic/gateway/test_journal.py"
SCHEDULER = "tests/unit/elastic/engine/test_scheduler.py"
LOOP = "tests/unit/elastic/engine/test_loop.py"
PREFIX = "tests/unit/elastic/engine/test_prefix.py"
SALVAGE = "tests/unit/elastic/engine/test_salvage.py"
POOLS = "tests/unit/workers/agent/test_kv_pools.py"
MIGRATION = "tests/unit/elastic/engine/test_migration.py"

MUTANTS: tuple[Mutant, ...] = (
    # --- the journal
    Mutant(
        name="tokens-twice",
        guards="G3: a token index is sent to the client once",
        file="elastic/gateway/journal.py",
        before="return message.tokens[overlap - message.index :]",
        after="return message.tokens",
        shown=Shown(154),
    ),
    Mutant(
        name="gap-accepted",
        guards="G3: a token that leaves a gap before it is an error",
        file="elastic/gateway/journal.py",
        before="if not 0 <= message.index <= known:",
        after="if message.index < 0:",
        tests=(f"{JOURNAL}::test_a_contradiction_is_an_error_and_changes_nothing",),
    ),
    Mutant(
        name="former-engine-obeyed",
        guards="G2: only messages of the engine that a gateway follows count",
        file="elastic/gateway/journal.py",
        before="ours = self.engine_token != 0 and message.engine_token == self.engine_token",
        after="ours = self.engine_token != 0",
        tests=(f"{JOURNAL}::test_only_the_current_engine_counts",),
    ),
    Mutant(
        name="no-end",
        guards="G3: a request ends once",
        file="elastic/gateway/journal.py",
        before="        if reason:\n            self._end(request, RequestState.FINISHED)\n",
    ),
    # --- steps
    Mutant(
        name="any-step-answered",
        guards="G2: an answer counts for the step under way only",
        file="elastic/engine/scheduler.py",
        before="answers_step(result, home.rank_id, self.token, epoch, self.step)",
        after="answers_step(result, home.rank_id, self.token, epoch, result.step)",
        tests=(f"{SCHEDULER}::test_answers_to_another_step_token_epoch_or_incarnation_have_no_effect",),
    ),
    Mutant(
        name="any-engine-answered",
        guards="G2: an answer to another engine has no effect",
        file="elastic/engine/scheduler.py",
        before="answers_step(result, home.rank_id, self.token, epoch, self.step)",
        after="answers_step(result, home.rank_id, result.engine_token, epoch, self.step)",
        tests=(f"{SCHEDULER}::test_answers_to_another_step_token_epoch_or_incarnation_have_no_effect",),
    ),
    Mutant(
        name="another-incarnation-answered",
        guards="G2: an answer of a rank that was never a member of the epoch has no effect",
        file="elastic/engine/scheduler.py",
        before="answers_step(result, home.rank_id, self.token, epoch, self.step)",
        after="answers_step(result, result.rank_id, self.token, epoch, self.step)",
        tests=(f"{SCHEDULER}::test_answers_to_another_step_token_epoch_or_incarnation_have_no_effect",),
    ),
    Mutant(
        name="aborted-goes-on",
        guards="G3: the chunk in flight of a request that was aborted, or submitted again, has no effect",
        file="elastic/engine/scheduler.py",
        before="[(sequence, chunk) for sequence, chunk in in_flight if sequence.home is home]",
        after="in_flight",
        tests=(
            f"{SCHEDULER}::test_an_answer_has_no_effect_on_a_request_that_was_aborted_or_submitted_again_meanwhile",
        ),
    ),
    Mutant(
        name="failure-counts",
        guards="G4: what a rank could not compute is not counted as computed",
        file="elastic/engine/scheduler.py",
        before="        if result.status is not StepStatus.OK:\n            return self._set_back(",
        after="        if False:\n            return self._set_back(",
        tests=(f"{SCHEDULER}::test_an_unsuccessful_answer_runs_the_same_chunk_again",),
    ),
    Mutant(
        name="lost-with-the-rank",
        guards="G3: requests of a dead rank are computed elsewhere",
        file="elastic/engine/scheduler.py",
        before="                self._requeue(sequence)\n                moved",
        after="                self._forget(sequence)\n                moved",
    ),
    Mutant(
        name="mask-comes-back",
        guards="G2: a masked rank never comes back within the epoch",
        file="elastic/engine/scheduler.py",
        before="self.masked |= gone",
        after="self.masked = gone",
    ),
    Mutant(
        name="submitted-twice",
        guards="G3: a request that is submitted again takes the place of the earlier one",
        file="elastic/engine/scheduler.py",
        before="        self.abort(request.request_id)\n        if refused",
        after="        if refused",
    ),
    Mutant(
        name="cache-believed",
        guards="G3: a request that loses its home is computed from the first token on that its next home has not got",
        file="elastic/engine/scheduler.py",
        before="cached = len(shared[home.rank]) * size\n",
        after="cached = (len(sequence.tokens) - 1) // size * size\n",
    ),
    # --- the prefix cache
    Mutant(
        name="content-of-any-type",
        guards="G3: KV blocks that were computed in another type or mode, or by another model, have another name",
        file="elastic/engine/prefix.py",
        before="[config.model, model, config.dtype, config.exactness, config.device, config.block_size]",
        after="[config.block_size]",
        tests=(f"{PREFIX}::test_blocks_of_another_model_type_or_mode_have_another_name",),
    ),
    Mutant(
        name="content-without-what-is-before",
        guards="G3: the content of a KV block depends on all tokens before it",
        file="elastic/engine/prefix.py",
        before="before = names[-1] if names else self._root",
        after="before = self._root",
        tests=(f"{PREFIX}::test_the_same_tokens_after_others_have_another_name",),
    ),
    Mutant(
        name="block-found-before-it-is-full",
        guards="G3: only what a rank has confirmed is found in the prefix cache",
        file="elastic/engine/sequence.py",
        before="min(self.computed // pool.block_size, len(self.names))",
        after="len(self.names)",
    ),
    Mutant(
        name="used-block-freed",
        guards="G3: a KV block is free once no request uses it",
        file="elastic/engine/kv_blocks.py",
        before="            if self._users[block]:\n                continue\n",
        tests=(f"{PREFIX}::test_a_block_is_free_once_its_last_user_is_gone",),
    ),
    Mutant(
        name="evicted-but-found",
        guards="G3: a KV block that gets other content is no longer found by its former one",
        file="elastic/engine/kv_blocks.py",
        before="            del self._holder[self._content.pop(block)]\n",
    ),
    # --- moves
    Mutant(
        name="home-flips-first",
        guards="G3: a request moves once its KV blocks have been copied",
        file="elastic/engine/migration.py",
        before="        if move.copied >= total:\n",
        after="        if True:\n",
        tests=(f"{MIGRATION}::test_a_request_goes_on_elsewhere_with_what_was_computed",),
    ),
    Mutant(
        name="runs-while-it-moves",
        guards="G3: a request pauses while its last blocks are copied",
        file="elastic/engine/migration.py",
        before="return any(move.sequence is sequence and move.pausing for move in self._moves)",
        after="return False",
        tests=(f"{MIGRATION}::test_only_the_request_on_its_way_pauses_and_only_while_its_last_blocks_are_copied",),
    ),
    Mutant(
        name="earlier-copy-counts",
        guards="G3: only the answer to the last copy counts",
        file="elastic/engine/migration.py",
        before="(order.copy, order.addressee) != (answer.copy, identity)",
        after="order.addressee != identity",
        tests=(f"{MIGRATION}::test_an_answer_to_an_earlier_copy_has_no_effect",),
    ),
    # --- pools of dead ranks
    Mutant(
        name="read-before-confirmed",
        guards="G3: of a dead rank's pool only blocks are read whose tokens it has confirmed",
        file="elastic/engine/salvage.py",
        before="sequence.blocks[: sequence.computed // self._size] if self._on",
        after="sequence.blocks[: len(sequence.tokens) // self._size] if self._on",
        tests=(f"{SALVAGE}::test_a_block_is_not_read_before_its_step_was_answered",),
    ),
    Mutant(
        name="pool-of-an-uncertain-death",
        guards="G3: the engine has a pool read only of a rank that has certainly ended",
        file="elastic/engine/scheduler.py",
        before="                if ended:\n                    self._salvage",
        after="                if True:\n                    self._salvage",
        tests=(f"{SALVAGE}::test_a_rank_that_may_live_leaves_nothing",),
    ),
    Mutant(
        name="pool-of-the-living",
        guards="G3: an agent gives a rank's pool away only once that rank has certainly ended",
        file="workers/agent/kv_pools.py",
        before="        if not self._ended(key):\n",
        after="        if False:\n",
        tests=(f"{POOLS}::test_the_pool_of_a_rank_that_may_live_is_refused",),
    ),
    Mutant(
        name="runs-before-it-is-read",
        guards="G3: a request waits until what is left of it has been read",
        file="elastic/engine/salvage.py",
        before="return any(read.sequence is sequence for read in self._reads)",
        after="return False",
        tests=(f"{SALVAGE}::test_the_others_go_on_while_blocks_are_read_piece_by_piece",),
    ),
    # --- the engine's office
    Mutant(
        name="newer-token-unseen",
        guards="G1: an engine that sees another engine's token in the store starts no step",
        file="elastic/engine/loop.py",
        before="        if state.engine_token != self._token:\n",
        after="        if False:\n",
        tests=(f"{LOOP}::test_an_engine_that_sees_another_token_in_the_store_starts_no_step",),
    ),
)
