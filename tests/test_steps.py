"""The steps of a training: which rows meet in them, how they are cut into passes, and what a pass computes."""

import itertools
import random

import numpy as np
import pytest
import torch
from conftest import SCRIPTS
from datasets import Dataset
from test_training import arguments, constants, plan_of, token_row
from transformers import AutoModelForCausalLM
from trl.trainer import utils as trl_utils

from configs.training import trainer as trainer_module
from configs.training.sizes import Sizes
from configs.training.trainer import ExactTrainer, StepSampler, cut

LORA, FULL = SCRIPTS[1], SCRIPTS[2]


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """Forty rows of 6 to 60 tokens, all different; the last step of an epoch has eight of sixteen."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 60, (40,), generator=draw).tolist()
    return Dataset.from_list(
        [token_row(torch.randint(1, 400, (n,), generator=draw).tolist(), n // 3) for n in lengths]
    )


def trainer_of(scripts, script, folder, model, rows, tokenizer, tokens: int, kind=ExactTrainer, **changed):
    """A trainer of a script over a model, fp32, without dropout, with passes of at most `tokens` tokens."""
    given = {"MODEL_NAME": str(model), "REPORT_TO": "none", "WARMUP_RATIO": 0.0, "EVAL_STEPS": 99, "SAVE_STEPS": 99}
    given |= {"LORA_DROPOUT": 0.0, "USE_4BIT": False} if script == LORA else {}
    c, args = arguments(scripts, script, folder, model, **{**given, **changed})
    return kind(
        model=scripts[script].build_model(c, plan_of(c), args.device),
        args=args,
        plan=plan_of(c, tokens=tokens),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        peft_config=scripts[script].adapter_config(c),
    )


# --- which rows meet


def lengths_of(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).lognormal(5, 0.8, n).astype(int).clip(5).tolist()


def steps(lengths: list[int], rows: int = 16, seed: int = 42, epoch: int = 0) -> list[list[int]]:
    return list(StepSampler(lengths, rows, seed, lambda: epoch))


@pytest.mark.parametrize("n", [0, 1, 5, 15, 16, 17, 100, 805, 1616])
def test_an_epoch_is_every_row_once_in_whole_steps(n):
    lengths = lengths_of(n)
    found = steps(lengths)
    assert sorted(itertools.chain(*found)) == list(range(n))
    assert len(found) == len(StepSampler(lengths, 16, 42)) == -(-n // 16)
    assert all(len(step) == 16 for step in found[:-1])
    for step in found:
        assert [lengths[i] for i in step] == sorted((lengths[i] for i in step), reverse=True)


@pytest.mark.parametrize("n", [16, 17, 100, 817])
def test_the_longest_row_is_in_the_first_step(n):
    """A run that does not fit the memory must fail in its first step, wherever the longest row stands."""
    for place in {0, n // 2, n - 1}:
        lengths = lengths_of(n)
        lengths[place] = 100_000
        assert all(steps(lengths, epoch=epoch)[0][0] == place for epoch in range(8))


def test_steps_depend_on_seed_and_epoch_alone():
    lengths = lengths_of(2000)
    first = steps(lengths)
    np.random.seed(1)
    torch.manual_seed(1)
    random.seed(1)
    states = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), random.getstate()
    assert steps(lengths) == first
    # nor do they take from the generators that dropout draws from
    after = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), random.getstate()
    assert after == states
    others = [steps(lengths, epoch=1), steps(lengths, epoch=2), steps(lengths, seed=43)]
    met = [
        {frozenset(pair) for step in found for pair in itertools.combinations(step, 2)} for found in (first, *others)
    ]
    # two rows meet again about as often as chance has it, which is 15 in 1,999
    assert all(len(met[0] & other) < 3 * len(met[0]) * 15 / 1999 for other in met[1:])


def test_steps_are_random_sets_and_not_of_one_length():
    """Steps of equal lengths would weigh the tokens of short rows more than the loss over all tokens does."""
    lengths = lengths_of(2000)
    within = np.mean([np.std([lengths[i] for i in step]) for step in steps(lengths)])
    assert within > 0.85 * np.std(lengths)


def test_steps_ask_for_the_epoch_anew_each_time():
    epoch, lengths = [0], lengths_of(100)
    sampler = StepSampler(lengths, 16, 42, lambda: epoch[0])
    first = list(sampler)
    epoch[0] = 1
    assert list(sampler) == steps(lengths, epoch=1) != first


@pytest.mark.parametrize("processes", [2, 4, 16])
def test_processes_share_out_the_rows_of_each_step(processes):
    lengths = lengths_of(101)
    shares = [list(StepSampler(lengths, 16, 42, process=p, processes=processes)) for p in range(processes)]
    for step, *parts in zip(steps(lengths), *shares, strict=True):
        assert sorted(itertools.chain(*parts)) == sorted(step)
    assert any(not part for part in [share[-1] for share in shares]) == (processes == 16)  # five rows are left


class Recorded(ExactTrainer):
    """An ExactTrainer that notes the rows of every optimizer step and pass."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        mask = inputs["attention_mask"].bool()
        self.seen.append(
            sorted(tuple(ids[kept].tolist()) for ids, kept in zip(inputs["input_ids"], mask, strict=True))
        )
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.widths.append(tuple(inputs["input_ids"].shape))
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_both_methods_take_the_same_rows_in_the_same_steps(scripts, tokenizer, tiny, rows, tmp_path):
    """Both scripts at 4 x 4 and 2 x 8, with large and with small passes, over two epochs whose last step is short."""
    seen, widths = {}, {}
    for script, (batch, accumulation), tokens in itertools.product((LORA, FULL), ((4, 4), (2, 8)), (10_000, 130)):
        key = (script, batch, tokens)
        shape = {"BATCH_SIZE": batch, "GRADIENT_ACCUMULATION_STEPS": accumulation, "NUM_EPOCHS": 2.0}
        trainer = trainer_of(
            scripts, script, tmp_path / "-".join(map(str, key)), tiny, rows, tokenizer, tokens, Recorded, **shape
        )
        trainer.seen, trainer.widths = [], []
        trainer.train()
        assert trainer.state.global_step == 6
        seen[key], widths[key] = trainer.seen, trainer.widths
    reference = seen[LORA, 4, 10_000]
    assert [len(step) for step in reference] == [16, 16, 8] * 2
    whole = sorted(tuple(row["input_ids"]) for row in rows)
    assert sorted(itertools.chain(*reference[:3])) == sorted(itertools.chain(*reference[3:])) == whole
    assert reference[0] != reference[3]
    assert all(other == reference for other in seen.values())
    assert all(rows * tokens <= 130 for rows, tokens in widths[FULL, 2, 130])
    assert len(widths[FULL, 2, 130]) > len(widths[FULL, 2, 10_000]) > 6


