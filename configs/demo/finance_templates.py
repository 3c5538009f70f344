"""The templated part of the demo data: short finance sums, each with its calculation written out.

    python configs/demo/finance_templates.py     rewrites the templated rows of finance_qa.jsonl

A template is a text (R: the rule, Q: the question in two or three wordings, I: the optional `input`, A: the
calculation and its conclusion, S: a sentence for plain prose) and a function that draws its figures.
All arithmetic is in fractions, so that no figure is the rounding of a rounding.
"""

import json
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction as F
from functools import cached_property
from pathlib import Path

FILE = Path(__file__).with_name("finance_qa.jsonl")
ROWS, SEED = 1000, 0


@dataclass(frozen=True)
class Template:
    """One kind of sum: its texts (with `{fields}`) and `draw(rng)`, which gives every field's text."""

    name: str
    rule: str
    questions: list[str]
    table: str
    equation: str
    conclusion: str
    prose: list[str]
    draw: Callable[[random.Random], dict[str, str]]

    @cached_property
    def _shape(self) -> re.Pattern:
        shapes = "|".join(re.escape(question + "\n" + self.table) for question in self.questions)
        return re.compile(re.sub(r"\\{\w+\\}", r"\\S+", shapes))

    def made(self, row: dict) -> bool:
        """True where this template could have written the row's question (with its input) or its answer."""
        # either is enough: a row from before a template was reworded must not pass for a hand-written one
        question = row["instruction"] + "\n" + row.get("input", "")
        return bool(self._shape.fullmatch(question)) or row["output"].startswith(self.rule + ": ")


TEMPLATES: list[Template] = []


def template(text: str) -> Callable:
    """Register the decorated function as a template's `draw`; `text` holds the R, Q, I, A and S entries."""
    parts: dict[str, list[str]] = {key: [] for key in "RQIAS"}
    pieces = re.split(r"^\s*([RQIAS]): ", text, flags=re.MULTILINE)
    for key, body in zip(pieces[1::2], pieces[2::2], strict=True):
        parts[key].append(" ".join(body.split()))

    def register(draw: Callable) -> Callable:
        table = "\n".join(parts["I"]).replace(" | ", "\n")
        equation, conclusion = parts["A"][0].split(". ", 1)
        texts = (parts["R"][0], parts["Q"], table, equation, conclusion, parts["S"])
        TEMPLATES.append(Template(draw.__name__, *texts, draw))
        return draw

    return register


def num(value, places: int = 2) -> str:
    """1234.5 as "1,234.5": at most `places` decimals, half up, without trailing zeros."""
    value = F(value)
    exact = Decimal(value.numerator * 10**places) / Decimal(value.denominator)
    text = f"{exact.quantize(Decimal(1), ROUND_HALF_UP).scaleb(-places):,f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def usd(value) -> str:
    """1234 as "$1,234", 1234.5 as "$1,234.50": cents only where there are any."""
    text = num(value)
    return "$" + (text if "." not in text else text.ljust(text.index(".") + 3, "0"))


def pct(value) -> str:
    """6.25 as "6.25%": the value is already in percent."""
    return num(value) + "%"


def rows(n: int, seed: int, side: int = 0) -> list[dict]:
    """`n` Alpaca rows {instruction, input, output}, equally many (or one more) of every template, shuffled.

    No two rows of a template share their figures, so a held-out row is not a trained one in other words.
    side: 0 for the data set; 1 for rows whose figures never occur there, as those of `statements`.
    Raises ValueError where a template has too few distinct figures for `n`.
    """
    rng = random.Random(f"rows {seed}")
    made = [
        {
            "instruction": rng.choice(each.questions).format(**figures),
            "input": each.table.format(**figures),
            "output": f"{each.rule}: {each.equation}. {each.conclusion}".format(**figures),
        }
        for each, figures in _draws(n, rng, side)
    ]
    rng.shuffle(made)
    return made


def statements(n: int, seed: int) -> list[str]:
    """`n` distinct short paragraphs of plain prose (20 to 80 words) on the same rules, for pre-training.

    Their figures are never those of a row, whatever the two seeds. Raises ValueError as `rows` does.
    """
    rng = random.Random(f"statements {seed}")
    made = []
    for each, figures in _draws(n, rng, side=1):
        parts = [each.rule + ".", rng.choice(each.prose).format(**figures)]
        parts = parts if rng.random() < 0.5 else parts[::-1]
        # a third show the sum as well, or the base model would never have met `*` and `=`
        if rng.random() < 1 / 3:
            parts.append(f"In figures: {each.equation.format(**figures)}.")
        made.append(" ".join(parts))
    rng.shuffle(made)
    return made


def _draws(n: int, rng: random.Random, side: int):
    seen = set()
    for i in range(n):
        each = TEMPLATES[i % len(TEMPLATES)]
        for _ in range(2000):
            figures = each.draw(rng)
            key = each.name + repr(sorted(figures.items()))
            # a checksum says whose the figures are: rows and statements can never meet
            if zlib.crc32(key.encode()) % 2 == side and key not in seen:
                break
        else:
            raise ValueError(f"template {each.name} has too few distinct figures for n={n}")
        seen.add(key)
        yield each, figures


