"""The parts of ``benchmarks/serving.py``: bundles, servers under test, load, faults, and the report."""
