"""An engine of another user: `python -m tests.support.impostor SOCKET UID TOKEN`, as root.

It has a socket in our own run directory, as no other user could get it there: the last thing that must be relied on.
Answers as an engine does, and prints the kinds of all messages that it gets.
"""

from __future__ import annotations

import os
import socket
import sys

import msgspec
import zmq

from elastic.protocol import Hello, Submit, ToEngine, Tokens, Welcome


def main() -> None:
    """Until killed."""
    path, uid, token = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(path)
    os.setuid(uid)
    bound.listen()
    bound.setblocking(False)
    router = zmq.Context().socket(zmq.ROUTER)
    router.set(zmq.USE_FD, bound.fileno())
    router.bind(f"ipc://{path}")
    print("listening", flush=True)
    while True:
        peer, body = router.recv_multipart()
        message = msgspec.msgpack.decode(body, type=ToEngine)
        print(type(message).__name__, flush=True)
        if isinstance(message, Hello):
            router.send_multipart([peer, msgspec.msgpack.encode(Welcome(token))])
        if isinstance(message, Submit):
            router.send_multipart([peer, msgspec.msgpack.encode(Tokens(token, message.request_id, 0, [7]))])


if __name__ == "__main__":
    main()
