"""What the commands are made of: durations, errors in one line, the state directory, restart delays, plans in words."""

from __future__ import annotations

import pwd
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import typer
from rich.table import Table
from typer.testing import CliRunner

from chaos.campaigns.demo import demo
from chaos.cli.main import app as chaos
from elastic.cli.changes import user
from elastic.cli.command import command
from elastic.cli.flags import seconds, size
from elastic.cli.main import app, declared_in, wanted
from elastic.cli.render import console, event_line, plan_view
from elastic.serve.options import StoreOptions
from elastic.serve.role_process import leases_of, restart_delay_s, revoke_leases
from elastic.serve.state_dir import ClusterAddress, StateDir
from membership.base.errors import ConfigError
from membership.base.events import Event
from membership.operations.dry_run import Plan
from membership.store.codec import encode
from membership.store.credentials import NO_CREDENTIALS, Credentials
from membership.store.in_memory import MemoryStore
from membership.store.records import AgentRecord, LeaderRecord
from tests.support import ROOT

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "value"), [("90", 90.0), ("90s", 90.0), ("5m", 300.0), ("250ms", 0.25), ("1.5h", 5400.0)]
)
def test_durations(text: str, value: float) -> None:
    assert seconds(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "soon", "5 minutes", "-3s"])
def test_what_is_not_a_duration(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        seconds(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("512", 512),
        ("500MB", 500_000_000),
        ("2GiB", 2 << 30),
        ("1.5k", 1500),
        ("1Ti", 1 << 40),
        ("9" * 400, 1 << 63),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert size(text) == value


@pytest.mark.parametrize("text", ["", "much", "-1GB", "2XB", "1iB"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        size(text)


def test_an_error_is_one_line_with_what_to_do_next(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def refuse() -> None:
        raise ConfigError("no such\nthing", hint="do this")

    with pytest.raises(typer.Exit) as raised:
        refuse()
    assert raised.value.exit_code == 1
    assert capsys.readouterr().err == "error: no such thing (do this)\n"


def test_every_command_explains_itself() -> None:
    for name in (
        "serve",
        "demo-model",
        "status",
        "scale",
        "rebalance",
        "events",
        "doctor",
        "agent",
        "engine",
        "controller",
        "gateway",
    ):
        outcome = CliRunner().invoke(app, [name, "--help"])
        assert outcome.exit_code == 0, outcome.output
        assert "--help" in outcome.output


def test_commands_of_other_packages_load_only_when_called_or_listed() -> None:
    assert wanted("demo", [])
    assert wanted("demo", ["demo", "--seed", "1"])
    assert wanted("demo", ["--help"])
    assert not wanted("demo", ["status"])
    assert not wanted("demo", ["--version"])


def test_sources_that_are_not_installed_have_the_same_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`python -m elastic demo` with the sources on the path and nothing else, as on a bare machine with GPUs."""

    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    assert not declared_in(ROOT), "an installed distribution has declared them already"
    monkeypatch.setattr("elastic.cli.main.distribution", missing)
    found = {each.name: each.load() for each in declared_in(ROOT)}
    assert found == {"demo": demo}
    assert not declared_in(tmp_path)


@pytest.mark.parametrize("program", [app, chaos])
def test_a_program_says_its_version(program: typer.Typer) -> None:
    said = CliRunner().invoke(program, ["--version"])
    assert (said.exit_code, said.output) == (0, f"elastic-ep {version('elastic-ep')}\n")


def test_a_role_that_keeps_dying_young_waits_longer() -> None:
    delays = [restart_delay_s(deaths) for deaths in range(1, 9)]
    assert delays[0] == 0.0
    assert delays == sorted(delays)
    assert delays[-1] == 5.0


def test_a_state_directory_has_one_owner_and_keeps_its_token_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    with pytest.raises(ConfigError, match="no cluster was served"):
        StateDir.last_served()
    state, second = StateDir(tmp_path / "state"), StateDir(tmp_path / "state")
    state.claim()
    with pytest.raises(ConfigError, match="another"):
        second.claim()
    address = ClusterAddress(cluster="c", admin_token="secret")
    state.publish(address)
    assert StateDir.last_served().address() == address
    assert (state.path / "cluster.json").stat().st_mode & 0o077 == 0
    state.release()
    with pytest.raises(ConfigError, match="no cluster is being served"):
        second.address()
    second.claim()
    second.release()


def test_a_home_that_cannot_be_written_to_keeps_no_cluster_from_being_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    address = ClusterAddress(cluster="c")
    StateDir(tmp_path).publish(address)
    assert StateDir(tmp_path).address() == address
    with pytest.raises(ConfigError, match="no cluster was served"):
        StateDir.last_served()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00", b"[]", b'{"cluster": 3}', b'{"etcd": []}'])
def test_a_damaged_address_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cluster.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"cluster\.json is damaged") as refused:
        StateDir(tmp_path).address()
    assert "elastic serve" in refused.value.hint


def test_a_user_without_a_name_has_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: pwd.getpwuid(2**31 - 2).pw_name)
    assert re.fullmatch(r"uid \d+@.+", user())


def test_a_line_that_no_terminal_wraps_is_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    table = Table(box=None)
    table.add_row("a-node-with-a-long-name" * 10, "serving")
    console().print(table)
    assert capsys.readouterr().out.split() == ["a-node-with-a-long-name" * 10, "serving"]


def test_leases_of_a_dead_process_are_found_by_its_pid_on_its_node() -> None:
    store = MemoryStore()
    mine, other, elsewhere = (store.grant(5.0) for _ in range(3))
    store.put("/c/agents/a", encode(AgentRecord(node="a", pid=10, started=0.0)), mine)
    store.put("/c/agents/b", encode(AgentRecord(node="a", pid=11, started=0.0)), other)
    store.put("/c/agents/c", encode(AgentRecord(node="b", pid=10, started=0.0)), elsewhere)
    store.put("/c/plain", encode(AgentRecord(node="a", pid=10, started=0.0)))
    store.put("/c/damaged", b"{", other)
    assert leases_of(store, "/c/", 10, "a") == {mine}
    assert leases_of(store, "/c/") == {mine, other, elsewhere}
    store.close()


def test_an_office_that_went_over_to_another_lease_amid_that_is_free_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    first, second = store.grant(60.0), store.grant(60.0)
    record = encode(LeaderRecord(node="a", pid=10))
    store.put("/c/leader", record, first)
    revoke = store.revoke

    def late(lease: int) -> None:
        if lease == first:
            store.put("/c/leader", record, second)
        revoke(lease)

    monkeypatch.setattr(store, "revoke", late)
    revoke_leases(store, "/c/", 10, "a")
    assert store.get("/c/leader") is None
    store.close()


def test_a_plan_in_words() -> None:
    plan = Plan(target=3, epoch=2, ranks=(0, 1), add=(2,), loads={2: 10}, replicas_before=2, replicas_after=2)
    assert "add ranks 2" in plan_view(plan)
    assert "rank 2 loads 10 experts" in plan_view(plan)
    assert plan_view(Plan(target=0, epoch=2, refused="no ranks")) == "refused: no ranks"
    assert "nothing would change" in plan_view(Plan(target=2, epoch=2, ranks=(0, 1)))


def test_an_event_in_one_line() -> None:
    line = event_line(Event(ts=0.5, role="engine", kind="rank_masked", rank=2, fields={"source": "robust futex"}))
    assert "rank_masked" in line
    assert "rank=2" in line
    assert "source=robust futex" in line


def test_what_is_not_given_of_credentials_is_as_the_cluster_knows_it() -> None:
    known = Credentials(ca="/ca", user="u", password_file="/word")
    assert StoreOptions().credentials() == NO_CREDENTIALS
    assert StoreOptions().credentials(known) == known
    given = StoreOptions(etcd_ca=Path("mine"), etcd_user="me").credentials(known)
    assert given == Credentials(ca=str(Path.cwd() / "mine"), user="me", password_file="/word")
    assert given.as_flags() == [f"--etcd-ca={Path.cwd()}/mine", "--etcd-user=me", "--etcd-password-file=/word"]
