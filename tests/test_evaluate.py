"""Step 4: what it scores, generates and computes, what it says about it, and what it refuses."""

import copy
import html
import itertools
import json
import math
import os
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, SHORT, load_script, ok, plain, refused, run, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs import device
from configs.evaluation import metrics, scoring, statistics
from configs.evaluation.candidates import HeldOut
from configs.evaluation.pictures import draw
from configs.evaluation.report import load_words, sentence, summary_table, verdict, write_report
from configs.pictures import Picture
from configs.preparation.reading import general_text
from configs.text import without_zero_signs
from configs.values import read_constants

METRICS = ["nll_per_token", "answer_quality", "style_match", "well_formed"]
MODEL_KEYS = {*METRICS, "perplexity", "bits_per_byte", "scored_tokens", "forgetting", "cost"}
PAIRS = [("lora", "base"), ("full", "base"), ("full", "lora")]
PAIRS_4BIT = [("base_4bit", "base"), ("lora", "base_4bit")]
GENERAL = "The river rose in the night.\n\nTwo birds sat on a wall and sang until noon.\n"


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPTS[3])


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def phi(tiny):
    return load(tiny)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    from hub import tiny_phi

    return load(tiny_phi(tmp_path_factory.mktemp("tied") / "tiny-llama", tied=True))


@torch.no_grad()
def plain_nll(model, context: list[int], continuation: list[int]) -> float:
    """nll of a continuation from one unpadded forward pass, summed in double precision."""
    logits = model(input_ids=torch.tensor([context + continuation])).logits[0].double()
    wanted = logits.log_softmax(-1)[len(context) - 1 : -1]
    return -sum(wanted[i, token].item() for i, token in enumerate(continuation))


# --- score


def some_rows(seed: int = 0, n: int = 20) -> list[tuple[list[int], list[int]]]:
    draw = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [draw.randrange(490) for _ in range(draw.randint(1, most))]

    return [(ids(30), ids(40)) for _ in range(n)]


@pytest.mark.parametrize("name", ["phi", "tied"])
def test_score_is_the_plain_sum_over_the_continuation(request, name):
    model, rows = request.getfixturevalue(name), some_rows()
    got = scoring.score(model, rows, 300, "test")
    assert got.shape == (len(rows),) and got.dtype == np.float64
    assert got == pytest.approx([plain_nll(model, *row) for row in rows], rel=1e-5)


@pytest.mark.parametrize("name", ["phi", "tied"])
def test_score_does_not_depend_on_batches_order_or_padding(request, name):
    model, rows = request.getfixturevalue(name), some_rows(1)
    alone = scoring.score(model, rows, 1, "one by one")
    for budget in (90, 10**6):
        assert scoring.score(model, rows, budget, "test") == pytest.approx(alone, rel=1e-5)
    order = random.Random(2).sample(range(len(rows)), len(rows))
    shuffled = scoring.score(model, [rows[i] for i in order], 200, "shuffled")
    assert shuffled == pytest.approx(alone[order], rel=1e-5)
    # one very long companion pads all others
    beside = scoring.score(model, [*rows, ([1] * 300, [2] * 200)], 10**6, "padded")
    assert beside[:-1] == pytest.approx(alone, rel=1e-5)


def test_the_context_is_conditioned_on_and_not_scored(phi):
    first, context, continuation = [7], [3, 50, 200, 8], [12, 90, 4, 400]
    both, of_context, of_rest, other = scoring.score(
        phi,
        [
            (first, context + continuation),
            (first, context),
            (first + context, continuation),
            (first + context[::-1], continuation),
        ],
        1000,
        "chain",
    )
    assert both == pytest.approx(of_context + of_rest, rel=1e-5)  # the chain rule
    assert abs(of_rest - other) > 1e-3


def test_batches_keep_to_the_budget_and_lose_no_row():
    lengths = [random.Random(0).randint(1, 90) for _ in range(10)] + [5, 500, 5, 77, 1]
    for budget in (1, 100, 350, 10**6):
        found = list(scoring.batches(list(range(len(lengths))), lengths, budget))
        assert sorted(itertools.chain(*found)) == list(range(len(lengths)))
        for batch in found:
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    assert len(list(scoring.batches(list(range(len(lengths))), lengths, 10**6))) == 1
    assert list(scoring.batches([3, 7], lengths, 10**6)) == [[3, 7] if lengths[3] >= lengths[7] else [7, 3]]
    assert list(scoring.batches([], [], 100)) == []


# --- answer


@pytest.fixture(scope="module")
def talker(tiny):
    """The tiny model without its head's bias, which else makes it say one token without a text for ever."""
    model = load(tiny)
    with torch.no_grad():
        model.lm_head.bias.zero_()
        model.lm_head.bias[len(AutoTokenizer.from_pretrained(tiny)) :] = -1e4
    return model


@pytest.fixture(scope="module")
def tokenizer(tiny):
    found = AutoTokenizer.from_pretrained(tiny)
    found.pad_token = found.eos_token
    return found


@torch.no_grad()
def greedy(model, prompt: list[int], limit: int) -> list[int]:
    """The most likely tokens, one forward pass each, with no cache, no padding and no end."""
    ids = list(prompt)
    for _ in range(limit):
        ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


def test_answers_in_batches_are_those_of_one_prompt_alone(talker, tokenizer):
    draw = random.Random(4)
    prompts = [[draw.randrange(490) for _ in range(length)] for length in (9, 2, 31, 17, 4, 1, 23)]
    limit = 12
    free = [greedy(talker, prompt, limit) for prompt in prompts]
    # two ends that different prompts reach, neither at once; eos pads, and nobody says it by itself here
    ends = sorted({tokenizer.eos_token_id, free[0][5], free[1][8]})
    expected = []
    for tokens in free:
        stop = next((n for n, token in enumerate(tokens) if token in ends), None)
        text = tokenizer.decode(tokens[:stop], skip_special_tokens=True).strip()
        expected.append({"answer": text, "stopped": stop is not None})
    assert {row["stopped"] for row in expected} == {True, False}, "the example shows only one of both"
    assert len({row["answer"] for row in expected}) > 3
    for size in (1, 3, 100):
        assert scoring.answer(talker, tokenizer, prompts, ends, limit, size, "test") == expected
    alone = talker.generate(  # the library's own, too
        torch.tensor([prompts[2]]),
        attention_mask=torch.ones(1, len(prompts[2]), dtype=torch.long),
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=tokenizer.eos_token_id,
    )[0, len(prompts[2]) :].tolist()
    assert tokenizer.decode([t for t in alone if t not in ends]).strip() == expected[2]["answer"]


def test_an_answer_ends_at_any_end_and_is_cut_at_the_cap(talker, tokenizer):
    prompt = [11, 45, 300]
    tokens = greedy(talker, prompt, 12)
    at = next(n for n in range(2, 12) if tokens[n] not in tokens[:n])
    eos = tokenizer.eos_token_id

    def said(ends: list[int], limit: int) -> dict:
        return scoring.answer(talker, tokenizer, [prompt], ends, limit, 4, "test")[0]

    def text(n: int) -> str:
        return tokenizer.decode(tokens[:n]).strip()

    for ends in ([eos, tokens[at]], [tokens[at], eos], [tokens[at]]):
        assert said(ends, 12) == {"answer": text(at), "stopped": True}
    assert said([eos, tokens[at]], at + 1) == {"answer": text(at), "stopped": True}  # the cap's last token ends it
    assert said([eos, tokens[at]], at) == {"answer": text(at), "stopped": False}
    assert said([eos], 5) == {"answer": text(5), "stopped": False}
    assert said([tokens[0]], 12) == {"answer": "", "stopped": True}


# --- what an answer is worth

ENGLISH = [
    ("Bonds pay a fixed interest. Shares don't.", "Bonds pay interest; shares pay dividends."),
    ("Diversify: 60% in funds, 40% in bonds!", "You should diversify (60/40)."),
    ("no", "A long answer about taxes, savings and pensions."),
    ("the same words", "words same the"),
]


def style(answer: str, reference: str) -> float:
    (value,) = metrics.style_match([answer], [reference])
    return value


def well_formed(question: str, answer: str, stopped: bool) -> float:
    (value,) = metrics.well_formed([answer], [question], [stopped])
    return value


def test_rouge_and_chrf_are_the_libraries_on_english():
    from rouge_score import rouge_scorer
    from sacrebleu import sentence_chrf

    texts, references = map(list, zip(*ENGLISH, strict=True))
    texts[0] = texts[0].replace("don't", "do not")  # the library's own tokenizer splits at the apostrophe, ours too
    both = texts, references
    rouge_l, chrf, quality = metrics.rouge_l(*both), metrics.chrf(*both), metrics.answer_quality(*both)
    rouge = rouge_scorer.RougeScorer(["rougeL"])
    for n, (text, reference) in enumerate(zip(*both, strict=True)):
        assert rouge_l[n] == pytest.approx(rouge.score(reference, text)["rougeL"].fmeasure)
        assert chrf[n] == pytest.approx(sentence_chrf(text, [reference]).score / 100)
        assert quality[n] == pytest.approx((rouge_l[n] + chrf[n]) / 2)
    assert 0 < quality[0] < 1


def test_identical_answers_are_perfect_and_empty_ones_worth_nothing():
    texts = ["Save first. Then invest.", "应急基金是三到六个月的支出。", "- a list\n- of **two**", "42"]
    assert metrics.answer_quality(texts, texts) == pytest.approx([1] * len(texts))
    assert metrics.style_match(texts, texts) == pytest.approx([1] * len(texts))
    for metric in (metrics.answer_quality, metrics.rouge_l, metrics.chrf):
        assert metric([""] * len(texts), texts) == [0] * len(texts)
    assert all(value <= 0.5 for value in metrics.style_match([""] * len(texts), texts))


def test_chinese_is_compared_by_characters():
    # four of five characters, in order: precision 4/4, recall 4/5; as one "word" it would be 0
    assert metrics.rouge_l(["分散投资"], ["分散的投资"]) == pytest.approx([2 * 1 * 0.8 / 1.8])
    assert metrics.Words().tokenize("ETF基金2024 naïve_x") == ["etf", "基", "金", "2024", "naïve", "x"]


def test_chinese_sentences_end_without_a_space():
    one, two = "基金分散风险,债券降低波动,现金随时可用。", "基金分散风险。债券降低波动。现金随时可用。"
    assert style(one, two) < 0.9
    assert style("Is 3.5 % much?", "Is 3 5 % much?") == pytest.approx(1)  # not the end of a sentence


TEXTS = [
    "",
    " \n",
    "the",
    "Yes.",
    "A fund holds many shares, and that is why it varies less than one of them.",
    "# Steps\n\n1. Save.\n2. Invest.\n\n**Do not** hurry!",
    "- a\n- b\n- c",
    "到期收益率。到期收益率!",
    "the the the of of and",
    "?!?",
    "word " * 300,
    "x" * 5000,
]


