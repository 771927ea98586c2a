"""`elastic-chaos simulate` and `replay`: whole lives of a cluster under a virtual clock, many or one."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from chaos.campaigns.campaign import seed_of
from chaos.simulation.life import Life, Step, live
from chaos.simulation.swarm import Progress, SimulationReceipt
from elastic.cli.flags import Output, OutputFlag, write_json
from membership.base.errors import ConfigError


def simulate(
    faults: Annotated[int, typer.Option(min=1, help="Stop after this many faults.")] = 20_000,
    seed: Annotated[int | None, typer.Option(help="The first life's; the next ones follow.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
    replays: Annotated[int, typer.Option(min=0, help="Lives to live again in another process, and to compare.")] = 20,
    replay: Annotated[bool, typer.Option("--replay", help="Only the life of --seed: as `replay`.")] = False,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Live whole lives of a cluster under a virtual clock, with faults of all kinds. Exit 1 if a promise breaks.

    Controller, agents, ranks' ports, engine, gateway: their loops as shipped; clock, store and network simulated. The
    first lives walk along all ordered pairs of faults. What breaks a promise is shrunk to the few faults that it takes.
    """
    from chaos.simulation.swarm import simulate

    first = seed_of(seed)
    if replay:
        _replay(first, None, output)
    typer.echo(f"seed {first}", err=True)
    receipt = simulate(first, faults, jobs, _Teller(faults), replays=replays)
    typer.echo("\r\x1b[K", err=True, nl=False)
    if output is Output.JSON:
        write_json(receipt)
    else:
        typer.echo(in_words(receipt))
    raise typer.Exit(0 if receipt.ok else 1)


def replay(
    seed: Annotated[int, typer.Option(help="Of the life.")],
    keep: Annotated[str, typer.Option(help="Only these of its happenings: 3,17,40; `none`: none of them.")] = "",
    timing: Annotated[int, typer.Option(min=0, help="Other delays between the same happenings.")] = 0,
    output: OutputFlag = Output.TEXT,
) -> None:
    """Live one life of `simulate` again, or only some of what happens in it; tell what happens. Exit 1 as that does."""
    _replay(seed, kept(keep), output, timing)


def _replay(seed: int, keep: list[int] | None, output: Output, timing: int = 0) -> None:
    life = live(seed, keep, lambda step: typer.echo(told(step), err=output is Output.JSON), timing)
    if output is Output.JSON:
        write_json(life)
    else:
        typer.echo(_verdict(life))
    raise typer.Exit(1 if life.violation else 0)


def kept(text: str) -> list[int] | None:
    """The happenings that `--keep` names; None: all."""
    if not text:
        return None
    try:
        return [] if text == "none" else [int(number) for number in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--keep: {text!r} is no list of numbers", hint="as in --keep 3,17,40") from error


def told(step: Step) -> str:
    """One happening as a line."""
    return f"{step.at:8.3f} s  {step.index:3d}  {step.kind:<26} {step.told or '-'}"


def in_words(receipt: SimulationReceipt) -> str:
    """The receipt for people."""
    missing = f"; missing: {', '.join(receipt.pairs_missing[:20])}" if receipt.pairs_missing else ""
    lines = [
        f"{receipt.lives:,} lives, {receipt.faults:,} faults in {receipt.seconds:,.0f} s"
        f" ({receipt.faults_per_minute:,} a minute; {receipt.virtual_seconds / 3600:,.1f} hours of virtual time)",
        f"{receipt.epochs:,} epochs, {receipt.requests:,} requests, {receipt.tokens:,} tokens,"
        f" {receipt.refused:,} requests refused while experts were lost",
        f"pairs: {receipt.pairs}{missing}",
        f"{sum(receipt.points.values()):,} blows at {len(receipt.points)} failpoints",
        f"{receipt.replayed:,} lives lived again in another process",
    ]
    for broken in receipt.violations:
        lines += ["", f"BROKEN  seed {broken.seed}: {broken.violation}"]
        if broken.minimal is not None:
            lines += [f"  {told(step)}" for step in broken.minimal.happenings]
        lines.append(f"  again: {broken.again}")
    lines += ["", "no promise broke" if receipt.ok else f"{len(receipt.violations)} violations"]
    return "\n".join(lines)


def _verdict(life: Life) -> str:
    served = f"{life.epochs} epochs, {life.requests} requests, {life.tokens} tokens, digest {life.digest}"
    return f"{served}\n{'BROKEN  ' + life.violation if life.violation else 'no promise broke'}"


class _Teller:
    """One line on stderr that tells how far it is; line by line where that is no terminal."""

    def __init__(self, faults: int) -> None:
        self._faults, self._tty = faults, os.isatty(2)

    def __call__(self, now: Progress) -> None:
        rate = 60 * now.faults / max(now.seconds, 1e-9)
        bar = "#" * min(20, 20 * now.faults // self._faults)
        line = (
            f"[{bar:<20}] {now.faults:,}/{self._faults:,} faults, {now.lives:,} lives, {rate:,.0f} a minute,"
            f" {now.pairs} pairs, {now.violations} violations; {now.doing}"
        )
        typer.echo(f"\r\x1b[K{line}" if self._tty else line, err=True, nl=not self._tty)
