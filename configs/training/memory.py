"""What a training will hold in memory, and the choices that make it fit.

The plan is made from the model's configuration alone, before anything is loaded.
"""

import copy
import importlib.util
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from configs import device, hub
from configs.device import GB
from configs.handover import LORA
from configs.settings import command, fail, say

# bytes of optimizer state a trained parameter; Adam keeps two moments
STATE_BYTES = {"adamw_torch_8bit": 2, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 2}
STATE_BYTES |= {"sgd": 0, "adafactor": 0, "lion_32bit": 4, "lion_8bit": 1}
RESERVE = 0.08  # of the rest: what CUDA's allocator cannot use because it lies between other blocks


@dataclass(frozen=True)
class Plan:
    """What a training will hold in memory, in bytes, and the choices that make it fit.

    parts: what takes it -> bytes; free: bytes that the device has; reasons: why each choice was made.
    """

    checkpointing: bool
    optim: str
    half_weights: bool  # bf16 weights with stochastic rounding instead of fp32 masters
    batch_size: int
    accumulation: int
    parts: dict[str, int]
    free: int
    disk: int
    attention: str
    packing: bool
    reasons: tuple[str, ...] = ()
    parameters: int = 0  # of the base model

    @property
    def total(self) -> int:
        return sum(self.parts.values())

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
            "batch_size": self.batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "attention": self.attention,
            "packing": self.packing,
        }
        return {**choices, "parts": planned, "planned_bytes": sum(planned.values()), "disk_bytes": self.disk}

    def table(self) -> str:
        """The plan for people."""
        lines = [f"  {name:16} {size / GB:8.2f} GB" for name, size in self.parts.items()]
        lines += [f"  {'together':16} {self.total / GB:8.2f} GB of {self.free / GB:.2f} GB that are free"]
        lines += [f"  {'disk':16} {self.disk / GB:8.2f} GB for checkpoints and the result"]
        return "\n".join([*lines, *(f"  chosen: {reason}" for reason in self.reasons)])


def packing(choice: bool | str, implementation: str) -> tuple[bool, str]:
    """(whether to pack rows into full sequences, why).

    Only flash and flex attention keep packed rows apart at no cost: with others a row could see its neighbours, or
    would pay for masking them.
    """
    isolates = implementation.startswith(("flash", "flex"))
    if choice is True and not isolates:
        fail(
            f"PACKING is true, but {implementation} attention does not keep packed rows apart; install flash-attn, or "
            "let batches be grouped by length: --packing auto"
        )
    if choice is not False and isolates:
        return True, f"{implementation} keeps packed rows apart"
    return (
        False,
        "chosen by PACKING" if isolates else f"{implementation} does not keep packed rows apart; by length instead",
    )


def adapt(model, adapter):
    """The model with LoRA's adapters around it; exit code 2 where LORA_TARGET_MODULES fits no layer."""
    wanted = adapter.target_modules
    names = [wanted] if isinstance(wanted, str) else sorted(wanted)
    modules = [name for name, _ in model.named_modules()]
    try:
        for name in names if not isinstance(wanted, str) else []:
            if not any(module == name or module.endswith("." + name) for module in modules):
                raise ValueError(name)
        if not names:
            raise ValueError("an empty list")
        return get_peft_model(model, copy.deepcopy(adapter))
    except (ValueError, re.error) as error:
        known = sorted({module.rpartition(".")[2] for module in modules if module and not module[-1].isdigit()})
        fail(
            f"LORA_TARGET_MODULES {wanted if isinstance(wanted, str) else names} fits no layer of this model "
            f"({' '.join(str(error).split())[:120]}); it has: {', '.join(known)}; adapt every linear layer with: "
            "--lora_target_modules all-linear"
        )


