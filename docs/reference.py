"""What is written from tables: docs/OPTIONS.md and the chart's values from the options; its dashboards; a part of
docs/API.md.

`python -m docs.reference` in a checkout (`make docs`) rewrites them; a test fails while they differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs.api import API_PAGE, api_page
from docs.dashboards import boards
from elastic.cli.command import as_text
from elastic.cli.connection import Connection
from elastic.serve.options import (
    MAX_PORT,
    AgentOptions,
    GatewayOptions,
    InitOptions,
    Kind,
    RoleOptions,
    ServeOptions,
    Stated,
    options_of,
)

PAGE = Path("docs/OPTIONS.md")
VALUES = Path("helm/elastic-ep/values.yaml")
SCHEMA = Path("helm/elastic-ep/values.schema.json")
URL = r"^https?://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+):[0-9]{1,5}/?$"
BEGIN, END = "# Options of `elastic serve`, written by `make docs`:", "# (end of what `make docs` writes)"
SECTIONS = (
    ("elastic serve MODEL", ServeOptions),
    ("elastic init MODEL", InitOptions),
    ("elastic controller, elastic engine", RoleOptions),
    ("elastic agent", AgentOptions),
    ("elastic gateway", GatewayOptions),
    ("Client commands (status, scale, drain, ops, …)", Connection),
)
LOWEST_PORT = 1024  # of a pod that is not root
ONE_POD = "ranks, for one pod is one cluster; with mode: many, agents.replicas"
INSTEAD = {  # what people write where the chart has another value, and which that is; "." is the top
    ".": {
        "replicas": ONE_POD, "replicaCount": ONE_POD, "controllers": "controller", "engines": "engine",
        "gateways": "gateway", "agent": "agents",
        "servicePort": "service.port", "port": "service.port", "adminPort": "service.adminPort",
        "gracePeriodSeconds": "terminationGracePeriodSeconds", "persistence": "state.persistence",
        "shmSize": "sharedMemory.size", "shm": "sharedMemory.size", "args": "extraArgs", "pdb": "podDisruptionBudget",
        "modelPath": "model.path", "servedModelName": "model.servedName", "annotations": "podAnnotations",
        "securityContext": "podSecurityContext", "etcdEndpoints": "etcd.endpoints",
        "adminToken": "admin.existingSecret", "networkPolicies": "networkPolicy.enabled",
        "serviceMonitor": "monitoring.serviceMonitor", "prometheusRule": "monitoring.rules", "metrics": "monitoring",
    },
    "admin": {"token": "admin.existingSecret, a Secret with key token"},
    "agents": {
        "ranks": "agents.ranksPerPod", "capacity": "agents.ranksPerPod", "resources": "resources, at the top",
        "zone": "agents.zoneLabel, or agents.extraArgs",
        "gracePeriodSeconds": "agents.terminationGracePeriodSeconds",
    },
    "gateway": {"port": "service.containerPort"},
    "join": {"secret": "join.existingSecret, a Secret with key join-secret"},
    "etcd": {"password": "etcd.passwordSecret, a Secret with key password"},
    "service": {"targetPort": "service.containerPort"},
}  # fmt: skip
INTRODUCTION = """\
# Options

