"""Step 4's scores against other implementations, on models that differ where scores go wrong."""

import json
import logging
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, ok, run
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
)

from configs.evaluation import metrics, scoring
from configs.evaluation.candidates import Candidate

SMALL = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
# what each does to its logits or its attention that a head of our own would miss
ARCHITECTURES = {
    "phi: head with a bias": PhiConfig(**SMALL, partial_rotary_factor=0.5),
    "llama: tied head, grouped queries": LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "gemma2: soft cap of the logits": Gemma2Config(
        **SMALL, head_dim=16, num_key_value_heads=2, final_logit_softcapping=0.1
    ),
    "cohere: scale of the logits": CohereConfig(**SMALL, logit_scale=7.0, num_key_value_heads=2),
    "mistral: sliding window": MistralConfig(**SMALL, sliding_window=5, num_key_value_heads=2),
    "gpt2: learned positions, other names": GPT2Config(
        vocab_size=500, n_embd=64, n_layer=2, n_head=4, n_positions=256
    ),
}


def build(config) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # far from the even distribution that new weights give
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def some_rows(n: int = 24, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    draw = random.Random(seed)
    sizes = [(draw.randint(1, 40), draw.randint(1, 30)) for _ in range(n - 2)] + [(1, 60), (60, 1)]
    return [([draw.randrange(1, 490) for _ in range(k)] for k in size) for size in sizes]


@pytest.fixture(scope="module")
def rows():
    return [(a, b) for a, b in some_rows()]


def harness(model, tokenizer):
    """lm-evaluation-harness around the same weights."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=2048)


def by_harness(model, tokenizer, rows) -> list[float]:
    requests = [(None, list(a), list(b)) for a, b in rows]
    return [-nll for nll, _ in harness(model, tokenizer)._loglikelihood_tokens(requests, disable_tqdm=True)]


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_row_has_the_nll_of_lm_evaluation_harness(tiny, rows, name):
    model = build(ARCHITECTURES[name])
    got = scoring.score(model, rows, None, "test")
    assert got == pytest.approx(by_harness(model, AutoTokenizer.from_pretrained(tiny), rows), rel=1e-4)
    # and of one forward pass each, to the precision that is promised
    with torch.no_grad():
        for (context, continuation), nll in zip(rows[:6], got, strict=False):
            logits = model(input_ids=torch.tensor([context + continuation])).logits[0].double()
            wanted = logits.log_softmax(-1)[len(context) - 1 : -1]
            alone = -sum(wanted[i, t].item() for i, t in enumerate(continuation))
            assert nll == pytest.approx(alone, rel=1e-5)
    assert scoring.score(model, rows, 100, "small batches") == pytest.approx(got, rel=1e-5)


def test_the_scored_rows_of_a_run_have_the_nll_of_lm_evaluation_harness(trained, tiny, tmp_path):
    """The ids that evaluation_examples.jsonl holds, scored by the harness from the saved folders: base, LoRA (adapter
    over the 16-bit base) and full."""
    from peft import PeftModel

    folder = work(trained, tmp_path)
    log = folder / "outputs/lora_model/training_log.json"
    record = json.loads(log.read_text("utf-8"))
    record["settings"]["USE_4BIT"] = False  # scored as a LoRA over 16 bits: base and LoRA are one copy
    log.write_text(json.dumps(record), encoding="utf-8")
    flags = "--max_new_tokens 2 --resamples 2000".split()
    ok(run(SCRIPTS[3], "--model_name", tiny, *flags, cwd=folder))
    records = [
        json.loads(line) for line in (folder / "outputs/evaluation_examples.jsonl").read_text("utf-8").splitlines()
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    models = {"base": base}
    models["full"] = AutoModelForCausalLM.from_pretrained(
        folder / "outputs/full_model/final_model", dtype=torch.float32
    )
    for name in ("base", "full", "lora"):
        if name == "lora":
            models["lora"] = PeftModel.from_pretrained(base, folder / "outputs/lora_model/final_lora_adapter")
        scored = [r for r in records if r["model"] == name and "nll" in r]
        assert len(scored) == 16
        pairs = [(r["context_ids"], r["continuation_ids"]) for r in scored]
        wanted = by_harness(models[name].eval(), tokenizer, pairs)
        assert [r["nll"] for r in scored] == pytest.approx(wanted, rel=1e-4), name
    results = json.loads((folder / "outputs/evaluation_results.json").read_text("utf-8"))
    assert "base_4bit" not in results["models"]["lora"]  # the same copy, and the same precision


def work(trained: Path, folder: Path) -> Path:
    import shutil

    return shutil.copytree(trained, folder / "work", ignore=shutil.ignore_patterns("checkpoint-*", "runs"))


def test_the_logits_of_a_batch_never_exist(monkeypatch):
    """The head sees only positions that predict an answer, and never more than CHUNK of them."""
    model = build(ARCHITECTURES["phi: head with a bias"])
    rows = [([5] * 50, [7] * 30) for _ in range(20)]
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.shape))
    monkeypatch.setattr(scoring, "CHUNK", 64)
    scoring.score(model, rows, 10**6, "test")  # one batch
    assert sum(shape[-2] for shape in seen) == 20 * 30 and max(shape[-2] for shape in seen) == 64


@pytest.fixture
def nothing_held(monkeypatch):
    """As in a process in which memory never ran out."""
    monkeypatch.setattr(scoring, "_held", {})


def watched(model, see) -> None:
    """Call see(rows, columns) before every forward pass of the model's layers."""
    model.model.layers[0].register_forward_pre_hook(lambda _, args: see(*args[0].shape[:2]))


def passes(model) -> list[tuple[int, int]]:
    """The (rows, columns) of every forward pass of the model's layers from now on."""
    seen = []
    watched(model, lambda *shape: seen.append(shape))
    return seen


def test_scores_and_batches_do_not_depend_on_the_free_memory(tiny, monkeypatch, nothing_held):
    import psutil

    model = build(ARCHITECTURES["phi: head with a bias"])
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.pad_token = tokenizer.eos_token
    model.generation_config = GenerationConfig()
    rows, prompts, found = [(a, b) for a, b in some_rows(120)], [context for context, _ in some_rows(80)], []
    for free in (1, 10**6, 10**10, 10**13):
        memory = type("Memory", (), {"available": free, "free": free, "total": free})
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_, free=free: (free, free))
        seen = passes(model)
        scores = scoring.score(model, rows, None, "test").tolist()
        found.append((scores, scoring.answer(model, tokenizer, prompts, [1], 3, None, "test"), list(seen)))
    scores, _, seen = found[0]
    assert all(other == found[0] for other in found[1:])  # to the last digit
    # as large as the constants say: tokens of a pass of scoring, then prompts answered at once
    assert len(scores) == 120 and max(n * width for n, width in seen[:-6]) > scoring.PASS_TOKENS_CPU / 2
    assert all(n * width <= scoring.PASS_TOKENS_CPU for n, width in seen[:-6])
    assert [n for n, _ in seen[-6:]] == [scoring.PROMPTS] * 3 + [80 - scoring.PROMPTS] * 3


