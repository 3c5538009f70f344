"""What a training leaves behind is for others: plain libraries load it elsewhere, and a server serves it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import SCRIPTS, SHORT, ok, run

from configs import device

pytestmark = pytest.mark.slow
LORA, FULL = SCRIPTS[1], SCRIPTS[2]

# the libraries' own way to load a folder, in a process that knows nothing of this project
LOADED = """
import sys
from {library} import {load}
from transformers import AutoTokenizer

model = {load}.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
chat = [{{"role": "user", "content": "What is an ETF?"}}]
text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
print("ids", out[0].tolist())
assert not any(name.split(".")[0] == "configs" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def work(prepared, tiny, tmp_path_factory) -> Path:
    """A folder with a full model, an adapter and its merged model."""
    folder = shutil.copytree(prepared, tmp_path_factory.mktemp("serve") / "work")
    ok(run(LORA, "--model_name", tiny, *SHORT, "--merge_adapter", "--learning_rate", "1e-2", cwd=folder))
    ok(run(FULL, "--model_name", tiny, *SHORT, cwd=folder))
    return folder / "outputs"


@pytest.mark.parametrize(
    "name, library, load",
    [
        ("lora_model/final_lora_adapter", "peft", "AutoPeftModelForCausalLM"),
        ("lora_model/merged_model", "transformers", "AutoModelForCausalLM"),
        ("full_model/final_model", "transformers", "AutoModelForCausalLM"),
    ],
)
def test_plain_libraries_load_it_from_another_folder(work, tmp_path, name, library, load):
    code = LOADED.format(library=library, load=load)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-I", "-c", code, str(work / name)]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert "ids [" in ok(result)
    card = (work / name / "README.md").read_text(encoding="utf-8")
    assert "rows.jsonl" in card and "| LEARNING_RATE |" in card
    assert "Validation loss of the kept checkpoint" in card
    assert not list((work / name).glob("*.bin"))  # nothing pickled


@pytest.mark.parametrize(
    "name, loads",
    [
        ("lora_model/final_lora_adapter", ["from peft import PeftConfig, PeftModel", "load_in_4bit=True"]),
        ("lora_model/merged_model", ["from transformers import AutoModelForCausalLM, AutoTokenizer"]),
        ("full_model/final_model", ["from transformers import AutoModelForCausalLM, AutoTokenizer"]),
    ],
)
def test_the_code_of_a_model_card_runs_where_the_folder_was_moved_to(work, tmp_path, name, loads):
    moved = shutil.copytree(work / name, tmp_path / "elsewhere" / Path(name).name)
    card = (moved / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)
    assert all(line in code for line in loads)
    known = "import sys\nassert not any(name.split('.')[0] == 'configs' for name in sys.modules)\nprint('end')\n"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-I", "-c", code + known]
    result = subprocess.run(command, cwd=moved.parent, env=env, capture_output=True, text=True, timeout=120)
    assert ok(result).endswith("end\n")


@pytest.mark.parametrize("name", ["lora_model/merged_model", "full_model/final_model"])
def test_transformers_serve_answers_over_http(work, tmp_path, name):
    port, folder = device.free_port(), str(work / name)
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    log = open(tmp_path / "log", "w+", encoding="utf-8")  # noqa: SIM115
    server = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)
    try:
        body = {
            "model": folder,
            "messages": [{"role": "user", "content": "What is an ETF?"}],
            "max_tokens": 8,
            "stream": False,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        end = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    answer = json.load(response)
                break
            except (urllib.error.URLError, ConnectionError) as error:
                log.seek(0)
                assert server.poll() is None and time.monotonic() < end, (error, log.read()[-3000:])
                time.sleep(0.5)
        choice = answer["choices"][0]
        assert choice["message"]["role"] == "assistant" and isinstance(choice["message"]["content"], str)
        assert choice["finish_reason"] in ("stop", "length")
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
        log.close()
