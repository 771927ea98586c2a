"""What runs inside a rank process (the child half of WorkerProc).

Imports model and below. Start with `worker_proc.py`, then `worker.py`.
"""
