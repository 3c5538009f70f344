"""The previous evaluation: its results are kept in history/, and the report shows them beside the new ones."""

import json
import math
import time
from pathlib import Path

from configs import handover

RESULTS = "evaluation_results.json"
KEPT = 10  # results in history/; older ones are removed


def read(folder: Path) -> dict | None:
    """The results that lie in `folder`, with the `time` of their writing in words; None if there are none of ours."""
    path = folder / RESULTS
    try:
        results = json.loads(path.read_text("utf-8"))
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
    except (OSError, ValueError):
        return None
    return results | {"time": written} if isinstance(results, dict) else None


def keep(folder: Path) -> None:
    """Copy the results that lie in `folder` into its history/, before others take their place.

    They become history/evaluation_results_<time of their writing>.json, so keeping them twice makes one file. What is
    none of ours is left alone. The caller holds the lock of `folder`.
    """
    path, place = folder / RESULTS, folder / "history"
    if read(folder) is None:
        return
    written = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
    handover.write_text(place / f"{path.stem}_{written}.json", path.read_text("utf-8"))
    for old in sorted(place.glob(f"{path.stem}_*.json"))[:-KEPT]:
        old.unlink(missing_ok=True)


def comparable(before: dict | None, results: dict) -> dict | None:
    """`before` where it is about the same models, base and test rows as `results`, so that both can share a table."""

    def about(found: dict) -> tuple:
        data, settings = found["data"], found["settings"]
        rows = data["manifest_sha256"], data["test_rows"], data["test_prompts"]
        return *rows, settings["MODEL_NAME"], settings["MODEL_REVISION"], list(found["models"])

    try:
        return before if before and about(before) == about(results) else None
    except (KeyError, TypeError):  # of another version
        return None


def column(before: dict | None, key: str, form: str, part: str | None = None) -> str:
    """The values of a metric in the previous evaluation, in the order of the models, as one cell; "-" where unknown.

    form: such as "%.3f". part: where in a model's results the metric stands, "answers" or "forgetting".
    """
    values = []
    for model in (before or {}).get("models", {}).values():
        found = model if part is None else model.get(part)
        value = found.get(key) if isinstance(found, dict) else None
        is_number = isinstance(value, int | float) and math.isfinite(value)
        values.append(form % value if is_number else "-")
    return " / ".join(values)
