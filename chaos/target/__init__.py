"""The cluster that faults are injected into: started here, or somebody's own; how a run waits for it."""
