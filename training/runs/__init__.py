"""One training run: loop, state, journal, watchdog, hand-over."""
