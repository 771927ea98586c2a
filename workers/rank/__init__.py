"""What runs inside a rank process: the child half of WorkerProc, and the worker that computes.

Imports model and below; never agent or fleet. Start with `worker_proc.py`, then `worker.py`.
"""
