"""The cluster that faults are injected into: started here, or already running; the one wait of the harness.

Start with `cluster.py`. Imports no other room of chaos.
"""
