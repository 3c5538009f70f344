"""The demo data: every templated row is recomputed here, and every equation in any answer is evaluated."""

import ast
import importlib.util
import json
import operator
import re
import sys
from collections import Counter
from fractions import Fraction as F
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[1] / "configs" / "demo"
FILE = DEMO / "finance_qa.jsonl"


def _load():
    spec = importlib.util.spec_from_file_location("finance_templates", DEMO / "finance_templates.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


templates = _load()

# ---------------------------------------------------------------- the answers, recomputed from the questions

NUMBER = re.compile(r"(?:(?<=[\s(])-)?\$?\d+(?:,\d{3})*(?:\.\d+)?%?")
CENT, BASIS_POINT = F(1, 100), F(1, 10000)


def value(text: str) -> F:
    """ "$1,250.50" as 1250.5 and "6%" as 0.06, exactly."""
    plain = F(re.sub(r"[$,%]", "", text))
    return plain / 100 if text.endswith("%") else plain


def figures(text: str) -> list[F]:
    return [value(found) for found in NUMBER.findall(text)]


def grown(amount, rate, years):
    for _ in range(int(years)):
        amount += amount * rate
    return amount


def split_503020(*numbers):
    *rule, income = sorted(numbers)
    return (income / 2, income / 10 * 3, income / 5) if rule == [20, 30, 50] else None


# What names the question: (its figures, in order -> the answer's last ones, unit of rounding; None = exact).
# Where there are two ways to work something out, this is the one that the template does not take.
SUMS = {
    r"simple interest": (lambda p, r, t: p * r * t, None),
    r"compound": (grown, CENT),
    r"rule of 72": (lambda _, p, r: F(72) / (100 * r), None),
    r"How large is an emergency fund|in an emergency fund\?": (lambda c, m: c * m, None),
    r"emergency fund last|live on its emergency": (lambda fund, cost: fund / cost, None),
    r"savings rate": (lambda saved, income: saved / income, None),
    r"debt to income": (lambda *n: sum(n[:-1]) / n[-1], None),
    r"interest for one month|does one month cost": (lambda b, r: b * r / 12, None),
    r"credit card (?:balance of|at)": (lambda b, r, p: b + b * r - p, None),
    r"loan to value": (lambda m, v: m / v, None),
    r"50/30/20": (split_503020, None),
    r"Cash: .*Mortgage: ": (lambda c, s, h, m, d: c + s + h - m - d, None),
    r"sales tax": (lambda p, r: p + p * r, None),
    r"discount": (lambda p, r: p - p * r, None),
    r"exchange rate": (lambda a, x: a * x, None),
    r"real return": (lambda n, i: (n - i) / (1 + i), BASIS_POINT),
    r"percentage change": (lambda a, b: b / a - 1, None),
    r"face value": (lambda f, r: f * (r / 2), None),
    r"current yield": (lambda c, p: c / p, BASIS_POINT),
    r"dividend yield": (lambda p, d: d / p, None),
    r"P/E": (lambda p, e: p / e, None),
    r"earnings per share.*outstanding|its earnings per share": (lambda i, n: i / n, None),
    r"market capitalisation": (lambda n, p: n * p, None),
    r"expense ratio": (lambda a, r: a * r, None),
    r"Shares: weight": (lambda v, a, w, b: v * a + w * b if v + w == 1 else None, None),
    r"How much goes into each|What are the amounts": (
        lambda p, s, b: (p * s, p * b) if s + b == 1 else None,
        None,
    ),
    r"capital gain": (lambda n, a, b: n * b - n * a, None),
    r"a stop at": (lambda a, r, e, s: a * r / (e - s), None),
    r"purchasing power": (lambda p, t, r: p / grown(F(1), r, t), CENT),
    r"dollar-cost": (lambda a, *prices: len(prices) * a / sum(a / price for price in prices), CENT),
    r"mean return": (lambda *n: sum(n) / len(n), None),
    r"total return": (lambda a, b, d: (b + d) / a - 1, None),
    r"rental yield": (lambda p, m: 12 * m / p, None),
    r"break[- ]even": (lambda f, p, v: f / (p - v), None),
    r"gross margin": (lambda r, c: 1 - c / r, None),
    r"net margin": (lambda r, i: i / r, None),
    r"current ratio": (lambda a, d: a / d, None),
    r"quick ratio": (lambda a, i, d: (a - i) / d, None),
    r"debt to equity": (lambda d, e: d / e, None),
    r"return on equity": (lambda i, e: i / e, None),
    r"return on assets": (lambda i, a: i / a, None),
    r"depreciation": (lambda c, s, t: c / t - s / t, None),
    r"inventory turnover": (lambda c, i: c / i, None),
    r"days sales outstanding": (lambda a, s: 365 * a / s, None),
    r"working capital": (lambda a, d: a - d, None),
    r"accounting equation": (lambda a, d: a - d, None),
    r"cash conversion": (lambda i, r, p: i + r - p, None),
}


def asked(row: dict) -> str:
    return row["instruction"] + "\n" + row["input"]


def kinds(row: dict) -> list[str]:
    """The keys of SUMS whose pattern names this row's question."""
    return [key for key in SUMS if re.search(key, asked(row), re.DOTALL)]


def half_up(x: F, unit: F) -> F:
    return (x / unit + F(1, 2)).__floor__() * unit


def right(row: dict, kind: str) -> bool:
    """Whether the answer ends with the figures that its question's own figures give."""
    formula, unit = SUMS[kind]
    try:
        want = formula(*figures(asked(row)))
    except (TypeError, ZeroDivisionError):
        return False
    if want is None:
        return False
    want = want if isinstance(want, tuple) else (want,)
    if unit is not None:
        want = tuple(half_up(x, unit) for x in want)
        if {CENT: "to the cent", BASIS_POINT: "to two decimals"}[unit] not in row["output"]:
            return False
    equations = [sides[-1] for sides in find_equations(row["output"])]
    return want == tuple(figures(row["output"])[-len(want) :]) == tuple(value(side) for side in equations)


# ---------------------------------------------------------------- equations in any answer

SCALE = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
TOKEN = re.compile(
    r"(?P<number>[$£€]?\d+(?:,\d{3})*(?:\.\d+)?(?:%| percent\b| (?:thousand|million|billion|trillion)\b)?)"
    r"|(?P<about>about|approximately|roughly|around)\b"
    r"|(?P<unit>(?:shares?|units?|years?|months?|days?|weeks?|euros?|pounds?|dollars?)\b)"
    r"|(?P<op>\*\*|[-+*/^()−–×÷]|(?<![A-Za-z])x(?![A-Za-z]))"
    r"|(?P<equals>[=≈])"
    r"|(?P<other>\S)"
)
SIGNS = {"−": "-", "–": "-", "×": "*", "x": "*", "÷": "/", "^": "**"}
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def amount(text: str) -> F:
    """As `value`, and "$2 million" as 2000000."""
    head, _, word = text.partition(" ")
    scale = F(1, 100) if word == "percent" or head.endswith("%") else F(SCALE.get(word, 1))
    return F(re.sub(r"[$£€,%]", "", head)) * scale


def ulp(text: str) -> F:
    """The value of the last digit shown: "$1.50" gives 0.01, "6%" 0.01, "2 million" 1000000."""
    digits = re.search(r"\.(\d+)", text)
    one = "1" + text[text.index(" ") :] if " " in text else "1" + ("%" if text.endswith("%") else "")
    return amount(one) / 10 ** (len(digits[1]) if digits else 0)


def evaluate(tokens: list[str]):
    """The value of an arithmetic expression, or None where the tokens are not one."""
    code = " ".join(
        f"N({i})" if re.match(r"[$£€]?\d", token) else SIGNS.get(token, token)
        for i, token in enumerate(tokens)
    )

    def walk(node):
        match node:
            case ast.Call(func=ast.Name(id="N"), args=[ast.Constant(value=i)]):
                return amount(tokens[i])
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -walk(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                a, b = walk(left), walk(right)
                # a bare fraction as exponent (a yearly from a monthly rate) has no exact value
                if isinstance(op, ast.Pow) and (b.denominator != 1 or abs(b) > 1000):
                    return F(float(a) ** float(b))
                return OPERATORS[type(op)](a, b)
        raise SyntaxError(ast.dump(node))

    try:
        return walk(ast.parse(code, mode="eval").body)
    except (SyntaxError, ZeroDivisionError, OverflowError):
        return None


def trimmed(tokens: list[tuple[str, bool]], left: bool) -> list[str]:
    """The longest expression that ends (`left`: the left side of `=`) or begins (the right side) the tokens.

    `tokens` are (text, whether it touches the one before). An operator at the open end belongs to a word
    before it ("Revenue - $5 = ..."): then there is no expression here, and the result is empty.
    """
    texts = [text for text, _ in tokens]
    cuts = range(len(texts)) if left else range(len(texts), 0, -1)
    for cut in cuts:
        part = texts[cut:] if left else texts[:cut]
        if evaluate(part) is None:
            continue
        if left and cut and texts[cut - 1] not in "(" and not re.match(r"[$£€]?\d", texts[cut - 1]):
            return []
        # "Revenue - $5": a minus with a space after it, first of its run, is no sign
        if left and part[0] in "-−–" and len(part) > 1 and not tokens[cut + 1][1]:
            return []
        return part
    return []


def find_equations(text: str) -> list[tuple]:
    """All equations of `text`: (tokens of the left side, exact?, the right side as written)."""
    runs: list[list] = [[]]
    links: list[tuple[int, bool]] = []
    end = -1
    for found in TOKEN.finditer(text):
        kind, token = found.lastgroup, found.group()
        touches, end = found.start() == end, found.end()
        if kind in ("number", "op"):
            runs[-1].append((token, touches))
        elif kind == "equals":
            links.append((len(runs) - 1, token == "="))
            runs.append([])
        elif kind == "about" and links and links[-1][0] == len(runs) - 2 and not runs[-1]:
            links[-1] = (links[-1][0], False)
        elif kind == "unit" and runs[-1] and re.match(r"[$£€]?\d", runs[-1][-1][0]):
            continue
        else:
            runs.append([])
    equations = []
    for at, exact in links:
        left, right_side = trimmed(runs[at], True), trimmed(runs[at + 1], False)
        # "1 share = $40" states a price: an equation has something to work out, or a percentage to convert
        if left and right_side and (len(left) > 1 or len(right_side) > 1 or "%" in left[0] + right_side[0]):
            equations.append((left, exact, right_side, "".join(right_side)))
    return equations


def wrong_equations(text: str) -> list[str]:
    """The equations of `text` that do not hold to the precision shown (1 % where said to be approximate)."""
    wrong = []
    for left, exact, right_side, _ in find_equations(text):
        a, b = evaluate(left), evaluate(right_side)
        shown = [
            side[-1] for side in (left, right_side) if len(side) == 1 or len(side) == 2 and side[0] in "-−–"
        ]
        slack = max((ulp(number) / 2 for number in shown), default=F(1, 10**9))
        if not exact:
            slack = max(slack, abs(a) / 100)
        if abs(a - b) > slack:
            wrong.append(f"{' '.join(left)} = {' '.join(right_side)} (is {float(a):.6g})")
    return wrong


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Interest: $1,000 * 5% * 3 = $150.", 1),
        ("It grows to $1,000 * (1 + 5%)^3 = $1,157.63, to the cent.", 1),
        ("20 × 4 = 80 and 3 x 5 = 15", 2),
        ("A loss of (80 - 100) / 100 = -20% follows.", 1),
        ("(that is 30 / 200 = 15%)", 1),
        ("Equity = $50,000 - $20,000 = $30,000", 1),
        ("$50,000 - $20,000 = $30,000 = 3 * $10,000", 2),
        ("$300 / 12 months = $25 a month", 1),
        ("$10 million / 4 million shares = $2.50", 1),
        ("72 / 7 ≈ 10 years, or 72 / 7 = about 10.3", 2),
        ("In 2020 40 - 20 = 20", 1),
        ("6% = 0.06", 1),
        ("Revenue - $5 = $7, x = 3, 1 share = $40 and Assets = Liabilities + Equity", 0),
        ("$10 * 50 shares = $500", 1),
    ],
)
def test_the_finder_finds_equations_and_holds_true_ones(text, found):
    assert len(find_equations(text)) == found
    assert wrong_equations(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "$1,000 * 5% * 3 = $151.",
        "30 / 200 = 16%",
        "30 / 200 * 100 = 15%",
        "1,000 * 1.05^3 = 1,157.61",
        "2 * 3 = about 7",
    ],
)
def test_the_finder_reports_false_equations(text):
    assert len(wrong_equations(text)) == 1


