"""A model that leaves: the Modelfile for Ollama, and the upload to the Hub."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, SHORT, ok, refused, run
from hub import Fault, Hub
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from configs import chat
from configs.training import ollama

CHATML_OF_QWEN = (  # Qwen2.5's, without its tools: a system message that is there by default
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
ZEPHYR = (  # TinyLlama's
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
GEMMA = (  # no system turn
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else 'user' %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
COUNTING = "{% for message in messages %}{{ message.content }} ({{ loop.index }}){{ eos_token }}{% endfor %}"


def tokenizer_with(template: str | None, bos: bool) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with Llama's special tokens; template: its own, or the name of one of ours."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", "<|im_end|>", "<end_of_turn>", *alphabet]
    plain = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    if bos:
        plain.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_end|>", "<end_of_turn>"],
    )
    ours = ROOT / "configs" / "chat_templates" / f"{template}.jinja"
    if len(template) < 20:
        template = "{{- bos_token -}}\n" * bos + ours.read_text("utf-8")
    tokenizer.chat_template = template
    return tokenizer


def go(template: str, messages: list[dict]) -> str:
    """Renders the part of Go's text/template that a Modelfile of ours uses: range, if, else if, end and $last."""
    parts = re.split(r"(\{\{-? .*? -?\}\})", template)
    heads, at, out, last = [part[2:-2].strip("- ") for part in parts[1::2]], 1, [], ""
    assert heads[:2] == ['$last := ""', "range .Messages"] and parts[0] == parts[2] == "" and parts[1][2] == "-"
    for message in messages:
        at, taken, done = 2, True, False  # inside an if: whether this branch is taken, and whether one was
        while True:
            head, text = heads[at], parts[2 * at + 2]
            if found := re.fullmatch(r'(else )?if and \(eq \$last "(\w*)"\) \(eq \.Role "(\w+)"\)', head):
                done = done and bool(found[1])
                taken = not done and (found[2], found[3]) == (last, message["role"])
                done = done or taken
            elif head == ".Content":
                out.append(message["content"])
            elif head == "$last = .Role":
                last = message["role"]
            else:
                assert head == "end", head
                if heads[at - 1] == "$last = .Role":
                    break
                taken = True
            if taken and head != "$last = .Role":
                out.append(text)
            at += 1
    return "".join(out) + parts[2 * at + 2]


TURNS = [("user", "What is 贷款, in %?"), ("assistant", 'A "loan".\nRepaid later.'), ("user", "And {a} bond?")]
TURNS += [("assistant", "Debt, too."), ("user", "Thanks\n\n- a list")]
SYSTEM = [("system", "Answer in one sentence.")]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(
    ("template", "stop", "system"),
    [
        ("chatml", "</s>", True),
        ("alpaca", "</s>", True),
        ("llama", "</s>", True),
        (CHATML_OF_QWEN, "<|im_end|>", True),
        (ZEPHYR, "</s>", True),
        (GEMMA, "<end_of_turn>", False),
    ],
)
def test_the_modelfile_writes_what_was_trained(template, stop, system, bos):
    tokenizer = tokenizer_with(template, bos)
    content = ollama.modelfile(tokenizer, "LlamaForCausalLM")
    assert "\nFROM .\n" in content and f'\nPARAMETER stop "{stop}"\n' in content
    (text,) = re.findall(r'^TEMPLATE """(.*)"""$', content, re.DOTALL | re.MULTILINE)
    cases = [TURNS[:1], TURNS[:3], TURNS] + ([SYSTEM + TURNS[:1], SYSTEM + TURNS[:3]] if system else [])
    for case in cases:
        messages = [{"role": role, "content": said} for role, said in case]
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # Ollama's tokenizer adds the BOS where the model's does
        assert go(text, messages) == (expected.removeprefix("<s>") if bos else expected)
    assert tokenizer.decode([chat.answer_end(tokenizer)]) == stop


@pytest.mark.parametrize(
    ("template", "architecture", "why"),
    [
        (COUNTING, "LlamaForCausalLM", "depends on more than the roles"),
        (CHATML_OF_QWEN.replace("helpful", '""" helpful'), "Qwen2ForCausalLM", "read as an instruction"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "LlamaForCausalLM", "changes what is said"),
    ],
)
def test_where_there_is_no_modelfile_the_reason_is_said(template, architecture, why, tmp_path, capsys):
    tokenizer = tokenizer_with(template, False)
    ollama.write(tmp_path, tokenizer, architecture)
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().out
    assert said.startswith("no Modelfile for Ollama in ") and why in said