class Sizes:
    """Parameters of a model, and bytes of its activations, from its configuration and the adapter's alone.

    Activations are counted, not estimated: a model of one and of two layers runs forward on tensors without storage
    (torch's FakeTensorMode), and what autograd keeps is added up, at two lengths, so that what grows with the rows is
    told from what does not.
    """

    def __init__(self, config, adapter, dtype: torch.dtype, length: int):
        with init_empty_weights(include_buffers=True):
            model = AutoModelForCausalLM.from_config(config)
            model.tie_weights()
            head = model.get_output_embeddings()
            layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
            self.linear = sum(m.weight.numel() for m in layers)  # what bitsandbytes holds in 4 bits
            self.largest = max(m.weight.numel() for m in layers)
            self.total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
            self.trainable = self.total
            if adapter is not None:
                model = adapt(model, adapter)
                self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        text = config.get_text_config()
        self.layers, self.hidden, self.vocabulary = text.num_hidden_layers, text.hidden_size, text.vocab_size
        self.length = length
        # two models and two lengths: the differences between them are what one layer, and one token, costs
        kept = {
            n: [self._kept(config, adapter, dtype, n, part) for part in (length // 2, length // 2 * 2)] for n in (1, 2)
        }
        slopes = {n: (long - short) / max(length // 2, 1) for n, (short, long) in kept.items()}
        self.layer = (slopes[2] - slopes[1]) * length  # bytes a layer and row
        self.fixed = (2 * slopes[1] - slopes[2]) * length  # embedding, final norm: bytes a row

    def _kept(self, config, adapter, dtype: torch.dtype, layers: int, length: int) -> int:
        """Bytes that autograd keeps of a row of `length` tokens through `layers` layers, without the head."""
        config = copy.deepcopy(config)
        config.get_text_config().num_hidden_layers = layers
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with init_empty_weights(include_buffers=True):
            model = AutoModelForCausalLM.from_config(config)
            if adapter is not None:
                model = adapt(model, adapter).get_base_model()
        model = model.base_model.train()
        with FakeTensorMode():
            tensors = {}
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                trained = isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad
                frozen = tensor.dtype if not tensor.is_floating_point() else dtype
                tensors[name] = torch.empty(
                    tensor.shape, dtype=torch.float32 if trained else frozen, requires_grad=trained
                )
            # autograd's own tensors are counted; weights, which it refers to as well, are not
            own = {tensor.untyped_storage()._cdata for tensor in tensors.values()}
            given = {"input_ids": torch.ones(1, max(length, 1), dtype=torch.long), "use_cache": False}
            autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
                torch.func.functional_call(model, tensors, kwargs=given)
        # without storage a causal mask is made, where real tensors need none
        mask = (1, 1, length, length)
        return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own and t.shape != mask)


def parts(sizes: Sizes, settings, dtype: torch.dtype, checkpointing: bool, optim: str, half: bool, batch: int) -> dict:
    """Bytes that a training holds at its peak, by what takes them."""
    lora, split = hasattr(settings, "LORA_R"), zero(settings)
    width = dtype.itemsize
    # weights: full fine-tuning trains fp32 masters (or bf16 ones); LoRA's base is frozen, its adapters are fp32
    if not lora:
        weights = sizes.total * (2 if half else 4)
    elif settings.USE_4BIT:  # nf4, with doubly quantised scales: 4.127 bits (QLoRA, section 3)
        weights = int(sizes.linear * 4.127 / 8) + (sizes.total - sizes.linear) * width
        weights += sizes.trainable * 4 + sizes.largest * width  # and one layer at a time in full width
    else:
        weights = sizes.total * width + sizes.trainable * 4
    # gradients have the dtype of what is trained; the optimizer's states are counted in STATE_BYTES
    trained = 2 if half else 4
    gradients = sizes.trainable * trained
    states = sizes.trainable * STATE_BYTES.get(optim, 8)
    # autocast keeps a copy of each trained fp32 weight in 16 bits until the forward pass ends
    copies = sizes.linear * width if not lora and not half and dtype != torch.float32 else 0
    if checkpointing:  # the input of every layer; one layer is computed again, and its gradients with it
        stream = sizes.length * sizes.hidden * (width if lora or half else 4)
        activations = batch * (sizes.layers * stream + 2 * sizes.layer + sizes.fixed)
    else:  # what autograd keeps of every layer, and of one more while it is computed
        activations = batch * ((sizes.layers + 1) * sizes.layer + sizes.fixed)
    # positions of a forward pass, padding included
    rows = batch * sizes.length
    # TRL's head works in tiles; it keeps the gradient of its input, and of its weight where that is trained, in fp32
    logits = min(rows, 4096) * min(sizes.vocabulary, 32768) * width + rows * sizes.hidden * 4
    logits += 0 if lora else sizes.vocabulary * sizes.hidden * 4
    sizes_of = {
        "weights": weights // split["weights"],
        "gradients": gradients // split["gradients"],
        "optimizer": 0 if split["offload"] else states // split["states"],
        "16-bit copies": copies,
        "activations": int(activations),
        "logits": int(logits),
    }
    sizes_of["reserve"] = int(RESERVE * sum(sizes_of.values())) if dtype != torch.float32 else 0
    return sizes_of


def zero(settings) -> dict[str, int]:
    """By what DeepSpeed divides each part on one device (ZeRO; Rajbhandari et al. 2020), and whether it offloads."""
    processes, stage, offload = int(os.environ.get("WORLD_SIZE", "1")), 0, False
    stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0") or 0)
    offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") not in ("none", "")
    if getattr(settings, "USE_DEEPSPEED", False):
        own = json.loads(hub.local_path(settings.DEEPSPEED_CONFIG).read_text("utf-8")).get("zero_optimization", {})
        stage, offload = int(own.get("stage", 0)), "offload_optimizer" in own
    return {
        "states": processes if stage >= 1 else 1,
        "gradients": processes if stage >= 2 else 1,
        "weights": processes if stage >= 3 else 1,
        "offload": offload,
    }


def make_plan(settings, config, dtype: torch.dtype, length: int, adapter) -> Plan:
    """The fastest plan that fits, printed as a table.

    Tried in this order: the settings as they are, with gradient checkpointing, with 8-bit AdamW, with bf16 weights and
    stochastic rounding (full fine-tuning), with smaller micro-batches. The effective batch size never changes, and a
    setting that is not "auto" is kept. length: tokens of the longest row; adapter: LoRA's configuration, or None.
    Raises: SystemExit(2) when nothing fits, with what would, or when the disk is too small for the checkpoints.
    """
    device.own_precision(dtype)
    implementation = device.attention(dtype)
    packed, why_packed = packing(settings.PACKING, implementation)
    length = settings.MAX_LENGTH if packed else length
    free, gpu = device.device_memory(settings.DEVICE_MEMORY_GB)
    sizes, lora = Sizes(config, adapter, dtype, length), adapter is not None
    eight_bit = "paged_adamw_8bit" if lora else "adamw_bnb_8bit"
    plain = "adamw_torch_fused" if settings.OPTIM == "auto" else settings.OPTIM
    checkpoints = [False, True] if settings.GRADIENT_CHECKPOINTING == "auto" else [settings.GRADIENT_CHECKPOINTING]
    ladder = [(on, plain, False, settings.BATCH_SIZE) for on in checkpoints]
    if settings.OPTIM == "auto" and gpu:  # the 8-bit optimizers need a GPU
        ladder += [(checkpoints[-1], eight_bit, False, settings.BATCH_SIZE)]
        if not lora and dtype == torch.bfloat16 and importlib.util.find_spec("torchao"):
            ladder += [(checkpoints[-1], "adamw_torch_8bit", True, settings.BATCH_SIZE)]
    on, optim, half, _ = ladder[-1]
    rows = settings.BATCH_SIZE * settings.GRADIENT_ACCUMULATION_STEPS
    ladder += [(on, optim, half, n) for n in range(settings.BATCH_SIZE - 1, 0, -1) if rows % n == 0]
    # each rung costs more time or precision than the one before, so the first that fits is the best one
    for on, optim, half, batch in ladder:
        planned = parts(sizes, settings, dtype, on, optim, half, batch)
        if sum(planned.values()) <= free:
            break
    disk = disk_bytes(sizes, settings, lora, optim, half)
    why = (
        *reasons(settings, on, optim, half, batch, rows // batch),
        f"packing {'on' if packed else 'off'}: {why_packed}",
    )
    choices = (on, optim, half, batch, rows // batch)
    plan = Plan(*choices, planned, free, disk, implementation, packed, why, sizes.total)
    method = "LoRA" if lora else "full"
    say(f"memory plan, {method}, {batch} x {length} tokens a pass:\n{plan.table()}")
    if plan.total > free:
        ways = ways_out(settings, config, dtype, length, sizes, free, plan.total, adapter)
        fail(
            f"{settings.MODEL_NAME} ({method}) needs {plan.total / GB:.1f} GB at the least, and {free / GB:.1f} GB "
            f"are free; what would fit: {'; '.join(ways)}"
        )
    output = settings.OUTPUT_DIR
    left = shutil.disk_usage(output if Path(output).is_dir() else ".").free
    if left < disk and not settings.PLAN_ONLY:
        fail(
            f"{output}: {left / GB:.1f} GB are left on this disk, and the checkpoints need {disk / GB:.1f} GB; make "
            "room, or choose another place: --output_dir PATH"
        )
    return plan


def reasons(settings, on: bool, optim: str, half: bool, batch: int, steps: int) -> tuple[str, ...]:
    """One sentence for each thing that the plan chose."""
    sentences = []
    if settings.GRADIENT_CHECKPOINTING == "auto":
        sentences.append(
            "gradient checkpointing, because the activations would not fit without it (a third slower)"
            if on
            else "no gradient checkpointing, because the activations fit"
        )
    if settings.OPTIM == "auto" and optim != "adamw_torch_fused":
        sentences.append(f"{optim}: optimizer states in 8 bits, because 32 would not fit")
    if half:
        sentences.append("bf16 weights with stochastic rounding, because fp32 masters would not fit")
    if batch != settings.BATCH_SIZE:
        sentences.append(
            f"{batch} x {steps} rows instead of {settings.BATCH_SIZE} x {settings.GRADIENT_ACCUMULATION_STEPS}: the "
            "effective batch size stays"
        )
    return tuple(sentences)


def ways_out(
    settings, config, dtype: torch.dtype, length: int, sizes: Sizes, free: int, total: int, adapter
) -> list[str]:
    """What would fit where a plan does not, each with its number."""
    ways, lora = [], adapter is not None

    def offer(text: str, needed: int) -> None:
        if needed <= free:
            ways.append(f"{text} ({needed / GB:.1f} GB)")

    def least(sizes: Sizes, settings, free_choice: bool = False) -> int:
        """The least that a training takes: one row a pass, and what the settings leave open chosen for memory."""
        on = True if free_choice or settings.GRADIENT_CHECKPOINTING == "auto" else settings.GRADIENT_CHECKPOINTING
        small = "paged_adamw_8bit" if hasattr(settings, "LORA_R") else "adamw_torch_8bit"
        optim = small if free_choice or settings.OPTIM == "auto" else settings.OPTIM
        half = optim == "adamw_torch_8bit" and dtype == torch.bfloat16
        return sum(parts(sizes, settings, dtype, on, optim, half, 1).values())

    if settings.GRADIENT_CHECKPOINTING is False or settings.OPTIM != "auto":
        offer("both left to the plan: --gradient_checkpointing auto --optim auto", least(sizes, settings, True))
    # the same run as LoRA over 4 bits, whatever it is now
    as_lora = SimpleNamespace(**{**vars(settings), "LORA_R": 16, "USE_4BIT": True, "USE_DEEPSPEED": False})
    if not lora:
        small = Sizes(config, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"), dtype, length)
        offer(f"LoRA over 4 bits: {command(LORA)}", least(small, as_lora, True))
        as_lora.USE_4BIT = False
        offer(f"LoRA over 16 bits: {command(LORA, '--use_4bit', 'false')}", least(small, as_lora, True))
        offload = parts(sizes, settings, dtype, True, "adamw_torch_fused", False, 1)
        offer(
            "DeepSpeed with the optimizer on the CPU: --use_deepspeed --deepspeed_config "
            "configs/ds_config_offload.json",
            sum(size for name, size in offload.items() if name != "optimizer"),
        )
    elif not settings.USE_4BIT:
        offer("4 bits: --use_4bit true", least(sizes, as_lora, True))
    # activations grow with the row, so shorter ones help where weights leave some room
    for shorter in (512, 256, 128):
        if shorter < length:
            needed = least(Sizes(config, adapter, dtype, shorter), settings)
            if needed <= free:
                offer(f"rows of up to {shorter} tokens: --max_length {shorter}", needed)
                break
    billions = free / total * sizes.total / 1e9
    ways.append(f"a smaller model, of about {billions:.1f} billion parameters (computed in proportion)")
    return ways


def disk_bytes(sizes: Sizes, settings, lora: bool, optim: str, half: bool) -> int:
    """Bytes of all checkpoints that lie there at once, one of them being written, and of the final model."""
    checkpoint = sizes.trainable * ((2 if half else 4) + STATE_BYTES.get(optim, 8))
    # a checkpoint holds what is trained and the optimizer's states; a new one is written before an old one goes
    copies = max(settings.SAVE_TOTAL_LIMIT, 2) + 1  # the best one and the last one always stay
    merged = sizes.total * 2 if not lora or settings.MERGE_ADAPTER else 0
    return copies * checkpoint + merged + (sizes.trainable * 4 if lora else 0)
