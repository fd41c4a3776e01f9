"""The parity ladder, the latency comparison, and what they say."""
