"""What a person sees of a training: the line of a step, the last line, what is warned of, and TensorBoard."""

import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, SCRIPTS, SHORT, ok, refused, run
from hub import finance_rows

from configs.training import before, doubts
from configs.training import progress as progress_module
from configs.training.progress import Progress, clock, line
from configs.training.runlog import hyperparameters, next_step

LORA, FULL = SCRIPTS[1:3]
FLAGS = ["--model_name", "model", *SHORT]
# One line a logging step. The first step has no time to go by, and the last one nothing left.
STEP = re.compile(
    r"step \d/4 · epoch \S+ · loss \d\.\d\d · eval \d\.\d\d · lr (\d\.\de-\d|0) · [\d.]+k? tok/s · [\d.]+ [MG]B"
    r"( · \d+:\d\d left)?"
)


# --- the line


def test_a_line_as_it_was_promised():
    promised = "step 30/60 · epoch 0.5 · loss 2.80 · eval 3.03 · lr 2.8e-3 · 2.8k tok/s · 1.2 GB · 0:12 left"
    assert line(30, 60, 0.5, 2.8, 3.03, 2.8e-3, 2800, 1.2e9, f"{clock(12)} left") == promised
    assert line(1, 60) == "step 1/60"


@pytest.mark.parametrize(
    "values, shown",
    [
        ({"loss": float("nan")}, "loss nan"),
        ({"loss": 0.03123}, "loss 0.0312"),
        ({"loss": 104.0}, "loss 104.00"),
        ({"rate": 0.0}, "lr 0"),
        ({"rate": 1.466e-05}, "lr 1.5e-5"),
        ({"speed": 9999}, "10k tok/s"),
        ({"speed": 999.6}, "1.0k tok/s"),
        ({"speed": 412}, "412 tok/s"),
        ({"memory": 3.1e6}, "3 MB"),
        ({"memory": 0.949e9}, "949 MB"),
        ({"memory": 14.96e9}, "15.0 GB"),
        ({"epoch": 0.123456}, "epoch 0.12"),
        ({"epoch": 2.0}, "epoch 2"),
    ],
)
def test_numbers_are_as_long_as_they_need_to_be(values, shown):
    assert line(1, 2, **values) == f"step 1/2 · {shown}"


def test_times():
    shown = [clock(n) for n in (0.4, 12, 60, 725, 3599.6, 3723)]
    assert shown == ["0:00", "0:12", "1:00", "12:05", "1:00:00", "1:02:03"]


@pytest.mark.parametrize("width", range(20, 100, 8))
def test_a_narrow_terminal_keeps_what_matters(width):
    whole = line(30, 60, 0.5, 2.8, 3.03, 2.8e-3, 2800, 1.2e9, "0:12 left")
    shown = line(30, 60, 0.5, 2.8, 3.03, 2.8e-3, 2800, 1.2e9, "0:12 left", width=width)
    assert len(shown) <= max(width, len("step 30/60 · 0:12 left"))
    assert shown.startswith("step 30/60") and shown.endswith("0:12 left")
    left_out = [part for part in whole.split(" · ") if part not in shown]
    assert left_out == [p for p in whole.split(" · ") if p in left_out]  # in their order, nothing is changed
    if width >= 38:
        assert "loss 2.80" in shown


def test_the_time_left_counts_the_evaluations_that_come():
    """Ten of a hundred steps at 2 s; two evaluations took 30 s together, and nine are to come (steps 20 to 100)."""
    log = SimpleNamespace(seconds=0.0, pauses=0.0)
    log.elapsed, log.paused = lambda: log.seconds, lambda: log.pauses
    progress, args = Progress(log), SimpleNamespace()
    state = SimpleNamespace(global_step=0, max_steps=100, eval_steps=10, epoch=0.0, is_world_process_zero=False)
    progress.on_train_begin(args, state, None)
    log.pauses = 15.0
    progress.on_evaluate(args, state, None)
    assert progress.left(state) is None
    for step in range(1, 11):
        log.seconds += 30.0 if step == 1 else 2.0  # the first one warms up
        state.global_step = step
        progress.on_step_end(args, state, None)
    log.pauses = 30.0
    progress.on_evaluate(args, state, None)
    assert progress.left(state) == pytest.approx(90 * 2 + 9 * 15)


