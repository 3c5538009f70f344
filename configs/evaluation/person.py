"""A person as the judge: which answers are shown in which order, what was said of them, and whether to believe it.

A person has a quarter of an hour. So the three models are compared with one another, on at most PROMPTS prompts, each
pair once; a few pairs come a second time with the sides exchanged, and a few controls are mixed in. Pairs with equal
answers are ties that nobody is asked for.
"""

import hashlib
import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from configs.evaluation.judge import rated
from configs.evaluation.person_page import judge_on_page
from configs.evaluation.person_terminal import judge_in_terminal
from configs.evaluation.phrases import JUDGING
from configs.settings import command, say

PROMPTS = 40  # most prompts that a person is asked about: a quarter of an hour where answers are short
LEAST = 10  # prompts that must be judged before anything is concluded, or half of those that there are
CONTROL_EVERY = 10  # prompts: one pair of equal answers and one of an answer to another question each
AGAIN_EVERY = 5  # prompts: one pair a second time, with the sides exchanged
PASSED = 0.75  # share of each kind of control that must be right; a slip of the finger is allowed


@dataclass(frozen=True)
class Showing:
    """Two answers side by side. The person sees question, first and second, and nothing else.

    kind: "pair", "again" (a pair with the sides exchanged), "identical" or "mismatched" (a reference, and that of
    another question). prompt: its place among the test prompts. a, b: models, or "reference"; swapped: b's stands
    first.
    """

    kind: str
    prompt: int
    a: str
    b: str
    swapped: bool
    question: str
    first: str
    second: str

    def outcome(self, verdict: str) -> float:
        """1 where a's answer won, 0 where b's did, 0.5 for a tie, nan for a pair that was skipped."""
        if verdict not in ("first", "second"):
            return 0.5 if verdict == "tie" else math.nan
        return float((verdict == "first") != self.swapped)


