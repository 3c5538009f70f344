"""The previous evaluation: its results are kept in history/, and the report shows them beside the new ones."""

import json
import math
import time
from pathlib import Path

from configs import handover

RESULTS = "evaluation_results.json"
KEPT = 10  # results in history/; older ones are removed


def keep(folder: Path) -> dict | None:
    """Put the results that lie in `folder` into its history/, before others take their place; None if there are none.

    They become history/evaluation_results_<time of their writing>.json, so keeping them twice makes one file. Returns
    them with `time`, in words. The caller holds the lock of `folder`.
    """
    path, place = folder / RESULTS, folder / "history"
    try:
        text, written = path.read_text("utf-8"), time.localtime(path.stat().st_mtime)
        results = json.loads(text)
    except (OSError, ValueError):  # there are none, or what lies there is no result of ours
        return None
    handover.write_text(place / f"{path.stem}_{time.strftime('%Y%m%d-%H%M%S', written)}.json", text)
    for old in sorted(place.glob(f"{path.stem}_*.json"))[:-KEPT]:
        old.unlink(missing_ok=True)
    return results | {"time": time.strftime("%Y-%m-%d %H:%M", written)} if isinstance(results, dict) else None


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