# --- on a pipe and on a terminal


@pytest.fixture(scope="module")
def piped(fresh):
    """(folder, result) of a full fine-tuning whose output is a pipe."""
    work = fresh()
    result = run(FULL, *FLAGS, cwd=work)
    ok(result)
    return work, result


def test_without_a_terminal_each_logging_step_is_one_plain_line(piped):
    work, result = piped
    said = result.stdout.splitlines()
    steps = [text for text in said if text.startswith("step ")]
    assert re.fullmatch(r"step 0/4 · epoch 0 · eval \d\.\d\d", steps[0])
    assert len(steps) == 5 and all(STEP.fullmatch(text) for text in steps[1:]), steps
    assert " left" in steps[3] and " left" not in steps[4]
    log = json.loads((work / "outputs/full_model/training_log.json").read_text("utf-8"))
    shown = [text.split(" · ")[3].removeprefix("eval ") for text in steps[1:]]  # the evaluation of its own step
    evals = {record["step"]: f"{record['eval_loss']:.2f}" for record in log["history"] if "eval_loss" in record}
    assert shown == [evals[0], evals[2], evals[2], evals[4]] and len(set(evals.values())) > 1
    kept = "loss grad_norm learning_rate tokens_per_second memory_gb num_input_tokens_seen train_runtime epoch step"
    assert set(kept.split()) <= log["history"][1].keys()  # what is not shown is written all the same


def test_nothing_that_a_user_cannot_act_on(piped):
    _, result = piped
    everything = result.stdout + result.stderr
    for noise in ("{'", "it/s", "\r", "Filter", "Loading weights", "Writing model", "Setting accelerator", "%|"):
        assert noise not in everything, noise
    assert result.stderr == ""
    assert len([text for text in result.stdout.splitlines() if text.startswith("settings: ")]) == 1


def test_the_last_line_says_what_came_out_where_to_look_and_what_comes_next(piped):
    work, result = piped
    log = json.loads((work / "outputs/full_model/training_log.json").read_text("utf-8"))
    before_it = log["history"][0]["eval_loss"]
    last = result.stdout.splitlines()[-1]
    loss = f"eval loss {before_it:.4f} before, {log['summary']['eval_loss']:.4f} after 4 steps"
    assert last.startswith(f"done: outputs/full_model/final_model: {loss}; ")
    look_at = "look at outputs/full_model/training_curves.png, or: tensorboard --logdir outputs"
    assert re.search(rf"; \d+ s; {look_at}; next: python ", last)
    assert "2_lora_finetuning.py" in last.partition("; next: python ")[2]  # the other training is not there yet
    again = run(FULL, *FLAGS, "--quiet", cwd=work)
    assert ok(again).startswith("already done: ") and len(again.stdout.splitlines()) == 1


def test_a_run_that_goes_on_is_quiet_about_its_checkpoint(piped, tmp_path):
    """The libraries warn of a changed --eval_steps; resume.py says it in its own words."""
    work = shutil.copytree(piped[0], tmp_path / "work")
    words = [*FLAGS, "--max_steps", "6", "--eval_steps", "3", "--save_steps", "3", "--resume", "true"]
    result = run(FULL, *words, cwd=work)
    assert "EVAL_STEPS was 2.0 and is 3.0" in ok(result)
    assert "do not match" not in result.stdout + result.stderr and result.stderr == ""


def test_the_comparison_comes_next_where_the_other_model_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = SimpleNamespace(head={"method": "full"})
    assert "2_lora_finetuning.py" in next_step(log)
    (tmp_path / "outputs/lora_model/final_lora_adapter").mkdir(parents=True)
    assert "2_lora_finetuning.py" in next_step(log)  # a folder without weights
    (tmp_path / "outputs/lora_model/final_lora_adapter/adapter_model.safetensors").touch()
    assert "4_evaluate_compare.py" in next_step(log)
    assert "3_full_finetuning.py" in next_step(SimpleNamespace(head={"method": "lora"}))


