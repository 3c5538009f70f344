"""dataset_report.md: how long the rows are, what was left out, and what the model will see."""

import re
from pathlib import Path

import datasets
import numpy as np

from configs import chat, handover
from configs.text import cell, visible

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
# reasons and changes as the manifest has them, for a report in Chinese
REASONS = {
    "not JSON": "不是 JSON",
    "not an object with columns": "不是带列名的对象",
    "more cells than columns (an unquoted comma?)": "单元格比列多（有未加引号的逗号？）",
    "gold_index names none of the options": "gold_index 不对应任何选项",
    "label is a number without a name": "标签是没有名称的数字",
    "missing answer": "缺少回答",
    "empty answer": "回答为空",
    "answer is not a string": "回答不是字符串",
    "missing prompt": "缺少提示词",
    "empty prompt": "提示词为空",
    "prompt is not a string": "提示词不是字符串",
    "input is not a string": "input 不是字符串",
    "system is not a string": "system 不是字符串",
    "missing messages": "缺少消息",
    "message is not an object": "消息不是对象",
    "message is not text": "消息不是文本",
    "role or tool call that cannot be used": "角色或工具调用无法使用",
    "history is not a list of questions and answers": "history 不是由问答组成的列表",
    "no question in front of an answer": "回答之前没有问题",
    "prompt equal to answer": "提示词与回答相同",
    "NUL character": "含有 NUL 字符",
    "half a surrogate pair": "含有半个代理对字符",
    "template marker or special token in the text": "文本中含有模板标记或特殊 token",
    "exact duplicate": "完全重复",
    "conversation that the chat template cannot render": "对话模板无法表示这段对话",
    "white space around the answer removed": "去掉了回答首尾的空白",
    "turns behind the last answer removed": "去掉了最后一个回答之后的内容",
    "answers only read (no question in front, or weight 0)": "只读不训练的回答（前面没有问题，或 weight 为 0）",
}


def reason_in(language: str, reason: str) -> str:
    """A reason of the manifest in the language of the report."""
    if language == "en":
        return reason
    longer = re.fullmatch(r"longer than (\d+) tokens", reason)
    return f"超过 {longer[1]} 个 token" if longer else REASONS.get(reason, reason)


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
