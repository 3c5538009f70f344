"""Further candidates of step 4 (merged_model, CANDIDATES), and tasks of lm-evaluation-harness (BENCHMARKS)."""

import html
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import SCRIPTS, ok, refused, run

EVALUATE = SCRIPTS[3]
TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files: {rows}
test_split: train
output_type: multiple_choice
doc_to_text: "What colour is {{{{thing}}}}?"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with a task of twelve questions."""
    folder = tmp_path_factory.mktemp("tasks")
    things = "snow coal grass sky blood gold milk soot leaf sea ink sand".split()
    rows = [{"thing": t, "choices": ["white", "black", "green", "blue"], "label": n % 4} for n, t in enumerate(things)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "colours.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory, trained, tiny, tasks) -> Path:
    """A working folder in which step 4 has compared base, LoRA, full, merged_model, an adapter and a model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    work = tmp_path_factory.mktemp("compared") / "work"
    shutil.copytree(trained, work)
    adapter = work / "outputs/lora_model/final_lora_adapter"
    shutil.copytree(adapter, work / "mine")
    for path in (work / "mine").glob("tokenizer*"):
        path.unlink()
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny, dtype="float32"), adapter)
    merged.merge_and_unload().save_pretrained(work / "outputs/lora_model/merged_model")
    for path in adapter.glob("*token*"):
        shutil.copy(path, work / "outputs/lora_model/merged_model")
    for path in adapter.glob("chat_template*"):
        shutil.copy(path, work / "outputs/lora_model/merged_model")
    flags = ["--model_name", tiny, "--max_new_tokens", "4", "--precision", "fp32", "--max_eval_samples", "12"]
    flags += ["--candidates", f"mine=mine,twin={work}/outputs/full_model/final_model", "--benchmarks", tasks]
    ok(run(EVALUATE, *flags, cwd=work))
    return work


@pytest.mark.slow
def test_further_candidates_stand_in_all_tables(compared):
    results = json.loads((compared / "outputs/evaluation_results.json").read_text("utf-8"))
    models, comparisons = results["models"], results["comparisons"]
    assert list(models) == ["base", "lora", "full", "merged", "mine", "twin"]
    pairs = {(c["a"], c["b"]) for c in comparisons if c["metric"] == "nll_per_token"}
    for label in ("merged", "mine", "twin"):
        assert {(label, "base"), (label, "lora"), (label, "full")} <= pairs
    # an adapter by its folder is the adapter, a model by its folder the model, and a merged adapter nearly itself
    assert models["mine"]["nll_per_token"] == pytest.approx(models["lora"]["nll_per_token"], abs=0.05)
    assert models["twin"]["nll_per_token"] == models["full"]["nll_per_token"]
    same = next(c for c in comparisons if (c["a"], c["b"], c["metric"]) == ("twin", "full", "nll_per_token"))
    assert same["difference"] == 0 and same["p_value"] == 1
    report = (compared / "outputs/evaluation_report.md").read_text("utf-8")
    assert "| merged_model | mine | twin |" in report
    for name in ("mine", "twin"):
        assert f"what {name} was trained on is not known" in report
    assert "merged was trained" not in report
    assert results["verdict"].count(";") == 2  # the verdict is about base, LoRA and full


@pytest.mark.slow
def test_tasks_are_compared_item_by_item(compared):
    results = json.loads((compared / "outputs/evaluation_results.json").read_text("utf-8"))
    assert results["metrics"]["colours"] == {"better": "higher", "unit": "acc"}
    lines = (compared / "outputs/evaluation_benchmarks.jsonl").read_text("utf-8").splitlines()
    items: dict[str, dict] = {}
    for line in map(json.loads, lines):
        assert line["task"] == "colours" and line["metric"] == "acc" and line["value"] in (0, 1)
        items.setdefault(line["model"], {})[line["item"]] = line["value"]
    assert set(items) == {"base", "lora", "full", "merged", "mine", "twin"}
    assert len({tuple(sorted(found)) for found in items.values()}) == 1 and len(items["base"]) == 12
    for name, found in items.items():
        assert results["models"][name]["benchmarks"] == {"colours": pytest.approx(np.mean(list(found.values())))}
    found = {(c["a"], c["b"]): c for c in results["comparisons"] if c["metric"] == "colours"}
    assert {("lora", "base"), ("full", "base"), ("full", "lora"), ("twin", "full")} <= set(found)
    difference = np.mean([items["full"][item] - items["base"][item] for item in items["base"]])
    assert found["full", "base"]["difference"] == pytest.approx(difference) and found["full", "base"]["groups"] == 12
    report = html.unescape((compared / "outputs/evaluation_report.md").read_text("utf-8"))
    assert "| colours (acc) |" in report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--candidates", "mine"], "'mine' is not name=folder or name=file.gguf"),
        (["--candidates", "mine=nowhere"], "'mine=nowhere' is not name=folder or name=file.gguf"),
        (["--candidates", "verdict=mine"], "the name 'verdict' is taken"),
        (["--candidates", "lora=mine"], "the name 'lora' is taken"),
        (["--candidates", "data=data"], "data holds no weights"),
        (["--benchmarks", "arc_eazy"], "lm_eval has no task 'arc_eazy'; did you mean arc_easy?"),
        (["--benchmarks", "mine"], "no task lies in mine"),
    ],
)
def test_what_cannot_be_compared_is_refused(compared, tiny, flags, said):
    before = (compared / "outputs/evaluation_results.json").read_bytes()
    refused(run(EVALUATE, "--model_name", tiny, *flags, cwd=compared), said)
    assert (compared / "outputs/evaluation_results.json").read_bytes() == before
