"""run_all.py as its users meet it: in a terminal, with its real settings, and with steps that take no time.

The menu's screens and words are in test_menu.py.
"""

import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SCRIPTS, ok, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins import BASE_MODEL, SMALL, behave, calls, end, leave, make_folder, run, steps, terminal

from configs.flags import read_flags
from configs.settings import SECTIONS, override, override_all, read_constants
from configs.typed import parse_steps
from configs.values import Constant
from configs.words import TEXTS

RUN_ALL_ONLY = {"PRESET", "STEPS", "YES", "DEMO", "SWEEP", "SELECTION_SEEDS", "SEEDS"}
RUN_ALL_ONLY |= {"SELECTION_FRACTION", "SWEEP_DIR"}
# a model of which the menu knows that it takes seconds
TOY = ("--model_name", "outputs/demo_base_model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """run_all.py and configs/ as they are, beside four steps that only write down what they were given."""
    return make_folder(tmp_path)


# --- the menu


def test_the_menu_loads_no_heavy_library(folder):
    child = terminal(folder, python=("-X", "importtime"))
    child.expect_exact(TEXTS["en"]["prompt"])
    loaded = {line.rsplit("|", 1)[1].strip() for line in child.before.splitlines() if "|" in line}
    child.sendline("q")
    end(child)
    assert {"configs.settings", "rich.console"} <= loaded  # else the list is not what this test takes it for
    assert not loaded & {"torch", "numpy", "transformers", "datasets", "trl", "huggingface_hub", "pyarrow"}


def test_wrong_answers_are_asked_again(folder):
    child = terminal(folder, *TOY)
    for answer in ("5", "0", "1,x", "2-", "-3", "4-2", "nonsense"):
        child.expect_exact(TEXTS["en"]["prompt"])
        child.sendline(answer)
        child.expect_exact(TEXTS["en"]["see_help"])
    child.expect_exact(TEXTS["en"]["prompt"])
    assert not calls(folder)
    child.sendline("2, 1")
    assert "All done" in leave(child)
    assert child.exitstatus == 0
    assert steps(folder) == "12"


@pytest.mark.parametrize(("answer", "expected"), [("1", "1"), ("", "1234"), ("3-4", "34")])
def test_an_answer_runs_just_these_steps(folder, answer, expected):
    child = terminal(folder, *TOY)
    child.expect_exact(TEXTS["en"]["prompt"])
    child.sendline(answer)
    shown = leave(child)
    assert child.exitstatus == 0
    assert steps(folder) == expected
    table = shown.rpartition("All done in ")[2].split("\n\n")[0].splitlines()[1:]
    assert [line.split()[0] for line in table if line.strip()] == list(expected)  # one line of time for each


@pytest.mark.parametrize(("leave", "code"), [("q", 0), ("Q", 0), ("quit", 0), ("\x04", 0), ("\x03", 130)], ids=repr)
def test_leaving_runs_nothing(folder, leave, code):
    child = terminal(folder)
    child.expect_exact(TEXTS["en"]["prompt"])
    child.send(leave if leave < " " else leave + "\n")  # else Ctrl-D or Ctrl-C
    shown = end(child)
    assert TEXTS["en"]["nothing"] in shown
    assert "Traceback" not in shown
    assert child.exitstatus == code
    assert not calls(folder)


def test_the_menu_in_chinese(folder):
    words = TEXTS["zh"]
    # an ASCII locale is what a bare container has; the characters must come through all the same
    child = terminal(folder, "--language", "zh", env={**os.environ, "LC_ALL": "C"})
    child.expect_exact(words["prompt"])
    for text in words["steps"]:
        assert text in child.before
    child.sendline("9")
    child.expect_exact(words["see_help"])
    child.expect_exact(words["prompt"])
    child.sendline("1")
    shown = leave(child, "zh")
    assert words["done"].partition("{")[0] in shown and words["steps"][0] in shown
    assert child.exitstatus == 0
    assert steps(folder) == "1"


# --- without a terminal


def test_without_a_terminal_the_steps_must_be_named(folder):
    for language in TEXTS:
        result = run(folder, "--language", language)
        assert refused(result, "--yes", "--steps") == [f"error: {TEXTS[language]['no_terminal']}"]
    assert not calls(folder)
    assert run(folder, "--steps=3,1").returncode == 0
    assert steps(folder) == "13"


def test_help_needs_no_terminal_and_runs_nothing(folder):
    for flag in ("--help", "-h"):
        result = run(folder, flag, "--steps", "1")
        assert result.returncode == 0
        for words in ("--preset", "--steps", "--yes", "--demo", "--language", "a small story"):
            assert words in result.stdout
    assert not calls(folder)


def test_help_lists_its_settings_and_presets(folder):
    lines = run(folder, "--help").stdout.splitlines()
    for line in ("  --steps str|none", "  --yes true|false", "  --demo true|false", "  --language auto|en|zh"):
        assert line in lines
    assert "      small        a small story" in lines
    assert sum(line.strip().startswith("--preset NAME") for line in lines) == 1
    for section in SECTIONS.values():
        assert section in "\n".join(lines)
    others = {name for script in SCRIPTS for name in read_constants(ROOT / script)}
    assert not RUN_ALL_ONLY & others


def test_its_constants_can_be_edited(folder):
    script = folder / "run_all.py"
    original = script.read_text("utf-8")

    def edit(name: str, value: str) -> None:
        changed = re.sub(rf"^({name}\b.*? = )\S+", rf"\g<1>{value}", original, flags=re.MULTILINE)
        assert changed != original
        script.write_text(changed, "utf-8")

    edit("STEPS", '"2-3"')
    assert run(folder).returncode == 0
    assert steps(folder) == "23"
    assert run(folder, "--steps", "1").returncode == 0
    assert steps(folder) == "1"  # a flag beats it
    edit("PRESET", '"small"')
    assert run(folder, "--yes").returncode == 0
    assert {call["SEED"] for call in calls(folder) if "SEED" in call} == {7}
    edit("LANGUAGE", '"fr"')
    refused(
        run(folder, "--yes"),
        "run_all.py, line ",
        "LANGUAGE is 'fr'; choose auto, en or zh: change it there, or --language auto",
    )
    assert not calls(folder)


def test_mistakes_in_its_own_settings_and_in_those_of_a_step_come_together(folder):
    result = run(folder, "--language", "fr", "--num_epoch", "1", "--batch_size", "0", "--yes", "maybe")
    assert refused(result) == [
        "error: LANGUAGE is 'fr'; choose auto, en or zh: --language auto",
        "error: unknown setting --num_epoch; did you mean --num_epochs?",
        "error: BATCH_SIZE is 0; it must be at least 1: --batch_size 4",
        "error: YES wants true or false (bool), e.g. --yes false; --yes has 'maybe'",
    ]


def test_a_pipe_that_nobody_reads_ends_it_without_a_word(folder):
    for name in SCRIPTS:
        with open(folder / name, "a") as file:
            file.write("for _ in range(20000): print('line')\n")
    line = f"{sys.executable} run_all.py --yes | head -1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True)
    assert (result.stdout.splitlines()[-1], result.stderr) == ("141", "")
    assert steps(folder) in ("", "1")  # run_all.py or the first step has noticed it; nothing has gone on


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [1, 2, 3, 4]),
        ("  ", [1, 2, 3, 4]),
        ("all", [1, 2, 3, 4]),
        ("ALL", [1, 2, 3, 4]),
        ("1", [1]),
        ("4,1", [1, 4]),
        ("1 3", [1, 3]),
        (" 1 , 3 ", [1, 3]),
        ("2-4", [2, 3, 4]),
        ("1,2-3,3", [1, 2, 3]),
        ("2-2", [2]),
        ("1\uff0c3", [1, 3]),  # as a Chinese keyboard types it
        ("1\u3001\uff13", None),  # a full-width digit is no step
        ("2\u2014\u20144", [2, 3, 4]),
        ("\u5168\u90e8", [1, 2, 3, 4]),
        ("0", None),
        ("5", None),
        ("1-5", None),
        ("0-2", None),
        ("1,5", None),
        ("4-2", None),
        ("4-2,1", None),  # half of it would be obeyed
        ("1-2-3", None),
        ("1-", None),
        ("-1", None),
        ("-", None),
        (",", None),
        ("1.0", None),
        ("1;2", None),
        ("one", None),
        ("\u00b2", None),
        ("9" * 5000, None),  # int() refuses so many digits
    ],
)
def test_parse_steps(text, expected):
    assert parse_steps(text) == expected


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789,- al\uff0c\u2014", max_size=7))
def test_parse_steps_of_anything_typed(text):
    numbers = parse_steps(text)
    assert numbers is None or (numbers and numbers == sorted(set(numbers)) and set(numbers) <= {1, 2, 3, 4})


def test_an_endless_list_of_steps_is_refused_at_once(folder):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))  # 512 MB, so that a failure harms nobody

    result = run(folder, "--steps", "1-99999999999", preexec_fn=limit)
    refused(result, "'1-99999999999' is not a list of steps")


# --- what the steps are given


def test_flags_reach_the_steps_that_have_them(folder):
    assert run(folder, "--yes", "--num_epochs", "1", "--lora.learning_rate", "1e-4").returncode == 0
    first, lora, full, last = calls(folder)
    assert first["argv"] == last["argv"] == []
    assert lora["argv"] == ["--num_epochs=1", "--learning_rate=1e-4"]
    assert full["argv"] == ["--num_epochs=1"]
    defaults = {name: read_constants(ROOT / name)["LEARNING_RATE"].default for name in SCRIPTS[1:3]}
    assert (lora["NUM_EPOCHS"], full["NUM_EPOCHS"]) == (1.0, 1.0)
    assert (lora["LEARNING_RATE"], full["LEARNING_RATE"]) == (1e-4, defaults[SCRIPTS[2]])


def test_a_word_that_only_run_all_knows_is_not_passed_on():
    """--language auto, where a step wants en or zh."""
    own = {"LANGUAGE": Constant("LANGUAGE", "auto", ("str",), choices=("auto", "en", "zh"))}
    step = {"LANGUAGE": Constant("LANGUAGE", "en", ("str",), choices=("en", "zh"))}
    for value, wanted in (("auto", [None]), ("zh", [None, "prepare"])):
        problems = []
        _, flags = read_flags(["--language", value], {None: own, "prepare": step}, dict, problems)
        assert ([flag.step for flag in flags], problems) == (wanted, [])
    problems = []
    read_flags(["--language", "fr"], {None: own, "prepare": step}, dict, problems)
    assert len(problems) == 1 and "choose auto, en or zh" in str(problems[0])


def test_several_gpus_share_the_work_of_steps_2_to_4(folder, tmp_path):
    """As nvidia-smi has them, or CUDA_VISIBLE_DEVICES; the command is said, and two processes run each step."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA A (UUID: 1)'\necho 'GPU 1: NVIDIA A (UUID: 2)'\n"
    )
    (tools / "nvidia-smi").chmod(0o755)
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    env.pop("CUDA_VISIBLE_DEVICES")
    result = run(folder, "--steps", "1,2", "--num_epochs", "1", env=env)
    assert result.returncode == 0, result.stderr
    assert "python 1_prepare_dataset.py" in result.stdout
    assert "accelerate launch --num_processes 2 2_lora_finetuning.py --num_epochs=1" in result.stdout
    assert [call["step"] for call in calls(folder)] == ["1", "2", "2"]
    one = run(folder, "--steps", "2", env={**env, "CUDA_VISIBLE_DEVICES": "1"})
    assert "python 2_lora_finetuning.py" in one.stdout and steps(folder) == "2"


