"""Statistics without a model: sequential tests, proportions, distances between logits."""