def plan(questions: list[str], references: list[str], answers: dict, pairs: list, seed: int) -> list[Showing]:
    """All that is shown, in order; the same for the same answers and seed.

    answers: {model: its answers}; pairs: of models, (a, b). Prompts come in random order, the pairs of a prompt one
    after another. Each model stands first on half of the prompts.
    """
    draw, n = random.Random(seed), len(questions)
    chosen = draw.sample(range(n), min(n, PROMPTS))
    sides = {pair: [place % 2 == 0 for place in range(len(chosen))] for pair in pairs}
    for side in sides.values():
        draw.shuffle(side)

    def showing(kind: str, i: int, a: str, b: str, swapped: bool, texts: tuple[str, str]) -> Showing:
        first, second = reversed(texts) if swapped else texts
        return Showing(kind, i, a, b, swapped, questions[i], first, second)

    blocks: list[list[Showing]] = []
    for place, i in enumerate(chosen):
        block = [
            showing("pair", i, a, b, sides[a, b][place], (answers[a][i], answers[b][i]))
            for a, b in pairs
            if answers[a][i] != answers[b][i]
        ]
        draw.shuffle(block)
        blocks.append(block)
    later: list[list[Showing]] = [[] for _ in blocks]  # what follows on each block
    times = math.ceil(len(chosen) / CONTROL_EVERY)
    of_controls = draw.sample(range(n), min(n, 2 * times))
    left = [place % 2 == 0 for place in range(times)]  # who always takes one side is right on half of them only
    draw.shuffle(left)
    for number, i in enumerate(of_controls):
        place = (2 * number + 1) * len(blocks) // (2 * len(of_controls))
        others = [text for text in references if text != references[i]]
        kind, other = ("mismatched", draw.choice(others or [""])) if number % 2 else ("identical", references[i])
        later[place].append(showing(kind, i, "reference", kind, left[number // 2], (references[i], other)))
    seen: set[int] = set()
    for place in range(AGAIN_EVERY - 1, len(blocks), AGAIN_EVERY):
        before = [k for k in range(max(place - 2, 1)) if blocks[k] and k not in seen]  # not what was just seen
        if before:
            seen.add(k := draw.choice(before))
            one = draw.choice(blocks[k])
            sides_changed = {"kind": "again", "swapped": not one.swapped, "first": one.second, "second": one.first}
            later[place].append(Showing(**asdict(one) | sides_changed))
    return [one for block, more in zip(blocks, later, strict=True) for one in (*block, *more)]


class Session:
    """What a person has said so far; each verdict is appended to `path` at once, and a second start goes on there.

    Verdicts are "first", "second", "tie" and "skip". What the file holds of other answers, or of another order, does
    not count: `others` is how many verdicts those are.
    """

    def __init__(self, showings: list[Showing], path: Path):
        self.showings, self.path, self.ended = showings, path, False
        shown = json.dumps([asdict(showing) for showing in showings], sort_keys=True)
        self.name = hashlib.sha256(shown.encode("utf-8", "replace")).hexdigest()[:16]
        self.verdicts: dict[int, str] = {}
        others: dict[tuple, str] = {}
        try:
            text = path.read_text("utf-8", errors="replace")
        except OSError:
            text = ""
        self.gap = "\n" if text and not text.endswith("\n") else ""  # behind the last line of a killed run
        lines = text.splitlines()
        for line in lines:
            try:
                record = json.loads(line)
                evaluation, number, verdict = record["evaluation"], int(record["number"]), record["verdict"]
            except (ValueError, KeyError, TypeError):  # another judge's, or the last line of a killed run
                continue
            if evaluation != self.name:
                others[evaluation, number] = verdict
            elif verdict == "back":
                self.verdicts.pop(number, None)
            elif verdict in ("first", "second", "tie", "skip") and number < len(showings):
                self.verdicts[number] = verdict
        self.others = sum(verdict != "back" for verdict in others.values())

    @property
    def number(self) -> int | None:
        """The place of what is to be judged next; None where all is judged."""
        return next((n for n in range(len(self.showings)) if n not in self.verdicts), None)

    @property
    def current(self) -> Showing | None:
        number = self.number
        return None if number is None else self.showings[number]

    def give(self, number: int, verdict: str) -> bool:
        """Note a verdict; False where `number` is not what is to be judged now, as after a key pressed twice."""
        if self.ended or number != self.number:
            return False
        self._write(number, verdict)
        self.verdicts[number] = verdict
        self.ended = self.number is None
        return True

    def back(self) -> None:
        """Take the last verdict back."""
        if not self.ended and self.verdicts:
            self._write(last := max(self.verdicts), "back")
            del self.verdicts[last]

    def _write(self, number: int, verdict: str) -> None:
        one = self.showings[number]
        sides = (one.b, one.a) if one.swapped else (one.a, one.b)
        record = {"evaluation": self.name, "number": number, "kind": one.kind, "prompt": one.prompt}
        record |= {
            "first": sides[0],
            "second": sides[1],
            "verdict": verdict,
            "when": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(self.gap + json.dumps(record) + "\n")
        self.gap = ""


def judged(
    settings, held_out, answers: dict[str, list[str]], pairs: list[tuple[str, str]], path: Path
) -> tuple[dict, dict[str, np.ndarray]]:
    """(what the person says, in the form of judge.judged; {model: its helpfulness on each prompt, nan: not judged}).

    Asks in the terminal or on a page, as JUDGE says. A model's helpfulness on a prompt is the mean of its outcomes
    against the other models there. Controls: of the references compared with themselves, and of those compared with
    another question's, three of four must be judged right, and LEAST prompts must be judged; else `withheld` says
    why, and there are no win rates.
    """
    words = JUDGING[settings.REPORT_LANGUAGE]
    questions = ["\n\n".join(m["content"] for m in p["prompt"]) for p in held_out.prompts]
    pairs = [(a, b) for a, b in pairs if a in answers and b in answers]
    showings = plan(questions, held_out.references, answers, pairs, settings.SEED)
    session = Session(showings, path)
    if session.others and not session.verdicts:
        say(words["anew"].format(n=session.others, path=path))
    if session.verdicts and session.number is not None:
        say(words["goes_on"].format(n=len(session.verdicts), of=len(showings)))
    if session.number is not None:
        (judge_on_page if settings.JUDGE == "human:page" else judge_in_terminal)(session, words)
    opinion = opinion_of(settings, session, held_out, answers, pairs)
    if session.number is not None:
        again = command("4_evaluate_compare.py", "--judge", settings.JUDGE)
        say(words["left"].format(n=len(showings) - len(session.verdicts), command=again))
    if opinion["withheld"]:
        return opinion, {}
    return opinion, helpfulness(opinion)


def opinion_of(settings, session: Session, held_out, answers: dict, pairs: list) -> dict:
    """The statistics of a session; see `judged`."""
    given = [(session.showings[n], verdict) for n, verdict in sorted(session.verdicts.items())]
    prompts, reached = len(held_out.prompts), reached_prompts(session, given, len(held_out.prompts), settings.SEED)
    found = {"judge": settings.JUDGE, "withheld": None, "prompts": len(reached)}
    right = {}
    for kind, wanted in (("identical", 0.5), ("mismatched", 1.0)):
        outcomes = [one.outcome(verdict) for one, verdict in given if one.kind == kind]
        right[kind] = [outcome == wanted for outcome in outcomes if not math.isnan(outcome)]
    found["identical"] = {"n": len(right["identical"]), "ties": sum(right["identical"]), "missing": 0}
    control = {"outcomes": np.full(prompts, np.nan), "consistent": None, "first_slot": None, "missing": 0}
    for one, verdict in given:
        if one.kind == "mismatched":
            control["outcomes"][one.prompt] = one.outcome(verdict)
    blank = [""] * prompts
    found["shuffled"] = rated(settings, control, blank, blank, held_out.prompt_groups)
    found |= {"again": {"n": 0, "agreed": 0}, "against_reference": {}, "between_models": []}
    for a, b in pairs:
        outcomes = np.full(prompts, np.nan)
        outcomes[[i for i in reached if answers[a][i] == answers[b][i]]] = 0.5
        of_pair = [(one, verdict) for one, verdict in given if (one.a, one.b) == (a, b)]
        agreed = into_outcomes(of_pair, outcomes)
        found["again"]["n"] += len(agreed)
        found["again"]["agreed"] += sum(agreed)
        slots = [verdict for _, verdict in of_pair if verdict in ("first", "second")]
        of_both = {
            "outcomes": outcomes,
            "consistent": sum(agreed) / len(agreed) if agreed else None,
            "first_slot": slots.count("first") / len(slots) if slots else None,
            "missing": int(np.isnan(outcomes[reached]).sum()),
        }
        rates = rated(settings, of_both, answers[a], answers[b], held_out.prompt_groups)
        found["between_models"].append({"a": a, "b": b, **rates})
    found["withheld"] = doubt(found, right, min(LEAST, math.ceil(min(prompts, PROMPTS) / 2)))
    if found["withheld"]:
        found["between_models"] = []
    return found


def reached_prompts(session: Session, given: list, prompts: int, seed: int) -> list[int]:
    """The prompts up to the last one that was judged: answers that are equal count as ties there, and only there."""
    chosen = random.Random(seed).sample(range(prompts), min(prompts, PROMPTS))  # as in `plan`
    if session.number is None:
        return chosen
    judged_prompts = {one.prompt for one, verdict in given if one.kind == "pair" and verdict != "skip"}
    return chosen[: max((chosen.index(prompt) for prompt in judged_prompts), default=-1) + 1]


def into_outcomes(of_pair: list[tuple[Showing, str]], outcomes: np.ndarray) -> list[bool]:
    """Write a pair's verdicts into its outcomes, shape (prompts,); whether each one that came again was the same.

    Where the two times disagree, the outcome is a tie, as for any judge.
    """
    agreed = []
    for one, verdict in of_pair:  # in order, so what comes again comes later
        value, before = one.outcome(verdict), outcomes[one.prompt]
        if one.kind == "pair":
            outcomes[one.prompt] = value
        elif not math.isnan(value) and not math.isnan(before):
            agreed.append(bool(value == before))
            outcomes[one.prompt] = before if agreed[-1] else 0.5
    return agreed


def doubt(found: dict, right: dict[str, list[bool]], least: int) -> tuple[str, dict] | None:
    """Why a person's verdicts are not believed, as a note of the report; None where they are."""
    if found["prompts"] < least or not all(right.values()):
        return "judge_few", {"n": found["prompts"], "least": least}
    if sum(right["identical"]) < PASSED * len(right["identical"]):
        return "judge_identical", {"ties": sum(right["identical"]), "n": len(right["identical"])}
    if sum(right["mismatched"]) < PASSED * len(right["mismatched"]):
        rates = found["shuffled"]
        return "judge_shuffled", {"rate": rates["win_rate"], "low": rates["ci95"][0]}
    return None


def helpfulness(opinion: dict) -> dict[str, np.ndarray]:
    """{model: the mean of its outcomes against the other models on each prompt}; nan where nothing was judged."""
    outcomes: dict[str, list[np.ndarray]] = {}
    for rates in opinion["between_models"]:
        outcomes.setdefault(rates["a"], []).append(rates["outcomes"])
        outcomes.setdefault(rates["b"], []).append(1 - rates["outcomes"])
    means = {}
    for model, columns in outcomes.items():
        table = np.array(columns)
        known = ~np.isnan(table)
        counts = known.sum(0)
        sums = np.where(known, table, 0).sum(0)
        if counts.any():
            means[model] = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return means
