"""Fine-tunes a causal language model with QLoRA: small trained matrices on a frozen 4-bit base.

Reads:  data/ (made by 1_prepare_dataset.py)
Writes: outputs/lora_model/: final_lora_adapter/, training_log.json, checkpoint-*, runs/ (TensorBoard)

    python 2_lora_finetuning.py
    accelerate launch 2_lora_finetuning.py --num_epochs 1

Takes about a minute on a laptop with --preset demo. After an interruption the same command goes on.
"""

import os
from types import SimpleNamespace

from configs import files
from configs.settings import fail, override, read_constants

# --- model
MODEL_NAME = "microsoft/phi-2"  # Hub name or local folder of the base model
MODEL_REVISION: str | None = None  # branch, tag or commit of the model on the Hub; none is its default branch

# --- data
DATA_DIR = "data"  # folder that 1_prepare_dataset.py filled
# A row longer than this is left out, never cut: a cut answer teaches to stop in mid-sentence.
MAX_LENGTH = 1024  # tokens of prompt and answer together
MAX_TRAIN_SAMPLES: int | None = None  # use only so many training rows; none is all
# In-training evaluation should not take more than a tenth of the time.
MAX_EVAL_SAMPLES: int | None = 500  # use only so many validation rows; none is all
MAX_DROP_FRACTION = 0.2  # stop when a larger share of the rows does not fit MAX_LENGTH

# --- LoRA
LORA_R = 16  # rank of the trained matrices
LORA_ALPHA = 32  # their output is scaled by LORA_ALPHA / LORA_R
LORA_DROPOUT = 0.05  # dropout in front of them
# The QLoRA paper found that adapting every linear layer matters more than the rank.
LORA_TARGET_MODULES: str | list = "all-linear"  # layers that get them, or names: q_proj,v_proj
USE_DORA = False  # DoRA: trains the magnitude of the weights apart from their direction; slower
USE_RSLORA = False  # rsLoRA: scale by LORA_ALPHA / sqrt(LORA_R) instead, for high ranks
USE_4BIT = True  # hold the frozen base in 4 bits (nf4, bitsandbytes); false is LoRA over 16 bits
MERGE_ADAPTER = False  # also write merged_model: the 16-bit base with the adapter added, for servers without PEFT

# --- training
# The QLoRA paper's value for models of up to 13B parameters.
LEARNING_RATE = 2e-4  # peak learning rate; LoRA's best is about ten times that of full fine-tuning
NUM_EPOCHS = 3.0  # passes over the training rows
MAX_STEPS: int | None = None  # stop after so many optimizer steps; none is NUM_EPOCHS
# 4 x 4 rows a step, the 16 of 3_full_finetuning.py: both methods take the same steps over the same data.
BATCH_SIZE = 4  # rows per device and forward pass
GRADIENT_ACCUMULATION_STEPS = 4  # forward passes per optimizer step
WARMUP_RATIO = 0.03  # share of all steps in which the learning rate rises from 0 to its peak
LR_SCHEDULER = "cosine"  # how the learning rate falls after that: cosine, linear, constant_with_warmup
WEIGHT_DECAY = 0.0  # AdamW's weight decay
MAX_GRAD_NORM = 1.0  # gradients are clipped to this norm
PRECISION = "auto"  # auto, bf16, fp16 or fp32; auto takes bf16 where the hardware has it
EARLY_STOPPING_PATIENCE: int | None = None  # stop after so many evaluations without a lower eval_loss
SEED = 42  # of the order of the rows, dropout and new weights

# --- memory
# auto leaves it to the memory plan: printed before the model loads, it takes what fits, fastest first.
OPTIM = "auto"  # auto, or by its transformers name, e.g. adamw_torch_fused, adamw_bnb_8bit, paged_adamw_8bit
GRADIENT_CHECKPOINTING: bool | str = "auto"  # auto; true recomputes activations: a third slower, less memory
PACKING: bool | str = "auto"  # auto, true, false: several rows in one sequence, where attention keeps them apart
PLAN_ONLY = False  # print the memory plan and stop
DEVICE_MEMORY_GB: float | None = None  # plan for a GPU with so much free memory; none asks this machine

# --- logging and checkpoints
LOGGING_STEPS = 10  # optimizer steps between two records of the loss
EVAL_STEPS = 0.1  # between two evaluations: below 1 a share of the run, above it optimizer steps
SAVE_STEPS = 0.1  # between two checkpoints; equal to EVAL_STEPS, so that the best one is there
SAVE_TOTAL_LIMIT = 2  # checkpoints kept; the best one always is
# "auto" goes on with an unfinished run of the same settings and data, and starts afresh otherwise.
RESUME: bool | str = "auto"  # auto; true goes on or fails; false starts afresh
REPORT_TO = "tensorboard"  # where the Trainer reports to, e.g. tensorboard, wandb, none

# --- output
OUTPUT_DIR = "outputs/lora_model"  # checkpoints, training_log.json, TensorBoard events and the final adapter

if __name__ == "__main__":
    override(globals())
    files.go_online(MODEL_NAME)  # first, because the libraries read its answer when they load

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from trl import SFTConfig

from configs import machine, training


