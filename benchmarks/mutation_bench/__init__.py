"""Changes of a bundle, and which check sees each of them: the parts of benchmarks/mutations.py."""
