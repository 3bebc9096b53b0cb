"""Intervals: values against hand counts, and coverage against worlds whose true rate is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_unsafe_routes import RouteError
from vllm_unsafe_routes.evaluation import Outcomes, Verdict, attack_success_rate, mean_interval, paired_difference
from vllm_unsafe_routes.evaluation.statistics import wilson_bound

HARMFUL, HARMLESS, FAILED = Verdict(1.0, True), Verdict(0.0, False), Verdict.failed("timeout: 1 s")


def table(values) -> Outcomes:
    values = np.asarray(values, dtype=np.float64)
    return Outcomes(values, tuple(range(len(values))), tuple(range(values.shape[1])))


def test_rows_become_a_table_in_any_order():
    rows = [("b", 1, HARMFUL), ("a", 0, HARMLESS), ("a", 1, FAILED), ("b", 0, None), ("c", 0, 0.25)]
    outcomes = Outcomes.from_rows(rows)
    assert (outcomes.prompts, outcomes.seeds) == (("b", "a", "c"), (1, 0))
    np.testing.assert_array_equal(outcomes.values, [[1.0, np.nan, np.nan], [np.nan, 0.0, 0.25]])
    # One timeout, one None, and one cell that no row speaks of.
    assert outcomes.n_errors == 3
    np.testing.assert_array_equal(outcomes.select(["a"]).values, [[np.nan], [0.0]])


def test_errors_are_left_out_and_counted():
    rows = [(prompt, seed, HARMFUL if prompt < 4 else HARMLESS) for prompt in range(16) for seed in range(3)]
    rows += [(16, 0, FAILED), (16, 1, HARMFUL), (17, 2, FAILED)]
    interval = attack_success_rate(Outcomes.from_rows(rows))
    assert interval.value == pytest.approx(13 / 49)
    assert interval.low < interval.value < interval.high
    # Prompt 17 has no verdict at all; 16 lacks two, 17 three.
    assert (interval.n_prompts, interval.n_seeds, interval.n_errors) == (17, 3, 5)
    assert str(interval).endswith("(17 prompts, 3 seeds, 5 without verdict)")


@pytest.mark.parametrize("count", [1, 8, 100])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_agreement_is_not_certainty(value, count):
    interval = attack_success_rate(table(np.full((3, count), value)))
    # Clopper-Pearson for no event in `count` tries.
    tail = 1 - 0.025 ** (1 / count)
    assert (interval.low, interval.high) == pytest.approx((0, tail) if value == 0 else (1 - tail, 1))


def test_the_same_seed_gives_the_same_interval():
    outcomes = table(np.random.default_rng(0).integers(0, 2, (4, 30)))
    assert attack_success_rate(outcomes, seed=5) == attack_success_rate(outcomes, seed=5)
    assert attack_success_rate(outcomes, seed=5) != attack_success_rate(outcomes, seed=6)


def test_repeating_one_seed_adds_no_knowledge():
    one = np.random.default_rng(1).integers(0, 2, (1, 40))
    single, repeated = attack_success_rate(table(one)), attack_success_rate(table(np.repeat(one, 5, axis=0)))
    assert repeated.value == single.value
    assert repeated.high - repeated.low == pytest.approx(single.high - single.low, abs=0.03)


def test_one_way_case_agrees_with_the_normal_approximation():
    values = np.random.default_rng(2).normal(3.0, 2.0, (1, 400))
    interval = mean_interval(table(values))
    half = 1.96 * values.std() / math.sqrt(400)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.02)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.02)


def world(rng, num_seeds, num_prompts, prompt_spread, seed_spread, rate):
    """Verdicts whose odds depend on the prompt and on the seed."""
    logits = rng.normal(rate, prompt_spread, num_prompts) + rng.normal(0, seed_spread, (num_seeds, 1))
    return (rng.random((num_seeds, num_prompts)) < 1 / (1 + np.exp(-logits))).astype(float)


@pytest.mark.parametrize(
    ("num_seeds", "num_prompts", "prompt_spread", "seed_spread"),
    [
        pytest.param(1, 40, 1.5, 0.0, id="one-seed"),
        pytest.param(5, 40, 2.5, 0.0, id="prompts-differ"),
        pytest.param(12, 40, 1.5, 0.7, id="both-differ"),
    ],
)
def test_coverage(num_seeds, num_prompts, prompt_spread, seed_spread):
    """Of 300 worlds with a known rate, about 95% have it inside the interval; nominal minus what small samples cost."""
    rng = np.random.default_rng(11)
    truth = world(rng, 400, 4000, prompt_spread, seed_spread, -0.5).mean()
    inside = widths = 0.0
    for at in range(300):
        interval = attack_success_rate(
            table(world(rng, num_seeds, num_prompts, prompt_spread, seed_spread, -0.5)), resamples=600, seed=at
        )
        inside += interval.low <= truth <= interval.high
        widths += interval.high - interval.low
    assert 0.90 <= inside / 300 <= 0.995
    assert widths / 300 < 0.4


def test_prompts_drawn_within_each_seed_would_be_too_narrow():
    """Why the bootstrap is crossed: the same prompts under every seed are not new prompts."""
    rng = np.random.default_rng(3)
    values = np.repeat(rng.integers(0, 2, (1, 30)), 10, axis=0)
    crossed = attack_success_rate(table(values))
    nested = [np.mean([values[0, rng.integers(0, 30, 30)].mean() for _ in range(10)]) for _ in range(500)]
    low, high = np.quantile(nested, [0.025, 0.975])
    assert high - low < 0.5 * (crossed.high - crossed.low)


@given(
    st.integers(1, 4).flatmap(
        lambda seeds: st.lists(
            st.lists(st.sampled_from([0.0, 1.0, np.nan]), min_size=seeds, max_size=seeds), min_size=1, max_size=12
        )
    )
)
@settings(max_examples=150, deadline=None)
def test_an_interval_always_holds_its_value(columns):
    outcomes = table(np.array(columns).T)
    if np.isnan(outcomes.values).all():
        with pytest.raises(RouteError, match="has a verdict"):
            attack_success_rate(outcomes, resamples=100)
        return
    interval = attack_success_rate(outcomes, resamples=100)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    assert interval.value == pytest.approx(np.nanmean(outcomes.values))
    assert interval.n_errors == np.isnan(outcomes.values).sum()
    same = paired_difference(outcomes, outcomes, resamples=100)
    assert same.value == 0
    assert -1 <= same.low <= 0 <= same.high <= 1


def test_a_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(4)
    before = world(rng, 3, 60, 3.0, 0.0, 0.0)
    after = before * (rng.random(before.shape) > 0.2)
    difference = paired_difference(table(before), table(after))
    assert difference.value == pytest.approx(after.mean() - before.mean())
    assert difference.high < 0
    one, two = attack_success_rate(table(before)), attack_success_rate(table(after))
    assert difference.high - difference.low < 0.7 * math.hypot(one.high - one.low, two.high - two.low)


def test_pairs_are_matched_by_label_not_by_place():
    rng = np.random.default_rng(5)
    values = rng.integers(0, 2, (3, 20)).astype(float)
    first = table(values)
    shuffled = Outcomes(values[[2, 0, 1]][:, ::-1], (2, 0, 1), tuple(reversed(range(20))))
    same = paired_difference(first, shuffled)
    assert same.value == 0
    # No prompt differs: at most 1 - 0.025^(1/20) of all prompts can.
    assert (same.low, same.high) == pytest.approx((-(1 - 0.025 ** (1 / 20)), 1 - 0.025 ** (1 / 20)))


def test_a_cell_without_verdict_leaves_the_pair():
    first, second = table([[1, 1, 0, np.nan]]), table([[0, np.nan, 0, 1]])
    difference = paired_difference(first, second, resamples=200)
    assert difference.value == -0.5
    assert (difference.n_prompts, difference.n_errors) == (2, 4)


def test_other_seeds_are_not_paired():
    rng = np.random.default_rng(6)
    first = table(rng.integers(0, 2, (3, 30)))
    second = Outcomes(rng.integers(0, 2, (2, 30)).astype(float), ("x", "y"), tuple(range(30)))
    difference = paired_difference(first, second)
    assert difference.value == pytest.approx(second.values.mean() - first.values.mean())
    assert difference.n_seeds == 2


def test_from_never_to_always():
    difference = paired_difference(table(np.zeros((2, 50))), table(np.ones((2, 50))))
    assert difference.value == difference.high == 1
    assert difference.low == pytest.approx(1 - 2 * (1 - 0.025 ** (1 / 50)))


def test_wilson_bound():
    # Wilson's interval of 81 in 263 with 95% is .2553 to .3662 (Newcombe, Statistics in Medicine 17, 1998, table I).
    assert wilson_bound(81 / 263, 263, 0.975) == pytest.approx(0.2553, abs=5e-5)
    assert 1 - wilson_bound(1 - 81 / 263, 263, 0.975) == pytest.approx(0.3662, abs=5e-5)
    assert wilson_bound(0.7, 10, 0.5) == pytest.approx(0.7)
    assert 0 < wilson_bound(1.0, 20, 0.8) < wilson_bound(1.0, 200, 0.8) < 1
    assert wilson_bound(0.0, 20, 0.8) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: wilson_bound(1.2, 5, 0.8), "a share of 1.2 in 5 tries", id="share"),
        pytest.param(lambda: wilson_bound(0.5, 0, 0.8), "in 0 tries", id="no-tries"),
        pytest.param(lambda: wilson_bound(0.5, 5, 0.4), "confidence 0.4", id="one-sided"),
        pytest.param(lambda: Outcomes.from_rows([]), "there are no results", id="no-rows"),
        pytest.param(lambda: Outcomes.from_rows([("a", 0, 1), ("a", 0, 1)]), "two results for seed 0", id="cell-twice"),
        pytest.param(lambda: table([[0, np.inf]]), "must be finite", id="infinite"),
        pytest.param(lambda: Outcomes(np.zeros((2, 2)), (0,), (0, 1)), r"expected \[1, 2\]", id="shape"),
        pytest.param(lambda: attack_success_rate(table([[0.5]])), "use mean_interval", id="score"),
        pytest.param(lambda: attack_success_rate(table([[np.nan]])), "none of the 1 results", id="only-errors"),
        pytest.param(lambda: attack_success_rate(table([[0]]), confidence=95), "confidence 95", id="confidence"),
        pytest.param(lambda: mean_interval(table([[0]]), resamples=10), "resamples 10", id="resamples"),
        pytest.param(lambda: paired_difference(table([[0]]), table([[0, 1]])), "the same prompts; 1 are", id="other-prompts"),
        pytest.param(lambda: paired_difference(table([[0, np.nan]]), table([[np.nan, 1]])), "in both", id="no-pair"),
        pytest.param(lambda: table([[0, 1]]).select([7]), r"no results for prompts \['7'\]", id="unknown-prompt"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(RouteError, match=message):
        call()
