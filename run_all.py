"""Runs the four steps one after the other; without being told which, it opens a menu.

    python run_all.py                         the menu: what this machine has, what is done, what to do next
    python run_all.py status                  what is done, out of date or interrupted; --json for programs
    python run_all.py --demo                  everything in minutes on a laptop, without a network
    python run_all.py --preset gpu_24gb --steps 2-4 --num_epochs 1 --lora.learning_rate 1e-4
    python run_all.py --preset gpu_24gb --sweep   a fair comparison: learning rates and seeds for each method

Any setting of a step is a flag here too: --num_epochs 1 goes to every step that has it, --lora.learning_rate 1e-4
to one of them (prepare, lora, full or evaluate). `python 2_lora_finetuning.py --help` lists the settings of a step.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

from configs.settings import ROOT, SECTIONS, command, fail, override_all, resolved
from configs.typed import parse_steps, status_asked
from configs.values import read_constants
from configs.words import TEXTS, spoken

# --- what to run
PRESET: str | None = None  # settings for your machine, from configs/presets/NAME.yaml; none: the scripts' own
STEPS: str | None = None  # which steps, e.g. 1,2 or 2-4 or all; none: ask
YES = False  # do not ask: all steps
DEMO = False  # the same as --preset demo --yes
RERUN = False  # run what is done and up to date again, too; a trained model is moved to outputs/history before
LANGUAGE: Literal["auto", "en", "zh"] = "auto"  # language of the menu and of the reports; auto: the terminal's

# --- the sweep
# One run of each method proves little: the rates decide, and so does the luck of a seed.
SWEEP: bool | str = False  # compare methods fairly: a question of configs/comparison, or your own file
SELECTION_SEEDS: Annotated[int, "x >= 1"] = 1  # runs of a learning rate when the best one is looked for
SEEDS: Annotated[int | None, "x >= 2"] = None  # fresh runs of each method at its best rate; none: 5, and 3 in the demo
# Where full runs cost too much, choose the rates on fewer rows; short runs prefer higher rates.
SELECTION_FRACTION: Annotated[float | None, "0 < x <= 1"] = None  # share of the rows; none: all, 0.34 in the demo
MARGIN: Annotated[float, "0 < x < 1"] = 0.95  # LoRA is good enough where it keeps this share of full's gain
WEIGHT_ANALYSIS = False  # look for intruder dimensions in the weights, which full fine-tuning does not make
SWEEP_DIR = "outputs/sweep"  # runs, sweep.json and the report of the sweep
# For any other scheduler, --plan_only prints the commands of the runs.
SWEEP_EXECUTOR: Literal["here", "slurm", "submitit_local"] = "here"  # where the runs are trained; slurm: by submitit
SWEEP_JOB: str | None = None  # submitit's parameters of a job: timeout_min=240,gpus_per_node=1,slurm_partition=gpu

if __name__ == "__main__":
    as_written, (asked, typed) = dict(globals()), status_asked(sys.argv[1:])
    flags_of_steps = override_all(globals(), typed)

from configs.ending import FOLLOWED
from configs.machine import count_gpus
from configs.menu import Menu
from configs.screen import Settings, show_status

SCRIPTS = list(SECTIONS)
# The base model of each demo, and what configs/demo/base_model.py is told to make it.
DEMOS = {"demo": (Path("outputs/demo_base_model"), []), "demo_zh": (Path("outputs/demo_base_model_zh"), ["zh"])}


def run(command: list[str], last: bool = True) -> int:
    """Run a step as a child process; its exit code. last: whether it is to name the next command at its end.

    A signal to this process is the child's to act on, and ends the whole run even where the child was about to end
    well.
    """
    child, received = None, []

    def note(number: int, frame: object) -> None:
        received.append(number)
        # Ctrl-C reaches the child from the terminal; others may reach this process alone, so they are handed on
        if number != signal.SIGINT and child:
            child.send_signal(number)

    # before the child starts, so that no moment is uncovered; a handler, unlike SIG_IGN, is not inherited
    hangup = getattr(signal, "SIGHUP", None)  # a terminal that was closed; nohup has it ignored
    heard = [hangup] if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN else []
    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, *heard)}
    child = subprocess.Popen(command, env={**os.environ, "LANGUAGE": spoken(LANGUAGE), FOLLOWED: "" if last else "1"})
    for number in set(received) - {signal.SIGINT}:
        child.send_signal(number)
    code = child.wait()
    for number, handler in old.items():
        signal.signal(number, handler)
    if received and not code:
        return 128 + received[-1]
    return code if code >= 0 else 128 - code  # killed by a signal, as a shell reports it


def started(number: int, gpus: int) -> tuple[list[str], str]:
    """(how a step's script is started, the same for people): by accelerate where several GPUs can share the work."""
    if number < 2 or gpus < 2:
        return [sys.executable], "python"
    words = ["--multi_gpu", "--num_processes", str(gpus), "--num_machines", "1", "--mixed_precision", "no"]
    words += ["--dynamo_backend", "no"]  # these are accelerate's defaults, which it else reports as missing
    return [sys.executable, "-m", "accelerate.commands.launch", *words], f"accelerate launch --num_processes {gpus}"


def done_before(script: Path, given: list[str]) -> str:
    """What came out of a step that is done and up to date, to be told instead of running it again; else ""."""
    from configs import state

    settings = resolved(script, given)
    if RERUN or any(settings.get(name) for name in ("PLAN_ONLY", "PROMPT", "CHAT", "DRY_RUN")):
        return ""
    known = state.of_step(SECTIONS[script.name], state.as_asked(settings, given))
    why = known.zh if spoken(LANGUAGE) == "zh" else known.why
    return why or known.kind if known.kind == "done" else ""


def in_language(script: Path, given: list[str]) -> list[str]:
    """What a step is given, and its report in the menu's language: who reads a Chinese menu wants such reports."""
    name = {"1_prepare_dataset.py": "LANGUAGE", "4_evaluate_compare.py": "REPORT_LANGUAGE"}.get(script.name)
    flag, language = f"--{name}=".lower(), spoken(LANGUAGE)
    if language == "en" or name not in read_constants(script) or any(word.startswith(flag) for word in given):
        return given
    return [*given, flag + language]


def sweep(words: dict, flags: dict[str, list[str]], gpus: int, question: bool | str) -> int:
    """Do the sweep on the data that are there; its exit code."""
    from configs.comparison.sweep import run_sweep

    demo = PRESET in DEMOS
    settings = SimpleNamespace(
        SWEEP=question,
        SWEEP_DIR=SWEEP_DIR,
        SELECTION_SEEDS=SELECTION_SEEDS,
        SEEDS=SEEDS or (3 if demo else 5),
        SELECTION_FRACTION=SELECTION_FRACTION or (0.34 if demo else 1.0),
        MARGIN=MARGIN,
        WEIGHT_ANALYSIS=WEIGHT_ANALYSIS,
        SWEEP_EXECUTOR=SWEEP_EXECUTOR,
        SWEEP_JOB=SWEEP_JOB,
        LANGUAGE=spoken(LANGUAGE),
        RERUN=RERUN,
    )
    values = {section: resolved(ROOT / script, flags[section]) for script, section in SECTIONS.items()}

    def agreed() -> bool:
        return YES or not sys.stdin.isatty() or input(words["sweep"]).strip().lower() not in ("n", "no", "q", "否")

    return run_sweep(settings, flags, values, gpus, agreed)


def run_steps(steps: list[int], words: dict, flags: dict[str, list[str]], last: bool = True) -> None:
    """Run these steps, but none that is done and up to date; ends the program where one fails.

    last: whether nothing follows, so that the times are told.
    """
    from configs import state

    plan = [(n, words["steps"][n - 1], ROOT / SCRIPTS[n - 1], flags[SECTIONS[SCRIPTS[n - 1]]]) for n in steps]
    other_model = any(word.startswith("--model_name=") for given in flags.values() for word in given)
    model, told = DEMOS.get(PRESET, (None, []))
    if model and not other_model and not (model / "config.json").exists():
        plan.insert(0, (0, words["demo_model"], ROOT / "configs" / "demo" / "base_model.py", told))
    if DEMO and spoken(LANGUAGE) == "zh":
        print(words["other_demo"].format(command=f"python {os.path.relpath(__file__)} --preset demo_zh --yes"))
    began, times, gpus = time.monotonic(), [], count_gpus()
    for number, what, script, given in plan:
        if number and (why := done_before(script, given)):
            print(f"\n=== {number}  {what}: {words['skipped'].format(why=why)}", flush=True)
            continue
        start_words, shown = started(number, gpus)
        given = in_language(script, given) if number else given
        print(f"\n=== {number}  {what}: {shown} {shlex.join([os.path.relpath(script), *given])}", flush=True)
        start = time.monotonic()
        code = run([*start_words, str(script), *given], last and number == plan[-1][0])
        times.append((number, what, time.monotonic() - start))
        if code == 141:  # `| head`: nobody reads on, and the step has ended without a word
            sys.exit(code)
        if code:
            left = ",".join(str(n) for n in steps if n >= number)
            print(f"\n{words['failed'].format(n=number, code=code)}", file=sys.stderr)
            print(f"  {command(__file__, '--steps', left)}", file=sys.stderr)
            sys.exit(code)
        values = resolved(script, given) if number else {}
        if values.get("DRY_RUN"):
            sys.exit(0)  # nothing was written for the steps to come
        if number and not (values.get("PROMPT") or values.get("CHAT")):
            state.note_seconds(SECTIONS[script.name], values, times[-1][2])
    if last:
        print(f"\n{words['done'].format(seconds=time.monotonic() - began)}")
    for number, what, seconds in times if last else ():
        print(f"  {number}  {seconds:6.1f} s  {what}")


def take(words: list[str]) -> Settings:
    """Read the command line anew, with what was set in the menu. Raises: SystemExit(2) where it is wrong."""
    constants = dict(as_written)
    flags = override_all(constants, words)
    globals().update(constants)
    return in_force(flags)


def in_force(flags: dict[str, list[str]]) -> Settings:
    """The settings of this moment, for the menu and for `status`."""
    return Settings({name: globals()[name] for name in read_constants(__file__)}, spoken(LANGUAGE), flags)


def open_menu() -> None:
    """The menu, until it is left; what it is told is run here."""
    menu, action = Menu(typed, take), ""
    while True:
        action, what = menu.choose(show=action != "ask")  # the answers stay in sight
        words, flags = menu.words, menu.settings.flags
        if action == "quit":
            print("" if menu.ran else words["nothing"])
            return
        menu.ran = True
        if action == "steps":
            run_steps(what, words, flags)
        elif action == "ask":
            script = ROOT / SCRIPTS[3]
            how = f"--prompt={what}" if what else "--chat"
            run([sys.executable, str(script), *in_language(script, flags["evaluate"]), how])
        else:
            run_steps([1], words, flags, last=False)
            try:
                code = sweep(words, flags, count_gpus(), what)
            except SystemExit as end:
                code = end.code
            if code not in (0, 2):  # after a mistake, which was named, another answer may be given
                sys.exit(code)


def main(flags: dict[str, list[str]]) -> None:
    """Run the steps that STEPS or YES name, the sweep, `status` or the menu; `flags` are {section: its argv}."""
    words = TEXTS[spoken(LANGUAGE)]
    names = [resolved(ROOT / SCRIPTS[n], flags[SECTIONS[SCRIPTS[n]]])["PUSH_TO_HUB"] for n in (1, 2)]
    if names[0] and names[0] == names[1]:
        fail(
            f"--push_to_hub {names[0]} is for both models, and one would replace the other; give each a name of its "
            f"own: --lora.push_to_hub {names[0]}-lora --full.push_to_hub {names[0]}-full"
        )
    if asked:
        show_status(in_force(flags), asked == "json", command)
    elif SWEEP is not False:
        run_steps([1], words, flags, last=False)  # the sweep begins with data
        sys.exit(sweep(words, flags, count_gpus(), SWEEP))
    elif STEPS is not None:
        if (steps := parse_steps(STEPS)) is None:
            fail(f"--steps {STEPS!r} is not a list of steps from 1 to 4, e.g. --steps 1,2 or --steps 2-4")
        run_steps(steps, words, flags)
    elif YES:
        run_steps([1, 2, 3, 4], words, flags)
    elif sys.stdin.isatty():
        open_menu()
    else:
        fail(words["no_terminal"])


if __name__ == "__main__":
    main(flags_of_steps)
