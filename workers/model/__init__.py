"""The model on one rank: Hugging Face modules, our experts, our KV cache, our sampler."""
