"""What an operator may ask for: scale, drain, undrain, pause, rebalance, and the dry run of each.

Imports every other room of membership. Start with `operations.py`.
"""
