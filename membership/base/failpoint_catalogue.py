"""The names of all failpoints, a table for each role that passes them.

They are in one place because a name is checked when it is armed: by a command line, a supervisor or another role, none
of which imports the code that passes it.
"""

from __future__ import annotations

# What the controller's transactions do. An operation is never left in a phase that is not among them.
EDGES = (
    "spawning", "handshaking", "loading", "committed", "retiring", "done", "aborted", "staged", "unstaged", "assigned",
)  # fmt: skip
RPCS = ("initialise", "become", "attach_engine", "prepare_epoch", "retire_epoch")  # an agent's calls to a rank

CONTROLLER = (
    *(f"controller.{when}.{edge}" for edge in EDGES for when in ("before", "after")),
    "controller.before.campaign",
)
AGENT = (
    "agent.before.spawn",
    "agent.before.retire",
    "agent.before.grant",  # of the leases of its own record and of its ranks'
    "agent.before.publish",
    "agent.before.withdraw",
    *(f"agent.before.{rpc}" for rpc in RPCS),
)
RANK = (
    *(f"rank.{rpc}" for rpc in RPCS),
    "rank.registered",
    "rank.before.prepare",
    "rank.prepared",
    "rank.step",
    "rank.launched",  # a step's kernels run, or have; of their results none is there
    "rank.copy",
    "rank.shutdown",
)
ENGINE = (
    "engine.before.campaign",
    "engine.before.attach",
    "engine.before.step",
    "engine.before.copy",
    "engine.before.flip",
    "engine.after.flip",
    "engine.before.status",
    "engine.hello",
    "engine.submit",
    "engine.abort",
)
GATEWAY = (
    "gateway.before.hello",
    "gateway.before.submit",
    "gateway.before.abort",
    "gateway.before.propose",
    "gateway.before.cancel",
)
EVERY_ROLE = ("mirror.before.list", "mirror.before.watch")

ACROSS_HOSTS = ("agent.before.far_links", "rank.far_links")  # nothing passes them where all ranks are on one host

ON_ONE_HOST = (*CONTROLLER, *AGENT, *RANK, *ENGINE, *GATEWAY, *EVERY_ROLE)
POINTS = (*ON_ONE_HOST, *ACROSS_HOSTS)
