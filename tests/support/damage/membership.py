"""Damages of what the store says: epochs, incarnations, the watch, reads (G1) and fences (G2)."""

from __future__ import annotations

from msgspec.structs import replace

from chaos.record.record import Changed, Happened, Read
from tests.support.damage.tools import Lines, at, damage, event, put, put_view, reads, view_of
from tests.support.recorded_run import START, changed

# --- G1


@damage("commits", "epoch 3 was committed twice: revision 38 by leader token 6, revision 53 by leader token 41", "41")
def an_epoch_comes_twice(lines: Lines) -> None:
    put_view(lines, 4, epoch=3)


@damage("commits", "epoch 5 follows epoch 3", "revision 53 ")
def an_epoch_is_left_out(lines: Lines) -> None:
    put_view(lines, 5, epoch=6)
    put_view(lines, 4, epoch=5)


@damage("commits", r"epoch 4 was committed by leader token 6; the leader's was 41", "leader = token 41")
def a_deposed_leader_commits(lines: Lines) -> None:
    where = event(lines, "epoch_committed", 3)
    line = lines[where]
    assert isinstance(line, Happened)
    lines[where] = Happened(event=replace(line.event, fields={**line.event.fields, "token": 6}))


@damage("commits", r"an event reports a commit of epoch 4 at revision 54: there was none", "epoch_committed")
def a_commit_is_claimed_that_was_none(lines: Lines) -> None:
    where = event(lines, "epoch_committed", 3)
    line = lines[where]
    assert isinstance(line, Happened)
    lines[where] = Happened(event=replace(line.event, fields={**line.event.fields, "revision": 54}))


@damage("commits", "incarnation was changed while there was no leader", "revision 43 ")
def no_controller_leads(lines: Lines) -> None:
    del lines[changed(lines, "leader")[-1]]


@damage(
    "commits", "epoch 2 was committed with rank 2 .*has not prepared it: it was staged at revision 24", "revision 28 "
)
def a_member_has_not_prepared(lines: Lines) -> None:
    put(lines, at(lines, "ranks/2/3", prepared_revision=24), prepared_revision=14)


@damage("commits", "epoch 2 was committed and is still staged: not one transaction", "next = epoch 2")
def a_commit_is_not_one_transaction(lines: Lines) -> None:
    where = changed(lines, "next", lambda line: line.deleted and line.revision == 28)[0]
    line = lines.pop(where)
    assert isinstance(line, Changed)
    lines.insert(at(lines, "engine-status", epoch=2), replace(line, revision=29))


@damage("commits", "epoch 2 was committed otherwise than it was staged", "view = epoch 2")
def another_view_is_committed(lines: Lines) -> None:
    put(lines, at(lines, "view", epoch=2), attempt=1)


@damage("commits", "epoch 2 was committed without having been staged", "view = epoch 2")
def a_view_was_not_staged(lines: Lines) -> None:
    del lines[at(lines, "next", epoch=2)]


@damage("commits", r"rank 1 \(incarnation 2\) was evicted and is back in epoch 4", "assign/a = ranks 0/1 2/3")
def an_evicted_rank_is_back(lines: Lines) -> None:
    members = view_of(lines, 4)["members"]
    put_view(lines, 4, members=[{**m, "incarnation": 2} if m["rank"] == 1 else m for m in members])


@damage("commits", "the view was deleted", "view deleted")
def the_view_goes(lines: Lines) -> None:
    lines.append(Changed(revision=80, key="/elastic-ep/sim/view", at=START + 66.0, deleted=True))


@damage(
    "incarnations", "incarnation 3 was given out twice: to rank 2 on a at revision 7, to rank 3 on a at revision 43"
)
def an_incarnation_comes_twice(lines: Lines) -> None:
    where = changed(lines, "assign/a", lambda line: line.revision == 43)[0]
    line = lines[where]
    assert isinstance(line, Changed)
    specs = [{**s, "incarnation": 3} if s["incarnation"] == 5 else s for s in line.value["ranks"]]
    put(lines, where, ranks=specs)


@damage("incarnations", "incarnation 4 of rank 1 was given out without being counted", "assign/a")
def an_incarnation_is_not_counted(lines: Lines) -> None:
    del lines[at(lines, "incarnation", value=4)]


@damage("incarnations", "the counter of incarnations went back", "incarnation = value 2")
def the_counter_goes_back(lines: Lines) -> None:
    put(lines, at(lines, "incarnation", value=5), value=2)


@damage("incarnations", "slot 2 has two incarnations at once, 3 and 5")
def a_slot_is_filled_twice(lines: Lines) -> None:
    where = changed(lines, "assign/a", lambda line: line.revision == 43)[0]
    line = lines[where]
    assert isinstance(line, Changed)
    put(lines, where, ranks=[{**s, "rank": 2} if s["incarnation"] == 5 else s for s in line.value["ranks"]])


