"""Where a training begins: afresh, at a checkpoint of the same run, or not at all because it is finished.

Nothing that is finished is thrown away. A run that lies in OUTPUT_DIR is gone on with where it has the same identity
(configs/state.py); where it has another one, the user says what becomes of it.
"""

import contextlib
import json
import math
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import get_scheduler

from configs import device, handover, state
from configs.settings import command, fail, main_process, say
from configs.training import checkpoints
from configs.translation import phrase, translated
from configs.values import as_text

SCRIPTS = {"lora": handover.LORA, "full": handover.FULL}


@dataclass(frozen=True)
class Start:
    """How a training begins. checkpoint: to go on from, or None; run: what its manifest says of it, or {}.

    identity: of the run that is to be made. aside: whether what lies there must be moved away first. best: name of
    the best checkpoint so far, or None. lost_best: whether it was damaged, so that another one must become the best.
    """

    identity: dict
    checkpoint: str | None = None
    run: dict | None = None
    aside: bool = False
    best: str | None = None
    lost_best: bool = False

    @property
    def plan(self) -> dict | None:
        """The memory plan that the checkpoint was trained with."""
        return self.run["plan"] if self.run else None


def where_to_start(method: str, settings, manifest: dict, config) -> Start:
    """How this training begins, decided once by the first process. settings: of the script; config: of its model.

    Raises: SystemExit(0) where the run is finished already, SystemExit(2) where another run lies in OUTPUT_DIR and
    nobody is there to ask, with what can be done. Collective.
    """
    commit = getattr(config, "_commit_hash", None)  # of a model on the Hub
    now = state.identity(method, vars(settings), manifest, commit)
    return device.decided_once(lambda: _decide(settings, now))


def _decide(settings, now: dict) -> Start:
    output, method, script = settings.OUTPUT_DIR, now["method"], SCRIPTS[now["method"]]
    log, sealed = state.training_log(output), checkpoints.found(output)
    done = state.finished(output, method, log)
    before = log.get("identity") or (sealed[0].run["identity"] if sealed else None)
    if sealed and not done:  # the checkpoints are what can be gone on with, whatever the log says
        before = sealed[0].run["identity"]
    older = [] if before else list(Path(output).glob("checkpoint-*/trainer_state.json"))  # of an older version
    lies_there = bool(sealed or older) or state.has_weights(Path(output) / state.final_folder(method))
    # a run that was begun with --rerun and interrupted goes on by the same command
    unfinished = bool(sealed) and not done and not state.differences(before, now)
    if settings.RESUME is False or (settings.RERUN and not unfinished):
        return Start(now, aside=lies_there)
    if not lies_there:
        if settings.RESUME is True:
            fail(f"RESUME is true, but {output} holds no checkpoint to go on from; start afresh with: --resume auto")
        _say_lost(output)
        return Start(now)
    differing = state.differences(before, now) if before else None
    later = differing is not None and state.later_end(differing)
    if differing is None or (differing and not (later and (not done or settings.RESUME is True))):
        return _another_run(settings, now, differing, log, sealed, done)
    if done and not differing:
        merged = not getattr(settings, "MERGE_ADAPTER", False) or state.has_weights(Path(output) / "merged_model")
        if merged and settings.RESUME is not True:
            name, folder = settings.PUSH_TO_HUB, Path(output) / state.final_folder(method)
            if name and name not in log.get("pushed", {}):
                fail(f"{output} is finished already, and is not on the Hub as {name}: hf upload {name} {folder}")
            say(
                f"already done: {output}: {_told(log, sealed)}; to train it again: {command(script, '--rerun')}",
                always=True,
            )
            raise SystemExit(0)
    alone = None  # the newest that is whole but for its best one
    for checkpoint, wrong, of_best in checkpoints.whole(sealed):
        if not wrong and not of_best:
            _say_changes(checkpoint, settings)
            return Start(now, str(checkpoint.path), checkpoint.run, best=checkpoint.run.get("best"))
        alone = alone or (None if wrong else checkpoint)
        why = wrong or f"its best checkpoint so far, {checkpoint.run['best']}: {of_best}"
        say(f"note: {checkpoint.path} is damaged ({why}) and is not used where another one is whole")
    if alone:
        say(f"note: {alone.run['best']} was the best so far and is lost: the best one from here on will count")
        _say_changes(alone, settings)
        return Start(now, str(alone.path), alone.run, lost_best=True)
    if done:
        fail(
            f"{output} is finished, but no checkpoint is left to go on from; keep it and train in another folder: "
            f"{_elsewhere(script, output)}; or move it aside and train again: {command(script, '--rerun')}"
        )
    if settings.RESUME is True:
        fail(f"RESUME is true, but no checkpoint in {output} is whole; start afresh with: --resume auto")
    say(f"no checkpoint in {output} is whole: the training begins anew")
    return Start(now)


