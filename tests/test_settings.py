"""configs/settings.py, flags.py and values.py: constants <- preset <- command line; how a program ends.

Small scripts with the real names are run as a user runs them.
"""

import ast
import dataclasses
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.flags import ALIASES
from configs.settings import (
    COMES_ALONG,
    SECTIONS,
    command,
    fail,
    freeze,
    list_presets,
    main_process,
    override,
    override_all,
    preset_path,
    read_constants,
    say,
)

REPO = Path(__file__).resolve().parent.parent
HEAD = '''"""Trains something.

Its constants stand above `override(globals())`.

Reads: data/
Writes: outputs/
"""
import json
import sys
import typing
from typing import Annotated, Literal
from configs.settings import override

# --- model
MODEL_NAME = "org/tiny"  # Hub name or local folder
MODEL_REVISION: str | None = None  # branch, tag or commit
'''
TAIL = """
if __name__ == "__main__":
    override(globals())

LATER = 3  # below the call, so no setting
here = {k: v for k, v in globals().items() if k.isupper()}
print("RESULT", json.dumps({**here, "TORCH": "torch" in sys.modules}))
"""
TRAIN = """
# --- training
# measured: the best
# of three
LEARNING_RATE = 2e-4  # peak learning rate; 100% of it after the warm-up, not 50 %s
NUM_EPOCHS = 3.0  # how often each row is seen
BATCH_SIZE = 8  # rows a step
MAX_STEPS = -1  # -1 is no limit
MAX_TRAIN_SAMPLES: int | None = None  # None is all
EVAL_STEPS: int | float = 0.25  # count, or share of the run
RESUME: bool | str = "auto"  # true, false, auto, or a checkpoint
PACKING = False  # pack rows
RATES: list[float] = [1e-4]  # swept
DERIVED = BATCH_SIZE * 2  # not a literal, so no setting
"""
SCRIPTS = {
    "1_prepare_dataset.py": "\n# --- data\nCOLUMN_MAP: dict = {}  # yours=ours\nSEED = 1\n",
    "2_lora_finetuning.py": TRAIN
    + """
# --- lora
LORA_R = 16  # rank
LORA_TARGET_MODULES: str | list = "all-linear"  # which layers
USE_4BIT = True  # QLoRA
""",
    "3_full_finetuning.py": TRAIN,
    "4_evaluate_compare.py": "\nJUDGE: str | None = None  # a model\nBATCH_SIZE = 16\n",
}


@pytest.fixture
def root(tmp_path):
    for name, constants in SCRIPTS.items():
        (tmp_path / name).write_text(HEAD + constants + TAIL)
    (tmp_path / "configs" / "presets").mkdir(parents=True)
    return tmp_path


def preset(root, text, name="demo"):
    (root / "configs" / "presets" / f"{name}.yaml").write_text(text, encoding="utf-8")


def run(root, section, *flags, env=None, launcher=()):
    """The finished process; its `.result` is what the script's constants are after override."""
    script = next(name for name, of in SECTIONS.items() if of == section)
    done = subprocess.run(
        [sys.executable, *launcher, script, *flags],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(REPO), "RANK": "", **(env or {})},
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    done.result = json.loads(lines[0][7:]) if lines else None
    return done


def value(root, section, name, *flags):
    done = run(root, section, *flags)
    assert done.returncode == 0, done.stderr
    return done.result[name]


def errors(root, section, *flags):
    """The error lines of a run that must be refused."""
    done = run(root, section, *flags)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.result is None and "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines), done.stderr
    return lines


def lora(root, flags):
    """override() in this process, on a copy of the constants of the LoRA script."""
    known = read_constants(root / "2_lora_finetuning.py")
    constants = {"__file__": str(root / "2_lora_finetuning.py")} | {n: c.default for n, c in known.items()}
    changed = override(constants, flags)
    assert all(constants[name] == new for name, new in changed.items())
    return changed


# --- constants


def test_read_constants(root):
    known = read_constants(root / "2_lora_finetuning.py")
    assert list(known)[:3] == ["MODEL_NAME", "MODEL_REVISION", "LEARNING_RATE"]
    assert {"DERIVED", "LATER"}.isdisjoint(known)
    rate = known["LEARNING_RATE"]
    assert (rate.default, rate.types, rate.flag, rate.group) == (2e-4, ("float",), "--learning_rate", "training")
    assert rate.help == "peak learning rate; 100% of it after the warm-up, not 50 %s"
    assert rate.why == "measured: the best of three"
    assert known["NUM_EPOCHS"].why == ""
    assert known["MODEL_REVISION"].types == ("str", "None")
    assert known["LORA_TARGET_MODULES"].types == ("str", "list")
    assert (known["RATES"].types, known["RATES"].items) == (("list",), ("float",))
    assert known["LORA_R"].group == "lora" and known["MAX_STEPS"].default == -1


def test_read_constants_hash_in_text_and_several_lines(tmp_path):
    script = tmp_path / "x.py"
    script.write_text(
        'URL = "http://x#y"  # where\nWORDS = [\n    "a",\n]  # which\nPAIR = 1, 2\nA = B = 1\nNO_HELP = 1\n'
    )
    known = read_constants(script)
    assert {name: c.help for name, c in known.items()} == {"URL": "where", "WORDS": "which", "NO_HELP": ""}
    assert known["URL"].default == "http://x#y" and known["WORDS"].items == ("str",)


@pytest.mark.parametrize("call", ["override(globals())", "CHANGED = settings.override(globals())"])
def test_read_constants_stops_at_the_call(tmp_path, call):
    script = tmp_path / "x.py"
    script.write_text(f'"""Not yet: override(globals())."""\nA = 1\n{call}\nB = 2\n')
    assert list(read_constants(script)) == ["A"]


# --- flags


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--learning_rate", "1e-4"], {"LEARNING_RATE": 1e-4}),
        (["--learning-rate=1e-4"], {"LEARNING_RATE": 1e-4}),
        (["--learning_rate", "1"], {"LEARNING_RATE": 1.0}),
        (["--learning_rate", "1e-4", "--learning-rate", "1e-5"], {"LEARNING_RATE": 1e-5}),
        (["--batch_size", "1e3"], {"BATCH_SIZE": 1000}),
        (["--batch_size", "1_000"], {"BATCH_SIZE": 1000}),
        (["--max_steps", "-5"], {"MAX_STEPS": -5}),
        (["--max_steps=-5"], {"MAX_STEPS": -5}),
        (["--max_train_samples", "10"], {"MAX_TRAIN_SAMPLES": 10}),
        (["--max_train_samples", "none"], {}),
        (["--model_revision", "12345"], {"MODEL_REVISION": "12345"}),
        (["--eval_steps", "1"], {"EVAL_STEPS": 1}),
        (["--eval_steps", "1.0"], {"EVAL_STEPS": 1.0}),
        (["--packing"], {"PACKING": True}),
        (["--packing", "--batch_size", "2"], {"PACKING": True, "BATCH_SIZE": 2}),
        (["--resume"], {"RESUME": True}),
        (["--resume", "no"], {"RESUME": False}),
        (["--no_resume"], {"RESUME": False}),
        (["--resume", "outputs/checkpoint-5"], {"RESUME": "outputs/checkpoint-5"}),
        (["--no_use_4bit"], {"USE_4BIT": False}),
        (["--no-use-4bit"], {"USE_4BIT": False}),
        (["--no_use_4bit", "--use_4bit"], {}),
        (["--lora_target_modules", "q_proj,v_proj"], {"LORA_TARGET_MODULES": ["q_proj", "v_proj"]}),
        (["--lora_target_modules", "[q_proj, v_proj]"], {"LORA_TARGET_MODULES": ["q_proj", "v_proj"]}),
        (["--lora_target_modules", '["q_proj"]'], {"LORA_TARGET_MODULES": ["q_proj"]}),
        (["--lora_target_modules", r".*\.(q|v){1,2}"], {"LORA_TARGET_MODULES": r".*\.(q|v){1,2}"}),
        (["--rates", "1e-4,2e-4"], {"RATES": [1e-4, 2e-4]}),
        (["--rates", "[1e-4, 1]"], {"RATES": [1e-4, 1.0]}),
        (["--rates", "3e-4"], {"RATES": [3e-4]}),
        (["--rates", ""], {"RATES": []}),
        (["--local_rank", "1", "--batch_size", "2"], {"BATCH_SIZE": 2}),
        (["--local-rank=1"], {}),
    ],
)
def test_flags(root, flags, expected):
    changed = lora(root, flags)
    assert changed == expected
    assert {name: type(v) for name, v in changed.items()} == {name: type(v) for name, v in expected.items()}