def test_a_preset_reaches_all_steps_and_flags_beat_it(folder):
    (folder / "own.yaml").write_text(SMALL.replace("seed: 7", "seed: 8"))
    assert run(folder, "--preset", "small", "--full.seed", "9", "--seed=6", "--steps", "2-4").returncode == 0
    assert [call["SEED"] for call in calls(folder)] == [6, 9, 6]
    for name, seed in (("small", 7), ("own.yaml", 8)):
        assert run(folder, f"--preset={name}", "--steps", "2,3").returncode == 0
        lora, full = calls(folder)
        assert (lora["SEED"], full["SEED"]) == (seed, seed)
        assert lora["LEARNING_RATE"] == 3e-4 != full["LEARNING_RATE"]


def test_flags_hold_for_what_is_chosen_in_the_menu(folder):
    child = terminal(folder, *TOY, "--preset", "small", "--num-epochs", "2")
    child.expect_exact(TEXTS["en"]["prompt"])
    child.sendline("3")
    leave(child)
    (full,) = calls(folder)
    assert (full["step"], full["SEED"], full["NUM_EPOCHS"]) == ("3", 7, 2.0)


def test_the_demo_makes_its_base_model_once(folder):
    demo = yaml.safe_load((folder / "configs" / "presets" / "demo.yaml").read_text("utf-8"))
    assert run(folder, "--demo").returncode == 0
    made = calls(folder)
    assert [call["step"] for call in made] == ["base model", "1", "2", "3", "4"]
    assert {call["MODEL_NAME"] for call in made[1:]} == {demo["all"]["model_name"]}
    assert run(folder, "--demo", "--steps", "1").returncode == 0
    assert steps(folder) == "1"
    shutil.rmtree(folder / "outputs")
    assert run(folder, "--preset", "demo", "--steps", "1", "--model_name", "org/other").returncode == 0
    assert steps(folder) == "1"  # another model needs none


