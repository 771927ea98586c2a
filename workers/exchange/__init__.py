"""Dispatch and combine: rows travel to the ranks that hold their experts, and back.

Imports ipc, queue and protocol. Start with `base.py`.
"""
