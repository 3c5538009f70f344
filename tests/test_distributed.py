"""Several processes on this machine over gloo: DDP, ZeRO, FSDP; launchers, configurations, lost processes.

A step is the same rows whatever the number of processes, so each run here must have the losses of one process.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, SCRIPTS, ok, run, write_rows
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


LONG = "--max_steps 40 --eval_steps 10 --save_steps 10".split()  # long enough to be ended on its way


@pytest.fixture(scope="module")
def calm(work) -> dict:
    """The log of script 3 in one process, undisturbed, over 40 steps."""
    ok(train(work, [], FULL, "calm", *LONG))
    return log_of(work / "calm")


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


def errors(result: subprocess.CompletedProcess) -> list[str]:
    """What our scripts said on stderr. (The launcher adds a traceback of its own where a process has failed.)"""
    assert str(ROOT / "configs") not in result.stderr, result.stderr[-4000:]
    return [line for line in result.stderr.splitlines() if "error: " in line and "Error: " not in line]


def test_a_step_that_cannot_be_shared_out_is_refused_once(work):
    result = train(work, [*TORCHRUN, "--standalone", "--nproc_per_node", "3"], FULL, "three", env=ON_CPU)
    (error,) = errors(result)
    assert result.returncode != 0 and re.search(r"exitcode +: 2 ", result.stderr)
    assert "2 x 4 = 8 rows, which 3 processes cannot share out evenly" in error
    assert "start 1, 2, 4, 8 processes" in error and "--batch_size 2 --gradient_accumulation_steps 6" in error
    assert not list((work / "three").glob("checkpoint-*"))


def test_two_processes_go_on_where_they_were_ended(work, calm):
    """Both get SIGTERM, as a scheduler sends it, save a checkpoint, and the same command goes on from there."""
    words = [sys.executable, *TORCHRUN, *"--standalone --nproc_per_node 2".split(), ROOT / FULL, *TEN]
    words += [*LONG, "--output_dir", "ended"]
    env = {**os.environ, **ON_CPU}
    with subprocess.Popen(list(map(str, words)), cwd=work, env=env, stdout=-1, stderr=-2, text=True) as launcher:
        wait_for(lambda: log_of(work / "ended")["summary"]["steps"] >= 3, launcher)
        launcher.terminate()
        output = launcher.communicate(timeout=120)[0]
    assert log_of(work / "ended")["summary"]["status"] == "interrupted", output[-3000:]
    step = log_of(work / "ended")["summary"]["steps"]
    assert 3 <= step < 40 and f"saved ended/checkpoint-{step}" in output
    ok(train(work, [*TORCHRUN, "--standalone", "--nproc_per_node", "2"], FULL, "ended", *LONG, env=ON_CPU))
    log = log_of(work / "ended")
    assert log["summary"]["resumed_from"] == f"ended/checkpoint-{step}" and log["summary"]["steps"] == 40
    assert values(log, "loss") == pytest.approx(values(calm, "loss"), rel=1e-3)


def test_a_split_adapter_is_merged_afterwards(work):
    """The way out that before.problems names where MERGE_ADAPTER meets ZeRO-3."""
    flags = [*LORA_16, "--output_dir", "merged"]
    ok(run(*config("zero3"), ROOT / LORA, *TEN, *flags, cwd=work))
    output = ok(run(LORA, *TEN, *flags, "--merge_adapter", "--resume", "true", cwd=work))
    assert "merged: merged/merged_model" in output
    merge = log_of(work / "merged")["merge"]
    assert merge["nll_after"] == pytest.approx(merge["nll_before"], abs=2e-3)  # saved in the base's fp16


# --- the configurations of accelerate

CONFIGS = sorted(path.stem for path in (ROOT / "configs" / "accelerate").iterdir())


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_takes_each_configuration_as_it_is(name, work):
    from accelerate.commands.config.config_args import load_config_from_file

    path = ROOT / "configs" / "accelerate" / f"{name}.yaml"
    loaded = load_config_from_file(str(path))
    assert loaded.mixed_precision is None  # PRECISION decides
    kinds = {"ddp": "MULTI_GPU", "two_nodes": "MULTI_GPU", "fsdp2": "FSDP"}
    assert loaded.distributed_type.value == kinds.get(name, "DEEPSPEED")
    first = path.read_text("utf-8").split("compute_environment")[0]
    assert f"# accelerate launch --config_file configs/accelerate/{name}.yaml" in first
    assert set(re.findall(r"\w+\.(?:py|yaml)", first)) <= {f"{name}.yaml", LORA, FULL}


# What a training computed in, said when its process ends, which `device.leave` does without the interpreter's own end.
SHOW = """
import gc, os, sys
def show(code, leave=os._exit):
    if "trl" in sys.modules:
        from trl import SFTTrainer
        for trainer in [each for each in gc.get_objects() if isinstance(each, SFTTrainer)]:
            engine = trainer.deepspeed and trainer.deepspeed.bfloat16_enabled()
            policy = getattr(getattr(trainer.accelerator.state, "fsdp_plugin", None), "mixed_precision_policy", None)
            print("computes in", trainer.accelerator.mixed_precision, engine, getattr(policy, "param_dtype", None))
    sys.stdout.flush()
    leave(code)