def test_the_chinese_demo_makes_its_own_base_model_and_is_offered_in_chinese(folder):
    result = run(folder, "--preset", "demo_zh", "--yes")
    assert result.returncode == 0, result.stderr
    made = calls(folder)
    assert [call["step"] for call in made] == ["base model", "1", "2", "3", "4"]
    assert {call["MODEL_NAME"] for call in made[1:]} == {"outputs/demo_base_model_zh"}
    assert all(call["argv"] == ["--preset=demo_zh"] for call in made[1:])
    assert (folder / "outputs" / "demo_base_model_zh").is_dir()
    chinese, english = (run(folder, "--demo", "--language", language).stdout for language in ("zh", "en"))
    assert "中文演示：python run_all.py --preset demo_zh --yes" in chinese and "demo_zh" not in english


# --- mistakes are seen before anything runs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "smal"], "did you mean small?"),
        (["--num_epoch", "1"], "did you mean --num_epochs?"),
        (["--lorra.num_epochs", "1"], "did you mean lora?"),
        (["--full.lora_r", "8"], "is a setting of 2_lora_finetuning.py"),
        (["--num_epochs", "many"], "NUM_EPOCHS wants a finite number"),
        (["--steps", "7"], "--steps 2-4"),
        (["--steps", "1-"], "--steps 2-4"),
        (["--language", "fr"], "choose auto, en or zh"),
        (["--yes=2"], "YES wants true or false"),
        (["--seed", "1", "2"], "unexpected argument '2'"),
        (["--step", "1"], "unknown setting --step; did you mean --steps?"),
        (["--lr", "1"], "unknown setting --lr; did you mean --learning_rate?"),
        (["--batch_size", "0"], "BATCH_SIZE is 0; it must be at least 1: --batch_size 4"),
        (["--full.batch_size", "0"], "BATCH_SIZE is 0; it must be at least 1: --full.batch_size 2"),
        (["--precision", "bf17"], "PRECISION is 'bf17'; choose auto, bf16, fp16 or fp32: --precision auto"),
        (["--run_all.steps", "1"], "there is no step run_all"),
        (["--push_to_hub", "me/x"], "of its own: --lora.push_to_hub me/x-lora --full.push_to_hub me/x-full"),
        (["--demo", "--preset", "small"], "--demo is --preset demo --yes; leave it out for --preset small"),
    ],
)
def test_a_mistake_ends_before_the_first_step(folder, words, message):
    refused(run(folder, "--yes", *words), message)
    assert not calls(folder)


