"""The text of a file that an option names."""

from __future__ import annotations

from pathlib import Path

from membership.base.errors import ConfigError


def text_of(option: str, path: Path) -> str:
    """Its text. ConfigError, which names the option: it cannot be read, or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"{option} {path} cannot be read: {why}") from error
