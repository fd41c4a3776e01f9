"""One training run: loop, state, journal, check of the losses, checkpoint of the student."""
