"""The page's recordings, in this machine's JavaScript if it has one: their times, their seeking, their refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from elastic.gateway.live import message

NODE = shutil.which("node")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not NODE, reason="node is not on this machine (package nodejs of Debian)"),
]
SCRIPT = """
import { readFileSync } from "node:fs";
import { Player, recorded } from %s;
const seen = [], moments = JSON.parse(process.argv[3]);
try {
  const recording = recorded(readFileSync(process.argv[2], "utf8"));
  const take = (kind, data) => { seen.push([kind, structuredClone(data)]); if (data.a) data.a.b = "changed"; };
  const player = new Player(recording, () => seen.push("forget"), take);
  for (const moment of moments) { player.seek(moment); seen.push(player.at); }
  console.log(JSON.stringify({ from: recording.from, to: recording.to, seen }));
} catch (error) { console.log(JSON.stringify({ error: error.message })); }
"""


def played(folder: Path, saved: bytes, *moments: float) -> dict[str, Any]:
    """What comes of a recording that is gone to these moments in turn."""
    (folder / "saved").write_bytes(saved)
    script = folder / "play.mjs"
    module = folder / "replay.mjs"
    module.write_bytes(files("elastic.gateway").joinpath("ui", "replay.js").read_bytes())
    script.write_text(SCRIPT % json.dumps(module.as_uri()), encoding="utf-8")
    assert NODE is not None
    command = [NODE, str(script), str(folder / "saved"), json.dumps(moments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


BEGIN = message("begin", {"now": 10.0}, 10.0)
RUN = BEGIN + message("patch", {"a": {"b": 1}}, 10.5) + b":\n\n" + message("patch", {"c": "\u2028"}, 12.0)


def test_forward_only_what_is_new_and_backward_from_the_beginning(tmp_path: Path) -> None:
    begin, first, second = ["begin", {"now": 10.0}], ["patch", {"a": {"b": 1}}], ["patch", {"c": "\u2028"}]
    found = played(tmp_path, RUN, 10.0, 11.0, 12.0, 11.0)
    assert found == {
        "from": 10.5, "to": 12.0,
        "seen": [begin, 10.0, first, 11.0, second, 12.0, "forget", begin, first, 11.0],
    }  # fmt: skip


def test_a_stream_saved_on_another_system_or_from_its_middle_or_without_times(tmp_path: Path) -> None:
    cut = b"data: {}\n\n" + message("patch", {}, 3.0) + RUN.replace(b"\n", b"\r\n") + b"event: patch\ndata: {"
    found = played(tmp_path, cut + b"ra", 12.0)
    assert (found["from"], found["to"], found["seen"][-1]) == (10.5, 12.0, 12.0), "what was cut off is no message"
    timeless = b'event: begin\ndata: {"now":7}\n\nevent: patch\ndata: {}\n\n'
    assert played(tmp_path, timeless, 7.0)["seen"] == [["begin", {"now": 7}], ["patch", {}], 7.0]


@pytest.mark.parametrize("saved", [b"", b"{}", b"\xff\xfe", message("patch", {}, 1.0)])
def test_what_is_none_is_refused_in_words(tmp_path: Path, saved: bytes) -> None:
    assert played(tmp_path, saved) == {"error": "This is no recording of the live stream."}
