"""What both trainings share and no library has: token-exact evaluation, a seeded sampler by length, the memory plan,
resume, the run's log.

The trainer is TRL's SFTTrainer with two small overrides. Everything that a reader wants to see or change (the model,
the LoRA configuration, the SFTConfig, the order of things) stands in the scripts.
"""

import contextlib
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import init_empty_weights
from datasets import Dataset
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Sampler
from transformers import AutoConfig, AutoModelForCausalLM, EarlyStoppingCallback, EvalPrediction, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import get_model_param_count
from trl import SFTTrainer, pack_dataset

from configs import files
from configs.machine import GB, Plan
from configs.settings import fail

# --- the two overrides


class LengthGroupedSampler(Sampler[int]):
    """Row numbers in an order in which the rows of one optimizer step have similar lengths, so that little is padding.

    The order is a function of (seed, epoch) alone, and so the same in every process and after a resume. The library's
    sampler draws from the global generator instead: a run that is killed in its second epoch resumes with other
    batches.

    lengths: tokens per row. group_size: rows per optimizer step over all processes (micro-batch x accumulation x
    processes), so that a group never straddles two steps. epoch: called when an epoch begins; its number, from 0.
    """

    GROUPS_PER_POOL = 50  # rows are sorted within pools of so many steps: as random as the memory of a pool allows

    def __init__(self, lengths: Sequence[int], group_size: int, seed: int, epoch: Callable[[], int]):
        self.lengths, self.group_size, self.seed, self.epoch = np.asarray(lengths), group_size, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch()])
        order = random.permutation(len(self.lengths))
        pool = self.group_size * self.GROUPS_PER_POOL
        groups = []
        # what is left over joins the last pool: in a pool of its own it could hide the longest row in the short group
        pools = max(len(order) // pool, 1)
        for rows in np.split(order, [pool * i for i in range(1, pools)]):
            rows = rows[np.argsort(-self.lengths[rows], kind="stable")]
            groups += [rows[i : i + self.group_size] for i in range(0, len(rows), self.group_size)]
        # only the very last group may be short: anywhere else it would shift all later groups across the steps
        last = [groups.pop()] if groups and len(groups[-1]) < self.group_size else []
        random.shuffle(groups)
        if groups:  # the longest rows first, so that a run that does not fit fails in its first step
            first = max(range(len(groups)), key=lambda i: self.lengths[groups[i][0]])
            groups.insert(0, groups.pop(first))
        for group in groups + last:
            yield from group.tolist()


def token_exact(prediction: EvalPrediction) -> dict[str, float]:
    """eval_loss as sum of nll over sum of tokens, from per-row sums.

    prediction.predictions: nll per row, float, shape (rows,), in nats; prediction.label_ids: scored tokens per row.
    """
    nll, tokens = prediction.predictions.astype(np.float64), prediction.label_ids
    return {"eval_loss": float(nll.sum() / max(tokens.sum(), 1)), "eval_tokens": int(tokens.sum())}


class ExactTrainer(SFTTrainer):
    """SFTTrainer whose eval_loss is the mean over tokens, whose batches are grouped by length, and whose LoRA is fp32.

    The Trainer's own eval_loss is a mean over rows of per-batch means, which changes with the evaluation batch size
    and the number of processes. Here each row reports (nll, tokens); `gather_for_metrics` brings them together without
    the rows that pad the last batch of several processes, and the best checkpoint is chosen by their quotient.
    """

    def __init__(self, *args, **kwargs):
        self.portion: int | None = None  # rows a forward pass, once memory has run out
        self.step_rows: tuple[int, list] = (-1, [])  # (optimizer step, its micro-batches so far)
        self.logged: tuple[float, int] = (time.monotonic(), 0)  # when the last record was made, at how many tokens
        super().__init__(*args, compute_metrics=token_exact, **kwargs)
        # TRL casts QLoRA's trainable weights to bf16, where an update below 1/256 of a weight vanishes and which
        # fp16's GradScaler refuses; in fp32 they cost next to nothing. (Full fine-tuning chooses its dtype when it
        # loads.)
        if hasattr(self.model, "peft_config"):
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        files.keep_4bit_layout(self.model)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        return LengthGroupedSampler(
            rows["length"] if "length" in rows.column_names else [len(ids) for ids in rows["input_ids"]],
            args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            args.seed,
            # read from the trainer's state: accelerate does not hand set_epoch through the wrappers of a resumed run
            lambda: int(self.state.epoch or 0),
        )

    def training_step(self, model, inputs, num_items_in_batch=None):
        """The loss of one micro-batch; when memory runs out, the optimizer step again in half micro-batches.

        That is exact (dropout apart): the loss is a sum over tokens, divided by the tokens of the whole
        step, so it does not matter in how many portions they come. All micro-batches of the step come again, because
        the backward pass that failed may have added to some of the gradients. The smaller size is kept.
        """
        step = self.state.global_step
        seen = self.step_rows[1] if self.step_rows[0] == step else []
        self.step_rows = (step, [*seen, inputs])
        todo = [inputs]
        while True:
            try:
                for batch in todo:
                    loss = sum(
                        super(ExactTrainer, self).training_step(model, rows, num_items_in_batch)
                        for rows in self._portions(batch)
                    )
                return loss
            except torch.OutOfMemoryError:
                size = min(self.portion or sys.maxsize, max(len(rows["input_ids"]) for rows in todo))
                if self.args.world_size > 1 or size == 1:
                    raise
            self.portion = (size + 1) // 2
            model.zero_grad()
            torch.cuda.empty_cache()
            files.say(
                f"\nout of memory with {size} rows a pass: this step again with {self.portion}, and so from now on"
            )
            todo = self.step_rows[1]

    def _portions(self, batch: dict) -> Iterator[dict]:
        rows = len(batch["input_ids"])
        size = self.portion or rows
        for start in range(0, rows, size):
            yield {k: v[start : start + size] if torch.is_tensor(v) else v for k, v in batch.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            (then, before), now = self.logged, time.monotonic()
            tokens = int(self.state.num_input_tokens_seen)
            self.logged = (now, tokens)
            logs["tokens_per_second"] = (tokens - before) / max(now - then, 1e-9)
            logs["memory_gb"] = peak_memory() / GB
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Per-row sums instead of a loss: (None, nll of shape (batch,), tokens of shape (batch,))."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        # log_probs are zero where the label is masked
        return None, -outputs.log_probs.double().sum(dim=1), outputs.label_mask.sum(dim=1)


# --- before the model loads


def settings_problems(settings: dict) -> list[str]:
    """What can be seen to be wrong in a training script's constants before anything loads: one sentence
    each."""
    found = []
    for name in (
        "BATCH_SIZE",
        "GRADIENT_ACCUMULATION_STEPS",
        "MAX_LENGTH",
        "LOGGING_STEPS",
        "SAVE_TOTAL_LIMIT",
        "LORA_R",
        "LORA_ALPHA",
    ):
        if name in settings and settings[name] < 1:
            found.append(f"{name} is {settings[name]}; it must be at least 1: --{name.lower()} 1")
    for name in ("LEARNING_RATE", "NUM_EPOCHS", "EVAL_STEPS", "SAVE_STEPS"):
        if settings[name] <= 0:
            found.append(f"{name} is {settings[name]}; it must be above 0")
    if not 0 <= settings["WARMUP_RATIO"] < 1:
        found.append(f"WARMUP_RATIO is {settings['WARMUP_RATIO']}; it is a share of all steps: --warmup_ratio 0.03")
    for name in ("MAX_TRAIN_SAMPLES", "MAX_EVAL_SAMPLES", "MAX_STEPS"):
        if settings[name] is not None and settings[name] < 1:
            found.append(f"{name} is {settings[name]}; give a number above 0, or none for all: --{name.lower()} none")
    for name in ("EVAL_STEPS", "SAVE_STEPS"):
        if settings[name] > 1 and settings[name] != int(settings[name]):
            found.append(f"{name} is {settings[name]}; above 1 it counts steps and must be whole")
    named = any("EVAL_STEPS" in problem or "SAVE_STEPS" in problem for problem in found)
    if settings["SAVE_STEPS"] != settings["EVAL_STEPS"] and not named:
        found.append(
            f"SAVE_STEPS ({settings['SAVE_STEPS']}) must equal EVAL_STEPS ({settings['EVAL_STEPS']}), so that the "
            f"best model that was evaluated is also saved: --save_steps {settings['EVAL_STEPS']}"
        )
    for name in ("GRADIENT_CHECKPOINTING", "PACKING"):
        if settings[name] not in ("auto", True, False):
            found.append(f"{name} is {settings[name]!r}; choose auto, true or false: --{name.lower()} auto")
    for name in ("EARLY_STOPPING_PATIENCE", "DEVICE_MEMORY_GB"):
        if settings[name] is not None and settings[name] <= 0:
            found.append(f"{name} is {settings[name]}; give a number above 0, or none: --{name.lower()} none")
    if settings["PRECISION"] not in ("auto", "bf16", "fp16", "fp32"):
        found.append(f"PRECISION is {settings['PRECISION']!r}; choose auto, bf16, fp16 or fp32")
    # the library's other schedules need arguments of their own
    schedules = "cosine linear constant constant_with_warmup polynomial inverse_sqrt".split()
    # those of the library's that need no further package
    optimizers = "auto adamw_torch adamw_torch_fused adamw_torch_8bit adamw_bnb_8bit paged_adamw_8bit "
    optimizers += "paged_adamw_32bit lion_8bit lion_32bit paged_lion_8bit paged_lion_32bit "
    optimizers += "adafactor sgd adagrad rmsprop"
    for name, known in (("LR_SCHEDULER", schedules), ("OPTIM", optimizers.split())):
        if settings[name] not in known:
            found.append(f"{name} is {settings[name]!r}; choose one of: {', '.join(known)}")
    if not 0 <= settings.get("LORA_DROPOUT", 0) < 1:
        found.append(f"LORA_DROPOUT is {settings['LORA_DROPOUT']}; it is a share: --lora_dropout 0.05")
    for tracker in settings["REPORT_TO"].replace(" ", "").split(","):
        modules = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "none": "torch"}
        if tracker not in modules:
            found.append(f"REPORT_TO is {tracker!r}; choose one of: {', '.join(modules)}")
        elif importlib.util.find_spec(modules[tracker]) is None:
            found.append(f"REPORT_TO is {tracker!r}, which is not installed: pip install {tracker}")
    if "none" in settings["REPORT_TO"] and settings["REPORT_TO"].strip() != "none":
        found.append(f"REPORT_TO is {settings['REPORT_TO']!r}; none stands alone: --report_to none")
    if settings["RESUME"] not in ("auto", True, False):
        found.append(f"RESUME is {settings['RESUME']!r}; choose auto, true or false: --resume auto")
    if not 0 <= settings["SEED"] < 2**32:
        found.append(f"SEED is {settings['SEED']}; it must be at least 0 and below 2**32: --seed 42")
    for name in ("WEIGHT_DECAY", "MAX_GRAD_NORM"):
        if settings[name] < 0:
            found.append(f"{name} is {settings[name]}; it must not be negative")
    zero3 = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    if settings.get("USE_4BIT") and zero3:
        found.append(
            "ZeRO-3 cannot split a 4-bit base: launch with --zero_stage 2, or train LoRA over 16 bits: --use_4bit "
            "false"
        )
    if settings.get("USE_DEEPSPEED"):
        path, text = files.local_path(settings["DEEPSPEED_CONFIG"]), None
        if path is None or not path.is_file():
            found.append(
                f"DEEPSPEED_CONFIG {settings['DEEPSPEED_CONFIG']!r} is missing or no file; use configs/ds_config.json"
            )
        else:
            text = path.read_text("utf-8")
            try:
                config = json.loads(text)
                if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
                    raise ValueError("an object with an object zero_optimization is needed")
            except ValueError as error:
                found.append(
                    f"DEEPSPEED_CONFIG {path} is not JSON of the right shape ({error}); compare configs/ds_config.json"
                )
        if text and "offload" in text and not shutil.which("nvcc"):
            found.append(
                f"{path} offloads to the CPU, which compiles with the CUDA toolkit, and nvcc is not there; install it"
            )
    return found


def pack(rows: Dataset, length: int) -> Dataset:
    """Rows packed into sequences of up to `length` tokens, best fit first, none of them cut (TRL's bfd)."""
    return pack_dataset(rows.remove_columns(["length", "trained"]), length, "bfd")


def callbacks(c, log: TrainerCallback) -> list[TrainerCallback]:
    """The run's log, and early stopping where it is asked for."""
    patience = c.EARLY_STOPPING_PATIENCE
    return [log] + ([EarlyStoppingCallback(patience)] if patience else [])


def model_config(name: str, revision: str | None, max_length: int):
    """The model's configuration, read before its weights. Ends with exit code 2 when rows would not fit its
    positions."""
    with files.hub_errors("model", name, "MODEL_NAME", revision):
        config = AutoConfig.from_pretrained(files.model_path(name), revision=revision)
    positions = getattr(config, "max_position_embeddings", None)
    if positions and max_length > positions:
        fail(f"MAX_LENGTH is {max_length}, but {name} has only {positions} positions: --max_length {positions}")
    return config


def prepare_deepspeed(config: str) -> str:
    """Path of a DeepSpeed configuration for SFTConfig; under plain `python`, sets up the one process that it
    expects."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)  # without these DeepSpeed looks for MPI
    os.environ.setdefault("MASTER_PORT", str(files.free_port()))
    return str(files.local_path(config))


def token_rows(
    data_dir: str, part: str, limit: int | None, tokenizer, max_length: int, max_drop_fraction: float
) -> Dataset:
    """Rows of "train" or "validation" as the trainer takes them: input_ids, labels (-100 on the prompt), length, and
    how many tokens are trained.

    A row that does not fit max_length is dropped and counted, never cut: a cut answer teaches to stop in mid-sentence.
    limit: use so many rows (None: all). Raises: SystemExit(2) when more than max_drop_fraction goes.
    """
    rows = files.load_split(data_dir, "train" if part == "train" else "eval")
    if part != "train":
        rows = rows.filter(lambda p: p == part, input_columns="part", keep_in_memory=True)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))

    def encode(row: dict) -> dict:
        context, answer = files.encode(tokenizer, row["prompt"], row["completion"])
        ids = context + answer
        return {"input_ids": ids, "labels": [-100] * len(context) + answer, "length": len(ids), "trained": len(answer)}

    # keep_in_memory: the ids depend on a template that the cache's fingerprint would not see
    encoded = rows.map(encode, remove_columns=rows.column_names, keep_in_memory=True, desc="tokenising")
    fitting = encoded.filter(lambda n: n <= max_length, input_columns="length", keep_in_memory=True)
    dropped = len(encoded) - len(fitting)
    if dropped:
        files.say(f"rows: {dropped} of {len(encoded)} are longer than MAX_LENGTH={max_length} tokens and are left out")
    if dropped > max_drop_fraction * len(encoded) or not len(fitting):
        fail(
            f"{dropped} of {len(encoded)} rows are longer than MAX_LENGTH={max_length} tokens, more than "
            f"MAX_DROP_FRACTION={max_drop_fraction} allows; raise it: --max_length {max(encoded['length'])}"
        )
    return fitting


# --- resume


SAME_RUN = (
    "MERGE_ADAPTER",
    "PLAN_ONLY",
    "DEVICE_MEMORY_GB",
    "LOGGING_STEPS",
    "SAVE_TOTAL_LIMIT",
    "RESUME",
    "REPORT_TO",
)  # may differ between a run and its continuation


def resume_point(output_dir: str, resume: bool | str, settings: dict, manifest_sha256: str) -> str | None:
    """The checkpoint to go on from, or None for a fresh start (which removes what an older run left behind).

    resume: True goes on or ends with exit code 2; False starts afresh; "auto" goes on where an unfinished run with the
    same settings and data lies. A checkpoint that was cut off while it was written is not used.
    """
    folder = Path(output_dir)
    complete, broken = [], []
    for path in folder.glob("checkpoint-*"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            # the Trainer writes this file last
            complete.append((json.loads((path / "trainer_state.json").read_text("utf-8"))["global_step"], path))
            continue
        broken.append(path)
    last = max(complete)[1] if complete else None

    log, why = {}, "there is no checkpoint"
    with contextlib.suppress(OSError, ValueError):
        log = json.loads((folder / "training_log.json").read_text("utf-8"))
    if last:
        changed = [
            k
            for k, v in settings.items()
            if k not in SAME_RUN and k in log.get("settings", {}) and log["settings"][k] != v
        ]
        if not {"settings", "data", "summary"} <= set(log):
            why = "its training_log.json is missing or not complete"
        elif changed:
            why = f"{changed[0]} was {log['settings'][changed[0]]!r} and is {settings[changed[0]]!r}"
        elif log["data"]["manifest_sha256"] != manifest_sha256:
            why = "the data were prepared anew"
        elif log["summary"]["status"] == "done" and resume != True:  # noqa: E712 ("auto" is not True)
            why = "it is finished"
        else:
            why = ""
    if resume is True and why:
        fail(f"RESUME is true, but {output_dir} cannot be continued: {why}; start afresh with: --resume false")
    if resume is not False and not why:
        files.say(f"resuming from {last}")
        return str(last)
    if files.main_process():
        if last and resume is not False:
            files.say(f"starting afresh; the older run in {output_dir} is not continued: {why}")
        for path in [p for _, p in complete] + broken + [folder / "runs"]:
            shutil.rmtree(path, ignore_errors=True)
    return None


# --- while it runs


def peak_memory() -> int:
    """Bytes: the most that the tensors on the GPU took, or that this process held on a machine without
    one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes


class RunLog(TrainerCallback, ExportableState):
    """Renews training_log.json at every logging step, ends the run well on Ctrl-C or SIGTERM, stops it at a NaN, says
    when it overfits, and shows sample answers.

    What must go on across a resume (time, peak memory) travels in the checkpoint's trainer_state.json.
    """

    def __init__(
        self, method: str, settings: dict, plan: Plan, manifest: dict, rows: dict, config, resumed_from: str | None
    ):
        """rows: {"train_rows": n, "eval_rows": n}; config: the model's; resumed_from: a checkpoint or
        None."""
        self.path = Path(settings["OUTPUT_DIR"]) / "training_log.json"
        self.head = {
            "method": method,
            "model_name": settings["MODEL_NAME"],
            "settings": settings,
            "environment": files.environment(),
            "parameters": {"trainable": None, "total": None, "percent": None},
            "data": {"manifest_sha256": manifest["manifest_sha256"], **rows},
            "plan": plan.as_dict(),
            "notes": [],
        }
        self.manifest, self.resumed_from = manifest, resumed_from
        self.model_parameters = parameter_count(config)
        self.seconds, self.peak, self.began = 0.0, 0, None
        self.signal: int | None = None
        self.prompts: list[tuple[list[int], list[int]]] = []  # (prompt, answer) whose answers TensorBoard shows

    def state(self) -> dict:
        """What a checkpoint keeps of this callback (transformers' ExportableState)."""
        return {"args": {}, "attributes": {"seconds": self.elapsed(), "peak": max(self.peak, peak_memory())}}

    def elapsed(self) -> float:
        return self.seconds + (time.monotonic() - self.began if self.began is not None else 0.0)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.resumed_from:
            saved = state.stateful_callbacks.get("RunLog", {})
            saved = saved[-1] if isinstance(saved, list) else saved
            self.seconds, self.peak = saved["attributes"]["seconds"], saved["attributes"]["peak"]
        self.began, self.first_step, self.step_times = time.monotonic(), state.global_step, []
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
        files.say(
            f"\n{signal.Signals(number).name}: finishing this step, then saving a checkpoint (again: stop at once)"
        )

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        done = state.global_step - self.first_step
        self.step_times += [time.monotonic() - self.step_began]
        if done == 5 and state.max_steps - state.global_step > 20:  # the first step is slower than the others
            left = np.mean(self.step_times[1:]) * (state.max_steps - state.global_step)
            files.say(f"\nabout {left / 60:.0f} min left, evaluations apart (measured on steps 2 to 5)")
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
                files.say(f"\nnote: {note}")
                self.head["notes"].append(note)

    def on_evaluate(self, args, state, control, model=None, processing_class=None, **kwargs):
        """Greedy answers to a few validation prompts, for TensorBoard's text tab."""
        if args.world_size > 1 or not self.prompts or getattr(self.board, "tb_writer", None) is None:
            return
        text = []
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
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
            asked, said, wanted = (processing_class.decode(p, skip_special_tokens=True) for p in parts)
            text.append(f"**prompt**\n\n    {indent(asked)}\n\n**answer**\n\n    {indent(said)}\n\n")
            text[-1] += f"**reference**\n\n    {indent(wanted)}"
        self.board.tb_writer.add_text("sample answers", "\n\n---\n\n".join(text), state.global_step)

    def write(self, state, status: str) -> None:
        """Replace training_log.json by the state of this moment (main process only)."""
        if not state.is_world_process_zero:
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
            "steps": state.global_step,
            "epochs": round(state.epoch or 0.0, 4),
            "train_loss": float(np.average([x for _, x in losses], weights=spans)) if losses else None,
            "eval_loss": state.best_metric if state.best_metric is None else float(state.best_metric),
            "tokens": int(state.num_input_tokens_seen),
            "tokens_per_second": round(state.num_input_tokens_seen / seconds, 1) if seconds else None,
            "peak_memory_bytes": max(self.peak, peak_memory()),
            "best_checkpoint": state.best_model_checkpoint,
            "resumed_from": self.resumed_from,
        }
        if summary["eval_loss"] is not None and not math.isfinite(summary["eval_loss"]):
            summary["eval_loss"] = None
        files.write_json(self.path, {**self.head, "history": history, "summary": summary})


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


