"""Intervals and tests for paired differences. Pure: numbers in, numbers out, numpy and scipy alone."""

import math
from collections.abc import Iterator

import numpy as np
from scipy import stats


def resample(groups: list, resamples: int, seed: int) -> tuple[np.ndarray, Iterator, tuple[float, float]]:
    """Bootstrap samples of groups: (group of each row, how often each group is drawn, percentiles of a 95 % interval).

    The first has shape (rows,) and counts from 0; the second comes in portions of shape (up to 1000, groups).

    The bootstrap's spread is too small by sqrt((n - 1) / n) and has no Student's tails: wider percentiles make up for
    both (Hesterberg 2015, "expanded percentile").
    """
    # a group is drawn with all its rows: near-duplicates are no independent observations
    index = {group: n for n, group in enumerate(dict.fromkeys(groups))}
    place, n = np.array([index[group] for group in groups]), len(index)
    # t's quantile, widened for the bootstrap's divisor n, as the normal tail that percentiles would cut
    tail = 100 * stats.norm.sf(stats.t.ppf(0.975, max(n - 1, 1)) * math.sqrt(n / max(n - 1, 1)))
    random = np.random.default_rng(seed)
    drawn = (
        random.multinomial(n, np.full(n, 1 / n), min(1000, resamples - start))
        for start in range(0, resamples, 1000)  # in portions, so that memory does not grow with the test split
    )
    return place, drawn, (float(tail), float(100 - tail))


def compare(
    a: np.ndarray, b: np.ndarray, weight: np.ndarray, groups: list, resamples: int, seed: int, pairs: int = 1
) -> dict:
    """Difference a - b of two models on the same rows, with a 95 % interval and a two-sided p-value.

    a, b: numerators per row (nll in nats, or a score), shape (rows,); weight: their common denominators (tokens, or
    1); the difference is sum(a - b) / sum(weight). groups: rows with the same question are drawn together. The
    interval is the studentised bootstrap over groups (Efron and Tibshirani 1993, chapter 12.5), which follows skewed
    differences where percentiles do not; with fewer than 10 groups Student's t. The p-value is the larger one of that
    bootstrap's and of a sign-flip permutation test over groups (Fisher 1935), so that few groups cannot show anything.
    Identical models give a difference of exactly 0 and p = 1. smallest_detectable: the difference that a comparison of
    so many groups, with this spread, would find in four of five cases at a level of 5 % / pairs, two-sided: (t + 0.84)
    standard errors (Cohen 1988).
    Raises: ValueError for a value that is no finite number, or for a single group, which has no spread.
    """
    place, drawn, _ = resample(groups, resamples, seed)
    n = int(place.max()) + 1
    # from here on a group is one observation: the sum of its differences, and of its weights
    d, w = np.bincount(place, a - b, n), np.bincount(place, weight, n).astype(float)
    if n < 2 or not np.isfinite(d).all() or not w.sum() > 0:
        raise ValueError(f"cannot compare {n} groups with differences that sum to {d.sum()}")
    observed, fewer = d.sum() / w.sum(), n / (n - 1)
    # the standard error of a ratio of sums, linearised (delta method)
    error = math.sqrt(fewer * np.square(d - observed * w).sum()) / w.sum()
    error = 0.0 if error <= 1e-12 * abs(observed) else error  # rounding of what is constant
    beyond = stats.norm.ppf(0.8) + stats.t.ppf(1 - 0.025 / pairs, n - 1)
    # under 10 groups a bootstrap has too few different samples, and without a spread it has none
    if n < 10 or not error:
        reach = stats.t.ppf(0.975, n - 1) * error
        low, high = observed - reach, observed + reach
        p = float(2 * stats.t.sf(abs(observed) / error, n - 1)) if error else float(not observed)
    else:
        e, sampled = d - observed * w, []  # centred: less is lost when squares are subtracted
        # each sample's own t: its distance from the observed difference, in its own standard errors
        for times in drawn:
            total, squares = times @ w, times @ np.square(e)
            off = (times @ e) / total  # the sample's difference less the observed one
            spread = squares - 2 * off * (times @ (e * w)) + np.square(off) * (times @ np.square(w))
            spread[spread <= 1e-12 * squares] = np.nan  # rounding of what is constant
            sampled.append(off / (np.sqrt(fewer * spread) / total))
        t = np.concatenate(sampled)
        t = t[np.isfinite(t)]
        # the ends swap: where samples run too high, the truth lies lower
        upper, lower = np.percentile(t, [97.5, 2.5])
        low, high = observed - upper * error, observed - lower * error
        # how many samples lie as far out as zero does; + 1 counts the observed one among them
        beside = min((t >= observed / error).sum(), (t <= observed / error).sum())
        p = min(1.0, 2 * (beside + 1) / (len(t) + 1))
    return {
        "difference": float(observed),
        "ci95": [float(low), float(high)],
        "p_value": max(p, sign_flip_p(d, resamples, seed)),
        "n": len(groups),
        "groups": n,
        "smallest_detectable": float(beyond * error),
    }


