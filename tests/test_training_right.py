"""Training that is right: what the loss, the weights and the saved folders must not depend on."""

import copy
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SCRIPTS, SHORT, load_script, ok, refused, run
from datasets import Dataset
from hub import tiny_phi
from peft import AutoPeftModelForCausalLM, PeftModel
from test_training import arguments, constants, full_model, plan_of, token_row
from transformers import AutoModelForCausalLM
from trl import SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from configs import device
from configs.training import trainer as trainer_module
from configs.training.memory import Plan, Sizes, make_plan, packing
from configs.training.resume import Start
from configs.training.runlog import RunLog, overfitting
from configs.training.runlog import run as run_training
from configs.training.trainer import ExactTrainer

LORA, FULL = SCRIPTS[1], SCRIPTS[2]


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    """A tiny model whose head is its embedding."""
    return tiny_phi(tmp_path_factory.mktemp("tied") / "tied", tied=True)


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """Sixteen rows of 6 to 60 tokens."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 60, (16,), generator=draw).tolist()
    return Dataset.from_list(
        [token_row(torch.randint(1, 400, (n,), generator=draw).tolist(), n // 3) for n in lengths]
    )


def trainer_of(scripts, script, folder, model, rows, tokenizer, **changed):
    """An ExactTrainer of a script over a tiny model, fp32, without dropout."""
    changed = {"LORA_DROPOUT": 0.0, **changed} if script == LORA else changed
    c, args = arguments(scripts, script, folder, model, **changed)
    return ExactTrainer(
        model=scripts[script].build_model(c, plan_of(c), args.device),
        args=args,
        plan=plan_of(c),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        peft_config=scripts[script].adapter_config(c),
    )


def losses_of(trainer) -> list[float]:
    trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


# --- the loss


@pytest.mark.parametrize("script", [LORA, FULL])
def test_the_loss_does_not_depend_on_how_a_step_is_cut_up(scripts, tokenizer, tiny, rows, tmp_path, script):
    """8 x 1, 2 x 4 and 1 x 8 rows: the same four steps. A mean of per-batch means would differ in the third digit."""
    found = {}
    for batch in (8, 2, 1):
        # the Trainer adds up the micro-batches' losses in fp32, and they are logged with all their digits
        shape = {"BATCH_SIZE": batch, "GRADIENT_ACCUMULATION_STEPS": 8 // batch}
        made = {**shape, "MAX_STEPS": 4, "LOGGING_STEPS": 1, "EVAL_STEPS": 4, "SAVE_STEPS": 4, "USE_4BIT": False}
        made = made if script == LORA else {k: v for k, v in made.items() if k != "USE_4BIT"}
        trainer = trainer_of(scripts, script, tmp_path / str(batch), tiny, rows, tokenizer, **made)
        found[batch] = losses_of(trainer)
    assert len(found[8]) == 4
    for batch in (2, 1):
        assert found[batch] == pytest.approx(found[8], rel=1e-5)


def test_the_loss_does_not_depend_on_packing_or_padding(tiny, rows):
    """Packed rows, padded rows and single ones have the same nll: no row sees another one, no position is shifted."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    plain = rows.remove_columns("length")
    packed = pack_dataset(plain, 128, "bfd")
    assert len(packed) < len(rows)

    def nll(some: Dataset, size: int, free: bool) -> float:
        collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=free)
        total = 0.0
        for start in range(0, len(some), size):
            batch = collate([some[i] for i in range(start, min(start + size, len(some)))])
            labels = batch.pop("labels")
            with torch.no_grad():
                logits = model(**batch, use_cache=False).logits
            total += torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            ).item()
        return total

    alone = nll(plain, 1, False)
    assert nll(plain, 16, False) == pytest.approx(alone, rel=1e-5)
    assert nll(packed, 1, True) == pytest.approx(alone, rel=1e-5)


