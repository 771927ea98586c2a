"""The engine's hold on all ranks: queues, death notices, the watchdog.

Imports queue, protocol and below. Start with `fleet.py`.
"""
