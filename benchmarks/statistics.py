"""What a handful of seeds can say: an interval for a mean, and a paired comparison of two methods."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

__all__ = ["holm", "mean_interval", "mean_log_ratio", "paired_p"]


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % percentile bootstrap interval over seeds, seeded; the mean thrice where there is no spread.

    With five seeds a bootstrap interval is too narrow rather than too wide (it covers less than 95 %).
    """
    x = np.asarray(values, dtype=float)
    mean = float(x.mean())
    if len(x) < 2 or not np.isfinite(x).all() or np.ptp(x) == 0:
        return mean, mean, mean
    interval = stats.bootstrap(
        (x,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return mean, float(interval.low), float(interval.high)


def paired_p(losses: Sequence[float], others: Sequence[float]) -> float | None:
    """Two-sided p of "the mean log ratio of losses is zero", paired by seed; None where nothing can be said.

    A paired t-test, because a seed fixes initial weights and data order for both methods, and on logarithms, because
    methods differ by factors. Wilcoxon's signed ranks would assume less, but with five pairs its smallest two-sided p
    is 1/16: it could never be below 0.05.
    """
    a, b = np.asarray(losses, dtype=float), np.asarray(others, dtype=float)
    if len(a) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all() and (a > 0).all() and (b > 0).all()):
        return None
    difference = np.log(a) - np.log(b)
    if np.ptp(difference) == 0:
        return None
    return float(stats.ttest_1samp(difference, 0.0).pvalue)


def mean_log_ratio(losses: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """The ratio of geometric means of losses paired by seed, and its 95 % interval by Student's t on logarithms.

    Equal losses, a single pair, or one that is not finite and positive leave the interval open: not a number.
    """
    a, b = np.asarray(losses, dtype=float), np.asarray(others, dtype=float)
    if not len(a) or not (np.isfinite(a).all() and np.isfinite(b).all() and (a > 0).all() and (b > 0).all()):
        return math.nan, math.nan, math.nan
    difference = np.log(a) - np.log(b)
    if len(a) < 2 or np.ptp(difference) == 0:
        return float(np.exp(difference.mean())), math.nan, math.nan
    interval = stats.ttest_1samp(difference, 0.0).confidence_interval(0.95)
    return float(np.exp(difference.mean())), float(np.exp(interval.low)), float(np.exp(interval.high))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction (1979) for as many comparisons as there are p; None stays None and counts too.

    The k-th smallest of n is multiplied by n - k + 1, and no corrected p is below one that was smaller before.
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None and not math.isnan(p))
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for k, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(p_values) - k)))
        corrected[i] = largest
    return corrected
