"""The small trained checkpoint that the demo serves, and the script that trains it.

Imports membership.base. Start with `model.py`.
"""
