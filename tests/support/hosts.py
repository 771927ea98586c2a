"""Hosts for a test, which is skipped where none can be made: once some were, each further failure is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from chaos.faults import netns
from chaos.target import hosts as of_this_machine
from chaos.target.hosts import Hosts
from membership.base.errors import ConfigError

__all__ = ["Hosts", "made_hosts"]

_made: list[str] = []


def own_namespaces() -> set[str]:
    """Those of this process: tests that run beside make some, too."""
    return {name for name in netns.namespaces() if name.startswith(f"{netns.PREFIX}{os.getpid()}-")}


@contextmanager
def made_hosts(*hosts: str) -> Iterator[Hosts]:
    """See chaos/target/hosts.py."""
    with ExitStack() as opened:
        try:
            made = opened.enter_context(of_this_machine.made_hosts(*hosts))
        except ConfigError as error:
            if _made:
                raise
            pytest.skip(str(error))
        _made.append(made.bridge)
        yield made