def main() -> None:
    """Rewrite FILE: the hand-written rows first, as they are, then `rows(ROWS, SEED)`."""
    lines = FILE.read_text(encoding="utf-8").split("\n") if FILE.exists() else []
    old = [json.loads(line) for line in lines if line.strip()]
    hand = [row for row in old if not any(each.made(row) for each in TEMPLATES)]
    hand = [{key: row.get(key, "") for key in ("instruction", "input", "output")} for row in hand]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in hand + rows(ROWS, SEED))
    FILE.write_text(text, encoding="utf-8", newline="\n")
    print(f"{FILE.name}: kept {len(hand)} hand-written rows, wrote {ROWS} templated rows")


# --- saving and borrowing


@template("""
    R: Simple interest is the principal times the yearly rate times the number of years
    Q: How much simple interest does {p} earn at {r} a year over {t} years?
    Q: What is the simple interest on {p} at {r} a year for {t} years?
    Q: I deposit {p} at {r} simple interest a year. How much interest have I earned after {t} years?
    A: {p} * {r} * {t} = {i}. The deposit earns {i} of interest.
    S: A saver who leaves {p} in an account paying {r} a year has been paid {i} after {t} years.
    S: Lending {p} at a simple rate of {r} for {t} years brings in {i}, for past interest earns nothing.""")
def simple_interest(rng):
    p, r, t = rng.randrange(500, 9001, 100), rng.randrange(2, 10), rng.randrange(2, 9)
    return {"p": usd(p), "r": pct(r), "t": num(t), "i": usd(F(p * r * t, 100))}


@template("""
    R: With compound interest the balance grows by the same rate every year
    Q: What does {p} grow to at {r} a year, compounded yearly, after {t} years?
    Q: I invest {p} at {r} compounded once a year. What is the balance after {t} years, to the cent?
    Q: Find the value of {p} at {r} compound interest, compounded yearly, for {t} years.
    A: {p} * (1 + {r})^{t} = {b}, to the cent. The balance after {t} years is {b}.
    S: A deposit of {p} at {r} reaches {b} after {t} years, since interest is paid on earlier interest too.
    S: Left alone for {t} years at {r}, a sum of {p} becomes {b} to the nearest cent.""")
def compound_interest(rng):
    p, r, t = rng.randrange(500, 9001, 100), rng.randrange(2, 10), rng.randrange(2, 6)
    return {"p": usd(p), "r": pct(r), "t": num(t), "b": usd(p * (1 + F(r, 100)) ** t)}


@template("""
    R: The rule of 72 divides 72 by the yearly return in percent to estimate the doubling time
    Q: By the rule of 72, how long does {p} take to double at {r} a year?
    Q: Use the rule of 72 to estimate when {p} has doubled at a return of {r} a year.
    A: 72 / {q} = {t}. At {r} a year, {p} grows to {d} in about {t} years.
    S: Money that earns {r} a year doubles in roughly {t} years, so {p} turns into {d} over that time.
    S: An investor with {p} and a yearly return of {r} can expect about {d} after some {t} years.""")
def rule_of_72(rng):
    p, r = rng.randrange(1000, 20001, 500), rng.choice((2, 3, 4, 5, 6, 8, 9, 10, 12))
    return {"p": usd(p), "d": usd(2 * p), "r": pct(r), "q": num(r), "t": num(F(72, r))}


@template("""
    R: An emergency fund is the monthly living costs times the number of months to cover
    Q: My living costs are {c} a month. How large is an emergency fund for {m} months?
    Q: How much do I need to cover living costs of {c} a month for {m} months in an emergency fund?
    A: {c} * {m} = {f}. You need {m} months of costs, which is {f}.
    S: A household that spends {c} a month and wants {m} months of safety keeps {f} where it is easy to reach.
    S: With costs of {c} a month, {f} in the bank pays the bills for {m} months without any income.""")
def emergency_fund(rng):
    c, m = rng.randrange(1200, 4501, 50), rng.randrange(3, 13)
    return {"c": usd(c), "m": num(m), "f": usd(c * m)}


@template("""
    R: The months covered are the savings divided by the monthly costs
    Q: How many months does an emergency fund last with these figures?
    Q: For how many months could this household live on its emergency fund?
    I: Emergency fund: {f} | Monthly costs: {c}
    A: {f} / {c} = {m}. Without any income, the fund lasts for {m} months.
    S: A fund of {f} against costs of {c} a month gives a family {m} months to find new work.
    S: Someone who has saved {f} and spends {c} a month can go without pay for {m} months.""")
def months_covered(rng):
    c, m = rng.randrange(1200, 4001, 100), F(rng.randrange(4, 25), 2)
    return {"c": usd(c), "m": num(m), "f": usd(c * m)}


@template("""
    R: The savings rate is the amount saved divided by the income
    Q: I save {s} of a monthly income of {i}. What is my savings rate?
    Q: What is the savings rate of a person who puts aside {s} a month and takes home {i}?
    A: {s} / {i} = {r}. The savings rate is {r}.
    S: Putting aside {s} from a pay cheque of {i} means that {r} of the income is kept for later.
    S: A worker who takes home {i} a month and saves {s} of it has a savings rate of {r}.""")
def savings_rate(rng):
    i, r = rng.randrange(2000, 8001, 100), rng.randrange(5, 41)
    return {"i": usd(i), "r": pct(r), "s": usd(F(i * r, 100))}


