"""Damages of the rest: requests (G3), coverage (G4), operations (G5), faults, and what the run itself has found."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from chaos.record.record import Answered, Changed, Expected, InjectedFault, Verified
from tests.support.damage.tools import Lines, at, damage, put, put_operation, put_view, view_of
from tests.support.recorded_run import START, changed, tokens

# --- G3


def answer(lines: Lines, **fields: Any) -> None:
    """Change the first answer."""
    where = next(i for i, line in enumerate(lines) if isinstance(line, Answered))
    line = lines[where]
    assert isinstance(line, Answered)
    lines[where] = Answered(record=replace(line.record, **fields))


@damage("requests", "request cmpl-0-1 of prompt 0 was lost: after 2 of 4 tokens: cut", "kill of rank 1")
def a_request_is_lost(lines: Lines) -> None:
    times = {"started": 19.9, "token_times": (20.0, 20.003), "ended": 20.4}
    answer(lines, tokens=("a", "b"), finish_reason="", error="cut", **times)


@damage("requests", "was lost: .*HTTP 503: busy; every expert had a live replica", "HTTP 503")
def a_request_is_refused(lines: Lines) -> None:
    answer(lines, tokens=(), finish_reason="", error="HTTP 503: busy")


@damage("requests", "was duplicated: token 2", "5 tokens")
def a_token_comes_twice(lines: Lines) -> None:
    answer(lines, tokens=("a", "b", "b", "c", "d"))


@damage("requests", "was altered: token 1", "4 tokens")
def a_token_is_another(lines: Lines) -> None:
    answer(lines, tokens=("a", "x", "c", "d"))


@damage("requests", "there is no fault-free run of prompt 7", "prompt 7")
def a_request_has_no_oracle(lines: Lines) -> None:
    answer(lines, prompt=7)


@damage("requests", "two requests had the id cmpl-1-1", "cmpl-1-1")
def two_requests_have_one_id(lines: Lines) -> None:
    answer(lines, id="cmpl-1-1")


@damage("requests", "the fault-free run of prompt 0 failed: out of luck", "")
def the_oracle_failed(lines: Lines) -> None:
    lines.append(Expected(record=replace(tokens(0), finish_reason="", error="out of luck")))


# --- G4


def without(placement: dict[str, Any], *ranks: str) -> dict[str, Any]:
    """The placement with expert 0 of layer 0 taken from those ranks."""
    return {r: [[e for e in held[0] if e or r not in ranks], *held[1:]] for r, held in placement.items()}


@damage("coverage", "epoch 4 with 4 ranks has expert 0 of layer 0 on fewer than 2 of them", "view = epoch 4")
def a_replica_is_missing(lines: Lines) -> None:
    placement = view_of(lines, 4)["placement"]
    put_view(lines, 4, placement=without(placement, next(r for r, held in placement.items() if 0 in held[0])))


@damage("coverage", "epoch 5 with 2 ranks has expert 0 of layer 0 on fewer than 2 of them", "view = epoch 5")
def a_replica_is_missing_after_a_drain(lines: Lines) -> None:
    put_view(lines, 5, placement=without(view_of(lines, 5)["placement"], "0"))


@damage("coverage", "epoch 2 with 2 ranks has expert 0 of layer 0 on fewer than 1 of them", "view = epoch 2")
def an_expert_is_nowhere(lines: Lines) -> None:
    placement = view_of(lines, 2)["placement"]
    put_view(lines, 2, placement=without(placement, *placement))


@damage("coverage", r"epoch 2 places experts on ranks \[0\], its members are \(0, 2\)", "view = epoch 2")
def a_member_holds_nothing(lines: Lines) -> None:
    put_view(lines, 2, placement={"0": [list(range(8))] * 2})


@damage("coverage", "epoch 2 follows a death with every expert on a survivor, and moved 2 experts", "masked")
def a_death_moves_weights(lines: Lines) -> None:
    placement = view_of(lines, 2)["placement"]
    put_view(lines, 2, placement={**placement, "0": [list(range(8)), placement["0"][1]]})


# --- G5


@damage("operations", "two operations are active at once: up and stuck", "ops/stuck = scale to 6, proposed")
def two_operations_are_active(lines: Lines) -> None:
    del lines[at(lines, "ops/up", phase="done")]


@damage(
    "operations", "operation up went from handshaking to retiring, which is not legal", "ops/up = scale to 4, retiring"
)
def a_phase_is_illegal(lines: Lines) -> None:
    times = {"proposed": 1.0, "spawning": 2.0, "handshaking": 3.0, "retiring": 4.0}
    put(lines, at(lines, "ops/up", phase="loading"), phase="retiring", phase_times=times)


@damage("operations", "operation up is committed, and has gone from loading to ready", "committed")
def a_phase_has_no_time(lines: Lines) -> None:
    where = at(lines, "ops/up", phase="committed")
    line = lines[where]
    assert isinstance(line, Changed)
    put(lines, where, phase_times={k: v for k, v in line.value["phase_times"].items() if k != "committed"})


@damage("operations", "operation up begins as ready", "ready")
def an_operation_begins_in_the_middle(lines: Lines) -> None:
    put(lines, changed(lines, "ops/up")[0], phase="ready")


@damage("operations", "operation up was changed after it had ended", "retiring")
def an_operation_goes_on_after_its_end(lines: Lines) -> None:
    put(lines, at(lines, "ops/up", phase="committed"), phase="aborted")


@damage("operations", "operation down ended 5[0-9.]+ s after its deadline", "done")
def an_operation_is_late(lines: Lines) -> None:
    put_operation(lines, "down", deadline=START + 12.0)


@damage("operations", "operation down is still retiring after its deadline", "retiring")
def an_operation_never_ends(lines: Lines) -> None:
    put_operation(lines, "down", deadline=START + 12.0)
    del lines[at(lines, "ops/down", phase="done")]


@damage("operations", "operation up says that epoch 3 is its commit, and the epoch is 4", "view = epoch 4")
def an_operation_names_another_epoch(lines: Lines) -> None:
    put(lines, at(lines, "ops/up", phase="committed"), epoch=3)


@damage("operations", "operation up asked for 3 ranks, and was committed with 4", "view = epoch 4")
def an_operation_gets_what_it_did_not_ask_for(lines: Lines) -> None:
    put_operation(lines, "up", target=3)


@damage("operations", "operation stuck was rolled back, and what it made desired was not", "aborted")
def a_rollback_is_half_done(lines: Lines) -> None:
    del lines[changed(lines, "desired", lambda line: line.revision == 59)[0]]


@damage("operations", "operation up was proposed without what it makes desired", "proposed")
def a_proposal_is_half_done(lines: Lines) -> None:
    del lines[changed(lines, "desired", lambda line: line.revision == 42)[0]]


@damage("operations", "an operation was forgotten before it had ended", "deleted")
def an_operation_is_forgotten(lines: Lines) -> None:
    where = at(lines, "ops/up", phase="retiring")
    line = lines[where]
    assert isinstance(line, Changed)
    lines[where] = replace(line, deleted=True, value=None)


# --- faults, and what the run said itself


@damage("faults", "kill of rank 1 was counted without proof that it happened", "no proof")
def a_fault_has_no_proof(lines: Lines) -> None:
    where = next(i for i, line in enumerate(lines) if isinstance(line, InjectedFault))
    line = lines[where]
    assert isinstance(line, InjectedFault)
    lines[where] = replace(line, fault=replace(line.fault, proof=""))


@damage("faults", r"kill of rank 0 \(incarnation 1\) was never noticed", "kill of rank 0")
def a_death_is_not_noticed(lines: Lines) -> None:
    line = next(line for line in lines if isinstance(line, InjectedFault))
    fault = replace(line.fault, victim="rank 0", pid=101, at=START + 1.0, seen_at=START + 1.1)
    lines.append(InjectedFault(fault=fault))


@damage("by the run", "two processes are left", "")
def the_run_itself_found_something(lines: Lines) -> None:
    lines.append(Verified(promise="G7", ok=False, said="two processes are left"))
