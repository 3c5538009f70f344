"""Settings of the scripts: constants at the top of a script <- `--preset` <- command-line flags.

A script's constants are its settings: `LEARNING_RATE = 2e-4  # peak learning rate` is also the flag
`--learning_rate` (or `--learning-rate`). configs/values.py reads them, and says which values each may have. The
script calls `override(globals())` below them, before its heavy imports; its main() calls `freeze(globals())`.

A preset is a YAML file with an optional `description:` and the sections `prepare:`, `lora:`, `full:`,
`evaluate:` (one script each) and `all:` (every script that has the constant; its own section beats it).

Mistakes are collected, shown at once on stderr as `error: ...` lines, and end the script with exit code 2.
"""

import atexit
import contextlib
import os
import re
import select
import shlex
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import NoReturn

from configs.flags import ROOT, SECTIONS, Flag, list_presets, preset_path, read_flags, read_preset
from configs.secrets import redact
from configs.text import disk_full, visible
from configs.translation import translated, use
from configs.values import Constant, as_text, read_constants

RUN_ALL = "run_all.py"
# A folder that two scripts call by different names: (script, its flag) -> the flag of the other.
SAME_FOLDER = {
    ("2_lora_finetuning.py", "output_dir"): ("4_evaluate_compare.py", "lora_dir"),
    ("3_full_finetuning.py", "output_dir"): ("4_evaluate_compare.py", "full_dir"),
    ("4_evaluate_compare.py", "lora_dir"): ("2_lora_finetuning.py", "output_dir"),
    ("4_evaluate_compare.py", "full_dir"): ("3_full_finetuning.py", "output_dir"),
}
# What our modules import that requirements.txt does not name, because it comes with what is named there.
COMES_ALONG = "huggingface_hub numpy packaging pyarrow safetensors tokenizers tqdm".split()


@dataclass(frozen=True)
class Run:
    """What `override` was last told, for `command`: `flags` is {name as the flag has it: text or None}."""

    script: Path
    preset: str | None
    flags: dict[str, str | None]


_run: Run | None = None  # of this process
_quiet = False  # QUIET of this run
_aside = False  # PROMPT or CHAT of this run: stdout is for the answers, and what else is said goes to stderr
# A line that is redrawn in place makes room for what is said meanwhile (configs/training/progress.py).
beside_line: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


# --- one line, once


def main_process() -> bool:
    """True in the only process, or in the first of several."""
    return os.environ.get("RANK", "") in ("", "0")


def first_on_machine() -> bool:
    """True in the only process, or in the first of several on this machine."""
    return os.environ.get("LOCAL_RANK", "") in ("", "0")


def is_quiet() -> bool:
    """Whether QUIET was asked for: the first and the last line of a step, warnings and errors only."""
    return _quiet


def say(*words: object, always: bool = False, to_stderr: bool = False) -> None:
    """Print one line, once per run however many processes there are; data in it cannot steer the terminal.

    With QUIET, only what begins with note:, warning: or error: is printed, and what is to be said `always`.
    """
    text = visible(redact(" ".join(map(str, words))))
    if main_process() and (always or not _quiet or text.startswith(("note: ", "warning: ", "error: "))):
        with beside_line():
            print(translated(text), flush=True, file=sys.stderr if to_stderr or _aside else sys.stdout)


def fail(*problems: object) -> NoReturn:
    """Print each problem as `error: ...` on stderr and end the program with exit code 2 (user's mistake).

    Several processes mostly fail alike: the first one of a machine says it, and the launcher then ends the others.
    What only another one has to say, it says a little later.
    """
    _flush()
    if not first_on_machine():
        time.sleep(5)
    for problem in dict.fromkeys(visible(redact(str(problem))) for problem in problems):
        # of what a user pasted by mistake, the beginning says enough; the end says what mends it
        shown = problem if len(problem) <= 3000 else f"{problem[:1000]} ... {problem[-1000:]}"
        print(translated(f"error: {shown}"), file=sys.stderr)
    raise SystemExit(2)


