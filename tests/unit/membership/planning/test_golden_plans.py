"""Transcripts of the planner (tests/golden/plan): the same commands do what they did, word for word.

UPDATE_GOLDEN=1 writes them anew; look at the difference. For a new one write comments and `$ commands` into a file.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import GOLDEN
from tests.support.transcript import replay

pytestmark = pytest.mark.unit

TRANSCRIPTS = GOLDEN / "plan"


@pytest.mark.parametrize("path", sorted(TRANSCRIPTS.glob("*.txt")), ids=lambda path: path.stem)
def test_the_planner_does_what_it_did(path: Path) -> None:
    written = path.read_text()
    transcript = replay(written)
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(transcript)
    assert path.read_text() == transcript


def test_another_plan_shows() -> None:
    text = (TRANSCRIPTS / "run_loss.txt").read_text()
    assert replay(text.replace("kill 2", "kill 3")) != text.replace("kill 2", "kill 3")