def _say_lost(output: str) -> None:
    """One line where checkpoints lie that were cut off while they were written, or that an older version made."""
    if cut := sorted(path.name for path in Path(output).glob("checkpoint-*")):
        say(f"note: {', '.join(cut)} in {output} cannot be gone on with (cut off, or of an older version)")


def _told(log: dict, sealed: list) -> str:
    """What lies in a folder: steps, time and eval_loss, from its log or from its newest checkpoint."""
    summary = log.get("summary", {})
    steps, seconds, loss = (summary.get(key) for key in ("steps", "train_runtime_s", "eval_loss"))
    total = sealed[0].run.get("steps") if sealed else None
    if sealed and not isinstance(steps, int):
        steps = sealed[0].step
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads((sealed[0].path / "trainer_state.json").read_text("utf-8"))
            loss, seconds = saved["best_metric"], saved["stateful_callbacks"]["RunLog"]["attributes"]["seconds"]
    parts = [f"{steps} of {total} steps" if total and total != steps else f"{steps} steps"] if steps else []
    parts += [state.spell(seconds)] if isinstance(seconds, int | float) else []
    parts += [f"eval_loss {loss:.4f}"] if isinstance(loss, int | float) else []
    return ", ".join(parts) or "a model, and no log of it"


def _say_changes(checkpoint: checkpoints.Checkpoint, settings) -> None:
    say(f"resuming from {checkpoint.path}")
    before, now = checkpoint.run["settings"], vars(settings)
    changed = [f"{n} was {before[n]!r} and is {now[n]!r}" for n in state.SAID if n in before and before[n] != now[n]]
    if changed:
        say(f"note: from here on {'; '.join(changed)}")


def say_new_end(start: Start, settings, steps: int) -> None:
    """Where a run goes on to another end, say what that does to the learning rate. steps: of the whole run now."""
    planned = start.run.get("steps") if start.run else None
    if not planned or planned == steps:
        return
    step = start.run["step"]
    then, now = (rate_at(settings, step, end) for end in (planned, steps))
    say(
        f"note: the run now has {steps} steps instead of {planned}. It goes on at step {step} with a learning rate of "
        f"{now:.2e} instead of {then:.2e} ({settings.LR_SCHEDULER}); a run that was to have {steps} steps from its "
        "start would have had other rates before, too"
    )