def test_packing_only_where_attention_keeps_rows_apart(capsys):
    assert packing("auto", "sdpa")[0] is False
    assert packing("auto", "flash_attention_2")[0] is True
    assert packing("auto", "flex_attention")[0] is True
    assert packing(False, "flash_attention_2")[0] is False
    with pytest.raises(SystemExit) as end:
        packing(True, "sdpa")
    assert end.value.code == 2 and "--packing auto" in capsys.readouterr().err


# --- running out of memory


@pytest.mark.parametrize("script", [LORA, FULL])
def test_a_step_that_runs_out_of_memory_comes_again_in_halves(
    scripts, tokenizer, tiny, rows, tmp_path, monkeypatch, script, capsys
):
    """Simulated: a forward pass of more than 150 tokens raises, but the first, and after its backward pass has begun
    to add to the gradients. The losses are those of a machine with enough memory."""
    shape = {"BATCH_SIZE": 8, "GRADIENT_ACCUMULATION_STEPS": 2, "MAX_STEPS": 3, "LOGGING_STEPS": 1}
    monkeypatch.setattr(trainer_module, "PASS_COST", 512)  # few, large passes, as on a GPU
    shape |= {"EVAL_STEPS": 3, "SAVE_STEPS": 3}
    enough = losses_of(trainer_of(scripts, script, tmp_path / "enough", tiny, rows, tokenizer, **shape))
    trainer = trainer_of(scripts, script, tmp_path / "short", tiny, rows, tokenizer, **shape)
    real, sizes = SFTTrainer.training_step, []

    def step(self, model, inputs, num_items_in_batch=None):
        sizes.append(inputs["input_ids"].numel())
        loss = real(self, model, inputs, num_items_in_batch)
        if sizes[-1] > 150:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss

    monkeypatch.setattr(SFTTrainer, "training_step", step)
    assert losses_of(trainer) == pytest.approx(enough, rel=1e-5)
    first = sizes[0]
    assert first > 400 and [n for n in sizes if n > 150] == [first, sizes[1], sizes[2]][: sum(n > 150 for n in sizes)]
    assert trainer.budget <= 150 < 2 * trainer.budget + 150
    said = capsys.readouterr().out
    assert f"out of memory with {first:,} tokens a pass: now this step again with {first // 2:,}" in said


