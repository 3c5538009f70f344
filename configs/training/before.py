"""What is looked at before a training starts: settings, machine, other processes, the rows."""

import functools
import importlib.util
import itertools
import json
import math
import os
import secrets
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset

from configs import chat, device, handover, hub, models
from configs.settings import command, fail, first_on_machine, main_process, say
from configs.training import checkpoints, doubts, push
from configs.training.memory import Plan, sharing
from configs.training.resume import Start, say_new_end
from configs.training.trainer import StepSampler, cut, deepspeed_path
from configs.translation import translated

MOST_ROWS = 100_000  # of an optimizer step; the memory plan tries every number of them, which takes seconds then
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "swanlab", "none")  # REPORT_TO; each is a package's name

# --- settings and model


def problems(settings: dict) -> list[str]:
    """What is wrong between a training's settings, or between them and this machine; one sentence each."""
    wrong = []
    for name in ("EVAL_STEPS", "SAVE_STEPS"):
        if settings[name] > 1 and settings[name] != int(settings[name]):
            wrong.append(f"{name} is {settings[name]}; above 1 it counts steps and must be whole")
    if settings["SAVE_STEPS"] != settings["EVAL_STEPS"] and not wrong:
        wrong.append(
            f"SAVE_STEPS ({settings['SAVE_STEPS']}) must equal EVAL_STEPS ({settings['EVAL_STEPS']}), so that the "
            f"best model that was evaluated is also saved: --save_steps {settings['EVAL_STEPS']}"
        )
    if settings["REPLAY_FRACTION"] and not settings["REPLAY_TEXT"]:
        wrong.append(
            f"REPLAY_FRACTION is {settings['REPLAY_FRACTION']}, but REPLAY_TEXT names no text; give a file or a Hub "
            "data set, e.g. --replay_text Salesforce/wikitext#wikitext-2-raw-v1, or: --replay_fraction 0"
        )
    rows = settings["BATCH_SIZE"] * settings["GRADIENT_ACCUMULATION_STEPS"]
    if rows > MOST_ROWS:
        wrong.append(
            f"BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS is {rows:,}, and a step takes {MOST_ROWS:,} rows at most: "
            "--batch_size 4 --gradient_accumulation_steps 4"
        )
    for tracker in settings["REPORT_TO"].replace(" ", "").split(","):
        if tracker not in TRACKERS:
            wrong.append(f"REPORT_TO is {tracker!r}; choose one of: {', '.join(TRACKERS)}")
        elif tracker != "none" and importlib.util.find_spec(tracker) is None:
            wrong.append(f"REPORT_TO is {tracker!r}, which is not installed: pip install {tracker}")
        elif tracker == "swanlab" and not swanlab_knows_where():
            wrong.append(
                "REPORT_TO is 'swanlab', and nobody is logged in to it: run `swanlab login`, or keep its runs on this "
                "machine: export SWANLAB_MODE=local"
            )
    if "none" in settings["REPORT_TO"] and settings["REPORT_TO"].strip() != "none":
        wrong.append(f"REPORT_TO is {settings['REPORT_TO']!r}; none stands alone: --report_to none")
    if name := settings["PUSH_TO_HUB"]:
        wrong += push.refusals(name)
    if not (in_file := deepspeed_problems(SimpleNamespace(**settings))):
        wrong += splitting_problems(SimpleNamespace(**settings))
    return wrong + in_file


def deepspeed_problems(settings) -> list[str]:
    """What is wrong with the DeepSpeed configuration in force: DEEPSPEED_CONFIG's, or the launcher's."""
    name, given = "DEEPSPEED_CONFIG", settings.DEEPSPEED_CONFIG if getattr(settings, "USE_DEEPSPEED", False) else None
    path = hub.local_path(given) if given else None
    if given is None and (given := deepspeed_path(settings)):
        name, path = "--deepspeed_config_file", Path(given)
    text = ""
    if given:
        if path is None or not path.is_file():
            return [f"{name} {given!r} is missing or no file; use configs/ds_config.json"]
        try:
            text = path.read_text("utf-8")
            config = json.loads(text)
            if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
                raise ValueError("an object with an object zero_optimization is needed")
        except (ValueError, RecursionError) as error:
            return [f"{name} {path} is not JSON of the right shape ({error}); compare configs/ds_config.json"]
    if ("offload" in text or sharing(settings)["offload"]) and not shutil.which("nvcc"):
        who = path or "the launcher's configuration"
        return [f"{who} offloads to the CPU, which compiles with the CUDA toolkit, and nvcc is not there; install it"]
    return []


