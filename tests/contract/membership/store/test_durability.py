"""Nothing is returned before etcd has it on disk, also by a version that acknowledges writes earlier."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from elastic.serve.etcd_server import EtcdServer
from membership.store.etcd import EtcdStore, connect
from membership.store.etcd3_compat import etcdrpc
from membership.store.interface import Put

pytestmark = pytest.mark.contract

T = 30.0


class LoneMember:
    """Says that it is an etcd of this version; acknowledges at once, and answers reads while its disk is quick."""

    def __init__(self, version: str, *, says_version: bool = True) -> None:
        self.version, self._says_version = version, says_version
        self.written = threading.Event()
        self.written.set()

    def _range(self, request: Any, context: Any) -> Any:
        assert self.written.wait(T)
        return etcdrpc.RangeResponse(header=self._header)

    def _watch(self, requests: Any, context: Any) -> Iterator[Any]:
        next(requests)
        yield etcdrpc.WatchResponse(header=self._header, created=True)
        event = {"kv": {"key": b"k", "value": b"v", "mod_revision": 8, "create_revision": 8, "version": 1}}
        yield etcdrpc.WatchResponse(header=self._header, events=[event])
        next(requests, None)

    @property
    def _header(self) -> Any:
        return etcdrpc.ResponseHeader(cluster_id=1, revision=7)

    @contextmanager
    def connected(self) -> Iterator[EtcdStore]:
        """A client of it."""
        lease = etcdrpc.LeaseGrantResponse(header=self._header, ID=5, TTL=9)
        handlers = {
            "KV": {
                "Range": self._unary(self._range, "Range"),
                "Put": self._unary(lambda *_: etcdrpc.PutResponse(header=self._header), "Put"),
                "Txn": self._unary(lambda *_: etcdrpc.TxnResponse(header=self._header, succeeded=True), "Txn"),
            },
            "Lease": {"LeaseGrant": self._unary(lambda *_: lease, "LeaseGrant")},
            "Maintenance": {"Status": self._unary(lambda *_: etcdrpc.StatusResponse(version=self.version), "Status")},
            "Watch": {
                "Watch": grpc.stream_stream_rpc_method_handler(
                    self._watch, etcdrpc.WatchRequest.FromString, lambda answer: answer.SerializeToString()
                )
            },
        }
        if not self._says_version:
            del handlers["Maintenance"]
        server = grpc.server(ThreadPoolExecutor(8))
        for service, methods in handlers.items():
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(f"etcdserverpb.{service}", methods),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        store = connect([f"http://127.0.0.1:{port}"], timeout_s=T)
        try:
            yield store
        finally:
            self.written.set()
            store.close()
            server.stop(0).wait(T)

    @staticmethod
    def _unary(answer: Any, name: str) -> Any:
        request = getattr(etcdrpc, f"{name}Request")
        return grpc.unary_unary_rpc_method_handler(answer, request.FromString, lambda made: made.SerializeToString())


CALLS = {
    "put": lambda store: store.put("k", b"v"),
    "txn": lambda store: store.txn((), (Put("k", b"v"),)).succeeded,
    "grant": lambda store: store.grant(9.0),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_write_is_acknowledged_once_it_is_on_disk(call: str) -> None:
    etcd = LoneMember("3.5.1")
    with etcd.connected() as store, ThreadPoolExecutor(1) as thread:
        etcd.written.clear()
        done = thread.submit(CALLS[call], store)
        with pytest.raises(TimeoutError):
            done.result(0.2)
        etcd.written.set()
        assert done.result(T)


def test_a_watch_reports_what_is_on_disk() -> None:
    etcd = LoneMember("3.5.1")
    with etcd.connected() as store:
        etcd.written.clear()
        watch = store.watch("k", 8)
        assert watch.next(0.2) is None
        etcd.written.set()
        batch = watch.next(T)
        assert batch is not None
        assert batch.revision == 8


@pytest.mark.parametrize("call", CALLS)
def test_an_etcd_that_writes_first_is_believed(call: str) -> None:
    etcd = LoneMember("3.5.9")
    with etcd.connected() as store:
        etcd.written.clear()
        assert CALLS[call](store)


def test_an_etcd_that_does_not_say_its_version_is_not_believed() -> None:
    etcd = LoneMember("3.5.9", says_version=False)
    with etcd.connected() as store, ThreadPoolExecutor(1) as thread:
        etcd.written.clear()
        done = thread.submit(store.put, "k", b"v")
        with pytest.raises(TimeoutError):
            done.result(0.2)
        etcd.written.set()
        assert done.result(T)


def test_a_killed_etcd_has_all_that_it_acknowledged(tmp_path: Path) -> None:
    """A write to its log takes half a second; it is killed as soon as it has acknowledged."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    with EtcdServer(tmp_path) as server:
        with closing(connect([server.url])) as store:
            store.put("k", b"0")
            (wal,) = {file for file in _files_of(server.pid) if file.endswith(".wal")}
            slow = ["-e", "inject=write:delay_enter=500000", "-P", wal]
            said = tmp_path / "strace"
            tracer = subprocess.Popen([strace, "-f", "-o", said, "-p", str(server.pid), *slow], stderr=subprocess.PIPE)
            try:
                assert tracer.stderr is not None
                if b"attached" not in (first := tracer.stderr.readline()):
                    pytest.skip(f"strace may not attach here: {first!r}")
                revision = store.put("k", b"1")
                os.kill(server.pid, signal.SIGKILL)
            finally:
                tracer.kill()
                tracer.communicate()
        server.restart()
        with closing(connect([server.url])) as store:
            assert store.range("k")[0] >= revision
    assert "write(" in said.read_text()


def _files_of(pid: int) -> list[str]:
    return [os.path.realpath(descriptor) for descriptor in Path(f"/proc/{pid}/fd").iterdir()]
