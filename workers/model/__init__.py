"""A Hugging Face MoE model with our experts, KV cache and arithmetic.

Imports exchange and below. Start with `runner.py`.
"""
