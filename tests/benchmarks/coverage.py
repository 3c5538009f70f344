"""Coverage of the 95 % intervals of step 4 and of the sweep, and false positives of their p-values, by simulation.

    python tests/benchmarks/coverage.py
    python tests/benchmarks/coverage.py --sets 1000 --only seeds

Each line is a shape of data whose truth is known, `--sets` data sets of it, and how often the interval held the truth
(0.95 is promised) and how often p was below 0.05 although there was no difference (0.05 is allowed). Beside our
interval stands a plain alternative: Student's t over rows; for seeds, the rows alone, as if a single run were the
method.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
from scipy import stats

from configs.evaluation import statistics

RESAMPLES = 2000


def plain_t(d: np.ndarray, w: np.ndarray) -> tuple[float, float]:
    """Student's t interval of a ratio of sums, over rows that are taken to be independent."""
    n, observed = len(d), d.sum() / w.sum()
    error = np.sqrt(n / (n - 1) * np.square(d - observed * w).sum()) / w.sum()
    reach = stats.t.ppf(0.975, n - 1) * error
    return observed - reach, observed + reach


def shapes(draw: np.random.Generator) -> dict[str, tuple[Callable, float]]:
    """{name: (a sample of n: differences, weights, groups; the true difference)}."""

    def alone(sample: Callable) -> Callable:
        return lambda n: (sample(n), np.ones(n), list(range(n)))

    def weighted(n: int) -> tuple:
        weight = draw.lognormal(3, 1, n)
        return draw.normal(0, 1, n) * weight, weight, list(range(n))

    def clusters(n: int) -> tuple:
        groups = np.repeat(np.arange(n), draw.integers(1, 9, n))  # n groups of 1 to 8 rows that share their difference
        return draw.normal(0, 1, n)[groups] + draw.normal(0, 0.3, len(groups)), np.ones(len(groups)), groups.tolist()

    def pieces(n: int) -> tuple:
        noise, series = draw.normal(0, 1, 10 * n + 100), np.zeros(10 * n + 100)  # an AR(1) series: neighbours agree
        for i in range(1, len(series)):
            series[i] = 0.7 * series[i - 1] + noise[i]
        values = series[100:]
        return values, np.ones(len(values)), statistics.blocks(len(values), n)

    return {
        "normal": (alone(lambda n: draw.normal(0, 1, n)), 0),
        "gamma(0.5)": (alone(lambda n: draw.gamma(0.5, 1, n)), 0.5),
        "lognormal(1.2)": (alone(lambda n: draw.lognormal(0, 1.2, n)), float(np.exp(0.72))),
        "t, 3 degrees": (alone(lambda n: draw.standard_t(3, n)), 0),
        "sparse: 1 in 10": (alone(lambda n: (draw.random(n) < 0.1) * draw.normal(1, 1, n)), 0.1),
        "0/1, p = 0.2": (alone(lambda n: (draw.random(n) < 0.2).astype(float)), 0.2),
        "lognormal weights": (weighted, 0),
        "unequal clusters": (clusters, 0),
        "neighbours agree": (pieces, 0),
    }


def rows_part(sets: int) -> Iterator[str]:
    draw = np.random.default_rng(1)
    for name, (sample, truth) in shapes(draw).items():
        for n in (8, 20, 50, 100):
            covered, plain, wrong = [], [], []
            for seed in range(sets):
                d, w, groups = sample(n)
                d = d - truth * w
                c = statistics.compare(d, np.zeros(len(d)), w, groups, RESAMPLES, seed)
                covered.append(c["ci95"][0] <= 0 <= c["ci95"][1])
                wrong.append(c["p_value"] < 0.05)
                low, high = plain_t(d, w)
                plain.append(low <= 0 <= high)
            line = f"covered {np.mean(covered):.3f}, p < 0.05 {np.mean(wrong):.3f}"
            yield f"{name:18} n = {n:3}: {line}; Student's t over rows covered {np.mean(plain):.3f}"


