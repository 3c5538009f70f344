"""Killed, hung up, out of disk: at every moment that matters, with real signals and real full disks."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, SHORT, ok, refused, run
from safetensors.torch import load_file

from configs import handover

pytestmark = pytest.mark.slow
LORA, FULL = SCRIPTS[1:3]
FOLDER = {LORA: "outputs/lora_model", FULL: "outputs/full_model"}
FINAL = {LORA: "final_lora_adapter/adapter_model.safetensors", FULL: "final_model/model.safetensors"}
WEIGHTS = {LORA: "adapter_model.safetensors", FULL: "model.safetensors"}
# Four epochs of six steps, a checkpoint every fourth step, all in fp32: equal weights are equal bit by bit.
LONG = "--model_name model --max_steps none --num_epochs 4 --max_train_samples 22 --save_total_limit 9".split()
LONG = [*SHORT, *LONG, *"--eval_steps 4 --save_steps 4 --learning_rate 1e-3".split()]

# Runs a script and does something at an arranged moment: before the n-th call of a function, given as module:name.
AT = """
import importlib, os, runpy, signal, sys
where, number, action = sys.argv[1:4]
sys.argv = sys.argv[4:]
module, _, name = where.partition(":")
owner = importlib.import_module(module)
*path, name = name.split(".")
for part in path:
    owner = getattr(owner, part)
real, calls = getattr(owner, name), []
def arranged(*args, **kwargs):
    calls.append(1)
    if len(calls) == int(number) and os.environ.get("RANK", "0") == "0":
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        with open(action, "wb") as file:  # the disk fills up
            while file.write(bytes(4096)):
                file.flush()
    return real(*args, **kwargs)
def filling(*args, **kwargs):
    try:
        return arranged(*args, **kwargs)
    except OSError:
        return real(*args, **kwargs)
setattr(owner, name, arranged if action == "kill" else filling)
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# (moment, function, before its n-th call of this process): all in one run that is killed and goes on ten times
MOMENTS = [
    ("before the first step", "configs.training.runlog:run", 1),
    ("in the third step", "configs.training.trainer:ExactTrainer.training_step", 3),
    ("a checkpoint has weights, no optimizer", "transformers.trainer:Trainer._save_optimizer_and_scheduler", 1),
    ("a checkpoint has no random states", "transformers.trainer:Trainer._save_rng_state", 1),
    ("a checkpoint has no manifest", "configs.training.checkpoints:seal", 1),
    ("a checkpoint is written, older ones are to go", "configs.training.trainer:rotate_checkpoints", 1),
    ("in the second epoch", "configs.training.trainer:ExactTrainer.training_step", 4),
    ("the final folder is written", "configs.training.export:model_card", 1),
    ("the final folder is put in its place", "pathlib:Path.rename", 2),
    ("all is done but for the log", "configs.training.runlog:draw_curves", 1),
]


