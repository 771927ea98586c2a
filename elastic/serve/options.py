"""The options of `elastic serve` and of the role commands: name, default, help and limits, each stated once.

The command line (`elastic/cli/command.py`), the checks below, the Helm chart and docs/OPTIONS.md
(`elastic/cli/reference.py`) are all made from these dataclasses. To add an option, add a field here. An option that
becomes part of the stored cluster configuration takes its default from `ClusterConfig`.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import msgspec

from membership.base.enums import Device, Dtype, Exactness
from membership.base.errors import ConfigError
from membership.store.records import ClusterConfig

DEFAULTS = {each.name: each.default for each in msgspec.structs.fields(ClusterConfig)}
MAX_PORT = 65_535


class Kind(StrEnum):
    """How the text of a flag is parsed, where its field's type is not enough."""

    DURATION = "DURATION"  # 90s, 5m
    SIZE = "SIZE"  # 500MB, 2GiB
    URLS = "URLS"  # comma-separated


@dataclass(frozen=True, kw_only=True)
class Option:
    """What is known of an option beside its field's name, type and default."""

    help: str
    names: tuple[str, ...] = ()  # of the flag, where it is not the field's name
    argument: bool = False  # given by position, not by a flag
    kind: Kind | None = None
    env: str = ""
    minimum: float | None = None
    maximum: float | None = None  # only beside a minimum
    choices: type[StrEnum] | None = None
    helm: str = ""  # path in the chart's values.yaml

    def check(self, flag: str, value: Any) -> None:
        """ConfigError naming the flag if the value is out of its limits."""
        if self.choices is not None and value not in list(self.choices):
            known = ", ".join(self.choices)
            raise ConfigError(f"{flag} {value}: there is no such choice", hint=f"choose one of {known}")
        if value is None or self.minimum is None:
            return
        if self.maximum is not None and not self.minimum <= value <= self.maximum:
            raise ConfigError(f"{flag} {value}: it must be from {self.minimum:g} to {self.maximum:.0f}")
        if not value >= self.minimum:
            raise ConfigError(f"{flag} {value}: it must be at least {self.minimum:g}")


class Stated(msgspec.Struct, frozen=True):
    """An option with its field's name, type and default. A default that is computed is None here."""

    field: str
    type: Any
    default: Any
    required: bool
    option: Option

    @property
    def flags(self) -> tuple[str, ...]:
        """All names of the flag, the first one first."""
        return self.option.names or (f"--{self.field.replace('_', '-')}",)


def options_of(kind: type[Any]) -> Iterator[Stated]:
    """Every option of a dataclass: its own in the order of the fields, then those of its bases.

    Fields without an `Option` are left out.
    """
    hints = get_type_hints(kind, include_extras=True)
    classes = [inspect.get_annotations(each) for each in kind.__mro__]

    def inherited_from(each: dataclasses.Field[Any]) -> int:
        return next(index for index, annotations in enumerate(classes) if each.name in annotations)

    for each in sorted(dataclasses.fields(kind), key=inherited_from):
        for option in getattr(hints[each.name], "__metadata__", ()):
            if isinstance(option, Option):
                computed = each.default_factory is not dataclasses.MISSING
                required = each.default is dataclasses.MISSING and not computed
                default = None if required or computed else each.default
                yield Stated(each.name, hints[each.name].__origin__, default, required, option)


def check_options(options: Any) -> None:
    """ConfigError naming the first flag whose value is out of its limits, independent of the model."""
    for stated in options_of(type(options)):
        stated.option.check(stated.flags[0], getattr(options, stated.field))


Etcd = Annotated[
    tuple[str, ...],
    Option(
        kind=Kind.URLS,
        env="ELASTIC_ETCD",
        helm="etcd.endpoints",
        help="etcd endpoints, comma-separated. Default: an embedded etcd (serve), or the cluster served last.",
    ),
]
Cluster = Annotated[
    str,
    Option(
        env="ELASTIC_CLUSTER",
        help="Name of the cluster. Default: the checkpoint directory's name (serve), or the cluster served last.",
    ),
]
StateDirectory = Annotated[
    Path | None,
    Option(env="ELASTIC_STATE_DIR", help="Directory of the cluster's address, event history, logs and etcd data."),
]


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """Which store, which cluster in it, and where its files are."""

    etcd: Etcd = ()
    cluster: Cluster = ""
    state_dir: StateDirectory = None


@dataclass(frozen=True, kw_only=True)
class ListenOptions:
    """Where a gateway listens."""

    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[
        int,
        Option(minimum=0, maximum=MAX_PORT, helm="service.port", help="Port of the OpenAI API (0 = any free port)."),
    ] = 8000
    admin_port: Annotated[
        int,
        Option(
            minimum=0, maximum=MAX_PORT, helm="service.adminPort", help="Port of the admin API (0 = any free port)."
        ),
    ] = 8001


@dataclass(frozen=True, kw_only=True)
class SpareOptions:
    """How many spares a host keeps."""

    spares: Annotated[
        int,
        Option(minimum=0, help="Warm spares per host: processes with the model loaded, ready to replace a dead rank."),
    ] = 0


