"""Where the run directory is, what it must be like, and what is removed from it."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from membership.base.errors import ConfigError
from membership.base.run_dir import (
    ENV,
    LONGEST_NAME,
    MAX_PATH,
    default_run_dir,
    entered,
    make_run_dir,
    new_socket,
    remove_run_dir,
    run_dir,
    sweep,
)

pytestmark = pytest.mark.unit


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run_dir(tmp_path / "run")


@pytest.fixture
def alive(run: Path) -> Iterator[Path]:
    """A socket that a process has."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(run / "alive.sock"))
        sock.listen()
        yield run / "alive.sock"


def leave(path: Path) -> Path:
    """A socket whose process is gone."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    return path


def test_it_is_in_the_state_directory_where_paths_fit() -> None:
    assert run_dir(Path("/srv/state")) == Path("/srv/state/run")
    assert len(new_socket("engine")) <= LONGEST_NAME


@pytest.mark.parametrize("length", [MAX_PATH - LONGEST_NAME - len("/run/") - 1 + extra for extra in (0, 1, 2, 300)])
def test_the_paths_of_its_sockets_fit(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    state = Path("/" + "d" * (length - 1))
    found = run_dir(state)
    assert len(str(found / ("s" * LONGEST_NAME))) <= MAX_PATH
    assert (found == state / "run") == (length <= MAX_PATH - LONGEST_NAME - len("/run/"))


def test_else_it_is_one_for_this_user_and_state_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (Path("/" + "d" * 100, name) for name in ("a", "b"))
    with tempfile.TemporaryDirectory() as runtime:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        assert run_dir(one).parent == run_dir(other).parent == Path(runtime).resolve()
        assert run_dir(one) != run_dir(other)
        assert run_dir(one) == run_dir(other / ".." / "a")
        assert str(os.geteuid()) in run_dir(one).name


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_no_path_of_a_socket_has_a_comma(tmp_path: Path) -> None:
    assert "," not in str(run_dir(tmp_path / "a,b"))


def test_a_runtime_directory_of_another_user_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """`su` leaves it in the environment."""
    with tempfile.TemporaryDirectory() as runtime:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        os.chown(runtime, 4321, -1)
        assert not run_dir(Path("/" + "d" * 100)).is_relative_to(runtime)


def test_a_process_is_given_one_by_its_environment(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV, str(run))
    assert default_run_dir() == run
    monkeypatch.delenv(ENV)
    assert default_run_dir() != run


def test_it_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = make_run_dir(tmp_path / "run")
    finally:
        os.umask(before)
    assert made.stat().st_mode & 0o777 == 0o700
    assert list(made.iterdir()) == []
    make_run_dir(made)


def test_one_that_others_may_enter_is_refused(run: Path) -> None:
    run.chmod(0o710)
    with pytest.raises(ConfigError, match=r"other users may enter .*0710") as refused:
        make_run_dir(run)
    assert refused.value.hint == f"chmod 700 {run}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_one_of_another_user_is_refused_by_their_number(run: Path) -> None:
    os.chown(run, 4321, -1)
    with pytest.raises(ConfigError, match=r"belongs to user 4321, we are user 0"), entered(run):
        pass


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_is_no_directory_of_its_own_is_refused(tmp_path: Path, run: Path, kind: str) -> None:
    wrong = tmp_path / kind
    if kind == "link":
        wrong.symlink_to(run)
    else:
        wrong.touch()
    with pytest.raises(ConfigError, match="no directory"):
        make_run_dir(wrong)


def test_where_none_can_be_made_the_error_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="no socket can be made in the run directory /proc/run") as refused:
        make_run_dir(Path("/proc/run"))
    assert "--state-dir" in refused.value.hint


def test_what_is_entered_stays_the_directory_that_was_checked(tmp_path: Path, run: Path) -> None:
    with entered(run) as inside:
        run.rename(tmp_path / "moved")
        (tmp_path / "run").mkdir(mode=0o700)  # another one in its place
        leave(inside / "mine.sock")
    assert (tmp_path / "moved" / "mine.sock").is_socket()


def test_sockets_of_dead_processes_are_removed_and_no_others(run: Path, alive: Path) -> None:
    dead = leave(run / "dead.sock")
    with socket.socket(socket.AF_UNIX) as bound:  # as one is between `bind` and `listen`
        bound.bind(str(run / "bound.sock"))
        (run / "notes").touch()
        sweep(run)
        assert dead.exists(), "it is as young as one whose process is about to listen"
        sweep(run, newborn_s=0.0)
        assert {path.name for path in run.iterdir()} == {"alive.sock", "bound.sock", "notes"}


def test_a_live_one_does_not_notice_that_it_was_asked(run: Path, alive: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as mine:
        mine.bind(str(run / "mine.sock"))
        mine.listen()
        mine.setblocking(False)
        sweep(run, newborn_s=0.0)
        with pytest.raises(BlockingIOError):
            mine.accept()


def test_the_end_leaves_nothing(run: Path) -> None:
    leave(run / "dead.sock")
    remove_run_dir(run)
    assert not run.exists()
    remove_run_dir(run)


def test_the_end_leaves_what_others_still_use(run: Path, alive: Path) -> None:
    remove_run_dir(run)
    assert alive.exists()
