"""A role for tests of its supervisor: it does nothing until it is asked to stop."""

from __future__ import annotations

from elastic.serve.role_main import StopSignal

if __name__ == "__main__":
    with StopSignal() as stop:
        stop.wait(timeout=600.0)