def rate_at(settings, step: int, steps: int) -> float:
    """The learning rate of a step in a run of `steps` steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings.LEARNING_RATE)
    warmup = math.ceil(steps * settings.WARMUP_RATIO)
    schedule = get_scheduler(settings.LR_SCHEDULER, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    rates = getattr(schedule, "lr_lambdas", None)
    return settings.LEARNING_RATE * rates[0](step) if rates else settings.LEARNING_RATE


# --- another run lies there


def _another_run(settings, now: dict, differing: dict | None, log: dict, sealed: list, done: bool) -> Start:
    """Ask what becomes of the run that lies there; without a terminal, end with exit code 2 and the commands."""
    output, script = settings.OUTPUT_DIR, SCRIPTS[now["method"]]
    told = f"{output} holds another run: {_told(log, sealed)}, {'finished' if done else 'not finished'}"
    if differing is None:
        what = ["which run it is cannot be told: an older version of this script made it, or its log is lost"]
    else:
        what = [state.spelled(name, *values) for name, values in differing.items()]
    old_flags = _flags_of(differing or {}, sealed[0].run["settings"] if sealed else log.get("settings", {}))
    ways = [("train in another folder", _elsewhere(script, output))]
    if old_flags is not None:
        ways.append(("keep it" if done else "go on with it", command(script, *old_flags)))
    if differing and state.later_end(differing):
        ways.append(("go on with it to the later end", command(script, "--resume", "true")))
    aside = ("move it to outputs/history and train", command(script, "--rerun"))
    if not (sys.stdin and sys.stdin.isatty()) or device.launched():
        listed = "; or ".join(f"{words}: {line}" for words, line in [*ways, aside])
        fail(f"{told} ({'; '.join(what)}). Nothing was changed; {listed}")
    print(f"\n{translated(f'{told}:')}")
    for line in what:
        print(f"  {phrase(line)}")
    for number, (words, line) in enumerate([*ways, aside], 1):
        print(f"  {number}  {phrase(f'{words}: {line}')}")
    question = f"Which? (1 to {len(ways) + 1}; q: leave it as it is and quit) "
    while True:
        try:
            answer = input(translated(question)).strip().lower()
        except EOFError:
            answer = "q"
        if answer in ("q", "quit"):
            fail(f"{output} is as it was; nothing was trained")
        if answer == str(len(ways) + 1):
            return Start(now, aside=True)
        if answer.isdigit() and 1 <= int(answer) <= len(ways):
            words = shlex.split(ways[int(answer) - 1][1])
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, *words[1:]])


def _flags_of(differing: dict, before: dict) -> list[str] | None:
    """The flags that bring an old run's settings back; None where no flag can, as for other rows."""
    names = {"model": ["MODEL_NAME"], "model_revision": ["MODEL_REVISION"], "model_version": [], "method": []}
    names |= {"rows_per_step": ["BATCH_SIZE", "GRADIENT_ACCUMULATION_STEPS"], "deepspeed": ["USE_DEEPSPEED"]}
    wanted = [n for key in differing for n in names.get(key, [key])]
    if not differing or not wanted or any(name not in before for name in wanted):
        return None
    if "model_version" in differing and "model" not in differing:
        return None
    return [word for name in wanted for word in (f"--{name.lower()}", as_text(before[name]))]


def _elsewhere(script: str, output: str) -> str:
    """The command that trains in the next free folder."""
    number = 2
    while Path(f"{output.rstrip('/')}_{number}").exists():
        number += 1
    return command(script, "--output_dir", f"{output.rstrip('/')}_{number}")


# --- making room


def make_room(start: Start, output_dir: str) -> None:
    """When all else is settled: move an older run aside, or remove the checkpoints that cannot be gone on with."""
    if not main_process():
        return
    if start.aside:
        place = handover.move_aside(output_dir, state.history_folder(output_dir))
        say(f"the older run lies in {place} now; to remove it: rm -r {shlex.quote(place)}")
        return
    keep = {start.best, Path(start.checkpoint).name} if start.checkpoint else set()
    step = start.run["step"] if start.checkpoint else -1
    sealed = {c.path.name: c.step for c in checkpoints.found(output_dir)}
    paths = [p for p in Path(output_dir).glob("checkpoint-*") if p.name not in keep]
    checkpoints.remove([path for path in paths if path.name not in sealed or sealed[path.name] > step])
    if not start.checkpoint:
        checkpoints.remove([Path(output_dir) / "runs"])
