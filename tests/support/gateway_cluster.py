"""A cluster as the gateway sees it, for tests: a store in memory, a tokenizer on disk, and gateways in threads."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec
from openai import OpenAI

from elastic.gateway.admin_token import AdminToken
from elastic.gateway.app import GatewaySettings, run_gateway
from elastic.gateway.engine_link import LinkSettings
from elastic.gateway.tokenizer import Tokenizer
from elastic.serve.options import ApiOptions
from membership.base.events import EventLog
from membership.base.network import Network
from membership.store import codec
from membership.store.in_memory import MemoryStore
from membership.store.keys import Keys
from membership.store.records import (
    AgentRecord,
    Assignment,
    ClusterConfig,
    Desired,
    EngineRecord,
    EngineStatus,
    GatewayRecord,
    Member,
    RankRecord,
    RankSpec,
    RankState,
    View,
)
from tests.support.helpers import eventually
from tests.support.scripted_engine import Answer, ScriptedEngine
from tests.support.tiny_tokenizer import TEMPLATE, write_tokenizer
from workers.queue.network import Purpose, join_key, listening_keys

NAME = "test"
MODEL = "tiny"
TOKEN = "s3cret"
OPEN = ApiOptions()
QUICK = LinkSettings(engine_wait_s=1.0, ping_every_s=0.1, silence_s=0.6, resubmit_after_s=0.3)  # for tests of that
PATIENT = LinkSettings(engine_wait_s=30.0, ping_every_s=0.1, silence_s=30.0)  # a busy machine is no fault


@dataclass
class RunningGateway:
    """A gateway in a thread."""

    url: str
    admin_url: str
    stop: threading.Event
    thread: threading.Thread
    failures: list[BaseException]

    def client(self, key: str = "x", trust: ssl.SSLContext | None = None) -> OpenAI:
        """The official client; close it. `trust`: whose certificates it takes."""
        none_kept = httpx.Limits(max_keepalive_connections=0)  # nothing open between tests
        fleeting = httpx.Client(limits=none_kept, verify=True if trust is None else trust)
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20.0, http_client=fleeting)


@dataclass
class GatewayCluster:
    """Writes the records that a gateway reads."""

    path: Path
    max_model_len: int = 128
    chat_template: str = TEMPLATE
    specials: tuple[str, ...] = ()
    end_tokens: tuple[int, ...] = ()
    network: Network | None = None  # of its gateways: `span`
    store: MemoryStore = field(default_factory=MemoryStore)
    keys: Keys = field(default_factory=lambda: Keys(NAME))

    def __post_init__(self) -> None:
        self.tokenizer = Tokenizer(
            write_tokenizer(self.path / "model", chat_template=self.chat_template, specials=self.specials)
        )
        self.config = ClusterConfig(
            cluster=NAME,
            model=str(self.path / "model"),
            served_model_name=MODEL,
            moe_layers=1,
            experts=4,
            max_model_len=self.max_model_len,
            vocab_size=self.tokenizer.vocab_size,
            eos_token_ids=self.end_tokens,
        )
        self.store.put(self.keys.config, codec.encode(self.config))

    @property
    def events(self) -> Path:
        """The event history's file."""
        return self.path / "events.jsonl"

    def span(self, network: Network) -> None:
        """From now on it spans hosts, and its gateways have this network."""
        self.network = network
        self.config = msgspec.structs.replace(self.config, join_key=join_key(network))
        self.store.put(self.keys.config, codec.encode(self.config))

    def publish_view(self, dead: tuple[int, ...] = ()) -> None:
        """Epoch 1: two ranks that hold all experts, on one node, without those that are dead."""
        members = tuple(Member(rank=rank, node="n", incarnation=rank + 1) for rank in (0, 1))
        alive = tuple(m for m in members if m.rank not in dead)
        everything = {m.rank: (tuple(range(4)),) for m in members}
        specs = tuple(RankSpec(rank=m.rank, incarnation=m.incarnation) for m in alive)
        put, keys = self.store.put, self.keys
        put(keys.view, codec.encode(View(epoch=1, members=members, placement=everything)))
        put(keys.desired, codec.encode(Desired(ranks=2)))
        put(keys.agent("n"), codec.encode(AgentRecord(node="n", pid=1, started=1.0)))
        put(keys.assign("n"), codec.encode(Assignment(node="n", ranks=specs, agent_started=1.0)))
        for member in alive:
            record = RankRecord(
                rank=member.rank, node="n", incarnation=member.incarnation, pid=100, state=RankState.STANDBY
            )
            put(keys.rank(member.rank, member.incarnation), codec.encode(record))

    @contextmanager
    def engine(self, answer: Answer, **options: object) -> Iterator[ScriptedEngine]:
        """A new engine that holds the token, until the block ends."""
        engine = ScriptedEngine(0, answer, **options)  # type: ignore[arg-type]
        engine.token = self.publish_engine(engine.address, engine.network)
        with engine:
            yield engine

    def publish_engine(self, address: str, network: Network | None = None) -> int:
        """Another engine is elected; its token. `network`: it is on another host, at this address."""
        self.store.delete(self.keys.engine)
        record = EngineRecord(node="n", pid=1, address=address, broadcast_handle=b"", mask_handle=b"")
        if network is not None:
            key = listening_keys(network, Purpose.GATEWAYS).public
            record = msgspec.structs.replace(record, host="another", remote=address, remote_key=key)
        token = self.store.put(self.keys.engine, codec.encode(record))
        self.store.put(self.keys.engine_status, codec.encode(EngineStatus(token=token, epoch=1)))
        return token

    def says(self, text: str) -> Answer:
        """An engine's script: always this text."""
        ids = self.tokenizer.encode(text)[1:]
        return lambda submit: ids

    @contextmanager
    def gateway(
        self,
        name: str = "g",
        *,
        port: int = 0,
        token: str = TOKEN,
        grace_s: float = 2.0,
        link: LinkSettings = PATIENT,
        api: ApiOptions = OPEN,
        admin_host: str = "127.0.0.1",
    ) -> Iterator[RunningGateway]:
        """A gateway that serves, until the block ends."""
        stop, failures = threading.Event(), []
        asked = AdminToken(token, api.admin_token_file)
        settings = GatewaySettings(
            name, self.path, asked, port=port, admin_host=admin_host, grace_s=grace_s, link=link, api=api,
            network=self.network,
        )  # fmt: skip
        log = EventLog(self.events, "gateway")

        def run() -> None:
            try:
                run_gateway(self.store, NAME, settings, stop, log)
            except BaseException as error:  # noqa: BLE001 - raised by the thread's owner
                failures.append(error)

        thread = threading.Thread(target=run, name=f"gateway-{name}")
        thread.start()
        try:
            record = eventually(lambda: failures or self._record(name), 60.0, f"gateway {name} to register")
            if not isinstance(record, GatewayRecord):
                raise failures[0]
            yield RunningGateway(record.url, record.admin_url, stop, thread, failures)
        finally:
            stop.set()
            thread.join(60.0)
        if failures:
            raise failures[0]

    def _record(self, name: str) -> GatewayRecord | None:
        found = self.store.get(self.keys.gateway(name))
        return None if found is None else codec.decode(found.value, GatewayRecord)


def wait_ready(gateway: RunningGateway, trust: ssl.SSLContext | None = None) -> None:
    """Until /readyz says so: it is linked to the engine. `trust`: whose certificates count."""
    verify = True if trust is None else trust

    def ready() -> bool:
        return httpx.get(f"{gateway.url}/readyz", timeout=20, verify=verify).status_code == 200

    eventually(ready, 60.0, "the gateway to be ready")
