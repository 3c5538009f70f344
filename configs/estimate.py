"""How long a step may take and what it needs, estimated from the model's and the data's size. Light: no torch.

An estimate is called so wherever it is shown. It counts 6 floating-point operations a parameter and token in training
(LoRA, which computes no gradients of the base, repeats its forward pass instead) and 2 in scoring, and divides them by
what the machine may do. It is right within a factor of about three.
"""

import contextlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from configs import hub, state
from configs.machine import GB, Machine

BYTES_A_TOKEN = 4  # of English text
TOKENS_A_ROW = 150  # where nothing is known of the rows
SHARE = 0.3  # of its peak that a processor reaches in training
# Peak of a card's matrix products in 16 bits, FLOP/s, by a part of its name; any other: OTHER_GPU.
PEAKS = {
    "B200": 2.2e15,
    "H200": 9.9e14,
    "H100": 9.9e14,
    "A100": 3.1e14,
    "L40": 1.8e14,
    "5090": 2.1e14,
    "4090": 1.65e14,
    "4080": 9.7e13,
    "4070": 5.8e13,
    "4060": 3.0e13,
    "A6000": 1.5e14,
    "A10": 1.25e14,
    "L4": 1.2e14,
    "3090": 7.1e13,
    "3080": 6.0e13,
    "3070": 4.1e13,
    "V100": 1.1e14,
    "T4": 6.5e13,
}
OTHER_GPU, APPLE_GPU = 3e13, 7e12
CPU_THREAD = 4.4e10  # in fp32: 88 GFLOP/s were measured for the two threads of a core
DECODING = 0.03  # seconds of a generated token on a GPU, for a whole batch
FULL_GPU, FULL_CPU = 7.2, 16.0  # bytes a parameter that full fine-tuning takes: bf16 weights on a GPU; fp32 with AdamW
HOUR = 3600.0
# Of models that are not on this machine yet; else the name says it (7b, 360M).
KNOWN = {"microsoft/phi-2": 2.78e9, "outputs/demo_base_model": 1.7e6, "outputs/demo_base_model_zh": 1.7e6}
START = 10.0  # seconds until the libraries are imported and the model is loaded


@dataclass(frozen=True)
class Time:
    """How long a step takes. kind: "measured", "estimate", "per_1000" (an estimate for 1,000 rows) or "unknown"."""

    kind: str
    seconds: float | None = None


# --- sizes


def parameters(name: str) -> float | None:
    """Number of a model's parameters, from the size of its weights, else from its name; None where neither tells."""
    for folder in _folders(name):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            config = json.loads((folder / "config.json").read_text("utf-8"))
            kind = str(config.get("dtype") or config.get("torch_dtype") or "float16")
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            size = size or sum(path.stat().st_size for path in folder.glob("*.bin"))
            if size:
                return size / (4 if "32" in kind else 2)
    named = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)([bBmM])(?![a-zA-Z])", name.rpartition("/")[2].replace("_", "-"))
    if named:
        return float(named[1]) * (1e9 if named[2] in "bB" else 1e6)
    return KNOWN.get(name)


def _folders(name: str) -> list[Path]:
    """Where a model's files may lie: its own folder, or what the Hub's cache holds of it."""
    if place := hub.local_path(name):
        return [place]
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    return sorted(cache.glob(f"models--{name.replace('/', '--')}/snapshots/*"))


def data_size(values: dict[str, dict]) -> tuple[float, float, float] | None:
    """(training rows, test rows, tokens a row) of the data as they would be made now; None where that is not known.

    values: {section: settings}. From data/ where step 1 is done, else from a local file.
    """
    settings = values["prepare"]
    folder = Path(settings["DATA_DIR"])
    if state.of_step("prepare", settings, quick=True).kind == "done":
        rows = json.loads((folder / "manifest.json").read_text("utf-8"))["rows"]
        size = sum(path.stat().st_size for path in (folder / "train").glob("*.arrow"))
        return rows["train"], rows["test"], (size / max(rows["train"], 1) / BYTES_A_TOKEN or TOKENS_A_ROW)
    place = hub.local_path(settings["DATASET_NAME"])
    if place is None or not place.is_file() or place.stat().st_size > 200e6:
        return None
    size, text = place.stat().st_size, place.suffix in (".jsonl", ".csv", ".tsv")
    if text:
        with place.open("rb") as file:
            lines = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
    tokens = size / BYTES_A_TOKEN
    rows = lines if text else tokens / TOKENS_A_ROW
    held_out = settings["EVAL_FRACTION"]
    return rows * (1 - held_out), rows * held_out / 2, tokens / max(rows, 1)


