"""A bundle as a classifier: its target on images, and its accuracy on labelled ones; needs no torch."""
