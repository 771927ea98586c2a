"""The `elastic-chaos` command: parse, call, render. Start with `main.py`."""
