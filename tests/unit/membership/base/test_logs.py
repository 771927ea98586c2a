"""Logs: one JSON object per line with the role that wrote it; plain tracebacks, on a terminal too."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

PROGRAM = """
import logging, threading
import structlog
from workers.rank.environment import set_name
from membership.base.logs import configure

set_name("Worker_3")
configure("worker", json_lines={json_lines}, rank=3)
structlog.get_logger("a").info("ours", seconds=1.5)
logging.getLogger("b").warning("a library's")
def fail(secret):
    raise ValueError("broken")
def run():
    try:
        fail("what a client said")
    except ValueError:
        structlog.get_logger("c").exception("failed")
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


def logged(json_lines: bool) -> str:
    program = PROGRAM.format(json_lines=json_lines)
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert outcome.stdout == ""
    return outcome.stderr


def test_machines_get_one_object_per_line_that_says_whose_it_is() -> None:
    ours, library, failed = map(json.loads, logged(json_lines=True).splitlines())
    assert (ours["event"], ours["level"], ours["seconds"]) == ("ours", "info", 1.5)
    assert {line["role"] for line in (ours, library, failed)} == {"worker"}, "from each thread and library"
    assert {line["rank"] for line in (ours, library, failed)} == {3}
    assert failed["exception"].endswith("ValueError: broken")


@pytest.mark.parametrize("json_lines", [True, False])
def test_tracebacks_are_plain(json_lines: bool) -> None:
    text = logged(json_lines)
    assert "Traceback (most recent call last)" in text
    assert "what a client said" not in text, "locals are shown"
    assert not set(text) & set("\u256d\u2502\u2500\u276f"), "frames are drawn"


def test_people_see_the_prefix() -> None:
    assert all(line.startswith("(Worker_3 pid=") for line in logged(json_lines=False).splitlines())