@pytest.mark.parametrize("word, truth", [("true", True), ("Yes", True), ("on", True), ("1", True)])
def test_words_for_booleans(root, word, truth):
    opposite = {"true": "false", "Yes": "No", "on": "off", "1": "0"}[word]
    assert lora(root, ["--packing", word]) == {"PACKING": truth}
    assert lora(root, [f"--use_4bit={opposite}"]) == {"USE_4BIT": not truth}


def test_dicts(root):
    expected = {"instruction": "question", "output": "answer"}
    for text in (
        "instruction=question,output=answer",
        json.dumps(expected),
        "{instruction: question, output: answer}",
    ):
        assert value(root, "prepare", "COLUMN_MAP", "--column_map", text) == expected
    [line] = errors(root, "prepare", "--column_map", "question")
    assert "COLUMN_MAP wants a mapping (dict)" in line and "'question'" in line


def test_value_with_equals_sign(root):
    judge = "openai:http://x/v1?a=b#m"
    assert value(root, "evaluate", "JUDGE", f"--judge={judge}") == judge
    assert value(root, "evaluate", "JUDGE", "--judge", judge) == judge


@pytest.mark.parametrize(
    "flags, wanted, got",
    [
        (["--batch_size", "0.5"], "a whole number (int), e.g. --batch_size 8", "'0.5'"),
        (["--batch_size", "many"], "a whole number (int)", "'many'"),
        (["--batch_size", "1e999999999"], "a whole number (int)", "'1e999999999'"),
        (["--batch_size", "none"], "a whole number (int)", "'none'"),
        (["--learning_rate", "nan"], "a finite number (float), e.g. --learning_rate 0.0002", "'nan'"),
        (["--learning_rate", "-inf"], "a finite number (float)", "'-inf'"),
        (["--learning_rate", "1e400"], "a finite number (float)", "'1e400'"),
        (["--learning_rate="], "a finite number (float)", "''"),
        (["--packing", "maybe"], "true or false (bool), e.g. --packing false", "'maybe'"),
        (["--max_train_samples", "few"], "a whole number (int) or none, e.g. --max_train_samples 100", "'few'"),
        (["--rates", "1e-4,x"], "a list with items of a finite number (float)", "'1e-4,x'"),
        (["--rates", "[1e-4"], "a list with items of a finite number (float)", "'[1e-4'"),
    ],
)
def test_wrong_type_of_a_flag(root, capsys, flags, wanted, got):
    with pytest.raises(SystemExit) as stop:
        lora(root, flags)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1
    assert f" wants {wanted}" in line and line.endswith(f"{flags[0].strip('=')} has {got}\n")


def test_unknown_flags(root):
    assert errors(root, "lora", "--learning_rat", "1") == [
        "error: unknown setting --learning_rat; did you mean --learning_rate?"
    ]
    # no abbreviations, no upper case, no single dash, no positional arguments
    assert "did you mean --learning_rate?" in errors(root, "lora", "--learning", "1")[0]
    assert "did you mean --learning_rate?" in errors(root, "lora", "--LEARNING_RATE", "1")[0]
    assert "did you mean --batch_size?" in errors(root, "lora", "-batch_size=1")[0]
    assert "unexpected argument 'again'" in errors(root, "lora", "--batch_size", "1", "again")[0]
    assert "--help lists" in errors(root, "lora", "--xyzzy")[0]
    assert "did you mean --preset?" in errors(root, "lora", "--prest", "demo")[0]
    assert "did you mean --batch_size?" in errors(root, "lora", "--lora.batch_size", "1")[0]


def test_flag_of_another_script(root):
    assert errors(root, "full", "--lora_r", "8") == ["error: --lora_r is a setting of 2_lora_finetuning.py"]
    owners = errors(root, "prepare", "--learning-rate", "1")[0]
    assert owners.endswith("is a setting of 2_lora_finetuning.py and 3_full_finetuning.py")


def test_missing_and_needless_values(root):
    assert errors(root, "lora", "--batch_size", "--packing") == [
        "error: --batch_size needs a value, e.g. --batch_size 8"
    ]
    assert "write --packing false" in errors(root, "lora", "--no_packing", "true")[0]
    assert "--preset needs a value" in errors(root, "lora", "--preset")[0]


def test_changes_are_printed_on_the_main_process_only(root):
    done = run(root, "lora", "--learning_rate", "1e-4", env={"RANK": "0"})
    assert "settings: LEARNING_RATE = 0.0001 (command line)\n" in done.stdout
    done = run(root, "lora", "--learning_rate", "1e-4", env={"RANK": "1"})
    assert "settings:" not in done.stdout and done.result["LEARNING_RATE"] == 1e-4


def test_under_accelerate_launch(root):
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes=1"]
    done = run(root, "lora", "--learning_rate", "1e-4", "--no_use_4bit", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert done.result["LEARNING_RATE"] == 1e-4 and done.result["USE_4BIT"] is False


def test_help(root):
    preset(root, "description: small\n")
    done = run(root, "lora", "--help", "--nonsense")
    assert done.returncode == 0 and done.result is None and done.stderr == ""
    text = done.stdout
    assert text.startswith("Trains something.") and "Writes: outputs/" in text and "demo" in text
    assert "  --learning_rate float\n" in text and "  --max_train_samples int|none\n" in text
    assert "100% of it after the warm-up, not 50 %s (default: 0.0002)" in text
    assert text.index("model:") < text.index("--model_name") < text.index("training:") < text.index("--lora_r")
    assert "(default: none)" in text and "(default: all-linear)" in text
    assert run(root, "lora", "-h").stdout == text


def test_help_into_a_closed_pipe(root):
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "2_lora_finetuning.py", "--help"]
    done = subprocess.run(command, cwd=root, env=env, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")  # as Unix tools end, in the eyes of a shell


def test_help_needs_no_heavy_imports(root):
    preset(root, "lora:\n  lora_r: 8\n")
    code = (
        "import sys, time; start = time.perf_counter(); from configs.settings import override\n"
        "try: override({'__file__': '2_lora_finetuning.py'}, ['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "print('SECONDS', time.perf_counter() - start)\n"
        "assert not {'torch', 'transformers', 'yaml', 'numpy'} & set(sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    seconds = []
    for _ in range(3):  # the machine may be busy, so the best of three counts
        done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout.rpartition("SECONDS")[2]))
    assert min(seconds) < 0.5
    assert run(root, "lora").result["TORCH"] is False


# --- presets


def test_precedence(root):
    preset(root, "all: {batch_size: 2}\n")
    preset(root, "lora: {batch_size: 3}\nall: {batch_size: 2}\n", "both")
    assert value(root, "lora", "BATCH_SIZE") == 8
    assert value(root, "lora", "BATCH_SIZE", "--preset", "demo") == 2
    assert value(root, "lora", "BATCH_SIZE", "--preset", "both") == 3
    assert value(root, "lora", "BATCH_SIZE", "--batch_size", "4", "--preset", "both") == 4
    done = run(root, "lora", "--preset=both")
    assert "settings: BATCH_SIZE = 3 (preset both)\n" in done.stdout
    done = run(root, "lora", "--preset=both", "--learning_rate", "1e-4", "--no_use_4bit")
    said = "settings: BATCH_SIZE = 3 (preset both); LEARNING_RATE = 0.0001, USE_4BIT = False (command line)"
    assert [line for line in done.stdout.splitlines() if line.startswith("settings")] == [said]


