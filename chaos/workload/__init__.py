"""Load and oracle: streams of requests, and their comparison with a fault-free run of the same prompts."""
