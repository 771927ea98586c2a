"""What the live page says of events, in this machine's JavaScript if it has one: also of those that lack fields."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

NODE = shutil.which("node")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not NODE, reason="node is not on this machine (package nodejs of Debian)"),
]
SCRIPT = """
import { SAY, lane, say, tells } from "./events.mjs";
const bare = Object.keys(SAY).flatMap((kind) => [{ ts: 1, kind }, { ts: 1, kind, fields: null }]);
const lanes = new Map(), after = [];
for (const event of JSON.parse(process.argv[2])) { lane(lanes, event, 600); after.push(structuredClone([...lanes])); }
console.log(JSON.stringify({ said: bare.map((event) => [event.kind, tells(event), ...say(event)]), after }));
"""


def run(folder: Path, *events: dict[str, Any]) -> Any:
    """What is said of each kind of event without its fields, and the ranks' states after each of these events."""
    (folder / "events.mjs").write_bytes(files("elastic.gateway").joinpath("ui", "events.js").read_bytes())
    script = folder / "run.mjs"
    script.write_text(SCRIPT, encoding="utf-8")
    assert NODE is not None
    command = [NODE, str(script), json.dumps(events)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_an_event_without_its_fields_is_said_in_words(tmp_path: Path) -> None:
    said = run(tmp_path)["said"]
    assert {"epoch_committed", "rank_recovered", "operation_phase"} <= {kind for kind, *_ in said}
    for kind, _, family, words, *more in said:
        assert family in ("", "bad", "good", "warn", "busy"), kind
        assert words, kind
        assert not any(wrong in f"{words} {more}" for wrong in ("undefined", "NaN", "[object")), (kind, words, more)


def test_a_view_whose_ranks_are_not_recorded_changes_no_ranks_state(tmp_path: Path) -> None:
    spawned = [{"ts": 1, "kind": "rank_spawned", "rank": rank} for rank in (0, 1)]
    loaded = [{"ts": 2, "kind": "rank_loaded", "rank": rank} for rank in (0, 1)]
    committed = {"ts": 3, "kind": "epoch_committed", "epoch": 1, "fields": {"ranks": [0, 1]}}
    bare = [{"ts": 4, "kind": kind, "epoch": 2} for kind in ("epoch_staged", "epoch_committed")]
    without = {"ts": 5, "kind": "epoch_committed", "epoch": 3, "fields": {"ranks": [0]}}
    *_, serving, staged, unknown, left = run(tmp_path, *spawned, *loaded, committed, *bare, without)["after"]
    assert [(rank, states[-1]) for rank, states in serving] == [(0, [3, "serving"]), (1, [3, "serving"])]
    assert staged == unknown == serving
    assert [(rank, states[-1][1]) for rank, states in left] == [(0, "serving"), (1, "")]
