"""The default path, phi-2 on finance-alpaca, from a Hub on the loopback interface to the report.

The four scripts run by their real commands with their real constants, over a model that is phi-2 in everything but
size; only the length of the run is cut. What the Hub refuses must end in one line.
"""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SCRIPTS, ok, refused, run
from hub import Hub, finance_rows

MODEL, DATA = "microsoft/phi-2", "gbharti/finance-alpaca"
ROWS = 300
# 11 steps of 16 rows: the first record of the training loss comes with the tenth
TRAINING = ["--num_epochs", "0.6"]
ANSWERS = ["--max_new_tokens", "32"]
WAYS_OUT = ("HF_ENDPOINT", "--preset demo", "HF_HUB_OFFLINE")


@pytest.fixture(scope="module")
def hub(tiny: Path) -> Iterator[Hub]:
    with Hub() as hub:
        rows = json.dumps(finance_rows(ROWS)).encode()
        hub.add_model(MODEL, tiny)
        hub.add_model("some/gated-model", tiny, gated=True)
        hub.add_dataset(DATA, {"Cleaned_date.json": rows})
        hub.add_dataset("some/gated-rows", {"rows.json": rows}, gated=True)
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The cache of the Hub's files, empty at first and shared by the tests of this file."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def pipeline(hub: Hub, home: Path, tmp_path_factory) -> tuple[Path, list[str]]:
    """A working folder in which all four steps have run with an empty cache, and what each one said."""
    folder = tmp_path_factory.mktemp("pipeline")
    env = hub.env(home)
    # conftest.py keeps all other tests off the net; here the question is whether the scripts find it
    assert "HF_HUB_OFFLINE" in os.environ and "HF_HUB_OFFLINE" not in env
    given = [[], TRAINING, TRAINING, ANSWERS]
    said = [ok(run(name, *more, cwd=folder, env=env)) for name, more in zip(SCRIPTS, given, strict=True)]
    return folder, said


@pytest.fixture
def nobody() -> str:
    """The address of a Hub that is not there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def strangers(hub: Hub) -> list[str]:
    """What was asked of other hosts. The data set viewer is the Hub's own, and datasets always asks it."""
    viewer = hub.url.replace("://", "://datasets-server.")
    return [line for line in hub.strays if not line.startswith(f"GET {viewer}/info")]


# --- what comes out


@pytest.mark.slow
def test_nothing_but_the_hub_was_asked(hub, pipeline):
    assert strangers(hub) == []
    assert any(f"/{MODEL}/resolve/" in line for line in hub.requests)
    assert any(f"/datasets/{DATA}/resolve/" in line for line in hub.requests)


@pytest.mark.slow
def test_constants_are_untouched(pipeline):
    changes = [line for text in pipeline[1] for line in text.splitlines() if line.startswith("settings: ")]
    assert [line.split()[1] for line in changes] == ["NUM_EPOCHS", "NUM_EPOCHS", "MAX_NEW_TOKENS"]
    assert all(line.count(" = ") == 1 for line in changes)


@pytest.mark.slow
def test_the_data_are_complete(pipeline):
    from datasets import load_from_disk

    folder = pipeline[0] / "data"
    report = {"dataset_report.md", "length_histogram.png"}
    assert names(folder) - {".lock"} == {"train", "eval", "test_prompts.json", "manifest.json", *report}
    manifest = read(folder / "manifest.json")
    assert {"source", "revision", "schema", "settings", "rows", "sha256", "seed"} <= manifest.keys()
    assert manifest["source"] == DATA
    rows = manifest["rows"]
    assert (rows["read"], rows["kept"]) == (ROWS, ROWS - sum(rows["dropped"].values()))
    train, held_out = load_from_disk(str(folder / "train")), load_from_disk(str(folder / "eval"))
    assert train.column_names == ["id", "prompt", "completion"]
    assert held_out.column_names == ["id", "prompt", "completion", "part", "group"]
    assert len(train) + len(held_out) == rows["kept"]
    assert sorted(held_out["part"]) == ["test"] * 15 + ["validation"] * 15
    assert not set(train["id"]) & set(held_out["id"])
    prompts = read(folder / "test_prompts.json")
    assert all(prompt.keys() == {"id", "prompt", "reference"} for prompt in prompts)
    tested = {row["id"] for row in held_out if row["part"] == "test"}
    assert {prompt["id"] for prompt in prompts} == tested


