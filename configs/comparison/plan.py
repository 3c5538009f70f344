"""The plan of a sweep and what came out of its runs, as sweep.json holds them."""

import contextlib
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path

from configs import handover, state
from configs.comparison.question import Arm
from configs.settings import command, fail, say


@dataclass
class Sweep:
    """A sweep: its plan, and the state of its runs, as sweep.json holds them.

    plan: what must be the same when it goes on. runs: {key: record}, a record has arm, rate, seed, phase
    ("selection", "confirmation" or "seeds"), folder, state ("waiting", "done", "diverged" or "failed"), and when it is
    over eval_loss, start_loss, seconds, tokens, peak_memory_bytes, why. selection: {arm: {rate, eval_loss, edge}}.
    """

    folder: Path
    plan: dict
    arms: list[Arm]
    runs: dict[str, dict] = field(default_factory=dict)
    selection: dict[str, dict] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def save(self) -> None:
        with self.lock:
            content = {"plan": self.plan, "runs": self.runs, "selection": self.selection}
            handover.write_json(self.folder / "sweep.json", content)

    def add(self, arm: Arm, rate: float, seed: int, phase: str) -> str:
        key = f"{arm.name}/lr_{rate:.1e}_seed_{seed}"
        folder = str(self.folder / key)
        self.runs.setdefault(
            key, {"arm": arm.name, "rate": rate, "seed": seed, "phase": phase, "folder": folder, "state": "waiting"}
        )
        return key

    def of(self, arm: str, phase: str) -> list[dict]:
        """The runs of an arm in a phase, in order."""
        return [run for run in self.runs.values() if run["arm"] == arm and run["phase"] == phase]


def begin(settings, arms: list[Arm], words: dict, manifest: dict, flags: dict[str, list[str]]) -> Sweep:
    """The sweep of this plan: a new one, or the one that lies in SWEEP_DIR.

    Raises: SystemExit(2) where another one lies there.
    """
    given = {a.name: {"method": a.method, "settings": a.settings, "rows": a.rows} for a in arms}
    plan = {
        "question": words,
        "arms": json.loads(json.dumps(given)),
        "flags": {method: [w for w in flags[method] if not w.startswith("--rerun")] for method in ("lora", "full")},
        "train_rows": manifest["sha256"]["train"],
        "fraction": settings.SELECTION_FRACTION,
    }
    sweep = Sweep(Path(settings.SWEEP_DIR), plan, arms)
    before = {}
    with contextlib.suppress(OSError, ValueError):
        before = json.loads((sweep.folder / "sweep.json").read_text("utf-8"))
    if before and settings.RERUN:
        place = handover.move_aside(sweep.folder, state.history_folder(sweep.folder))
        say(f"the older sweep lies in {place} now; to remove it: rm -r {place}")
        before = {}
    if before and before.get("plan") != plan:
        differing = [key for key in plan if before.get("plan", {}).get(key) != plan[key]]
        fail(
            f"{sweep.folder} holds another sweep (its {' and '.join(differing)} differ). Nothing was changed; sweep "
            f"in another folder: {command('run_all.py', '--sweep_dir', f'{sweep.folder}_2')}; or move it to "
            f"outputs/history and begin: {command('run_all.py', '--rerun')}"
        )
    if before:
        sweep.runs, sweep.selection = before["runs"], before["selection"]
    return sweep
