"""Which join secrets an agent has, and when its new ranks listen with another one."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from membership.base.network import Network
from tests.support.world import CONFIG
from workers.agent.join_secrets import LOOK_EVERY_S, JoinSecrets
from workers.queue.network import join_key

pytestmark = pytest.mark.unit

OLD, NEW = b"the first secret of the tests", b"the second secret of the tests"


def key_of(secret: bytes) -> str:
    return join_key(Network("10.0.0.1", "moe", secret))


OLD_CONFIG = msgspec.structs.replace(CONFIG, join_key=key_of(OLD))
NEW_CONFIG = msgspec.structs.replace(CONFIG, join_key=key_of(NEW))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_its_file_is_read_again_each_second(tmp_path: Path) -> None:
    file, clock = tmp_path / "secret", Clock()
    file.write_bytes(OLD)
    secrets = JoinSecrets(Network("10.0.0.1", "moe", OLD, file=file), clock)
    assert not secrets.look(OLD_CONFIG)
    file.write_bytes(OLD + b"\n" + NEW)
    assert not secrets.look(OLD_CONFIG)
    assert secrets.keys == (key_of(OLD),)
    clock.now += LOOK_EVERY_S
    assert not secrets.look(OLD_CONFIG), "to have another one is not to use it"
    assert set(secrets.keys) == {key_of(OLD), key_of(NEW)}
    assert secrets.key == key_of(OLD)


def test_ranks_listen_with_what_the_cluster_uses_from_the_moment_that_it_does(tmp_path: Path) -> None:
    file, clock = tmp_path / "secret", Clock()
    file.write_bytes(OLD)
    secrets = JoinSecrets(Network("10.0.0.1", "moe", OLD, file=file), clock)
    assert not secrets.look(NEW_CONFIG), "it is lacking: ranks are started as before"
    assert secrets.key == key_of(OLD)
    file.write_bytes(OLD + b"\n" + NEW)
    assert secrets.look(NEW_CONFIG), "though no second has passed"
    assert secrets.key == key_of(NEW)
    assert secrets.network is not None
    assert secrets.network.secrets == (NEW, OLD), "old listeners are reached as before"
    assert not secrets.look(NEW_CONFIG)


def test_what_is_retired_is_known_at_once(tmp_path: Path) -> None:
    """And handed on to ranks, which have no copy of the config."""
    file = tmp_path / "secret"
    file.write_bytes(OLD + b"\n" + NEW)
    secrets = JoinSecrets(Network("10.0.0.1", "moe", OLD, file=file), Clock())
    grace = msgspec.structs.replace(NEW_CONFIG, join_keys_before=(key_of(OLD),), join_grace=True)
    assert secrets.look(grace)
    assert secrets.retired == frozenset()
    assert not secrets.look(msgspec.structs.replace(grace, join_grace=False))
    assert secrets.retired == {key_of(OLD)}


def test_on_one_host_there_is_nothing_to_look_at() -> None:
    secrets = JoinSecrets(None, Clock())
    assert not secrets.look(CONFIG)
    assert not secrets.look(None)
    assert (secrets.keys, secrets.key) == ((), "")
