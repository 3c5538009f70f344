"""What this machine has: its GPU, precision, attention, 4 bits, memory and versions."""

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import AttentionInterface, AttentionMaskInterface, BitsAndBytesConfig
from transformers.activations import FastGELUActivation, GELUTanh, NewGELUActivation
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

from configs.settings import say

GB = 1e9
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PACKAGES = "torch transformers datasets peft trl bitsandbytes accelerate deepspeed evaluate tensorboard".split()


def machine_problems() -> list[str]:
    """What about the visible devices would end in a crash or in a run of weeks: one sentence each."""
    launched = bool(os.environ.get("RANK"))
    if torch.cuda.is_available():
        if lacking := triton_lacks():
            return [
                f"there is no {lacking}, which Triton compiles the model's head with; install them, on Debian and "
                "Ubuntu with: sudo apt install gcc python3-dev"
            ]
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
            why = f"the driver is too old for its CUDA {build}; update it, or install a torch built for an older CUDA"
            if build is None:
                why = "it is a build for the CPU; install a CUDA build of the same version"
            return [
                f"nvidia-smi sees {smi.stdout.splitlines()[0].split(' (')[0]!r}, torch {torch.__version__} does not: "
                f"{why}; to train on the CPU on purpose, set CUDA_VISIBLE_DEVICES= (empty)"
            ]
    return []


def triton_lacks() -> str | None:
    """What Triton would miss when the first step compiles TRL's head: "C compiler", "Python.h", or None."""
    if importlib.util.find_spec("triton") is None:
        return None
    if not any(shutil.which(name) for name in (os.environ.get("CC") or "gcc", "clang")):
        return "C compiler"
    return None if (Path(sysconfig.get_path("include")) / "Python.h").is_file() else "Python.h"


def compute_device() -> str | torch.device:
    """Where this process computes: its GPU, or the CPU."""
    return PartialState().device if torch.cuda.is_available() else "cpu"


def placement(target: torch.device, always: bool = False) -> dict | None:
    """`device_map` for loading a model straight to its GPU; None where ZeRO-3 or FSDP splits it, and on the CPU.

    always: on the CPU, too (4-bit layers are made where they will lie).
    """
    split = is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return {"": target} if always or (target.type == "cuda" and not split) else None


# --- several processes


def processes() -> int:
    """How many processes work together; launchers say it in WORLD_SIZE."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched() -> bool:
    """Whether this process is one of several."""
    return processes() > 1


# How long a process waits for the others before the run ends. What one of them does alone must fit in it: writing a
# checkpoint or the final model, and being the slower one to load the base.
PATIENCE = timedelta(minutes=10)


def join() -> None:
    """Meet the other processes, each on its own GPU; a lone process has nothing to do."""
    if launched():
        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def machine() -> tuple[str, str]:
    """(number of this machine among those that train together, its name). torchrun, accelerate and DeepSpeed count."""
    return os.environ.get("GROUP_RANK") or os.environ.get("CROSS_RANK") or "0", platform.node()


def lost_process(error: BaseException) -> str:
    """What an error says of another process that is gone or does not answer, in one line; "" for other errors.

    gloo (on the CPU) raises RuntimeErrors that name its own files; NCCL and the store raise torch's DistErrors.
    """
    text = str(error).splitlines()[0] if str(error) else ""
    gloo = isinstance(error, RuntimeError) and "gloo" in text and re.search("peer|[Tt]imed out|Broken pipe", text)
    if launched() and (gloo or isinstance(error, torch.distributed.DistError)):
        return re.sub(r"^\[\S+\] ", "", text).split(". ")[0]  # without a source file's name, and advice
    return ""


def leave() -> None:
    """End a process that is one of several, after all that it does with them; a lone process ends by itself.

    It ends at once: a thread of gloo's or DeepSpeed's that outlives the interpreter now and then aborts its process
    (SIGABRT, "terminate called without an active exception"), and the launcher then calls a finished run failed.
    """
    PartialState().destroy_process_group()
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


T = TypeVar("T")


def decided_once(decide: Callable[[], T]) -> T:
    """What `decide` returns in the first process, in every process; its SystemExit ends them all. Collective."""
    if not launched():
        return decide()
    outcome: list = [None, None]
    if PartialState().is_main_process:
        try:
            outcome = [decide(), None]
        except SystemExit as ending:
            outcome = [None, ending.code]
    value, code = broadcast_object_list(outcome)
    if code is not None:
        raise SystemExit(code)
    return value


# --- precision


def precision(choice: str, planned_gb: float | None = None) -> tuple[torch.dtype, str]:
    """The dtype to compute in and why: bf16 only where the hardware has it, fp16 on older GPUs, fp32 else.

    planned_gb: memory of a GPU that is planned for and may not be here; such a one is taken to have bf16.
    """
    if choice != "auto":
        return DTYPES[choice], "chosen by PRECISION"
    if planned_gb is not None and not torch.cuda.is_available():
        return torch.bfloat16, "GPUs since 2020 have bf16; for an older one: --precision fp16"
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU has bf16"
        return torch.float16, "the GPU has no bf16 of its own"
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, "the CPU has bf16 instructions"
    return torch.float32, "the CPU has no bf16 instructions"


def scoring_precision(choice: str) -> torch.dtype:
    """The dtype to score in: exact on a CPU, what training would choose on a GPU."""
    if choice == "auto" and not torch.cuda.is_available():
        return torch.float32
    return precision(choice)[0]


def own_precision(dtype: torch.dtype) -> None:
    """Let PRECISION decide, and not what an `accelerate config` of long ago says; a difference is named."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "no")
    theirs = os.environ.get("ACCELERATE_MIXED_PRECISION", name)
    if theirs not in (name, "", "no"):  # "no" is what accelerate says where nothing was asked for
        say(
            f"note: accelerate's configuration asks for mixed precision {theirs!r}; this run takes {name!r} "
            "(PRECISION), so that both methods compute alike"
        )
    os.environ["ACCELERATE_MIXED_PRECISION"] = name  # the library would obey it where no precision is asked for


