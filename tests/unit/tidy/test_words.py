"""The code speaks the plain English of its field: a word with a better one is not used."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.support.sources import PRODUCT, Source, sources

pytestmark = pytest.mark.unit

BETTER = {  # word -> what to write instead
    "wish": "change request",
    "wishes": "change requests",
    "seat": "node",
    "seats": "nodes",
    "seating": "node selection",
    "evening": "local search",
    "preview": "dry run",
    "census": "cluster facts",
    "blow": "fault, failpoint action",
    "blows": "faults, failpoint actions",
    "deed": "action",
    "deeds": "actions",
    "bed": "test cluster",
    "peace": "quiescence",
    "told": "published, reported, notified",
    "heard": "observed, received",
    "hears": "observes, receives",
    "dealt": "injected",
    "strike": "fault",
    "strikes": "faults",
    "story": "incident",
    "whoever": "the process that, the caller",
    "nobody": "no process, no caller",
    "somebody": "a process, an operator",
    "everybody": "each process",
}
ALLOWED = {  # (file, word) -> why it stays; a stale entry fails
    ("membership/store/codec.py", "wish"): "the name under which a record was first stored",
    ("chaos/record/record.py", "dealt"): "the tag under which a record keeps its faults",
    ("chaos/campaigns/soak.py", "strikes"): "a field of the soak's receipt",
    ("chaos/scenarios/reading.py", "strike"): "a key of older scenario files",
    ("chaos/simulation/episode.py", "told"): "a field of what a simulated step is stored as",
}


def words(source: Source) -> Iterator[tuple[int, str]]:
    """Line number and word, lower case; identifiers come apart at underscores and capitals."""
    for number, line in enumerate(source.text.splitlines(), 1):
        for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", line):
            yield number, word.lower()


def test_words_with_a_better_one_are_not_used() -> None:
    found = {
        (source.path, word): f"{source.path}:{number} {word!r}: write {BETTER[word]}"
        for source in sources(*PRODUCT)
        for number, word in words(source)
        if word in BETTER
    }
    assert [where for key, where in found.items() if key not in ALLOWED] == []
    assert ALLOWED.keys() - found.keys() == set(), "stale entries"
