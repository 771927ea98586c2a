"""Ways to damage the record of a run, each with what the check that guards against it must say and show."""

from tests.support.damage import membership, promises
from tests.support.damage.tools import DAMAGES

__all__ = ["DAMAGES", "membership", "promises"]
