"""The judge of step 4: what it says is counted right; one that misbehaves, or its server, changes nothing."""

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, ok, refused, run

from configs import chat, device, hub
from configs.evaluation import statistics
from configs.evaluation.candidates import HeldOut
from configs.evaluation.judge import RewardJudge, ServerJudge, bouts_of, judge_problems, judged
from configs.evaluation.report import load_words, sentence

PAIRS = [("lora", "base"), ("full", "base"), ("full", "lora")]


class Server:
    """An OpenAI-compatible server on loopback. behave(request, number of the request) returns the text of the answer,
    or (status, headers, body), or raises to drop the connection; all requests are kept."""

    def __init__(self, behave):
        self.requests, lock = [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with lock:
                    headers = {key.lower(): value for key, value in handler.headers.items()}
                    self.requests.append((handler.path, headers, body))
                    number = len(self.requests)
                try:
                    answer = behave(body, number)
                except ConnectionError:
                    handler.close_connection = True
                    return handler.connection.close()
                status, headers, data = answer if isinstance(answer, tuple) else (200, {}, reply(answer))
                handler.send_response(status)
                for key, value in ({"Content-Type": "application/json"} | headers).items():
                    handler.send_header(key, value)
                handler.send_header("Content-Length", str(len(data)))
                handler.end_headers()
                handler.wfile.write(data)

            def do_HEAD(handler):
                handler.send_response(404)
                handler.end_headers()

            def log_message(self, *_):
                pass

        class Many(ThreadingHTTPServer):
            request_queue_size = 64

        self.http = Many(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


def reply(text: str | None) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    whole = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return json.dumps(whole).encode()


def parts(body: dict) -> tuple[str, str, str]:
    """(question, answer A, answer B) of a request."""
    text = body["messages"][-1]["content"]
    return re.fullmatch(
        r"<question>\n(.*)\n</question>\n\n<answer_A>\n(.*)\n</answer_A>\n\n<answer_B>\n(.*)\n</answer_B>",
        text,
        re.DOTALL,
    ).groups()


def wise(body: dict, _: int = 0) -> str:
    """Knows which answer fits its question: the one that repeats the question's number more often."""
    question, a, b = parts(body)
    number = re.search(r"\d+", question)[0]
    a, b = (text.split().count(number) for text in (a, b))
    return f"I think so.\n[[{'A' if a > b else 'B' if b > a else 'C'}]]"


# Each with a letter of its own: questions that differ in their figures alone would be one observation.
PROMPTS = [
    {
        "id": f"{n}",
        "prompt": [{"role": "user", "content": f"What is {n} and {'abcdefghijklmnopqrstuvwx'[n]} ?"}],
        "reference": f"It is {n} , {n} .",
    }
    for n in range(24)
]


def opinion(judge, answers: dict[str, list[str]], prompts: list[dict] = PROMPTS) -> dict:
    settings = SimpleNamespace(JUDGE="test", RESAMPLES=2000, SEED=1)
    rows = [{"id": p["id"], "prompt": p["prompt"], "group": p["id"]} for p in prompts]
    return judged(settings, judge, HeldOut(rows, prompts), answers, PAIRS)


def good(times: int) -> list[str]:
    return [" ".join([str(n)] * times) or "no" for n in range(24)]


def ask(server: Server, tmp_path: Path, answers: dict | None = None) -> dict:
    judge = ServerJudge(server.url, "the-judge", tmp_path / "out" / "judge_verdicts.jsonl")
    return opinion(judge, answers or {"base": good(1), "lora": good(2), "full": good(3)})


def test_a_wise_judge_is_believed(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-7")
    with Server(wise) as server:
        found = ask(server, tmp_path)
    assert found["withheld"] is None
    assert (found["identical"]["n"], found["identical"]["ties"]) == (20, 20)
    assert found["shuffled"]["win_rate"] == 1 and found["shuffled"]["ci95"][0] > 0.8
    rates = {name: r["win_rate"] for name, r in found["against_reference"].items()}
    assert rates == {"base": 0, "lora": 0.5, "full": 1}
    between = {(r["a"], r["b"]): r["win_rate"] for r in found["between_models"]}
    assert between == {("lora", "base"): 1, ("full", "base"): 1, ("full", "lora"): 1}
    for r in (*found["against_reference"].values(), *found["between_models"]):
        assert r["consistent"] == 1 and r["missing"] == 0 and r["wins"] + r["ties"] + r["losses"] == r["n"] == 24
        assert r["first_slot"] in (0.5, None)  # nothing but ties has no slot
    # every pair in both orders: 20 controls, 24 shuffled, 3 + 3 pairs of 24
    assert len(server.requests) == 2 * (20 + 24 + 6 * 24)
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["authorization"] == "Bearer secret-7"
    assert body["model"] == "the-judge" and body["temperature"] == 0
    kept = (tmp_path / "out" / "judge_verdicts.jsonl").read_text("utf-8")
    assert "secret-7" not in kept and len(kept.splitlines()) == 376
    # nothing that was paid for is asked again
    with Server(lambda *_: (500, {}, b"")) as silent:
        judge = ServerJudge(silent.url, "the-judge", tmp_path / "out" / "judge_verdicts.jsonl")
        judge.name = f"{server.url}#the-judge"  # another address would be another judge
        again = opinion(judge, {"base": good(1), "lora": good(2), "full": good(3)})
        assert silent.requests == []
    assert json.dumps(again, default=list) == json.dumps(found, default=list)


def test_a_verdict_counts_only_in_both_orders():
    said = {("q0", "x", "y"): "first", ("q0", "y", "x"): "second"}  # x wins
    said |= {("q1", "x", "y"): "second", ("q1", "y", "x"): "first"}  # y wins
    said |= {("q2", "x", "y"): "first", ("q2", "y", "x"): "first"}  # the first one wins: a tie
    said |= {("q3", "x", "y"): "tie", ("q3", "y", "x"): "tie"}
    said |= {("q4", "x", "y"): "tie", ("q4", "y", "x"): "first"}  # disagree: a tie
    said |= {("q5", "x", "y"): "first", ("q5", "y", "x"): None}  # missing

    def judge(bouts):
        return [said[bout[1:]] for bout in bouts]

    questions = [f"q{n}" for n in range(6)]
    found = bouts_of(judge, "test", questions, ["x"] * 6, ["y"] * 6)
    assert found["outcomes"][:5].tolist() == [1, 0, 0.5, 0.5, 0.5] and np.isnan(found["outcomes"][5])
    assert found["missing"] == 1 and found["consistent"] == 3 / 5
    # decided verdicts of whole pairs: q0 first second, q1 second first, q2 first first, q4 first
    assert found["first_slot"] == 5 / 7


def first_slot(body: dict, _: int) -> str:
    return "[[A]]"


def a_dice(body: dict, number: int) -> str:
    return f"[[{random.Random(f'{number}').choice('ABC')}]]"


def unfaithful(body: dict, _: int) -> str:
    """Ties what is equal, and else prefers what is longer: it passes the first control only."""
    _, a, b = parts(body)
    return f"[[{'A' if len(a) > len(b) else 'B' if len(b) > len(a) else 'C'}]]"


@pytest.mark.parametrize(
    "behave, why",
    [
        (first_slot, "references do not beat"),
        (a_dice, "compared with themselves only"),
        (unfaithful, "references do not beat"),
        (lambda *_: "I like both. [[D]]", "too few verdicts"),
    ],
)
def test_a_judge_that_fails_its_controls_gives_no_verdict(tmp_path, behave, why):
    with Server(behave) as server:
        found = ask(server, tmp_path)
    for language, words in (("en", why), ("zh", "")):
        assert words in sentence(found["withheld"], load_words(language))
    assert found["against_reference"] == {} and found["between_models"] == []


def test_a_server_that_is_lost_after_the_controls_gives_no_verdict(tmp_path, quick):
    def lost(body, number):
        return wise(body) if number <= 2 * (20 + 24) else (500, {"Retry-After": "0.01"}, b"{}")

    with Server(lost) as server:
        found = ask(server, tmp_path)
    assert found["withheld"] == ("judge_missing", {"missing": 72, "n": 72})
    assert found["shuffled"]["win_rate"] == 1 and found["against_reference"] == {}


def test_one_that_looks_at_the_place_alone_decides_nothing(tmp_path):
    with Server(first_slot) as server:
        judge = ServerJudge(server.url, "m", tmp_path / "verdicts.jsonl")
        found = bouts_of(judge, "x", ["q"] * 5, list("abcde"), list("vwxyz"))
    assert found["outcomes"].tolist() == [0.5] * 5 and found["first_slot"] == 1 and found["consistent"] == 0


# --- servers that misbehave


@pytest.fixture
def quick(monkeypatch):
    """Waiting times of the client in hundredths: its policy stays as it is."""
    from openai import _base_client

    monkeypatch.setattr(_base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(_base_client, "MAX_RETRY_DELAY", 0.02)
    monkeypatch.setattr("configs.evaluation.judge.JUDGE_TIMEOUT_S", 0.5)


def two(server: Server, tmp_path: Path, n: int = 2) -> list:
    judge = ServerJudge(server.url, "m", tmp_path / "verdicts.jsonl")
    return judge([(str(k), f"What is {k} ?", f"It is {k} .", "It is not.") for k in range(n)])


def lines(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text("utf-8").splitlines()]


def test_429_and_500_are_asked_again(tmp_path, quick):
    def busy(body, number):
        if number <= 4:
            return (429 if number % 2 else 503), {"Retry-After": "0.01"}, b'{"error": {"message": "busy"}}'
        return wise(body)

    with Server(busy) as server:
        assert two(server, tmp_path) == ["first", "first"]
    assert len(server.requests) == 6


def test_a_server_that_is_always_busy_leaves_verdicts_missing_and_stops_being_asked(tmp_path, quick):
    with Server(lambda *_: (429, {"Retry-After": "0.01"}, b"{}")) as server:
        assert two(server, tmp_path, 60) == [None] * 60
        # five tries each, and no more once so many in a row have failed
        assert len(server.requests) < 5 * 40
    assert {line["verdict"] for line in lines(tmp_path)} == {None}
    assert all("RateLimitError" in line["reason"] for line in lines(tmp_path))
    # the missing ones are asked again in the next run; the others are not
    with Server(wise) as server:
        judge = ServerJudge(server.url, "m", tmp_path / "verdicts.jsonl")
        assert judge([("0", "What is 0 ?", "It is 0 .", "No.")]) == ["first"]


def test_a_server_that_hangs_is_left_after_its_time(tmp_path, quick, monkeypatch):
    monkeypatch.setattr("configs.evaluation.judge.JUDGE_TIMEOUT_S", 0.05)

    def hang(body, number):
        time.sleep(0.4)
        return "[[A]]"

    start = time.monotonic()
    with Server(hang) as server:
        assert two(server, tmp_path) == [None, None]
        assert len(server.requests) == 10 and time.monotonic() - start < 10
    assert all("APITimeoutError" in line["reason"] for line in lines(tmp_path))


def test_a_server_that_hangs_once_is_asked_again(tmp_path, quick):
    def hang(body, number):
        if number == 1:
            time.sleep(1)
        return wise(body)

    with Server(hang) as server:
        assert two(server, tmp_path, 1) == ["first"] and len(server.requests) == 2


NONSENSE = {
    "words": "Both are fine answers.",
    "empty": "",
    "null": (200, {}, reply(None)),
    "no choices": (200, {}, b'{"choices": []}'),
    "not json": (200, {}, b"<html>hello</html>"),
    "html": (200, {"Content-Type": "text/html"}, b"<html>hello</html>"),
    "a list": (200, {}, b"[1, 2]"),
    "wrong types": (200, {}, b'{"choices": {"0": 5}}'),
    "a marker in the question only": "The text says [[a]] and [C].",
}


@pytest.mark.parametrize("name", list(NONSENSE))
def test_nonsense_is_asked_for_once_more_and_then_missing(tmp_path, quick, name):
    with Server(lambda *_: NONSENSE[name]) as server:
        assert two(server, tmp_path, 1) == [None]
    assert len(server.requests) == 2
    (line,) = lines(tmp_path)
    assert line["verdict"] is None and line["reason"]


def test_nonsense_once_costs_nothing(tmp_path, quick):
    with Server(lambda body, number: "hm" if number == 1 else wise(body)) as server:
        assert two(server, tmp_path, 1) == ["first"]


def test_a_dropped_connection_is_asked_again(tmp_path, quick):
    def drop(body, number):
        if number == 1:
            raise ConnectionError
        return wise(body)

    with Server(drop) as server:
        assert two(server, tmp_path, 1) == ["first"]


def test_a_model_that_refuses_a_temperature_is_asked_without(tmp_path, quick):
    def strict(body, number):
        if "temperature" in body or "max_tokens" in body:
            return 400, {}, b'{"error": {"message": "Unsupported parameter: temperature"}}'
        return wise(body)

    with Server(strict) as server:
        assert two(server, tmp_path, 12) == ["first"] * 12
    assert len(server.requests) <= 12 + 8


def test_the_last_verdict_in_an_answer_counts(tmp_path):
    with Server(lambda *_: "[[A]] would be my first thought, but no:\n[[B]]") as server:
        assert two(server, tmp_path, 1) == ["second"]


def test_what_a_killed_run_left_is_read(tmp_path):
    with Server(wise) as server:
        judge = ServerJudge(server.url, "m", tmp_path / "verdicts.jsonl")
        bouts = [(str(k), f"What is {k} ?", f"It is {k} .", "No.") for k in range(6)]
        assert judge(bouts) == ["first"] * 6
        text = (tmp_path / "verdicts.jsonl").read_text("utf-8")
        (tmp_path / "verdicts.jsonl").write_text(text[: len(text) * 2 // 3], encoding="utf-8")  # cut in a line
        before = len(server.requests)
        again = ServerJudge(server.url, "m", tmp_path / "verdicts.jsonl")
        assert again(bouts) == ["first"] * 6
        assert 1 <= len(server.requests) - before <= 3


# --- rates


def test_win_rates_cover_and_their_length_is_taken_out():
    draw = np.random.default_rng(3)
    covered = adjusted = 0
    runs, n = 300, 100
    for run_ in range(runs):
        length = draw.normal(8, 20, n)
        x = np.tanh(length / length.std())
        p = 1 / (1 + np.exp(-(0.4 + 1.0 * x)))
        outcomes = (draw.random(n) < p).astype(float)
        found = statistics.win_rate(outcomes, length, list(range(n)), 2000, run_)
        true = np.mean(1 / (1 + np.exp(-(0.4 + np.tanh(draw.normal(8, 20, 40000) / 20)))))
        covered += found["ci95"][0] <= true <= found["ci95"][1]
        low, high = found["length_adjusted_ci95"]
        adjusted += low <= 1 / (1 + np.exp(-0.4)) <= high
    assert 0.92 <= covered / runs <= 0.98
    assert 0.92 <= adjusted / runs <= 0.98


def test_a_rate_without_length_is_the_plain_rate():
    outcomes = np.array([1, 1, 1, 0.5, 0, 0, 1, 1.0])
    found = statistics.win_rate(outcomes, np.zeros(8), list(range(8)), 2000, 1)
    assert found["win_rate"] == found["length_adjusted"] == outcomes.mean()
    assert found["length_adjusted_ci95"] == found["ci95"]
    assert (found["wins"], found["ties"], found["losses"], found["n"]) == (5, 1, 2, 8)


def test_longer_answers_that_win_by_length_alone_win_nothing():
    draw = np.random.default_rng(0)
    length = np.abs(draw.normal(30, 15, 400)) * np.where(draw.random(400) < 0.8, 1, -1)
    outcomes = (draw.random(400) < 1 / (1 + np.exp(-3 * np.tanh(length / length.std())))).astype(float)
    found = statistics.win_rate(outcomes, length, list(range(400)), 2000, 1)
    assert found["ci95"][0] > 0.55
    assert found["length_adjusted_ci95"][0] <= 0.5 <= found["length_adjusted_ci95"][1]


def test_ten_wins_of_ten_are_not_certainty():
    from scipy.stats import binomtest

    found = statistics.win_rate(np.ones(10), np.arange(10.0), list(range(10)), 2000, 1)
    exact = binomtest(10, 10).proportion_ci(0.95, "exact")
    assert found["win_rate"] == 1 and found["ci95"] == [exact.low, 1] and 0.6 < exact.low < 0.7
    ties = statistics.win_rate(np.full(10, 0.5), np.arange(10.0), list(range(10)), 2000, 1)
    assert ties["win_rate"] == 0.5 and ties["ci95"] == [0.5, 0.5]


def test_separable_outcomes_stay_finite():
    length = np.arange(-10.0, 10)
    found = statistics.win_rate((length > 0).astype(float), length, list(range(20)), 2000, 1)
    numbers = [found["length_adjusted"], *found["length_adjusted_ci95"]]
    assert all(0 < v < 1 for v in numbers) and numbers[1] <= numbers[0] <= numbers[2]


@pytest.mark.parametrize(
    "outcomes, length",
    [
        ([1] * 32 + [0] * 8, list(range(40, 80))),  # always longer: nobody knows how it would do at equal length
        ([1] * 36 + [0] * 4, list(range(-20, 20))),  # four losses tell nothing about a slope
        ([1.0] * 20, list(range(-10, 10))),
    ],
)
def test_where_the_data_cannot_tell_no_adjusted_rate_is_given(outcomes, length):
    values, lengths = np.array(outcomes, float), np.array(length, float)
    found = statistics.win_rate(values, lengths, list(range(len(values))), 2000, 1)
    assert found["length_adjusted"] is None and found["length_adjusted_ci95"] is None
    assert found["win_rate"] == values.mean()


def test_half_a_character_from_a_server_loses_nothing(tmp_path):
    (tmp_path / "verdicts.jsonl").write_bytes(b'\xff\xfe\n{"key": "x", "verdict": "maybe"}\n')
    body = reply("?").replace(b'"?"', b'"\\ud800 [[A]]"')
    with Server(lambda *_: (200, {}, body)) as server:
        assert two(server, tmp_path, 1) == ["first"]
    assert json.loads((tmp_path / "verdicts.jsonl").read_bytes().splitlines()[-1])["verdict"] == "first"


# --- in a run


def work(trained: Path, folder: Path) -> Path:
    import shutil

    return shutil.copytree(trained, folder / "work", ignore=shutil.ignore_patterns("checkpoint-*", "runs"))


def talking(folder: Path, tiny: Path) -> None:
    """Without its head's bias the full model says something; else it repeats a token without a text."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    weights = folder / "outputs/full_model/final_model/model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.bias"].zero_()[len(AutoTokenizer.from_pretrained(tiny)) :] = -1e4
    save_file(tensors, weights, metadata={"format": "pt"})


FLAGS = "--max_new_tokens 12 --resamples 2000".split()


@pytest.fixture(scope="module")
def judged_run(trained, tiny, tmp_path_factory) -> tuple[Path, str, list]:
    """(folder, output, requests) of a run with a judge that prefers, of two texts, the one that is not empty and fits
    the question (the references are known to it)."""
    folder = work(trained, tmp_path_factory.mktemp("judged"))
    talking(folder, tiny)
    prompts = json.loads((folder / "data/test_prompts.json").read_text("utf-8"))
    fits = {p["prompt"][-1]["content"]: p["reference"] for p in prompts}

    def judge(body, _):
        question, a, b = parts(body)
        a, b = (2 * (text == fits[question]) + bool(text.strip()) for text in (a, b))
        return f"[[{'A' if a > b else 'B' if b > a else 'C'}]]"

    with Server(judge) as server:
        flags = ["--model_name", tiny, *FLAGS, "--judge", f"openai:{server.url}#wise|<b>judge"]
        out = ok(run(SCRIPTS[3], *flags, cwd=folder))
    return folder, out, server.requests


def test_helpfulness_is_the_judges_where_one_was_asked(judged_run):
    folder, out, requests = judged_run
    results = json.loads((folder / "outputs/evaluation_results.json").read_text("utf-8"))
    judge = results["judge"]
    assert judge["withheld"] is None and set(judge["against_reference"]) == {"base", "lora", "full"}
    for name, model in results["models"].items():
        assert model["helpfulness"] == judge["against_reference"][name]["win_rate"]
    full = results["models"]["full"]
    assert full["helpfulness"] == 0 < full["well_formed"]
    assert "helpfulness (judged, win rate against the reference)" in out
    report = (folder / "outputs/evaluation_report.md").read_text("utf-8")
    assert "## Judge" in report and "not judged" not in report and "<b>judge" not in report
    assert r"wise\|&#60;b>judge" in report
    pairs = [(c["a"], c["b"], c["n"]) for c in results["comparisons"] if c["metric"] == "helpfulness"]
    assert pairs == [("lora", "base", 16), ("full", "base", 16), ("full", "lora", 16)]
    kept = (folder / "outputs/judge_verdicts.jsonl").read_text("utf-8").splitlines()
    assert len(kept) == len(requests) == 2 * (16 + 16 + 6 * 16)


@pytest.mark.slow
def test_a_judge_that_fails_leaves_helpfulness_empty(trained, tiny, tmp_path):
    folder = work(trained, tmp_path)
    with Server(first_slot) as server:
        flags = ["--model_name", tiny, *FLAGS, "--judge", f"openai:{server.url}#m", "--report_language", "zh"]
        out = ok(run(SCRIPTS[3], *flags, cwd=folder))
    results = json.loads((folder / "outputs/evaluation_results.json").read_text("utf-8"))
    assert results["judge"]["withheld"] and results["judge"]["against_reference"] == {}
    for model in results["models"].values():
        assert model["helpfulness"] is None and 0 <= model["well_formed"] <= 1
    assert [w for w in results["warnings"] if "failed a control" in w] and "没有通过对照" in out
    report = (folder / "outputs/evaluation_report.md").read_text("utf-8")
    assert "不采用评判的结论" in report and "| 有用性 | 未测量 | 未测量 | 未测量 |" in report


def test_a_judge_that_cannot_be_asked_is_refused_at_once(trained, tiny, tmp_path):
    folder = work(trained, tmp_path)
    judge = f"openai:http://127.0.0.1:{device.free_port()}/v1#m"
    refused(run(SCRIPTS[3], "--model_name", tiny, "--judge", judge, cwd=folder), "JUDGE", "does not answer")
    assert not (folder / "outputs/evaluation_results.json").exists()
    for judge, said in (
        ("gpt-4", "openai:<base_url>#<model>"),
        ("openai:http://127.0.0.1/v1", "openai:<base_url>#<model>"),
        ("openai:ftp://127.0.0.1/v1#m", "openai:<base_url>#<model>"),
        ("reward:", "reward:<model>"),
        ("reward:outputs/nowhere", "outputs/nowhere"),
    ):
        (found,) = judge_problems(judge)
        assert "JUDGE" in found and said in found
    assert judge_problems(None) == judge_problems(f"reward:{tiny}") == []


@pytest.fixture(scope="module")
def reward(tiny, tmp_path_factory) -> Path:
    from transformers import AutoTokenizer, PhiConfig, PhiForSequenceClassification

    folder = tmp_path_factory.mktemp("reward") / "model"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=tokenizer.eos_token_id,
    )
    PhiForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_model_judges_by_its_scores(reward):
    judge = RewardJudge(str(reward))
    texts = ["Bonds pay interest.", "No.", "Save first, then invest the rest in a fund."]
    bouts = [("x", "What are bonds?", a, b) for a in texts for b in texts]
    found = judge(bouts)
    back = judge([(name, q, b, a) for name, q, a, b in bouts])
    other = {"first": "second", "second": "first", "tie": "tie"}
    assert found == [other[v] for v in back]
    assert [v for (_, _, a, b), v in zip(bouts, found, strict=True) if a == b] == ["tie"] * 3
    assert found.count("tie") == 3
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(reward).eval()
    tokenizer = chat.load_tokenizer(str(reward), None, "auto")
    turns = [{"role": "user", "content": "What are bonds?"}, {"role": "assistant", "content": texts[0]}]
    text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip()
    ids = AutoTokenizer.from_pretrained(reward)(text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        score = model(ids.input_ids).logits[0, 0].item()
    assert judge.known["What are bonds?", texts[0]] == pytest.approx(score, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_a_reward_model_in_a_run(trained, tiny, reward, tmp_path):
    folder = work(trained, tmp_path)
    ok(run(SCRIPTS[3], "--model_name", tiny, *FLAGS, "--judge", f"reward:{reward}", cwd=folder))
    results = json.loads((folder / "outputs/evaluation_results.json").read_text("utf-8"))
    # its weights are random: it ties what is equal, and cannot tell a reference from another one
    assert results["judge"]["identical"]["ties"] == 16 and results["judge"]["withheld"][0] == "judge_shuffled"


@pytest.mark.slow
def test_a_real_server_with_a_tiny_model(trained, tiny, tmp_path):
    """`transformers serve` answers like any OpenAI-compatible server; a tiny model's verdicts are nonsense, so they
    are counted as missing."""
    folder = work(trained, tmp_path)
    talking(folder, tiny)
    port, model = device.free_port(), str(folder / "outputs/full_model/final_model")
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", model, "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with open(tmp_path / "log", "w+", encoding="utf-8") as log:
        server = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, env=os.environ)
        try:
            end = time.monotonic() + 120
            while hub.probe(f"http://127.0.0.1:{port}/v1") and time.monotonic() < end:
                assert server.poll() is None, (tmp_path / "log").read_text("utf-8")[-3000:]
                time.sleep(0.5)
            judge = ServerJudge(f"http://127.0.0.1:{port}/v1", model, tmp_path / "verdicts.jsonl")
            judge.extra["max_tokens"] = 8  # a tiny model does not end
            found = opinion(judge, {"base": good(1)[:5]}, PROMPTS[:5])
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
    assert found["withheld"][0] == "judge_missing" and found["identical"]["missing"] == 5
    # the server really answered: what it said is there, and it is no verdict
    kept = lines(tmp_path)
    assert len(kept) == 20 and all(line["verdict"] is None for line in kept)
    assert {line["reason"] for line in kept} == {"no verdict in the answer"}
    assert all(isinstance(line["said"], str) for line in kept) and any(line["said"] for line in kept)