def test_budgets_are_constants(phi_2, nothing_held):
    """phi-2, whose cache is 327,680 bytes a token in 16 bits, is answered in fewer prompts at once than a small model;
    a GPU takes more tokens at once than a CPU."""
    from types import SimpleNamespace

    small = build(ARCHITECTURES["llama: tied head, grouped queries"])
    assert scoring.token_budget(small) == 2048 and scoring.prompt_budget(small, 400) == 64
    on = {name: torch.device(name) for name in ("cpu", "cuda")}
    big = SimpleNamespace(config=phi_2, dtype=torch.float16, device=on["cuda"])
    assert scoring.token_budget(big) == 8192
    assert scoring.prompt_budget(big, 550) == 4 * 10**9 // (550 * 327_680) == 22
    assert scoring.prompt_budget(SimpleNamespace(config=phi_2, dtype=torch.float32, device=on["cpu"]), 550) == 11
    assert scoring.prompt_budget(big, 10**6) == 1


def card_of(model, tokens: int) -> None:
    """A fault that a CPU does not have: the model stands on a card that holds so many tokens of a pass."""

    def see(rows: int, columns: int) -> None:
        if rows * columns > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    watched(model, see)


def test_where_memory_runs_out_batches_are_halved_and_nothing_is_lost(rows, capsys, nothing_held):
    model = build(ARCHITECTURES["phi: head with a bias"])
    usual = scoring.score(model, rows, 10**6, "test")
    tried = passes(model)  # also those that fail
    card_of(model, 200)
    capsys.readouterr()
    assert scoring.score(model, rows, 10**6, "test") == pytest.approx(usual, rel=1e-5)
    sizes = [n * width for n, width in tried]
    failed = sizes.index(next(size for size in sizes if size <= 200))
    assert 2 <= failed < 6 and all(b <= a / 2 for a, b in zip(sizes[:failed], sizes[1:failed], strict=False))
    assert all(size <= sizes[failed - 1] / 2 for size in sizes[failed:]) and len(sizes) > failed + 3
    # said once, with the flag that starts with smaller batches; what holds is kept, and not tried anew
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"memory ran out with {sizes[0]:,} tokens" in said and "--batch_tokens" in said
    tried.clear()
    assert scoring.score(model, rows, None, "again") == pytest.approx(usual, rel=1e-5)
    assert max(n * width for n, width in tried) <= 200 and capsys.readouterr().out == ""
    # a smaller budget of the user's is not raised
    tried.clear()
    scoring.score(model, rows, 1, "one by one")
    assert {n for n, _ in tried} == {1}


