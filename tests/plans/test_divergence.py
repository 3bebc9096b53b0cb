"""Where two runs part."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_unsafe_routes import RouteError
from vllm_unsafe_routes.divergence import compare_logprobs, compare_routes

IDS = np.arange(24).reshape(4, 3, 2) % 8


def changed(*cells):
    ids = IDS.copy()
    for token, slot, row in cells:
        ids[token, slot] = row
    return ids


def test_the_first_token_and_its_first_layer_are_named():
    found = compare_routes(IDS, changed((2, 0, [0, 7]), (1, 2, [6, 7]), (1, 1, [1, 5])), (3, 5, 9))
    assert (found.position, found.layer, found.experts) == (1, 5, ((0, 1), (1, 5)))
    assert (found.compared, found.differing) == (12, 3)
    assert found.by_layer == {3: 0.25, 5: 0.25, 9: 0.25}


def test_the_order_of_experts_is_no_difference():
    found = compare_routes(IDS, IDS[..., ::-1], (0, 1, 2))
    assert (found.differing, found.position, found.compared) == (0, None, 12)


def test_only_what_both_know_is_compared():
    found = compare_routes(changed((0, 0, [-1, -1])), changed((0, 0, [0, 7]), (3, 2, [0, 3])), (0, 1, 2))
    assert (found.compared, found.differing, found.position, found.layer) == (11, 1, 3, 2)


def test_starts_are_positions():
    found = compare_routes(IDS, changed((3, 1, [0, 3]))[2:], (0, 1, 2), (10, 12))
    assert (found.compared, found.position, found.layer) == (6, 13, 1)
    with pytest.raises(RouteError, match="no position in common: 0-3 and 4-7"):
        compare_routes(IDS, IDS, (0, 1, 2), (0, 4))
    with pytest.raises(RouteError, match="are not those of 3 layers of one model"):
        compare_routes(IDS, IDS[:, :2], (0, 1, 2))


def test_log_probabilities():
    one = np.array([np.nan, -1.0, -2.0, -np.inf, -3.0])
    other = np.array([-5.0, -1.0005, -2.1, -np.inf, -3.5])
    found = compare_logprobs(one, other, 1e-3)
    assert (found.compared, found.differing, found.token, found.values) == (4, 2, 2, (-2.0, -2.1))
    assert found.largest == pytest.approx(0.5) and found.mean == pytest.approx(0.6005 / 4)
    assert compare_logprobs(one, other, 1.0).token is None
    with pytest.raises(RouteError, match="are not those of one list of tokens"):
        compare_logprobs(one, other[:2], 1e-3)
    with pytest.raises(RouteError, match="no token has a log-probability in both"):
        compare_logprobs(one[:1], other[:1], 1e-3)
