"""What only a CUDA GPU can show; skipped without one. Run them there with: python -m pytest -m gpu

The models have random weights, and phi-2's shape where memory is the question: nothing is downloaded.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, SHORT

from configs.training.memory import packing

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
LORA, FULL = SCRIPTS[1], SCRIPTS[2]


def gpu_run(script: str, *flags: object, cwd: Path, cap_gb: float | None = None) -> str:
    """A script on the GPU, which conftest.py hides from the other tests; cap_gb: the memory that it may
    take."""
    env = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    start = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = sys.argv[1:]; "
    if cap_gb:
        start += "import torch; total = torch.cuda.get_device_properties(0).total_memory; "
        start += f"torch.cuda.set_per_process_memory_fraction({cap_gb}e9 / total); "
    start += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", start, str(ROOT / script), *map(str, flags)]
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result.stdout


@pytest.fixture
def work(prepared, tmp_path) -> Path:
    return shutil.copytree(prepared, tmp_path / "work")


@pytest.fixture(scope="module")
def phi_shaped(tmp_path_factory, tiny, phi_2) -> Path:
    """phi-2 in everything but what it knows: 2.78 billion random weights in fp16, the tiny model's
    tokenizer."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("phi") / "phi-shaped"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").unlink()
    config = copy.deepcopy(phi_2)
    config.bos_token_id = config.eos_token_id = 0
    torch.manual_seed(0)
    with torch.device("cuda"):
        AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    torch.cuda.empty_cache()
    return folder


def log_of(work: Path, method: str) -> dict:
    return json.loads((work / f"outputs/{method}_model/training_log.json").read_text(encoding="utf-8"))


def test_4_bits_and_bf16_on_the_gpu(work, tiny):
    flags = [f for f in SHORT if f not in ("--precision", "fp32")]
    said = gpu_run(LORA, "--model_name", tiny, *flags, cwd=work)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        assert "precision: torch.bfloat16 (the GPU has bf16)" in said
    log = log_of(work, "lora")
    assert log["summary"]["status"] == "done" and log["plan"]["optim"] == "adamw_torch_fused"
    assert log["history"][-1]["eval_loss"] < log["history"][0]["eval_loss"]


def test_packing_with_flash_or_flex_attention_changes_no_loss(tiny):
    """Packed rows through flex attention have the nll of the rows alone."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    assert packing("auto", "flex_attention")[0]
    model = AutoModelForCausalLM.from_pretrained(
        tiny, dtype=torch.float32, attn_implementation="flex_attention", device_map="cuda"
    )
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 400, (n,), generator=draw).tolist() for n in (9, 30, 17, 44, 12)]
    rows = Dataset.from_list([{"input_ids": i, "labels": i} for i in ids])
    totals = []
    for some, free in ((rows, False), (pack_dataset(rows, 128, "bfd"), True)):
        collate, total = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=free), 0.0
        for row in some:
            batch = {k: v.cuda() for k, v in collate([row]).items() if torch.is_tensor(v)}
            labels = batch.pop("labels")
            with torch.no_grad():
                logits = model(**batch, use_cache=False).logits
            total += torch.nn.functional.cross_entropy(
                logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum"
            ).item()
        totals.append(total)
    assert totals[1] == pytest.approx(totals[0], rel=1e-4)


LENGTH = [
    "--max_steps",
    "3",
    "--warmup_ratio",
    "0.1",
    "--eval_steps",
    "3",
    "--save_steps",
    "3",
    "--logging_steps",
    "1",
]


def test_qlora_of_phi_2_runs_in_8_gb(work, phi_shaped):
    """The default constants, in a process that is given 8 GB."""
    gpu_run(LORA, "--model_name", phi_shaped, *LENGTH, "--device_memory_gb", "7.5", cwd=work, cap_gb=8)
    log = log_of(work, "lora")
    assert log["summary"]["status"] == "done" and log["summary"]["peak_memory_bytes"] < 8e9


@pytest.mark.parametrize("method, needed", [("lora", 12), ("full", 60)])
def test_the_plan_is_within_15_percent_of_the_peak(work, phi_shaped, method, needed):
    if torch.cuda.get_device_properties(0).total_memory < needed * 1e9:
        pytest.skip(reason=f"needs {needed} GB")
    gpu_run(LORA if method == "lora" else FULL, "--model_name", phi_shaped, *LENGTH, cwd=work)
    log = log_of(work, method)
    assert log["plan"]["planned_bytes"] == pytest.approx(log["summary"]["peak_memory_bytes"], rel=0.15)