# ---------------------------------------------------------------- the file


@pytest.fixture(scope="module")
def data() -> list[dict]:
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture(scope="module")
def made() -> list[dict]:
    return templates.rows(templates.ROWS, templates.SEED)


@pytest.fixture(scope="module")
def prose() -> list[str]:
    return templates.statements(3000, 1)


def by_hand(rows: list[dict]) -> list[dict]:
    return [row for row in rows if not any(each.made(row) for each in templates.TEMPLATES)]


def test_file_is_what_the_generator_writes(data, made):
    assert (templates.ROWS, templates.SEED) == (1000, 0)
    assert data[-1000:] == made
    assert by_hand(data) == data[:-1000]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in data]
    assert FILE.read_bytes() == "".join(lines).encode("utf-8")


def test_fields_and_counts(data):
    for row in data:
        assert list(row) == ["instruction", "input", "output"], row
        assert all(isinstance(text, str) and text == text.strip() for text in row.values()), row
        assert row["instruction"] and row["output"], row
    assert sum(bool(row["input"]) for row in data) >= 100
    assert max(Counter(asked(row) for row in data).values()) == 1
    assert max(Counter(row["output"] for row in data).values()) == 1


def test_enough_rows_by_hand(data):
    assert len(data) >= 1200
    assert len(by_hand(data)) >= 200