@template("""
    R: The debt to income ratio is the sum of the monthly debt payments divided by the gross monthly income
    Q: What is the debt to income ratio of this household?
    Q: Calculate the debt to income ratio from these monthly figures.
    I: Mortgage: {a} | Car loan: {b} | Credit card: {c} | Gross income: {i}
    A: ({a} + {b} + {c}) / {i} = {r}. Debt payments take {r} of the income.
    S: A borrower who earns {i} a month and pays {a}, {b} and {c} on three debts has a ratio of {r}.
    S: Lenders look at it closely: payments of {a}, {b} and {c} out of {i} a month use up {r}.""")
def debt_to_income(rng):
    i, r = rng.randrange(2500, 9001, 100), rng.randrange(20, 51)
    b, c = rng.randrange(100, 251, 10), rng.randrange(20, 101, 5)
    return {"i": usd(i), "r": pct(r), "b": usd(b), "c": usd(c), "a": usd(F(i * r, 100) - b - c)}


@template("""
    R: One month of interest on a loan is the balance times the yearly rate divided by 12
    Q: A loan has a balance of {b} at {r} a year. What is the interest for one month?
    Q: How much interest does one month cost on a loan balance of {b} at a yearly rate of {r}?
    A: {b} * {r} / 12 = {i}. The interest for the month is {i}.
    S: On a loan of {b} at {r}, {i} of the next payment is interest, and the rest pays back the debt.
    S: A borrower who owes {b} at a yearly rate of {r} is charged {i} for the month.""")
def loan_month(rng):
    k, r = rng.randrange(2, 41), F(rng.randrange(6, 25), 2)
    return {"b": usd(1200 * k), "r": pct(r), "i": usd(k * r)}


@template("""
    R: A card balance grows by the monthly rate and then falls by the payment
    Q: A credit card balance of {b} is charged {r} a month. What is owed after a payment of {p}?
    Q: I owe {b} on a credit card at {r} a month and then pay {p}. What is my new balance?
    A: {b} * (1 + {r}) - {p} = {n}. After interest and payment, the card balance is {n}.
    S: A card with {b} outstanding and a charge of {r} a month stands at {n} once {p} has been paid.
    S: Paying {p} on a debt of {b} leaves {n}, because {r} of interest is added first.""")
def card_month(rng):
    b, r = rng.randrange(800, 6001, 100), F(rng.choice((4, 5, 6, 7, 8)), 4)
    p = rng.randrange(50, 401, 10)
    return {"b": usd(b), "r": pct(r), "p": usd(p), "n": usd(b * (1 + r / 100) - p)}


@template("""
    R: Loan to value is the mortgage divided by the value of the home
    Q: What is the loan to value ratio of a mortgage of {m} on a home worth {v}?
    Q: I borrow {m} to buy a home valued at {v}. What is the loan to value ratio?
    A: {m} / {v} = {r}. The loan to value ratio is {r}.
    S: A buyer who borrows {m} for a home worth {v} has financed {r} of it with the loan.
    S: With a mortgage of {m} on a house valued at {v}, the bank has lent {r} of the price.""")
def loan_to_value(rng):
    v, r = rng.randrange(120, 601, 10), rng.randrange(40, 96)
    return {"v": usd(1000 * v), "r": pct(r), "m": usd(10 * v * r)}


# --- budget and household


@template("""
    R: The 50/30/20 rule gives half to needs, three tenths to wants and the rest to savings
    Q: How does the 50/30/20 rule split a monthly income of {i}?
    Q: I take home {i} a month. Make a budget with the 50/30/20 rule.
    A: {i} * 50% = {a}, {i} * 30% = {b} and {i} * 20% = {c}. Plan {a} for needs, {b} for wants and {c}
    for savings.
    S: From a monthly income of {i}, a household would spend {a} on needs, {b} on wants, and save {c}.
    S: Someone with {i} a month may spend {a} on rent and food and {b} on fun, which leaves {c}.""")
def budget(rng):
    i = rng.randrange(1500, 9001, 20)
    return {"i": usd(i), "a": usd(F(i, 2)), "b": usd(F(3 * i, 10)), "c": usd(F(i, 5))}


@template("""
    R: Net worth is everything owned minus everything owed
    Q: What is the net worth of this household?
    Q: Calculate the net worth from these figures.
    I: Cash: {c} | Investments: {s} | Home: {h} | Mortgage: {m} | Other debts: {d}
    A: ({c} + {s} + {h}) - ({m} + {d}) = {n}. The household has a net worth of {n}.
    S: A family with {c} in cash, {s} in funds, a home worth {h} and debts of {m} and {d} is worth {n}.
    S: Cash of {c}, investments of {s} and a house at {h}, less {m} and {d} of debt, come to {n}.""")
def net_worth(rng):
    c, s, d = rng.randrange(2, 31), rng.randrange(5, 91), rng.randrange(1, 16)
    h, m = rng.randrange(200, 501, 10), rng.randrange(50, 191, 10)
    sums = {"c": c, "s": s, "h": h, "m": m, "d": d, "n": c + s + h - m - d}
    return {key: usd(1000 * value) for key, value in sums.items()}


@template("""
    R: The price with sales tax is the price times one plus the tax rate
    Q: An item costs {p} before a sales tax of {r}. What is the total price?
    Q: What do I pay at the till for goods priced at {p} with a sales tax of {r}?
    A: {p} * (1 + {r}) = {t}. With the tax, the buyer pays {t}.
    S: Where the tax is {r}, a bill of {p} before tax comes to {t} at the till.
    S: A shop in a state with a tax of {r} charges {t} for goods marked at {p}.""")
