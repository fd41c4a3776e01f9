"""Paired latency measurement in fresh processes."""
