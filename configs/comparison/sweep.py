"""A fair comparison: every arm at its own best learning rate, with fresh seeds. `python run_all.py --sweep [NAME]`.

A question is a YAML file beside this module, or one of the user's: a description and arms. An arm is a method (lora or
full) with any settings of its step, and `rows`, a share of the training rows. The sweep

1. trains each arm at five learning rates, half decades apart, around its method's centre, with the selection seeds;
2. takes the rate with the lowest validation loss; where that is at the edge, the grid grows, by two at most; where a
   share of the rows chose it, all rows decide between it and the next lower one;
3. trains each arm at its rate with fresh seeds: the luck of a run is in its validation and in its test loss alike;
4. scores all of them on the test split, which nothing before has seen (scoring.py), and compares (results.py).

Each run is an ordinary run of step 2 or 3 in SWEEP_DIR/ARM/lr_RATE_seed_N. sweep.json holds the plan and what came
out; a sweep that was killed goes on where it was.
"""

import json
import math
import os
import shlex
import signal
import subprocess
import sys

from configs import handover
from configs.comparison import jobs
from configs.comparison.plan import Sweep, begin
from configs.comparison.question import MORE, RATES, Arm, grid, model_width, neighbour, read_question
from configs.comparison.runs import check_arms, do_all, words_of
from configs.settings import ROOT, command, say

# Fresh seeds are 101, 102, ...; those that choose the rates are 1, 2, ..., and 51, 52, ... where all rows confirm one.
FIRST_FRESH, FIRST_CONFIRMING = 101, 51


# --- choosing


def best_rate(sweep: Sweep, arm: Arm, phase: str = "selection") -> float | None:
    """The rate with the lowest validation loss, mean over the seeds of a phase; None where every run failed."""
    losses: dict[float, list[float]] = {}
    for run in sweep.of(arm.name, phase):
        losses.setdefault(run["rate"], []).append(run["eval_loss"] if run["state"] == "done" else math.inf)
    means = {rate: sum(values) / len(values) for rate, values in losses.items()}
    rate = min(means, key=lambda rate: means[rate], default=None)
    return rate if rate is not None and math.isfinite(means[rate]) else None


def choose(sweep: Sweep, seeds: int, train_rows: int, where, total: int) -> None:
    """Train the grids, let them grow until each best rate has a worse one on either side, and note the rates.

    seeds: runs a rate; where: as for `do_all`.
    """
    for grown in range(MORE + 1):
        keys = [key for key, run in sweep.runs.items() if run["phase"] == "selection"]
        do_all(sweep, keys, train_rows, where, total)
        wanted = []
        for arm in sweep.arms:
            rates = sorted({run["rate"] for run in sweep.of(arm.name, "selection")})
            best = best_rate(sweep, arm)
            edge = best is not None and best in (rates[0], rates[-1])
            loss = None
            if best is not None:
                values = [r["eval_loss"] for r in sweep.of(arm.name, "selection") if r["rate"] == best]
                loss = sum(values) / len(values)
            sweep.selection[arm.name] = {"rate": best, "eval_loss": loss, "edge": edge}
            if edge and grown < MORE:
                wanted.append((arm, neighbour(best, -1 if best == rates[0] else 1)))
        for arm, rate in wanted:
            say(f"{arm.name}: the best rate is at the edge, so {rate:.1e} is tried, too")
            for seed in range(1, seeds + 1):
                sweep.add(arm, rate, seed, "selection")
        sweep.save()
        if not wanted:
            return


def confirm(sweep: Sweep, seeds: int, train_rows: int, where, total: int) -> None:
    """Where a share of the rows chose the rates: try each one, and the next lower one, on all rows; the better counts.

    Short runs prefer higher rates. In a study with half of the rows, rank 16 got a rate that was too high by one step
    of the grid (LOG.md), and its loss with all rows was worse than that of rank 4. seeds: runs a rate.
    """
    if sweep.plan["fraction"] == 1:
        return
    for arm in sweep.arms:
        chosen = sweep.selection[arm.name]["rate"]
        for rate in (chosen, neighbour(chosen, -1)) if chosen else ():
            for seed in range(FIRST_CONFIRMING, FIRST_CONFIRMING + seeds):
                sweep.add(arm, rate, seed, "confirmation")
    sweep.save()
    do_all(sweep, [k for k, r in sweep.runs.items() if r["phase"] == "confirmation"], train_rows, where, total)
    for arm in sweep.arms:
        if (best := best_rate(sweep, arm, "confirmation")) is not None:
            sweep.selection[arm.name]["rate"] = best
    sweep.save()


# --- all together


