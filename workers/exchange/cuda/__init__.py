"""Dispatch and combine on the GPUs of one host, without the host between the layers: kernels write into peers' memory.

Start reading at `calls.py`; `kernels.cu` has the protocol at its top. Ranks use it in `workers/rank/gpu_exchange.py`.
"""
