"""What people give for URLs, tokens and times: one line that says what to do, whichever command it is."""

from __future__ import annotations

import math

import httpx
import pytest
from typer.testing import CliRunner

from chaos.cli.main import app as chaos_app
from elastic.cli.changes import DrainChange, TimedChange
from elastic.cli.client import AdminClient
from elastic.cli.main import app
from elastic.demo.model import shipped_demo_model
from elastic.serve.options import (
    AgentOptions,
    GatewayOptions,
    Kind,
    ServeOptions,
    Stated,
    options_of,
)
from elastic.serve.supervisor import Supervisor
from elastic.serve.tokens import admin_token, http_url
from membership.base.errors import ConfigError
from membership.store.etcd import connect

pytestmark = pytest.mark.unit

NO_URLS = ("http://[::1", "http://[::1]:x", "http://[zz]", "localhost:8001", "http://", "http://:8001", "ftp://x",
           "http://x:99999", "http://x:0", "http://a b", "http://x\ny", "http://a..b", f"http://{'x' * 64}",
           "//x", "", "[::1]")  # fmt: skip
NO_TOKENS = ("t\u00f6k\u00e9n", "two words", "tab\t", "\udcff", "\u2603", "x\n")
COMMANDS = (["status"], ["events"], ["explain"], ["scale", "2"], ["drain", "0"], ["undrain", "0"], ["pause"],
            ["resume"], ["rebalance"], ["rollout"], ["unquarantine", "0"], ["ops", "ls"], ["ops", "show", "x"],
            ["ops", "cancel", "x"], ["keys", "ls"], ["keys", "rotate"])  # fmt: skip
NUMBERS = [s for s in options_of(ServeOptions) if s.type in (int, int | None) or s.option.minimum is not None]
DURATIONS = [
    each
    for kind in (ServeOptions, AgentOptions, GatewayOptions, TimedChange, DrainChange)
    for each in options_of(kind)
    if each.kind is Kind.DURATION
]


@pytest.mark.parametrize("url", NO_URLS)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(ConfigError, match="is not a URL") as refused:
        AdminClient(url, "t")
    assert "http://HOST:8001" in refused.value.hint


@pytest.mark.parametrize("url", ["http://127.0.0.1:8001", "https://[::1]:8001/", "http://b\u00fccher.example"])
def test_urls(url: str) -> None:
    assert httpx.URL(http_url(url, "--admin")).host


@pytest.mark.parametrize("endpoint", ["http://[::1", "http://x:99999", "http://x:y", "http://"])
def test_what_is_no_etcd_endpoint(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="bad etcd endpoint"):
        connect([endpoint])


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_client_command_says_it_in_one_line(command: list[str]) -> None:
    for flags in (["--admin", "http://[::1"], ["--admin", "http://x", "--admin-token", NO_TOKENS[0]]):
        done = CliRunner().invoke(app, [*command, *flags])
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1), done.output
        assert done.stderr.startswith("error: ")


def test_chaos_says_it_in_one_line() -> None:
    for flags in (["--target", "http://[::1"], ["--target", "http://x", "--admin", "http://[::1"]):
        done = CliRunner().invoke(chaos_app, ["run", "kill-rank", *flags])
        assert done.exit_code == 1, done.output
        assert "is not a URL" in done.stderr


@pytest.mark.parametrize("token", NO_TOKENS)
def test_a_token_that_no_header_carries_is_refused_at_the_start(token: str) -> None:
    with pytest.raises(ConfigError, match="a header cannot carry"):
        Supervisor(ServeOptions(model=shipped_demo_model(), port=0, admin_port=0, admin_token=token))
    with pytest.raises(ConfigError, match="a header cannot carry"):
        AdminClient("http://127.0.0.1:1", token)
    assert admin_token("aZ09-._~+/=!") == "aZ09-._~+/=!"


@pytest.mark.parametrize("stated", DURATIONS, ids=lambda each: each.flags[0])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, 1e300])
def test_no_duration_is_negative_or_endless(stated: Stated, value: float) -> None:
    with pytest.raises(ConfigError, match=stated.flags[0]):
        stated.checked(value)


@pytest.mark.parametrize("stated", NUMBERS, ids=lambda each: each.flags[0])
def test_no_number_is_beyond_what_a_record_takes(stated: Stated) -> None:
    """They had passed, and ended `serve` by a traceback once etcd was up."""
    with pytest.raises(ConfigError, match=stated.flags[0]):
        stated.checked(10**24)


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (["scale", "2"], "--timeout"), (["drain", "0"], "--deadline"), (["undrain", "0"], "--timeout"),
        (["pause"], "--ttl"), (["rollout"], "--timeout"),
    ],
)  # fmt: skip
def test_times_that_nothing_can_be_done_in(command: list[str], flag: str) -> None:
    for value in ("0", "1ms", "0.000000001", "9" * 400, "25h"):
        done = CliRunner().invoke(app, [*command, flag, value, "--admin", "http://127.0.0.1:1"])
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1), done.output
        assert done.stderr.startswith(f"error: {flag} ")


@pytest.mark.parametrize(
    ("command", "flag"),
    [(["serve", "m"], "--state-dir"), (["serve", "m"], "--api-key-file"), (["agent"], "--join-secret-file"),
     (["status"], "--state-dir"), (["status"], "--cacert"), (["doctor", "m"], "--etcd-ca"), (["demo-model"], "--")],
)  # fmt: skip
def test_an_empty_path_is_not_the_current_directory(command: list[str], flag: str) -> None:
    """As after `--state-dir "$UNSET"`: the current directory became a state directory, and its mode 0700."""
    done = CliRunner().invoke(app, [*command, flag, ""])
    assert done.exit_code == 2, done.output
    assert "it is empty" in done.stderr


@pytest.mark.parametrize("flag", ["--launch-deadline", "--ready-timeout"])
def test_nothing_starts_within_no_time(flag: str) -> None:
    stated = next(each for each in options_of(ServeOptions) if flag in each.flags)
    with pytest.raises(ConfigError, match=f"{flag} 0.0: it must be from 1 to"):
        stated.checked(0.0)
