"""The options of `elastic serve` and of the role commands: name, default, help and limits, each stated once.

The command line (`elastic/cli/command.py`), the checks below, the Helm chart and docs/OPTIONS.md
(`docs/reference.py`) are all made from these dataclasses. To add an option, add a field here. An option that becomes
part of the stored cluster configuration takes its default from `ClusterConfig`.
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
from typing import Any, TypeVar, get_type_hints

import msgspec

from membership.base.enums import Device, Dtype, Exactness, GenerationConfig, Homes, ReasoningParser, ToolCallParser
from membership.base.errors import ConfigError
from membership.base.rotation import MAX_FILES, MEGABYTE, Limit
from membership.base.timing import STOP_GRACE_S, STORE_AWAITED_S
from membership.store.credentials import NO_CREDENTIALS, Credentials
from membership.store.records import MAX_RANKS, ClusterConfig

DEFAULTS = {each.name: each.default for each in msgspec.structs.fields(ClusterConfig)}
DEFAULT_RANKS = 4
MAX_PORT = 65_535
LONGEST_S = 315_360_000.0  # ten years, which is as good as for ever
MOST = 2**53  # of a number without a limit of its own: beyond, not all readers of JSON take it for the same
T = TypeVar("T")


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
    off: str = ""  # the flag that switches off what is on by default
    argument: bool = False  # given by position, not by a flag
    kind: Kind | None = None
    env: str = ""
    secret: bool = False  # passed on to a role by its environment: a command line is seen by all users of the machine
    minimum: float | None = None
    maximum: float | None = None  # only beside a minimum
    helm: str = ""  # path in the chart's values.yaml


class Stated(msgspec.Struct, frozen=True):
    """An option with its field's name, type and default. A default that is computed is None here."""

    field: str
    type: Any
    default: Any
    required: bool
    option: Option

    @property
    def kind(self) -> Kind | None:
        """How its text is parsed; a number whose name ends with _s is a duration."""
        return self.option.kind or (Kind.DURATION if self.type is float and self.field.endswith("_s") else None)

    @property
    def flags(self) -> tuple[str, ...]:
        """All names of the flag, the first one first."""
        name = self.field.removesuffix("_s") if self.kind is Kind.DURATION else self.field
        return self.option.names or (f"--{name.replace('_', '-')}",)

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that there are, if the type is an enumeration."""
        known = isinstance(self.type, type) and issubclass(self.type, StrEnum)
        return tuple(self.type) if known else ()

    def checked(self, value: Any) -> Any:
        """The value in the option's type. ConfigError naming the flag if it is out of its limits."""
        flag, low, high = self.flags[0], self.option.minimum, self.option.maximum
        if isinstance(value, list):  # of a flag that may be given several times
            return tuple(value)
        if self.choices:
            if value not in self.choices:
                known = ", ".join(self.choices)
                raise ConfigError(f"{flag} {value}: there is no such choice", hint=f"choose one of {known}")
            return self.type(value)
        if self.kind is Kind.DURATION:
            low, high = low or 0.0, high or LONGEST_S
        elif self.kind is Kind.SIZE:
            low = low or 0
        if value is None or low is None:
            return value
        if high is not None and not low <= value <= high:
            raise ConfigError(f"{flag} {value}: it must be from {low:g} to {high:.0f}")
        if not value >= low:
            raise ConfigError(f"{flag} {value}: it must be at least {low:g}")
        if value > MOST:
            raise ConfigError(f"{flag} {value}: it must be at most {MOST}")
        return value


def option(default: T, help: str, **details: Any) -> T:
    """A dataclass field that is an option; `details` are the other fields of `Option`."""
    known = Option(help=help, **details)
    described: T = field(default=default, repr=not known.secret, metadata={"option": known})
    return described


def options_of(kind: type[Any]) -> Iterator[Stated]:
    """Every option of a dataclass: its own in the order of the fields, then those of its bases.

    Fields without an `Option` are left out.
    """
    hints = get_type_hints(kind)
    classes = [inspect.get_annotations(each) for each in kind.__mro__]

    def inherited_from(each: dataclasses.Field[Any]) -> int:
        return next(index for index, annotations in enumerate(classes) if each.name in annotations)

    for each in sorted(dataclasses.fields(kind), key=inherited_from):
        if "option" in each.metadata:
            computed = each.default_factory is not dataclasses.MISSING
            required = each.default is dataclasses.MISSING and not computed
            default = None if required or computed else each.default
            yield Stated(each.name, hints[each.name], default, required, each.metadata["option"])


