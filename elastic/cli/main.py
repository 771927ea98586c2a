"""The `elastic` command. Each command only parses, calls, and shows; heavy imports happen inside the commands.

Other packages add commands through the entry-point group `elastic.commands` (that is how `elastic demo` gets here
from chaos/, which this package may not import).
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer

from elastic.cli import changes, cluster, roles
from elastic.cli.flags import (
    CoverageDeadlineFlag,
    LoadBandwidthFlag,
    Output,
    OutputFlag,
    RebalanceBudgetFlag,
    RestartIntensityFlag,
    reported,
    write_json,
)

app = typer.Typer(
    name="elastic",
    help="Serve Mixture-of-Experts models over expert-parallel ranks that may die, come and go at run time.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(help="Checkpoint directory in Hugging Face format.")],
    ranks: Annotated[int, typer.Option(help="Expert-parallel ranks to start with.")] = 4,
    max_ranks: Annotated[int | None, typer.Option(help="Never more ranks than this.")] = None,
    follow_agents: Annotated[
        int, typer.Option(min=0, help="So many ranks per agent: whoever starts or stops agents sets the size.")
    ] = 0,
    spares: Annotated[
        int, typer.Option(help="Warm spares: processes with the model loaded that take a dead rank's place at once.")
    ] = 0,
    redundancy: Annotated[
        float, typer.Option(help="Each expert lives on this many ranks (1.25: 25% more slots).")
    ] = 2.0,
    etcd: Annotated[
        str | None, typer.Option(help="etcd URLs; without: an embedded one.", envvar="ELASTIC_ETCD")
    ] = None,
    cluster: Annotated[
        str, typer.Option(help="Name of the cluster; default: the model's.", envvar="ELASTIC_CLUSTER")
    ] = "",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the OpenAI-compatible API.")] = 8000,
    admin_port: Annotated[int, typer.Option(help="Port of the admin API.")] = 8001,
    state_dir: Annotated[
        Path | None, typer.Option(help="Where address, events, logs and etcd data go.", envvar="ELASTIC_STATE_DIR")
    ] = None,
    served_model_name: Annotated[str, typer.Option(help="Name in the API; default: the directory's.")] = "",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    exactness: Annotated[
        str, typer.Option(help="invariant: same bits in any batch and placement; stock: faster.")
    ] = "invariant",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt plus output, in tokens.")] = None,
    kv_blocks: Annotated[int, typer.Option(help="KV-cache blocks of 16 tokens per rank.")] = 1024,
    restart_intensity: RestartIntensityFlag = 6,
    restart_window: Annotated[str, typer.Option(help="How long a death counts.")] = "60s",
    rebalance_budget: RebalanceBudgetFlag = "2GiB",
    load_bandwidth: LoadBandwidthFlag = "0",
    coverage_deadline: CoverageDeadlineFlag = "30s",
    ready_timeout: Annotated[str, typer.Option(help="Give up when not ready by then.")] = "3m",
    chaos: Annotated[
        bool, typer.Option("--chaos", help="For tests only: let faults be armed at run time, by file or admin API.")
    ] = False,
) -> None:
    """Serve MODEL on this machine: etcd, controller, agent with its ranks, engine and gateway."""
    with reported():
        from elastic.cli.flags import seconds, size
        from elastic.serve.options import ServeOptions
        from elastic.serve.supervisor import run_serve

        run_serve(
            ServeOptions(
                model=model, ranks=ranks, max_ranks=max_ranks, follow_agents=follow_agents, spares=spares,
                redundancy=redundancy, etcd=tuple(etcd.split(",")) if etcd else (), cluster=cluster, host=host,
                port=port, admin_port=admin_port, state_dir=state_dir, served_model_name=served_model_name, dtype=dtype,
                exactness=exactness, device=device, max_model_len=max_model_len, kv_blocks=kv_blocks,
                restart_intensity=restart_intensity, restart_window_s=seconds(restart_window),
                rebalance_bytes=size(rebalance_budget), coverage_deadline_s=seconds(coverage_deadline),
                load_bytes_per_s=size(load_bandwidth), ready_timeout_s=seconds(ready_timeout), chaos=chaos,
            )
        )  # fmt: skip


@app.command("demo-model")
def demo_model(
    directory: Annotated[Path, typer.Argument(help="Where to write the checkpoint.")],
    retrain: Annotated[bool, typer.Option("--retrain", help="Train it again instead (some minutes).")] = False,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Write the small trained Mixture-of-Experts checkpoint that the demo serves."""
    with reported():
        from elastic.demo.model import write_demo_model

        write_demo_model(directory, retrain=retrain)
        if output is Output.JSON:
            write_json({"model": str(directory.resolve()), "retrained": retrain})
        else:
            typer.echo(f"wrote {directory}; serve it with: elastic serve {directory}")


@app.command()
def doctor(
    model: Annotated[Path | None, typer.Argument(help="Also check this checkpoint.")] = None,
    ranks: Annotated[int, typer.Option(help="Check coverage for this many ranks.")] = 4,
    redundancy: Annotated[float, typer.Option(help="Check coverage for this redundancy.")] = 2.0,
    hosts: Annotated[int, typer.Option(min=1, help="Check coverage for ranks on this many hosts.")] = 1,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Check that this machine (and MODEL) can be served, and what a lost rank would cost. Exit 1 if it can't."""
    with reported():
        from elastic.cli.doctor import examine, show

        findings = examine(model, ranks, redundancy, hosts)
        if output is Output.JSON:
            write_json(findings)
        else:
            show(findings)
        if any(f.level == "fail" for f in findings):
            raise typer.Exit(1)


cluster.add_to(app)
changes.add_to(app)
roles.add_to(app)


def main() -> None:
    """Entry point of the `elastic` script."""
    for extra in entry_points(group="elastic.commands"):
        if wanted(extra.name, sys.argv[1:]):
            app.command(extra.name)(extra.load())
    app()


def wanted(command: str, arguments: list[str]) -> bool:
    """Whether a command from another package may be called or listed: only then is it worth its import."""
    return not arguments or arguments[0] == command or arguments[0].startswith("-")