def full(*args, **kwargs):
    """Raises what CUDA raises when memory has run out."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def out_of_memory(trainer, capsys) -> str:
    """What a run of script 3 says on stderr that must end because memory has run out."""
    head = {"settings": vars(constants(FULL)), "environment": {}, "identity": {}, "plan": {}}
    log = SimpleNamespace(write=lambda *a: None, prompts=[], answers=[], signal=None, head=head, start=Start({}))
    log.progress = SimpleNamespace(close=lambda: None)
    with pytest.raises(SystemExit) as end:
        run_training(trainer, log)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_an_evaluation_that_does_not_fit_is_not_taken_for_a_step(
    scripts, tokenizer, tiny, rows, tmp_path, monkeypatch, capsys
):
    trainer = trainer_of(scripts, FULL, tmp_path, tiny, rows, tokenizer, EVAL_STEPS=1, SAVE_STEPS=1)
    monkeypatch.setattr(ExactTrainer, "prediction_step", full)
    said = out_of_memory(trainer, capsys)
    assert "an evaluation does not fit beside the training" in said and "--device_memory_gb" in said


def test_one_row_that_does_not_fit_names_the_settings(scripts, tokenizer, tiny, rows, tmp_path, monkeypatch, capsys):
    trainer = trainer_of(scripts, FULL, tmp_path, tiny, rows, tokenizer, EVAL_STEPS=1, SAVE_STEPS=1)
    monkeypatch.setattr(SFTTrainer, "training_step", full)
    said = out_of_memory(trainer, capsys)
    assert "a pass of a single row does not fit" in said and "--max_length 512" in said
    assert "--gradient_checkpointing true" in said and "2_lora_finetuning.py" in said


def test_an_optimizer_step_that_does_not_fit_is_not_helped_by_smaller_passes(
    scripts, tokenizer, tiny, rows, tmp_path, monkeypatch, capsys
):
    trainer = trainer_of(scripts, FULL, tmp_path, tiny, rows, tokenizer, EVAL_STEPS=1, SAVE_STEPS=1)
    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    said = out_of_memory(trainer, capsys)
    assert "the optimizer's step does not fit" in said
    assert "--optim adamw_bnb_8bit" in said and "max_length" not in said


def test_what_cannot_be_replayed_is_not(scripts, tokenizer, tiny, rows, tmp_path, monkeypatch, capsys):
    """DeepSpeed has counted the passes that went well: no step is taken again."""
    trainer = trainer_of(scripts, FULL, tmp_path, tiny, rows, tokenizer, BATCH_SIZE=4, EVAL_STEPS=1, SAVE_STEPS=1)
    passes = []

    def step(self, model, inputs, num_items_in_batch=None):
        passes.append(len(inputs["input_ids"]))
        self.is_deepspeed_enabled = True  # from here on, as a DeepSpeed run is
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(SFTTrainer, "training_step", step)
    said = out_of_memory(trainer, capsys)
    assert len(passes) == 1
    assert "DeepSpeed cannot take a step again" in said and "--device_memory_gb" in said


# --- adapters: as trained, as saved, as merged


@pytest.mark.parametrize("four_bit", [True, False], ids=["4-bit", "16-bit"])
@pytest.mark.parametrize("kind", ["biased head", "tied"])
def test_trained_reloaded_and_merged_adapters_agree(scripts, tokenizer, tiny, tied, rows, tmp_path, four_bit, kind):
    """Logits of the trainer's model, of the saved adapter and of the merged one: over the same base the same
    numbers."""
    model = tiny if kind == "biased head" else tied
    names = {"USE_4BIT": four_bit, "MAX_STEPS": 4, "LEARNING_RATE": 1e-2, "EVAL_STEPS": 4, "SAVE_STEPS": 4}
    trainer = trainer_of(scripts, LORA, tmp_path, model, rows, tokenizer, **names)
    base_before = {n: p.clone() for n, p in trainer.model.named_parameters() if "lora_" not in n}
    trainer.train()
    for name, p in trainer.model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, base_before[name]), name  # byte-identical
    ids = torch.tensor([rows[0]["input_ids"]])

    def logits(some) -> torch.Tensor:
        with torch.no_grad():
            return some.eval()(input_ids=ids, use_cache=False).logits.float()

    trained = logits(trainer.model)
    trainer.save_model(str(tmp_path / "adapter"))
    c = constants(LORA, MODEL_NAME=str(model), USE_4BIT=four_bit)
    base = scripts[LORA].build_model(c, plan_of(c), torch.device("cpu"))
    device.keep_4bit_layout(base)
    reloaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert torch.allclose(logits(reloaded), trained, atol=1e-5)
    # and it has learned: a base without the adapter says something else
    with reloaded.disable_adapter():
        assert not torch.allclose(logits(reloaded), trained, atol=1e-2)
    full_width = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    merged = PeftModel.from_pretrained(full_width, str(tmp_path / "adapter")).merge_and_unload()
    close = torch.allclose(logits(merged), trained, atol=1e-4)
    assert close is not four_bit  # over 4 bits the rounding of the base is the difference, and nothing else
    if four_bit:
        same = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        over_16 = PeftModel.from_pretrained(same, str(tmp_path / "adapter"))
        assert torch.allclose(logits(merged), logits(over_16), atol=1e-4)
    if kind == "tied":
        assert merged.get_output_embeddings().weight.data_ptr() == merged.get_input_embeddings().weight.data_ptr()


def test_dora_and_rslora_reach_the_library(scripts):
    adapter = scripts[LORA].adapter_config(constants(LORA, USE_DORA=True, USE_RSLORA=True, LORA_R=8))
    assert (adapter.use_dora, adapter.use_rslora, adapter.r, adapter.target_modules) == (True, True, 8, "all-linear")


# --- bf16 weights


def test_bf16_weights_learn_with_stochastic_rounding_and_stall_without(tiny, rows):
    """60 steps at 5e-5 on one batch: torchao's 8-bit AdamW with stochastic rounding follows fp32; plain bf16 does not,
    because an update of 5e-5 vanishes beside a weight above 0.0128 (bf16 has 8 bits of
    mantissa)."""
    from torchao.optim import AdamW8bit

    ids = torch.tensor([row["input_ids"][:6] for row in rows])

    def loss_after(dtype: torch.dtype, optimizer) -> float:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype)
        for parameter in model.parameters():  # the tiny model's weights are smaller than a trained model's
            parameter.data *= 4
        steps = optimizer(model.parameters(), lr=5e-5, weight_decay=0.0)
        for _ in range(60):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            steps.step()
            steps.zero_grad()
        with torch.no_grad():
            return model.float()(input_ids=ids, labels=ids, use_cache=False).loss.item()

    start = loss_after(torch.float32, lambda p, lr, weight_decay: torch.optim.SGD(p, lr=0.0))
    exact = start - loss_after(torch.float32, torch.optim.AdamW)
    plain = start - loss_after(torch.bfloat16, torch.optim.AdamW)
    rounded = start - loss_after(torch.bfloat16, lambda p, **k: AdamW8bit(p, **k, bf16_stochastic_round=True))
    assert exact > 0.05
    assert rounded > 0.8 * exact
    assert plain < 0.6 * exact


# --- precision


def test_a_leftover_accelerate_configuration_is_named_and_not_obeyed(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    device.own_precision(torch.float32)
    assert "'fp16'" in capsys.readouterr().out
    import os

    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no"
    device.own_precision(torch.float32)
    assert capsys.readouterr().out == ""


def test_fp16_attention_is_computed_in_fp32():
    """Queries and keys whose products exceed 65,504, as phi-2's do: plain fp16 attention has no number for them."""
    assert device.attention(torch.float16) == "sdpa_fp32"
    query = torch.full((1, 2, 4, 64), 60.0, dtype=torch.float16)
    key = torch.full((1, 2, 4, 64), 60.0, dtype=torch.float16)
    value = torch.randn(1, 2, 4, 64).half()
    assert not torch.isfinite(query @ key.transpose(-1, -2)).all()
    module = SimpleNamespace(is_causal=True, training=False)
    out, _ = device.sdpa_fp32(module, query, key, value, None, scaling=1.0)
    assert out.dtype == torch.float16 and torch.isfinite(out).all()
    assert torch.allclose(out[0, 0], value[0, :, 0], atol=1e-3)  # the first token sees itself alone


