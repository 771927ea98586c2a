"""`elastic gateway` as a process of its own, on a real etcd, with a scripted engine.

It is forked from where the imports are: an interpreter of its own costs two seconds of a core.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import httpx
import msgspec

from chaos.target import warm_start
from chaos.target.warm_start import WarmCommands, WarmProcess
from elastic.gateway.tokenizer import Tokenizer
from elastic.serve.etcd_server import EtcdServer, free_ports
from elastic.serve.role_fork import Command
from membership.store import codec
from membership.store.etcd import connect
from membership.store.keys import Keys
from membership.store.records import ClusterConfig, EngineRecord
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiny_tokenizer import write_tokenizer
from workers.model.content import small_files

CLUSTER = "real"
TEXT = "the quick brown fox jumps over the lazy dog"
DESCRIPTORS = "TEST_DESCRIPTORS"
BODY = {"model": "tiny", "prompt": "x", "max_tokens": 60, "stream": True}


def free_port() -> int:
    (port,) = free_ports(1)
    return port


@contextmanager
def engine_in(etcd: EtcdServer, tmp_path: Path, pause_after: int | None = 3) -> Iterator[ScriptedEngine]:
    """A cluster with a scripted engine that holds the token; the next one takes it over."""
    tokenizer = Tokenizer(write_tokenizer(tmp_path / "model"))
    config = ClusterConfig(
        cluster=CLUSTER, model=str(tmp_path / "model"), served_model_name="tiny", moe_layers=1, experts=4,
        lease_ttl_s=2, files=tuple(small_files(tmp_path / "model").items()),
    )  # fmt: skip
    words = tokenizer.encode(TEXT)[1:]
    store, keys = connect([etcd.url]), Keys(CLUSTER)
    engine = ScriptedEngine(0, lambda submit: words, pause_after=pause_after)
    record = EngineRecord(node="n", pid=1, address=engine.address, broadcast_handle=b"", mask_handle=b"")
    try:
        store.put(keys.config, codec.encode(config))
        store.delete(keys.engine)
        engine.token = store.put(keys.engine, codec.encode(record))
        with engine:
            yield engine
    finally:
        store.close()


@dataclass(frozen=True)
class GatewayProcess:
    """One that runs, and the file of what it says."""

    process: WarmProcess
    output: IO[bytes]

    def end(self, timeout: float = 30.0) -> tuple[int, str]:
        """Its exit status, once it has ended, and all that it said."""
        status = self.process.wait(timeout)
        self.output.seek(0)
        return status, self.output.read().decode()


@contextmanager
def gateway(
    commands: WarmCommands,
    etcd: EtcdServer,
    state_dir: Path,
    port: int,
    *flags: str,
    descriptors: int | None = None,
) -> Iterator[GatewayProcess]:
    """The command, killed at the end if it still runs. `descriptors`: how many it may have."""
    words = ["gateway", "--etcd", etcd.url, "--cluster", CLUSTER, "--state-dir", str(state_dir), "--name", "g"]
    words += ["--port", str(port), *flags]
    if "--admin-port" not in flags:
        words += ["--admin-port", str(free_port())]
    environ = os.environ | {"ELASTIC_ADMIN_TOKEN": "t"}
    if descriptors is not None:
        environ[DESCRIPTORS] = str(descriptors)
    with TemporaryFile() as output:
        process = commands.start(words, environ, output.fileno(), f"{__name__}:limited")
        try:
            yield GatewayProcess(process, output)
        finally:
            process.kill()
            process.wait(60.0)
            process.close()


def limited(payload: bytes, files: list[int]) -> None:
    """In the fork: with as many descriptors as it may have."""
    if most := msgspec.msgpack.decode(payload, type=Command).environ.get(DESCRIPTORS.encode()):
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(most), int(most)))
    warm_start.run(payload, files)


def alive(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/livez", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