def test_two_methods_differ_in_one_preset(root):
    preset(root, "lora:\n  learning_rate: 1e-4\nfull:\n  LEARNING_RATE: 1e-5\nall:\n  seed: 7\n  batch_size: 2\n")
    assert value(root, "lora", "LEARNING_RATE", "--preset", "demo") == 1e-4
    assert value(root, "full", "LEARNING_RATE", "--preset", "demo") == 1e-5
    assert value(root, "prepare", "SEED", "--preset", "demo") == 7
    assert value(root, "evaluate", "BATCH_SIZE", "--preset", "demo") == 2


def test_yaml_values(root):
    preset(
        root,
        """
description: types
lora:
  learning_rate: 1e-4
  num_epochs: 1
  batch_size: 1e1
  max_train_samples: 5
  resume: no
  use_4bit: off
  lora_target_modules: [q_proj, v_proj]
  rates: [1e-4, 2.0e-4, 1]
  model_revision: "123"
prepare:
  column_map: {instruction: question}
evaluate:
  judge: none
full:
""",
    )
    result = run(root, "lora", "--preset", "demo").result
    assert (result["LEARNING_RATE"], result["NUM_EPOCHS"], result["BATCH_SIZE"]) == (1e-4, 1.0, 10)
    assert (result["MAX_TRAIN_SAMPLES"], result["RESUME"], result["USE_4BIT"]) == (5, False, False)
    assert result["LORA_TARGET_MODULES"] == ["q_proj", "v_proj"] and result["RATES"] == [1e-4, 2e-4, 1.0]
    assert result["MODEL_REVISION"] == "123"
    assert value(root, "prepare", "COLUMN_MAP", "--preset", "demo") == {"instruction": "question"}
    assert value(root, "evaluate", "JUDGE", "--preset", "demo") is None


@pytest.mark.parametrize(
    "body, wanted, got",
    [
        ("batch_size: true", "a whole number (int), e.g. batch_size: 8", "True (bool)"),
        ("batch_size: 0.5", "a whole number (int)", "0.5 (float)"),
        ("model_revision: 12e4", "text (str) or none", "120000.0 (float); in quotes it would be text"),
        ("packing: 1", "true or false (bool), e.g. packing: false", "1 (int)"),
        ("learning_rate: .nan", "a finite number (float)", "nan (float)"),
        ("learning_rate: .inf", "a finite number (float)", "inf (float)"),
        ("learning_rate: fast", "a finite number (float), e.g. learning_rate: 0.0002", "'fast' (str)"),
        ("learning_rate:", "a finite number (float)", "None (NoneType)"),
        ("rates: {a: 1}", "a list", "{'a': 1} (dict)"),
        ("model_revision: 123", "text (str) or none", "123 (int); in quotes it would be text"),
        ("model_name: 2024-01-01", "text (str)", "datetime.date(2024, 1, 1) (date); in quotes it would be text"),
    ],
)
def test_wrong_type_in_yaml(root, capsys, body, wanted, got):
    preset(root, f"lora:\n  {body}\n")
    with pytest.raises(SystemExit) as stop:
        lora(root, ["--preset", "demo"])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1
    assert f"wants {wanted}" in line and f"demo.yaml, section lora has {got}\n" in line


def test_every_script_checks_the_whole_preset(root):
    preset(root, "full:\n  batch_size: many\nlora:\n  lora_r: 8\n")
    [line] = errors(root, "prepare", "--preset", "demo")
    assert line.endswith("configs/presets/demo.yaml, section full has 'many' (str)")
    # a script that is not there cannot be asked
    (root / "3_full_finetuning.py").unlink()
    assert run(root, "prepare", "--preset", "demo").returncode == 0


@pytest.mark.parametrize(
    "text, message",
    [
        ("lorra: {lora_r: 8}", "unknown section lorra; did you mean lora?; there are prepare, lora, full"),
        ("learning_rate: 1e-4", "unknown section learning_rate, a setting that stands outside a section"),
        ("lora: {learning_rte: 1e-4}", "section lora: unknown setting learning_rte; did you mean learning_rate?"),
        ("full: {lora_r: 8}", "section full: lora_r is a setting of 2_lora_finetuning.py"),
        ("all: {sead: 8}", "section all: unknown setting sead; did you mean seed?"),
        ("lora: {lora_r: 8, LORA_R: 9}", "section lora: lora_r is given twice, in upper and in lower case"),
        ("lora:\n  lora_r: 8\n  lora_r: 9", "demo.yaml, line 3: lora_r is given twice"),
        ("lora: {lora_r: 8}\nlora: {lora_r: 9}", "demo.yaml, line 2: lora is given twice"),
        ("lora:\n  lora_r: [8\n", "demo.yaml, line 3: "),
        ("lora:\n\tlora_r: 8\n", "demo.yaml, line 2: "),
        ("lora: 8", "section lora wants settings, e.g. learning_rate: 0.0001; it has 8 (int)"),
        ("- lora", "wants sections (prepare, lora, full, evaluate, all); it has ['lora'] (list)"),
        ("description: {a: 1}", "description wants text (str)"),
        ("prepare: {seed: 2024-13-01}", "demo.yaml, month must be in 1..12"),
    ],
)
def test_broken_presets(root, capsys, text, message):
    preset(root, text)
    with pytest.raises(SystemExit) as stop:
        lora(root, ["--preset", "demo"])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and all(line.startswith("error: ") for line in lines)
    assert any(message in line for line in lines), lines


def test_empty_preset(root):
    preset(root, "# nothing yet\n")
    assert lora(root, ["--preset", "demo"]) == {}
    # with the byte order mark that some editors write
    preset(root, "\ufefflora: {lora_r: 4}\n")
    assert lora(root, ["--preset", "demo"]) == {"LORA_R": 4}


def test_unknown_preset_lists_what_exists(root):
    preset(root, "description: the small one\n")
    preset(root, "description: >\n  for a card\n  of 8 GB\n", "gpu_8gb")
    done = run(root, "lora", "--preset", "dmo")
    assert done.returncode == 2 and done.stderr == (
        "error: unknown preset 'dmo'; did you mean demo?; the presets are\n"
        "  demo: the small one\n  gpu_8gb: for a card of 8 GB\n"
    )
    assert list_presets(root) == {"demo": "the small one", "gpu_8gb": "for a card of 8 GB"}
    # names only: nothing outside the folder can be meant
    assert "unknown preset" in run(root, "lora", "--preset", "../presets/demo").stderr


def test_preset_by_path(root, monkeypatch):
    mine = root / "mine.yaml"
    mine.write_text("lora: {lora_r: 4}\n")
    assert value(root, "lora", "LORA_R", "--preset", "mine.yaml") == 4
    monkeypatch.chdir(root)
    preset(root, "")
    assert preset_path("mine.yaml", root) == mine
    assert preset_path("demo.yaml", root) == preset_path("demo", root) == root / "configs/presets/demo.yaml"
    with pytest.raises(FileNotFoundError, match="absent"):
        preset_path("absent.yaml", root)


def test_all_problems_at_once(root):
    preset(root, "lora: {lora_rr: 8, batch_size: x}\nful: {}\n")
    flags = ["--preset", "demo", "--learning_rat", "1", "--packing", "maybe", "stray", "--column_map", "a=b"]
    lines = errors(root, "lora", *flags)
    assert len(lines) == 7
    for part in (
        "learning_rat;",
        "PACKING wants",
        "'stray'",
        "1_prepare",
        "lora_rr",
        "BATCH_SIZE wants",
        "section ful",
    ):
        assert any(part in line for line in lines), part


# --- run_all.py


