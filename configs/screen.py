"""What run_all.py shows: the state of the steps as lines, on terminals of any width, and as plain text or JSON.

Light: rich is all that it loads. On a terminal that can, lines are coloured and fit its width; on a dumb one and in a
pipe each is plain text.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from configs import state
from configs.estimate import Time
from configs.flags import ROOT, SECTIONS, list_presets
from configs.settings import resolved
from configs.text import visible
from configs.words import TEXTS

SCRIPTS = {section: script for script, section in SECTIONS.items()}
WIDE = 76  # columns from which a step stands on one line
CHINESE = "\u2e80-\u9fff\uf900-\ufaff"  # characters between which a line may break
CLOSING, OPENING = "，。；：、？！）》”…％", "（《“"
STYLES = {"done": "green", "out of date": "yellow", "interrupted": "yellow", "running": "cyan", "not yet": "dim"}


def clock(seconds: float) -> str:
    """A moment (seconds since 1970) for people, in local time: "2026-11-27 04:38"."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def told(step: state.Step, words: dict, language: str) -> str:
    """A step's state in words, e.g. "out of date: LORA_R was 16 and is 8"."""
    why = step.zh if language == "zh" and step.zh else step.why
    if step.kind == "running":
        why = words["running_why"].format(why=why)
    kind = words["kinds"][step.kind].format(when=clock(step.when) if step.when else "").strip()
    return words["because"].format(kind=kind, why=why) if why else kind


def timed(known: Time, words: dict, language: str) -> str:
    """How long a step takes, in words."""
    spelled = state.spell(known.seconds, language) if known.seconds is not None else ""
    return words[known.kind].format(time=spelled)


def wrapped(text: str, width: int) -> list[str]:
    """A text as lines of at most `width` columns, where a Chinese character takes two.

    English breaks between words, Chinese anywhere but before a closing mark and after an opening one.
    """
    from rich.cells import cell_len, chop_cells

    lines = [""]
    for piece in re.findall(rf"\s+|[{OPENING}]*(?:[{CHINESE}]|[^\s{CHINESE}{OPENING}{CLOSING}]+)?[{CLOSING}]*", text):
        if cell_len(lines[-1] + piece.rstrip()) > width:
            lines[-1] = lines[-1].rstrip()
            chopped = chop_cells(piece.lstrip(), width) or [""]  # a path may be longer than a line
            lines += chopped if lines[-1] else []
            lines = lines if lines[-1] or len(lines) > 1 else chopped
        else:
            lines[-1] += piece
    return [line.rstrip() for line in lines]


class Screen:
    """Where lines go: coloured and wrapped on a terminal, as plain text to anything else."""

    def __init__(self):
        dumb = os.environ.get("TERM", "" if os.name != "nt" else "windows") in ("", "dumb", "unknown")
        self.plain = dumb or not sys.stdout.isatty()
        self.console = None
        if not self.plain:
            from rich.console import Console

            self.console = Console(highlight=False)

    def line(self, text: str = "", style: str = "") -> None:
        """A text, on more lines than one where it is longer than the terminal is wide."""
        if self.plain:
            print(visible(text), flush=True)
        else:
            self.columns([], text, style)

    def columns(self, labels: list[tuple[str, int]], text: str, style: str = "") -> None:
        """One row: (label, its columns) pairs in bold, then a text that is wrapped within the rest of the width."""
        from rich.cells import set_cell_size
        from rich.text import Text

        left = "".join(set_cell_size(label, width) for label, width in labels)
        indent = sum(width for _, width in labels)
        for number, part in enumerate(wrapped(visible(text), max(self.console.width - indent, 10))):
            head = left if number == 0 else " " * indent
            row = Text.assemble((head, "bold"), (part, style))
            self.console.print(row, no_wrap=True, overflow="ignore", crop=False)

    def facts(self, rows: list[tuple[str, str]], labels: tuple[str, ...] = ()) -> None:
        """(label, text) rows, as two columns; long labels stand above their text on a narrow terminal.

        labels: of other rows that stand in line with these.
        """
        if self.plain:
            for label, text in rows:
                self.line(f"{label}: {text}")
            return
        from rich.cells import cell_len

        longest = max(cell_len(label) for label in (*labels, *(label for label, _ in rows))) + 2
        for label, text in rows:
            if longest > self.console.width // 3:
                self.line(label, "bold")
                self.columns([("", 2)], text)
            else:
                self.columns([(label, longest)], text)

    def steps(self, rows: list[tuple[str, str, str, str]]) -> None:
        """Rows of (number, what the step does, its state, style of that); two lines for each on a narrow terminal."""
        if self.plain:
            for number, what, text, _ in rows:
                self.line(f"{number}  {what}: {text}")
            return
        from rich.cells import cell_len

        longest = max(cell_len(what) for _, what, _, _ in rows) + 2
        for number, what, text, style in rows:
            if self.console.width >= WIDE:
                self.columns([(number, 3), (what, longest)], text, style)
            else:
                self.columns([(number, 3)], what, "bold")
                self.columns([("", 3)], text, style)


