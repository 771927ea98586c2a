"""Who is in the cluster: records, the store they live in, and the decisions about them. No tensors, no processes."""
