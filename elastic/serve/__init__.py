"""`elastic serve`: the supervisor of one machine's roles, its options, state directory and embedded etcd.

Imports workers and membership. Start with `supervisor.py`.
"""
