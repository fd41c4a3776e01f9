"""Where a failed check comes from: bisection over stages, then over nodes, to one node that can be run alone."""
