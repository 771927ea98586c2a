"""Tokens and URLs as users give them: what no request could carry, or reach, is refused at once."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from membership.base.errors import ConfigError
from membership.base.text_file import text_of


def admin_token(token: str) -> str:
    """The token; ConfigError unless a request's header can carry it. An empty one is none."""
    if not re.fullmatch("[!-~]*", token):
        raise ConfigError(
            "the admin token has characters that a header cannot carry",
            hint="use ASCII letters, digits and -._~+/= for ELASTIC_ADMIN_TOKEN and --admin-token",
        )
    return token


def read_admin_token(path: Path) -> str:
    """The admin token in a file. ConfigError: it cannot be read, is empty, or no header can carry it."""
    token = admin_token(text_of("--admin-token-file", path).strip())
    if not token:
        raise ConfigError(f"--admin-token-file {path} is empty", hint="write the token into it")
    return token


def http_url(text: str, flag: str) -> str:
    """The URL; ConfigError naming the flag unless it has http or https, a host, and perhaps a port."""
    try:
        parts = urlsplit(text)
        host = (parts.hostname or "").encode("idna")  # ValueError: it cannot be a name
        good = parts.scheme in ("http", "https") and bool(host) and parts.port != 0 and not re.search(r"\s", text)
    except ValueError:
        good = False
    if not good:
        raise ConfigError(f"{flag} {text!r} is not a URL", hint="write it like http://HOST:8001 or http://[::1]:8001")
    return text
