"""What this machine has and what fits it: its GPU, precision, attention, and the memory plan of a training.

The plan is made from the model's configuration alone, before anything is loaded, and chooses what fits.
"""

import contextlib
import copy
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

from configs import files
from configs.settings import fail


def machine_problems() -> list[str]:
    """What about the visible devices would end in a crash or in a run of weeks: one sentence each."""
    launched = "RANK" in os.environ
    if torch.cuda.is_available():
        if torch.cuda.device_count() > 1 and not launched:
            script, n = sys.argv[0], torch.cuda.device_count()
            return [
                f"{n} GPUs are visible to one process; use one with `CUDA_VISIBLE_DEVICES=0 python {script}`, or all "
                f"with `accelerate launch --num_processes {n} {script}`"
            ]
        return []
    if os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1"):
        return []  # the user has hidden the GPU
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        smi = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10)
        if smi.returncode == 0 and "GPU" in smi.stdout:
            build = torch.version.cuda
            why = (
                f"the driver is too old for its CUDA {build}; update the driver or install a torch built for an older "
                "CUDA"
            )
            if build is None:
                why = "it is a build for the CPU; install a CUDA build of the same version"
            return [
                f"nvidia-smi sees {smi.stdout.splitlines()[0].split(' (')[0]!r}, torch {torch.__version__} does not: "
                f"{why}; to train on the CPU on purpose, set CUDA_VISIBLE_DEVICES= (empty)"
            ]
    return []


def precision(choice: str, planned_gb: float | None = None) -> tuple[torch.dtype, str]:
    """The dtype to compute in and why: bf16 only where the hardware has it, fp16 on older GPUs, fp32 else.

    planned_gb: memory of a GPU that is planned for and may not be here; such a one is taken to have bf16.
    """
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if choice != "auto":
        return named[choice], "chosen by PRECISION"
    if planned_gb is not None and not torch.cuda.is_available():
        return torch.bfloat16, "GPUs since 2020 have bf16; for an older one: --precision fp16"
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU has bf16"
        return torch.float16, "the GPU has no bf16 of its own"
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, "the CPU has bf16 instructions"
    return torch.float32, "the CPU has no bf16 instructions"


def own_precision(dtype: torch.dtype) -> None:
    """Let PRECISION decide, and not what an `accelerate config` of long ago says; a difference is named."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "no")
    theirs = os.environ.get("ACCELERATE_MIXED_PRECISION", name)
    if theirs not in (name, ""):
        files.say(
            f"note: accelerate's configuration asks for mixed precision {theirs!r}; this run takes {name!r} "
            "(PRECISION), so that both methods compute alike"
        )
    os.environ["ACCELERATE_MIXED_PRECISION"] = name  # the library would obey it where no precision is asked for


def four_bit(wanted: bool) -> bool:
    """Whether the base can be held in 4 bits here; says so where it was wanted and cannot be."""
    able = importlib.util.find_spec("bitsandbytes") is not None and not (
        torch.backends.mps.is_available() and not torch.cuda.is_available()
    )
    if wanted and not able:
        files.say("note: bitsandbytes has no 4-bit kernels for this device; the base is held in 16 bits (USE_4BIT)")
    return wanted and able


def attention(dtype: torch.dtype) -> str:
    """The attention implementation: flash attention where it is installed, sdpa in fp32 for fp16, sdpa elsewhere.

    fp16 ends at 65,504, which the products of phi-2's queries and keys exceed; in fp32 they are right.
    """
    if dtype == torch.float16:
        AttentionInterface.register("sdpa_fp32", sdpa_fp32)
        AttentionMaskInterface.register("sdpa_fp32", sdpa_mask)
        return "sdpa_fp32"
    if dtype == torch.bfloat16 and torch.cuda.is_available() and is_flash_attn_2_available():
        return "flash_attention_2"
    return "sdpa"


def sdpa_fp32(module, query, key, value, attention_mask, **kwargs):
    """transformers' sdpa attention, computed in fp32 whatever autocast says. Shapes as there."""
    kind = query.device.type
    with torch.autocast(kind, enabled=False):
        sdpa = AttentionInterface()["sdpa"]
        out, weights = sdpa(module, query.float(), key.float(), value.float(), attention_mask, **kwargs)
    return out.to(query.dtype), weights


