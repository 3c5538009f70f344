"""configs/settings.py: constants <- preset <- command line.

Small scripts with the real names are run as a user runs them.
"""

import dataclasses
import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.settings import (
    SECTIONS,
    command,
    fail,
    freeze,
    list_presets,
    main_process,
    override,
    preset_path,
    read_constants,
    say,
    split_flags,
)

REPO = Path(__file__).resolve().parent.parent
HEAD = '''"""Trains something.

Its constants stand above `override(globals())`.

Reads: data/
Writes: outputs/
"""
import json
import sys
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
    assert (rate.default, rate.types, rate.flag, rate.group) == (
        2e-4,
        ("float",),
        "--learning_rate",
        "training",
    )
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
        (
            ["--max_train_samples", "few"],
            "a whole number (int) or none, e.g. --max_train_samples 100",
            "'few'",
        ),
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
    assert "settings: LEARNING_RATE = 0.0001 (was 0.0002, from --learning_rate)\n" in done.stdout
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
    assert "  --learning_rate float\n" in text and "  --max_train_samples int|None\n" in text
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
    assert (done.returncode, done.stderr) == (0, "")


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
    assert "settings: BATCH_SIZE = 3 (was 8, from preset both, section lora)\n" in done.stdout


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
        (
            "model_name: 2024-01-01",
            "text (str)",
            "datetime.date(2024, 1, 1) (date); in quotes it would be text",
        ),
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
    "text, said",
    [
        (
            "lorra: {lora_r: 8}",
            "unknown section lorra; did you mean lora?; there are prepare, lora, full",
        ),
        ("learning_rate: 1e-4", "unknown section learning_rate, a setting that stands outside a section"),
        (
            "lora: {learning_rte: 1e-4}",
            "section lora: unknown setting learning_rte; did you mean learning_rate?",
        ),
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
def test_broken_presets(root, capsys, text, said):
    preset(root, text)
    with pytest.raises(SystemExit) as stop:
        lora(root, ["--preset", "demo"])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and all(line.startswith("error: ") for line in lines)
    assert any(said in line for line in lines), lines


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


def test_split_flags(root):
    flags = [
        "--lora.learning-rate=1e-4",
        "--learning_rate",
        "1e-3",
        "--batch_size",
        "2",
        "--full.batch_size",
        "1",
    ]
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
    flags = [
        "--lora.learning_rate",
        "1e-4",
        "--learning_rate",
        "1e-3",
        "--lora.no_use_4bit",
        "--model_name=--x y",
    ]
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
    assert "interrupted" in errors and "Traceback" not in errors


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
        "python 2_lora_finetuning.py --preset demo --lora_r 8 --batch_size 2 --packing false --resume true "
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
