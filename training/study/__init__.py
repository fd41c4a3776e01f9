"""Tables: the results of many runs, and the architectures."""
