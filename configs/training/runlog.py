"""A run from its start to its end: where it goes on, training_log.json, how it is interrupted, its curves."""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import get_model_param_count

from configs import chat, device, handover
from configs.device import GB
from configs.ending import say_done
from configs.settings import ROOT, command, disk_full, fail, main_process, say
from configs.state import final_folder, has_weights
from configs.text import visible
from configs.training import checkpoints, doubts
from configs.training.memory import Plan
from configs.training.progress import Progress, replace_theirs
from configs.training.resume import Start
from configs.training.trainer import ExactTrainer
from configs.translation import translated
from configs.values import read_constants

# --- while it runs


class RunLog(TrainerCallback, ExportableState):
    """Renews training_log.json at every logging step, and ends the run well on Ctrl-C, SIGTERM or a NaN.

    It says when the model overfits, and shows sample answers in TensorBoard. What must go on across a resume (time,
    peak memory) travels in the checkpoint's trainer_state.json.
    """

    def __init__(self, method: str, settings: dict, plan: Plan, manifest: dict, rows: dict, start: Start):
        """rows: {"train_rows": n, "eval_rows": n}; start: where the run begins."""
        self.path = Path(settings["OUTPUT_DIR"]) / "training_log.json"
        self.head = {
            "method": method,
            "model_name": settings["MODEL_NAME"],
            "settings": settings,
            "identity": start.identity,
            "environment": device.environment(),
            "parameters": {"trainable": None, "total": None, "percent": None},
            "data": {"manifest_sha256": manifest["manifest_sha256"], **rows},
            "plan": plan.as_dict(),
            "notes": [],
        }
        self.manifest, self.start = manifest, start
        self.model_parameters = plan.parameters
        self.seconds, self.pauses, self.peak, self.began = 0.0, 0.0, 0, None
        self.pause: Callable[[], float] = lambda: 0.0  # seconds of this run that were not training
        self.written = (0.0, 0.0)  # when the log was last written, and how long that took
        self.unwritten = False  # whether the disk was too full for the log
        self.progress = Progress(self)
        self.signal: int | None = None
        self.asked = 0.0  # when a signal came, by time.monotonic
        self.prompts: list[tuple[list[int], list[int]]] = []  # (prompt, answer) whose answers TensorBoard shows
        self.answers, self.vocabulary = [], 0  # of the validation rows; tokens of the tokenizer

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
        if self.start.checkpoint:
            # as it was written, the path may be that of another folder
            best = self.start.best and os.path.join(args.output_dir, self.start.best)
            state.best_model_checkpoint = best
            if self.start.lost_best:
                state.best_metric = state.best_global_step = None
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
        for number in self.signals():
            signal.signal(number, self.on_signal)
        self.write(state, "running")

    @staticmethod
    def signals() -> list[int]:
        """Those that end a run well: Ctrl-C, SIGTERM and a closed terminal, unless nohup has it ignored."""
        hangup = getattr(signal, "SIGHUP", None)
        heard = hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN
        return [signal.SIGINT, signal.SIGTERM, *([hangup] if heard else [])]

    def on_signal(self, number, frame):
        now = time.monotonic()
        # a service manager or a closing terminal asks this process and run_all.py, which hands its own on
        if self.signal is not None and number != signal.SIGINT and now - self.asked < 3:
            return
        if self.signal is not None:  # asked twice: at once
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal, self.asked = number, now
        words = f"{signal.Signals(number).name}: finishing this step, then saving a checkpoint (again: stop at once)"
        with contextlib.suppress(OSError, ValueError, AttributeError):  # print may be what this has interrupted
            os.write(sys.stdout.fileno(), f"\n{translated(words)}\n".encode() if main_process() else b"")

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
                say(f"note: {note}")
                self.head["notes"].append(note)
        if "eval_loss" in (logs or {}) and state.global_step == 0:  # of the base
            if doubt := doubts.unknown_language(logs["eval_loss"], logs["eval_tokens"], self.answers, self.vocabulary):
                say(f"warning: {doubt}")
                self.head["notes"].append(doubt)

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
            "resumed_from": self.start.checkpoint,
        }
        if summary["eval_loss"] is not None and not math.isfinite(summary["eval_loss"]):
            summary["eval_loss"] = None
        try:
            handover.write_json(self.path, {**self.head, "history": history, "summary": summary})
        except OSError as error:
            if not disk_full(error) or status == "done":
                raise
            if not self.unwritten:  # what it would say is in the checkpoints, too
                say(f"note: no space is left on the disk for {self.path}; the training goes on")
            self.unwritten = True
        self.written = (time.monotonic(), time.monotonic() - began)