def test_a_single_row_that_memory_cannot_hold_is_the_users_to_mend(capsys, nothing_held):
    model = build(ARCHITECTURES["phi: head with a bias"])
    card_of(model, 200)
    with pytest.raises(SystemExit) as end:
        scoring.score(model, [([5] * 300, [7]), ([5], [7])], None, "test")
    assert end.value.code == 2 and "--max_length 512" in capsys.readouterr().err


def test_answers_are_halved_too_and_stay_the_same(tiny, capsys, nothing_held):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.pad_token = tokenizer.eos_token
    with torch.no_grad():
        model.lm_head.bias.zero_()
    prompts = [context for context, _ in some_rows(9)]
    usual = scoring.answer(model, tokenizer, prompts, [1], 5, None, "test")
    tried = passes(model)
    card_of(model, 120)
    capsys.readouterr()
    assert scoring.answer(model, tokenizer, prompts, [1], 5, None, "test") == usual
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "memory ran out with 9 prompts" in said and "--generation_batch 4" in said
    assert [n for n, width in tried if width > 1][:3] == [9, 4, 2] and "tokens" not in scoring._held


def test_other_errors_are_not_taken_for_a_lack_of_memory(nothing_held):
    def broken(batch):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        scoring.in_batches([0, 1, 2], [1, 1, 1], 3, "tokens", broken, "test")
    assert scoring._held == {}


def test_a_failed_pass_holds_no_tensor_when_the_next_one_starts(nothing_held):
    """An error keeps the frames in which it was raised, and so their tensors, for as long as it is handled."""
    import weakref

    left = []

    def work(batch: list[int]) -> list[int]:
        assert [ref() for ref in left] == [None] * len(left)
        held = torch.zeros(10)
        left.append(weakref.ref(held))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch

    items = list(range(4))
    assert scoring.in_batches(items, [1] * 4, 4, "prompts", work, "test") == {i: i for i in items}
    assert len(left) == 2 + 4  # 4 at once, 2 at once, then one by one


# --- answers


