"""A run from its start to its end: where it goes on, training_log.json, how it is interrupted, its curves."""

import contextlib
import itertools
import json
import math
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import get_model_param_count

from configs import chat, device, handover
from configs.device import GB
from configs.settings import command, fail, main_process, say
from configs.training.memory import Plan, processes
from configs.training.trainer import ExactTrainer, StepSampler, cut

# --- before it starts


def preflight(rows: Dataset, validation: Dataset, tokenizer, settings, plan: Plan) -> None:
    """Show one row as the model will see it, and what the run will do. Ends with exit code 2 where that is nothing.

    rows, validation: with input_ids and labels. The trained tokens stand between the brackets.
    """
    row = rows[0]
    first = next(n for n, label in enumerate(row["labels"]) if label != -100)
    before, after = tokenizer.decode(row["input_ids"][:first]), tokenizer.decode(row["input_ids"][first:])
    say(f"a row as the model sees it, trained between the brackets:\n{before}⟦{after}⟧\n")
    step, devices = plan.rows, processes()
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
    say(
        f"{len(rows)} rows of {lengths.sum():,} tokens, {trained:,} of them trained, {padding:.1%} padding; "
        f"{len(validation)} rows to validate; {steps} steps of {step} rows, {warmup} of them warm-up"
    )


def meet(settings) -> dict:
    """The manifest of the data, after all processes have met and seen the same data and the same OUTPUT_DIR.

    Raises: SystemExit(2) in all of them where one has no data or others, or another OUTPUT_DIR (machines that share no
    folder), with the ways out.
    """
    device.join()
    manifest, code = None, None
    try:
        manifest = handover.read_manifest(settings.DATA_DIR)
    except SystemExit as ending:
        code = ending.code
    if not device.launched():
        if code is not None:
            raise SystemExit(code)
        return manifest
    output = Path(settings.OUTPUT_DIR)
    token = device.decided_once(lambda: _leave_token(output))
    machine = os.environ.get("GROUP_RANK", "0")
    mine = (machine, code, manifest and manifest["manifest_sha256"], (output / token).exists())
    found = gather_object([mine])  # no process is beyond this line before all have looked
    if main_process():
        (output / token).unlink(missing_ok=True)
    if any(code is not None for _, code, _, _ in found):
        raise SystemExit(2)
    if lacking := sorted({machine for machine, _, _, seen in found if not seen}):
        problem = (
            f"machine {', '.join(lacking)} does not see the OUTPUT_DIR of machine 0, {output.resolve()}; put it on a "
            "file system that all machines share: --output_dir /shared/PATH, or train on one machine"
        )
        _fail_once(problem)
    if len({sha for _, _, sha, _ in found}) > 1:
        _fail_once(
            f"{settings.DATA_DIR} differs between the machines (manifest_sha256); copy it from machine 0, or put it "
            "on a file system that all share: --data_dir /shared/PATH"
        )
    return manifest


def _leave_token(output: Path) -> str:
    name = f".met-{secrets.token_hex(8)}"
    handover.write_text(output / name, "")
    return name


def _fail_once(problem: str) -> None:
    if main_process():
        fail(problem)
    raise SystemExit(2)