# --- the state of everything


@dataclass(frozen=True)
class Settings:
    """What is in force. own: {name: value} of run_all.py; language: "en" or "zh"; flags: {section: its argv}."""

    own: dict[str, object]
    language: str
    flags: dict[str, list[str]]

    @property
    def preset(self) -> str | None:
        return self.own["PRESET"]

    @property
    def sweep_dir(self) -> str:
        return self.own["SWEEP_DIR"]


def values_of(flags: dict[str, list[str]]) -> dict[str, dict]:
    """{section: {name: value}} of the scripts with these flags."""
    return {
        section: state.as_asked(resolved(ROOT / script, flags[section]), flags[section])
        for script, section in SECTIONS.items()
    }


def made_with(values: dict[str, dict], settings: Settings) -> str | None:
    """The preset with which the data that lie there are done, "" for none; None where no other one has made them."""
    given = [word for word in settings.flags["prepare"] if not word.startswith("--preset=")]
    if state.of_step("prepare", values["prepare"], quick=True).kind != "out of date":
        return None
    for preset in ("", *list_presets(ROOT)):
        words = [f"--preset={preset}", *given] if preset else given
        if preset != (settings.preset or "") and (
            state.of_step("prepare", resolved(ROOT / SCRIPTS["prepare"], words), quick=True).kind == "done"
        ):
            return preset
    return None


def states(values: dict[str, dict]) -> dict[str, state.Step]:
    """{section: its state}. values: {section: {name: value}} of the scripts."""
    return {section: state.of_step(section, values[section], quick=True) for section in SECTIONS.values()}


def show_steps(screen: Screen, known: dict, times: dict, sweep: state.Step, words: dict, language: str) -> None:
    """The four steps and the sweep. known, times: {section: state.Step, estimate.Time}; times may lack some."""
    rows = []
    for number, (section, what) in enumerate(zip(SECTIONS.values(), words["steps"], strict=True), 1):
        step, spent = known[section], times.get(section)
        text = told(step, words, language)
        if spent and (step.kind != "done" or (spent.kind == "measured" and section in ("prepare", "evaluate"))):
            text += f" · {timed(spent, words, language)}"  # a training that is done has said it
        rows.append((str(number), what, text, STYLES[step.kind]))
    if sweep.kind != "not yet":
        hint = f" · {words['sweep_go_on']}" if sweep.kind == "interrupted" else ""
        rows.append(("*", words["sweep_label"], told(sweep, words, language) + hint, STYLES[sweep.kind]))
    screen.steps(rows)


def as_json(known: dict, sweep: state.Step, values: dict, preset: str | None) -> str:
    """The same for programs.

    {"preset", "model", "data", "steps": [{"step", "name", "script", "state", "detail", "finished", "seconds"}],
    "sweep"}: state is a `kind` of state.Step, detail English, finished a local time with its offset from UTC, or null;
    sweep has the last four of these keys.
    """

    def fields(step: state.Step) -> dict:
        finished = step.when and time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(step.when))
        return {"state": step.kind, "detail": step.why, "finished": finished, "seconds": step.seconds}

    steps = [
        {"step": number, "name": section, "script": script, **fields(known[section])}
        for number, (script, section) in enumerate(SECTIONS.items(), 1)
    ]
    content = {
        "preset": preset,
        "model": values["lora"]["MODEL_NAME"],
        "data": values["prepare"]["DATASET_NAME"],
        "steps": steps,
        "sweep": fields(sweep),
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


def reports(values: dict[str, dict], sweep_dir: str) -> list[Path | None]:
    """The reports of step 4, of the sweep and of step 1, the page before the text; None where there is none."""
    places = (
        Path(values["evaluate"]["REPORT_DIR"]) / "evaluation_report",
        Path(sweep_dir) / "sweep_report",
        Path(values["prepare"]["DATA_DIR"]) / "dataset_report",
    )
    return [
        next((path for ending in (".html", ".md") if (path := place.with_suffix(ending)).is_file()), None)
        for place in places
    ]


def show_status(settings: Settings, json_wanted: bool, command: Callable[..., str]) -> None:
    """Print the state of each step and of the sweep. command: settings.command, for a hint."""
    values = values_of(settings.flags)
    known, sweep = states(values), state.of_sweep(settings.sweep_dir)
    if json_wanted:
        print(as_json(known, sweep, values, settings.preset))
        return
    words, shown = TEXTS[settings.language], Screen()
    show_steps(shown, known, {}, sweep, words, settings.language)
    if fitting := made_with(values, settings):
        shown.line(words["status_made_with"].format(command=f"{command('run_all.py', '--preset', fitting)} status"))