def test_style_match_is_symmetric_and_within_0_and_1():
    for a, b in itertools.product(TEXTS, TEXTS):
        value = style(a, b)
        assert 0 <= value <= 1 and value == pytest.approx(style(b, a))


def test_each_part_of_the_style_counts():
    base = "Save the money in a fund. Keep it for the years."
    assert style(base, "Sell the shares in a bank. Hold it for the days.") == pytest.approx(1)
    for other in (
        f"{base} {base}",  # number of words
        "Save the money in a fund keep it for the years.",  # words per sentence
        "- Save the money in a fund. Keep it for the years.",  # list items
        "Save this money at your fund. Keep them by all years.",  # function words
    ):
        assert style(base, other) < 0.95, other


def test_what_is_well_formed_has_five_parts_that_each_count():
    question, good = "How do bonds protect savings?", "Bonds protect your savings by paying a fixed interest."
    again = "bonds protect savings " * 20
    assert well_formed(question, good, True) == 1
    assert well_formed(question, good, False) == pytest.approx(0.8)
    assert well_formed(question, again, True) == pytest.approx(0.2)
    assert well_formed(question, again, False) == 0
    assert well_formed(question, "Nobody ever knows.", True) == pytest.approx(0.8)
    # one of three content words, where half of them would be enough: 2/3 of this part
    assert well_formed(question, "Buy bonds now.", True) == pytest.approx((4 + 2 / 3) / 5)
    assert well_formed("债券如何保护储蓄?", "Buy now and hold.", True) == pytest.approx(0.6)
    assert well_formed("债券如何保护储蓄?", "债券保护您的储蓄。", True) == 1
    assert well_formed(question, " \n", True) == pytest.approx(0.2)
    assert well_formed(question, "", False) == 0
    for asked, text, stopped in itertools.product(TEXTS, TEXTS, (True, False)):
        assert 0 <= well_formed(asked, text, stopped) <= 1


def test_repetitive():
    assert metrics.repetitive("buy low sell high " * 10)
    assert metrics.repetitive("复利" * 20)
    assert not metrics.repetitive(" ".join(f"word{n}" for n in range(40)))
    assert not metrics.repetitive("no no no no no")  # too short to say
    assert not metrics.repetitive("")
    half = " ".join(f"word{n}" for n in range(30))
    assert not metrics.repetitive(f"{half} {half}")  # one repetition is emphasis
    assert metrics.repetitive(f"{half} {half} {half}")
    # what has no words repeats itself by its signs
    assert metrics.repetitive("\ufffd" * 160) and metrics.repetitive("|---" * 40) and metrics.repetitive("ha" * 60)
    assert not metrics.repetitive("\ufffd" * 20) and not metrics.repetitive(
        "https://example.org/a/page/of/a/book/on/saving.html"
    )


# --- statistics


def simulate(n: int, sets: int, seed: int, grouped: bool) -> tuple[float, float]:
    """(coverage of 0 by the intervals, share of p-values below .05) over data sets without a difference.

    A shift of the true difference moves data, interval and truth alike: zero loses no generality.
    """
    draw = np.random.default_rng(seed)
    tokens = np.maximum(np.rint(draw.lognormal(3.6, 0.5, (sets, n))), 1)
    group = draw.integers(0, int(n * 0.8), (sets, n)) if grouped else np.tile(np.arange(n), (sets, 1))
    # rows with one question are alike: most of the difference is the question's
    shared = np.take_along_axis(draw.normal(0, 0.2, (sets, n)), group, 1)
    a = tokens * (2 + shared + draw.normal(0, 0.1, (sets, n)))
    found = [statistics.compare(a[i], 2 * tokens[i], tokens[i], group[i].tolist(), 2000, i) for i in range(sets)]
    covered = np.mean([c["ci95"][0] <= 0 <= c["ci95"][1] for c in found])
    return float(covered), float(np.mean([c["p_value"] < 0.05 for c in found]))


@pytest.mark.parametrize("n, grouped", [(100, False), (150, True)])
def test_intervals_cover_and_p_values_are_uniform_without_a_difference(n, grouped):
    covered, below = simulate(n, 600, 7, grouped)
    assert 0.93 <= covered <= 0.97
    assert 0.02 <= below <= 0.08


def test_identical_models_do_not_differ_at_all():
    draw = np.random.default_rng(0)
    nll, tokens = draw.gamma(2, 30, 50), draw.integers(1, 90, 50)
    for groups in (list(range(50)), [n % 2 for n in range(50)], [n // 3 for n in range(50)]):
        found = statistics.compare(nll, nll.copy(), tokens, groups, 2000, 1)
        assert found == {
            "difference": 0.0,
            "ci95": [0.0, 0.0],
            "p_value": 1.0,
            "n": 50,
            "groups": len(set(groups)),
            "effective_groups": statistics.effective_number(tokens, groups),
            "smallest_detectable": 0.0 if len(set(groups)) >= 10 else None,
            "error": 0.0,
        }
        row = {"a": "lora", "b": "base", "metric": "nll_per_token", **found}
        assert "no difference" in verdict({"comparisons": [row]}, PAIRS, load_words("en"))


def test_a_planted_difference_is_found_and_has_its_size():
    draw = np.random.default_rng(0)
    tokens = draw.integers(5, 90, 120)
    b = tokens * draw.normal(2, 0.3, 120)
    a = b + tokens * draw.normal(0.1, 0.2, 120)
    found = statistics.compare(a, b, tokens, list(range(120)), 2000, 1)
    assert found["difference"] == pytest.approx((a - b).sum() / tokens.sum())
    assert 0 < found["ci95"][0] < found["difference"] < found["ci95"][1] and found["p_value"] < 0.01
    back = statistics.compare(b, a, tokens, list(range(120)), 2000, 1)
    assert back["difference"] == -found["difference"] and back["ci95"][1] < 0
    assert back["p_value"] == found["p_value"]


def test_p_is_never_below_that_of_all_sign_flips():
    a = np.array([1.0, 2.0, 3.0, -0.5, 2.5, 0.7])
    sums = [abs(np.dot(signs, a)) for signs in itertools.product((-1, 1), repeat=len(a))]
    exact = np.mean([value >= abs(a.sum()) - 1e-9 for value in sums])
    assert statistics.sign_flip_p(a, 20000, 3) == pytest.approx(exact, abs=0.01)
    found = statistics.compare(a, np.zeros(6), np.ones(6), list(range(6)), 20000, 3)
    assert found["p_value"] == pytest.approx(exact, abs=0.01)
    # five groups have 32 patterns of signs: whatever they show, it may be one of them
    for n in (2, 3, 5):
        found = statistics.compare(np.arange(1, n + 1.0), np.zeros(n), np.ones(n), list(range(n)), 4000, 3)
        assert found["p_value"] >= 2.0 ** (1 - n) * 0.85


def test_what_is_no_number_or_a_single_group_is_not_compared():
    one, values = np.ones(20), np.arange(20.0)
    for a, groups in ((values, ["x"] * 20), (values * math.nan, range(20)), (np.full(20, math.inf), range(20))):
        with pytest.raises(ValueError):
            statistics.compare(a, np.zeros(20), one, list(groups), 2000, 1)


@pytest.mark.parametrize("n", [5, 20, 100])
@pytest.mark.parametrize("kind", ["normal", "exponential", "t3"])
def test_intervals_cover_skewed_and_heavy_tailed_differences(n, kind):
    """Percentile intervals cover 90 % and less of such data; studentised ones do."""
    draw, sets, covered = np.random.default_rng(11), 250, 0
    of = {
        "normal": lambda: draw.normal(0, 1, n),
        "exponential": lambda: draw.exponential(1, n) - 1,
        "t3": lambda: draw.standard_t(3, n),
    }[kind]
    for seed in range(sets):
        c = statistics.compare(of(), np.zeros(n), np.ones(n), list(range(n)), 2000, seed)
        covered += c["ci95"][0] <= 0 <= c["ci95"][1]
    assert covered / sets >= (0.86 if n == 5 else 0.89 if kind == "t3" else 0.92)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.6, -3.7])
@pytest.mark.parametrize("n", [10, 16, 40])
def test_differences_that_are_nearly_all_equal_have_an_interval_of_their_size(value, n):
    """Many samples of such differences are of equal values alone, whose spread is nothing but rounding."""
    d = np.full(n, value)
    d[0] += 0.05
    found = statistics.compare(d, np.zeros(n), np.ones(n), list(range(n)), 2000, 1)
    low, high = found["ci95"]
    assert d.min() - 0.01 <= low <= found["difference"] + 1e-9
    assert found["difference"] - 1e-9 <= high <= d.max()


def test_the_seed_decides_the_resampling():
    draw = np.random.default_rng(0)
    data = (draw.normal(0, 1, 60), draw.normal(0, 1, 60), np.ones(60), list(range(60)))
    one = statistics.compare(*data, 2500, 1)
    assert one == statistics.compare(*data, 2500, 1)
    other = statistics.compare(*data, 2500, 2)
    assert other["ci95"] != one["ci95"] and other["difference"] == one["difference"]


def test_copies_of_a_row_do_not_make_the_interval_narrower():
    draw = np.random.default_rng(0)
    a, groups = draw.normal(0.1, 1, 80), list(range(80))
    one = statistics.compare(a, np.zeros(80), np.ones(80), groups, 4000, 1)
    copies = np.tile(a, 4), np.zeros(320), np.ones(320)
    together = statistics.compare(*copies, groups * 4, 4000, 1)
    apart = statistics.compare(*copies, list(range(320)), 4000, 1)

    def width(c: dict) -> float:
        return c["ci95"][1] - c["ci95"][0]

    assert width(together) == pytest.approx(width(one)) and together["p_value"] == one["p_value"]
    assert (together["groups"], together["n"], apart["groups"]) == (80, 320, 320)
    assert width(together) == pytest.approx(2 * width(apart), rel=0.1)
    assert together["difference"] == pytest.approx(apart["difference"]) and together["n"] == 320


def test_holm_by_hand():
    # .01 x 3 = .03; .03 x 2 = .06; .04 x 1 = .04, but not below the one before
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.04]) == [0.04] and statistics.holm([]) == []
    assert statistics.holm([0.9, 0.5, 0.5]) == [1, 1, 1]


def test_holm_keeps_the_order_and_never_lowers_a_p_value():
    draw = random.Random(0)
    for _ in range(200):
        before = [draw.random() ** 3 for _ in range(draw.randint(1, 5))]
        given = list(before)
        after = statistics.holm(given)
        assert given == before  # what it was given is left as it is
        assert all(p <= q <= 1 for p, q in zip(before, after, strict=True))
        order = sorted(range(len(before)), key=before.__getitem__)
        assert [after[i] for i in order] == sorted(after)
        assert min(after) == pytest.approx(min(1, min(before) * len(before)))