def split_flags(argv: list[str], root: Path) -> dict[str, list[str]]:
    """What run_all.py, placed in `root`, gives to the steps there."""
    own = Path(shutil.copy(Path(__file__).parents[1] / "run_all.py", root))
    return override_all({"__file__": str(own), **{n: c.default for n, c in read_constants(own).items()}}, argv)


def test_split_flags(root):
    flags = ["--lora.learning-rate=1e-4", "--learning_rate", "1e-3", "--batch_size", "2", "--full.batch_size", "1"]
    flags += ["--no_packing", "--resume", "--max_steps", "-1", "--judge=a=b", "--column_map", "a=b"]
    training = ["--batch_size=2", "--packing=false", "--resume=true", "--max_steps=-1"]
    assert split_flags(flags, root) == {
        "prepare": ["--column_map=a=b"],
        "lora": ["--learning_rate=1e-3", *training, "--learning_rate=1e-4"],
        "full": ["--learning_rate=1e-3", *training, "--batch_size=1"],
        "evaluate": ["--batch_size=2", "--judge=a=b"],
    }
    assert split_flags([], root) == {section: [] for section in SECTIONS.values()}


def test_split_flags_are_understood_by_the_steps(root):
    flags = ["--lora.learning_rate", "1e-4", "--learning_rate", "1e-3", "--lora.no_use_4bit", "--model_name=--x y"]
    split = split_flags(flags, root)
    assert lora(root, split["lora"]) == {"LEARNING_RATE": 1e-4, "USE_4BIT": False, "MODEL_NAME": "--x y"}
    assert value(root, "full", "LEARNING_RATE", *split["full"]) == 1e-3


def test_split_flags_preset(root, monkeypatch):
    preset(root, "lora: {lora_r: 8}\n")
    assert split_flags(["--preset", "demo", "--batch_size", "1"], root)["evaluate"] == [
        "--preset=demo",
        "--batch_size=1",
    ]
    (root / "mine.yaml").write_text("")
    (root / "demo").mkdir()
    monkeypatch.chdir(root)
    assert split_flags(["--preset=mine.yaml"], root)["prepare"] == [f"--preset={root / 'mine.yaml'}"]


def test_split_flags_problems(root, capsys, monkeypatch):
    monkeypatch.chdir(root)
    preset(root, "lora: {lora_r: x}\n")
    flags = ["--preset", "demo", "--learning_rat", "1", "--lorra.lora_r", "8", "--full.lora_r", "8"]
    flags += ["--full.learning_rat", "1", "--batch_size", "x", "--prepare.seed", "stray", "over"]
    with pytest.raises(SystemExit) as stop:
        split_flags(flags, root)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert lines == [
        "error: unknown setting --learning_rat; did you mean --learning_rate?",
        "error: --lorra.lora_r: there is no step lorra; did you mean lora?",
        "error: --full.lora_r is a setting of 2_lora_finetuning.py",
        "error: unknown setting --full.learning_rat; did you mean --full.learning_rate?",
        "error: BATCH_SIZE wants a whole number (int), e.g. --batch_size 8; --batch_size has 'x'",
        "error: SEED wants a whole number (int), e.g. --seed 1; --prepare.seed has 'stray'",
        "error: unexpected argument 'over'; settings are --name value",
        "error: LORA_R wants a whole number (int), e.g. lora_r: 16; "
        "configs/presets/demo.yaml, section lora has 'x' (str)",
    ]


def test_syntax_error_in_a_script_is_named(root):
    (root / "3_full_finetuning.py").write_text("A = (\n")
    preset(root, "")
    [line] = errors(root, "lora", "--preset", "demo")
    assert "3_full_finetuning.py, line 1" in line


def test_fail(capsys):
    with pytest.raises(SystemExit) as stop:
        fail("one", "two", "one")
    assert stop.value.code == 2 and capsys.readouterr().err == "error: one\nerror: two\n"


TEXT = st.text(st.characters(blacklist_categories=("Cs",)))
VALUES = {
    "bool": (st.booleans(), lambda v: str(v).lower()),
    "int": (st.integers(), str),
    "float": (st.floats(allow_nan=False, allow_infinity=False), repr),
    "str": (TEXT, str),
    "list": (st.lists(TEXT | st.integers() | st.booleans()), json.dumps),
    "dict": (st.dictionaries(TEXT, TEXT | st.integers()), json.dumps),
}
TYPED = st.sampled_from(sorted(VALUES)).flatmap(lambda kind: st.tuples(st.just(kind), VALUES[kind][0]))


@settings(deadline=None)  # the machine may be busy
@given(TYPED, st.booleans())
def test_any_value_survives_its_flag(tmp_path_factory, typed, optional):
    kind, wanted = typed
    script = tmp_path_factory.getbasetemp() / "round_trip.py"
    script.write_text(f"X: {kind} | None = None\n" if optional else f"X: {kind} = 0\n")
    constants = {"__file__": str(script), "X": object()}
    text = VALUES[kind][1](wanted)
    expected = None if optional and text.strip().lower() in ("none", "null") else wanted
    override(constants, [f"--x={text}"])
    assert constants["X"] == expected and type(constants["X"]) is type(expected)


@settings(deadline=None)  # the machine may be busy
@given(TYPED)
def test_any_value_survives_a_preset(tmp_path_factory, typed):
    kind, wanted = typed
    folder = tmp_path_factory.getbasetemp()
    (folder / "2_lora_finetuning.py").write_text(f"X: {kind} = 0\n")
    # numbers as people write them (1e-05), the rest in quotes: plain words may be something else to YAML
    text = f"lora: {{x: {wanted!r}}}" if kind in ("int", "float") else None
    text = text or yaml.safe_dump({"lora": {"x": wanted}}, default_style='"')
    (folder / "any.yaml").write_text(text)
    constants = {"__file__": str(folder / "2_lora_finetuning.py"), "X": object()}
    override(constants, ["--preset", str(folder / "any.yaml")])
    assert constants["X"] == wanted and type(constants["X"]) is type(wanted)


def test_ctrl_c_ends_with_130_and_one_line(root):
    script = root / "1_prepare_dataset.py"
    script.write_text(script.read_text() + "\nprint('ready', flush=True)\nimport time\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    child = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    while "ready" not in child.stdout.readline():
        assert child.poll() is None
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=20)
    assert child.returncode == 130
    assert errors == "\ninterrupted; finished outputs are unchanged; run again to start over\n"


# --- say, freeze, command


def test_say_prints_once_per_run(capsys, monkeypatch):
    for rank, printed in ((None, "a 1\n"), ("", "a 1\n"), ("0", "a 1\n"), ("1", "")):
        monkeypatch.delenv("RANK", raising=False) if rank is None else monkeypatch.setenv("RANK", rank)
        say("a", 1)
        assert (capsys.readouterr().out, main_process()) == (printed, bool(printed)), rank


def constants_of(root, section):
    """What globals() is in a script: its constants at their defaults, and names that are no settings."""
    script = root / next(name for name, of in SECTIONS.items() if of == section)
    defaults = {name: constant.default for name, constant in read_constants(script).items()}
    return {"__file__": str(script), "DERIVED": 16, "LATER": 3, "json": json, **defaults}


