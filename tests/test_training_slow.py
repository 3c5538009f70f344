"""The trainings as users run them: two processes, DeepSpeed, killed and interrupted runs, what is left."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, SHORT, load_script, ok, refused, run
from safetensors.torch import load_file

from configs import device
from configs.training.trainer import token_rows

pytestmark = pytest.mark.slow
LORA, FULL = SCRIPTS[1:3]
FINAL = {LORA: "outputs/lora_model/final_lora_adapter", FULL: "outputs/full_model/final_model"}
FOLDER = {LORA: "outputs/lora_model", FULL: "outputs/full_model"}
# Four epochs of six steps, of which the last is short: 22 rows by four.
LONG = [*SHORT, *"--model_name model --max_steps none --num_epochs 4 --max_train_samples 22".split()]
PER_EPOCH, STEPS = 6, 24
FULL_LONG = [*LONG, "--learning_rate", "1e-3"]  # else the saved fp16 weights would hide small moves


def log_of(work: Path, script: str) -> dict:
    return json.loads((work / FOLDER[script] / "training_log.json").read_text("utf-8"))


def weights(work: Path, script: str) -> dict[str, torch.Tensor]:
    (path,) = (work / FINAL[script]).glob("*.safetensors")
    return load_file(path)


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def uninterrupted(fresh) -> Path:
    """Where script 2 has run from beginning to end."""
    work = fresh()
    before = hashes(work / "model"), hashes(work / "data")
    ok(run(LORA, *LONG, cwd=work))
    # what a training reads, it leaves as it was
    assert (hashes(work / "model"), hashes(work / "data")) == before
    return work


class Running:
    """A script in the background; `with` ends it whatever happens."""

    def __init__(self, script: str, flags: list[str], work: Path):
        self.script, self.work = script, work
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / script), *flags],
            cwd=work,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()

    def wait_for(self, steps: int) -> None:
        """Until its log says that so many steps are done."""
        path, end = self.work / FOLDER[self.script] / "training_log.json", time.monotonic() + 120
        while time.monotonic() < end:
            if self.process.poll() is not None:
                pytest.fail(f"ended too early\n{self.process.communicate()[0][-3000:]}")
            if path.exists() and json.loads(path.read_text("utf-8"))["summary"]["steps"] >= steps:
                return
            time.sleep(0.01)
        pytest.fail(f"did not come to step {steps}")

    def signal(self, *numbers: int) -> tuple[int, str]:
        """Send signals; its exit code and what it printed."""
        for number in numbers:
            self.process.send_signal(number)
        output = self.process.communicate(timeout=120)[0]
        return self.process.returncode, output


def same_run(one: dict, other: dict) -> None:
    """Two logs are of runs that did the same: equal losses at equal steps, equal counts."""
    keys = ("step", "epoch", "loss", "eval_loss", "eval_tokens", "learning_rate", "num_input_tokens_seen")
    records = [[{k: r[k] for k in keys if k in r} for r in log["history"]] for log in (one, other)]
    assert [(r["step"], "loss" in r) for r in records[0]] == [(r["step"], "loss" in r) for r in records[1]]
    for a, b in zip(*records, strict=True):
        assert a == pytest.approx(b, abs=1e-6)
    for key in ("status", "steps", "epochs", "tokens", "best_checkpoint"):
        assert one["summary"][key] == other["summary"][key], key
    for key in ("train_loss", "eval_loss"):
        assert one["summary"][key] == pytest.approx(other["summary"][key], abs=1e-6), key


# --- ended and gone on with


def test_a_run_killed_in_its_second_epoch_goes_on_as_if_nothing_had_been(fresh, uninterrupted):
    work = fresh()
    with Running(LORA, LONG, work) as running:
        running.wait_for(PER_EPOCH + 3)  # behind the checkpoint of step 8, the first of the second epoch
        code, _ = running.signal(signal.SIGKILL)
    assert code == -signal.SIGKILL
    half = log_of(work, LORA)
    assert half["summary"]["status"] == "running" and not (work / FINAL[LORA]).exists()

    output = ok(run(LORA, *LONG, cwd=work))
    log = log_of(work, LORA)
    resumed = log["summary"]["resumed_from"]
    step = int(resumed.rpartition("-")[2])
    assert PER_EPOCH < step < 2 * PER_EPOCH, "it was not killed in its second epoch"
    assert resumed == f"outputs/lora_model/checkpoint-{step}" and f"resuming from {resumed}" in output
    # what had been logged up to the checkpoint stands as it was, with its times
    kept = [record for record in half["history"] if record["step"] <= step]
    assert log["history"][: len(kept)] == kept

    expected = log_of(uninterrupted, LORA)
    assert expected["summary"]["resumed_from"] is None and expected["summary"]["steps"] == STEPS
    same_run(log, expected)
    assert log["summary"]["train_runtime_s"] > half["history"][0].get("train_runtime", 0)
    result, reference = weights(work, LORA), weights(uninterrupted, LORA)
    assert result.keys() == reference.keys()
    for name, tensor in reference.items():
        torch.testing.assert_close(result[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_sigterm_saves_and_a_second_run_is_refused_meanwhile(fresh, uninterrupted):
    work = fresh()
    with Running(LORA, LONG, work) as running:
        running.wait_for(3)
        running.process.send_signal(signal.SIGSTOP)  # it holds the folder while the other one starts
        before = hashes(work / FOLDER[LORA])
        refused(run(LORA, *LONG, cwd=work), "outputs/lora_model: another run is writing there")
        assert hashes(work / FOLDER[LORA]) == before
        code, output = running.signal(signal.SIGTERM, signal.SIGCONT)
    assert code == 143, output[-3000:]
    assert "Traceback" not in output
    log = log_of(work, LORA)
    step = log["summary"]["steps"]
    assert log["summary"]["status"] == "interrupted" and 3 <= step < STEPS
    assert f"saved outputs/lora_model/checkpoint-{step}; the same command goes on" in output
    assert (work / FOLDER[LORA] / f"checkpoint-{step}" / "trainer_state.json").exists()
    assert not (work / FINAL[LORA]).exists()

    ok(run(LORA, *LONG, cwd=work))
    log = log_of(work, LORA)
    assert log["summary"]["resumed_from"] == f"outputs/lora_model/checkpoint-{step}"
    same_run(log, log_of(uninterrupted, LORA))
    for name, tensor in weights(uninterrupted, LORA).items():
        torch.testing.assert_close(weights(work, LORA)[name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def full_run(fresh) -> tuple[Path, int, str, dict]:
    """Where script 3 came to its end after a Ctrl-C; its exit code, output and log at the Ctrl-C."""
    work = fresh()
    with Running(FULL, FULL_LONG, work) as running:
        running.wait_for(3)
        code, output = running.signal(signal.SIGINT)
    log = log_of(work, FULL)
    ok(run(FULL, *FULL_LONG, cwd=work))
    return work, code, output, log


def test_ctrl_c_saves_and_the_same_command_goes_on(full_run):
    work, code, output, log = full_run
    assert code == 130, output[-3000:]
    assert "Traceback" not in output and "SIGINT: finishing this step" in output
    step = log["summary"]["steps"]
    assert log["summary"]["status"] == "interrupted" and step < STEPS
    after = log_of(work, FULL)["summary"]
    assert (after["status"], after["steps"], after["epochs"]) == ("done", STEPS, 4)
    assert after["resumed_from"] == f"outputs/full_model/checkpoint-{step}"


# --- DeepSpeed (several processes: test_distributed.py)


def evals(log: dict) -> list[tuple[int, float]]:
    return [(r["step"], r["eval_loss"]) for r in log["history"] if "eval_loss" in r]


def test_deepspeed_under_plain_python(fresh, trained):
    work = fresh()
    output = ok(run(FULL, "--model_name", "model", *SHORT, "--use_deepspeed", "true", cwd=work))
    assert "done: outputs/full_model/final_model: eval loss " in output
    # ZeRO really ran: only it writes its optimizer's shards
    assert list((work / FOLDER[FULL]).glob("checkpoint-4/global_step4/*optim_states.pt"))
    log, plain = log_of(work, FULL), log_of(trained, FULL)
    assert log["summary"]["status"] == "done" and log["summary"]["steps"] == 4
    assert evals(log)[0] == pytest.approx(evals(plain)[0], abs=1e-5)
    assert evals(log)[-1] == pytest.approx(evals(plain)[-1], abs=1e-3)
    assert files_of(work / FINAL[FULL]) == files_of(trained / FINAL[FULL])
    plain_load(work, "full", "float16")


# --- what is left


def files_of(folder: Path) -> set[str]:
    return set(hashes(folder))


LOADER = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import AutoPeftModelForCausalLM
kind, folder = sys.argv[1:]
model = (AutoPeftModelForCausalLM if kind == "lora" else AutoModelForCausalLM).from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
assert "configs" not in sys.modules
chat = [{"role": "user", "content": "hi"}]
text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
base = model.get_base_model() if kind == "lora" else model
print("loaded", str(base.dtype), text.count("<|im_start|>"), out.shape[1] - inputs["input_ids"].shape[1] > 0)
"""


