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
    1); the difference is sum(a - b) / sum(weight). groups: rows with the same question are drawn together. Each end of
    the interval is the outer one of the studentised bootstrap over groups (Efron and Tibshirani 1993, chapter 12.5),
    which follows skewed differences, and of Student's t, since the bootstrap collapses where few groups differ; with
    fewer than 6 groups Student's t alone. The p-value is the largest one of these and of a sign-flip permutation test
    over groups (Fisher 1935), so that few groups cannot show anything. Identical models give a difference of exactly 0
    and p = 1. smallest_detectable: the difference that a comparison of so many groups, with this spread, would find in
    four of five cases at a level of 5 % / pairs, two-sided: (t + 0.84) standard errors (Cohen 1988); None with fewer
    than 10 groups, whose spread is hardly known. error: the standard error. effective_groups: (sum of weights)^2 / sum
    of squared weights (Kish 1965), fewer than groups where some weigh more than others.
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
    reach = stats.t.ppf(0.975, n - 1) * error
    low, high = observed - reach, observed + reach
    p = float(2 * stats.t.sf(abs(observed) / error, n - 1)) if error else float(not observed)
    # under 6 groups a bootstrap has too few different samples, and without a spread it has none
    if n >= 6 and error:
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
        low, high = min(low, observed - upper * error), max(high, observed - lower * error)
        # how many samples lie as far out as zero does; + 1 counts the observed one among them
        beside = min((t >= observed / error).sum(), (t <= observed / error).sum())
        p = max(p, min(1.0, 2 * (beside + 1) / (len(t) + 1)))
    return {
        "difference": float(observed),
        "ci95": [float(low), float(high)],
        "p_value": max(p, sign_flip_p(d, resamples, seed)),
        "n": len(groups),
        "groups": n,
        "effective_groups": effective_number(weight, groups),
        "smallest_detectable": float(beyond * error) if n >= 10 else None,
        "error": float(error),
    }


def effective_number(weight: np.ndarray, groups: list) -> float:
    """(sum of weights)^2 / sum of squared weights, over groups (Kish 1965): how many equal ones would tell as much."""
    place, _, _ = resample(groups, 1, 0)
    w = np.bincount(place, weight).astype(float)
    return float(w.sum() ** 2 / np.square(w).sum())


