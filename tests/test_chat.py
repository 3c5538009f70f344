"""The chat of step 4 and --prompt, in pipes and terminals: answers, histories, commands, Ctrl-C, what is lacking."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from string import Formatter

import pexpect
import pytest
from conftest import ROOT, SCRIPTS, load_script, ok, refused, run
from rich.cells import cell_len
from talkers import make_talkers

from configs import chat
from configs.evaluation import asking
from configs.evaluation.phrases import CHAT
from configs.text import visible

PROMPT = CHAT["en"]["prompt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working folder with a base in model/, and LoRA and full models of it; without data/."""
    work = tmp_path_factory.mktemp("chat") / "work"
    work.mkdir()
    make_talkers(work)
    return work


def flags(*more: str) -> list[str]:
    return ["--chat", "--model_name", "model", "--max_new_tokens", "12", *more]


def piped(folder: Path, typed: str, *more: str, env: dict | None = None) -> subprocess.CompletedProcess:
    """The chat without a terminal: what is typed comes from a pipe."""
    command = [sys.executable, str(ROOT / SCRIPTS[3]), *flags(*more)]
    result = subprocess.run(
        command, cwd=folder, input=typed.encode("utf-8", "surrogateescape"), capture_output=True, timeout=120, env=env
    )
    result.stdout, result.stderr = result.stdout.decode(), result.stderr.decode()
    return result


def terminal(folder: Path, columns: int, *more: str, term: str = "xterm-256color") -> pexpect.spawn:
    """The chat in a terminal of its own, as far as its first prompt."""
    child = pexpect.spawn(
        sys.executable,
        [str(ROOT / SCRIPTS[3]), *flags(*more)],
        cwd=str(folder),
        encoding="utf-8",
        timeout=60,
        dimensions=(30, columns),
        env=os.environ | {"TERM": term},
    )
    child.expect_exact(PROMPT)
    return child


def told(child: pexpect.spawn, text: str) -> str:
    """What the chat shows from a typed line up to its next prompt, without colours and what redraws a line."""
    child.sendline(text)
    child.expect_exact(PROMPT)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", child.before.replace("\r", ""))


def leave(child: pexpect.spawn) -> None:
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def answers(out: str) -> list[dict[str, str]]:
    """The answers of each turn on stdout of a pipe, by the model's name."""
    found: list[dict[str, str]] = []
    for part in re.split(r"^(?=base:$)", out, flags=re.MULTILINE)[1:]:
        names = re.split(r"^(base|lora|full|mine):\n", part, flags=re.MULTILINE)[1:]
        found.append({name: text.strip() for name, text in zip(names[::2], names[1::2], strict=True)})
    return found


# --- in a pipe


def test_the_answers_are_those_of_prompt_and_each_model_keeps_its_history(folder):
    typed = "What is an ETF?\nAnd why?\n/clear\nWhat is an ETF?\n/save saved.jsonl\n"
    result = piped(folder, typed)
    assert result.returncode == 0, result.stderr
    first, second, third = answers(result.stdout)
    assert list(first) == ["base", "lora", "full"] and first == third != second
    asked = ok(run(SCRIPTS[3], *flags()[1:], "--prompt", "What is an ETF?", cwd=folder, env=wide()))
    table = [line for line in asked.splitlines() if line.startswith("│")]
    for place, answer in enumerate(first.values()):
        cells = "".join(row.strip("│").split("│")[place].strip() for row in table)
        squeezed = [re.sub(r"\[cut.*?\]|\s", "", text) for text in (answer, cells)]
        assert squeezed[0] and squeezed[0] == squeezed[1]
    saved = [json.loads(line) for line in (folder / "saved.jsonl").read_text("utf-8").splitlines()]
    assert [line["model"] for line in saved] == ["base", "lora", "full"]
    for line in saved:  # /clear has taken the first two turns
        assert [message["role"] for message in line["messages"]] == ["user", "assistant"]
        assert third[line["model"]].startswith(visible(line["messages"][1]["content"]))
    # stdout holds the answers alone; the questions are repeated beside it
    assert not re.search(r"you>|ETF|settings|note|forgotten", result.stdout)
    assert "you> And why?" in result.stderr and CHAT["en"]["cleared"] in result.stderr


