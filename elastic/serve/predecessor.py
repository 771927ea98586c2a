"""The server that ended in this state directory without leaving it: it was killed. On an etcd that outlives it, its
offices are taken over at once instead of when their leases run out.

That it has ended is known by the directory's lock, and that an office was its by the node's name. Should a role of it
still live, as for a moment without a pod around it, the role is fenced by the loss of its lease. A process of the same
node that belongs to another server is let alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from elastic.serve.role_process import owner_of
from elastic.serve.state_dir import ClusterAddress
from membership.base.process_stats import command_words
from membership.base.run_dir import ENV as RUN_DIR_ENV
from membership.store.interface import KeyValue, Store

OFFICES = ("controller", "engine")  # as commands


@dataclass(frozen=True)
class Predecessor:
    """A server that was killed. `run`: the run directory, in the environment of all its roles."""

    address: ClusterAddress
    node: str
    run: Path

    def served(self, cluster: str, etcd: Iterable[str]) -> bool:
        """Whether it was this cluster, on this etcd."""
        return (self.address.cluster, set(self.address.etcd)) == (cluster, set(etcd))

    def fence(self, store: Store, offices: Iterable[str]) -> list[str]:
        """Revoke the leases under which it holds these keys; the keys."""
        held = [kv for key in offices if (kv := store.get(key)) is not None and self._holds(kv)]
        for kv in held:
            store.revoke(kv.lease)
        return [kv.key for kv in held]

    def _holds(self, kv: KeyValue) -> bool:
        owner = owner_of(kv.value)
        return bool(kv.lease) and owner is not None and owner.node == self.node and not self._is_others(owner.pid)

    def _is_others(self, pid: int) -> bool:
        """Whether that is a process of another server now. Those of another PID namespace are not seen: they ended.

        The title of a role that was forked takes the place of its environment: then the role is let alone.
        """
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            command = command_words(pid)
        except (FileNotFoundError, ProcessLookupError):
            return False
        except OSError:  # it is another user's
            return True
        mark = f"{RUN_DIR_ENV}=".encode()
        runs = [each.removeprefix(mark) for each in environ if each.startswith(mark)]
        return bytes(self.run) not in runs if runs else any(each in command for each in OFFICES)