def blocks(number: int, of: int = 20) -> list[int]:
    """The block of each of `number` consecutive pieces of a text, so that `of` blocks are observations, not pieces.

    Neighbouring pieces are about the same things, so their losses move together (block bootstrap, Kuensch 1989).
    """
    return [piece * min(of, number) // number for piece in range(number)]


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


def shaffer(p_values: list[float]) -> list[float]:
    """p-values of the three pairs of three models, adjusted for their number (Shaffer 1986), in the same order.

    Of three pairs, none or one or all three are equal: two equal pairs would make the third one equal. So after the
    smallest p-value, which counts three times, only one more can be false, and the others count once. Any other number
    of pairs is adjusted as Holm does.
    """
    if len(p_values) != 3:
        return holm(p_values)
    order = sorted(range(3), key=lambda i: p_values[i])
    adjusted, running = [0.0] * 3, 0.0
    for times, i in zip((3, 1, 1), order, strict=True):
        running = max(running, min(1.0, p_values[i] * times))
        adjusted[i] = running
    return adjusted


def shows(comparison: dict) -> bool:
    """Whether a difference shows: its 95 % interval excludes 0 and Holm's adjusted p is below 0.05."""
    low, high = comparison["ci95"]
    return not low <= 0 <= high and comparison["p_value"] < 0.05


# --- several runs of each method


def means(runs: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The value of each run, shape (runs,): sum over rows of `runs`, shape (runs, rows), over the sum of `weight`."""
    return runs.sum(axis=1) / weight.sum()


def seed_part(arms: list[np.ndarray]) -> tuple[float, float]:
    """(variance, degrees of freedom) that the seeds give to a sum or difference of arms' means.

    arms: the value of each run, shape (runs,), at least two; an arm without seeds, as a base model, is left out.
    Variance: the sum over arms of s^2 / runs; degrees of freedom: Satterthwaite (1946), infinite without any spread.
    """
    parts = [(float(np.var(values, ddof=1)) / len(values), len(values) - 1) for values in arms]
    variance = sum(part for part, _ in parts)
    squares = sum(part**2 / df for part, df in parts)
    return variance, variance**2 / squares if squares else math.inf


def compare_runs(
    a: np.ndarray, b: np.ndarray, weight: np.ndarray, groups: list, resamples: int, seed: int, pairs: int = 1
) -> dict:
    """Difference a - b of two methods, each trained with several seeds, with a 95 % interval over rows and seeds.

    a, b: numerators per run and row, shapes (runs of a, rows) and (runs of b, rows), or (rows,) for a base model that
    has no seeds; weight, groups, pairs: as in `compare`. The interval of the rows, from `compare` on the means over
    runs, (l, u), and that of the seeds, +- h = t sqrt(V) (`seed_part`), are joined by MOVER (Zou and Donner 2008):
    [d - sqrt((d - l)^2 + h^2), d + sqrt((u - d)^2 + h^2)]. The p-value is at least that of a t-test on both variances.
    Adds to compare's result: rows_ci95 and row_error, seed_error, runs, and `helps`: "seeds" or "rows", the larger
    part of the variance. Raises: ValueError for a method with a single run, whose spread is unknown.
    """
    arms = [np.atleast_2d(np.asarray(x, float)) for x in (a, b)]
    given = [arm for x, arm in zip((a, b), arms, strict=True) if np.ndim(x) == 2]
    if any(len(arm) < 2 for arm in given):
        raise ValueError("a single run tells nothing about the spread between runs")
    result = compare(arms[0].mean(axis=0), arms[1].mean(axis=0), weight, groups, resamples, seed, pairs)
    variance, freedom = seed_part([means(arm, np.asarray(weight)) for arm in given]) if given else (0.0, math.inf)
    difference, (low, high), n = result["difference"], result["ci95"], result["groups"]
    reach = quantile(0.975, freedom) * math.sqrt(variance)
    squares = result["error"] ** 4 / (n - 1) + (variance**2 / freedom if variance else 0.0)
    error = math.sqrt(result["error"] ** 2 + variance)
    both = error**4 / squares if squares else math.inf
    p = float(2 * survival(abs(difference) / error, both)) if error else float(not difference)
    beyond = stats.norm.ppf(0.8) + quantile(1 - 0.025 / pairs, both)
    return result | {
        "ci95": [difference - math.hypot(difference - low, reach), difference + math.hypot(high - difference, reach)],
        "p_value": max(result["p_value"], p),
        "rows_ci95": [low, high],
        "row_error": result["error"],
        "seed_error": math.sqrt(variance),
        "error": error,
        "smallest_detectable": float(beyond * error) if n >= 10 else None,
        "runs": [len(arm) if np.ndim(x) == 2 else 0 for x, arm in zip((a, b), arms, strict=True)],
        "helps": "seeds" if variance > result["error"] ** 2 else "rows",
    }


def quantile(level: float, freedom: float) -> float:
    """Student's t quantile; the normal one where the degrees of freedom are infinite."""
    return float(stats.norm.ppf(level) if math.isinf(freedom) else stats.t.ppf(level, freedom))


def survival(t: float, freedom: float) -> float:
    return float(stats.norm.sf(t) if math.isinf(freedom) else stats.t.sf(t, freedom))


def share_kept(
    base: np.ndarray, lora: np.ndarray, full: np.ndarray, weight: np.ndarray, groups: list, share: float
) -> dict:
    """How much of full fine-tuning's gain over the base LoRA keeps, and whether it keeps at least `share` of it.

    base: nll per row, shape (rows,); lora, full: per run and row, or (rows,) for a single run, whose interval then
    covers the rows alone. rho = (B - L) / (B - F) with its 95 % interval by Fieller (1954), from the variances over
    groups and over seeds; [None, None] where full's gain does not differ from zero. contrast: (1 - share) B + share F
    - L, in nats per token, positive where LoRA keeps more than the share (Holmgren 1999); keeps: whether its 95 %
    interval lies above zero, which is the non-inferiority test at a one-sided level of 2.5 %. full_gains: whether
    full's gain does; without it, a share of it means nothing.
    """
    place, _, _ = resample(groups, 1, 0)
    n, total = int(place.max()) + 1, float(np.sum(weight))
    lora, full = (np.atleast_2d(np.asarray(arm, float)) for arm in (lora, full))
    w = np.bincount(place, weight, n).astype(float)
    b, low, f = (np.bincount(place, x, n) for x in (base, lora.mean(axis=0), full.mean(axis=0)))
    top, bottom = (b - low).sum() / total, (b - f).sum() / total  # LoRA's gain and full's
    u, v = b - low - top * w, b - f - bottom * w
    fewer = n / (n - 1) / total**2
    seeds = [means(x, np.asarray(weight)) for x in (lora, full)]
    var_l, var_f = (float(np.var(x, ddof=1)) / len(x) if len(x) > 1 else 0.0 for x in seeds)
    uu, uv, vv = fewer * (u @ u) + var_l, fewer * (u @ v), fewer * (v @ v) + var_f

    def spread(rho: float) -> tuple[float, float]:
        """(standard error, degrees of freedom) of top - rho x bottom."""
        rows = fewer * np.square(u - rho * v).sum()
        parts = [(rows, n - 1), (var_l, len(lora) - 1), (rho**2 * var_f, len(full) - 1)]
        variance, squares = sum(p for p, _ in parts), sum(p**2 / df for p, df in parts if p)
        return math.sqrt(variance), variance**2 / squares if squares else math.inf

    error, freedom = spread(share)
    t = quantile(0.975, freedom)
    contrast = top - share * bottom
    gain_error = math.sqrt(vv)
    gains = bottom - t * gain_error > 0
    # the values of rho that (top - rho bottom)^2 <= t^2 Var(top - rho bottom) does not rule out
    ends, a = [None, None], bottom**2 - t**2 * vv
    if gains and a > 0:
        half, c = top * bottom - t**2 * uv, top**2 - t**2 * uu
        root = math.sqrt(max(half**2 - a * c, 0.0))
        ends = [(half - root) / a, (half + root) / a]
    return {
        "kept": float(top / bottom) if bottom else None,
        "ci95": ends,
        "share": share,
        "contrast": float(contrast),
        "contrast_ci95": [float(contrast - t * error), float(contrast + t * error)],
        "full_gains": bool(gains),
        "keeps": bool(gains and contrast - t * error > 0),
    }


def at_equal_learning(
    own: tuple[np.ndarray, np.ndarray],
    curve: list[tuple[np.ndarray, np.ndarray]],
    weights: tuple[np.ndarray, np.ndarray],
    groups: tuple[list, list],
    resamples: int,
    seed: int,
) -> dict:
    """How much more one run has forgotten than another method would have where it had learned as much.

    own: (nll of the test rows, nll of the pieces of the general text) of the run; curve: the same of the other method,
    first of the base and then of its runs from the lowest learning rate to the highest; weights and groups: tokens and
    groups of the test rows and of the pieces. What a run has gained is the base's test loss minus its own. The other
    method's loss on the general text is interpolated at the gain of `own`, linearly, on the first stretch of its curve
    that reaches it. The interval is that of a bootstrap over groups of test rows and of pieces at once, so that it
    has the uncertainty of the gains, too; its percentiles are widened as in `resample`. `outside` is true, and nothing
    else is given, where no stretch reaches that gain: the other method never learned as much.
    """
    portions, columns = [], [own, *curve]
    for part in (0, 1):
        place, drawn, tails = resample(groups[part], resamples, seed + part)
        counts = np.vstack([np.ones((1, int(place.max()) + 1)), *drawn])  # the first row is what was observed
        sums = [np.bincount(place, column[part]) for column in columns]
        portions.append(counts @ np.array(sums).T / (counts @ np.bincount(place, weights[part]))[:, None])
    test, text = portions
    gain, forgot = test[:, 1:2] - test, text - text[:, 1:2]
    x, found = gain[:, 0], np.full(len(gain), np.nan)
    for left in range(1, len(columns) - 1):
        low, high = gain[:, left], gain[:, left + 1]
        reached = np.isnan(found) & (np.minimum(low, high) <= x) & (x <= np.maximum(low, high)) & (low != high)
        part = np.divide(x - low, high - low, out=np.zeros_like(x), where=low != high)
        found = np.where(reached, forgot[:, left] + part * (forgot[:, left + 1] - forgot[:, left]), found)
    record = {"gain": float(x[0]), "outside": bool(np.isnan(found[0]))}
    if record["outside"]:
        return record
    # where a sample's curve ends just short of the gain, its furthest point stands for it
    furthest = np.take_along_axis(forgot[:, 1:], gain[:, 1:].argmax(axis=1)[:, None], 1)[:, 0]
    differences = forgot[:, 0] - np.where(np.isnan(found), furthest, found)
    ends = np.percentile(differences[1:], tails)
    return record | {"difference": float(differences[0]), "ci95": [float(end) for end in ends]}


def standing(ci95: list[float], margin: float) -> str:
    """What an interval of a difference in nll (positive: worse) says beside a margin, in nats per token.

    "better", "equivalent" (the difference lies within the margin on both sides), "good enough" (not worse by more than
    the margin), "worse within the margin", "worse" or "undecided" (Piaggio et al. 2012).
    """
    low, high = ci95
    if high < 0:
        return "better"
    if -margin < low and high < margin:
        return "worse within the margin" if low > 0 else "equivalent"
    if high < margin:
        return "good enough"
    return "worse" if low > 0 else "undecided"


def needed(comparison: dict, margin: float) -> dict[str, int]:
    """About how many groups and runs an undecided comparison would take: {"groups": n, "runs": n}.

    So many that 1.96 standard errors are as small as the distance of the difference from the nearer one of zero and
    the margin. Each number is computed with the other part as it is; a part that cannot do it alone is left out.
    """
    d = comparison["difference"]
    distance = min(abs(d), abs(margin - d)) / 1.96
    row, seeds = comparison["row_error"] ** 2, comparison["seed_error"] ** 2
    found = {}
    if distance**2 > seeds and row:
        found["groups"] = math.ceil(comparison["groups"] * row / (distance**2 - seeds))
    if distance**2 > row and seeds:
        found["runs"] = math.ceil(max(comparison["runs"]) * seeds / (distance**2 - row))
    return found


def expected_best(losses: list[float], budget: int) -> float:
    """The lowest loss to expect from `budget` runs drawn from these, with replacement (Dodge et al. 2019)."""
    ordered, n = sorted(losses), len(losses)
    chance = [((n - i) / n) ** budget - ((n - i - 1) / n) ** budget for i in range(n)]
    return float(np.dot(ordered, chance))


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