def check_options(options: Any) -> None:
    """ConfigError naming the first flag whose value is out of its limits, independent of the model."""
    for stated in options_of(type(options)):
        stated.checked(getattr(options, stated.field))


@dataclass(frozen=True, kw_only=True)
class StateDirOptions:
    """Where a cluster's files are."""

    state_dir: Path | None = option(
        None, "Directory of the cluster's address, event history, logs and etcd data.", env="ELASTIC_STATE_DIR"
    )


@dataclass(frozen=True, kw_only=True)
class StoreOptions(StateDirOptions):
    """Which store, and which cluster in it."""

    etcd: tuple[str, ...] = option(
        (),
        "etcd endpoints, comma-separated. Default: an embedded etcd (serve), or the cluster served last.",
        kind=Kind.URLS,
        env="ELASTIC_ETCD",
        helm="etcd.endpoints",
    )
    etcd_ca: Path | None = option(
        None, "PEM file of the authority that signed etcd's certificate (https endpoints).", env="ELASTIC_ETCD_CA"
    )
    etcd_cert: Path | None = option(
        None, "PEM file of the certificate that we show etcd, if it asks for one.", env="ELASTIC_ETCD_CERT"
    )
    etcd_key: Path | None = option(None, "PEM file of that certificate's key.", env="ELASTIC_ETCD_KEY")
    etcd_user: str = option("", "Name of our user, if etcd has users.", env="ELASTIC_ETCD_USER", helm="etcd.user")
    etcd_password_file: Path | None = option(
        None, "File with that user's password; it is read again when needed.", env="ELASTIC_ETCD_PASSWORD_FILE"
    )
    cluster: str = option(
        "",
        "Name of the cluster. Default: the checkpoint directory's name (serve), or the cluster served last.",
        env="ELASTIC_CLUSTER",
    )

    def credentials(self, known: Credentials = NO_CREDENTIALS) -> Credentials:
        """Who we are to etcd; what is not given is as `known`."""
        given = {
            each.name: str(value.absolute() if isinstance(value, Path) else value)
            for each in msgspec.structs.fields(Credentials)
            if (value := getattr(self, f"etcd_{each.name}"))
        }
        return msgspec.structs.replace(known, **given)


@dataclass(frozen=True, kw_only=True)
class AwaitedStoreOptions(StoreOptions):
    """The same where etcd may be started later than we are, as pods are on Kubernetes."""

    etcd_wait_s: float = option(
        STORE_AWAITED_S,
        "Max wait for an etcd that nothing answers for yet, also while its name is unknown; 0: one try."
        " A refused certificate or password ends it at once.",
    )


@dataclass(frozen=True, kw_only=True)
class ListenOptions:
    """Where a gateway listens."""

    host: str = option("127.0.0.1", "Address of the OpenAI API, the probes and metrics.")
    port: int = option(
        8000, "Port of the OpenAI API (0 = any free port).", minimum=0, maximum=MAX_PORT, helm="service.containerPort"
    )
    admin_host: str = option("127.0.0.1", "Address of the admin API.", helm="service.adminHost")
    admin_port: int = option(
        8001, "Port of the admin API (0 = any free port).", minimum=0, maximum=MAX_PORT, helm="service.adminPort"
    )
    max_connections: int | None = option(
        None,
        "Most open connections to the OpenAI API. Default: what the limit of open files leaves, at most 8192.",
        minimum=1,
    )
    stop_grace_s: float = option(STOP_GRACE_S, "On SIGTERM: max time for open streams to end.")


