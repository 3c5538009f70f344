"""What the report says to do, its glossary, and what an answer in good form is."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, SCRIPTS, load_script, ok, run
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.evaluation import glossary, metrics, statistics
from configs.evaluation.recommendation import cheaper, forgot, needed, no_use, recommend, told
from configs.evaluation.report import load_words

GOOD = {"useless": 0.1, "nearer": {"difference": 0.2, "ci95": [0.1, 0.3]}}
BAD = {"useless": 0.9, "nearer": {"difference": 0.2, "ci95": [0.1, 0.3]}}
FAR = {"useless": 0.1, "nearer": {"difference": 0.01, "ci95": [-0.1, 0.1]}}
# LoRA takes less of everything than full fine-tuning
COSTS = {
    "lora": {"train_runtime_s": 40.0, "peak_memory_bytes": 2e9, "disk_bytes": 1.5e6},
    "full": {"train_runtime_s": 100.0, "peak_memory_bytes": 8e9, "disk_bytes": 600e6},
}
SETTINGS = SimpleNamespace(RESAMPLES=2000, SEED=1)


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPTS[3])


def made_up(script, gains: dict[str, float], noise: float = 0.1, rows: int = 60, **more) -> tuple[dict, dict]:
    """(results, rows of each model) where a model's loss lies `gains` nats per token below the base's.

    more: answers and costs by model, general (how much is lost on general text), unsound, judge.
    """
    draw = np.random.default_rng(0)
    tokens, base = draw.integers(20, 60, rows).astype(float), draw.normal(3.0, 0.5, rows)
    groups = [str(n) for n in range(rows)]
    by_model = {"base": {"nll_per_token": SimpleNamespace(values=base * tokens, weights=tokens, groups=groups)}}
    for name, gain in gains.items():
        nll = (base - gain + draw.normal(0, noise, rows)) * tokens
        by_model[name] = {"nll_per_token": SimpleNamespace(values=nll, weights=tokens, groups=groups)}
    for name in ("base", *gains) if "general" in more else ():
        nll = np.full(40, 30.0) + 10 * (more["general"].get(name, 0) + draw.normal(0, 0.05, 40) * (name != "base"))
        rows_of = SimpleNamespace(values=nll, weights=np.full(40, 10.0), groups=statistics.blocks(40))
        by_model[name]["forgetting"] = rows_of
    answers, costs = more.get("answers", {}), more.get("costs", COSTS)
    results = {
        "models": {n: {"answers": answers.get(n, GOOD), "cost": costs.get(n)} for n in by_model},
        "comparisons": script.compare_all(SETTINGS, by_model),
        "unsound": more.get("unsound", []),
        "judge": more.get("judge"),
        "data": {"test_rows": rows},
    }
    return results, by_model


def advice(script, gains: dict[str, float], *, price: float | None = None, margin: float = 0.95, **more) -> dict:
    return recommend(*made_up(script, gains, **more), margin, price)


def said(found: dict, language: str = "en") -> list[str]:
    return told(found, load_words(language))


# --- the main cases, word for word


def test_full_is_better_and_lora_is_cheaper(script):
    found = advice(script, {"lora": 0.5, "full": 0.8}, price=9.0)
    assert (found["choice"], found["reason"], found["cheaper"]) == ("full", "better", "lora")
    assert found["kept"]["ci95"][0] < found["kept"]["kept"] < found["kept"]["ci95"][1] < 0.7
    assert found["prices"] == {"lora": pytest.approx(0.1), "full": pytest.approx(0.25)}
    assert said(found) == [
        "Take full: it predicts the reference answers better than lora, by 0.313 nats per token (95 % interval 0.278 "
        "to 0.348).",
        "lora keeps 61.4% of what full gains over the base (95 % interval 58.0% to 65.0%).",
        "Where training time, memory or disk space counts for more, take lora.",
        "What the training took: lora 40 s, 0.10 at 9 an hour, 2.00 GB of memory, 2 MB on disk; full 2 min, 0.25 at 9 "
        "an hour, 8.00 GB of memory, 0.60 GB on disk.",
    ]
    assert said(found, "zh")[:3] == [
        "请用全量：它对参考答案的预测好于 LoRA，每个 token 低 0.313 nats（95 % 区间 0.278 至 0.348）。",
        "全量相对基座的收益，LoRA 保留了 61.4%（95 % 区间 58.0% 至 65.0%）。",
        "如果更看重训练时间、内存（显存）或磁盘空间，请用 LoRA。",
    ]


def test_equivalent_models_are_told_apart_by_their_cost(script):
    found = advice(script, {"lora": 0.8, "full": 0.8}, noise=0.02)
    assert (found["choice"], found["reason"]) == ("lora", "equivalent")
    assert said(found)[0] == (
        "Take lora: it is the cheaper one, and lora and full are equivalent. Each keeps at least 95% of what the "
        "other gains over the base (MARGIN)."
    )
    assert said(found, "zh")[0] == (
        "请用 LoRA：它更省，而且 LoRA 与全量等效。各自都至少保留了对方相对基座的收益的 95%（MARGIN）。"
    )
    swapped = {"lora": COSTS["full"], "full": COSTS["lora"]}
    assert advice(script, {"lora": 0.8, "full": 0.8}, noise=0.02, costs=swapped)["choice"] == "full"
    found = advice(script, {"lora": 0.8, "full": 0.8}, noise=0.02, costs={})
    assert found["reason"] == "equivalent" and "neither is known to be cheaper" in said(found)[0]
    assert found["cheaper"] is None and not [line for line in said(found) if "training took" in line]


def test_the_cheaper_one_is_good_enough_though_the_other_is_better(script):
    gains = {"lora": 0.7, "full": 0.82}
    found = advice(script, gains, noise=0.02, margin=0.8)
    assert (found["choice"], found["reason"]) == ("lora", "good enough") and found["kept"]["keeps"]
    assert said(found)[:2] == [
        "Take lora: it is the cheaper one, and it is good enough. It keeps at least 80% of what full gains over the "
        "base (MARGIN).",
        "lora keeps 85.1% of what full gains over the base (95 % interval 84.3% to 85.9%).",
    ]
    assert said(found, "zh")[0] == "请用 LoRA：它更省，而且够用。全量相对基座的收益，它至少保留了 80%（MARGIN）。"
    # where the margin is not shown, or the better one is the cheaper one, the better one is recommended
    assert advice(script, gains, noise=0.02, margin=0.9)["reason"] == "better"
    swapped = {"lora": COSTS["full"], "full": COSTS["lora"]}
    found = advice(script, gains, noise=0.02, margin=0.8, costs=swapped)
    assert (found["choice"], found["reason"]) == ("full", "better")


def test_what_cannot_be_told_says_what_would_tell_it(script):
    found = advice(script, {"lora": 0.5, "full": 0.52}, noise=0.5)
    assert (found["choice"], found["reason"]) == ("untold", "undecided")
    lines = said(found)
    assert lines[0].startswith(
        "Both full and lora are better than the base, but which of them is better cannot be told"
    )
    assert "Until it can be told, lora is the cheaper one." in lines
    (rows,) = [line for line in lines if line.startswith("About ")]
    assert re.search(r"About [\d,]{3,} test rows \([\d,]{3,} different questions\) instead of 60 would show", rows)
    assert any("--sweep" in line for line in lines)
    assert said(found, "zh")[0].startswith("全量和 LoRA 都优于基座，但两者孰优孰劣还没有定论")


def test_stay_with_a_base_that_is_not_beaten(script):
    for gains in ({"lora": 0.0, "full": -0.5}, {"lora": -0.3}, {"full": 0.01}):
        found = advice(script, gains, noise=0.5)
        assert (found["choice"], found["reason"]) == ("base", "not beaten"), gains
        assert said(found)[0].startswith("Stay with base: none of the others (")
        assert said(found, "zh")[0].startswith("请继续用基座：不能证明其他模型（")


def test_few_questions_tell_nothing(script):
    found = advice(script, {"lora": 0.5, "full": 0.5}, noise=2.0, rows=6)
    assert (found["choice"], found["reason"]) == ("untold", "few questions")
    assert said(found)[0] == (
        "Which model is best cannot be told from 6 different test questions. Prepare more data, with about 100 of "
        "them."
    )


@pytest.mark.parametrize("bad", [BAD, FAR])
def test_a_model_whose_answers_nobody_can_use_is_never_recommended(script, bad):
    gains = {"lora": 0.5, "full": 0.8}
    found = advice(script, gains, answers={"full": bad})
    assert found["choice"] == "lora" and "Leave out full: nobody can use those answers." in said(found)
    found = advice(script, gains, answers={"full": bad, "lora": bad})
    assert (found["choice"], found["reason"]) == ("base", "no use")
    assert said(found)[0] == "Stay with base: nobody can use the answers of lora and full."
    found = advice(script, gains, answers=dict.fromkeys(("base", "lora", "full"), bad))
    assert (found["choice"], found["reason"]) == ("none", "no use")
    assert said(found) == [
        "Take none of these models: nobody can use the answers of base, lora and full. They need more training, or "
        "another base model."
    ]
    assert said(found, "zh") == [
        "这些模型都不要用：基座、LoRA 和全量的回答没有用。它们需要更多训练，或者换一个基座模型。"
    ]
    # nor is a useless base, though nothing beats it
    found = advice(script, {"lora": -0.5}, answers={"base": bad})
    assert (found["choice"], found["reason"]) == ("none", "no use")


def test_an_unsound_comparison_recommends_nothing(script):
    reasons = [("leaked", {"name": "lora", "number": 3, "row": "x", "command": "python 2_lora_finetuning.py"})]
    found = advice(script, {"lora": 0.5, "full": 0.8}, unsound=reasons)
    assert (found["choice"], found["reason"]) == ("untold", "unsound")
    (line,) = said(found)
    assert line.startswith("Take none of these models on these numbers") and "python 2_lora_finetuning.py" in line
    assert said(found, "zh")[0].startswith("凭这些数字，哪个模型都不要用")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_one_method_alone(script, method):
    found = advice(script, {method: 0.5})
    assert (found["choice"], found["reason"], found["kept"]) == (method, "better", None)
    assert said(found)[0].startswith(f"Take {method}: it predicts the reference answers better than base, by 0.4")


def test_further_candidates(script):
    gains = {"lora": 0.5, "full": 0.8, "mine": 1.2}
    found = advice(script, gains)
    assert found["choice"] == "mine" and "better than full, by 0.4" in said(found)[0]
    assert "What mine was trained on is not known. If test rows were among it, this does not hold." in said(found)
    # one that is no better than the choice is named, and one that is useless left out
    found = advice(script, gains | {"mine": 0.8}, answers={"mine": GOOD})
    assert found["choice"] == "full" and "Not told apart from full: mine." in said(found)
    assert advice(script, gains, answers={"mine": BAD})["choice"] == "full"
    # of two, the one that beats the other
    assert advice(script, gains | {"other": 1.6})["choice"] == "other"
    found = advice(script, gains | {"other": 1.2})
    assert found["choice"] == "untold" and said(found)[0].startswith("mine and other are better than the other models")
    assert re.match(r"About [\d,]+ test rows", said(found)[1])
    # LoRA's merged weights are LoRA
    assert advice(script, {"lora": 0.5, "full": 0.3, "merged": 0.9})["choice"] == "lora"


def test_heavy_forgetting_is_a_warning_in_it(script):
    found = advice(script, {"lora": 0.5, "full": 0.8}, general={"lora": 0.0, "full": 0.3})
    assert found["choice"] == "full" and set(found["forgot"]) == {"full"}
    lines = said(found)
    (line,) = [line for line in lines if "forgotten" in line]
    assert line.startswith("full has forgotten much: its loss on the general text rose by 0.294")
    assert lines[lines.index(line) + 1] == "Where the model must stay good at other things, take lora."
    assert not advice(script, {"lora": 0.5, "full": 0.8}, general={"full": 0.05})["forgot"]


@pytest.mark.parametrize(
    ("rise", "interval", "gain", "heavy"),
    [
        (0.2, (0.11, 0.3), 1.0, True),  # surely more than 0.1
        (0.2, (0.09, 0.3), 1.0, False),
        (0.05, (0.01, 0.09), 0.04, True),  # surely something, and more than was learned
        (0.05, (0.01, 0.09), 0.06, False),
        (0.5, (-0.1, 1.1), 0.04, False),  # perhaps nothing
        (-0.2, (-0.3, -0.1), 0.5, False),
        (0.05, (0.01, 0.09), -0.5, True),  # nothing was learned
    ],
)
def test_what_heavy_forgetting_is(rise, interval, gain, heavy):
    comparisons = [
        {"a": "lora", "b": "base", "metric": "nll_per_token", "difference": -gain, "ci95": [-gain - 1, -gain + 1]},
        {"a": "lora", "b": "base", "metric": "forgetting", "difference": rise, "ci95": list(interval)},
        {"a": "full", "b": "lora", "metric": "forgetting", "difference": 9.0, "ci95": [8.0, 10.0]},
        {"a": "base_4bit", "b": "base", "metric": "forgetting", "difference": 9.0, "ci95": [8.0, 10.0]},
    ]
    assert set(forgot(comparisons)) == ({"lora"} if heavy else set())


def test_a_judge_that_prefers_the_other_one_is_heard(script):
    bout = {"a": "full", "b": "lora", "win_rate": 0.2, "ci95": [0.1, 0.3], "n": 40}
    judge = {"withheld": None, "between_models": [bout]}
    wanted = (
        "The judge prefers the answers of lora to those of full, though (win rate 0.80, 95 % interval 0.70 to 0.90)."
    )
    gains = {"lora": 0.5, "full": 0.8}
    assert wanted in said(advice(script, gains, judge=judge))
    for harmless in (bout | {"ci95": [0.1, 0.6]}, bout | {"win_rate": 0.8, "ci95": [0.7, 0.9]}, bout | {"n": 0}):
        found = advice(script, gains, judge={"withheld": None, "between_models": [harmless]})
        assert not [line for line in said(found) if "judge" in line]
    assert wanted not in said(advice(script, gains, judge=judge | {"withheld": ["judge_missing", {}]}))


# --- what must hold whatever the numbers


gain = st.floats(-0.5, 1.0)


@settings(max_examples=60, deadline=None)
@given(
    gains=st.dictionaries(st.sampled_from(["lora", "full", "mine"]), gain, min_size=1),
    useless=st.sets(st.sampled_from(["base", "lora", "full", "mine"])),
    unsound=st.booleans(),
    noise=st.sampled_from([0.02, 0.3, 2.0]),
    rows=st.sampled_from([4, 12, 60]),
)
def test_nobody_is_sent_to_a_useless_or_unsound_model(script, gains, useless, unsound, noise, rows):
    reasons = [("different_data", {})] if unsound else []
    answers = dict.fromkeys(useless, BAD)
    results, by_model = made_up(script, gains, noise=noise, rows=rows, answers=answers, unsound=reasons)
    found = recommend(results, by_model, 0.95, 2.0)
    assert found["choice"] in {"base", "none", "untold", *gains} - useless
    assert not unsound or found["choice"] == "untold"
    if found["choice"] in gains:  # and it is shown to be better than the base
        name = found["choice"]
        (c,) = [c for c in results["comparisons"] if (c["a"], c["b"]) == (name, "base")]
        assert statistics.shows(c) and c["difference"] < 0
    for language in ("en", "zh"):
        lines = said(found, language)
        assert lines and all(lines) and not [line for line in lines if "{" in line or "None" in line]
    json.dumps(found)  # or it could not be written


@settings(max_examples=40, deadline=None)
@given(lora=gain, full=gain, noise=st.sampled_from([0.02, 0.2, 1.0]))
def test_the_names_make_no_difference(script, lora, full, noise):
    results, by_model = made_up(script, {"lora": lora, "full": full}, noise=noise)
    swap = {"lora": "full", "full": "lora"}
    turned = {swap.get(name, name): rows for name, rows in by_model.items()}
    turned = {name: turned[name] for name in by_model}
    mirrored = results | {
        "models": {swap.get(n, n): model for n, model in results["models"].items()},
        "comparisons": script.compare_all(SETTINGS, turned),
    }
    found, other = recommend(results, by_model, 0.95, None), recommend(mirrored, turned, 0.95, None)
    assert other["choice"] == swap.get(found["choice"], found["choice"]) and other["reason"] == found["reason"]


@settings(max_examples=40, deadline=None)
@given(lora=gain, full=gain, noise=st.sampled_from([0.02, 0.2]), more=st.floats(0.001, 1.0))
def test_a_choice_that_gets_better_stays_the_choice(script, lora, full, noise, more):
    results, by_model = made_up(script, {"lora": lora, "full": full}, noise=noise)
    found = recommend(results, by_model, 0.95, None)
    if found["choice"] not in by_model or found["choice"] == "base":
        return
    chosen = by_model[found["choice"]]["nll_per_token"]
    better = SimpleNamespace(**vars(chosen) | {"values": chosen.values - more * chosen.weights})
    changed = by_model | {found["choice"]: {"nll_per_token": better}}
    again = recommend(results | {"comparisons": script.compare_all(SETTINGS, changed)}, changed, 0.95, None)
    assert again["choice"] == found["choice"]


def test_the_interval_of_the_share_that_a_single_run_keeps_holds_the_truth():
    draw, held, sets, rows = np.random.default_rng(3), 0, 400, 60
    for _ in range(sets):
        tokens = draw.lognormal(3, 0.5, rows)
        common = draw.normal(0, 0.3, rows)
        base = draw.normal(3, 0.5, rows)
        lora = base - 0.6 + common + draw.normal(0, 0.2, rows)
        full = base - 1.0 + common + draw.normal(0, 0.2, rows)
        groups = [n // 2 for n in range(rows)]
        found = statistics.share_kept(base * tokens, lora * tokens, full * tokens, tokens, groups, 0.95)
        held += found["ci95"][0] <= 0.6 <= found["ci95"][1]
    assert 0.925 * sets <= held <= 0.985 * sets


def test_a_single_run_keeps_what_two_equal_runs_keep():
    draw = np.random.default_rng(4)
    base, lora, full, tokens = (draw.normal(mean, 0.2, 50) for mean in (3, 2.5, 2.2, 30))
    groups = list(range(50))
    alone = statistics.share_kept(base, lora, full, tokens, groups, 0.95)
    twice = statistics.share_kept(base, np.stack([lora, lora]), np.stack([full, full]), tokens, groups, 0.95)
    for key in ("kept", "ci95", "contrast", "contrast_ci95"):
        assert alone[key] == pytest.approx(twice[key]), key
    assert alone["kept"] == pytest.approx((base - lora).sum() / (base - full).sum())


def test_so_many_rows_would_really_tell():
    draw = np.random.default_rng(5)

    def compared(rows: int) -> dict:
        difference = draw.normal(-0.1, 0.5, rows)
        return statistics.compare(difference, np.zeros(rows), np.ones(rows), list(range(rows)), 2000, 0)

    few = compared(40)
    ((key, values),) = [needed(few, 0.1, 40)]
    assert key == "do_rows" and values["now"] == 40 and values["rows"] == values["groups"] > 100
    assert compared(values["rows"])["smallest_detectable"] == pytest.approx(0.1, rel=0.25)
    assert needed(few, few["smallest_detectable"] * 1.01, 40) is None and needed(few, 0.0, 40) is None


def test_what_is_cheaper():
    models = {"a": {"cost": dict(COSTS["lora"])}, "b": {"cost": dict(COSTS["full"])}, "c": {"cost": None}}
    assert cheaper(models, "a", "b") == cheaper(models, "b", "a") == "a"
    assert cheaper(models, "a", "c") is None
    models["b"]["cost"]["train_runtime_s"] = 41.0  # about the same time: memory decides
    models["a"]["cost"]["peak_memory_bytes"] = 9e9
    assert cheaper(models, "a", "b") == "b"
    models["a"]["cost"] |= {"train_runtime_s": None, "peak_memory_bytes": None}
    assert cheaper(models, "a", "b") == "a"  # disk


def test_no_use():
    assert (no_use({"answers": GOOD}), no_use({"answers": BAD}), no_use({"answers": FAR})) == (
        "",
        "useless",
        "not_nearer",
    )
    assert no_use({}) == no_use({"answers": {"useless": 0.5, "nearer": None}}) == ""


# --- the form of an answer


def test_the_answer_that_looked_helpful_gets_little():
    """It is what the demo's base model says to a question in Chinese."""
    answer, english = "The price: $2,500 " * 20, "What is the price of a good fund?"
    for text in (answer, answer.replace("500 ", "500\n"), "The price: $2,500 " * 3):
        assert metrics.repetitive(text)
        assert metrics.well_formed([text], [english], [True]) == [0.2]
        assert metrics.well_formed([text], [english], [False]) == [0]
    assert metrics.well_formed(["The price of this good fund is $2,500."], [english], [True]) == [1]