# --- the memory plan


@pytest.fixture(scope="module")
def shapes(tmp_path_factory, phi_2) -> dict[str, Path]:
    """Folders that hold the configuration of a big model and nothing else: the plan needs no weights."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("shapes")
    phi_2.save_pretrained(folder / "phi-2")
    LlamaConfig(max_position_embeddings=4096, dtype="float16").save_pretrained(folder / "llama-7b")
    return {path.name: path for path in folder.iterdir()}


def planned(shapes, script: str, name: str, gigabytes: float, before: dict | None = None, **changed) -> Plan:
    from transformers import AutoConfig

    c = constants(script, MODEL_NAME=str(shapes[name]), DEVICE_MEMORY_GB=gigabytes, PLAN_ONLY=True, **changed)
    config = AutoConfig.from_pretrained(shapes[name])
    adapter = load_script(script).adapter_config(c)
    return make_plan(c, config, c.MAX_LENGTH, adapter, before)


def test_the_plan_climbs_its_ladder(shapes, capsys):
    """phi-2 in full: with memory to spare as it is, then each choice in its order. The sums are those of the
    papers."""
    big = planned(shapes, FULL, "phi-2", 200)
    assert (big.checkpointing, big.optim, big.half_weights) == (False, "adamw_torch_fused", False)
    assert big.tokens == 16 * 1024  # all rows of a step in one pass
    assert big.total <= 0.85 * big.free  # more than was asked for only with room to spare
    count = 2_779_683_840
    assert big.parts["weights"] == big.parts["gradients"] == 4 * count and big.parts["optimizer"] == 8 * count
    seen = [big]
    for gigabytes in (57, 40, 24):
        seen.append(planned(shapes, FULL, "phi-2", gigabytes))
    assert [plan.checkpointing for plan in seen[1:]] == [True] * 3
    assert [plan.optim for plan in seen[1:]] == ["adamw_torch_fused", "adamw_bnb_8bit", "adamw_torch_8bit"]
    assert [plan.half_weights for plan in seen] == [False, False, False, True]
    fixed = [sum(plan.parts[name] for name in ("weights", "gradients", "optimizer")) for plan in seen[2:]]
    # 28.6 GB, with bitsandbytes' 32-bit states for the embedding's 51,200 x 2,560 weights, and 16.7 GB
    assert fixed == [10 * count + 6 * 51_200 * 2_560, 6 * count]
    # three checkpoints of fp32 weights and two moments are 100 GB; the final model has 16 bits
    assert big.disk == 3 * 12 * count + 2 * count and seen[3].disk == 3 * 4 * count + 2 * count
    for plan in seen:
        assert plan.total <= plan.free and plan.rows == 16 and plan.tokens >= 1024
    assert "stochastic rounding" in capsys.readouterr().out


def test_the_disk_is_for_the_checkpoints_that_a_run_makes(shapes):
    count = 2_779_683_840
    one = planned(shapes, FULL, "phi-2", 200, MAX_STEPS=20, EVAL_STEPS=20.0, SAVE_STEPS=20.0)
    assert one.disk == 12 * count + 2 * count
    assert planned(shapes, FULL, "phi-2", 200, EVAL_STEPS=0.5, SAVE_STEPS=0.5).disk == 2 * 12 * count + 2 * count


def test_qlora_of_phi_2_fits_8_gb_and_of_llama_12(shapes):
    plan = planned(shapes, LORA, "phi-2", 8)
    assert plan.total <= 8e9 and plan.rows == 16 and plan.tokens >= 1024
    assert planned(shapes, LORA, "llama-7b", 12).total <= 12e9


def test_a_run_that_goes_on_keeps_its_plan(shapes, capsys):
    """Its checkpoint holds that optimizer's states, for those weights: with more memory, and with less."""
    first = planned(shapes, FULL, "phi-2", 24)
    again = planned(shapes, FULL, "phi-2", 200, first.as_dict())
    assert again.as_dict() == first.as_dict()
    capsys.readouterr()
    less = planned(shapes, FULL, "phi-2", 19.5, first.as_dict())
    assert (less.optim, less.half_weights, less.precision) == (first.optim, True, "bf16")
    assert 1024 <= less.tokens < first.tokens and less.total <= less.free
    assert f"{less.tokens:,} tokens a pass instead of {first.tokens:,}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        planned(shapes, FULL, "phi-2", 12, first.as_dict())
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("error:") == 1
    assert "the interrupted run was trained with adamw_torch_8bit and bf16" in said and "--resume false" in said
    with pytest.raises(SystemExit):
        planned(shapes, FULL, "phi-2", 200, {**first.as_dict(), "attention": "flash_attention_2"})
    assert "computed attention with flash_attention_2" in capsys.readouterr().err


