"""Fine-tunes a causal language model with all its weights, with DeepSpeed where one GPU is not enough.

Reads:  data/ (made by 1_prepare_dataset.py)
Writes: outputs/full_model/: final_model/, training_log.json, training_curves.png, checkpoint-*,
        runs/ (TensorBoard)

    python 3_full_finetuning.py
    accelerate launch 3_full_finetuning.py --num_epochs 1

Takes about a minute on a laptop with --preset demo. After an interruption the same command resumes the run.
"""

import os
from typing import Annotated, Literal

from configs import hub
from configs.settings import fail, freeze, override

# --- model
MODEL_NAME = "microsoft/phi-2"  # Hub name or local folder of the base model
MODEL_REVISION: str | None = None  # branch, tag or commit of the model on the Hub; none: its default branch

# --- data
DATA_DIR = "data"  # folder with the prepared data, written by 1_prepare_dataset.py
# A row longer than this is left out, never cut: a cut answer teaches the model to stop in mid-sentence.
MAX_LENGTH: Annotated[int, "x >= 1"] = 1024  # most tokens of prompt and answer together; longer rows are left out
MAX_TRAIN_SAMPLES: Annotated[int | None, "x >= 1"] = None  # use only this many training rows; none: all
# Evaluation during training should not take more than a tenth of the time.
MAX_EVAL_SAMPLES: Annotated[int | None, "x >= 1"] = 500  # use only this many validation rows; none: all
MAX_DROP_FRACTION: Annotated[float, "0 <= x <= 1"] = 0.2  # stop when a larger share of the rows exceeds MAX_LENGTH
# Prose apart from the data set's subject: less is forgotten, and perhaps less learned (run_all.py --sweep replay).
REPLAY_FRACTION: Annotated[float, "0 <= x <= 0.9"] = 0.0  # share of the training tokens that are general text
REPLAY_TEXT: str | None = None  # a text file, or a Hub data set with a text column: owner/name#configuration

# --- DeepSpeed
USE_DEEPSPEED = False  # split optimizer state and gradients over processes (ZeRO); works under plain python too
DEEPSPEED_CONFIG = "configs/ds_config.json"  # ZeRO-2; the ZeRO-3 and offload variants lie beside it

# --- training
# Every weight moves, so each may move only a little: higher rates make the model forget what it knew.
LEARNING_RATE: Annotated[float, "x > 0"] = 5e-5  # peak learning rate; LoRA's is about ten times full fine-tuning's
NUM_EPOCHS: Annotated[float, "x > 0"] = 3.0  # passes over the training rows
MAX_STEPS: Annotated[int | None, "x >= 1"] = None  # stop after this many optimizer steps; none: run NUM_EPOCHS
# 2 x 8 rows a step, the 16 of 2_lora_finetuning.py: both methods take the same steps over the same rows.
BATCH_SIZE: Annotated[int, "x >= 1"] = 2  # times GRADIENT_ACCUMULATION_STEPS: rows an optimizer step, over all devices
GRADIENT_ACCUMULATION_STEPS: Annotated[int, "x >= 1"] = 8  # times BATCH_SIZE: rows an optimizer step
WARMUP_RATIO: Annotated[float, "0 <= x < 1"] = 0.03  # share of all steps in which the learning rate rises to its peak
# The library's other schedules need arguments of their own.
Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]
LR_SCHEDULER: Schedule = "cosine"  # how the learning rate falls after the warm-up
WEIGHT_DECAY: Annotated[float, "x >= 0"] = 0.0  # AdamW's weight decay
MAX_GRAD_NORM: Annotated[float, "x >= 0"] = 1.0  # clip gradients to this norm; 0: no clipping
PRECISION: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 where the hardware has it, else fp16 or fp32
EARLY_STOPPING_PATIENCE: Annotated[int | None, "x >= 1"] = None  # stop after this many evaluations without improvement
SEED: Annotated[int, "0 <= x < 4_000_000_000"] = 42  # for the order of the rows, dropout and new weights

