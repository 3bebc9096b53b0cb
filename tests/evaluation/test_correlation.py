"""Rank correlation: known values, ties, and an interval that holds what it should."""

import numpy as np
import pytest

from vllm_unsafe_routes import RouteError
from vllm_unsafe_routes.evaluation.correlation import rank_correlation


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(1, 10), (2, 11), (3, 90)], 1.0),
        ([(1, 3), (2, 2), (3, 1), (4, 0)], -1.0),
        # scipy.stats.spearmanr of the same values.
        ([(106, 7), (100, 27), (86, 2), (101, 50), (99, 28), (103, 29), (97, 20), (113, 12), (112, 6), (110, 17)], -0.17575757575),
        ([(1, 0), (2, 1), (3, 1), (4, 0), (5, 1)], 0.28867513459),
    ],
)
def test_known_values(pairs, expected):
    found = rank_correlation(pairs, resamples=200)
    assert found.value == pytest.approx(expected, abs=1e-9)
    assert found.low <= found.value <= found.high
    assert (found.n_prompts, found.n_seeds) == (len(pairs), 1)


def test_the_interval_holds_the_truth():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(40):
        first = rng.normal(size=24)
        # Independent of the first: the truth is 0.
        found = rank_correlation(list(zip(first, rng.normal(size=24), strict=True)), resamples=200)
        held += found.low <= 0 <= found.high
    assert held >= 34


@pytest.mark.parametrize("pairs", [[(1, 2), (2, 3)], [(1, 5), (2, 5), (3, 5)], [(1, 2), (2, float("nan")), (3, 4)]])
def test_what_has_no_correlation(pairs):
    with pytest.raises(RouteError, match="rank correlation"):
        rank_correlation(pairs)
