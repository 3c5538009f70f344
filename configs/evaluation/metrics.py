"""What an answer is worth: texts in, numbers out. Pure: nothing here knows a model, a file or a setting.

Each metric takes columns of one length (answers, references, questions, stopped, ...) and returns a number a row.
"""

import math
import re
from collections import Counter
from collections.abc import Callable

import numpy as np
from rouge_score import rouge_scorer
from sacrebleu.metrics import CHRF

FUNCTION_WORDS = (
    "the a an of to in and or is are be it that this for on with as by at from not you your can will if but they "
    "their which more than when "
    "的 了 是 在 和 有 不 也 就 都 与 及 而 或 以 为 于 会 可 要 你 您 这 那 它 他 们 如 因 但 把 被 从 对"
).split()


class Words:
    """Tokenizer for rouge_score: words of letters and digits; single characters of Chinese, Japanese and Korean."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(
            r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+", text.lower()
        )


def likelihood(nll: list[float], tokens: list[int], sizes: list[int]) -> dict[str, float]:
    """Perplexity exp(nll per token), nll per token (nats) and bits per byte of texts.

    nll: nats a row; tokens, sizes: tokens and UTF-8 bytes a row. Sums over all rows come first, then one division, so
    that long rows weigh more.
    """
    per_token = sum(nll) / sum(tokens)
    return {
        "perplexity": math.exp(min(per_token, 700)),
        "nll_per_token": per_token,
        "bits_per_byte": sum(nll) / math.log(2) / sum(sizes),
    }


def rouge_l(answers: list[str], references: list[str]) -> list[float]:
    """ROUGE-L F1 a row, in [0, 1] (Lin 2004; rouge_score)."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words())
    return [scorer.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references, strict=True)]


def chrf(answers: list[str], references: list[str]) -> list[float]:
    """chrF a row, in [0, 1] (Popovic 2015; sacrebleu)."""
    scorer = CHRF()
    return [scorer.sentence_score(a, [r]).score / 100 for a, r in zip(answers, references, strict=True)]


def answer_quality(answers: list[str], references: list[str]) -> list[float]:
    """Mean of ROUGE-L F1 and chrF a row, in [0, 1]."""
    return [(a + b) / 2 for a, b in zip(rouge_l(answers, references), chrf(answers, references), strict=True)]


def style_match(answers: list[str], references: list[str]) -> list[float]:
    """How alike two texts are in form, in [0, 1] a row: the mean of four ratios that do not look at the content.

    Number of words; words per sentence; share of lines that are list items or markdown; profile of function words,
    English and Chinese (cosine), as used in authorship attribution (Mosteller and Wallace 1964).
    """
    return [_style_of_one(a, r) for a, r in zip(answers, references, strict=True)]


def _style_of_one(text: str, reference: str) -> float:
    """style_match of one answer."""

    def features(s: str) -> tuple[float, float, float, np.ndarray]:
        words = Words().tokenize(s)
        sentences = [x for x in re.split(r"[.!?]+(?:\s|$)|[\u3002\uff01\uff1f]+", s) if x.strip()]
        lines = [line for line in s.splitlines() if line.strip()]
        marked = sum(bool(re.match(r"\s*([-*#>|]|\d+[.)]\s)|.*\*\*", line)) for line in lines)
        counts = Counter(words)
        profile = np.array([counts[w] for w in FUNCTION_WORDS], float)
        return len(words), len(words) / max(len(sentences), 1), marked / max(len(lines), 1), profile

    def ratio(a: float, b: float) -> float:
        return 1.0 if a == b else min(a, b) / max(a, b)

    a, b = features(text), features(reference)
    norms = np.linalg.norm(a[3]) * np.linalg.norm(b[3])
    cosine = float(a[3] @ b[3] / norms) if norms else float(np.array_equal(a[3], b[3]))
    return (ratio(a[0], b[0]) + ratio(a[1], b[1]) + 1 - abs(a[2] - b[2]) + cosine) / 4


