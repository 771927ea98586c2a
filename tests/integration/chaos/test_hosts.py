"""Hosts made of this machine: they can be made again at once, whatever goes on in the former ones."""

from __future__ import annotations

import subprocess

import pytest

from tests.support.hosts import made_hosts

pytestmark = pytest.mark.integration


def test_a_process_that_outlives_its_host_is_in_no_way_of_the_next() -> None:
    with made_hosts("a") as hosts:
        left = subprocess.Popen(
            hosts.command("a", "sh", "-c", "echo && cat"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert left.stdout is not None
        assert left.stdout.readline() == b"\n", "it runs there"
    try:
        with made_hosts("a"):
            assert left.poll() is None
    finally:
        left.communicate(timeout=30)
