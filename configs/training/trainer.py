"""TRL's SFTTrainer with what a fair comparison needs: token-exact evaluation, a seeded order, fp32 adapters.

What a reader wants to see or change (the model, the LoRA configuration, the SFTConfig) stands in the scripts.
"""

import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import AutoConfig, EarlyStoppingCallback, EvalPrediction, TrainerCallback
from trl import SFTTrainer, pack_dataset

from configs import chat, device, handover, hub
from configs.device import GB
from configs.settings import fail, say

# --- the trainer


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
        device.keep_4bit_layout(self.model)

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
            say(f"\nout of memory with {size} rows a pass: this step again with {self.portion}, and so from now on")
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
            logs["memory_gb"] = device.peak_memory() / GB
        super().log(logs, start_time)

    def create_model_card(self, *args, **kwargs) -> None:
        """Nothing: TRL's card of a checkpoint knows no base ("fine-tuned version of None"); export.py writes ours."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Per-row sums instead of a loss: (None, nll of shape (batch,), tokens of shape (batch,))."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        # log_probs are zero where the label is masked
        return None, -outputs.log_probs.double().sum(dim=1), outputs.label_mask.sum(dim=1)


def callbacks(settings, log: TrainerCallback) -> list[TrainerCallback]:
    """The run's log, and early stopping where it is asked for."""
    patience = settings.EARLY_STOPPING_PATIENCE
    return [log] + ([EarlyStoppingCallback(patience)] if patience else [])


# --- before the model loads


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
    for tracker in settings["REPORT_TO"].replace(" ", "").split(","):
        modules = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "none": "torch"}
        if tracker not in modules:
            wrong.append(f"REPORT_TO is {tracker!r}; choose one of: {', '.join(modules)}")
        elif importlib.util.find_spec(modules[tracker]) is None:
            wrong.append(f"REPORT_TO is {tracker!r}, which is not installed: pip install {tracker}")
    if "none" in settings["REPORT_TO"] and settings["REPORT_TO"].strip() != "none":
        wrong.append(f"REPORT_TO is {settings['REPORT_TO']!r}; none stands alone: --report_to none")
    zero3 = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    if settings.get("USE_4BIT") and zero3:
        wrong.append(
            "ZeRO-3 cannot split a 4-bit base: launch with --zero_stage 2, or train LoRA over 16 bits: --use_4bit "
            "false"
        )
    if settings.get("USE_DEEPSPEED"):
        path, text = hub.local_path(settings["DEEPSPEED_CONFIG"]), None
        if path is None or not path.is_file():
            wrong.append(
                f"DEEPSPEED_CONFIG {settings['DEEPSPEED_CONFIG']!r} is missing or no file; use configs/ds_config.json"
            )
        else:
            text = path.read_text("utf-8")
            try:
                config = json.loads(text)
                if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
                    raise ValueError("an object with an object zero_optimization is needed")
            except ValueError as error:
                wrong.append(
                    f"DEEPSPEED_CONFIG {path} is not JSON of the right shape ({error}); compare configs/ds_config.json"
                )
        if text and "offload" in text and not shutil.which("nvcc"):
            wrong.append(
                f"{path} offloads to the CPU, which compiles with the CUDA toolkit, and nvcc is not there; install it"
            )
    return wrong


def model_config(name: str, revision: str | None, max_length: int):
    """The model's configuration, read before its weights; exit code 2 where MAX_LENGTH exceeds its positions."""
    with hub.hub_errors("model", name, "MODEL_NAME", revision):
        config = AutoConfig.from_pretrained(hub.model_path(name), revision=revision)
    positions = chat.positions(config)
    if max_length > positions:
        fail(f"MAX_LENGTH is {max_length}, but {name} has only {positions} positions: --max_length {positions}")
    return config


def deepspeed_file(config: str) -> str:
    """Path of a DeepSpeed configuration for SFTConfig.

    Under plain `python`, this sets up the one process that DeepSpeed expects.
    """
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)  # without these DeepSpeed looks for MPI
    os.environ.setdefault("MASTER_PORT", str(device.free_port()))
    return str(hub.local_path(config))


# --- rows


def token_rows(
    data_dir: str, part: str, limit: int | None, tokenizer, max_length: int, max_drop_fraction: float
) -> Dataset:
    """Rows of "train" or "validation" as the trainer takes them.

    Their columns: input_ids, labels (-100 on the prompt), length (tokens), trained (tokens that are trained).

    A row that does not fit max_length is dropped and counted, never cut: a cut answer teaches to stop in mid-sentence.
    limit: use so many rows (None: all). Raises: SystemExit(2) when more than max_drop_fraction goes.
    """
    rows = handover.load_split(data_dir, "train" if part == "train" else "eval")
    if part != "train":
        rows = rows.filter(lambda p: p == part, input_columns="part", keep_in_memory=True)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))

    def encode(row: dict) -> dict:
        context, answer = chat.encode(tokenizer, row["prompt"], row["completion"])
        ids = context + answer
        return {"input_ids": ids, "labels": [-100] * len(context) + answer, "length": len(ids), "trained": len(answer)}

    # keep_in_memory: the ids depend on a template that the cache's fingerprint would not see
    encoded = rows.map(encode, remove_columns=rows.column_names, keep_in_memory=True, desc="tokenising")
    fitting = encoded.filter(lambda n: n <= max_length, input_columns="length", keep_in_memory=True)
    dropped = len(encoded) - len(fitting)
    if dropped:
        say(f"rows: {dropped} of {len(encoded)} are longer than MAX_LENGTH={max_length} tokens and are left out")
    if dropped > max_drop_fraction * len(encoded) or not len(fitting):
        fail(
            f"{dropped} of {len(encoded)} rows are longer than MAX_LENGTH={max_length} tokens, more than "
            f"MAX_DROP_FRACTION={max_drop_fraction} allows; raise it: --max_length {max(encoded['length'])}"
        )
    return fitting


def pack(rows: Dataset, length: int) -> Dataset:
    """Rows packed into sequences of up to `length` tokens, best fit first, none of them cut (TRL's bfd)."""
    return pack_dataset(rows.remove_columns(["length", "trained"]), length, "bfd")