def by_model(script, n: int = 40) -> dict[str, dict]:
    """Rows of four models in three metrics; the base in 4 bits answers nothing."""
    draw, groups = np.random.default_rng(3), [k // 2 for k in range(n)]
    tokens = draw.integers(5, 90, n)
    found = {}
    for label, better in (("base", 0.0), ("base_4bit", -0.05), ("lora", 0.07), ("full", 0.1)):
        nll = tokens * (2 - better + draw.normal(0, 0.2, n))
        found[label] = {"nll_per_token": script.Rows(nll, tokens, groups)}
        if label != "base_4bit":
            found[label]["style_match"] = script.Rows(draw.normal(0.5 + better, 0.3, n), np.ones(n), groups)
            found[label]["helpfulness"] = script.Rows(draw.integers(0, 2, n) + 0.0, np.ones(n), groups)
    return found


def test_the_pairs_of_a_metric_are_a_family_and_those_of_the_4_bits_another(script):
    settings, models = SimpleNamespace(RESAMPLES=2000, SEED=5), by_model(script)
    expected = []
    for metric, families in (
        ("nll_per_token", (PAIRS, PAIRS_4BIT)),
        ("style_match", (PAIRS,)),
        ("helpfulness", (PAIRS,)),
    ):
        for family in families:
            alone = []
            for a, b in family:
                (of_a, weight, groups), (of_b, _, _) = models[a][metric], models[b][metric]
                outcome = statistics.compare(of_a, of_b, weight, groups, 2000, 5, len(family))
                alone.append({"a": a, "b": b, "metric": metric} | outcome)
            adjusted = statistics.shaffer([c["p_value"] for c in alone])
            assert adjusted != [c["p_value"] for c in alone], "the example shows no correction"
            expected += [c | {"raw_p": c["p_value"], "p_value": p} for c, p in zip(alone, adjusted, strict=True)]
    assert script.compare_all(settings, models) == expected
    # without the full model one pair is left, and nothing to correct or to allow for
    del models["full"]
    found = {(c["metric"], c["a"], c["b"]): c for c in script.compare_all(settings, models)}
    assert list(found) == [
        ("nll_per_token", "lora", "base"),
        *(("nll_per_token", *pair) for pair in PAIRS_4BIT),
        ("style_match", "lora", "base"),
        ("helpfulness", "lora", "base"),
    ]
    (of_a, weight, groups), (of_b, _, _) = models["lora"]["style_match"], models["base"]["style_match"]
    alone = statistics.compare(of_a, of_b, weight, groups, 2000, 5)
    alone |= {"a": "lora", "b": "base", "metric": "style_match", "raw_p": alone["p_value"]}
    assert found["style_match", "lora", "base"] == alone


def test_what_a_judge_did_not_answer_is_left_out_of_both_models(script):
    settings, models = SimpleNamespace(RESAMPLES=2000, SEED=5), by_model(script)
    lora, base = models["lora"]["helpfulness"], models["base"]["helpfulness"]
    lora.values[3], base.values[[3, 10, 11]] = math.nan, math.nan
    (found,) = [
        c
        for c in script.compare_all(settings, models)
        if (c["metric"], c["a"], c["b"]) == ("helpfulness", "lora", "base")
    ]
    kept = [n for n in range(40) if n not in (3, 10, 11)]
    assert found["difference"] == pytest.approx((lora.values[kept] - base.values[kept]).mean())
    assert found["n"] == 37 and found["groups"] == 19  # rows 10 and 11 were a group
    assert lora.mean == pytest.approx(lora.values[[n for n in range(40) if n != 3]].mean())
    # a single observation has no spread
    base.values[2:] = math.nan
    assert [c["b"] for c in script.compare_all(settings, models) if c["metric"] == "helpfulness"] == ["lora"]


def test_answers_that_nobody_can_use():
    question, reference = "How do I start to save?", "Put a tenth of each pay aside first."
    cases = [
        ("Set some of your pay aside before you spend it.", True, False),
        ("", True, True),
        ("save more and save more and " * 8, True, True),
        ("Set some of your pay aside and then", False, False),  # cut, but no longer than the reference
        ("Set some of your pay aside and then go on and on with other words until the cap has come", False, True),
        ("先存下十分之一的收入。", True, True),
    ]
    answers, stopped, wanted = map(list, zip(*cases, strict=True))
    count = len(cases)
    assert metrics.useless(answers, [question] * count, [reference] * count, stopped) == wanted
    assert metrics.useless(["先存下十分之一的收入。"], ["怎样开始储蓄？"], ["先存钱。"], [True]) == [False]


def test_answers_that_have_nothing_to_do_with_their_questions():
    references = [
        f"{word} {word} is what the {word} question is about" for word in "gold bond tax rent loan fund".split()
    ]
    assert np.mean(metrics.nearer(references, references)) > 0.2
    assert np.mean(metrics.nearer(references[3:] + references[:3], references)) < -0.2
    assert abs(np.mean(metrics.nearer(["the same for all"] * 6, references))) < 1e-9


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_winner_is_named_before_it_is_said_that_its_answers_are_of_no_use(language):
    words = load_words(language)
    row = {"a": "full", "b": "base", "metric": "nll_per_token", "difference": -8.8, "ci95": [-9, -8], "p_value": 0.001}

    def said(useless: float, low: float) -> str:
        answers = {"useless": useless, "nearer": {"difference": 0.1, "ci95": [low, 0.2]}}
        models = {"base": {"answers": {"useless": 1.0}}, "full": {"answers": answers}}
        return verdict({"comparisons": [row], "models": models}, PAIRS, words)

    better = verdict({"comparisons": [row]}, PAIRS, words)
    assert said(0.1, 0.05) == better
    assert said(0.98, 0.05).endswith(better) and "98%" in said(0.98, 0.05) and len(said(0.98, 0.05)) > len(better)
    assert said(0.1, -0.01).endswith(better) and "-0.010" in said(0.1, -0.01)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_verdict_follows_the_interval_and_the_test(language):
    words, draw = load_words(language), random.Random(0)
    said_of = {"better": "优于", "worse": "劣于", "no difference": "看不出差异", "not decided": "尚无定论"}
    said_of = {key: key for key in said_of} if language == "en" else said_of
    cases = [(0.0, 0.2), (-0.2, 0.0), (0.0, 0.0)] + [
        tuple(sorted((draw.uniform(-1, 1), draw.uniform(-1, 1)))) for _ in range(200)
    ]
    for low, high in cases:
        for p in (0.01, 0.2):
            row = {"a": "lora", "b": "base", "metric": "nll_per_token", "difference": (low + high) / 2}
            row |= {"ci95": [low, high], "p_value": p, "n": 9}
            said = verdict({"comparisons": [row]}, PAIRS, words)
            wanted = "no difference" if low <= 0 <= high else "better" if high < 0 else "worse"
            wanted = "not decided" if wanted != "no difference" and p > 0.05 else wanted
            assert {key for key, text in said_of.items() if text in said} == {wanted}, said
    # the sentence is about nll alone: other metrics have another direction
    other = {"a": "lora", "b": "base", "metric": "style_match", "difference": 1.0, "ci95": [0.9, 1.1]}
    assert words["lora"] not in verdict({"comparisons": [other]}, PAIRS, words)
    # and about these pairs alone
    control = row | {"b": "base_4bit", "ci95": [-2, -1], "p_value": 0.001}
    assert words["lora"] not in verdict({"comparisons": [control]}, PAIRS, words)
    # nor is a comparison with an unsound model a verdict
    unsound = [("other_data", {"name": "lora", "command": "python x.py"})]
    row |= {"ci95": [-2, -1], "p_value": 0.001}
    said = verdict({"comparisons": [row], "unsound": unsound}, PAIRS, words)
    assert not [text for text in said_of.values() if text in said] and "python x.py" in said


# --- fairness


@pytest.fixture(scope="module")
def fair(trained) -> dict[str, dict]:
    """Logs of two comparable long runs: those of `trained` as if they had gone on."""
    logs = {}
    for name in ("lora", "full"):
        logs[name] = json.loads((trained / f"outputs/{name}_model/training_log.json").read_text("utf-8"))
        logs[name]["summary"] |= {"steps": 300, "epochs": 3.0}
        logs[name]["settings"] |= {"NUM_EPOCHS": 3.0, "MAX_STEPS": None, "WARMUP_RATIO": 0.1}
    return logs


def unfair(script, fair: dict, change, rows: int = 100, cut: dict | None = None) -> list[str]:
    logs = copy.deepcopy(fair)
    change(logs)
    cut = {"lora": 0, "full": 0} if cut is None else cut
    notes = script.fairness(logs, rows, SimpleNamespace(MAX_NEW_TOKENS=64), cut, questions=rows, prompts=100)
    assert all(sentence(note, load_words("zh")) for note in notes)
    return [sentence(note, load_words("en")) for note in notes]


def setting(method: str, **values):
    return lambda logs: logs[method]["settings"].update(values)


def summary(method: str, **values):
    return lambda logs: logs[method]["summary"].update(values)


def nothing(logs: dict) -> None:
    pass


def test_a_fair_comparison_has_no_warning(script, fair):
    assert unfair(script, fair, nothing) == []
    # the same rows per step, made in another way, are no difference
    assert unfair(script, fair, setting("lora", BATCH_SIZE=1, GRADIENT_ACCUMULATION_STEPS=4)) == []
    assert unfair(script, fair, lambda logs: logs.pop("full")) == []
    # a step has as many rows whatever the processes, and data that were prepared anew may hold the same rows
    assert unfair(script, fair, lambda logs: logs["full"]["environment"].update(processes=2)) == []
    assert unfair(script, fair, lambda logs: logs["full"]["data"].update(manifest_sha256="0")) == []


def fewer_rows(logs: dict) -> None:
    logs["lora"]["data"]["train_rows"] -= 1


def same_rate(logs: dict) -> None:
    logs["full"]["settings"]["LEARNING_RATE"] = logs["lora"]["settings"]["LEARNING_RATE"]


@pytest.mark.parametrize(
    "change, said",
    [
        (setting("lora", SEED=7), "differ in SEED: 7 (lora), 42 (full)"),
        (setting("full", NUM_EPOCHS=2.0), "differ in NUM_EPOCHS: 3.0 (lora), 2.0 (full)"),
        (setting("full", MAX_STEPS=300), "differ in MAX_STEPS: None (lora), 300 (full)"),
        (setting("full", MAX_LENGTH=512), "differ in MAX_LENGTH: 1024 (lora), 512 (full)"),
        (setting("lora", MAX_TRAIN_SAMPLES=9), "differ in MAX_TRAIN_SAMPLES: 9 (lora), None (full)"),
        (setting("lora", BATCH_SIZE=4), "differ in effective batch size: 8 (lora), 4 (full)"),
        (setting("full", GRADIENT_ACCUMULATION_STEPS=1), "differ in effective batch size: 4 (lora), 2 (full)"),
        (same_rate, "LoRA's learning rate is 1.0 times that of full fine-tuning"),
        (fewer_rows, "trained on different numbers of rows"),
        (lambda logs: logs["full"]["identity"].update(train_rows="0"), "trained on different data"),
        (summary("lora", steps=30, epochs=0.3), "lora never left its warm-up (30 steps)"),
        (summary("full", steps=1, epochs=3.0), "full never left its warm-up (1 steps)"),
    ],
)
def test_each_unfairness_is_named_and_no_other(script, fair, change, said):
    found = unfair(script, fair, change)
    assert len(found) == 1 and said in found[0]


def test_warm_up_is_counted_in_the_steps_that_were_asked_for(script, fair, trained):
    # MAX_STEPS shortens the schedule and its warm-up with it: 4 steps of `trained` have a warm-up of one
    def short(logs: dict) -> None:
        for log in logs.values():
            log["settings"]["MAX_STEPS"] = 4
            log["summary"] |= {"steps": 4, "epochs": 0.1}

    assert unfair(script, fair, short) == []
    rates = [
        r["learning_rate"]
        for r in json.loads((trained / "outputs/lora_model/training_log.json").read_text("utf-8"))["history"]
        if "learning_rate" in r
    ]
    assert len(rates) == 4 and max(rates) in rates[:2] and rates[-1] < max(rates)  # so it really is


def test_few_rows_and_cut_answers_are_named(script, fair):
    (found,) = unfair(script, fair, nothing, rows=99)
    assert "only 99 rows" in found and "99 different questions" in found
    notes = script.fairness(fair, 200, SimpleNamespace(MAX_NEW_TOKENS=9), {}, questions=7, prompts=29)
    assert [key for key, _ in notes] == ["too_few_rows", "few_prompts"]
    (found,) = unfair(script, fair, nothing, cut={"lora": 0, "full": 3})
    assert found == "3 answers of full were cut at MAX_NEW_TOKENS=64"


@pytest.mark.parametrize(
    "dtype, differences, named",
    [
        (torch.bfloat16, [-0.0019, 0.002, 0.0021], ["lora - base = -0.00190", "full - base = +0.00200"]),
        (torch.bfloat16, [0.0, -0.4, 0.3], ["lora - base = 0.00000"]),
        (torch.bfloat16, [-0.0021, 0.4, 0.3], []),
        (torch.float16, [-0.0019, 0.0002, 0.0021], ["full - base = +0.00020"]),
        (torch.float16, [-0.0019, 0.002, 0.0021], []),
        (torch.float32, [-0.0019, 0.0, 1e-7], []),
    ],
)
def test_differences_as_small_as_the_rounding_are_named(script, dtype, differences, named):
    compared = [
        {"a": a, "b": b, "metric": metric, "difference": difference if metric == "nll_per_token" else 0.0}
        for metric in METRICS
        for (a, b), difference in zip(PAIRS, differences, strict=True)
    ]
    notes = script.rounding(dtype, compared)
    assert len(notes) == (1 if named else 0)
    for language in ("en", "zh"):
        for text in (sentence(note, load_words(language)) for note in notes):
            assert all(pair in text for pair in named) and text.count(" = ") == len(named)
            assert str(dtype).removeprefix("torch.") in text and "4_evaluate_compare.py --precision fp32" in text


# --- end to end


def work(trained: Path, folder: Path) -> Path:
    """A copy of `trained` without what evaluation does not read."""
    return shutil.copytree(trained, folder / "work", ignore=shutil.ignore_patterns("checkpoint-*", "runs"))


@pytest.fixture(scope="module")
def evaluated(trained, tiny, tmp_path_factory) -> tuple[Path, str]:
    """(folder, standard output) of one real run of the script with everything there."""
    from safetensors.torch import load_file, save_file

    folder = work(trained, tmp_path_factory.mktemp("evaluated"))
    # The head's bias makes the tiny model repeat one token that has no text; without it the full model talks.
    weights = folder / "outputs/full_model/final_model/model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.bias"].zero_()[len(AutoTokenizer.from_pretrained(tiny)) :] = -1e4
    save_file(tensors, weights, metadata={"format": "pt"})
    (folder / "general.txt").write_text(GENERAL, encoding="utf-8")
    flags = "--max_new_tokens 24 --resamples 2000 --general_text general.txt".split()
    return folder, ok(run(SCRIPTS[3], "--model_name", tiny, *flags, cwd=folder))


