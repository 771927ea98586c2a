"""Which rank holds which expert. Pure functions.

Imports base and store. Start with `plan.py`.
"""
