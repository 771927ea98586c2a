"""The catalogue of mutants: each removes one guard of the product, as a developer might who saw no use in it."""

from __future__ import annotations

from chaos.mutants import gpus, hosts, membership, ranks, serving
from chaos.mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = (*membership.MUTANTS, *serving.MUTANTS, *ranks.MUTANTS, *gpus.MUTANTS, *hosts.MUTANTS)