@pytest.fixture(scope="module")
def results(evaluated) -> dict:
    return json.loads((evaluated[0] / "outputs/evaluation_results.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def records(evaluated) -> list[dict]:
    text = (evaluated[0] / "outputs/evaluation_examples.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def shown(results: dict, language: str = "en", **changed) -> dict:
    """`results` as write_report wants them: with the sentences of a language, and which direction is better."""
    said = verdict(results, PAIRS, load_words(language))
    return results | {"verdict": said, "warnings": []} | changed


def of(records: list[dict], name: str, key: str) -> list[dict]:
    return [row for row in records if row["model"] == name and key in row]


def test_the_files_are_these_and_no_others(evaluated):
    outputs = evaluated[0] / "outputs"
    assert {p.name for p in outputs.iterdir()} == {
        ".lock",
        "lora_model",
        "full_model",
        "evaluation_results.json",
        "evaluation_examples.jsonl",
        "evaluation_report.md",
        "evaluation_report.html",
        "plots",
    }
    pictures = sorted((outputs / "plots").iterdir())
    assert [p.name for p in pictures] == ["cost.png", "differences.png", "forgetting.png", "loss_curves.png"]
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG\r\n") and picture.stat().st_size > 5000


def test_the_results_have_the_agreed_keys(results):
    agreed = {"environment", "settings", "data", "models", "comparisons", "warnings"}
    assert set(results) == agreed | {"judge", "unsound", "verdict", "metrics", "recommendation"}
    assert results["judge"] is None and results["unsound"] == []
    assert list(results["models"]) == ["base", "lora", "full"]
    for name, model in results["models"].items():
        assert set(model) >= MODEL_KEYS
        assert model["perplexity"] == pytest.approx(math.exp(model["nll_per_token"]))
        assert model["nll_ci95"][0] < model["nll_per_token"] < model["nll_ci95"][1]
        assert set(model["perplexity_by_prompt"]) == ({"chat", "plain"} if name == "base" else {"chat"})
        assert model["perplexity"] == pytest.approx(min(model["perplexity_by_prompt"].values()))
        assert all(0 <= model[key] <= 1 for key in METRICS[1:])
        assert model["helpfulness"] is None  # until a judge has spoken
    # over 4 bits: the base in the same precision stands beside LoRA
    likelihood = [*PAIRS, *PAIRS_4BIT]
    assert [(c["metric"], c["a"], c["b"]) for c in results["comparisons"]] == [
        *(("nll_per_token", *pair) for pair in likelihood),
        *((metric, *pair) for metric in METRICS[1:] for pair in PAIRS),
        *(("forgetting", *pair) for pair in likelihood),
    ]
    keys = {"a", "b", "metric", "difference", "ci95", "p_value", "raw_p", "n", "groups", "effective_groups"}
    keys |= {"smallest_detectable", "error"}
    models = results["models"] | {"base_4bit": results["models"]["lora"]["base_4bit"]}
    for c in results["comparisons"]:
        assert set(c) == keys
        a, b = models[c["a"]][c["metric"]], models[c["b"]][c["metric"]]
        if c["metric"] == "forgetting":
            a, b = a["nll_per_token"], b["nll_per_token"]
        assert c["difference"] == pytest.approx(a - b, abs=1e-9)
        assert c["ci95"][0] <= c["difference"] <= c["ci95"][1] and 0 < c["p_value"] <= 1
        assert c["n"] == (2 if c["metric"] == "forgetting" else 16)
        assert (c["smallest_detectable"] is None) == (c["groups"] < 10)


def test_the_base_in_the_precision_of_lora_stands_beside_it(results, records, tiny):
    base, lora = results["models"]["base"], results["models"]["lora"]
    beside = lora["base_4bit"]
    assert beside["prompt"] == base["prompt"] and set(beside["perplexity_by_prompt"]) == {base["prompt"]}
    assert len({beside["nll_per_token"], base["nll_per_token"], lora["nll_per_token"]}) == 3
    cost, gain = (
        next(c["difference"] for c in results["comparisons"] if (c["metric"], c["a"], c["b"]) == ("nll_per_token", *p))
        for p in PAIRS_4BIT
    )
    assert cost + gain == pytest.approx(lora["nll_per_token"] - base["nll_per_token"])
    # scored on the very tokens of the base, by the very model that LoRA stands on
    rows, own = of(records, "base", "nll"), of(records, "base_4bit", "nll")
    for a, b in zip(rows, own, strict=True):
        assert all(a[key] == b[key] for key in ("id", "context_ids", "continuation_ids", "tokens"))
    model = in_4_bits(tiny)
    for row in own[:4]:
        nll = plain_nll(model, row["context_ids"], row["continuation_ids"])
        assert row["nll"] == pytest.approx(nll, rel=1e-5)


def in_4_bits(folder: Path):
    """The model in LoRA's 4 bits, kept from repacking itself for inference (it would on CPUs with avx512_bf16)."""
    from transformers import BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=nf4)
    device.keep_4bit_layout(model)
    return model.eval()


@pytest.mark.parametrize("instructions", ["as they are", "without bf16"])
def test_qlora_is_trained_and_scored_with_and_without_bf16_instructions(instructions, tiny, prepared, tmp_path):
    """A CPU with avx512_bf16 has two ways through bitsandbytes and torch; one without has the second."""
    folder, env = shutil.copytree(prepared, tmp_path / "work"), dict(os.environ)
    has = instructions == "as they are" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    if instructions == "without bf16":
        env["PYTHONPATH"] = str(ROOT / "tests" / "without_bf16")
    flags = [flag for flag in SHORT if flag not in ("--precision", "fp32")]
    said = ok(run(SCRIPTS[1], "--model_name", tiny, *flags, cwd=folder, env=env))
    assert ("torch.bfloat16 (the CPU has bf16" if has else "torch.float32 (the CPU has no bf16") in said
    log = json.loads((folder / "outputs/lora_model/training_log.json").read_text("utf-8"))
    assert log["history"][-1]["eval_loss"] < log["history"][0]["eval_loss"]
    ok(run(SCRIPTS[3], "--model_name", tiny, "--max_new_tokens", "2", "--resamples", "2000", cwd=folder, env=env))
    lines = (folder / "outputs/evaluation_examples.jsonl").read_text("utf-8").splitlines()
    own, model = of([json.loads(line) for line in lines], "base_4bit", "nll"), in_4_bits(tiny)
    assert len(own) == 16
    for row in own:
        assert row["nll"] == pytest.approx(plain_nll(model, row["context_ids"], row["continuation_ids"]), rel=1e-5)


def test_the_cost_is_the_log_and_the_size_on_disk(evaluated, results):
    assert results["models"]["base"]["cost"] is None
    for name, final in (("lora", "final_lora_adapter"), ("full", "final_model")):
        folder = evaluated[0] / f"outputs/{name}_model"
        log = json.loads((folder / "training_log.json").read_text("utf-8"))
        keys = ("train_runtime_s", "tokens", "tokens_per_second", "peak_memory_bytes")
        assert results["models"][name]["cost"] == {key: log["summary"][key] for key in keys} | {
            "device": "cpu",
            "trainable": log["parameters"]["trainable"],
            # the card grows by the test scores
            "disk_bytes": sum(p.stat().st_size for p in (folder / final).iterdir() if p.name != "README.md"),
        }


def test_the_examples_add_up_to_the_results(results, records):
    assert len(records) == 3 * (16 + 16) + 16
    for name, model in results["models"].items():
        rows, asked = of(records, name, "nll"), of(records, name, "answer")
        keys = {"id", "model", "context_ids", "continuation_ids", "nll", "tokens", "bytes"}
        assert len(rows) == len(asked) == 16 and all(set(row) == keys for row in rows)
        assert all(set(row) == {"id", "model", "prompt", "answer", "reference", "stopped"} for row in asked)
        nll, tokens = sum(row["nll"] for row in rows), sum(row["tokens"] for row in rows)
        assert tokens == sum(len(row["continuation_ids"]) for row in rows) == model["scored_tokens"]
        assert model["nll_per_token"] == pytest.approx(nll / tokens)
        assert model["bits_per_byte"] == pytest.approx(nll / math.log(2) / sum(row["bytes"] for row in rows))
        texts, references = [r["answer"] for r in asked], [r["reference"] for r in asked]
        quality, form = metrics.answer_quality(texts, references), metrics.style_match(texts, references)
        whole = [well_formed(r["prompt"][-1]["content"], r["answer"], r["stopped"]) for r in asked]
        for key, values in (("answer_quality", quality), ("style_match", form), ("well_formed", whole)):
            assert model[key] == pytest.approx(np.mean(values)), key
        for key, values in (
            ("rouge_l", metrics.rouge_l(texts, references)),
            ("chrf", metrics.chrf(texts, references)),
            ("stopped", [r["stopped"] for r in asked]),
            ("repetitive", list(map(metrics.repetitive, texts))),
            ("empty", [text == "" for text in texts]),
        ):
            assert model["answers"][key] == pytest.approx(np.mean(values)), key
    assert results["models"]["full"]["answer_quality"] > 0, "no model said anything: the example shows nothing"


def test_what_was_scored_is_the_reference_without_its_end(evaluated, results, records, tiny, tokenizer):
    from datasets import load_from_disk

    parts = load_from_disk(str(evaluated[0] / "data/eval"))
    test = {row["id"]: row for row in parts if row["part"] == "test"}
    assert {row["id"] for row in records} == set(test)
    full = AutoTokenizer.from_pretrained(evaluated[0] / "outputs/full_model/final_model")
    for row in (row for row in records if "nll" in row):
        text = test[row["id"]]["completion"][0]["content"]
        assert tokenizer.decode(row["continuation_ids"]) == text and row["bytes"] == len(text.encode())
        assert tokenizer.eos_token_id not in row["continuation_ids"]
        question = test[row["id"]]["prompt"][-1]["content"]
        context = tokenizer.decode(row["context_ids"])
        models = results["models"] | {"base_4bit": results["models"]["base"]}
        if models[row["model"]]["prompt"] == "chat":
            wanted = full.apply_chat_template(test[row["id"]]["prompt"], tokenize=False, add_generation_prompt=True)
            assert context == wanted
        else:
            assert row["model"].startswith("base") and context == f"Question: {question}\n\nAnswer:\n"


@pytest.mark.parametrize("name", ["base", "full"])
def test_the_nll_is_that_of_the_saved_model(evaluated, records, tiny, name):
    model = load(tiny if name == "base" else evaluated[0] / "outputs/full_model/final_model")
    for row in of(records, name, "nll")[:6]:
        assert row["nll"] == pytest.approx(plain_nll(model, row["context_ids"], row["continuation_ids"]), rel=1e-5)


def test_forgetting_is_measured_on_the_general_text(results, phi, tokenizer):
    ids = [tokenizer(text).input_ids for text in GENERAL.strip().split("\n\n")]
    nll, tokens = sum(plain_nll(phi, [tokenizer.bos_token_id], t) for t in ids), sum(map(len, ids))
    found = results["models"]["base"]["forgetting"]
    assert found["tokens"] == tokens and found["nll_per_token"] == pytest.approx(nll / tokens, rel=1e-5)
    size = len(GENERAL.strip().replace("\n\n", "").encode())
    assert found["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-5)
    others = [results["models"][name]["forgetting"]["nll_per_token"] for name in ("lora", "full")]
    assert len({found["nll_per_token"], *others}) == 3


class Page(HTMLParser):
    """tags: (name, attribute names) in order; links: values of src, href, ...; rows: texts of table cells."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.links, self.rows, self.text, self.inside = [], [], [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(sorted(key for key, _ in attrs))))
        self.links += [value for key, value in attrs if key in ("src", "href", "srcset", "action", "data")]
        self.inside.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag in self.inside:
            while self.inside.pop() != tag:
                pass

    def handle_data(self, data):
        if {"td", "th"} & set(self.inside):
            self.rows[-1][-1] += data
        if "style" not in self.inside:
            self.text += data


def test_the_page_holds_everything_itself(evaluated):
    page = (evaluated[0] / "outputs/evaluation_report.html").read_text("utf-8")
    links, tags = Page(page).links, [tag for tag, _ in Page(page).tags]
    assert tags.count("svg") == 4 and "img" not in tags and all(link.startswith("#") for link in links)
    ids = re.findall(r' id="([^"]+)"', page)
    assert {link[1:] for link in links} <= set(ids) and len(set(ids)) == len(ids)
    assert "@import" not in page and "url(" not in page


def test_nobody_is_told_of_helpfulness_before_a_judge_has_spoken(evaluated):
    folder, printed = evaluated
    assert "helpful" not in printed.lower()
    shown = [line for line in printed.splitlines() if line.startswith("well-formed answers (0 to 1)")]
    assert len(shown) == 1 and len(shown[0].split(")")[1].split()) == 3
    report = (folder / "outputs/evaluation_report.md").read_text("utf-8")
    lines = [line for line in report.splitlines() if "helpful" in line.lower()]
    assert lines[0].split("|")[1:5] == [" helpfulness ", *[" not measured "] * 3]
    assert len(lines) == 2 and "no judge was set" in lines[1]
    assert len([line for line in report.splitlines() if line.startswith("| well-formed")]) == 1 + 3


def test_the_report_and_the_table_show_the_results(evaluated, results):
    folder, printed = evaluated
    page = Page((folder / "outputs/evaluation_report.html").read_text("utf-8"))
    rows = {row[0]: row[1:] for row in page.rows}
    models = results["models"].values()
    assert rows["perplexity of the answers (lower is better)"][:3] == [f"{m['perplexity']:.2f}" for m in models]
    assert rows["bits per byte on general text"][:3] == [f"{m['forgetting']['bits_per_byte']:.3f}" for m in models]
    words = load_words("en")
    assert results["verdict"] == verdict(results, PAIRS, words)
    assert results["verdict"] in printed and results["verdict"] in page.text
    assert summary_table(results, words) in printed
    for model in models:
        assert f"{model['perplexity']:.2f}" in printed
    for warning in results["warnings"]:
        assert f"warning: {warning}" in printed and " ".join(warning.split()) in page.text
    for prompts in ("chat", "plain"):
        assert f"{results['models']['base']['perplexity_by_prompt'][prompts]:.2f}" in page.text


def test_the_differences_say_which_direction_is_better(evaluated, results):
    page = Page((evaluated[0] / "outputs/evaluation_report.html").read_text("utf-8"))
    head = next(n for n, row in enumerate(page.rows) if row[0] == "metric")
    assert page.rows[head][1] == "better"
    rows = page.rows[head + 1 : head + 1 + len(results["comparisons"])]
    words = load_words("en")
    for row, c in zip(rows, results["comparisons"], strict=True):
        lower = c["metric"] in ("nll_per_token", "forgetting")
        assert row[0].startswith(words[c["metric"]]) and row[1] == ("lower" if lower else "higher")
        assert row[2:5] == [words[c["a"]], words[c["b"]], without_zero_signs(f"{c['difference']:+.4f}")]


# --- hostile text in the report

HOSTILE = [
    "a | b || c ||| d |",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</td></tr></table></body><iframe src=//evil.example></iframe><!-- ",
    "[link](javascript:alert(1)) ![image](http://evil.example/i.png) <https://evil.example>",
    "[ref]: http://evil.example 'x'\n\n[ref]",
    "`code` ``more`` ``` ~~~",
    "line\nbreak\r\n\r\n# heading\n\n    indented\n\n- item\n\n| a | b |\n|---|---|\n| 1 | 2 |\n",
    "**bold** __under__ *it* ~~gone~~ $x^2$ ==mark==",
    r"\| \` \< \\| \[x\](y)",
    "&lt;script&gt; &amp; &#60;b&#62; &nbsp; &#x3c;i>",
    'src="plots/differences.png" src="plots/loss_curves.png"',
    "{{ settings }} {% raw %} {# x #} ${y}",
    "> quote",
    "1. one",
    "---",
    "",
    "\u202eright to left\u2028\x85\u00a0 中文 ünï 😀 \u200b",
    "\u0002amp\u0003 \u0002klzzwxh:0000\u0003 \u0002wzxhzdk:0\u0003",
    "x" * 5000,
    "|" * 700,
]


def as_shown(text: str) -> str:
    """What a reader must see of `text`: all of it, white space as one space."""
    text = " ".join(text.split())
    # the first two control characters are markdown's own; the last turns the direction of writing
    return re.sub("[\u0002\u0003\u202e]", lambda match: ascii(match[0])[1:-1], text)


def report_of(results: dict, folder: Path, texts: list[str], name: str) -> tuple[str, Page]:
    """The report with `texts` as prompts, answers, warnings and settings; `name` as model, data, device."""
    results = copy.deepcopy(results)
    results["settings"] |= {f"S{n}": text for n, text in enumerate(texts)} | {"MODEL_NAME": name}
    results["data"]["source"] = results["environment"]["device"] = name
    results["warnings"] = [f"lora is not compared: {text}" for text in texts]
    results["judge"] = {
        "judge": name,
        "identical": {"n": 2, "ties": 2, "missing": 0},
        "shuffled": {"n": 2, "win_rate": 1.0, "missing": 0},
        "withheld": None,
        "against_reference": {},
        "between_models": [],
    }
    examples = [
        {"prompt": f"Q: {text}", "reference": text, "base": text, "lora": text, "full": text} for text in texts
    ]
    drawn = {name: Picture("<svg></svg>", name, name) for name in ("differences", "loss_curves")}
    write_report(shown(results, warnings=results["warnings"]), examples, drawn, folder, "en")
    page = Page((folder / "evaluation_report.html").read_text("utf-8"))
    return (folder / "evaluation_report.md").read_text("utf-8"), page


def test_hostile_text_cannot_leave_its_place(results, tmp_path):
    _, harmless = report_of(results, tmp_path / "harmless", ["word"] * len(HOSTILE), "word")
    text, page = report_of(results, tmp_path / "hostile", HOSTILE, "word")
    assert page.tags == harmless.tags  # not one element or attribute more, and none elsewhere
    assert [len(row) for row in page.rows] == [len(row) for row in harmless.rows]
    assert {tag for tag, _ in page.tags}.isdisjoint({"a", "img", "iframe", "blockquote", "pre", "del"})
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 1 and names.count("h3") == len(HOSTILE) and page.links == []
    heads = [n for n, row in enumerate(page.rows) if row == ["reference", "base", "lora", "full"]]
    assert len(heads) == len(HOSTILE)
    for n, hostile in zip(heads, HOSTILE, strict=True):
        assert [" ".join(text.split()) for text in page.rows[n + 1]] == [as_shown(hostile)] * 4
    # a reader of the markdown sees the same tables, whatever renders it
    after = text[text.index("## Answers") : text.index("## Settings")]
    bars = r"(?<!\\)\|"  # an escaped one ends no cell
    assert {len(re.findall(bars, line)) for line in after.splitlines() if line.startswith("|")} == {5}
    after = text[text.index("## Settings") :]
    assert {len(re.findall(bars, line)) for line in after.splitlines() if line.startswith("|")} == {3}


def test_names_are_shown_as_they_are(results, tmp_path):
    _, harmless = report_of(results, tmp_path / "harmless", [], "word")
    wrong = []
    for n, name in enumerate(["microsoft/phi-2", "my_models/a*b_c", *HOSTILE[:13]]):
        _, page = report_of(results, tmp_path / str(n), [], name)
        assert page.tags == harmless.tags
        # once each: the model above, its setting, the data, the device, the judge
        wrong += [name] if page.text.count(as_shown(name)) < 5 else []
    assert wrong == []


def test_the_number_of_models_is_the_number_of_columns(results, tmp_path):
    for left_out in ([], ["lora"], ["full"]):
        some = copy.deepcopy(results)
        some["models"] = {k: v for k, v in results["models"].items() if k not in left_out}
        some["comparisons"] = [c for c in results["comparisons"] if not {c["a"], c["b"]} & set(left_out)]
        _, page = report_of(some, tmp_path / "_".join(["x", *left_out]), ["word"], "word")
        assert page.rows[0] == ["", *some["models"]]
        assert {len(row) for row in page.rows[:17]} == {1 + len(some["models"])}
        first, *lines = summary_table(some | {"judge": None}, load_words("en")).splitlines()
        assert first.split() == list(some["models"])
        assert len({len(line) for line in [first, *lines]}) == 1


# --- what is missing or does not fit


@pytest.fixture
def call(script, trained, tiny, tmp_path, monkeypatch, capsys):
    """call(settings) runs main() in a copy (call.folder): (exit code, `error:` lines, standard output)."""
    folder = work(trained, tmp_path)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("configs.settings._run", None)  # what another test has told override
    short = {"MODEL_NAME": str(tiny), "MAX_NEW_TOKENS": 4, "RESAMPLES": 2000, "MAX_EVAL_SAMPLES": 5}
    usual = {name: getattr(script, name) for name in read_constants(script.__file__)} | short

    def main(**settings) -> tuple[int, str, str]:
        for key, value in (usual | settings).items():
            monkeypatch.setattr(script, key, value)
        capsys.readouterr()
        try:
            script.main()
            code = 0
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        errors = "\n".join(line for line in said.err.splitlines() if line.startswith("error: "))
        return code, plain(errors), plain(said.out)

    main.folder = folder
    return main


@pytest.mark.parametrize("missing, left", [("lora", "full"), ("full", "lora")])
def test_what_was_not_trained_is_named_and_the_rest_compared(call, missing, left):
    final = {"lora": "outputs/lora_model/final_lora_adapter", "full": "outputs/full_model/final_model"}[missing]
    shutil.rmtree(call.folder / final)
    code, _, out = call()
    assert code == 0
    results = json.loads((call.folder / "outputs/evaluation_results.json").read_text("utf-8"))
    assert list(results["models"]) == ["base", left]
    found = [(c["a"], c["b"], c["metric"]) for c in results["comparisons"]]
    assert [c for c in found if "base_4bit" not in c] == [(left, "base", m) for m in METRICS]
    assert len(found) == len(METRICS) + (2 if left == "lora" else 0)
    command = {"lora": "python 2_lora_finetuning.py", "full": "python 3_full_finetuning.py"}[missing]
    note = f"{missing} is not compared: {final} is missing; make it with: {command}"
    assert note in map(plain, results["warnings"]) and out.count(note) == 2  # before the work and after it
    assert results["data"]["test_rows"] == 5 and results["models"]["base"]["forgetting"] is None
    page = Page((call.folder / "outputs/evaluation_report.html").read_text("utf-8"))
    assert final in page.text


@pytest.mark.parametrize("precision, language", [("bf16", "en"), ("bf16", "zh"), ("fp32", "en")])
def test_a_report_says_where_the_rounding_is_as_large_as_a_difference(call, tiny, precision, language):
    """A LoRA of zeros and a full model of the base's weights differ by nothing: too little for bf16, so it is said."""
    from safetensors.torch import load_file, save_file

    log = call.folder / "outputs/lora_model/training_log.json"
    log.write_text(re.sub('"USE_4BIT": true', '"USE_4BIT": false', log.read_text("utf-8")), encoding="utf-8")
    adapter = call.folder / "outputs/lora_model/final_lora_adapter/adapter_model.safetensors"
    tensors = {key: tensor * ("lora_B" not in key) for key, tensor in load_file(adapter).items()}
    save_file(tensors, adapter, metadata={"format": "pt"})
    shutil.copy(tiny / "model.safetensors", call.folder / "outputs/full_model/final_model")
    code, _, out = call(PRECISION=precision, REPORT_LANGUAGE=language)
    assert code == 0
    results = json.loads((call.folder / "outputs/evaluation_results.json").read_text("utf-8"))
    report = Page((call.folder / "outputs/evaluation_report.html").read_text("utf-8")).text
    said = [plain(text) for text in results["warnings"] if "full - lora" in text]
    if precision == "fp32":
        assert said == [] and "fp32" not in out.partition("\n\n")[2] and "full - lora =" not in report
        return
    assert len(said) == 1 and "bfloat16" in said[0] and "4_evaluate_compare.py --precision fp32" in said[0]
    assert all("full - lora = 0.00000" in text for text in (said[0], report, out))
    assert all("--precision fp32" in text for text in (report, out))
    assert ("舍入误差" if language == "zh" else "scoring in bfloat16 rounds the nll") in report


def test_nothing_trained_names_both_commands(trained, tiny, tmp_path):
    folder = work(trained, tmp_path)
    shutil.rmtree(folder / "outputs/lora_model")
    shutil.rmtree(folder / "outputs/full_model")
    result = run(SCRIPTS[3], "--model_name", tiny, cwd=folder)
    said = refused(result, "python 2_lora_finetuning.py", "python 3_full_finetuning.py")
    assert len(said) == 2 and list((folder / "outputs").iterdir()) == []


def test_another_base_is_refused(call, tiny, tmp_path):
    other = shutil.copytree(tiny, tmp_path / "other")
    code, said, _ = call(MODEL_NAME=str(other))
    assert code == 2 and len(said.splitlines()) == 2
    assert f"--model_name {tiny}" in said and f"python 3_full_finetuning.py --model_name {other}" in said
    assert not (call.folder / "outputs/evaluation_results.json").exists()


def test_other_data_give_warnings_and_no_verdict(call, tiny):
    # another held-out part: what is tested was trained on
    flags = ["--dataset_name", "rows.jsonl", "--model_name", tiny, "--eval_fraction", "0.2", "--seed", "1"]
    ok(run(SCRIPTS[0], *flags, cwd=call.folder))
    code, _, out = call()
    results = json.loads((call.folder / "outputs/evaluation_results.json").read_text("utf-8"))
    assert code == 0 and results["verdict"].startswith("No verdict") and plain(results["verdict"]) in out
    for name, command in (("lora", "2_lora_finetuning.py"), ("full", "3_full_finetuning.py")):
        (said,) = [plain(w) for w in results["warnings"] if f"{name} saw " in w and "of the test questions" in w]
        assert command in said and f"warning: {said}" in out
    report = (call.folder / "outputs/evaluation_report.md").read_text("utf-8")
    assert results["verdict"] in html.unescape(report) and "is better than" not in report


def test_a_run_that_is_going_on_is_refused(call):
    for name in ("lora", "full"):
        edit_log(call, name, "running")
        code, said, _ = call()
        assert code == 2 and f"outputs/{name}_model is being trained" in said
    assert len(said.splitlines()) == 2


def edit_log(call, name: str, status: str) -> None:
    path = call.folder / f"outputs/{name}_model/training_log.json"
    log = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(log | {"summary": log["summary"] | {"status": status}}), encoding="utf-8")


def test_a_run_that_stopped_early_gives_a_warning_and_no_verdict(call):
    edit_log(call, "full", "failed")
    code, _, out = call()
    results = json.loads((call.folder / "outputs/evaluation_results.json").read_text("utf-8"))
    assert code == 0 and results["verdict"].startswith("No verdict") and "failed after 4 steps" in out
    assert [w for w in results["warnings"] if "full stopped early (failed after 4 steps)" in w]


def spoil(path: Path, change) -> None:
    """Change a JSON file: `change` alters what is loaded, or returns what takes its place."""
    value = json.loads(path.read_text("utf-8"))
    value = change(value) or value
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda log: 3, "model_name is missing"),
        (lambda log: log["settings"].pop("WARMUP_RATIO") and None, "settings.WARMUP_RATIO is missing"),
        (lambda log: log.update(settings=None), "settings.WARMUP_RATIO is missing"),
        (lambda log: log["summary"].update(steps=None), "summary.steps is None"),
        (lambda log: log["data"].pop("manifest_sha256") and None, "data.manifest_sha256 is missing"),
        (lambda log: log["summary"].pop("peak_memory_bytes") and None, "summary.peak_memory_bytes is missing"),
        (lambda log: log.update(history=None), "history is None"),
        (lambda log: log.update(model_name=5), "model_name is 5"),
    ],
)
def test_a_damaged_log_is_refused_before_anything_is_loaded(call, script, monkeypatch, change, said):
    monkeypatch.setattr(script, "load_model", lambda *_: pytest.fail("a model was loaded"))
    path = call.folder / "outputs/full_model/training_log.json"
    spoil(path, change)
    code, found, _ = call()
    assert code == 2 and said in found and "python 3_full_finetuning.py" in found