def test_the_plan_of_deepspeed_is_what_deepspeed_holds(shapes, monkeypatch):
    """A 16-bit model with fp32 masters beside; no 8-bit states, no stochastic rounding (computed, not measured)."""
    count = 2_779_683_840
    one = planned(shapes, FULL, "phi-2", 200, USE_DEEPSPEED=True)
    assert (one.optim, one.half_weights) == ("adamw_torch_fused", False)
    assert one.parts["weights"] == one.parts["gradients"] == 2 * count
    assert one.parts["fp32 masters"] == one.parts["optimizer"] == 8 * count and one.parts["16-bit copies"] == 0
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(device, "launched", lambda: False)  # no other process is there to ask
    zero2 = planned(shapes, FULL, "phi-2", 200, USE_DEEPSPEED=True)
    assert zero2.parts["weights"] == 2 * count and zero2.parts["gradients"] == 2 * count // 4
    assert zero2.parts["optimizer"] == zero2.parts["fp32 masters"] == 2 * count
    zero3 = {"USE_DEEPSPEED": True, "DEEPSPEED_CONFIG": "configs/ds_config_zero3.json"}
    assert planned(shapes, FULL, "phi-2", 200, **zero3).parts["weights"] == 2 * count // 4
    offload = {"USE_DEEPSPEED": True, "DEEPSPEED_CONFIG": "configs/ds_config_offload.json"}
    parts = planned(shapes, FULL, "phi-2", 200, **offload).parts
    assert parts["optimizer"] == parts["fp32 masters"] == 0
    assert zero2.share == 4 and zero2.tokens == 4 * 1024  # a quarter of a step's 16 rows