def test_freeze(root):
    constants = constants_of(root, "lora")
    override(constants, ["--lora_r", "8", "--rates", "1e-4,2e-4"])
    frozen = freeze(constants, BATCH_SIZE=2)
    assert list(vars(frozen)) == list(read_constants(root / "2_lora_finetuning.py"))
    assert (frozen.LORA_R, frozen.BATCH_SIZE, frozen.MODEL_REVISION) == (8, 2, None)
    assert dataclasses.asdict(frozen) == vars(frozen)
    # nothing that happens to it, to its copies or to the constants reaches it
    constants["RATES"].append(1.0)
    constants["LORA_R"] = 4
    dataclasses.asdict(frozen)["RATES"].append(1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        frozen.LORA_R = 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        frozen.NEW = 4
    assert (frozen.LORA_R, frozen.RATES, constants["BATCH_SIZE"]) == (8, [1e-4, 2e-4], 8)
    assert dataclasses.replace(frozen, LORA_R=2).LORA_R == 2
    assert vars(pickle.loads(pickle.dumps(frozen))) == vars(frozen)


@pytest.mark.parametrize("name", ["LORA_RR", "DERIVED", "LATER", "lora_r"])
def test_freeze_refuses_a_name_that_is_no_setting(root, name):
    with pytest.raises(TypeError, match=f"2_lora_finetuning.py has no setting {name}"):
        freeze(constants_of(root, "lora"), **{name: 1})


@pytest.fixture
def told(root, monkeypatch):
    """told(section, *flags): override() in this process, as that script; forgotten after the test."""
    from configs import settings

    monkeypatch.setattr(settings, "_run", None)
    monkeypatch.chdir(root)
    return lambda section, *flags: override(constants_of(root, section), list(flags))


def test_command_without_a_run_is_the_script_and_the_words(told, monkeypatch):
    monkeypatch.chdir(REPO)
    assert command("1_prepare_dataset.py") == "python 1_prepare_dataset.py"
    assert command("configs/demo/base_model.py") == "python configs/demo/base_model.py"
    assert (
        command("4_evaluate_compare.py", "--prompt", "it's") == """python 4_evaluate_compare.py --prompt 'it'"'"'s'"""
    )


def test_command_of_the_same_script_carries_every_flag(told, root):
    preset(root, "lora: {lora_r: 4}\n")
    flags = ["--lora-r=8", "--preset", "demo", "--batch_size", "1", "--batch_size", "2", "--no_packing", "--resume"]
    told("lora", *flags, "--model_name=--odd name", "--rates", "1e-4, 2e-4", "--local_rank", "0")
    assert command("2_lora_finetuning.py", "--max_steps", "3") == (
        "python 2_lora_finetuning.py --preset demo --lora_r 8 --batch_size 2 --packing false --resume "
        "'--model_name=--odd name' --rates '1e-4, 2e-4' --max_steps 3"
    )
    # it is understood as it was meant
    words = shlex.split(command(root / "2_lora_finetuning.py"))[2:]
    assert override(constants_of(root, "lora"), words)["RATES"] == [1e-4, 2e-4]


@pytest.mark.parametrize("words", [["--batch-size=1"], ["--batch_size", "1", "--no-packing"], ["--preset=other"]])
def test_a_word_beats_what_is_carried(told, root, words):
    preset(root, "")
    told("lora", "--preset", "demo", "--batch_size", "2", "--packing", "true")
    line = command("2_lora_finetuning.py", *words)
    assert line.endswith(" " + " ".join(words))
    for name in ("batch", "packing", "preset"):
        assert line.count(name) == 1, line


def test_command_of_another_step_carries_what_both_mean_alike(told, root):
    preset(root, "")
    given = ["--preset=demo", "--model_name", "org/m", "--learning_rate", "1e-3", "--batch_size", "2", "--lora_r", "8"]
    told("lora", *given)
    # BATCH_SIZE is 8 in both trainings here and 16 in the evaluation; LORA_R is script 2's alone
    assert command("1_prepare_dataset.py") == "python 1_prepare_dataset.py --preset demo --model_name org/m"
    assert command("4_evaluate_compare.py") == "python 4_evaluate_compare.py --preset demo --model_name org/m"
    assert command("3_full_finetuning.py").endswith("--model_name org/m --learning_rate 1e-3 --batch_size 2")
    told("evaluate", "--judge", "reward:x")  # the newest run counts
    assert command("1_prepare_dataset.py", "--seed", "2") == "python 1_prepare_dataset.py --seed 2"
    # a script without our flags is given none
    told("lora", *given)
    assert command("configs/demo/base_model.py") == "python configs/demo/base_model.py"


def test_command_between_the_real_scripts(told):
    def real(section, *flags):
        override(constants_of(REPO, section), list(flags))

    same = "--model_name m --data_dir d --max_length 64 --seed 1".split()
    real("lora", *same, "--learning_rate", "1e-3", "--batch_size", "1", "--output_dir", "o", "--max_steps", "2")
    beside = os.path.relpath(REPO)
    assert command("1_prepare_dataset.py").endswith("1_prepare_dataset.py " + " ".join(same))
    assert command("3_full_finetuning.py").endswith("3_full_finetuning.py " + " ".join([*same, "--max_steps", "2"]))
    assert command("4_evaluate_compare.py").endswith(" --model_name m --data_dir d --seed 1 --lora_dir o")
    assert command("1_prepare_dataset.py").split()[1] in (
        f"{beside}/1_prepare_dataset.py",
        f"{REPO}/1_prepare_dataset.py",
    )
    real("full", "--output_dir", "o")
    assert command("4_evaluate_compare.py").endswith("4_evaluate_compare.py --full_dir o")
    assert command("2_lora_finetuning.py").endswith("2_lora_finetuning.py")
    real("evaluate", "--lora_dir", "l", "--full_dir", "f")
    assert command("2_lora_finetuning.py").endswith("2_lora_finetuning.py --output_dir l")
    assert command("3_full_finetuning.py").endswith("3_full_finetuning.py --output_dir f")


def test_the_script_of_a_command_is_found_from_the_current_folder(told, root, monkeypatch):
    told("lora")
    (root / "elsewhere").mkdir()
    monkeypatch.chdir(root / "elsewhere")
    assert command("1_prepare_dataset.py") == "python ../1_prepare_dataset.py"
    monkeypatch.chdir("/")
    assert command("1_prepare_dataset.py") == f"python {str(root)[1:]}/1_prepare_dataset.py"


# --- words and ranges

RULES = """
Schedule = Literal["cosine", "linear"]
Long = Literal["slow"] | Schedule
LR_SCHEDULER: Schedule = "cosine"  # how it falls
OPTIM: Long = "slow"
PRECISION: typing.Literal["auto", "bf16", "fp16", "fp32"] = "auto"
GRADIENT_CHECKPOINTING: bool | Literal["auto"] = "auto"
LIMIT: Annotated[int | None, "x >= 1"] = None
RATE: Annotated[float, "x > 0"] = 2e-4
SHARE: Annotated[float, "0 <= x < 1"] = 0.03
ALIKE: Annotated[float | None, "0.7 <= x <= 1"] = 0.8
SEED: Annotated[int, "0 <= x < 4_000_000_000"] = 42
NAME: Annotated[str, "not empty"] = "org/name"
LEVEL: Literal[1, 2] = 1
"""


@pytest.fixture
def rules(tmp_path):
    """rules(*flags, **edited): what override() changes in a script with words and ranges, edited by hand."""
    script = tmp_path / "rules.py"

    def apply(*flags, **edited):
        lines = RULES.splitlines()
        for name, text in edited.items():
            lines = [
                line.partition(" = ")[0] + f" = {text}" if line.startswith(f"{name}:") else line for line in lines
            ]
        script.write_text("\n".join(lines))
        known = read_constants(script)
        return override({"__file__": str(script)} | {n: c.default for n, c in known.items()}, list(flags))

    apply.script = script
    return apply


def test_read_words_and_ranges(rules):
    rules()
    known = read_constants(rules.script)
    assert "Schedule" not in known and "Long" not in known
    shown = {name: (c.types, c.choices, c.range, c.shown) for name, c in known.items()}
    assert shown == {
        "LR_SCHEDULER": (("str",), ("cosine", "linear"), "", "cosine|linear"),
        "OPTIM": (("str",), ("slow", "cosine", "linear"), "", "slow|cosine|linear"),
        "PRECISION": (("str",), ("auto", "bf16", "fp16", "fp32"), "", "auto|bf16|fp16|fp32"),
        "GRADIENT_CHECKPOINTING": (("bool", "str"), ("auto",), "", "auto|true|false"),
        "LIMIT": (("int", "None"), (), "x >= 1", "int|none (at least 1)"),
        "RATE": (("float",), (), "x > 0", "float (above 0)"),
        "SHARE": (("float",), (), "0 <= x < 1", "float (at least 0 and below 1)"),
        "ALIKE": (("float", "None"), (), "0.7 <= x <= 1", "float|none (from 0.7 to 1)"),
        "SEED": (("int",), (), "0 <= x < 4_000_000_000", "int (at least 0 and below 4,000,000,000)"),
        "NAME": (("str",), (), "not empty", "str (not empty)"),
        "LEVEL": (("int",), (1, 2), "", "1|2"),
    }
    assert known["LR_SCHEDULER"].help == "how it falls"
    words = rules.script.read_text().splitlines()
    assert all(words[c.line - 1].startswith(f"{name}:") for name, c in known.items())


@pytest.mark.parametrize("text", ["x >> 1", "y > 1", "x", "1 < x > 2 < 3", "1", "empty"])
def test_a_range_that_is_none_is_a_mistake_of_the_script(tmp_path, text):
    (tmp_path / "x.py").write_text(f'\nA: Annotated[int, "{text}"] = 1\n')
    with pytest.raises(SyntaxError, match="A: .* is no range") as error:
        read_constants(tmp_path / "x.py")
    assert error.value.lineno == 2


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--lr_scheduler", "linear"], {"LR_SCHEDULER": "linear"}),
        (["--gradient_checkpointing"], {"GRADIENT_CHECKPOINTING": True}),
        (["--no_gradient_checkpointing"], {"GRADIENT_CHECKPOINTING": False}),
        (["--gradient_checkpointing", "off"], {"GRADIENT_CHECKPOINTING": False}),
        (["--gradient_checkpointing", "false", "--gradient_checkpointing", "auto"], {}),
        (["--limit", "1"], {"LIMIT": 1}),
        (["--limit", "1", "--limit", "none"], {}),
        (["--share", "0"], {"SHARE": 0.0}),
        (["--alike", "1"], {"ALIKE": 1.0}),
        (["--alike", "none"], {"ALIKE": None}),
        (["--level", "2"], {"LEVEL": 2}),
        (["--seed", "3999999999"], {"SEED": 3999999999}),
    ],
)
def test_allowed_values(rules, flags, expected):
    assert rules(*flags) == expected


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--precision", "bf17"], "PRECISION is 'bf17'; choose auto, bf16, fp16 or fp32: --precision auto"),
        (["--precision", ""], "PRECISION is ''; choose auto, bf16, fp16 or fp32: --precision auto"),
        (["--lr_scheduler", "cosin"], "LR_SCHEDULER is 'cosin'; choose cosine or linear: --lr_scheduler cosine"),
        (["--lr_scheduler", "Linear"], "LR_SCHEDULER is 'Linear'; choose cosine or linear: --lr_scheduler linear"),
        (
            ["--gradient_checkpointing", "maybe"],
            "GRADIENT_CHECKPOINTING is 'maybe'; choose auto, true or false: --gradient_checkpointing auto",
        ),
        (["--limit", "0"], "LIMIT is 0; it must be at least 1, or none: --limit none"),
        (["--rate", "0"], "RATE is 0.0; it must be above 0: --rate 0.0002"),
        (["--share", "1"], "SHARE is 1.0; it must be at least 0 and below 1: --share 0.03"),
        (["--share", "-0.1"], "SHARE is -0.1; it must be at least 0 and below 1: --share 0.03"),
        (["--alike", "0.69"], "ALIKE is 0.69; it must be from 0.7 to 1, or none: --alike 0.8"),
        (["--seed", "-1"], "SEED is -1; it must be at least 0 and below 4,000,000,000: --seed 42"),
        (["--name", " "], "NAME is ' '; it must not be empty: --name org/name"),
        (["--level", "3"], "LEVEL is 3; choose 1 or 2: --level 1"),
        (["--level", "high"], "LEVEL is 'high'; choose 1 or 2: --level 1"),
    ],
)
def test_values_that_are_not_allowed(rules, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        rules(*flags)
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {message}\n"
    # what the message offers is accepted
    rules(*shlex.split(message.rpartition(": ")[2]))


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("PRECISION", '"bf17"', "line 6: PRECISION is 'bf17'; choose auto, bf16, fp16 or fp32: change it there, or "),
        ("RATE", "0", "line 9: RATE is 0; it must be above 0: change it there, or --rate 0.1"),
        ("LIMIT", "-1", "line 8: LIMIT is -1; it must be at least 1, or none: change it there, or --limit 1"),
        ("SEED", "0.5", "line 12: SEED is 0.5; it must be at least 0 and below 4,000,000,000: change it there, or "),
        ("NAME", "None", "line 13: NAME is None; it must not be empty: change it there, or --name text"),
        (
            "SHARE",
            '"few"',
            "line 10: SHARE is 'few'; it must be at least 0 and below 1: change it there, or --share 0.0",
        ),
        ("GRADIENT_CHECKPOINTING", "1", "line 7: GRADIENT_CHECKPOINTING is 1; choose auto, true or false: change it"),
    ],
)
def test_a_constant_edited_by_hand_is_checked(rules, capsys, name, text, message):
    with pytest.raises(SystemExit) as stop:
        rules(**{name: text})
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith(f"error: rules.py, {message}"), line
    # the flag that is offered mends it without a change of the script: the final value counts
    flag, value = shlex.split(line.rpartition("or ")[2])
    assert rules(flag, value, **{name: text})


