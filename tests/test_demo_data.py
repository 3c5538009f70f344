"""The demo's texts: every figure of the worked answers is recomputed from their own text."""

import ast
import json
import operator
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[1] / "configs" / "demo"

# ---------------------------------------------------------------- the arithmetic

FIGURE = r"\$?\d+(?:,\d{3})*(?:\.\d+)?%?"  # $1,250.50 or 6%
# a calculation and its result; one with other signs is not found, so the tests compare the count with the equals signs
EQUATION = re.compile(rf"((?:[-(]|{FIGURE})(?:{FIGURE}|[-+*/^() ])*)= (-?{FIGURE})")
OPERATORS = {"Add": operator.add, "Sub": operator.sub, "Mult": operator.mul, "Div": operator.truediv, "Pow": pow}


def literal(figure: str) -> str:
    """A figure in Python's spelling: "$1,250.50" as "1250.50" and "6%" as "(6/100)"."""
    plain = re.sub(r"[$,%]", "", figure)
    return f"({plain}/100)" if figure.endswith("%") else plain


def evaluate(text: str) -> Fraction:
    """The exact value of a calculation such as "$500 * (1 + 5%)^2"; SyntaxError where the text is none."""

    def value(node: ast.AST) -> Fraction:
        match node:
            case ast.Constant():
                return Fraction(str(node.value))
            case ast.UnaryOp(op=ast.USub()):
                return -value(node.operand)
            case ast.BinOp():
                return OPERATORS[type(node.op).__name__](value(node.left), value(node.right))
        raise SyntaxError(f"{text!r} is not a calculation")

    python = re.sub(FIGURE, lambda figure: literal(figure[0]), text).replace("^", "**")
    return value(ast.parse(python.strip(), mode="eval").body)


def holds(calculation: str, result: str, rounded: bool) -> bool:
    """Whether the result is exact or, in a text that says that it rounds, rounded half up to the digits shown."""
    decimals = len(result.partition(".")[2].rstrip("%")) + (2 if result.endswith("%") else 0)
    half = Fraction(1, 2 * 10**decimals)
    difference = evaluate(calculation) - evaluate(result)
    return -half <= difference < half if rounded else difference == 0


def false_equations(text: str) -> list[str]:
    """The equations of a text that do not hold."""
    rounded = re.search(r"to the cent|to two decimals|rounded", text) is not None
    return [f"{left}= {right}" for left, right in EQUATION.findall(text) if not holds(left, right, rounded)]


def other_results(text: str) -> list[str]:
    """The text with one digit of one equation's result changed, for every such digit."""
    places = [at for each in EQUATION.finditer(text) for at in range(*each.span(2)) if text[at].isdigit()]
    return [text[:at] + str(int(text[at]) % 9 + 1) + text[at + 1 :] for at in places]


def figures(*texts: str) -> set[str]:
    """The figures of the texts without their signs: "50/30/20" in a question names the 50% of its answer."""
    return {figure.strip("$%") for text in texts for figure in re.findall(FIGURE, text)}


def from_nowhere(row: dict) -> set[str]:
    """The figures of an answer that neither its question names nor one of its equations gives."""
    results = [result for _, result in EQUATION.findall(row["output"])]
    constants = {"1", "2", "3", "12", "365"}  # 1 + a rate, halves and thirds, months and days in a year
    return figures(row["output"]) - figures(row["instruction"], row["input"], *results) - constants


@pytest.mark.parametrize(
    ("text", "equations", "wrong"),
    [
        ("The fund costs $56,000 * 0.15% = $84 and (20 - 25) / 25 = -20% is lost.", 2, 0),
        ("It is $1,000 * (1 + 5%)^3 = $1,157.63, to the cent.", 1, 0),
        ("It is $1,000 * (1 + 5%)^3 = $1,157.62, to the cent.", 1, 1),
        ("It is $1,000 * (1 + 5%)^3 = $1,157.63.", 1, 1),  # does not say that it is rounded
        ("It is 30 / 200 * 100 = 15%.", 1, 1),
        ("1 share = $40 and 2 * 3 = about 7, but x = 3.", 0, 0),
    ],
)
def test_the_arithmetic(text, equations, wrong):
    assert len(EQUATION.findall(text)) == equations
    assert len(false_equations(text)) == wrong