def finish(trainer: ExactTrainer, log: RunLog) -> None:
    """After training: the curves as a picture, the hparams tab of TensorBoard, and the last state of the
    log."""
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
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o--")):
        points = [(r["step"], r[key]) for r in history if isinstance(r.get(key), float)]
        if points:
            axis.plot(*zip(*points, strict=True), style, markersize=4, label=label)
    axis.set_xlabel("optimizer steps")
    axis.set_ylabel("loss (nats per token)")
    rates = [(r["step"], r["learning_rate"]) for r in history if "learning_rate" in r]
    if rates:
        twin = axis.twinx()
        twin.plot(*zip(*rates, strict=True), ":", color="gray", label="learning rate")
        twin.set_ylabel("learning rate")
        twin.set_ylim(bottom=0)
    axis.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def preflight(rows: Dataset, validation: Dataset, tokenizer, c, plan: Plan) -> None:
    """Show one row as the model will see it, and what the run will do. Ends with exit code 2 where that is nothing.

    rows, validation: with input_ids and labels. The trained tokens stand between the brackets.
    """
    row = rows[0]
    first = next(n for n, label in enumerate(row["labels"]) if label != -100)
    before, after = tokenizer.decode(row["input_ids"][:first]), tokenizer.decode(row["input_ids"][first:])
    files.say(f"a row as the model sees it, trained between the brackets:\n{before}⟦{after}⟧\n")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    step = plan.batch_size * plan.accumulation * processes
    if step > len(rows):
        fail(
            f"one optimizer step takes {plan.batch_size} x {plan.accumulation} x {processes} = {step} rows, and there "
            f"are {len(rows)}; take fewer: --batch_size 1 --gradient_accumulation_steps {max(len(rows) // 4, 1)}"
        )
    steps = c.MAX_STEPS or math.ceil(math.ceil(len(rows) / step) * c.NUM_EPOCHS)
    warmup = math.ceil(steps * c.WARMUP_RATIO)
    if c.WARMUP_RATIO and warmup >= steps:
        fail(
            f"the run has {steps} step{'s' * (steps > 1)}, and WARMUP_RATIO={c.WARMUP_RATIO} makes {warmup} of them "
            "warm-up: the learning rate would never be reached; train longer, or --warmup_ratio 0"
        )
    lengths, trained = np.array(rows["length"]), sum(rows["trained"])
    order = np.array(list(LengthGroupedSampler(lengths, step, c.SEED, lambda: 0)))
    padded = sum(
        len(part) * part.max()
        for part in (lengths[order[i : i + plan.batch_size]] for i in range(0, len(order), plan.batch_size))
    )
    files.say(
        f"{len(rows)} rows of {lengths.sum():,} tokens, {trained:,} of them trained, {1 - lengths.sum() / padded:.1%} "
        f"padding; {len(validation)} rows to validate; {steps} steps of {step} rows, {warmup} of them warm-up"
    )


