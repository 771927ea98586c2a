"""`elastic-chaos simulate` and `replay`: episodes of a simulated cluster under a virtual clock, many or one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated

import msgspec
import typer

from chaos.campaigns.campaign import seed_of
from chaos.cli.shared import finish
from chaos.simulation.campaign import Progress, SimulationReceipt, Where
from chaos.simulation.episode import Episode, Step, run_episode
from elastic.cli.command import command
from elastic.cli.flags import Output, OutputFlag
from elastic.serve.options import option
from membership.base.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Over:
    """What episodes run on."""

    hosts: int = option(0, "Hosts with a network between them, 2 or 3; 0: all on one.", minimum=0, maximum=3)
    gpus: bool = option(False, "Ranks have GPUs, and run steps together.")

    def where(self) -> Where:
        """ConfigError: one host has no network, and ranks of several hosts run no steps together."""
        if self.hosts == 1:
            raise ConfigError("--hosts 1: there is no network within a host", hint="leave it out, or give 2 or 3")
        if self.hosts and self.gpus:
            raise ConfigError("--gpus: ranks of several hosts run no step together", hint="leave --hosts out")
        return Where(self.hosts, self.gpus)


@command
def simulate(
    faults: Annotated[int, typer.Option(min=1, help="Stop after this number of faults.")] = 20_000,
    seed: Annotated[int | None, typer.Option(help="Of the first episode; the next ones follow.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Number of processes.")] = os.cpu_count() or 1,
    replays: Annotated[int, typer.Option(min=0, help="Number of episodes to run again and compare.")] = 20,
    replay: Annotated[bool, typer.Option("--replay", help="Only the episode of --seed, as `replay`.")] = False,
    over: Over = Over(),
    output: OutputFlag = Output.TEXT,
) -> None:
    """Run a cluster through faults of all kinds under a virtual clock. Exit 1 if an invariant breaks.

    Controller, agents, ranks, engine and gateway run their shipped loops; clock, store and network are simulated. The
    first episodes walk along all ordered pairs of faults. With `--hosts 3` hosts and links fail, too; with `--gpus`
    ranks run steps together over windows of slots, and their kernels outlive them. A schedule that breaks an invariant
    is minimised.
    """
    from chaos.simulation.campaign import simulate

    first, where = seed_of(seed), over.where()
    if replay:
        _replay(first, None, output, where)
    typer.echo(f"seed {first}", err=True)
    receipt = simulate(first, faults, jobs, _ProgressLine(faults), replays=replays, where=where)
    typer.echo("\r\x1b[K", err=True, nl=False)
    finish(receipt.ok, msgspec.to_builtins(receipt), [in_words(receipt)], output)


@command
def replay(
    seed: Annotated[int, typer.Option(help="Of the episode.")],
    keep: Annotated[str, typer.Option(help="Only these of its events, as in 3,17,40; or `none`.")] = "",
    timing: Annotated[int, typer.Option(min=0, help="Other delays between the same events.")] = 0,
    over: Over = Over(),
    output: OutputFlag = Output.TEXT,
) -> None:
    """Run one episode of `simulate` again, or only some of its events, and print them. Exit 1 as `simulate` does."""
    _replay(seed, kept(keep), output, over.where(), timing)


def _replay(seed: int, keep: list[int] | None, output: Output, where: Where, timing: int = 0) -> None:
    echo = output is Output.JSON
    hosts, gpus = where
    episode = run_episode(seed, keep, lambda step: typer.echo(step_line(step), err=echo), timing, hosts, gpus=gpus)
    finish(not episode.violation, msgspec.to_builtins(episode), [_verdict(episode)], output)


def kept(text: str) -> list[int] | None:
    """The events that `--keep` names; None: all."""
    if not text:
        return None
    try:
        return [] if text == "none" else [int(number) for number in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--keep: {text!r} is no list of numbers", hint="as in --keep 3,17,40") from error


def step_line(step: Step) -> str:
    """An event that was executed, as a line."""
    return f"{step.at:8.3f} s  {step.index:3d}  {step.kind:<26} {step.outcome or '-'}"


def in_words(receipt: SimulationReceipt) -> str:
    """The receipt for people."""
    missing = f"; missing: {', '.join(receipt.pairs_missing[:20])}" if receipt.pairs_missing else ""
    lines = [
        f"{receipt.episodes:,} episodes, {receipt.faults:,} faults in {receipt.seconds:,.0f} s"
        f" ({receipt.faults_per_minute:,} a minute; {receipt.virtual_seconds / 3600:,.1f} hours of virtual time)",
        f"{receipt.epochs:,} epochs, {receipt.requests:,} requests, {receipt.tokens:,} tokens,"
        f" {receipt.refused:,} requests refused while experts were lost",
        f"pairs: {receipt.pairs}{missing}",
        f"{sum(receipt.points.values()):,} failpoint actions at {len(receipt.points)} failpoints",
        f"{receipt.replayed:,} episodes run again in another process",
    ]
    for broken in receipt.violations:
        lines += ["", f"BROKEN  seed {broken.seed}: {broken.violation}"]
        if broken.minimal is not None:
            lines += [f"  {step_line(step)}" for step in broken.minimal.events]
        lines.append(f"  again: {broken.again}")
    lines += ["", "no invariant broke" if receipt.ok else f"{len(receipt.violations)} violations"]
    return "\n".join(lines)


def _verdict(episode: Episode) -> str:
    served = f"{episode.epochs} epochs, {episode.requests} requests, {episode.tokens} tokens, digest {episode.digest}"
    return f"{served}\n{'BROKEN  ' + episode.violation if episode.violation else 'no invariant broke'}"


class _ProgressLine:
    """Progress on stderr: one line that is overwritten, or line by line if stderr is no terminal."""

    def __init__(self, faults: int) -> None:
        self._faults, self._tty = faults, os.isatty(2)

    def __call__(self, now: Progress) -> None:
        rate = 60 * now.faults / max(now.seconds, 1e-9)
        bar = "#" * min(20, 20 * now.faults // self._faults)
        line = (
            f"[{bar:<20}] {now.faults:,}/{self._faults:,} faults, {now.episodes:,} episodes, {rate:,.0f} a minute,"
            f" {now.pairs} pairs, {now.violations} violations; {now.doing}"
        )
        typer.echo(f"\r\x1b[K{line}" if self._tty else line, err=True, nl=not self._tty)
