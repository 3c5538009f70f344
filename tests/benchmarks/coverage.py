"""Coverage of step 4's 95 % intervals and false positives of its p-values, for differences of many shapes.

python tests/benchmarks/coverage.py
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np

from configs.evaluation import statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=300, help="data sets of each kind and size")
    sets = parser.parse_args().sets
    draw = np.random.default_rng(1)
    shapes = {  # name: (a sample of n, its true mean)
        "normal": (lambda n: draw.normal(0, 1, n), 0),
        "gamma(0.5)": (lambda n: draw.gamma(0.5, 1, n), 0.5),
        "lognormal(1.2)": (lambda n: draw.lognormal(0, 1.2, n), np.exp(0.72)),
        "t, 3 degrees": (lambda n: draw.standard_t(3, n), 0),
        "exponential": (lambda n: draw.exponential(1, n), 1),
    }
    for name, (sample, mean) in shapes.items():
        for n in (5, 20, 50, 100):
            zero, one, groups = np.zeros(n), np.ones(n), list(range(n))
            found = [statistics.compare(sample(n) - mean, zero, one, groups, 2000, seed) for seed in range(sets)]
            covered = np.mean([c["ci95"][0] <= 0 <= c["ci95"][1] for c in found])
            wrong = np.mean([c["p_value"] < 0.05 for c in found])
            print(f"{name:16} n = {n:3}: covered {covered:.3f}, p < 0.05 {wrong:.3f}", flush=True)


if __name__ == "__main__":
    main()