def test_a_log_without_costs_still_gives_a_report(call):
    def change(log: dict) -> None:
        log["summary"] |= {"peak_memory_bytes": None, "train_runtime_s": None}
        log["history"] = [1, {"loss": 1.0}, *log["history"]]

    spoil(call.folder / "outputs/full_model/training_log.json", change)
    assert call()[0] == 0


def test_nothing_is_written_when_the_report_fails(call, script, monkeypatch):
    assert call()[0] == 0
    outputs = call.folder / "outputs"
    before = listing(outputs)
    monkeypatch.setattr(script, "write_report", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(MAX_EVAL_SAMPLES=4)
    assert listing(outputs) == before


def test_the_model_cards_hold_the_test_scores(call):
    cards = {
        "lora": call.folder / "outputs/lora_model/final_lora_adapter/README.md",
        "full": call.folder / "outputs/full_model/final_model/README.md",
    }
    before = {name: card.read_text("utf-8") for name, card in cards.items()}
    marks = "<!-- test scores -->\n", "\n<!-- end of test scores -->"
    sizes = []
    for rows in (5, 4):  # the second run replaces what the first one wrote
        assert call(MAX_EVAL_SAMPLES=rows)[0] == 0
        results = json.loads((call.folder / "outputs/evaluation_results.json").read_text("utf-8"))
        models = results["models"]
        sizes.append([models[name]["cost"]["disk_bytes"] for name in cards])
        for name, card in cards.items():
            text = card.read_text("utf-8")
            assert [text.count(mark) for mark in marks] == [1, 1]
            head, scores, tail = re.split("|".join(map(re.escape, marks)), text)
            untouched = re.split("|".join(map(re.escape, marks)), before[name])
            assert "Not measured yet" in untouched[1] and [head, tail] == [untouched[0], untouched[2]]
            first, blank, *table, gap, last = scores.splitlines()
            assert first == f"On {rows} rows and 16 prompts of the test split:" and blank == gap == ""
            assert last == results["verdict"]
            cells = [[part.strip() for part in line.strip("|").split("|")] for line in table]
            assert cells[0] == ["", "base", "this model"] and cells[1] == ["---"] * 3
            assert [cell[1:] for cell in cells[2:]] == [
                [f"{models[label][key]:{form}}" for label in ("base", name)]
                for key, form in (
                    ("perplexity", ".2f"),
                    ("bits_per_byte", ".3f"),
                    ("answer_quality", ".3f"),
                    ("style_match", ".3f"),
                )
            ]
    assert sizes[0] == sizes[1]


def test_cards_that_cannot_take_the_scores_are_left_alone(call):
    lora = call.folder / "outputs/lora_model/final_lora_adapter/README.md"
    full = call.folder / "outputs/full_model/final_model/README.md"
    lora.unlink()
    for card, named in (
        (b"Written by hand.\n", False),
        (b"<!-- test scores -->\n\xff\n<!-- end of test scores -->", True),
    ):
        full.write_bytes(card)
        (call.folder / "outputs/evaluation_results.json").unlink(missing_ok=True)
        code, said, out = call()
        assert (code, said) == (0, "") and (call.folder / "outputs/evaluation_results.json").exists()
        assert full.read_bytes() == card and not lora.exists()
        assert (f"{full.relative_to(call.folder)} is left without the test scores" in out) == named
        assert f"{lora.relative_to(call.folder)} is left without the test scores" in out


def prompts_of(call) -> Path:
    return call.folder / "data/test_prompts.json"


@pytest.mark.parametrize(
    "change",
    [
        lambda prompts: ["a"],
        lambda prompts: prompts[0].update(id="elsewhere"),
        lambda prompts: prompts[0].update(reference="hello"),
        lambda prompts: prompts[0].pop("reference") and None,
        lambda prompts: [*prompts, prompts[0]],
    ],
)
def test_prompts_that_are_not_of_the_test_part_are_refused(call, change):
    spoil(prompts_of(call), change)
    code, said, _ = call()
    assert code == 2 and "test_prompts.json" in said and "python 1_prepare_dataset.py" in said


def test_no_prompts_are_refused(call):
    for text in ("[]", "{}", "null"):
        prompts_of(call).write_text(text, encoding="utf-8")
        code, said, _ = call()
        assert code == 2 and "test_prompts.json" in said


def test_changed_test_rows_are_refused(call):
    """Rows that somebody has edited are no longer those that training kept apart."""
    from datasets import load_from_disk

    held_out = load_from_disk(str(call.folder / "data/eval"))

    def put(changed, said: str) -> None:
        shutil.rmtree(call.folder / "data/eval")
        changed.save_to_disk(str(call.folder / "data/eval"))
        code, found, _ = call()
        assert code == 2 and said in found and "python 1_prepare_dataset.py" in found

    from datasets import Dataset

    rows = held_out.to_list()
    edited = [row | {"completion": [{"role": "assistant", "content": "hello"}]} for row in rows]
    put(Dataset.from_list(edited), "was changed after step 1")
    put(Dataset.from_list(rows[:4]), "is not what")
    put(Dataset.from_list([{k: v for k, v in row.items() if k != "part"} for row in rows]), "has no column 'part'")


def test_a_folder_without_the_weights_of_lora_is_no_adapter(call):
    final = call.folder / "outputs/lora_model/final_lora_adapter"
    shutil.copy(call.folder / "outputs/full_model/final_model/model.safetensors", final / "adapter_model.safetensors")
    code, said, _ = call()
    assert code == 2 and "none of LoRA's" in said and "2_lora_finetuning.py" in said


def test_an_adapter_of_another_base_is_refused(call):
    spoil(
        call.folder / "outputs/lora_model/final_lora_adapter/adapter_config.json",
        lambda config: config.update(base_model_name_or_path="other/model"),
    )
    code, said, _ = call()
    assert code == 2 and "other/model" in said
    # but a project that was moved is no other base
    spoil(
        call.folder / "outputs/lora_model/final_lora_adapter/adapter_config.json",
        lambda config: config.update(base_model_name_or_path="/where/it/was/outputs/demo_base_model"),
    )
    assert call()[0] == 0


@pytest.mark.parametrize(
    "name",
    [
        "lora_model/final_lora_adapter/tokenizer.json",
        "lora_model/final_lora_adapter/adapter_config.json",
        "full_model/final_model/config.json",
    ],
)
def test_a_broken_file_of_a_model_is_one_sentence(call, name):
    (call.folder / "outputs" / name).write_text('{"a": ', encoding="utf-8")
    code, said, _ = call()
    command = "2_lora_finetuning.py" if "lora" in name else "3_full_finetuning.py"
    assert code == 2 and command in said and len(said.splitlines()) == 1


def test_a_model_that_gives_no_numbers_is_named(call):
    from safetensors.torch import load_file, save_file

    weights = call.folder / "outputs/full_model/final_model/model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.weight"][3] = math.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    code, said, _ = call()
    assert code == 2 and "full gives no number for row" in said and "3_full_finetuning.py" in said