# --- the glossary


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_glossary_explains_words_that_the_reports_use(language):
    terms = glossary.load(language)
    folders = (ROOT / "configs/evaluation/templates", ROOT / "configs/comparison/templates")
    files = [folder / f"{language}.yaml" for folder in folders]
    text = "\n".join(path.read_text("utf-8") for path in files).lower()
    for term in terms:
        assert any(form.lower() in text for form in term.forms), term.name
        assert len(term.meaning) > 10 and term.meaning.endswith((".", "。")), term.name
    names = [form.lower() for term in terms for form in set(term.forms)]
    assert len(names) == len(set(names))  # no form has two meanings
    assert len(terms) == len(glossary.load("en"))


def test_a_term_is_marked_once_a_section_and_only_in_text():
    terms = [glossary.Term("nats", ["nats"], 'the "unit" <of> nll'), glossary.Term("p", ["p"], "chance")]
    abbr = '<abbr title="the &quot;unit&quot; &lt;of&gt; nll">{}</abbr>'.format
    page = (
        '<h1>nats</h1><p>Nats, nats</p><h2 id="nats">nats</h2><img alt="nats"><code>nats</code><svg><text>nats</text>'
        "</svg><p>natsy nats-x <b>5 nats计</b> p P</p><h2>Mine</h2><p>nats</p>"
    )
    assert glossary.mark(page, terms, ("Mine",)) == (
        f'<h1>nats</h1><p>{abbr("Nats")}, nats</p><h2 id="nats">nats</h2><img alt="nats"><code>nats</code><svg><text>'
        f'nats</text></svg><p>natsy nats-x <b>5 {abbr("nats")}计</b> <abbr title="chance">p</abbr> P</p>'
        "<h2>Mine</h2><p>nats</p>"
    )
    longer = [glossary.Term("interval", ["interval", "95 % interval"], "range")]
    assert glossary.mark("a 95 % interval", longer) == 'a <abbr title="range">95 % interval</abbr>'


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_sweeps_report_warns_and_explains_in_the_same_words(tmp_path, language):
    from test_sweep import made_up as made_up_sweep

    from configs.comparison import report, results

    found = results.analyse(*made_up_sweep(spread=0.002, gap=0.1), 2000, 0.95)
    heavy = forgot([*found["comparisons"], *found["forgetting"]])
    assert set(heavy) == {"lora", "full"}
    lines = [load_words(language)["do_forgot"].format(name=name, **much) for name, much in heavy.items()]
    report.write(found, tmp_path, language)
    text, page = ((tmp_path / f"sweep_report.{end}").read_text("utf-8") for end in ("md", "html"))
    for line in lines:
        assert line in report.summary(found, language) and line in text.splitlines()
    # what is better, and by how much, is said in the words of the evaluation's report
    start = load_words(language)["do_better"].split("{difference")[0]
    wanted = start.format(a="full", b="lora").rstrip()
    assert f"**{wanted}" in text
    assert '<abbr title="' in page and f"<h2>{load_words(language)['glossary']}</h2>" in page
    assert all(f"- **{term.name}**: {term.meaning}" in text for term in glossary.load(language))