@damage("watch", "the watch missed a change of .*/ops/up: it was version 1, then version 3", "revision 45 ")
def the_watch_leaves_something_out(lines: Lines) -> None:
    del lines[changed(lines, "ops/up")[1]]


@damage("watch", "the watch delivered revision 24 after 25", "revision 24 ")
def the_watch_mixes_the_order_up(lines: Lines) -> None:
    where = at(lines, "next", epoch=2)
    after = changed(lines, "ranks/0/1", lambda line: line.revision == 25)[0]
    lines[where], lines[after] = lines[after], lines[where]


@damage("watch", "the deletion of .*ranks/2/3, and never its creation", "ranks/2/3 deleted")
def the_watch_delivers_an_end_without_a_beginning(lines: Lines) -> None:
    for where in reversed(changed(lines, "ranks/2/3", lambda line: not line.deleted)):
        del lines[where]


def stale(lines: Lines, client: str) -> None:
    """The last read gets what the tenth one got."""
    early, late = (lines[reads(lines)[number]] for number in (9, -1))
    assert isinstance(early, Read)
    assert isinstance(late, Read)
    lines[reads(lines)[-1]] = replace(early, began=late.began, ended=late.ended, client=client)


@damage("linearizable", "reader 9 read revision 22 after the watch had delivered 70: the read is stale", "ops/down")
def a_read_is_older_than_a_change_that_was_delivered(lines: Lines) -> None:
    stale(lines, "reader 9")


@damage("linearizable", r"reader 9 read revision 22 after reader 1 had read 72: the read is stale", "read revision 72")
def a_read_is_older_than_another(lines: Lines) -> None:
    stale(lines, "reader 9")
    last = lines[reads(lines)[-1]]
    assert isinstance(last, Read)
    before = replace(last, client="reader 1", revision=72, epoch=5, view_revision=65, leader_revision=41)
    lines.insert(reads(lines)[-1], before)
    lines[reads(lines)[-1]] = replace(last, began=last.ended + 0.1, ended=last.ended + 0.2)


@damage("linearizable", "reader 2 read revision 70 and then, in another read, revision 22", "reader")
def a_client_goes_back_in_time(lines: Lines) -> None:
    last = lines[reads(lines)[-3]]
    assert isinstance(last, Read)
    stale(lines, last.client)


@damage(
    "linearizable",
    "as of revision 71, that the view was epoch 4 of revision 53, where it was epoch 5",
    "view = epoch 5",
)
def a_read_says_what_was_before(lines: Lines) -> None:
    last = lines[reads(lines)[-1]]
    assert isinstance(last, Read)
    lines[reads(lines)[-1]] = replace(last, epoch=4, view_revision=53)


@damage("linearizable", "the leader was token 6, where it was token 41", "leader = token 41")
def a_read_names_a_deposed_leader(lines: Lines) -> None:
    last = lines[reads(lines)[-1]]
    assert isinstance(last, Read)
    lines[reads(lines)[-1]] = replace(last, leader_revision=6)


# --- G2


@damage("fences", "engine 4 published the status while engine 5 was in office", "engine = token 5")
def an_old_engine_publishes_the_status(lines: Lines) -> None:
    put(lines, at(lines, "engine-status", epoch=4), token=4)


@damage("fences", "engine 5 uses epoch 5, and only 4 is committed", "view = epoch 4")
def an_engine_is_ahead_of_the_view(lines: Lines) -> None:
    put(lines, at(lines, "engine-status", epoch=4), epoch=5)


@damage("fences", "engine 5 went back from epoch 3 to 2", "engine-status = token 5, epoch 2")
def an_engine_goes_back(lines: Lines) -> None:
    put(lines, at(lines, "engine-status", epoch=4), epoch=2)


@damage("fences", r"ranks \[1\] were masked in epoch 1 and came back within it", "masked")
def a_mask_shrinks(lines: Lines) -> None:
    put(lines, changed(lines, "engine-status")[2], masked=[])


@damage("fences", r"rank 1 \(incarnation 2\) was masked and joined again", "rank_joined")
def a_masked_rank_joins(lines: Lines) -> None:
    masked = lines[event(lines, "rank_masked")]
    assert isinstance(masked, Happened)
    lines.append(Happened(event=replace(masked.event, kind="rank_joined", ts=masked.event.ts + 1.0)))


@damage("fences", "token 5 elected the engine twice", "engine_elected")
def a_token_is_given_out_twice(lines: Lines) -> None:
    lines.append(lines[event(lines, "engine_elected")])