def test_what_does_not_fit_is_refused_with_what_would(shapes, capsys):
    with pytest.raises(SystemExit) as end:
        planned(shapes, FULL, "phi-2", 8)
    assert end.value.code == 2
    said = capsys.readouterr()
    assert "memory plan, full, passes of up to 1,024 tokens" in said.out
    for words in ("8.00 GB are free", "LoRA over 4 bits", "2_lora_finetuning.py", "a smaller model"):
        assert words in said.err, said.err


def test_a_setting_that_was_given_is_kept(shapes):
    plan = planned(shapes, FULL, "phi-2", 200, GRADIENT_CHECKPOINTING=True, OPTIM="sgd")
    assert plan.checkpointing and plan.optim == "sgd" and plan.parts["optimizer"] == 0


@pytest.mark.parametrize("wanted", ["nonsense", "[]", "(((", "q_proj,nonsense"])
def test_target_modules_that_fit_nothing_name_those_that_are_there(shapes, capsys, wanted):
    from configs.settings import read_constants

    value = read_constants(Path(load_script(LORA).__file__))["LORA_TARGET_MODULES"].parse(wanted, "--flag")
    with pytest.raises(SystemExit) as end:
        planned(shapes, LORA, "phi-2", 80, LORA_TARGET_MODULES=value)
    assert end.value.code == 2
    assert "q_proj" in (said := capsys.readouterr().err) and "all-linear" in said


@pytest.mark.parametrize("fixed", [{"GRADIENT_CHECKPOINTING": False}, {"OPTIM": "adamw_torch_fused"}])
def test_what_would_fit_does_fit(shapes, capsys, fixed):
    """The ways out hold the settings that were given, and offer to leave them to the plan."""
    with pytest.raises(SystemExit):
        planned(shapes, FULL, "phi-2", 20, **fixed)
    said = capsys.readouterr().err
    assert "--gradient_checkpointing auto --optim auto" in said
    if shorter := re.search(r"--max_length (\d+)", said):
        plan = planned(shapes, FULL, "phi-2", 20, MAX_LENGTH=int(shorter[1]), **fixed)
        assert plan.total <= plan.free
    billions = float(re.search(r"of about ([\d.]+) billion", said)[1])
    assert billions < 2.78


def test_activations_are_those_that_autograd_keeps(scripts, tokenizer, tiny, tmp_path):
    """The plan's count against real tensors: what a real forward pass of the real model keeps, within 5 %."""
    from transformers import AutoConfig

    c = constants(FULL, MODEL_NAME=str(tiny))
    sizes = Sizes(AutoConfig.from_pretrained(tiny), None, torch.float32, 96)
    model = full_model(scripts, c).train()
    device.fuse_gelu(model)  # as the trainer does
    own = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=torch.ones(1, 96, dtype=torch.long), use_cache=False)
    real = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    assert sizes.layers * sizes.layer + sizes.fixed == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("script", [LORA, FULL])