def test_a_prompt_that_leaves_no_room_is_refused(call):
    code, said, _ = call(PROMPT="word " * 3000)
    assert code == 2 and "PROMPT" in said and "positions" in said


def test_a_single_question_is_refused(call):
    code, said, _ = call(MAX_EVAL_SAMPLES=1)
    assert code == 2 and "MAX_EVAL_SAMPLES" in said


def test_a_terminal_that_cannot_show_chinese_shows_something(trained, tiny, tmp_path):
    folder = work(trained, tmp_path)
    env = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "8"}
    flags = ["--model_name", tiny, "--max_new_tokens", "2", "--report_language", "zh", "--prompt", "What is an ETF?"]
    out = ok(run(SCRIPTS[3], *flags, cwd=folder, env=env))
    assert "?" in out and len(out.splitlines()) > 3


def test_missing_data_are_refused(call):
    (call.folder / "data/manifest.json").unlink()
    code, said, _ = call()
    assert code == 2 and "python 1_prepare_dataset.py" in said


def test_a_general_text_that_is_none_is_refused(call):
    code, said, _ = call(GENERAL_TEXT="nowhere.txt")
    assert code == 2 and "GENERAL_TEXT" in said and "nowhere.txt" in said
    (call.folder / "empty.txt").write_text(" \n\n \n", encoding="utf-8")
    (call.folder / "picture.png").write_bytes(b"\x89PNG\r\n\xff\xfe")
    for name in ("empty.txt", "picture.png"):
        code, said, _ = call(GENERAL_TEXT=name)
        assert code == 2 and "GENERAL_TEXT" in said and name in said, name


