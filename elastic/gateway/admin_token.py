"""The token that the admin API asks for: a text, or what a file has now, such as a Secret in a pod."""

from __future__ import annotations

from pathlib import Path

import structlog

from elastic.serve.tokens import read_admin_token
from membership.base.errors import ConfigError

log = structlog.get_logger(__name__)


class AdminToken:
    """Read anew for each request. A file that cannot be used changes nothing, and is logged."""

    def __init__(self, text: str, file: Path | None = None) -> None:
        """ConfigError if there is a file that cannot be used. Without one the token is `text`; an empty one is none."""
        self._file = file
        self._last = text if file is None else read_admin_token(file)

    def now(self) -> str:
        """The token."""
        if self._file is not None:
            try:
                self._last = read_admin_token(self._file)
            except ConfigError as error:
                log.warning("admin_token_not_read", error=str(error), hint=error.hint)
        return self._last
