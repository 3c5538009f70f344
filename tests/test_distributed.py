"""Several processes on this machine over gloo: DDP, ZeRO, FSDP; launchers, configurations, lost processes.

A step is the same rows whatever the number of processes, so each run here must have the losses of one process.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, SCRIPTS, ok, run
from safetensors.torch import load_file

from configs import device

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


# --- what is refused


def test_a_step_that_cannot_be_shared_out_is_refused_with_what_can(work):
    three = [*TORCHRUN, "--standalone", "--nproc_per_node", "3"]
    result = train(work, three, FULL, "three", env=ON_CPU)
    assert result.returncode != 0
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "takes 2 x 4 = 8 rows, which 3 processes cannot share out evenly; start 1, 2, 4, 8 processes" in error
    assert "--batch_size 2 --gradient_accumulation_steps 6" in error
    assert not (work / "three" / "training_log.json").exists()


# --- launch configurations and lines


@pytest.mark.parametrize("path", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_configurations_are_what_accelerate_reads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 2 and config.mixed_precision is None  # the script's PRECISION decides
    head = path.read_text("utf-8").splitlines()[0:3]
    assert any(f"accelerate launch --config_file configs/accelerate/{path.name}" in line for line in head)


def test_the_batch_file_for_slurm_names_what_is_there():
    path = ROOT / "configs/slurm_two_nodes.sh"
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    names = re.findall(r"configs/\S+\.yaml|\d_\w+\.py", path.read_text("utf-8"))
    assert len(names) == 3 and all((ROOT / name).is_file() for name in names)


LINES = [line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line.startswith("accelerate launch")]


@pytest.mark.parametrize("line", LINES)
def test_launch_lines_of_the_readme(line, work):
    """As written, but for the device: two processes over gloo. accelerate would quietly run one process without
    DeepSpeed on a CPU, so torchrun stands in for it there."""
    assert line in (ROOT / "README.zh-CN.md").read_text("utf-8")
    words = shlex.split(line)
    script = next(word for word in words if word.endswith(".py"))
    before, flags = words[2 : words.index(script)], words[words.index(script) + 1 :]
    before[before.index("--num_processes") + 1] = "2"
    launcher, env = [*ACCELERATE, "--main_process_port", "0", *before], {}
    kind = "DEEPSPEED" if "zero" in line else "MULTI_CPU"
    if "zero" not in " ".join(before):
        launcher = [*TORCHRUN, "--standalone", "--nproc_per_node", "2"]
        env = ON_CPU if kind == "MULTI_CPU" else {}
    launcher = [f"{ROOT}/{word}" if word.startswith("configs/") else word for word in launcher]
    name = f"readme_{LINES.index(line)}"
    output = ok(train(work, launcher, script, name, *flags, env=env))
    assert "note:" not in output
    log = log_of(work / name)
    assert (log["environment"]["distributed_type"], log["environment"]["processes"]) == (kind, 2)
    assert log["summary"]["status"] == "done"


# --- two machines


def machines(work: Path, port: int, *flags: list[str]) -> list[subprocess.Popen]:
    """Two launchers over loopback, each with one process and its own flags."""
    children = []
    for rank, own in enumerate(flags):
        words = [*TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1", "--node_rank", rank]
        words += ["--master_addr", "127.0.0.1", "--master_port", port, ROOT / FULL, *TEN, *own]
        children.append(
            subprocess.Popen(
                [sys.executable, *map(str, words)],
                cwd=work,
                env={**os.environ, **ON_CPU},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                stdin=subprocess.DEVNULL,
                text=True,
            )
        )
    return children


def ends(children: list[subprocess.Popen]) -> list[tuple[int, str, list[str]]]:
    """(exit code, what was printed, lines that begin with error:) of each launcher."""
    outputs = [child.communicate(timeout=240) for child in children]
    return [
        (child.returncode, out, [line for line in err.splitlines() if line.startswith("error: ")])
        for child, (out, err) in zip(children, outputs, strict=True)
    ]


def test_two_machines_train_lose_one_another_and_go_on(work, alone):
    slow = ["--output_dir", "nodes", "--max_steps", "10", "--eval_steps", "2", "--save_steps", "2"]
    children = machines(work, device.free_port(), slow, slow)
    log, deadline = work / "nodes" / "training_log.json", time.monotonic() + 200
    while time.monotonic() < deadline and not list((work / "nodes").glob("checkpoint-*/trainer_state.json")):
        time.sleep(0.02)
    launcher = psutil.Process(children[1].pid)
    for process in [launcher, *launcher.children(recursive=True)]:  # torchrun's processes have sessions of their own
        process.kill()
    children[1].communicate()
    code, _, errors = ends(children[:1])[0]
    assert code != 0 and len(errors) == 1, errors
    assert "another process ended, or did not answer within 10 minutes" in errors[0]
    assert "start all of them again with the same command: it goes on from nodes/checkpoint-" in errors[0]
    assert json.loads(log.read_text("utf-8"))["summary"]["status"] == "running"
    both = ends(machines(work, device.free_port(), slow, slow))
    assert [code for code, _, _ in both] == [0, 0], both
    assert "resuming from nodes/checkpoint-" in both[0][1]
    after, one = log_of(work / "nodes"), log_of(alone[FULL])
    assert after["summary"]["status"] == "done" and after["environment"]["processes"] == 2
    assert values(after, "loss") == pytest.approx(values(one, "loss"), rel=1e-4)


def test_two_machines_that_share_no_folder_are_refused(work):
    own = ["--output_dir", "mine"], ["--output_dir", "yours"]
    found = ends(machines(work, device.free_port(), *own))
    assert all(code != 0 for code, _, _ in found)
    errors = [error for _, _, errors in found for error in errors]
    assert errors and all("does not see the OUTPUT_DIR of machine 0" in error for error in errors)
    assert "--output_dir /shared/PATH, or train on one machine" in errors[0]
    other = work / "other_data"
    shutil.copytree(work / "data", other)
    manifest = json.loads((other / "manifest.json").read_text("utf-8"))
    (other / "manifest.json").write_text(json.dumps({**manifest, "seed": 7}), "utf-8")
    flags = ["--output_dir", "ours"], ["--output_dir", "ours", "--data_dir", "other_data"]
    found = ends(machines(work, device.free_port(), *flags))
    errors = [error for _, _, errors in found for error in errors]
    assert all(code != 0 for code, _, _ in found)
    assert errors and all("differs between the machines (manifest_sha256)" in error for error in errors)
