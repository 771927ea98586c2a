"""The transport of a rank that has no peers: nothing is carried. For a cluster of one rank, and for tests."""
