"""What is done to a cluster and judged: the demo, scenarios, soak, churn, matrices, and the suite of them all."""
