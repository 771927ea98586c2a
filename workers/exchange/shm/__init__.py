"""The transport between ranks of one host: shared memory and doorbells.

Two ranks share two lanes (`wire.py`), one written by each. `transport.py` hands them over; `link.py` uses them.
"""