def test_every_templated_row_is_recomputed(data):
    templated = data[-1000:]
    seen = Counter()
    for row in templated:
        found = kinds(row)
        assert len(found) == 1, (found, row)
        assert right(row, found[0]), row
        seen[found[0]] += 1
    # every sum occurs, about equally often: nothing here is checked by an entry that never runs
    assert set(seen) == set(SUMS) and len(SUMS) == len(templates.TEMPLATES)
    assert max(seen.values()) - min(seen.values()) <= 1


def test_another_seed_is_right_too():
    rows = templates.rows(2000, 5)
    assert [row for row in rows if not right(row, kinds(row)[0])] == []
    assert [row["output"] for row in rows if wrong_equations(row["output"])] == []


def test_every_equation_holds(data):
    wrong = {row["instruction"]: bad for row in data if (bad := wrong_equations(row["output"]))}
    assert not wrong, "\n".join(f"{question}\n    {bad}" for question, bad in wrong.items())


def test_the_finder_misses_little(made):
    signs = sum(row["output"].count("=") for row in made)
    assert signs >= len(made)
    assert sum(len(find_equations(row["output"])) for row in made) >= 0.9 * signs


def test_answers_are_short_and_end_in_a_sentence(made):
    for row in made:
        assert 15 <= len(row["output"].split()) <= 60, row
        assert re.fullmatch(r"[A-Z][^\n]*: [^\n]* = [^\n]*\. [A-Z][^\n]*\.", row["output"]), row


