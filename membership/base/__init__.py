"""What every process of the product uses: errors, events, failpoints, logs.

Imports nothing of ours. Start with `errors.py`.
"""
