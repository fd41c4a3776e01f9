"""Sessions that depend on those before: how wide their intervals must be, and whether the error rate then holds."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from kdexport.stats.dependence import BLOCK, MOST, lag_correlation, widening
from kdexport.stats.sequential import LOOKS, sequential

LIMIT = math.log(1.02)
SESSIONS = 60


def correlated(count: int, length: int, rho: float, seed: int) -> NDArray[np.float64]:
    """(count,length) stationary sessions of deviation 0.02, each correlated by ``rho`` with the one before."""
    from scipy.signal import lfilter

    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((count, length))
    noise[:, 1:] *= math.sqrt(1 - rho * rho)
    drawn: NDArray[np.float64] = lfilter([1.0], [1.0, -rho], noise, axis=1)
    return 0.02 * drawn


def test_the_widening_is_the_f_statistic_over_its_quantile() -> None:
    values = correlated(1, SESSIONS, 0.7, 1)[0]
    found = stats.f_oneway(*values.reshape(-1, BLOCK))
    assert found.statistic > 2
    quantile = stats.f.ppf(0.1, 9, 50)
    assert widening(values) == pytest.approx(math.sqrt(found.statistic / quantile))
    # Values beyond the last whole block are not used.
    assert widening([*values, 5.0, -5.0]) == widening(values)


def test_the_correlation_is_that_of_neighbours() -> None:
    for rho in (-0.5, 0.0, 0.8):
        assert lag_correlation(correlated(1, 5000, rho, 3)[0]) == pytest.approx(rho, abs=0.05)
    assert lag_correlation([0.5] * 4) == 0.0
    assert lag_correlation([1.0, -1.0] * 10) == pytest.approx(-0.95)


def test_blocks_without_a_spread_give_the_ends_of_the_range() -> None:
    assert widening([0.1] * 12) == 1.0
    assert widening([0.1] * 6 + [0.2] * 6) == MOST
    # Alternating sessions: their mean varies less than that of independent ones.
    assert widening([0.1, -0.1] * 30) == 1.0


@pytest.mark.parametrize("values", [[0.0] * 11, [math.nan] * 12, [math.inf] + [0.0] * 11, [[0.0] * 12] * 12])
def test_too_few_or_infinite_values_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite values"):
        widening(values)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.5, 0.8])
def test_the_stated_error_rate_holds_for_sessions_that_depend_on_each_other(rho: float) -> None:
    # A machine is calibrated once, and gates run on it later: every simulated gate has a calibration of its own.
    machines, gates = 400, 10
    wrong = unprotected = 0
    for index, sessions in enumerate(correlated(machines, SESSIONS, rho, 11)):
        draws = LIMIT + correlated(gates, LOOKS[-1], rho, 1000 + index)
        verdicts, _ = sequential(draws, LIMIT, widening=widening(sessions))
        wrong += int((verdicts == "FAIL").sum())
        unprotected += int((sequential(draws, LIMIT)[0] == "FAIL").sum())
    # 1.2 % is stated, for the worst case of a ratio on the limit; four standard errors of 4,000 gates are 0.7 %.
    assert wrong / (machines * gates) <= 0.019
    if rho == 0.8:
        assert unprotected / (machines * gates) > 0.2
