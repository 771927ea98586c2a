"""What is checked in the record of a run: a file per promise, each a function from the evidence to its outcome."""