def sign_flip_p(difference: np.ndarray, resamples: int, seed: int) -> float:
    """p-value of a sign-flip permutation test (Fisher 1935) of differences per group, shape (groups,)."""
    random, as_large, n = np.random.default_rng([seed, 1]), 0, len(difference)
    # without a difference between the models, each group's sign is a coin
    for start in range(0, resamples, 1000):
        signs = random.integers(0, 2, (min(1000, resamples - start), n)) * 2 - 1
        as_large += (np.abs(signs @ difference) >= abs(difference.sum()) * (1 - 1e-12)).sum()
    return float((as_large + 1) / (resamples + 1))


def holm(p_values: list[float]) -> list[float]:
    """p-values of one family of tests, adjusted for their number (Holm 1979), in the same order."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = running
    return adjusted


def shows(comparison: dict) -> bool:
    """Whether a difference shows: its 95 % interval excludes 0 and Holm's adjusted p is below 0.05."""
    low, high = comparison["ci95"]
    return not low <= 0 <= high and comparison["p_value"] < 0.05


# --- win rates


def win_rate(
    outcomes: np.ndarray, lengths: np.ndarray, groups: list, resamples: int, seed: int
) -> dict[str, float | list]:
    """(wins + ties / 2) / n with its 95 % interval, raw and as if both answers were equally long.

    outcomes: 1 win, 0.5 tie, 0 loss, shape (n,); lengths: words of the own answer less those of the other's. The
    adjusted rate is that of a logistic regression on tanh(length difference / its standard deviation) at 0, as in
    AlpacaEval 2 (Dubois et al. 2024) without its term for the instruction; None where the data cannot tell: fewer than
    5 wins or 5 losses, or all answers of one model longer. Intervals: bootstrap by prompt; where all outcomes are
    alike there is nothing to resample, and they are exact (Clopper and Pearson 1934).
    """
    place, drawn, percentiles = resample(groups, resamples, seed)
    n = int(place.max()) + 1
    # without wins, losses, longer and shorter answers, the data cannot tell length from quality
    equal = not lengths.any()
    told = min(outcomes.sum(), (1 - outcomes).sum()) >= 5 and lengths.min() < 0 < lengths.max()
    x = np.tanh(lengths / lengths.std()) if told else np.zeros(len(lengths))
    raw, adjusted = [], []
    for times in drawn:
        weight = times[:, place].astype(float)
        raw.append(weight @ outcomes / weight.sum(1))
        if told:
            adjusted.append(rate_at_equal_length(x, outcomes, weight))
    ci95 = np.percentile(np.concatenate(raw), percentiles).tolist()
    if len(set(outcomes.tolist())) == 1 and outcomes[0] != 0.5:
        exact = stats.binomtest(n if outcomes[0] else 0, n).proportion_ci(0.95, "exact")
        ci95 = [float(exact.low), float(exact.high)]
    rate, adjusted_rate, adjusted_ci = float(outcomes.mean()), None, None
    if told:
        adjusted_rate = float(rate_at_equal_length(x, outcomes, np.ones((1, len(x))))[0])
        adjusted_ci = np.percentile(np.concatenate(adjusted), percentiles).tolist()
    elif equal:
        adjusted_rate, adjusted_ci = rate, ci95
    return {
        "win_rate": rate,
        "ci95": ci95,
        "length_adjusted": adjusted_rate,
        "length_adjusted_ci95": adjusted_ci,
        "wins": int((outcomes == 1).sum()),
        "ties": int((outcomes == 0.5).sum()),
        "losses": int((outcomes == 0).sum()),
        "n": len(outcomes),
    }


def rate_at_equal_length(x: np.ndarray, outcomes: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Intercepts of weighted logistic regressions of outcomes on x, shape (samples,), as probabilities.

    weight: shape (samples, n). Newton's method for all samples at once; a ridge of 0.1 rows on the slope, and a
    hundredth of that on the intercept, keep separable samples finite.
    """
    a, b, ridge = np.zeros(len(weight)), np.zeros(len(weight)), 0.1
    for _ in range(30):
        p = 1 / (1 + np.exp(-(a[:, None] + b[:, None] * x)))
        # gradient and curvature of the log-likelihood, the ridge included
        miss, curve = weight * (outcomes - p), weight * p * (1 - p)
        ga, gb = miss.sum(1) - ridge / 100 * a, miss @ x - ridge * b
        aa, ab, bb = curve.sum(1) + ridge / 100, curve @ x, curve @ (x * x) + ridge
        det = aa * bb - ab * ab
        # a Newton step, cut to 2 so that the first ones cannot run away
        step = np.clip([(bb * ga - ab * gb) / det, (aa * gb - ab * ga) / det], -2, 2)
        a, b = a + step[0], b + step[1]
        if np.abs(step).max() < 1e-6:
            break
    return 1 / (1 + np.exp(-a))
