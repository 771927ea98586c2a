"""In what this host differs from a cluster's other hosts and from what they serve: for `elastic doctor`. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from elastic.serve.model_check import Finding
from membership.base.enums import Exactness
from membership.planning.identity import HINT_COMPUTES, KERNELS, advice, parts_of, refusal
from membership.store.records import AgentRecord, ClusterState

HINT_CODE = "install the same version of elastic-ep, with its libraries, on both hosts: ranks of the other are refused"
HINT_FILES = "copy the checkpoint from a host that serves it: ranks that load another one are refused"


@dataclass(frozen=True)
class Here:
    """This host: what doctor has found on it."""

    host: str  # as `AgentRecord.host`
    code: str  # versions of what its ranks would compute with
    model: str  # where its copy of the checkpoint is
    files: Mapping[str, str]  # digests of the small files there
    kernels: str = ""  # fingerprint; empty: not measured, as its ranks say it, or there is nothing to compare with


def differences(state: ClusterState, here: Here) -> Iterator[Finding]:
    """What this host's ranks would be refused for, and which ranks are, on any host."""
    for agent in sorted(others(state, here.host), key=lambda each: each.node):
        yield _code(agent, here.code)
    if state.config is not None and state.config.files:
        yield _files(here, dict(state.config.files))
    if here.kernels:
        yield _kernels(state, here.kernels)
    reasons = [refusal(state, record) for record in state.ranks.values()]
    reasons += [record.reason for record in state.exits.values() if record.refused]
    for reason in filter(None, reasons):
        yield Finding("ranks", "fail", reason, advice(reason))


def others(state: ClusterState, here: str) -> list[AgentRecord]:
    """Agents of other hosts that are there."""
    return [agent for agent in state.agents.values() if agent.host not in ("", here)]


def reference(state: ClusterState, part: str) -> str:
    """What the ranks that serve have as this part of their identity; empty if none has loaded yet."""
    if state.checkpoint is not None:
        return state.checkpoint.parts.get(part, "")
    return next((found for record in state.ranks.values() if (found := parts_of(record).get(part, ""))), "")


def _code(agent: AgentRecord, ours: str) -> Finding:
    what = f"host {agent.node}"
    if not agent.code:
        return Finding(
            what, "warn", "its agent does not say what it computes with: it is of an older elastic-ep", HINT_CODE
        )
    there, here = _versions(agent.code), _versions(ours)
    names = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    if not names:
        return Finding(what, "ok", f"it computes with the same as this host: {ours}")
    differing = ", ".join(f"{name} {there.get(name, 'none')} there and {here.get(name, 'none')} here" for name in names)
    return Finding(what, "fail", f"it computes with something else than this host: {differing}", HINT_CODE)


def _versions(code: str) -> dict[str, str]:
    """The parts of `code_version`: libraries and their versions, and the digest of our own source."""
    pairs = (part.rpartition(" ") for part in code.split(", "))
    return {name or "source of elastic-ep": version for name, _, version in pairs}


def _files(here: Here, known: Mapping[str, str]) -> Finding:
    if not here.files:
        message = f"there is no checkpoint at {here.model}"
        return Finding(
            "checkpoint", "warn", message, "its agent and gateway take it from other hosts; else name it as MODEL"
        )
    names = sorted(name for name in known.keys() | here.files.keys() if known.get(name) != here.files.get(name))
    if names:
        message = f"{', '.join(names)} in {here.model} are not those that the cluster serves"
        return Finding("checkpoint", "fail", message, HINT_FILES)
    message = f"config and tokenizer in {here.model} are those that the cluster serves"
    return Finding("checkpoint", "ok", f"{message}; weights are compared when a rank loads them")


def _kernels(state: ClusterState, ours: str) -> Finding:
    theirs = reference(state, KERNELS)
    if theirs == ours:
        return Finding("kernels", "ok", f"this host rounds as the ranks that serve ({ours})")
    message = f"this host rounds in another way ({ours}) than the ranks that serve ({theirs})"
    if state.config is not None and state.config.exactness != Exactness.INVARIANT:
        return Finding("kernels", "ok", f"{message}, which --exactness {state.config.exactness} allows")
    return Finding("kernels", "fail", f"{message}: its ranks would be refused", HINT_COMPUTES)
