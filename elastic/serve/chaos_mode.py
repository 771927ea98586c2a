"""`elastic serve --chaos`: processes of the cluster may be made to fail on purpose, at run time (`failpoints.py`).

The roles read their faults from a file in the state directory. It is there as long as such a cluster serves, and says
so; without --chaos there is none, and nothing can be armed from outside.
"""

from __future__ import annotations

import os

from elastic.serve.state_dir import StateDir
from membership.base import failpoints

WARNING = """\
*** CHAOS MODE: processes of this cluster fail on purpose as soon as somebody asks them to, by writing to
*** {} or by PUT /admin/v1/failpoints. Not for production."""


def check(chaos: bool) -> None:
    """ConfigError if the environment asks for faults that there are not; each role would refuse them over and over."""
    asked = os.environ.get(failpoints.ENV, "")
    if chaos or not asked.startswith("@"):
        failpoints.parse(asked)


def begin(state: StateDir, chaos: bool) -> dict[str, str]:
    """Make the file, or see that there is none. What the roles' environment must have."""
    if not chaos:
        state.failpoints.unlink(missing_ok=True)
        return {}
    failpoints.write(state.failpoints, os.environ.get(failpoints.ENV, ""))
    return {failpoints.ENV: f"@{state.failpoints.resolve()}"}
