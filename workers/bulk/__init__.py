"""Bytes that one host takes from another (weights, a checkpoint's small files): who sends them, and who asks for them.

Imports queue and protocol. Start with `server.py`.
"""
