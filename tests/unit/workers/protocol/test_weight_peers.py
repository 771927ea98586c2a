"""What an entry of the weight store is called on all hosts, and what it is by content."""

from __future__ import annotations

import pytest

from membership.store.records import DIGEST_BYTES, Checkpoint
from workers.protocol.weight_peers import DENSE, digest_of, expert_name, on_any_host

pytestmark = pytest.mark.unit

SERVED = Checkpoint(parts={"weights": "d1"}, experts=(b"aaaabbbb", b"cccc" + bytes(DIGEST_BYTES)))


def test_the_name_of_a_hosts_own_files_is_no_part_of_an_entrys_name_elsewhere() -> None:
    name = expert_name(1, 2)
    assert on_any_host(f"0123/torch.float32/layout3/{name}") == on_any_host(f"4567/torch.float32/layout3/{name}")
    assert on_any_host(f"0123/torch.float32/layout3/{name}") != on_any_host(f"0123/torch.bfloat16/layout3/{name}")


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        (DENSE, b"d1"),
        (expert_name(0, 0), b"aaaa"),
        (expert_name(0, 1), b"bbbb"),
        (expert_name(1, 0), b"cccc"),
        (expert_name(1, 1), b""),  # not known yet
        (expert_name(1, 7), b""),
        (expert_name(9, 0), b""),
        ("served", b""),
    ],
)
def test_an_entrys_digest_is_what_the_cluster_serves(name: str, digest: bytes) -> None:
    assert DIGEST_BYTES == 4
    assert digest_of(name, SERVED) == digest
    assert digest_of(name, None) == b""