@dataclass(frozen=True, kw_only=True)
class ApiOptions:
    """Who may use the OpenAI API, how it answers, what is written down. `elastic serve` passes it on to its gateway."""

    api_key: tuple[str, ...] = option(
        (),
        "API key that clients must send; may be repeated. Seen in `ps`: the file, or the environment, is better.",
        env="ELASTIC_API_KEY",
        secret=True,
    )
    api_key_file: Path | None = option(
        None, "File of API keys, one `NAME:KEY` per line, with limits; read again when it changes."
    )
    allowed_origins: tuple[str, ...] = option(
        (), "Origin whose pages may use the API from a browser (CORS), or `*`; may be repeated. Default: none."
    )
    allowed_methods: tuple[str, ...] = option((), "HTTP method that such pages may use; may be repeated. Default: all.")
    allowed_headers: tuple[str, ...] = option((), "Header that such pages may send; may be repeated. Default: all.")
    allow_credentials: bool = option(False, "Let such pages send cookies and other credentials.")
    max_open_requests: int = option(
        2048,
        "Most open requests of a gateway, of which each choice is one; further ones get a 503.",
        minimum=1,
        helm="maxOpenRequests",
    )
    metrics_aliases: bool = option(False, "Show metrics under vLLM's names, too.")
    access_log: bool = option(False, "Log a line for each request to the OpenAI API.")
    generation_config: GenerationConfig = option(
        GenerationConfig.MODEL, "Sampling of requests that do not say: the checkpoint's, or none (temperature 1)."
    )
    tool_call_parser: ToolCallParser = option(
        ToolCallParser.AUTO, "How the model writes tool calls (auto = as its chat template has it)."
    )
    reasoning_parser: ReasoningParser = option(
        ReasoningParser.NONE, "How the model marks its reasoning, which answers then have as `reasoning_content`."
    )
    ssl_certfile: Path | None = option(
        None,
        "PEM file of the API's certificate (https), and of an admin API beyond loopback; a changed file counts.",
    )
    ssl_keyfile: Path | None = option(None, "PEM file of that certificate's key. Default: in the same file.")
    ssl_ca_certs: Path | None = option(None, "PEM file of the authorities of clients' certificates.")
    ssl_cert_reqs: int = option(
        0,
        "Client certificates: 0 = none are asked for, 1 = checked, 2 = required, except of probes.",
        minimum=0,
        maximum=2,
    )
    admin_token_file: Path | None = option(
        None, "File with the admin API's token; a changed file counts at once. Default: ELASTIC_ADMIN_TOKEN."
    )

    def passed_on(self) -> tuple[list[str], dict[str, str]]:
        """The same for a role's command: flags, and what goes into its environment."""
        flags: list[str] = []
        environment: dict[str, str] = {}
        for stated in options_of(ApiOptions):
            value, flag = getattr(self, stated.field), stated.flags[0]
            if value == stated.default:
                continue
            if stated.option.secret:
                environment[stated.option.env] = " ".join(value)  # as several are read from there
            elif value is True:
                flags.append(flag)
            else:
                each = value if isinstance(value, tuple) else [value.absolute() if isinstance(value, Path) else value]
                flags += [part for item in each for part in (flag, str(item))]
        return flags, environment


@dataclass(frozen=True, kw_only=True)
class JoinOptions:
    """What hosts of a cluster have in common."""

    join_secret_file: Path | None = option(
        None,
        "File with the secret that hosts share, and the next one. Default: ELASTIC_JOIN_SECRET; `serve` makes one.",
        env="ELASTIC_JOIN_SECRET_FILE",
    )


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(JoinOptions):
    """How hosts reach each other."""

    advertise: str = option(
        "",
        "Address (IPv4, IPv6) or name at which other hosts reach this one. Default: none do.",
        env="ELASTIC_ADVERTISE",
    )
    port_range: str = option(
        "",
        "Ports at which engine and ranks listen there, as FIRST-LAST. Default: the kernel chooses.",
        env="ELASTIC_PORT_RANGE",
    )


@dataclass(frozen=True, kw_only=True)
class SpareOptions:
    """How many ranks and spares a host runs, and whether they may be killed on request."""

    capacity: int | None = option(
        None, "Most ranks that this host runs. Default: as many as the cluster may have.", minimum=1, maximum=MAX_RANKS
    )
    spares: int = option(
        0, "Warm spares per host: processes with the model loaded, ready to replace a dead rank.", minimum=0
    )
    allow_kill: bool = option(False, "Let the admin API kill ranks of this host, as a test of a cluster does.")


@dataclass(frozen=True, kw_only=True)
class DomainOptions:
    """What a host ends with: replicas of an expert are kept apart by it."""

    machine: str = option(
        "", "Server or Kubernetes node, if others of the cluster are on it. Default: it alone.", env="ELASTIC_MACHINE"
    )
    zone: str = option("", "Zone that this host is in, as of a cloud. Default: none is known.", env="ELASTIC_ZONE")


@dataclass(frozen=True, kw_only=True)
class LeaveOptions:
    """How a host leaves others."""

    drain_grace_s: float = option(
        60.0, "On SIGTERM: max time to hand ranks over to other hosts before exit (0 = exit at once)."
    )


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """How large logs and the event history may grow."""

    log_max_mb: int = option(64, "Max size of a log, and of the event history; then a new file is begun.", minimum=1)
    log_keep: int = option(
        3, "How many earlier files of a log, and of the event history, are kept.", minimum=0, maximum=MAX_FILES - 1
    )

    @property
    def limit(self) -> Limit:
        """The same for what writes them."""
        return Limit(self.log_max_mb * MEGABYTE, self.log_keep)