def resume_point(
    output_dir: str, resume: bool | str, settings: dict, manifest: dict
) -> tuple[str, dict] | tuple[None, None]:
    """(the checkpoint to go on from, the plan that it was trained with), or (None, None) for a fresh start.

    resume: True goes on or ends with exit code 2; False starts afresh; "auto" goes on where an unfinished run with the
    same settings and data lies. A checkpoint that was cut off while it was written is not used.
    """
    folder = Path(output_dir)
    complete = []
    for path in folder.glob("checkpoint-*"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            # the Trainer writes this file last
            complete.append((json.loads((path / "trainer_state.json").read_text("utf-8"))["global_step"], path))
    last = max(complete)[1] if complete else None

    log, why = {}, "there is no checkpoint"
    with contextlib.suppress(OSError, ValueError):
        log = json.loads((folder / "training_log.json").read_text("utf-8"))
    if last:
        why = handover.other_run(log, settings, manifest["manifest_sha256"])
        if not why and log["summary"]["status"] == "done" and resume != True:  # noqa: E712 ("auto" is not True)
            why = "it is finished"
        if not why and "tokens_per_pass" not in log.get("plan", {}):
            why = "an older version of this script trained it"
    if resume is True and why:
        fail(f"RESUME is true, but {output_dir} cannot be continued: {why}; start afresh with: --resume false")
    if resume is not False and not why:
        say(f"resuming from {last}")
        return str(last), log["plan"]
    if last and resume is not False:
        say(f"starting afresh; the older run in {output_dir} is not continued: {why}")
    return None, None


def clear_unless(checkpoint: str | None, output_dir: str) -> None:
    """Before a fresh start, when all else is settled: remove the checkpoints and events of the run before."""
    if checkpoint is None and main_process():
        for path in [*Path(output_dir).glob("checkpoint-*"), Path(output_dir) / "runs"]:
            shutil.rmtree(path, ignore_errors=True)


# --- while it runs


class RunLog(TrainerCallback, ExportableState):
    """Renews training_log.json at every logging step, and ends the run well on Ctrl-C, SIGTERM or a NaN.

    It says when the model overfits, and shows sample answers in TensorBoard. What must go on across a resume (time,
    peak memory) travels in the checkpoint's trainer_state.json.
    """

    def __init__(self, method: str, settings: dict, plan: Plan, manifest: dict, rows: dict, resumed_from: str | None):
        """rows: {"train_rows": n, "eval_rows": n}; resumed_from: a checkpoint or None."""
        self.path = Path(settings["OUTPUT_DIR"]) / "training_log.json"
        self.head = {
            "method": method,
            "model_name": settings["MODEL_NAME"],
            "settings": settings,
            "environment": device.environment(),
            "parameters": {"trainable": None, "total": None, "percent": None},
            "data": {"manifest_sha256": manifest["manifest_sha256"], **rows},
            "plan": plan.as_dict(),
            "notes": [],
        }
        self.manifest, self.resumed_from = manifest, resumed_from
        self.model_parameters = plan.parameters
        self.seconds, self.pauses, self.peak, self.began = 0.0, 0.0, 0, None
        self.pause: Callable[[], float] = lambda: 0.0  # seconds of this run that were not training
        self.written = (0.0, 0.0)  # when the log was last written, and how long that took
        self.signal: int | None = None
        self.prompts: list[tuple[list[int], list[int]]] = []  # (prompt, answer) whose answers TensorBoard shows

    def state(self) -> dict:
        """What a checkpoint keeps of this callback (transformers' ExportableState)."""
        peak = max(self.peak, device.peak_memory())
        return {"args": {}, "attributes": {"seconds": self.elapsed(), "pauses": self.paused(), "peak": peak}}

    def elapsed(self) -> float:
        """Seconds of training alone, over all resumes."""
        began = time.monotonic() if self.began is None else self.began
        return self.seconds + time.monotonic() - began - self.pause()

    def paused(self) -> float:
        """Seconds of evaluation, saving and sample answers, over all resumes."""
        return self.pauses + self.pause()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.resumed_from:
            saved = state.stateful_callbacks.get("RunLog", {})
            saved = saved[-1] if isinstance(saved, list) else saved
            kept = saved["attributes"]
            self.seconds, self.pauses, self.peak = kept["seconds"], kept["pauses"], kept["peak"]
        self.began = time.monotonic()
        trainable = get_model_param_count(model, trainable_only=True)
        total = self.model_parameters + (trainable if hasattr(model, "peft_config") else 0)
        self.head["parameters"] = {
            "trainable": trainable,
            "total": total,
            "percent": round(100 * trainable / total, 4),
        }
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        self.write(state, "running")

    def on_signal(self, number, frame):
        if self.signal is not None:  # asked twice: at once
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = number
        say(f"\n{signal.Signals(number).name}: finishing this step, then saving a checkpoint (again: stop at once)")

    def on_step_end(self, args, state, control, **kwargs):
        stop = self.signal is not None
        if args.world_size > 1:  # all processes must stop at the same step, or they wait for one another for ever
            flag = torch.tensor(float(stop), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            stop = bool(flag.item())
            self.signal = self.signal or (signal.SIGTERM if stop else None)
        if stop:
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.write(state, "running")
        for key in ("loss", "eval_loss"):
            if key in (logs or {}) and not math.isfinite(logs[key]):
                self.write(state, "failed")
                kept = state.best_model_checkpoint or "none was saved"
                raise FloatingPointError(
                    f"{key} is {logs[key]} at step {state.global_step}; last good checkpoint: {kept}; try a lower "
                    "LEARNING_RATE or PRECISION fp32"
                )
        if (logs or {}).get("loss") == 0.0:
            self.write(state, "failed")
            kept = state.best_model_checkpoint or "none was saved"
            raise FloatingPointError(
                f"loss is 0 at step {state.global_step}, so nothing is learned: are the answers all alike? last good "
                f"checkpoint: {kept}"
            )
        if "eval_loss" in (logs or {}) and (note := overfitting(state.log_history)):
            if not any(n.startswith("overfitting") for n in self.head["notes"]):
                say(f"\nnote: {note}")
                self.head["notes"].append(note)

    def on_evaluate(self, args, state, control, model=None, processing_class=None, **kwargs):
        """Greedy answers to a few validation prompts, for TensorBoard's text tab."""
        if args.world_size > 1 or not self.prompts or getattr(self.board, "tb_writer", None) is None:
            return
        text = []
        positions = chat.positions(model.config)
        for prompt, answer in self.prompts:
            if len(prompt) + 48 > positions:
                continue
            ids = torch.tensor([prompt], device=args.device)
            with torch.no_grad():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=48,
                    do_sample=False,
                    pad_token_id=processing_class.pad_token_id,
                )
            parts = (prompt, out[0, len(prompt) :].tolist(), answer)
            question, reply, reference = (processing_class.decode(p, skip_special_tokens=True) for p in parts)
            text.append(f"**prompt**\n\n    {indent(question)}\n\n**answer**\n\n    {indent(reply)}\n\n")
            text[-1] += f"**reference**\n\n    {indent(reference)}"
        self.board.tb_writer.add_text("sample answers", "\n\n---\n\n".join(text), state.global_step)

    def write(self, state, status: str) -> None:
        """Replace training_log.json by the state of this moment (main process only)."""
        if not state.is_world_process_zero:
            return
        began, (then, took) = time.monotonic(), self.written
        if status == "running" and took > 0.01 * (began - then):  # a long history is not rewritten all the time
            return
        history = [
            {k: (v if not isinstance(v, float) or math.isfinite(v) else str(v)) for k, v in record.items()}
            for record in state.log_history
            if "loss" in record or "eval_loss" in record
        ]
        losses = [(r["step"], r["loss"]) for r in history if isinstance(r.get("loss"), float)]
        spans = np.diff([0] + [step for step, _ in losses])
        seconds = self.elapsed()
        summary = {
            "status": status,
            "train_runtime_s": round(seconds, 2),
            "paused_s": round(self.paused(), 2),
            "steps": state.global_step,
            "epochs": round(state.epoch or 0.0, 4),
            "train_loss": float(np.average([x for _, x in losses], weights=spans)) if losses else None,
            "eval_loss": state.best_metric if state.best_metric is None else float(state.best_metric),
            "tokens": int(state.num_input_tokens_seen),
            "tokens_per_second": round(state.num_input_tokens_seen / seconds, 1) if seconds else None,
            "peak_memory_bytes": max(self.peak, device.peak_memory()),
            "best_checkpoint": state.best_model_checkpoint,
            "resumed_from": self.resumed_from,
        }
        if summary["eval_loss"] is not None and not math.isfinite(summary["eval_loss"]):
            summary["eval_loss"] = None
        handover.write_json(self.path, {**self.head, "history": history, "summary": summary})
        self.written = (time.monotonic(), time.monotonic() - began)


def indent(text: str) -> str:
    """Text inside an indented block of Markdown: shown as it is, whatever markup it holds."""
    return text.replace("\n", "\n    ")


def overfitting(history: list[dict]) -> str | None:
    """A sentence where eval_loss rose in the last two evaluations while the training loss fell; None elsewhere."""
    evals = [(n, record) for n, record in enumerate(history) if "eval_loss" in record]
    if len(evals) < 3:
        return None
    (first, best), (_, second), (last, third) = evals[-3:]
    before = [r["loss"] for r in history[:first] if "loss" in r][-1:]
    after = [r["loss"] for r in history[first:last] if "loss" in r][-1:]
    if not before or not after or not best["eval_loss"] < second["eval_loss"] < third["eval_loss"]:
        return None
    if after[0] >= before[0]:
        return None
    return (
        f"overfitting since epoch {best['epoch']:.2f}: eval_loss rose from {best['eval_loss']:.4f} to "
        f"{third['eval_loss']:.4f} while the training loss fell from {before[0]:.4f} to {after[0]:.4f}; the "
        "checkpoint with the lowest eval_loss is kept; fewer epochs or a lower learning rate would do"
    )


def run(trainer: ExactTrainer, log: RunLog, checkpoint: str | None) -> None:
    """Train. An interruption ends the process with 130 or 143 and names the checkpoint; a NaN, with 1."""
    if checkpoint:  # its evaluation stands in the log already
        trainer.args.eval_on_start = False
    log.pause = lambda: trainer.paused
    log.board = next((cb for cb in trainer.callback_handler.callbacks if hasattr(cb, "tb_writer")), None)
    for row in trainer.eval_dataset.select(range(min(2, len(trainer.eval_dataset)))):
        at = row["labels"].count(-100)
        log.prompts.append((row["input_ids"][:at], row["input_ids"][at:]))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except FloatingPointError as error:
        say(f"error: {error}")
        sys.exit(1)
    except torch.OutOfMemoryError as error:
        log.write(trainer.state, "failed")
        fail(f"{str(error).split('. ')[0]}: {out_of_memory(trainer, log.head['settings'])}")
    # no step is left to finish: a signal now ends the program, and the next run goes on from the last checkpoint
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if log.signal is not None:
        log.write(trainer.state, "interrupted")
        saved = f"{trainer.args.output_dir}/checkpoint-{trainer.state.global_step}"
        say(f"interrupted at step {trainer.state.global_step}; saved {saved}; the same command goes on from there")
        sys.stdout.flush()
        # a plain exit would wait for the other processes; they leave the same way
        os._exit(128 + log.signal)


def out_of_memory(trainer: ExactTrainer, settings: dict) -> str:
    """What to do where a step ran out of memory and could not be taken again in smaller passes."""
    lora = "LORA_R" in settings
    light = f"8-bit optimizer states: --optim {'paged_adamw_8bit' if lora else 'adamw_bnb_8bit'}"
    small = "a 4-bit base: --use_4bit true" if lora else f"LoRA: {command(handover.LORA)}"
    if not trainer.passing:
        return f"the optimizer's step does not fit, which smaller passes do not help; take {light}; or {small}"
    ways = [] if trainer.args.gradient_checkpointing else ["recompute activations: --gradient_checkpointing true"]
    length = settings["MAX_LENGTH"]
    ways += [f"shorter rows: --max_length {length // 2}", light, small]
    if trainer.args.world_size > 1 or trainer.is_deepspeed_enabled:
        gigabytes = round(0.8 * trainer.plan.free / GB, 1)
        why = "several processes or DeepSpeed cannot take a step again in smaller passes"
        return f"{why}; plan with less memory: --device_memory_gb {gigabytes}; or {'; or '.join(ways)}"
    return f"a pass of a single row does not fit; {'; or '.join(ways)}"


# --- when it is done


def finish(trainer: ExactTrainer, log: RunLog) -> None:
    """After training: the curves as a picture, the hparams tab of TensorBoard, and the log's last state."""
    if not trainer.is_world_process_zero():
        return
    settings, history = log.head["settings"], trainer.state.log_history
    draw_curves(history, Path(settings["OUTPUT_DIR"]) / "training_curves.png")
    if "tensorboard" in trainer.args.report_to:
        shown = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
        losses = {f"hparam/{k}": r[k] for r in history for k in ("loss", "eval_loss") if isinstance(r.get(k), float)}
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        # the Trainer's callback writes the settings as a text only; add_hparams would open a folder of its own
        with SummaryWriter(os.environ["TENSORBOARD_LOGGING_DIR"]) as writer:
            for summary in hparams(shown, losses):
                writer.file_writer.add_summary(summary)
            for name, value in losses.items():
                writer.add_scalar(name, value, trainer.state.global_step)
    log.write(trainer.state, "done")


def draw_curves(history: list[dict], path: Path) -> None:
    """Training and validation loss, and the learning rate, over the optimizer steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 3.5))
    handover.draw_losses(axis, history)
    rates = [(r["step"], r["learning_rate"]) for r in history if "learning_rate" in r]
    if rates:
        twin = axis.twinx()
        twin.plot(*zip(*rates, strict=True), ":", color="gray", label="learning rate")
        twin.set_ylabel("learning rate")
        twin.set_ylim(bottom=0)
    axis.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