def test_quiet_is_the_first_and_the_last_line_and_what_is_warned_of(fresh):
    work = fresh()
    result = run(FULL, *FLAGS, "--quiet", cwd=work)
    first, *between, last = ok(result).splitlines()
    assert first.startswith("full fine-tuning of model: 128 rows of ") and last.startswith("done: ")
    assert between and all(text.startswith("warning: ") for text in between)  # a toy that knows no language
    assert result.stderr == ""
    log = json.loads((work / "outputs/full_model/training_log.json").read_text("utf-8"))
    assert any("hardly knows the language" in note for note in log["notes"])
    # and an error is said as ever
    refused(run(FULL, *FLAGS, "--quiet", "--max_train_samples", "3", "--rerun", cwd=work), "and there are 3")


@pytest.mark.parametrize("columns", [120, 44])
def test_on_a_terminal_the_line_is_drawn_again_in_place(fresh, columns):
    import pexpect

    words = [str(ROOT / FULL), *FLAGS, "--max_steps", "60", "--eval_steps", "30", "--save_steps", "30"]
    size = {"dimensions": (40, columns), "encoding": "utf-8", "timeout": 120}
    child = pexpect.spawn(sys.executable, words, cwd=str(fresh()), **size)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    rows = child.before.replace("\r\n", "\n").split("\n")
    (drawn,) = [row for row in rows if "step 60/60" in row]  # one row, drawn over and over
    states = [state.rstrip() for state in drawn.split("\r") if state.strip()]
    steps = [int(state.removeprefix("step ").partition("/")[0]) for state in states if state.startswith("step ")]
    assert steps == sorted(steps) and steps[0] == 0 and len(set(steps)) > 5
    assert all(len(state) < columns for state in states)
    assert ("tok/s" in states[-1], "loss" in states[-1], "eval" in states[-1]) == (columns == 120, True, True)
    assert any(state.endswith(" left") for state in states)
    text = "\n".join(rows)
    assert "%|" not in text.partition("step 0/60")[2] and "{'" not in text
    assert "".join(rows[rows.index(drawn) + 1 :]).startswith("done: outputs/full_model/final_model: ")


def test_an_evaluation_says_how_far_it_is(monkeypatch):
    log = SimpleNamespace(elapsed=lambda: 0.0, paused=lambda: 0.0)
    progress, shown = Progress(log), []
    progress.drawn = SimpleNamespace(set_description_str=lambda text, refresh: shown.append(text))
    monkeypatch.setattr(progress_module, "columns", lambda: 80)
    state = SimpleNamespace(global_step=15, max_steps=30, eval_steps=15, epoch=0.5)
    for _ in range(2):
        progress.drawn_at = -1.0  # long ago
        progress.on_prediction_step(None, state, None, eval_dataloader=[1, 2])
    progress.on_evaluate(None, state, None)
    assert shown == [f"step 15/30 · epoch 0.5 · evaluating {n}/2" for n in (1, 2)] + ["step 15/30 · epoch 0.5"]


def test_ctrl_c_on_a_terminal_keeps_its_words_apart_from_the_line(fresh):
    import pexpect

    words = [str(ROOT / FULL), *FLAGS, "--max_steps", "4000", "--eval_steps", "2000", "--save_steps", "2000"]
    size = {"dimensions": (40, 160), "encoding": "utf-8", "timeout": 120}
    child = pexpect.spawn(sys.executable, words, cwd=str(fresh()), **size)
    child.expect("step [1-9][0-9]*/4000")
    child.sendintr()
    child.expect("\nSIGINT: finishing this step, then saving a checkpoint")
    child.expect("\ninterrupted at step ([0-9]+); saved outputs/full_model/checkpoint-[0-9]+; the same command")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130


# --- warned before it costs anything