@dataclass(frozen=True, kw_only=True)
class ConfigOptions:
    """What a cluster serves and how: what becomes its stored configuration."""

    model: Path = field(
        metadata={"option": Option(argument=True, helm="model.path", help="Checkpoint directory, Hugging Face format.")}
    )
    ranks: int | None = option(
        None,
        f"Number of expert-parallel ranks at the start. Default: as the cluster was left, at first {DEFAULT_RANKS}.",
        minimum=1,
        maximum=MAX_RANKS,
        helm="ranks",
    )
    max_ranks: int | None = option(
        None,
        f"Upper limit for the number of ranks. Default: {DEFAULTS['max_ranks']}, or --ranks if higher.",
        minimum=1,
        maximum=MAX_RANKS,
    )
    follow_agents: int = option(
        DEFAULTS["follow_agents"],
        "Autoscale: run N ranks per registered agent (0 = size is set by `elastic scale`).",
        minimum=0,
    )
    redundancy: float = option(
        DEFAULTS["redundancy"],
        "Mean number of ranks that hold an expert (1.25 = 25% more slots).",
        minimum=1,
        helm="redundancy",
    )
    served_model_name: tuple[str, ...] = option(
        (),
        "Name of the model in the API; may be repeated, or several with commas. Default: the checkpoint directory's.",
        helm="model.servedName",
    )
    dtype: Dtype = option(DEFAULTS["dtype"], "Type of weights (auto = the checkpoint's).", helm="dtype")
    exactness: Exactness = option(
        DEFAULTS["exactness"],
        "invariant: a request's tokens are the same in any batch and placement. stock: faster kernels.",
        helm="exactness",
    )
    device: Device = option(DEFAULTS["device"], "Where ranks compute (auto = a GPU if there is one).")
    max_model_len: int | None = option(
        None,
        f"Maximum tokens of prompt plus output. Default: the model's limit, at most {DEFAULTS['max_model_len']}.",
        minimum=1,
        helm="maxModelLen",
    )
    kv_blocks: int = option(
        DEFAULTS["kv_blocks"], f"KV-cache blocks per rank, of {DEFAULTS['block_size']} tokens each.", minimum=1
    )
    kv_cache_memory: float = option(
        0.0,
        "Part of a GPU's memory of its ranks together, e.g. 0.9: what weights leave is KV cache (0 = --kv-blocks).",
        minimum=0,
        maximum=1,
    )
    gpu_exchange: int | None = option(
        None,
        "Rows travel between the GPUs of so many ranks of one host, 2 to 8 (0 = over host memory)."
        " Default: of all ranks, if each has a GPU of its own and all reach one another by P2P.",
        minimum=0,
        maximum=8,
    )
    homes: Homes = option(
        DEFAULTS["homes"],
        "Requests of a CPU host: apart = on all its ranks, so a death concerns few;"
        " together = on one, if that can use all cores (faster).",
    )
    prefix_cache: bool = option(
        DEFAULTS["prefix_cache"],
        "Compute a prompt's beginning once: later requests use the KV blocks of earlier ones.",
        off="--no-prefix-cache",
    )
    kv_pools: bool = option(
        DEFAULTS["kv_pools"],
        "After a rank's death its requests go on with the KV blocks that it had, on the other ranks of its host.",
        off="--no-kv-pools",
    )
    step_budget_s: float = option(
        DEFAULTS["step_budget_s"],
        "Max time of a step while requests wait for each other: prompts are cut to fit (0: 512 tokens, GPUs 2048).",
    )
    max_waiting_requests: int = option(
        DEFAULTS["max_waiting_requests"],
        "How many requests may wait for a place on a rank; further ones get a 429, but keys below their part.",
        minimum=1,
    )
    max_waiting_tokens: int = option(
        DEFAULTS["max_waiting_tokens"],
        "How many tokens their prompts may have together; further ones get a 429, but keys below their part.",
        minimum=1,
    )
    max_wait_s: float = option(
        DEFAULTS["max_wait_s"], "Max time a request waits for a place on a rank before it gets a 429."
    )
    restart_intensity: int = option(
        DEFAULTS["restart_intensity"],
        "Quarantine a rank slot after this many deaths within --restart-window.",
        minimum=1,
    )
    restart_window_s: float = option(DEFAULTS["restart_window_s"], "Period in which deaths are counted.")
    rebalance_bytes: int = option(
        DEFAULTS["rebalance_bytes"],
        "Max weights that one background rebalance may load (0 = never rebalance).",
        names=("--rebalance-budget",),
        kind=Kind.SIZE,
    )
    load_bytes_per_s: int = option(
        DEFAULTS["load_bytes_per_s"],
        "Max rate per host of weights read, or sent to other hosts, while serving, e.g. 500MB/s (0 = unlimited).",
        names=("--load-bandwidth",),
        kind=Kind.SIZE,
    )
    coverage_deadline_s: float = option(
        DEFAULTS["coverage_deadline_s"],
        "Max time a request waits for lost experts, while no rank that may bring them starts, before it gets a 503.",
    )
    launch_deadline_s: float = option(
        DEFAULTS["launch_deadline_s"],
        "Max time for a rank to start and to link with the others; a load has none.",
        minimum=1,
    )
    load_stall_s: float = option(
        DEFAULTS["load_stall_s"], "Give up the load of a rank once no byte has come for this long.", minimum=1
    )
    min_agents: int = option(
        DEFAULTS["min_agents"], "How many agents must be there before the first ranks start.", minimum=1
    )


