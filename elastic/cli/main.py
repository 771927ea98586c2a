"""The `elastic` command. Each command only parses, calls and renders; heavy imports happen inside the commands.

Other packages add commands through the entry-point group `elastic.commands` (that is how `elastic demo` gets here
from chaos/, which this package may not import).
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, entry_points
from pathlib import Path
from typing import Annotated

import typer

from elastic.cli import changes, cluster, keys, roles
from elastic.cli.command import command, path
from elastic.cli.entry import run
from elastic.cli.flags import DISTRIBUTION, Output, OutputFlag, described, show, write_json
from elastic.serve.options import DEFAULT_RANKS, ServeOptions, StoreOptions

EXTRA = "elastic.commands"  # the group
SOURCES = Path(__file__).parents[2]

app = typer.Typer(
    name="elastic",
    help="Serve Mixture-of-Experts models on expert-parallel ranks that may die, join and leave at run time.",
    callback=described,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
@command
def serve(options: ServeOptions) -> None:
    """Serve MODEL on this machine: etcd, controller, agent with its ranks, engine and gateway."""
    from elastic.serve.supervisor import run_serve

    run_serve(options)


@app.command("demo-model")
@command
def demo_model(
    directory: Annotated[
        Path, typer.Argument(parser=path, metavar="DIRECTORY", help="Directory to write the checkpoint to.")
    ],
    retrain: Annotated[bool, typer.Option("--retrain", help="Train it again (some minutes).")] = False,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Write the small trained Mixture-of-Experts checkpoint that the demo serves."""
    from elastic.demo.model import write_demo_model

    write_demo_model(directory, retrain=retrain)
    document = {"model": str(directory.resolve()), "retrained": retrain}
    show(document, f"wrote {directory}; serve it with: elastic serve {directory}", output)


@app.command()
@command
def doctor(
    where: StoreOptions,
    model: Annotated[Path | None, typer.Argument(help="Also check this checkpoint.")] = None,
    ranks: Annotated[int, typer.Option(help="Check coverage for this many ranks.")] = DEFAULT_RANKS,
    redundancy: Annotated[float, typer.Option(help="Check coverage for this redundancy.")] = ServeOptions.redundancy,
    hosts: Annotated[int, typer.Option(min=1, help="Check coverage for ranks on this many hosts.")] = 1,
    timing: Annotated[
        bool, typer.Option("--timing", help="Print the times of detection, eviction and commit instead.")
    ] = False,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Check that this machine can serve (MODEL, if given), and what the death of a rank would cost. Exit 1 if not.

    With --cluster: also which listeners of the cluster's other hosts are reached from here, and in what this host
    differs from them (versions, kernels, the checkpoint at MODEL or where the cluster has it, clock, MTU).
    """
    from elastic.cli.doctor import examine, show_findings, show_timing
    from elastic.serve.model_check import first_failure
    from membership.base.timing import TIMINGS

    if timing:
        if output is Output.JSON:
            write_json(TIMINGS)
        else:
            show_timing()
        return
    findings = examine(model, ranks, redundancy, hosts)
    if where.cluster:
        from elastic.cli.hosts import examine_hosts

        findings += examine_hosts(where, model)
    if output is Output.JSON:
        write_json(findings)
    else:
        show_findings(findings)
    wrong = first_failure(findings)
    if wrong is not None:
        raise wrong


cluster.add_to(app)
changes.add_to(app)
keys.add_to(app)
roles.add_to(app)


def main() -> None:
    """Entry point of the `elastic` script."""
    extra_commands(sys.argv[1:])
    run(app)


def extra_commands(arguments: list[str]) -> None:
    """Add those commands of other packages that these arguments may call or list."""
    for extra in (*entry_points(group=EXTRA), *declared_in(SOURCES)):
        if wanted(extra.name, arguments):
            app.command(extra.name)(extra.load())


def declared_in(folder: Path) -> Sequence[EntryPoint]:
    """Those that the sources themselves declare, if they are in no installed distribution (`python -m elastic`)."""
    try:
        distribution(DISTRIBUTION)
        return ()
    except PackageNotFoundError:
        project = folder / "pyproject.toml"
    if not project.exists():
        return ()
    declared = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["entry-points"][EXTRA]
    return [EntryPoint(name, value, EXTRA) for name, value in declared.items()]


def wanted(command: str, arguments: list[str]) -> bool:
    """Whether a command from another package may be called or listed: only then is it worth its import."""
    return not arguments or arguments[0] == command or arguments[0] in ("-h", "--help")