def indent(text: str) -> str:
    """Text inside an indented block of Markdown: shown as it is, whatever markup or kind of line break it holds."""
    return visible(text).replace("\n", "\n    ")


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


def run(trainer: ExactTrainer, log: RunLog) -> None:
    """Train, from the log's start on.

    An interruption ends the process with 129, 130 or 143 and names the checkpoint; a NaN, with 1.
    """
    checkpoint = log.start.checkpoint
    if trainer.is_world_process_zero():  # step 4 looks whether a test row is among them
        seen = {"train": trainer.train_dataset, "validation": trainer.eval_dataset}
        keys = [key for key in ("id", "question") if key in trainer.train_dataset.column_names]
        rows = {part: {key: list(known[key]) for key in keys} for part, known in seen.items()}
        handover.write_json(Path(trainer.args.output_dir) / handover.TRAINED_ROWS, rows)
    trainer.run = {key: log.head[key] for key in ("identity", "settings", "plan")}
    if checkpoint:  # its evaluation stands in the log already
        trainer.args.eval_on_start = False
    log.pause = lambda: trainer.paused
    log.head["environment"]["distributed_type"] = kind = trainer.accelerator.distributed_type.value
    if log.head["settings"].get("USE_DEEPSPEED") and kind != "DEEPSPEED":
        fail(
            f"USE_DEEPSPEED is true, but accelerate made a run of kind {kind}: ACCELERATE_USE_CPU or another launch "
            "configuration stands in the way; unset it, or train without: --use_deepspeed false"
        )
    replace_theirs(trainer)
    log.board = next((cb for cb in trainer.callback_handler.callbacks if hasattr(cb, "tb_writer")), None)
    for row in trainer.eval_dataset.select(range(min(2, len(trainer.eval_dataset)))):
        at = row["labels"].count(-100)
        log.prompts.append((row["input_ids"][:at], row["input_ids"][at:]))
    log.vocabulary = len(trainer.processing_class)
    for row in trainer.eval_dataset:
        answer = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        log.answers.append(trainer.processing_class.decode(answer, skip_special_tokens=True))
    try:
        with contextlib.closing(log.progress):
            trainer.train(resume_from_checkpoint=checkpoint)
    except FloatingPointError as error:
        say(f"error: {error}")
        sys.exit(1)
    except torch.OutOfMemoryError as error:
        log.write(trainer.state, "failed")
        fail(f"{str(error).split('. ')[0]}: {out_of_memory(trainer, log.head['settings'])}")
    except Exception as error:
        if not isinstance(error, checkpoints.DiskFull) and not disk_full(error):
            raise
        lost = f"{error} could not be saved, and " if isinstance(error, checkpoints.DiskFull) else ""
        kept = checkpoints.found(trainer.args.output_dir)
        last = f"it goes on from {kept[0].path}" if kept else "no checkpoint was saved, so it begins anew"
        with contextlib.suppress(OSError):  # the log, too, needs room
            log.write(trainer.state, "interrupted")
        fail(
            f"no space is left on the disk of {trainer.args.output_dir}: {lost}the training ends here. Make room, "
            f"then give the same command: {last}"
        )
    # no step is left to finish: a signal now ends the program, and the next run goes on from the last checkpoint
    for number in log.signals():
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if log.signal is not None:
        log.write(trainer.state, "interrupted")
        saved = f"{trainer.args.output_dir}/checkpoint-{trainer.state.global_step}"
        # with --resume false, the same command would begin anew
        anew = log.head["settings"]["RESUME"] is False
        script = handover.LORA if log.head["method"] == "lora" else handover.FULL
        how = f"go on with: {command(script, '--resume', 'auto')}" if anew else "the same command goes on from there"
        say(f"interrupted at step {trainer.state.global_step}; saved {saved}; {how}", always=True)
        sys.stdout.flush()
        # a plain exit would wait for the other processes; they leave the same way
        os._exit(128 + log.signal)


