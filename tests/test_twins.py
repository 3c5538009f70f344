"""Scripts 2 and 3 stay twins: whatever differs between them is named here, line by line, or is a mistake."""

import ast
import difflib
from collections import Counter

import pytest
from conftest import ROOT, SCRIPTS

from configs.settings import read_constants

LORA, FULL = ROOT / SCRIPTS[1], ROOT / SCRIPTS[2]
LORA_ONLY = {"LORA_R", "LORA_ALPHA", "LORA_DROPOUT", "LORA_TARGET_MODULES", "USE_DORA", "USE_RSLORA", "USE_4BIT"}
LORA_ONLY |= {"MERGE_ADAPTER"}
FULL_ONLY = {"USE_DEEPSPEED", "DEEPSPEED_CONFIG"}
# Shared constants that may differ, and in what: a value, the help behind it, the reason above it.
OTHER_VALUE = {"LEARNING_RATE", "BATCH_SIZE", "GRADIENT_ACCUMULATION_STEPS", "OUTPUT_DIR"}
OTHER_HELP = {"OUTPUT_DIR"}
OTHER_WHY = {"LEARNING_RATE", "BATCH_SIZE"}

# Lines that may differ: of the shared functions (adapter_config and build_model apart), and of what stands around them
# and the constants. `lora` is what only script 2 may have, `full` what only script 3 may have.
FUNCTION_LINES = {
    "training_arguments": {
        "lora": [],
        "full": ["deepspeed=training.prepare_deepspeed(c.DEEPSPEED_CONFIG) if c.USE_DEEPSPEED else None,"],
    },
    "main": {
        "lora": [
            "c.USE_4BIT = machine.four_bit(USE_4BIT)",
            'log = training.RunLog("lora", vars(c), plan, manifest, counts, config, checkpoint)',
            'training.save_final(trainer, f"{OUTPUT_DIR}/final_lora_adapter", None, log)',
            "if MERGE_ADAPTER:",
            "training.merge_adapter(trainer, c, eval_rows, log)",
            'files.say(f"done: {OUTPUT_DIR}: final_lora_adapter, training_log.json, training_curves.png")',
        ],
        "full": [
            'log = training.RunLog("full", vars(c), plan, manifest, counts, config, checkpoint)',
            'training.save_final(trainer, f"{OUTPUT_DIR}/final_model", config.dtype, log)',
            'files.say(f"done: {OUTPUT_DIR}: final_model, training_log.json, training_curves.png")',
        ],
    },
}
OTHER_LINES = {
    "lora": [
        '"""Fine-tunes a causal language model with QLoRA: small trained matrices on a frozen 4-bit base.',
        "Writes: outputs/lora_model/: final_lora_adapter/, training_log.json, checkpoint-*, runs/ (TensorBoard)",
        "python 2_lora_finetuning.py",
        "accelerate launch 2_lora_finetuning.py --num_epochs 1",
        "from peft import LoraConfig",
        "from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel",
    ],
    "full": [
        '"""Fine-tunes a causal language model with all its weights, with DeepSpeed where one GPU is not enough.',
        "Writes: outputs/full_model/: final_model/, training_log.json, checkpoint-*, runs/ (TensorBoard)",
        "python 3_full_finetuning.py",
        "accelerate launch 3_full_finetuning.py --num_epochs 1",
        "from transformers import AutoModelForCausalLM, PreTrainedModel",
    ],
}


def functions(path) -> dict[str, str]:
    """{name: source, comments included} of a script's functions and classes, in order."""
    text = path.read_text("utf-8")
    return {
        node.name: ast.get_source_segment(text, node)
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }


def rest(path) -> str:
    """A script without its functions and without the block of its constants."""
    text = path.read_text("utf-8")
    for source in functions(path).values():
        text = text.replace(source, "")
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("# --- "))
    last = next(i for i, line in enumerate(lines) if line.startswith("if __name__"))
    return "\n".join(lines[:first] + lines[last:])


def changed(lora: str, full: str) -> dict[str, Counter]:
    """The lines that only one of two texts has, without their indent, as often as they occur."""
    found = {"lora": Counter(), "full": Counter()}
    for line in difflib.ndiff(lora.splitlines(), full.splitlines()):
        if line[:2] in ("- ", "+ "):
            found["lora" if line[0] == "-" else "full"][line[2:].strip()] += 1
    return found


