"""Every command in every environment: it works, or says in one line on stderr what to do. Never a traceback.

Commands are those of the two apps. None has a cluster here: `tests/e2e/test_environments.py` has one.
"""

from __future__ import annotations

import os
import pwd
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

import chaos.cli.main
import elastic.cli.main
from elastic.cli.main import extra_commands
from tests.support.locales import LATIN_1, latin_1_folder
from tests.support.warm_cli import Ended, Request, Stdout, WarmCli

pytestmark = [pytest.mark.integration, pytest.mark.timeout(200)]

STATE, MISSING, OUT = "{state}", "{missing}", "{out}"  # of a cluster, no file, a directory to write in
HERE = ("--state-dir", STATE)
MODEL = ("--model", MISSING)
ARGUMENTS: dict[str, tuple[str, ...]] = {  # what each command is called with
    "elastic serve": (MISSING, *HERE),
    "elastic demo": ("--plain", *MODEL),
    "elastic demo-model": (OUT + "/demo",),
    "elastic doctor": (MISSING,),
    "elastic scale": ("3", *HERE),
    "elastic drain": ("0", *HERE),
    "elastic undrain": ("0", *HERE),
    "elastic unquarantine": ("0", *HERE),
    "elastic ops show": ("op", *HERE),
    "elastic ops cancel": ("op", *HERE),
    "elastic-chaos run": ("kill-rank", *MODEL),
    "elastic-chaos scenarios": (),
    "elastic-chaos suite": ("--only", "nothing", "--out", OUT + "/report"),
    "elastic-chaos kill-rank": ("--plain", *MODEL),
    "elastic-chaos soak": MODEL,
    "elastic-chaos churn": MODEL,
    "elastic-chaos simulate": ("--faults", "0"),
    "elastic-chaos planted": ("--only", "nothing"),
    "elastic-chaos mutants": ("--only", "nothing"),
    "elastic-chaos replay": ("--seed", "1", "--keep", "none"),
    "elastic-chaos check": (MISSING,),
    "elastic-chaos faults": (),
    "elastic-chaos failpoint-matrix": MODEL,
    "elastic-chaos report": (MISSING,),
    "elastic-chaos role-matrix": MODEL,
}


@dataclass(frozen=True)
class Environment:
    """What a command is started in."""

    environ: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()  # variables
    locale: str = ""
    umask: int = 0o022
    uid: int = 0
    stdout: Stdout = Stdout.FILE
    remove_cwd: bool = False
    byte: bytes = b""  # at the end of each name of a file
    cluster_json: bytes | None = None  # what is in the state directory
    named: bool = True  # the state directory is named


PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "grpc_proxy")
HARMLESS = {"TMPDIR": "/nonexistent", "TERM": "dumb", "COLUMNS": "1", "LINES": "1"}
NOBODY = pwd.getpwnam("nobody").pw_uid  # our own passwd entry names a home, where a cluster may be served
ENVIRONMENTS = {
    "harmless": Environment(dict.fromkeys(PROXIES, "socks5://127.0.0.1:9") | HARMLESS, umask=0o077),
    "no-home": Environment(without=("HOME",), uid=NOBODY, named=False),
    "a-file-for-a-home": Environment({"HOME": "/dev/null"}, named=False),
    "uid-without-passwd-entry": Environment(without=("HOME",), uid=54_321, named=False),
    "another-user": Environment(uid=54_321, cluster_json=b"{}"),
    "ascii": Environment(locale="C", byte="ä".encode()),
    "latin-1": Environment(locale=LATIN_1, byte="ä".encode("latin-1")),
    "names-not-in-utf-8": Environment(byte=b"\xff"),
    "stdout-closed": Environment(stdout=Stdout.CLOSED),
    "stdout-full": Environment(stdout=Stdout.FULL),
    "no-current-directory": Environment(remove_cwd=True),
    "cluster-json-cut-short": Environment(cluster_json=b'{"cluster": "c", "etcd": ["http'),
}


def leaves(program: str, command: Any) -> Iterator[str]:
    for name, each in getattr(command, "commands", {}).items():
        yield from leaves(f"{program} {name}", each)
    if not hasattr(command, "commands"):
        yield program


@cache
def commands() -> dict[str, tuple[str, ...]]:
    """Each command of both apps with its arguments: those of the table, else those that every client command has."""
    extra_commands([])
    found = [*leaves("elastic", typer.main.get_command(elastic.cli.main.app))]
    found += leaves("elastic-chaos", typer.main.get_command(chaos.cli.main.app))
    assert ARGUMENTS.keys() <= set(found), "a command of the table is gone"
    return {name: ARGUMENTS.get(name, HERE) for name in found}


@pytest.fixture(scope="module")
def latin_1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return latin_1_folder(tmp_path_factory.mktemp("locales"))


@pytest.fixture(scope="module")
def clis(latin_1: Path) -> Iterator[dict[str, WarmCli]]:
    """An interpreter per locale."""
    environs = {
        "": {},
        "C": {"LC_ALL": "C", "PYTHONUTF8": "0"},
        LATIN_1: {"LC_ALL": LATIN_1, "LOCPATH": str(latin_1)},
    }
    made = {name: WarmCli(environ) for name, environ in environs.items()}
    yield made
    for each in made.values():
        each.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Another user may enter it, too."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


def complaint(name: str, ended: Ended) -> str:
    """What is wrong with how it ended; "" if nothing is."""
    said = ended.stderr.decode(errors="replace")
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if "Traceback" in said or ended.status not in (0, 1, 2):
        return f"status {ended.status}: {said[-600:]}"
    if ended.status == 1 and len(lines) != 1 and not (name == "elastic doctor" and b"fail" in ended.stdout):
        return f"status 1, and not one line that says why: {said[-600:]!r}"
    if ended.status == 2 and not said and not ended.stdout:
        return "status 2 and not a word"
    if ended.status and ended.slow_imports:
        return f"{', '.join(ended.slow_imports)} imported before it was found out"
    return ""


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_command(clis: dict[str, WarmCli], folder: Path, name: str) -> None:
    environment = ENVIRONMENTS[name]
    environ = {"PATH": os.environ["PATH"], "HOME": str(folder / "home"), **environment.environ}
    environ = {key: value for key, value in environ.items() if key not in environment.without}
    places = {STATE: folder / "state", MISSING: folder / "missing", OUT: folder}
    if environment.cluster_json is not None:
        places[STATE].mkdir()
        (places[STATE] / "cluster.json").write_bytes(environment.cluster_json)
        (places[STATE] / "cluster.json").chmod(0o600)
    wrong = {}
    for number, (command, given) in enumerate(commands().items()):
        program, *words = command.split()
        if environment.cluster_json is not None and STATE not in given:
            continue  # it does not look there
        if not environment.named and given[-2:] == HERE:
            given = given[:-2]
        cwd = folder / f"cwd{number}"
        cwd.mkdir()
        named = [re.sub(r"{\w+}", lambda found: str(places[found[0]]), word) for word in given]
        byte = [environment.byte if word.startswith("{") else b"" for word in given]
        ended = clis[environment.locale].run(
            Request(
                program=program,
                arguments=(*map(os.fsencode, words), *(os.fsencode(n) + b for n, b in zip(named, byte, strict=True))),
                environ=environ, cwd=str(cwd), remove_cwd=environment.remove_cwd, umask=environment.umask,
                uid=environment.uid, stdout=environment.stdout,
            )
        )  # fmt: skip
        if why := complaint(command, ended):
            wrong[command] = why
    assert not wrong, "\n".join(f"{command}: {why}" for command, why in wrong.items())
