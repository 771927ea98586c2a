"""The backend of CPUs, in plain torch operations; the GPU's takes its tiling of dense products from here.

Imports the device-neutral modules of workers.model. Start with `backend.py`.
"""
