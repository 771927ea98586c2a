"""Campaigns: the demo, scenarios, soak, churn, the matrices, and the suite of them all.

Start with `campaign.py`, the loop that all of them share. May import the rooms below: scenarios, record, check, faults,
target, workload.
"""
