"""The command with short gates, for tests of everything but the statistics: four sessions of twelve pairs, one look."""

import functools

from kdexport.gate import compare
from kdexport.gate.sequential_test import Plan

QUICK_PLAN = functools.partial(Plan, pairs=12, max_sessions=4)

if __name__ == "__main__":
    from kdexport.__main__ import main

    setattr(compare, "Plan", QUICK_PLAN)  # noqa: B010
    main()
