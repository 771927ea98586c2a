"""What people see in a terminal: the status view, a plan, an event, an operation's progress. Rendering only."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from membership.base.events import Event
from membership.operations.change import describe_change as words
from membership.operations.dry_run import Plan
from membership.operations.rebalance_now import RebalancePlan
from membership.operations.rotate_keys import RotationPlan, Secrets
from membership.placement.survivability import describe_survivability
from membership.store.phases import ORDER
from membership.store.records import Operation, Phase

UNWRAPPED = 10_000
COLOURS = {
    "serving": "green", "standby": "cyan", "draining": "yellow", "launching": "blue", "handshaking": "blue",
    "loading": "blue", "masked": "red", "dead": "red", "quarantined": "magenta",
    "starting": "blue", "degraded": "yellow", "uncovered": "red", "stopped": "red",
}  # fmt: skip


def console() -> Console:
    """For stdout. A line that no terminal wraps is as long as it is: programs read it.

    Without markup: what it shows has brackets of its own, as `elastic-ep[embedded]` and names of hosts may.
    """
    return Console(width=None if sys.stdout.isatty() else UNWRAPPED, markup=False, emoji=False)


def status_view(document: dict[str, Any]) -> RenderableType:
    """The status document as a heading and a table of ranks."""
    lines: list[RenderableType] = [_heading(document), _ranks_table(document["ranks"], document.get("nodes", ()))]
    lines += map(Text, _gpu_lines(document["ranks"]))
    if operation := document.get("operation"):
        lines.append(Text(f"{operation['what']}: {operation['phase']} ({operation['id']})", "cyan"))
    return Group(*lines)


def _heading(document: dict[str, Any]) -> Text:
    state, coverage, requests = document["state"], document["coverage"], document["requests"]
    serving = sum(rank["state"] == "serving" for rank in document["ranks"])
    heading = Text.assemble(
        (f"{document['cluster']} ", "bold"), (state, COLOURS.get(state, "")),
        f"   epoch {document['epoch']}   ranks {serving}/{document['desired']}",
        " (set by the agents)" if document.get("owner") == "agents" else "",
        f"   live replicas >= {coverage['min_live_replicas']}",
        f"   requests {requests['running']} running, {requests['waiting']} waiting",
    )  # fmt: skip
    if requests.get("shed"):
        heading.append(f", {requests['shed']} refused for want of room", "yellow")
    if document.get("exactness", "invariant") != "invariant":
        heading.append(f"   exactness {document['exactness']}: tokens may depend on the batch", "yellow")
    if document.get("imbalance") is not None:
        heading.append(f"   expert load {document['imbalance']:.2f}x the mean on the busiest rank")
    if (cache := document.get("prefix_cache") or {}).get("queried_tokens"):
        heading.append(f"   prefix cache {cache['cached_tokens'] / cache['queried_tokens']:.0%} of tokens")
    if (spares := document.get("spares", {})).get("wanted"):
        heading.append(f"   spares {spares['ready']}/{spares['wanted']}")
    if document.get("pause"):
        heading.append(f"\n{document['pause']['words']}; elastic resume ends it", "yellow")
    if document.get("drained"):
        heading.append(f"\ndrained: {_ranks(document['drained'])}; elastic undrain fills them again", "yellow")
    for warning in _warnings(document):
        heading.append(f"\n{warning}", "yellow")
    for trouble in _troubles(document):
        heading.append(f"\n{trouble}", "red")
    return heading


def _warnings(document: dict[str, Any]) -> Iterator[str]:
    if free := [node["node"] for node in document.get("nodes", ()) if node["safe_to_delete"]]:
        yield f"safe to delete: node {', '.join(free)}"
    if sole := _sole_lines(document):
        yield f"the only replicas of experts are {'; '.join(sole)}"


def _sole_lines(document: dict[str, Any]) -> list[str]:
    """Whose end would leave experts without a replica. Of one host that is true of all, and said of its ranks only."""
    nodes = document.get("nodes", ())
    found = [("node", node["node"], node.get("sole_experts", 0)) for node in nodes if len(nodes) > 1]
    found += [("rank", rank["rank"], rank.get("sole_experts", 0)) for rank in document["ranks"]]
    return [f"on {kind} {name} ({count} of them)" for kind, name, count in found if count]


def nodes_view(document: dict[str, Any]) -> RenderableType:
    """The hosts as a table, and what the end of each would cost."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    words = ("node", "machine", "zone")
    for column in (*words, "ranks", "only replicas of", "safe to delete"):
        table.add_column(column, justify="left" if column in words else "right")
    for node in document["nodes"]:
        table.add_row(
            node["node"], node.get("machine", ""), node.get("zone", ""), str(node["ranks"]),
            f"{node.get('sole_experts', 0)} experts", "yes" if node["safe_to_delete"] else "no",
        )  # fmt: skip
    return table


