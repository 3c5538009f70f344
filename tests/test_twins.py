"""Scripts 2 and 3 are twins: tests/twins.diff is all that may differ, and it is the lesson "LoRA against full"."""

import difflib

import pytest
from conftest import ROOT, SCRIPTS

from configs.settings import read_constants

LORA, FULL = ROOT / SCRIPTS[1], ROOT / SCRIPTS[2]
GOLDEN = ROOT / "tests" / "twins.diff"
RENEW = "python tests/test_twins.py"


def twins_diff() -> str:
    """The two scripts as a unified diff without context: only what differs, with the line numbers left out."""
    lines = difflib.unified_diff(*(path.read_text("utf-8").splitlines() for path in (LORA, FULL)), lineterm="", n=0)
    marks = {"---": f"--- {LORA.name}", "+++": f"+++ {FULL.name}", "@@ ": "@@"}
    return "".join(marks.get(line[:3], line) + "\n" for line in lines)


def test_the_twins_differ_only_in_what_makes_the_methods():
    assert twins_diff() == GOLDEN.read_text("utf-8"), (
        f"scripts 2 and 3 differ in other lines than tests/twins.diff says; where that is right, renew it: {RENEW}"
    )


def test_a_change_in_one_twin_is_noticed():
    changed = twins_diff().replace("LEARNING_RATE", "RATE")
    assert changed != GOLDEN.read_text("utf-8")


@pytest.fixture(scope="module")
def constants() -> tuple[dict, dict]:
    return read_constants(LORA), read_constants(FULL)


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
    promised = {"LORA_R": 16, "LORA_ALPHA": 32, "LORA_DROPOUT": 0.05, "USE_4BIT": True}
    assert {name: lora[name] for name in promised} == promised
    names = ("LEARNING_RATE", "BATCH_SIZE", "GRADIENT_ACCUMULATION_STEPS", "NUM_EPOCHS", "MODEL_NAME")
    assert [lora[name] for name in names] == [2e-4, 4, 4, 3, "microsoft/phi-2"]
    assert [full[name] for name in names] == [5e-5, 2, 8, 3, "microsoft/phi-2"]
    assert full["USE_DEEPSPEED"] is False
    assert (ROOT / full["DEEPSPEED_CONFIG"]).is_file()
    assert [script["OUTPUT_DIR"] for script in (lora, full)] == ["outputs/lora_model", "outputs/full_model"]


if __name__ == "__main__":
    GOLDEN.write_text(twins_diff(), encoding="utf-8")
    print(f"wrote {GOLDEN}; read it before you commit it")
