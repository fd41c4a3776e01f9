"""Statistics that know nothing of models: sequential tests, proportions, distances between logits."""
