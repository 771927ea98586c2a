"""Steps keep to their time whatever is asked, and a short prompt does not wait behind long ones: in simulated time."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from chaos.simulation.kv_model import KvModel
from elastic.engine.reserve import Reserve
from elastic.engine.scheduler import Scheduler
from elastic.engine.step_budget import FIRST_TOKENS, FLOOR_TOKENS, StepBudget, Work, shares
from elastic.protocol import Tokens
from tests.support.rank_model import TOKEN, Client, ask, config, view

pytestmark = pytest.mark.unit

BUDGET_S, MOST = 0.1, 512


def run(budget: StepBudget, base_s: float, token_s: float, steps: int = 30, *, decodes: int = 0) -> float:
    """How long the last of some steps full of prompts takes, on a machine of this speed."""
    took_s = 0.0
    for _ in range(steps):
        tokens = budget.tokens(decodes, 1)
        took_s = base_s + tokens * token_s
        budget.learn(Work(decodes, tokens, 1), took_s)
    return took_s


@pytest.mark.parametrize(("base_s", "token_s"), [(0.0, 0.001), (0.03, 0.0005), (0.05, 0.002), (0.01, 0.0003)])
def test_steps_come_to_take_their_time_and_no_more(base_s: float, token_s: float) -> None:
    budget = StepBudget(BUDGET_S, MOST)
    assert BUDGET_S * 0.85 <= run(budget, base_s, token_s) <= BUDGET_S * 1.02


def test_decodes_are_paid_first_and_a_prompt_advances_all_the_same() -> None:
    budget = StepBudget(BUDGET_S, MOST)
    for _ in range(5):
        budget.learn(Work(30, 0, 0), 0.06)
    assert run(budget, 0.06, 0.001, decodes=30) == pytest.approx(BUDGET_S, rel=0.05)
    assert 35 <= budget.tokens(30, 1) <= 42
    for _ in range(5):
        budget.learn(Work(30, 0, 0), 0.2)
    assert 70 <= budget.tokens(30, 1) <= 110, "as much as half of what the decodes take: 0.1 s"


def test_the_first_steps_are_short_and_then_at_most_twice_what_was_measured() -> None:
    budget = StepBudget(BUDGET_S, MOST)
    sizes = []
    for _ in range(5):
        sizes.append(budget.tokens(0, 1))
        budget.learn(Work(0, sizes[-1], 1), sizes[-1] * 1e-6)
    assert sizes == [FIRST_TOKENS, 128, 256, 512, 512]


@pytest.mark.parametrize("budget_s", [0.0, 1000.0])
def test_a_step_that_was_overdue_is_not_tried_again_as_it_was(budget_s: float) -> None:
    """Each token takes a tenth of a second, and steps that take 30 s are given up; then the machine is quick again."""
    budget, tried = StepBudget(budget_s, MOST), list[int]()
    budget.learn(Work(0, MOST, 1), 0.01)
    for _ in range(20):
        tried.append(budget.tokens(0, 1))
        work = Work(0, tried[-1], 1)
        if (took_s := tried[-1] * 0.1) >= 30:
            budget.overran(work)
        else:
            budget.learn(work, took_s)
    assert tried == [MOST] + 19 * [MOST // 2]
    for _ in range(3):
        budget.learn(Work(0, budget.tokens(0, 1), 1), 1.0)
    assert budget.tokens(0, 1) == MOST


def test_there_is_an_end_to_smaller_steps() -> None:
    budget = StepBudget(0.0, MOST)
    for _ in range(20):
        budget.overran(Work(3, budget.tokens(0, 1), 1))
    budget.overran(Work(3, 0, 0))  # of decodes alone: prompts are not to blame
    assert budget.tokens(0, 1) == FLOOR_TOKENS


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_step_that_costs_more_than_its_budget_whatever_its_size_gets_as_much_time_again_for_prompts(
    noise: float,
) -> None:
    """Weights that take 190 ms to be read: at 16 tokens a step nearly all of the time would go there."""
    rng, budget, last = random.Random(1), StepBudget(BUDGET_S, MOST), list[int]()
    for _ in range(60):
        last.append(budget.tokens(0, 1))
        budget.learn(Work(0, last[-1], 1), (0.19 + 0.0034 * last[-1]) * (1.0 + noise * rng.expovariate(1.0)))
    assert all(0.19 * 0.8 <= 0.0034 * tokens <= 0.19 * 1.5 for tokens in last[10:])


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_steps_do_not_stay_small_for_want_of_larger_ones_to_compare_with(noise: float) -> None:
    """What one rank's large step took says nothing of the part that two ranks pay whatever their steps' size."""
    rng, budget, sizes = random.Random(2), StepBudget(BUDGET_S, MOST), list[int]()
    budget.learn(Work(0, MOST, 1), 1.9)
    for _ in range(80):
        sizes.append(budget.tokens(0, 2))
        took_s = (0.35 + 0.0068 * sizes[-1]) * (1.0 + noise * rng.expovariate(1.0))
        budget.learn(Work(0, sizes[-1], 2), took_s)
    assert sizes[:4] == [FLOOR_TOKENS] * 4
    assert 0.35 * 0.5 <= 0.0068 * statistics.median(sizes[10:]) <= 0.35 * 1.5


def test_only_a_request_that_is_alone_has_all_of_a_step() -> None:
    """No other waits for it. As soon as one does, steps keep to their time, as far as can be known."""
    rng, machine = random.Random(11), Machine()
    machine.ask("long", 2000, 4, rng)
    machine.step()
    machine.step()
    assert machine.took == [pytest.approx(0.02 + 0.0005 * MOST)] * 2
    machine.ask("short", 20, 4, rng)
    machine.step()
    assert machine.took[-1] <= 1.2 * BUDGET_S
    assert "short" in machine.ttft


def test_what_a_step_costs_whatever_its_size_is_forgotten_when_the_machine_is_free_again() -> None:
    budget = StepBudget(BUDGET_S, MOST)
    run(budget, 0.19, 0.0034)
    assert run(budget, 0.01, 0.0003, 20) == pytest.approx(BUDGET_S, rel=0.05)


@pytest.mark.parametrize("first", [True, False])
def test_one_step_that_took_long_for_another_reason_changes_nothing(first: bool) -> None:
    budget = StepBudget(BUDGET_S, MOST)
    if first:
        budget.learn(Work(0, FIRST_TOKENS, 1), 3.0)
        assert budget.tokens(0, 1) == FLOOR_TOKENS
    run(budget, 0.0, 0.001)
    before = budget.tokens(0, 1)
    budget.learn(Work(0, before, 1), 3.0)
    assert budget.tokens(0, 1) == before == 100


def test_small_prompts_say_nothing_of_what_a_large_one_costs() -> None:
    budget = StepBudget(BUDGET_S, MOST)
    run(budget, 0.02, 0.0002)
    before = budget.tokens(0, 1)
    for _ in range(20):
        budget.learn(Work(0, 5, 1), 0.021)
    assert budget.tokens(0, 1) == before > 350


def test_ranks_that_compute_prompts_at_once_share_the_cores() -> None:
    budget = StepBudget(BUDGET_S, MOST)
    run(budget, 0.0, 0.001)
    assert (budget.tokens(0, 1), budget.tokens(0, 4)) == (100, 25)
    for _ in range(3):
        budget.learn(Work(0, 25, 4), 0.05)
    assert budget.tokens(0, 4) == 50


def test_without_a_budget_there_is_the_limit_of_tokens_only() -> None:
    budget = StepBudget(0.0, MOST)
    run(budget, 1.0, 1.0)
    assert budget.tokens(99, 9) == MOST


@pytest.mark.parametrize(
    ("prompts", "given"),
    [
        ([], []),
        ([(True, 900)], [100]),
        ([(True, 900), (True, 30)], [70, 30]),
        ([(True, 900), (True, 400), (True, 60)], [40, 0, 60]),
        ([(True, 900), (True, 400), (True, 80)], [50, 0, 50]),
        ([(True, 20), (True, 400), (True, 60)], [20, 20, 60]),
        ([(False, 900), (True, 10), (False, 300)], [50, 0, 50]),
        ([(True, 5), (True, 6)], [5, 6]),
    ],
)
def test_half_is_for_the_oldest_and_the_rest_for_the_shortest(
    prompts: list[tuple[bool, int]], given: list[int]
) -> None:
    assert shares(prompts, 100) == given


class Machine:
    """One rank that takes 20 ms for a step and 0.5 ms for each token, and a client that notes when tokens come."""

    def __init__(self, **changes: object) -> None:
        most: dict[str, object] = {"block_size": 16, "kv_blocks": 1024, "max_seqs": 64, "max_batched_tokens": MOST}
        most |= {"max_model_len": 4096, "prefix_cache": False, "max_wait_s": 1e6}
        self.scheduler = Scheduler(config(**(most | changes)), TOKEN)
        self.scheduler.set_view(view(1, {0: 10}), [], 0.0)
        self.ranks, self.client, self.now = KvModel(16), Client(), 0.0
        self.asked: dict[str, float] = {}
        self.ttft: dict[str, float] = {}
        self.took: list[float] = []

    def ask(self, name: str, tokens: int, max_tokens: int, rng: random.Random) -> None:
        self.asked[name] = self.now
        prompt = [rng.randrange(50) for _ in range(tokens)]
        self.client.submit(self.scheduler, ask(name, prompt, max_tokens, ignore_eos=True), self.now)

    def step(self) -> None:
        batch = self.scheduler.schedule(self.now)
        assert batch is not None
        self.took.append(0.02 + 0.0005 * sum(len(chunk.tokens) for chunk in batch.ranks[0]))
        self.now += self.took[-1]
        outputs = [
            output for result in self.ranks.run(batch, {0: 10}) for output in self.scheduler.apply(result, self.now)
        ]
        self.client.take(outputs)
        for output in outputs:
            if isinstance(output, Tokens):
                self.ttft.setdefault(output.request_id, self.now - self.asked[output.request_id])


def test_steps_without_prompts_say_nothing_of_what_a_prompt_costs() -> None:
    rng, machine = random.Random(7), Machine(step_budget_s=0.03)
    for n in range(40):
        machine.ask(f"stream {n}", 8, 100, rng)
    while machine.ttft.keys() != machine.asked.keys():
        machine.step()
    known = machine.scheduler._budget.tokens(0, 1)
    for _ in range(8):
        machine.step()
    assert machine.scheduler._budget.tokens(0, 1) == known


def test_a_short_prompt_does_not_wait_behind_five_hundred_long_ones() -> None:
    rng, machine = random.Random(1), Machine()
    for n in range(500):
        machine.ask(f"long {n}", 700, 20, rng)
    for n in range(200):
        if n % 10 == 5:
            machine.ask(f"short {n}", 20, 8, rng)
        machine.step()
    shorts = [machine.ttft[name] for name in machine.asked if name.startswith("short")]
    assert len(shorts) == 20
    assert max(shorts) <= 2.2 * BUDGET_S, "the step under way, and its own"
    assert max(machine.took[10:]) <= 1.05 * BUDGET_S, "whatever waits at a step's end waits for one budget at most"
    longs = sorted(int(name.split()[1]) for name in machine.ttft if name.startswith("long"))
    assert longs == list(range(len(longs))), "the oldest first"
    assert len(longs) >= 8


def test_an_old_long_prompt_advances_however_many_short_ones_come() -> None:
    rng, machine = random.Random(2), Machine()
    machine.ask("long", 700, 2, rng)
    for n in range(60):
        machine.ask(f"short {n}", 60, 1, rng)
        machine.step()
    share = machine.scheduler._budget.tokens(0, 1)
    assert machine.ttft["long"] <= BUDGET_S * (math.ceil(700 / (share // 2)) + 3)


def test_an_interrupted_stream_goes_before_new_prompts() -> None:
    rng, machine = random.Random(3), Machine()
    machine.ask("stream", 400, 400, rng)
    while len(machine.client.outputs["stream"]) < 20:
        machine.step()
    for n in range(40):
        machine.ask(f"new {n}", 300, 2, rng)
    machine.step()
    machine.scheduler.set_view(view(2, {0: 11}), [], machine.now)  # its rank is another process now
    batch = machine.scheduler.schedule(machine.now)
    assert batch is not None
    sizes = {chunk.seq: len(chunk.tokens) for chunk in batch.ranks[0]}
    assert list(sizes) == [1], "all of the step is for it"


def test_short_requests_have_places_that_long_ones_cannot_take() -> None:
    """Two hundred streams that go on for long, whether or not anybody reads them; then a short request."""
    rng, machine = random.Random(4), Machine()
    for n in range(200):
        machine.ask(f"stream {n}", 8, 1000, rng)
    for _ in range(20):
        machine.step()
    assert (machine.scheduler.running, machine.scheduler.waiting) == (56, 144)
    machine.ask("short", 8, 8, rng)
    for _ in range(9):
        machine.step()
    assert machine.client.ends["short"] == "length"
    machine.ask("also long", 8, 1000, rng)
    machine.step()
    assert (machine.scheduler.running, machine.scheduler.waiting) == (56, 145)


def test_a_full_queue_of_long_requests_does_not_turn_a_short_one_away() -> None:
    rng, machine = random.Random(5), Machine(max_waiting_requests=20)
    for n in range(56 + 20):
        machine.ask(f"stream {n}", 8, 1000, rng)
    machine.ask("also long", 8, 1000, rng)
    assert machine.client.ends["also long"].startswith("429")
    machine.ask("short", 8, 8, rng)
    assert (machine.scheduler.running, machine.scheduler.waiting) == (57, 20)
    for _ in range(30):
        machine.step()
    assert machine.client.ends["short"] == "length"


def test_blocks_kept_for_short_requests_take_none_from_who_asks_for_none() -> None:
    """A short one has ended; streams that have what they need stay, though fewer blocks are free than are kept."""
    rng, machine = random.Random(6), Machine(block_size=4, kv_blocks=24, max_seqs=8, max_batched_tokens=40)
    for name in ("a", "b", "waits"):
        machine.ask(name, 36, 8, rng)
    while len(machine.client.outputs["b"]) < 4:
        machine.step()
    machine.ask("short", 1, 2, rng)
    while "short" not in machine.client.ends:
        machine.step()
    machine.step()
    assert machine.scheduler.waiting == 1
    assert machine.scheduler.preemptions == 0


def test_a_long_request_makes_room_for_itself_and_not_a_short_one_for_it() -> None:
    rng, machine = random.Random(8), Machine(block_size=4, kv_blocks=32, max_seqs=16, max_batched_tokens=100)
    machine.ranks = KvModel(4)
    for name in ("a", "b", "waits"):
        machine.ask(name, 48, 40, rng)
    (home,) = machine.scheduler._homes.values()
    machine.step()
    while home.pool.free > 4:
        machine.step()
    machine.ask("short", 1, 7, rng)
    while not machine.scheduler.preemptions:
        machine.step()
    assert "short" not in machine.client.ends
    assert [each.request.request_id for each in home.running] == ["a", "short"]


def test_nothing_passes_by_those_that_wait_while_no_step_may_run() -> None:
    rng, machine = random.Random(9), Machine(max_waiting_requests=20)
    for n in range(56 + 20):
        machine.ask(f"stream {n}", 8, 1000, rng)
    machine.scheduler.set_view(view(2, {0: 10}, covered=False), [], machine.now)
    machine.ask("short", 8, 8, rng)
    assert machine.client.ends["short"].startswith("503")


@pytest.mark.parametrize(("kv_blocks", "places"), [(64, 8), (63, 0)])
def test_no_place_is_kept_where_the_cache_has_no_share_for_it(kv_blocks: int, places: int) -> None:
    assert Reserve(config(kv_blocks=kv_blocks, max_seqs=64)).places == places
