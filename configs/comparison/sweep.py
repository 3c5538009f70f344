"""A fair comparison: every arm at its own best learning rate, with fresh seeds. `python run_all.py --sweep [NAME]`.

A question is a YAML file beside this module, or one of the user's: a description and arms. An arm is a method (lora or
full) with any settings of its step, and `rows`, a share of the training rows. The sweep

1. trains each arm at five learning rates, half decades apart, around its method's centre, with the selection seeds;
2. takes the rate with the lowest validation loss; where that is at the edge, the grid grows, by two at most;
3. trains each arm at its rate with fresh seeds: the luck of a run is in its validation and in its test loss alike;
4. scores all of them on the test split, which nothing before has seen (score.py), and compares (results.py).

Each run is an ordinary run of step 2 or 3 in SWEEP_DIR/ARM/lr_RATE_seed_N. sweep.json holds the plan and what came
out; a sweep that was killed goes on where it was.
"""

import contextlib
import json
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from configs import handover, hub, state
from configs.flags import near
from configs.settings import ROOT, SECTIONS, command, fail, say
from configs.text import quoted, read_yaml
from configs.values import as_text, read_constants

FOLDER = Path(__file__).parent
SCRIPTS = {section: script for script, section in SECTIONS.items()}
RATES, MORE = 5, 2  # learning rates an arm; how many more each way where the best one is at the edge
# The centre of full fine-tuning's grid: 5e-5 at phi-2's width, and in inverse proportion to the width, as Adam's rates
# go (Yang et al. 2022, "Tensor Programs V"); LoRA's is ten times that ("LoRA Without Regret", Thinking Machines 2025).
CENTRE, WIDTH, LORA_TIMES = 5e-5, 2560, 10
FIRST_FRESH = 101  # fresh seeds are 101, 102, ...; those that choose the rates are 1, 2, ...


# --- the question


@dataclass(frozen=True)
class Arm:
    """One side of the comparison. settings: {CONSTANT: value} of its step; rows: share of the training rows."""

    name: str
    method: str
    settings: dict
    rows: float = 1.0


def read_question(name: str, root: Path = ROOT) -> tuple[dict, list[Arm]]:
    """({"name", "description", "description_zh"}, arms) of a question, by its name or by a path.

    Raises: SystemExit(2) where it is wrong, with all that is.
    """
    known = {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}
    path = hub.local_path(name) if name.endswith((".yaml", ".yml")) else known.get(name)
    if path is None or not path.is_file():
        listed = "".join(f"\n  {stem}: {read_yaml(file)[0]['description']}" for stem, file in known.items())
        hint = f"; did you mean {guess}?" if (guess := near(name, known)) else ""
        fail(f"unknown question {quoted(name)}{hint}; give a path to a .yaml file, or one of{listed}")
    data, wrong = read_yaml(path)
    if not isinstance(data, dict) or not isinstance(data.get("arms"), dict) or len(data["arms"]) < 2:
        fail(
            *[f"{path}, {line}" for line in wrong],
            f"{path} wants `arms:` with at least two arms, each with a `method:`",
        )
    problems, arms = [f"{path}, {line}" for line in wrong], []
    for title, body in data["arms"].items():
        where = f"{path}, arm {title}"
        if not isinstance(body, dict) or body.get("method") not in ("lora", "full"):
            problems.append(f"{where} wants `method: lora` or `method: full`")
            continue
        if not str(title).replace("_", "").replace("-", "").isalnum() or len(str(title)) > 50:
            problems.append(f"{where}: a name holds letters, digits, - and _ only, 50 at most: it becomes a folder")
        constants, settings = read_constants(root / SCRIPTS[body["method"]]), {}
        rows = body.get("rows", 1.0)
        if not isinstance(rows, int | float) or not 0 < rows <= 1:
            problems.append(f"{where}: rows is a share of the training rows, above 0 and up to 1; it is {rows!r}")
            rows = 1.0
        for key, value in body.items():
            upper = str(key).upper()
            if key in ("method", "rows"):
                continue
            if upper in ("LEARNING_RATE", "SEED", "OUTPUT_DIR", "MAX_TRAIN_SAMPLES", "RERUN", "RESUME"):
                problems.append(f"{where}: {key} is what the sweep sets; leave it out")
            elif upper not in constants:
                guess = near(str(key), [name.lower() for name in constants])
                problems.append(f"{where}: unknown setting {key}{f'; did you mean {guess}?' if guess else ''}")
            else:
                try:
                    settings[upper] = constants[upper].parse(value, where)
                except ValueError as error:
                    problems.append(error)
        arms.append(Arm(str(title), body["method"], settings, float(rows)))
    if problems:
        fail(*problems)
    words = {"description": str(data.get("description") or path.stem), "name": path.stem}
    return words | {"description_zh": str(data.get("description_zh") or words["description"])}, arms