def at(where: str, number: int, action: str, script: str, *flags: object, cwd: Path):
    """A run of a script with an arranged moment."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", AT, where, number, action, ROOT / script, *flags]
    return subprocess.run(list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def log_of(work: Path, script: str) -> dict:
    return json.loads((work / FOLDER[script] / "training_log.json").read_text("utf-8"))


def same_weights(one: Path, other: Path) -> None:
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("script", [LORA, FULL])
def test_a_training_killed_at_ten_moments_ends_with_the_same_bits(fresh, script):
    whole, work = fresh(), fresh()
    ok(run(script, *LONG, cwd=whole))
    for moment, where, number in MOMENTS:
        result = at(where, number, "kill", script, *LONG, cwd=work)
        assert result.returncode == -signal.SIGKILL, f"{moment}: {result.stdout[-2000:]}{result.stderr[-3000:]}"
    # the last kill left a model, and a log that does not know it: the run is finished without a step
    output = ok(run(script, *LONG, cwd=work))
    assert "resuming from" in output
    assert log_of(work, script)["summary"]["status"] == "done"
    assert log_of(work, script)["summary"]["steps"] == log_of(whole, script)["summary"]["steps"] == 24
    same_weights(work / FOLDER[script] / FINAL[script], whole / FOLDER[script] / FINAL[script])
    for step in (16, 20, 24):
        name = f"checkpoint-{step}/{WEIGHTS[script]}"
        same_weights(work / FOLDER[script] / name, whole / FOLDER[script] / name)
    losses = [[(r["step"], r["loss"]) for r in log_of(w, script)["history"] if "loss" in r] for w in (work, whole)]
    assert losses[0] == losses[1]


def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(fresh):
    whole, work = fresh(), fresh()
    ok(run(LORA, *LONG, cwd=whole))
    at("configs.training.trainer:ExactTrainer.training_step", 15, "kill", LORA, *LONG, cwd=work)
    for name in ("optimizer.pt", "scheduler.pt"):
        path = work / FOLDER[LORA] / "checkpoint-12" / name
        path.write_bytes(path.read_bytes()[:-1])
    output = ok(run(LORA, *LONG, cwd=work))
    assert (
        "checkpoint-12 is damaged (optimizer.pt has" in output
        and "resuming from outputs/lora_model/checkpoint-8" in output
    )
    same_weights(work / FOLDER[LORA] / FINAL[LORA], whole / FOLDER[LORA] / FINAL[LORA])


def test_a_finished_training_is_not_repeated_and_another_one_does_not_replace_it(trained, tiny, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(trained, work)
    before = contents(work / FOLDER[LORA])
    output = ok(run(LORA, "--model_name", tiny, *SHORT, cwd=work))
    assert "already done: outputs/lora_model: 4 steps" in output and contents(work / FOLDER[LORA]) == before
    words = refused(run(LORA, "--model_name", tiny, *SHORT, "--learning_rate", "5", cwd=work), "LEARNING_RATE was")[0]
    assert "python 2_lora_finetuning.py" in words and "--rerun" in words and contents(work / FOLDER[LORA]) == before
    output = ok(run(LORA, "--model_name", tiny, *SHORT, "--rerun", cwd=work))
    (place,) = (work / "outputs" / "history").iterdir()
    assert f"rm -r outputs/history/{place.name}" in output and contents(place) == before
    assert log_of(work, LORA)["summary"]["resumed_from"] is None
    assert len(list((work / FOLDER[LORA] / "runs").glob("events*"))) == 2  # and the hparams


def test_on_a_terminal_it_asks(trained, tiny, tmp_path):
    import pexpect

    work = tmp_path / "work"
    shutil.copytree(trained, work)
    words = [str(ROOT / LORA), "--model_name", str(tiny), *SHORT, "--learning_rate", "5e-4"]
    child = pexpect.spawn(sys.executable, words, cwd=str(work), timeout=120, encoding="utf-8", dimensions=(50, 300))
    child.expect("outputs/lora_model holds another run: 4 steps")
    child.expect("LEARNING_RATE was 0.0002 and is 0.0005")
    child.expect("1  train in another folder: .*--output_dir outputs/lora_model_2")
    child.expect("2  keep it: .*--learning_rate 0.0002")
    child.expect("3  move it to outputs/history and train: .*--rerun")
    child.sendline("7")
    child.expect("Which")
    child.sendline("1")
    child.expect("done: outputs/lora_model_2")
    child.expect(pexpect.EOF)
    assert (work / "outputs" / "lora_model_2" / "final_lora_adapter").is_dir()
    child = pexpect.spawn(sys.executable, words, cwd=str(work), timeout=120, encoding="utf-8", dimensions=(50, 300))
    child.expect("Which")
    child.sendline("2")
    child.expect("already done: outputs/lora_model: 4 steps")
    child.expect(pexpect.EOF)


def test_two_processes_killed_twice_end_with_the_same_bits(fresh):
    """The first process is killed in a step, and before a checkpoint has its manifest; the launcher ends the other."""
    whole, work = fresh(), fresh()
    env = {**os.environ, "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT)}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    (work / "at.py").write_text(AT)
    ok(run(*launch, ROOT / LORA, *LONG, cwd=whole, env=env))
    for where, number in (
        ("configs.training.checkpoints:seal", 2),
        ("configs.training.trainer:ExactTrainer.training_step", 7),
    ):
        result = run(*launch, "at.py", where, number, "kill", ROOT / LORA, *LONG, cwd=work, env=env)
        assert result.returncode == 1 and "SIGKILL" in result.stderr, result.stderr[-3000:]
    assert "resuming from outputs/lora_model/checkpoint-8" in ok(run(*launch, ROOT / LORA, *LONG, cwd=work, env=env))
    same_weights(work / FOLDER[LORA] / FINAL[LORA], whole / FOLDER[LORA] / FINAL[LORA])


@pytest.mark.parametrize(("signals", "code"), [([signal.SIGHUP], 129), ([signal.SIGTERM, signal.SIGTERM], 143)])
def test_a_closed_terminal_and_a_signal_that_comes_twice(fresh, signals, code):
    """SIGTERM reaches a step from a service manager and from run_all.py."""
    work = fresh()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / LORA), *LONG], cwd=work, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # else nohup's children would ignore it
    )  # fmt: skip
    path, end = work / FOLDER[LORA] / "training_log.json", time.monotonic() + 120
    while not path.exists() or log_of(work, LORA)["summary"]["steps"] < 2:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)  # both have come before it can act on the first
    for number in signals[:1]:
        process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.05 if len(signals) > 1 else 0)
    for number in signals[1:]:
        process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == code, output[-3000:]
    assert "Traceback" not in output
    if code > 0:
        step = log_of(work, LORA)["summary"]["steps"]
        assert f"saved outputs/lora_model/checkpoint-{step}" in output
        assert f"resuming from outputs/lora_model/checkpoint-{step}" in ok(run(LORA, *LONG, cwd=work))


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder that is not scratch."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def kill_after(seconds: float, *command: object, cwd: Path) -> int | None:
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


@pytest.mark.parametrize("step", [1, 4])
def test_steps_1_and_4_killed_at_ten_moments_leave_the_old_state_or_the_new_one(trained, tiny, tmp_path, step):
    work = tmp_path / "work"
    shutil.copytree(trained, work)
    if step == 1:
        folder, words = "data", [SCRIPTS[0], "--dataset_name", "rows.jsonl", "--model_name", tiny]
        first, second = [*words, "--eval_fraction", "0.2"], [*words, "--eval_fraction", "0.3", "--seed", "7"]
    else:
        folder, words = "outputs", [SCRIPTS[3], "--model_name", tiny, "--max_new_tokens", "4"]
        first, second = words, [*words, "--max_eval_samples", "10"]
    names = {"data": None, "outputs": "evaluation_"}[folder]

    def state() -> dict[str, str]:
        handover.settle(work / folder)
        return {name: sha for name, sha in contents(work / folder).items() if not names or name.startswith(names)}

    ok(run(*first, cwd=work))
    old = state()
    began = time.monotonic()
    ok(run(*second, cwd=work))
    took, new = time.monotonic() - began, state()
    ok(run(*first, cwd=work))
    assert state().keys() == new.keys()
    killed, quick = 0, 0
    while killed < 10:
        code = kill_after(took * (killed + 1) / 10.5, ROOT / second[0], *second[1:], cwd=work)
        now = state()
        same = [now == old, now == new] if step == 1 else [set(now) == set(old)]
        assert any(same), f"after {killed + 1} of ten: {sorted(set(now.items()) ^ set(old.items()))}"
        if code == -signal.SIGKILL:
            killed += 1
        else:  # the machine has become faster, and it was done before: the same moment again, sooner
            took, quick = 0.8 * took, quick + 1
            assert code == 0 and quick < 10
    ok(run(*second, cwd=work))
    assert step == 4 or state() == new
    assert not [p.name for p in (work / folder).iterdir() if p.name in (".new", ".old", ".done")]


# --- full disks

# In a namespace of its own: a small file system at a folder, then commands.
DISK = """
set -e
mount -t tmpfs -o size={size} tmpfs {folder}
cp -r {source}/. {folder}/
{commands}
"""


def on_a_small_disk(work: Path, folder: str, size: str, commands: str) -> subprocess.CompletedProcess:
    """Run commands where `folder` lies on a file system of `size`, with what the folder held before."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody make a mount namespace (unshare -rm)")
    source = work / f"{folder}-before"
    (work / folder).mkdir(exist_ok=True)
    shutil.copytree(work / folder, source, dirs_exist_ok=True)
    text = DISK.format(size=size, folder=work / folder, source=source, commands=commands)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", text], cwd=work, env=env, capture_output=True, text=True, timeout=300
    )


