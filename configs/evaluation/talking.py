"""The chat of step 4: a person talks with all models at once, and sees their answers side by side as they are written.

Each model has a history of its own. Only the answers go to stdout; what the chat itself says goes to stderr.
"""

import contextlib
import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from configs import handover
from configs.evaluation.asking import Stop, Unanswered, loaded, marker_in, reply
from configs.evaluation.candidates import Candidate
from configs.evaluation.keys import can_draw, unechoed
from configs.evaluation.phrases import CHAT
from configs.evaluation.report import load_words
from configs.settings import main_process, say
from configs.text import is_path, is_utf8, quoted, visible

COLUMN = 24  # columns of the terminal that an answer needs beside the others; with fewer they stand one below another


def talk(settings, candidates: list[Candidate]) -> None:
    """Talk with these models until the person leaves; nothing is written but what /save is told to."""
    if not main_process():  # of several, one holds the conversation
        return
    # LoRA's merged_model answers what LoRA does, and would take the memory of one more model
    asked = [candidate for candidate in candidates if candidate.method != "merged"]
    Chat(settings, list(loaded(settings, asked))).run()


# --- how the answers are shown


class SideBySide:
    """A column for each model, drawn anew while they write; of a long answer the last lines, until all have ended."""

    def __init__(self, console: Console, names: list[str]):
        self.console, self.names = console, names
        self.texts, self.notes, self.now = [""] * len(names), [""] * len(names), -1

    def table(self, height: int | None = None) -> Table:
        """The answers so far; height: of which only so many lines are shown."""
        inner = (self.console.width - 1) // len(self.names) - 3
        grid = Table(expand=True)
        cells = []
        for name, text, note in zip(self.names, self.texts, self.notes, strict=True):
            grid.add_column(Text(name), ratio=1)
            shown = Text(visible(" ".join(filter(None, [text, note]))))
            lines = shown.wrap(self.console, max(inner, 1)) if height else [shown]
            cells.append(Text("\n").join(lines[-height:] if height else lines))
        grid.add_row(*cells)
        return grid

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """One question: a picture while the models write, and the whole of their answers at its end."""

        def picture() -> Table:
            return self.table(max(self.console.height - 6, 1))

        self.texts, self.notes = [""] * len(self.names), [""] * len(self.names)
        try:
            with Live(console=self.console, get_renderable=picture, refresh_per_second=8, transient=True):
                yield
        finally:
            self.console.print(self.table())

    def begin(self, place: int) -> None:
        self.now = place

    def hear(self, piece: str) -> None:
        self.texts[self.now] = (self.texts[self.now] + piece).lstrip()

    def end(self, text: str, note: str) -> None:
        self.texts[self.now], self.notes[self.now] = text, note


class OneBelowAnother:
    """Each model's name, and below it its answer as it is written: for pipes, and narrow or dumb terminals."""

    def __init__(self, names: list[str]):
        self.names, self.heard = names, ""

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        yield

    def begin(self, place: int) -> None:
        self.heard = ""
        print(f"{self.names[place]}:", flush=True)

    def hear(self, piece: str) -> None:
        piece = piece if self.heard else piece.lstrip()
        self.heard += piece
        print(visible(piece), end="", flush=True)

    def end(self, text: str, note: str) -> None:
        rest = text[len(self.heard) :] if text.startswith(self.heard) else ""
        print(visible(f"{rest} {note}".rstrip()) + "\n", flush=True)


# --- the conversation