def test_an_architecture_that_ollama_does_not_read_gets_no_modelfile(tmp_path, capsys):
    tokenizer = tokenizer_with("chatml", False)
    ollama.write(tmp_path, tokenizer, "PhiForCausalLM")
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="does not read PhiForCausalLM from safetensors; llama.cpp"):
        ollama.modelfile(tokenizer, "PhiForCausalLM")


# --- to the Hub


TOKEN = "hf_a-token-that-may-write"


@pytest.fixture
def at_hub(fresh, tmp_path):
    """(a Hub where `me` may write, a folder with data/ and model/, the environment of a command there)."""
    with Hub() as hub:
        hub.users[TOKEN] = "me"
        yield hub, fresh(), hub.env(tmp_path / "home") | {"HF_TOKEN": TOKEN}


def train(script: str, work: Path, env: dict, *words: str):
    return run(script, "--model_name", "model", *SHORT, *words, cwd=work, env=env)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS[1:3])
def test_the_final_folder_goes_to_the_hub_with_a_card_that_loads_it(script, at_hub, tmp_path):
    hub, work, env = at_hub
    name = f"me/{'my-adapter' if script == SCRIPTS[1] else 'my-model'}"
    said = ok(train(script, work, env, "--push_to_hub", name))
    assert f"uploaded: {hub.url}/{name}" in said and said.splitlines()[-1].startswith("done: ")
    assert hub.private == {name: True} and not hub.strays
    folder = next(work.glob("outputs/*/final_*"))
    repo = hub.repos["models", name]
    files = {path: file.data for path, file in repo.commits[repo.main].items() if path != ".gitattributes"}
    assert files.keys() == {path.name for path in folder.iterdir()}
    same = {path.name for path in folder.iterdir() if files[path.name] == path.read_bytes()}
    assert files.keys() - same == {"README.md"} | ({"adapter_config.json"} if script == SCRIPTS[1] else set())
    everything = b"".join(files.values())
    assert str(work).encode() not in everything and TOKEN.encode() not in everything
    card = files["README.md"].decode()
    for part in ("rows.jsonl", "Validation loss of the kept checkpoint", "| LEARNING_RATE |", "licenses", f'"{name}"'):
        assert part in card
    assert "Not measured when this was uploaded" in card and "final_" not in card
    log = json.loads((folder.parent / "training_log.json").read_text("utf-8"))
    assert log["pushed"] == {name: f"{hub.url}/{name}"} and TOKEN not in json.dumps(log)
    # somebody else loads it by its name, with the card's own code
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)
    if script == SCRIPTS[2]:
        env = hub.env(tmp_path / "another home") | {"HF_TOKEN": TOKEN}
        ok(run("-I", "-c", code, cwd=tmp_path, env=env))
    # what is there is not uploaded again, and under another name by hand
    before = len(hub.requests)
    assert "already done" in ok(train(script, work, env | {"HF_TOKEN": TOKEN}, "--push_to_hub", name))
    assert not [line for line in hub.requests[before:] if "commit" in line]
    other = train(script, work, env, "--push_to_hub", "the-org/copy")
    refused(other, f": hf upload the-org/copy outputs/{folder.parts[-2]}")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("my-model", {}, "a name, 96 characters at most, e.g. --push_to_hub me/my-model"),
        ("me/a/b", {}, "give the owner and a name"),
        ("me/my-model", {"HF_TOKEN": ""}, "there is no token; make one with write access and run `hf auth login`"),
        ("me/my-model", {"HF_TOKEN": "hf_nobody's"}, "does not accept the token (HTTP 401)"),
        ("me/my-model", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ("me/my-model", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "nothing can be uploaded to me/my-model"),
        ("you/my-model", {}, "the token is of 'me', who is not in 'you': --push_to_hub me/my-model"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_the_training(name, change, said, at_hub):
    hub, work, env = at_hub
    errors = refused(train(SCRIPTS[2], work, env | change, "--push_to_hub", name), said)
    assert len(errors) == 1 and not list((work / "outputs").glob("*/checkpoint-*"))
    assert not [line for line in hub.requests if line.startswith("POST")]


@pytest.mark.slow
def test_an_upload_that_fails_loses_no_training(at_hub):
    hub, work, env = at_hub
    hub.faults.append(Fault("status", "/commit/", status=403))
    result = train(SCRIPTS[2], work, env, "--push_to_hub", "me/my-model")
    refused(result, "outputs/full_model/final_model is done, but me/my-model", "hf upload me/my-model outputs")
    assert (work / "outputs/full_model/final_model/model.safetensors").is_file()
    hub.faults.clear()
    again = train(SCRIPTS[2], work, env, "--push_to_hub", "me/my-model")
    refused(again, "is finished already, and is not on the Hub as me/my-model: hf upload me/my-model outputs/")
