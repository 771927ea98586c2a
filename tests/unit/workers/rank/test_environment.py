"""A rank's allocator: what a step frees serves the next step."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.unit
PROGRAM = """
import json, resource
from workers.rank.environment import give_memory_back, keep_for_steps

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    before = faults()
    pieces = [bytearray(size << 20) for size in (8, 16, 8, 16, 8)]
    del pieces
    return faults() - before

def steps():
    return min([step() for _ in range(6)][2:])

found = [steps()]
give_memory_back()
keep_for_steps()
found.append(steps())
give_memory_back()
found.append(step())
print(json.dumps(found))
"""


def test_memory_that_a_step_frees_is_not_faulted_in_by_the_next() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, check=True, timeout=120, cwd=ROOT)
    before, after, given_back = json.loads(done.stdout)
    assert before > 4096, "this allocator keeps it anyway"
    assert after < 64
    assert given_back > 4096, "and after a load it is given back all the same"