# --- how a program ends


def quiet_errors() -> None:
    """From here on Ctrl-C, a missing package and a closed pipe end this program in one line or none.

    Ctrl-C: one line, exit code 130. A package of requirements.txt that is not installed: one line with the command
    that installs it, exit code 2. `| head`, which reads no further: no line, exit code 141, as Unix tools end.
    Anything else keeps its traceback. A character that a terminal cannot show becomes a ?.
    `override` calls it; a program without settings calls it before its imports.
    """
    if sys.excepthook is not _end_quietly:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows a ?
        sys.excepthook = _end_quietly
        threading.excepthook = _end_thread
        atexit.register(_end_without_reader)


def _end_quietly(kind: type, error: BaseException, trace: object) -> None:
    if issubclass(kind, KeyboardInterrupt):
        with contextlib.suppress(OSError):  # nobody may read it any more
            words = "\ninterrupted; finished outputs are unchanged; run again to start over"
            print(translated(words), file=sys.stderr)
        _flush()
        os._exit(130)  # by itself, python would end with the signal, which a parent process sees as -2
    if issubclass(kind, BrokenPipeError) and _nobody_reads():
        _flush()
        raise SystemExit(141)
    if disk_full(error):
        place = f" ({error.filename})" if getattr(error, "filename", None) else ""
        fail(f"no space is left on the disk{place}; what was complete is unchanged: make room, and run it again")
    if issubclass(kind, ModuleNotFoundError) and (package := _package(error.name)):
        file = shlex.quote(_from_here(ROOT / "requirements.txt"))
        fail(f"the package {package!r} is not installed; install all of them with: pip install -r {file}")
    print(redact("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="")


def _end_thread(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer is a thread: where the disk is full, the program says so itself."""
    if not disk_full(args.exc_value):
        threading.__excepthook__(args)


def _end_without_reader() -> None:
    if not _flush():
        os._exit(141)  # the interpreter would report its own attempt to flush, and end with 120


def _flush() -> bool:
    """Write out what stdout still holds; False where nobody reads it any more, and then it is gone for good."""
    try:
        if sys.stdout:  # None where it was closed at the start
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing tries again
        return False
    except ValueError:  # closed
        pass
    return True


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose other end is closed; an error of another pipe is no reason to be quiet."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # Windows has no poll; a replaced stdout no fileno
        return False


def _package(module: str | None) -> str | None:
    """The package in requirements.txt, or beside them, that a missing module belongs to; None where it is no such."""
    try:
        lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [match[0] for line in lines if (match := re.match(r"[\w.-]+", line))] + COMES_ALONG
    modules = {name.lower().replace("-", "_"): name for name in names}
    modules["yaml"] = "PyYAML"
    return modules.get(module)


def _from_here(path: Path) -> str:
    """A path from the current folder or from the root, whichever is shorter."""
    return min(os.path.relpath(path), str(path), key=len)


def _constants(path: Path) -> dict[str, Constant]:
    """The settings of a script; a mistake in its source is the user's."""
    try:
        return read_constants(path)
    except SyntaxError as error:
        fail(f"{error.filename}, line {error.lineno}: {error.msg}")


def _all_constants(root: Path) -> dict[str, dict[str, Constant]]:
    """The settings of the steps in `root`, by file name; a script that is not there is left out."""
    return {name: _constants(root / name) for name in SECTIONS if (root / name).is_file()}


def check_values(script: str, known: dict[str, Constant], values: dict, prefix: str = "--") -> list[str]:
    """What is wrong with the values of a script's constants as they stand there: [] or a sentence each.

    values: {name: value}, the constants' own where it has none; prefix: of the flags that mend it in run_all.py.
    """
    problems = []
    for name, constant in known.items():
        value = values.get(name, constant.default)
        if problem := constant.problem(value):
            mended = as_text(constant.mended(value))
            line = f", line {constant.line}" if value == constant.default else ""
            problems.append(f"{script}{line}: {problem}: change it there, or {prefix}{name.lower()} {mended}")
    return problems


def override(constants: dict, argv: list[str] | None = None, check: Callable[[dict], list[str]] | None = None) -> dict:
    """Apply `--preset` and then the flags to a script's constants, in place: `override(globals())`.

    `constants` needs `__file__`: names, types and help are read from that source, presets from the folder
    configs/presets beside it. `argv` is sys.argv[1:] unless given. Prints in one line what changed and where it
    came from, on the main process only, and returns {name: new value} of what changed. `--help` prints the settings
    and exits with 0, mistakes exit with 2.

    `check` finds what else can be seen before the heavy imports: it is given {name: value} of all settings as they
    would be, and returns a sentence for each problem. They are shown with the others:
    `override(globals(), check=lambda values: check_model(values["MODEL_NAME"]))`.
    """
    global _run, _quiet, _aside
    script, known, argv = _begin(constants, argv)
    problems = []

    def scripts() -> dict:
        return _all_constants(script.parent) | {script.name: known}

    def owners() -> dict:
        run_all = script.parent / RUN_ALL
        return scripts() | ({RUN_ALL: _constants(run_all)} if run_all.is_file() else {})

    preset, flags = read_flags(argv, {script.name: known}, owners, problems)
    chosen = {} if preset is None else read_preset(preset, script.parent, scripts(), problems).get(script.name, {})
    chosen |= {flag.constant.name: (flag.value, "command line") for flag in flags}
    untouched = {name: constant for name, constant in known.items() if name not in chosen}
    problems += check_values(script.name, untouched, constants)
    if check:
        now = {name: constants.get(name, constant.default) for name, constant in known.items()}
        problems += check(now | {name: value for name, (value, _) in chosen.items()})
    use(constants | {name: value for name, (value, _) in chosen.items()})
    if problems:
        fail(*problems)
    changed, told = {}, {}
    for name, (value, source) in chosen.items():
        old = constants.get(name, known[name].default)
        if value != old or type(value) is not type(old):
            constants[name] = changed[name] = value
            told.setdefault(source.partition(", section ")[0], []).append(f"{name} = {value!r}")
    _quiet = bool(constants.get("QUIET"))
    _aside = bool(constants.get("PROMPT") or constants.get("CHAT"))
    if told:
        say("settings: " + "; ".join(f"{', '.join(changes)} ({source})" for source, changes in told.items()))
    _run = Run(script, preset, {flag.constant.name.lower(): flag.typed for flag in flags})
    return changed


def override_all(constants: dict, argv: list[str] | None = None) -> dict[str, list[str]]:
    """The same for run_all.py: its own constants in place, and the rest dealt out: {section: argv of its script}.

    `--num_epochs 1` goes to every step that has it, `--lora.learning_rate 1e-4` to one, `--preset X` to all. The
    preset comes first, then the general flags, then a step's own, so that those win. Each comes out as one word,
    `--name=value`. DEMO is `PRESET = "demo"` and `YES = True` in one word.
    """
    global _run
    script, own, argv = _begin(constants, argv)
    scripts, problems = _all_constants(script.parent), []
    steps = {None: own} | _by_section(scripts)
    preset, flags = read_flags(argv, steps, lambda: scripts | {script.name: own}, problems)
    chosen = {flag.constant.name: flag.value for flag in flags if flag.step is None}
    typed = chosen | ({"PRESET": preset} if preset else {})
    constants.update(typed)
    use(constants)
    if constants["DEMO"]:
        if typed.get("PRESET", "demo") != "demo":
            problems.append(f"--demo is --preset demo --yes; leave it out for --preset {preset}, or take --yes")
        constants.update(PRESET="demo", YES=True)
    problems += check_values(script.name, {name: own[name] for name in own if name not in typed}, constants)
    dealt = _deal(constants["PRESET"], [flag for flag in flags if flag.step], scripts, script.parent, problems)
    prefixes = [f"{flag.step}." if flag.own else "" for flag in flags]
    names = [prefix + flag.constant.name.lower() for prefix, flag in zip(prefixes, flags, strict=True)]
    _run = Run(script, preset, {name: flag.typed for name, flag in zip(names, flags, strict=True)})
    return dealt


def resolved(script: Path, argv: list[str]) -> dict[str, object]:
    """{name: value} of the settings that a script would have with these words; they were checked before."""
    known, problems = _constants(script), []
    preset, flags = read_flags(argv, {script.name: known}, dict, problems)
    chosen = {} if preset is None else read_preset(preset, script.parent, _all_constants(script.parent), problems)
    values = {name: constant.default for name, constant in known.items()}
    values |= {name: value for name, (value, _) in chosen.get(script.name, {}).items()}
    return values | {flag.constant.name: flag.value for flag in flags}


def _by_section(scripts: dict[str, dict[str, Constant]]) -> dict[str, dict[str, Constant]]:
    return {section: scripts.get(file, {}) for file, section in SECTIONS.items()}


def _deal(preset: str | None, flags: list[Flag], scripts: dict, root: Path, problems: list) -> dict[str, list[str]]:
    """{section: argv of its script}; ends with exit code 2 where there are problems, the preset's among them."""
    chosen = {} if preset is None else read_preset(preset, root, scripts, problems)
    for file, known in scripts.items():
        touched = {*chosen.get(file, {}), *(flag.constant.name for flag in flags if flag.step == SECTIONS[file])}
        untouched = {name: constant for name, constant in known.items() if name not in touched}
        problems += check_values(file, untouched, {}, f"--{SECTIONS[file]}.")
    if problems:
        fail(*problems)
    if preset and preset.endswith((".yaml", ".yml")):
        preset = preset_path(preset, root)  # absolute: a step may run in another folder
    first = [] if preset is None else [f"--preset={preset}"]
    flags = sorted(flags, key=lambda flag: flag.own)  # stable: general ones first, else as given
    words = {
        step: [f"{flag.constant.flag}={flag.text}" for flag in flags if flag.step == step]
        for step in SECTIONS.values()
    }
    return {step: first + words[step] for step in words}


def _begin(constants: dict, argv: list[str] | None) -> tuple[Path, dict[str, Constant], list[str]]:
    """(script, its constants, its words) of what calls `override`; answers `--help`."""
    if constants.get("__name__") == "__main__":
        quiet_errors()
    argv = sys.argv[1:] if argv is None else list(argv)
    script = Path(os.path.abspath(constants["__file__"]))
    known = _constants(script)
    if "-h" in argv or "--help" in argv:
        print(_help(script, constants.get("__doc__") or "", known))
        raise SystemExit(0 if _flush() else 141)
    return script, known, argv


def _help(script: Path, purpose: str, known: dict[str, Constant]) -> str:
    """What --help prints: what the script is for, and its settings in their groups."""
    presets = ", ".join(sorted(path.stem for path in script.parent.glob("configs/presets/*.yaml")))
    lines = [purpose.strip(), "", f"usage: python {script.name} [--preset NAME] [--setting VALUE ...]", ""]
    offer = textwrap.fill(f"settings from a file: {presets or 'none here'}; or a path to a .yaml file", 113)
    lines += ["  --preset NAME", textwrap.indent(offer, " " * 6)]
    if script.name == RUN_ALL:  # reading them takes a moment, so only here
        with contextlib.suppress(ModuleNotFoundError):  # PyYAML; help must not need an installation
            lines += [f"      {name:12} {about}" for name, about in list_presets(script.parent).items()]
    lines += ["  -h, --help\n      show this text and exit"]
    listed = [constant for name, constant in known.items() if name != "PRESET"]
    for group in dict.fromkeys(constant.group for constant in listed):
        lines += ["", f"{group}:"]
        for constant in (constant for constant in listed if constant.group == group):
            text = f"{constant.help} (default: {as_text(constant.default)})"
            text = textwrap.fill(text, 113, break_on_hyphens=False)
            lines += [f"  {constant.flag} {constant.shown}", textwrap.indent(text, " " * 6)]
    return "\n".join(lines).strip()


# --- the settings of a run, for its functions and for its messages


def freeze(constants: dict, **changes: object) -> object:
    """A script's settings as one frozen object: `settings = freeze(globals())`, then `settings.BATCH_SIZE`.

    constants: the globals() of a script; exactly the names that `read_constants` finds in its `__file__` become
    attributes, with the values that they have now. changes: values that take their place, such as what "auto"
    turned out to be: `freeze(globals(), PRECISION="bf16")`. A name that the script lacks is a TypeError.

    It is a frozen dataclass: assigning raises, `vars(settings)` and `dataclasses.asdict(settings)` are
    {name: value}, `dataclasses.replace(settings, SEED=1)` is a changed copy. Lists and dicts are copies, so what
    is done to the constants later does not reach it.
    """
    known = read_constants(constants["__file__"])
    if unknown := sorted(changes.keys() - known.keys()):
        script = Path(constants["__file__"]).name
        raise TypeError(f"{script} has no setting {unknown[0]}; it has {', '.join(known)}")
    return _frozen({name: changes.get(name, constants[name]) for name in known})


def _frozen(values: dict) -> object:
    # a class that is made here cannot be found by its name, so a pickle (datasets' workers) makes it anew
    again = {"__reduce__": lambda self: (_frozen, (vars(self),))}
    return make_dataclass("Settings", list(values), frozen=True, namespace=again)(**deepcopy(values))


def command(script: str | Path, *words: str) -> str:
    """The command line that runs `script` with the settings of this run, as a user would type it.

    script: a step ("1_prepare_dataset.py"), `__file__`, or a path below the project's folder. words: what to add;
    a flag among them beats a carried one. After `2_lora_finetuning.py --preset demo --data_dir d --lora_r 8`,
    `command("1_prepare_dataset.py", "--seed", "1")` is

        python 1_prepare_dataset.py --preset demo --data_dir d --seed 1

    The same script is given all flags of this run. Another step is given those that it has too with the same
    default; learning rates and batch sizes, which differ between the methods, are not carried. OUTPUT_DIR of a
    training is LORA_DIR or FULL_DIR of the evaluation.
    """
    path = Path(os.path.abspath((_run.script.parent if _run else ROOT) / script))
    typed = {word.partition("=")[0][2:].replace("-", "_") for word in map(str, words) if word.startswith("--")}
    typed |= {name.removeprefix("no_") for name in typed}
    carried = {} if _run is None else _carried(_run, path)
    line = [_from_here(path)]
    for name, text in carried.items():
        if name not in typed:
            joined = text is not None and text.startswith("--")
            line += [f"--{name}={text}"] if joined else [f"--{name}", *([] if text is None else [text])]
    return "python " + shlex.join([*line, *map(str, words)])


def _carried(run: Run, path: Path) -> dict[str, str | None]:
    """The preset and the flags of `run` that the script `path` is to be given, too."""
    preset = {"preset": run.preset} if run.preset else {}
    if path == run.script:
        return preset | run.flags
    if path.name == RUN_ALL and run.script.name in SECTIONS:  # what all steps share
        return preset | {name: run.flags[name] for name in ("model_name", "data_dir") if name in run.flags}
    if not {path.name, run.script.name} <= SECTIONS.keys() or not path.is_file():
        return {}  # takes no flags of ours
    own, others, flags = read_constants(run.script), read_constants(path), {}
    for name, text in run.flags.items():
        script, renamed = SAME_FOLDER.get((run.script.name, name), (None, None))
        constant, other = own.get(name.upper()), others.get(name.upper())
        if script == path.name:
            flags[renamed] = text
        elif constant and other and (constant.default, constant.types) == (other.default, other.types):
            flags[name] = text
    return preset | flags