@pytest.mark.parametrize(
    "method, rate, width, said",
    [
        ("lora", 2e-4, 2560, None),
        ("full", 5e-5, 2560, None),
        ("lora", 2e-4, 768, None),  # too low, but within the factor
        ("full", 5e-5, 64, "40 times below what full fine-tuning mostly wants"),
        ("lora", 2e-2, 2560, "40 times above what LoRA mostly wants"),
        ("full", 2e-3, 2560, "40 times above"),
    ],
)
def test_a_rate_far_from_what_the_method_wants(method, rate, width, said):
    settings = SimpleNamespace(LEARNING_RATE=rate, OPTIM="auto", **({"LORA_R": 16} if method == "lora" else {}))
    doubt = doubts.odd_rate(settings, width)
    assert (doubt is None) if said is None else (said in doubt)
    if doubt:  # what it advises is not doubted
        settings.LEARNING_RATE = float(doubt.rpartition("--learning_rate ")[2])
        assert doubts.odd_rate(settings, width) is None
    settings.OPTIM, settings.LEARNING_RATE = "sgd", rate  # of which the rule knows nothing
    assert doubts.odd_rate(settings, width) is None


def test_every_preset_has_a_rate_that_is_not_doubted():
    from configs.settings import resolved

    widths = {"microsoft/phi-2": 2560, "outputs/demo_base_model": 192, "outputs/demo_base_model_zh": 192}
    widths |= {"TinyLlama/TinyLlama-1.1B-Chat-v1.0": 2048}
    widths |= {"Qwen/Qwen2.5-0.5B": 896, "Qwen/Qwen2.5-1.5B": 1536, "meta-llama/Llama-3.2-1B": 2048}
    widths |= {"meta-llama/Llama-2-7b-hf": 4096, "Qwen/Qwen3-0.6B": 1024, "Qwen/Qwen3-1.7B": 2048}
    for preset in sorted(path.stem for path in (ROOT / "configs/presets").glob("*.yaml")):
        for script in (LORA, FULL):
            settings = SimpleNamespace(**resolved(ROOT / script, ["--preset", preset]))
            assert doubts.odd_rate(settings, widths[settings.MODEL_NAME]) is None, (preset, script)


def test_a_language_that_the_base_does_not_know():
    answers = [row["output"] for row in finance_rows(200)]
    size, bit = sum(map(len, answers)), math.log(2)
    tokens = size // 4  # phi-2's, about

    def doubt(bits_per_byte: float, tokens=tokens, answers=answers, size=size) -> str | None:
        return doubts.unknown_language(bits_per_byte * bit * size / tokens, tokens, answers, 51200)

    assert doubt(1.2) is None and doubt(2.5) is None
    assert "3.50 bits per byte" in doubt(3.5) and "--model_name" in doubt(3.5)
    assert doubt(3.5, tokens=size) and doubt(3.0, tokens=size) is None  # a token a byte: only the characters count
    # Chinese: three bytes a character
    text = "利率上升时，债券价格通常会下跌，因为新发行的债券收益更高。分散投资可以降低单一资产带来的风险。"
    chinese = {"answers": [text] * 9, "size": 9 * len(text.encode()), "tokens": 9 * len(text)}
    assert doubt(1.6, **chinese) and doubt(0.9, **chinese) is None
    # labels are no language, whatever they cost a base that was never told to give one
    assert doubt(9.0, answers=["positive", "negative"] * 50, size=800, tokens=200) is None
    assert doubt(float("nan")) is None and doubts.unknown_language(3.0, 0, [], 512) is None


def test_more_than_an_hour_is_said_once_after_the_first_steps(capsys):
    log = SimpleNamespace(seconds=0.0)
    log.elapsed, log.paused = lambda: log.seconds, lambda: 0.0
    progress = Progress(log)
    state = SimpleNamespace(global_step=0, max_steps=1000, eval_steps=250, epoch=0.0, is_world_process_zero=False)
    for step in range(1, 31):
        log.seconds += 40.0 if step == 1 else 12.0
        state.global_step = step
        progress.on_step_end(None, state, None)
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("warning: about 3.3 h to go") and "--max_train_samples" in said
    assert doubts.many_hours(3599) is None


# --- TensorBoard and the other trackers