@dataclass(frozen=True, kw_only=True)
class SupervisorOptions:
    """How `elastic serve` starts its roles, and watches over them."""

    ready_timeout_s: float = option(
        180.0, "Exit if not ready, and no rank loads any further, within this time.", minimum=1
    )
    only_on: str = option("", "Refuse to start on a node of another name (a StatefulSet's other pods).")
    log_stdout: bool = option(False, "Also write the logs of all roles to stdout, as JSON lines that name the role.")
    chaos: bool = option(False, "For tests only: allow faults to be armed at run time, by file or admin API.")


@dataclass(frozen=True, kw_only=True)
class InitOptions(ConfigOptions, AwaitedStoreOptions, JoinOptions):
    """Options of `elastic init`."""

    anew: bool = option(
        False,
        "Begin anew even with the same settings: forget what ranks computed with. No process of it may live.",
    )


@dataclass(frozen=True, kw_only=True)
class ServeOptions(
    ConfigOptions,
    SupervisorOptions,
    AwaitedStoreOptions,
    NetworkOptions,
    ListenOptions,
    ApiOptions,
    LeaveOptions,
    SpareOptions,
    DomainOptions,
    LogOptions,
):
    """Options of `elastic serve`."""

    etcd_wait_s: float = option(
        0.0, "Max wait for an etcd of yours (--etcd) that nothing answers for yet. Default: one try."
    )
    admin_token: str = field(default_factory=lambda: os.environ.get("ELASTIC_ADMIN_TOKEN") or secrets.token_urlsafe(24))


NODE = Option(env="ELASTIC_NODE", help="Name of this host in the cluster. Default: the host name.")


@dataclass(frozen=True, kw_only=True)
class RoleOptions(AwaitedStoreOptions, NetworkOptions, LogOptions):
    """Options of the roles that run on a named host: controller and engine."""

    node: str = field(default_factory=socket.gethostname, metadata={"option": NODE})
    probe_port: int | None = option(
        None,
        "Port of `/readyz` and `/metrics` at the address of --advertise, for kubelet and Prometheus. Default: none.",
        minimum=1,
        maximum=MAX_PORT,
    )


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Where a role finds the checkpoint."""

    model: Path | None = option(None, "This host's copy of the checkpoint. Default: where `serve` or `init` found it.")

    @property
    def local_model(self) -> str:
        """The same as text; empty: as the cluster's config has it."""
        return str(self.model.absolute()) if self.model is not None else ""


@dataclass(frozen=True, kw_only=True)
class AgentOptions(RoleOptions, ModelOptions, LeaveOptions, SpareOptions, DomainOptions):
    """Options of `elastic agent`."""

    worker_class: str = option("workers.rank.worker:EPWorker", "Worker that ranks run, as module:Class.")


@dataclass(frozen=True, kw_only=True)
class GatewayOptions(AwaitedStoreOptions, NetworkOptions, ModelOptions, ListenOptions, ApiOptions, LogOptions):
    """Options of `elastic gateway`."""

    name: str = option("", "Name of this gateway. Default: host name and process id.")
    node: str = field(default_factory=socket.gethostname, metadata={"option": NODE})
