"""Graphs as programs of torch. A folder of its own: all modules beside the backends are imported without torch too."""
