"""Mutants: copies of the product without one guard, to prove that the suite would notice its loss.

`catalogue.py` lists them; each names the tests that must fail, or is left to simulated runs. `tree.py` makes the copy,
`catch.py` runs in it, and `hunt.py` does that for all of them and then for the unchanged product, which must pass.
Start reading in `mutant.py`. A mutant that nothing catches is a hole in the suite.
"""
