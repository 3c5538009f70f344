"""What both trainings share: token-exact evaluation, sampler, QLoRA's weights, labels, resume, refusals."""

import json
import math
import os
import random
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, refused, run, write_rows
from datasets import Dataset

from configs import chat, device, handover
from configs.settings import read_constants
from configs.training.before import problems as training_problems
from configs.training.memory import Plan, Sizes
from configs.training.resume import Start
from configs.training.runlog import RunLog
from configs.training.trainer import ExactTrainer, token_rows

# --- the scripts' own functions, in this process


def constants(script: str, **changed) -> SimpleNamespace:
    """A script's constants at their defaults, apart from `changed`."""
    known = {name: c.default for name, c in read_constants(ROOT / script).items()}
    assert set(changed) <= set(known)
    return SimpleNamespace(**{**known, **changed})


def arguments(scripts: dict, script: str, folder: Path, tiny: Path, **changed):
    """(constants, SFTConfig) of a script for the tiny model: fp32, a step of one pass of two rows."""
    c = constants(
        script,
        **{
            "MODEL_NAME": str(tiny),
            "OUTPUT_DIR": str(folder),
            "REPORT_TO": "none",
            "GRADIENT_CHECKPOINTING": False,
            "BATCH_SIZE": 2,
            "GRADIENT_ACCUMULATION_STEPS": 1,
            "WARMUP_RATIO": 0.0,
            **changed,
        },
    )
    return c, scripts[script].training_arguments(c, plan_of(c))


def plan_of(c: SimpleNamespace, tokens: int | None = None) -> Plan:
    """The plan that takes the constants as they are; tokens: of a pass."""
    return Plan(
        checkpointing=c.GRADIENT_CHECKPOINTING is True,
        optim="adamw_torch" if c.OPTIM == "auto" else c.OPTIM,
        half_weights=False,
        tokens=tokens or c.BATCH_SIZE * c.MAX_LENGTH,
        rows=c.BATCH_SIZE * c.GRADIENT_ACCUMULATION_STEPS,
        parts={},
        free=0,
        disk=0,
        kept=0,
        attention="sdpa",
        packing=False,
    )


def full_model(scripts: dict, c: SimpleNamespace):
    return scripts[SCRIPTS[2]].build_model(c, plan_of(c), torch.device("cpu"))


def token_row(ids: list[int], masked: int) -> dict:
    """A row as token_rows makes it: the loss on all but the first `masked` tokens."""
    return {"input_ids": ids, "labels": [-100] * masked + ids[masked:], "length": len(ids)}