# --- memory
# auto leaves the choice to the memory plan, which is printed before the model loads: the fastest way that fits.
# Of the library's optimizers, these need no further package.
AdamW = Literal["adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"]
EightBit = Literal["adamw_torch_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "lion_8bit", "paged_lion_8bit"]
Other = Literal["lion_32bit", "paged_lion_32bit", "adafactor", "sgd", "adagrad", "rmsprop"]
Optimizer = Literal["auto"] | AdamW | EightBit | Other
OPTIM: Optimizer = "auto"  # optimizer, by its name in transformers; auto: as the memory plan says
GRADIENT_CHECKPOINTING: bool | Literal["auto"] = "auto"  # recompute activations: less memory, slower
PACKING: bool | Literal["auto"] = "auto"  # rows one after another, not padded, where attention keeps them apart
PLAN_ONLY = False  # print the memory plan and stop
DEVICE_MEMORY_GB: Annotated[float | None, "x > 0"] = None  # plan for this much free GPU memory; none: measure it

# --- logging and checkpoints
LOGGING_STEPS: Annotated[int, "x >= 1"] = 10  # optimizer steps between two records of the loss
EVAL_STEPS: Annotated[float, "x > 0"] = 0.25  # between two evaluations; below 1: a share of the run, else steps
SAVE_STEPS: Annotated[float, "x > 0"] = 0.25  # between two checkpoints; equal to EVAL_STEPS, so that the best is saved
SAVE_TOTAL_LIMIT: Annotated[int, "x >= 1"] = 2  # checkpoints to keep; the best one always is
# A run that lies in OUTPUT_DIR is never thrown away: one of the same data and settings is gone on with, or left as it
# is where it is finished; another one is only moved to outputs/history, when that is asked for.
RESUME: bool | Literal["auto"] = "auto"  # true: go on or fail; false: as RERUN; auto: go on where it can
RERUN = False  # train again, and move the run that lies in OUTPUT_DIR to outputs/history
REPORT_TO = "tensorboard"  # tensorboard, wandb, mlflow, trackio, swanlab, several of them, or none
QUIET = False  # show only the first and the last line, warnings and errors

# --- output
OUTPUT_DIR = "outputs/full_model"  # checkpoints, training_log.json, TensorBoard events and the final model
PUSH_TO_HUB: str | None = None  # upload the final model to the Hub as owner/name, private if new; none: no

if __name__ == "__main__":
    override(globals(), check=hub.model_problems)
    hub.go_online(MODEL_NAME, hub.text_name(REPLAY_TEXT), push=PUSH_TO_HUB)  # before the imports: they read its answer

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import SFTConfig

from configs import chat, device, handover, models
from configs.training.before import meet, model_config, preflight, problems
from configs.training.export import save_final
from configs.training.memory import Plan, make_plan
from configs.training.progress import callbacks
from configs.training.push import finish
from configs.training.replay import with_replay
from configs.training.resume import make_room, where_to_start
from configs.training.runlog import RunLog, run
from configs.training.trainer import ExactTrainer, deepspeed_file, token_rows


def training_arguments(settings, plan: Plan) -> SFTConfig:
    """The Trainer's arguments. settings: the constants above; plan: what fits."""
    return SFTConfig(
        output_dir=settings.OUTPUT_DIR,
        max_length=None,  # the rows were measured when they were tokenised
        dataset_kwargs={"skip_prepare_dataset": True},
        learning_rate=settings.LEARNING_RATE,
        num_train_epochs=settings.NUM_EPOCHS,
        max_steps=settings.MAX_STEPS or -1,
        per_device_train_batch_size=plan.share,  # a batch is an optimizer step; the trainer cuts it into passes
        per_device_eval_batch_size=max(plan.share, 32),  # cut into passes, too
        warmup_steps=settings.WARMUP_RATIO,
        lr_scheduler_type=settings.LR_SCHEDULER,
        weight_decay=settings.WEIGHT_DECAY,
        max_grad_norm=settings.MAX_GRAD_NORM,
        optim=plan.optim,
        optim_args=plan.optim_args,
        gradient_checkpointing=plan.checkpointing,
        bf16=plan.dtype == torch.bfloat16,
        fp16=plan.dtype == torch.float16,
        use_cpu=not torch.cuda.is_available(),
        seed=settings.SEED,
        logging_steps=settings.LOGGING_STEPS,
        logging_nan_inf_filter=False,  # a NaN must be seen
        include_num_input_tokens_seen="non_padding",
        eval_strategy="steps",
        eval_steps=settings.EVAL_STEPS,
        eval_on_start=True,  # the loss before training stands in the log
        save_steps=settings.SAVE_STEPS,
        save_total_limit=settings.SAVE_TOTAL_LIMIT,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=False,  # RunLog reads its own
        report_to=settings.REPORT_TO.replace(" ", "").split(","),
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        deepspeed=deepspeed_file(settings.DEEPSPEED_CONFIG) if settings.USE_DEEPSPEED else None,
    )


def adapter_config(settings) -> None:
    """None: every weight is trained."""
    return None


def build_model(settings, plan: Plan, target: torch.device) -> PreTrainedModel:
    """The model with fp32 masters, or bf16 weights rounded stochastically: plain bf16 loses small updates."""
    return models.load(
        AutoModelForCausalLM,
        settings.MODEL_NAME,
        settings.MODEL_REVISION,
        dtype=torch.bfloat16 if plan.half_weights else torch.float32,
        attn_implementation=plan.attn_implementation,
        device_map=device.placement(target),
    )


def main() -> None:
    settings = freeze(globals())
    name, revision, length = settings.MODEL_NAME, settings.MODEL_REVISION, settings.MAX_LENGTH
    if wrong := device.machine_problems() + problems(vars(settings)):
        fail(*wrong)
    config = model_config(name, revision, length, weights=not settings.PLAN_ONLY)
    adapter = adapter_config(settings)
    if settings.PLAN_ONLY:
        make_plan(settings, config, length, adapter)
        return
    manifest = meet(settings)

    with handover.lock(settings.OUTPUT_DIR):
        # --- where it goes on, the data, and what fits
        start = where_to_start("full", settings, manifest, config)
        tokenizer = chat.load_tokenizer(name, revision, manifest["settings"]["PROMPT_FORMAT"])
        limits = (tokenizer, length, settings.MAX_DROP_FRACTION)
        train_rows = token_rows(settings.DATA_DIR, "train", settings.MAX_TRAIN_SAMPLES, *limits)
        train_rows = with_replay(train_rows, settings, tokenizer)
        eval_rows = token_rows(settings.DATA_DIR, "validation", settings.MAX_EVAL_SAMPLES, *limits)
        plan = make_plan(settings, config, max(train_rows["length"]), adapter, start.plan)
        preflight(train_rows, eval_rows, tokenizer, settings, config, plan, start)

        # --- model and trainer
        make_room(start, settings.OUTPUT_DIR)
        os.environ["TENSORBOARD_LOGGING_DIR"] = f"{settings.OUTPUT_DIR}/runs"
        arguments = training_arguments(settings, plan)  # before the model: ZeRO-3 splits it while it loads
        counts = {"train_rows": len(train_rows), "eval_rows": len(eval_rows)}
        log = RunLog("full", vars(settings), plan, manifest, counts, start)
        trainer = ExactTrainer(
            model=build_model(settings, plan, arguments.device),
            args=arguments,
            plan=plan,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            callbacks=callbacks(settings, log),
            peft_config=adapter,
        )

        # --- train and save
        run(trainer, log)
        save_final(trainer, "final_model", config.dtype, log)
        finish(trainer, log)
    device.leave()


if __name__ == "__main__":
    main()
