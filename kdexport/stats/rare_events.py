"""A sequential exact test of the share of trials that have an event which is usually absent.

The test looks after fixed numbers of trials and passes at a look with 0, 1 or 2 events. Each bound is that of Clopper
and Pearson (1934), and the allowed error is divided among the looks (Bonferroni). Therefore a PASS at a true share
above the limit, and a FAIL at one below it, each have a probability of at most ``ERROR``, whatever the share is.
tests/kdexport/stats/test_rare_events.py computes both exactly.
"""

from functools import lru_cache

from kdexport.stats.proportions import lower_bound, upper_bound
from kdexport.stats.sequential import Verdict

#: Probability of a wrong PASS, and of a wrong FAIL, of a whole test.
ERROR = 0.01

#: The numbers of events with which a test may pass, one look each.
ALLOWED = (0, 1, 2)

#: A test may fail at one more look, this fraction of the first passing one: most bad shares are evident by then.
_EARLY = 4


@lru_cache(maxsize=256)
def share_looks(limit: float) -> tuple[int, ...]:
    """The numbers of trials after which the test of a share of at most ``limit`` looks; 0 < ``limit`` < 1.

    The first look can only fail. The others are the smallest numbers of trials that pass with 0, 1 and 2 events.
    """
    if not 0 < limit < 1:
        raise ValueError(f"The limit of a share must lie between 0 and 1; got {limit}.")
    passing = tuple(_fewest(events, limit) for events in ALLOWED)
    return (max(1, passing[0] // _EARLY), *passing)


def decide_share(events: int, trials: int, limit: float, *, family: int = 1) -> Verdict:
    """The verdict at a look of ``share_looks``: is the share of trials with an event at most ``limit``?

    ``family`` is the number of tests of which one FAIL fails the whole, as the batch sizes of a gate.
    """
    if upper_bound(events, trials, 1 - ERROR / len(ALLOWED)) <= limit:
        return "PASS"
    looks = len(ALLOWED) + 1
    return "FAIL" if lower_bound(events, trials, 1 - ERROR / (looks * family)) > limit else "INCONCLUSIVE"


def _fewest(events: int, limit: float) -> int:
    """The smallest number of trials of which ``events`` prove a share of at most ``limit``."""
    confidence = 1 - ERROR / len(ALLOWED)
    low, high = events, events + 1
    while upper_bound(events, high, confidence) > limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        enough = upper_bound(events, middle, confidence) <= limit
        low, high = (low, middle) if enough else (middle, high)
    return high