Written by `make docs` from `elastic/serve/options.py` and `elastic/cli/connection.py`: do not edit. Durations look like
`90s` or `5m`, sizes like `500MB` or `2GiB`. The Helm chart passes other flags through `extraArgs`.
"""


def options_page() -> str:
    """docs/OPTIONS.md."""
    lines = [INTRODUCTION]
    for title, kind in SECTIONS:
        lines += [f"## {title}\n", "| flag | default | meaning | environment |", "|---|---|---|---|"]
        lines += [_row(stated) for stated in options_of(kind) if not stated.option.argument]
        lines.append("")
    lines += ["## Values of the Helm chart\n", "| value | flag |", "|---|---|"]
    for stated in chart_options():
        flag = "MODEL" if stated.option.argument else f"`{stated.flags[0]}`"
        lines.append(f"| `{stated.option.helm}` | {flag} |")
    lines.append("")
    return "\n".join(lines)


def _row(stated: Stated) -> str:
    option, default = stated.option, as_text(stated.kind, stated.default)
    shown = "" if default is None else f"`{f'{default:g}' if isinstance(default, float) else default}`"
    choices = f" One of {', '.join(f'`{each}`' for each in stated.choices)}." if stated.choices else ""
    cells = (
        ", ".join(f"`{flag}`" for flag in (*stated.flags, *([option.off] if option.off else ()))),
        {False: "off", True: "on"}.get(default, shown) if isinstance(default, bool) else shown,
        option.help + choices,
        f"`{option.env}`" if option.env else "",
    )
    return f"| {' | '.join(cells)} |"


def chart_options() -> Iterator[Stated]:
    """The options that have a value in the chart."""
    return (stated for stated in options_of(ServeOptions) if stated.option.helm)


def chart_values(text: str) -> str:
    """The text of values.yaml with its part for options written anew."""
    lines = []
    for stated in chart_options():
        if "." not in stated.option.helm:
            line = f"{stated.option.helm}: {json.dumps(plain_default(stated)).strip(chr(34))}"
            lines.append(f"{line:<28} # {stated.option.help}")
    part = "\n".join((BEGIN, *lines, END))
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda found: part, text, flags=re.DOTALL)


def plain_default(stated: Stated) -> Any:
    """The default as YAML and JSON have it; a whole number without a fraction."""
    default = stated.default
    if isinstance(default, tuple):  # what a flag takes with commas is one text
        default = list(default) if stated.kind is Kind.URLS else ",".join(default)
    return int(default) if isinstance(default, float) and default.is_integer() else default


def chart_schema(text: str) -> str:
    """The text of values.schema.json with the properties of options written anew."""
    schema = json.loads(text)
    for stated in chart_options():
        if (limits := _limits(stated)) is None:
            continue
        *path, name = stated.option.helm.split(".")
        node = schema
        for key in path:
            node = node["properties"].setdefault(key, {"type": "object", "properties": {}})
        node["properties"][name] = limits
    _close(schema)
    return json.dumps(schema, indent=2) + "\n"


def _close(node: dict[str, Any], path: str = ".") -> None:
    """Refuse what the object has no property for. The message names all that there are, or the one that was meant."""
    instead = INSTEAD.get(path, {})
    properties = {name: inner for name, inner in node.get("properties", {}).items() if name not in instead}
    for name, inner in properties.items():
        _close(inner, name)
    if properties:
        node["propertyNames"] = {"enum": list(properties)}
        refused = {name: {"enum": [f"(not a value: set {meant})"]} for name, meant in instead.items()}
        node["properties"] = {**properties, **refused}
    if "items" in node:
        _close(node["items"], f"{path}[]")


def _limits(stated: Stated) -> dict[str, Any] | None:
    """JSON schema of an option's value; None: any text will do."""
    option = stated.option
    if stated.kind is Kind.URLS:
        return {"type": "array", "items": {"type": "string", "pattern": URL}}
    if stated.choices:
        return {"enum": list(stated.choices)}
    if stated.required:  # the model's path in a pod: one that is not absolute would be below a folder of ours
        return {"type": "string", "pattern": "^/."}
    bounds = {"minimum": option.minimum, "maximum": option.maximum}
    if option.maximum == MAX_PORT:
        bounds["minimum"] = LOWEST_PORT
    given: dict[str, Any] = {name: int(bound) for name, bound in bounds.items() if bound is not None}
    if stated.type is float:  # `helm --set` makes text of a fraction
        return {"type": ["number", "string"], **given, "pattern": "^[1-9][0-9]*(\\.[0-9]+)?$"}
    if stated.type in (int, int | None):
        return {"type": "integer" if stated.type is int else ["integer", "null"], **given}
    return None


def main() -> None:
    """Write all files."""
    PAGE.write_text(options_page(), encoding="utf-8")
    API_PAGE.write_text(api_page(API_PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    VALUES.write_text(chart_values(VALUES.read_text(encoding="utf-8")), encoding="utf-8")
    SCHEMA.write_text(chart_schema(SCHEMA.read_text(encoding="utf-8")), encoding="utf-8")
    for path, text in boards():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