def test_a_models_own_decoding_settings_do_not_count(tiny, tmp_path):
    """A chat model's generation_config (temperature, repetition penalty, a shorter length) would make the answers of
    the three incomparable."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    with torch.no_grad():
        model.lm_head.bias.zero_()
        model.lm_head.bias[len(tokenizer) :] = -1e4
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=50.0, max_length=12, no_repeat_ngram_size=1
    )
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "chatty")
    loaded = scoring.load_model([Candidate("base", "base", str(tmp_path / "chatty"))], torch.float32, None)
    tokenizer.pad_token = tokenizer.eos_token
    prompt, ids = [11, 45, 300], [11, 45, 300]
    with torch.no_grad():
        for _ in range(20):
            ids.append(loaded(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    (found,) = scoring.answer(loaded, tokenizer, [prompt], [tokenizer.eos_token_id], 20, None, "test")
    assert found["answer"] == tokenizer.decode(ids[3:]).strip()
    other = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 3, dtype=torch.long))
    assert other[0, : len(ids)].tolist() != ids  # the settings would have made a difference


def test_answers_with_a_temperature_are_the_same_at_every_run(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model.generation_config = GenerationConfig()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.pad_token = tokenizer.eos_token
    with torch.no_grad():
        model.lm_head.bias.zero_()

    def said(temperature: float, seed: int, size: int | None = None) -> list[str]:
        prompts = [[11, 45, 300], [7, 8], [99], [45, 11]]
        return [
            a["answer"] for a in scoring.answer(model, tokenizer, prompts, [1], 12, size, "test", temperature, seed)
        ]

    once = said(3.0, 1)
    assert once == said(3.0, 1) and len(set(once)) == 4
    assert once != said(3.0, 2) and once != said(0.0, 1)
    # whatever is answered beside a prompt: batches may be halved, and processes share the prompts out
    torch.manual_seed(5)
    assert all(said(3.0, 1, size) == once for size in (1, 2, 3))


def test_a_sample_is_drawn_from_the_models_distribution():
    """4,000 draws of the first token against its probabilities at that temperature: chi-squared."""
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -30.0])
    draw = scoring.OwnDraw(list(range(4000)), 1.7, torch.device("cpu"))
    scores = draw(torch.zeros(4000, 1), logits.expand(4000, -1))
    counts = torch.bincount(scores.argmax(-1), minlength=5).double()
    expected = 4000 * (logits / 1.7).softmax(-1).double()
    assert counts[4] == 0 and expected[4] < 1e-4
    chi_squared = ((counts - expected)[:4] ** 2 / expected[:4]).sum()
    assert chi_squared < 16.3  # three degrees of freedom, p = 0.001
    # another draw at the next token, not the same one again
    assert (draw(torch.zeros(4000, 2), logits.expand(4000, -1)).argmax(-1) != scores.argmax(-1)).float().mean() > 0.4


def test_a_long_prompt_does_not_cut_the_answers_beside_it(tiny):
    """A prompt near the end of the model's positions leaves no room for a whole answer: only its own is shorter."""
    model = build(GPT2Config(vocab_size=500, n_embd=64, n_layer=2, n_head=4, n_positions=64))
    model.generation_config = GenerationConfig()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.pad_token = tokenizer.eos_token
    prompts = [[7] * 60, [11, 45, 300], [8] * 52, [99]]
    alone = [scoring.answer(model, tokenizer, [prompt], [499], 12, None, "test")[0] for prompt in prompts]
    assert scoring.answer(model, tokenizer, prompts, [499], 12, None, "test") == alone
    assert len(alone[0]["answer"]) < len(alone[2]["answer"])


# --- attention in fp16


