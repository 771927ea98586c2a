"""One contract for every transport: what the exchange promises over any links, and what it expects of them.

All ranks are in this process. A rank that waits runs `on_wait` before each look at its links: by default, its peers
answer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from membership.base.errors import ConfigError, CoverageLost, ElasticError, PeerTimeout, RankError
from membership.base.network import Network
from membership.base.rank_id import RankId
from membership.store.records import Member, Placement, View
from tests.support.exchange_ranks import Experts, batch, broken
from tests.support.local_exchange import LocalExchange
from tests.support.toy_transport import ToyTransport
from tests.support.watched_doorbell import WatchedDoorbell, eventually_read
from workers.exchange.link import Refusal, Tag, refusal_of
from workers.exchange.loop import Exchange
from workers.exchange.model_side import StepContext
from workers.exchange.router import Parcel
from workers.exchange.shm.transport import ShmTransport
from workers.exchange.tcp.transport import TcpTransport
from workers.exchange.transports import Opener, opener, register

pytestmark = pytest.mark.unit

TRANSPORTS = ("toy", "shm", "tcp")
NETWORK = Network("127.0.0.1", "moe", b"a secret of the tests' cluster")
FEW_PAIRS = {
    "toy": partial(ToyTransport, most_pairs=5),
    "shm": partial(ShmTransport, area=4096),
    "tcp": partial(TcpTransport, network=NETWORK, most_bytes=4096),
}
register("tcp", partial(TcpTransport, network=NETWORK))
EXPERTS, HIDDEN, TOKENS, TOP_K, TIMEOUT_S = 4, 16, 6, 2, 10.0
WAIT_S = 30.0
ALL = tuple(range(EXPERTS))
BF16 = 1
TAG = Tag(sequence=5, epoch=3, engine_token=70, step=11, attempt=1, layer=0)
PARCEL = Parcel(1, np.array([0, 2]), np.array([0, 1]), np.array([0, 1]), [2], [2])
ASKER, REPLICA = RankId(0, 1), RankId(2, 3)
REPLICATED: Placement = {0: ((),), 1: (ALL,), 2: (ALL,)}  # rank 0 holds nothing; either peer can answer


class Rank:
    def __init__(self, me: RankId, placement: Placement, open_transport: Opener, timeout_s: float) -> None:
        self.me = me
        self.bank = Experts(me.rank, placement)
        self.bell = WatchedDoorbell()
        self.masked = 0
        self.exchange = Exchange(
            me, self.bank, self.bell, open_transport, lambda: self.masked, answer_timeout_s=timeout_s
        )

    def link_with(self, peer: RankId) -> object:
        return self.exchange._links.of(peer)

    def run(self, seed: int = 3, tokens: int = TOKENS) -> Tensor:
        return self.exchange.dispatch_combine(0, *rows(seed, tokens))

    def close(self) -> None:
        self.exchange.close()
        self.bell.close()


class Cluster:
    """Linked ranks, each in a step of the same view. Rank r has incarnation r + 1, so the higher rank dials."""

    def __init__(self, placement: Placement, open_transport: Opener, timeout_s: float) -> None:
        self.ranks = [Rank(RankId(r, r + 1), placement, open_transport, timeout_s) for r in sorted(placement)]
        handles = {rank.me: rank.exchange.handle() for rank in self.ranks}
        for rank in self.ranks:
            rank.exchange.connect({peer: handle for peer, handle in handles.items() if peer < rank.me}, TIMEOUT_S)
        members = tuple(Member(rank=rank.me.rank, node="n", incarnation=rank.me.incarnation) for rank in self.ranks)
        view = View(epoch=1, members=members, placement=placement)
        for rank in self.ranks:
            rank.exchange.connect(handles, TIMEOUT_S)
            rank.exchange.begin_step(StepContext(view, 7, 1, 1))
            rank.bell.on_wait = self.serve

    def serve(self) -> None:
        for rank in self.ranks[1:]:
            rank.exchange.serve()


Make = Callable[..., Cluster]


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def cluster(transport: str) -> Iterator[Make]:
    with ExitStack() as ends:

        def make(placement: Placement, few_pairs: bool = False, timeout_s: float = TIMEOUT_S) -> Cluster:
            made = Cluster(placement, FEW_PAIRS[transport] if few_pairs else opener(transport), timeout_s)
            for rank in made.ranks:
                ends.callback(rank.close)
            return made

        yield make


def rows(seed: int = 3, tokens: int = TOKENS) -> tuple[Tensor, ...]:
    return batch(seed, tokens, TOP_K, EXPERTS, HIDDEN, torch.bfloat16)


def alone(seed: int = 3, tokens: int = TOKENS) -> Tensor:
    """What one rank with every expert computes."""
    return LocalExchange(Experts(0, {0: (ALL,)})).dispatch_combine(0, *rows(seed, tokens))


# -- the exchange over any transport ---------------------------------------------------------------------------------


def test_the_bits_are_those_of_one_rank(cluster: Make) -> None:
    asker = cluster({0: ((0,),), 1: ((1, 2),), 2: ((3,),)}).ranks[0]
    for seed in range(3):
        assert torch.equal(asker.run(seed), alone(seed))
    assert (asker.exchange.retried_rows, asker.exchange.suspects) == (0, set())


def test_a_large_parcel_goes_in_parts(cluster: Make) -> None:
    made = cluster({0: ((),), 1: (ALL,)}, few_pairs=True)
    assert torch.equal(made.ranks[0].run(tokens=200), alone(tokens=200))
    assert len(made.ranks[1].bank.calls) > EXPERTS


def test_ranks_that_wait_for_each_other_answer_each_other(cluster: Make) -> None:
    made = cluster({0: ((0, 1),), 1: ((2, 3),)})
    for rank in made.ranks:
        rank.bell.on_wait = lambda: None
    found: dict[int, Tensor] = {}

    def run(rank: Rank) -> None:
        found[rank.me.rank] = rank.run(rank.me.rank)
        while len(found) < len(made.ranks):
            rank.bell.wait(rank.exchange.pending, 0.01)
            rank.exchange.serve()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in made.ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert found.keys() == {0, 1}
    assert all(torch.equal(found[seed], alone(seed)) for seed in found)


@pytest.mark.parametrize("lost", [1, 2])
def test_rows_of_a_peer_that_is_gone_go_to_a_replica(cluster: Make, lost: int) -> None:
    made = cluster(REPLICATED)
    asker, dying, other = made.ranks[0], made.ranks[lost], made.ranks[3 - lost]

    def die() -> None:
        asked = "something to be asked of the rank that dies"
        eventually_read(dying.exchange.pending, WAIT_S, asked)
        dying.exchange.close()
        asker.bell.on_wait = lambda: other.exchange.serve()

    asker.bell.on_wait = die
    assert torch.equal(asker.run(), alone())
    assert asker.exchange.retried_rows > 0
    assert asker.exchange.retried_at > 0
    assert asker.exchange.suspects == {lost}


def test_a_masked_peer_is_not_waited_for_and_its_late_answer_is_harmless(cluster: Make) -> None:
    made = cluster(REPLICATED)
    asker, hanging, other = made.ranks

    def mask() -> None:
        asker.masked = 1 << hanging.me.rank
        asker.bell.on_wait = lambda: other.exchange.serve()

    asker.bell.on_wait = mask
    assert torch.equal(asker.run(), alone())
    assert asker.exchange.suspects == {hanging.me.rank}
    asker.masked = 0
    asker.bell.on_wait = made.serve
    hanging.exchange.serve()  # late: the asker's next request replaces this one
    assert torch.equal(asker.run(4), alone(4))


def test_without_a_replica_coverage_is_lost(cluster: Make) -> None:
    made = cluster({0: ((0, 1, 2),), 1: ((3,),)})
    made.ranks[0].bell.on_wait = made.ranks[1].exchange.close
    with pytest.raises(CoverageLost, match=r"layer 0: no live rank holds experts \[3\]"):
        made.ranks[0].run()


def test_a_peer_that_does_not_answer_is_named(cluster: Make) -> None:
    made = cluster({0: ((0, 1, 2),), 1: ((3,),)}, timeout_s=0.01)
    made.ranks[0].bell.on_wait = lambda: None
    with pytest.raises(PeerTimeout, match=r"step 1, layer 0: no answer from ranks \[1\]"):
        made.ranks[0].run()
    made.ranks[0].bell.on_wait = made.serve

    def the_next_is_answered() -> bool:
        with suppress(PeerTimeout):  # 10 ms are short on a busy machine
            return torch.equal(made.ranks[0].run(4), alone(4))
        return False

    eventually_read(the_next_is_answered, WAIT_S, "an answer")


@pytest.mark.parametrize("how", ["not held", "raises"])
def test_a_refused_expert_goes_to_a_replica_and_without_one_is_named(cluster: Make, how: str) -> None:
    made = cluster(REPLICATED)
    asker, first, second = made.ranks

    def refuse(rank: Rank, expert: int) -> None:
        if how == "not held":
            rank.bank.held.discard((0, expert))
        else:
            rank.bank.before = broken(expert)

    refuse(first, 1)
    refuse(second, 2)
    assert torch.equal(asker.run(), alone())
    assert (asker.exchange.retried_rows > 0, asker.exchange.suspects) == (True, set())
    refuse(second, 1)
    with pytest.raises(CoverageLost, match=r"\[1\]"):
        asker.run()


@pytest.mark.parametrize("field", [*Tag._fields, "incarnation"])
def test_an_answer_to_anything_else_is_not_taken(cluster: Make, field: str) -> None:
    """Rank 1 sends wrong rows under a tag that differs in one field. It answers nothing else; rank 2 does."""
    made = cluster(REPLICATED)
    asker, stray, other = made.ranks

    def answer_wrongly() -> None:
        link = stray.link_with(ASKER)
        eventually_read(link.asked, WAIT_S, "a request")
        request = link.take()
        link.room(request)[:] = 0
        if field == "incarnation":
            link.incarnation += 1
            link.answer(request.tag)
        else:
            link.answer(request.tag._replace(**{field: getattr(request.tag, field) + 1}))
        asker.masked = (field == "sequence") << stray.me.rank  # is no answer at all: the asker still waits for one
        asker.bell.on_wait = lambda: other.exchange.serve()

    asker.bell.on_wait = answer_wrongly
    assert torch.equal(asker.run(), alone())
    assert asker.exchange.retried_rows > 0


def test_an_answer_that_comes_twice_is_harmless(cluster: Make) -> None:
    made = cluster({0: ((),), 1: (ALL,)})
    asker, peer = made.ranks
    assert torch.equal(asker.run(), alone())
    link = peer.link_with(ASKER)

    def answer_the_last_again() -> None:
        reply = asker.link_with(peer.me).reply()
        link.answer(Tag(*reply.tag))
        asker.bell.on_wait = made.serve

    asker.bell.on_wait = answer_the_last_again
    assert torch.equal(asker.run(4), alone(4))


# -- what the exchange expects of links ------------------------------------------------------------------------------


def test_a_request_is_taken_once_and_a_newer_one_replaces_it(cluster: Make, transport: str) -> None:
    made = cluster({0: ((),), 1: (ALL,)})
    near, far = made.ranks[0].link_with(made.ranks[1].me), made.ranks[1].link_with(ASKER)
    data = np.arange(2 * HIDDEN, dtype=np.int16).reshape(2, HIDDEN)
    assert (far.asked(), far.take(), near.answered()) == (False, None, 0)
    near.ask(TAG, PARCEL, data, BF16)
    near.ask(TAG._replace(sequence=6), PARCEL, data, BF16)
    taken = []

    def is_replaced() -> bool:
        eventually_read(far.asked, WAIT_S, "a request")
        taken.append(far.take())
        return taken[-1].tag.sequence == 6

    eventually_read(is_replaced, WAIT_S, "the newer request")
    assert len(taken) == 1 or transport == "tcp", "only over a network can the older one be there before the newer one"
    request = taken[-1]
    assert (request.experts, request.counts) == ([2], [2])
    assert request.rows[request.row_of].tolist() == data.tolist()
    assert (far.asked(), far.take()) == (False, None)
    far.room(request)[:] = data + 1
    far.answer(request.tag)
    eventually_read(lambda: near.answered() == 6, WAIT_S, "the answer")
    assert near.rows(2, HIDDEN, BF16).tolist() == (data + 1).tolist()


@pytest.mark.parametrize("field", Tag._fields)
def test_an_answer_counts_for_its_whole_tag_only(cluster: Make, field: str) -> None:
    made = cluster({0: ((),), 1: (ALL,)})
    near, far = made.ranks[0].link_with(made.ranks[1].me), made.ranks[1].link_with(ASKER)
    far.answer(TAG)
    eventually_read(lambda: refusal_of(near, TAG) is None, WAIT_S, "the answer")
    assert refusal_of(near, TAG._replace(**{field: getattr(TAG, field) + 1})) is not None
    far.answer(TAG, Refusal([2], "not here"))
    eventually_read(lambda: refusal_of(near, TAG) == Refusal([2], "not here"), WAIT_S, "the refusal")
    far.incarnation += 1
    far.answer(TAG)
    eventually_read(lambda: not near.reply().refused, WAIT_S, "the answer of another incarnation")
    assert refusal_of(near, TAG) is not None


def test_bulk_data_reaches_the_peer_it_is_for(cluster: Make, transport: str) -> None:
    made = cluster(REPLICATED)
    source, other, target = made.ranks
    there = threading.Event()
    source.exchange.outbox(target.me, 3)[:] = b"abc"
    source.exchange.post(target.me, there.set)
    assert there.wait(WAIT_S)
    assert target.exchange.inbox(source.me)[:3] == b"abc"
    if transport == "tcp":
        with pytest.raises(RankError, match=r"nothing has come from rank 0"):
            other.exchange.inbox(source.me)
    else:
        assert other.exchange.inbox(source.me)[:3] == bytes(3)
    with pytest.raises(RankError, match=r"rank 0 has no link with rank 2 \(incarnation 9\)"):
        source.exchange.outbox(RankId(2, 9), 3)


def test_of_large_data_no_byte_is_lost_and_only_the_last_post_counts(cluster: Make, transport: str) -> None:
    if transport == "toy":
        return
    made = cluster(REPLICATED)
    source, _, target = made.ranks
    whole = np.random.default_rng(1).bytes(8 << 20)
    said: list[int] = []
    last = threading.Event()
    for number in range(3):
        room = source.exchange.outbox(target.me, len(whole) + 1)
        assert len(room) == len(whole), "8 MB at most"
        room[:] = whole
        room[:8] = number.to_bytes(8, "little")
        source.exchange.post(target.me, partial(lambda n: (said.append(n), n == 2 and last.set()), number))
    assert last.wait(WAIT_S)
    assert said == sorted(set(said)), "each once, and none after a later one"
    found = target.exchange.inbox(source.me)
    assert (bytes(found[:8]), bytes(found[8:])) == ((2).to_bytes(8, "little"), whole[8:])


def test_a_link_belongs_to_one_pair_of_incarnations(cluster: Make, transport: str) -> None:
    made = cluster(REPLICATED)
    asker = made.ranks[0]
    with ExitStack() as ends:

        def rank(me: RankId) -> Rank:
            found = Rank(me, REPLICATED, opener(transport), TIMEOUT_S)
            ends.callback(found.close)
            return found

        for dialler, wanted in ((RankId(2, 2), ASKER), (RankId(3, 9), RankId(0, 0)), (RankId(0, 9), ASKER)):
            with pytest.raises(ElasticError):
                rank(dialler).exchange._transport.dial(wanted, asker.exchange.handle(), TIMEOUT_S)
        assert asker.link_with(REPLICA) is not None
        newer = rank(RankId(2, 9))
        newer.exchange.connect({ASKER: asker.exchange.handle()}, TIMEOUT_S)
        assert asker.link_with(newer.me) is not None
        assert asker.link_with(REPLICA) is None, "a newer incarnation takes the slot"


# -- the registry, and the transport without peers -------------------------------------------------------------------


def test_transports_have_names() -> None:
    assert opener("toy") is ToyTransport
    with pytest.raises(ConfigError, match="'toy'"):
        register("toy", ToyTransport)
    with pytest.raises(ConfigError, match="'pigeon'") as unknown:
        opener("pigeon")
    assert "loopback, shm, tcp, toy" in str(unknown.value.hint)


def test_over_the_loopback_a_rank_computes_alone_and_links_with_no_peer() -> None:
    rank = Cluster({0: (ALL,)}, opener("loopback"), TIMEOUT_S).ranks[0]
    try:
        assert torch.equal(rank.run(), alone())
        assert rank.exchange.serve() == 0
        with pytest.raises(RankError, match="rank 0 runs alone and cannot link with rank 1"):
            rank.exchange.connect({RankId(1, 0): b""}, TIMEOUT_S)
        rank.bank.before = broken(1)
        with pytest.raises(RankError, match=r"layer 0, expert 1: .*broken here"):
            rank.run()
    finally:
        rank.close()
