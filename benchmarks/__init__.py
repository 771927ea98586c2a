"""Measurements behind the figures in docs/benchmarks.md; each runs both sides in one run and prints a ratio."""

import os

from membership.base import starter

os.environ[starter.ENV] = starter.named()  # what a benchmark starts ends with it
