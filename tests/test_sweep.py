"""The sweep: questions, grids, selection, what is done again and what not, and a whole one at toy size."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, ok, run

from configs import handover
from configs.comparison import jobs, report, results, runs, weights
from configs.comparison.plan import Sweep, begin
from configs.comparison.question import Arm, grid, neighbour, read_question
from configs.comparison.runs import check_arms, note, words_of
from configs.comparison.sweep import best_rate, choose, confirm

LORA, FULL = SCRIPTS[1:3]
QUESTIONS = sorted(path.stem for path in (ROOT / "configs" / "comparison").glob("*.yaml"))
MANIFEST = {"sha256": {"train": "rows of today"}, "rows": {"train": 900}}


def settings_of(tmp_path, **changed) -> SimpleNamespace:
    values = {"SWEEP_DIR": str(tmp_path / "sweep"), "SELECTION_FRACTION": 1.0, "RERUN": False}
    return SimpleNamespace(**{**values, **changed})


def fresh_sweep(tmp_path, *methods: str) -> Sweep:
    arms = [Arm(method, method, {}) for method in methods]
    return begin(settings_of(tmp_path), arms, {"name": "x"}, MANIFEST, {"lora": [], "full": []})


# --- questions


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_question_is_whole(name):
    words, arms = read_question(name)
    assert words["description"] and words["description_zh"] != words["description"]
    assert len(arms) >= 2 and len({arm.name for arm in arms}) == len(arms)


def test_attention_alone_has_as_many_parameters_as_all_layers():
    """For phi's shape: per layer, 4 matrices h x h and two of h x 4h; LoRA has r (in + out) of each."""
    _, arms = read_question("layers")
    ranks = {arm.name: arm.settings["LORA_R"] for arm in arms}
    attention, mlp = 4 * 2, 2 * 5  # in units of the width
    assert ranks["attention"] * attention == ranks["all_linear"] * (attention + mlp)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arms: {a: {method: lora}}", "at least two arms"),
        ("[1]", "at least two arms"),
        ("arms: {a: {method: lora}, b: {method: qlora}}", "arm b wants `method: lora` or `method: full`"),
        ("arms: {a: {method: lora, lora_rr: 3}, b: {method: full}}", "unknown setting lora_rr; did you mean lora_r?"),
        ("arms: {a: {method: full, lora_r: 3}, b: {method: full}}", "unknown setting lora_r"),
        ("arms: {a: {method: lora, learning_rate: 1.0}, b: {method: full}}", "learning_rate is what the sweep sets"),
        ("arms: {a: {method: lora, lora_r: x}, b: {method: full}}", "lora_r"),
        ("arms: {a: {method: lora, rows: 2}, b: {method: full}}", "rows is a share of the training rows"),
        ("arms: {a/b: {method: lora}, b: {method: full}}", "a name holds letters"),
    ],
)
def test_a_wrong_question_says_what_is_wrong(tmp_path, capsys, text, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as end:
        read_question(str(path))
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_an_unknown_question_lists_those_that_there_are(capsys):
    with pytest.raises(SystemExit):
        read_question("rank")
    said = capsys.readouterr().err
    assert "did you mean ranks?" in said and all(name in said for name in QUESTIONS)


# --- the grid


def test_the_grids():
    assert grid("full", 2560) == [3.2e-6, 1e-5, 3.2e-5, 1e-4, 3.2e-4]  # 5e-5 lies nearest to 3.2e-5
    assert grid("lora", 2560) == [3.2e-5, 1e-4, 3.2e-4, 1e-3, 3.2e-3]
    for width in (64, 256, 2560, 8192):
        full, lora = grid("full", width), grid("lora", width)
        assert full[2] == pytest.approx(5e-5 * 2560 / width, rel=0.8)
        assert lora == [pytest.approx(10 * rate, rel=0.01) for rate in full]
        for rates in (full, lora):
            assert all(b / a == pytest.approx(10**0.5, rel=0.02) for a, b in zip(rates, rates[1:], strict=False))
    assert neighbour(1e-4, 1) == 3.2e-4 and neighbour(3.2e-4, 1) == 1e-3 and neighbour(3.2e-4, -1) == 1e-4


def pretend(sweep_: Sweep, loss) -> list[str]:
    """Runs end at once, with a loss as a function of (arm, rate, seed); the keys in the order of their start."""
    order = []

    def train(self, key, train_rows, gpu, starts):
        run = self.runs[key]
        order.append(key)
        value = loss(run["arm"], run["rate"], run["seed"])
        if value is None:
            run |= {"state": "diverged", "why": "the loss became NaN", "eval_loss": None, "seconds": 1.0}
        else:
            run |= {"state": "done", "eval_loss": value, "seconds": 1.0}
        self.save()

    runs.train = train
    return order


@pytest.fixture
def pretending(monkeypatch):
    monkeypatch.setattr(runs, "train", runs.train)
    return pretend


def with_grid(sweep_: Sweep, seeds: int = 1) -> Sweep:
    for arm in sweep_.arms:
        for rate in grid(arm.method, 2560):
            for seed in range(1, seeds + 1):
                sweep_.add(arm, rate, seed, "selection")
    return sweep_


def test_the_best_rate_is_that_of_the_lowest_validation_loss(tmp_path, pretending):
    one = with_grid(fresh_sweep(tmp_path, "lora", "full"))
    rates = {arm: grid(arm, 2560) for arm in ("lora", "full")}
    order = pretending(one, lambda arm, rate, seed: abs(rates[arm].index(rate) - (1 if arm == "lora" else 3)) + 2.0)
    choose(one, 1, 900, 1, 10)
    assert len(order) == 10
    assert one.selection["lora"] == {"rate": rates["lora"][1], "eval_loss": 2.0, "edge": False}
    assert one.selection["full"]["rate"] == rates["full"][3]
    kept = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert kept["selection"] == one.selection and len(kept["runs"]) == 10


def test_a_grid_grows_until_its_best_rate_has_worse_ones_beside_it(tmp_path, pretending):
    one = with_grid(fresh_sweep(tmp_path, "lora"))
    last = grid("lora", 2560)[-1]
    order = pretending(one, lambda arm, rate, seed: abs(rate - neighbour(last, 1)))
    choose(one, 1, 900, 1, 10)
    assert one.selection["lora"] == {"rate": neighbour(last, 1), "eval_loss": 0.0, "edge": False}
    assert len(order) == 7  # the rate at which it turns, and one beyond


def test_a_grid_grows_by_two_and_then_says_that_the_best_is_at_the_edge(tmp_path, pretending):
    one = with_grid(fresh_sweep(tmp_path, "lora"))
    order = pretending(one, lambda arm, rate, seed: rate)
    choose(one, 1, 900, 1, 10)
    first = grid("lora", 2560)[0]
    assert len(order) == 7 and one.selection["lora"] == {
        "rate": neighbour(first, -2), "eval_loss": neighbour(first, -2), "edge": True
    }  # fmt: skip
    found = {"runs": one.runs, "selection": one.selection, "plan": one.plan}
    assert results.withheld(found) == {"lora": "edge"}


def test_diverged_runs_count_and_never_win(tmp_path, pretending):
    one = with_grid(fresh_sweep(tmp_path, "lora"), seeds=2)
    rates = grid("lora", 2560)
    # the third rate would be best, but one of its two seeds diverges
    pretending(
        one, lambda arm, rate, seed: None if (rate, seed) == (rates[2], 2) else abs(rates.index(rate) - 2) + seed
    )
    choose(one, 2, 900, 1, 10)
    assert best_rate(one, one.arms[0]) in (rates[1], rates[3])
    pretending(one, lambda *_: None)
    two = with_grid(fresh_sweep(tmp_path / "two", "lora"))
    choose(two, 1, 900, 1, 10)
    assert two.selection["lora"] == {"rate": None, "eval_loss": None, "edge": False}


def test_all_rows_decide_between_a_rate_that_a_share_of_them_chose_and_the_next_lower_one(tmp_path, pretending):
    arms = [Arm(name, name, {}) for name in ("lora", "full")]
    settings = settings_of(tmp_path, SELECTION_FRACTION=0.5)
    one = with_grid(begin(settings, arms, {"name": "x"}, MANIFEST, {"lora": [], "full": []}))
    rates = {arm: grid(arm, 2560) for arm in ("lora", "full")}

    def loss(arm: str, rate: float, seed: int) -> float:
        best = 3 if seed < 51 or arm == "full" else 2  # with all rows, LoRA's best rate is one step lower
        return abs(rates[arm].index(rate) - best) + 2.0

    order = pretending(one, loss)
    choose(one, 1, 900, 1, 14)
    assert [one.selection[arm]["rate"] for arm in rates] == [rates[arm][3] for arm in rates]
    confirm(one, 1, 900, 1, 14)
    assert one.selection["lora"]["rate"] == rates["lora"][2] and one.selection["full"]["rate"] == rates["full"][3]
    assert len(order) == 14 and all("seed_51" in key for key in order[10:])
    words = words_of(one, one.runs[order[-1]], 900)
    assert not [word for word in words if word.startswith("--max_train_samples")]  # all rows
    # the same again, when a sweep goes on
    choose(one, 1, 900, 1, 14)
    confirm(one, 1, 900, 1, 14)
    assert one.selection["lora"]["rate"] == rates["lora"][2] and len(order) == 14
    whole = with_grid(fresh_sweep(tmp_path / "whole", "lora"))
    order = pretending(whole, loss)
    choose(whole, 1, 900, 1, 5)
    confirm(whole, 1, 900, 1, 5)
    assert len(order) == 5  # where all rows have chosen, there is nothing to confirm


# --- what is done again


def test_what_is_done_is_not_repeated(tmp_path, pretending):
    one = with_grid(fresh_sweep(tmp_path, "lora"))
    rates = grid("lora", 2560)
    pretending(one, lambda arm, rate, seed: abs(rates.index(rate) - 2))
    runs.do_all(one, list(one.runs)[:3], 900, 1, 10)
    again = with_grid(fresh_sweep(tmp_path, "lora"))
    order = pretending(again, lambda arm, rate, seed: abs(rates.index(rate) - 2))
    choose(again, 1, 900, 1, 10)
    assert order == list(again.runs)[3:]


def test_another_sweep_in_the_folder_is_left_alone(tmp_path, capsys):
    fresh_sweep(tmp_path, "lora").save()
    before = (tmp_path / "sweep" / "sweep.json").read_text()
    for arms, manifest in (
        ([Arm("full", "full", {})], MANIFEST),
        ([Arm("lora", "lora", {})], {"sha256": {"train": "x"}}),
    ):
        with pytest.raises(SystemExit) as end:
            begin(settings_of(tmp_path), arms, {"name": "x"}, manifest, {"lora": [], "full": []})
        said = capsys.readouterr().err
        assert end.value.code == 2 and "--sweep_dir" in said and "--rerun" in said
    assert (tmp_path / "sweep" / "sweep.json").read_text() == before
    new = begin(
        settings_of(tmp_path, RERUN=True), [Arm("full", "full", {})], {"name": "x"}, MANIFEST, {"lora": [], "full": []}
    )
    assert not new.runs and len(list((tmp_path / "history").iterdir())) == 1


def test_a_run_is_an_ordinary_run_of_its_step(tmp_path):
    arms = [
        Arm("small", "lora", {"LORA_R": 4, "LORA_TARGET_MODULES": ["q_proj", "v_proj"]}, rows=0.5),
        Arm("full", "full", {}),
    ]
    flags = {"lora": ["--preset=demo", "--num_epochs=1"], "full": ["--preset=demo"]}
    one = begin(settings_of(tmp_path, SELECTION_FRACTION=0.5), arms, {"name": "x"}, MANIFEST, flags)
    chosen, seeds = one.add(arms[0], 3.2e-4, 1, "selection"), one.add(arms[0], 3.2e-4, 101, "seeds")
    words = words_of(one, one.runs[chosen], 900)
    assert words[0].endswith(LORA) and words[1:3] == flags["lora"]
    assert (
        "--lora_r=4" in words and "--lora_target_modules=q_proj,v_proj" in words and "--learning_rate=0.00032" in words
    )
    assert "--seed=1" in words and f"--output_dir={tmp_path}/sweep/small/lr_3.2e-04_seed_1" in words
    assert "--max_train_samples=225" in words
    assert "--max_train_samples=450" in words_of(one, one.runs[seeds], 900)
    assert not any("max_train" in w for w in words_of(one, one.runs[one.add(arms[1], 1e-4, 101, "seeds")], 900))


@pytest.mark.parametrize(
    ("code", "status", "losses", "state"),
    [
        (0, "done", [5.0, 4.0], "done"),
        (0, "done", [5.0, 4.0, 5.5], "diverged"),
        (1, "failed", [5.0], "diverged"),
        (2, None, [], "failed"),
        (130, "interrupted", [5.0], "waiting"),
        (143, "interrupted", [5.0], "waiting"),
        (-9, "running", [5.0], "failed"),
    ],
)
def test_what_a_run_came_to(tmp_path, code, status, losses, state):
    history = [{"eval_loss": loss, "step": n} for n, loss in enumerate(losses)]
    summary = {
        "status": status,
        "eval_loss": min(losses, default=None),
        "train_runtime_s": 2.0,
        "tokens": 7,
        "steps": 3,
    }
    if status:
        handover.write_json(
            tmp_path / "training_log.json", {"settings": {}, "data": {}, "history": history, "summary": summary}
        )
    (tmp_path / "output.txt").write_text("precision: fp32\nerror: it does not fit\n")
    record = {"folder": str(tmp_path), "state": "waiting"}
    note(record, code)
    assert record["state"] == state
    assert state != "failed" or record["why"] == "error: it does not fit"


# --- results


def made_up(spread: float = 0.02, gap: float = 0.05, seeds: int = 4, rows: int = 120) -> tuple[dict, dict, list]:
    """(sweep, scores, groups) of two arms whose losses differ by `gap`, with seeds that differ by `spread`."""
    draw = np.random.default_rng(0)
    tokens, base = draw.integers(20, 60, rows), draw.normal(3.0, 0.5, rows)
    arms = {name: {"method": name, "settings": {}, "rows": 1.0} for name in ("lora", "full")}
    scores = {
        "base": {
            "nll": base * tokens,
            "tokens": tokens,
            "general_nll": np.full(200, 30.0),
            "general_tokens": np.full(200, 10),
        }
    }
    runs, selection = {}, {}
    for name, better in (("lora", 0.5), ("full", 0.5 + gap)):
        rates = grid(name, 2560)
        for phase, numbers in (
            ("selection", [(rate, 1) for rate in rates]),
            ("seeds", [(rates[2], 101 + s) for s in range(seeds)]),
        ):
            for rate, seed in numbers:
                key = f"{name}/lr_{rate:.1e}_seed_{seed}"
                off = 0.3 * abs(rates.index(rate) - 2) + draw.normal(0, spread)
                runs[key] = {"arm": name, "rate": rate, "seed": seed, "phase": phase, "folder": key, "state": "done"}
                runs[key] |= {
                    "method": name,
                    "eval_loss": 2.5 + off,
                    "seconds": 60.0 if name == "lora" else 100.0,
                    "peak_memory_bytes": 2e9,
                }
                nll = (base - better + off + draw.normal(0, 0.05, rows)) * tokens
                general = np.full(200, 30.0) + rates.index(rate) + draw.normal(0, 0.3, 200)
                scores[key] = {
                    "nll": nll,
                    "tokens": tokens,
                    "general_nll": general,
                    "general_tokens": np.full(200, 10),
                }
        selection[name] = {"rate": rates[2], "eval_loss": 2.5, "edge": False}
    plan = {
        "question": {"name": "x", "description": "a against b", "description_zh": "甲与乙"},
        "arms": arms,
        "fraction": 1.0,
    }
    return {"plan": plan, "runs": runs, "selection": selection}, scores, [str(n) for n in range(rows)]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_report_says_what_to_do(tmp_path, language):
    found = results.analyse(*made_up(spread=0.002, gap=0.1), 2000, 0.95)
    report.write(found, tmp_path, language)
    text, page = ((tmp_path / f"sweep_report.{end}").read_text("utf-8") for end in ("md", "html"))
    first = next(line for line in text.splitlines() if line.startswith("**"))
    assert first.startswith({"en": "**Take full:", "zh": "**请用 full"}[language])
    assert page.count("<svg") == page.count("<figure") == 3 and "<img" not in page and "<script" not in page
    assert (tmp_path / "plots" / "rates.png").stat().st_size > 5000
    assert json.loads(json.dumps(found))  # it is JSON


def test_both_languages_say_the_same_things():
    import string

    words = {language: report.words_of(language) for language in ("en", "zh")}
    assert words["en"].keys() == words["zh"].keys()
    for key in words["en"]:
        fields = [{f for _, f, _, _ in string.Formatter().parse(w[key]) if f} for w in words.values()]
        assert fields[0] == fields[1], key


def test_two_names_of_one_method_never_have_a_winner():
    """Arms that are equal but for their seeds: at most 2 in 40 may be told apart."""
    wrong = 0
    for number in range(40):
        draw = np.random.default_rng(number)
        rows, tokens = draw.normal(2.5, 0.5, 100), draw.integers(20, 60, 100)
        arms = []
        for _ in range(2):
            runs = rows + draw.normal(0, 0.03, (5, 1)) + draw.normal(0, 0.05, (5, 100))
            arms.append(runs * tokens)
        outcome = results.statistics.compare_runs(*arms, tokens.astype(float), list(range(100)), 2000, number)
        standing = results.statistics.standing(outcome["ci95"], np.log(1.02))
        wrong += standing in ("better", "worse") and outcome["p_value"] < 0.05
    assert wrong <= 2


def test_a_single_run_tells_nothing_about_the_spread():
    with pytest.raises(ValueError, match="a single run"):
        results.statistics.compare_runs(np.ones((1, 9)), np.ones((3, 9)), np.ones(9), list(range(9)), 2000, 0)


def test_blocks_are_of_equal_size_and_in_order():
    assert results.blocks(200) == [n // 10 for n in range(200)]
    assert results.blocks(7) == list(range(7))
    assert max(np.bincount(results.blocks(207))) - min(np.bincount(results.blocks(207))) <= 1


def test_of_more_than_two_the_best_one_is_named_first(tmp_path):
    sweep_, scores, groups = made_up(spread=0.002, gap=0.1)
    plan, draw = sweep_["plan"], np.random.default_rng(5)
    plan["arms"]["twin"] = {"method": "full", "settings": {}, "rows": 1.0}  # as good as full, and as expensive
    sweep_["selection"]["twin"] = sweep_["selection"]["full"]
    for key, run_ in list(sweep_["runs"].items()):
        if run_["arm"] == "full":
            other = key.replace("full/", "twin/")
            sweep_["runs"][other] = {**run_, "arm": "twin", "folder": other}
            nll = scores[key]["nll"] + draw.normal(0.02, 0.5, len(groups))
            scores[other] = {**scores[key], "nll": nll}
    found = results.analyse(sweep_, scores, groups, 2000, 0.95)
    assert report.overall(found, report.words_of("en")) == (
        "Of these 3, full has the lowest loss. Not told apart from it: twin. Surely worse: lora."
    )
    report.write(found, tmp_path, "zh")
    first = (tmp_path / "sweep_report.md").read_text("utf-8").splitlines()[2]
    assert first == "**这 3 种方法中，full 的损失最低。与它分不出高下的：twin。肯定更差的：lora。**"
    assert not report.overall(results.analyse(*made_up(), 2000, 0.95), report.words_of("en"))


def noisy(mean: float, count: int, draw: np.random.Generator) -> np.ndarray:
    return mean + draw.normal(0, 0.02, count)


def learned_and_forgot(gain: float, forgot: float, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return noisy(3 - gain, 100, draw), noisy(3 + forgot, 200, draw)


def test_forgetting_is_compared_where_both_have_learned_the_same():
    """The other method forgets 0.1 where it gains 0.2, and 0.5 where it gains 0.4: 0.3 where it gains 0.3."""
    held = 0
    weights, groups = (np.ones(100), np.ones(200)), (list(range(100)), results.blocks(200))
    for number in range(60):
        draw = np.random.default_rng(number)
        curve = [learned_and_forgot(*point, draw) for point in ((0, 0), (0.2, 0.1), (0.4, 0.5), (0.1, 2.0))]
        own = learned_and_forgot(0.3, 0.1, draw)
        found = results.statistics.at_equal_learning(own, curve, weights, groups, 1000, number)
        assert not found["outside"] and found["gain"] == pytest.approx(0.3, abs=0.02)
        held += found["ci95"][0] <= 0.1 - 0.3 <= found["ci95"][1]
    assert 52 <= held <= 60  # 95 % of 60 are 57
    beyond = results.statistics.at_equal_learning(learned_and_forgot(0.6, 0.1, draw), curve, weights, groups, 1000, 1)
    assert beyond == {"gain": pytest.approx(0.6, abs=0.02), "outside": True}


def test_who_wins_and_forgets_more_is_told_so():
    sweep_, scores, groups = made_up(spread=0.002, gap=0.1)
    for key, run_ in sweep_["runs"].items():
        if run_["arm"] == "full":
            scores[key]["general_nll"] = scores[key]["general_nll"] + 5
    found = results.analyse(sweep_, scores, groups, 2000, 0.95)
    for language, words in (("en", "But full has forgotten more"), ("zh", "但 full 遗忘得更多")):
        assert words in report.summary(found, language)
    plain = report.summary(results.analyse(*made_up(spread=0.002, gap=0.1), 2000, 0.95), "en")
    assert "forgotten more" not in plain


# --- new directions in the weights


def test_a_planted_intruder_is_found():
    draw = torch.Generator().manual_seed(0)
    before = torch.randn(96, 160, generator=draw)
    u, v = (torch.nn.functional.normalize(torch.randn(n, generator=draw), dim=0) for n in (96, 160))
    assert weights.intruders(before, before) == 0
    assert weights.intruders(before, before + 0.01 * torch.randn(96, 160, generator=draw)) == 0
    assert weights.intruders(before, before + 60 * torch.outer(u, v)) == 1
    old = torch.linalg.svd(before)
    raised = before + 60 * torch.outer(old.U[:, 50], old.Vh[50])  # a direction that the base had, made stronger
    assert weights.intruders(before, raised) == 0


def test_an_adapter_s_weights_are_read_and_the_base_is_left_as_it_was(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    deltas = [m.get_delta_weight("default") for m in adapted.modules() if hasattr(m, "get_delta_weight")]
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    pairs = list(weights.changed("lora", str(tmp_path), base, None))
    assert len(pairs) == len(deltas) > 1
    for (old, new), delta in zip(pairs, deltas, strict=True):
        torch.testing.assert_close(new - old, delta)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


# --- before anything is trained, and jobs


def test_an_arm_that_cannot_be_trained_is_refused_before_the_first_run(tmp_path, tiny, capsys):
    arms = [Arm("fine", "full", {}), Arm("odd", "lora", {"LORA_TARGET_MODULES": ["no_such_layer"], "USE_4BIT": False})]
    flags = {method: [f"--model_name={tiny}", "--precision=fp32"] for method in ("lora", "full")}
    one = begin(settings_of(tmp_path), arms, {"name": "x"}, MANIFEST, flags)
    with_grid(one)
    with pytest.raises(SystemExit) as end:
        check_arms(one, 900, 3)
    said = capsys.readouterr().err
    assert end.value.code == 2 and "arm odd: " in said and "no_such_layer" in said and "arm fine" not in said
    assert not list((tmp_path / "sweep").glob("*/*"))
    one.arms.pop()
    needed = check_arms(one, 900, 3)
    weights_of_one = sum(p.stat().st_size for p in tiny.glob("*.safetensors"))
    assert needed > 5 * weights_of_one / 2  # five runs that choose a rate leave 16-bit weights until they are scored


def test_job_parameters(capsys):
    assert jobs.options("timeout_min=240, slurm_partition=gpu,gpus_per_node=1") == {
        "timeout_min": 240, "slurm_partition": "gpu", "gpus_per_node": 1
    }  # fmt: skip
    assert jobs.options(None) == {}
    with pytest.raises(SystemExit):
        jobs.options("timeout_min")
    assert "name=value" in capsys.readouterr().err


def test_runs_as_jobs(tmp_path):
    """submitit's local executor: exit codes come back, output is kept, and a job that goes on is met again."""
    one = fresh_sweep(tmp_path, "lora")
    keys = [one.add(one.arms[0], rate, 1, "selection") for rate in (1e-4, 1e-3)]
    cluster = jobs.Cluster("submitit_local", one.folder, {"timeout_min": 5})
    words = {keys[0]: ["-c", "print('trained')"], keys[1]: ["-c", "import sys; sys.exit(3)"]}
    assert dict(cluster.done(one, words)) == {keys[0]: 0, keys[1]: 3}
    assert "trained" in (Path(one.runs[keys[0]]["folder"]) / "output.txt").read_text()
    assert not any("job" in record for record in one.runs.values())
    # the sweep is ended while its job is at work; the next start waits for it instead of training twice
    line = "import time, pathlib; time.sleep(4); pathlib.Path('times').open('a').write('x')"
    started = cluster.done(one, {keys[0]: ["-c", line.replace("'times'", repr(str(tmp_path / "times")))]})
    monkey = jobs.POLL
    jobs.POLL = 0.1
    try:
        import threading

        first = threading.Thread(target=lambda: next(started))
        first.start()
        deadline = time.monotonic() + 60
        while "job" not in one.runs[keys[0]] and time.monotonic() < deadline:
            time.sleep(0.05)
        number = one.runs[keys[0]]["job"]
        first.join(60)
        one.runs[keys[0]]["job"] = number  # as sweep.json had it when the sweep was ended
        assert list(cluster.done(one, {keys[0]: ["-c", "raise SystemExit(9)"]})) == [(keys[0], 0)]
    finally:
        jobs.POLL = monkey
    assert (tmp_path / "times").read_text() == "x"


def test_a_job_whose_time_is_up_saves_a_checkpoint_and_is_submitted_again(tmp_path):
    import threading

    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); "
    code += "print('on', flush=True); time.sleep(60)"
    job = jobs.Training([sys.executable, "-c", code], str(tmp_path / "run" / "output.txt"))
    codes = []
    thread = threading.Thread(target=lambda: codes.append(job()))
    thread.start()
    deadline = time.monotonic() + 30
    while "on" not in (tmp_path / "run" / "output.txt").read_text() if (tmp_path / "run").exists() else True:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    again = job.checkpoint()
    thread.join(30)
    assert codes == [143] and again.function.words == job.words and again.function.child is None


# --- a whole one


def sweep_words(tiny: Path, *more: str) -> list:
    words = (
        "--sweep --yes --precision fp32 --max_steps 6 --batch_size 2 --gradient_accumulation_steps 2 --eval_steps 3"
    )
    words += " --save_steps 3 --logging_steps 3 --report_to none --seeds 2 --max_train_samples 40 --use_4bit false"
    words += " --gradient_checkpointing false --dataset_name rows.jsonl --eval_fraction 0.2 --general_text general.txt"
    return [ROOT / "run_all.py", *words.split(), "--model_name", tiny, *more]


@pytest.fixture(scope="module")
def swept(tmp_path_factory, prepared, tiny) -> Path:
    """A whole sweep of the tiny model, killed at five moments on its way."""
    import shutil

    work = tmp_path_factory.mktemp("sweep") / "work"
    shutil.copytree(prepared, work)
    (work / "general.txt").write_text("The river runs past the old mill, and nobody looks at it. " * 200)
    done = []
    for moment in range(5):
        child = subprocess.Popen(
            list(map(str, [sys.executable, *sweep_words(tiny)])), cwd=work, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        end = time.monotonic() + 200
        while time.monotonic() < end:
            path = work / "outputs" / "sweep" / "sweep.json"
            runs = json.loads(path.read_text())["runs"].values() if path.exists() else []
            if sum(r["state"] == "done" for r in runs) >= 2 * moment + 1:
                break
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.1)
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        runs = json.loads(path.read_text())["runs"]
        done.append({key for key, r in runs.items() if r["state"] == "done"})
        assert not moment or done[-2] < done[-1]
    ok(run(*sweep_words(tiny), cwd=work, timeout=900))
    return work


@pytest.mark.slow
def test_a_sweep_that_was_killed_five_times_comes_to_its_end(swept):
    folder = swept / "outputs" / "sweep"
    found = json.loads((folder / "sweep_results.json").read_text())
    runs = found["runs"].values()
    assert {r["state"] for r in runs} <= {"done", "diverged"}
    for arm in ("lora", "full"):
        assert sum(r["arm"] == arm and r["phase"] == "seeds" for r in runs) == 2
        rates = {r["rate"] for r in runs if r["arm"] == arm and r["phase"] == "selection"}
        assert len(rates) >= 5
        final = {"lora": "final_lora_adapter", "full": "final_model"}[arm]
        # the weights of the best fresh run stay, and all logs
        assert len(list((folder / arm).glob(f"*/{final}"))) == 1
        assert len(list((folder / arm).glob("*/training_log.json"))) == len([r for r in runs if r["arm"] == arm])
        assert not list((folder / arm).glob("*/checkpoint-*"))
    assert {(c["a"], c["b"]) for c in found["comparisons"]} == {("lora", "base"), ("full", "base"), ("lora", "full")}
    assert all(c["runs"] in ([2, 0], [2, 2]) for c in found["comparisons"])
    assert (folder / "sweep_report.html").exists() and (folder / "plots" / "learning.png").exists()


@pytest.mark.slow
def test_a_finished_sweep_is_not_done_again(swept, tiny):
    before = {p: p.stat().st_mtime_ns for p in (swept / "outputs" / "sweep").glob("*/*/training_log.json")}
    output = ok(run(*sweep_words(tiny, "--language", "zh"), cwd=swept))
    assert before == {p: p.stat().st_mtime_ns for p in (swept / "outputs" / "sweep").glob("*/*/training_log.json")}
    assert (
        "种子" in (swept / "outputs" / "sweep" / "sweep_report.md").read_text("utf-8")
        and "sweep_report.html" in output
    )