@pytest.fixture
def sdpa_calls(monkeypatch) -> list[dict]:
    """What torch's attention is called with from now on: {dtype, mask, queries, and its other named arguments}."""
    usual, calls = torch.nn.functional.scaled_dot_product_attention, []

    def watched(query, key, value, attn_mask=None, **kwargs):
        calls.append({"dtype": query.dtype, "mask": attn_mask is not None, "queries": query.shape[2], **kwargs})
        return usual(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    return calls


@pytest.mark.parametrize("padded", [False, True])
def test_grouped_queries_in_fp32_attention_are_those_of_eager_attention(sdpa_calls, padded):
    """Forward, backward and one token after another over a cache; torch is never asked for enable_gqa, for which in
    fp32 it has only a kernel with quadratic memory."""
    from configs import device

    device.attention(torch.float16)  # registers it
    config = LlamaConfig(**SMALL, num_key_value_heads=2)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 490, (3, 20), generator=draw)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :7] = mask[1, :1] = 0
    weights = torch.randn(3, 20, 500, generator=draw) * mask[..., None]
    found = {}
    for name in ("eager", "sdpa_fp32"):
        config._attn_implementation = name
        model = build(config)
        assert model.config._attn_implementation == name
        model.zero_grad()
        out = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(0), use_cache=False)
        (out.logits * weights).sum().backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        with torch.no_grad():
            steps = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=499)
        found[name] = (out.logits.detach() * mask[..., None], gradients, steps)
    (logits, gradients, steps), (own_logits, own_gradients, own_steps) = found.values()
    torch.testing.assert_close(own_logits, logits, rtol=1e-4, atol=1e-4)
    for key, gradient in gradients.items():
        assert gradient.abs().max() > 0, key
        torch.testing.assert_close(own_gradients[key], gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())
    assert torch.equal(own_steps, steps)
    assert {call["queries"] for call in sdpa_calls} >= {20, 2}  # whole rows, and a group's queries of one token
    assert not any(call.get("enable_gqa") for call in sdpa_calls)
    first = sdpa_calls[0]
    assert first["mask"] == padded and first["is_causal"] != padded  # no mask is made where none was


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory, tiny) -> Path:
    """The tiny phi with a bias in queries and keys, as phi-2's: their products exceed 65,504, where fp16 ends.

    The bias stands alone in the last number of each head, so it adds the same to every score and changes no
    attention: a right computation is as exact as without it.
    """
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                last = torch.arange(1, 5) * part.out_features // 4 - 1
                part.weight[last] = 0
                part.bias[last] = 300
        # else it says one token without a text for ever
        model.lm_head.bias.zero_()
        model.lm_head.bias[len(AutoTokenizer.from_pretrained(tiny)) :] = -1e4
    folder = tmp_path_factory.mktemp("overflowing") / "phi"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def test_fp16_scores_and_answers_with_attention_in_fp32(overflowing, rows, sdpa_calls):
    """Through step 4's functions: whole rows without a mask, batches padded on the left, and a key-value cache."""
    base = Candidate("base", "base", str(overflowing))
    plain = AutoModelForCausalLM.from_pretrained(overflowing, dtype=torch.float16, attn_implementation="eager")
    assert not torch.isfinite(plain(input_ids=torch.tensor([[5, 6, 7]])).logits).all()  # so fp16 does overflow
    exact = scoring.load_model([base], torch.float32, None)
    model = scoring.load_model([base], torch.float16, None)
    assert model.dtype == torch.float16 and model.config._attn_implementation == "sdpa_fp32"
    sdpa_calls.clear()
    own, wanted = scoring.score(model, rows, 300, "test"), scoring.score(exact, rows, 300, "test")
    assert own == pytest.approx(wanted, rel=2e-3) and (own != wanted).any()
    assert not any(call["mask"] for call in sdpa_calls)
    sdpa_calls.clear()
    tokenizer = AutoTokenizer.from_pretrained(overflowing)
    tokenizer.pad_token = tokenizer.eos_token
    prompts = [[11, 45, 300], list(range(7, 30)), [99]]
    together = scoring.answer(model, tokenizer, prompts, [1], 8, None, "test")
    assert any(call["mask"] and call["queries"] == 23 for call in sdpa_calls)  # padded on the left
    assert any(call["queries"] == 1 for call in sdpa_calls)  # the cache holds the rest
    for prompt, record in zip(prompts, together, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(8):  # one forward pass each, with no cache and no padding
                ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        assert record["answer"] == tokenizer.decode(ids[len(prompt) :]).strip() != ""
    assert together == scoring.answer(model, tokenizer, prompts, [1], 8, 1, "test")
    assert {call["dtype"] for call in sdpa_calls} == {torch.float32}


def test_a_model_without_sdpa_is_scored_in_its_own_attention(tmp_path):
    """Gemma 2 caps its attention's scores, which sdpa cannot: asked for by name, it is refused."""
    build(ARCHITECTURES["gemma2: soft cap of the logits"]).save_pretrained(tmp_path)
    model = scoring.load_model([Candidate("base", "base", str(tmp_path))], torch.bfloat16, None)
    assert model.config._attn_implementation == "eager"
    assert np.isfinite(scoring.score(model, [([5, 6], [7])], None, "test")).all()


# --- several processes


@pytest.mark.slow
def test_two_processes_give_what_one_gives(trained, tiny, tmp_path):
    """Under torchrun rows and prompts are shared out, and gathered by id; answers are drawn by prompt."""
    flags = ["--model_name", str(tiny), *"--max_new_tokens 6 --resamples 2000 --general_text general.txt".split()]
    flags += ["--temperature", "1"]  # greedy, the tiny model says one token without a text for ever
    found = []
    for processes in (1, 2):
        folder = work(trained, tmp_path / str(processes))
        (folder / "general.txt").write_text("The river rose.\n\nTwo birds sang.\n\nIt rained.\n", "utf-8")
        command = [sys.executable, str(ROOT / SCRIPTS[3]), *flags]
        if processes == 2:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            command = [sys.executable, *launcher, *command[1:]]
        env = os.environ | {"ACCELERATE_USE_CPU": "1"}
        result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
        out = ok(result)
        results = json.loads((folder / "outputs/evaluation_results.json").read_text("utf-8"))
        assert results["environment"]["processes"] == processes
        assert out.count("; look at ") == out.count("done: ") == 1
        records = [
            json.loads(line) for line in (folder / "outputs/evaluation_examples.jsonl").read_text("utf-8").splitlines()
        ]
        found.append((results, records))
    (one, a), (two, b) = found
    # every row of the four models and every answer of three, once: ids, texts and all, in one order
    assert len(a) == len(b) == 4 * 16 + 3 * 16
    assert len({(record["id"], record["model"], "nll" in record) for record in b}) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        assert x.get("nll", 0) == pytest.approx(y.get("nll", 0), rel=1e-5)
        assert {k: v for k, v in x.items() if k != "nll"} == {k: v for k, v in y.items() if k != "nll"}
    assert len({record["answer"] for record in b if "answer" in record}) > 8

    def exactly(value: object) -> object:
        """What must be equal as it is; numbers may differ in their last digits."""
        if isinstance(value, dict):
            return {key: exactly(child) for key, child in value.items()}
        if isinstance(value, list):
            return [exactly(child) for child in value]
        return pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value

    assert set(one["models"]["base"]) >= {"nll_per_token", "perplexity", "bits_per_byte", "forgetting"}
    for key in ("data", "models", "metrics", "warnings", "unsound"):
        assert two[key] == exactly(one[key]), key
    assert [(c["a"], c["b"], c["metric"]) for c in two["comparisons"]] == [
        (c["a"], c["b"], c["metric"]) for c in one["comparisons"]
    ]
    for x, y in zip(one["comparisons"], two["comparisons"], strict=True):
        assert y["difference"] == pytest.approx(x["difference"], abs=1e-5)


@pytest.mark.slow
def test_a_prompt_under_two_processes_is_answered_once(trained, tiny, tmp_path):
    """A process that left early would let the other one wait for it for ever."""
    folder = work(trained, tmp_path)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / SCRIPTS[3])]
    flags = ["--model_name", str(tiny), "--max_new_tokens", "4", "--prompt", "What is an ETF?"]
    env = os.environ | {"ACCELERATE_USE_CPU": "1"}
    command = [sys.executable, *launcher, *flags]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert ok(result).count("┏") == 1
    assert not (folder / "outputs/evaluation_results.json").exists()


