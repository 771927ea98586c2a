"""Bugs that we plant in copies of the product, to prove that the suite would notice them.

`bugs.py` is the catalogue: each takes one guard out of the product's source. `plant.py` makes the copy, `catch.py` runs
there and tries to catch the bug, in simulated lives or with a check of `checks/`; `hunt.py` does that for all of them,
and first for the product as it is, which must pass. A bug that nobody catches is a hole in the suite.
"""
