"""Several processes on this machine over gloo: DDP, ZeRO, FSDP; launchers, configurations, lost processes.

A step is the same rows whatever the number of processes, so each run here must have the losses of one process.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, ok, run
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
LORA, FULL = SCRIPTS[1:3]
FINAL = {LORA: "final_lora_adapter", FULL: "final_model"}
# Five steps an epoch: 33 rows by eight, so that the fifth step is one row, and one of two processes has none. The
# learning rate is high enough for every difference to show, and the gradients' norm is five times what is allowed.
STEP = "--model_name model --max_train_samples 33 --batch_size 2 --gradient_accumulation_steps 4".split()
TEN = [*STEP, *"--max_steps 10 --logging_steps 1 --eval_steps 5 --save_steps 5 --warmup_ratio 0.1".split()]
TEN += "--learning_rate 5e-3 --max_grad_norm 0.1 --precision fp32 --gradient_checkpointing false".split()
LORA_16 = "--use_4bit false --lora_dropout 0".split()
TORCHRUN = ["-m", "torch.distributed.run"]
ACCELERATE = ["-m", "accelerate.commands.launch"]
ON_CPU = {"ACCELERATE_USE_CPU": "1"}


def config(name: str) -> list[str]:
    return [*ACCELERATE, "--config_file", f"{ROOT}/configs/accelerate/{name}.yaml", "--main_process_port", "0"]


# accelerate makes DDP of FSDP on the CPU. This module of a test tells it that gloo's processes have GPUs, and torch's
# FSDP then runs as on GPUs; it is imported before everything else.
PRETEND = """
import os
if os.environ.get("ACCELERATE_USE_FSDP") == "true" and "LOCAL_RANK" in os.environ:
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    init = PartialState.__init__
    PartialState.__init__ = lambda self, cpu=False, **kwargs: init(self, **kwargs)
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
"""


@pytest.fixture(scope="session")
def pretended(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pretended")
    (folder / "sitecustomize.py").write_text(PRETEND)
    return {"PYTHONPATH": str(folder), "ACCELERATE_TORCH_DEVICE": "cpu"}


@pytest.fixture(scope="module")
def work(tmp_path_factory, prepared, tiny) -> Path:
    """A working folder with data/ and the tiny model in model/, for all tests; each has an OUTPUT_DIR of its own."""
    folder = tmp_path_factory.mktemp("distributed") / "here"
    shutil.copytree(prepared, folder)
    shutil.copytree(tiny, folder / "model")
    return folder


def train(work: Path, launcher: list, script: str, name: str, *flags: str, env: dict | None = None):
    words = [*launcher, ROOT / script, *TEN, *flags, "--output_dir", name]
    return run(*words, cwd=work, env={**os.environ, **(env or {})})


def log_of(folder: Path) -> dict:
    return json.loads((folder / "training_log.json").read_text("utf-8"))


def values(log: dict, key: str) -> list[float]:
    return [record[key] for record in log["history"] if key in record]


def final(folder: Path, script: str) -> tuple[set[str], dict[str, torch.Tensor]]:
    folder = folder / FINAL[script]
    (path,) = folder.glob("*.safetensors")
    return {file.name for file in folder.iterdir()}, load_file(path)


@pytest.fixture(scope="module")
def alone(work) -> dict[str, Path]:
    """Both scripts in one process."""
    for script, flags in {FULL: [], LORA: LORA_16}.items():
        ok(train(work, [], script, f"one_{script[0]}", *flags))
    ok(train(work, [], LORA, "one_qlora", "--lora_dropout", "0"))
    folders = {FULL: work / f"one_{FULL[0]}", LORA: work / f"one_{LORA[0]}", "qlora": work / "one_qlora"}
    clipped = values(log_of(folders[FULL]), "grad_norm")
    assert min(clipped) > 0.1, "no step was clipped, so that a wrong norm would not show"
    assert values(log_of(folders[FULL]), "loss")[-1] < values(log_of(folders[FULL]), "loss")[0] - 0.5
    return folders


WAYS = {
    "ddp": ([*TORCHRUN, "--standalone", "--nproc_per_node", "2"], ON_CPU, "MULTI_CPU", []),
    "zero2": (config("zero2"), {}, "DEEPSPEED", []),
    "zero3": (config("zero3"), {}, "DEEPSPEED", []),
    "fsdp2": (config("fsdp2"), None, "FSDP", []),
    "zero3 without its field": (
        [*ACCELERATE, *"--use_deepspeed --num_processes 2 --zero_stage 3 --mixed_precision no".split()],
        {},
        "DEEPSPEED",
        [],
    ),
    "our ds_config": (
        [*TORCHRUN, "--standalone", "--nproc_per_node", "2"],
        {},
        "DEEPSPEED",
        ["--use_deepspeed", "--deepspeed_config", "configs/ds_config_zero3.json"],
    ),
}
TRIED = [(FULL, way) for way in WAYS] + [(LORA, way) for way in ("ddp", "zero3", "fsdp2")] + [("qlora", "ddp")]


@pytest.mark.parametrize(("method", "way"), TRIED, ids=lambda value: value)
def test_two_processes_have_the_losses_of_one(method, way, work, alone, pretended):
    launcher, env, kind, flags = WAYS[way]
    script = FULL if method == FULL else LORA
    flags = {FULL: flags, LORA: LORA_16, "qlora": ["--lora_dropout", "0"]}[method]
    name = f"{method[0]}_{way}".replace(" ", "_")
    output = ok(train(work, launcher, script, name, *flags, env=pretended if env is None else env))
    assert output.count("memory plan") == output.count("33 rows of") == output.count("done: ") == 1  # said once
    log, one = log_of(work / name), log_of(alone[method])
    assert (log["environment"]["distributed_type"], log["environment"]["processes"]) == (kind, 2)
    assert (one["environment"]["distributed_type"], one["environment"]["processes"]) == ("NO", 1)
    assert values(log, "step") == values(one, "step") and log["summary"]["steps"] == 10
    assert log["summary"]["epochs"] == one["summary"]["epochs"] == 2
    assert log["summary"]["tokens"] == one["summary"]["tokens"]
    assert values(log, "eval_tokens") == values(one, "eval_tokens")
    exact = {"loss": 1e-4, "eval_loss": 1e-5, "grad_norm": 1e-3}
    if method == "qlora":  # the base computes in fp32 here, and bitsandbytes' sums depend on the shape of a pass
        exact = {"loss": 1e-3, "eval_loss": 1e-3, "grad_norm": 2e-2}
    for key, tolerance in exact.items():
        assert values(log, key) == pytest.approx(values(one, key), rel=tolerance), key
    (files, weights), (expected, reference) = final(work / name, script), final(alone[method], script)
    assert files == expected and weights.keys() == reference.keys()
    for key, tensor in reference.items():
        assert weights[key].dtype == tensor.dtype
        torch.testing.assert_close(weights[key], tensor, rtol=1e-2, atol=2e-3, msg=f"{way}: {key}")
