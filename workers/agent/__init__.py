"""One host's agent: starts and supervises rank processes (the parent half of WorkerProc), keeps the host's weights.

Imports queue, protocol and below. Start with `agent.py`; what it decides is `decide.py`.
"""
