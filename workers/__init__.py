"""What runs on a host: rank processes, their queues, liveness, expert exchange and the model."""
