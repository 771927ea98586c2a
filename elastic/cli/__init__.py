"""The `elastic` command: parse, call, render.

Imports everything else of elastic. Start with `main.py`.
"""