# ---------------------------------------------------------------- the questions


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [json.loads(line) for line in (DEMO / "finance_qa.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def worked(rows) -> list[dict]:
    """The rows whose answer shows a calculation."""
    return [row for row in rows if "=" in row["output"]]


def test_the_rows(rows):
    assert len(rows) == 1245
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    assert (DEMO / "finance_qa.jsonl").read_bytes() == "".join(lines).encode()
    for row in rows:
        assert list(row) == ["instruction", "input", "output"], row
        assert all(text == text.strip() for text in row.values()) and row["instruction"] and row["output"], row
        assert not re.search(r"<\||\[INST|###|\b(?:User|Assistant|Human):", "\n".join(row.values())), row
    assert sum(bool(row["input"]) for row in rows) >= 100
    assert len({row["instruction"] + row["input"] for row in rows}) == len({row["output"] for row in rows}) == 1245


def test_every_equation_of_the_answers_holds(worked):
    assert len(worked) == 1097
    # every equals sign belongs to an equation, so none is left out
    assert sum(len(EQUATION.findall(row["output"])) for row in worked) == 1281
    assert sum(row["output"].count("=") for row in worked) == 1281
    assert [wrong for row in worked for wrong in false_equations(row["output"])] == []


def test_a_changed_digit_of_a_result_is_noticed(worked):
    changed = [text for row in worked for text in other_results(row["output"])]
    assert len(changed) == 4179
    assert [text for text in changed if not false_equations(text)] == []


def test_the_figures_of_an_answer_come_from_its_question(worked):
    asked = [row for row in worked if figures(row["instruction"], row["input"])]
    assert len(asked) == 1044
    # 22 answers by the rule of 72 name the doubled sum, 21 longer ones bring in a figure of their own
    assert sum(bool(from_nowhere(row)) for row in asked) == 43
    # a question whose last figure is changed no longer goes with its answer
    known = [row for row in asked if not from_nowhere(row)]
    changed = [
        {**row, key: re.sub(r"[0-9](?=\D*$)", lambda digit: str(int(digit[0]) % 9 + 1), row[key])}
        for row in known
        for key in ["input" if row["input"] else "instruction"]
    ]
    assert sum(bool(from_nowhere(row)) for row in changed) >= 0.9 * len(known) > 900


# ---------------------------------------------------------------- the base model's texts


def test_the_base_model_has_read_no_row(rows, worked):
    texts = (DEMO / "finance_texts.txt").read_text("utf-8").strip().split("\n\n")
    assert len(texts) == len(set(texts)) == 3000 and all(text == text.strip() for text in texts)
    whole = "\n".join([*texts, (DEMO / "finance_prose.txt").read_text("utf-8")])
    for row in rows:
        assert f"{row['instruction']}\n{row['input']}".strip() not in whole, row
        assert row["output"] not in whole, row
    # what a row asks has not been worked out before, but for three sums and the nine that divide 72
    sums = {left.strip() for row in worked for left, _ in EQUATION.findall(row["output"])}
    told = {left.strip() for text in texts for left, _ in EQUATION.findall(text)}
    assert len(told) == 2050 and len({each for each in sums & told if not each.startswith("72 / ")}) == 3
    assert [wrong for text in texts for wrong in false_equations(text)] == []


@pytest.mark.parametrize(
    ("flag", "code", "text"),
    [("--help", 0, "under a minute"), ("-h", 0, "finance_texts.txt"), ("--x", 2, "error: unknown argument '--x'")],
)
def test_help_of_the_base_model_helps_without_training(flag, code, text, tmp_path):
    command = [sys.executable, "-X", "importtime", str(DEMO / "base_model.py"), flag]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and text in (done.stderr if code else done.stdout)
    assert "torch" not in done.stderr and not list(tmp_path.iterdir())