def parameter_count(config) -> int:
    """Parameters of a model from its configuration alone. (A 4-bit model counts two of its weights as
    one.)"""
    with init_empty_weights(include_buffers=True):
        model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def run(trainer: ExactTrainer, log: RunLog, checkpoint: str | None) -> None:
    """Train. An interruption ends the process with 130 or 143 and names the checkpoint; a NaN ends it with
    1."""
    if checkpoint:  # its evaluation stands in the log already
        trainer.args.eval_on_start = False
    log.board = next((c for c in trainer.callback_handler.callbacks if hasattr(c, "tb_writer")), None)
    for row in trainer.eval_dataset.select(range(min(2, len(trainer.eval_dataset)))):
        at = row["labels"].count(-100)
        log.prompts.append((row["input_ids"][:at], row["input_ids"][at:]))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except FloatingPointError as error:
        files.say(f"error: {error}")
        sys.exit(1)
    except torch.OutOfMemoryError as error:
        log.write(trainer.state, "failed")
        size = trainer.args.per_device_train_batch_size
        fail(
            f"the memory is full at {trainer.portion or size} rows a pass ({str(error).split('. ')[0]}); halve "
            f"BATCH_SIZE and double GRADIENT_ACCUMULATION_STEPS: --batch_size {max(size // 2, 1)} "
            f"--gradient_accumulation_steps {trainer.args.gradient_accumulation_steps * 2}; or use shorter rows "
            "(MAX_LENGTH), or LoRA with USE_4BIT"
        )
    if log.signal is not None:
        log.write(trainer.state, "interrupted")
        saved = f"{trainer.args.output_dir}/checkpoint-{trainer.state.global_step}"
        files.say(
            f"interrupted at step {trainer.state.global_step}; saved {saved}; the same command goes on from there"
        )
        sys.stdout.flush()
        # a plain exit would wait for the other processes; they leave the same way
        os._exit(128 + log.signal)