def sales_tax(rng):
    p, r = rng.randrange(20, 1001, 20), F(rng.randrange(16, 42), 4)
    return {"p": usd(p), "r": pct(r), "t": usd(p * (1 + r / 100))}


@template("""
    R: The discounted price is the price times one minus the discount
    Q: An item is priced at {p}. What does it cost after a discount of {r}?
    Q: A product is marked at {p} and is reduced by a discount of {r}. What does it cost now?
    A: {p} * (1 - {r}) = {t}. After the discount, the item costs {t}.
    S: In a sale at {r} off, goods marked at {p} are sold for {t}.
    S: A shopper with a voucher for {r} pays {t} in place of the full price of {p} for the same goods.""")
def discount(rng):
    p, r = rng.randrange(20, 901, 5), rng.randrange(5, 61, 5)
    return {"p": usd(p), "r": pct(r), "t": usd(p * (1 - F(r, 100)))}


@template("""
    R: To convert into dollars, multiply the amount by the dollars paid for one unit
    Q: How many dollars are {a} {c} at an exchange rate of {x} dollars per {u}?
    Q: Convert {a} {c} into dollars at an exchange rate of {x} dollars per {u}.
    A: {a} * {x} = {d}. At this rate, {a} {c} are worth {d}.
    S: A traveller who changes {a} {c} at {x} dollars per {u} is handed {d} before any fee.
    S: When one {u} buys {x} dollars, an invoice for {a} {c} costs an American firm {d}.""")
def currency(rng):
    u, c, x = rng.choice((("euro", "euros", 110), ("pound", "pounds", 128), ("franc", "francs", 116)))
    a, x = rng.randrange(100, 5001, 50), F(x + rng.randrange(-6, 7), 100)
    return {"a": num(a), "c": c, "u": u, "x": num(x), "d": usd(a * x)}


# --- shares, bonds and funds


@template("""
    R: The real return is one plus the nominal return divided by one plus inflation, minus one
    Q: An investment returns {n} while inflation is {i}. What is the real return?
    Q: What is the real return, to two decimals, with a nominal return of {n} and inflation of {i}?
    A: (1 + {n}) / (1 + {i}) - 1 = {r}, to two decimals. Buying power grows by {r}.
    S: A fund that returns {n} in a year when prices rise by {i} makes its owner only {r} richer.
    S: With inflation at {i}, a nominal gain of {n} is worth about {r} in goods and services.""")
def real_return(rng):
    i = F(rng.randrange(4, 25), 4)
    n = i + F(rng.randrange(4, 33), 4)
    return {"n": pct(n), "i": pct(i), "r": pct(100 * ((1 + n / 100) / (1 + i / 100) - 1))}


@template("""
    R: The percentage change is the new price minus the old price, divided by the old price
    Q: A share price moves from {a} to {b}. What is the percentage change?
    Q: What is the percentage change of a stock that went from {a} to {b}?
    A: ({b} - {a}) / {a} = {c}. The price of the share changed by {c}.
    S: A share that opened the year at {a} and closed it at {b} shows a change of {c}.
    S: When a quote goes from {a} to {b}, its holders see a change of {c} on their money.""")
def percentage_change(rng):
    a, c = rng.randrange(20, 301, 5), rng.choice([x for x in range(-40, 61) if x])
    return {"a": usd(a), "b": usd(a * (1 + F(c, 100))), "c": pct(c)}


@template("""
    R: A half-yearly coupon is the face value times the coupon rate divided by 2
    Q: A bond has a face value of {f} and a coupon rate of {r}, paid twice a year. How large is each coupon?
    Q: What is the half-yearly coupon of a bond with face value {f} and coupon rate {r}?
    A: {f} * {r} / 2 = {c}. Every six months the bond pays {c}.
    S: The holder of a bond of {f} at {r} receives {c} every half year until it is repaid.
    S: An issuer who sells {f} of bonds at {r} must find {c} for the holders twice a year.""")
def coupon(rng):
    f, r = 1000 * rng.randrange(1, 31), F(rng.randrange(4, 33), 4)
    return {"f": usd(f), "r": pct(r), "c": usd(f * r / 200)}


@template("""
    R: The current yield is the yearly coupon divided by the market price of the bond
    Q: A bond pays {c} a year and trades at {p}. What is its current yield?
    Q: What is the current yield, to two decimals, of a bond with a yearly coupon of {c} and a price of {p}?
    A: {c} / {p} = {y}, to two decimals. The current yield is {y}.
    S: A buyer who pays {p} for a bond with {c} of interest a year earns about {y} on the money.
    S: At a market price of {p}, yearly coupons of {c} are worth {y}, and a lower price would mean more.""")
def current_yield(rng):
    c, p = rng.randrange(20, 81, 5), rng.randrange(850, 1101, 5)
    return {"c": usd(c), "p": usd(p), "y": pct(F(100 * c, p))}


@template("""
    R: The dividend yield is the yearly dividend divided by the share price
    Q: A share at {p} pays a yearly dividend of {d}. What is the dividend yield?
    Q: What is the dividend yield of a stock that trades at {p} and pays {d} a year?
    A: {d} / {p} = {y}. The dividend yield is {y}.
    S: A company whose shares cost {p} and pay {d} a year gives its owners an income of {y}.
    S: For every share bought at {p}, an investor collects {d} a year, which is {y} of the price.""")
