"""The transport between ranks of different hosts: ZeroMQ over TCP, encrypted (CURVE), with the keys of the join secret.

Each side of a link connects to the other's one listening socket and sends over its own connection only. So the end of
that connection shows either side that the other has died, and a host that falls silent is found by ZeroMQ's heartbeats.
"""
