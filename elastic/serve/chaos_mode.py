"""`elastic serve --chaos`: faults can be injected into the cluster's processes at run time (`failpoints.py`).

The roles read their faults from a file in the state directory. It exists while such a cluster serves; without --chaos
there is none, and nothing can be armed from outside.
"""

from __future__ import annotations

import os

from elastic.serve.state_dir import StateDir
from membership.base import failpoints

WARNING = """\
*** CHAOS MODE: anyone who may write to the file below, or has the admin token, can make processes of this
*** cluster fail on purpose: {} or by PUT /admin/v1/failpoints. Not for production."""


def check(chaos: bool) -> None:
    """ConfigError if the environment names unknown faults: each role would refuse them at every start."""
    asked = os.environ.get(failpoints.ENV, "")
    if chaos or not asked.startswith("@"):
        failpoints.parse(asked)


def begin(state: StateDir, chaos: bool) -> dict[str, str]:
    """Create the file, or remove a stale one. Returns the environment that the roles need."""
    if not chaos:
        state.failpoints.unlink(missing_ok=True)
        return {}
    failpoints.write(state.failpoints, os.environ.get(failpoints.ENV, ""))
    return {failpoints.ENV: f"@{state.failpoints.resolve()}"}
