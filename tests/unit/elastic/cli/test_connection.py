"""Which cluster a command acts on: the one that was named, or none."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from typer.testing import CliRunner

from elastic.cli.client import AdminClient
from elastic.cli.connection import Connection, require_embedded
from elastic.cli.hosts import examine_hosts
from elastic.cli.main import app
from elastic.serve.options import StoreOptions
from elastic.serve.state_dir import ClusterAddress, StateDir, home
from membership.base.errors import ConfigError, StoreUnavailable
from membership.base.events import EventLog

pytestmark = pytest.mark.unit


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """Three clusters of this machine: "one" where it is by default, "two" and "last" elsewhere, "last" served last."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    where = {"one": tmp_path / "home/elastic-ep/one", "two": tmp_path / "b", "last": tmp_path / "c"}
    with ExitStack() as opened:
        for cluster, path in where.items():
            state = StateDir(path)
            state.claim()
            opened.callback(state.release)
            state.publish(ClusterAddress(cluster=cluster, admin_url="http://127.0.0.1:1"))
        yield where


def test_a_named_cluster_is_found_or_none_is(served: dict[str, Path]) -> None:
    """It was that served last, whatever the name: `elastic drain 0 --cluster one` drained another one's rank."""
    assert Connection().state().path == served["last"]
    assert Connection(cluster="one").state().path == served["one"]
    assert Connection(cluster="last").state().path == served["last"]
    for unknown in ("two", "three", "../one"):  # nothing says where "two" is
        with pytest.raises(ConfigError, match=f"no cluster named '{unknown}' is being served") as refused:
            Connection(cluster=unknown).client()
        assert "--state-dir" in refused.value.hint


def test_a_cluster_called_last_is_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As checkpoints are. The pointer to the cluster served last had the name of its directory."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    state = StateDir(home() / "last")
    state.claim()
    state.publish(ClusterAddress(cluster="last"))
    assert Connection().state().path == state.path
    assert Connection(cluster="last").state().path == state.path
    state.release()


def test_the_history_of_a_cluster_that_was_killed_is_read_from_its_file(served: dict[str, Path]) -> None:
    """It was refused: nothing listens at the socket of its store."""
    address = ClusterAddress(cluster="one", etcd=(f"unix://{served['one']}/etcd.sock:0",))
    StateDir(served["one"]).publish(address)
    EventLog(StateDir(served["one"]).events, "supervisor").emit("stopped_for_a_test")
    done = CliRunner().invoke(app, ["events", "--cluster", "one"])
    assert (done.exit_code, "stopped_for_a_test" in done.stdout) == (0, True), done.output
    StateDir(served["one"]).release()
    stopped = CliRunner().invoke(app, ["events", "--cluster", "one"])
    assert (stopped.exit_code, stopped.stdout) == (0, done.stdout), "stopped, it has no address any more"
    with pytest.raises(ConfigError, match="no cluster named 'three' is being served"):
        Connection(cluster="three").history()
    assert Connection(cluster="last", state_dir=served["last"]).history() is None, "nothing is written yet"
    assert Connection(admin="http://127.0.0.1:1").history() is None


def test_doctor_finds_the_named_one_too(served: dict[str, Path]) -> None:
    """And says of one that was killed what the others say."""
    address = ClusterAddress(cluster="one", etcd=(f"unix://{served['one']}/etcd.sock:0",))
    StateDir(served["one"]).publish(address)
    StateDir(served["last"]).publish(ClusterAddress(cluster="last"))
    said = {name: next(examine_hosts(StoreOptions(cluster=name), None)).message for name in ("one", "two")}
    assert said["one"].startswith("cluster 'one' is not being served: nothing listens at")
    assert said["two"] == "no cluster named 'two' is being served from this machine"


def test_a_state_directory_of_another_cluster_is_refused(served: dict[str, Path]) -> None:
    assert Connection(cluster="two", state_dir=served["two"]).state().path == served["two"]
    with pytest.raises(ConfigError, match=f"cluster 'two' is served from {served['two']}, not 'one'"):
        Connection(cluster="one", state_dir=served["two"]).client()


def test_a_gateway_of_another_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdminClient, "status", lambda _: {"cluster": "two"})
    with Connection(cluster="two", admin="http://127.0.0.1:1").client() as client:
        assert isinstance(client, AdminClient)
    with (
        pytest.raises(ConfigError, match="cluster 'two' is served there, not 'one'"),
        Connection(cluster="one", admin="http://127.0.0.1:1").client(),
    ):
        pass


def test_a_cluster_whose_server_was_killed_is_said_to_be_and_how_to_go_on(tmp_path: Path) -> None:
    """It was gRPC's "connections to all backends failing", without anything to do."""
    path = tmp_path / "etcd.sock:0"
    address = ClusterAddress(cluster="one", etcd=(f"unix://{path}",), model="/models/m")
    state = StateDir(tmp_path)
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(path))
        alive.listen()
        require_embedded(address, state)
    for _ in ("nobody has the socket", "it is gone"):
        with pytest.raises(StoreUnavailable, match="cluster 'one' is not being served: nothing listens at") as refused:
            require_embedded(address, state, timeout_s=0.0)
        assert f"elastic serve /models/m --cluster one --state-dir {tmp_path}" in refused.value.hint
        assert str(state.events) in refused.value.hint
        path.unlink(missing_ok=True)
    require_embedded(ClusterAddress(cluster="one", etcd=("http://127.0.0.1:1",)), state, timeout_s=0.0)


def test_a_server_that_takes_no_connection_holds_no_command_up(tmp_path: Path) -> None:
    """An etcd that is stopped, and whose queue is full: gRPC's calls have deadlines, a look had none."""
    path = tmp_path / "etcd.sock:0"
    address = ClusterAddress(cluster="one", etcd=(f"unix://{path}",))
    with ExitStack() as opened:
        stopped = opened.enter_context(socket.socket(socket.AF_UNIX))
        stopped.bind(str(path))
        stopped.listen(0)
        opened.enter_context(socket.socket(socket.AF_UNIX)).connect(str(path))  # which fills it
        look = threading.Thread(target=require_embedded, args=(address, StateDir(tmp_path)), daemon=True)
        look.start()
        look.join(5.0)
        assert not look.is_alive()