class Chat:
    """A conversation with several models. speakers: (candidate, its model), in the order in which they answer."""

    def __init__(self, settings, speakers: list[tuple[Candidate, PreTrainedModel]]):
        self.settings, self.speakers, self.words = settings, speakers, CHAT[settings.REPORT_LANGUAGE]
        named = load_words(settings.REPORT_LANGUAGE)
        self.names = [named.get(candidate.label, candidate.label) for candidate, _ in speakers]
        self.system, self.saved = "", set()
        self.histories: list[list[dict]] = [[] for _ in speakers]
        self.is_asked = sys.stdin.isatty()

    def tell(self, key: str, **values: object) -> None:
        say(self.words[key].format(**values), to_stderr=True)

    def run(self) -> None:
        """Read questions and commands until the end of the input or /quit."""
        if self.is_asked:
            self.tell("greeting", names=self.words["comma"].join(self.names))
        while (line := self.read()) is not None:
            word, _, rest = line.partition(" ")
            if not line:
                continue
            if not is_utf8(line):
                self.tell("not_text")
            elif not re.fullmatch(r"/[A-Za-z]*", word):  # /etc/hosts begins a question, and no command
                self.question(line)
            elif word.lower() in ("/quit", "/exit"):
                return
            elif not self.obey(word.lower(), rest.strip()):
                self.tell("unknown", name=quoted(word, 40))

    def read(self) -> str | None:
        """What the person types; None at the end of the input. Ctrl-C takes back the line and says how to leave."""
        if not self.is_asked:
            line = sys.stdin.readline()
            if line.strip():
                say(self.words["prompt"] + line.strip(), to_stderr=True)
            return line.strip() if line else None
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  (arrow keys and earlier questions)
        while True:
            prompt = "\n" + self.words["prompt"]
            if not sys.stdout.isatty():  # a file or a pipe holds the answers alone
                print(prompt, end="", file=sys.stderr, flush=True)
                prompt = ""
            try:
                return input(prompt).strip().strip("\u3000")
            except EOFError:
                print(file=sys.stderr)
                return None
            except KeyboardInterrupt:
                print(file=sys.stderr)
                self.tell("leave_how")

    # --- commands

    def obey(self, word: str, rest: str) -> bool:
        """Do what a command says; False where there is no such command."""
        if word == "/clear":
            self.forget()
            self.tell("cleared")
        elif word == "/system":
            self.begin_with(rest)
        elif word == "/save":
            self.save(rest)
        elif word == "/help":
            for name, text in self.words["help"]:
                say(f"  {name}: {text}", to_stderr=True)
        else:
            return False
        return True

    def forget(self) -> None:
        self.histories = [[] for _ in self.speakers]

    def begin_with(self, system: str) -> None:
        """Begin anew with this system message, or without one."""
        if mark := self.marker(system):
            return self.tell("marker", mark=quoted(mark))
        self.system = system
        self.forget()
        self.tell("system_set" if system else "system_gone")

    def save(self, name: str) -> None:
        """Write each model's messages as a line of JSON; a file that this chat did not write stays as it is."""
        path = Path(name).expanduser() if name and is_path(name) else None
        if path is None:
            return self.tell("save_how")
        if not any(self.histories):
            return self.tell("save_nothing")
        if path.exists() and path.absolute() not in self.saved:
            return self.tell("save_other", path=path)
        lines = (
            json.dumps({"model": candidate.label, "messages": self.messages(history)}, ensure_ascii=False) + "\n"
            for (candidate, _), history in zip(self.speakers, self.histories, strict=True)
        )
        try:
            handover.write_text(path, "".join(lines))
        except OSError as error:
            return self.tell("save_failed", path=path, why=error.strerror or error)
        self.saved.add(path.absolute())
        self.tell("saved", path=path)

    # --- questions

    def marker(self, text: str) -> str | None:
        return marker_in(text, [candidate for candidate, _ in self.speakers])

    def messages(self, history: list[dict]) -> list[dict]:
        """A model's conversation so far, as it is asked with it."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *history]

    def question(self, text: str) -> None:
        """Ask all models; Ctrl-C stops the one that is writing, and what it has written stays."""
        if mark := self.marker(text):
            return self.tell("marker", mark=quoted(mark))
        console = Console(highlight=False)
        wide = can_draw() and console.width >= COLUMN * len(self.speakers)
        display = SideBySide(console, self.names) if wide else OneBelowAnother(self.names)
        asked, stop = {"role": "user", "content": text}, Stop()

        def halt(*_) -> None:
            stop.asked = True

        before = signal.signal(signal.SIGINT, halt)
        try:
            with unechoed(), display.turn():
                for place, (candidate, model) in enumerate(self.speakers):
                    stop.asked = False
                    display.begin(place)
                    messages = self.messages([*self.histories[place], asked])
                    try:
                        record = reply(self.settings, candidate, model, messages, stop, display.hear)
                    except Unanswered as why:  # its history stays as it was before the question
                        display.end("", self.words[why.key].format(**why.values))
                        continue
                    display.end(record["answer"], self.note(record, stop))
                    answered = {"role": "assistant", "content": record["answer"]}
                    self.histories[place] += [asked, answered]
        finally:
            signal.signal(signal.SIGINT, before)

    def note(self, record: dict, stop: Stop) -> str:
        """What stands behind an answer that the model did not end by itself, or that is empty."""
        if not record["stopped"]:
            return self.words["halted" if stop.asked else "cut"].format(cap=self.settings.MAX_NEW_TOKENS)
        return "" if record["answer"] else self.words["empty"]