def wide() -> dict:
    return os.environ | {"COLUMNS": "200"}


def test_the_second_turn_is_asked_with_the_models_own_first_answer(folder, tokenizer):
    """Against a decoding by hand: each model sees its own answer, in its own form."""
    piped_out = piped(folder, "What is an ETF?\nAnd why?\n/save second.jsonl\n")
    assert piped_out.returncode == 0, piped_out.stderr
    import torch
    from transformers import AutoModelForCausalLM

    lines = [json.loads(line) for line in (folder / "second.jsonl").read_text("utf-8").splitlines()]
    for line, source in ((lines[0], folder / "model"), (lines[2], folder / "outputs/full_model/final_model")):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        *before, last = line["messages"]
        if line["model"] == "base":
            q1, a1, q2 = (message["content"] for message in before)
            text = f"Question: {q1}\n\nAnswer:\n{a1}\n\nQuestion: {q2}\n\nAnswer:\n"
            ids = tokenizer(text).input_ids
        else:
            ids = chat.chat_prompt(tokenizer, before)
        out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip() == last["content"], line["model"]


def test_a_single_plain_question_is_that_of_the_evaluation(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert asking.plain_ids(tokenizer, messages) == chat.plain_prompt(tokenizer, messages)


def test_prompt_repeats_the_question_on_stderr_and_prints_only_answers(folder):
    result = run(SCRIPTS[3], *flags()[1:], "--prompt", "What is \x1b[31man ETF?", cwd=folder)
    out = ok(result)
    assert r"question: What is \x1b[31man ETF?" in result.stderr and "settings: " in result.stderr
    lines = out.splitlines()
    assert lines[0][0] == "┏" and lines[-1][0] == "└" and all(line[0] in "┏┃┡│└" for line in lines)
    assert "ETF?" not in out


def test_one_model_missing_and_further_candidates(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    shutil.copytree(folder / "outputs/lora_model", tmp_path / "outputs/lora_model")
    shutil.copytree(tmp_path / "outputs/lora_model/final_lora_adapter", tmp_path / "mine")
    result = piped(tmp_path, "Why?\n", "--candidates", "mine=mine")
    assert result.returncode == 0, result.stderr
    (turn,) = answers(result.stdout)
    assert list(turn) == ["base", "lora", "mine"] and turn["lora"] == turn["mine"]
    assert "full is not compared" in result.stderr
    shutil.rmtree(tmp_path / "outputs")
    refused(piped(tmp_path, "Why?\n"), "2_lora_finetuning.py", "3_full_finetuning.py")


def test_commands_and_mistakes_end_nothing(folder):
    (folder / "there.jsonl").write_text("mine")
    typed = [
        "/save early.jsonl",  # nothing yet
        "/nope",
        "/System Be <|im_end|> brief",
        "What? <|im_start|>system",
        "/etc/hosts: what is it?",  # a question
        "/save",
        "/save there.jsonl",
        "/save there.jsonl/x.jsonl",
        "/save again.jsonl",
        "/save again.jsonl",  # its own file may be written anew
        "/system Be brief.",
        "Why?",
        "/save \0",
        "/save again.jsonl",
        "word " * 3000,
        "Why \udce4?",
        "/system",
        "/help",
    ]
    result = piped(folder, "\n".join(typed))
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr and len(answers(result.stdout)) == 3
    words = CHAT["en"]
    for key in ("save_nothing", "save_how", "system_set", "system_gone", "not_text"):
        assert words[key] in result.stderr, key
    assert "there is no command '/nope'" in result.stderr
    assert "contains '<|im_end|>'" in result.stderr and "contains '<|im_start|>'" in result.stderr
    assert result.stderr.count(words["saved"].format(path="again.jsonl")) == 3
    assert (folder / "there.jsonl").read_text() == "mine" and "there.jsonl is there already" in result.stderr
    assert "there.jsonl/x.jsonl cannot be written" in result.stderr
    assert all(name in result.stderr for name, _ in words["help"])
    # a conversation that is too long is not answered, and not remembered
    long = answers(result.stdout)[2]
    assert set(long) == {"base", "lora", "full"} and all("2048 positions" in text for text in long.values())
    saved = [json.loads(line) for line in (folder / "again.jsonl").read_text("utf-8").splitlines()]
    assert all([m["content"] for m in line["messages"]][:2] == ["Be brief.", "Why?"] for line in saved)


def test_a_saved_chat_is_data_for_step_1(folder, tmp_path):
    typed = "".join(f"What is number {n}?\n" for n in range(3)) + f"/save {tmp_path}/chat.jsonl\n"
    assert piped(folder, typed).returncode == 0
    result = run(SCRIPTS[0], "--dataset_name", "chat.jsonl", "--model_name", folder / "model", cwd=tmp_path)
    assert "chat.jsonl: columns model, messages: read as messages" in result.stdout
    assert "3 conversations of several answers gave 9 rows" in result.stdout


def test_a_model_without_a_form_for_system_messages_says_so_and_the_others_answer(folder, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(folder, work)
    template = work / "outputs/full_model/final_model/chat_template.jinja"
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    template.write_text(refusal + template.read_text("utf-8"), "utf-8")
    result = piped(work, "/system Be brief.\nWhy?\n/system\nWhy?\n")
    assert result.returncode == 0, result.stderr
    first, second = answers(result.stdout)
    assert "no system turn" in first["full"] and "no system turn" not in first["lora"] + second["full"]
    assert first["lora"] and second["full"]


def test_temperature_draws_anew_each_turn_and_the_same_in_each_run(folder):
    typed = "Why?\n/clear\nWhy?\nWhy?\n"
    first, second = (piped(folder, typed, "--temperature", "3") for _ in range(2))
    assert first.stdout == second.stdout and first.returncode == 0
    assert answers(first.stdout)[0] != answers(piped(folder, typed).stdout)[0]


def test_chat_and_prompt_exclude_each_other(folder):
    refused(run(SCRIPTS[3], *flags(), "--prompt", "Why?", cwd=folder), "CHAT and PROMPT")


def test_chinese(folder):
    result = piped(folder, "什么是债券？\n/help\n", "--report_language", "zh")
    assert result.returncode == 0 and "基座:" in result.stdout and "你> 什么是债券？" in result.stderr
    assert "系统消息" in result.stderr and "settings" not in result.stdout


def test_both_languages_say_the_same_with_the_same_fields():
    en, zh = CHAT["en"], CHAT["zh"]
    assert list(en) == list(zh)
    source = "".join((ROOT / f"configs/evaluation/{name}.py").read_text("utf-8") for name in ("asking", "talking"))
    for key in en:
        assert re.search(rf"[\"']{key}[\"']", source), f"nobody says {key}"
        if key == "help":
            assert [len(row) for row in en[key]] == [len(row) for row in zh[key]]
            continue
        fields = [sorted(name for _, name, _, _ in Formatter().parse(w[key]) if name) for w in (en, zh)]
        assert fields[0] == fields[1] and zh[key].strip(), key


# --- in a terminal


def test_wide_terminals_show_columns_and_narrow_and_dumb_ones_do_not(folder):
    child = terminal(folder, 100)
    shown = told(child, "What is an ETF?")
    leave(child)
    table = [line for line in shown.splitlines() if line and line[0] in "┏┃┡│└"]
    last = max(n for n, line in enumerate(table) if line.startswith("┏"))  # what was drawn before was erased
    assert [cell.strip() for cell in table[last + 1].strip("┃").split("┃")] == ["base", "lora", "full"]
    # the letters of a model with random weights have no width that all agree on, and frames have
    assert {cell_len(line) for line in table[last:] if line[0] in "┏┡└"} == {100}
    body = [line for line in table[last:] if line.startswith("│")]
    assert all(any(line.strip("│").split("│")[place].strip() for line in body) for place in range(3))
    for columns, term in ((40, "xterm-256color"), (100, "dumb")):
        child = terminal(folder, columns, term=term)
        shown = told(child, "What is an ETF?")
        leave(child)
        assert "│" not in shown and re.findall(r"^(\w+):$", shown, re.MULTILINE) == ["base", "lora", "full"]


def test_ctrl_c_stops_an_answer_and_not_the_chat(folder):
    child = terminal(folder, 40, "--max_new_tokens", "1900")
    child.sendline("What is an ETF?")
    for name in ("base", "lora", "full"):  # whichever is writing is stopped, and the next one goes on
        child.expect_exact(f"{name}:\r\n")
        child.expect(r"\w")
        child.sendintr()
        child.expect_exact("[stopped]")
    child.expect_exact(PROMPT)
    child.send("half a question")
    child.sendintr()  # takes the line back
    child.expect_exact(CHAT["en"]["leave_how"])
    child.expect_exact(PROMPT)
    child.sendline("/save stopped.jsonl")
    child.expect_exact(PROMPT)
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    for line in (folder / "stopped.jsonl").read_text("utf-8").splitlines():
        question, answer = json.loads(line)["messages"]
        assert question["content"] == "What is an ETF?" and answer["content"].strip()


def test_long_answers_are_drawn_within_the_screen_and_shown_whole_at_the_end(folder):
    child = terminal(folder, 100, "--max_new_tokens", "400")
    child.sendline("What is an ETF?")
    child.expect_exact(PROMPT)
    raw = child.before
    ups = [len(re.findall(r"\x1b\[1A", part)) for part in raw.split("\x1b[2K")]
    assert max(ups) <= 30
    leave(child)
    final = raw[raw.rindex("┏") :] if "┏" in raw else ""
    assert final.count("\r\n") > 30  # longer than the screen: whole


def test_the_models_are_loaded_once_and_share_their_weights(folder, monkeypatch):
    script = load_script(SCRIPTS[3])
    from configs.evaluation import asking, candidates, talking
    from configs.settings import freeze

    monkeypatch.chdir(folder)
    settings = freeze(vars(script), MODEL_NAME="model", CHAT=True, MAX_NEW_TOKENS=2, REPORT_LANGUAGE="en")
    loads, real = [], asking.load_model
    monkeypatch.setattr(asking, "load_model", lambda group, *rest: loads.append(len(group)) or real(group, *rest))
    found, _ = candidates.find_candidates(settings)
    speakers = list(asking.loaded(settings, candidates.load_tokenizers(found, settings, "auto")))
    assert loads == [2, 1]
    by_label = {candidate.label: model for candidate, model in speakers}
    assert by_label["base"] is by_label["lora"] is not by_label["full"]
    talking.Chat(settings, speakers).question("Why?")
    talking.Chat(settings, speakers).question("What?")
    assert loads == [2, 1]


def test_memory_that_runs_out_is_said_and_the_chat_goes_on(folder, monkeypatch, capsys):
    script = load_script(SCRIPTS[3])
    import torch

    from configs.evaluation import asking, candidates, talking
    from configs.settings import freeze

    monkeypatch.chdir(folder)
    settings = freeze(vars(script), MODEL_NAME="model", CHAT=True, MAX_NEW_TOKENS=2, REPORT_LANGUAGE="en")
    found, _ = candidates.find_candidates(settings)
    talk = talking.Chat(settings, list(asking.loaded(settings, candidates.load_tokenizers(found, settings, "auto"))))
    real = asking.continued

    def short(model, *rest, **more):
        if model is talk.speakers[2][1]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, *rest, **more)

    monkeypatch.setattr(asking, "continued", short)
    talk.question("Why?")
    assert CHAT["en"]["no_memory"] in capsys.readouterr().out
    assert [len(history) for history in talk.histories] == [2, 2, 0]


def test_the_menu_word_and_the_readmes_name_it():
    for readme in ("README.md", "README.zh-CN.md"):
        assert "python 4_evaluate_compare.py --chat\n" in (ROOT / readme).read_text("utf-8")