def out_of_memory(trainer: ExactTrainer, settings: dict) -> str:
    """What to do where a step ran out of memory and could not be taken again in smaller passes."""
    lora = "LORA_R" in settings
    light = f"8-bit optimizer states: --optim {'paged_adamw_8bit' if lora else 'adamw_bnb_8bit'}"
    small = "a 4-bit base: --use_4bit true" if lora else f"LoRA: {command(handover.LORA)}"
    if trainer.doing == "evaluation":
        gigabytes = round(0.8 * trainer.plan.free / GB, 1)
        return f"an evaluation does not fit beside the training; plan with less memory: --device_memory_gb {gigabytes}"
    if trainer.doing == "step":
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
    """After training: the curves as a picture, the hparams tab of TensorBoard, the log's last state, the last line."""
    if not trainer.is_world_process_zero():
        return
    settings, history = log.head["settings"], trainer.state.log_history
    draw_curves(history, Path(settings["OUTPUT_DIR"]) / "training_curves.png")
    if "tensorboard" in trainer.args.report_to:
        shown = hyperparameters(log.head["method"], settings)
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
    output = Path(settings["OUTPUT_DIR"])
    before = [f"{r['eval_loss']:.4f} before, " for r in history if r["step"] == 0 and "eval_loss" in r][:1]
    steps = f"{trainer.state.global_step} step{'s' * (trainer.state.global_step != 1)}"
    after = "not measured" if trainer.state.best_metric is None else f"{trainer.state.best_metric:.4f}"
    what = f"{output / final_folder(log.head['method'])}: eval loss {''.join(before)}{after} after {steps}"
    say_done(what, f"{output}/training_curves.png, or: tensorboard --logdir {output.parent}", next_step(log))


def next_step(log: RunLog) -> str:
    """The command that follows: the other training where its model is not there yet, else the comparison."""
    other, script = ("full", handover.FULL) if log.head["method"] == "lora" else ("lora", handover.LORA)
    folder = read_constants(ROOT / script)["OUTPUT_DIR"].default
    return command(handover.EVALUATE if has_weights(Path(folder) / final_folder(other)) else script)


def hyperparameters(method: str, settings: dict) -> dict[str, bool | float | str]:
    """What TensorBoard's hparams tab shows of a run, in this order. Its first run decides the columns of all.

    So both methods have the same ones, and the rank is a word: full fine-tuning has none.
    """
    first = {
        "LEARNING_RATE": settings["LEARNING_RATE"],
        "LORA_R": str(settings["LORA_R"]) if method == "lora" else "full",
        "rows_per_step": settings["BATCH_SIZE"] * settings["GRADIENT_ACCUMULATION_STEPS"],
        "NUM_EPOCHS": settings["NUM_EPOCHS"],
    }
    names = "MAX_STEPS MAX_TRAIN_SAMPLES WARMUP_RATIO LR_SCHEDULER WEIGHT_DECAY REPLAY_FRACTION SEED".split()
    return first | {n: v if isinstance(v := settings[n], bool | int | float | str) else str(v) for n in names}


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
