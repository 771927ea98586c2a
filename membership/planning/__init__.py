"""What the controller does next: facts about the cluster, the planner's rules, and the loop that carries them out.

Imports base, store and placement. Start with `planner.py`; its loop is `controller.py`.
"""
