"""Mutants that only a network between hosts shows: who is silent, whose word counts, what returns after a cut."""

from __future__ import annotations

from chaos.mutants.mutant import Mutant, Shown

NETWORK = "tests/unit/chaos/simulation/test_network.py"

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        name="cut-off-and-sure",
        guards="G9: an engine that no other host answers, of two or more, gives no rank up: it is cut off itself",
        file="workers/queue/silence.py",
        before="    return len(longest) > 1 and min(longest) >= LINK_SUSPECT_MIN_S / 2\n",
        after="    return False\n",
        hosts=3,
        shown=Shown(1, (3,), hosts=3),
    ),
    Mutant(
        name="peers-word-is-death",
        guards="G9: a rank that a peer misses is asked whether it lives, and not given up: their link may be cut",
        file="elastic/engine/loop.py",
        before="            self._fleet.probe()\n        self._note_links(result)\n",
        after="            for key in [key for key in self._ready if key.rank in result.suspects]:\n"
        "                self._fleet.ended(key)\n        self._note_links(result)\n",
        hosts=3,
        shown=Shown(1, (117,), hosts=3),
    ),
    Mutant(
        name="link-cut-for-good",
        guards="G4: a link between hosts that was cut is made again",
        file="workers/exchange/tcp/redial.py",
        before="due=now + pause_s, trying=False)",
        after="trying=False)",
        hosts=3,
        shown=Shown(1, (117,), hosts=3),
    ),
    Mutant(
        name="silence-unnoticed",
        guards="G4: a host that acknowledges nothing is gone around, while its connections last",
        file="workers/queue/silence.py",
        before="    return silence.waiting and silence.lasted_s >=",
        after="    return silence.waiting and silence.lasted_s >= 100 +",
        tests=(f"{NETWORK}::test_a_silent_host_is_given_up_whichever_way_is_cut",),
    ),
)