# --- the final folder


def save_final(trainer: ExactTrainer, folder: str, dtype: torch.dtype | None, log: RunLog) -> None:
    """Write the model, its tokenizer with the chat template, and a model card; nothing pickled; all or nothing.

    dtype: of the saved weights (full model: the source's), or None to save them as they are (an adapter). Collective:
    call it in every process.
    """
    name = log.head["model_name"]
    staged = Path(folder).with_name(f".{Path(folder).name}-new")
    if trainer.is_world_process_zero():
        shutil.rmtree(staged, ignore_errors=True)
    if hasattr(trainer.model, "peft_config"):
        trainer.model.peft_config["default"].base_model_name_or_path = files.model_path(name)
    trainer.model.generation_config.eos_token_id = sorted(
        {trainer.processing_class.eos_token_id, files.answer_end(trainer.processing_class)}
    )
    trainer.save_model(str(staged))  # gathers the shards of DeepSpeed; writes in the main process only
    if trainer.is_world_process_zero():
        (staged / "training_args.bin").unlink(missing_ok=True)
        if dtype is not None:
            cast_folder(staged, dtype)
        files.write_text(staged / "README.md", model_card(log, trainer.state, Path(folder)))
        files.put_folder(staged, Path(folder))
        shutil.rmtree(Path(folder).with_name("merged_model"), ignore_errors=True)  # of the adapter before this one