def test_wrong_settings_are_shown_together_before_torch_is_there(tmp_path):
    wrong = {
        "MAX_NEW_TOKENS": 0,
        "BATCH_TOKENS": 0,
        "GENERATION_BATCH": -1,
        "MAX_EVAL_SAMPLES": 0,
        "RESAMPLES": 10,
        "PRECISION": "fp8",
        "TEMPERATURE": -1.0,
        "REPORT_LANGUAGE": "de",
        "PROMPT": " ",
        "MODEL_NAME": "no/such/folder/x",
    }
    flags = [f"--{name.lower()}={value}" for name, value in wrong.items()]
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    said = refused(run(SCRIPTS[3], *flags, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}))
    assert len(said) == len(wrong)
    for name, line in zip(wrong, said, strict=True):
        assert line.startswith(f"error: {name} ")


def test_what_is_no_matter_of_a_range_is_shown_together(call):
    code, said, _ = call(EMBEDDING_MODEL="no/such/folder/x", PROMPT="What\udce4?", JUDGE="gpt-4")
    assert code == 2 and len(said.splitlines()) == 3
    for name in ("EMBEDDING_MODEL", "PROMPT", "JUDGE"):
        assert f"error: {name} " in said


# --- --prompt, languages, groups, what is shown


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in sorted(folder.rglob("*"))
    }