def dividend_yield(rng):
    p, y = rng.randrange(20, 201, 2), F(rng.randrange(2, 15), 2)
    return {"p": usd(p), "y": pct(y), "d": usd(p * y / 100)}


@template("""
    R: The price-earnings ratio is the share price divided by the earnings per share
    Q: A share costs {p} and earns {e} per share. What is the P/E ratio?
    Q: What is the P/E ratio of a stock at {p} with earnings of {e} per share?
    A: {p} / {e} = {r}. Investors pay {r} times the yearly earnings.
    S: A stock at {p} with {e} of profit for each share trades at {r} times what it earns.
    S: Buyers who pay {p} for {e} of yearly profit value the company at a multiple of {r}.""")
def price_earnings(rng):
    e, r = F(rng.randrange(4, 33), 4), rng.randrange(8, 31)
    return {"p": usd(e * r), "e": usd(e), "r": num(r)}


@template("""
    R: Earnings per share are the net income divided by the number of shares
    Q: A company earns a net income of {i} and has {n} shares. What are its earnings per share?
    Q: What are the earnings per share with a net income of {i} and {n} shares outstanding?
    A: {i} / {n} = {e}. Each share earned {e}.
    S: A firm with {n} shares and a profit of {i} after tax made {e} for each of them.
    S: Spread over {n} shares, a net income of {i} leaves {e} for the owner of a single one.""")
def earnings_per_share(rng):
    n, e = 10000 * rng.randrange(5, 91), F(rng.randrange(2, 25), 4)
    return {"n": num(n), "i": usd(n * e), "e": usd(e)}


@template("""
    R: Market capitalisation is the number of shares times the share price
    Q: What is the market capitalisation of a company with {n} shares at {p} each?
    Q: A company has {n} shares outstanding at {p}. What is its market capitalisation?
    A: {n} * {p} = {m}. The market values the company at {m}.
    S: A firm with {n} shares that trade at {p} is valued by the stock market at {m}.
    S: To buy all {n} shares at today's price of {p}, an investor would have to pay {m}.""")
def market_cap(rng):
    n, p = 100000 * rng.randrange(2, 61), rng.randrange(5, 81)
    return {"n": num(n), "p": usd(p), "m": usd(n * p)}


@template("""
    R: The yearly cost of a fund is the amount invested times the expense ratio
    Q: I hold {a} in an ETF with an expense ratio of {r}. What does it cost me a year?
    Q: What is the yearly cost of {a} in an ETF whose expense ratio is {r}?
    A: {a} * {r} = {c}. The fund costs {c} a year.
    S: An investor with {a} in an index fund that charges {r} gives up {c} each year in fees.
    S: A charge of {r} sounds small, yet on savings of {a} it takes {c} every year.""")
def expense_ratio(rng):
    a, r = rng.randrange(5000, 60001, 1000), F(rng.choice((5, 10, 15, 20, 25, 40, 50, 75, 90)), 100)
    return {"a": usd(a), "r": pct(r), "c": usd(a * r / 100)}


@template("""
    R: A portfolio's return is the sum of each weight times its return
    Q: What is the return of this portfolio?
    Q: Calculate the portfolio return from the weights and returns below.
    I: Shares: weight {v}, return {a} | Bonds: weight {w}, return {b}
    A: {v} * {a} + {w} * {b} = {r}. The portfolio as a whole returns {r}.
    S: With {v} in shares that return {a} and {w} in bonds that return {b}, an investor earns {r}.
    S: A mix of {v} shares at {a} and {w} bonds at {b} gives {r} over the year.""")
def portfolio_return(rng):
    v, a, b = 10 * rng.randrange(2, 10), rng.randrange(5, 13), rng.randrange(1, 6)
    return {"v": pct(v), "w": pct(100 - v), "a": pct(a), "b": pct(b), "r": pct(F(v * a + (100 - v) * b, 100))}


@template("""
    R: Each asset gets its weight times the total amount
    Q: Split {p} into {s} shares and {b} bonds. How much goes into each?
    Q: I want to invest {p} with {s} in shares and {b} in bonds. What are the amounts?
    A: {p} * {s} = {x} and {p} * {b} = {y}. Put {x} into shares and the other part into bonds, which is {y}.
    S: A saver with {p} who wants {s} in shares buys {x} of them and {y} of bonds.
    S: Holding {s} shares and {b} bonds means that {p} is split into {x} and {y}.""")
def allocation(rng):
    p, s = rng.randrange(2000, 50001, 500), rng.randrange(20, 91, 5)
    x = F(p * s, 100)
    return {"p": usd(p), "s": pct(s), "b": pct(100 - s), "x": usd(x), "y": usd(p - x)}


@template("""
    R: A capital gain is the number of shares times the rise from the purchase price to the sale price
    Q: I bought {n} shares at {a} and sold them at {b}. What is my capital gain?
    Q: What is the capital gain on {n} shares bought at {a} and sold at {b}?
    A: {n} * ({b} - {a}) = {g}. The sale brings a capital gain of {g}.
    S: An investor who buys {n} shares at {a} and sells at {b} makes {g} before tax.
    S: Selling {n} shares for {b} that once cost {a} leaves {g} on which tax may be due.""")
