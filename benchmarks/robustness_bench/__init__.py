"""Faults and damaged files for ``benchmarks/robustness.py``."""