# --- a real run


@pytest.fixture(scope="module")
def evaluated(trained, tiny, tmp_path_factory):
    """(folder, standard output) of step 4 on the tiny models, in Chinese."""
    folder = tmp_path_factory.mktemp("recommended") / "work"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    flags = "--max_new_tokens 8 --resamples 2000 --price_per_hour 3.5 --report_language zh".split()
    return folder, ok(run(SCRIPTS[3], "--model_name", tiny, *flags, cwd=folder))


def test_the_report_opens_with_the_recommendation(evaluated):
    folder, printed = evaluated
    results = json.loads((folder / "outputs/evaluation_results.json").read_text("utf-8"))
    found = results["recommendation"]
    keys = {"choice", "reason", "kept", "cheaper", "prices", "forgot", "notes", "sentences"}
    assert set(found) == keys and found["sentences"] == said(found)
    assert found["choice"] in ("lora", "full", "base", "none", "untold")
    chinese = said(found, "zh")
    report = (folder / "outputs/evaluation_report.md").read_text("utf-8").splitlines()
    assert report[2] == f"**{chinese[0]}**"
    assert [line[2:] for line in report[4:] if line.startswith("- ")][: len(chinese) - 1] == chinese[1:]
    for line in chinese:
        assert line in printed
    assert printed.splitlines()[-1].startswith(f"完成：{chinese[0].rstrip('。')}；")
    # the tiny models answer nothing but one token again and again
    assert all(no_use(model) for name, model in results["models"].items()) == (found["choice"] == "none")
    for name in ("lora", "full"):
        took = results["models"][name]["cost"]["train_runtime_s"]
        assert found["prices"][name] == pytest.approx(3.5 * took / 3600)


def test_the_page_explains_its_words(evaluated):
    page = (evaluated[0] / "outputs/evaluation_report.html").read_text("utf-8")
    sections = re.split("(?=<h2)", page)
    assert sections[-1].startswith("<h2>术语表</h2>") or "<h2>术语表</h2>" in page
    for term in ("nats", "困惑度", "chrF", "Shaffer", "可发现的最小差异", "EOS 率"):
        assert re.search(rf'<abbr title="[^"]+">{term}', page), term
        assert all(len(re.findall(rf'<abbr title="[^"]+">{term}<', part)) <= 1 for part in sections), term
    report = (evaluated[0] / "outputs/evaluation_report.md").read_text("utf-8")
    assert "<abbr" not in report
    for term in glossary.load("zh"):
        assert f"- **{term.name}**: {term.meaning}" in report
    assert math.isclose(len(glossary.load("zh")), report.partition("## 术语表")[2].count("\n- "))