def nll_per_token(model, rows: Dataset) -> float:
    """Sum of nll over sum of trained tokens, in nats, of rows with input_ids and labels; one row a pass."""
    total, tokens, device = 0.0, 0, next(model.parameters()).device
    model.eval()
    for row in rows:
        ids, labels = (torch.tensor([row[key]], device=device) for key in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        kept = labels[0, 1:] != -100
        total += torch.nn.functional.cross_entropy(logits[kept], labels[0, 1:][kept], reduction="sum").item()
        tokens += int(kept.sum())
    return total / tokens


def merge_adapter(trainer: ExactTrainer, c, rows: Dataset, log: RunLog) -> None:
    """Write merged_model beside the adapter: the 16-bit base with the adapter added, for servers that know
    no PEFT.

    Never the 4-bit base: its rounded weights plus the adapter would be rounded again. The nll before and after stands
    in training_log.json: over 4 bits the adapter has also learned to mend the rounding, so the two differ a little.
    """
    if not trainer.is_world_process_zero():
        return
    rows = rows.select(range(min(32, len(rows))))
    before = nll_per_token(trainer.model, rows)
    folder = Path(c.OUTPUT_DIR) / "merged_model"
    with files.hub_errors("model", c.MODEL_NAME, "MODEL_NAME", c.MODEL_REVISION):
        base = AutoModelForCausalLM.from_pretrained(
            files.model_path(c.MODEL_NAME), revision=c.MODEL_REVISION, dtype="auto"
        )
    merged = PeftModel.from_pretrained(base, f"{c.OUTPUT_DIR}/final_lora_adapter").merge_and_unload()
    merged.generation_config = trainer.model.generation_config
    with files.new_folder(folder) as new:
        merged.save_pretrained(new)
        trainer.processing_class.save_pretrained(new)
        card = model_card(log, trainer.state, folder, merged=True)
        files.write_text(new / "README.md", card)
    room = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.2 * merged.get_memory_footprint()
    after = nll_per_token(merged.to(trainer.args.device) if room else merged.float().cpu(), rows)
    log.head["merge"] = {"rows": len(rows), "nll_before": before, "nll_after": after}
    files.say(f"merged: {folder}; nll on {len(rows)} rows {before:.4f} before and {after:.4f} after")


def model_card(log: RunLog, state, folder: Path, merged: bool = False) -> str:
    """A model card: where the model comes from, what it was trained on and how, what came out, how to load it."""
    name, settings, rows = log.head["model_name"], log.head["settings"], log.head["data"]
    base = Path(name).name if files.local_path(name) else name
    source = Path(log.manifest["source"]).name if files.local_path(log.manifest["source"]) else log.manifest["source"]
    lora = log.head["method"] == "lora"
    load = "AutoPeftModelForCausalLM" if lora and not merged else "AutoModelForCausalLM"
    library = "peft" if lora and not merged else "transformers"
    shown = ["LEARNING_RATE", "NUM_EPOCHS", "BATCH_SIZE", "GRADIENT_ACCUMULATION_STEPS", "MAX_LENGTH", "SEED"]
    shown += ["LORA_R", "LORA_ALPHA", "LORA_DROPOUT", "LORA_TARGET_MODULES", "USE_4BIT"] if lora else []
    table = "\n".join(f"| {key} | {settings[key]} |" for key in shown)
    loss = "not measured" if state.best_metric is None else f"{state.best_metric:.4f} nats per token"
    # a folder on this machine is not a Hub id, which is all that the card's metadata may name
    meta = "" if files.local_path(name) else f"base_model: {name}\n"
    return f"""---
library_name: {library}
pipeline_tag: text-generation
{meta}tags: [trl, sft]
---

# {base}, {"merged LoRA" if merged else "LoRA adapter" if lora else "fully fine-tuned"}

Fine-tuned from `{base}` on `{source}` ({rows["train_rows"]} rows; the loss is taken on the answers only).
Validation loss of the kept checkpoint: {loss} on {rows["eval_rows"]} rows.

| setting | value |
|---|---|
{table}

```python
from {library} import {load}
from transformers import AutoTokenizer

model = {load}.from_pretrained("{folder.name}")
tokenizer = AutoTokenizer.from_pretrained("{folder.name}")
chat = [{{"role": "user", "content": "What is an ETF?"}}]
text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0][inputs["input_ids"].shape[1]:]))
```
"""


def cast_folder(folder: Path, dtype: torch.dtype) -> None:
    """Rewrite the float tensors of a saved model in another dtype, file by file, and say so in its config.json."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
        total += sum(t.numel() * t.element_size() for t in tensors.values())
        save_file(tensors, path, metadata=metadata)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text("utf-8"))
        content["metadata"]["total_size"] = total
        files.write_json(index, content)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    files.write_json(folder / "config.json", config)
