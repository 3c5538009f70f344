"""Step 1 against plain `datasets` on synthetic rows: wall time, and the peak memory of any one process.

    python tests/benchmarks/prepare.py
    python tests/benchmarks/prepare.py --rows 100000 --keep /tmp/rows

Rows are JSON Lines of 300 bytes to 3 kB, of words drawn by Zipf's law; 1 % are exact copies, 5 % copies with a small
edit. Plain `datasets` does load_dataset, map to messages, train_test_split and save_to_disk. Token lengths are left
out: MAX_LENGTH is above the longest row, so that no row is tokenised. Every run is a
process of its own, after one reading of the file, so that all find it in the page cache.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

PLAIN = """
import sys, datasets
rows = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2] + "/cache")
def messages(row):
    question = row["instruction"] + ("\\n\\n" + row["input"] if row["input"] else "")
    prompt, answer = {"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}
    return {"messages": [prompt, answer]}
rows = rows.map(messages, remove_columns=rows.column_names)
rows.train_test_split(test_size=0.1, seed=42).save_to_disk(sys.argv[2] + "/data")
"""


def words(rng: random.Random, size: int) -> str:
    """About `size` bytes of made-up words, common ones more often."""
    return " ".join(rng.choices(WORDS, cum_weights=WEIGHTS, k=max(size // 7, 3)))


def write_rows(path: Path, n: int) -> None:
    rng, last = random.Random(0), []
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(n):
            kind, size = rng.random(), rng.randint(300, 3000)
            asked = rng.randint(60, min(1000, size - 200))
            row = {"instruction": words(rng, asked), "input": "", "output": words(rng, size - asked - 50)}
            if last and kind < 0.06:
                row = dict(rng.choice(last))
            if last and 0.01 < kind < 0.06:
                parts = row["instruction"].split()
                parts[rng.randrange(len(parts))] = "edited"
                row["instruction"] = " ".join(parts)
            last = [*last[-999:], row]
            file.write(json.dumps(row) + "\n")


def measure(command: list, cwd: Path) -> tuple[float, float]:
    """(seconds, GB) of a command: wall time, and the largest resident set of it or any of its children."""
    meter = "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); print('peak', "
    meter += "resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", meter, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True
    )
    seconds = time.monotonic() - began
    assert result.returncode == 0, result.stderr[-3000:]
    return seconds, int(result.stdout.rsplit("peak ", 1)[1]) * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 500_000])
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args()
    from hub import tiny_phi

    for n in options.rows:
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work)
            model = tiny_phi(folder / "tiny-phi")
            write_rows(folder / "rows.jsonl", n)
            print(f"{n:,} rows, {(folder / 'rows.jsonl').stat().st_size / 1e6:,.0f} MB", flush=True)
            step = [sys.executable, ROOT / "1_prepare_dataset.py", "--dataset_name", folder / "rows.jsonl"]
            step += ["--model_name", model, "--max_length", 8192]
            runs = {
                "plain datasets": [sys.executable, "-c", PLAIN, folder / "rows.jsonl"],
                "step 1, equal prompts": [*step, "--near_duplicate_threshold", "none"],
                "step 1, near-equal prompts": step,
            }
            for turn in range(options.repeat):
                base = None
                for number, (name, command) in enumerate(runs.items()):
                    place = folder / f"run-{turn}-{number}"
                    place.mkdir()
                    seconds, peak = measure([*command, place] if number == 0 else command, place)
                    base = base or seconds
                    print(f"  {name:28} {seconds:7.1f} s  {seconds / base:5.2f} x  {peak:5.2f} GB", flush=True)


if __name__ == "__main__":
    _rng = random.Random(1)
    _letters = "etaoinshrdlucmfwypvbgkjqxz"
    WORDS = ["".join(_rng.choices(_letters, range(26, 0, -1), k=_rng.randint(2, 11))) for _ in range(20_000)]
    WEIGHTS = list(itertools.accumulate(1 / (rank + 3) for rank in range(20_000)))
    main()
