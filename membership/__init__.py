"""Which ranks are in the cluster and what each one holds. No tensors, no child processes.

Rooms, each importing only those before it: `base` (errors, events, failpoints, timing), `store` (records, etcd,
leases, the mirror), `placement` (which rank holds which expert), `planning` (what the controller does next),
`operations` (changes that people request). Start with `planning/planner.py`: one state in, one effect out.
"""