def packing(choice: bool | str, implementation: str) -> tuple[bool, str]:
    """(whether to pack rows into full sequences, why). Only flash and flex attention keep packed rows apart at no
    cost: with others a row could see its neighbours, or would pay for masking them."""
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


# --- the memory plan

GB = 1e9
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


def adapt(model, adapter):
    """The model with LoRA's adapters around it. Ends with exit code 2 where LORA_TARGET_MODULES fits
    nothing."""
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
            own = {tensor.untyped_storage()._cdata for tensor in tensors.values()}
            given = {"input_ids": torch.ones(1, max(length, 1), dtype=torch.long), "use_cache": False}
            autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
                torch.func.functional_call(model, tensors, kwargs=given)
        # without storage a causal mask is made, where real tensors need none
        mask = (1, 1, length, length)
        return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own and t.shape != mask)


def parts(sizes: Sizes, c, dtype: torch.dtype, checkpointing: bool, optim: str, half: bool, batch: int) -> dict:
    """Bytes that a training holds at its peak, by what takes them."""
    lora, split = hasattr(c, "LORA_R"), zero(c)
    width = dtype.itemsize
    if not lora:
        weights = sizes.total * (2 if half else 4)
    elif c.USE_4BIT:  # nf4, with doubly quantised scales: 4.127 bits (QLoRA, section 3)
        weights = int(sizes.linear * 4.127 / 8) + (sizes.total - sizes.linear) * width
        weights += sizes.trainable * 4 + sizes.largest * width  # and one layer at a time in full width
    else:
        weights = sizes.total * width + sizes.trainable * 4
    trained = 2 if half else 4
    gradients = sizes.trainable * trained
    states = sizes.trainable * STATE_BYTES.get(optim, 8)
    # autocast keeps a copy of each trained fp32 weight in 16 bits until the forward pass ends
    copies = sizes.linear * width if not lora and not half and dtype != torch.float32 else 0
    if checkpointing:  # the input of every layer; one layer is computed again, and its gradients with it
        stream = sizes.length * sizes.hidden * (width if lora or half else 4)
        activations = batch * (sizes.layers * stream + 2 * sizes.layer + sizes.fixed)
    else:
        activations = batch * ((sizes.layers + 1) * sizes.layer + sizes.fixed)
    rows = batch * sizes.length
    # TRL's head works in tiles; it keeps the gradient of its input, and of its weight where that is trained, in fp32
    logits = min(rows, 4096) * min(sizes.vocabulary, 32768) * width + rows * sizes.hidden * 4
    logits += 0 if lora else sizes.vocabulary * sizes.hidden * 4
    found = {
        "weights": weights // split["weights"],
        "gradients": gradients // split["gradients"],
        "optimizer": 0 if split["offload"] else states // split["states"],
        "16-bit copies": copies,
        "activations": int(activations),
        "logits": int(logits),
    }
    found["reserve"] = int(RESERVE * sum(found.values())) if dtype != torch.float32 else 0
    return found


def zero(c) -> dict[str, int]:
    """By what DeepSpeed divides each part on one device (ZeRO; Rajbhandari et al. 2020), and whether it offloads."""
    processes, stage, offload = int(os.environ.get("WORLD_SIZE", "1")), 0, False
    stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0") or 0)
    offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") not in ("none", "")
    if getattr(c, "USE_DEEPSPEED", False):
        own = json.loads(files.local_path(c.DEEPSPEED_CONFIG).read_text("utf-8")).get("zero_optimization", {})
        stage, offload = int(own.get("stage", 0)), "offload_optimizer" in own
    return {
        "states": processes if stage >= 1 else 1,
        "gradients": processes if stage >= 2 else 1,
        "weights": processes if stage >= 3 else 1,
        "offload": offload,
    }