os._exit = show
"""


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3", "fsdp2"])
def test_the_script_chooses_the_precision(name, work, pretended, tmp_path):
    """PRECISION bf16 is what DDP's autocast, DeepSpeed's engine and FSDP's policy compute in, without a note."""
    (tmp_path / "sitecustomize.py").write_text(PRETEND + SHOW)
    env = {**pretended, "PYTHONPATH": str(tmp_path)} if name == "fsdp2" else {"PYTHONPATH": str(tmp_path)}
    result = train(work, config(name), FULL, f"bf16_{name}", "--precision", "bf16", "--max_steps", "2", env=env)
    output = ok(result)
    notes = [line for line in (output + result.stderr).splitlines() if line.startswith("note: ")]
    assert all("FSDP" in note for note in notes) and len(notes) == (name == "fsdp2")
    assert "were not passed to `accelerate launch`" not in result.stderr
    expected = {"ddp": "bf16 None None", "fsdp2": "bf16 None torch.bfloat16"}.get(name, "bf16 True None")
    assert output.count(f"computes in {expected}") == 2, output[-2000:]


# --- the README's launch lines


def launch_lines() -> list[str]:
    text = (ROOT / "README.md").read_text("utf-8")
    return re.findall(r"^(?:accelerate launch|torchrun) .*$", text, re.MULTILINE)


