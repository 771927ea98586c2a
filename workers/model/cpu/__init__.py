"""The backend in plain torch operations: written and checked for CPUs; also what `--device cuda` runs today.

Imports the device-neutral modules of workers.model. Start with `backend.py`.
"""