def speed(machine: Machine) -> float:
    """Floating-point operations a second that a training may reach here, all GPUs together."""
    if machine.gpus:
        peaks = [next((p for part, p in PEAKS.items() if part in gpu.name), OTHER_GPU) for gpu in machine.gpus]
        return SHARE * sum(peaks)
    return SHARE * (APPLE_GPU if machine.kind == "mps" else CPU_THREAD * machine.cores)


# --- time


def time_of(section: str, values: dict[str, dict], known: state.Step, machine: Machine) -> Time:
    """How long a step will take: as long as the last time where that was the same work, else an estimate."""
    try:
        return _time_of(section, values, known, machine)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # files that are not ours, or damaged
        return Time("unknown")


def _time_of(section: str, values: dict[str, dict], known: state.Step, machine: Machine) -> Time:
    settings = values[section]
    if section == "prepare":
        return Time("measured", known.seconds) if known.seconds else Time("unknown")
    other_model = known.why.startswith("MODEL_NAME ")
    if known.seconds and (known.kind == "done" or section == "evaluate" and not other_model):
        return Time("measured", known.seconds)
    size, count = data_size(values), parameters(settings["MODEL_NAME"])
    if count is None:
        return Time("measured", known.seconds) if known.seconds else Time("unknown")
    per_second = speed(machine)
    train_rows, test_rows, tokens = size or (1000, 50, TOKENS_A_ROW)
    if section == "evaluate":
        most = settings["MAX_EVAL_SAMPLES"]
        test_rows, prompts = min(test_rows, most or test_rows), min(test_rows, values["prepare"]["NUM_TEST_PROMPTS"])
        new = settings["MAX_NEW_TOKENS"]
        seconds = START + 3 * 2 * count * (test_rows * tokens + prompts * new) / per_second
        if machine.kind == "cuda":
            seconds += 3 * new * DECODING * -(-prompts // 64)
        return Time("estimate" if size else "unknown", seconds if size else None)
    most = settings["MAX_TRAIN_SAMPLES"]
    rows = min(train_rows, most or train_rows)
    tokens_seen = rows * min(tokens, settings["MAX_LENGTH"]) * settings["NUM_EPOCHS"]
    if settings["MAX_STEPS"]:
        a_step = settings["BATCH_SIZE"] * settings["GRADIENT_ACCUMULATION_STEPS"]
        tokens_seen = settings["MAX_STEPS"] * a_step * min(tokens, settings["MAX_LENGTH"])
    seconds = START + 6 * count * tokens_seen / per_second
    log = state.training_log(settings["OUTPUT_DIR"])
    if log and log.get("model_name") == settings["MODEL_NAME"] and log["summary"].get("tokens_per_second"):
        seconds = START + tokens_seen / log["summary"]["tokens_per_second"]  # this machine's, as far as that is known
        if known.kind == "interrupted":
            seconds *= max(1 - (log["summary"].get("epochs") or 0) / settings["NUM_EPOCHS"], 0)
    exact = size or settings["MAX_STEPS"]
    return Time("estimate" if exact else "per_1000", seconds)


def too_large(settings: dict, machine: Machine) -> tuple[float, float] | None:
    """(GB that full fine-tuning takes, GB that are free) where it does not fit, by an estimate; None where it may."""
    count = parameters(settings["MODEL_NAME"])
    if count is None or settings.get("USE_DEEPSPEED") or machine.kind == "mps":
        return None
    if machine.gpus:
        wanted, free = count * FULL_GPU / GB, sum(gpu.free for gpu in machine.gpus) / GB
    else:
        wanted, free = count * FULL_CPU / GB, machine.memory / GB
    return (wanted, free) if wanted > free else None