def test_a_setting_must_not_be_computed(rules, capsys):
    with pytest.raises(SyntaxError):
        rules(SEED="2 * 21")
    with pytest.raises(SystemExit) as stop:
        override({"__file__": str(rules.script)}, [])
    message = "line 12: SEED is computed; write its value out, so that it can be read without running the script"
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {rules.script}, {message}\n"


def test_words_and_ranges_of_a_preset(root, capsys):
    script = root / "2_lora_finetuning.py"
    more = 'PRECISION: Literal["auto", "bf16"] = "auto"\nWARMUP: Annotated[float, "0 <= x < 1"] = 0.03\n'
    script.write_text(script.read_text().replace("\n# --- lora", f"\n{more}\n# --- lora"))
    preset(root, "lora:\n  precision: bf17\n  warmup: 100\n  lora_rr: 1\n")
    with pytest.raises(SystemExit):
        lora(root, ["--preset", "demo", "--warmup", "-1"])
    where = f"error: {root}/configs/presets/demo.yaml, section lora: "
    assert capsys.readouterr().err.splitlines() == [
        "error: WARMUP is -1.0; it must be at least 0 and below 1: --warmup 0.03",
        where + "PRECISION is 'bf17'; choose auto or bf16, e.g. precision: \"auto\"",
        where + "WARMUP is 100.0; it must be at least 0 and below 1, e.g. warmup: 0.03",
        where + "unknown setting lora_rr; did you mean lora_r?",
    ]
    # a word where YAML has another type, and another script's section
    preset(root, "lora:\n  precision: 16\n")
    with pytest.raises(SystemExit):
        override(constants_of(root, "prepare"), ["--preset", "demo"])
    assert "PRECISION is 16; choose auto or bf16" in capsys.readouterr().err


