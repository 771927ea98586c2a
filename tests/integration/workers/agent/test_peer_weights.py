"""A host without weight files takes them from other hosts: the same bits, whatever happens to who sends them."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
import zmq
from torch import Tensor

from membership.base.errors import ConfigError, ModelError, QueueError
from membership.base.network import Ports
from membership.store.records import AgentRecord, Checkpoint, ClusterConfig, ClusterState
from tests.support.families import write_checkpoint
from tests.support.helpers import eventually
from tests.support.replaced_files import is_expert, replace_weights
from tests.support.weight_peer import NETWORK, Killed
from workers.agent.peer_hosts import LISTEN_AGAIN_S, HostSource, PeerHosts
from workers.agent.weight_store import WeightStore
from workers.bulk.client import BulkLink, PeerLost
from workers.bulk.model_files import keep_files, model_directory
from workers.bulk.server import BulkServer
from workers.model import peer_weights
from workers.model.content import small_files
from workers.model.cpu import backend as cpu_backend
from workers.model.expert_source import ExpertWeights
from workers.model.load import LoadedModel, load_model
from workers.model.packing import available, is_packed, pack, stays_plain
from workers.model.packing import plain as unpacked
from workers.model.peer_weights import OtherHosts, PeerWeights
from workers.model.shared_weights import LAYOUT, SUFFIX_BYTES, WeightsCorrupt, header_of, header_size
from workers.model.weight_digests import table
from workers.protocol.load_progress import LoadProgress, seen
from workers.protocol.weight_client import WeightClient
from workers.protocol.weight_peers import DENSE, PIECE, Peer, Read, digest_of, expert_name
from workers.queue.network import Purpose, remote_of

pytestmark = pytest.mark.integration

CONFIG = ClusterConfig(cluster="c", model="", served_model_name="m", moe_layers=2, experts=4)
OTHERS = OtherHosts(NETWORK, patience_s=2.0, silent_s=1.0)
RATE = 1 << 12
Loaded = dict[tuple[int, int], ExpertWeights]


class Source(HostSource):
    """Counts what it sends, and may change it."""

    change: Callable[[bytes], bytes] = staticmethod(lambda data: data)
    sent = 0

    def read(self, shard: int, offset: int, nbytes: int) -> bytes:
        data = self.change(super().read(shard, offset, nbytes))
        self.sent += len(data)
        return data


class Host:
    """A host's store and, once `serve` was called, who sends of it."""

    def __init__(self, node: str, clock: Callable[[], float] | None = None, bytes_per_s: int = 0) -> None:
        self.node, self.clock = node, clock or (lambda: 0.0)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.store = WeightStore(lambda kind, **f: self.events.append((kind, f)), bytes_per_s, self.clock)
        self.servers: list[BulkServer] = []

    def load(self, path: Path, others: OtherHosts | None = None, progress: LoadProgress | None = None) -> LoadedModel:
        return load_model(path, store=WeightClient(self.store.handle()), progress=progress, others=others)

    def serve(self, path: Path) -> Source:
        source = Source(
            self.store, msgspec.structs.replace(CONFIG, model=str(path), files=tuple(small_files(path).items()))
        )
        self.servers.append(BulkServer(remote_of(NETWORK, Purpose.WEIGHTS), source, self.clock))
        return source

    @property
    def peer(self) -> Peer:
        return Peer(self.node, self.servers[-1].endpoint, self.servers[-1].key)

    def close(self) -> None:
        for server in self.servers:
            server.close()
        self.store.close()

    def left_out(self) -> list[tuple[str, str]]:
        return [(f["peer"], f["reason"]) for kind, f in self.events if kind == "weights_peer_left_out"]


def everything(loaded: LoadedModel) -> Loaded:
    info = loaded.info
    every = [(layer, expert) for layer in range(info.moe_layers) for expert in range(info.experts)]
    return dict(loaded.source.load_many(every))


def same(one: Loaded, other: Loaded) -> bool:
    pairs = [(one[key], other[key]) for key in one]
    return one.keys() == other.keys() and all(
        equal(a.gate_up, b.gate_up) and equal(a.down, b.down) and a.digest == b.digest for a, b in pairs
    )


