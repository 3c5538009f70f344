"""GGUF files in step 4: made by llama.cpp's converter, and measured through llama-cpp-python.

The slow tests need that package and, in LLAMA_CPP, the folder of llama.cpp's sources, where its converter lies; its
source distribution holds them (see .ci/run).
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SCRIPTS, ok, refused, run

EVALUATE = SCRIPTS[3]
LLAMA_CPP = os.environ.get("LLAMA_CPP")
SERVED = LLAMA_CPP and importlib.util.find_spec("llama_cpp")
llama_cpp = pytest.mark.skipif(not SERVED, reason="needs llama-cpp-python, and llama.cpp's sources in LLAMA_CPP")
# The converter knows tokenizers by a hash, and that of the tests is nobody's; it splits text as GPT-2's does.
CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
runpy.run_path(f"{sys.path[0]}/convert_hf_to_gguf.py", run_name="__main__")
"""


def convert(folder: Path, to: Path, kind: str) -> Path:
    """A model's folder as a GGUF of llama.cpp's own making. kind: "f32" or "q8_0"."""
    words = [sys.executable, "-c", CONVERT, LLAMA_CPP, folder, "--outfile", to, "--outtype", kind]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0 and to.is_file(), done.stderr[-3000:]
    return to


@pytest.fixture(scope="module")
def work(tmp_path_factory, trained, tiny) -> Path:
    """A working folder with the full model and the base as GGUFs, and step 4's results about them."""
    work = tmp_path_factory.mktemp("gguf") / "work"
    shutil.copytree(trained, work)
    full = work / "outputs/full_model/final_model"
    convert(full, work / "exact.gguf", "f32")
    convert(full, work / "small.gguf", "q8_0")
    convert(tiny, work / "base.gguf", "f32")
    given = "exact=exact.gguf,small=small.gguf,untaught=base.gguf"
    (work / "prose.txt").write_text("\n\n".join(f"Prose about nothing, number {n}, and so on." for n in range(40)))
    flags = ["--model_name", tiny, "--precision", "fp32", "--max_new_tokens", "12", "--general_text", "prose.txt"]
    ok(run(EVALUATE, *flags, "--candidates", given, cwd=work))
    return work


@llama_cpp
@pytest.mark.slow
def test_a_gguf_is_scored_as_the_model_that_it_was_made_from(work):
    results = json.loads((work / "outputs/evaluation_results.json").read_text("utf-8"))
    models = results["models"]
    assert list(models) == ["base", "lora", "full", "exact", "small", "untaught"]
    # llama.cpp keeps its keys and values in 16 bits
    for name, source in (("exact", "full"), ("untaught", "base")):
        assert models[name]["nll_per_token"] == pytest.approx(models[source]["nll_per_token"], abs=2e-3)
        assert models[name]["nll_per_token"] != models[source]["nll_per_token"]
        assert models[name]["scored_tokens"] == models[source]["scored_tokens"]
        assert models[name]["prompt"] == models[source]["prompt"]
        forgetting = (models[label]["forgetting"]["nll_per_token"] for label in (name, source))
        assert next(forgetting) == pytest.approx(next(forgetting), abs=2e-3)
    assert set(models["untaught"]["perplexity_by_prompt"]) == {"chat", "plain"}  # no template, no training
    # eight bits change a model more than a key-value cache in sixteen
    moved = {name: abs(models[name]["nll_per_token"] - models["full"]["nll_per_token"]) for name in ("exact", "small")}
    assert 0 < moved["exact"] < moved["small"] < 0.1
    pairs = {(c["a"], c["b"]) for c in results["comparisons"] if c["metric"] == "nll_per_token"}
    assert {("small", "full"), ("small", "lora"), ("small", "base")} <= pairs
    assert not [w for w in results["warnings"] if "llama.cpp" in w]  # its own tokenizer agrees
    assert sum("was trained on is not known" in w for w in results["warnings"]) == 3


