"""Runs the four steps one after the other, asking which ones unless told.

    python run_all.py                         asks which steps to run
    python run_all.py --demo                  everything in minutes on a laptop, without a network
    python run_all.py --preset gpu_24gb --steps 2-4 --num_epochs 1 --lora.learning_rate 1e-4

  --preset NAME   settings for your machine, from configs/presets/NAME.yaml
  --steps LIST    which steps, e.g. 1,2 or 2-4 or all; asks when it is not given
  --yes           do not ask: all steps
  --demo          the same as --preset demo --yes
  --language en   language of the menu: en or zh

Any setting of a step is a flag here too: --num_epochs 1 goes to every step that has it, --lora.learning_rate
1e-4 to one (prepare, lora, full, evaluate). `python 2_lora_finetuning.py --help` lists the settings of a
step.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from configs.settings import SECTIONS, fail, list_presets, split_flags

ROOT = Path(__file__).resolve().parent
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
        "done": "全部完成，用时 {seconds:.0f} 秒：",
    },
}


def own_flags(argv: list[str]) -> tuple[dict, list[str]]:
    """run_all's own flags, and the rest, which belongs to the steps."""
    own = {"steps": None, "yes": False, "language": "en", "preset": None}
    rest, words = [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name in ("--yes", "--demo") and not equals:
            own["yes"] = True
            own["preset"] = "demo" if name == "--demo" else own["preset"]
        elif name in ("--steps", "--language", "--preset"):
            if not equals and not words:
                example = {"--steps": "1,2", "--language": "zh", "--preset": "demo"}[name]
                fail(f"{name} wants a value, e.g. {name} {example}")
            own[name[2:]] = value if equals else words.pop(0)
        else:
            rest.append(word)
    if own["language"] not in TEXTS:
        fail(f"--language {own['language']!r} is not there; choose {' or '.join(TEXTS)}")
    return own, rest


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
        except (EOFError, KeyboardInterrupt):
            print()
            return []
        if answer.strip().lower() in ("q", "quit", "exit"):
            return []
        if (steps := parse_steps(answer)) is not None:
            return steps
        print(words["wrong"])


def run(command: list[str]) -> int:
    """Run a step as a child process; its exit code. A signal to this process is the child's to act on, and
    ends the whole run even where the child was about to end well."""
    child, received = None, []

    def note(number: int, frame: object) -> None:
        received.append(number)
        # Ctrl-C reaches the child from the terminal; a SIGTERM reaches this process alone, so it is handed on
        if number == signal.SIGTERM and child:
            child.terminate()

    # before the child starts, so that no moment is uncovered; a handler, unlike SIG_IGN, is not inherited
    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    child = subprocess.Popen(command)
    if signal.SIGTERM in received:
        child.terminate()
    code = child.wait()
    for number, handler in old.items():
        signal.signal(number, handler)
    if received and not code:
        return 128 + received[-1]
    return code if code >= 0 else 128 - code  # killed by a signal, as a shell reports it


def main() -> None:
    argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        for name, description in list_presets(ROOT).items():
            print(f"  {name:12} {description}")
        return
    own, rest = own_flags(argv)
    words = TEXTS[own["language"]]
    preset = ["--preset", own["preset"]] if own["preset"] else []
    if own["language"] != "en" and not any("report_language" in word.replace("-", "_") for word in rest):
        rest = [*rest, "--report_language", own["language"]]  # who reads a Chinese menu wants such a report
    flags = split_flags(preset + rest, ROOT)
    if own["steps"] is not None:
        steps = parse_steps(own["steps"])
        if steps is None:
            fail(f"--steps {own['steps']!r} is not a list of steps from 1 to 4, e.g. --steps 1,2 or --steps 2-4")
    elif own["yes"]:
        steps = [1, 2, 3, 4]
    elif sys.stdin.isatty():
        steps = ask(words)
    else:
        fail(words["no_terminal"])
    if not steps:
        print(words["nothing"])
        return

    began, times = time.monotonic(), []
    plan = [
        (str(n), words["steps"][n - 1], [str(ROOT / SCRIPTS[n - 1]), *flags[SECTIONS[SCRIPTS[n - 1]]]]) for n in steps
    ]
    asked_for = any("--model_name" in word or "--model-name" in word for word in rest)
    if own["preset"] == "demo" and not asked_for and not (DEMO_MODEL / "config.json").exists():
        plan.insert(0, ("0", words["demo_model"], [str(ROOT / "configs" / "demo" / "base_model.py")]))
    for number, what, command in plan:
        print(
            f"\n=== {number}  {what}: python "
            f"{shlex.join(os.path.relpath(w) if w.endswith('.py') else w for w in command)}"
        )
        sys.stdout.flush()
        start = time.monotonic()
        code = run([sys.executable, *command])
        times.append((number, what, time.monotonic() - start))
        if code:
            left = [str(n) for n in steps if n >= int(number)]
            again = [w for w in (*preset, *rest)]
            language = [] if own["language"] == "en" else ["--language", own["language"]]
            print(f"\n{words['failed'].format(n=number, code=code)}", file=sys.stderr)
            print(
                f"  python {os.path.relpath(__file__)} {shlex.join(['--steps', ','.join(left), *again, *language])}",
                file=sys.stderr,
            )
            sys.exit(code)
    print(f"\n{words['done'].format(seconds=time.monotonic() - began)}")
    for number, what, seconds in times:
        print(f"  {number}  {seconds:6.1f} s  {what}")


if __name__ == "__main__":
    main()