@pytest.mark.parametrize("flag", ["--steps", "--preset", "--language"])
def test_a_flag_without_its_value_gives_an_example_that_works(folder, flag):
    (error,) = refused(run(folder, "--yes", flag), flag)
    example = shlex.split(error.partition("e.g. ")[2])
    assert example[0] == flag
    result = run(folder, *(["--yes"] if flag == "--steps" else ["--steps=1"]), *example)
    assert result.returncode == 0, example
    assert steps(folder)


def test_a_mistake_in_a_later_steps_section_is_seen_at_the_start(folder):
    (folder / "configs" / "presets" / "small.yaml").write_text("evaluate:\n  max_new_token: 3\n")
    refused(run(folder, "--preset", "small", "--steps", "1"), "max_new_tokens")
    assert not calls(folder)


def test_a_chinese_menu_gives_a_chinese_report(folder):
    for flags, wanted in (
        (["--language", "zh"], "zh"),
        (["--language", "zh", "--evaluate.report_language", "en"], "en"),
        ([], None),
    ):
        assert run(folder, "--yes", *flags).returncode == 0
        first, *others, last = calls(folder)
        assert ("--language=zh" in first["argv"]) == bool(flags)
        given = [word for word in last["argv"] if "report_language" in word or word in ("zh", "en")]
        assert wanted is None and not given or wanted in " ".join(given)
        assert not [word for call in others[1:] for word in call["argv"] if "language" in word]


