"""What the clients' programs share: where to ask, and what. They run with the clients' own Python, not the tests'."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

URL, KEY, MODEL = os.environ["CLIENT_URL"], os.environ["CLIENT_KEY"], os.environ["CLIENT_MODEL"]
PROMPT = "The for statement"
USER: Any = [{"role": "user", "content": PROMPT}]
TOO_LONG = "for " * 9000
ENOUGH = 600  # tokens for a Place: there may be 24 spaces between any two parts of it


class Place(BaseModel):
    """A place, so narrow that a model that has to write one comes to an end."""

    model_config = ConfigDict(extra="forbid")
    city: Literal["Rome", "Oslo"]
    days: Literal[1, 2, 3]


TOOL: Any = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather.", "parameters": Place.model_json_schema()},
}


def fails(kind: type[BaseException], act: Callable[[], object], *words: str) -> None:
    """AssertionError unless it raises that, with these words."""
    try:
        found = act()
    except kind as error:
        said = str(error)
    else:
        raise AssertionError(f"no {kind.__name__}, but {found!r}")
    missing = [word for word in words if word not in said]
    assert not missing, f"{missing} in {said}"
