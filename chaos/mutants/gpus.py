"""Mutants around GPUs: steps of all ranks together, windows of slots, KV pools, spares. Caught without a GPU."""

from __future__ import annotations

from chaos.mutants.mutant import Mutant, Shown

STEPS = "tests/unit/elastic/engine/test_gpu_steps.py"
WINDOWS = "tests/unit/workers/agent/test_gpu_windows.py"
POOLS = "tests/unit/workers/rank/test_left_pools.py"
ANSWERS = "tests/unit/workers/model/test_answers_wait.py"
ROOM = "tests/unit/workers/model/test_expert_room.py"
ENDINGS = "tests/unit/membership/base/test_endings.py"
SPARES = "tests/unit/workers/agent/test_spares.py"

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        name="called-off-too-little",
        guards="G3: a step over GPUs that a rank did not finish is called off in all of its layers",
        file="elastic/engine/gpu_steps.py",
        before="self._below = first + self._layers",
        after="self._below = first",
        tests=(f"{STEPS}::test_a_loss_calls_off_all_numbers_so_far_once",),
    ),
    Mutant(
        name="window-of-a-zombie",
        guards="G3: a rank uses its slot's window once those that had it before are over",
        file="workers/protocol/window_client.py",
        before="if not process_ended(process, max(0.0, deadline - time.monotonic())):",
        after="if False:",
        tests=(f"{WINDOWS}::test_a_successor_waits_for_the_end_of_who_had_the_slot",),
    ),
    Mutant(
        name="window-before-the-death",
        guards="G3: an agent names to a slot's successor all that had it before and still run",
        file="workers/agent/gpu_windows.py",
        before="before = [process for other, process in self._by_pid.items() if other != pid]",
        after="before = list[int]()",
        gpus=True,
        shown=Shown(17, (2, 3, 8), gpus=True),
    ),
    Mutant(
        name="lost-is-taken-for-dead",
        guards="G3: a pool is read once its rank's end is certain, not when the rank is given up",
        file="workers/fleet/fleet.py",
        before="ended = ended or source in CERTAIN or (page is not None and page.ended)",
        after="ended = True",
        gpus=True,
        shown=Shown(17, (0, 7), 1, gpus=True),
    ),
    Mutant(
        name="not-called-off",
        guards="G3: a step over GPUs is called off once one of its ranks is lost",
        file="elastic/engine/loop.py",
        before="        self._call_off(self._gpu.failed())  # first",
        after="        #",
        tests=(f"{STEPS}::test_the_loss_of_a_rank_without_requests_is_a_loss_all_the_same",),
    ),
    Mutant(
        name="answer-of-the-dead",
        guards="G3: what a dead rank owed in a step over GPUs is not awaited of its successor",
        file="elastic/engine/scheduler.py",
        before="            self._serving.discard(home.rank)  # else its successor would owe that answer\n",
        after="",
        gpus=True,
        shown=Shown(23, (13,), gpus=True),
    ),
    Mutant(
        name="another-rank-s-pool",
        guards="G3: what is read is what that very rank has left, not what was mapped for the one before",
        file="workers/rank/left_pools.py",
        before="if self._mapped is None or self._mapped[0] != order.source:",
        after="if self._mapped is None:",
        tests=(f"{POOLS}::test_another_rank_s_death_takes_the_place_of_the_first",),
    ),
    Mutant(
        name="answered-before-it-is-written",
        guards="G3: a rank answers a step once its device has written what may be read after its death",
        file="workers/model/runner.py",
        before="        self._backend.finish()  # also",
        after="        #",
        tests=(f"{ANSWERS}::test_a_step_is_answered_once_it_is_written",),
    ),
    Mutant(
        name="named-before-it-is-whole",
        guards="G3: memory of experts names only what was copied to its end",
        file="workers/model/cuda/expert_room.py",
        before="        self._say([(place, NOTHING)])\n",
        after="        self._say([(place, content)])\n",
        tests=(f"{ROOM}::test_a_rank_that_died_in_the_midst_of_a_copy_leaves_nothing_that_counts",),
    ),
    Mutant(
        name="copied-while-it-changed",
        guards="G3: an expert that its owner replaced while it was copied does not count",
        file="workers/model/cuda/expert_room.py",
        before=" if now[copy.source.at] == copy.source.content]",
        after=" if now]",
        tests=(f"{ROOM}::test_what_changed_while_it_was_copied_does_not_count",),
    ),
    Mutant(
        name="out-of-device-memory-for-ever",
        guards="G6: a slot whose ranks run out of device memory one after the other is set aside",
        file="workers/agent/exits.py",
        before="if len(full) >= FULL_DEATHS and not record.quarantined:",
        after="if False:",
        tests=(f"{ENDINGS}::test_a_slot_that_runs_out_of_device_memory_again_and_again_is_set_aside",),
    ),
    Mutant(
        name="spare-on-another-gpu",
        guards="G5: a spare becomes only a rank of the GPU that it is on",
        file="workers/agent/spares.py",
        before="if (spare.number - key.rank) % self._devices == 0), None)",
        after="), None)",
        tests=(f"{SPARES}::test_a_spare_becomes_only_a_rank_of_its_gpu",),
    ),
    Mutant(
        name="spares-without-device-memory",
        guards="G5: spares that lack device memory are made ever later: each takes it beside ranks that serve",
        file="workers/agent/spares.py",
        before='self.lost(key, f"{why}{reason}", full=full or said.full)',
        after='self.lost(key, f"{why}{reason}")',
        tests=(f"{SPARES}::test_a_spare_that_lacks_device_memory_is_made_ever_later_and_said_once",),
    ),
)
