"""Dispatch and combine: how a token's row reaches the ranks that hold its experts, and comes back."""