def equal(one: Tensor, other: Tensor) -> bool:
    """Two operands of products, whether packed or not."""
    first, second = (unpacked(each) if is_packed(each) else each.t() for each in (one, other))
    return torch.equal(first, second)


class Scene:
    """Host `a` has the checkpoint and has loaded all of it; `b` has its config only."""

    def __init__(self, root: Path, opened: ExitStack, dtype: str = "float32", *, intermediate_size: int = 96) -> None:
        self.opened, self.dtype = opened, dtype
        self.path = write_checkpoint(root / "model", "mixtral", dtype, intermediate_size=intermediate_size)
        self.bare = root / "bare"
        self.bare.mkdir()
        shutil.copy(self.path / "config.json", self.bare)
        self.a, self.b = self.host("a"), self.host("b")
        self.loaded = self.a.load(self.path)
        opened.callback(self.loaded.checkpoint.close)
        self.experts = everything(self.loaded)
        digests = {key: weights.digest for key, weights in self.experts.items()}
        info = self.loaded.info
        self.served = Checkpoint(
            parts={"weights": self.loaded.dense_digest}, experts=table(digests, info.moe_layers, info.experts)
        )

    def host(self, node: str) -> Host:
        made = Host(node)
        self.opened.callback(made.close)
        return made

    @property
    def names(self) -> list[str]:
        return [
            f"torch.{self.dtype}/layout{LAYOUT}/{name}"
            for name in (DENSE, *(expert_name(*key) for key in self.experts))
        ]

    def join(self, *peers: Peer, served: Checkpoint | None = None) -> tuple[LoadedModel, Loaded]:
        """All of it at b, from these hosts."""
        self.b.store.know(peers, partial(digest_of, served=served or self.served))
        loaded = self.b.load(self.bare, OTHERS)
        try:
            return loaded, everything(loaded)
        finally:
            loaded.checkpoint.close()

    def require_same(self, found: tuple[LoadedModel, Loaded]) -> None:
        loaded, experts = found
        assert same(experts, self.experts)
        assert loaded.dense_digest == self.loaded.dense_digest
        assert loaded.checkpoint.bytes_read == 0
        theirs = loaded.model.state_dict()
        ours = self.loaded.model.state_dict()
        assert all(torch.equal(unpacked(tensor), unpacked(theirs[name])) for name, tensor in ours.items())


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with ExitStack() as opened:
        yield Scene(tmp_path, opened)


