"""Memory and wake-ups between processes of one host: shared memory, futexes, descriptor hand-over.

Imports membership.base only. Start with `doorbell.py`.
"""
