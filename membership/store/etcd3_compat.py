"""Makes etcd3 0.12.0 importable under protobuf >= 4, which refuses its generated modules. Import it only from here.

Those modules contain the serialized protocol definition as a literal. We parse it from their source (without executing
it), load it into a private descriptor pool (the default pool may hold another client's `rpc.proto`), and provide it
under the modules' names by an import hook that exists only while etcd3 is imported.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from membership.base.errors import ConfigError

PACKAGE = "etcd3.etcdrpc"
MODULES = {f"{PACKAGE}.{name}_pb2": f"{name}.proto" for name in ("kv", "auth", "rpc")}  # in order of dependence


def serialized_descriptor(source: str) -> bytes:
    """Return the argument `serialized_pb` of the file descriptor that a generated module builds."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "serialized_pb":
            for part in ast.walk(node.value):
                if isinstance(part, ast.Constant) and isinstance(part.value, str | bytes):
                    return part.value.encode("latin1") if isinstance(part.value, str) else part.value
    raise ConfigError("the installed etcd3 is not the one expected", hint="pip install etcd3==0.12.0")


class _Finder(MetaPathFinder, Loader):
    """Serves the three generated modules from the private pool."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pool = descriptor_pool.DescriptorPool()
        for module in MODULES:
            source = (folder / f"{module.rpartition('.')[2]}.py").read_text(encoding="utf-8")
            self._pool.AddSerializedFile(serialized_descriptor(source))

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        file: Any = self._pool.FindFileByName(MODULES[module.__name__])
        names: dict[str, object] = {"DESCRIPTOR": file}
        for name, message in file.message_types_by_name.items():
            names[name] = message_factory.GetMessageClass(message)
        for name, enum in file.enum_types_by_name.items():
            names[name] = EnumTypeWrapper(enum)
            names.update((value.name, value.number) for value in enum.values)
        vars(module).update(names)


def load() -> ModuleType:
    """Import etcd3 and return it."""
    loaded = sys.modules.get("etcd3")
    if loaded is not None:
        return loaded
    spec = importlib.util.find_spec("etcd3")
    if spec is None or spec.origin is None:
        raise ConfigError("the package etcd3 is not installed", hint="pip install etcd3==0.12.0")
    finder = _Finder(Path(spec.origin).parent / "etcdrpc")
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module("etcd3")
    finally:
        sys.meta_path.remove(finder)


etcd3: Any = load()
etcdrpc: Any = etcd3.etcdrpc