def run_sweep(settings, flags: dict[str, list[str]], values: dict[str, dict], gpus: int, ask) -> int:
    """Do the whole sweep; its exit code. data/ must be there.

    settings: run_all.py's own; flags: {section: argv of its script}; values: {section: its settings}; ask: a question
    in, yes or no out.
    """
    words, arms = read_question("default" if settings.SWEEP is True else str(settings.SWEEP))
    manifest = handover.read_manifest(values["lora"]["DATA_DIR"])
    train_rows, width = manifest["rows"]["train"], model_width(values["lora"]["MODEL_NAME"])
    with handover.lock(settings.SWEEP_DIR):
        sweep = begin(settings, arms, words, manifest, flags)
        for arm in arms:
            for rate in grid(arm.method, width):
                for seed in range(1, settings.SELECTION_SEEDS + 1):
                    sweep.add(arm, rate, seed, "selection")
        total = sum(run["phase"] == "selection" for run in sweep.runs.values()) + len(arms) * settings.SEEDS
        total += 2 * len(arms) * settings.SELECTION_SEEDS if sweep.plan["fraction"] < 1 else 0
        if values["lora"].get("PLAN_ONLY"):
            for run in sweep.runs.values():
                print(shlex.join(["python", *words_of(sweep, run, train_rows)]))
            return 0
        announce(sweep, settings, train_rows, width, total)
        if not ask():
            return 0
        sweep.save()
        where = gpus
        if settings.SWEEP_EXECUTOR != "here":
            where = jobs.Cluster(settings.SWEEP_EXECUTOR, sweep.folder, jobs.options(settings.SWEEP_JOB))
        for name in ("SIGTERM", "SIGHUP"):  # as Ctrl-C: the children are asked to save and end
            if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
                signal.signal(getattr(signal, name), signal.default_int_handler)
        try:
            choose(sweep, settings.SELECTION_SEEDS, train_rows, where, total)
            confirm(sweep, settings.SELECTION_SEEDS, train_rows, where, total)
            for arm in arms:
                chosen = sweep.selection[arm.name]["rate"]
                for seed in range(FIRST_FRESH, FIRST_FRESH + settings.SEEDS) if chosen else []:
                    sweep.add(arm, chosen, seed, "seeds")
            sweep.save()
            # what chose the rates is scored, unseen, so that its weights make room for the fresh runs
            if code := score_and_compare(sweep, settings, values, only_score=True):
                return code
            fresh = [key for key, run in sweep.runs.items() if run["phase"] == "seeds"]
            do_all(sweep, fresh, train_rows, where, len(sweep.runs))
            return score_and_compare(sweep, settings, values)
        except KeyboardInterrupt:
            sweep.save()
            say(f"\ninterrupted; what is done stays, and the same command goes on: {command('run_all.py')}")
            return 130


def announce(sweep: Sweep, settings, train_rows: int, width: int, total: int) -> None:
    """Say what the sweep is and what it takes. Raises: SystemExit(2) where an arm cannot be trained."""
    arms, over = sweep.arms, sum(run["state"] != "waiting" for run in sweep.runs.values())
    say(
        f"sweep: {sweep.plan['question']['description']}\n{len(arms)} arms ({', '.join(a.name for a in arms)}); "
        f"{RATES} learning rates x {settings.SELECTION_SEEDS} to choose, then {settings.SEEDS} fresh seeds each: "
        f"{total} runs, {over} of them done; up to {2 * MORE * len(arms)} more where a best rate is at the edge"
    )
    for arm in arms:
        say(f"  {arm.name}: {arm.method}, rates {', '.join(f'{rate:.1e}' for rate in grid(arm.method, width))}")
    if settings.SWEEP_EXECUTOR == "slurm":
        say("disk and memory are not checked: they are those of the machines that the jobs will get")
    elif not over:
        needed = check_arms(sweep, train_rows, settings.SEEDS)
        say(f"disk: up to {max(needed / 1e9, 0.1):.1f} GB; time: told after the first run, and after each one")


def score_and_compare(sweep: Sweep, settings, values: dict[str, dict], only_score: bool = False) -> int:
    """Score what was trained, compare, and write the report, in a child process that loads the models; its exit code.

    only_score: score the runs that are done and remove their weights; nothing is shown.
    """
    evaluate = values["evaluate"]
    given = {
        "sweep": str(sweep.folder),
        "data_dir": evaluate["DATA_DIR"],
        "model_name": evaluate["MODEL_NAME"],
        "model_revision": evaluate["MODEL_REVISION"],
        "general_text": evaluate["GENERAL_TEXT"],
        "precision": evaluate["PRECISION"],
        "resamples": evaluate["RESAMPLES"],
        "language": settings.LANGUAGE,
        "share": settings.MARGIN,
        "weights": settings.WEIGHT_ANALYSIS,
        "only_score": only_score,
    }
    words = [sys.executable, "-m", "configs.comparison.results", json.dumps(given)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.call(words, env=env)
