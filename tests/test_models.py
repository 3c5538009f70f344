"""Model folders that are not what they seem: refused in a sentence, before anything relies on them."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, SHORT, ok, refused, run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from configs import chat, hub, models
from configs.evaluation.candidates import Candidate
from configs.evaluation.judge import RewardJudge
from configs.evaluation.scoring import load_model
from configs.training.before import model_config

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daa\n"
# Code that a model brings along: it leaves a file where it runs.
OWN_CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
Path("ran").touch()
from transformers import PhiConfig, PhiForCausalLM
class OwnConfig(PhiConfig):
    model_type = "own"
class OwnModel(PhiForCausalLM):
    config_class = OwnConfig
"""


# --- what can be done to a folder


def change_json(path: Path, **values) -> None:
    """Change keys of a JSON file; None takes one away."""
    content = json.loads(path.read_text("utf-8")) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), "utf-8")


def config(**values) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", **values)


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text, "utf-8")


def weights(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return apply


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def in_shards(folder: Path) -> None:
    """Two files of weights with an index, of which the second is missing."""
    names = sorted(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    files = {name: f"model-0000{1 + (name == names[-1])}-of-00002.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def no_index(folder: Path) -> None:
    in_shards(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1, 2')


def own_code(folder: Path) -> None:
    (folder / "own.py").write_text(OWN_CODE)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change_json(folder / "config.json", model_type="own", auto_map=auto_map)


def another_type(kind: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

        if kind == "t5":
            sizes = {"vocab_size": 512, "d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 16}
            T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(folder)
        else:
            sizes = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
            BertForMaskedLM(BertConfig(**sizes, intermediate_size=64)).save_pretrained(folder)

    return apply


def adapter_beside(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)


MODELS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ["holds no weights"]),
    "a layer is missing": (
        weights(lambda t: {k: v for k, v in t.items() if ".layers.1." not in k}),
        ["lacks 14 of the weights", "model.layers.1.input_layernorm.bias", "random"],
    ),
    "one bias is missing": (
        weights(lambda t: {k: v for k, v in t.items() if k != "lm_head.bias"}),
        ["lacks 1 of the weights", "(lm_head.bias)"],
    ),
    "other names": (
        weights(lambda t: {f"net.{k}": v for k, v in t.items()}),
        ["lacks", "and holds", "net.lm_head.bias", "random"],
    ),
    "another shape": (config(intermediate_size=128), ["fc1.bias has the shape (256,)", "asks for (128,)"]),
    "git-LFS pointer": (write("model.safetensors", POINTER), ["git-LFS pointers", "git lfs pull", "hf download"]),
    "git-LFS pointer of the configuration": (
        write("config.json", POINTER),
        ["pointers", "config.json", "git lfs pull"],
    ),
    "cut off": (cut, ["model.safetensors, which is cut off or damaged"]),
    "empty": (write("model.safetensors", ""), ["model.safetensors, which is empty"]),
    "a page instead of weights": (write("model.safetensors", "<html>404</html>"), ["cut off or damaged"]),
    "a bomb in the header": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}"),
        ["cut off or damaged"],
    ),
    "a shard is missing": (in_shards, ["lacks 1 of its 2 files", "model-00002-of-00002.safetensors"]),
    "an index that is no JSON": (no_index, ["model.safetensors.index.json that cannot be read"]),
    "pickles only": (pickled, ["pickles only (pytorch_model.bin)", "can run code", "safetensors/convert"]),
    "a pickle by name": (
        lambda folder: (pickled(folder), config(transformers_weights="adapter_model.bin")(folder)),
        ["names a pickle"],
    ),
    "no JSON": (write("config.json", "{"), ["not a valid JSON"]),
    "bytes": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"), ["not a valid JSON"]),
    "deep JSON": (write("config.json", "[" * 100_000), ["cannot be loaded (RecursionError"]),
    "a list": (write("config.json", "[1, 2]"), ["holds no object, but a list"]),
    "a number": (write("config.json", "1"), ["cannot be loaded"]),
    "no type": (config(model_type=None), ["is of the type None"]),
    "an unknown type": (config(model_type="gpt-9"), ["'gpt-9'", "transformers 5.", "does not know"]),
    "a type that is a list": (config(model_type=["phi"]), ["['phi']", "does not know"]),
    "code of its own": (own_code, ["'own'", "brings code of its own", "never run"]),
    "an auto_map that is none": (config(auto_map=7), ["cannot be loaded"]),
    "an encoder and a decoder": (another_type("t5"), ["no causal language model", "'t5'"]),
    "a model that fills in words": (another_type("bert"), ["no causal language model", "'bert'"]),
    "a negative size": (config(hidden_size=-64), ["hidden_size is -64"]),
    "a size of zero": (config(num_attention_heads=0), ["num_attention_heads is 0"]),
    "a size in words": (config(hidden_size="large"), ["cannot be loaded", "hidden_size"]),
    "a billion layers": (config(num_hidden_layers=10**9), ["num_hidden_layers is 1,000,000,000"]),
    "heads that do not divide": (config(num_attention_heads=7), ["has the shape (64, 64)"]),
    "an unknown activation": (config(hidden_act="glue"), ["cannot be loaded"]),
    "weights in integers": (config(dtype="int8"), ["dtype is int8"]),
    "weights in nothing known": (config(dtype="float99"), ["cannot be loaded"]),
    "an adapter beside it": (adapter_beside, ["adapter_config.json"]),
}


def changed(tiny: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    """A copy of the tiny model to which something was done."""
    shutil.copytree(tiny, folder / "model")
    change(folder / "model")
    return folder / "model"


def sentence(capsys: pytest.CaptureFixture, words: list[str], call: Callable, *args, **kwargs) -> str:
    """The one `error:` line with which a call must end, with exit code 2, and without the library's table."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        call(*args, **kwargs)
    assert ending.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("error: ")]
    assert "LOAD REPORT" not in "".join(lines)
    for word in words:
        assert word in line, line
    return line


@pytest.mark.parametrize("what", MODELS)
def test_a_training_refuses_it_before_its_memory_plan(tiny, tmp_path, capsys, monkeypatch, what):
    change, words = MODELS[what]
    monkeypatch.chdir(tmp_path)
    folder = changed(tiny, tmp_path, change)
    line = sentence(capsys, [*words, str(folder)], model_config, str(folder), None, 64, weights=True)
    assert re.search("--model_name NAME|git lfs pull|name its base", line)
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize("what", [what for what in MODELS if what != "a model that fills in words"])
def test_an_evaluation_refuses_it(tiny, tmp_path, capsys, monkeypatch, what):
    change, words = MODELS[what]
    if what in ("an encoder and a decoder", "a pickle by name"):
        words = []  # the training has refused it; here it must only be a sentence
    monkeypatch.chdir(tmp_path)
    folder = changed(tiny, tmp_path, change)
    sentence(capsys, words, load_model, [Candidate("base", "base", str(folder))], torch.float32, None)
    assert not list(tmp_path.rglob("ran"))


def test_a_known_type_is_read_by_the_library_and_not_by_the_code_that_it_brings(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = changed(tiny, tmp_path, lambda folder: (own_code(folder), config(model_type="phi")(folder)))
    given = model_config(str(folder), None, 64, weights=True)
    model = models.load(AutoModelForCausalLM, str(folder), None, config=given)
    assert type(model).__module__ == "transformers.models.phi.modeling_phi"
    assert not list(tmp_path.rglob("ran"))


def test_a_sound_model_is_not_refused(tiny, tmp_path, capsys):
    from hub import tiny_phi

    tied = tiny_phi(tmp_path / "tied", tied=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")  # supplied by the embedding: not missing
    for folder in (tiny, tied):
        config = model_config(str(folder), None, 64, weights=True)
        model = models.load(AutoModelForCausalLM, str(folder), None, config=config, dtype=torch.float32)
        exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for (name, mine), (_, theirs) in zip(model.state_dict().items(), exact.state_dict().items(), strict=True):
            assert torch.equal(mine, theirs), name
        assert model.config._attn_implementation == exact.config._attn_implementation == "sdpa"
    said = capsys.readouterr()
    assert "error" not in said.err and "LOAD REPORT" not in said.err and "not used" not in said.out


def test_a_tied_weight_that_nothing_supplies_is_missing(tmp_path, capsys):
    from hub import tiny_phi

    folder = tiny_phi(tmp_path / "tied", tied=True)
    weights(lambda t: {k: v for k, v in t.items() if "embed_tokens" not in k})(folder)
    sentence(capsys, ["lacks 2 of the weights", "embed_tokens"], model_config, str(folder), None, 64, weights=True)


def test_weights_that_are_not_used_are_named(tiny, tmp_path, capsys):
    folder = changed(tiny, tmp_path, weights(lambda t: t | {"extra.weight": torch.zeros(2)}))
    model_config(str(folder), None, 64, weights=True)
    models.load(AutoModelForCausalLM, str(folder), None)
    said = capsys.readouterr()
    assert (
        "weights that the model does not use, 1 of them (extra.weight)" in said.out and "LOAD REPORT" not in said.err
    )


def test_a_plan_needs_no_weights_but_a_configuration(tiny, tmp_path, capsys):
    folder = changed(tiny, tmp_path, lambda folder: (folder / "model.safetensors").unlink())
    assert model_config(str(folder), None, 64, weights=False).hidden_size == 64
    config(hidden_act="glue")(folder)
    sentence(capsys, ["cannot be loaded"], model_config, str(folder), None, 64, weights=False)


def test_4_bits_notice_what_is_missing_or_of_another_shape(tiny, tmp_path, capsys):
    from configs import device

    def load(folder: Path):
        how = {"quantization_config": device.nf4(torch.float32), "device_map": {"": "cpu"}, "dtype": torch.float32}
        return models.load(AutoModelForCausalLM, str(folder), None, **how)

    assert load(tiny).is_loaded_in_4bit
    folder = changed(tiny, tmp_path, MODELS["a layer is missing"][0])
    sentence(capsys, ["lacks 14 of the weights"], load, folder)
    shutil.rmtree(folder)
    changed(tiny, tmp_path, weights(lambda t: t | {"model.layers.0.mlp.fc1.weight": torch.zeros(128, 64)}))
    sentence(capsys, ["fc1.weight has the shape (128, 64)", "asks for (256, 64)"], load, folder)


@pytest.mark.parametrize("wrong", [{"do_sample": False, "temperature": 0.6}, {"temperature": "hot"}])
def test_generation_settings_that_contradict_themselves_do_not_cost_a_training(tiny, tmp_path, capsys, wrong):
    """The library refuses to save such settings once they were changed, and a training changes the end tokens."""
    text = json.dumps({"eos_token_id": 7, **wrong})
    folder = changed(tiny, tmp_path, write("generation_config.json", text))
    model = models.load(AutoModelForCausalLM, str(folder), None)
    model.generation_config.eos_token_id = [model.generation_config.eos_token_id, 8]
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert saved["eos_token_id"] == [7, 8] and not wrong.keys() & saved.keys()
    assert "contradicts itself" in capsys.readouterr().out


# --- attention


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_kernel_that_a_configuration_names_is_not_loaded(tiny, tmp_path, monkeypatch, key):
    """The library would import the package `kernels` and run what it fetches."""
    from transformers.integrations import hub_kernels

    def fetched(*args, **kwargs):
        pytest.fail(f"a kernel was asked for: {args}")

    for name in ("load_and_register_attn_kernel", "lazy_load_kernel", "get_kernel"):
        monkeypatch.setattr(hub_kernels, name, fetched, raising=False)
    folder = changed(tiny, tmp_path, config(**{key: "kernels-community/flash-attn2"}))
    given = model_config(str(folder), None, 64, weights=True)
    for model in (
        models.load(AutoModelForCausalLM, str(folder), None, config=given, attn_implementation=None),
        load_model([Candidate("base", "base", str(folder))], torch.float32, None),
    ):
        assert model.config._attn_implementation == "sdpa"


def test_a_kernel_inside_a_nested_configuration_is_not_taken_either(tmp_path):
    from transformers import Gemma3Config

    Gemma3Config().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        content[part] = (content.get(part) or {}) | {"_attn_implementation": "kernels-community/flash-attn2"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    given = models.configuration(str(tmp_path), None)
    assert given.get_text_config()._attn_implementation is None
    assert given.vision_config._attn_implementation is None


# --- tokenizers


def another_tokenizer(folder: Path) -> None:
    """One that makes ids that the model does not know."""
    from hub import tiny_phi

    other = tiny_phi(folder.with_name("other"), vocab=900)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(other / name, folder / name)


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)


def own_tokenizer(folder: Path) -> None:
    (folder / "own.py").write_text(OWN_CODE + "from transformers import CodeGenTokenizer as OwnTokenizer\n")
    auto_map = {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}
    change_json(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto_map)


TOKENIZERS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "missing": (no_tokenizer, ["tokenizer"]),
    "a git-LFS pointer": (write("tokenizer.json", POINTER), ["git-LFS pointers", "tokenizer.json", "git lfs pull"]),
    "garbage": (write("tokenizer.json", "garbage"), ["tokenizer"]),
    "empty": (write("tokenizer.json", ""), ["tokenizer"]),
    "an empty object": (write("tokenizer.json", "{}"), ["tokenizer"]),
    "a list": (write("tokenizer.json", "[]"), ["tokenizer"]),
    "settings that are no JSON": (write("tokenizer_config.json", "{"), ["tokenizer"]),
    "settings that are a list": (write("tokenizer_config.json", "[]"), ["tokenizer"]),
    "another model's": (another_tokenizer, ["another model's", "vocab_size"]),
}
CLASSES = ["BertTokenizer", "T5Tokenizer", "LlamaTokenizer", "NoSuchTokenizer", 7]


@pytest.mark.parametrize("what", TOKENIZERS)
def test_a_tokenizer_that_cannot_be_used_is_refused(tiny, tmp_path, capsys, what):
    change, words = TOKENIZERS[what]
    sentence(capsys, words, chat.load_tokenizer, str(changed(tiny, tmp_path, change)), None, "auto")


@pytest.mark.parametrize("name", CLASSES)
def test_a_tokenizer_of_another_class_works_or_is_refused(tiny, tmp_path, capsys, name):
    def change(folder: Path) -> None:
        change_json(folder / "tokenizer_config.json", tokenizer_class=name)

    folder = changed(tiny, tmp_path, change)
    try:
        tokenizer = chat.load_tokenizer(str(folder), None, "auto")
    except SystemExit as ending:
        assert ending.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert "tokenizer" in line
        return
    text = "What is an ETF? It costs $4.\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_a_tokenizers_own_code_is_not_run(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = changed(tiny, tmp_path, own_tokenizer)
    try:
        chat.load_tokenizer(str(folder), None, "auto")
    except SystemExit as ending:
        assert ending.code == 2
    assert not list(tmp_path.rglob("ran"))


# --- chat templates

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template,words",
    [
        (LOOP + TURNS, ["may never end", "--prompt_format chatml"]),
        (TURNS + "x" * 300_000, ["300,", "no real one has more than 200,000"]),
        ("{% set x = 'a' * 9999999999 %}" + TURNS, ["more than 2 GB"]),
        ("{{ 9 ** (9 ** 9) }}" + TURNS, ["may never end"]),
        ("{% for m in messages %}", ["damaged (TemplateSyntaxError"]),
        ("(" * 10 + "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", ["damaged"]),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}" + TURNS, ["damaged (SecurityError"]),
    ],
    ids=["loop", "megabytes", "memory", "power", "syntax", "nesting", "sandbox"],
)
def test_a_template_that_no_conversation_can_be_rendered_with(tiny, tmp_path, capsys, monkeypatch, template, words):
    monkeypatch.setattr(chat, "RENDERING_SECONDS", 0.5)
    folder = changed(tiny, tmp_path, write("chat_template.jinja", template))
    sentence(capsys, words, chat.load_tokenizer, str(folder), None, "auto")
    assert chat.load_tokenizer(str(folder), None, "chatml").chat_template != template  # the way out that it names


def test_a_template_that_loops_for_some_rows_only(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(chat, "RENDERING_SECONDS", 0.5)
    template = "{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}" + TURNS
    tokenizer = chat.load_tokenizer(str(changed(tiny, tmp_path, write("chat_template.jinja", template))), None, "auto")
    answer = [{"role": "assistant", "content": "b"}]
    assert chat.encode(tokenizer, [{"role": "user", "content": "go"}], answer)
    sentence(capsys, ["may never end"], chat.encode, tokenizer, [{"role": "user", "content": "loop"}], answer)


def test_of_several_templates_the_default_one_is_taken(tiny, tmp_path):
    def change(folder: Path) -> None:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates/tool_use.jinja").write_text("tools")
        (folder / "chat_template.jinja").write_text(TURNS)

    tokenizer = chat.load_tokenizer(str(changed(tiny, tmp_path, change)), None, "auto")
    assert tokenizer.chat_template == TURNS


# --- reward models, embeddings, adapters


def reward_of(tiny: Path, folder: Path) -> Path:
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    model.config.pad_token_id = model.config.eos_token_id
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def test_a_judge_without_a_head_is_refused(tiny, tmp_path, capsys):
    """A causal language model has no score.weight; the library would take a random one."""
    sentence(capsys, ["JUDGE", "lacks 1 of the weights", "score.weight"], RewardJudge, str(tiny))
    RewardJudge(str(reward_of(tiny, tmp_path / "reward")))


def test_a_judge_that_brings_code_or_pickles_is_refused(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = reward_of(tiny, tmp_path / "reward")
    own_code(folder)
    sentence(capsys, ["JUDGE", "brings code of its own", "--judge NAME"], RewardJudge, str(folder))
    assert not list(tmp_path.rglob("ran"))
    pickled(reward_of(tiny, folder))
    config(auto_map=None)(folder)
    sentence(capsys, ["JUDGE", "pickles only"], RewardJudge, str(folder))


@pytest.fixture(scope="module")
def embedder(tiny, tmp_path_factory) -> Path:
    """A folder of sentence-transformers: a tiny BERT, its mean, and a layer over it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers import models as modules
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("embedder")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.pad_token = tokenizer.eos_token
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    word = modules.Transformer(str(folder / "bert"))
    parts = [word, modules.Pooling(32, pooling_mode="mean"), modules.Dense(32, 8)]
    SentenceTransformer(modules=parts).save(str(folder / "model"))
    return folder / "model"


def test_an_embedding_model_is_read_from_safetensors_and_without_its_code(embedder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(embedder, tmp_path / "model"))
    config(attn_implementation="kernels-community/flash-attn2")(folder)
    assert models.load_embedder(str(folder), "cpu").encode(["Save first."]).shape == (1, 8)
    (folder / "own.py").write_text(OWN_CODE)
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["type"] = "own.OwnModel"
    (folder / "modules.json").write_text(json.dumps(modules))
    sentence(capsys, ["EMBEDDING_MODEL", "cannot be loaded"], models.load_embedder, str(folder), "cpu")
    shutil.rmtree(folder)
    shutil.copytree(embedder, folder)
    dense = folder / "2_Dense"
    torch.save(load_file(dense / "model.safetensors"), dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()
    sentence(capsys, ["EMBEDDING_MODEL", "2_Dense", "can run code"], models.load_embedder, str(folder), "cpu")
    assert not list(tmp_path.rglob("ran"))


def test_an_adapter_is_whole_and_no_pickle(tiny, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    def base():
        return AutoModelForCausalLM.from_pretrained(tiny)

    get_peft_model(base(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    models.load_adapter(base(), str(tmp_path), "train again")
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "layers.1." not in k}, file)
    sentence(capsys, ["lacks 2 of the adapter's 4", "; train"], models.load_adapter, base(), str(tmp_path), "train")
    torch.save(tensors, tmp_path / "adapter_model.bin")
    file.unlink()
    sentence(capsys, ["holds no adapter_model.safetensors"], models.load_adapter, base(), str(tmp_path), "train")


# --- the whole scripts


def test_every_call_that_could_run_a_models_code_says_no():
    """trust_remote_code is one constant, False, and every loader of the libraries is given it."""
    assert hub.TRUST_REMOTE_CODE is False
    calls = re.compile(r"\b(\w+)\.from_pretrained\(|\b(\w+)\.from_config\(|\b(load_dataset|SentenceTransformer)\(")
    found = 0
    for path in (*(ROOT / "configs").rglob("*.py"), *(ROOT / script for script in SCRIPTS)):
        text = path.read_text("utf-8")
        for match in calls.finditer(text):
            if match[1] == "PeftModel" or path.parent.name == "demo":
                continue  # takes no code; makes its own model
            depth, end = 1, match.end()
            while depth:
                depth += {"(": 1, ")": -1}.get(text[end], 0)
                end += 1
            assert "trust_remote_code=hub.TRUST_REMOTE_CODE" in text[match.start() : end], (path, match[0])
            found += 1
    assert found >= 8
    for path in (ROOT / "configs").rglob("*.py"):
        assert not re.search(
            r"import pickle|pickle\.load|weights_only=False|torch\.load\(", path.read_text("utf-8")
        ), path


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_pipe_of_yes_runs_no_code_of_a_model(tiny, trained, tmp_path, script):
    work = Path(shutil.copytree(trained, tmp_path / "work"))
    folder = changed(tiny, tmp_path, lambda folder: (own_code(folder), own_tokenizer(folder)))
    flags = ["--model_name", str(folder)] + (SHORT + ["--rerun", "true"] if script in SCRIPTS[1:3] else [])
    if script == SCRIPTS[0]:
        flags += ["--dataset_name", str(work / "rows.jsonl")]
    if script == SCRIPTS[3]:
        flags = ["--model_name", str(tiny), "--judge", f"reward:{folder}", "--general_text", "none"]
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *flags],
        cwd=work,
        input="y\n" * 100,
        capture_output=True,
        text=True,
        timeout=300,
    )
    refused(done, str(folder))
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["a layer is missing", "git-LFS pointer", "a negative size", "pickles only"])
@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_a_run_ends_in_one_line(tiny, trained, tmp_path, what, script):
    work = Path(shutil.copytree(trained, tmp_path / "work"))
    change, words = MODELS[what]
    if script == SCRIPTS[3]:  # what was trained is damaged: train again
        folder = work / "outputs/full_model/final_model"
        change(folder)
        (line,) = refused(run(script, "--model_name", tiny, "--general_text", "none", cwd=work), str(folder)[-20:])
        assert "python 3_full_finetuning.py" in line
        return
    before = sorted(path for path in (work / "outputs").rglob("*") if not path.name.startswith("."))
    folder = changed(tiny, tmp_path, change)
    (line,) = refused(run(script, "--model_name", folder, *SHORT, "--rerun", "true", cwd=work), *words)
    # nothing was thrown away or moved for a run that cannot be
    assert sorted(path for path in (work / "outputs").rglob("*") if not path.name.startswith(".")) == before


@pytest.mark.slow
def test_pickles_on_the_hub_are_not_read(tiny, tmp_path):
    from hub import Hub

    pickles = changed(tiny, tmp_path, pickled)
    with Hub() as server:
        server.add_model("org/pickles", pickles)
        env = server.env(tmp_path / "home")
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); from configs import models; "
            "from transformers import AutoModelForCausalLM as A; models.load(A, 'org/pickles', None)"
        )
        (line,) = refused(run("-c", code, ROOT, cwd=tmp_path, env=env), "'org/pickles'", "can run code")
        assert not any(
            request.endswith("pytorch_model.bin") and request.startswith("GET") for request in server.requests
        )
        assert server.strays == []


@pytest.mark.slow
def test_an_intact_run_still_works(tiny, prepared, tmp_path):
    """The kernel that its configuration names does not stop a training, and a 4-bit base is loaded as before."""
    work = Path(shutil.copytree(prepared, tmp_path / "work"))
    folder = changed(tiny, tmp_path, config(attn_implementation="kernels-community/flash-attn2"))
    said = ok(run(SCRIPTS[1], "--model_name", folder, *SHORT, cwd=work))
    assert "done: outputs/lora_model" in said