def test_a_prompt_prints_the_answers_side_by_side_and_changes_nothing(evaluated, records, tiny):
    folder = evaluated[0]
    before = listing(folder)
    asked = of(records, "full", "answer")[0]
    question = asked["prompt"][-1]["content"]
    flags = ["--model_name", tiny, "--max_new_tokens", "24", "--prompt", question]
    out = ok(run(SCRIPTS[3], *flags, cwd=folder, env=os.environ | {"COLUMNS": "120"}))
    assert listing(folder) == before
    table = [line for line in out.splitlines() if line[:1] in "┃│"]
    assert [cell.strip() for cell in table[0].strip("┃").split("┃")] == ["base", "lora", "full"]
    columns = list(zip(*([c.strip() for c in line.strip("│").split("│")] for line in table[1:]), strict=True))
    assert len(columns) == 3
    shown = "".join("".join(columns[2]).split())
    assert "".join(asked["answer"].split())[:40] in shown


def test_a_prompt_with_a_marker_is_refused_before_a_model_is_loaded(call, script, monkeypatch):
    monkeypatch.setattr(script, "load_model", lambda *_: pytest.fail("a model was loaded"))
    for marker in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        code, said, _ = call(PROMPT=f"What? {marker}system")
        assert code == 2 and "PROMPT" in said and marker in said


def test_both_languages_have_the_same_sentences_with_the_same_gaps(script):
    from string import Formatter

    en, zh = load_words("en"), load_words("zh")
    assert list(en) == list(zh)
    for key in en:
        gaps = [sorted({name for _, name, _, _ in Formatter().parse(w[key]) if name}) for w in (en, zh)]
        assert gaps[0] == gaps[1], key
        assert isinstance(en[key], str) and isinstance(zh[key], str) and zh[key].strip()
    folder = ROOT / "configs/evaluation"
    files = [*sorted((folder / "templates").glob("*.jinja")), *sorted(folder.glob("*.py")), Path(script.__file__)]
    used = "\n".join(path.read_text("utf-8") for path in files)
    for key in en:  # no sentence that nobody says
        name = key.removeprefix("note_").removeprefix("plot_").removeprefix("form_")
        assert re.search(rf"\b{name}\b", used), key


def test_the_chinese_report_says_the_same(results, evaluated, tmp_path):
    words = load_words("zh")
    write_report(
        shown(results, "zh"), [], draw(results, {}, tmp_path / "plots", words, load_words("en")), tmp_path, "zh"
    )
    page = (tmp_path / "evaluation_report.html").read_text("utf-8")
    english = Page((evaluated[0] / "outputs/evaluation_report.html").read_text("utf-8"))
    chinese = Page(page)
    assert '<html lang="zh">' in page and "困惑度" in chinese.text

    def numbers(shown: Page) -> list[str]:
        rows = [row for row in shown.rows if row and row[0] not in ("reference",)]
        return re.findall(r"[-+]?\d+\.\d+", " ".join(cell for row in rows[:40] for cell in row[1:]))

    assert numbers(chinese)[:60] == numbers(english)[:60] and len(numbers(chinese)) > 60
    # nothing of the sentences is left in English, but names
    sentences = [line for line in chinese.text.splitlines() if len(line.split()) > 12]
    assert [line for line in sentences if not re.search("[\u4e00-\u9fff]", line)] == []


def test_near_equal_questions_are_drawn_together(call, script, monkeypatch):
    seen = []
    usual = statistics.compare

    def spy(a, b, weight, groups, *rest):
        seen.append(list(groups))
        return usual(a, b, weight, groups, *rest)

    monkeypatch.setattr(script, "compare", spy)
    from datasets import load_from_disk

    held_out = load_from_disk(str(call.folder / "data/eval"))
    test = [row for row in held_out if row["part"] == "test"]
    alone = list(dict.fromkeys(HeldOut(held_out.to_list(), []).groups))
    halves = [f"half {alone.index(group) % 2}" for group in HeldOut(held_out.to_list(), []).groups]
    alike = held_out.remove_columns("group").add_column("group", halves)
    alike.save_to_disk(str(call.folder / "data/other"))
    for path in (call.folder / "data/eval", call.folder / "data/other"):
        if path.name == "other":
            shutil.rmtree(call.folder / "data/eval")
            path.rename(call.folder / "data/eval")
        seen.clear()
        code, _, _ = call(MAX_EVAL_SAMPLES=None)
        assert code == 0
        groups = [g for g in seen if len(g) == len(test)]
        rows = test if path.name == "eval" else [row for row in alike if row["part"] == "test"]
        wanted = HeldOut(rows, []).groups
        assert len(set(wanted)) <= (len(test) if path.name == "eval" else 2)
        assert groups[0] == wanted and all(sorted(g) == sorted(wanted) for g in groups)


def test_a_prompt_is_in_the_group_of_its_row():
    turns = {n: [{"role": "user", "content": f"Question {'abcd'[n]}"}] for n in range(4)}
    rows = [{"id": f"{n}", "prompt": turns[n], "group": group} for n, group in enumerate(["x", "x", None])]
    groups = ["x", "x", None, "x"]  # row 3 is not among those that MAX_EVAL_SAMPLES left, and keeps its group
    prompts = [
        {"id": f"{n}", "prompt": turns[n], "reference": f"Answer {n}", "group": groups[n]} for n in (1, 0, 3, 2)
    ]
    held_out = HeldOut(rows, prompts)
    alone = json.dumps(turns[2]).lower()
    assert held_out.groups == ["x", "x", alone]
    assert held_out.prompt_groups == ["x", "x", "x", alone]
    # questions that differ in their figures alone are one observation, whatever step 1 has found
    twins = [{"prompt": [{"role": "user", "content": f"What is {n} % of ${n}00.50?"}], "group": f"{n}"} for n in "123"]
    other = {"prompt": [{"role": "user", "content": "What is a bond?"}], "group": "1"}
    assert len(set(HeldOut([*twins, other], []).groups)) == 1
    assert len(set(HeldOut([twins[0], {**other, "group": "4"}], []).groups)) == 2
    assert held_out.questions == ["Question b", "Question a", "Question d", "Question c"]
    assert held_out.references == ["Answer 1", "Answer 0", "Answer 3", "Answer 2"]


def test_the_groups_are_those_of_step_1(tiny, tmp_path):
    """Prompts that differ in a comma are one group, and stand under the smallest id of it."""
    from datasets import load_from_disk
    from hub import finance_rows

    rows = finance_rows(120)
    twins = [
        {
            "instruction": "How should a young family save money for a house over the coming ten years" + end,
            "input": "",
            "output": f"Save a fixed part of the income, number {n}.",
        }
        for n, end in enumerate(("?", " ?", ", please?", "?!"))
    ]
    path = write_rows(tmp_path / "rows.jsonl", [*twins, *rows])
    flags = ["--dataset_name", path, "--model_name", tiny, "--eval_fraction", "0.5"]
    for seed in range(6):  # until they are held out
        ok(run(SCRIPTS[0], *flags, "--seed", seed, cwd=tmp_path))
        held_out = list(load_from_disk(str(tmp_path / "data/eval")))
        mine = [row for row in held_out if "young family" in row["prompt"][-1]["content"]]
        if mine:
            break
    assert len(mine) == 4 and {row["group"] for row in mine} == {min(row["id"] for row in mine)}
    others = [row for row in held_out if row not in mine]
    assert sum(row["group"] == row["id"] for row in others) > len(others) / 2


def test_the_most_different_answers_are_shown():
    answers = {
        "base": ["same words here", "buy a bond now", "I do not know", ""],
        "lora": ["same words here", "sell a share soon", "I do not know.", ""],
        "full": ["same words here", "xyz", "I do not know", "long answer about taxes"],
    }
    assert metrics.most_different(answers, 10) == [1, 3, 2, 0]
    assert metrics.most_different(answers, 2) == [1, 3]


def test_the_smallest_detectable_difference_is_found_in_four_of_five_cases():
    draw = np.random.default_rng(5)
    n, spread = 80, 0.5
    planted = statistics.compare(draw.normal(0, spread, n), np.zeros(n), np.ones(n), list(range(n)), 2000, 1)
    expected = planted["smallest_detectable"]
    assert expected == pytest.approx(2.83 * spread / math.sqrt(n), rel=0.25)
    effect = (1.99 + 0.8416) * spread / math.sqrt(n)  # with the true spread
    found = 0
    for seed in range(400):
        values = draw.normal(effect, spread, n)
        c = statistics.compare(values, np.zeros(n), np.ones(n), list(range(n)), 2000, seed)
        found += not c["ci95"][0] <= 0 <= c["ci95"][1]
    assert 0.74 <= found / 400 <= 0.86


def test_three_pairs_without_a_difference_seldom_show_one():
    """Family-wise: of three comparisons under the null, any one shows in about 5 % of the cases at most."""
    draw, wrong = np.random.default_rng(9), 0
    for seed in range(300):
        models = draw.gamma(2, 1, (3, 60))
        found = [
            statistics.compare(models[i], models[j], np.ones(60), list(range(60)), 2000, seed)
            for i, j in ((0, 1), (0, 2), (1, 2))
        ]
        adjusted = statistics.holm([c["p_value"] for c in found])
        wrong += any(statistics.shows(c | {"p_value": p}) for c, p in zip(found, adjusted, strict=True))
    assert wrong / 300 <= 0.08


def test_a_long_general_text_is_cut_into_pieces_and_none_is_lost(tokenizer, monkeypatch):
    texts = ["One line.", "The river rose in the night, and 基金 fell. " * 60]
    found, sizes = scoring.pieces(tokenizer, texts, 50)
    ids = [tokenizer(text).input_ids for text in texts]
    assert found[0] == ids[0] and sum(found[1:], []) == ids[1]
    assert max(map(len, found)) == 50 and len(found) == 1 + -(-len(ids[1]) // 50) > 12
    assert sizes[0] == len(texts[0]) and sum(sizes[1:]) == len(texts[1].encode())
    monkeypatch.setattr(scoring, "GENERAL_PIECES", 5)
    few, sizes_ = scoring.pieces(tokenizer, texts, 50)
    step = -(-len(found) // 5)
    assert few == found[::step] and sizes_ == sizes[::step] and len(few) <= 5
    assert scoring.pieces(tokenizer, [""]) == ([], [])


def test_a_general_text_without_empty_lines_is_read_by_lines(tmp_path):
    path = tmp_path / "text.txt"
    for text, found in (("a\nb\n\nc\n \n\nd", ["a\nb", "c", "d"]), ("a\r\nb\n c \n", ["a", "b", "c"])):
        path.write_bytes(text.encode())
        assert general_text(str(path)) == found
