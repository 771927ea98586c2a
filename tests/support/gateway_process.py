"""`elastic gateway` as a process of its own, on a real etcd, with a scripted engine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from elastic.gateway.tokenizer import Tokenizer
from elastic.serve.etcd_server import EtcdServer
from membership.store import codec
from membership.store.etcd import connect
from membership.store.keys import Keys
from membership.store.records import ClusterConfig, EngineRecord
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiny_tokenizer import write_tokenizer
from workers.model.content import small_files

CLUSTER = "real"
TEXT = "the quick brown fox jumps over the lazy dog"
BODY = {"model": "tiny", "prompt": "x", "max_tokens": 60, "stream": True}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


@contextmanager
def gateway(
    etcd: EtcdServer, state_dir: Path, port: int, *flags: str, descriptors: int | None = None
) -> Iterator[subprocess.Popen[str]]:
    """The command, killed at the end if it still runs. `descriptors`: how many it may have."""
    command = [str(Path(sys.executable).with_name("elastic")), "gateway", "--etcd", etcd.url, "--cluster", CLUSTER]
    command += ["--state-dir", str(state_dir), "--name", "g", "--port", str(port)]
    command += [*flags] if "--admin-port" in flags else ["--admin-port", str(free_port()), *flags]
    if descriptors is not None:
        command = ["prlimit", f"--nofile={descriptors}", *command]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"ELASTIC_ADMIN_TOKEN": "t"}
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=60)


def alive(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/livez", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
