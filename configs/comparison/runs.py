"""The runs of a sweep, ordinary runs of step 2 or 3: one after the other, one per GPU, or as jobs of a cluster."""

import contextlib
import math
import os
import queue
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from configs import handover, state
from configs.comparison.plan import Sweep
from configs.comparison.question import SCRIPTS
from configs.settings import ROOT, fail, say
from configs.values import as_text

INTERRUPTED = (-2, -15, -1, 129, 130, 143)  # exit codes of a run that has saved a checkpoint and goes on from there
UNITS = {"MB": 1e6, "GB": 1e9}
ENGLISH = {"LANGUAGE": "en"}  # what the runs say is read by this program


def words_of(sweep: Sweep, run: dict, train_rows: int) -> list[str]:
    """The command line of a run, behind the python that starts it."""
    arm = next(a for a in sweep.arms if a.name == run["arm"])
    share = arm.rows * (sweep.plan["fraction"] if run["phase"] == "selection" else 1.0)
    own = {**arm.settings, "LEARNING_RATE": run["rate"], "SEED": run["seed"], "OUTPUT_DIR": run["folder"]}
    if share < 1:
        own["MAX_TRAIN_SAMPLES"] = math.ceil(share * train_rows)
    given = [f"--{name.lower()}={as_text(value)}" for name, value in own.items()]
    flags = [word for word in sweep.plan["flags"][arm.method] if not word.startswith("--push_to_hub=")]
    return [str(ROOT / SCRIPTS[arm.method]), *flags, *given]


def check_arms(sweep: Sweep, train_rows: int, seeds: int) -> float:
    """Ask each arm's script for its plan before anything is trained; bytes of disk that the sweep takes at most.

    seeds: fresh runs an arm. The weights of the runs that choose a rate go when those are scored, before the fresh
    ones begin. Raises: SystemExit(2) with what is wrong with any arm, or where the disk is too small.
    """
    problems, choosing, fresh, passing = [], 0.0, 0.0, 0.0
    for arm in sweep.arms:
        own = sweep.of(arm.name, "selection")
        words = [sys.executable, *words_of(sweep, own[0], train_rows), "--plan_only=true"]
        told = {"capture_output": True, "text": True, "encoding": "utf-8", "env": {**os.environ, **ENGLISH}}
        result = subprocess.run(words, stdin=subprocess.DEVNULL, **told)
        if result.returncode:
            lines = result.stderr.splitlines()
            errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines[-1:]
            problems += [f"arm {arm.name}: {line}" for line in errors]
            continue
        sizes = re.search(r"disk +([\d.,]+) (\w+) for checkpoints.*, ([\d.,]+) (\w+) of it stays", result.stdout)
        all_of_it, kept = (float(sizes[i].replace(",", "")) * UNITS[sizes[i + 1]] for i in (1, 3))
        choosing, fresh, passing = choosing + kept * len(own), fresh + kept * seeds, max(passing, all_of_it - kept)
    if problems:
        fail(*problems)
    needed = max(choosing, fresh) + passing
    place = next(path for path in (sweep.folder, *sweep.folder.resolve().parents) if path.is_dir())
    if (left := shutil.disk_usage(place).free) < needed:
        fail(
            f"the sweep needs up to {needed / 1e9:.1f} GB of disk, and {left / 1e9:.1f} GB are left in {place}; make "
            "room, give another folder (--sweep_dir PATH), or take fewer runs (--seeds 3, --selection_seeds 1)"
        )
    return needed


def await_older(folder: Path) -> None:
    """Wait for a run that an earlier sweep began, and that has outlived it, to end."""
    if handover.is_locked(folder):
        say(f"{folder}: a run of an earlier start is still at work{handover.holder(folder)}; waiting for it")
    while handover.is_locked(folder):
        time.sleep(1)