@llama_cpp
@pytest.mark.slow
def test_its_answers_are_those_of_the_model(work):
    answers: dict[str, list] = {}
    for line in (work / "outputs/evaluation_examples.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        if "answer" not in record:
            continue  # a row that was scored
        answers.setdefault(record["model"], []).append(record["answer"])
    same = sum(a == b for a, b in zip(answers["exact"], answers["full"], strict=True))
    assert len(answers["full"]) > 5 and same > 0.8 * len(answers["full"])  # a near tie may fall otherwise


@llama_cpp
@pytest.mark.slow
def test_batches_padding_and_its_cache_change_no_answer(work, tiny):
    """One by one, in batches of different lengths, and longer than the room that was made at first."""
    import torch

    from configs import chat
    from configs.evaluation import gguf, scoring

    tokenizer = chat.load_tokenizer(str(tiny), None, "auto")
    texts = ["What is a bond?", "Why?", "Explain what an index fund is, and what it costs. " * 4, "Why not?", "How"]
    prompts = [tokenizer(text).input_ids for text in texts]
    decoding = ([tokenizer.eos_token_id], 20)
    alone = [
        scoring.answer(gguf.load(str(work / "exact.gguf"), ""), tokenizer, [prompt], *decoding, 1, "alone")[0]
        for prompt in prompts
    ]
    model = gguf.load(str(work / "exact.gguf"), "")
    for size in (1, 2, None):
        assert scoring.answer(model, tokenizer, prompts, *decoding, size, "together") == alone
    drawn = [scoring.answer(model, tokenizer, prompts, *decoding, size, "drawn", 1.0, 7) for size in (1, None)]
    assert drawn[0] == drawn[1] != alone
    # logits of padded rows stand where their tokens do
    ids = torch.full((2, 8), tokenizer.pad_token_id)
    ids[0, 3:], ids[1] = torch.tensor(prompts[0][:5]), torch.tensor(prompts[2][:8])
    mask = torch.tensor([[0] * 3 + [1] * 5, [1] * 8])
    both = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(both[0, :3], torch.zeros(3, both.shape[-1]))
    assert torch.allclose(both[0, 3:], model(input_ids=ids[:1, 3:]).logits[0], atol=1e-3)
    assert torch.allclose(both[1], model(input_ids=ids[1:]).logits[0], atol=1e-3)
    # more rows than it holds sequences
    many = [(prompt[:1], prompt[1:]) for prompt in prompts if len(prompt) > 1] * 30
    nll = scoring.score(model, many, None, "many").reshape(30, -1)
    assert np.ptp(nll, axis=0).max() < 1e-2 < np.ptp(nll, axis=1).min()
    # its room is that of the largest batch, not of the most rows times the longest one
    assert model.room <= len(prompts) * (max(map(len, prompts)) + 20 + gguf.GROWTH)


@llama_cpp
@pytest.mark.slow
def test_a_recurrent_gguf_reads_its_prompt_anew(tmp_path, tiny):
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    from configs import chat
    from configs.evaluation import gguf, scoring

    tokenizer = chat.load_tokenizer(str(tiny), None, "auto")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mamba = MambaForCausalLM(MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2)).eval()
    mamba.save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    model = gguf.load(str(convert(tmp_path / "mamba", tmp_path / "mamba.gguf", "f32")), "")
    ids = tokenizer("What is a bond, and who buys one?").input_ids
    with torch.inference_mode():
        wanted = mamba(input_ids=torch.tensor([ids])).logits[0]
    for _ in range(2):  # the second time it has read all of them
        assert torch.allclose(model(input_ids=torch.tensor([ids])).logits[0], wanted, atol=1e-3)
        assert torch.allclose(
            model(input_ids=torch.tensor([ids]), logits_to_keep=1).logits[0, 0], wanted[-1], atol=1e-3
        )
    shorter = ids[:-3]
    found = model(input_ids=torch.tensor([shorter]), logits_to_keep=1).logits[0, 0]
    assert torch.allclose(found, wanted[len(shorter) - 1], atol=1e-3)
    assert scoring.answer(model, tokenizer, [ids], [tokenizer.eos_token_id], 5, None, "mamba")[0]["answer"]


@llama_cpp
@pytest.mark.slow
def test_what_a_server_would_do_otherwise_is_said(work, tiny):
    from configs import chat
    from configs.evaluation import gguf
    from configs.evaluation.candidates import Candidate

    prompts = [{"prompt": [{"role": "user", "content": text}]} for text in ("What is a bond?", "Why?")]
    tokenizer = chat.load_tokenizer(str(tiny), None, "auto")
    taught = Candidate("mine", "other", str(work / "exact.gguf"), tokenizer=tokenizer)
    assert gguf.served_otherwise([taught], prompts) == []
    tokenizer.add_tokens(["bond"])  # one more than the GGUF's own tokenizer knows
    other = ("other_tokens", {"name": "mine", "number": 1, "of": 2})
    assert gguf.served_otherwise([taught], prompts) == [other]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|done|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '<|done|>' }}{% endfor %}"
    notes = gguf.served_otherwise([taught], prompts)
    ends = {"name": "mine", "token": "<|done|>", "id": tokenizer.convert_tokens_to_ids("<|done|>")}
    assert ("no_end_token", ends) in notes


@llama_cpp
@pytest.mark.slow
def test_it_is_asked_in_the_template_that_it_brings(work, tiny):
    from configs import chat
    from configs.evaluation import gguf

    tokenizer = chat.load_tokenizer(str(tiny), None, "alpaca")
    found = gguf.with_its_template(str(work / "exact.gguf"), tokenizer)
    assert found.chat_template == gguf.tokenizer_of(str(work / "exact.gguf")).template != tokenizer.chat_template
    assert gguf.with_its_template(str(work / "base.gguf"), tokenizer) is tokenizer  # none of its own


