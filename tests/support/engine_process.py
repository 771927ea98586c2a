"""The engine role as a process of its own, for tests that kill it: `... engine_process URL EVENTS`."""

from __future__ import annotations

import signal
import sys
import threading

from elastic.engine.role import run_terms
from membership.base.events import EventLog
from membership.base.starter import end_with_starter
from membership.store.etcd import connect


def main() -> None:
    url, events = sys.argv[1:]
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    store = connect([url])
    try:
        run_terms(store, "test", "n", stop, EventLog(events, "engine"))
    finally:
        store.close()


if __name__ == "__main__":
    end_with_starter()
    main()