def test_statements_share_nothing_with_the_rows(made, prose):
    assert len(set(prose)) == 3000
    texts = {text for row in made for text in (row["instruction"], row["output"])}
    texts |= {row["input"] for row in made if row["input"]}
    whole = "\n".join(prose)
    assert [text for text in texts if text in whole] == []
    # nor a sum: what a row asks has not been worked out before (but 72 is divided by nine rates only)
    sums = {" ".join(left) for row in made for left, *_ in find_equations(row["output"])}
    told = {" ".join(left) for text in prose for left, *_ in find_equations(text)}
    assert len(told) >= 800
    assert [shared for shared in sums & told if not shared.startswith("72 / ")] == []


def test_statements_are_prose_and_true(prose):
    for text in prose:
        assert (
            20 <= len(text.split()) <= 80 and "?" not in text and "\n" not in text and text.endswith(".")
        ), text
        assert wrong_equations(text) == [], text


def test_generator_is_deterministic_and_checks_its_supply():
    assert templates.rows(200, 3) == templates.rows(200, 3) != templates.rows(200, 4)
    assert templates.statements(200, 3) == templates.statements(200, 3) != templates.statements(200, 4)
    with pytest.raises(ValueError, match="too few distinct figures"):
        templates.rows(100_000, 0)


def other_digit(found: re.Match) -> str:
    """The number with another first digit."""
    return re.sub(r"[0-9]", lambda digit: str(int(digit[0]) % 9 + 1), found.group(), count=1)


def change(text: str, which: int) -> str:
    """`text` with its `which`-th number changed."""
    found = list(NUMBER.finditer(text))[which]
    return text[: found.start()] + other_digit(found) + text[found.end() :]


def test_a_changed_figure_is_noticed(made):
    for row in made[:300]:
        kind = kinds(row)[0]
        final = {**row, "output": change(row["output"], -1)}
        assert not right(final, kind), final
        key = "input" if row["input"] else "instruction"
        question = {**row, key: change(row[key], -1)}
        assert not right(question, kind), question
        # the right side of the first equation
        at = row["output"].index("= ")
        broken = row["output"][:at] + change(row["output"][at:], 0)
        assert wrong_equations(broken), broken


def test_main_keeps_the_rows_by_hand(tmp_path, monkeypatch, made, capsys):
    hand = [
        {"instruction": "What is a bond?", "input": "", "output": "A loan to its issuer – “fixed income”."},
        # a question like a template's, but with a table that no template writes
        {"instruction": "What is the current ratio of this company?", "input": "None.", "output": "Unknown."},
    ]
    path = tmp_path / "qa.jsonl"
    # rows from before a template was reworded: known by the other half
    reworded = [{**made[0], "instruction": "Old words", "input": ""}, {**made[1], "output": "Old words"}]
    monkeypatch.setattr(templates, "FILE", path)
    stale = templates.rows(10, 9) + reworded
    text = "\n".join(json.dumps(row) for row in stale[:5] + hand + stale[5:])
    path.write_text(text, encoding="utf-8")
    templates.main()
    first = path.read_bytes()
    assert [json.loads(line) for line in first.decode("utf-8").splitlines()] == hand + made
    assert "“fixed income”".encode() in first
    templates.main()
    assert path.read_bytes() == first
    assert "kept 2 hand-written rows" in capsys.readouterr().out