@llama_cpp
@pytest.mark.slow
def test_a_gguf_answers_questions_and_talks(work, tiny):
    flags = ["--model_name", tiny, "--precision", "fp32", "--max_new_tokens", "8", "--candidates", "mine=exact.gguf"]
    said = ok(run(EVALUATE, *flags, "--prompt", "What is a bond?", cwd=work))
    assert "mine" in said
    words = [sys.executable, str(Path(__file__).parent.parent / EVALUATE), *map(str, flags), "--chat"]
    done = subprocess.run(words, input="What is a bond?\nWhy?\n/quit\n", capture_output=True, text=True, cwd=work)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("mine:") == 2


@llama_cpp
@pytest.mark.slow
def test_files_that_are_not_what_they_seem(work, tiny, tmp_path):
    from hub import tiny_phi

    whole = (work / "exact.gguf").read_bytes()
    (work / "text.gguf").write_text("not a model")
    (work / "begun.gguf").write_bytes(whole[:400])
    (work / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    convert(tiny_phi(tmp_path / "smaller", vocab=400), work / "smaller.gguf", "f32")
    # as many tokens, and other ones: the ids of one model mean nothing to the other
    backwards = tmp_path / "backwards"
    shutil.copytree(tiny, backwards)
    described = json.loads((backwards / "tokenizer.json").read_text("utf-8"))
    known = described["model"]["vocab"]
    described["model"]["vocab"] = {token: len(known) - 1 - n for token, n in known.items()}
    (backwards / "tokenizer.json").write_text(json.dumps(described), "utf-8")
    convert(backwards, work / "backwards.gguf", "f32")
    reads = tiny_with(tmp_path / "strict", tiny, "{{ raise_exception('a system message first') }}")
    convert(reads, work / "strict.gguf", "f32")
    before = (work / "outputs/evaluation_results.json").read_bytes()
    for name, said in (
        ("text", "text.gguf is no GGUF"),
        ("begun", "begun.gguf cannot be read by llama.cpp"),
        ("cut", "cut.gguf cannot be read by llama.cpp"),
        ("smaller", "smaller.gguf has 400 tokens"),
        ("backwards", "which are not those of MODEL_NAME's tokenizer"),
        ("strict", "mine cannot be asked test row"),
    ):
        flags = ["--model_name", tiny, "--max_new_tokens", "4", "--precision", "fp32", "--max_eval_samples", "4"]
        errors = refused(run(EVALUATE, *flags, "--candidates", f"mine={name}.gguf", cwd=work), said)
        assert len(errors) == 1
        assert (work / "outputs/evaluation_results.json").read_bytes() == before


def tiny_with(folder: Path, tiny: Path, template: str) -> Path:
    """A copy of the tiny model with this chat template."""
    shutil.copytree(tiny, folder)
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    return folder


@llama_cpp
@pytest.mark.slow
def test_a_server_without_a_template_or_with_thoughts_is_named(work, tiny, tmp_path):
    from test_thinking import THINKER

    from configs import chat
    from configs.evaluation import gguf
    from configs.evaluation.candidates import Candidate

    prompts = [{"prompt": [{"role": "user", "content": "What is a bond?"}]}]
    tokenizer = chat.load_tokenizer(str(tiny), None, "auto")
    bare = Candidate("bare", "other", str(work / "base.gguf"), tokenizer=tokenizer)
    assert gguf.served_otherwise([bare], prompts) == [("no_template", {"name": "bare"})]
    path = str(convert(tiny_with(tmp_path / "thinker", tiny, THINKER), tmp_path / "thinker.gguf", "f32"))
    asked = gguf.with_its_template(path, tokenizer)
    assert chat.is_silent(asked)
    notes = gguf.served_otherwise([Candidate("mine", "other", path, tokenizer=asked)], prompts)
    assert ("served_thinking", {"name": "mine"}) in notes


def test_without_the_package_it_says_which_one(tmp_path, trained, tiny):
    """Hidden from the step, where it is installed."""
    work = tmp_path / "work"
    shutil.copytree(trained, work)
    (work / "mine.gguf").write_bytes(b"GGUF" + bytes(60))
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/sitecustomize.py").write_text("import sys\nsys.modules['llama_cpp'] = None\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "hidden")}
    result = run(EVALUATE, "--model_name", tiny, "--candidates", "mine=mine.gguf", cwd=work, env=env)
    errors = refused(result, "mine.gguf is a GGUF, which needs llama-cpp-python", "pip install llama-cpp-python")
    assert len(errors) == 1 and not (work / "outputs/evaluation_results.json").exists()
