"""run_all.py in a terminal of its own, with stand-ins for the four steps, which take no time.

The stand-in steps are the real scripts down to `override(globals())`, so their settings are the real ones; what
follows there writes down what the step was given, and behaves as the test asks.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pexpect
from conftest import ROOT, SCRIPTS

from configs.words import TEXTS

STAND_IN = """
override(globals())
import json, signal, sys, time
from pathlib import Path

here = Path(__file__).resolve().parent
names = ("MODEL_NAME", "NUM_EPOCHS", "LEARNING_RATE", "SEED", "COLUMN_MAP")
seen = {name: globals()[name] for name in names if name in globals()}
with open(here / "calls.jsonl", "a") as file:
    file.write(json.dumps({"step": Path(__file__).name[0], "pid": os.getpid(), "argv": sys.argv[1:], **seen}))
    file.write("\\n")
behaviour = json.loads((here / "behaviour.json").read_text()).get(Path(__file__).name[0])
if isinstance(behaviour, int):
    sys.exit(behaviour)
if behaviour == "saves":  # as a training does that is asked to stop
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
if behaviour == "finishes":  # as a training does that is asked to stop while it writes its final folder
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
if behaviour:
    print("READY", flush=True)
    time.sleep(60)
"""
BASE_MODEL = """
import sys
from pathlib import Path
folder = Path("outputs/demo_base_model" + "_zh" * (sys.argv[1:] == ["zh"]))
folder.mkdir(parents=True)
(folder / "config.json").write_text("{}")
with open("calls.jsonl", "a") as file:
    file.write('{"step": "base model"}\\n')
"""
SMALL = "description: a small story\nall:\n  seed: 7\nlora:\n  learning_rate: 3e-4\n"


def make_folder(tmp_path: Path) -> Path:
    """run_all.py and configs/ as they are, beside four steps that only write down what they were given."""
    shutil.copy(ROOT / "run_all.py", tmp_path)
    (tmp_path / "configs" / "demo").mkdir(parents=True)
    (tmp_path / "configs" / "presets").mkdir()
    for path in (ROOT / "configs").glob("*.py"):
        shutil.copy(path, tmp_path / "configs" / path.name)
    for name in ("demo.yaml", "demo_zh.yaml"):
        shutil.copy(ROOT / "configs" / "presets" / name, tmp_path / "configs" / "presets" / name)
    for name in ("help_zh.yaml", "sentences_zh.yaml"):
        shutil.copy(ROOT / "configs" / name, tmp_path / "configs")
    for name in ("finance_qa.jsonl", "finance_qa_zh.jsonl"):
        shutil.copy(ROOT / "configs" / "demo" / name, tmp_path / "configs" / "demo")
    (tmp_path / "configs" / "presets" / "small.yaml").write_text(SMALL)
    (tmp_path / "configs" / "demo" / "base_model.py").write_text(BASE_MODEL)
    for name in SCRIPTS:
        head, guard, _ = (ROOT / name).read_text("utf-8").partition('\nif __name__ == "__main__":')
        assert guard
        (tmp_path / name).write_text(head + "\nimport os\n" + STAND_IN)
    behave(tmp_path)
    return tmp_path


def behave(folder: Path, **behaviour: object) -> None:
    """behave(folder, _2=7): from now on step 2 ends with exit code 7; see STAND_IN for the words."""
    (folder / "behaviour.json").write_text(json.dumps({k[1:]: v for k, v in behaviour.items()}))


def calls(folder: Path) -> list[dict]:
    """What was run since the last call of this function, in order."""
    path = folder / "calls.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [json.loads(line) for line in lines]


def steps(folder: Path) -> str:
    """The numbers of the steps that were run since the last call, in order."""
    return "".join(call["step"] for call in calls(folder))


def run(folder: Path, *words: str, cwd: Path | None = None, **more: object) -> subprocess.CompletedProcess:
    """run_all.py without a terminal."""
    return subprocess.run(
        [sys.executable, str(folder / "run_all.py"), *words],
        cwd=cwd or folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=30,
        **more,
    )


def terminal(folder: Path, *words: str, python: tuple = (), **more: object) -> pexpect.spawn:
    """run_all.py in a terminal of its own."""
    command = [*python, str(folder / "run_all.py"), *words]
    more["env"] = {"TERM": "xterm-256color", **(more.get("env") or {**os.environ, "TERM": "xterm-256color"})}
    child = pexpect.spawn(sys.executable, command, cwd=str(folder), encoding="utf-8", timeout=20, **more)
    child.delaybeforesend = None  # pexpect would wait 50 ms before each answer
    return child


def end(child: pexpect.spawn) -> str:
    """What else it prints until it ends, with line ends as files have them."""
    child.expect(pexpect.EOF)
    child.close()
    return child.before.replace("\r\n", "\n")


def leave(child: pexpect.spawn, language: str = "en") -> str:
    """What it prints until it asks again; then the menu is left."""
    child.expect_exact(TEXTS[language]["prompt"])
    shown = child.before.replace("\r\n", "\n")
    child.sendline("q")
    end(child)
    return shown
