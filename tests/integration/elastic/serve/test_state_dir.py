"""Whose the state directory is and what its mode is, before anything is kept in it."""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from elastic.serve.state_dir import ClusterAddress, StateDir
from membership.base.errors import ConfigError
from tests.support.other_user import NEEDS_ROOT, run_as

pytestmark = pytest.mark.integration

UID = 10001
IMPORTS = """
import stat
from pathlib import Path
from elastic.serve.state_dir import ClusterAddress, StateDir
from membership.base.errors import ConfigError
"""


@pytest.fixture
def volume() -> Iterator[Path]:
    """A directory of root's that other users can reach."""
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        Path(made).chmod(0o755)
        yield Path(made)


def claimed(path: Path) -> Path:
    state = StateDir(path)
    state.claim()
    state.release()
    return state.path


def claim_as(uid: int, path: Path) -> subprocess.CompletedProcess[str]:
    """stdout: the directory that was claimed, or why not."""
    return run_as(
        uid,
        f"""
try:
    state = StateDir(Path({str(path)!r}))
    state.claim()
    print(state.path)
except ConfigError as error:
    print(error, "|", error.hint)
""",
        IMPORTS,
    )


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o775, 0o500])
def test_one_of_ours_becomes_private(tmp_path: Path, mode: int) -> None:
    (tmp_path / "s").mkdir(mode=mode)
    assert claimed(tmp_path / "s") == tmp_path / "s"
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o700


def test_one_that_is_missing_is_made_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert claimed(tmp_path / "a" / "s") == tmp_path / "a" / "s"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "s").stat().st_mode) == 0o700


def test_a_link_to_one_of_ours_may_be_given(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    assert claimed(tmp_path / "link") == tmp_path / "link"
    assert (tmp_path / "there" / "lock").exists()


def test_one_that_all_may_write_to_stays_so_and_ours_is_in_it(tmp_path: Path) -> None:
    """As /tmp, for root."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    ours = claimed(shared)
    assert ours == shared / f"elastic-ep-{os.geteuid()}"
    assert [stat.S_IMODE(each.stat().st_mode) for each in (shared, ours)] == [0o1777, 0o700]
    assert StateDir(shared).path == ours


@pytest.mark.parametrize("under", ["", "below"])
def test_a_file_is_refused(tmp_path: Path, under: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"{tmp_path}/file is not a directory") as caught:
        claimed(tmp_path / "file" / under)
    assert "--state-dir" in caught.value.hint


@NEEDS_ROOT
@pytest.mark.parametrize("mode", [0o2777, 0o2775, 0o777])
def test_a_volume_of_kubernetes(volume: Path, mode: int) -> None:
    """An emptyDir is root's, and of the pod's group: it is not ours to chmod."""
    mounted = volume / "mounted"
    mounted.mkdir()
    os.chown(mounted, 0, UID)
    mounted.chmod(mode)
    outcome = claim_as(UID, mounted)
    ours = mounted / f"elastic-ep-{UID}"
    assert outcome.stdout == f"{ours}\n", outcome.stderr
    assert (ours.stat().st_uid, stat.S_IMODE(ours.stat().st_mode)) == (UID, 0o700)
    assert stat.S_IMODE(mounted.stat().st_mode) == mode
    assert claim_as(UID, mounted).stdout == f"{ours}\n"


@NEEDS_ROOT
def test_one_that_is_not_ours_to_write_names_its_owner(volume: Path) -> None:
    outcome = claim_as(UID, volume)
    assert f"{volume} belongs to user 0, and we, user {UID}, may not write to it" in outcome.stdout, outcome.stderr
    assert "--state-dir" in outcome.stdout


@NEEDS_ROOT
@pytest.mark.parametrize("kind", ["directory", "link"])
def test_what_another_user_put_where_ours_would_be_is_refused(volume: Path, kind: str) -> None:
    shared, elsewhere = volume / "shared", volume / "elsewhere"
    shared.mkdir()
    shared.chmod(0o1777)
    elsewhere.mkdir()
    os.chown(elsewhere, UID, UID)
    name = f"elastic-ep-{UID}"
    put = f"os.mkdir('{name}', 0o777)" if kind == "directory" else f"os.symlink('{elsewhere}', '{name}')"
    made = run_as(12345, put, f"import os; os.chdir({str(shared)!r})")
    assert made.returncode == 0, made.stderr
    said = claim_as(UID, shared).stdout
    assert ("belongs to user 12345" if kind == "directory" else "is no directory, or a link") in said
    assert not (elsewhere / "lock").exists()


@NEEDS_ROOT
def test_root_sees_the_cluster_of_another_user(volume: Path) -> None:
    theirs = volume / "theirs"
    theirs.mkdir()
    os.chown(theirs, UID, UID)
    serve = (
        f"s = StateDir(Path({str(theirs)!r})); s.claim(); (s.path / 'cluster.json').write_text('{{\"cluster\":\"c\"}}')"
    )
    assert run_as(UID, serve, IMPORTS).returncode == 0
    assert StateDir(theirs).address() == ClusterAddress(cluster="c")


@NEEDS_ROOT
@pytest.mark.parametrize("where", [".", "elastic-ep-0", f"elastic-ep-{UID}"])
def test_an_address_that_another_user_wrote_is_not_believed(volume: Path, where: str) -> None:
    """Not in a directory that all may write to, whoever asks."""
    shared = volume / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    lure = f"""
folder = Path({str(shared)!r}) / {where!r}
folder.mkdir(exist_ok=True)
(folder / "cluster.json").write_text('{{"cluster": "lure"}}')
"""
    assert run_as(12345, lure, "from pathlib import Path").returncode == 0
    with pytest.raises(ConfigError, match=r"no cluster is being served|was written by user 12345"):
        StateDir(shared).address()
    ask = f"print(StateDir(Path({str(shared)!r})).address())"
    assert "ConfigError" in run_as(UID, ask, IMPORTS).stderr
    if where != "elastic-ep-0":
        assert claimed(shared) == shared / "elastic-ep-0"
    assert stat.S_IMODE(shared.stat().st_mode) == 0o1777


@NEEDS_ROOT
def test_root_serves_no_cluster_in_another_users_directory(volume: Path) -> None:
    theirs = volume / "theirs"
    theirs.mkdir()
    os.chown(theirs, UID, UID)
    (theirs / "cluster.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"belongs to user {UID}"):
        claimed(theirs)


@NEEDS_ROOT
def test_a_read_only_file_system_is_named(volume: Path) -> None:
    with mounted_read_only(volume), pytest.raises(ConfigError, match="Read-only file system"):
        claimed(volume / "s")


@contextmanager
def mounted_read_only(path: Path) -> Iterator[None]:
    command = ["mount", "-t", "tmpfs", "-o", "ro", "none", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if done.returncode != 0:
        pytest.skip(f"no mounts here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True, timeout=20)


def test_client_commands_have_the_admin_token_that_counts_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    file, state = tmp_path / "token", StateDir(tmp_path / "state")
    state.make()
    file.write_text("old\n")
    state.publish(ClusterAddress(cluster="c", admin_token_file=str(file)))
    assert state.address().token() == "old"
    file.write_text("new\n")
    assert state.address().token() == "new"
    assert "new" not in (state.path / "cluster.json").read_text()
    file.unlink()
    with pytest.raises(ConfigError, match=r"--admin-token-file .* cannot be read"):
        state.address().token()
    state.publish(ClusterAddress(cluster="c", admin_token="text"))
    assert state.address().token() == "text"
