"""A process that watches its starter ends with it, however that one ends and whatever is between them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest

from membership.base import starter
from membership.base.errors import ConfigError
from membership.base.starter import ENV, StarterWatch
from tests.support import ROOT

pytestmark = pytest.mark.integration

WATCHES = """
import os, signal, sys, threading
from membership.base import starter
starter.ROLE_GRACE_S = 0.2
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
starter.end_with_starter()
print(os.getpid(), flush=True)
threading.Event().wait(60)
"""
STARTS = f"""
import os, subprocess, sys, threading
from membership.base import starter
os.environ[starter.ENV] = starter.named()
between = ["sh", "-c", 'setsid "$@" & wait', "between", sys.executable, "-c", {WATCHES!r}, *sys.argv[1:]]
subprocess.Popen(between, start_new_session=True)
threading.Event().wait(60)
"""


@pytest.fixture
def own_name(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What the tests change of the environment is put back."""
    monkeypatch.setenv(ENV, os.environ[ENV])
    return monkeypatch


@pytest.mark.parametrize("deaf", [(), ("deaf",)])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGHUP, signal.SIGSEGV])
def test_it_ends_with_a_starter_that_is_not_its_parent(end: signal.Signals, deaf: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", STARTS, *deaf]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as owner:
        assert owner.stdout is not None
        child = psutil.Process(int(owner.stdout.readline()))
        owner.send_signal(end)
        assert owner.wait(timeout=30) == -end
        _, alive = psutil.wait_procs([child], timeout=20)
    assert not alive


@pytest.mark.parametrize("named", [f"{os.getpid()}:1", f"{2**22}:1"], ids=["a-pid-that-is-anothers-now", "gone"])
def test_a_starter_that_has_ended_before(own_name: pytest.MonkeyPatch, named: str) -> None:
    own_name.setenv(ENV, named)
    ended = threading.Event()
    watch = StarterWatch(ended.set)
    assert ended.wait(30)
    watch.close()


def test_its_own_children_are_to_end_with_it(own_name: pytest.MonkeyPatch) -> None:
    own_name.delenv(ENV)
    StarterWatch(lambda: pytest.fail("there is no starter")).close()
    assert os.environ[ENV] == starter.named()


def test_nothing_happens_after_it_is_closed(own_name: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        own_name.setenv(ENV, f"{other.pid}:{starter.start_time(other.pid)}")
        watch = StarterWatch(ended.set)
        watch.close()
        other.kill()
        other.wait(timeout=30)
    assert not ended.is_set()


def test_what_names_no_process_is_refused(own_name: pytest.MonkeyPatch) -> None:
    own_name.setenv(ENV, "the shell")
    with pytest.raises(ConfigError, match="ELASTIC_STARTER=the shell") as refused:
        StarterWatch(lambda: None)
    assert refused.value.hint == "unset ELASTIC_STARTER"
