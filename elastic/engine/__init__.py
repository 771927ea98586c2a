"""Continuous batching: one step at a time over all ranks, and the live mask.

Imports workers and `elastic/protocol.py`, never the gateway. Start with `loop.py`; what it decides is `scheduler.py`.
"""