def _troubles(document: dict[str, Any]) -> Iterator[str]:
    yield from (f"node {node['node']}: {node['trouble']}" for node in document.get("nodes", ()) if node.get("trouble"))
    set_aside = (rank for rank in document["ranks"] if rank.get("reason"))
    yield from (f"rank {rank['rank']} is set aside: {rank['reason']}" for rank in set_aside)
    if document.get("store"):
        yield document["store"]


def _gpu_lines(ranks: Iterable[dict[str, Any]]) -> Iterator[str]:
    """What ranks use of their GPUs, a rank a line."""
    for rank in ranks:
        if gpu := rank.get("gpu"):
            rows = f" of {_ranks(gpu['graph_rows'])} rows" if gpu.get("graph_rows") else ""
            reason = f" ({gpu['exchange_reason']})" if gpu.get("exchange_reason") else ""
            yield (
                f"rank {rank['rank']}: GPU {gpu['index']}, {gpu['used_gb']:g} of {gpu['total_gb']:g} GB used; "
                f"{gpu.get('graphs', 0)} steps recorded{rows}; rows travel by {gpu.get('exchange', 'host')}{reason}"
            )


def _ranks_table(ranks: list[dict[str, Any]], nodes: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    domains = [name for name in ("machine", "zone") if any(node.get(name) for node in nodes)]
    of_node = {node["node"]: [node.get(name, "") for name in domains] for node in nodes}
    for column in ("rank", "state", "node", *domains, "pid", "incarnation", "slots", "heartbeat", "restarts"):
        table.add_column(column, justify="left" if column in ("state", "node", "machine", "zone") else "right")
    for rank in ranks:
        age_ms = rank["heartbeat_age_ms"]
        heartbeat = "-" if age_ms is None else f"{age_ms:.0f} ms"
        state = Text(rank["state"], COLOURS.get(rank["state"], ""))
        if load := rank.get("load"):
            state.append(f" {in_bytes(load['bytes'])} of {in_bytes(load['total'])}", "blue")
            if sources := load.get("sources"):
                state.append(f" from node {', '.join(sources)}", "blue")
        if rank.get("slow"):
            state.append(" slow", "yellow")
        table.add_row(
            str(rank["rank"]), state, rank["node"], *of_node.get(rank["node"], [""] * len(domains)), str(rank["pid"]),
            str(rank["incarnation"]), str(rank["slots"]), heartbeat, str(rank["restarts"]),
        )  # fmt: skip
    return table


def links_view(document: dict[str, Any], events: Iterable[Event]) -> RenderableType:
    """The connections between hosts as a table, and the last that were cut."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("from", "to", "of", "up", "rtt", "sent", "retransmits", "suspected", "cut"):
        table.add_column(column, justify="left" if column in ("from", "to", "of") else "right")
    for link in document["links"]:
        table.add_row(
            link["node"], link["peer_node"], link["role"],
            Text(f"{link['up']}/{link['links']}", "" if link["up"] == link["links"] else "red"),
            f"{link['rtt_ms']:.2f} ms", in_bytes(link["sent_bytes"]),
            *(str(link[counter]) for counter in ("retransmits", "suspects", "cuts")),
        )  # fmt: skip
    lines: list[RenderableType] = [table if document["links"] else Text("no connections between hosts")]
    lines += [Text(event_line(event), "red" if event.kind == "link_lost" else "") for event in events]
    return Group(*lines)


def watch_status(
    read: Callable[[], dict[str, Any]],
    view: Callable[[dict[str, Any]], RenderableType],
    stop: threading.Event,
    interval_s: float = 0.5,
) -> None:
    """Redraw the status until `stop` is set."""
    with Live(view(read()), console=console(), refresh_per_second=4, transient=False) as live:
        while not stop.wait(interval_s):
            live.update(view(read()))


def plan_view(plan: Plan) -> str:
    """A plan in words, one fact a line."""
    if plan.refused:
        return f"refused: {plan.refused}"
    if not plan.changes:
        return f"nothing would change: epoch {plan.epoch}, ranks {_ranks(plan.ranks)}"
    lines = [f"{plan.kind} {len(plan.ranks)} -> {plan.target} (from epoch {plan.epoch})"]
    lines += [f"  add ranks {_ranks(plan.add)}"] if plan.add else []
    lines += [f"  remove ranks {_ranks(plan.remove)}; their requests move with their KV blocks"] if plan.remove else []
    lines += [f"  rank {rank} loads {count} experts" for rank, count in sorted(plan.loads.items())]
    lines.append(f"  replicas of every expert: >= {plan.replicas_before} -> >= {plan.replicas_after}")
    lines.append(f"  experts per rank: <= {plan.slots_before} -> <= {plan.slots_after}")
    moved = f"  to load: {sum(plan.loads.values())} experts, {in_bytes(plan.bytes_moved)}"
    lines.append(
        moved + ("" if plan.estimated_s is None else f", about {plan.estimated_s:.1f} s as the last scale went")
    )
    if plan.expected_pause_ms is not None:
        lines.append(f"  tokens wait about {plan.expected_pause_ms:.0f} ms at the commit, as they did before")
    if plan.survives is not None:
        lines.append(f"  afterwards {describe_survivability(plan.survives)}")
        lines += _needs(plan)
    return "\n".join(lines)


def rebalance_view(plan: RebalancePlan, *, asked: bool) -> str:
    """What a rebalance moves, one fact a line."""
    before = "not measured yet" if plan.imbalance_before is None else f"{plan.imbalance_before:.2f}"
    if not plan.changes:
        return f"nothing to move: epoch {plan.epoch}, busiest rank's load over the mean: {before}"
    after = "" if plan.imbalance_after is None else f" -> {plan.imbalance_after:.2f}"
    lines = [
        f"rebalance from epoch {plan.epoch}: {plan.reason}",
        f"  busiest rank's load over the mean: {before}{after}",
        f"  to load: {plan.slots} experts in layers {_ranks(plan.layers)}, {in_bytes(plan.bytes_moved)}",
    ]
    lines += [f"  rank {rank} loads {count} experts" for rank, count in plan.loads.items()]
    lines += ["  more will follow: it exceeds the byte budget of one change"] if plan.unfinished else []
    lines += ["  it would happen without a request, too"] if plan.unasked and not asked else []
    lines += ["  it waits for the change that is under way"] if plan.waits else []
    return "\n".join([*lines, "asked for; see: elastic events"] if asked else lines)


def rotation_view(plan: RotationPlan) -> str:
    """What a rotation of the join secret does, one fact a line."""
    if not plan.changes:
        return f"nothing to do: all listen with join secret {plan.secret}, generation {plan.generation}"
    lines = [f"join secret {plan.secret} becomes generation {plan.generation}"]
    if plan.ends:
        lines = [f"all listen with join secret {plan.secret}, generation {plan.generation}: the one before is retired"]
    lines += ["  the engine begins a new term"] if plan.engine else []
    lines += [f"  a new process for each of ranks {_ranks(plan.ranks)}"] if plan.ranks else []
    return "\n".join(lines)


def secrets_view(found: Secrets) -> str:
    """Who has which join secrets, a process a line."""
    if not found.current:
        return "this cluster is on one host: it has no join secret"
    lines = [f"join secret {found.current}, generation {found.generation}"]
    if found.before in found.in_use:
        lines.append(f"  {found.before} (generation {found.generation - 1}) is still in use: elastic keys rotate")
    elif found.grace:
        lines.append(f"  {found.before} is used no more, and not yet retired: elastic keys rotate")
    elif found.before and any(found.before in (use.has or ()) for use in found.uses):
        lines.append(f"  {found.before} is used no more: its line may go from the files")
    lines += [f"  {name} is not in use" for name in found.others]
    for use in found.uses:
        generation = "another generation" if use.generation is None else f"generation {use.generation}"
        listens = f"listens with {generation}" if use.listens else ""
        has = f"has {', '.join(use.has)}" if use.has else "has none" if use.has is not None else ""
        lines.append(f"{use.role:<24}{use.node:<20}{'; '.join(filter(None, (listens, has)))}")
    return "\n".join(lines)


def in_bytes(number: float) -> str:
    """A number of bytes, with three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def _needs(plan: Plan) -> list[str]:
    """The slots needed to survive the death of any rank or host, where one may not die now."""
    found, lines = plan.survives, []
    if found is not None and found.vital_ranks:
        lines.append(f"  to survive any one rank's death: {_slots(plan.slots_for_rank_loss, 'a second rank')}")
    if found is not None and found.vital_hosts:
        lines.append(f"  to survive any one host's death: {_slots(plan.slots_for_host_loss, 'a second host')}")
    return lines


def _slots(number: int | None, other: str) -> str:
    return f"no number of slots suffices without {other} that holds the same" if number is None else f"{number} slots"


def _ranks(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks)) or "none"


