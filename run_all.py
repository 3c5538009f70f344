"""Runs the four steps one after the other, asking which ones unless told.

    python run_all.py                         asks which steps to run
    python run_all.py --demo                  everything in minutes on a laptop, without a network
    python run_all.py --preset gpu_24gb --steps 2-4 --num_epochs 1 --lora.learning_rate 1e-4
    python run_all.py --preset gpu_24gb --sweep   a fair comparison: learning rates and seeds for each method

Any setting of a step is a flag here too: --num_epochs 1 goes to every step that has it, --lora.learning_rate 1e-4
to one of them (prepare, lora, full or evaluate). `python 2_lora_finetuning.py --help` lists the settings of a step.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

from configs.settings import ROOT, SECTIONS, command, fail, list_presets, override_all, resolved

# --- what to run
PRESET: str | None = None  # settings for your machine, from configs/presets/NAME.yaml; none: the scripts' own
STEPS: str | None = None  # which steps, e.g. 1,2 or 2-4 or all; none: ask
YES = False  # do not ask: all steps
DEMO = False  # the same as --preset demo --yes
RERUN = False  # run what is done and up to date again, too; a trained model is moved to outputs/history before
LANGUAGE: Literal["en", "zh"] = "en"  # language of the menu and of the report

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
    flags_of_steps = override_all(globals())

SCRIPTS = list(SECTIONS)
DEMO_MODEL = Path("outputs/demo_base_model")
TEXTS = {
    "en": {
        "steps": ["prepare the data", "LoRA fine-tuning", "full fine-tuning", "evaluate and compare"],
        "ask": "Which steps? (e.g. 1,2 or 2-4; Enter: all; q: quit) ",
        "wrong": "Please answer with numbers from 1 to 4, such as 1,2 or 2-4.",
        "presets": "Presets for your machine (--preset NAME):",
        "no_terminal": "there is no terminal to ask which steps to run; say so: --yes (all) or --steps 1,2",
        "demo_model": "the demo's base model (made once)",
        "nothing": "Nothing was run.",
        "failed": "step {n} ended with exit code {code}; when the cause is mended, go on with:",
        "sweep": "Begin? (Enter: yes; n: no) ",
        "skipped": "done already ({why}); to run it again: --rerun",
        "done": "All done in {seconds:.0f} s:",
    },
    "zh": {
        "steps": ["准备数据", "LoRA 微调", "全量微调", "评估与比较"],
        "ask": "要运行哪些步骤？（例如 1,2 或 2-4；直接回车：全部；q：退出）",
        "wrong": "请输入 1 到 4 之间的数字，例如 1,2 或 2-4。",
        "presets": "按你的机器选择预设（--preset 名称）：",
        "no_terminal": "没有终端，无法询问要运行哪些步骤；请用 --yes（全部）或 --steps 1,2 指定",
        "demo_model": "演示用的基座模型（只生成一次）",
        "nothing": "没有运行任何步骤。",
        "failed": "第 {n} 步已结束，退出码 {code}；解决问题后，用下面的命令继续：",
        "sweep": "开始吗？（回车：是；n：否）",
        "skipped": "已完成（{why}）；要重新运行：--rerun",
        "done": "全部完成，用时 {seconds:.0f} 秒：",
    },
}


def parse_steps(text: str) -> list[int] | None:
    """Step numbers from "1,2", "2-4", "all" or "", in running order; None for anything else."""
    # a Chinese input method types these instead of a comma and a hyphen
    text = re.sub("-+", "-", text.translate(str.maketrans("，、－—–", ",,---"))).strip().lower()
    if text in ("", "all", "a", "全部"):
        return [1, 2, 3, 4]
    chosen: set[int] = set()
    for part in text.replace(" ", ",").split(","):
        bounds = re.fullmatch(r"([1-4])(?:-([1-4]))?", part)
        if part and not (bounds and bounds[1] <= (bounds[2] or bounds[1])):
            return None
        if bounds:
            chosen |= set(range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1))
    return sorted(chosen) or None


def ask(words: dict) -> list[int]:
    """Show the menu and read the answer; an empty list means to leave."""
    for number, (script, what) in enumerate(zip(SCRIPTS, words["steps"], strict=True), 1):
        print(f"  {number}  {script:24} {what}")
    print(f"\n{words['presets']}")
    for name, description in list_presets(ROOT).items():
        print(f"  {name:12} {description}")
    print()
    while True:
        try:
            answer = input(words["ask"])
        except EOFError:  # Ctrl-D
            print()
            return []
        except KeyboardInterrupt:
            print(f"\n{words['nothing']}")
            sys.exit(130)
        if answer.strip().lower() in ("q", "quit", "exit"):
            return []
        if (steps := parse_steps(answer)) is not None:
            return steps
        print(words["wrong"])


def run(command: list[str]) -> int:
    """Run a step as a child process; its exit code.

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
    child = subprocess.Popen(command)
    for number in set(received) - {signal.SIGINT}:
        child.send_signal(number)
    code = child.wait()
    for number, handler in old.items():
        signal.signal(number, handler)
    if received and not code:
        return 128 + received[-1]
    return code if code >= 0 else 128 - code  # killed by a signal, as a shell reports it


