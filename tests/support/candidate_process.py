"""A role as far as the store is concerned: a mirror, a lease, and a campaign for an office, over and over.

It prints to stdout what it believes, one JSON object per line, with the time of this host's monotonic clock: `won` is
after it first held the office, `left` before it last saw that it did. So what it prints never claims too long a term.
Run as a process of its own: gRPC opens connections from its own threads, which must be in the right namespace.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import structlog

from membership.base.errors import LeaseLost, StoreUnavailable, WaitTimeout
from membership.base.starter import end_with_starter
from membership.store.election import Election
from membership.store.etcd import EtcdStore, connect
from membership.store.interface import Put
from membership.store.keys import Keys
from membership.store.lease import LeaseKeeper
from membership.store.mirror import Mirror

TTL_S = 1.0
POLL_S = 0.01
ACT_EVERY_S = 0.1
CLUSTER = "candidates"


def say(kind: str, at: float = 0.0, **fields: object) -> None:
    """One line."""
    sys.stdout.write(json.dumps({"kind": kind, "at": at or time.monotonic(), **fields}) + "\n")
    sys.stdout.flush()


def term(store: EtcdStore) -> None:
    """Campaign, and act as long as the office is held."""
    keys = Keys(CLUSTER)
    with LeaseKeeper(store, TTL_S) as keeper:
        election = Election(store, keys.leader, b"", keeper)
        while not election.token:
            try:
                election.campaign(0.5)
            except WaitTimeout:
                continue
        acting = threading.Thread(target=act, args=(store, election, keys), daemon=True)
        if not election.held:
            return
        say("won", token=election.token)
        acting.start()
        seen_at = asked_at = time.monotonic()
        while election.held:
            seen_at, asked_at = asked_at, time.monotonic()
            time.sleep(POLL_S)
        say("left", seen_at, token=election.token)
        acting.join(10.0)


def act(store: EtcdStore, election: Election, keys: Keys) -> None:
    """What only the holder may do: fenced writes, also for a while after it has left."""
    left = 0.0
    while not left or time.monotonic() < left + 1.0:
        left = left or (0.0 if election.held else time.monotonic())
        try:
            done = store.txn([election.fence()], [Put(keys.prefix + "acted", str(election.token).encode())])
        except StoreUnavailable:
            continue
        if done.succeeded:
            say("acted", token=election.token, revision=done.revision)
        time.sleep(ACT_EVERY_S)


def watch(mirror: Mirror) -> None:
    """Say when the mirror loses the store and when it is back."""
    before = None
    while True:
        if (now := mirror.synced) != before:
            say("synced" if now else "unsynced")
            before = now
        time.sleep(POLL_S)


def main(urls: str) -> None:
    """Until killed."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    store = connect(urls.split(","), timeout_s=1.0, connect_timeout_s=30.0)
    mirror = Mirror(store, CLUSTER, probe_every_s=0.2)
    threading.Thread(target=watch, args=(mirror,), daemon=True).start()
    while True:
        try:
            term(store)
        except (LeaseLost, StoreUnavailable) as error:
            say("waits", error=str(error))


if __name__ == "__main__":
    end_with_starter()
    main(sys.argv[1])