# Each check of one constant, in the scripts as they are.
REFUSED = [
    ("prepare", "dataset_name", " ", "must not be empty"),
    ("prepare", "eval_fraction", "0", "above 0 and below 1: --eval_fraction 0.1"),
    ("prepare", "eval_fraction", "1", "above 0 and below 1: --eval_fraction 0.1"),
    ("prepare", "max_drop_fraction", "1.1", "from 0 to 1: --max_drop_fraction 0.2"),
    ("prepare", "near_duplicate_threshold", "0.69", "from 0.7 to 1, or none: --near_duplicate_threshold 0.8"),
    ("prepare", "max_length", "0", "at least 1: --max_length 1024"),
    ("prepare", "num_test_prompts", "0", "at least 1: --num_test_prompts 100"),
    ("prepare", "seed", "-1", "at least 0"),
    *[(step, name, "0", "at least 1: --") for step in ("lora", "full") for name in (
        "batch_size", "gradient_accumulation_steps", "max_length", "logging_steps", "save_total_limit")],
    *[(step, name, "0", "above 0: --") for step in ("lora", "full") for name in (
        "learning_rate", "num_epochs", "eval_steps", "save_steps")],
    *[(step, name, "0", "at least 1, or none: --") for step in ("lora", "full") for name in (
        "max_train_samples", "max_eval_samples", "max_steps", "early_stopping_patience")],
    *[(step, name, "fast", "choose auto, true or false: --") for step in ("lora", "full") for name in (
        "gradient_checkpointing", "packing", "resume")],
    *[(step, name, "-0.1", "at least 0: --") for step in ("lora", "full") for name in (
        "weight_decay", "max_grad_norm")],
    ("lora", "lora_r", "0", "at least 1: --lora_r 16"),
    ("lora", "lora_alpha", "0", "at least 1: --lora_alpha 32"),
    ("lora", "lora_dropout", "1", "at least 0 and below 1: --lora_dropout 0.05"),
    ("lora", "warmup_ratio", "100", "at least 0 and below 1: --warmup_ratio 0.03"),
    ("lora", "max_drop_fraction", "-0.1", "from 0 to 1: --max_drop_fraction 0.2"),
    ("full", "device_memory_gb", "0", "above 0, or none: --device_memory_gb none"),
    ("full", "precision", "bf8", "choose auto, bf16, fp16 or fp32: --precision auto"),
    ("full", "lr_scheduler", "cosin", "or inverse_sqrt: --lr_scheduler cosine"),
    ("full", "optim", "adam", "choose auto, adamw_torch, adamw_torch_fused, "),
    ("full", "optim", "adamw_torchfused", ": --optim adamw_torch_fused"),
    ("full", "seed", str(2**32), "below 4,000,000,000: --seed 42"),
    ("evaluate", "max_new_tokens", "0", "at least 1: --max_new_tokens 256"),
    ("evaluate", "batch_tokens", "0", "at least 1, or none: --batch_tokens none"),
    ("evaluate", "generation_batch", "0", "at least 1, or none: --generation_batch none"),
    ("evaluate", "max_eval_samples", "0", "at least 1, or none: --max_eval_samples none"),
    ("evaluate", "precision", "bf8", "choose auto, bf16, fp16 or fp32: --precision auto"),
    ("evaluate", "resamples", "1999", "from 2000 to 1,000,000: --resamples 10000"),
    ("evaluate", "temperature", "10.5", "from 0 to 10: --temperature 0.0"),
    ("evaluate", "seed", str(2**32 - 10**6), "below 4,000,000,000: --seed 42"),
    ("evaluate", "report_language", "fr", "choose auto, en or zh: --report_language auto"),
    ("evaluate", "prompt", "", "must not be empty, or none: --prompt none"),
]  # fmt: skip


@pytest.mark.parametrize("section, name, text, message", REFUSED, ids=lambda value: value[:24])
def test_wrong_values_of_the_real_scripts(capsys, section, name, text, message):
    with pytest.raises(SystemExit) as stop:
        override(constants_of(REPO, section), [f"--{name}={text}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith(f"error: {name.upper()} is ") and message in line, line
    mended = shlex.split(line.rpartition(": ")[2])
    override(constants_of(REPO, section), mended)


def test_wrong_values_are_shown_together_and_before_torch(root):
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "2_lora_finetuning.py", "--batch_size", "0", "--precision", "bf17", "--lr", "1"],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "error: BATCH_SIZE is 0; it must be at least 1: --batch_size 4",
        "error: PRECISION is 'bf17'; choose auto, bf16, fp16 or fp32: --precision auto",
        "error: unknown setting --lr; did you mean --learning_rate?",
    ]
    assert time.perf_counter() - start < 3  # torch and trl alone take longer


def test_what_a_script_checks_itself_is_shown_with_the_rest(root, capsys):
    preset(root, "lora: {batch_size: 3}\n")
    seen = []

    def check(values):
        seen.append(values)
        return ["MODEL_NAME is missing"] if values["MODEL_NAME"] == "x" else []

    constants = constants_of(root, "lora")
    assert override(constants, ["--preset", "demo", "--lora_r", "8"], check) == {"BATCH_SIZE": 3, "LORA_R": 8}
    assert list(seen[0]) == list(read_constants(root / "2_lora_finetuning.py"))
    assert seen[0] == {name: constants[name] for name in seen[0]}  # as they are afterwards
    with pytest.raises(SystemExit):
        override(constants_of(root, "lora"), ["--model_name", "x", "--lora_r", "y"], check)
    assert [line[:12] for line in capsys.readouterr().err.splitlines()] == ["error: LORA_", "error: MODEL"]


def test_run_all_checks_the_constants_of_every_step(root, capsys):
    script = root / "3_full_finetuning.py"
    text = script.read_text().replace("BATCH_SIZE = 8", 'BATCH_SIZE: Annotated[int, "x >= 1"] = 0')
    script.write_text(text)
    with pytest.raises(SystemExit) as stop:
        split_flags([], root)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert "3_full_finetuning.py, line " in line and line.endswith("change it there, or --full.batch_size 1")
    assert "--batch_size=1" in split_flags(["--full.batch_size", "1"], root)["full"]


# --- help of the real scripts

ALL = [*SECTIONS, "run_all.py"]


@pytest.mark.parametrize("name", ALL)
def test_every_flag_has_help_on_its_line(name):
    lines = (REPO / name).read_text("utf-8").splitlines()
    for constant in read_constants(REPO / name).values():
        assert constant.help, f"{constant.flag} has no help"
        assert constant.help in lines[constant.line - 1] and len(lines[constant.line - 1]) <= 119
        assert constant.allows(constant.default), constant


