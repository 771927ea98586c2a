"""Dispatch and combine: rows travel to the ranks that hold their experts, and back.

Imports ipc, queue and protocol. Start with `loop.py`: the class `Exchange`, the same for every transport. What
carries the rows is a transport: a folder here (`shm/`, `loopback/`) that implements the protocols of `link.py`.
To add a transport, follow the steps at the top of `link.py` and add a line to `transports.py`.
"""