def test_a_host_without_weight_files_gets_the_bits_of_one_that_has_them_and_gives_them_on(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where several threads of a rank read experts, as on GPUs: one has the connections."""
    source = scene.a.serve(scene.path)
    scene.require_same(scene.join(scene.a.peer))
    assert ("weights_from_peers", {"peers": ["a"]}) in scene.b.events
    assert scene.b.left_out() == []
    assert source.sent >= scene.a.store.nbytes - len(scene.names) * 4096

    scene.b.serve(scene.bare)
    c = scene.host("c")
    c.store.know((scene.b.peer,), partial(digest_of, served=scene.served))
    loaded = c.load(scene.bare, OTHERS)
    fetch, threads, loaded.source.readers = PeerWeights._fetch, list[int](), 3
    monkeypatch.setattr(PeerWeights, "_fetch", lambda *a: (threads.append(threading.get_ident()), fetch(*a))[1])
    scene.require_same((loaded, everything(loaded)))
    assert len(set(threads)) == 1
    eventually(lambda: scene.b.store.taking_from == (), 20, "the end of b's sessions")


def test_what_a_host_takes_is_progress_of_its_load(scene: Scene) -> None:
    scene.a.serve(scene.path)
    scene.b.store.know((scene.a.peer,), partial(digest_of, served=scene.served))
    words = memoryview(bytearray(32)).cast("Q")
    progress = LoadProgress(words)
    with progress.loading():
        experts = everything(scene.b.load(scene.bare, OTHERS, progress))
        now = seen(words)
    assert now.done == now.total > sum(weights.nbytes for weights in experts.values())
    assert now.marks > len(scene.names)


def test_another_host_gives_the_rest_of_one_that_is_killed_in_the_middle(scene: Scene) -> None:
    scene.a.serve(scene.path)
    with Killed(scene.a.store, scene.names, reads=4) as killed:
        scene.require_same(scene.join(killed.peer, scene.a.peer))
        assert killed.ended_by(30) == -9
    assert {node for node, _ in scene.b.left_out()} == {"killed"}
    assert "has ended the connection" in scene.b.left_out()[0][1]


def damaged(data: bytes) -> bytes:
    """One bit of the weights; headers are as they were."""
    return bytes([data[0] ^ 1]) + data[1:]


def test_a_damaged_piece_is_not_used_and_who_sent_it_is_named(scene: Scene) -> None:
    source = scene.a.serve(scene.path)
    source.change = damaged
    with pytest.raises(ModelError, match=r"node a sent .* with a wrong checksum"):
        scene.join(scene.a.peer)
    assert scene.b.store.keys == frozenset(), "nothing of it was kept"
    assert [node for node, _ in scene.b.left_out()] == ["a"]


def test_what_one_host_damages_another_one_gives(scene: Scene) -> None:
    scene.a.serve(scene.path).change = damaged
    bad, good = replace_node(scene.a.peer, "bad"), scene.a.serve(scene.path)
    scene.require_same(scene.join(bad, scene.a.peer))
    assert good.sent > 0
    assert {node for node, _ in scene.b.left_out()} == {"bad"}


class Packing(Scene):
    """Of a model whose matrices are packed."""

    def __init__(self, root: Path, opened: ExitStack) -> None:
        super().__init__(root, opened, "bfloat16", intermediate_size=128)

    def has(self, node: str, monkeypatch: pytest.MonkeyPatch, pack: Callable[[Tensor], bytes]) -> Host:
        """Another host that has loaded all, and packs like that."""
        made = self.host(node)
        with monkeypatch.context() as patched:
            patched.setattr(cpu_backend, "pack", pack)
            loaded = made.load(self.path)
            everything(loaded)
            loaded.checkpoint.close()
        return made


@pytest.fixture
def packing(tmp_path: Path) -> Iterator[Packing]:
    if not available():
        pytest.skip("this torch, or this processor, packs nothing")
    with ExitStack() as opened:
        yield Packing(tmp_path, opened)


def test_packed_weights_of_one_host_and_plain_ones_of_another_are_the_same_to_who_takes_them(
    packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one has told how its entries are packed, and is lost before it has sent one."""
    packing.a.serve(packing.path).change = only_headers
    plain_host = packing.has("plain", monkeypatch, stays_plain)
    plain_host.serve(packing.path)
    loaded, experts = packing.join(packing.a.peer, plain_host.peer)
    assert {node for node, _ in packing.b.left_out()} == {"a"}
    assert not any(is_packed(weights.gate_up) for weights in experts.values())
    packing.require_same((loaded, experts))


def only_headers(data: bytes) -> bytes:
    """What a host sends that is lost before its first tensor."""
    said = memoryview(data)
    try:
        header_of(said, zlib.crc32(said[-header_size(said) : -SUFFIX_BYTES]))
    except WeightsCorrupt as error:
        raise QueueError("no more of it") from error
    return data


def off_by_a_bit(matrix: Tensor) -> bytes:
    """An error between what was read, whose digest is the cluster's, and what is kept, whose checksum is right."""
    if pack(matrix.clone()):
        matrix.view(torch.int16)[0, 0] ^= 1
    return pack(matrix)


def test_packed_weights_are_compared_with_what_the_cluster_serves_and_not_with_what_their_sender_says(
    packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = packing.has("wrong", monkeypatch, off_by_a_bit)
    wrong.serve(packing.path)
    with pytest.raises(ModelError, match=r"node wrong sent .* with a wrong checksum"):
        packing.join(wrong.peer)
    packing.a.serve(packing.path)
    packing.require_same(packing.join(wrong.peer, packing.a.peer))


def test_a_host_that_packs_for_another_processor_is_left_out_before_it_sends_any(
    packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(peer_weights, "takes", lambda _kind, _shape, how: not how)
        packing.a.serve(packing.path)
        with pytest.raises(ModelError, match="node a has packed dense for another torch or processor"):
            packing.join(packing.a.peer)
        plain_host = packing.has("plain", monkeypatch, stays_plain)
        plain_host.serve(packing.path)
        packing.require_same(packing.join(packing.a.peer, plain_host.peer))


def replace_node(peer: Peer, node: str) -> Peer:
    return msgspec.structs.replace(peer, node=node)


@pytest.mark.parametrize("changed", [is_expert, lambda name: True], ids=["experts", "all"])
def test_a_host_with_another_model_is_refused_before_its_weights_are_sent(
    scene: Scene, changed: Callable[[str], bool], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(scene.path, other)
    replace_weights(other, changed)
    c = scene.host("c")
    loaded = c.load(other)
    everything(loaded)
    loaded.checkpoint.close()
    wrong, right = c.serve(other), scene.a.serve(scene.path)
    scene.require_same(scene.join(c.peer, scene.a.peer))
    assert "than the cluster serves" in dict(scene.b.left_out())["c"]
    assert right.sent > 0
    assert wrong.sent < scene.a.store.nbytes / 2 or changed is is_expert, "headers only"


def test_without_a_host_that_has_it_the_load_ends_with_who_was_asked(scene: Scene) -> None:
    empty = scene.host("empty")
    empty.serve(scene.path)
    with pytest.raises(ModelError, match=r"lacks dense, and so do other hosts \(asked: empty\)"):
        scene.join(empty.peer)
    with pytest.raises(ModelError, match="no safetensors weights"):
        load_model(scene.bare)


def test_a_load_waits_for_a_host_that_has_it_and_ends_when_it_is_not_wanted(scene: Scene) -> None:
    scene.a.serve(scene.path)
    known = threading.Timer(0.2, lambda: scene.b.store.know((scene.a.peer,), lambda name: b""))
    known.start()
    try:
        loaded = scene.b.load(scene.bare, replace(OTHERS, patience_s=60.0))
    finally:
        known.join(10)
    assert loaded.dense_digest == scene.loaded.dense_digest
    assert list(loaded.source.load_many([(0, 0)], stop=lambda: True)) == []
    loaded.checkpoint.close()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_host_sends_no_faster_than_its_bandwidth_but_what_is_urgent(scene: Scene) -> None:
    clock = Clock()
    slow = Host("slow", clock, bytes_per_s=RATE)
    scene.opened.callback(slow.close)
    loaded = slow.load(scene.path)
    everything(loaded)
    loaded.checkpoint.close()
    slow.serve(scene.path)
    context = scene.opened.enter_context(zmq.Context())
    link = BulkLink(slow.peer, NETWORK, context)
    scene.opened.callback(link.close)
    (place,) = link.find(scene.names[:1])
    half = Read(place.shard, 0, place.size // 2)
    each_s = half.nbytes / RATE
    clock.now = 1000.0
    assert len(link.take(link.ask(half))) == half.nbytes, "what was unused for a moment may be used at once"
    waiting = [link.ask(half) for _ in range(3)]
    outbox = slow.servers[0]._outbox
    eventually(lambda: len(outbox._due) == 3, 20, "three promises")
    assert [round(at - clock.now, 6) for at, *_ in sorted(outbox._due)] == [
        round((turn + 1) * each_s - 0.1, 6) for turn in range(3)
    ]
    assert len(link.take(link.ask(replace_urgent(half)))) == half.nbytes
    assert len(outbox._due) == 3
    clock.now += 2 * each_s
    assert [len(link.take(number)) for number in waiting[:2]] == [half.nbytes] * 2
    assert len(outbox._due) == 1


def replace_urgent(asked: Read) -> Read:
    return msgspec.structs.replace(asked, urgent=True)


def test_a_promise_ends_with_the_host_that_gave_it(scene: Scene) -> None:
    """It may be for much later; that the connection has ended is known at once."""
    slow = Host("slow", Clock(), bytes_per_s=1)
    scene.opened.callback(slow.close)
    slow.load(scene.path).checkpoint.close()
    slow.serve(scene.path)
    context = scene.opened.enter_context(zmq.Context())
    link = BulkLink(slow.peer, NETWORK, context)
    scene.opened.callback(link.close)
    (place,) = link.find(scene.names[:1])
    _, number = [link.ask(Read(place.shard, 0, place.size // 2)) for _ in range(2)]
    eventually(lambda: slow.servers[0]._outbox._due, 20, "a promise for the second one")
    looks: list[int] = []

    def waiting() -> None:
        if not looks:
            slow.servers[0].close()
        looks.append(1)
        assert len(looks) < 60, "the promise of a host that has ended is believed"

    with pytest.raises(PeerLost, match=r"node slow .* has ended the connection"):
        link.take(number, waiting)


def test_a_host_whose_agent_has_ended_takes_no_connection(scene: Scene) -> None:
    scene.a.serve(scene.path)
    scene.a.servers[0].close()
    context = scene.opened.enter_context(zmq.Context())
    link = BulkLink(scene.a.peer, NETWORK, context, silent_s=600.0)
    scene.opened.callback(link.close)
    with pytest.raises(PeerLost, match=r"node a .* takes none"):
        link.find(scene.names[:1])


def test_a_connection_that_ended_while_nothing_was_owed_is_no_loss(scene: Scene) -> None:
    """A flap between two loads: ZeroMQ has another connection by the next question."""
    scene.a.serve(scene.path)
    context = scene.opened.enter_context(zmq.Context())
    link = BulkLink(scene.a.peer, NETWORK, context)
    scene.opened.callback(link.close)
    before = link.find(scene.names[:1])
    cut_connections_with(scene.a.peer)
    assert link._monitor.poll(20_000), "ZeroMQ has not noticed"
    assert link.find(scene.names[:1]) == before
    link.forget(link.ask(Read(before[0].shard, 0, 1)))
    cut_connections_with(scene.a.peer)
    assert link._monitor.poll(20_000), "ZeroMQ has not noticed"
    assert link.find(scene.names[:1]) == before, "an answer that nobody wants any more is not owed"


def cut_connections_with(peer: Peer) -> None:
    """End the connections that this process has made to that host, as a network would."""
    port, ended = int(peer.endpoint.rpartition(":")[2]), 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                if connection.family == socket.AF_INET and connection.getpeername()[1] == port:
                    connection.shutdown(socket.SHUT_RDWR)
                    ended += 1
        except OSError:  # closed meanwhile, or it only listens
            continue
    assert ended, "there was no connection"


def test_while_a_load_waits_for_a_host_other_ranks_of_its_own_wait_with_it(scene: Scene) -> None:
    """A rank that waits for another one's reading begins its own once that gives no sign of life."""
    scene.a.serve(scene.path)
    signs: list[int] = []
    link, _ = WeightClient(scene.b.store.handle()).join(lambda: signs.append(1))
    scene.opened.callback(link.close)
    loaded: list[LoadedModel] = []
    load = threading.Thread(target=lambda: loaded.append(scene.b.load(scene.bare, replace(OTHERS, patience_s=60.0))))
    load.start()
    try:
        eventually(lambda: signs, 30, "a sign before there is anything to read")
    finally:
        scene.b.store.know((scene.a.peer,), lambda name: b"")
        load.join(60)
    assert [each.dense_digest for each in loaded] == [scene.loaded.dense_digest]
    loaded[0].checkpoint.close()


def test_a_host_refuses_what_it_has_not_got_and_who_has_another_secret(scene: Scene) -> None:
    scene.a.serve(scene.path)
    context = scene.opened.enter_context(zmq.Context())
    link = BulkLink(scene.a.peer, NETWORK, context)
    scene.opened.callback(link.close)
    (place,) = link.find([*scene.names[:1], "absent"])
    for asked in (
        Read(place.shard, place.size, 1),
        Read(place.shard, -1, 1),
        Read(place.shard, 0, PIECE + 1),
        Read(place.shard, 0, 0),
        Read(999, 0, 1),
    ):
        with pytest.raises(PeerLost, match="node a refused"):
            link.take(link.ask(asked))
    with pytest.raises(PeerLost, match="no small file"):
        link.file("model.safetensors")
    with pytest.raises(PeerLost, match="another join secret"):
        BulkLink(scene.a.peer, replace(NETWORK, secret=b"another secret of another cluster"), context)
    with pytest.raises(QueueError):
        scene.a.store.read(place.shard, place.size - 1, 2)


def test_whatever_a_host_stumbles_over_it_refuses_and_goes_on(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the agent a thread that ends takes all of its ranks along."""
    source = scene.a.serve(scene.path)
    context = scene.opened.enter_context(zmq.Context())
    link = BulkLink(scene.a.peer, NETWORK, context)
    scene.opened.callback(link.close)

    def broken(_name: str) -> bytes:
        raise KeyError("no such thing")

    with monkeypatch.context() as changed:
        changed.setattr(source, "file", broken)
        with pytest.raises(PeerLost, match=r"node a refused.*KeyError"):
            link.file("config.json")
    assert link.file("config.json") == (scene.path / "config.json").read_bytes()


def test_without_a_free_port_a_host_sends_nothing_and_tries_again(scene: Scene) -> None:
    now, state = [0.0], ClusterState(revision=1, config=CONFIG)
    hosts = PeerHosts(CONFIG, "b", scene.b.store, lambda: now[0])
    scene.opened.callback(hosts.close)
    with socket.create_server((NETWORK.address, 0)) as taken:
        port = taken.getsockname()[1]
        network = replace(NETWORK, ports=Ports(port, port))
        for _ in range(3):
            files = os.listdir("/proc/self/fd")
            assert hosts.meet(state, network) == {"weights_at": "", "weights_key": ""}
            # Fewer: what an earlier test left to its sockets' own threads may be closed meanwhile.
            assert len(os.listdir("/proc/self/fd")) <= len(files), "what it had opened is closed"
            now[0] += LISTEN_AGAIN_S
    assert hosts.meet(state, network)["weights_at"].endswith(f":{port}")


def cluster(scene: Scene, *peers: Peer, deadline_s: float = 1.5) -> Any:
    """What b's mirror shows, of a cluster whose checkpoint is not on b."""
    config = msgspec.structs.replace(
        CONFIG, model="/absent", files=tuple(small_files(scene.path).items()), launch_deadline_s=deadline_s
    )
    agents = {
        peer.node: AgentRecord(node=peer.node, pid=1, started=0.0, weights_at=peer.endpoint, weights_key=peer.key)
        for peer in peers
    }
    state = ClusterState(revision=1, config=config, agents=agents)
    return SimpleNamespace(state=lambda: state)  # as much of a mirror as is looked at


def test_config_and_tokenizer_come_whole_from_the_first_host_that_has_the_right_ones(
    scene: Scene, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(scene.path, other)
    (other / "config.json").write_text("{}")
    scene.a.serve(other)
    wrong = replace_node(scene.a.peer, "wrong")
    scene.a.serve(scene.path)
    keep, stop = tmp_path / "state" / "model-files", threading.Event()
    with pytest.raises(ConfigError, match=r"no checkpoint at /absent, .* node wrong has another config.json"):
        model_directory(cluster(scene, wrong), "", "b", keep, NETWORK, stop)
    assert not keep.exists()
    found = model_directory(cluster(scene, wrong, scene.a.peer), "", "b", keep, NETWORK, stop)
    assert found == str(keep)
    assert small_files(keep) == small_files(scene.path)
    assert [path.name for path in keep.parent.iterdir()] == ["model-files"], "and nothing else stays"
    assert model_directory(cluster(scene), "", "b", keep, NETWORK, stop) == str(keep), "kept for the next start"
    assert model_directory(cluster(scene), str(scene.path), "b", keep, NETWORK, stop) == str(scene.path), "its own copy"
    assert model_directory(cluster(scene), "", "b", keep, None, stop) == "", "one host asks no other"


@pytest.mark.parametrize("theirs", [b"{}", b"[]"])
def test_two_roles_of_a_host_may_keep_the_files_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: bytes
) -> None:
    """The other one has just put them there, after this one had looked."""
    keep = tmp_path / "model-files"
    keep.mkdir()
    (keep / "config.json").write_bytes(theirs)
    with monkeypatch.context() as late:
        late.setattr(Path, "exists", lambda _: False)
        if theirs == b"{}":
            keep_files({"config.json": b"{}"}, keep)
        else:
            with pytest.raises(OSError, match="not empty"):
                keep_files({"config.json": b"{}"}, keep)
    assert (keep / "config.json").read_bytes() == theirs
