"""What the tests share: small real models and data, made here, and the scripts run as real subprocesses."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SCRIPTS = ["1_prepare_dataset.py", "2_lora_finetuning.py", "3_full_finetuning.py", "4_evaluate_compare.py"]

# The GPU that the GPU tests give back to their children: the first that the user lets us see, or "" for none. It
# stands in the environment because the workers of pytest-xdist find CUDA_VISIBLE_DEVICES hidden already.
os.environ.setdefault("TEST_GPU", os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0])
# Nothing a test starts may reach out, find this machine's GPU or its user's caches, or fight over the cores.
os.environ.update(
    HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", HF_HUB_DISABLE_TELEMETRY="1", CI="1"
)
os.environ.pop("HF_TOKEN", None)
os.environ["LC_ALL"] = "C.UTF-8"  # all would be said in the language of this terminal
os.environ.pop("LANGUAGE", None)
for name in ("COLUMNS", "LINES"):  # pytest-xdist sets them, and a test's own terminal would not have its own width
    os.environ.pop(name, None)
# A shell that puts the suite into the background lets it ignore Ctrl-C, and every child would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run(*command: object, cwd: Path, env: dict | None = None, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run a script of the project (by name) or a python command line in `cwd`, as a user would."""
    words = [str(word) for word in command]
    if words[0].endswith(".py") and not os.path.isabs(words[0]):
        words[0] = str(ROOT / words[0])
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


def ok(result: subprocess.CompletedProcess) -> str:
    """The output of a run that must have succeeded."""
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result.stdout


def plain(text: str) -> str:
    """Commands in a text as they are typed where the scripts lie: `python /path/to/1_x.py` is `python 1_x.py`."""
    return re.sub(r"python \S*?(\d_\w+\.py|run_all\.py)", r"python \1", text)


def refused(result: subprocess.CompletedProcess, *said: str) -> list[str]:
    """The `error:` lines of a run that must have ended as the user's mistake: exit code 2, no traceback."""
    assert result.returncode == 2, f"exit code {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    assert "Traceback" not in result.stderr
    errors = [plain(line) for line in result.stderr.splitlines() if line.startswith("error: ")]
    for words in said:
        assert words in "\n".join(errors), errors
    return errors


def load_script(name: str):
    """A numbered script as a module, with its constants at their defaults."""
    spec = importlib.util.spec_from_file_location(Path(name).stem.lstrip("0123456789_"), ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_rows(path: Path, rows: list) -> Path:
    """A .jsonl file of `rows`."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# Flags that make a training of the tiny model short and exact on any CPU.
SHORT = (
    "--precision fp32 --gradient_checkpointing false --logging_steps 1 --eval_steps 2 --save_steps 2 --batch_size 2 "
    "--gradient_accumulation_steps 2 --max_steps 4 --warmup_ratio 0.1"
).split()


@pytest.fixture(autouse=True)
def no_leftover_precision():
    """TrainingArguments(bf16=True) leaves this variable, and later trainers of the same process would read it."""
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


@pytest.fixture(autouse=True)
def no_leftover_language():
    """A script that a test runs in this process decides the language of all that is said in it."""
    from configs import settings, translation

    yield
    translation.use({})
    settings._run, settings._quiet, settings._aside = None, False, False  # nor its flags, in commands that are shown


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with a tiny Phi model and its tokenizer, as phi-2 in everything but size."""
    from hub import tiny_phi

    return tiny_phi(tmp_path_factory.mktemp("tiny") / "tiny-phi")


@pytest.fixture(scope="module")
def scripts() -> dict:
    """Scripts 2 and 3 as modules, by name."""
    return {name: load_script(name) for name in SCRIPTS[1:3]}


@pytest.fixture(scope="session")
def tokenizer(tiny):
    """The tiny model's tokenizer, with the template of a base model."""
    from configs import chat

    return chat.load_tokenizer(str(tiny), None, "auto")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, tiny) -> Path:
    """A working folder in which step 1 has prepared 160 rows for the tiny model. Copy it before writing."""
    from hub import finance_rows

    folder = tmp_path_factory.mktemp("prepared")
    rows = write_rows(folder / "rows.jsonl", finance_rows(160))
    ok(run(SCRIPTS[0], "--dataset_name", rows, "--model_name", tiny, "--eval_fraction", "0.2", cwd=folder))
    return folder


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, prepared, tiny):
    """Makes working folders with data/ and the tiny model in model/."""

    import shutil

    def make() -> Path:
        work = tmp_path_factory.mktemp("work") / "here"
        shutil.copytree(prepared, work)
        shutil.copytree(tiny, work / "model")
        return work

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny, prepared) -> Path:
    """A copy of `prepared` in which steps 2 and 3 have made their models in four optimizer steps."""
    import shutil

    folder = tmp_path_factory.mktemp("trained") / "work"
    shutil.copytree(prepared, folder)
    for script in SCRIPTS[1:3]:
        ok(run(script, "--model_name", tiny, *SHORT, cwd=folder))
    return folder


@pytest.fixture(scope="session")
def phi_2():
    """microsoft/phi-2's configuration, without its weights."""
    from transformers import PhiConfig

    return PhiConfig(
        vocab_size=51200,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
        partial_rotary_factor=0.4,
        dtype="float16",
    )