# --- how they are cut


def cost(lengths: list[int], parts: list[slice], packed: bool) -> float:
    sums = [sum(lengths[p]) if packed else max(lengths[p]) * len(lengths[p]) for p in parts]
    return sum(sums) + trainer_module.PASS_COST * len(parts)


def fits(lengths: list[int], parts: list[slice], budget: int, packed: bool) -> bool:
    each = trainer_module.PASS_COST
    return all(len(lengths[p]) == 1 or cost(lengths, [p], packed) - each <= budget for p in parts)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("budget", [1, 60, 200, 1000, 10_000])
def test_a_step_is_cut_where_it_costs_least(budget, packed):
    """Against every way to cut nine rows."""
    for seed in range(20):
        lengths = sorted(lengths_of(9, seed), reverse=True)
        parts = cut(lengths, budget, packed)
        assert [i for p in parts for i in range(p.start, p.stop)] == list(range(9))

        assert fits(lengths, parts, budget, packed)
        ways = []
        for ends in itertools.chain.from_iterable(itertools.combinations(range(1, 9), k) for k in range(9)):
            way = [slice(a, b) for a, b in itertools.pairwise((0, *ends, 9))]
            if fits(lengths, way, budget, packed):
                ways.append(cost(lengths, way, packed))
        assert cost(lengths, parts, packed) == min(ways)


def test_a_share_without_rows_is_one_empty_pass():
    assert cut([], 100) == [slice(0, 0)]


