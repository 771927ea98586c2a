"""Faults, one kind per file; each is dealt by an injector that proves that it happened and can take it back."""

from chaos.faults.signals import Killed, kill

__all__ = ["Killed", "kill"]
