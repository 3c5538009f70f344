"""Tasks of lm-evaluation-harness (BENCHMARKS), item by item, so that models are compared on the same items.

The harness asks and scores, in its own way for each task; the statistics are this project's.
https://github.com/EleutherAI/lm-evaluation-harness
"""

import importlib.util
import json
import logging
from dataclasses import dataclass
from functools import lru_cache
from numbers import Number
from pathlib import Path

import numpy as np

from configs import handover, hub
from configs.evaluation.scoring import token_budget
from configs.flags import near
from configs.settings import fail, say

WIDTH = 1024  # tokens of an item that a batch is planned for


@dataclass
class Task:
    """What one model did on one task. values: the metric of each item; items: what tells the items apart.

    metric: the first one that the task has, with its filter; better: "higher" or "lower"; records: {item, value,
    target, answers} of each item, for evaluation_benchmarks.jsonl.
    """

    metric: str
    better: str
    values: np.ndarray
    items: list[str]
    records: list[dict]


@lru_cache
def tasks_of(names: tuple[str, ...]) -> tuple:
    """(the harness's task manager, names of its tasks) for task names and folders with tasks of one's own.

    Raises: SystemExit(2) for a missing package, an unknown name and a folder without tasks.
    """
    if importlib.util.find_spec("lm_eval") is None:
        fail("BENCHMARKS needs the package lm_eval, which is not installed: pip install lm_eval")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders = [str(path) for name in names if (path := hub.local_path(name)) and path.is_dir()]
    own = TaskManager(include_path=folders, include_defaults=False) if folders else None
    manager = TaskManager(include_path=folders or None)
    found = list(own.all_subtasks) if own else []
    if folders and not found:
        fail(f"BENCHMARKS: no task lies in {', '.join(folders)}; a task is a .yaml file with `task:` and its settings")
    for name in names:
        if (path := hub.local_path(name)) and path.is_dir():
            continue
        if name not in manager.all_tasks:
            hint = f"; did you mean {guess}?" if (guess := near(name, manager.all_tasks)) else ""
            fail(f"BENCHMARKS: lm_eval has no task {name!r}{hint}; list them with: lm-eval ls tasks")
        found.append(name)
    return manager, found


def run(model, tokenizer, names: list[str], limit: int | None, label: str) -> dict[str, Task]:
    """What one model does on the tasks, by name. limit: so many items of each; None: all.

    Every model is asked in the same words, without a chat template, which a base was never taught.
    """
    manager, tasks = tasks_of(tuple(names))
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    say(f"benchmarks of {label}: {', '.join(tasks)}")
    batch = max(token_budget(model) // WIDTH, 1)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    try:
        results = lm_eval.simple_evaluate(
            harness, tasks=tasks, limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=True
        )
    except (OSError, ValueError, KeyError) as error:  # data that cannot be had, a task that is not well formed
        fail(f"BENCHMARKS: {', '.join(tasks)} cannot be run ({type(error).__name__}: {str(error)[:300]})")
    return {task: of_task(samples, results["higher_is_better"][task]) for task, samples in results["samples"].items()}


def of_task(samples: list[dict], higher: dict[str, bool]) -> Task:
    """One task's first metric that is a number for each item, under the first filter."""
    first = samples[0]["filter"]
    samples = sorted((s for s in samples if s["filter"] == first), key=lambda s: s["doc_id"])
    metric = next(name for name in samples[0]["metrics"] if isinstance(samples[0][name], Number))
    values = np.array([float(sample[metric]) for sample in samples])
    records = [
        {"item": s["doc_hash"], "value": float(s[metric]), "target": str(s["target"]), "answers": s["filtered_resps"]}
        for s in samples
    ]
    name = metric if first == "none" else f"{metric}, {first}"
    better = "higher" if higher.get(metric, True) else "lower"
    return Task(name, better, values, [s["doc_hash"] for s in samples], records)


def write_items(path: Path, found: dict[str, dict[str, Task]]) -> None:
    """One line an item of each task and model, {task, metric, model, item, value, target, answers}; none, no file.

    found: {model: {task: what it did}}.
    """
    items = [
        {"task": name, "metric": task.metric, "model": model, **record}
        for model, tasks in found.items()
        for name, task in tasks.items()
        for record in task.records
    ]
    if items:
        handover.write_text(path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