def capital_gain(rng):
    n, a, d = rng.randrange(10, 301, 5), rng.randrange(10, 121), rng.randrange(2, 41)
    return {"n": num(n), "a": usd(a), "b": usd(a + d), "g": usd(n * d)}


@template("""
    R: The position size is the amount at risk divided by the distance to the stop
    Q: I have {a} and risk {r} on a trade with entry at {e} and a stop at {s}. How many shares do I buy?
    Q: With an account of {a}, a risk of {r}, an entry at {e} and a stop at {s}, what is the position size?
    A: {a} * {r} / ({e} - {s}) = {n}. The trader buys {n} shares.
    S: A trader with {a} who risks {r} and sets a stop at {s} below an entry of {e} buys {n} shares.
    S: If the price falls from {e} to {s}, holding {n} shares costs a trader {r} of {a}.""")
def position_size(rng):
    n, d, r = 5 * rng.randrange(2, 41), F(rng.choice((2, 4, 5, 8, 10)), 2), rng.choice((1, 2))
    # the shares never cost more than the account holds
    e = rng.randrange(20, int(min(120, 100 * d / r)) + 1)
    return {"a": usd(n * d * 100 / r), "r": pct(r), "e": usd(e), "s": usd(e - d), "n": num(n)}


@template("""
    R: Buying power is the amount divided by one plus inflation for every year
    Q: What is the purchasing power of {p} after {t} years of {r} inflation?
    Q: What will {p} buy in today's money, its purchasing power, after {t} years with inflation at {r}?
    A: {p} / (1 + {r})^{t} = {v}, to the cent. In today's money, the sum is worth {v}.
    S: Cash of {p} kept in a drawer for {t} years while prices rise by {r} a year buys only {v} of goods.
    S: After {t} years with inflation at {r}, it takes {p} to buy what {v} buys today.""")
def purchasing_power(rng):
    p, t, r = rng.randrange(1000, 20001, 500), rng.randrange(2, 11), rng.randrange(2, 8)
    return {"p": usd(p), "t": num(t), "r": pct(r), "v": usd(p / (1 + F(r, 100)) ** t)}


@template("""
    R: The mean price is the total spent divided by the number of shares bought
    Q: What is the mean price per share of this dollar-cost averaging plan?
    Q: Find the mean price that dollar-cost averaging paid here, to the cent.
    I: Amount each month: {a} | January price: {x} | February price: {y} | March price: {z}
    A: 3 * {a} / ({a} / {x} + {a} / {y} + {a} / {z}) = {m}, to the cent. The mean price paid is {m}.
    S: Someone who invests {a} a month at prices of {x}, {y} and {z} has paid {m} a share on average.
    S: Monthly purchases of {a} at {x}, {y} and {z} cost {m} a share, as low prices buy more shares.""")
def dollar_cost_averaging(rng):
    a = rng.choice((240, 300, 360, 480, 600, 720, 840, 900))
    x, y, z = rng.sample([price for price in range(10, 61) if a % price == 0], 3)
    return {"a": usd(a), "x": usd(x), "y": usd(y), "z": usd(z), "m": usd(3 / (F(1, x) + F(1, y) + F(1, z)))}


@template("""
    R: The mean return is the sum of the yearly returns divided by the number of years
    Q: A fund returned {x}, {y} and {z} in three years. What is its mean return?
    Q: What is the mean return of a fund with yearly returns of {x}, {y} and {z}?
    A: ({e}) / 3 = {m}. The mean return over the years is {m}.
    S: A fund that earned {x}, {y} and {z} in turn shows a mean of {m}.
    S: Returns of {x}, {y} and {z} differ from year to year, but their mean is {m}.""")
def mean_return(rng):
    m, u, w = rng.randrange(3, 10), rng.randrange(-12, 10), rng.randrange(-6, 7)
    x, y, z = pct(m + u), pct(m + w), pct(m - u - w)
    return {"x": x, "y": y, "z": z, "m": pct(m), "e": f"{x} + {y} + {z}".replace("+ -", "- ")}


@template("""
    R: The total return is the price gain plus the dividend, divided by the purchase price
    Q: I bought a share at {a}, sold it at {b} and got a dividend of {d}. What was my total return?
    Q: What is the total return on a share bought at {a}, sold at {b}, with {d} of dividends?
    A: ({b} - {a} + {d}) / {a} = {r}. The total return is {r}.
    S: A share that rises from {a} to {b} and pays {d} on the way has earned its owner {r}.
    S: Counting {d} of dividends, a move from {a} to {b} is worth {r} to the holder.""")
def total_return(rng):
    a, r, d = rng.randrange(40, 201, 10), rng.randrange(6, 41), F(rng.randrange(2, 5), 2)
    return {"a": usd(a), "d": usd(d), "r": pct(r), "b": usd(a * (1 + F(r, 100)) - d)}


@template("""
    R: The gross rental yield is twelve months of rent divided by the price of the property
    Q: A flat costs {p} and rents for {m} a month. What is the gross rental yield?
    Q: What is the gross rental yield of a property bought for {p} and let at {m} a month?
    A: {m} * 12 / {p} = {y}. The gross rental yield is {y}.
    S: A landlord who pays {p} for a flat and lets it for {m} a month earns {y} a year before costs.
    S: Rent of {m} a month on a house that cost {p} comes to {y} a year, repairs and tax not counted.""")
