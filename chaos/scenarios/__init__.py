"""Scenarios: faults and changes as written in YAML, decoded, checked and dry-run. Pure: campaigns run them.

Start with `script.py`. May import faults (the catalogue) and workload.
"""
