"""dataset_report.md: how long the rows are, what was left out, and what the model will see."""

import re
from pathlib import Path

import datasets
import numpy as np

from configs import chat, handover
from configs.text import cell, visible

SAMPLE = 2000  # rows whose tokens are counted


def write_report(
    manifest: dict, rows: datasets.Dataset, ids: np.ndarray, tokenizer, long: list[int], folder: Path
) -> None:
    """dataset_report.md and length_histogram.png: how long the rows are, what was left out, what the model will see.

    Lengths are those of the SAMPLE rows with the smallest ids, and of every row that was too long.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sample = rows.select(np.argsort(ids)[:SAMPLE])
    lengths = np.sort([sum(map(len, chat.encode(tokenizer, r["prompt"], r["completion"]))) for r in sample])
    over = np.sort([n if n else np.inf for n in long])
    limit, total = manifest["settings"]["MAX_LENGTH"], len(rows) + len(over)

    def fit(tokens: float) -> float:
        return ((lengths <= tokens).mean() * len(rows) + (over <= tokens).sum()) / total

    candidates = np.concatenate([lengths, over[np.isfinite(over)]])
    keeps = next((int(n) for n in candidates if fit(n) >= 0.99), None)
    figure, axis = pyplot.subplots(figsize=(7, 3))
    axis.hist(lengths, bins=50, color="#4477aa")
    axis.axvline(limit, color="#cc6677", linestyle="--", label=f"MAX_LENGTH = {limit}")
    axis.set_xlabel("tokens of prompt and answer")
    axis.set_ylabel(f"rows of {len(lengths)}")
    axis.legend()
    figure.savefig(folder / "length_histogram.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)

    n, groups = manifest["rows"], manifest["groups"]
    lines = [f"# Data set report: {cell(manifest['source'])}", ""]
    lines += [
        f"{n['read']:,} rows read as {manifest['schema']['name']}, {n['kept']:,} kept: {n['train']:,} to train on, "
        f"{n['validation']:,} to validate and {n['test']:,} to test.",
        f"Equal prompts and near-duplicates stay on one side: {groups['groups']:,} groups, the largest of "
        f"{groups['largest']:,} rows; {groups['same_prompt']:,} rows share their prompt with another row.",
        "",
        "## Lengths",
        "",
        "![tokens per row](length_histogram.png)",
        "",
        f"Tokens of prompt and answer in the model's template, counted on {len(lengths):,} rows; median "
        f"{int(np.median(lengths))}.",
        "",
        "| MAX_LENGTH | rows that fit |",
        "|---|---|",
        *(f"| {tokens} | {100 * fit(tokens):.1f} % |" for tokens in (512, 1024, 2048)),
        "",
        f"99 % of the rows fit at MAX_LENGTH = {keeps}." if keeps else "99 % of the rows fit at no length counted.",
        "",
        "## Left out",
        "",
    ]
    if n["dropped"]:
        lines += ["| reason | rows | examples |", "|---|---|---|"]
        examples = manifest["dropped_examples"]
        lines += [
            f"| {cell(why)} | {count:,} | {', '.join(map(cell, examples[why]))} |"
            for why, count in n["dropped"].items()
        ]
    else:
        lines += ["Nothing."]
    lines += ["", "## Changed", ""]
    lines += [f"- {what}: {count:,} rows" for what, count in manifest["changed"].items()] or ["Nothing."]
    lines += ["", "## What the model will see", "", "The part between ⟦ and ⟧ is trained; the rest is only read."]
    for row in sample.select(range(min(3, len(sample)))):
        before, after = chat.render(tokenizer, row["prompt"], row["completion"])
        text = visible(f"{before[-3000:]}⟦{after[:3000]}⟧")
        fence = "~" * max(3, *(len(run) + 1 for run in re.findall("~+", text)), 3)
        lines += ["", fence, text, fence]
    handover.write_text(folder / "dataset_report.md", "\n".join(lines) + "\n")
