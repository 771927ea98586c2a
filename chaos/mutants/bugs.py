"""The catalogue of planted bugs: each removes one guard of the product, as somebody might who saw no use in it."""

from __future__ import annotations

from chaos.mutants import bugs_membership, bugs_ranks, bugs_serving
from chaos.mutants.bug import Bug

BUGS: tuple[Bug, ...] = (*bugs_membership.BUGS, *bugs_serving.BUGS, *bugs_ranks.BUGS)
