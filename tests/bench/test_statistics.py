"""Intervals and tests against numbers worked out by hand."""

import math

import numpy as np
import pytest

from benchmarks.check import expected_order
from benchmarks.statistics import holm, mean_interval, mean_log_ratio, paired_p
from benchmarks.timing import Ratio, paired_ratios


def test_interval_holds_the_mean_and_stays_within_the_data():
    mean, low, high = mean_interval([1.0, 2.0, 3.0, 4.0, 10.0])
    assert mean == 4.0
    assert 1.0 <= low < mean < high <= 10.0
    assert mean_interval([1.0, 2.0, 3.0, 4.0, 10.0]) == (mean, low, high)  # seeded


def test_interval_of_two_values_is_their_range():
    # A resample of {0, 1} has mean 0, 1/2 or 1 with probabilities 1/4, 1/2, 1/4: both tails exceed 2.5 %.
    assert mean_interval([0.0, 1.0]) == (0.5, 0.0, 1.0)


def test_a_diverged_seed_makes_the_mean_infinite():
    assert mean_interval([1.0, math.inf])[0] == math.inf


@pytest.mark.parametrize(("values", "mean"), [([1.0, 2.0, math.inf], math.inf), ([2.0, 2.0, 2.0], 2.0), ([3.0], 3.0)])
def test_values_without_a_spread_have_no_interval(values, mean):
    assert mean_interval(values) == (mean, mean, mean)


def test_paired_p_by_hand():
    # Differences of logarithms 1, 2, 3: mean 2, deviation 1, t = 2 sqrt(3) with two degrees of freedom. The two-sided p
    # of Student's t with two degrees of freedom is 1 - t / sqrt(t^2 + 2).
    t = 2 * math.sqrt(3)
    p = paired_p(np.exp([1.0, 2.0, 3.0]), [1.0, 1.0, 1.0])
    assert p == pytest.approx(1 - t / math.sqrt(t**2 + 2))


@pytest.mark.parametrize("values", [[1.0], [1.0, math.inf], [0.0, 1.0], [2.0, 2.0]])
def test_paired_p_refuses_what_says_nothing(values):
    assert paired_p(values, [1.0] * len(values)) is None


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("value", [math.inf, math.nan, 0.0])
def test_paired_p_refuses_one_spoiled_value_on_either_side(place, value):
    losses = [1.0, 2.0, 4.0]
    losses[place] = value
    assert paired_p(losses, [1.0, 1.0, 2.0]) is None
    assert paired_p([1.0, 1.0, 2.0], losses) is None


def test_ratio_interval_of_fifteen_turns_runs_from_the_fourth_to_the_twelfth():
    # P(4 <= number of turns above the true median <= 11) = 0.965 for a binomial(15, 1/2).
    ratio = Ratio.of(np.arange(1.0, 16.0))
    assert (ratio.value, ratio.low, ratio.high) == (8.0, 4.0, 12.0)


def test_steps_take_turns_and_the_first_round_does_not_count():
    calls = []
    seconds = paired_ratios(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, {"a": 2, "b": 1}, turns=2, label="test"
    )
    assert "".join(calls) == "baa" + "aab" + "baa"
    assert all(len(values) == 2 for values in seconds.values())


def test_only_separate_intervals_have_an_order():
    import pandas as pd

    frame = pd.DataFrame({"contestant": ["a", "b", "c"], "train loss": [1.0, 2.0, 4.0], "train low": [0.9, 1.4, 3.0],
                          "train high": [1.5, 2.5, 5.0]})  # fmt: skip
    assert expected_order(frame) == [("a", "c"), ("b", "c")]


def test_bootstrap_of_five_seeds_covers_less_than_it_says():
    # Chapter 13: about P(|t_4| <= 1.96 sqrt(4/5)) = 0.846. 400 trials resolve it to 0.018; five deviations are allowed.
    samples = np.random.default_rng(0).normal(size=(400, 5))
    covered = np.mean([low <= 0 <= high for _, low, high in map(mean_interval, samples)])
    assert abs(covered - 0.846) < 5 * 0.018


def test_a_factor_that_seeds_share_changes_no_pair():
    rng = np.random.default_rng(0)
    ours, theirs, shared = np.exp(rng.normal(size=(3, 5)))
    assert paired_p(shared * ours, shared * theirs) == pytest.approx(paired_p(ours, theirs), rel=1e-9)


def test_holm_by_hand():
    # Sorted: .01 x 3, .02 x 2, .04 x 1 = .03, .04, .04.
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.01, None]) == [0.02, None]  # a comparison that could not be made was one all the same
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_ratio_of_geometric_means_by_hand():
    ratio, low, high = mean_log_ratio([2.0, 8.0], [1.0, 1.0])
    assert ratio == pytest.approx(4.0)
    # Two logarithms, mean ln 4 and deviation ln 4 / sqrt 2: t with one degree of freedom is 12.706.
    half = 12.7062 * math.log(4) / math.sqrt(2) / math.sqrt(2)
    assert (low, high) == pytest.approx((4.0 * math.exp(-half), 4.0 * math.exp(half)), rel=1e-4)
    assert mean_log_ratio([1.0], [2.0])[0] == 0.5
    assert all(math.isnan(value) for value in mean_log_ratio([1.0, math.inf], [1.0, 1.0]))
