"""A gateway's stand-in: `python -m tests.support.answers_one` takes one client from each socket handed down to it.

It tells each its process id, and ends.
"""

from __future__ import annotations

import os

from elastic.serve.listening import inherited_listeners

if __name__ == "__main__":
    for listener in inherited_listeners() or ():
        listener.setblocking(True)
        client, _ = listener.accept()
        client.sendall(b"%d" % os.getpid())
