"""Client commands of a real cluster, on a machine that is unlike the one they were written on."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from chaos.target.cluster import ServedCluster
from tests.e2e.conftest import Serve
from tests.support.locales import LATIN_1, latin_1_folder
from tests.support.warm_cli import Request, Stdout, WarmCli

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PROXY = "http://127.0.0.1:9"  # nothing listens there
PROXIES = {f"{kind}_proxy": PROXY for kind in ("http", "https", "all")}
PROXIES |= {name.upper(): PROXY for name in PROXIES}


@pytest.fixture(scope="module")
def latin_1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return latin_1_folder(tmp_path_factory.mktemp("locales"))


@dataclass(frozen=True)
class Environment:
    """What a client command is started in, and how it reaches the cluster."""

    environ: dict[str, str] = field(default_factory=dict)
    locale: str = "C.UTF-8"
    uid: int = 0
    stdout: Stdout = Stdout.FILE
    by_admin: bool = False


ENVIRONMENTS = {
    "proxies": Environment(PROXIES, by_admin=True),
    "uid-without-passwd-entry": Environment(uid=54_321, by_admin=True),
    "latin-1": Environment(locale=LATIN_1),
    "stdout-closed": Environment(stdout=Stdout.CLOSED),
    "stdout-full": Environment(stdout=Stdout.FULL),
}
COMMANDS = {  # and their exit status, where they can write
    "status": 0, "status -o json": 0, "explain": 0, "explain 0": 0, "events": 0, "ops ls": 0, "pause": 0, "resume": 0,
    "rebalance --plan": 0, "scale 3 --plan": 2, "drain 0 --plan": 2, "unquarantine 0": 1, "ops cancel none": 1,
}  # fmt: skip


@pytest.fixture
def cwd() -> Iterator[Path]:
    """Anybody may enter it."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


def test_client_commands(serve: Serve, demo_model: Path, latin_1: Path, cwd: Path) -> None:
    cluster = serve(demo_model, 2)
    cluster.wait_serving(2)
    clis = {
        locale: WarmCli({"LC_ALL": locale, "LOCPATH": str(latin_1)} if locale == LATIN_1 else {"LC_ALL": locale})
        for locale in {each.locale for each in ENVIRONMENTS.values()}
    }
    try:
        wrong = [
            f"{name}: elastic {command}: {why}"
            for name, environment in ENVIRONMENTS.items()
            for command in COMMANDS
            if (why := complaint(clis[environment.locale], cluster, environment, command, cwd))
        ]
    finally:
        for cli in clis.values():
            cli.close()
    assert not wrong, "\n".join(wrong)
    one_line(cluster)


def complaint(cli: WarmCli, cluster: ServedCluster, environment: Environment, command: str, cwd: Path) -> str:
    """What is wrong with how the command ended; "" if nothing is."""
    address = cluster.state.address()
    environ = {"PATH": os.environ["PATH"], **environment.environ}
    environ |= (
        {"ELASTIC_ADMIN": address.admin_url, "ELASTIC_ADMIN_TOKEN": address.admin_token}
        if environment.by_admin
        else {"ELASTIC_STATE_DIR": str(cluster.state.path)}
    )
    ended = cli.run(
        Request(
            program="elastic", arguments=tuple(map(os.fsencode, command.split())), environ=environ, cwd=str(cwd),
            uid=environment.uid, stdout=environment.stdout,
        )
    )  # fmt: skip
    said = ended.stderr.decode(errors="replace")
    wanted, errors = COMMANDS[command], [line for line in said.splitlines() if line.startswith("error: ")]
    if environment.stdout is not Stdout.FILE and wanted != 1:
        wanted = 0 if command == "ops ls" else 1  # there are none to write
        if wanted and not (errors and "cannot write to stdout" in errors[0]):
            return said
    right = ended.status == wanted and "Traceback" not in said and len(errors) == (wanted == 1)
    return "" if right else f"status {ended.status}: {said[-600:]}"


def one_line(cluster: ServedCluster) -> None:
    """Who reads one line only is no error."""
    elastic = f"{sys.executable} -m elastic.cli"
    pipe = f"{elastic} events --state-dir {cluster.state.path} | (read line; echo $line)"
    done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, timeout=60)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
