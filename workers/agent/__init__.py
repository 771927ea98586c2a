"""One host's agent: starts and supervises rank processes (the parent half of WorkerProc), keeps the host's weights
and KV pools.

Imports queue, protocol and ipc; never rank, which it only names. Start with `agent.py`; its decisions are `decide.py`.
"""
