"""The menu of run_all.py: what this machine has, what is done, and what to do next.

Light: opens without torch. It runs no step itself: `choose` returns what run_all.py is to do.
"""

import atexit
import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from configs import estimate, hub, machine, screen, state
from configs.board import Board, open_page
from configs.flags import ALIASES, ROOT, SECTIONS, list_presets, near
from configs.screen import SCRIPTS, Settings, made_with, values_of
from configs.settings import resolved
from configs.text import quoted, read_yaml
from configs.typed import normalised, parse_steps, same_setting
from configs.values import as_text, read_constants
from configs.words import TEXTS

NUMBERS = {section: number for number, section in enumerate(SECTIONS.values(), 1)}
COMMANDS = ("set", "continue", "sweep", "ask", "report", "board", "help", "quit")
CHINESE = {
    "设置": "set",
    "继续": "continue",
    "公平比较": "sweep",
    "提问": "ask",
    "报告": "report",
    "帮助": "help",
    "退出": "quit",
}
NOT_SET = {"STEPS", "YES", "DEMO", "PRESET", "SWEEP"}  # of run_all.py: the menu has words of its own for them


class Menu:
    """The menu and what is set in it. take: words of a command line in, Settings out; SystemExit(2) where wrong."""

    def __init__(self, words: list[str], take: Callable[[list[str]], Settings]):
        self.take, self.typed = take, normalised(words)
        self.screen, self.board, self.ran = screen.Screen(), Board(), False
        atexit.register(self.board.stop)
        self.machine: machine.Machine | None = None
        self.looking: threading.Thread | None = threading.Thread(target=self._look, daemon=True)
        self.looking.start()  # nvidia-smi takes a moment
        self.read(take(self.typed))
        self.hub = machine.HubCheck(self.values["lora"]["MODEL_NAME"], self.values["prepare"]["DATASET_NAME"])

    def _look(self) -> None:
        self.machine = machine.look()

    def read(self, settings: Settings) -> None:
        """From here on these settings are in force."""
        self.settings, self.language = settings, settings.language
        self.words, self.values = TEXTS[settings.language], values_of(settings.flags)

    def say(self, key: str, **values: object) -> None:
        self.screen.line(self.words[key].format(**values))

    # --- what is shown

    def look(self) -> None:
        """What is known now: states, times, and what Enter would do."""
        if self.looking:
            self.looking.join()
        else:  # a run may have changed what is free
            self._look()
        self.looking = None
        self.known = screen.states(self.values)
        self.sweep = state.of_sweep(self.settings.sweep_dir)
        states, here = self.known, self.machine
        self.times = {name: estimate.time_of(name, self.values, states[name], here) for name in states}
        self.large = estimate.too_large(self.values["full"], self.machine)
        self.todo = self.not_done()

    def not_done(self) -> list[int]:
        """What Enter runs: the steps that are not done, and those that follow from them."""
        possible = {1, 2, 4} if self.large else {1, 2, 3, 4}
        todo = {NUMBERS[section] for section, step in self.known.items() if step.kind != "done"} & possible
        if 1 in todo:
            todo |= {2, 3}
        if todo & {2, 3}:
            todo.add(4)
        return [] if self.running() else sorted(todo & possible)

    def running(self) -> list[str]:
        """What another process does at this moment, in words: then Enter starts nothing beside it."""
        steps = dict(zip(self.known, self.words["steps"], strict=True)) | {"sweep": self.words["sweep_label"]}
        return [steps[name] for name, step in {**self.known, "sweep": self.sweep}.items() if step.kind == "running"]

    def show(self) -> None:
        """The whole screen."""
        w, values = self.words, self.values
        self.screen.line()
        models = dict.fromkeys(settings["MODEL_NAME"] for settings in values.values())
        rows = [(w["model"], ", ".join(map(self.place, models)))]
        rows += [(w["data"], self.place(values["prepare"]["DATASET_NAME"]))]
        changed = [word[2:] for word in self.typed if word.startswith("--") and not word.startswith("--preset=")]
        labels = tuple(w[key] for key in ("model", "data", "changed", "machine", "hub", "preset"))
        self.screen.facts(rows + ([(w["changed"], ", ".join(changed))] if changed else []), labels)
        self.look()
        key, facts = self.hub.answer(0.1)
        rows = [(w["machine"], self.described()), (w["hub"], w[key].format(**facts)), (w["preset"], self.preset())]
        self.screen.facts(rows, labels)
        self.screen.line()
        screen.show_steps(self.screen, self.known, self.times, self.sweep, w, self.language)
        fitting = made_with(values, self.settings)
        if fitting is not None:
            self.say("made_with" if fitting else "made_without", name=fitting)
        self.screen.line()

    def place(self, name: str) -> str:
        """A model's or a data set's name, and whether it is missing on this machine."""
        if hub.is_hub_name(name) or hub.local_path(name):
            return name
        made_here = name.startswith("outputs/demo_base_model")
        return self.words["made_first" if made_here else "not_there"].format(name=name)

    def described(self) -> str:
        """The machine in a line."""
        here, gb = self.machine, machine.GB
        parts = [
            self.words["gpu"].format(name=gpu.name, free=gpu.free / gb, total=gpu.total / gb) for gpu in here.gpus
        ] or [self.words[here.kind].format(cores=here.cores, memory=here.memory / gb)]
        return self.words["semicolon"].join([*parts, self.words["disk"].format(disk=here.disk / gb)])

    def preset(self) -> str:
        """The preset in force and the one for this machine, in words."""
        name, key, facts = machine.recommended(self.machine)
        why = self.words[key].format(**facts)
        if name == self.settings.preset:
            return self.words["this_fits"].format(name=name, why=why)
        now = self.settings.preset or self.words["no_preset"]
        return self.words["other_fits"].format(name=now, other=name, why=why)

    def listed(self, numbers: list[int]) -> str:
        """[2, 3, 4] as "2, 3 and 4"."""
        first, last = [str(n) for n in numbers[:-1]], str(numbers[-1])
        return self.words["and"].join(filter(None, [self.words["comma"].join(first), last]))

    def enter(self) -> str:
        """What Enter will do."""
        w = self.words
        if not self.todo:
            running = self.running()
            return w["enter_wait"].format(what=running[0]) if running else w["enter_report"]
        first = self.todo[0]
        if self.known[list(SECTIONS.values())[first - 1]].kind == "interrupted":
            rest = w["enter_then"].format(steps=self.listed(self.todo[1:])) if self.todo[1:] else ""
            text = w["enter_goes_on"].format(first=first) + rest
        else:
            text = w["enter_runs"].format(steps=self.listed(self.todo))
        return f"{text} · {self.spent(self.todo)[0]}"

    def spent(self, steps: list[int]) -> tuple[str, float]:
        """How long these steps take, in words, and at least in seconds."""
        times = [self.times[section] for section, number in NUMBERS.items() if number in steps]
        known = [time.seconds for time in times if time.seconds is not None]
        kinds = {time.kind for time in times} - {"unknown"}
        if not known:
            return self.words["unknown"], 0.0
        kind = next(kind for kind in ("per_1000", "estimate", "measured") if kind in kinds)
        whole = len(known) == len(times) or kind == "per_1000" or sum(known) > 10 * estimate.HOUR
        key = kind if whole else "at_least"
        return self.words[key].format(time=state.spell(sum(known), self.language)), sum(known)

    # --- what is asked

    def choose(self, show: bool = True) -> tuple[str, object]:
        """Show the menu and obey until something is to be run.

        Returns ("steps", [2, 3]), ("sweep", its question or True), ("ask", a question or "") or ("quit", None).
        """
        while True:
            if show:
                self.show()
                self.screen.line(self.words["hint"], "dim")
            if self.large and self.known["full"].kind != "done":
                self.say("left_out", n=3, wanted=self.large[0], free=self.large[1])
            self.screen.line(self.enter(), "bold")
            answer = self.ask(self.words["prompt"])
            if answer is None:
                return "quit", None
            action = self.obey(answer)
            if isinstance(action, tuple):
                return action
            show = action

    def ask(self, prompt: str) -> str | None:
        """An answer from the terminal; None for Ctrl-D. Ctrl-C leaves with exit code 130."""
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  (arrow keys and earlier answers)
        try:
            return input(prompt).strip().strip("\u3000")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print("" if self.ran else f"\n{self.words['nothing']}")
            sys.exit(130)

    def obey(self, answer: str) -> tuple[str, object] | bool:
        """What run_all.py is to do; else whether the whole screen is to be shown again."""
        word, _, rest = answer.partition(" ")
        word, rest = CHINESE.get(word, word.lower()), rest.strip()
        presets = list_presets(ROOT)
        if not answer:
            return self.begin(self.todo) if self.todo else self.idle()
        if (steps := parse_steps(answer)) is not None:
            return self.begin(steps)
        if answer.lower() in ("none", "无"):
            return self.change("", "preset", "")
        if answer.lower() in presets or answer.endswith((".yaml", ".yml")):
            return self.change("", "preset", answer if answer not in presets else answer.lower())
        if word in ("q", "exit", "quit"):
            return "quit", None
        if word == "set":
            return self.set(rest)
        if word == "sweep":
            return "sweep", rest or self.question_of_sweep()
        if word == "ask":
            return self.question(rest)
        others = {"continue": self.go_on, "report": self.report, "board": self.start_board, "help": self.help}
        if word in others and not rest:
            return others[word]()
        close = near(word, [*COMMANDS, *presets])
        hint = self.words["did_you_mean"].format(name=close) if close else self.words["see_help"]
        self.say("wrong", answer=quoted(answer, 40), hint=hint)
        return False

    def begin(self, steps: list[int]) -> tuple[str, object] | bool:
        """Run these steps, after a question where that takes more than an hour."""
        again = self.values["lora"]["RERUN"]
        due = [n for n in steps if again or self.known[list(SECTIONS.values())[n - 1]].kind != "done"]
        text, seconds = self.spent(due) if due else ("", 0.0)
        if seconds > estimate.HOUR:
            answer = self.ask(self.words["long"].format(time=text))
            if answer is None or answer.lower() not in self.words["yes"]:
                return False
        return "steps", steps

    def idle(self) -> bool:
        """Enter, where nothing is left to run."""
        return True if self.running() else self.report()

    def go_on(self) -> tuple[str, object] | bool:
        """Go on with what was interrupted, and with what follows from it; else with the sweep."""
        halted = [NUMBERS[section] for section, step in self.known.items() if step.kind == "interrupted"]
        if halted:
            return self.begin([n for n in self.todo if n >= halted[0]])
        if self.sweep.kind == "interrupted":
            return "sweep", self.question_of_sweep()
        self.say("nothing_interrupted")
        return False

    def question_of_sweep(self) -> str | bool:
        """The question of the sweep that is to go on; True, the default one, where there is none."""
        return self.sweep.why.partition(":")[0] if self.sweep.kind == "interrupted" else True

    def question(self, rest: str) -> tuple[str, object] | bool:
        """Ask all models one question, or open the chat with them, where there is a model."""
        folders = {method: Path(self.values[method]["OUTPUT_DIR"]) for method in ("lora", "full")}
        if not any(state.has_weights(path / state.final_folder(method)) for method, path in folders.items()):
            self.say("no_model")
            return False
        return "ask", rest

    # --- settings

    def change(self, step: str, name: str, value: str) -> bool:
        """Set NAME of a step, or of all ("") that have it; "" takes back what was set.

        False, with the mistake said, where the value is wrong.
        """
        flag = f"{step}.{name}" if step else name
        typed = [word for word in self.typed if not same_setting(word, step, name)]
        typed += [f"--{flag}={value}"] if value else []
        try:
            self.read(self.take(typed))
        except SystemExit:  # it was said what is wrong
            return False
        self.typed = typed
        self.hub = machine.HubCheck(self.values["lora"]["MODEL_NAME"], self.values["prepare"]["DATASET_NAME"])
        if name == "preset" and value:
            self.say("preset_taken", name=value, description=described(value, self.language))
        return True

    def set(self, rest: str) -> bool:
        """`set NAME VALUE` and `set NAME`."""
        flag, _, value = rest.replace("=", " ", 1).partition(" ") if "=" in rest.split(" ")[0] else rest.partition(" ")
        step, _, name = flag.removeprefix("--").replace("-", "_").lower().rpartition(".")
        value = value.strip()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        known = {section: read_constants(ROOT / script) for script, section in SECTIONS.items()}
        own = {key: at for key, at in read_constants(ROOT / "run_all.py").items() if key not in NOT_SET}
        having = {s: of[name.upper()] for s, of in known.items() if name.upper() in of and step in ("", s)}
        if name == "preset" and value:
            return self.change("", "preset", value)
        if not flag:
            self.say("set_how")
            return False
        if not having and (step or name.upper() not in own):
            names = {key.lower() for of in (*known.values(), own) for key in of}
            meant = next((key for key, others in ALIASES.items() if name in others.split() and key in names), None)
            meant = meant or near(name, names)
            hint = self.words["did_you_mean"].format(name=meant) if meant else ""
            self.say("set_unknown", name=quoted(flag, 40), hint=hint)
            return False
        if not value:
            self.explain(name.upper(), having or {"run_all": own[name.upper()]})
            return False
        if not self.change(step, name, value):
            return False
        shown = as_text(next(iter(self.in_force(name.upper(), having or ["run_all"]).values())))
        self.say("set_taken", name=name.upper(), value=shown, steps=", ".join(having) or "run_all")
        return True

    def in_force(self, name: str, sections: Iterable[str]) -> dict[str, object]:
        """{section: value of this setting}; the section "run_all" is run_all.py's own."""
        flags, own = self.settings.flags, self.settings.own
        return {
            section: own[name] if section == "run_all" else resolved(ROOT / SCRIPTS[section], flags[section])[name]
            for section in sections
        }

    def explain(self, name: str, having: dict) -> None:
        """What a setting is for, which values it may have, and which it has. having: {section: Constant}."""
        first = next(iter(having.values()))
        translated = read_yaml(ROOT / "configs" / "help_zh.yaml")[0] if self.language == "zh" else {}
        for text in dict.fromkeys(constant.help for constant in having.values()):
            sections = ", ".join(section for section, constant in having.items() if constant.help == text)
            self.screen.line(f"{name} ({sections}): {(translated or {}).get(text, text)}")
        if first.why and self.language == "en":
            self.screen.line(first.why, "dim")
        shown = first.shown
        for english, other in self.words["ranges"]:
            shown = re.sub(english, other, shown)
        self.say("set_value", shown=shown)
        now = self.in_force(name, having)
        self.say("set_now", values=", ".join(f"{section} {as_text(value)}" for section, value in now.items()))

    # --- reports, TensorBoard, help

    def report(self) -> bool:
        """Say where the reports are, and open the first of them where there is a browser."""
        there = screen.reports(self.values, self.settings.sweep_dir)
        named = [(what, path) for what, path in zip(self.words["reports"], there, strict=True) if path]
        if not named:
            self.say("no_report")
            return False
        for what, path in named:
            self.say("report_at", what=what, path=path)
        if open_page(named[0][1]):
            self.say("opened")
        return False

    def start_board(self) -> bool:
        """Start TensorBoard where it does not run yet, and say its address."""
        if not Board.installed:
            self.say("board_missing")
            return False
        folders = [os.path.abspath(self.values[method]["OUTPUT_DIR"]) for method in ("lora", "full")]
        if not self.board.address():
            self.say("board_starts")
        address, why = self.board.start(os.path.commonpath([os.path.dirname(folder) for folder in folders]))
        self.say("board_at", address=address) if address else self.say("board_failed", why=why)
        return False

    def help(self) -> bool:
        rows = []
        for name, text in self.words["help"]:
            rows.append((name, text))
            if text[-1] in ":：":
                rows += [(f"  {preset}", described(preset, self.language)) for preset in list_presets(ROOT)]
        self.screen.facts(rows)
        return False


def described(preset: str, language: str) -> str:
    """What a preset is for, in this language where its file says so; "" where it cannot be read."""
    path = ROOT / "configs" / "presets" / f"{preset}.yaml"
    data, _ = read_yaml(path if path.is_file() else Path(preset))
    if not isinstance(data, dict):
        return ""
    return str(data.get("description_zh" if language == "zh" else "description") or data.get("description") or "")