def seeds_part(sets: int) -> Iterator[str]:
    """Two methods that are equal on average, trained with S seeds each on the same 100 rows."""
    draw, rows = np.random.default_rng(2), 100
    for spread in (0.0, 0.5, 1.0, 2.0, 3.0):  # SD between seeds, in standard errors of the rows
        for seeds in (2, 3, 5):
            covered, alone, wrong, single = [], [], [], []
            for seed in range(sets):
                tokens = draw.lognormal(3, 0.5, rows)
                common = draw.normal(0, 1, rows)  # how much each row prefers one method
                error = np.sqrt(np.square(common * tokens).sum()) / tokens.sum()
                arms = []
                for sign in (0.5, -0.5):
                    runs = (
                        sign * common + draw.normal(0, spread * error, (seeds, 1)) + draw.normal(0, 0.3, (seeds, rows))
                    )
                    arms.append(runs * tokens)
                c = statistics.compare_runs(*arms, tokens, list(range(rows)), RESAMPLES, seed)
                covered.append(c["ci95"][0] <= 0 <= c["ci95"][1])
                alone.append(c["rows_ci95"][0] <= 0 <= c["rows_ci95"][1])
                wrong.append(c["p_value"] < 0.05)
                one = statistics.compare(arms[0][0], arms[1][0], tokens, list(range(rows)), RESAMPLES, seed)
                single.append(not one["ci95"][0] <= 0 <= one["ci95"][1])
            yield (
                f"seeds' SD {spread:.1f} row errors, {seeds} seeds: covered {np.mean(covered):.3f}, p < 0.05 "
                f"{np.mean(wrong):.3f}; rows alone covered {np.mean(alone):.3f}; one run of each differs in "
                f"{np.mean(single):.3f}"
            )


def share_part(sets: int) -> Iterator[str]:
    """LoRA keeps just the share that is asked for: how often the test says more, and Fieller's interval."""
    draw, rows, share = np.random.default_rng(3), 100, 0.95
    for gain in (0.2, 0.5, 1.0):
        covered, said, known = [], [], 0
        for _ in range(sets):
            tokens = draw.lognormal(3, 0.5, rows)
            base, own = draw.normal(3, 0.5, rows), draw.normal(gain, 0.3, rows)
            lora, full = (
                (base - part * own + draw.normal(0, 0.02, (4, 1)) + draw.normal(0, 0.1, (4, rows))) * tokens
                for part in (share, 1.0)
            )
            s = statistics.share_kept(base * tokens, lora, full, tokens, list(range(rows)), share)
            said.append(s["keeps"])
            if s["ci95"][0] is not None:
                known += 1
                covered.append(s["ci95"][0] <= share <= s["ci95"][1])
        yield (
            f"full gains {gain:.1f}: share kept covered {np.mean(covered):.3f} ({known} of {sets} known), said to "
            f"keep more than it does {np.mean(said):.3f}"
        )


def equal_part(sets: int) -> Iterator[str]:
    """Forgetting at equal learning, whose truth is -0.2; beside it, the text alone, with the gains taken as exact."""
    draw, rows, pieces = np.random.default_rng(4), 100, 200
    curve_of = ((0, 0), (0.1, 0.02), (0.2, 0.1), (0.4, 0.5))  # (gain, forgotten) of the base and of three rates
    weights, groups = (np.ones(rows), np.ones(pieces)), (list(range(rows)), statistics.blocks(pieces))
    for noise in (0.05, 0.1, 0.2):  # SD of a row's own gain
        covered, alone = [], []
        for seed in range(sets):
            base = draw.normal(3, 0.5, rows), draw.normal(3, 0.5, pieces)
            curve, own = (
                [(base[0] - g + s * draw.normal(0, noise, rows), base[1] + f + s * draw.normal(0, noise, pieces))
                 for (g, f), s in points]
                for points in ([(point, point != (0, 0)) for point in curve_of], [((0.3, 0.1), 1)])
            )  # fmt: skip
            found = statistics.at_equal_learning(own[0], curve, weights, groups, RESAMPLES, seed)
            if found["outside"]:
                continue
            covered.append(found["ci95"][0] <= -0.2 <= found["ci95"][1])
            gains = [(curve[0][0] - run[0]).mean() for run in curve]
            part = (found["gain"] - gains[2]) / (gains[3] - gains[2])
            on_curve = (1 - part) * curve[2][1] + part * curve[3][1]
            low, high = statistics.compare(own[0][1], on_curve, weights[1], groups[1], RESAMPLES, seed)["ci95"]
            alone.append(low <= -0.2 <= high)
        yield (
            f"gains with SD {noise:.2f}: forgetting at equal learning covered {np.mean(covered):.3f} ({len(covered)} "
            f"of {sets} known); text alone covered {np.mean(alone):.3f}"
        )


def main() -> None:
    parts = {"rows": rows_part, "seeds": seeds_part, "share": share_part, "equal": equal_part}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=300, help="data sets of each kind and size")
    parser.add_argument("--only", choices=list(parts), help="one of the parts")
    given = parser.parse_args()
    for name in [given.only] if given.only else parts:
        for line in parts[name](given.sets):
            print(line, flush=True)


if __name__ == "__main__":
    main()