@pytest.mark.parametrize("name", ALL)
def test_help_of_the_real_scripts(name):
    seconds = []
    for _ in range(3):  # the machine may be busy, so the best of three counts
        start = time.perf_counter()
        done = subprocess.run([sys.executable, name, "--help"], cwd=REPO, capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert (done.returncode, done.stderr) == (0, "")
    assert min(seconds) < 0.5
    lines = done.stdout.splitlines()
    assert lines[0].endswith(".") and lines[1] == ""  # a sentence on its line
    if name != "run_all.py":
        assert [line[:8] for line in lines if "Reads:" in line or "Writes:" in line] == ["Reads:  ", "Writes: "]
    flags = [i for i, line in enumerate(lines) if line.startswith("  --")]
    assert len(flags) >= len(read_constants(REPO / name))
    for i in flags:  # each with its help below it
        assert re.fullmatch(r"      [^ (].+", lines[i + 1]), lines[i]
    if "PRECISION" in read_constants(REPO / name):
        assert "  --precision auto|bf16|fp16|fp32" in lines
    assert all(len(line) <= 119 for line in lines if not line.startswith("  --"))


# --- names from elsewhere


@pytest.mark.parametrize(
    "section, flag, message",
    [
        ("lora", "--lr", "did you mean --learning_rate?"),
        ("lora", "--batch", "did you mean --batch_size?"),
        ("full", "--epochs", "did you mean --num_epochs?"),
        ("prepare", "--model", "did you mean --model_name?"),
        ("prepare", "--dataset", "did you mean --dataset_name?"),
        ("prepare", "--data", "did you mean --dataset_name?"),
        ("lora", "--data", "did you mean --data_dir?"),
        ("lora", "--steps", "did you mean --max_steps?"),
        ("lora", "--rank", "did you mean --lora_r?"),
        ("lora", "--alpha", "did you mean --lora_alpha?"),
        ("lora", "--dropout", "did you mean --lora_dropout?"),
        ("lora", "--quantize", "did you mean --use_4bit?"),
        ("lora", "--load-in-4bit", "did you mean --use_4bit?"),
        ("lora", "--accumulation", "did you mean --gradient_accumulation_steps?"),
        ("full", "--grad_accum", "did you mean --gradient_accumulation_steps?"),
        ("prepare", "--seq_len", "did you mean --max_length?"),
        ("lora", "--max_seq_length", "did you mean --max_length?"),
        ("lora", "--cutoff_len", "did you mean --max_length?"),
        ("lora", "--output", "did you mean --output_dir?"),
        ("prepare", "--output", "did you mean --data_dir?"),
        ("evaluate", "--output", "did you mean --report_dir?"),
        ("lora", "--report", "did you mean --report_to?"),
        ("evaluate", "--report", "did you mean --report_dir?"),
        ("evaluate", "--language", "did you mean --report_language?"),
        # what the script does not have is never suggested
        ("prepare", "--lr", "--learning_rate is a setting of 2_lora_finetuning.py and 3_full_finetuning.py"),
        ("full", "--rank", "--lora_r is a setting of 2_lora_finetuning.py"),
        ("full", "--lora_rr", "--lora_r is a setting of 2_lora_finetuning.py"),
        ("lora", "--yes", "--yes is a setting of run_all.py"),
        ("lora", "--xyzzy", "--help lists the settings"),
    ],
)
def test_names_from_elsewhere(capsys, section, flag, message):
    with pytest.raises(SystemExit) as stop:
        override(constants_of(REPO, section), [flag, "1"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.endswith(message), line


def test_names_from_elsewhere_in_a_preset(root, capsys):
    preset(root, "lora: {lr: 1e-4, rank: 8}\nfull: {rank: 8}\nall: {epochs: 1}\n")
    with pytest.raises(SystemExit):
        lora(root, ["--preset", "demo"])
    hints = [line.partition("section ")[2] for line in capsys.readouterr().err.splitlines()]
    assert hints == [
        "lora: unknown setting lr; did you mean learning_rate?",
        "lora: unknown setting rank; did you mean lora_r?",
        "full: unknown setting rank; lora_r is a setting of 2_lora_finetuning.py",
        "all: unknown setting epochs; did you mean num_epochs?",
    ]


def test_every_alias_leads_to_a_setting():
    known = {name.lower() for script in ALL for name in read_constants(REPO / script)}
    assert ALIASES.keys() <= known
    for name, others in ALIASES.items():
        assert len(set(others.split())) == len(others.split()) and name not in others.split()


# --- how a program ends


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A python without any package."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return str(folder / "bin" / "python")


def without_packages(bare, *words, cwd=REPO):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run([bare, *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True)


def missing(package, file="requirements.txt"):
    return f"error: the package '{package}' is not installed; install all of them with: pip install -r {file}\n"


@pytest.mark.parametrize("name", SECTIONS)
def test_a_missing_package_is_one_line(bare, name, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("")
    flags = ["--model_name", tmp_path / "model"]  # nothing that would be looked for on the Hub
    flags += ["--dataset_name", tmp_path / "rows.jsonl"] if name[0] == "1" else []
    for folder in (REPO, tmp_path):
        done = without_packages(bare, REPO / name, *flags, cwd=folder)
        match = re.fullmatch(re.escape(missing("@", "@")).replace("@", "(.+)"), done.stderr)
        assert match and done.returncode == 2, done.stderr
        package, file = match.groups()
        assert package in (REPO / "requirements.txt").read_text() or package in COMES_ALONG
        assert (folder / file).samefile(REPO / "requirements.txt")
        assert folder != REPO or file == "requirements.txt"


def test_without_pyyaml_a_preset_is_one_line_and_help_works(bare):
    for words in (["1_prepare_dataset.py", "--preset", "demo"], ["run_all.py", "--demo"]):
        done = without_packages(bare, *words)
        assert (done.returncode, done.stderr) == (2, missing("PyYAML"))
    for name in ALL:
        done = without_packages(bare, name, "--help")
        assert (done.returncode, done.stderr) == (0, "") and "demo" in done.stdout


def test_a_mistake_in_our_own_modules_keeps_its_traceback(root):
    for module in ("configs.nothing", "nothing_of_ours", "json.nothing"):
        script = root / "1_prepare_dataset.py"
        script.write_text(HEAD + TAIL + f"import {module}\n")
        done = run(root, "prepare")
        assert done.returncode == 1 and f"No module named '{module}'" in done.stderr and "Traceback" in done.stderr


def test_every_package_that_we_import_is_known(monkeypatch):
    from configs.settings import _package

    ours = {path.stem for path in REPO.rglob("*.py")} | {"configs"}
    # only for BENCHMARKS, SWEEP_EXECUTOR, REPORT_TO and a GGUF, which name them where they are missing
    ours |= {"lm_eval", "submitit", "swanlab", "llama_cpp"}
    for path in [*map(REPO.joinpath, ALL), *REPO.glob("configs/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for top in {name.partition(".")[0] for name in names} - ours - sys.stdlib_module_names:
                assert _package(top), f"{path.name} imports {top}, which requirements.txt does not name"


def shell(root, line, **env):
    """(exit code of the first command of the pipe, stderr)."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), **env}
    script = f"{line}; echo ${{PIPESTATUS[0]}} >code"
    done = subprocess.run(["bash", "-c", script], cwd=root, env=environment, capture_output=True, text=True)
    return int((root / "code").read_text()), done.stderr


CLOSED = "(exec <&-; sleep 0.5)"  # a reader that has gone before anything is written


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("name", ["1_prepare_dataset.py", "run_all.py"])
def test_help_into_head(tmp_path, name, unbuffered):
    line = f"{sys.executable} {REPO / name} --help"
    code, errors = shell(tmp_path, f"{line} | head -1", PYTHONUNBUFFERED=unbuffered)
    assert code in (0, 141) and errors == ""  # head may have read it all
    assert shell(tmp_path, f"{line} | {CLOSED}", PYTHONUNBUFFERED=unbuffered) == (141, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("flush", ["True", "False"])
def test_output_into_head(root, unbuffered, flush):
    many = f"for i in range(20000): print('line', i, flush={flush})\n"
    (root / "1_prepare_dataset.py").write_text(HEAD + TAIL + many)
    line = f"{sys.executable} 1_prepare_dataset.py"
    assert shell(root, f"{line} | head -1", PYTHONUNBUFFERED=unbuffered) == (141, "")
    # and what is only written when the program ends
    (root / "1_prepare_dataset.py").write_text(HEAD + TAIL + "print('done')\n")
    assert shell(root, f"{line} | {CLOSED}", PYTHONUNBUFFERED=unbuffered) == (141, "")


def test_a_mistake_is_shown_also_where_nobody_reads_the_output(root):
    code, errors = shell(root, f"{sys.executable} 1_prepare_dataset.py --sed 1 | {CLOSED}")
    assert (code, errors) == (2, "error: unknown setting --sed; did you mean --seed?\n")
    code, errors = shell(root, f"{sys.executable} 1_prepare_dataset.py --sed 1 >&-")
    assert (code, errors) == (2, "error: unknown setting --sed; did you mean --seed?\n")


def test_another_broken_pipe_keeps_its_traceback(root):
    broken = "import os\nread, write = os.pipe()\nos.close(read)\nos.write(write, b'x')\n"
    (root / "1_prepare_dataset.py").write_text(HEAD + TAIL + broken)
    done = run(root, "prepare")
    assert done.returncode == 1 and "Traceback" in done.stderr and "BrokenPipeError" in done.stderr


def test_quiet_errors_without_settings(tmp_path, bare):
    (tmp_path / "x.py").write_text("from configs.settings import quiet_errors\nquiet_errors()\nimport torch\n")
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run([bare, "x.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: the package 'torch' is not installed; ")
