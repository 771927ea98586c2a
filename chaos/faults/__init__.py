"""Faults, one kind per file. Each has an injector that proves that the fault happened, and undoes it where possible.

Start with `base.py` (injector, entry, site), then `catalogue.py` (all faults by name).
"""

from chaos.faults.signals import Killed, kill

__all__ = ["Killed", "kill"]
