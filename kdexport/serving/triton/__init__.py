"""Write verified bundles into Triton model repositories."""
