"""The cause of a failed check: bisection over stages, then over nodes, to one node that can be run alone."""