def for_the_cpu(line: str, rank: int | None, port: int) -> list[str]:
    """A launch line of the README with only that replaced which needs GPUs or other machines.

    The number of processes is two; `accelerate launch` without a configuration counts GPUs, so it is told
    --multi_gpu; addresses and shared folders of two machines are those of this one. Then the tiny model is added.
    """
    words = line.split()
    for flag in ("--num_processes", "--nproc_per_node"):
        if flag in words:
            words[words.index(flag) + 1] = "2"
    if words[0] == "accelerate":
        words[:2] = ACCELERATE
        if "--config_file" not in words:
            words[2:2] = "--multi_gpu --num_processes 2".split()
        words[2:2] = ["--main_process_port", str(port)]
    else:
        words[:1] = [*TORCHRUN, "--standalone"]
    if rank is not None:
        words[2:2] = ["--num_processes", "2"]
        words[words.index("--machine_rank") + 1] = str(rank)
        words[words.index("--main_process_ip") + 1] = "127.0.0.1"
    words = [word.replace("/shared/", "") for word in words]
    at = next(n for n, word in enumerate(words) if word.endswith(".py"))
    words[at] = str(ROOT / words[at])
    return [*words, *TEN, "--max_steps", "2"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("line", launch_lines(), ids=lambda line: line[:70])
def test_every_launch_line_of_the_readme_runs(line, work, tmp_path):
    for name in ("data", "model"):
        (tmp_path / name).symlink_to(work / name)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    port, ranks = free_port(), [0, 1] if "--machine_rank" in line else [None]
    started = [Machine(for_the_cpu(line, rank, port), tmp_path) for rank in ranks]
    for machine in started:
        code, output = machine.end()
        assert code == 0, output[-3000:]
    script = LORA if LORA in line else FULL
    folder = next(path.parent for path in tmp_path.rglob("training_log.json"))
    environment = log_of(folder)["environment"]
    kind = "DEEPSPEED" if "deepspeed" in line or "zero" in line else "MULTI_CPU"
    assert (environment["distributed_type"], environment["processes"]) == (kind, 2)
    final(folder, script)


# --- two machines


class Machine:
    """A launcher of one machine, in the background."""

    def __init__(self, words: list[str], cwd: Path, inside: tuple = (), env: dict | None = None):
        self.log = cwd / f"launcher-{time.monotonic_ns()}.txt"
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [*inside, sys.executable, *words],
                cwd=cwd,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def kill(self) -> None:
        """SIGKILL for the launcher and what it started."""
        for process in [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]:
            process.kill()
        self.process.wait()

    def end(self, timeout: float = 150) -> tuple[int, str]:
        try:
            return self.process.wait(timeout), self.log.read_text("utf-8")
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"did not end\n{self.log.read_text('utf-8')[-3000:]}")