@pytest.fixture(scope="module")
def uneven(tiny) -> Dataset:
    """Eleven rows of 4 to 180 tokens. Short ones are of tokens that the model finds likely, long ones are not, so that
    a mean over rows or over batches is far from the mean over tokens."""
    from transformers import AutoModelForCausalLM

    bias = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).lm_head.bias
    likely = bias.argsort(descending=True).tolist()
    draw = random.Random(0)
    lengths = [4, 150, 5, 180, 6, 4, 90, 7, 5, 60, 9]
    return Dataset.from_list(
        [token_row([draw.choice(likely[:20] if n < 20 else likely[-150:]) for _ in range(n)], n // 3) for n in lengths]
    )


def row_sums(folder: Path, rows: Dataset) -> list[tuple[float, int]]:
    """(nll, scored tokens) of each row, from plain transformers' logits, row by row and without padding."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums = []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0]
        labels = torch.tensor(row["labels"])
        nll = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        sums.append((nll.item(), int((labels[1:] != -100).sum())))
    return sums


def over_tokens(sums: list[tuple[float, int]]) -> float:
    return sum(nll for nll, _ in sums) / sum(tokens for _, tokens in sums)


# --- token-exact evaluation


def test_eval_loss_is_the_mean_over_tokens(scripts, tokenizer, tiny, uneven, tmp_path):
    from trl import SFTTrainer

    c, args = arguments(scripts, SCRIPTS[2], tmp_path, tiny)
    data = {"train_dataset": uneven, "eval_dataset": uneven, "processing_class": tokenizer}
    trainer = ExactTrainer(model=full_model(scripts, c), args=args, plan=plan_of(c), **data)
    sums = row_sums(tiny, uneven)
    expected = over_tokens(sums)
    for size in (1, 3, 8):
        trainer.args.per_device_eval_batch_size = size
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-5), size
        assert metrics["eval_tokens"] == sum(tokens for _, tokens in sums), size

    # the library's own number differs, so that this test would not pass without the override
    c, args = arguments(scripts, SCRIPTS[2], tmp_path, tiny)
    args.per_device_eval_batch_size = 1
    naive = SFTTrainer(model=full_model(scripts, c), args=args, **data)
    assert naive.evaluate()["eval_loss"] == pytest.approx(np.mean([nll / n for nll, n in sums]), abs=1e-3)
    assert abs(naive.evaluate()["eval_loss"] - expected) > 0.3


def test_best_checkpoint_is_chosen_over_tokens(scripts, tokenizer, tiny, uneven, tmp_path):
    """Trained on the short rows only, the mean over rows still falls where the mean over tokens rises."""
    short = uneven.filter(lambda n: n < 20, input_columns="length")
    c, args = arguments(
        scripts,
        SCRIPTS[2],
        tmp_path,
        tiny,
        MAX_STEPS=4,
        EVAL_STEPS=1.0,
        SAVE_STEPS=1.0,
        LEARNING_RATE=2e-3,
        SAVE_TOTAL_LIMIT=9,
        LR_SCHEDULER="constant",
    )
    data = {"train_dataset": short, "eval_dataset": uneven, "processing_class": tokenizer}
    trainer = ExactTrainer(model=full_model(scripts, c), args=args, plan=plan_of(c), **data)
    trainer.train()
    sums = {step: row_sums(tmp_path / f"checkpoint-{step}", uneven) for step in (1, 2, 3, 4)}
    exact = {step: over_tokens(rows) for step, rows in sums.items()}
    by_rows = {step: np.mean([nll / tokens for nll, tokens in rows]) for step, rows in sums.items()}
    best = min(exact, key=exact.get)
    assert min(by_rows, key=by_rows.get) != best  # else the two could not be told apart here
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best}"
    assert trainer.state.best_metric == pytest.approx(exact[best], abs=1e-5)
    logged = {r["step"]: r["eval_loss"] for r in trainer.state.log_history if "eval_loss" in r}
    assert [logged[step] for step in exact] == pytest.approx(list(exact.values()), abs=1e-5)
    # load_best_model_at_end: what is saved as the result is that checkpoint
    assert trainer.evaluate()["eval_loss"] == pytest.approx(exact[best], abs=1e-5)


# --- QLoRA


def qlora(scripts: dict, tokenizer, tiny: Path, rows: Dataset, folder: Path, trainer_class, **changed):
    """A trainer of script 2 over the tiny model in 4 bits, by bitsandbytes on the CPU."""
    script = scripts[SCRIPTS[1]]
    c, args = arguments(scripts, SCRIPTS[1], folder, tiny, **changed)
    model, adapter = script.build_model(c, plan_of(c), args.device), script.adapter_config(c)
    data = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer}
    data |= {"plan": plan_of(c)} if trainer_class is ExactTrainer else {}
    return trainer_class(model=model, args=args, peft_config=adapter, **data)


def test_qlora_trains_in_fp32(scripts, tokenizer, tiny, uneven, tmp_path):
    from bitsandbytes.nn import Linear4bit
    from trl import SFTTrainer

    trainer = qlora(scripts, tokenizer, tiny, uneven, tmp_path, ExactTrainer)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    linear = [module for module in trainer.model.modules() if isinstance(module, Linear4bit)]
    assert len(linear) == 2 * 6  # q, k, v, dense, fc1, fc2 of two layers
    assert len(trained) == 2 * len(linear) and all("lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}

    # TRL alone leaves bf16, in which a small update is lost
    alone = qlora(scripts, tokenizer, tiny, uneven, tmp_path, SFTTrainer)
    assert {p.dtype for p in alone.model.parameters() if p.requires_grad} == {torch.bfloat16}
    updated = torch.ones(1) + 1e-3
    assert updated.bfloat16() == 1 and updated.float() > 1


def test_evaluation_leaves_gradients_as_they_were(scripts, tokenizer, tiny, uneven, tmp_path):
    """bitsandbytes repacks 4-bit weights at the first evaluation on CPUs with avx512_bf16 (elsewhere this holds by
    itself): no gradient would come through to the first layer any more."""
    trainer = qlora(scripts, tokenizer, tiny, uneven, tmp_path, ExactTrainer, LORA_DROPOUT=0.0)
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name:  # B starts at zero, and A would have no gradient
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.02)
    batch = trainer.data_collator([uneven[i] for i in range(4)])

    def gradients() -> dict[str, torch.Tensor]:
        trainer.model.train()
        trainer.model.zero_grad()
        trainer.model(**batch).loss.backward()
        return {
            name: p.grad.clone()
            for name, p in trainer.model.named_parameters()
            if p.requires_grad and ".layers.0." in name
        }

    before = gradients()
    assert len(before) == 12 and all(g.abs().max() > 0 for g in before.values())
    trainer.evaluate()
    after = gradients()
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


# --- how much of phi-2 is trained


def test_lora_trains_under_one_percent_of_phi_2(phi_2):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    c = constants(SCRIPTS[1])
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=c.LORA_R,
        lora_alpha=c.LORA_ALPHA,
        lora_dropout=c.LORA_DROPOUT,
        target_modules=c.LORA_TARGET_MODULES,
    )
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(phi_2), config)
    trainable, total = model.get_nb_trainable_parameters()
    # r x (in + out) of each linear layer but the head: q, k, v, dense, fc1 and fc2, 32 times
    assert trainable == 32 * 16 * (4 * (2560 + 2560) + 2 * (2560 + 10240)) == 23_592_960
    assert total == 2_779_683_840 + trainable
    assert trainable / total < 0.01
    targets = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert targets == {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}


def test_parameter_count(phi_2, tiny):
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    def count(config) -> int:
        return Sizes(config, None, torch.float32, 8).total

    assert count(phi_2) == 2_779_683_840
    real = AutoModelForCausalLM.from_pretrained(tiny)
    assert count(AutoConfig.from_pretrained(tiny)) == sum(p.numel() for p in real.parameters())
    # a head that is the embedding is counted once
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    tied, free = (LlamaConfig(**shape, tie_word_embeddings=tie) for tie in (True, False))
    assert count(free) - count(tied) == 512 * 64


# --- labels


def rows_for(tokenizer, prepared: Path, part="train", limit=None, max_length=1024, fraction=0.2) -> Dataset:
    return token_rows(str(prepared / "data"), part, limit, tokenizer, max_length, fraction)


def test_labels_are_masked_by_position(tokenizer, prepared):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # else the test below could not fail
    rows, source = rows_for(tokenizer, prepared), handover.load_split(prepared / "data", "train")
    assert len(rows) == len(source)
    for row, original in zip(rows, source, strict=True):
        ids, labels = row["input_ids"], row["labels"]
        assert row["length"] == len(ids) == len(labels)
        prompt = tokenizer.apply_chat_template(original["prompt"], tokenize=False, add_generation_prompt=True)
        context = tokenizer(prompt, add_special_tokens=False).input_ids
        n = len(context)
        assert ids[:n] == context and labels[:n] == [-100] * n and labels[n:] == ids[n:]
        # the answer, then the token that ends it, once
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[n:-1]
        assert tokenizer.decode(ids[n:-1]).startswith(original["completion"][0]["content"])


def test_end_token_is_trained_although_it_pads(scripts, tokenizer, tiny, prepared, tmp_path):
    rows = rows_for(tokenizer, prepared, limit=8)
    c, args = arguments(scripts, SCRIPTS[2], tmp_path, tiny)
    data = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer}
    trainer = ExactTrainer(model=full_model(scripts, c), args=args, plan=plan_of(c), **data)
    batch = trainer.data_collator([rows[i] for i in range(8)])
    assert batch["input_ids"].shape[1] == max(rows["length"]) > min(rows["length"])
    for i, row in enumerate(rows):
        n = row["length"]
        assert batch["labels"][i, :n].tolist() == row["labels"]
        assert batch["labels"][i, n - 1] == tokenizer.eos_token_id
        assert (batch["labels"][i, n:] == -100).all() and (batch["attention_mask"][i, n:] == 0).all()
        assert (batch["attention_mask"][i, :n] == 1).all()  # a mask made from pad ids would hide the end
    # and the loss counts exactly these tokens
    scored = sum(sum(label != -100 for label in row["labels"]) for row in rows)
    _, _, tokens = trainer.prediction_step(trainer.model, batch, False)
    assert tokens.sum() == scored


def test_rows_that_do_not_fit_are_dropped_and_counted(tokenizer, prepared, capsys):
    everything = rows_for(tokenizer, prepared)
    longest = max(everything["length"])
    gone = sum(n == longest for n in everything["length"])
    capsys.readouterr()
    fitting = rows_for(tokenizer, prepared, max_length=longest - 1)
    assert f"rows: {gone} of 128 are longer than MAX_LENGTH={longest - 1} tokens" in capsys.readouterr().out
    # dropped, not cut: the others are what they were, up to and with their last token
    assert fitting["input_ids"] == [ids for ids in everything["input_ids"] if len(ids) < longest]
    assert fitting["labels"] == [r["labels"] for r in everything if r["length"] < longest]
    assert len(rows_for(tokenizer, prepared, max_length=longest)) == 128  # the bound itself fits


def test_too_many_rows_that_do_not_fit_end_the_run(tokenizer, prepared, capsys):
    lengths = sorted(rows_for(tokenizer, prepared)["length"])
    limit = lengths[64]
    gone = sum(n > limit for n in lengths)
    with pytest.raises(SystemExit) as stop:
        rows_for(tokenizer, prepared, max_length=limit)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"error: {gone} of 128 rows are longer than MAX_LENGTH={limit}" in said
    assert f"--max_length {lengths[-1]}" in said
    assert len(rows_for(tokenizer, prepared, max_length=limit, fraction=gone / 128)) == 128 - gone
    with pytest.raises(SystemExit):  # nothing left is an error whatever is allowed
        rows_for(tokenizer, prepared, max_length=lengths[0] - 1, fraction=1.0)


def test_validation_never_sees_the_test_part(tokenizer, prepared):
    source = handover.load_split(prepared / "data", "eval")
    assert set(source["part"]) == {"validation", "test"}
    wanted = [row for row in source if row["part"] == "validation"]
    expected = [sum(chat.encode(tokenizer, row["prompt"], row["completion"]), []) for row in wanted]
    assert rows_for(tokenizer, prepared, "validation")["input_ids"] == expected
    assert rows_for(tokenizer, prepared, "validation", limit=3)["input_ids"] == expected[:3]


# --- settings and machine


def problems(script: str = SCRIPTS[1], **changed) -> list[str]:
    return training_problems(vars(constants(script, **changed)))


def test_defaults_have_no_problems():
    assert problems() == problems(SCRIPTS[2]) == []
    assert problems(EVAL_STEPS=2.0, SAVE_STEPS=2.0) == problems(MAX_STEPS=1, LORA_R=1) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"EVAL_STEPS": 2.5, "SAVE_STEPS": 5.0}, "EVAL_STEPS is 2.5"),
        ({"EVAL_STEPS": 4.0, "SAVE_STEPS": 6.0}, "--save_steps 4.0"),
        ({"EVAL_STEPS": 0.1, "SAVE_STEPS": 10.0}, "must equal EVAL_STEPS"),
        ({"EVAL_STEPS": 10.0, "SAVE_STEPS": 5.0}, "must equal EVAL_STEPS"),
        ({"REPORT_TO": "tensorbord"}, "choose one of: tensorboard"),
        ({"REPORT_TO": "tensorboard,none"}, "none stands alone"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_are_refused(changed, said):
    found = problems(**changed)
    assert len(found) == 1 and said in found[0]


def test_settings_problems_come_together():
    assert len(problems(EVAL_STEPS=2.5, SAVE_STEPS=3.5, REPORT_TO="x")) == 3


@pytest.mark.parametrize(
    ("asked", "way"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "ZeRO-3"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds_config_zero3.json"}, "ZeRO-3"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
    ],
    ids=["zero_stage", "deepspeed_config_file", "fsdp"],
)
def test_what_a_split_model_cannot_do_is_refused(asked, way, monkeypatch):
    """However ZeRO-3 or FSDP was asked for: a 4-bit base, and merging the adapter."""
    assert problems() == []
    monkeypatch.chdir(ROOT / "configs")
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    (found,) = problems()
    assert f"{way} cannot split a 4-bit base" in found
    for out in ("configs/accelerate/ddp.yaml", "--zero_stage 2", "--use_4bit false"):
        assert out in found
    assert problems(USE_4BIT=False) == problems(SCRIPTS[2]) == []
    (found,) = problems(USE_4BIT=False, MERGE_ADAPTER=True)
    assert f"{way} splits it" in found and "--merge_adapter --resume true" in found


def test_zero_2_holds_whole_models(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    assert problems() == problems(MERGE_ADAPTER=True) == []
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "typo.json")
    (found,) = problems()
    assert "--deepspeed_config_file 'typo.json' is missing" in found


def test_deepspeed_config_is_looked_at(tmp_path, monkeypatch):
    assert problems(SCRIPTS[2], USE_DEEPSPEED=True) == []
    (found,) = problems(SCRIPTS[2], USE_DEEPSPEED=True, DEEPSPEED_CONFIG="configs/ds_typo.json")
    assert "'configs/ds_typo.json' is missing" in found and "configs/ds_config.json" in found
    assert problems(SCRIPTS[2], DEEPSPEED_CONFIG="configs/ds_typo.json") == []  # not used, so not looked at
    broken = tmp_path / "ds.json"
    broken.write_text('{"zero_optimization": {"stage": 2,}}')
    (found,) = problems(SCRIPTS[2], USE_DEEPSPEED=True, DEEPSPEED_CONFIG=str(broken))
    assert "ds.json" in found and "JSON" in found
    (found,) = problems(SCRIPTS[2], USE_DEEPSPEED=True, DEEPSPEED_CONFIG=str(tmp_path))  # a folder
    assert str(tmp_path) in found
    monkeypatch.setenv("PATH", str(tmp_path))  # a machine without the CUDA toolkit
    offload = {"USE_DEEPSPEED": True, "DEEPSPEED_CONFIG": "configs/ds_config_offload.json"}
    (found,) = problems(SCRIPTS[2], **offload)
    assert "nvcc is not there" in found
    nvcc = write_rows(tmp_path / "nvcc", [])
    nvcc.chmod(0o755)
    assert problems(SCRIPTS[2], **offload) == []


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RANK", raising=False)


def smi(folder: Path, script: str) -> None:
    """An executable `nvidia-smi` that runs a shell script: no test machine has a GPU that torch misses."""
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_gpu_that_torch_does_not_see_is_named(without_gpu, monkeypatch, tmp_path):
    smi(tmp_path, 'echo "GPU 0: NVIDIA H200 (UUID: GPU-1234)"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.version, "cuda", None)
    (found,) = device.machine_problems()
    assert "GPU 0: NVIDIA H200" in found and torch.__version__ in found
    assert "install a CUDA build" in found and "CUDA_VISIBLE_DEVICES=" in found
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (found,) = device.machine_problems()
    assert "driver is too old for its CUDA 13.0" in found
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert device.machine_problems() == []


@pytest.mark.parametrize("script", ["echo 'No devices were found'", "echo 'GPU 0: lost'; exit 9", None])
def test_a_machine_without_a_gpu_is_fine(without_gpu, monkeypatch, tmp_path, script):
    if script:
        smi(tmp_path, script)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if script else str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert device.machine_problems() == []


def test_two_gpus_under_plain_python_name_both_commands(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("sys.argv", ["2_lora_finetuning.py", "--num_epochs", "1"])
    monkeypatch.delenv("RANK", raising=False)
    (found,) = device.machine_problems()
    assert "CUDA_VISIBLE_DEVICES=0 python 2_lora_finetuning.py" in found
    assert "accelerate launch --num_processes 2 2_lora_finetuning.py" in found
    monkeypatch.setenv("RANK", "0")  # a launcher started it
    assert device.machine_problems() == []
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device.machine_problems() == []


@pytest.mark.parametrize("lacks, there", [("C compiler", ()), ("Python.h", ("gcc",)), (None, ("clang", "header"))])
def test_what_triton_would_miss_is_said_before_the_run(monkeypatch, tmp_path, lacks, there):
    """Where Triton is installed, the first step on a GPU compiles the head: with a C compiler and Python's headers."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(device.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    for name in there:
        path = tmp_path / ("Python.h" if name == "header" else name)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    found = device.machine_problems()
    assert len(found) == (1 if lacks else 0)
    if lacks:
        assert f"there is no {lacks}" in found[0] and "sudo apt install gcc python3-dev" in found[0]


def test_precision_is_what_the_hardware_has(monkeypatch):
    assert device.precision("fp16")[0] == torch.float16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert device.precision("auto")[0] == (torch.bfloat16 if has else torch.float32)
    # an older GPU emulates bf16, and torch says that it supports it unless asked
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert device.precision("auto")[0] == torch.float16


SETTINGS = {"LEARNING_RATE": 2e-4, "BATCH_SIZE": 4, "LOGGING_STEPS": 10, "RESUME": "auto"}


# --- the log


def test_a_nan_ends_the_run_and_stays_readable(tiny, tmp_path):
    """NaN is no JSON: it is written as text, and the run stops at the step that showed it."""
    from transformers import TrainerControl, TrainerState, TrainingArguments

    manifest = {"manifest_sha256": "abc", "source": "rows.jsonl"}
    settings = {**SETTINGS, "MODEL_NAME": str(tiny), "OUTPUT_DIR": str(tmp_path)}
    rows = {"train_rows": 1, "eval_rows": 1}
    plan = plan_of(constants(SCRIPTS[1]))
    log = RunLog("lora", settings, plan, manifest, rows, Start({}))
    state = TrainerState(is_world_process_zero=True, global_step=3, best_model_checkpoint="out/checkpoint-2")
    state.log_history = [{"loss": 2.0, "step": 2}, {"loss": math.nan, "step": 3}]
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(FloatingPointError, match="loss is nan at step 3; last good checkpoint: out/checkpoint-2"):
        log.on_log(arguments, state, TrainerControl(), logs=state.log_history[-1])
    written = json.loads((tmp_path / "training_log.json").read_text())
    assert written["summary"]["status"] == "failed"
    assert written["summary"]["train_loss"] == 2.0
    assert [record["loss"] for record in written["history"]] == [2.0, "nan"]


def test_a_log_that_takes_long_is_not_written_at_every_step(tiny, tmp_path):
    from transformers import TrainerState

    settings = {**SETTINGS, "MODEL_NAME": str(tiny), "OUTPUT_DIR": str(tmp_path)}
    rows, plan = {"train_rows": 1, "eval_rows": 1}, plan_of(constants(SCRIPTS[1]))
    log = RunLog("lora", settings, plan, {"manifest_sha256": "abc"}, rows, Start({}))
    path, state = tmp_path / "training_log.json", TrainerState(is_world_process_zero=True)
    log.write(state, "running")
    log.written = (time.monotonic(), 5.0)  # writing took five seconds
    path.unlink()
    log.write(state, "running")
    assert not path.exists()
    log.write(state, "done")  # but how it ends is always written
    assert json.loads(path.read_text("utf-8"))["summary"]["status"] == "done"


# --- refused before anything is trained


def test_data_that_are_not_there_name_step_1(tiny, tmp_path):
    result = run(SCRIPTS[1], "--model_name", tiny, cwd=tmp_path)
    (error,) = refused(result, "data/manifest.json is missing", "python 1_prepare_dataset.py")
    assert "data is empty" in error
    assert not (tmp_path / "outputs").exists()


def test_all_problems_come_at_once(tmp_path):
    (tmp_path / "model").mkdir()
    result = run(SCRIPTS[2], "--model_name", "model", "--batch_size", "0", cwd=tmp_path)
    errors = refused(result, "MODEL_NAME 'model' is not a model folder", "config.json is missing")
    assert len(errors) == 2 and "BATCH_SIZE is 0" in errors[0]


def test_max_length_beyond_the_models_positions_is_refused(tiny, prepared):
    result = run(SCRIPTS[1], "--model_name", tiny, "--max_length", "4096", "--output_dir", "out", cwd=prepared)
    refused(result, "MAX_LENGTH is 4096", "has only 2048 positions: --max_length 2048")