def splitting_problems(settings) -> list[str]:
    """What cannot be done with a model whose weights are shared out over the processes."""
    split = sharing(settings)
    way = {("deepspeed", 3): "ZeRO-3", ("fsdp", 3): "FSDP"}.get((split["engine"], split["stage"]))
    if way is None:
        return []
    wrong = []
    if getattr(settings, "USE_4BIT", False):
        wrong.append(
            f"{way} cannot split a 4-bit base: launch with configs/accelerate/ddp.yaml, with --zero_stage 2, or train "
            "LoRA over 16 bits: --use_4bit false"
        )
    if getattr(settings, "MERGE_ADAPTER", False):
        merge = command(handover.LORA, "--merge_adapter", "--resume", "true")
        wrong.append(
            f"MERGE_ADAPTER needs the whole model in one process, and {way} splits it: train without it, and merge "
            f"afterwards in one process: {merge}"
        )
    return wrong


def model_config(name: str, revision: str | None, max_length: int, weights: bool):
    """The model's configuration, read before its weights; exit code 2 where MAX_LENGTH exceeds its positions.

    weights: whether a local folder must hold all weights, too.
    """
    config = models.configuration(name, revision)
    models.check(name, config, weights)
    positions = chat.positions(config)
    if max_length > positions:
        fail(f"MAX_LENGTH is {max_length}, but {name} has only {positions} positions: --max_length {positions}")
    return config


def swanlab_knows_where() -> bool:
    """Whether swanlab can begin a run: by SWANLAB_MODE, a key, an earlier login, or by asking at a terminal."""
    if os.environ.get("SWANLAB_MODE", "online") not in ("online", "cloud") or os.environ.get("SWANLAB_API_KEY"):
        return True
    places = [Path(".swanlab/.netrc"), Path("~/.swanlab/.netrc").expanduser(), Path("~/.netrc").expanduser()]
    return any(place.is_file() for place in places) or bool(sys.stdin and sys.stdin.isatty())


# --- processes, the rows