# --- what is scored besides


def test_perplexity_is_of_the_sums():
    draw = np.random.default_rng(0)
    nll, tokens, sizes = draw.gamma(2, 30, 40), draw.integers(1, 90, 40), draw.integers(5, 400, 40)
    found = metrics.likelihood(nll, tokens, sizes)
    assert found["nll_per_token"] == pytest.approx(nll.sum() / tokens.sum())
    assert found["perplexity"] == pytest.approx(math.exp(nll.sum() / tokens.sum()))
    assert found["bits_per_byte"] == pytest.approx(nll.sum() / math.log(2) / sizes.sum())
    assert abs(found["nll_per_token"] - np.mean(nll / tokens)) > 0.1
    assert scoring.RowMetric(metrics.likelihood).compute(nll=nll, tokens=tokens, sizes=sizes) == pytest.approx(found)


def test_metrics_are_metrics_of_evaluate():
    """Each function through evaluate.Metric gives what it gives by itself."""
    import evaluate

    answers, references = ["Bonds pay.", "", "复利。"], ["Bonds pay interest.", "No.", "复利滚存。"]
    texts = {"answers": answers, "references": references}
    asked = {"answers": answers, "questions": ["What do bonds pay?", "Why?", "复利?"], "stopped": [True, False, True]}

    def embed(some: list[str]) -> np.ndarray:
        angles = np.array([len(text) for text in some], float)
        return np.stack([np.cos(angles), np.sin(angles)], 1)

    for function, columns in (
        (metrics.answer_quality, texts),
        (metrics.rouge_l, texts),
        (metrics.chrf, texts),
        (metrics.style_match, texts),
        (metrics.well_formed, asked),
        (metrics.embedding_similarity, texts | {"embed": embed}),
    ):
        metric = scoring.RowMetric(function)
        assert isinstance(metric, evaluate.Metric) and metric.description == function.__doc__
        rows = metric.compute(**columns)["rows"]
        assert rows == function(**columns) and len(rows) == 3 and rows[0] != rows[1], function.__name__
        with pytest.raises(ValueError):  # columns of different lengths
            function(**columns | {"answers": answers[:2]})
    for function in (metrics.answer_quality, metrics.style_match, metrics.well_formed, metrics.likelihood):
        assert len(function.__doc__) > 30
    assert isinstance(scoring.RowMetric(metrics.likelihood), evaluate.Metric)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory, tiny) -> Path:
    """A small sentence-transformers model with the tiny model's tokenizer."""
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("embedder")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.pad_token = tokenizer.eos_token
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    word = models.Transformer(str(folder / "bert"))
    pooling = models.Pooling(word.get_word_embedding_dimension(), pooling_mode="mean")
    SentenceTransformer(modules=[word, pooling]).save(str(folder / "model"))
    return folder / "model"