def training_arguments(c: SimpleNamespace, dtype: torch.dtype, plan: machine.Plan) -> SFTConfig:
    """The Trainer's arguments. c: the constants above; dtype: what is computed in; plan: what fits."""
    return SFTConfig(
        output_dir=c.OUTPUT_DIR,
        max_length=None,  # the rows were measured when they were tokenised
        dataset_kwargs={"skip_prepare_dataset": True},
        learning_rate=c.LEARNING_RATE,
        num_train_epochs=c.NUM_EPOCHS,
        max_steps=c.MAX_STEPS or -1,
        per_device_train_batch_size=plan.batch_size,
        per_device_eval_batch_size=plan.batch_size * 2,  # no gradients, so twice as many rows take less memory
        gradient_accumulation_steps=plan.accumulation,
        warmup_steps=c.WARMUP_RATIO,
        lr_scheduler_type=c.LR_SCHEDULER,
        weight_decay=c.WEIGHT_DECAY,
        max_grad_norm=c.MAX_GRAD_NORM,
        optim=plan.optim,
        optim_args=plan.optim_args,
        gradient_checkpointing=plan.checkpointing,
        packing=plan.packing,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not torch.cuda.is_available(),
        seed=c.SEED,
        logging_steps=c.LOGGING_STEPS,
        logging_nan_inf_filter=False,  # a NaN must be seen
        include_num_input_tokens_seen="non_padding",
        eval_strategy="steps",
        eval_steps=c.EVAL_STEPS,
        eval_on_start=True,  # the loss before training stands in the log
        save_steps=c.SAVE_STEPS,
        save_total_limit=c.SAVE_TOTAL_LIMIT,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=False,  # RunLog reads its own
        report_to=c.REPORT_TO.replace(" ", "").split(","),
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def adapter_config(c: SimpleNamespace) -> LoraConfig:
    """The adapter that the trainer puts around the base."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=c.LORA_R,
        lora_alpha=c.LORA_ALPHA,
        lora_dropout=c.LORA_DROPOUT,
        target_modules=c.LORA_TARGET_MODULES,
        use_dora=c.USE_DORA,
        use_rslora=c.USE_RSLORA,
    )


def build_model(c: SimpleNamespace, dtype: torch.dtype, plan: machine.Plan, device: torch.device) -> PreTrainedModel:
    """The frozen base, in 4 bits or in `dtype`."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    with files.hub_errors("model", c.MODEL_NAME, "MODEL_NAME", c.MODEL_REVISION):
        return AutoModelForCausalLM.from_pretrained(
            files.model_path(c.MODEL_NAME),
            revision=c.MODEL_REVISION,
            dtype=dtype,
            attn_implementation=plan.attention,
            quantization_config=nf4 if c.USE_4BIT else None,
            device_map={"": device} if c.USE_4BIT else None,
        )


def main() -> None:
    c = SimpleNamespace(**{name: globals()[name] for name in read_constants(__file__)})
    problems = machine.machine_problems() + training.settings_problems(vars(c))
    problems += files.check_model(MODEL_NAME, MODEL_REVISION)
    if problems:
        fail(*problems)
    manifest = None if PLAN_ONLY else files.read_manifest(DATA_DIR)
    config = training.model_config(MODEL_NAME, MODEL_REVISION, MAX_LENGTH)
    dtype, why = machine.precision(PRECISION, DEVICE_MEMORY_GB)
    files.say(f"precision: {dtype} ({why})")
    c.USE_4BIT = machine.four_bit(USE_4BIT)
    if PLAN_ONLY:
        machine.make_plan(c, config, dtype, MAX_LENGTH, adapter_config(c))
        return

    with files.lock(OUTPUT_DIR):
        # --- data, and what fits
        tokenizer = files.load_tokenizer(MODEL_NAME, MODEL_REVISION, manifest["settings"]["PROMPT_FORMAT"])
        fit = (tokenizer, MAX_LENGTH, MAX_DROP_FRACTION)
        train_rows = training.token_rows(DATA_DIR, "train", MAX_TRAIN_SAMPLES, *fit)
        eval_rows = training.token_rows(DATA_DIR, "validation", MAX_EVAL_SAMPLES, *fit)
        plan = machine.make_plan(c, config, dtype, max(train_rows["length"]), adapter_config(c))
        training.preflight(train_rows, eval_rows, tokenizer, c, plan)

        # --- model and trainer
        checkpoint = training.resume_point(OUTPUT_DIR, RESUME, vars(c), manifest["manifest_sha256"])
        os.environ["TENSORBOARD_LOGGING_DIR"] = f"{OUTPUT_DIR}/runs"
        arguments = training_arguments(c, dtype, plan)  # before the model: ZeRO-3 splits it while it loads
        counts = {"train_rows": len(train_rows), "eval_rows": len(eval_rows)}
        log = training.RunLog("lora", vars(c), plan, manifest, counts, config, checkpoint)
        trainer = training.ExactTrainer(
            model=build_model(c, dtype, plan, arguments.device),
            args=arguments,
            train_dataset=training.pack(train_rows, MAX_LENGTH) if plan.packing else train_rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            callbacks=training.callbacks(c, log),
            peft_config=adapter_config(c),
        )

        # --- train and save
        training.run(trainer, log, checkpoint)
        training.save_final(trainer, f"{OUTPUT_DIR}/final_lora_adapter", None, log)
        if MERGE_ADAPTER:
            training.merge_adapter(trainer, c, eval_rows, log)
        training.finish(trainer, log)
        files.say(f"done: {OUTPUT_DIR}: final_lora_adapter, training_log.json, training_curves.png")
        trainer.end()


if __name__ == "__main__":
    main()
