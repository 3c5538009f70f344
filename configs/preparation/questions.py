"""Which test questions are independent of one another; few of them can show no difference between models."""

import json
import re
from collections.abc import Iterable

FEW = 10  # a sign-flip test of fewer questions has hardly any signs to flip


def question_groups(rows: list[dict]) -> list[str]:
    """A group for each row with `prompt` and perhaps `group`: rows that share either one's group are in one.

    Step 1 has found the near-duplicates. Questions that differ in their figures alone ("what is 5 % of $200?") are no
    independent observations either, since a model that knows one of them knows them all.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    texts = [re.sub(r"\d+(?:[.,:]\d+)*", "0", json.dumps(row["prompt"]).lower()) for row in rows]
    names = [row.get("group") or text for row, text in zip(rows, texts, strict=True)]
    for name, text in zip(names, texts, strict=True):
        parent[root(f"text {text}")] = root(f"group {name}")
    return [root(f"group {name}").removeprefix("group ") for name in names]


def doubt_about(test: list[dict], every: Iterable[dict]) -> str | None:
    """A sentence where step 4 will refuse these test rows, or can hardly show a difference on them; None elsewhere.

    test: rows with `prompt` and `group`; every: the rows of all parts, read only where step 4 will refuse.
    """
    questions = len(set(question_groups(test)))
    asked = f"{len(test)} test row{'s ask' if len(test) > 1 else ' asks'}"
    if questions < 2:
        others = len(set(question_groups([{"prompt": row["prompt"]} for row in every]))) > 1
        mend = "hold out more rows, e.g. --eval_fraction 0.3" if others else "add rows with other questions"
        return f"warning: {asked} one question only (figures aside), so step 4 will refuse to compare models: {mend}"
    if questions < FEW <= len(test):  # of fewer rows, it is said anyway
        return (
            f"note: {asked} only {questions} different questions (figures aside), which can hardly show a difference"
        )
    return None