def test_tensorboard_has_curves_without_noise_and_hparams_in_order(piped):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    events = EventAccumulator(str(piped[0] / "outputs/full_model/runs")).Reload()
    train = {f"train/{name}" for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_gb")}
    assert set(events.Tags()["scalars"]) == {*train, "eval/loss", "hparam/loss", "hparam/eval_loss"}
    assert len(events.Scalars("train/loss")) == 4 and len(events.Scalars("eval/loss")) == 3
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    experiment = plugin_data_pb2.HParamsPluginData.FromString(content).experiment
    names = [info.name for info in experiment.hparam_infos]
    assert names[:4] == ["LEARNING_RATE", "LORA_R", "rows_per_step", "NUM_EPOCHS"]


def test_both_methods_have_the_same_columns():
    """TensorBoard takes the columns of all runs from the first one that it finds."""
    from configs.settings import resolved

    methods = (("lora", LORA), ("full", FULL))
    shown = [hyperparameters(method, resolved(ROOT / script, [])) for method, script in methods]
    kinds = [[(name, type(value)) for name, value in columns.items()] for columns in shown]
    assert kinds[0] == kinds[1]
    assert (shown[0]["LORA_R"], shown[1]["LORA_R"]) == ("16", "full") and shown[0]["rows_per_step"] == 16


@pytest.mark.parametrize("tracker", ["trackio", "swanlab"])
def test_a_tracker_that_is_not_installed_is_named(tracker, monkeypatch):
    from configs.settings import resolved

    settings = resolved(ROOT / LORA, []) | {"REPORT_TO": f"tensorboard,{tracker}"}
    find, there = before.importlib.util.find_spec, {}
    monkeypatch.setattr(before.importlib.util, "find_spec", lambda name: there.get(name, find(name)))
    there[tracker] = None
    (problem,) = [text for text in before.problems(settings) if "REPORT_TO" in text]
    assert problem.endswith(f"which is not installed: pip install {tracker}")
    there[tracker] = object()
    monkeypatch.setenv("SWANLAB_MODE", "local")  # or it would ask for a login
    assert before.problems(settings) == []
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert tracker in INTEGRATION_TO_CALLBACK  # the Trainer knows it by this name


def test_no_script_prints_more_than_its_last_line_at_the_end():
    """All four steps end by say_done, and nothing is said behind it."""
    for name in SCRIPTS:
        text = (ROOT / name).read_text("utf-8") + Path(ROOT / "configs/training/runlog.py").read_text("utf-8")
        assert "say_done(" in text and 'say(f"done' not in text, name


def test_swanlab_without_a_login_is_refused_before_the_model_loads(tmp_path, monkeypatch):
    """A stand-in package: swanlab is none of our requirements, and would ask its makers' server for the login."""
    from configs.settings import resolved

    (tmp_path / "swanlab").mkdir()
    (tmp_path / "swanlab" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("SWANLAB_MODE", "SWANLAB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stdin", None)
    settings = resolved(ROOT / LORA, []) | {"REPORT_TO": "swanlab"}

    def told() -> list[str]:
        return [text for text in before.problems(settings) if "REPORT_TO" in text]

    assert len(told()) == 1 and "swanlab login" in told()[0] and "SWANLAB_MODE=local" in told()[0]
    monkeypatch.setenv("SWANLAB_MODE", "local")
    assert told() == []
    monkeypatch.delenv("SWANLAB_MODE")
    (tmp_path / ".swanlab").mkdir()
    (tmp_path / ".swanlab" / ".netrc").write_text("machine api.swanlab.cn")
    assert told() == []


def test_swanlabs_own_callback_takes_the_place_of_the_trainers(tmp_path, monkeypatch):
    """The Trainer's asks for a run that is not there yet, which swanlab 0.10 answers with an error."""
    from transformers.integrations import SwanLabCallback

    (tmp_path / "swanlab" / "integration").mkdir(parents=True)
    for name, text in (("__init__.py", ""), ("integration/__init__.py", "")):
        (tmp_path / "swanlab" / name).write_text(text)
    (tmp_path / "swanlab" / "integration" / "transformers.py").write_text("class SwanLabCallback: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    theirs = SwanLabCallback.__new__(SwanLabCallback)
    assert type(progress_module.ours_for(theirs)).__module__ == "swanlab.integration.transformers"
    for name in [name for name in sys.modules if name.partition(".")[0] == "swanlab"]:
        monkeypatch.delitem(sys.modules, name)