@pytest.mark.parametrize("script", [LORA, FULL])
def test_the_loss_does_not_depend_on_the_budget(scripts, tokenizer, tiny, rows, tmp_path, script):
    """One pass, several, and one a row. A mean of per-pass means would differ in the third digit."""
    found = {}
    for tokens in (10_000, 150, 1):
        shape = {"BATCH_SIZE": 4, "GRADIENT_ACCUMULATION_STEPS": 4, "MAX_STEPS": 4, "LOGGING_STEPS": 1}
        trainer = trainer_of(scripts, script, tmp_path / str(tokens), tiny, rows, tokenizer, tokens, **shape)
        trainer.train()
        found[tokens] = [r["loss"] for r in trainer.state.log_history if "loss" in r]
        evaluated = trainer.evaluate()
        found[tokens].append(evaluated["eval_loss"])
        assert evaluated["eval_tokens"] == sum(n - n // 3 for n in rows["length"])
    assert len(found[1]) == 5
    for tokens in (150, 1):
        assert found[tokens] == pytest.approx(found[10_000], rel=1e-5)


@pytest.mark.parametrize("script", [LORA, FULL])
def test_packed_rows_train_as_padded_ones(scripts, tokenizer, tiny, rows, tmp_path, script):
    """The layout of flash attention, through sdpa, which keeps rows apart by their positions (only slower)."""
    found = {}
    for packed in (False, True):
        shape = {"BATCH_SIZE": 4, "GRADIENT_ACCUMULATION_STEPS": 4, "MAX_STEPS": 4, "LOGGING_STEPS": 1}
        folder = tmp_path / str(packed)
        trainer = trainer_of(
            scripts, script, folder, tiny, rows, tokenizer, 300, Recorded, **shape, LEARNING_RATE=1e-2
        )
        trainer.packed, trainer.seen, trainer.widths = packed, [], []
        trainer.train()
        assert all((count == 1) == packed for count, _ in trainer.widths if packed or count == 1)
        records = [r for r in trainer.state.log_history if "loss" in r]
        found[packed] = [(r["loss"], r["grad_norm"], r["num_input_tokens_seen"]) for r in records]
        found[packed].append(trainer.evaluate()["eval_loss"])
    for one, other in zip(found[True], found[False], strict=True):
        assert one == pytest.approx(other, rel=1e-4)


# --- what a pass computes


def test_a_model_without_sdpa_is_trained_with_its_own_attention(scripts, tmp_path, tiny):
    """Gemma 2 caps its attention's logits, which sdpa cannot: asked for sdpa by name, it does not load."""
    gemma = tiny_model("soft cap", tiny)
    gemma.save_pretrained(tmp_path)
    assert Sizes(gemma.config, None, torch.float32, 64).layer > 0
    c = constants(FULL, MODEL_NAME=str(tmp_path))
    model = scripts[FULL].build_model(c, plan_of(c), torch.device("cpu"))
    assert model.config._attn_implementation == "eager"


def tiny_model(kind: str, tiny):
    """A tiny model of a family whose head is special, with random weights that are large enough to matter."""
    from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, MixtralConfig

    shape = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    shape |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    configs = {
        "tied head": lambda: LlamaConfig(**shape, tie_word_embeddings=True),
        "logit scale": lambda: CohereConfig(**shape, logit_scale=0.25),
        "divided logits": lambda: GraniteConfig(**shape, logits_scaling=4.0),
        "soft cap": lambda: Gemma2Config(**shape, head_dim=8, final_logit_softcapping=2.0),
        "experts": lambda: MixtralConfig(**shape, num_local_experts=4, output_router_logits=True),
    }
    torch.manual_seed(0)
    if kind == "head bias":
        return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model = AutoModelForCausalLM.from_config(configs[kind](), attn_implementation="eager" if "cap" in kind else "sdpa")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 4
    return model


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["head bias", "tied head", "logit scale", "divided logits", "soft cap"])
def test_only_trained_positions_are_scored_and_nothing_changes(
    scripts, tokenizer, tiny, rows, tmp_path, monkeypatch, kind, lora
):
    """Loss, gradients and eval_loss are those of plain transformers; the head sees the trained positions alone."""
    script = LORA if lora else FULL
    model = tiny_model(kind, tiny)
    plain = tiny_model(kind, tiny)
    c, args = arguments(scripts, script, tmp_path, tiny, BATCH_SIZE=8, **({"LORA_DROPOUT": 0.0} if lora else {}))
    adapter = scripts[script].adapter_config(c)
    data = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer}
    trainer = ExactTrainer(model=model, args=args, plan=plan_of(c, tokens=10_000), peft_config=adapter, **data)
    real, scored = trl_utils._ChunkedLogProbFunction.apply, []

    def spy(hidden, *rest):
        scored.append(len(hidden))
        return real(hidden, *rest)

    monkeypatch.setattr(trl_utils._ChunkedLogProbFunction, "apply", spy)
    batch = trainer.data_collator([{k: rows[i][k] for k in ("input_ids", "labels")} for i in range(8)])
    trained = int((batch["labels"][:, 1:] != -100).sum())
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(2 * trained))
    loss.backward()
    assert scored == [trained] and trained < batch["labels"].numel() / 2

    plain.train()
    labels = batch.pop("labels")
    logits = plain(**batch, use_cache=False).logits.float()
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    ) / (2 * trained)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    if not lora:  # a new adapter changes nothing, but its gradients have no counterpart in the plain model
        expected.backward()
        other = dict(plain.named_parameters())
        for name, parameter in trainer.model.named_parameters():
            if other[name].grad is not None:
                torch.testing.assert_close(parameter.grad, other[name].grad, rtol=1e-3, atol=1e-6, msg=name)
    scored.clear()
    metrics = trainer.evaluate()
    assert sum(scored) == metrics["eval_tokens"] == sum(n - n // 3 for n in rows["length"])
    with torch.no_grad():
        nll = sum(
            torch.nn.functional.cross_entropy(
                plain(torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1].float(),
                torch.tensor(row["labels"][1:]),
                ignore_index=-100,
                reduction="sum",
            ).item()
            for row in rows
        )
    assert metrics["eval_loss"] == pytest.approx(nll / metrics["eval_tokens"], rel=1e-5)


def test_a_mixture_of_experts_keeps_its_balancing_loss(scripts, tokenizer, tiny, rows, tmp_path):
    """The same sum as TRL's own trainer has in one pass."""
    from trl import SFTTrainer

    c, args = arguments(scripts, FULL, tmp_path, tiny, BATCH_SIZE=8)
    data = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer}
    losses = []
    for kind, more in ((SFTTrainer, {}), (ExactTrainer, {"plan": plan_of(c, tokens=10_000)})):
        trainer = kind(model=tiny_model("experts", tiny), args=args, **data, **more)
        assert trainer.aux_loss_enabled
        batch = trainer.data_collator([{k: rows[i][k] for k in ("input_ids", "labels")} for i in range(8)])
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        losses.append(trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(99)).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_the_time_of_training_leaves_out_evaluation(scripts, tokenizer, tiny, rows, tmp_path, monkeypatch):
    import time

    slow = ExactTrainer.prediction_step

    def prediction_step(self, *args, **kwargs):
        time.sleep(0.5)
        return slow(self, *args, **kwargs)

    monkeypatch.setattr(ExactTrainer, "prediction_step", prediction_step)
    shape = {"MAX_STEPS": 2, "LOGGING_STEPS": 1, "EVAL_STEPS": 1, "SAVE_STEPS": 1, "BATCH_SIZE": 8}
    trainer = trainer_of(scripts, FULL, tmp_path, tiny, rows, tokenizer, 10_000, **shape)
    began = time.monotonic()
    trainer.train()
    whole = time.monotonic() - began
    assert trainer.paused > 1.5 and whole > trainer.paused  # three evaluations of two batches
    second = [r["tokens_per_second"] for r in trainer.state.log_history if "loss" in r][1]
    tokens = np.diff([r["num_input_tokens_seen"] for r in trainer.state.log_history if "loss" in r])[0]
    assert tokens / second < 0.5  # the evaluation between the two steps took a second
