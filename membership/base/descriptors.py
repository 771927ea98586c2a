"""How many files a process may have open. Each role takes as many as it is allowed to: shells give few by default."""

from __future__ import annotations

import resource

MOST = 1 << 20  # more would only cost programs that walk over all of them


def raise_limit() -> int:
    """Raise the soft limit of this process, and of all that it starts, to the hard one; return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return limit()


def limit() -> int:
    """How many descriptors this process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else soft