def test_plan_only_needs_no_data_no_weights_and_no_gpu(shapes, tmp_path, script):
    flags = ["--model_name", shapes["phi-2"], "--plan_only", "--device_memory_gb", "80"]
    said = ok(run(script, *flags, cwd=tmp_path))
    for words in ("memory plan", "weights", "gradients", "optimizer", "activations", "logits", "disk"):
        assert words in said
    assert list(tmp_path.iterdir()) == []
    if script == FULL:
        refused(run(script, *flags[:-1], "8", cwd=tmp_path), "LoRA over 4 bits")


# --- what is said before and while it runs


def test_the_preflight_shows_a_row_and_the_counts(prepared, tiny, tmp_path):
    import shutil

    work = shutil.copytree(prepared, tmp_path / "work")
    said = ok(run(FULL, "--model_name", tiny, *SHORT, "--early_stopping_patience", "3", cwd=work))
    shown = said[said.index("trained between the brackets") :]
    assert "<|im_start|>assistant\n⟦" in shown and "<|endoftext|>⟧" in shown
    assert "128 rows of" in said and "padding; 16 rows to validate; 4 steps of 4 rows, 1 of them warm-up" in said
    assert "packing off: sdpa does not keep packed rows apart" in said
    log = json.loads((work / "outputs/full_model/training_log.json").read_text(encoding="utf-8"))
    assert log["plan"]["planned_bytes"] == sum(log["plan"]["parts"].values())
    assert log["summary"]["peak_memory_bytes"] > 0
    assert [note.partition(":")[0] for note in log["notes"]] == ["the base hardly knows the language of the answers"]
    first = log["history"][0]
    assert first["step"] == 0 and math.isfinite(first["eval_loss"])  # the loss before training
    assert all("tokens_per_second" in record for record in log["history"] if "loss" in record)
    assert (work / "outputs/full_model/training_curves.png").read_bytes()[:4] == b"\x89PNG"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(work / "outputs/full_model/runs")).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "eval/loss", "train/learning_rate", "train/grad_norm"} <= scalars
    assert {"train/tokens_per_second", "train/memory_gb", "hparam/loss", "hparam/eval_loss"} <= scalars
    assert "sample answers/text_summary" in events.Tags()["tensors"]
    assert "_hparams_/session_start_info" in events.summary_metadata or "_hparams_" in str(events.summary_metadata)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--max_steps", "1", "--warmup_ratio", "0.5"], "of them warm-up"),
        (["--max_train_samples", "3"], "one optimizer step takes 2 x 2 = 4 rows"),
        (["--early_stopping_patience", "0"], "EARLY_STOPPING_PATIENCE is 0"),
        (["--packing", "true"], "--packing auto"),
    ],
    ids=["warm-up", "batch", "patience", "packing"],
)
def test_a_run_that_could_not_learn_is_refused(prepared, tiny, tmp_path, flags, said):
    import shutil

    work = shutil.copytree(prepared, tmp_path / "work")
    assert len(refused(run(FULL, "--model_name", tiny, *SHORT, *flags, cwd=work), said)) == 1
    assert not (work / "outputs/full_model/training_log.json").exists()


def records(*pairs: tuple[float, float]) -> list[dict]:
    """A history in which each evaluation follows a training loss: (loss, eval_loss)."""
    history = []
    for n, (loss, evaluated) in enumerate(pairs, 1):
        history += [{"loss": loss, "epoch": n / 2}, {"eval_loss": evaluated, "epoch": n / 2}]
    return history