def embedding_similarity(answers: list[str], references: list[str], embed: Callable) -> list[float]:
    """Cosine of the embeddings of answer and reference, in [-1, 1] a row (Reimers and Gurevych 2019).

    embed(texts) gives unit vectors, shape (texts, width). An empty text means nothing: 0.
    """
    told = [n for n, pair in enumerate(zip(answers, references, strict=True)) if all(map(str.strip, pair))]
    rows = np.zeros(len(answers))
    if told:
        a, b = (np.asarray(embed([texts[n] for n in told]), float) for texts in (answers, references))
        rows[told] = np.clip((a * b).sum(1), -1, 1)
    return rows.tolist()


def well_formed(answers: list[str], questions: list[str], stopped: list[bool]) -> list[float]:
    """How well-formed an answer is, in [0, 1] a row: the share of five things, none of which is what it says.

    It ends by itself (`stopped`), is not empty, does not repeat itself, is in the question's script (Latin, Chinese,
    ...), and takes up the question's content words (at most half of them being asked for). An answer that is empty or
    repeats itself says nothing, whatever words it takes up: only its end counts. Truth and help are not judged.
    """
    return [_form_of_one(*row) for row in zip(questions, answers, stopped, strict=True)]


def _form_of_one(question: str, text: str, stopped: bool) -> float:
    """well_formed of one answer."""
    if not text.strip() or repetitive(text):
        return 0.2 * stopped
    said = set(Words().tokenize(text))
    asked = {w for w in Words().tokenize(question) if w not in FUNCTION_WORDS and (len(w) > 3 or not w.isascii())}
    taken_up = min(2 * len(asked & said) / len(asked), 1.0) if asked else 1.0
    return (stopped + 2 + (_script(text) == _script(question)) + taken_up) / 5


def useless(answers: list[str], questions: list[str], references: list[str], stopped: list[bool]) -> list[bool]:
    """Whether an answer is of no use whatever it says, a row.

    It is empty, or repeats itself, or went on without an end to more than half as long again as its reference, or is
    in another script (Latin, Chinese, ...) than the question.
    """
    return [
        not text.strip()
        or repetitive(text)
        or (not ended and len(text) > 1.5 * len(reference))
        or _script(text) != _script(question)
        for text, question, reference, ended in zip(answers, questions, references, stopped, strict=True)
    ]


def nearer(answers: list[str], references: list[str]) -> list[float]:
    """How much nearer each answer is to its own reference than to another question's, in chrF, a row.

    The other one is half the list away; 0 on average says that an answer has nothing to do with its question.
    """
    half = len(references) // 2
    others = references[half:] + references[:half]
    return [a - b for a, b in zip(chrf(answers, references), chrf(answers, others), strict=True)]


def _script(text: str) -> str:
    cjk = len(re.findall(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]", text))
    return "cjk" if cjk * 2 > len(re.findall(r"[^\W\d_]", text)) else "other"


def repetitive(text: str) -> bool:
    """True when fewer than half of the word 4-grams are different ones; of a text of hardly any words, letter 4-grams.

    The latter are signs that are no words, and one word without an end.
    """
    words, letters = Words().tokenize(text), "".join(text.split())
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    if len(grams) < 8 and len(letters) >= 40:
        grams = [letters[i : i + 4] for i in range(len(letters) - 3)]
    return len(grams) >= 8 and len(set(grams)) < len(grams) / 2


def most_different(answers: dict[str, list[str]], number: int) -> list[int]:
    """Rows whose answers differ most between the models, most different first: the mean of 1 - chrF over the pairs.

    answers: {model: answers}, all of one length. Returns `number` row numbers at most.
    """
    names, distance = list(answers), np.zeros(len(next(iter(answers.values()))))
    for n, a in enumerate(names):
        for b in names[n + 1 :]:
            alike = np.array(chrf(answers[a], answers[b]))
            same = np.array([x == y for x, y in zip(answers[a], answers[b], strict=True)])
            distance += np.where(same, 0, 1 - alike)
    return sorted(range(len(distance)), key=lambda i: -distance[i])[:number]