def preflight(rows: Dataset, validation: Dataset, tokenizer, settings, config, plan: Plan, start: Start) -> None:
    """Show one row as the model will see it, and what the run will do. Ends with exit code 2 where that is nothing.

    rows, validation: with input_ids and labels; config: of the model. The trained tokens stand between the brackets.
    """
    row = rows[0]
    first = next(n for n, label in enumerate(row["labels"]) if label != -100)
    before, after = tokenizer.decode(row["input_ids"][:first]), tokenizer.decode(row["input_ids"][first:])
    say(f"a row as the model sees it, trained between the brackets:\n{before}⟦{after}⟧\n")
    step, devices = plan.rows, device.processes()
    asked = f"one optimizer step takes {settings.BATCH_SIZE} x {settings.GRADIENT_ACCUMULATION_STEPS} = {step} rows"
    if step > len(rows):
        fail(
            f"{asked}, and there are {len(rows)}; take fewer: "
            f"--batch_size 1 --gradient_accumulation_steps {max(len(rows) // 4, 1)}"
        )
    if step % devices:
        fits = ", ".join(str(n) for n in range(1, step + 1) if step % n == 0)
        more = next(n for n in itertools.count(step // settings.BATCH_SIZE) if n * settings.BATCH_SIZE % devices == 0)
        fail(
            f"{asked}, which {devices} processes cannot share out evenly; start {fits} processes, or more rows in "
            f"both trainings: --batch_size {settings.BATCH_SIZE} --gradient_accumulation_steps {more}"
        )
    steps = settings.MAX_STEPS or math.ceil(math.ceil(len(rows) / step) * settings.NUM_EPOCHS)
    warmup = math.ceil(steps * settings.WARMUP_RATIO)
    if settings.WARMUP_RATIO and warmup >= steps:
        fail(
            f"the run has {steps} step{'s' * (steps > 1)}, and WARMUP_RATIO={settings.WARMUP_RATIO} makes {warmup} of "
            "them warm-up: the learning rate would never be reached; train longer, or --warmup_ratio 0"
        )
    lengths, trained = np.array(rows["length"]), sum(rows["trained"])
    sampler = StepSampler(lengths, step, settings.SEED)
    passes = [lengths[numbers][part] for numbers in sampler.steps() for part in cut(lengths[numbers], plan.tokens)]
    padding = 0 if plan.packing else 1 - lengths.sum() / sum(len(part) * part.max() for part in passes)
    if sharing(settings)["engine"] == "fsdp":
        say("note: FSDP was not tried on a GPU yet; on the CPU, accelerate takes DDP instead")
    method = "LoRA" if hasattr(settings, "LORA_R") else "full fine-tuning"
    say(
        f"{method} of {settings.MODEL_NAME}: {len(rows)} rows of {lengths.sum():,} tokens, {trained:,} of them "
        f"trained, {padding:.1%} padding; {len(validation)} rows to validate; {steps} steps of {step} rows, {warmup} "
        "of them warm-up",
        always=True,
    )
    if doubt := doubts.odd_rate(settings, config.get_text_config().hidden_size):
        say(f"warning: {doubt}")
    say_new_end(start, settings, steps)


def meet(settings) -> dict:
    """The manifest of the data, after all processes have met and seen the same data and the same OUTPUT_DIR.

    Raises: SystemExit(2) in all of them where one has no data or others, or another OUTPUT_DIR (machines that share no
    folder), with the ways out. From here on, the loss of another process ends this one in one line, with exit code 1.
    """
    device.join()
    if not device.launched():
        return handover.read_manifest(settings.DATA_DIR)
    sys.excepthook = functools.partial(_say_lost, settings.OUTPUT_DIR, sys.excepthook)
    manifest, code = None, None
    if first_on_machine():  # those of one machine see the same files
        try:
            manifest = handover.read_manifest(settings.DATA_DIR)
        except SystemExit as ending:
            code = ending.code
    output = Path(settings.OUTPUT_DIR)
    token, place = device.decided_once(lambda: _leave_token(output))
    mine = (device.machine(), code, manifest and manifest["manifest_sha256"], (output / token).exists())
    met = gather_object([mine])  # no process is beyond this line before all have looked
    if main_process():
        (output / token).unlink(missing_ok=True)
    if any(code is not None for _, code, _, _ in met):
        raise SystemExit(2)
    if lacking := sorted({f"{number} ({name})" for (number, name), _, _, seen in met if not seen}):
        fail(
            f"machine {', '.join(lacking)} does not see the OUTPUT_DIR of machine 0, {place}; put it on a "
            "file system that all machines share: --output_dir /shared/PATH, or train on one machine"
        )
    if len({sha for _, _, sha, _ in met if sha}) > 1:
        fail(
            f"DATA_DIR {settings.DATA_DIR} differs between the machines (manifest_sha256); copy it from machine 0, or "
            "put it on a file system that all share: --data_dir /shared/PATH"
        )
    return manifest or handover.read_manifest(settings.DATA_DIR)


def _say_lost(output_dir: str, otherwise: Callable, kind: type, error: BaseException, trace) -> None:
    """An excepthook: one line where another process was lost, with what goes on."""
    why = device.lost_process(error)
    if not why:
        return otherwise(kind, error, trace)
    if first_on_machine():
        last = checkpoints.found(output_dir)
        goes_on = f"it goes on from {last[0].path}" if last else "no checkpoint was saved, so it begins anew"
        words = (
            f"error: another process ended, or did not answer within {device.PATIENCE.seconds // 60} minutes ({why}); "
            f"see why on its machine, then start all of them again with the same command: {goes_on}"
        )
        print(translated(words), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # a plain exit would wait for the process that is gone


def _leave_token(output: Path) -> tuple[str, str]:
    """Leave an empty file; its name, and where it lies on this machine."""
    name = f".met-{secrets.token_hex(8)}"
    handover.write_text(output / name, "")
    return name, str(output.resolve())
