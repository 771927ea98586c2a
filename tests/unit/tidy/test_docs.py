"""The documents name things that exist: files, links, commands and make targets."""

from __future__ import annotations

import re

import pytest
import typer.main

from elastic.cli.main import app
from tests.support import ROOT

pytestmark = pytest.mark.unit

DOCS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/API.md",
    "docs/ARCHITECTURE.md",
    "docs/GUARANTEES.md",
    "docs/OPERATIONS.md",
    "docs/OPTIONS.md",
    "docs/SCENARIOS.md",
)
OTHER_PACKAGES = {"demo"}  # commands that join by entry point


@pytest.mark.parametrize("name", DOCS)
def test_files_and_links_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    files = [str(path.relative_to(ROOT)) for top in ROOT.iterdir() if top.name[0] != "." for path in top.rglob("*.py")]
    named = re.findall(r"`([\w/]+\.py)`", text)
    assert [file for file in named if not any(f"/{known}".endswith(f"/{file}") for known in files)] == []
    links = set(re.findall(r"\]\(([^)#:]+)\)", text))
    assert [link for link in links if not ((ROOT / name).parent / link).exists()] == []


@pytest.mark.parametrize("name", DOCS)
def test_commands_and_targets_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    commands = set(typer.main.get_group(app).commands) | OTHER_PACKAGES
    named = set(re.findall(r"(?:^    |`)elastic ([a-z][a-z-]*)", text, re.MULTILINE))
    assert named <= commands
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^    |`)make ([a-z]+)", text, re.MULTILINE)) <= targets
