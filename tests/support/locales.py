"""A locale whose encoding is not UTF-8, made where it is needed: few machines have one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

LATIN_1 = "de_DE.ISO-8859-1"
SOURCES = Path("/usr/share/i18n/locales/de_DE")


def latin_1_folder(folder: Path) -> Path:
    """A folder for LOCPATH with that locale; skips the test where the sources of locales are not installed."""
    if not SOURCES.exists():
        pytest.skip("no sources of locales here: install the package `locales`")
    command = ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(folder / LATIN_1)]
    subprocess.run(command, check=True, timeout=60)
    return folder