def test_overfitting_is_said_with_the_epoch_where_it_began():
    rising = records((3.0, 2.5), (2.0, 2.0), (1.5, 2.1), (1.0, 2.3))
    assert "since epoch 1.00" in overfitting(rising)
    assert overfitting(rising[:-2]) is None  # one evaluation is no trend
    assert overfitting(records((3.0, 2.5), (2.0, 2.0), (1.5, 2.1), (1.0, 2.05))) is None
    assert overfitting(records((3.0, 2.5), (2.0, 2.0), (2.1, 2.1), (2.2, 2.3))) is None  # both rise


def test_a_loss_of_zero_ends_the_run(scripts, tokenizer, tiny, rows, tmp_path):
    from transformers import TrainerControl, TrainerState

    c = constants(LORA, OUTPUT_DIR=str(tmp_path), MODEL_NAME=str(tiny))
    counts = {"train_rows": 1, "eval_rows": 1}
    log = RunLog("lora", vars(c), plan_of(c), {"manifest_sha256": "x"}, counts, Start({}))
    args = SimpleNamespace(world_size=1)
    log.on_log(args, TrainerState(), TrainerControl(), {"loss": 1.0})
    with pytest.raises(FloatingPointError, match="loss is 0"):
        log.on_log(args, TrainerState(), TrainerControl(), {"loss": 0.0})


def test_four_bits_fall_back_with_one_line(monkeypatch, capsys):
    assert device.four_bit(True) is True and device.four_bit(False) is False
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    assert device.four_bit(True) is False
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("devices, able", [({"cuda", "mps"}, True), ({"cuda"}, False)])
def test_four_bits_on_an_apple_gpu_are_what_bitsandbytes_has(monkeypatch, devices, able):
    import bitsandbytes

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", devices)
    assert device.four_bit(True) is able


@pytest.mark.slow
def test_merge_adapter_writes_a_model_that_plain_transformers_load(prepared, tiny, tmp_path):
    import shutil

    work = shutil.copytree(prepared, tmp_path / "work")
    said = ok(run(LORA, "--model_name", tiny, *SHORT, "--merge_adapter", "--learning_rate", "1e-2", cwd=work))
    assert "merged: outputs/lora_model/merged_model" in said
    log = json.loads((work / "outputs/lora_model/training_log.json").read_text(encoding="utf-8"))
    merge, folder = log["merge"], work / "outputs/lora_model/merged_model"
    assert merge["rows"] == 16 and merge["nll_after"] == pytest.approx(merge["nll_before"], rel=0.02)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "chat_template.jinja"} <= names
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert merged.dtype == torch.float16  # the source's
    adapter = AutoPeftModelForCausalLM.from_pretrained(work / "outputs/lora_model/final_lora_adapter")
    ids = torch.ones(1, 9, dtype=torch.long)
    with torch.no_grad():
        one, two = merged.float()(ids).logits, adapter.float()(ids).logits
    assert torch.allclose(one, two, atol=2e-2)
    assert copy.deepcopy(merged.generation_config).eos_token_id


@pytest.mark.slow
def test_a_finished_run_of_max_steps_is_merged_without_another_step(prepared, tiny, tmp_path):
    import shutil

    work = shutil.copytree(prepared, tmp_path / "work")
    flags = [*SHORT, "--max_steps", 4, "--eval_steps", 2, "--save_steps", 2, "--logging_steps", 1]
    folder = work / "outputs/lora_model"
    weights, logs = [], []
    for further in ([], ["--merge_adapter"]):
        ok(run(LORA, "--model_name", tiny, *flags, *further, cwd=work))
        weights.append((folder / "final_lora_adapter/adapter_model.safetensors").read_bytes())
        logs.append(json.loads((folder / "training_log.json").read_text("utf-8")))
    assert (folder / "merged_model/model.safetensors").exists()
    assert weights[0] == weights[1] and logs[1]["summary"]["steps"] == 4
    steps = [[record["step"] for record in log["history"]] for log in logs]
    assert steps[0] == steps[1] and logs[0]["summary"]["tokens"] == logs[1]["summary"]["tokens"]