def event_line(event: Event) -> str:
    """One event as one line: time, role, kind, then its fields."""
    clock = time.strftime("%H:%M:%S", time.localtime(event.ts)) + f".{int(event.ts % 1 * 1000):03d}"
    fields = {
        k: v for k, v in msgspec.to_builtins(event).items() if k not in ("ts", "role", "kind", "cluster", "fields")
    }
    fields |= event.fields
    return f"{clock} {event.role:<10} {event.kind:<20} " + " ".join(
        f"{k}={v}" for k, v in fields.items() if v is not None
    )


def operation_line(operation: Operation, now: float) -> str:
    """An operation as one line of `elastic ops ls`."""
    ago = f"{now - operation.started:.0f} s ago"
    end = f"  {operation.error}" if operation.error else ""
    return f"{operation.id:<14} {words(operation):<22} {operation.phase:<12} epoch {operation.epoch:<5} {ago}{end}"


class Progress:
    """A bar per operation phase on stderr; silent when not enabled."""

    def __init__(self, *, enabled: bool) -> None:
        self._bars = Bars(
            TextColumn("{task.description:<12}"), BarColumn(), TimeElapsedColumn(),
            console=Console(stderr=True), disable=not enabled,
        )  # fmt: skip
        self._task = self._bars.add_task("proposed", total=len(ORDER) - 1)

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()

    def update(self, operation: Operation) -> None:
        """Show where the operation is; its end shows the measured pause."""
        done = operation.progress * (len(ORDER) - 1)
        self._bars.update(self._task, description=str(operation.phase), completed=done)
        if operation.phase is Phase.DONE:
            took = operation.finished - operation.started
            self._bars.console.print(
                f"{words(operation)} done in {took:.2f} s, epoch {operation.epoch}, pause {operation.pause_ms:.1f} ms"
            )
