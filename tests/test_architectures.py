"""Phi-, Llama- and Qwen-style models go through all four steps: what differs between them comes out right."""

import json
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS, ok, run, write_rows
from hub import finance_rows, tiny_phi
from peft import PeftModel
from safetensors import safe_open
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, normalizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from configs import chat

pytestmark = pytest.mark.slow
SHAPE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 1024}
TEXTS = [row[key] for row in finance_rows(64, seed=1) for key in ("instruction", "input", "output")]
# Qwen2.5's own, without its tools: a system message by default, and an end of turn that is no end of text
QWEN = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
END = {"phi": "<|endoftext|>", "llama": "</s>", "qwen": "<|im_end|>"}
TRAINING = (
    "--precision fp32 --gradient_checkpointing false --batch_size 8 --gradient_accumulation_steps 1 --max_steps 40 "
    "--eval_steps 20 --save_steps 20 --learning_rate 1e-2 --warmup_ratio 0.1"
).split()


def llama(folder: Path) -> None:
    """As Llama-2: a BOS before every text, byte fallback, a head of its own, shared keys and values, no template."""
    spm = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    spm.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    spm.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False))
    trained = json.loads(spm.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    tokenizer = LlamaTokenizer(vocab=trained["vocab"], merges=merges, add_bos_token=True, model_max_length=1024)
    config = LlamaConfig(vocab_size=600, **SHAPE, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def qwen_tokenizer(template: str) -> Qwen2Tokenizer:
    """As Qwen's: its own template, <|im_end|> ends a turn, no BOS."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=480, show_progress=False)
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    more = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "extra_special_tokens": ["<|im_start|>"]}
    tokenizer = Qwen2Tokenizer(vocab=trained["vocab"], merges=merges, model_max_length=1024, **more)
    tokenizer.chat_template = template
    return tokenizer


def qwen(folder: Path) -> None:
    """As Qwen2.5-Instruct: a tied head, biases in attention."""
    tokenizer = qwen_tokenizer(QWEN)
    # more rows than tokens, as there
    config = Qwen2Config(vocab_size=512, **SHAPE, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module", params=["phi", "llama", "qwen"])
def work(request, tmp_path_factory) -> tuple[str, Path]:
    """(the family, a folder in which all four steps have run on its tiny model, which is in model/)."""
    folder = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        {"phi": tiny_phi, "llama": llama, "qwen": qwen}[request.param](folder / "model")
    rows = write_rows(folder / "rows.jsonl", finance_rows(160))
    ok(run(SCRIPTS[0], "--dataset_name", rows, "--model_name", "model", "--eval_fraction", "0.2", cwd=folder))
    lora = ("--use_4bit", "false", "--merge_adapter", "--lora_dropout", "0")
    ok(run(SCRIPTS[1], "--model_name", "model", *TRAINING, *lora, cwd=folder))
    ok(run(SCRIPTS[2], "--model_name", "model", *TRAINING, cwd=folder))
    short = ("--max_new_tokens", "16", "--resamples", "2000")
    ok(run(SCRIPTS[3], "--model_name", "model", *short, cwd=folder))
    return request.param, folder


def load(path: Path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def scored(folder: Path, model: str) -> list[dict]:
    """The records of the scored test rows of one model."""
    lines = (folder / "outputs" / "evaluation_examples.jsonl").read_text("utf-8").splitlines()
    return [row for line in lines if (row := json.loads(line))["model"] == model and "context_ids" in row]


def test_there_is_one_bos_where_the_model_wants_one(work):
    family, folder = work
    tokenizer = AutoTokenizer.from_pretrained(folder / "outputs" / "full_model" / "final_model")
    rows = scored(folder, "full")
    assert len(rows) >= 8
    for row in rows:
        ids = row["context_ids"] + row["continuation_ids"]
        if family == "llama":
            assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        elif family == "qwen":
            assert tokenizer.bos_token is None and tokenizer.decode(ids).startswith("<|im_start|>system\nYou are")
        else:  # its BOS is its EOS
            assert ids[0] != tokenizer.bos_token_id
    # the same ids as in training, but for the end of the answer, which is not scored
    end = tokenizer.convert_tokens_to_ids(END[family])
    assert {(*row["context_ids"], *row["continuation_ids"], end) for row in rows} <= encoded_rows(folder, tokenizer)


def encoded_rows(folder: Path, tokenizer) -> set[tuple[int, ...]]:
    """Token ids of the test rows as training encodes rows."""
    from datasets import load_from_disk

    rows = [row for row in load_from_disk(str(folder / "data" / "eval")) if row["part"] == "test"]
    return {tuple(sum(chat.encode(tokenizer, row["prompt"], row["completion"]), [])) for row in rows}


def test_the_end_of_an_answer_is_the_models_own_and_is_learned(work):
    family, folder = work
    outputs = folder / "outputs"
    full = outputs / "full_model" / "final_model"
    tokenizer = AutoTokenizer.from_pretrained(full)
    end = tokenizer.convert_tokens_to_ids(END[family])
    rows = scored(folder, "full")
    assert all(end not in row["continuation_ids"] for row in rows)
    ends = 3 if family == "qwen" else 1  # there, it also ends the system's and the user's turn
    assert all(ids.count(end) == ends and ids[-1] == end for ids in encoded_rows(folder, tokenizer))
    chance = {}
    for name, model in {"base": load(folder / "model"), "full": load(full), "lora": load(merged(folder))}.items():
        chance[name] = torch.stack([log_chance(model, row, end) for row in rows[:8]]).mean().item()
    assert min(chance["full"], chance["lora"]) > chance["base"] + 0.5, chance
    # whoever loads the folder stops there
    for path in (full, merged(folder)):
        ends = json.loads((path / "generation_config.json").read_text("utf-8"))["eos_token_id"]
        assert end in ([ends] if isinstance(ends, int) else ends)


def log_chance(model, row: dict, end: int) -> torch.Tensor:
    """Log probability of the end token behind a whole answer."""
    ids = torch.tensor([row["context_ids"] + row["continuation_ids"]])
    with torch.no_grad():
        return model(ids).logits[0, -1].log_softmax(-1)[end]


def merged(folder: Path) -> Path:
    return folder / "outputs" / "lora_model" / "merged_model"


def test_merged_equals_adapter(work):
    _, folder = work
    adapter = folder / "outputs" / "lora_model" / "final_lora_adapter"
    base = load(folder / "model")
    ids = torch.tensor([scored(folder, "lora")[0]["context_ids"]])
    with torch.no_grad():
        before = base(ids).logits
        with_adapter = PeftModel.from_pretrained(base, adapter)(ids).logits
        after = load(merged(folder))(ids).logits
    moved = (with_adapter - before).abs().max()
    # the merged weights are rounded to the base's 16 bits
    assert (with_adapter - after).abs().max() < 0.05 * moved, moved
    log = json.loads((adapter.parent / "training_log.json").read_text("utf-8"))
    assert log["merge"]["nll_after"] == pytest.approx(log["merge"]["nll_before"], abs=0.02)


def test_a_tied_head_is_saved_once_and_stays_tied(work):
    family, folder = work
    for path in (folder / "outputs" / "full_model" / "final_model", merged(folder)):
        with safe_open(path / "model.safetensors", "pt") as file:
            names = set(file.keys())
        assert ("lm_head.weight" in names) == (family != "qwen")
        model = load(path)
        tied = model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
        assert tied == (family == "qwen") == json.loads((path / "config.json").read_text())["tie_word_embeddings"]


def test_a_modelfile_lies_where_ollama_reads_the_architecture(work):
    family, folder = work
    adapter = folder / "outputs" / "lora_model" / "final_lora_adapter"
    assert not (adapter / "Modelfile").exists()
    for path in (folder / "outputs" / "full_model" / "final_model", merged(folder)):
        assert (path / "Modelfile").exists() == (family != "phi")
        if family != "phi":
            content = (path / "Modelfile").read_text("utf-8")
            assert f'PARAMETER stop "{END[family]}"' in content and "<s>" not in content
            assert ("You are helpful." in content) == (family == "qwen")


def test_all_models_are_compared(work):
    _, folder = work
    results = json.loads((folder / "outputs" / "evaluation_results.json").read_text("utf-8"))
    assert set(results["models"]) == {"base", "lora", "full", "merged"} and not results["unsound"]
    losses = {name: model["nll_per_token"] for name, model in results["models"].items()}
    assert max(losses["lora"], losses["full"]) < losses["base"] - 0.5, losses