def one_line(result: subprocess.CompletedProcess, *words: str) -> None:
    said = result.stdout + result.stderr
    assert "Traceback" not in said, said[-4000:]
    for word in words:
        assert word in said, said[-3000:]


def test_step_1_on_a_full_disk_leaves_the_old_data(prepared, tiny, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(prepared, work)
    flags = f"{ROOT / SCRIPTS[0]} --dataset_name rows.jsonl --model_name {tiny}"
    commands = f"""
head -c 200000000 /dev/zero > data/filler 2> filling || true
find data -name .lock -delete
{sys.executable} {flags} && exit 9 || echo "exit code $?"
rm data/filler
{sys.executable} -c "from configs import handover; print('rows', handover.read_manifest('data')['rows']['train'])"
"""
    result = on_a_small_disk(work, "data", "2m", commands)
    one_line(result, "exit code 2", "no space is left on the disk", "rows 1")


def test_step_4_on_a_full_disk(trained, tiny, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(trained, work)
    flags = f"{ROOT / SCRIPTS[3]} --model_name {tiny} --max_new_tokens 4"
    commands = f"""
head -c 900000000 /dev/zero > outputs/filler 2> filling || true
{sys.executable} {flags} && exit 9 || echo "exit code $?"
ls -A outputs
rm outputs/filler
{sys.executable} {flags} > /dev/null && ls outputs
"""
    result = on_a_small_disk(work, "outputs", "60m", commands)
    one_line(result, "exit code 2", "no space is left on the disk", "evaluation_results.json")


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("configs.training.trainer:ExactTrainer.training_step", 6),
        ("transformers.trainer:Trainer._save_optimizer_and_scheduler", 2),
        ("configs.training.checkpoints:seal", 2),
        ("configs.training.export:save_final", 1),
    ],
)
def test_a_disk_that_fills_up_in_mid_run(fresh, moment, number):
    """The run ends in one sentence with the checkpoint before; with room again, the same command goes on."""
    work = fresh()
    command = f"{ROOT / LORA} {' '.join(LONG)}"
    (work / "at.py").write_text(AT)
    commands = f"""
{sys.executable} at.py {moment} {number} outputs/filler {command} && exit 9 || echo "exit code $?"
rm outputs/filler
{sys.executable} {command}
cp outputs/lora_model/training_log.json .
"""
    result = on_a_small_disk(work, "outputs", "80m", commands)
    one_line(result, "exit code 2", "no space is left on the disk", "resuming from outputs/lora_model/checkpoint-")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    log = json.loads((work / "training_log.json").read_text("utf-8"))
    assert log["summary"]["status"] == "done" and log["summary"]["steps"] == 24


