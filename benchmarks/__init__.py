"""Measurements behind the figures in docs/benchmarks.md; each runs both sides in one run and prints a ratio."""