# --- a step that fails


@pytest.mark.parametrize("language", ["en", "zh"])
def test_it_stops_at_the_first_failure_and_says_how_to_go_on(folder, language):
    given = ["--preset", "small", "--num_epochs", "1", "--prepare.column_map", "instruction=a b,output=c's"]
    behave(folder, _3=7)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    result = run(folder, "--yes", *given, "--language", language, cwd=elsewhere)
    assert result.returncode == 7
    first = calls(folder)
    assert [call["step"] for call in first] == ["1", "2", "3"]
    assert TEXTS[language]["failed"].format(n=3, code=7) in result.stderr

    behave(folder)
    python, *command = shlex.split(result.stderr.strip().splitlines()[-1])
    assert python == "python"
    again = subprocess.run([sys.executable, *command], cwd=elsewhere, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert TEXTS[language]["done"].partition("{")[0] in again.stdout
    second = calls(folder)
    assert [call["step"] for call in second] == ["3", "4"]
    assert second[0]["argv"] == first[2]["argv"] and second[0]["SEED"] == 7


def test_the_command_goes_on_with_the_chosen_steps_only(folder):
    behave(folder, _2=2)
    result = run(folder, "--steps", "1,2,4")
    assert result.returncode == 2
    assert steps(folder) == "12"
    behave(folder)
    command = shlex.split(result.stderr.strip().splitlines()[-1])[1:]
    assert subprocess.run([sys.executable, *command], cwd=folder, capture_output=True).returncode == 0
    assert steps(folder) == "24"


def test_a_failed_demo_goes_on_as_a_demo(folder):
    (folder / "configs" / "demo" / "base_model.py").write_text("raise SystemExit(5)")
    result = run(folder, "--demo")
    assert result.returncode == 5
    assert not calls(folder)
    (folder / "configs" / "demo" / "base_model.py").write_text(BASE_MODEL)
    command = shlex.split(result.stderr.strip().splitlines()[-1])[1:]
    assert subprocess.run([sys.executable, *command], cwd=folder, capture_output=True).returncode == 0
    assert steps(folder) == "base model1234"


# --- interruptions


def gone(pid: int) -> bool:
    """Whether a process has ended and was waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("behaviour", ["dies", "saves", "finishes"])
def test_ctrl_c_reaches_the_step_and_ends_everything(folder, behaviour):
    behave(folder, _2=behaviour)
    child = terminal(folder, "--steps", "2,3")
    child.expect_exact("READY")
    child.sendintr()
    shown = end(child)
    assert child.exitstatus == 130, shown
    (call,) = calls(folder)  # step 3 was not run
    assert gone(call["pid"])
    # a traceback may be that of the step, which does not catch KeyboardInterrupt, but not of run_all itself
    assert 'run_all.py", line' not in shown


@pytest.mark.parametrize("behaviour", ["dies", "saves", "finishes"])
def test_sigterm_ends_the_step_and_everything(folder, behaviour):
    behave(folder, _2=behaviour)
    command = [sys.executable, str(folder / "run_all.py"), "--steps", "2,3"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while "READY" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    (call,) = calls(folder)
    assert gone(call["pid"])


def test_an_interrupted_run_goes_on_with_its_command(folder):
    behave(folder, _2="saves")
    child = terminal(folder, "--steps", "2,3", "--seed", "5")
    child.expect_exact("READY")
    child.sendintr()
    shown = end(child)
    calls(folder)
    behave(folder)
    command = shlex.split(shown.strip().splitlines()[-1])[1:]
    assert subprocess.run([sys.executable, *command], cwd=folder, capture_output=True).returncode == 0
    assert [(call["step"], call["SEED"]) for call in calls(folder)] == [("2", 5), ("3", 5)]


# --- the presets that are there


@pytest.mark.parametrize("preset", sorted(path.stem for path in (ROOT / "configs/presets").glob("*.yaml")))
def test_every_preset_fits_all_four_scripts(preset, capsys):
    data = yaml.safe_load((ROOT / "configs" / "presets" / f"{preset}.yaml").read_text("utf-8"))
    assert data["description"]
    assert re.search(r"[\u4e00-\u9fff]", data["description_zh"])
    # the menu has one line for it
    assert "\n" not in data["description"].strip() + data["description_zh"].strip()
    own = {name: constant.default for name, constant in read_constants(ROOT / "run_all.py").items()}
    dealt = override_all({"__file__": str(ROOT / "run_all.py"), **own}, ["--preset", preset])
    for script, section in SECTIONS.items():
        known = read_constants(ROOT / script)
        constants = {name: constant.default for name, constant in known.items()}
        applied = {"__file__": str(ROOT / script), **constants}
        override(applied, dealt[section])
        wanted = {key.upper(): value for key, value in (data.get("all") or {}).items() if key.upper() in known}
        wanted |= {key.upper(): value for key, value in (data.get(section) or {}).items()}
        for name, value in wanted.items():
            # PyYAML reads 5e-3 as text; the settings make it a number
            value = float(value) if isinstance(known[name].default, float) else value
            assert applied[name] == value, name
    assert "error" not in capsys.readouterr().err


def test_the_next_command_is_named_where_run_all_does_not_run_it_itself(folder):
    for name in SCRIPTS[:2]:
        ending = "\nfrom configs.ending import say_done\nsay_done('8 rows', 'a/b', 'python next.py')\n"
        (folder / name).write_text((folder / name).read_text("utf-8") + ending, "utf-8")
    ends = [line for line in ok(run(folder, "--steps", "1,2")).splitlines() if line.startswith("done: ")]
    assert [re.sub(r"\d+ s", "0 s", line) for line in ends] == [
        "done: 8 rows; 0 s; look at a/b",
        "done: 8 rows; 0 s; look at a/b; next: python next.py",
    ]
    ends = [line for line in run(folder, "--steps", "2", "--language", "zh").stdout.splitlines() if "完成：8" in line]
    assert len(ends) == 1 and ends[0].endswith("；请看 a/b；下一步：python next.py")
