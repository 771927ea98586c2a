"""The join secret: made once, private, and refused with what to do about it."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest

from elastic.serve.join_secret import ENV, make_secret, network_of
from membership.base.errors import ConfigError
from membership.base.network import Ports
from tests.support.ipv6 import needs_ipv6

pytestmark = pytest.mark.unit

HERE = "127.0.0.1"


@pytest.fixture(autouse=True)
def no_secret_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV, raising=False)


def test_it_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    file = make_secret(tmp_path)
    made = file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert (make_secret(tmp_path), file.read_text()) == (file, made)
    assert len(bytes.fromhex(made.strip())) == 32
    network = network_of(HERE, file, "moe")
    assert network is not None
    assert (network.address, network.cluster, network.secret) == (HERE, "moe", made.strip().encode())


def test_it_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who ended while it was made left an empty file, which each later start refused."""
    with monkeypatch.context() as full:
        full.setattr("elastic.serve.join_secret.new_secret", Mock(side_effect=OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            make_secret(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert network_of(HERE, make_secret(tmp_path), "moe") is not None
    assert [each.name for each in tmp_path.iterdir()] == ["join-secret"]


def test_one_host_needs_none() -> None:
    assert network_of("", None, "moe") is None


def test_it_may_be_in_the_environment_and_a_file_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV, " a secret from the environment\n")
    found = network_of(HERE, None, "moe")
    assert found is not None
    assert found.secret == b"a secret from the environment"
    file = tmp_path / "secret"
    file.write_text("a secret from a file, long enough\n")
    found = network_of(HERE, file, "moe")
    assert found is not None
    assert found.secret == b"a secret from a file, long enough"


def test_what_is_no_good_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the cluster's join secret") as none:
        network_of(HERE, None, "moe")
    assert "--join-secret-file" in none.value.hint
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        network_of(HERE, tmp_path / "missing", "moe")
    empty = tmp_path / "empty"
    empty.write_text(" \n")
    with pytest.raises(ConfigError, match="is empty"):
        network_of(HERE, empty, "moe")
    for address in ("203.0.113.7", "no.such.name.invalid", "2001:db8::7"):
        with pytest.raises(ConfigError, match=f"--advertise {address}: this host cannot listen there"):
            network_of(address, make_secret(tmp_path), "moe")


@needs_ipv6
def test_an_ipv6_address_is_given_with_brackets_or_without(tmp_path: Path) -> None:
    secret = make_secret(tmp_path)
    assert network_of("[::1]", secret, "moe", "7000-7001") == network_of("::1", secret, "moe", "7000-7001")
    found = network_of("::1", secret, "moe", "7000-7001")
    assert found is not None
    assert (found.address, found.ports) == ("::1", Ports(7000, 7001))
    with pytest.raises(ConfigError, match="--port-range 0"):
        network_of("::1", secret, "moe", "0")


def test_a_name_that_means_this_host_alone_is_refused(tmp_path: Path) -> None:
    """As Debian's /etc/hosts has a host's own name."""
    with pytest.raises(ConfigError, match=r"localhost: that is 127\.0\.0\.1, where no other host") as refused:
        network_of("localhost", make_secret(tmp_path), "moe")
    assert "/etc/hosts" in refused.value.hint
