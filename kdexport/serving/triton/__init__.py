"""Writes verified bundles into Triton model repositories."""