@dataclass(frozen=True, kw_only=True)
class ServeOptions(StoreOptions, ListenOptions, SpareOptions):
    """Options of `elastic serve`."""

    model: Annotated[Path, Option(argument=True, helm="model.path", help="Checkpoint directory, Hugging Face format.")]
    ranks: Annotated[int, Option(minimum=1, helm="ranks", help="Number of expert-parallel ranks at the start.")] = 4
    max_ranks: Annotated[
        int | None,
        Option(help=f"Upper limit for the number of ranks. Default: {DEFAULTS['max_ranks']}, or --ranks if higher."),
    ] = None
    follow_agents: Annotated[
        int, Option(minimum=0, help="Autoscale: run N ranks per registered agent (0 = size is set by `elastic scale`).")
    ] = DEFAULTS["follow_agents"]
    redundancy: Annotated[
        float,
        Option(minimum=1, helm="redundancy", help="Mean number of ranks that hold an expert (1.25 = 25% more slots)."),
    ] = DEFAULTS["redundancy"]
    served_model_name: Annotated[
        str, Option(helm="model.servedName", help="Model name in the API. Default: name of the checkpoint directory.")
    ] = ""
    dtype: Annotated[str, Option(choices=Dtype, helm="dtype", help="Type of weights (auto = the checkpoint's).")] = (
        DEFAULTS["dtype"]
    )
    exactness: Annotated[
        str,
        Option(
            choices=Exactness,
            helm="exactness",
            help="invariant: a request's tokens are the same in any batch and placement. stock: faster kernels.",
        ),
    ] = DEFAULTS["exactness"]
    device: Annotated[str, Option(choices=Device, help="Where ranks compute (auto = a GPU if there is one).")] = (
        DEFAULTS["device"]
    )
    max_model_len: Annotated[
        int | None,
        Option(
            minimum=1,
            helm="maxModelLen",
            help="Maximum tokens of prompt plus output. Default: the model's limit, at most "
            f"{DEFAULTS['max_model_len']}.",
        ),
    ] = None
    kv_blocks: Annotated[
        int, Option(minimum=1, help=f"KV-cache blocks per rank, of {DEFAULTS['block_size']} tokens each.")
    ] = DEFAULTS["kv_blocks"]
    restart_intensity: Annotated[
        int, Option(minimum=1, help="Quarantine a rank slot after this many deaths within --restart-window.")
    ] = DEFAULTS["restart_intensity"]
    restart_window_s: Annotated[
        float, Option(names=("--restart-window",), kind=Kind.DURATION, help="Period in which deaths are counted.")
    ] = DEFAULTS["restart_window_s"]
    rebalance_bytes: Annotated[
        int,
        Option(
            names=("--rebalance-budget",),
            kind=Kind.SIZE,
            help="Max weights that one background rebalance may load (0 = never rebalance).",
        ),
    ] = DEFAULTS["rebalance_bytes"]
    load_bytes_per_s: Annotated[
        int,
        Option(
            names=("--load-bandwidth",),
            kind=Kind.SIZE,
            help="Max checkpoint read rate per host while serving, e.g. 500MB/s (0 = unlimited).",
        ),
    ] = DEFAULTS["load_bytes_per_s"]
    coverage_deadline_s: Annotated[
        float,
        Option(
            names=("--coverage-deadline",),
            kind=Kind.DURATION,
            help="Max time a request waits for lost experts before it gets a 503.",
        ),
    ] = DEFAULTS["coverage_deadline_s"]
    ready_timeout_s: Annotated[
        float, Option(names=("--ready-timeout",), kind=Kind.DURATION, help="Exit if not ready within this time.")
    ] = 180.0
    chaos: Annotated[
        bool, Option(help="For tests only: allow faults to be armed at run time, by file or admin API.")
    ] = False
    admin_token: str = field(default_factory=lambda: os.environ.get("ELASTIC_ADMIN_TOKEN") or secrets.token_urlsafe(24))


@dataclass(frozen=True, kw_only=True)
class RoleOptions(StoreOptions):
    """Options of the roles that run on a named host: controller and engine."""

    node: Annotated[
        str, Option(env="ELASTIC_NODE", help="Name of this host in the cluster. Default: the host name.")
    ] = field(default_factory=socket.gethostname)


@dataclass(frozen=True, kw_only=True)
class AgentOptions(RoleOptions, SpareOptions):
    """Options of `elastic agent`."""

    worker_class: Annotated[str, Option(help="Worker that ranks run, as module:Class.")] = (
        "workers.rank.worker:EPWorker"
    )
    drain_grace_s: Annotated[
        float,
        Option(
            names=("--drain-grace",),
            kind=Kind.DURATION,
            help="On SIGTERM: max time to hand ranks over to other hosts before exit (0 = exit at once).",
        ),
    ] = 60.0


@dataclass(frozen=True, kw_only=True)
class GatewayOptions(StoreOptions, ListenOptions):
    """Options of `elastic gateway`."""

    name: Annotated[str, Option(help="Name of this gateway. Default: host name and process id.")] = ""
