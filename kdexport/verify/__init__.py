"""The parity ladder, the latency comparison, and their reports."""
