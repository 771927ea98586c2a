"""Which versions of etcd answer a write, and show it to watches, before it is on disk. `EtcdStore` asks them once more.

They apply what is committed while they still write it to their log, and a lone member commits what it has only in
memory. When it is killed just then, an acknowledged write is lost (etcd-io/etcd#14370; mended in 3.4.21 and 3.5.5). It
begins nothing new before it has written, so a linearizable read that starts after the answer ends after the write.
"""

from __future__ import annotations

import re

MENDED = {(3, 4): 21, (3, 5): 5}  # minor version -> the first release in which the write comes first


def acknowledges_early(version: str) -> bool:
    """Whether an etcd of this version may acknowledge a write that it has not written. True if it is not known."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if found is None:
        return True
    major, minor, patch = map(int, found.groups())
    return (major, minor) < min(MENDED) or patch < MENDED.get((major, minor), 0)