def test_the_check_before_training_counts_what_lies_there(fresh):
    """A run that was interrupted on a nearly full disk goes on: its own checkpoints make room in turn."""
    work = fresh()
    command = f"{ROOT / LORA} {' '.join(LONG)} --save_total_limit 2"
    (work / "at.py").write_text(AT)
    step = "configs.training.trainer:ExactTrainer.training_step"
    commands = f"""
{sys.executable} at.py {step} 10 kill {command} && exit 9 || echo "exit code $?"
free=$(df --output=avail -B1 outputs | tail -1)
one=$(du -sb outputs/lora_model/checkpoint-8 | cut -f1)
head -c $((free - one * 3 / 2)) /dev/zero > outputs/filler
{sys.executable} {command}
"""
    result = on_a_small_disk(work, "outputs", "80m", commands)
    one_line(result, "exit code 137", "resuming from outputs/lora_model/checkpoint-8", "done: outputs/lora_model")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


# --- folders


@pytest.mark.parametrize("name", ["with space", "数据与模型", "-dash", "a link"])
def test_folders_with_odd_names(tmp_path, prepared, tiny, name):
    """Steps 1 and 2 with data and outputs in such folders, from another working directory."""
    base = tmp_path / "base"
    base.mkdir()
    data, output = base / f"{name} data", base / f"{name} out"
    if name == "a link":
        (tmp_path / "elsewhere").mkdir()
        output.symlink_to(tmp_path / "elsewhere")
    rows = prepared / "rows.jsonl"
    places = [f"--data_dir={data.relative_to(base)}"]
    ok(run(SCRIPTS[0], f"--dataset_name={rows}", "--model_name", tiny, *places, cwd=base))
    places += [f"--output_dir={output.relative_to(base)}"]
    ok(run(LORA, "--model_name", tiny, *SHORT, *places, cwd=base))
    assert (output / "final_lora_adapter" / "adapter_model.safetensors").is_file()
    output_2 = ok(run(LORA, "--model_name", tiny, *SHORT, *places, "--rerun", cwd=base))
    assert "the older run lies in" in output_2 and len(list((base / "history").iterdir())) == 1
    refused(run(LORA, "--model_name", tiny, *SHORT, f"--data_dir={data}", f"--output_dir={output}", "--seed", "3",
                cwd=tmp_path), "SEED was 42 and is 3")  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_place_that_cannot_be_written(tmp_path, trained, tiny, script):
    """A file where a folder should be: root, too, cannot write below it."""
    work = tmp_path / "work"
    shutil.copytree(trained, work)
    (work / "file").write_text("in the way")
    flag = {SCRIPTS[0]: "--data_dir", SCRIPTS[3]: "--report_dir"}.get(script, "--output_dir")
    words = ["--dataset_name", "rows.jsonl"] if script == SCRIPTS[0] else SHORT if script in (LORA, FULL) else []
    errors = refused(run(script, "--model_name", tiny, *words, flag, "file/below", cwd=work), "file/below")
    assert "cannot" in errors[0]


def test_outputs_on_another_file_system_than_data(fresh):
    work = fresh()
    command = f"{ROOT / LORA} {' '.join(LONG)}"
    commands = f"{sys.executable} {command}\n{sys.executable} {command} --rerun\nls outputs/history"
    result = on_a_small_disk(work, "outputs", "80m", commands)
    one_line(result, "lora_model-20")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
