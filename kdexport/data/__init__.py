"""Image datasets and preprocessing."""