def train(sweep: Sweep, key: str, train_rows: int, gpu: int | None, starts: list) -> None:
    """Do one run as a child process, and note what came out. starts: the child processes that are alive."""
    run, folder = sweep.runs[key], Path(sweep.runs[key]["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    await_older(folder)
    env = {**os.environ, **ENGLISH} | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
    with (folder / "output.txt").open("a", encoding="utf-8") as output:
        child = subprocess.Popen(
            [sys.executable, *words_of(sweep, run, train_rows)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
        )
        starts.append(child)
        code = child.wait()
        starts.remove(child)
    over(sweep, key, code)


def over(sweep: Sweep, key: str, code: int) -> None:
    """A run has ended: note what came out, and remove its checkpoints."""
    run = sweep.runs[key]
    note(run, code)
    for checkpoint in Path(run["folder"]).glob("checkpoint-*") if run["state"] != "waiting" else []:
        shutil.rmtree(checkpoint, ignore_errors=True)  # what is needed of it lies in the final folder
    sweep.save()


def note(run: dict, code: int) -> None:
    """Put what a run's log says into its record. code: the exit code of its process."""
    log = state.training_log(run["folder"])
    summary, history = log.get("summary", {}), log.get("history", [])
    losses = [r["eval_loss"] for r in history if isinstance(r.get("eval_loss"), float)]
    keys = {"eval_loss": "eval_loss", "seconds": "train_runtime_s", "tokens": "tokens"}
    keys |= {"peak_memory_bytes": "peak_memory_bytes", "steps": "steps"}
    run |= {name: summary.get(key) for name, key in keys.items()}
    run["start_loss"] = losses[0] if losses else None
    last = losses[-1] if losses else None
    if code in INTERRUPTED:  # it goes on when the sweep does
        run["state"] = "waiting"
    elif summary.get("status") == "failed" or (code == 0 and last is not None and last > losses[0]):
        run |= {"state": "diverged", "why": "the loss became NaN" if code else "its loss ended above the start"}
    elif code or run["eval_loss"] is None:
        run |= {"state": "failed", "why": last_error(Path(run["folder"])) or f"exit code {code}"}
    else:
        run["state"] = "done"


def last_error(folder: Path) -> str:
    """The last line of a run's output that names an error."""
    with contextlib.suppress(OSError):
        lines = (folder / "output.txt").read_text("utf-8", "replace").splitlines()
        return next((line for line in reversed(lines) if "error" in line.lower()), "")[:300]
    return ""


def do_all(sweep: Sweep, keys: list[str], train_rows: int, where, total: int) -> None:
    """Do the runs that wait, with a line each. where: a number of GPUs, one run on each, or a jobs.Cluster.

    Raises: KeyboardInterrupt, when the children have ended well.
    """
    waiting = [key for key in keys if sweep.runs[key]["state"] == "waiting"]
    if not isinstance(where, int):
        for key, code in where.done(sweep, {key: words_of(sweep, sweep.runs[key], train_rows) for key in waiting}):
            over(sweep, key, code)
            say(line_of(sweep, key, total))
    else:
        here(sweep, waiting, train_rows, where, total)
    if any(sweep.runs[key]["state"] == "waiting" for key in keys):
        raise KeyboardInterrupt


def here(sweep: Sweep, waiting: list[str], train_rows: int, gpus: int, total: int) -> None:
    """Do runs on this machine, one on each GPU or one after the other."""
    devices: queue.Queue = queue.Queue()
    for number in range(gpus) if gpus > 1 else [None]:
        devices.put(number)
    alive: list = []

    def one(key: str) -> str:
        device = devices.get()
        try:
            train(sweep, key, train_rows, device, alive)
        finally:
            devices.put(device)
        return key

    with ThreadPoolExecutor(max(gpus, 1)) as pool:
        futures = [pool.submit(one, key) for key in waiting]
        try:
            for future in as_completed(futures):
                say(line_of(sweep, future.result(), total))
        except BaseException:  # Ctrl-C has reached the children, too: they save a checkpoint
            for future in futures:
                future.cancel()
            for child in list(alive):
                with contextlib.suppress(OSError):
                    child.terminate()
            raise


def line_of(sweep: Sweep, key: str, total: int) -> str:
    """One line on a run that is over: number, what came out, and the time that is left."""
    run = sweep.runs[key]
    ended = [r for r in sweep.runs.values() if r["state"] != "waiting"]
    what = f"eval_loss {run['eval_loss']:.4f}" if run["state"] == "done" else f"{run['state']}: {run.get('why', '')}"
    left = max(total - len(ended), 0)
    # a fresh run has all rows, where one that chooses a rate may have a share of them
    share = {"selection": sweep.plan["fraction"], "confirmation": 1.0, "seeds": 1.0}
    took = [r["seconds"] / share[r["phase"]] for r in ended if r.get("seconds")]
    ahead = sum(share[r["phase"]] for r in sweep.runs.values() if r["state"] == "waiting")
    ahead += max(left - sum(r["state"] == "waiting" for r in sweep.runs.values()), 0)
    spent = f", about {state.spell(ahead * sum(took) / len(took))} of training to go" if took and left else ""
    seconds = f" in {state.spell(run['seconds'])}" if run.get("seconds") else ""
    return f"[{len(ended)}/{total}] {run['arm']}, rate {run['rate']:.1e}, seed {run['seed']}: {what}{seconds}{spent}"