def rental_yield(rng):
    k, y = rng.randrange(5, 21), F(rng.randrange(6, 21), 2)
    return {"p": usd(24000 * k), "m": usd(20 * k * y), "y": pct(y)}


# --- the company's books


@template("""
    R: Break-even units are the fixed costs divided by the price minus the variable cost of a unit
    Q: Fixed costs are {f}, the price is {p} and the variable cost is {v}. What is the break-even point?
    Q: How many units must a firm with fixed costs of {f}, a price of {p} and variable costs of {v} sell to
    break even?
    A: {f} / ({p} - {v}) = {u}. The firm covers its costs when it sells {u} units.
    S: A workshop with fixed costs of {f} that sells at {p} and spends {v} on each piece needs {u} sales.
    S: Selling at {p} what costs {v} to make, a firm pays off {f} of fixed costs with {u} units.""")
def break_even(rng):
    u, m, v = 10 * rng.randrange(5, 91), rng.randrange(2, 31), rng.randrange(3, 41)
    return {"f": usd(u * m), "p": usd(v + m), "v": usd(v), "u": num(u)}


@template("""
    R: The gross margin is revenue minus cost of goods sold, divided by revenue
    Q: What is the gross margin of this company?
    Q: Calculate the gross margin from these figures.
    I: Revenue: {r} | Cost of goods sold: {c}
    A: ({r} - {c}) / {r} = {m}. The company keeps a gross margin of {m}.
    S: A shop with sales of {r} whose goods cost it {c} works on a margin of {m}.
    S: When {c} of a revenue of {r} goes to suppliers, {m} is left to pay for everything else.""")
def gross_margin(rng):
    r, m = 1000 * rng.randrange(20, 501, 5), rng.randrange(15, 71)
    return {"r": usd(r), "m": pct(m), "c": usd(r * (1 - F(m, 100)))}


@template("""
    R: The net margin is net income divided by revenue
    Q: What is the net margin of this company?
    Q: Calculate the net margin from these figures.
    I: Revenue: {r} | Net income: {i}
    A: {i} / {r} = {m}. Of all its revenue, the company keeps {m}.
    S: A firm that sells for {r} and has {i} left after all costs and taxes keeps {m} of its sales.
    S: With {i} of profit on {r} of revenue, each sale leaves {m} for the owners.""")
def net_margin(rng):
    r, m = 1000 * rng.randrange(20, 501, 5), F(rng.randrange(4, 51), 2)
    return {"r": usd(r), "m": pct(m), "i": usd(r * m / 100)}


@template("""
    R: The current ratio is current assets divided by current liabilities
    Q: What is the current ratio of this company?
    Q: Calculate the current ratio from the balance sheet.
    I: Current assets: {a} | Current liabilities: {d}
    A: {a} / {d} = {r}. Current assets are {r} times the debts due within a year.
    S: A company with {a} in current assets and {d} of bills due within a year has a ratio of {r}.
    S: Bankers see {a} against {d} of short-term debt and read off a cover of {r}.""")
def current_ratio(rng):
    d, r = 1000 * rng.randrange(20, 201, 5), F(rng.choice([x for x in range(8, 31) if x != 10]), 10)
    return {"d": usd(d), "r": num(r), "a": usd(d * r)}


@template("""
    R: The quick ratio is current assets minus inventory, divided by current liabilities
    Q: What is the quick ratio of this company?
    Q: Calculate the quick ratio from the balance sheet.
    I: Current assets: {a} | Inventory: {i} | Current liabilities: {d}
    A: ({a} - {i}) / {d} = {r}. Without its inventory, the company can pay {r} times its short-term debts.
    S: Of current assets of {a}, {i} is stock, so against debts of {d} the ratio is {r}.
    S: Leaving out {i} of goods from {a} and comparing with {d} of bills gives a ratio of {r}.""")
def quick_ratio(rng):
    d, i = 1000 * rng.randrange(20, 201, 5), 1000 * rng.randrange(5, 61, 5)
    r = F(rng.choice([x for x in range(5, 21) if x != 10]), 10)
    return {"d": usd(d), "i": usd(i), "r": num(r), "a": usd(d * r + i)}


@template("""
    R: Debt to equity is total debt divided by shareholders' equity
    Q: What is the debt to equity ratio of this company?
    Q: Calculate the debt to equity ratio from the balance sheet.
    I: Total debt: {d} | Equity: {e}
    A: {d} / {e} = {r}. What the company owes is {r} times its equity.
    S: A firm financed with {d} of loans and {e} of its owners' money has a ratio of {r}.
    S: Owing {d} on {e} of equity means a ratio of {r}, and a higher one would mean more risk.""")
def debt_to_equity(rng):
    e, r = 1000 * rng.randrange(50, 501, 10), F(rng.choice([x for x in range(2, 26) if x != 10]), 10)
    return {"d": usd(e * r), "e": usd(e), "r": num(r)}


@template("""
    R: Return on equity is net income divided by shareholders' equity
    Q: What is the return on equity of this company?
    Q: Calculate the return on equity from these figures.
    I: Net income: {i} | Equity: {e}
    A: {i} / {e} = {r}. The company earned {r} on its owners' money.
    S: A company that makes {i} with {e} of its owners' capital has earned {r} for them.
    S: Shareholders who put {e} into a business that makes {i} a year see a return of {r}.""")