def grid(method: str, width: int, count: int = RATES) -> list[float]:
    """`count` learning rates, half decades apart, around the one nearest to a method's centre; width: of the model."""
    centre = CENTRE * WIDTH / width * (LORA_TIMES if method == "lora" else 1)
    middle = round(2 * math.log10(centre))
    return [half_decade(middle + k - count // 2) for k in range(count)]


def half_decade(k: int) -> float:
    """10^(k/2) to two digits: 1e-4, 3.2e-4, 1e-3."""
    return float(f"{10 ** (k / 2):.1e}")


def neighbour(rate: float, step: int) -> float:
    """The rate `step` half decades further."""
    return half_decade(round(2 * math.log10(rate)) + step)


def model_width(name: str) -> int:
    """The hidden size of a model, from its configuration."""
    place, config = hub.local_path(name), {}
    if place is not None:
        config = handover.read_json(place / "config.json", "a folder with a model")
    else:
        hub.go_online(name)
        from configs import models  # heavy, and the libraries read what go_online has found

        config = models.configuration(name, None).get_text_config().to_dict()
    config = config.get("text_config") or config
    for key in ("hidden_size", "n_embd", "d_model"):
        if isinstance(config.get(key), int) and config[key] > 0:
            return config[key]
    fail(f"the configuration of {name!r} names no hidden_size, from which the learning rates of the sweep follow")


# --- the plan and what came out


@dataclass
class Sweep:
    """A sweep: its plan, and the state of its runs, as sweep.json holds them.

    plan: what must be the same when it goes on. runs: {key: record}, a record has arm, rate, seed, phase ("selection"
    or "seeds"), folder, state ("waiting", "done", "diverged" or "failed"), and when it is over eval_loss, start_loss,
    seconds, tokens, peak_memory_bytes, why. selection: {arm: {rate, eval_loss, edge}}.
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


# --- runs


def words_of(sweep: Sweep, run: dict, train_rows: int) -> list[str]:
    """The command line of a run, behind the python that starts it."""
    arm = next(a for a in sweep.arms if a.name == run["arm"])
    share = arm.rows * (sweep.plan["fraction"] if run["phase"] == "selection" else 1.0)
    own = {**arm.settings, "LEARNING_RATE": run["rate"], "SEED": run["seed"], "OUTPUT_DIR": run["folder"]}
    if share < 1:
        own["MAX_TRAIN_SAMPLES"] = math.ceil(share * train_rows)
    given = [f"--{name.lower()}={as_text(value)}" for name, value in own.items()]
    return [str(ROOT / SCRIPTS[arm.method]), *sweep.plan["flags"][arm.method], *given]


def train(sweep: Sweep, key: str, train_rows: int, gpu: int | None, starts: list[list[str]]) -> None:
    """Do one run as a child process, and note what came out. starts: the child processes that are alive."""
    run, folder = sweep.runs[key], Path(sweep.runs[key]["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    env = dict(os.environ) if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
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
    note(run, code)
    for checkpoint in folder.glob("checkpoint-*") if run["state"] != "waiting" else []:
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
    if code in (-2, -15, -1, 129, 130, 143):  # interrupted: it goes on when the sweep does
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


def do_all(sweep: Sweep, keys: list[str], train_rows: int, gpus: int, total: int) -> None:
    """Do the runs that wait, one on each GPU or one after the other, with a line each.

    Raises: KeyboardInterrupt, when the children have ended well.
    """
    waiting = [key for key in keys if sweep.runs[key]["state"] == "waiting"]
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
    if any(sweep.runs[key]["state"] == "waiting" for key in keys):
        raise KeyboardInterrupt


def line_of(sweep: Sweep, key: str, total: int) -> str:
    """One line on a run that is over: number, what came out, and the time that is left."""
    run = sweep.runs[key]
    over = [r for r in sweep.runs.values() if r["state"] != "waiting"]
    what = f"eval_loss {run['eval_loss']:.4f}" if run["state"] == "done" else f"{run['state']}: {run['why']}"
    left = max(total - len(over), 0)
    took = [r["seconds"] for r in over if r.get("seconds")]
    spent = f", about {state.spell(left * sum(took) / len(took))} of training to go" if took and left else ""
    seconds = f" in {state.spell(run['seconds'])}" if run.get("seconds") else ""
    return f"[{len(over)}/{total}] {run['arm']}, rate {run['rate']:.1e}, seed {run['seed']}: {what}{seconds}{spent}"


# --- choosing


def best_rate(sweep: Sweep, arm: Arm) -> float | None:
    """The rate with the lowest validation loss, mean over the selection seeds; None where every run failed."""
    losses: dict[float, list[float]] = {}
    for run in sweep.of(arm.name, "selection"):
        losses.setdefault(run["rate"], []).append(run["eval_loss"] if run["state"] == "done" else math.inf)
    means = {rate: sum(values) / len(values) for rate, values in losses.items()}
    rate = min(means, key=lambda rate: means[rate], default=None)
    return rate if rate is not None and math.isfinite(means[rate]) else None


def choose(sweep: Sweep, seeds: int, train_rows: int, gpus: int, total: int) -> None:
    """Train the grids, let them grow until each best rate has a worse one on either side, and note the rates."""
    for grown in range(MORE + 1):
        keys = [key for key, run in sweep.runs.items() if run["phase"] == "selection"]
        do_all(sweep, keys, train_rows, gpus, total)
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
        total = len(sweep.runs) + len(arms) * settings.SEEDS
        if values["lora"].get("PLAN_ONLY"):
            for run in sweep.runs.values():
                print(" ".join(["python", *words_of(sweep, run, train_rows)]))
            return 0
        over = sum(run["state"] != "waiting" for run in sweep.runs.values())
        say(
            f"sweep: {words['description']}\n{len(arms)} arms ({', '.join(a.name for a in arms)}); {RATES} learning "
            f"rates x {settings.SELECTION_SEEDS} to choose, then {settings.SEEDS} fresh seeds each: {total} runs, "
            f"{over} of them done; up to {2 * MORE * len(arms)} more where a best rate is at the edge. How long they "
            "take is told after the first one"
        )
        for arm in arms:
            rates = ", ".join(f"{rate:.1e}" for rate in grid(arm.method, width))
            say(f"  {arm.name}: {arm.method}, rates {rates}")
        if not ask():
            return 0
        sweep.save()
        for name in ("SIGTERM", "SIGHUP"):  # as Ctrl-C: the children are asked to save and end
            if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
                signal.signal(getattr(signal, name), signal.default_int_handler)
        try:
            choose(sweep, settings.SELECTION_SEEDS, train_rows, gpus, total)
            for arm in arms:
                chosen = sweep.selection[arm.name]["rate"]
                for seed in range(FIRST_FRESH, FIRST_FRESH + settings.SEEDS) if chosen else []:
                    sweep.add(arm, chosen, seed, "seeds")
            sweep.save()
            total = len(sweep.runs)
            do_all(sweep, [k for k, r in sweep.runs.items() if r["phase"] == "seeds"], train_rows, gpus, total)
            return finish(sweep, settings, values)
        except KeyboardInterrupt:
            sweep.save()
            say(f"\ninterrupted; what is done stays, and the same command goes on: {command('run_all.py')}")
            return 130


def finish(sweep: Sweep, settings, values: dict[str, dict]) -> int:
    """Score what was trained, compare, and write the report, in a child process that loads the models."""
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
    }
    words = [sys.executable, "-m", "configs.comparison.results", json.dumps(given)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.call(words, env=env)