@pytest.fixture(scope="module")
def constants() -> tuple[dict, dict]:
    return read_constants(LORA), read_constants(FULL)


def test_same_functions_in_the_same_order():
    assert list(functions(LORA)) == list(functions(FULL))
    assert {*FUNCTION_LINES, "adapter_config", "build_model"} == set(functions(LORA))


def test_same_constants_in_the_same_order(constants):
    lora, full = constants
    assert set(lora) - set(full) == LORA_ONLY
    assert set(full) - set(lora) == FULL_ONLY
    assert [name for name in lora if name not in LORA_ONLY] == [n for n in full if n not in FULL_ONLY]
    # the two groups that differ stand at the same place
    groups = [list(dict.fromkeys(c.group for c in script.values())) for script in constants]
    assert [("LoRA" if group == "DeepSpeed" else group) for group in groups[1]] == groups[0]


def test_shared_constants_differ_only_where_the_methods_do(constants):
    lora, full = constants
    shared = [name for name in lora if name in full]
    assert {n for n in shared if lora[n].default != full[n].default} == OTHER_VALUE
    assert {n for n in shared if lora[n].help != full[n].help} == OTHER_HELP
    assert {n for n in shared if lora[n].why != full[n].why} == OTHER_WHY
    for name in shared:
        assert (lora[name].types, lora[name].items) == (full[name].types, full[name].items), name
        assert type(lora[name].default) is type(full[name].default), name
    assert lora["OUTPUT_DIR"].help.replace("adapter", "model") == full["OUTPUT_DIR"].help


@pytest.mark.parametrize("name", FUNCTION_LINES)
def test_shared_functions_differ_only_in_named_lines(name):
    found = changed(functions(LORA)[name], functions(FULL)[name])
    assert found == {side: Counter(lines) for side, lines in FUNCTION_LINES[name].items()}


def test_what_stands_around_differs_only_in_named_lines():
    assert changed(rest(LORA), rest(FULL)) == {side: Counter(lines) for side, lines in OTHER_LINES.items()}


def test_same_rows_a_step(constants):
    """Both methods see the same number of rows in a step, so their steps can be compared."""
    sizes = [c["BATCH_SIZE"].default * c["GRADIENT_ACCUMULATION_STEPS"].default for c in constants]
    assert sizes == [16, 16]
    # the sentences that promise it say the numbers that stand there
    for script, twin in zip(constants, (FULL, LORA), strict=True):
        size, steps = script["BATCH_SIZE"].default, script["GRADIENT_ACCUMULATION_STEPS"].default
        assert f"{size} x {steps} rows a step, the {size * steps} of {twin.name}" in script["BATCH_SIZE"].why


def test_defaults(constants):
    """What the project was asked for: these defaults are a promise."""
    lora, full = ({name: c.default for name, c in script.items()} for script in constants)
    assert {k: lora[k] for k in ("LORA_R", "LORA_ALPHA", "LORA_DROPOUT", "USE_4BIT")} == {
        "LORA_R": 16,
        "LORA_ALPHA": 32,
        "LORA_DROPOUT": 0.05,
        "USE_4BIT": True,
    }
    names = ("LEARNING_RATE", "BATCH_SIZE", "GRADIENT_ACCUMULATION_STEPS", "NUM_EPOCHS", "MODEL_NAME")
    assert [lora[name] for name in names] == [2e-4, 4, 4, 3, "microsoft/phi-2"]
    assert [full[name] for name in names] == [5e-5, 2, 8, 3, "microsoft/phi-2"]
    assert full["USE_DEEPSPEED"] is False
    assert (ROOT / full["DEEPSPEED_CONFIG"]).is_file()
    assert [script["OUTPUT_DIR"] for script in (lora, full)] == ["outputs/lora_model", "outputs/full_model"]


@pytest.mark.parametrize("path", [LORA, FULL], ids=lambda path: path.name)
def test_short_enough_to_read(path):
    """About 200 lines: what does not fit belongs to the libraries, or to configs/."""
    assert 120 <= len(path.read_text("utf-8").splitlines()) <= 230
