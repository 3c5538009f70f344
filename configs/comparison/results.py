"""What a sweep found: scores, comparisons over rows and seeds, sweep_results.json, the report. sweep.py starts it."""

import json
import math
import shutil
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from configs import handover, state
from configs.comparison import report
from configs.comparison.scoring import score_all
from configs.comparison.weights import intruders_of
from configs.evaluation import statistics
from configs.evaluation.candidates import load_held_out, not_replayed
from configs.evaluation.statistics import blocks
from configs.preparation.reading import general_text
from configs.settings import fail, say

PERPLEXITY = 1.02  # the second margin: 2 % of perplexity


def arm_runs(sweep: dict, arm: str, phase: str) -> list[dict]:
    """The runs of an arm in a phase that came to their end."""
    runs = [run for run in sweep["runs"].values() if run["arm"] == arm and run["phase"] == phase]
    return [run for run in runs if run["state"] == "done"]


def stacked(runs: list[dict], scores: dict, key: str) -> np.ndarray:
    """One score of several runs, shape (runs, rows)."""
    return np.array([scores[run["folder"]][key] for run in runs])


def compare_arms(sweep: dict, scores: dict, groups: list, resamples: int) -> list[dict]:
    """Every arm against the base, and every pair of arms, in nll of the test rows; p-values adjusted by family."""
    arms = {name: arm_runs(sweep, name, "seeds") for name in sweep["plan"]["arms"]}
    able = {name: stacked(runs, scores, "nll") for name, runs in arms.items() if len(runs) > 1}
    weight, base = scores["base"]["tokens"].astype(float), scores["base"]["nll"]
    families = [[(name, "base") for name in able], list(combinations(able, 2))]
    comparisons = []
    for family in families:
        compared = []
        for a, b in family:
            other = base if b == "base" else able[b]
            outcome = statistics.compare_runs(able[a], other, weight, groups, resamples, 0, len(family))
            compared.append({"a": a, "b": b, "metric": "nll_per_token", **outcome})
        adjusted = statistics.shaffer([c["p_value"] for c in compared])
        for comparison, p_value in zip(compared, adjusted, strict=True):
            comparison |= {"raw_p": comparison["p_value"], "p_value": p_value}
            comparison["standing"] = statistics.standing(comparison["ci95"], math.log(PERPLEXITY))
            comparison["needed"] = statistics.needed(comparison, math.log(PERPLEXITY))
        comparisons += compared
    return comparisons


def shares(sweep: dict, scores: dict, groups: list, share: float) -> list[dict]:
    """For each arm of LoRA and each of full fine-tuning: how much of full's gain over the base LoRA keeps."""
    arms, found = sweep["plan"]["arms"], []
    weight, base = scores["base"]["tokens"].astype(float), scores["base"]["nll"]
    for low in (name for name, arm in arms.items() if arm["method"] == "lora"):
        for full in (name for name, arm in arms.items() if arm["method"] == "full"):
            runs = arm_runs(sweep, low, "seeds"), arm_runs(sweep, full, "seeds")
            if arms[low]["rows"] == arms[full]["rows"] and min(map(len, runs)) > 1:
                given = (stacked(part, scores, "nll") for part in runs)
                found.append({"lora": low, "full": full, **statistics.share_kept(base, *given, weight, groups, share)})
    return found


def forgotten(sweep: dict, scores: dict, resamples: int) -> list[dict]:
    """What each arm lost on the general text at its rate, in nats per token over the base; [] without such a text."""
    if "general_nll" not in scores["base"]:
        return []
    weight, base = scores["base"]["general_tokens"].astype(float), scores["base"]["general_nll"]
    found = []
    for name in sweep["plan"]["arms"]:
        runs = arm_runs(sweep, name, "seeds")
        if len(runs) > 1:
            nll = stacked(runs, scores, "general_nll")
            outcome = statistics.compare_runs(nll, base, weight, blocks(len(weight)), resamples, 0)
            found.append({"a": name, "b": "base", "metric": "forgetting", **outcome})
    return found


def at_equal_learning(sweep: dict, scores: dict, groups: list, resamples: int) -> list[dict]:
    """For each pair of arms: which one forgets more where both have learned the same (statistics.at_equal_learning).

    The curve of an arm goes through the base and all its rates; the other arm's run at its best rate is compared with
    it (selection runs, the first seed).
    """
    if "general_nll" not in scores["base"]:
        return []
    base, found = scores["base"], []
    weights = base["tokens"].astype(float), base["general_tokens"].astype(float)

    def point(run: dict) -> tuple[np.ndarray, np.ndarray]:
        return scores[run["folder"]]["nll"], scores[run["folder"]]["general_nll"]

    def curve(name: str) -> list[dict]:
        runs = [run for run in arm_runs(sweep, name, "selection") if run["seed"] == 1]
        return sorted(runs, key=lambda run: run["rate"])

    for a in sweep["plan"]["arms"]:
        for b in sweep["plan"]["arms"]:
            own = [run for run in curve(a) if run["rate"] == sweep["selection"][a]["rate"]]
            if a != b and own and curve(b):
                points = [(base["nll"], base["general_nll"]), *map(point, curve(b))]
                both = groups, blocks(len(weights[1]))
                outcome = statistics.at_equal_learning(point(own[0]), points, weights, both, min(resamples, 2000), 0)
                found.append({"a": a, "b": b, **outcome})
    return found