def test_embedding_similarity_is_the_cosine(embedder):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(embedder), device="cpu")
    texts, references = ["Bonds pay.", "Save first.", " "], ["Bonds pay.", "Buy a fund.", "No."]

    def embed(some: list[str]) -> np.ndarray:
        return model.encode(some, normalize_embeddings=True, convert_to_numpy=True)

    found = metrics.embedding_similarity(texts, references, embed)
    a, b = model.encode(texts), model.encode(references)
    cosine = (a * b).sum(1)[:2] / np.linalg.norm(a, axis=1)[:2] / np.linalg.norm(b, axis=1)[:2]
    assert found == pytest.approx([*cosine, 0], abs=1e-5)  # an empty text means nothing
    assert metrics.embedding_similarity(["", ""], ["No.", "Yes."], embed) == [0, 0]
    assert found[0] == pytest.approx(1, abs=1e-5) and all(-1 <= v <= 1 for v in found) and found[1] < 0.999


@pytest.mark.slow
def test_embedding_similarity_and_a_data_set_of_the_hub_in_a_run(trained, tiny, embedder, tmp_path):
    """EMBEDDING_MODEL adds a metric; GENERAL_TEXT comes from the (loopback) Hub, up to 200 texts."""
    import pandas
    from hub import Hub

    folder = work(trained, tmp_path)
    texts = ["", " = A title = \n"] + [f"Text {n} of a text about rivers, birds and old towns." for n in range(300)]
    parts, content = {}, {}
    for config in ("small-v1", "large-v1"):
        for split in ("train", "test"):
            table = pandas.DataFrame({"text": [f"{split} {t}" if t else t for t in texts]})
            content[f"{config}/{split}-00000-of-00001.parquet"] = table.to_parquet()
            parts.setdefault(config, []).append(f"  - split: {split}\n    path: {config}/{split}-*")
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n" + "\n".join(lines) + "\n" for name, lines in parts.items()
    )
    content["README.md"] = (card + "---\n").encode()
    with Hub() as hub:
        hub.add_dataset("org/wikitext", content)
        env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
        env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        flags = ["--model_name", tiny, "--max_new_tokens", "4", "--resamples", "2000", "--max_eval_samples", "4"]
        flags += ["--embedding_model", embedder]
        result = run(SCRIPTS[3], *flags, "--general_text", "org/wikitext", cwd=folder, env=env)
        assert result.returncode == 2 and "org/wikitext#" in result.stderr and "small-v1" in result.stderr
        ok(run(SCRIPTS[3], *flags, "--general_text", "org/wikitext#small-v1", cwd=folder, env=env))
    results = json.loads((folder / "outputs/evaluation_results.json").read_text("utf-8"))
    assert {c["n"] for c in results["comparisons"] if c["metric"] == "forgetting"} == {200}
    assert sum(c["metric"] == "embedding_similarity" for c in results["comparisons"]) == 3
    assert all(-1 <= m["embedding_similarity"] <= 1 for m in results["models"].values())
    report = (folder / "outputs/evaluation_report.md").read_text("utf-8")
    assert "embedding similarity (-1 to 1)" in report and "no embedding model was set" not in report
