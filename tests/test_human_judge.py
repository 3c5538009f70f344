"""A person as the judge: what is shown and in which order, what is concluded from it, in a terminal and on a page."""

import http.client
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from string import Formatter
from types import SimpleNamespace

import numpy as np
import pexpect
import pytest
from chromium import tab
from conftest import ROOT, SCRIPTS, refused, run
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from talkers import make_talkers

from configs.evaluation import person, person_page
from configs.evaluation.candidates import HeldOut
from configs.evaluation.judge import judged as judged_by_any
from configs.evaluation.person import Session, Showing, plan
from configs.evaluation.phrases import JUDGING
from configs.evaluation.report import load_words, sentence
from configs.text import visible

PAIRS = [("lora", "base"), ("full", "base"), ("full", "lora")]
WORDS = JUDGING["en"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make(n: int, equal: int = 0) -> tuple[HeldOut, dict[str, list[str]]]:
    """n prompts, and answers of which full's are the best and base's the worst; of the first `equal` all are equal."""
    word = [f"{LETTERS[k % 26]}{LETTERS[k // 26]}" for k in range(n)]  # figures alone would be one observation
    prompts = [
        {"id": f"{k}", "prompt": [{"role": "user", "content": f"What is {w}?"}], "reference": f"{w} is best ****"}
        for k, w in enumerate(word)
    ]
    stars = {"base": "*", "lora": "**", "full": "***"}
    answers = {name: [f"{w} is {'*' if k < equal else of}" for k, w in enumerate(word)] for name, of in stars.items()}
    return HeldOut([{"id": p["id"], "prompt": p["prompt"]} for p in prompts], prompts), answers


def shown(held_out: HeldOut, answers: dict, seed: int = 1) -> list[Showing]:
    return plan(held_out.questions, held_out.references, answers, PAIRS, seed)


def wise(showing: Showing) -> str:
    """Prefers what fits the question and has more stars."""
    topic = showing.question.split()[2].rstrip("?")
    first, second = (text.count("*") * (topic in text) for text in (showing.first, showing.second))
    return "first" if first > second else "second" if second > first else "tie"


def judge(folder: Path, held_out: HeldOut, answers: dict, behave, most: int = 10**6, seed: int = 1):
    """(opinion, helpfulness) after a session in which behave(showing) was said of at most so many."""
    session = Session(shown(held_out, answers, seed), folder / "verdicts.jsonl")
    while session.current is not None and len(session.verdicts) < most:
        assert session.give(session.number, behave(session.current))
    settings = SimpleNamespace(JUDGE="human", RESAMPLES=2000, SEED=seed, REPORT_LANGUAGE="en")
    opinion = person.opinion_of(settings, session, held_out, answers, PAIRS)
    return opinion, person.helpfulness(opinion)


# --- what is shown


@given(st.integers(1, 60), st.integers(0, 3), st.integers(0, 10**6))
@hypothesis_settings(max_examples=40, deadline=None)
def test_each_pair_is_shown_once_on_a_random_side_and_controls_are_few(n, equal, seed):
    held_out, answers = make(n, min(equal, n))
    showings = shown(held_out, answers, seed)
    assert showings == shown(held_out, answers, seed)
    pairs = [one for one in showings if one.kind == "pair"]
    prompts = list(dict.fromkeys(one.prompt for one in pairs))
    assert len({(one.prompt, one.a, one.b) for one in pairs}) == len(pairs) and len(prompts) <= person.PROMPTS
    assert all(one.first != one.second for one in pairs)
    if n > 43:
        assert len(prompts) >= person.PROMPTS - 3
    # the pairs of a prompt stand together, so that its question is read once
    order = [one.prompt for one in pairs]
    assert order == sorted(order, key=prompts.index)
    for a, b in PAIRS:
        of_pair = [one for one in pairs if (one.a, one.b) == (a, b)]
        assert abs(2 * sum(one.swapped for one in of_pair) - len(of_pair)) <= 1 + 2 * equal
        for one in of_pair:
            texts = (answers[a][one.prompt], answers[b][one.prompt])
            assert (one.first, one.second) == (texts[::-1] if one.swapped else texts)
    for place, one in enumerate(showings):
        if one.kind == "again":
            (before,) = [k for k, other in enumerate(showings[:place]) if other.kind == "pair" and same(one, other)]
            assert showings[before].swapped != one.swapped and showings[before].first == one.second
            assert n < 9 or showings[place - 1].prompt != one.prompt
        if one.kind == "identical":
            assert one.first == one.second == held_out.references[one.prompt]
        if one.kind == "mismatched":
            own, other = (one.second, one.first) if one.swapped else (one.first, one.second)
            assert own == held_out.references[one.prompt] != other
    if n >= 10:  # they do not double the quarter of an hour
        assert len(showings) - len(pairs) <= 0.21 * max(len(pairs), 3 * min(n, 40))
        assert {"identical", "mismatched", "again"} <= {one.kind for one in showings}


def same(one: Showing, other: Showing) -> bool:
    return (one.prompt, one.a, one.b) == (other.prompt, other.a, other.b)


def test_forty_prompts_have_four_controls_of_each_kind_spread_over_the_session():
    held_out, answers = make(50)
    kinds = [one.kind for one in shown(held_out, answers)]
    counts = {kind: kinds.count(kind) for kind in ("pair", "identical", "mismatched", "again")}
    assert counts == {"pair": 120, "identical": 4, "mismatched": 4, "again": 8}
    half = kinds[: len(kinds) // 2]  # who stops early has passed his share of them
    assert half.count("identical") == half.count("mismatched") == 2 and half.count("again") in (3, 4)


def test_another_seed_shows_other_prompts_in_another_order():
    held_out, answers = make(50)
    one, other = (shown(held_out, answers, seed) for seed in (1, 2))
    assert {s.prompt for s in one} != {s.prompt for s in other}
    assert [s.prompt for s in one] != sorted(s.prompt for s in one)


# --- what is concluded


def test_a_wise_person_is_believed_and_has_the_statistics_of_any_judge(tmp_path):
    held_out, answers = make(50)
    opinion, helpful = judge(tmp_path, held_out, answers, wise)
    assert opinion["withheld"] is None and opinion["prompts"] == 40
    assert opinion["identical"] == {"n": 4, "ties": 4, "missing": 0} and opinion["shuffled"]["win_rate"] == 1
    assert opinion["again"] == {"n": 8, "agreed": 8}
    for rates in opinion["between_models"]:
        assert (rates["n"], rates["wins"], rates["missing"]) == (40, 40, 0) and rates["win_rate"] == 1
        assert rates["ci95"][0] > 0.9 and 0.3 <= rates["first_slot"] <= 0.7
    for name, rate in (("base", 0), ("lora", 0.5), ("full", 1)):
        values = helpful[name]
        assert np.isnan(values).sum() == 10 and np.nanmean(values) == rate
    settings = SimpleNamespace(JUDGE="test", RESAMPLES=2000, SEED=1)
    any_judge = judged_by_any(settings, lambda bouts: ["tie"] * len(bouts), held_out, answers, PAIRS)
    assert any_judge.keys() <= opinion.keys()
    assert any_judge["shuffled"].keys() <= opinion["shuffled"].keys() | {"length_adjusted", "length_adjusted_ci95"}
    assert {"a", "b", "win_rate", "ci95", "length_adjusted", "wins", "ties", "losses", "n", "consistent"} <= opinion[
        "between_models"
    ][0].keys()
    json.dumps({key: value for key, value in opinion.items() if key not in ("shuffled", "between_models")})


def dice(showing: Showing, count=iter(range(10**6))) -> str:  # noqa: B008 (one sequence for all)
    return ("first", "second", "tie", "second", "tie", "first", "first", "tie", "second")[next(count) * 7 % 9]


@pytest.mark.parametrize(
    "behave, note",
    [
        (lambda showing: "first", "judge_identical"),
        (lambda showing: "tie", "judge_shuffled"),
        (lambda showing: "skip", "judge_few"),
        (lambda showing: "tie" if showing.first == showing.second else "second", "judge_shuffled"),
        (dice, "judge_"),
    ],
)
def test_who_does_not_read_is_not_believed(tmp_path, behave, note):
    opinion, helpful = judge(tmp_path, *make(50), behave)
    assert opinion["withheld"] and opinion["withheld"][0].startswith(note), opinion["withheld"]
    assert opinion["between_models"] == [] and helpful == {}
    for language in ("en", "zh"):
        assert sentence(opinion["withheld"], load_words(language))


def test_one_slip_in_four_controls_is_forgiven_and_two_are_not(tmp_path):
    for slips, believed in ((1, True), (2, False)):
        left = [slips]

        def clumsy(showing: Showing, left=left) -> str:
            if showing.kind == "identical" and left[0]:
                left[0] -= 1
                return "first"
            return wise(showing)

        opinion, _ = judge(tmp_path / f"{slips}", *make(50), clumsy)
        assert (opinion["withheld"] is None) == believed


def test_who_stops_early_is_believed_after_ten_prompts_and_not_before(tmp_path):
    held_out, answers = make(50)
    showings = shown(held_out, answers)
    place = {}
    for n, one in enumerate(showings):
        place.setdefault(one.prompt, n) if one.kind == "pair" else None
    order = list(place)
    few, helpful = judge(tmp_path / "9", held_out, answers, wise, most=place[order[9]])
    assert few["withheld"] == ("judge_few", {"n": 9, "least": 10}) and helpful == {}
    enough, helpful = judge(tmp_path / "12", held_out, answers, wise, most=place[order[12]])
    assert enough["withheld"] is None and enough["prompts"] == 12
    assert {rates["n"] for rates in enough["between_models"]} == {12}
    assert (~np.isnan(helpful["full"])).sum() == 12 and set(np.flatnonzero(~np.isnan(helpful["full"]))) == set(
        order[:12]
    )


def test_equal_answers_are_ties_that_nobody_is_asked_for(tmp_path):
    held_out, answers = make(40, equal=10)
    opinion, helpful = judge(tmp_path, held_out, answers, wise)
    assert all(one.prompt >= 10 for one in shown(held_out, answers) if one.kind == "pair")
    for rates in opinion["between_models"]:
        assert (rates["wins"], rates["ties"], rates["n"]) == (30, 10, 40)
    assert np.all(helpful["base"][:10] == 0.5)
    # those that the person has not come to do not count yet
    half, _ = judge(tmp_path / "half", held_out, answers, wise, most=50)
    assert half["prompts"] < 25 and all(rates["ties"] < 10 for rates in half["between_models"])


def test_a_pair_that_is_judged_otherwise_the_second_time_is_a_tie(tmp_path):
    def fickle(showing: Showing) -> str:
        return {"first": "second", "second": "first"}[wise(showing)] if showing.kind == "again" else wise(showing)

    opinion, _ = judge(tmp_path, *make(40), fickle)
    assert opinion["again"] == {"n": 8, "agreed": 0} and sum(r["ties"] for r in opinion["between_models"]) == 8
    assert all(rates["wins"] + rates["ties"] == 40 for rates in opinion["between_models"])
    assert {rates["consistent"] for rates in opinion["between_models"]} <= {0, None}


def test_a_person_who_prefers_the_left_side_moves_no_win_rate(tmp_path):
    """Ties of one pair go to the left: each model stands there on half of the prompts."""

    def left(showing: Showing) -> str:
        return "first" if {showing.a, showing.b} == {"lora", "base"} and showing.kind == "pair" else wise(showing)

    opinion, _ = judge(tmp_path, *make(40), left)
    rates = opinion["between_models"][0]
    assert (rates["a"], rates["b"], rates["first_slot"] > 0.9) == ("lora", "base", True)
    assert abs(rates["win_rate"] - 0.5) < 0.1


def test_skipped_pairs_are_missing(tmp_path):
    def skips(showing: Showing) -> str:
        return "skip" if showing.kind == "pair" and showing.prompt % 2 and showing.a == "lora" else wise(showing)

    opinion, helpful = judge(tmp_path, *make(40), skips)
    assert opinion["withheld"] is None
    assert [rates["missing"] for rates in opinion["between_models"]] == [20, 0, 0]
    assert np.nanmean(helpful["base"]) == 0 and not np.isnan(helpful["base"]).any()


# --- the session and its file


def test_every_verdict_is_on_the_disk_at_once_and_a_second_start_goes_on(tmp_path):
    held_out, answers = make(12)
    showings, path = shown(held_out, answers), tmp_path / "out" / "v.jsonl"
    session = Session(showings, path)
    for n, verdict in enumerate(("first", "tie", "skip", "second")):
        assert session.number == n and session.give(n, verdict)
        assert len(path.read_text("utf-8").splitlines()) == n + 1
    assert not session.give(3, "first") and not session.give(9, "first")  # a key pressed twice; another page
    session.back()
    assert session.number == 3
    with path.open("a") as file:  # another judge's record, one of another evaluation, and a killed run's last line
        file.write('{"key": "a", "verdict": "first"}\n{"evaluation": "x", "number": 1, "verdict": "tie"}\n[1]\n')
        file.write('{"evaluation": "y", "number": 2, "verdict": "tie"}\n')
        file.write('{"evaluation": "y", "number": 2, "verdict": "back"}\n')
        file.write(path.read_text("utf-8").splitlines()[0][:40])
    again = Session(showings, path)
    assert again.verdicts == {0: "first", 1: "tie", 2: "skip"} and again.number == 3 and again.others == 1
    again.back()
    assert Session(showings, path).number == 2 and Session(showings, path).verdicts == {0: "first", 1: "tie"}


def test_a_changed_evaluation_begins_anew_and_says_so_and_the_old_one_is_kept(tmp_path, monkeypatch, capsys):
    held_out, answers = make(12)
    settings = SimpleNamespace(JUDGE="human", RESAMPLES=2000, SEED=1, REPORT_LANGUAGE="en")
    path, asked = tmp_path / "v.jsonl", []

    def talk(session: Session, words: dict, most: int = 7) -> None:
        asked.append(session.number)
        while session.number is not None and session.number < most:
            session.give(session.number, wise(session.current))

    monkeypatch.setattr(person, "judge_in_terminal", talk)
    person.judged(settings, held_out, answers, PAIRS, path)
    assert "7 verdicts" not in capsys.readouterr().out
    changed = answers | {"lora": [text + " !" for text in answers["lora"]]}
    opinion, _ = person.judged(settings, held_out, changed, PAIRS, path)
    said = capsys.readouterr().out
    assert f"note: 7 verdicts in {path} are about other answers and do not count; judging begins anew" in said
    assert opinion["withheld"][0] == "judge_few" and "--judge human" in said
    person.judged(settings, held_out, answers, PAIRS, path)
    assert "judging goes on: 7 of " in capsys.readouterr().out and asked == [0, 0, 7]
    monkeypatch.setattr(person, "judge_in_terminal", lambda session, words: talk(session, words, 10**6))
    opinion, helpful = person.judged(settings, held_out, answers, PAIRS, path)
    assert opinion["withheld"] is None and set(helpful) == {"base", "lora", "full"}
    capsys.readouterr()
    monkeypatch.setattr(person, "judge_in_terminal", lambda *_: pytest.fail("all was judged"))
    assert person.judged(settings, held_out, answers, PAIRS, path)[0]["withheld"] is None
    assert "note" not in capsys.readouterr().out


def test_both_languages_say_the_same_with_the_same_fields():
    en, zh = JUDGING["en"], JUDGING["zh"]
    assert list(en) == list(zh)
    files = ["person.py", "person_page.py", "person_terminal.py", "templates/judge_page.html"]
    source = "".join((ROOT / "configs/evaluation" / name).read_text("utf-8") for name in files)
    for key in en:
        fields = [sorted(name for _, name, _, _ in Formatter().parse(w[key]) if name) for w in (en, zh)]
        assert fields[0] == fields[1] and zh[key].strip(), key
        assert re.search(rf"\b{key}\b", source), f"nobody says {key}"


# --- in a terminal

DRIVER = """
import json, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from pathlib import Path
from test_human_judge import make, shown
from configs.evaluation.person import Session
from configs.evaluation.person_terminal import judge_in_terminal
from configs.evaluation.phrases import JUDGING
held_out, answers = make(4)
answers["lora"][:] = ["\\x1b]0;title\\x07 [red]lora[/red] ** " + text for text in answers["lora"]]
session = Session(shown(held_out, answers), Path("v.jsonl"))
judge_in_terminal(session, JUDGING[sys.argv[2]])
print("LEFT", session.number)
"""


def session_in_terminal(folder: Path, columns: int = 100, language: str = "en", term: str = "xterm-256color"):
    child = pexpect.spawn(
        sys.executable,
        ["-c", DRIVER, str(ROOT), language],
        cwd=str(folder),
        encoding="utf-8",
        timeout=60,
        dimensions=(40, columns),
        env=os.environ | {"TERM": term},
    )
    child.delaybeforesend = None
    return child


def test_one_key_a_verdict_in_the_terminal(tmp_path):
    child, words = session_in_terminal(tmp_path), WORDS
    child.expect_exact(words["keys"])
    first = child.before
    assert "1 of" in first and "lora" not in re.sub(r"\[red\]lora", "", first) and "full" not in first
    keys = [("1", "first"), ("2", "second"), ("t", "tie"), ("0", "tie"), ("s", "skip")]
    for key, _ in keys:
        child.send(key)
        child.expect_exact(words["keys"])
    for key in ("x", "\x1b[A"):  # a wrong key shows the pair again
        child.send(key)
        child.expect_exact(words["keys"])
        assert "6 of" in child.before
    child.send("b")
    child.expect_exact(words["keys"])
    assert "5 of" in child.before
    child.send("q")  # beside the 1
    child.expect_exact(words["sure"])
    child.send("1")
    child.expect_exact(words["keys"])
    assert "5 of" in child.before  # it was no verdict
    child.send("q")
    child.expect_exact(words["sure"])
    child.send("q")
    child.expect_exact("LEFT 4")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    records = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text("utf-8").splitlines()]
    assert [record["verdict"] for record in records] == [verdict for _, verdict in keys] + ["back"]
    # a second start goes on where the first one ended, and Ctrl-C keeps what was judged
    child = session_in_terminal(tmp_path)
    child.expect_exact(words["keys"])
    assert "5 of" in child.before
    child.send("t")
    child.expect_exact(words["keys"])
    child.sendintr()
    child.expect(pexpect.EOF)
    assert len((tmp_path / "v.jsonl").read_text("utf-8").splitlines()) == len(keys) + 2


@pytest.mark.parametrize("columns, language, term", [(40, "zh", "xterm-256color"), (100, "en", "dumb")])
def test_narrow_and_dumb_terminals_and_hostile_answers(tmp_path, columns, language, term):
    child = session_in_terminal(tmp_path, columns, language, term)
    words, seen = JUDGING[language], ""
    for _ in range(7):
        child.expect_exact(words["quit"])
        seen += child.before
        child.send("s")
    child.close(force=True)
    assert "\x1b]0" not in seen and r"\x1b]0;title\x07" in re.sub(r"\s", "", seen.replace("\r\n", ""))
    assert "[red]lora[/red]" in seen.replace("\r\n", "")
    assert ("┃" in seen) == (columns > 76)
    if term == "dumb":
        assert "\x1b" not in seen


def test_what_is_typed_before_a_pair_is_shown_does_not_count(tmp_path):
    child = session_in_terminal(tmp_path)
    child.send("111")  # while python starts
    child.expect_exact(WORDS["keys"])
    assert "1 of" in child.before and not (tmp_path / "v.jsonl").exists()
    child.close(force=True)


def test_without_a_terminal_the_page_is_named(tmp_path, tiny):
    words = ("--model_name", tiny, "--judge", "human", "--seed", "7")
    said = refused(run(SCRIPTS[3], *words, cwd=tmp_path), "JUDGE human reads keys from a terminal")
    assert "--seed 7 --judge human:page" in said[0] and "--judge human " not in said[0]


# --- the page


@pytest.fixture
def served(tmp_path):
    """A function that serves a session of these answers: (server, session)."""
    servers = []

    def serve(held_out: HeldOut | None = None, answers: dict | None = None, language: str = "en"):
        if held_out is None:
            held_out, answers = make(4)
        session = Session(shown(held_out, answers), tmp_path / "v.jsonl")
        server = person_page.Server(session, JUDGING[language])
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return server, session

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def request(server, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict, bytes]:
    """(status, headers, body) of one request; a header's _ stands for -."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, named)
    answer = connection.getresponse()
    found = answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()
    connection.close()
    return found


def test_nothing_is_answered_without_the_token_or_for_another_host(served):
    server, session = served()
    port, token = server.server_address[1], server.token
    assert server.server_address[0] == "127.0.0.1" and len(token) >= 30
    verdict = json.dumps({"number": 0, "verdict": "first"}).encode()
    ours = {"Content_Type": "application/json"}
    refusals = [
        request(server, "GET", "/"),
        request(server, "GET", "/state"),
        request(server, "GET", "//state"),
        request(server, "GET", "/wrong/state"),
        request(server, "GET", f"/{token[:-1]}/state"),
        request(server, "GET", f"/{token}x/state"),
        request(server, "GET", "/%C3%A9/state"),
        request(server, "POST", "/wrong/verdict", verdict, **ours),
        request(server, "GET", f"/{token}/", Host="evil.example"),
        request(server, "GET", f"/{token}/state", Host=f"evil.example:{port}"),
        request(server, "GET", f"/{token}/state", Host="127.0.0.1"),
        request(server, "POST", f"/{token}/verdict", verdict, Host=f"evil.example:{port}", **ours),
        request(server, "POST", f"/{token}/verdict", verdict, Origin="http://evil.example", **ours),
        request(server, "POST", f"/{token}/verdict", verdict, Origin="null", **ours),
        request(server, "POST", f"/{token}/verdict", verdict, Content_Type="text/plain"),
        request(server, "POST", f"/{token}/verdict", verdict, Content_Type="application/x-www-form-urlencoded"),
        request(server, "POST", f"/{token}/state", verdict, **ours),
        request(server, "GET", f"/{token}/../etc/passwd"),
        request(server, "POST", f"/{token}/verdict", verdict + b" " * 2000, **ours),
        request(server, "POST", f"/{token}/verdict", b"[" * 900, **ours),
        request(server, "POST", f"/{token}/verdict", b'{"number": 0, "verdict": "win"}', **ours),
        request(server, "POST", f"/{token}/verdict", b'{"number": "0", "verdict": "tie"}', **ours),
        request(server, "PUT", f"/{token}/verdict", verdict, **ours),
    ]
    assert all(400 <= status <= 501 for status, _, _ in refusals), [status for status, _, _ in refusals]
    assert all(token.encode() not in body and b"What is" not in body for _, _, body in refusals)
    assert session.verdicts == {} and not session.path.exists()
    status, headers, body = request(server, "GET", f"/{token}/state", Host=f"localhost:{port}")
    assert status == 200 and json.loads(body)["question"].startswith("What is")
    assert headers["cache-control"] == "no-store" and headers["referrer-policy"] == "no-referrer"
    # blind: no name of a model is ever sent
    state = json.loads(body)
    assert state.keys() == {"words", "number", "over", "count", "question", "answers"}
    state.pop("words")
    assert not re.search(r"lora|full|base|reference|again|identical|mismatched", json.dumps(state))
    status, headers, body = request(server, "GET", f"/{token}/")
    policy = headers["content-security-policy"]
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", policy)[1]
    assert status == 200 and policy.startswith("default-src 'none'") and "unsafe" not in policy
    assert body.count(f'nonce="{nonce}"'.encode()) == 2 and not re.search(rb"https?://", body)
    assert nonce not in request(server, "GET", f"/{token}/")[1]["content-security-policy"]


def test_a_verdict_counts_once_and_for_what_was_shown(served):
    server, session = served()
    path, ours = f"/{server.token}/verdict", {"Content_Type": "application/json"}
    for _ in range(3):  # pressed three times, or in three tabs
        status, _, body = request(server, "POST", path, b'{"number": 0, "verdict": "tie"}', **ours)
        assert status == 200 and json.loads(body)["number"] == 1
    assert session.verdicts == {0: "tie"}
    assert json.loads(request(server, "POST", path, b'{"number": 1, "verdict": "back"}', **ours)[2])["number"] == 0
    assert not server.over.is_set()
    assert json.loads(request(server, "POST", path, b'{"number": 1, "verdict": "quit"}', **ours)[2])["over"]
    assert server.over.wait(5)


def test_a_full_disk_ends_the_session_with_its_error(served, monkeypatch):
    server, session = served()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session, "_write", full)
    with pytest.raises((http.client.HTTPException, OSError)):
        request(
            server,
            "POST",
            f"/{server.token}/verdict",
            b'{"number": 0, "verdict": "tie"}',
            **{"Content_Type": "application/json"},
        )
    assert server.over.wait(5) and server.error.errno == 28


HOSTILE = [
    "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>",
    "</p></section><iframe src='javascript:parent.hacked=1'></iframe>",
    "<style>*{display:none}</style><meta http-equiv=refresh content='0;url=http://evil.example/'>",
    "x" * 3000,
    "\u202e right to left \u2066 \x00 \x1b[31m \ud800",
    "<a href='http://evil.example' id=verdicts>x</a>\n" * 40,
]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_hostile_answers_run_nothing_and_widen_nothing_in_chromium(served, tmp_path, language):
    held_out, answers = make(12)
    for n in range(12):
        for place, name in enumerate(answers):
            answers[name][n] = HOSTILE[(n + 2 * place) % 6] + name[:0] + f" {n} {place}"
    server, session = served(held_out, answers, language)
    with tab() as browser:
        for width, dark in ((390, True), (1280, False)):
            browser.open(server.address, width, dark=dark)
            browser.wait("!document.getElementById('pair').hidden")
            assert browser.run("document.documentElement.lang") == language
            for n in range(session.number, session.number + 9):
                browser.wait(f"state && state.number === {n}")
                assert browser.run("document.documentElement.scrollWidth") <= width
                texts = browser.run("[...document.querySelectorAll('.answer')].map((one) => one.textContent)")
                wanted = [session.current.first, session.current.second]
                assert [clean(text) for text in texts] == [clean(text) for text in wanted]
                assert browser.run("document.querySelectorAll('iframe, img, a, script').length") == 1
                assert browser.run(CONTRAST) >= 4.5
                browser.press("s")
        assert browser.run("window.hacked === undefined") and browser.run("location.href") == server.address
        complaints = [
            event for event in browser.events if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")
        ]
    assert complaints == [] and len(session.verdicts) == 18


def clean(text: str) -> str:
    """What JSON, HTML and Unicode may write otherwise: half characters, NUL."""
    return re.sub("[\ud800-\udfff\ufffd\x00]", "?", text)


# the least contrast (WCAG 2) of a text and what is behind it
CONTRAST = """(() => {
  const light = (color) => {
    const parts = color.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255)
      .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const behind = (element) => {
    const color = getComputedStyle(element).backgroundColor;
    return color === "rgba(0, 0, 0, 0)" && element.parentElement ? behind(element.parentElement) : color;
  };
  let least = 99;
  for (const element of document.querySelectorAll("h1, h2, p, span, button, kbd")) {
    if (!element.textContent || element.closest("[hidden]")) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(behind(element))];
    least = Math.min(least, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  return least;
})()"""


def test_keys_buttons_back_and_stop_in_chromium(served, tmp_path):
    server, session = served()
    with tab() as browser:
        browser.open(server.address)
        browser.wait("state && state.number === 0")
        for n, key in enumerate(("1", "2", "t", "0", "s"), 1):
            browser.press(key)
            browser.wait(f"state.number === {n} && !busy")
        browser.click("[data-verdict=first]")
        browser.wait("state.number === 6 && !busy")
        browser.press(" ")  # scrolls; it does not press the button once more
        browser.press("x")
        browser.press("b")
        browser.wait("state.number === 5 && !busy")
        browser.press("q")
        browser.wait("document.getElementById('said').textContent !== ''")
        browser.press("Escape")
        browser.wait("document.getElementById('said').hidden")
        browser.click("[data-verdict=quit]")
        assert not server.over.is_set()
        browser.click("[data-verdict=quit]")
        browser.wait("document.getElementById('pair').hidden")
        assert "Stopped" in browser.run("document.body.innerText") and server.over.wait(5)
        assert list(session.verdicts.values()) == ["first", "second", "tie", "tie", "skip"]
        # the address goes on working for who opens it again, but no verdict is taken any more
        browser.open(server.address)
        browser.wait("document.getElementById('pair').hidden && state")
        server.shutdown()


# --- whole evaluations


@pytest.fixture(scope="module")
def folder(tmp_path_factory, prepared) -> Path:
    """A working folder with prepared data and three models that answer differently."""
    import hashlib

    work = tmp_path_factory.mktemp("judged") / "work"
    shutil.copytree(prepared, work)
    make_talkers(work, hashlib.sha256((work / "data/manifest.json").read_bytes()).hexdigest())
    return work


def evaluation(*more: str) -> list[str]:
    usual = "--model_name model --max_new_tokens 12 --resamples 2000 --max_eval_samples 8".split()
    return [str(ROOT / SCRIPTS[3]), *usual, *more]


def references(folder: Path) -> dict[str, str]:
    """{question: reference}, squeezed."""
    prompts = json.loads((folder / "data/test_prompts.json").read_text("utf-8"))
    return {squeezed(p["prompt"][-1]["content"]): squeezed(p["reference"]) for p in prompts}


def squeezed(text: str) -> str:
    """What a person can tell of a text: its ASCII, without the white space that a terminal adds."""
    return re.sub(r"[^!-~]", "", visible(text))


def verdict_of(question: str, first: str, second: str, known: dict[str, str]) -> str:
    """1, 2 or t: the reference of the question, else the text that comes later in the alphabet."""
    first, second = squeezed(first), squeezed(second)
    own = known[squeezed(question)]
    if first == second:
        return "t"
    return "1" if first == own or (second != own and first > second) else "2"


def results_of(folder: Path) -> dict:
    return json.loads((folder / "outputs/evaluation_results.json").read_text("utf-8"))


@pytest.mark.slow
def test_a_whole_evaluation_judged_in_a_terminal_in_two_sittings(folder):
    known, words = references(folder), WORDS

    def sit(most: int) -> tuple[int, str]:
        child = pexpect.spawn(
            sys.executable,
            evaluation("--judge", "human"),
            cwd=str(folder),
            encoding="utf-8",
            timeout=240,
            dimensions=(60, 70),
            env=os.environ | {"TERM": "xterm-256color"},
        )
        child.delaybeforesend, said, count = None, "", 0
        while child.expect_exact([words["keys"], pexpect.EOF]) == 0:
            said += child.before
            screen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", child.before.replace("\r\n", "\n"))
            head, first, second = re.split(r"^[12] ─+$", screen.rstrip("─\n"), flags=re.MULTILINE)[-3:]
            question = head.rsplit(words["task"].split()[-1], 1)[-1]
            if count == most:
                child.send("q")
                child.expect_exact(words["sure"])
                child.send("q")
                continue
            child.send(verdict_of(question, first, second, known))
            count += 1
        child.close()
        assert child.exitstatus == 0, child.before
        return count, said + child.before

    count, said = sit(8)
    assert count == 8 and "not judged yet; go on with: python" in said and "--judge human" in said
    opinion = results_of(folder)["judge"]
    assert opinion["withheld"][0] == "judge_few" and opinion["judge"] == "human"
    rest, said = sit(10**6)
    assert "judging goes on: 8 of" in said and "not judged yet" not in said
    results = results_of(folder)
    opinion = results["judge"]
    assert opinion["withheld"] is None and opinion["prompts"] == min(len(known), 40)
    assert rest + 8 == len((folder / "outputs/judge_verdicts.jsonl").read_text("utf-8").splitlines())
    assert [(r["a"], r["b"]) for r in opinion["between_models"]] == PAIRS
    answers = [json.loads(line) for line in (folder / "outputs/evaluation_examples.jsonl").read_text().splitlines()]
    said_by = {(r["model"], r["id"]): squeezed(r["answer"]) for r in answers if "answer" in r}
    for rates in opinion["between_models"]:  # what was concluded is what was preferred
        ids = {key[1] for key in said_by}
        values = [
            0.5
            if said_by[rates["a"], i] == said_by[rates["b"], i]
            else said_by[rates["a"], i] > said_by[rates["b"], i]
            for i in ids
        ]
        assert math.isclose(rates["win_rate"], sum(values) / len(values)), rates
    helpful = {name: model["helpfulness"] for name, model in results["models"].items()}
    assert math.isclose(sum(helpful.values()), 1.5)
    report = (folder / "outputs/evaluation_report.md").read_text("utf-8")
    english = load_words("en")
    assert english["helpfulness_human"] in report and "A person saw the answers" in report
    assert english["read_judge_human"] in report and "in both orders" not in report


@pytest.mark.slow
def test_a_whole_evaluation_judged_in_chromium(folder, tmp_path):
    known = references(folder)
    work = tmp_path / "work"
    shutil.copytree(folder, work, ignore=shutil.ignore_patterns("evaluation*", "judge*", "plots"))
    with tab() as browser:  # skips first where there is none
        child = subprocess.Popen(
            [sys.executable, "-u", *evaluation("--judge", "human:page", "--report_language", "zh")],
            cwd=work,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        try:
            lines = iter(child.stdout.readline, "")
            address = next(found[0] for line in lines if (found := re.search(r"http://127\S+/", line)))
            browser.open(address, 390, dark=True)
            number = -1
            while browser.wait(f"state && !busy && (state.number !== {number} || state.over)"):
                shown_now = browser.run("state")
                if shown_now["over"]:
                    break
                number = shown_now["number"]
                browser.press(verdict_of(shown_now["question"], *shown_now["answers"], known))
            assert shown_now["over"] == JUDGING["zh"]["done"]
            rest = child.communicate(timeout=120)[0]
        finally:
            child.kill()
    assert child.returncode == 0, rest
    opinion = results_of(work)["judge"]
    assert opinion["withheld"] is None and opinion["judge"] == "human:page"
    assert "由人评判" in rest and "由人评判" in (work / "outputs/evaluation_report.md").read_text("utf-8")