@pytest.mark.slow
@pytest.mark.parametrize(("method", "final"), [("lora", "final_lora_adapter"), ("full", "final_model")])
def test_each_training_leaves_its_artefacts(pipeline, method, final):
    folder = pipeline[0] / "outputs" / f"{method}_model"
    checkpoints = {path.name for path in folder.glob("checkpoint-*")}
    assert 1 <= len(checkpoints) <= 2
    # README.md is what TRL writes beside its checkpoints
    left = {"runs", "training_log.json", "training_curves.png", "trained_rows.json"}
    assert names(folder) - checkpoints - {".lock", "README.md"} == {final, *left}

    log = read(folder / "training_log.json")
    expected = {"method", "model_name", "settings", "environment", "parameters", "data", "history", "summary"}
    assert expected <= log.keys()
    assert (log["method"], log["model_name"], log["summary"]["status"]) == (method, MODEL, "done")
    assert log["summary"]["steps"] == 11
    assert any("loss" in record for record in log["history"])
    assert any("eval_loss" in record for record in log["history"])
    assert log["data"]["train_rows"] == read(pipeline[0] / "data" / "manifest.json")["rows"]["train"]

    weights = {"lora": {"adapter_model.safetensors", "adapter_config.json"}}.get(
        method, {"model.safetensors", "config.json", "generation_config.json"}
    )
    there = names(folder / final)
    assert weights | {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"} <= there
    assert not {name for name in there if name.endswith((".bin", ".pt", ".pkl"))}
    card = (folder / final / "README.md").read_text("utf-8")
    assert f"base_model: {MODEL}\n" in card and DATA in card
    # a folder of this machine would make the result useless elsewhere
    text = "".join(p.read_text("utf-8") for p in (folder / final).iterdir() if p.suffix in (".json", ".md"))
    assert str(pipeline[0]) not in text


@pytest.mark.slow
def test_the_adapter_names_its_base_as_the_hub_does(pipeline):
    config = read(pipeline[0] / "outputs/lora_model/final_lora_adapter/adapter_config.json")
    assert config["base_model_name_or_path"] == MODEL


@pytest.mark.slow
def test_the_evaluation_leaves_its_artefacts(pipeline):
    folder = pipeline[0] / "outputs"
    made = {"evaluation_results.json", "evaluation_examples.jsonl", "evaluation_report.md"}
    made |= {"evaluation_report.html", "plots"}
    assert names(folder) - {".lock"} == made | {"lora_model", "full_model"}
    assert names(folder / "plots") == {"differences.png", "loss_curves.png", "cost.png"}
    results = read(folder / "evaluation_results.json")
    assert list(results["models"]) == ["base", "lora", "full"]
    assert {"environment", "settings", "data", "comparisons", "warnings"} <= results.keys()
    agreed = "perplexity nll_per_token bits_per_byte scored_tokens answer_quality style_match well_formed".split()
    for model in results["models"].values():
        assert {*agreed, "helpfulness", "forgetting", "cost"} <= model.keys()
    pairs = {(c["a"], c["b"]) for c in results["comparisons"]}
    with_4bit = {("base_4bit", "base"), ("lora", "base_4bit")}
    assert pairs == {("lora", "base"), ("full", "base"), ("full", "lora"), *with_4bit}
    # the base model's weights are random, so that whoever trained on the answers must do better
    nll = {name: model["nll_per_token"] for name, model in results["models"].items()}
    assert nll["full"] < nll["base"] and nll["lora"] < nll["base"]
    kinds = [json.loads(line) for line in (folder / "evaluation_examples.jsonl").read_text("utf-8").splitlines()]
    assert {record["model"] for record in kinds if "nll" in record} == {"base", "base_4bit", "lora", "full"}
    assert {record["model"] for record in kinds if "answer" in record} == {"base", "lora", "full"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_tensorboard_shows_both_runs(pipeline, method):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = pipeline[0] / "outputs" / f"{method}_model"
    # tensorboard --logdir ./outputs takes every folder with events below it for a run: there is one here
    runs = {path.parent for path in folder.rglob("events.out.tfevents.*")}
    assert len(runs) == 1 and runs.pop().is_relative_to(folder / "runs")
    events = EventAccumulator(str(next((folder / "runs").rglob("events.out.tfevents.*")).parent)).Reload()
    assert {"train/loss", "eval/loss"} <= set(events.Tags()["scalars"])
    history = read(folder / "training_log.json")["history"]
    for tag, key in (("train/loss", "loss"), ("eval/loss", "eval_loss")):
        shown = {event.step: event.value for event in events.Scalars(tag)}
        logged = {record["step"]: record[key] for record in history if key in record}
        assert shown == pytest.approx(logged, rel=1e-4), tag


# --- a second time, without the Hub


@pytest.mark.slow
def test_a_warm_cache_is_enough(hub, home, pipeline, nobody, tmp_path):
    env = hub.env(home) | {"HF_ENDPOINT": nobody}
    asked = len(hub.requests)
    said = ok(run(SCRIPTS[0], cwd=tmp_path, env=env))
    assert f"note: {nobody} cannot be reached" in said
    first, second = (read(folder / "data" / "manifest.json") for folder in (pipeline[0], tmp_path))
    assert first["sha256"] == second["sha256"]
    said = ok(run(SCRIPTS[1], "--max_steps", "2", cwd=tmp_path, env=env))
    assert f"note: {nobody} cannot be reached" in said
    assert read(tmp_path / "outputs/lora_model/training_log.json")["summary"]["status"] == "done"
    assert len(hub.requests) == asked, hub.requests[asked:]


# --- what cannot be had


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_hub_and_a_cold_cache_end_at_once(script, nobody, tmp_path, hub):
    start = time.monotonic()
    result = run(script, cwd=tmp_path, env=hub.env(tmp_path / "home") | {"HF_ENDPOINT": nobody})
    assert time.monotonic() - start < 10
    refused(result, MODEL, nobody, *WAYS_OUT)
    assert len(result.stderr.splitlines()) == 1 and not result.stdout
    assert (DATA in result.stderr) == (script == SCRIPTS[0])


def test_a_hub_that_never_answers_ends_soon(tmp_path, hub):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        result = run(SCRIPTS[0], cwd=tmp_path, env=hub.env(tmp_path / "home") | {"HF_ENDPOINT": endpoint})
        assert time.monotonic() - start < 10
    refused(result, MODEL, DATA, endpoint, *WAYS_OUT)
    assert len(result.stderr.splitlines()) == 1


def test_offline_on_purpose_with_a_cold_cache_ends_at_once(tmp_path, hub):
    asked = len(hub.requests)
    result = run(SCRIPTS[1], cwd=tmp_path, env=hub.env(tmp_path / "home") | {"HF_HUB_OFFLINE": "1"})
    refused(result, MODEL, "HF_HUB_OFFLINE is set", *WAYS_OUT)
    assert len(result.stderr.splitlines()) == 1
    assert len(hub.requests) == asked


WRONG = {
    "data set": (["--dataset_name", "gbharti/finance-alpacca"], ["gbharti/finance-alpacca", "DATASET_NAME"]),
    "gated data set": (["--dataset_name", "some/gated-rows"], ["some/gated-rows", "gated", "hf auth login"]),
    "data set's revision": (["--dataset_revision", "v9"], [DATA, "revision", "v9"]),
    "data set's split": (["--dataset_split", "training"], [DATA, "training", "train"]),
    "model": (["--model_name", "microsoft/phi-222"], ["microsoft/phi-222", "MODEL_NAME"]),
    "gated model": (["--model_name", "some/gated-model"], ["some/gated-model", "gated", "hf auth login"]),
    "model's revision": (["--model_revision", "v9"], [MODEL, "revision", "v9"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", WRONG)
def test_step_1_says_in_one_line_what_the_hub_refused(what, hub, home, tmp_path):
    flags, said = WRONG[what]
    result = run(SCRIPTS[0], *flags, cwd=tmp_path, env=hub.env(home))
    errors = refused(result, *said)
    assert len(errors) == 1
    assert not (tmp_path / "data" / "manifest.json").exists()
    assert strangers(hub) == []


@pytest.mark.slow
def test_training_says_in_one_line_what_the_hub_refused(hub, home, pipeline, tmp_path):
    shutil.copytree(pipeline[0] / "data", tmp_path / "data")
    flags, said = WRONG["model"]
    result = run(SCRIPTS[1], *flags, cwd=tmp_path, env=hub.env(home))
    assert len(refused(result, *said)) == 1
    assert not (tmp_path / "outputs" / "lora_model" / "training_log.json").exists()