def wait_for(ready, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None, "ended too early"
        try:
            if ready():
                return
        except OSError:  # no log yet
            pass
        time.sleep(0.01)
    pytest.fail("nothing came")


CABLE = """
mount -t tmpfs none /run && ip link set lo up && ip netns add b && ip link add va type veth peer name vb netns b &&
ip addr add 10.9.0.1/24 dev va && ip link set va up && ip netns exec b ip link set lo up &&
ip netns exec b ip addr add 10.9.0.2/24 dev vb && ip netns exec b ip link set vb up && echo connected && exec cat
"""


@pytest.fixture
def two_machines(work):
    """Starts script 3 on two machines, as configs/accelerate/two_nodes.yaml says: network namespaces with a cable.

    Where this user may not make network namespaces: both on the loopback interface.
    """
    started: list[Machine] = []
    holder = subprocess.Popen(["unshare", "-Urnm", "bash", "-c", CABLE], stdin=-1, stdout=-1, stderr=-3, text=True)
    connected = holder.stdout.readline() == "connected\n"
    # to the folder by its name: the one that is inherited lies in the file systems of another namespace
    enter = ["nsenter", "-t", str(holder.pid), "-U", "-n", "-m", "--preserve-credentials"]
    enter += ["bash", "-c", 'cd "$0" && exec "$@"', str(work)]
    inside = [(enter, "va"), ([*enter, "ip", "netns", "exec", "b"], "vb")] if connected else [([], "lo")] * 2

    def start(*flags: list[str]) -> list[Machine]:
        port, address = free_port(), "10.9.0.1" if connected else "127.0.0.1"
        pair = []
        for rank, (where, interface) in enumerate(inside):
            words = [
                *config("two_nodes")[:-2],
                "--main_process_port",
                port,
                "--num_processes",
                2,
                "--machine_rank",
                rank,
            ]
            words += ["--main_process_ip", address, ROOT / FULL, *TEN, *flags[rank]]
            pair.append(Machine(list(map(str, words)), work, tuple(where), {"GLOO_SOCKET_IFNAME": interface}))
        started.extend(pair)
        return pair

    yield start
    for machine in started:
        if machine.process.poll() is None:
            machine.kill()
    holder.communicate()


def said(output: str) -> list[str]:
    """Our `error:` lines of a launcher, whose own traceback names none of our files."""
    assert str(ROOT / "configs") not in output, output[-4000:]
    return [line for line in output.splitlines() if re.search(r"(^|\]:)error: ", line)]


def test_two_machines_lose_one_and_go_on(two_machines, work, calm):
    flags = [*LONG, "--output_dir", "lost"]
    first, second = two_machines(flags, flags)
    wait_for((work / "lost" / "checkpoint-10" / "manifest.json").exists, first.process)
    second.kill()
    began = time.monotonic()
    code, output = first.end()
    assert code != 0 and time.monotonic() - began < 60
    (error,) = said(output)
    assert "another process ended, or did not answer within 10 minutes" in error
    assert re.search(r"with the same command: it goes on from lost/checkpoint-\d0$", error)
    assert log_of(work / "lost")["summary"]["status"] == "running"

    for machine in two_machines(flags, flags):
        code, output = machine.end()
        assert code == 0, output[-3000:]
    log = log_of(work / "lost")
    assert log["summary"]["resumed_from"].startswith("lost/checkpoint-") and log["environment"]["processes"] == 2
    assert values(log, "loss") == pytest.approx(values(calm, "loss"), rel=1e-3)
    assert values(log, "eval_loss") == pytest.approx(values(calm, "eval_loss"), rel=1e-3)


@pytest.mark.parametrize("apart", ["output", "data"])
def test_machines_that_do_not_share_are_refused_on_both(apart, two_machines, work):
    here, there = (["--output_dir", f"apart_{apart}_{n}" if apart == "output" else "apart"] for n in (0, 1))
    if apart == "data":
        other = work / "other_data"
        shutil.copytree(work / "data", other)
        manifest = other / "manifest.json"
        manifest.write_text(manifest.read_text("utf-8") + "\n", encoding="utf-8")
        there += ["--data_dir", "other_data"]
    for machine in two_machines(here, there):
        code, output = machine.end()
        (error,) = said(output)
        assert code != 0 and re.search(r"exitcode +: 2 ", output)
        if apart == "output":
            assert f"machine 1 ({socket.gethostname()}) does not see the OUTPUT_DIR of machine 0, {work}/" in error
            assert "/apart_output_0; put it on" in error
            assert "--output_dir /shared/PATH" in error and "train on one machine" in error
        else:
            assert "differs between the machines (manifest_sha256)" in error
            assert "copy it from machine 0" in error and "--data_dir /shared/PATH" in error


# --- SLURM


def test_the_batch_file_launches_both_scripts_on_both_nodes(tmp_path):
    """With a srun, a scontrol and an accelerate that only say what they were given."""
    batch = ROOT / "configs" / "slurm_two_nodes.sh"
    subprocess.run(["bash", "-n", batch], check=True)
    text = batch.read_text("utf-8")
    for name in re.findall(r"\S+\.(?:py|yaml|sh)\b", text):
        assert (ROOT / name).is_file(), name
    tools = {
        "srun": 'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "${@:2}"; done',
        "scontrol": "echo node0; echo node1",
        "accelerate": 'echo accelerate "$@"',
    }
    for name, body in tools.items():
        path = write_rows(tmp_path / name, [])
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text("")
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "USER": "me", "SLURM_JOB_ID": "4321"}
    env |= {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2", "SLURM_SUBMIT_DIR": str(tmp_path)}
    result = subprocess.run(["bash", str(batch)], env=env, capture_output=True, text=True, check=True)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [
        (line[line.index("--machine_rank") + 1], next(word for word in line if word.endswith(".py"))) for line in lines
    ] == [(rank, script) for script in (LORA, FULL) for rank in ("0", "1")]
    for line in lines:
        assert "--main_process_ip node0 --main_process_port 24321" in " ".join(line)
        assert "--num_machines 2 --num_processes 8" in " ".join(line)