# --- 4 bits


def four_bit(wanted: bool) -> bool:
    """Whether the base can be held in 4 bits here; says so where it was wanted and cannot be."""
    able = importlib.util.find_spec("bitsandbytes") is not None
    if able and torch.backends.mps.is_available() and not torch.cuda.is_available():
        import bitsandbytes

        # look instead of assuming: Apple's GPUs have kernels since bitsandbytes 0.50
        able = "mps" in getattr(bitsandbytes, "supported_torch_devices", ())
    if wanted and not able:
        say("note: bitsandbytes has no 4-bit kernels for this device; the base is held in 16 bits (USE_4BIT)")
    return wanted and able


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's 4 bits (Dettmers et al. 2023): nf4 with doubly quantised scales, computed in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def keep_4bit_layout(model) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference when a CPU with avx512_bf16 first evaluates them.

    It does so once and for all (0.50.2): from the first evaluation on, no gradient passes through the 4-bit layers,
    and a layer whose width is no multiple of 64 fails. Training, evaluation and scoring then share one arithmetic,
    too.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def fuse_gelu(model) -> None:
    """Let GELU's tanh approximation run as one kernel: "gelu_new" of phi-2 and GPT-2, "gelu_fast".

    transformers computes these step by step: eight passes over the widest tensors of a model, several of which
    autograd keeps. The function is the same but for rounding, and the configuration that is saved does not change.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, (NewGELUActivation, FastGELUActivation)):
                setattr(module, name, GELUTanh())


# --- attention


def attention(dtype: torch.dtype) -> str:
    """The attention implementation: flash attention where it is installed, sdpa in fp32 for fp16, sdpa elsewhere.

    fp16 ends at 65,504, which the products of phi-2's queries and keys exceed; in fp32 they are right.
    """
    if dtype == torch.float16:
        AttentionInterface.register("sdpa_fp32", sdpa_fp32)
        AttentionMaskInterface.register("sdpa_fp32", sdpa_mask)
        return "sdpa_fp32"
    # installed, or as a kernel of the Hub through the package `kernels`
    if dtype == torch.bfloat16 and torch.cuda.is_available() and is_flash_attn_2_available(kernels_fallback_ok=True):
        return "flash_attention_2"
    return "sdpa"


def sdpa_fp32(module, query, key, value, attention_mask, **kwargs):
    """transformers' sdpa attention, computed in fp32 whatever autocast says. Shapes as there.

    With grouped queries and no mask, transformers would ask torch for `enable_gqa`. In fp32 only one kernel has it,
    whose memory grows with the square of the length. So keys and values are repeated here. A single query, as in
    generation, sees every key: with a mask that says so, transformers packs the queries of a group together instead.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1 and attention_mask is None:
        if query.shape[2] == 1:
            attention_mask = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=key.device)
        else:
            key, value = repeat_kv(key, groups), repeat_kv(value, groups)
            module = SimpleNamespace(is_causal=getattr(module, "is_causal", True))  # has no groups any more
    kind = query.device.type
    with torch.autocast(kind, enabled=False):
        sdpa = AttentionInterface()["sdpa"]
        out, weights = sdpa(module, query.float(), key.float(), value.float(), attention_mask, **kwargs)
    return out.to(query.dtype), weights


# --- memory


def device_memory(gigabytes: float | None) -> tuple[int, bool]:
    """(bytes, whether they are a GPU's): DEVICE_MEMORY_GB of a GPU to plan for, or what this machine has free."""
    if gigabytes is not None:
        return int(gigabytes * GB), True
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], True
    return psutil.virtual_memory().available, False


def least_memory(gigabytes: float | None) -> int:
    """Bytes free on the fullest device of all processes. Collective."""
    free = device_memory(gigabytes)[0]
    if not launched():
        return free
    return min(gather_object([free]))


def size(count: int) -> str:
    """Bytes for people: "1.23 GB", or "45 MB" where gigabytes would be 0.0 something."""
    return f"{count / GB:,.2f} GB" if count >= GB / 10 else f"{count / 1e6:,.0f} MB"


def peak_memory() -> int:
    """Bytes: the most that the tensors on the GPU took; without a GPU, the most that this process held."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes


# --- what a result depends on


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment() -> dict:
    """What a result depends on besides its settings: versions, processor, platform."""
    packages = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(0) if cuda else "cpu",
        "device_memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "cpu_count": os.cpu_count(),
        "processes": processes(),
        "packages": packages,
        "command": " ".join(sys.argv),
    }
