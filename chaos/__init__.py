"""Proof of the promises: fault injection, request histories, and their comparison with a fault-free run."""
