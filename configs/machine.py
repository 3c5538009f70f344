"""What this machine has, found in moments and without torch: GPUs, memory, disk, the Hub; and the preset that fits.

Light: imported before torch. What the steps themselves rely on is measured by configs/device.py.
"""

import contextlib
import os
import platform
import re
import shutil
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

import psutil

from configs import hub

GB = 1e9
# (preset, free GB that it wants), the largest first; what each was computed for stands in README.md.
PRESETS = (("gpu_80gb", 66.0), ("gpu_24gb", 21.0), ("gpu_8gb", 7.5))
BF16 = 8.0  # the first compute capability whose cards have bf16


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU. total, free: bytes of its memory; capability: 8.9, or None where the driver does not say."""

    name: str
    total: float
    free: float
    capability: float | None = None


@dataclass(frozen=True)
class Machine:
    """kind: "cuda", "mps" or "cpu"; cores: that this process may use; memory, disk: bytes that are free."""

    kind: str
    gpus: tuple[Gpu, ...]
    cores: int
    memory: float
    disk: float


def look(folder: str | Path = "outputs") -> Machine:
    """This machine now. folder: on whose disk the results go."""
    gpus = find_gpus()
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    kind = "cuda" if gpus else "mps" if apple else "cpu"
    return Machine(kind, tuple(gpus), cores, float(psutil.virtual_memory().available), float(free))


# --- GPUs


def _nvidia_smi(*words: str) -> list[str]:
    """The lines that nvidia-smi prints; [] where there is none, or it fails."""
    try:
        listed = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return []
    return listed.stdout.splitlines() if listed.returncode == 0 else []


def _chosen() -> list[str] | None:
    """Numbers or names of the GPUs that CUDA_VISIBLE_DEVICES allows; None where all are."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if chosen is None else [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]


def count_gpus() -> int:
    """How many NVIDIA GPUs the steps may use, without the seconds that torch takes to answer."""
    if (chosen := _chosen()) is not None:
        return len(chosen)
    return sum(line.startswith("GPU ") for line in _nvidia_smi("-L"))


def find_gpus() -> list[Gpu]:
    """The NVIDIA GPUs that the steps may use."""
    if (chosen := _chosen()) == []:
        return []
    query = "index,uuid,name,memory.total,memory.free,compute_cap"
    gpus = []
    for line in _nvidia_smi(f"--query-gpu={query}", "--format=csv,noheader,nounits"):
        fields = [field.strip() for field in line.split(",")]
        with contextlib.suppress(ValueError):  # too few fields, or "[N/A]"
            index, uuid, name, total, free = fields[:5]
            named = [one for one in chosen or () if one.startswith("GPU-") and uuid.startswith(one)]
            if chosen is None or index in chosen or named:
                known = fields[5] if len(fields) > 5 else ""
                capability = float(known) if known.replace(".", "").isdigit() else None
                gpus.append(Gpu(name, float(total) * 2**20, float(free) * 2**20, capability))
    return gpus


def recommended(machine: Machine) -> tuple[str, str, dict]:
    """(preset for this machine, the key of the reason in configs/words.py, what stands in that reason)."""
    if not machine.gpus:
        return "demo", "why_apple" if machine.kind == "mps" else "why_cpu", {}
    gpu = min(machine.gpus, key=lambda one: one.free)
    values = {"name": gpu.name, "free": gpu.free / GB}
    if gpu.capability is not None and gpu.capability < BF16 and gpu.free / GB > PRESETS[-1][1]:
        return "t4", "why_no_bf16", values
    for preset, wanted in PRESETS:
        if gpu.free / GB >= wanted:
            return preset, "why_memory", values
    return "demo", "why_small_gpu", values | {"wanted": PRESETS[-1][1]}


# --- the Hub


class HubCheck:
    """Whether the Hub answers, asked in the background from the moment on that this is made.

    names: of models and data sets. Where nothing is to be fetched, nobody is asked.
    """

    def __init__(self, *names: str):
        self.wanted = [name for name in dict.fromkeys(names) if hub.is_hub_name(name)]
        self.missing = [name for name in self.wanted if not hub.cached(name)]
        self.error: str | None = None  # "" once it has answered
        self.thread: threading.Thread | None = None
        if self.wanted and not hub.is_offline():
            self.thread = threading.Thread(target=self._ask, daemon=True)
            self.thread.start()

    def _ask(self) -> None:
        self.error = re.sub(r"^\[Errno -?\d+\] ", "", hub.probe(hub.endpoint()))

    def answer(self, seconds: float) -> tuple[str, dict]:
        """(key in configs/words.py, its values), after waiting for `seconds` at most."""
        if not self.wanted:
            return "hub_not_needed", {}
        values = {"where": hub.endpoint().partition("://")[2], "missing": ", ".join(self.missing)}
        if self.thread is None:
            return ("hub_offline_missing" if self.missing else "hub_offline"), values
        self.thread.join(seconds)
        if self.error is None:
            return "hub_waiting", values
        if self.error:
            return ("hub_missing" if self.missing else "hub_cached"), values | {"why": self.error}
        return ("hub_reachable" if self.missing else "hub_both"), values
