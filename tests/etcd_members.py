"""An etcd of three members on loopback."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from workers.etcd_server import find_binary, free_ports

T = 30.0


@dataclass
class Member:
    url: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(T)

    def status(self) -> tuple[int, int]:
        """Its own id, and its leader's (0: it knows none)."""
        answer = httpx.post(f"{self.url}/v3/maintenance/status", json={}, timeout=T).json()
        return int(answer["header"]["member_id"]), int(answer.get("leader", 0))


@contextmanager
def three_members(folder: Path) -> Iterator[list[Member]]:
    """Start them; whatever is left of them is killed at the end."""
    ports = free_ports(6)
    peers = {f"m{i}": f"http://127.0.0.1:{port}" for i, port in enumerate(ports[3:])}
    started: list[Member] = []
    try:
        for (name, peer), port in zip(peers.items(), ports, strict=False):
            url = f"http://127.0.0.1:{port}"
            flags = [f"--name={name}", f"--data-dir={folder}/{name}", f"--listen-client-urls={url}"]
            flags += [f"--advertise-client-urls={url}", f"--listen-peer-urls={peer}", "--log-level=error"]
            flags += [f"--initial-advertise-peer-urls={peer}", "--heartbeat-interval=100", "--election-timeout=500"]
            flags += ["--initial-cluster=" + ",".join(f"{n}={p}" for n, p in peers.items())]
            started.append(Member(url, subprocess.Popen([find_binary(), *flags])))
        yield started
    finally:
        for member in started:
            member.kill()