def plain_load(work: Path, kind: str, dtype: str) -> None:
    """Load a final folder with the libraries alone, in a process that knows nothing of this project."""
    elsewhere = work.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    folder = work / FINAL[LORA if kind == "lora" else FULL]
    output = ok(run("-c", LOADER, kind, folder, cwd=elsewhere, env=env))
    assert f"loaded torch.{dtype} 2 True" in output


SAVED = {"README.md", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("script", [LORA, FULL])
def test_final_folder_holds_exactly_these_files(script, trained, uninterrupted, full_run):
    own = {"adapter_config.json", "adapter_model.safetensors"}
    if script == FULL:
        own = {"config.json", "generation_config.json", "model.safetensors"}
    for work in (trained, uninterrupted if script == LORA else full_run[0]):
        assert files_of(work / FINAL[script]) == SAVED | own
        for path in (work / FINAL[script]).iterdir():  # a pickle by any name: plain, or in torch's zip
            assert not path.read_bytes().startswith((b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK"))
        beside = {path.name for path in (work / FOLDER[script]).iterdir()}
        assert {Path(FINAL[script]).name, "training_log.json", "runs"} <= beside
        assert not [name for name in beside if name.startswith(".") and name != ".lock"]


@pytest.mark.parametrize("script", [LORA, FULL])
def test_final_folder_loads_anywhere(script, uninterrupted, full_run):
    work = uninterrupted if script == LORA else full_run[0]
    plain_load(work, "lora" if script == LORA else "full", "float16")
    if script == LORA:
        config = json.loads((work / FINAL[LORA] / "adapter_config.json").read_text("utf-8"))
        # MODEL_NAME was "model", which means nothing in another folder
        assert config["base_model_name_or_path"] == str((work / "model").resolve())


@pytest.mark.parametrize("script", [LORA, FULL])
def test_training_log_has_exactly_these_keys(script, trained, uninterrupted, full_run):
    for work in (trained, uninterrupted if script == LORA else full_run[0]):
        log = log_of(work, script)
        head = "method model_name settings identity environment parameters data plan notes".split()
        assert list(log) == [*head, "history", "summary"]
        assert log["method"] == ("lora" if script == LORA else "full")
        assert set(log["parameters"]) == {"trainable", "total", "percent"}
        assert set(log["data"]) == {"manifest_sha256", "train_rows", "eval_rows"}
        assert set(log["summary"]) == set(
            "status train_runtime_s paused_s steps epochs train_loss eval_loss tokens tokens_per_second "
            "peak_memory_bytes best_checkpoint resumed_from".split()
        )
        manifest = (work / "data" / "manifest.json").read_bytes()
        assert log["data"]["manifest_sha256"] == hashlib.sha256(manifest).hexdigest()

        summary, steps = log["summary"], log["summary"]["steps"]
        assert summary["status"] == "done"
        assert [r["step"] for r in log["history"] if "loss" in r] == list(range(1, steps + 1))
        assert [step for step, _ in evals(log)] == list(range(0, steps + 1, 2))
        saved = {step: loss for step, loss in evals(log) if step}
        assert summary["eval_loss"] == min(saved.values())
        best = min(saved, key=saved.get)
        assert summary["best_checkpoint"] == f"{FOLDER[script]}/checkpoint-{best}"
        assert (work / summary["best_checkpoint"]).is_dir()
        losses = [r["loss"] for r in log["history"] if "loss" in r]
        assert summary["train_loss"] == pytest.approx(sum(losses) / steps)
        assert summary["tokens"] == log["history"][-1]["num_input_tokens_seen"] > 0
        rate = summary["tokens"] / summary["train_runtime_s"]
        assert summary["tokens_per_second"] == pytest.approx(rate, rel=0.05)
        assert summary["peak_memory_bytes"] > 50e6


def test_lora_moves_its_adapter_only(uninterrupted, tiny):
    """(That the model's own folder stays as it was is asserted where `uninterrupted` is made.)"""
    saved = weights(uninterrupted, LORA)
    assert len(saved) == 2 * 6 * 2 and all(".lora_A." in name or ".lora_B." in name for name in saved)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    # B starts at zero: all of them have moved, and so has what they multiply
    assert all(tensor.abs().max() > 0 for tensor in saved.values())
    assert hashes(uninterrupted / "model") == hashes(tiny)
    counts = log_of(uninterrupted, LORA)["parameters"]
    total = sum(tensor.numel() for tensor in load_file(tiny / "model.safetensors").values())
    assert counts["trainable"] == sum(tensor.numel() for tensor in saved.values())
    assert counts["total"] == total + counts["trainable"]
    assert counts["percent"] == pytest.approx(100 * counts["trainable"] / counts["total"], abs=1e-3)


def test_full_moves_every_tensor(full_run, tiny):
    saved, before = weights(full_run[0], FULL), load_file(tiny / "model.safetensors")
    assert saved.keys() == before.keys()
    for name, tensor in before.items():
        assert saved[name].dtype == tensor.dtype == torch.float16, name
        assert not torch.equal(saved[name], tensor), name
    assert hashes(full_run[0] / "model") == hashes(tiny)
    counts = log_of(full_run[0], FULL)["parameters"]
    assert counts["trainable"] == counts["total"] == sum(tensor.numel() for tensor in before.values())
    assert counts["percent"] == 100


@pytest.mark.parametrize("script", [LORA, FULL])
def test_what_was_saved_is_what_was_measured(script, uninterrupted, full_run):
    """The final folder, read back, has the validation loss of the log: it holds the best checkpoint."""
    from types import SimpleNamespace

    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    work = uninterrupted if script == LORA else full_run[0]
    log, folder = log_of(work, script), str(work / FINAL[script])
    if script == LORA:
        settings = SimpleNamespace(**{**log["settings"], "MODEL_NAME": str(work / "model")})
        plan = SimpleNamespace(attn_implementation=None, dtype=torch.float32)
        base = load_script(LORA).build_model(settings, plan, torch.device("cpu"))
        model = PeftModel.from_pretrained(base, folder)
        device.keep_4bit_layout(model)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    rows = token_rows(str(work / "data"), "validation", None, tokenizer, 1024, 0.0)
    nll, tokens = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model.eval()(torch.tensor([row["input_ids"]])).logits[0]
        labels = torch.tensor(row["labels"][1:])
        nll += torch.nn.functional.cross_entropy(logits[:-1].float(), labels, reduction="sum").item()
        tokens += int((labels != -100).sum())
    assert tokens == log["history"][0]["eval_tokens"]
    # the full model is saved in fp16, the precision of its source
    assert nll / tokens == pytest.approx(log["summary"]["eval_loss"], abs=1e-4 if script == LORA else 2e-3)
    # and training has done something that can be told from nothing
    assert log["summary"]["eval_loss"] < log["history"][0]["eval_loss"] - 0.01
