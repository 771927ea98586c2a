"""The backend of NVIDIA GPUs: kernels whose sums have one order whatever else is in the step (`kernels.py`).

May import what `cpu/` may, and of `cpu/` what is plain torch. Start reading at `backend.py`.
"""
