"""What tests share: fakes, helper processes, records of runs, and where the tree is. No tests in here."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
