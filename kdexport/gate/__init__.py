"""The latency gate: paired sessions in fresh processes, a group-sequential test, three verdicts."""
