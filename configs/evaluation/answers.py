"""The answers in the page: side by side, with what differs marked, and who was nearer to the reference."""

import difflib
import re
from typing import NamedTuple

from jinja2 import Environment
from markupsafe import Markup, escape

from configs.evaluation.metrics import chrf
from configs.text import visible

# numbers, words, each Chinese or Japanese character, and what stands between them
PIECES = re.compile(r"\d+(?:[.,]\d+)*|[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|\s+|.", re.S)
ALIKE = 0.3  # share of the letters of two answers; where they have less in common, everything would be marked
LONGEST = 2000  # pieces; comparing takes the square of their number


class Answer(NamedTuple):
    """A model's answer. html: with marks; chrf: its likeness to the reference, 0 to 1; nearest: none is higher."""

    html: Markup
    chrf: float
    nearest: bool


class Shown(NamedTuple):
    """A test prompt as the page shows it; answers: in the order of the models."""

    prompt: str
    reference: str
    answers: list[Answer]


def section(templates: Environment, examples: list[dict], titles: dict[str, str], words: dict[str, str]) -> str:
    """The part of the page with all answers, as HTML.

    titles: {model: what it is called}. examples: {prompt, reference, and the answer of each model}.
    """
    shown = [as_shown(example, list(titles)) for example in examples]
    called = [visible(title) for title in titles.values()]
    return templates.get_template("answers.html.jinja").render(w=words, titles=called, examples=shown)


def as_shown(example: dict, names: list[str]) -> Shown:
    """An example with its marks: each model's answer is compared with that of the model before it."""
    texts = [whole(example[name]) for name in names]
    scores = chrf([example[name] for name in names], [example["reference"]] * len(names))
    best = max(scores, default=0)
    answers = []
    for n, (text, score) in enumerate(zip(texts, scores, strict=True)):
        html = escape(text) if n == 0 else marked(texts[n - 1], text)
        answers.append(Answer(html, score, 0 < score > best - 1e-9))
    return Shown(" ".join(whole(example["prompt"]).split()), whole(example["reference"]), answers)


def whole(text: str) -> str:
    """All of a text, with its lines; what would steer the direction of writing is spelled out."""
    return visible("\n".join(str(text).splitlines()).strip())


def marked(before: str, text: str) -> Markup:
    """A text as HTML in which the words that `before` has not are marked; nothing is where the two share too little.

    By difflib's matching of words (Ratcliff and Metzener 1988), and of characters in Chinese.
    """
    a, b = PIECES.findall(before), PIECES.findall(text)
    if max(len(a), len(b)) > LONGEST:
        return escape(text)
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    spans = [(operation, "".join(b[begin:end])) for operation, _, _, begin, end in matcher.get_opcodes()]
    shared = sum(len("".join(piece.split())) for operation, piece in spans if operation == "equal")
    if shared < ALIKE * max(len("".join(full.split())) for full in (before, text)):
        return escape(text)
    html = Markup()
    for operation, piece in spans:
        html += Markup("<mark>{}</mark>").format(piece) if operation != "equal" and piece.strip() else escape(piece)
    return html
