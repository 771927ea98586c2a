"""A Hugging Face MoE model with our experts, KV cache and arithmetic; what differs by device is in one folder each.

Imports exchange and below. Start with `runner.py`; `backend.py` says what a device must give, `devices.py` lists them.
"""
