"""What a handful of seeds can say: an interval for a mean, and a paired comparison of two methods."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

__all__ = ["mean_interval", "paired_p"]


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
