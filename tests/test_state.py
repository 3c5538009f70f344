"""Which run lies in a folder, and what becomes of it: nothing that is finished is thrown away."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, SCRIPTS

from configs import handover, state
from configs.training import checkpoints
from configs.training.resume import Start, make_room, rate_at, say_new_end, where_to_start
from configs.values import read_constants

FULL = SCRIPTS[2]
MANIFEST = {
    "sha256": {"train": "a", "eval": "b", "validation": "c", "test": "d"},
    "settings": {"PROMPT_FORMAT": "auto"},
    "manifest_sha256": "abc",
}
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def settings_of(work: Path, **changed) -> SimpleNamespace:
    values = {name: constant.default for name, constant in read_constants(ROOT / FULL).items()}
    places = {"MODEL_NAME": str(work / "model"), "OUTPUT_DIR": str(work / "out"), "DATA_DIR": str(work / "data")}
    return SimpleNamespace(**{**values, **places, **changed})


def identity(work: Path, **changed) -> dict:
    return state.identity("full", vars(settings_of(work, **changed)), MANIFEST)


def checkpoint(work: Path, step: int, best: int | None = None, **changed) -> Path:
    """A checkpoint as the trainer leaves it, with files that only look like one."""
    folder = work / "out" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_bytes(f"{name} of step {step}".encode() * 100)
    saved = {
        "global_step": step,
        "best_metric": 2.5,
        "stateful_callbacks": {"RunLog": {"attributes": {"seconds": 60}}},
    }
    handover.write_json(folder / "trainer_state.json", saved)
    settings = vars(settings_of(work, **changed))
    best_name = best and f"checkpoint-{best}"
    run = {"identity": identity(work, **changed), "settings": settings, "plan": {"tokens_per_pass": 512}}
    checkpoints.seal(folder, {**run, "step": step, "steps": 40, "best": best_name})
    return folder


def write_log(work: Path, status: str, **changed) -> None:
    summary = {"status": status, "steps": 16, "train_runtime_s": 120.0, "eval_loss": 2.25}
    log = {"identity": identity(work, **changed), "settings": vars(settings_of(work, **changed)), "data": {}}
    handover.write_json(work / "out" / "training_log.json", {**log, "summary": summary})


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A model, and an interrupted run: two checkpoints, a third that was cut off while it was written, a log."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "phi"}')
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    for step in (8, 16):
        checkpoint(tmp_path, step)
    cut = tmp_path / "out" / "checkpoint-24"
    shutil.copytree(tmp_path / "out" / "checkpoint-16", cut)
    (cut / "manifest.json").unlink()
    (tmp_path / "out" / "runs").mkdir()
    write_log(tmp_path, "running")
    return tmp_path


@pytest.fixture
def done(work) -> Path:
    """The same, finished."""
    (work / "out" / "final_model").mkdir()
    (work / "out" / "final_model" / "model.safetensors").write_bytes(b"trained weights")
    write_log(work, "done")
    return work


def begin(work: Path, **changed) -> Start:
    settings = settings_of(work, **changed)
    start = where_to_start("full", settings, MANIFEST, SimpleNamespace())
    make_room(start, settings.OUTPUT_DIR)
    return start


def step_of(start: Start) -> str | None:
    return start.checkpoint and Path(start.checkpoint).name


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- the same run goes on


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
@pytest.mark.parametrize("resume", ["auto", True])
def test_an_unfinished_run_goes_on_from_its_last_whole_checkpoint(work, capsys, status, resume):
    write_log(work, status)
    start = begin(work, RESUME=resume)
    assert step_of(start) == "checkpoint-16" and start.plan == {"tokens_per_pass": 512}
    assert f"resuming from {work}/out/checkpoint-16" in capsys.readouterr().out
    left = sorted(path.name for path in (work / "out").iterdir())
    assert left == ["checkpoint-16", "checkpoint-8", "runs", "training_log.json"]  # the cut one is in the way


@pytest.mark.parametrize("log", ["", "[]", "{}", None, '{"settings": 1, "summary": 2, "data": 3}'])
def test_a_lost_log_loses_nothing(work, log):
    path = work / "out" / "training_log.json"
    path.unlink() if log is None else path.write_text(log)
    assert step_of(begin(work)) == "checkpoint-16"


def test_checkpoints_are_ordered_by_their_number(work):
    checkpoint(work, 128)
    assert step_of(begin(work)) == "checkpoint-128"  # "checkpoint-8" is last by its name


@pytest.mark.parametrize(
    "changed",
    [
        {"MODEL_NAME": "model", "DATA_DIR": "./data", "OUTPUT_DIR": "./out"},
        {"BATCH_SIZE": 1, "GRADIENT_ACCUMULATION_STEPS": 16},
        {"EVAL_STEPS": 5, "SAVE_STEPS": 5},
        {"EARLY_STOPPING_PATIENCE": 3},
        {"GRADIENT_CHECKPOINTING": True, "PACKING": False},
        {"MAX_DROP_FRACTION": 0.9, "LOGGING_STEPS": 1, "SAVE_TOTAL_LIMIT": 5, "REPORT_TO": "none"},
        {"PRECISION": "fp32", "OPTIM": "adamw_torch_fused"},  # auto may have been just these: the plan looks
    ],
)
def test_what_does_not_change_the_result_may_differ_and_is_said(work, capsys, changed):
    assert step_of(begin(work, **changed)) == "checkpoint-16"
    said = capsys.readouterr().out
    for name, value in changed.items():
        assert (f"{name} was" in said and f"is {value!r}" in said) or name not in state.SAID


def test_the_same_model_may_lie_elsewhere(work):
    (work / "model").rename(work / "moved")
    assert step_of(begin(work, MODEL_NAME=str(work / "moved"))) == "checkpoint-16"


def test_a_later_end_goes_on_and_says_what_it_does_to_the_learning_rate(work, capsys):
    start = begin(work, NUM_EPOCHS=9)
    assert step_of(start) == "checkpoint-16"
    settings = settings_of(work, NUM_EPOCHS=9, LR_SCHEDULER="linear", WARMUP_RATIO=0.0, LEARNING_RATE=1.0)
    say_new_end(start, settings, 160)
    said = capsys.readouterr().out
    # linear, from 1 to 0: 16 of 40 steps leave 0.6, 16 of 160 leave 0.9
    assert "160 steps instead of 40" in said and "9.00e-01 instead of 6.00e-01" in said
    assert rate_at(settings, 16, 40) == pytest.approx(0.6)
    say_new_end(start, settings, 40)
    assert "instead" not in capsys.readouterr().out


# --- a finished run is left as it is


def test_a_finished_run_is_skipped_with_one_line(done, capsys):
    before = everything(done)
    with pytest.raises(SystemExit) as end:
        begin(done)
    said = capsys.readouterr().out.strip().splitlines()
    assert end.value.code == 0 and len(said) == 1
    assert "already done" in said[0] and "16 of 40 steps" in said[0] and "eval_loss 2.2500" in said[0]
    assert "3_full_finetuning.py" in said[0] and "--rerun" in said[0]
    assert everything(done) == before


def test_resume_true_makes_the_final_folder_of_a_finished_run_again(done):
    assert step_of(begin(done, RESUME=True)) == "checkpoint-16"


def test_a_finished_run_whose_model_was_deleted_goes_on(done):
    shutil.rmtree(done / "out" / "final_model")
    assert step_of(begin(done)) == "checkpoint-16"


@pytest.mark.parametrize("other", [{"RERUN": True}, {"RESUME": False}])
def test_rerun_moves_the_run_aside_and_says_how_to_remove_it(done, capsys, other):
    before = everything(done / "out")
    start = begin(done, **other)
    assert start.checkpoint is None and list((done / "out").glob("[!.]*")) == []
    (place,) = (done / "history").iterdir()
    assert place.name.startswith("out-20") and everything(place) == before
    assert f"rm -r history/{place.name}" in capsys.readouterr().out


def test_a_move_that_was_cut_off_is_finished_when_the_folder_is_locked(done):
    place = done / "history" / "out-1"
    place.mkdir(parents=True)
    handover.write_text(done / "out" / ".aside", str(place))
    (done / "out" / "final_model").rename(place / "final_model")  # then the process was killed
    with handover.lock(done / "out"):
        assert list((done / "out").glob("[!.]*")) == []
    assert {p.name for p in place.iterdir()} >= {"final_model", "training_log.json", "checkpoint-16"}


# --- another run is not thrown away


OTHERS = [
    ({"LEARNING_RATE": 5.0}, "LEARNING_RATE was 5e-05 and is 5.0", "--learning_rate 5e-05"),
    ({"SEED": 7}, "SEED was 42 and is 7", "--seed 42"),
    (
        {"BATCH_SIZE": 8},
        "BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS was 16 and is 64",
        "--gradient_accumulation_steps 8",
    ),
    ({"MAX_LENGTH": 512}, "MAX_LENGTH was 1024 and is 512", "--max_length 1024"),
]


@pytest.mark.parametrize(("changed", "what", "back"), OTHERS)
@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("resume", ["auto", True])
def test_another_run_is_left_alone_and_three_ways_are_named(done, capsys, changed, what, back, finished, resume):
    if not finished:
        shutil.rmtree(done / "out" / "final_model")
        write_log(done, "interrupted")
    before = everything(done)
    with pytest.raises(SystemExit) as end:
        begin(done, **changed, RESUME=resume)
    said = capsys.readouterr().err
    assert end.value.code == 2 and what in said and "16 steps" in said.replace("16 of 40 steps", "16 steps")
    assert back in said and f"--output_dir {done}/out_2" in said and "--rerun" in said
    assert everything(done) == before


def test_other_rows_or_another_model_make_another_run(done, capsys):
    for key, words in (("train", "the training rows are others"), ("validation", "the validation rows are others")):
        other = {**MANIFEST, "sha256": {**MANIFEST["sha256"], key: "x"}}
        with pytest.raises(SystemExit) as end:
            where_to_start("full", settings_of(done), other, SimpleNamespace())
        assert end.value.code == 2 and words in capsys.readouterr().err
    (done / "model" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SystemExit):
        begin(done)
    assert "the files of the model are others" in capsys.readouterr().err


def test_other_test_rows_do_not_make_another_run(done):
    other = {**MANIFEST, "manifest_sha256": "x", "sha256": {**MANIFEST["sha256"], "eval": "x", "test": "x"}}
    with pytest.raises(SystemExit) as end:
        where_to_start("full", settings_of(done), other, SimpleNamespace())
    assert end.value.code == 0


def test_a_finished_run_is_not_made_longer_unasked(done, capsys):
    with pytest.raises(SystemExit) as end:
        begin(done, NUM_EPOCHS=9)
    assert end.value.code == 2 and "--resume true" in capsys.readouterr().err
    assert step_of(begin(done, NUM_EPOCHS=9, RESUME=True)) == "checkpoint-16"


def test_an_earlier_end_is_another_run(work, capsys):
    write_log(work, "running", MAX_STEPS=40)
    for step in (8, 16):
        shutil.rmtree(work / "out" / f"checkpoint-{step}")
        checkpoint(work, step, MAX_STEPS=40)
    with pytest.raises(SystemExit) as end:
        begin(work, MAX_STEPS=20)
    assert end.value.code == 2 and "MAX_STEPS was 40 and is 20" in capsys.readouterr().err


def test_a_run_of_an_older_version_is_left_alone(done, capsys):
    for path in (done / "out").glob("checkpoint-*/manifest.json"):
        path.unlink()
    log = json.loads((done / "out" / "training_log.json").read_text())
    del log["identity"]
    handover.write_json(done / "out" / "training_log.json", log)
    before = everything(done)
    with pytest.raises(SystemExit) as end:
        begin(done)
    said = capsys.readouterr().err
    assert end.value.code == 2 and "which run it is cannot be told" in said and "--rerun" in said
    assert everything(done) == before


def test_resume_true_needs_a_checkpoint(tmp_path, work, capsys):
    with pytest.raises(SystemExit) as end:
        begin(work, RESUME=True, OUTPUT_DIR=str(work / "empty"))
    assert end.value.code == 2 and "holds no checkpoint" in capsys.readouterr().err


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(work, capsys):
    for step in (8, 16):
        shutil.rmtree(work / "out" / f"checkpoint-{step}")
    start = begin(work, LEARNING_RATE=1.0)  # nothing lies there that could be lost
    assert start.checkpoint is None and not start.aside
    assert "checkpoint-24" in capsys.readouterr().out and not list((work / "out").glob("checkpoint-*"))


def test_only_the_main_process_moves_and_removes(work, monkeypatch):
    start = where_to_start("full", settings_of(work, RERUN=True), MANIFEST, SimpleNamespace())
    monkeypatch.setenv("RANK", "1")
    make_room(start, str(work / "out"))
    assert (work / "out" / "checkpoint-16").exists()


def test_a_model_on_the_hub_is_not_the_one_that_lay_here(done):
    """Which commit it has is not known before it is read; that it is another model is."""
    handover.write_json(done / "data" / "manifest.json", MANIFEST)
    now = vars(settings_of(done, MODEL_NAME="org/model"))
    assert state.of_step("full", now) == state.Step(
        "out of date", f"MODEL_NAME was {str(done / 'model')!r} and is 'org/model'"
    )


# --- damage


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["cut", "empty", "garbage", "missing", "other shape"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before_it(work, capsys, name, harm):
    path = work / "out" / "checkpoint-16" / name
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        harmed = {"cut": content[:-5], "empty": b"", "garbage": b"x" * len(content), "other shape": b"[]"}
        path.write_bytes(harmed[harm])
    start = begin(work)
    said = capsys.readouterr().out
    assert step_of(start) == "checkpoint-8"
    assert f"checkpoint-16 is damaged ({name}" in said
    assert not (work / "out" / "checkpoint-16").exists()  # its number comes again


@pytest.mark.parametrize("text", ["", "[]", "{}", '"16"', "10000", '{"files": 1}'])
def test_a_checkpoint_whose_manifest_is_damaged_is_skipped(work, text):
    (work / "out" / "checkpoint-16" / "manifest.json").write_text(text)
    assert step_of(begin(work)) == "checkpoint-8"


def test_a_checkpoint_is_not_used_without_its_best_one(work, capsys):
    """The best model is loaded at the end: without it, the run would end with another one, in silence."""
    # (an older one whose own best is whole is taken instead)
    checkpoint(work, 32, best=16)
    (work / "out" / "checkpoint-16" / "model.safetensors").write_bytes(b"")
    assert step_of(begin(work)) == "checkpoint-8"
    assert "its best checkpoint so far, checkpoint-16: model.safetensors has 0 bytes" in capsys.readouterr().out


def test_work_is_kept_where_only_the_best_checkpoint_is_lost(work, capsys):
    checkpoint(work, 32, best=16)
    for step in (8, 16):
        (work / "out" / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"")
    start = begin(work)
    assert (step_of(start), start.best, start.lost_best) == ("checkpoint-32", None, True)
    assert "checkpoint-16 was the best so far and is lost" in capsys.readouterr().out


def test_a_setting_that_only_one_version_has_is_no_difference(work):
    now = identity(work)
    assert state.differences({**now, "GONE": 1}, {**now, "NEW": 2}) == {}


def test_an_interrupted_rerun_goes_on_by_the_same_command(work):
    assert step_of(begin(work, RERUN=True)) == "checkpoint-16"
    assert begin(work, RERUN=True, SEED=7).aside


def test_an_interrupted_run_of_an_older_version_is_left_alone(work, capsys):
    for path in (work / "out").glob("checkpoint-*/manifest.json"):
        path.unlink()
    (work / "out" / "training_log.json").unlink()
    before = everything(work)
    with pytest.raises(SystemExit) as end:
        begin(work)
    assert end.value.code == 2 and "which run it is cannot be told" in capsys.readouterr().err
    assert everything(work) == before


def test_a_best_checkpoint_stays(work):
    checkpoint(work, 32, best=16)
    start = begin(work)
    assert (step_of(start), start.best) == ("checkpoint-32", "checkpoint-16")
    assert (work / "out" / "checkpoint-16").exists()


def test_where_nothing_is_whole_the_run_begins_anew_and_says_so(work, capsys):
    for step in (8, 16):
        (work / "out" / f"checkpoint-{step}" / "optimizer.pt").unlink()
    assert step_of(begin(work)) is None
    assert "no checkpoint" in capsys.readouterr().out
    for step in (8, 16):
        checkpoint(work, step)
        (work / "out" / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(SystemExit):
        begin(work, RESUME=True)


# --- locks


def test_a_lock_names_who_holds_it_and_since_when(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from configs import handover\n"
    code += f"with handover.lock({str(tmp_path)!r}): print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    assert handover.is_locked(tmp_path)
    refusal = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, input="")
    assert refusal.returncode == 2 and f"(process {other.pid}, since 20" in refusal.stderr
    other.communicate("")
    assert not handover.is_locked(tmp_path) and handover.holder(tmp_path) == ""


# --- the state of each step


def test_the_state_of_a_training(done):
    handover.write_json(done / "data" / "manifest.json", MANIFEST)
    now = vars(settings_of(done))
    assert state.of_step("full", now) == state.Step("done", "eval_loss 2.2500 in 2 min")
    assert state.of_step("full", {**now, "SEED": 1}) == state.Step("out of date", "SEED was 42 and is 1")
    assert state.of_step("full", {**now, "SEED": 1}).zh == "SEED 原为 42，现为 1"
    many = {**now, "SEED": 1, "LEARNING_RATE": 1.0, "NUM_EPOCHS": 9.0, "WEIGHT_DECAY": 0.5, "MAX_LENGTH": 7}
    assert state.of_step("full", many).why.endswith("; and 2 more")
    known = state.of_step("full", now)
    assert known.when == (done / "out" / "training_log.json").stat().st_mtime and known.seconds == 120
    write_log(done, "running")
    assert state.of_step("full", now) == state.Step("interrupted", "at step 16")
    with handover.lock(done / "out"):
        assert state.of_step("full", now).kind == "running"
    assert state.of_step("full", {**now, "OUTPUT_DIR": "nowhere"}) == state.Step("not yet")
    for damage in ("", "[]", "{}"):
        (done / "out" / "training_log.json").write_text(damage)
        assert state.of_step("full", now) == state.Step("not yet")


@pytest.mark.parametrize(
    ("verdict", "english", "chinese"),
    [
        (
            "On the test split, in nats per token of the answers: lora is worse than base by 0.1 (95 % interval 0.0 "
            "to 0.2); full against lora is not decided (95 % interval -0.1 to +0.2, but the adjusted p = 0.080).",
            "nats per token: lora is worse than base by 0.1; full against lora is not decided",
            "每 token 的 nats：lora 劣于 base 0.1；full 与 lora 尚无定论",
        ),
        (
            "No verdict, because the comparison is not sound: the data (of lora) are others",
            "No verdict, because the comparison is not sound: the data (of lora) are others",
            "比较不成立，不下结论：the data (of lora) are others",
        ),
    ],
)
def test_a_verdict_in_one_line(verdict, english, chinese):
    assert state.headline(verdict) == (english, chinese)


def test_the_real_verdict_is_shortened():
    """The patterns are those of the report's own sentences."""
    import yaml

    words = yaml.safe_load((ROOT / "configs/evaluation/templates/en.yaml").read_text("utf-8"))
    values = {"a": "full", "b": "lora", "difference": 0.5, "low": 0.4, "high": 0.6, "p": 0.2}
    for key in ("verdict_better", "verdict_worse", "verdict_none", "verdict_unsure"):
        short, chinese = state.headline(words["verdict"].format(pairs=words[key].format(**values)))
        assert short.startswith("nats per token: ") and "interval" not in short and "full" in short, short
        assert not [word for word in ("better", "worse", "between", "decided") if word in chinese]


def test_a_large_file_is_read_in_full_only_where_that_is_needed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "rows.jsonl"
    with rows.open("wb") as file:
        file.truncate(60_000_000)
    now = {"DATASET_NAME": "rows.jsonl", "DATA_DIR": "data"}
    counts = {"train": 1, "test": 1}
    manifest = {"settings": now, "source_files": "of other rows", "rows": counts}
    handover.write_json(tmp_path / "data" / "manifest.json", manifest)
    assert state.of_step("prepare", now, quick=True).kind == "done"
    assert state.of_step("prepare", now).kind == "out of date"
    rows.touch()
    assert state.of_step("prepare", now, quick=True).kind == "out of date"