def visible_gpus() -> int:
    """How many NVIDIA GPUs the steps may use, without the seconds that torch takes to answer."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([name for name in chosen.split(",") if name.strip() not in ("", "-1")])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0


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
    if RERUN or settings.get("PLAN_ONLY") or settings.get("PROMPT"):
        return ""
    known = state.of_step(SECTIONS[script.name], settings)
    return known.why or known.kind if known.kind == "done" else ""


def sweep(words: dict, flags: dict[str, list[str]], gpus: int) -> int:
    """Do the sweep on the data that are there; its exit code."""
    from configs.comparison.sweep import run_sweep

    demo = PRESET == "demo"
    settings = SimpleNamespace(
        SWEEP=SWEEP,
        SWEEP_DIR=SWEEP_DIR,
        SELECTION_SEEDS=SELECTION_SEEDS,
        SEEDS=SEEDS or (3 if demo else 5),
        SELECTION_FRACTION=SELECTION_FRACTION or (0.34 if demo else 1.0),
        MARGIN=MARGIN,
        WEIGHT_ANALYSIS=WEIGHT_ANALYSIS,
        SWEEP_EXECUTOR=SWEEP_EXECUTOR,
        SWEEP_JOB=SWEEP_JOB,
        LANGUAGE=LANGUAGE,
        RERUN=RERUN,
    )
    values = {section: resolved(ROOT / script, flags[section]) for script, section in SECTIONS.items()}

    def agreed() -> bool:
        return YES or not sys.stdin.isatty() or input(words["sweep"]).strip().lower() not in ("n", "no", "q", "否")

    return run_sweep(settings, flags, values, gpus, agreed)


def main(flags: dict[str, list[str]]) -> None:
    """Run the steps that STEPS, YES or the menu name; `flags` are {section: what its script is given}."""
    words = TEXTS[LANGUAGE]
    report_language = f"--report_language={LANGUAGE}"  # who reads a Chinese menu wants such a report
    if LANGUAGE != "en" and not any(word.startswith("--report_language=") for word in flags["evaluate"]):
        flags["evaluate"].append(report_language)
    if SWEEP is not False:
        steps = [1]  # the sweep begins with data
    elif STEPS is not None:
        steps = parse_steps(STEPS)
        if steps is None:
            fail(f"--steps {STEPS!r} is not a list of steps from 1 to 4, e.g. --steps 1,2 or --steps 2-4")
    elif YES:
        steps = [1, 2, 3, 4]
    elif sys.stdin.isatty():
        steps = ask(words)
    else:
        fail(words["no_terminal"])
    if not steps:
        print(words["nothing"])
        return

    plan = [(n, words["steps"][n - 1], ROOT / SCRIPTS[n - 1], flags[SECTIONS[SCRIPTS[n - 1]]]) for n in steps]
    other_model = any(word.startswith("--model_name=") for given in flags.values() for word in given)
    if PRESET == "demo" and not other_model and not (DEMO_MODEL / "config.json").exists():
        plan.insert(0, (0, words["demo_model"], ROOT / "configs" / "demo" / "base_model.py", []))
    began, times, gpus = time.monotonic(), [], visible_gpus()
    for number, what, script, given in plan:
        if number and (why := done_before(script, given)):
            print(f"\n=== {number}  {what}: {words['skipped'].format(why=why)}", flush=True)
            continue
        start_words, shown = started(number, gpus)
        print(f"\n=== {number}  {what}: {shown} {shlex.join([os.path.relpath(script), *given])}", flush=True)
        start = time.monotonic()
        code = run([*start_words, str(script), *given])
        times.append((number, what, time.monotonic() - start))
        if code == 141:  # `| head`: nobody reads on, and the step has ended without a word
            sys.exit(code)
        if code:
            left = ",".join(str(n) for n in steps if n >= number)
            print(f"\n{words['failed'].format(n=number, code=code)}", file=sys.stderr)
            print(f"  {command(__file__, '--steps', left)}", file=sys.stderr)
            sys.exit(code)
    if SWEEP is not False:
        sys.exit(sweep(words, flags, gpus))
    print(f"\n{words['done'].format(seconds=time.monotonic() - began)}")
    for number, what, seconds in times:
        print(f"  {number}  {seconds:6.1f} s  {what}")


if __name__ == "__main__":
    main(flags_of_steps)
