"""The record of a run: what clients saw, what was done, what the store said. Start with `record.py`."""
