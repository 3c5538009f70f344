"""dataset_report.md: how long the rows are, what was left out, and what the model will see."""

import re
from pathlib import Path

import datasets
import numpy as np

from configs import chat, handover
from configs.text import cell, visible
from configs.translation import Phrase

SAMPLE = 2000  # rows whose tokens are counted
WORDS = {
    "en": {
        "title": "# Data set report: {source}",
        "read": "{read:,} rows read as {schema}, {kept:,} kept: {train:,} to train on, {validation:,} to validate and "
        "{test:,} to test.",
        "conversations": "{several_answers:,} conversations have several answers, {answers:,} in all; {rows:,} of "
        "these became rows, each with what was said before it. Rows of one conversation stay on one side.",
        "groups": "Equal prompts and near-duplicates stay on one side: {groups:,} groups, the largest of {largest:,} "
        "rows; {same_prompt:,} rows share their prompt with another row.",
        "lengths": "## Lengths",
        "histogram": "![tokens per row](length_histogram.png)",
        "counted": "Tokens of prompt and answer in the model's template, counted on {counted:,} rows; median "
        "{median}.",
        "fit": "| MAX_LENGTH | rows that fit |",
        "keeps": "99 % of the rows fit at MAX_LENGTH = {keeps}.",
        "keeps_none": "99 % of the rows fit at no length counted.",
        "left_out": "## Left out",
        "table": "| reason | rows | examples |",
        "nothing": "Nothing.",
        "changed": "## Changed",
        "rows": "- {what}: {count:,} rows",
        "seen": "## What the model will see",
        "trained": "The part between ⟦ and ⟧ is trained; the rest is only read.",
    },
    "zh": {
        "title": "# 数据集报告：{source}",
        "read": "读入 {read:,} 行（格式：{schema}），保留 {kept:,} 行：训练 {train:,} 行，验证 {validation:,} 行，"
        "测试 {test:,} 行。",
        "conversations": "有 {several_answers:,} 段对话包含多个回答，共 {answers:,} 个；其中 {rows:,} 个各成一行，"
        "并带上此前的对话内容。同一段对话的各行总在同一个划分里。",
        "groups": "提示词相同或近似重复的行总在同一个划分里：共 {groups:,} 组，最大的一组有 {largest:,} 行；"
        "{same_prompt:,} 行与别的行提示词相同。",
        "lengths": "## 长度",
        "histogram": "![每行的 token 数](length_histogram.png)",
        "counted": "按模型的对话模板计算提示词与回答的 token 数，统计了 {counted:,} 行；中位数为 {median}。",
        "fit": "| MAX_LENGTH | 放得下的行 |",
        "keeps": "MAX_LENGTH = {keeps} 时，99 % 的行放得下。",
        "keeps_none": "在统计到的长度内，放不下 99 % 的行。",
        "left_out": "## 剔除的行",
        "table": "| 原因 | 行数 | 例子 |",
        "nothing": "无。",
        "changed": "## 改动",
        "rows": "- {what}：{count:,} 处",
        "seen": "## 模型将看到的内容",
        "trained": "⟦ 与 ⟧ 之间的部分参与训练，其余部分模型只读不学。",
    },
}


def reason_in(language: str, reason: str) -> str:
    """Why a row was left out, or what was changed in it, as the manifest has it, in the language of the report."""
    return Phrase(reason).chinese() if language == "zh" else reason


def first_rows(rows: datasets.Dataset, ids: np.ndarray, count: int = 3) -> datasets.Dataset:
    """The `count` rows with the smallest ids: the same ones whatever the order of the file."""
    return rows.select(np.argsort(ids)[:count])


def as_seen(tokenizer, row: dict) -> str:
    """A row as the model sees it, with what is trained between ⟦ and ⟧; of a long one, what is near the answer."""
    before, after = chat.render(tokenizer, row["prompt"], row["completion"])
    return visible(f"{before[-3000:]}⟦{after[:3000]}⟧")


def draw_lengths(lengths: np.ndarray, limit: int, path: Path) -> None:
    """The histogram. lengths: tokens, shape (rows,)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 3))
    axis.hist(lengths, bins=50, color="#4477aa")
    axis.axvline(limit, color="#cc6677", linestyle="--", label=f"MAX_LENGTH = {limit}")
    axis.set_xlabel("tokens of prompt and answer")
    axis.set_ylabel(f"rows of {len(lengths)}")
    axis.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def write_report(
    manifest: dict,
    rows: datasets.Dataset,
    ids: np.ndarray,
    tokenizer,
    long: list[int],
    folder: Path,
    language: str = "en",
) -> None:
    """dataset_report.md and length_histogram.png: how long the rows are, what was left out, what the model will see.

    Lengths are those of the SAMPLE rows with the smallest ids, and of every row that was too long.
    """
    sample, words = first_rows(rows, ids, SAMPLE), WORDS[language]
    lengths = np.sort([sum(map(len, chat.encode(tokenizer, r["prompt"], r["completion"]))) for r in sample])
    over = np.sort([n if n else np.inf for n in long])
    total = len(rows) + len(over)

    def fit(tokens: float) -> float:
        return ((lengths <= tokens).mean() * len(rows) + (over <= tokens).sum()) / total

    candidates = np.concatenate([lengths, over[np.isfinite(over)]])
    keeps = next((int(n) for n in candidates if fit(n) >= 0.99), None)
    draw_lengths(lengths, manifest["settings"]["MAX_LENGTH"], folder / "length_histogram.png")

    n = manifest["rows"]
    lines = [words["title"].format(source=cell(manifest["source"])), ""]
    lines += [words["read"].format(schema=manifest["schema"]["name"], **n)]
    if manifest["conversations"]["rows"]:
        lines += [words["conversations"].format(**manifest["conversations"])]
    lines += [words["groups"].format(**manifest["groups"]), "", words["lengths"], "", words["histogram"], ""]
    lines += [words["counted"].format(counted=len(lengths), median=int(np.median(lengths))), ""]
    lines += [words["fit"], "|---|---|"]
    lines += [f"| {tokens} | {100 * fit(tokens):.1f} % |" for tokens in (512, 1024, 2048)]
    lines += ["", words["keeps"].format(keeps=keeps) if keeps else words["keeps_none"], "", words["left_out"], ""]
    if n["dropped"]:
        lines += [words["table"], "|---|---|---|"]
        examples = manifest["dropped_examples"]
        lines += [
            f"| {cell(reason_in(language, why))} | {count:,} | {', '.join(map(cell, examples[why]))} |"
            for why, count in n["dropped"].items()
        ]
    else:
        lines += [words["nothing"]]
    lines += ["", words["changed"], ""]
    changed = manifest["changed"].items()
    lines += [words["rows"].format(what=reason_in(language, what), count=count) for what, count in changed]
    lines += [] if changed else [words["nothing"]]
    lines += ["", words["seen"], "", words["trained"]]
    for row in sample.select(range(min(3, len(sample)))):
        text = as_seen(tokenizer, row)
        fence = "~" * max(3, *(len(run) + 1 for run in re.findall("~+", text)), 3)
        lines += ["", fence, text, fence]
    handover.write_text(folder / "dataset_report.md", "\n".join(lines) + "\n")