def make_plan(c, config, dtype: torch.dtype, length: int, adapter) -> Plan:
    """The first of these that fits, printed as a table: as it is, with gradient checkpointing, with 8-bit AdamW, with
    bf16 weights and stochastic rounding (full fine-tuning), with smaller micro-batches. The rows a step never change.

    A setting that is not "auto" is kept. length: tokens of the longest row; adapter: LoRA's configuration,
    or None. Raises: SystemExit(2) when nothing fits, with what would, or when the disk is too small for the
    checkpoints.
    """
    own_precision(dtype)
    implementation = attention(dtype)
    packed, why_packed = packing(c.PACKING, implementation)
    length = c.MAX_LENGTH if packed else length
    free, gpu = device_memory(c.DEVICE_MEMORY_GB)
    sizes, lora = Sizes(config, adapter, dtype, length), adapter is not None
    eight_bit = "paged_adamw_8bit" if lora else "adamw_bnb_8bit"
    plain = "adamw_torch_fused" if c.OPTIM == "auto" else c.OPTIM
    checkpoints = [False, True] if c.GRADIENT_CHECKPOINTING == "auto" else [c.GRADIENT_CHECKPOINTING]
    ladder = [(on, plain, False, c.BATCH_SIZE) for on in checkpoints]
    if c.OPTIM == "auto" and gpu:  # the 8-bit optimizers need a GPU
        ladder += [(checkpoints[-1], eight_bit, False, c.BATCH_SIZE)]
        if not lora and dtype == torch.bfloat16 and importlib.util.find_spec("torchao"):
            ladder += [(checkpoints[-1], "adamw_torch_8bit", True, c.BATCH_SIZE)]
    on, optim, half, _ = ladder[-1]
    rows = c.BATCH_SIZE * c.GRADIENT_ACCUMULATION_STEPS
    ladder += [(on, optim, half, n) for n in range(c.BATCH_SIZE - 1, 0, -1) if rows % n == 0]
    for on, optim, half, batch in ladder:
        found = parts(sizes, c, dtype, on, optim, half, batch)
        if sum(found.values()) <= free:
            break
    disk = disk_bytes(sizes, c, lora, optim, half)
    why = (*reasons(c, on, optim, half, batch, rows // batch), f"packing {'on' if packed else 'off'}: {why_packed}")
    plan = Plan(on, optim, half, batch, rows // batch, found, free, disk, implementation, packed, why)
    method = "LoRA" if lora else "full"
    files.say(f"memory plan, {method}, {batch} x {length} tokens a pass:\n{plan.table()}")
    if plan.total > free:
        ways = ways_out(c, config, dtype, length, sizes, free, plan.total, adapter)
        fail(
            f"{c.MODEL_NAME} ({method}) needs {plan.total / GB:.1f} GB at the least, and {free / GB:.1f} GB are free; "
            f"what would fit: {'; '.join(ways)}"
        )
    left = shutil.disk_usage(Path(c.OUTPUT_DIR) if Path(c.OUTPUT_DIR).is_dir() else ".").free
    if left < disk and not c.PLAN_ONLY:
        fail(
            f"{c.OUTPUT_DIR}: {left / GB:.1f} GB are left on this disk, and the checkpoints need {disk / GB:.1f} GB; "
            "make room, or choose another place: --output_dir PATH"
        )
    return plan


def reasons(c, on: bool, optim: str, half: bool, batch: int, steps: int) -> tuple[str, ...]:
    """One sentence for each thing that the plan chose."""
    found = []
    if c.GRADIENT_CHECKPOINTING == "auto":
        found.append(
            "gradient checkpointing, because the activations would not fit without it (a third slower)"
            if on
            else "no gradient checkpointing, because the activations fit"
        )
    if c.OPTIM == "auto" and optim != "adamw_torch_fused":
        found.append(f"{optim}: optimizer states in 8 bits, because 32 would not fit")
    if half:
        found.append("bf16 weights with stochastic rounding, because fp32 masters would not fit")
    if batch != c.BATCH_SIZE:
        found.append(
            f"{batch} x {steps} rows instead of {c.BATCH_SIZE} x {c.GRADIENT_ACCUMULATION_STEPS}: as many a step"
        )
    return tuple(found)


def ways_out(c, config, dtype: torch.dtype, length: int, sizes: Sizes, free: int, total: int, adapter) -> list[str]:
    """What would fit where a plan does not, each with its number."""
    found, lora = [], adapter is not None

    def offer(text: str, needed: int) -> None:
        if needed <= free:
            found.append(f"{text} ({needed / GB:.1f} GB)")

    def least(sizes: Sizes, c, free_choice: bool = False) -> int:
        """The least that a training takes: one row a pass, and what the settings leave open chosen for memory."""
        on = True if free_choice or c.GRADIENT_CHECKPOINTING == "auto" else c.GRADIENT_CHECKPOINTING
        small = "paged_adamw_8bit" if hasattr(c, "LORA_R") else "adamw_torch_8bit"
        optim = small if free_choice or c.OPTIM == "auto" else c.OPTIM
        half = optim == "adamw_torch_8bit" and dtype == torch.bfloat16
        return sum(parts(sizes, c, dtype, on, optim, half, 1).values())

    if c.GRADIENT_CHECKPOINTING is False or c.OPTIM != "auto":
        offer("both left to the plan: --gradient_checkpointing auto --optim auto", least(sizes, c, True))
    as_lora = SimpleNamespace(**{**vars(c), "LORA_R": 16, "USE_4BIT": True, "USE_DEEPSPEED": False})
    if not lora:
        small = Sizes(config, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"), dtype, length)
        offer("LoRA over 4 bits: python 2_lora_finetuning.py", least(small, as_lora, True))
        as_lora.USE_4BIT = False
        offer("LoRA over 16 bits: python 2_lora_finetuning.py --use_4bit false", least(small, as_lora, True))
        offload = parts(sizes, c, dtype, True, "adamw_torch_fused", False, 1)
        offer(
            "DeepSpeed with the optimizer on the CPU: --use_deepspeed --deepspeed_config "
            "configs/ds_config_offload.json",
            sum(size for name, size in offload.items() if name != "optimizer"),
        )
    elif not c.USE_4BIT:
        offer("4 bits: --use_4bit true", least(sizes, as_lora, True))
    for shorter in (512, 256, 128):
        if shorter < length:
            needed = least(Sizes(config, adapter, dtype, shorter), c)
            if needed <= free:
                offer(f"rows of up to {shorter} tokens: --max_length {shorter}", needed)
                break
    billions = free / total * sizes.total / 1e9
    found.append(f"a smaller model, of about {billions:.1f} billion parameters (computed in proportion)")
    return found


def device_memory(gigabytes: float | None) -> tuple[int, bool]:
    """(bytes, whether they are a GPU's): DEVICE_MEMORY_GB of a GPU to plan for, or what this machine has free."""
    if gigabytes is not None:
        return int(gigabytes * GB), True
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], True
    return psutil.virtual_memory().available, False


def disk_bytes(sizes: Sizes, c, lora: bool, optim: str, half: bool) -> int:
    """Bytes of all checkpoints that lie there at once, one of them being written, and of the final model."""
    checkpoint = sizes.trainable * ((2 if half else 4) + STATE_BYTES.get(optim, 8))
    copies = max(c.SAVE_TOTAL_LIMIT, 2) + 1  # the best one and the last one always stay
    merged = sizes.total * 2 if not lora or c.MERGE_ADAPTER else 0
    return copies * checkpoint + merged + (sizes.trainable * 4 if lora else 0)
