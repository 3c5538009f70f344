"""What a training will hold in memory, and the choices that make it fit.

The plan is made from the model's configuration alone, before anything is loaded.
"""

import importlib.util
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import LoraConfig

from configs import device
from configs.handover import LORA
from configs.settings import command, fail, say
from configs.training import trainer
from configs.training.sizes import Sizes

# bytes of optimizer state a trained parameter; Adam keeps two moments
STATE_BYTES = {"adamw_torch_8bit": 2, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 2}
STATE_BYTES |= {"sgd": 0, "adafactor": 0, "lion_32bit": 4, "lion_8bit": 1, "paged_lion_32bit": 4, "paged_lion_8bit": 1}
RESERVE = 0.08  # of the rest: what CUDA's allocator cannot use because it lies between other blocks
HEADROOM = 0.85  # of the free memory, for passes that are larger than asked for
BUCKET = 500_000_000  # values that DeepSpeed collects before it exchanges them (reduce_bucket_size); two in turns
NAMES = {dtype: name for name, dtype in device.DTYPES.items()}


@dataclass(frozen=True)
class Plan:
    """What a training will hold in memory, in bytes, and the choices that make it fit.

    parts: what takes it -> bytes; free: bytes that the device has; reasons: why each choice was made.
    """

    checkpointing: bool
    optim: str
    half_weights: bool  # bf16 weights with stochastic rounding instead of fp32 masters
    tokens: int  # of a forward pass at most, padding included
    rows: int  # of an optimizer step, over all processes
    parts: dict[str, int]
    free: int
    disk: int
    kept: int
    attention: str
    packing: bool
    precision: str = "fp32"
    reasons: tuple[str, ...] = ()
    parameters: int = 0  # of the base model

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return device.DTYPES[self.precision]

    @property
    def attn_implementation(self) -> str | None:
        """What a model is loaded with: sdpa is every model's own choice where it has it, and refused elsewhere."""
        return None if self.attention == "sdpa" else self.attention

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def share(self) -> int:
        """Rows of an optimizer step in this process, at most."""
        return -(-self.rows // device.processes())

    @property
    def optim_args(self) -> str | None:
        """What the optimizer is given: bf16 weights would lose every update below 1/256 of a weight to rounding."""
        return "bf16_stochastic_round=True" if self.half_weights else None

    def as_dict(self) -> dict:
        """For training_log.json; `planned_bytes` is what the measured peak is to be compared with."""
        planned = {key: value for key, value in self.parts.items() if key != "reserve"}
        choices = {
            "gradient_checkpointing": self.checkpointing,
            "optim": self.optim,
            "bf16_weights": self.half_weights,
            "tokens_per_pass": self.tokens,
            "rows_per_step": self.rows,
            "precision": self.precision,
            "attention": self.attention,
            "packing": self.packing,
        }
        return {**choices, "parts": planned, "planned_bytes": sum(planned.values()), "disk_bytes": self.disk}

    def table(self) -> str:
        """The plan for people."""
        free, kept = device.size(self.free), device.size(self.kept)
        lines = [f"  {name:16} {device.size(bytes_):>11}" for name, bytes_ in self.parts.items()]
        lines += [f"  {'together':16} {device.size(self.total):>11} of {free} that are free"]
        lines += [f"  {'disk':16} {device.size(self.disk):>11} for checkpoints and the result, {kept} of it stays"]
        return "\n".join([*lines, *(f"  chosen: {reason}" for reason in self.reasons)])


def packing(choice: bool | str, implementation: str) -> tuple[bool, str]:
    """(whether the rows of a pass lie one after another instead of being padded, why).

    Only flash and flex attention keep such rows apart at no cost: with others a row could see its neighbours, or would
    pay for masking them. A step holds the same rows either way.
    """
    isolates = implementation.startswith(("flash", "flex"))
    if choice is True and not isolates:
        fail(
            f"PACKING is true, but {implementation} attention does not keep packed rows apart; install flash-attn, or "
            "let rows be padded: --packing auto"
        )
    if choice is not False and isolates:
        return True, f"{implementation} keeps packed rows apart"
    return False, "chosen by PACKING" if isolates else f"{implementation} does not keep packed rows apart"


def parts(
    sizes: Sizes, settings, dtype: torch.dtype, checkpointing: bool, optim: str, half: bool, tokens: int
) -> dict:
    """Bytes that a training holds at its peak, by what takes them. tokens: of a forward pass, padding included."""
    lora, split = hasattr(settings, "LORA_R"), sharing(settings)
    width, deepspeed = dtype.itemsize, split["engine"] == "deepspeed"
    # weights: full fine-tuning trains fp32 masters (or bf16 ones); LoRA's base is frozen, its adapters are fp32.
    # DeepSpeed computes in 16 bits instead and keeps its masters beside.
    trained = width if deepspeed or half else 4
    if not lora:
        weights = sizes.total * trained
    elif settings.USE_4BIT:  # nf4, with doubly quantised scales: 4.127 bits (QLoRA, section 3)
        weights = int(sizes.linear * 4.127 / 8) + (sizes.total - sizes.linear) * width
        weights += sizes.trainable * trained + sizes.largest * width  # and one layer at a time in full width
    else:
        weights = sizes.total * width + sizes.trainable * trained
    gradients = sizes.trainable * trained
    states = sizes.trainable * STATE_BYTES.get(optim, 8)
    if optim in ("adamw_bnb_8bit", "paged_adamw_8bit", "adamw_8bit") and not lora:
        states += sizes.embeddings * 6  # bitsandbytes keeps the states of embeddings in 32 bits
    # autocast keeps a copy of each trained fp32 weight in 16 bits until the forward pass ends
    copies = sizes.linear * width if not lora and trained == 4 and dtype != torch.float32 else 0
    passes = tokens / sizes.length  # in rows of the longest length
    if checkpointing:  # the input of every layer; one layer is computed again, and its gradients with it
        stream = sizes.length * sizes.hidden * (width if lora or half or deepspeed else 4)
        activations = passes * (sizes.layers * stream + 2 * sizes.layer + sizes.fixed)
    else:  # what autograd keeps of every layer, and of one more while it is computed
        activations = passes * ((sizes.layers + 1) * sizes.layer + sizes.fixed)
    # TRL's head works in tiles; it keeps the gradient of its input, and of its weight where that is trained, in fp32
    logits = min(tokens, 4096) * min(sizes.vocabulary, 32768) * width + tokens * sizes.hidden * 4
    logits += 0 if lora else sizes.vocabulary * sizes.hidden * 4
    sizes_of = {
        "weights": weights // split["weights"],
        "gradients": gradients // split["gradients"],
        "optimizer": 0 if split["offload"] else states // split["states"],
        "16-bit copies": copies // split["weights"],
        "activations": int(activations),
        "logits": int(logits),
    }
    if deepspeed:  # the fp32 masters of this process's part, their gradients in the step, and what is exchanged
        sizes_of["fp32 masters"] = 0 if split["offload"] else sizes.trainable * 8 // split["states"]
        sizes_of["buckets"] = 2 * min(BUCKET, sizes.trainable) * width
    if split["engine"] == "fsdp":  # one layer is whole while it is computed, and the next one on its way
        sizes_of["whole layers"] = 2 * (sizes.total // max(sizes.layers, 1)) * width
    sizes_of["reserve"] = int(RESERVE * sum(sizes_of.values())) if dtype != torch.float32 else 0
    return sizes_of


def sharing(settings) -> dict:
    """What the processes share out, and how: ZeRO (Rajbhandari et al. 2020) by DeepSpeed, or FSDP.

    Keys: engine ("deepspeed", "fsdp" or None), weights, gradients, states (by what each is divided on one device),
    offload (whether the optimizer lies in the CPU's memory).
    """
    count, engine, stage, offload = device.processes(), None, 0, False
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        engine, stage = "deepspeed", int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0") or 0)
        offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") not in ("none", "")
    elif os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        engine, stage = "fsdp", 3
    if path := trainer.deepspeed_path(settings):
        own = json.loads(Path(path).read_text("utf-8")).get("zero_optimization", {})
        engine, stage, offload = "deepspeed", int(own.get("stage", 0)), "offload_optimizer" in own
    return {
        "engine": engine,
        "stage": stage,
        "states": count if stage >= 1 else 1,
        "gradients": count if stage >= 2 else 1,
        "weights": count if stage >= 3 else 1,
        "offload": offload,
    }


def make_plan(settings, config, length: int, adapter, before: dict | None = None) -> Plan:
    """The fastest plan that fits the fullest device of all processes, printed as a table; the same in each process.

    Tried in this order: the settings as they are, with gradient checkpointing, with 8-bit AdamW, with bf16 weights and
    stochastic rounding (full fine-tuning); each with as many tokens a pass as fit, at least one row of the longest.
    The rows of a step never change, and a setting that is not "auto" is kept. length: tokens of the longest row;
    adapter: LoRA's configuration, or None; before: the plan of the run that goes on, whose choices are kept.
    Raises: SystemExit(2) when nothing fits, with what would, or when the disk is too small for the checkpoints.
    """
    dtype, why = device.precision(settings.PRECISION, settings.DEVICE_MEMORY_GB)
    if before:
        dtype, why = device.DTYPES[before["precision"]], "as the interrupted run had it"
    say(f"precision: {dtype} ({why})")
    device.own_precision(dtype)
    free = device.least_memory(settings.DEVICE_MEMORY_GB)
    return device.decided_once(lambda: _make_plan(settings, config, dtype, length, adapter, free, before))


def _make_plan(settings, config, dtype: torch.dtype, length: int, adapter, free: int, before: dict | None) -> Plan:
    implementation = device.attention(dtype)
    if before and before["attention"] != implementation:
        fail(
            f"{settings.OUTPUT_DIR}: the interrupted run computed attention with {before['attention']}, and this "
            f"machine has {implementation}; install what is missing, or start afresh: --resume false"
        )
    packed, why_packed = packing(settings.PACKING, implementation)
    sizes, lora = Sizes(config, adapter, dtype, length, planned_for_gpu(settings)), adapter is not None
    rows = settings.BATCH_SIZE * settings.GRADIENT_ACCUMULATION_STEPS
    ladder = rungs(settings, dtype, lora)
    if before:
        kept = (before["gradient_checkpointing"], before["optim"], before["bf16_weights"])
        ladder = [kept, (True, *kept[1:])]
    # the most that a pass can be asked to hold: all rows of a step that one process has
    share, asked = -(-rows // device.processes()), settings.BATCH_SIZE * settings.MAX_LENGTH
    # each rung costs more time or precision than the one before, so the first that fits is the best one
    for on, optim, half in ladder:
        for count in range(share, 0, -1):
            tokens = count * length
            if before:
                tokens = min(tokens, before["tokens_per_pass"])
            planned = parts(sizes, settings, dtype, on, optim, half, tokens)
            # more than was asked for only where it surely fits: the plan is computed, not measured
            if fits := sum(planned.values()) <= free * (1 if tokens <= asked else HEADROOM):
                break
        if fits:
            break
    kept = result_bytes(sizes, settings, lora)
    disk = kept + disk_bytes(sizes, settings, optim, half)
    why = (*reasons(settings, on, optim, half, tokens, before), f"packing {'on' if packed else 'off'}: {why_packed}")
    choices = (on, optim, half, tokens, rows)
    plan = Plan(*choices, planned, free, disk, kept, implementation, packed, NAMES[dtype], why, sizes.total)
    method = "LoRA" if lora else "full"
    say(
        f"memory plan, {method}, passes of up to {tokens:,} tokens, rows of up to {length:,}:\n{plan.table()}",
        always=settings.PLAN_ONLY,
    )
    if plan.total > free and before:
        fail(
            f"{settings.OUTPUT_DIR}: the interrupted run was trained with {optim} and {NAMES[dtype]}, which needs "
            f"{device.size(plan.total)}, and {device.size(free)} are free; free the device's memory, or start afresh: "
            "--resume false"
        )
    if plan.total > free:
        ways = ways_out(settings, config, dtype, length, sizes, free, plan.total, adapter)
        fail(
            f"{settings.MODEL_NAME} ({method}) needs {device.size(plan.total)} at the least, and {device.size(free)} "
            f"are free; what would fit: {'; '.join(ways)}"
        )
    output = settings.OUTPUT_DIR
    left = shutil.disk_usage(output if Path(output).is_dir() else ".").free
    there = 0 if settings.RERUN or settings.RESUME is False else checkpoint_bytes(output)  # they make room in turn
    if left + there < disk and not settings.PLAN_ONLY:
        lie = f", {device.size(there)} lie there already" if there else ""
        fewer = ", keep fewer: --save_total_limit 2" if settings.SAVE_TOTAL_LIMIT > 2 else ""
        fail(
            f"{output}: {device.size(left)} are left on this disk, and the checkpoints need {device.size(disk)}{lie}; "
            f"make room{fewer}, or choose another place: --output_dir PATH"
        )
    return plan


def planned_for_gpu(settings) -> bool:
    """Whether a GPU will train: this machine has one, or DEVICE_MEMORY_GB describes one."""
    return settings.DEVICE_MEMORY_GB is not None or torch.cuda.is_available()


def rungs(settings, dtype: torch.dtype, lora: bool) -> list[tuple[bool, str, bool]]:
    """(gradient checkpointing, optimizer, bf16 weights) from the fastest to what needs the least memory."""
    gpu = planned_for_gpu(settings)
    plain = "adamw_torch_fused" if settings.OPTIM == "auto" else settings.OPTIM
    checkpoints = [False, True] if settings.GRADIENT_CHECKPOINTING == "auto" else [settings.GRADIENT_CHECKPOINTING]
    ladder = [(on, plain, False) for on in checkpoints]
    # the 8-bit optimizers need a GPU; DeepSpeed has fp32 masters and states of its own, and FSDP shares them out
    if settings.OPTIM == "auto" and gpu and sharing(settings)["engine"] is None:
        ladder += [(checkpoints[-1], "paged_adamw_8bit" if lora else "adamw_bnb_8bit", False)]
        if not lora and dtype == torch.bfloat16 and importlib.util.find_spec("torchao"):
            ladder += [(checkpoints[-1], "adamw_torch_8bit", True)]
    return ladder


def reasons(settings, on: bool, optim: str, half: bool, tokens: int, before: dict | None) -> tuple[str, ...]:
    """One sentence for each thing that the plan chose."""
    sentences = []
    if before:
        sentences.append("optimizer, weights, attention and precision as the interrupted run had them")
        if tokens < before["tokens_per_pass"]:
            sentences.append(f"{tokens:,} tokens a pass instead of {before['tokens_per_pass']:,}: less memory is free")
        return tuple(sentences)
    if settings.GRADIENT_CHECKPOINTING == "auto":
        sentences.append(
            "gradient checkpointing, because the activations would not fit without it"
            if on
            else "no gradient checkpointing, because the activations fit"
        )
    if settings.OPTIM == "auto" and optim != "adamw_torch_fused":
        sentences.append(f"{optim}: optimizer states in 8 bits, because 32 would not fit")
    if half:
        sentences.append("bf16 weights with stochastic rounding, because fp32 masters would not fit")
    asked = settings.BATCH_SIZE * settings.MAX_LENGTH
    if tokens != asked:
        why = (
            "as many as the rows of a step fill and the memory holds"
            if tokens > asked
            else "all that is needed or fits"
        )
        sentences.append(
            f"{tokens:,} tokens a pass instead of {settings.BATCH_SIZE} x {settings.MAX_LENGTH:,}: {why}; "
            "the rows of a step stay the same"
        )
    return tuple(sentences)


def ways_out(
    settings, config, dtype: torch.dtype, length: int, sizes: Sizes, free: int, total: int, adapter
) -> list[str]:
    """What would fit where a plan does not, each with its number."""
    ways, lora = [], adapter is not None

    def offer(text: str, needed: int) -> None:
        if needed <= free:
            ways.append(f"{text} ({device.size(needed)})")

    def least(sizes: Sizes, settings, free_choice: bool = False) -> int:
        """The least that a training takes: one row a pass, and what the settings leave open chosen for memory."""
        on = True if free_choice or settings.GRADIENT_CHECKPOINTING == "auto" else settings.GRADIENT_CHECKPOINTING
        small = "paged_adamw_8bit" if hasattr(settings, "LORA_R") else "adamw_torch_8bit"
        optim = small if free_choice or settings.OPTIM == "auto" else settings.OPTIM
        half = optim == "adamw_torch_8bit" and dtype == torch.bfloat16
        return sum(parts(sizes, settings, dtype, on, optim, half, sizes.length).values())

    if settings.GRADIENT_CHECKPOINTING is False or settings.OPTIM != "auto":
        offer("both left to the plan: --gradient_checkpointing auto --optim auto", least(sizes, settings, True))
    # the same run as LoRA over 4 bits, whatever it is now
    as_lora = SimpleNamespace(**{**vars(settings), "LORA_R": 16, "USE_4BIT": True, "USE_DEEPSPEED": False})
    if not lora:
        adapted = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
        small = Sizes(config, adapted, dtype, length, planned_for_gpu(settings))
        offer(f"LoRA over 4 bits: {command(LORA)}", least(small, as_lora, True))
        as_lora.USE_4BIT = False
        offer(f"LoRA over 16 bits: {command(LORA, '--use_4bit', 'false')}", least(small, as_lora, True))
        offload = parts(sizes, settings, dtype, True, "adamw_torch_fused", False, length)
        offer(
            "DeepSpeed with the optimizer on the CPU: --use_deepspeed --deepspeed_config "
            "configs/ds_config_offload.json",
            sum(bytes_ for name, bytes_ in offload.items() if name not in ("optimizer", "fp32 masters")),
        )
    elif not settings.USE_4BIT:
        offer("4 bits: --use_4bit true", least(sizes, as_lora, True))
    # activations grow with the row, so shorter ones help where weights leave some room
    for shorter in (512, 256, 128):
        if shorter < length:
            needed = least(Sizes(config, adapter, dtype, shorter, sizes.gpu), settings)
            if needed <= free:
                offer(f"rows of up to {shorter} tokens: --max_length {shorter}", needed)
                break
    billions = free / total * sizes.total / 1e9
    ways.append(f"a smaller model, of about {billions:.1f} billion parameters (computed in proportion)")
    return ways


def checkpoint_bytes(output_dir: str) -> int:
    """Bytes of the checkpoints that lie in a folder."""
    return sum(p.stat().st_size for p in Path(output_dir).glob("checkpoint-*/**/*") if p.is_file())


def result_bytes(sizes: Sizes, settings, lora: bool) -> int:
    """Bytes of the final model, and of merged_model where it is wanted."""
    merged = sizes.total * 2 if not lora or settings.MERGE_ADAPTER else 0
    return merged + (sizes.trainable * 4 if lora else 0)


def disk_bytes(sizes: Sizes, settings, optim: str, half: bool) -> int:
    """Bytes of all checkpoints that lie there at once, one of them being written."""
    checkpoint = sizes.trainable * ((2 if half else 4) + STATE_BYTES.get(optim, 8))
    # a checkpoint holds what is trained and the optimizer's states; a new one is written before an old one goes
    copies = max(settings.SAVE_TOTAL_LIMIT, 2) + 1  # the best one and the last one always stay
    if settings.SAVE_STEPS < 1:
        copies = min(copies, math.ceil(1 / settings.SAVE_STEPS))
    elif settings.MAX_STEPS:  # the last step is always saved
        copies = min(copies, math.ceil(settings.MAX_STEPS / settings.SAVE_STEPS))
    return copies * checkpoint
