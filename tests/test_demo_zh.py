"""The Chinese demo's texts: every sum is recomputed, no row is in what the base has read, no two are alike."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SCRIPTS, ok, run
from test_demo_data import evaluate

DEMO = Path(__file__).resolve().parents[1] / "configs" / "demo"
QUESTIONS = DEMO / "finance_qa_zh.jsonl"
EQUATION = re.compile(r"([(\d-][\d.%×÷+\-() ]*?) ([=≈]) (-?\d+(?:\.\d+)?%?)")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [json.loads(line) for line in QUESTIONS.read_text("utf-8").splitlines()]


def wrong(text: str) -> list[str]:
    """The equations of a text that do not hold: = is exact, ≈ is rounded to the digits shown."""
    found = []
    for left, sign, result in EQUATION.findall(text):
        difference = abs(evaluate(left.replace("×", "*").replace("÷", "/")) - evaluate(result))
        decimals = len(result.partition(".")[2].rstrip("%")) + 2 * result.endswith("%")
        if difference and (sign == "=" or difference > 0.5000001 * 10**-decimals):
            found.append(f"{left} {sign} {result}")
    return found


def test_the_rows(rows):
    assert len(rows) == 862
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    assert QUESTIONS.read_text("utf-8") == "".join(lines)
    for row in rows:
        assert list(row) == ["instruction", "input", "output"], row
        assert all(text == text.strip() for text in row.values()) and row["instruction"] and row["output"], row
        assert not re.search(r"<\||\[INST|###", "\n".join(row.values())), row
        assert re.search("[一-鿿]", row["instruction"]), row
    written = [row for row in rows if not EQUATION.search(row["output"])]
    assert len(written) == 351 and sum(bool(row["input"]) for row in written) == 38
    assert len({row["instruction"] + row["input"] for row in rows}) == len({row["output"] for row in rows}) == 862


def test_every_sum_holds_and_a_changed_digit_is_noticed(rows):
    worked = [row["output"] for row in rows if EQUATION.search(row["output"])]
    assert len(worked) == 511
    assert all(len(EQUATION.findall(text)) == len(re.findall("[=≈]", text)) for text in worked)
    assert [each for text in worked for each in wrong(text)] == []
    for text in worked:
        at = EQUATION.search(text).end(3) - 1 - (EQUATION.search(text)[3].endswith("%"))
        assert wrong(text[:at] + str((int(text[at]) + 5) % 10) + text[at + 1 :]), text


def test_no_two_questions_are_near_duplicates(rows, tiny, tmp_path):
    ok(run(SCRIPTS[0], "--preset", "demo_zh", "--model_name", tiny, "--dataset_name", QUESTIONS, cwd=tmp_path))
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text("utf-8"))
    assert manifest["rows"]["kept"] == manifest["groups"]["groups"] == 862
    assert manifest["rows"]["test"] >= 100


def test_the_base_has_read_no_row(rows):
    texts = (DEMO / "finance_texts_zh.txt").read_text("utf-8").strip().split("\n\n")
    prose = (DEMO / "finance_prose_zh.txt").read_text("utf-8").strip().split("\n\n")
    assert len(texts) == len(set(texts)) == 777 and len(prose) == len(set(prose)) == 60
    whole = "\n".join([*texts, *prose])
    asked = {f"{row['instruction']}\n{row['input']}".strip() for row in rows}
    assert [text for text in asked | {row["output"] for row in rows} if text in whole] == []
    sums = {left for row in rows for left, _, _ in EQUATION.findall(row["output"])}
    assert not sums & {left for text in texts for left, _, _ in EQUATION.findall(text)}
    assert [each for text in texts for each in wrong(text)] == []


def test_the_base_models_help_names_both_demos(tmp_path):
    command = [sys.executable, str(DEMO / "base_model.py"), "zh", "--x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "unknown argument '--x'" in done.stderr and "zh" in done.stderr
    assert not list(tmp_path.iterdir())