def return_on_equity(rng):
    e, r = 1000 * rng.randrange(50, 501, 10), F(rng.randrange(6, 61), 2)
    return {"e": usd(e), "r": pct(r), "i": usd(e * r / 100)}


@template("""
    R: Return on assets is net income divided by total assets
    Q: What is the return on assets of this company?
    Q: Calculate the return on assets from these figures.
    I: Net income: {i} | Total assets: {a}
    A: {i} / {a} = {r}. The assets earned {r} in the year.
    S: A factory with {a} of assets and a yearly profit of {i} earns {r} on all that it uses.
    S: Making {i} with machines, stock and cash worth {a} is a return of {r} on the whole.""")
def return_on_assets(rng):
    a, r = 1000 * rng.randrange(100, 901, 20), F(rng.randrange(4, 37), 2)
    return {"a": usd(a), "r": pct(r), "i": usd(a * r / 100)}


@template("""
    R: Straight-line depreciation is the cost minus the salvage value, divided by the years of use
    Q: A machine costs {c}, has a salvage value of {s} and is used for {t} years.
    What is the yearly depreciation?
    Q: Find the straight-line depreciation of a machine with cost {c}, salvage value {s} and {t} years of use.
    A: ({c} - {s}) / {t} = {d}. The yearly depreciation is {d}.
    S: A van bought for {c} and sold for {s} after {t} years loses {d} of book value each year.
    S: Over {t} years, equipment worth {c} is written down to {s} in equal steps of {d}.""")
def depreciation(rng):
    d, t, s = 100 * rng.randrange(5, 61), rng.randrange(3, 11), 500 * rng.randrange(1, 13)
    return {"c": usd(d * t + s), "s": usd(s), "t": num(t), "d": usd(d)}


@template("""
    R: Inventory turnover is the cost of goods sold divided by the average inventory
    Q: What is the inventory turnover of this company?
    Q: Calculate the inventory turnover from these figures.
    I: Cost of goods sold: {c} | Average inventory: {i}
    A: {c} / {i} = {r}. In a year, the company sells its inventory {r} times.
    S: A store that sells goods costing {c} and keeps {i} on the shelves renews its stock {r} times a year.
    S: With {i} of stock on average and {c} of goods sold, the warehouse turns over {r} times.""")
def inventory_turnover(rng):
    i, r = 1000 * rng.randrange(5, 81), F(rng.randrange(4, 25), 2)
    return {"i": usd(i), "r": num(r), "c": usd(i * r)}


@template("""
    R: Days sales outstanding are receivables divided by yearly credit sales, times 365
    Q: What are the days sales outstanding of this company?
    Q: Calculate the days sales outstanding from these figures.
    I: Receivables: {a} | Credit sales: {s}
    A: {a} / {s} * 365 = {d}. Customers take {d} days to pay.
    S: A firm that sells {s} a year on credit and is owed {a} waits {d} days for its money.
    S: Unpaid invoices of {a} on yearly credit sales of {s} mean that customers pay after {d} days.""")
def days_sales(rng):
    k, d = rng.randrange(1, 21), rng.randrange(20, 76)
    return {"a": usd(200 * k * d), "s": usd(73000 * k), "d": num(d)}


@template("""
    R: Working capital is current assets minus current liabilities
    Q: A company has current assets of {a} and current liabilities of {d}. What is its working capital?
    Q: What is the working capital with current assets of {a} and current liabilities of {d}?
    A: {a} - {d} = {w}. For its daily business, the company has {w}.
    S: A firm with {a} in cash, stock and invoices and {d} of bills to pay can run its business on {w}.
    S: Once {d} of short-term debt is set against {a} of current assets, {w} remains.""")
def working_capital(rng):
    d, w = 500 * rng.randrange(20, 201), 500 * rng.randrange(10, 161)
    return {"a": usd(d + w), "d": usd(d), "w": usd(w)}


@template("""
    R: By the accounting equation, equity is assets minus liabilities
    Q: Total assets are {a} and total liabilities are {d}. What does the accounting equation give for equity?
    Q: Use the accounting equation to find the equity of a firm with assets of {a} and liabilities of {d}.
    A: {a} - {d} = {e}. The equity that belongs to the owners is {e}.
    S: A business with {a} of assets that owes {d} to others belongs to its owners to the extent of {e}.
    S: The two sides of a balance sheet agree: assets of {a} equal {d} of debts plus {e} of equity.""")
def accounting_equation(rng):
    d, e = 1000 * rng.randrange(20, 401), 1000 * rng.randrange(20, 301)
    return {"a": usd(d + e), "d": usd(d), "e": usd(e)}


@template("""
    R: The cash conversion cycle is inventory days plus receivable days minus payable days
    Q: What is the cash conversion cycle of this company?
    Q: Calculate the cash conversion cycle from these figures.
    I: Inventory days: {i} | Receivable days: {r} | Payable days: {p}
    A: {i} + {r} - {p} = {c}. Cash is tied up for {c} days.
    S: Goods that lie for {i} days, buyers who pay after {r} and suppliers paid after {p} make a cycle of {c}.
    S: A firm with {i} days of stock, {r} days of invoices and {p} days of credit waits {c} days for cash.""")
def cash_conversion_cycle(rng):
    i, r, p = rng.randrange(30, 91), rng.randrange(20, 61), rng.randrange(15, 46)
    return {"i": num(i), "r": num(r), "p": num(p), "c": num(i + r - p)}


if __name__ == "__main__":
    main()
