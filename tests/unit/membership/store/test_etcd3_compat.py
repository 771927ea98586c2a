"""etcd3 under a protobuf that its generated modules do not import under."""

from __future__ import annotations

import subprocess
import sys

import pytest
from google.protobuf import descriptor_pool

from membership.base.errors import ConfigError
from membership.store.etcd3_compat import etcd3, etcdrpc, serialized_descriptor

pytestmark = pytest.mark.unit


def test_messages_work() -> None:
    request = etcdrpc.WatchRequest(create_request=etcdrpc.WatchCreateRequest(key=b"\xff\0", start_revision=7))
    again = etcdrpc.WatchRequest.FromString(request.SerializeToString())
    assert again.create_request.key == b"\xff\0"
    assert again.WhichOneof("request_union") == "create_request"
    assert etcdrpc.Compare.CompareTarget.Value("LEASE") == 4
    assert etcdrpc.RangeRequest.DESCEND == 2
    assert etcd3.__version__ == "0.12.0"


def test_the_default_pool_stays_free_for_other_clients() -> None:
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindFileByName("rpc.proto")


def test_the_import_hook_does_not_stay() -> None:
    assert not [finder for finder in sys.meta_path if type(finder).__module__ == "membership.store.etcd3_compat"]


def test_it_loads_nothing_heavy() -> None:
    heavy = "print({'torch', 'zmq', 'transformers'} & set(sys.modules))"
    code = f"import sys, membership.store.etcd, membership.store.mirror; {heavy}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


def test_the_literal_is_read_not_executed() -> None:
    source = "raise SystemExit\nD = FileDescriptor(name='x', serialized_pb=_b('\\x01\\xff'))"
    assert serialized_descriptor(source) == b"\x01\xff"
    assert serialized_descriptor("D = FileDescriptor(serialized_pb=b'\\x02')") == b"\x02"
    with pytest.raises(ConfigError):
        serialized_descriptor("D = 1")
