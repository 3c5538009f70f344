"""Models that can think before they answer: that is switched off in training, in scoring and where they go."""

import json

import pytest
import torch
from conftest import SCRIPTS, SHORT, ok, refused, run, write_rows
from hub import finance_rows
from test_architectures import SHAPE, qwen_tokenizer
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from configs import chat
from configs.training import ollama

# As Qwen3's, without its tools: an answer that is the last turn has a block of thoughts, an earlier one has none, and
# a prompt closes an empty block where thinking is off.
THINKER = (
    "{%- for m in messages %}{%- set said = m.content %}{%- set thoughts = '' %}"
    "{%- if m.role == 'assistant' and '</think>' in said %}"
    "{%- set thoughts = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{%- set said = said.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}{{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- said + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
EMPTY = "<think>\n\n</think>\n\n"
ASKED = [{"role": "user", "content": "What is a bond?"}]
ANSWERED = [{"role": "assistant", "content": "A loan."}]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory) -> str:
    """The folder of a tiny Qwen3 with such a template."""
    folder = tmp_path_factory.mktemp("thinker") / "model"
    tokenizer = qwen_tokenizer(THINKER)
    tokenizer.add_tokens(["<think>", "</think>"])  # tokens, and no special ones, as there
    config = Qwen3Config(vocab_size=512, **SHAPE, head_dim=16, eos_token_id=tokenizer.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_switch_is_off_and_travels_with_the_template(thinker, tmp_path):
    tokenizer = chat.load_tokenizer(thinker, None, "auto")
    assert chat.is_silent(tokenizer) and not chat.is_our_template(tokenizer)
    before, after = chat.render(tokenizer, ASKED, ANSWERED)
    assert before.endswith("<|im_start|>assistant\n" + EMPTY) and after == "A loan.<|im_end|>"
    # an earlier answer stands in a prompt as the model has seen it
    longer = [*ASKED, *ANSWERED, {"role": "user", "content": "Why?"}]
    assert chat.render(tokenizer, longer, ANSWERED)[0].count("<think>") == 1
    # who loads it again, and asks for thoughts, gets the prompts of the training
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    said = {"tokenize": False, "add_generation_prompt": True}
    assert again.apply_chat_template(ASKED, **said, enable_thinking=True) == before
    assert chat.load_tokenizer(str(tmp_path), None, "auto").chat_template == tokenizer.chat_template
    assert not chat.is_silent(chat.load_tokenizer(thinker, None, "chatml"))


ALWAYS = "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        ALWAYS + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}{# enable_thinking #}",
        # it asks a namespace of its own
        "{%- set ns = namespace(enable_thinking=true) %}" + ALWAYS + "{%- if add_generation_prompt %}"
        "{{- '<|im_start|>assistant\n' }}{%- if not ns.enable_thinking %}{{- '<think>' }}{%- endif %}{%- endif %}",
        # off, it closes a block that its own answers do not have
        ALWAYS + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is false %}{{- '<think></think>' }}{%- endif %}{%- endif %}",
        "{{ raise_exception('a system message first') }}{{ enable_thinking }}",
    ],
)
def test_a_template_that_the_switch_does_not_fit_stays_as_it_is(thinker, template):
    tokenizer = AutoTokenizer.from_pretrained(thinker)
    tokenizer.chat_template = template
    chat.switch_thinking_off(tokenizer)
    assert tokenizer.chat_template == template
    tokenizer.chat_template = "\n" + THINKER  # white space before it is what it was
    raw = tokenizer.apply_chat_template(ASKED, tokenize=False)
    chat.switch_thinking_off(tokenizer)
    assert chat.is_silent(tokenizer) and tokenizer.apply_chat_template(ASKED, tokenize=False) == raw


def test_answers_with_thoughts_are_left_out_or_kept_as_text(thinker, tmp_path):
    rows = finance_rows(160)
    for row in rows[:40]:
        row["output"] = "<think>\nWhat do they mean?\n</think>\n\n" + row["output"]
    rows[40]["output"] = EMPTY + rows[40]["output"]  # as some data sets have it; nobody thinks in it
    source = write_rows(tmp_path / "rows.jsonl", rows)
    flags = ("--dataset_name", source, "--model_name", thinker, "--eval_fraction", "0.2")
    refused(run(SCRIPTS[0], *flags, cwd=tmp_path), "40 x answer with thoughts", "--prompt_format chatml keeps them")
    flags += ("--max_drop_fraction", "0.3")
    for more in ((), ("--dry_run",)):
        said = ok(run(SCRIPTS[0], *flags, *more, cwd=tmp_path))
        assert "its chat template is used with thinking switched off" in said
    manifest = json.loads((tmp_path / "data/manifest.json").read_text("utf-8"))
    reason = "answer with thoughts, which the chat template switches off (--prompt_format chatml keeps them)"
    assert manifest["rows"]["dropped"][reason] == 40
    ok(run(SCRIPTS[0], *flags, "--prompt_format", "chatml", "--data_dir", "kept", cwd=tmp_path))
    kept = json.loads((tmp_path / "kept/manifest.json").read_text("utf-8"))["rows"]
    assert reason not in kept["dropped"] and kept["train"] > manifest["rows"]["train"]
    # where all answers have them, nothing is left
    write_rows(source, rows[:40])
    refused(run(SCRIPTS[0], *flags, "--data_dir", "none", cwd=tmp_path), "--prompt_format chatml")


@pytest.mark.slow
def test_all_steps_train_and_ask_without_thoughts(thinker, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", finance_rows(160))
    model = ("--model_name", thinker)
    ok(run(SCRIPTS[0], "--dataset_name", rows, *model, "--eval_fraction", "0.2", cwd=tmp_path))
    ok(run(SCRIPTS[1], *model, *SHORT, "--use_4bit", "false", "--merge_adapter", cwd=tmp_path))
    ok(run(SCRIPTS[2], *model, *SHORT, cwd=tmp_path))
    ok(run(SCRIPTS[3], *model, "--max_new_tokens", "8", "--resamples", "2000", cwd=tmp_path))
    outputs = tmp_path / "outputs"
    tokenizer = AutoTokenizer.from_pretrained(outputs / "full_model/final_model")
    assert chat.is_silent(tokenizer)
    scored = [json.loads(line) for line in (outputs / "evaluation_examples.jsonl").read_text("utf-8").splitlines()]
    for name in ("lora", "full", "merged"):
        asked = [tokenizer.decode(row["context_ids"]) for row in scored if row["model"] == name and "nll" in row]
        assert asked and all(text.endswith("<|im_start|>assistant\n" + EMPTY) for text in asked)
        answers = [row["continuation_ids"] for row in scored if row["model"] == name and "nll" in row]
        assert not any("think>" in tokenizer.decode(ids) for ids in answers)
    assert json.loads((outputs / "full_model/training_log.json").read_text("utf-8"))["summary"]["status"] == "done"
    assert ollama.go_template(tokenizer).endswith("<|im_start|>assistant\n" + EMPTY)
