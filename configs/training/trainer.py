"""TRL's SFTTrainer with what a fair comparison needs: the same rows a step, token-exact sums, fp32 adapters.

What a reader wants to see or change (the model, the LoRA configuration, the SFTConfig) stands in the scripts.
"""

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft.helpers import disable_input_dtype_casting
from torch.utils.data import DataLoader, Sampler
from transformers import EvalPrediction
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTTrainer
from trl.trainer import utils as trl_utils
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from configs import chat, device, handover, hub
from configs.device import GB
from configs.settings import disk_full, fail, say
from configs.training import checkpoints
from configs.training.checkpoints import DiskFull
from configs.training.progress import bars
from configs.translation import phrase

# --- the rows of a step, and its passes

# What a pass costs beside its tokens, in tokens: starting kernels, casting weights, adding to gradients (estimates).
PASS_COST = 512 if torch.cuda.is_available() else 64


class StepSampler(Sampler[list[int]]):
    """For each optimizer step of an epoch, the numbers of the rows that this process trains: longest first.

    A step is a random set of rows, drawn by (seed, epoch) alone: whatever the method, the passes, the number of
    processes or a resume, the same rows meet in the same step. (Steps of rows of one length would waste less padding
    but learn worse: they weigh the tokens of short rows more than the loss over all tokens does.) The library's
    sampler draws from the global generator instead: a run killed in its second epoch resumes with other batches.

    lengths: tokens per row. rows: of one step, over all processes; the last step of an epoch may have fewer. epoch:
    called when an epoch begins; its number, from 0. A process gets every `processes`-th row of a step, which may be
    none of the last step's.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        rows: int,
        seed: int,
        epoch: Callable[[], int] = lambda: 0,
        process: int = 0,
        processes: int = 1,
    ):
        self.lengths, self.rows, self.seed, self.epoch = np.asarray(lengths), rows, seed, epoch
        self.process, self.processes = process, processes

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.rows)

    def steps(self) -> Iterator[np.ndarray]:
        """The row numbers of each step over all processes, longest first."""
        order = np.random.default_rng([self.seed, self.epoch()]).permutation(len(self.lengths))
        if len(order):  # the longest row is in the first step, so that a run that does not fit fails at once
            longest = np.argmax(self.lengths[order])
            order[[0, longest]] = order[[longest, 0]]
        for start in range(0, len(order), self.rows):
            step = order[start : start + self.rows]
            yield step[np.argsort(-self.lengths[step], kind="stable")]

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps():
            yield step[self.process :: self.processes].tolist()


def cut(lengths: Sequence[int], budget: int, packed: bool = False) -> list[slice]:
    """A step's rows in passes of at most `budget` tokens, padding included; a longer row has a pass of its own.

    Of all ways to cut, the one that computes least: padding costs tokens, and each pass costs PASS_COST beside them.
    lengths: tokens per row, longest first. packed: rows lie one after another, without padding.
    """
    best: list[tuple[float, int]] = [(0, 0)]  # the least cost of the first n rows, and where their last pass begins
    for end in range(1, len(lengths) + 1):
        ways, total = [], 0
        for start in range(end - 1, -1, -1):
            total += lengths[start]
            tokens = total if packed else lengths[start] * (end - start)
            if tokens <= budget or start == end - 1:
                ways.append((best[start][0] + tokens + PASS_COST, start))
        best.append(min(ways))
    cuts, end = [], len(lengths)
    while end:
        start = best[end][1]
        cuts, end = [slice(start, end), *cuts], start
    return cuts or [slice(0, 0)]


# --- the trainer


def token_exact(prediction: EvalPrediction) -> dict[str, float]:
    """eval_loss as sum of nll over sum of tokens, from per-row sums.

    prediction.predictions: nll per row, float, shape (rows,), in nats; prediction.label_ids: scored tokens per row.
    """
    nll, tokens = prediction.predictions.astype(np.float64), prediction.label_ids
    return {"eval_loss": float(nll.sum() / max(tokens.sum(), 1)), "eval_tokens": int(tokens.sum())}


class ExactTrainer(SFTTrainer):
    """SFTTrainer whose steps are sets of rows, whose eval_loss is the mean over tokens, and whose LoRA is fp32.

    One batch of the Trainer is what this process has of an optimizer step; it is cut into passes by a budget of
    tokens, and the sum over tokens does not depend on where.

    The Trainer's own eval_loss is a mean over rows of per-batch means, which changes with the evaluation batch size
    and the number of processes. Here each row reports (nll, tokens); `gather_for_metrics` brings them together without
    the rows that pad the last batch of several processes, and the best checkpoint is chosen by their quotient.
    """

    def __init__(self, *args, plan, **kwargs):
        """plan: memory.Plan; its `rows` a step over all processes, its `tokens` a pass, and `packing`.

        Packed rows lie one after another instead of being padded: only for attention that keeps them apart.
        """
        self.plan = plan
        self.rows, self.budget, self.packed = plan.rows, plan.tokens, plan.packing
        self.paused = 0.0  # seconds of evaluation, saving and sample answers
        self.doing = "step"  # what memory may run out in: a "pass", "evaluation" or the optimizer's "step"
        self.run: dict = {}  # what a checkpoint's manifest says of the run
        self.logged: tuple[float, int] | None = None  # when the last record was made, at how many tokens
        super().__init__(*args, compute_metrics=token_exact, **kwargs)
        if self.accelerator.ddp_handler is not None:  # else DDP holds the gradients twice
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        # TRL's head, for what is needed of it: log-probabilities of the trained positions. TRL scores masked
        # positions as well where Triton does not run, and computes entropies and accuracies that nobody asks for.
        trl_utils._use_triton = lambda device: True  # read by the head's choice of positions alone
        if not torch.cuda.is_available():  # tiles of the head's logits that stay in a CPU's cache
            trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = 512
        self.lora = hasattr(self.model, "peft_config")
        base = self.model.get_base_model() if self.lora else self.model
        add_fused_lm_head(base, outputs=("log_probs",))
        # TRL casts QLoRA's trainable weights to bf16, where an update below 1/256 of a weight vanishes and which
        # fp16's GradScaler refuses; in fp32 they cost next to nothing. (Full fine-tuning chooses its dtype when it
        # loads.)
        if self.lora:
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        device.keep_4bit_layout(self.model)
        device.fuse_gelu(self.model)

    # --- rows

    def get_train_dataloader(self) -> DataLoader:
        """Batches that hold the rows of this process in one optimizer step, padded to the longest."""
        rows = self.train_dataset
        steps = StepSampler(
            rows["length"] if "length" in rows.column_names else [len(ids) for ids in rows["input_ids"]],
            self.rows,
            self.args.seed,
            # read from the trainer's state: a resumed run wraps the loader, and set_epoch does not reach through
            lambda: int(self.state.epoch or 0),
            self.args.process_index,
            self.args.world_size,
        )
        # not prepared by accelerate, which would share the rows out once more and fill the last step with others
        return DataLoader(
            self._remove_unused_columns(rows, "training"),
            batch_sampler=steps,
            collate_fn=self._collate,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        if rows:
            return self.data_collator(rows)
        return {key: torch.zeros((0, 2), dtype=torch.long) for key in ("input_ids", "labels", "attention_mask")}

    def _get_eval_sampler(self, eval_dataset: Dataset) -> list[int]:
        """Rows of similar lengths together: little padding, and the longest first, so that what does not fit shows."""
        return np.argsort([-len(ids) for ids in eval_dataset["input_ids"]], kind="stable").tolist()

    def _passes(self, batch: dict, most: int, packed: bool = False) -> Iterator[dict]:
        """A batch in passes of the budget, as many in each process: several wait for one another in every pass.

        batch: input_ids, labels, attention_mask of shape (rows, tokens), longest row first; most: rows that the
        largest of the processes' batches has.
        """
        lengths = batch["attention_mask"].sum(dim=1)
        if self.args.world_size > 1:  # cut by the longest row of any process
            padded = torch.nn.functional.pad(lengths, (0, most - len(lengths)))
            lengths = self.accelerator.gather(padded.to(self.args.device)[None]).amax(dim=0).cpu()
            lengths = lengths[lengths > 0]
        for rows in cut(lengths.tolist(), self.budget, packed):
            part = {key: tensor[rows] for key, tensor in batch.items()}
            mask = part["attention_mask"].bool()
            if not len(mask):  # the other processes have a row more
                nothing = torch.full((1, 2), self.processing_class.pad_token_id)
                part = {"input_ids": nothing, "labels": nothing * 0 - 100, "attention_mask": nothing * 0 + 1}
                mask = part["attention_mask"].bool()
            if packed:
                flatten = DataCollatorForLanguageModeling(self.processing_class.pad_token_id, padding_free=True)
                names = ("input_ids", "labels")
                yield flatten(
                    [{name: part[name][row][kept].tolist() for name in names} for row, kept in enumerate(mask)]
                )
            else:
                # padding follows the tokens, so a causal model needs no mask, and attention without one is faster; a
                # mixture of experts leaves padding out of its own loss
                names = part if self.aux_loss_enabled else ("input_ids", "labels")
                yield {name: part[name][:, : int(mask.sum(dim=1).max())] for name in names}

    # --- a step

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward passes over this process's rows of a step. Returns their loss, a scalar.

        The loss is a sum over tokens divided by the tokens of the whole step, so it does not matter (dropout apart) in
        how many passes they come. When memory runs out, the step comes again with half the budget, which is kept.
        """
        if self.logged is None:
            self.logged = (time.monotonic() - self.paused, int(self.state.num_input_tokens_seen))
        while True:
            try:
                self.doing = "pass"
                total = self._step(model, inputs, num_items_in_batch)
                self.doing = "step"
                return total
            except torch.OutOfMemoryError:
                lengths = inputs["attention_mask"].sum(dim=1).tolist()
                parts = [lengths[rows] for rows in cut(lengths, self.budget, self.packed)]
                largest = max(sum(part) if self.packed else len(part) * part[0] for part in parts)
                # the others of several processes would wait; DeepSpeed has counted the passes that went well
                if self.args.world_size > 1 or self.is_deepspeed_enabled or all(len(part) == 1 for part in parts):
                    raise
            # outside of the except clause: the error's frames hold the tensors of the pass that failed
            self.budget = largest // 2
            model.zero_grad()
            gc.collect()
            torch.cuda.empty_cache()
            say(f"note: out of memory with {largest:,} tokens a pass: now this step again with {self.budget:,}")

    def _step(self, model, inputs: dict, num_items_in_batch) -> torch.Tensor:
        alone = self.args.world_size == 1 or self.is_deepspeed_enabled or self.is_fsdp_enabled
        total, passes = 0.0, list(self._passes(inputs, self.args.per_device_train_batch_size, self.packed))
        self.current_gradient_accumulation_steps = len(passes)  # by which a mixture of experts divides its own loss
        for number, part in enumerate(passes, 1):
            last = number == len(passes)
            # DeepSpeed takes its optimizer step in the pass that says so; DDP adds up gradients in the last one
            self.accelerator.gradient_state._set_sync_gradients(last)
            # PEFT casts what goes into a 16-bit layer to the adapter's fp32, keeps that for the backward pass, and
            # autocast casts it back at once: two thirds of what LoRA holds of such a layer, for nothing
            uncast = disable_input_dtype_casting(self.model, self.lora and (self.args.bf16 or self.args.fp16))
            with contextlib.nullcontext() if alone or last else self.accelerator.no_sync(model), uncast:
                total = total + super().training_step(model, part, num_items_in_batch)
        return total

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The nll of the trained positions over the tokens of the step, as TRL has it, without TRL's metrics.

        (TRL gathers an accuracy and an entropy over the processes, and waits for the device, in every pass.)
        """
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        tokens = outputs.label_mask.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = -outputs.log_probs.sum() / tokens.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP and ZeRO average over the processes
        if self.aux_loss_enabled:
            passes = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / passes
        return (loss, outputs) if return_outputs else loss

    # --- evaluation, and what the log says

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Per-row sums instead of a loss: (None, nll of shape (batch,), tokens of shape (batch,))."""
        nll, tokens = [], []
        for part in self._passes(inputs, len(inputs["input_ids"])):
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = model(**self._prepare_inputs(part), use_cache=False, fused_lm_head=True)
            # log_probs are zero where the label is masked
            nll.append(-outputs.log_probs.double().sum(dim=1))
            tokens.append(outputs.label_mask.sum(dim=1))
        return None, torch.cat(nll), torch.cat(tokens)

    @contextlib.contextmanager
    def pause(self):
        """Time that is not counted as training."""
        if torch.cuda.is_available():  # what is still queued on the GPU is training
            torch.cuda.synchronize()
        began = time.monotonic()
        try:
            yield
        finally:
            self.paused += time.monotonic() - began

    def _run_epoch(self, **of_epoch):
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(**of_epoch)
        self.control.should_training_stop = True  # a finished run: transformers would take one more step

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        before, self.doing = self.doing, "evaluation"
        with self.pause():  # the sample answers, too, which a callback makes
            metrics = super().evaluate(*args, **kwargs)
        self.doing = before
        return metrics

    def _save_checkpoint(self, *args, **kwargs) -> None:
        with self.pause(), self._or_disk_full():
            if self.is_fsdp_enabled:
                # the library asks whether the folder of the best checkpoint is there before FSDP's shards make it: one
                # process might see it and another not, and only one of them would then load it and wait for ever
                folder = os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")
                os.makedirs(folder, exist_ok=True)
            # older ones go only when this one is complete: its manifest comes last, after all processes have written
            limit, self.args.save_total_limit = self.args.save_total_limit, None
            try:
                super()._save_checkpoint(*args, **kwargs)
            finally:
                self.args.save_total_limit = limit
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                state, best = self.state, self.state.best_model_checkpoint
                run = {"step": state.global_step, "steps": state.max_steps, "best": best and Path(best).name}
                folder = Path(self.args.output_dir) / f"checkpoint-{state.global_step}"
                checkpoints.seal(folder, {**self.run, **run})
                rotate_checkpoints(self.args.output_dir, limit, best)

    @contextlib.contextmanager
    def _or_disk_full(self):
        """Raise DiskFull where a checkpoint does not fit, and remove what was written of it."""
        try:
            yield
        except Exception as error:  # each library has its own kind
            if not disk_full(error):
                raise
            step = self.state.global_step
            if self.args.should_save:
                checkpoints.remove([Path(self.args.output_dir) / f"checkpoint-{step}"])
            raise DiskFull(f"checkpoint-{step}") from error

    def save_model(self, *args, **kwargs) -> None:
        """As the Trainer does; ZeRO-3's weights are brought together even where its configuration does not ask."""
        if self.is_deepspeed_enabled:
            self.deepspeed._config.zero_config.gather_16bit_weights_on_model_save = True
        super().save_model(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.logged:
            (then, before), now = self.logged, time.monotonic() - self.paused
            tokens = int(self.state.num_input_tokens_seen)
            self.logged = (now, tokens)
            logs["tokens_per_second"] = (tokens - before) / max(now - then, 1e-9)
            logs["memory_gb"] = device.peak_memory() / GB
        super().log(logs, start_time)

    def create_model_card(self, *args, **kwargs) -> None:
        """Nothing: TRL's card of a checkpoint knows no base ("fine-tuned version of None"); export.py writes ours."""


# --- DeepSpeed's file


def deepspeed_path(settings) -> str | None:
    """The DeepSpeed configuration file in force: DEEPSPEED_CONFIG, or what `accelerate launch` was given; or None."""
    if getattr(settings, "USE_DEEPSPEED", False):
        return str(hub.local_path(settings.DEEPSPEED_CONFIG))
    return os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") or None


def deepspeed_file(config: str) -> str:
    """Path of a DeepSpeed configuration for SFTConfig.

    Under plain `python`, this sets up the one process that DeepSpeed expects.
    """
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)  # without these DeepSpeed looks for MPI
    os.environ.setdefault("MASTER_PORT", str(device.free_port()))
    if device.launched():  # else ZeRO-3 takes itself for alone while the model loads
        from deepspeed import comm

        comm.init_distributed(auto_mpi_discovery=False)
    return str(hub.local_path(config))


# --- rows


def token_rows(
    data_dir: str, part: str, limit: int | None, tokenizer, max_length: int, max_drop_fraction: float
) -> Dataset:
    """Rows of "train" or "validation" as the trainer takes them.

    Their columns: input_ids, labels (-100 on the prompt), length (tokens), trained (tokens that are trained), id, and
    question (a hash of the prompt).

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
        labels, question = [-100] * len(context) + answer, handover.content_hash(row["prompt"])
        known = {"id": row["id"], "question": question}
        return {"input_ids": ids, "labels": labels, "length": len(ids), "trained": len(answer), **known}

    # keep_in_memory: the ids depend on a template that the cache's fingerprint would not see
    texts = [name for name in rows.column_names if name != "id"]
    # and without a fingerprint of ours, the library would try to pickle the function
    name = f"{rows._fingerprint}-tokens"
    with bars():
        encoded = rows.map(
            encode, remove_columns=texts, keep_in_memory=True, desc=phrase("tokenising"), new_fingerprint=name
        )
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