def costs(sweep: dict) -> dict[str, dict]:
    """What the runs of each arm took: seconds and peak memory of a run with a fresh seed, and of all its runs."""
    found = {}
    for name in sweep["plan"]["arms"]:
        own = [run for run in sweep["runs"].values() if run["arm"] == name]
        fresh = [run for run in own if run["phase"] == "seeds" and run["state"] == "done"]
        found[name] = {
            "seconds": float(np.median([run["seconds"] for run in fresh])) if fresh else None,
            "peak_memory_bytes": max((run["peak_memory_bytes"] or 0 for run in fresh), default=None),
            "all_seconds": sum(run["seconds"] or 0 for run in own),
            "runs": len(own),
            "diverged": sum(run["state"] == "diverged" for run in own),
            "failed": sum(run["state"] == "failed" for run in own),
        }
    return found


def withheld(sweep: dict) -> dict[str, str]:
    """{arm: why nothing can be said of it}, as a key of a sentence: "edge" of the rates, "few_runs" or "no_rate"."""
    reasons = {}
    for name in sweep["plan"]["arms"]:
        if sweep["selection"][name]["rate"] is None:
            reasons[name] = "no_rate"
        elif sweep["selection"][name]["edge"]:
            reasons[name] = "edge"
        elif len(arm_runs(sweep, name, "seeds")) < 2:
            reasons[name] = "few_runs"
    return reasons


def analyse(sweep: dict, scores: dict, groups: list, resamples: int, share: float) -> dict:
    """Everything that sweep_results.json holds."""
    by_run = {
        run["folder"]: {
            "nll_per_token": float(scores[run["folder"]]["nll"].sum() / scores[run["folder"]]["tokens"].sum()),
            "general": float(
                scores[run["folder"]]["general_nll"].sum() / scores[run["folder"]]["general_tokens"].sum()
            )
            if "general_nll" in scores[run["folder"]]
            else None,
        }
        for run in sweep["runs"].values()
        if run["folder"] in scores
    }
    base = scores["base"]
    return {
        "question": sweep["plan"]["question"],
        "arms": sweep["plan"]["arms"],
        "fraction": sweep["plan"]["fraction"],
        "selection": sweep["selection"],
        "runs": {key: {**run, **by_run.get(run["folder"], {})} for key, run in sweep["runs"].items()},
        "base": {
            "nll_per_token": float(base["nll"].sum() / base["tokens"].sum()),
            "general": float(base["general_nll"].sum() / base["general_tokens"].sum())
            if "general_nll" in base
            else None,
        },
        "comparisons": compare_arms(sweep, scores, groups, resamples),
        "shares": shares(sweep, scores, groups, share),
        "forgetting": forgotten(sweep, scores, resamples),
        "equal_learning": at_equal_learning(sweep, scores, groups, resamples),
        "costs": costs(sweep),
        "withheld": withheld(sweep),
        "test_rows": len(base["nll"]),
        "test_groups": len(set(groups)),
        "margins": {"share": share, "perplexity": PERPLEXITY},
        "weights": None,
    }


def best_runs(sweep: dict) -> dict[str, dict | None]:
    """{arm: its fresh run with the lowest validation loss, None where none came through}."""
    fresh = {name: arm_runs(sweep, name, "seeds") for name in sweep["plan"]["arms"]}
    return {name: min(runs, key=lambda run: run["eval_loss"], default=None) for name, runs in fresh.items()}


def remove_weights(sweep: dict) -> None:
    """The weights of all runs that were scored but each arm's best fresh one; their logs and scores stay."""
    best = best_runs(sweep)
    for name, arm in sweep["plan"]["arms"].items():
        for run in (run for run in sweep["runs"].values() if run["arm"] == name and run is not best[name]):
            shutil.rmtree(Path(run["folder"]) / state.final_folder(arm["method"]), ignore_errors=True)


def main() -> None:
    given = SimpleNamespace(**json.loads(sys.argv[1]))
    folder = Path(given.sweep)
    sweep = handover.read_json(folder / "sweep.json", "run_all.py --sweep", ("plan", "runs", "selection"))
    for run in sweep["runs"].values():
        run["method"] = sweep["plan"]["arms"][run["arm"]]["method"]
    manifest = handover.read_manifest(given.data_dir)
    held_out = load_held_out(SimpleNamespace(DATA_DIR=given.data_dir, MAX_EVAL_SAMPLES=None), manifest)
    runs = [run for run in sweep["runs"].values() if run["state"] == "done"]
    folders = [Path(run["folder"]) for run in sweep["runs"].values()]
    general = not_replayed(general_text(given.general_text), given.general_text, folders)
    if not runs:
        why = next((run["why"] for run in sweep["runs"].values() if run.get("why")), "nothing was run")
        fail(f"no run of the sweep came to its end ({why}); see the output.txt of each run in {folder}")
    scores = score_all(given, runs, held_out, general, manifest["settings"]["PROMPT_FORMAT"])
    if given.only_score:
        return remove_weights(sweep)
    results = analyse(sweep, scores, held_out.groups, given.resamples, given.share)
    if given.weights:
        results["weights"] = intruders_of(best_runs(sweep), given.model_name, given.model_revision)
    with handover.replacing(folder) as new:
        handover.write_json(new / "sweep_results.json", results)
        report.write(results, new, given.language)
    remove_weights(sweep)
    say(f"\n{report.summary(results, given.language)}\n")
    say(f"look at {folder}/sweep_report.html (.md), {folder}/sweep_results.json")


if __name__ == "__main__":
    main()
