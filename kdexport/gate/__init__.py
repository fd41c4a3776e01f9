"""The gate: paired latency sessions in fresh processes, a group-sequential test, exact accuracy bounds."""
