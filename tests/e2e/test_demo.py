"""`elastic demo` on a machine unlike the one it was written on: a measured receipt, and nothing left behind.

As a newcomer runs it, in an empty environment, it is run by `make wheel`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.locales import LATIN_1, SOURCES, latin_1_folder

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


PROXIES = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "all")}  # nothing listens there
PROXIES |= {name.upper(): proxy for name, proxy in PROXIES.items()}
NO_SHM = """mount -t tmpfs -o size=64k tmpfs /dev/shm || exit 98
head -c 100000 /dev/zero > /dev/shm/full 2> /dev/null && exit 98
"$@"; status=$?
[ "$(ls -A /dev/shm)" = full ] || exit 99
exit $status"""


def test_the_receipt_is_measured_and_good_behind_a_proxy_in_latin_1_without_a_home_or_shm(tmp_path: Path) -> None:
    """Queues and exchange use anonymous memory, so a container's 64 KiB of /dev/shm, all taken, is enough."""
    saved, folder = tmp_path / "history.json", tmp_path / "tmp"
    folder.mkdir()
    environ = {key: value for key, value in os.environ.items() if key not in ("HOME", "LANG", "PYTHONUTF8")}
    environ |= {**PROXIES, "TMPDIR": str(folder)}
    if SOURCES.exists():
        environ |= {"LC_ALL": LATIN_1, "LOCPATH": str(latin_1_folder(tmp_path))}
    command = [sys.executable, "-m", "elastic.cli", "demo", "--seed", "7", "--seconds", "1", "--plain"]
    command += ["-o", "json", "--history", str(saved)]
    if os.geteuid() == 0 and shutil.which("unshare"):  # a mount namespace of its own
        command = ["unshare", "--mount", "bash", "-c", NO_SHM, "demo", *command]
    outcome = subprocess.run(command, capture_output=True, encoding="latin-1", timeout=300, env=environ, umask=0o077)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr[-3000:]
    receipt = json.loads(outcome.stdout.strip().splitlines()[-1])
    assert receipt["ok"] is True
    assert receipt["seed"] == 7
    assert receipt["requests"] >= 8  # each of the eight streams; how many more is the machine's business
    assert (receipt["lost"], receipt["duplicated"], receipt["altered"]) == (0, 0, 0)
    assert receipt["epochs"] == list(range(1, len(receipt["epochs"]) + 1))
    assert len(receipt["epochs"]) >= 5  # bring-up, up, loss, rejoin, down
    for measured in ("detected_ms", "recovered_ms", "max_token_gap_ms", "steady_token_gap_p99_ms", "restored_ms"):
        assert receipt[measured] > 0, measured
    assert receipt["scale_pause_ms"] >= 0
    assert not list(folder.glob("elastic-ep-*"))

    checked = subprocess.run(
        [sys.executable, "-c", "from chaos.cli.main import main; main()", "check", str(saved), "-o", "json"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["requests"] == receipt["requests"]


def test_the_receipt_of_a_killed_host_is_measured_and_good(tmp_path: Path) -> None:
    """The one in charge, with one of two ranks."""
    command = [sys.executable, "-m", "elastic.cli", "demo", "--hosts", "2", "--ranks", "2", "--seconds", "0", "--plain"]
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    outcome = subprocess.run([*command, "-o", "json"], capture_output=True, text=True, timeout=380, env=environ)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr[-3000:]
    receipt = json.loads(outcome.stdout.strip().splitlines()[-1])
    if "skipped" in receipt:
        pytest.skip(receipt["skipped"])
    assert receipt["ok"] is True
    assert (receipt["hosts"], receipt["killed_host"], receipt["killed_processes"] > 5) == (2, "a", True)
    assert (receipt["lost"], receipt["duplicated"], receipt["altered"]) == (0, 0, 0)
    for measured in ("detected_ms", "recovered_ms", "max_token_gap_ms", "steady_token_gap_p99_ms", "restored_ms"):
        assert receipt[measured] > 0, measured
    assert not list(tmp_path.glob("elastic-ep-*"))
