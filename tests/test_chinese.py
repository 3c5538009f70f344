"""What users see in Chinese: what each sentence is translated to, the common mistakes, and a run of each step."""

import ast
import re
import shutil
import string
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, SHORT, ok, run, write_rows
from hub import finance_rows

from configs import translation
from configs.translation import Phrase, phrase, table, translated

ZH = {"LANGUAGE": "zh_CN.UTF-8"}
# Of these, what is said in the common walks: the steps 1 to 3, and what they stand on.
ROOMS = [
    *(ROOT / name for name in SCRIPTS[:3]),
    *(ROOT / "configs" / f"{name}.py" for name in "settings flags values text hub network device models".split()),
    *(ROOT / "configs" / f"{name}.py" for name in "handover chat ending".split()),
    *(ROOT / "configs" / "preparation").glob("*.py"),
    *(ROOT / "configs" / "training").glob("*.py"),
]
# Words that nobody is told: lists of names, what is looked for in the errors of libraries, labels of a picture, the
# report that has both languages beside each other, and --help.
UNSAID = re.compile(
    r"tokenizers tqdm|load_in_4bit|output_folder|deepspeed evaluate|No space left|gated dataset|appear to have"
    r"|Timed|imed out|scripts are no longer|nats per token|tokens of prompt and answer|once its answer is there"
    r"|show this text|settings from a file|a path to a .yaml|is no range|that cannot be shown|safetensors.index"
    r"|tag:yaml|classify the|ollama create my-model"
)


@pytest.fixture
def chinese():
    translation.use({"LANGUAGE": "zh"})
    yield
    translation.use({"LANGUAGE": "en"})


def run_zh(*words: object, cwd: Path, language: dict = ZH):
    import os

    return run(*words, cwd=cwd, env={**os.environ, **language})


def english(text: str) -> list[str]:
    """Where a text still has English prose: three words in a row, apart from commands, code and data."""
    text = re.sub(r"python \S*\.py[^；。\n]*|hf [a-z ]+|pip install \S+|`[^`]*`|'[^'\n]*'|\"[^\"\n]*\"", "", text)
    text = re.sub(r"<\|im_start\|>.*?⟧", "", text, flags=re.S)  # the row that is shown
    return re.findall(r"(?<![\w/.-])[A-Za-z]+ [a-z]+ [a-z]+\b", text)


# --- the table


def test_each_translation_has_the_fields_of_its_original():
    entries = [(key, chinese) for section in table().values() for key, chinese in section.items()]
    assert len(entries) > 400
    for key, chinese in entries:
        before, after = ([p for p in string.Formatter().parse(text) if p[1] is not None] for text in (key, chinese))
        assert {field for _, field, _, _ in before} == {field for _, field, _, _ in after}, key
        assert all(spec == "" for _, _, spec, _ in before) and {spec for _, _, spec, _ in after} <= {"", "zh", "list"}
        assert not re.search(r"\}\{", key), f"nothing tells where the first of these two fields ends: {key}"
        assert set(re.findall("--[a-z_0-9]{3,}", key)) == set(re.findall("--[a-z_0-9]{3,}", chinese)), key


def docstrings(tree: ast.Module) -> set[int]:
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef))
    return {id(node.body[0].value) for node in nodes if isinstance(node.body[0], ast.Expr)}


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_the_steps_say_is_in_the_table(path):
    """Each text of four words or more is part of a key of configs/sentences_zh.yaml: there a new one belongs."""
    keys = [key for section in table().values() for key in section]
    tree = ast.parse(path.read_text("utf-8"))
    skipped, missing = docstrings(tree), []
    if path.name == "report.py":
        tree.body = [node for node in tree.body if not isinstance(node, ast.Assign)]  # WORDS has both languages
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            text = re.sub(r"^(note|warning|error): ", "", node.value.strip()).partition("--")[0].strip(" ,;:(")
            text = re.sub(r"^it must be ", "", text)
            words = re.findall(r"(?<![\w\\-])[a-z]+(?![\w=(])", text)
            if len(words) >= 4 and not UNSAID.search(text) and not any(text in key for key in keys):
                missing.append(f"line {node.lineno}: {text}")
    assert missing == []


def test_a_sentence_is_found_whatever_its_values_are(chinese):
    said = "there are no complete data: a: b; c/manifest.json is missing (a holds x, y); make them with: python 1.py"
    assert (
        translated(said) == "没有完整的数据：缺少 a: b; c/manifest.json（a 里有 x, y）；用下面的命令生成：python 1.py"
    )
    assert translated("Nobody has said this before; really") == "Nobody has said this before; really"
    rule = "WARMUP_RATIO is 3.0; it must be at least 0 and below 1: --warmup_ratio 0.03"
    assert translated(rule) == "WARMUP_RATIO 的值是 3.0；应不小于 0 和小于 1：--warmup_ratio 0.03"
    assert (
        translated("note: resuming from a b") == "注意：从 a b 继续" and translated("note: of mine") == "note: of mine"
    )
    assert phrase("{n} s {") == "{n} s {" and f"{Phrase('a {0} b'):zh}" == "a {0} b"  # braces are data, too
    plan = "memory plan, LoRA, passes of up to 8 tokens, rows of up to 9:\n  weights  3 MB\n  logits  1 MB"
    assert translated(plan).splitlines()[1:] == ["  权重     3 MB", "  logits  1 MB"]


def test_english_stays_english():
    said = "warning: resuming from here"
    assert translated(said) == said and phrase("starting") == "starting"


def test_a_long_text_costs_no_more_than_its_length(chinese):
    import time

    began = time.monotonic()
    for text in ("X is '" + "; it must be , or : -- " * 130 + "'", "x; " * 1000, "; it must be \n" * 1_000_000):
        translated(text)
    assert time.monotonic() - began < 2


# --- the language of a run


@pytest.mark.parametrize(
    "env, words, expected",
    [
        ({"LC_ALL": "zh_CN.UTF-8"}, [], "没有"),
        ({"LC_ALL": "zh_CN.UTF-8"}, ["--language", "en"], "unknown setting"),
        ({}, ["--language", "zh"], "没有"),
        ({"LANGUAGE": "zh"}, [], "没有"),
        ({"LC_ALL": "zh_CN.UTF-8", "LANGUAGE": "en"}, [], "unknown setting"),
        ({}, [], "unknown setting"),
    ],
)
def test_a_step_speaks_the_language_that_is_asked_for_or_the_terminals(tmp_path, env, words, expected):
    result = run_zh(SCRIPTS[0], *words, "--sed", "1", cwd=tmp_path, language=env)
    assert result.returncode == 2 and expected in result.stderr and "--seed" in result.stderr


# --- the common mistakes


LORA, FULL, EVALUATE = SCRIPTS[1:]
MISTAKES = [
    (LORA, "--batch_size 0", "错误：BATCH_SIZE 的值是 0；应不小于 1：--batch_size 4"),
    (LORA, "--learning_rate abc", "LEARNING_RATE 应为有限的数（float），例如 --learning_rate 0.0002"),
    (LORA, "--max_steps 1.5", "MAX_STEPS 应为整数（int）或 none，例如 --max_steps 100；--max_steps 的值是 '1.5'"),
    (LORA, "--lerning_rate 1", "没有名为 --lerning_rate 的设置；是不是想写 --learning_rate？"),
    (LORA, "--epochs", "没有名为 --epochs 的设置；是不是想写 --num_epochs？"),
    (FULL, "--lora_r 8", "--lora_r 是 2_lora_finetuning.py 的设置"),
    (LORA, "--qqqqzz 8", "没有名为 --qqqqzz 的设置；--help 列出所有设置"),
    (LORA, "--optim adam_w", "OPTIM 的值是 'adam_w'；可选 auto、"),
    (LORA, "--packing maybe", "PACKING 的值是 'maybe'；可选 auto、true 或 false：--packing auto"),
    (LORA, "--warmup_ratio 3", "应不小于 0 和小于 1：--warmup_ratio 0.03"),
    (LORA, "--num_epochs", "--num_epochs 需要一个值，例如 --num_epochs 3.0"),
    (LORA, "--preset tiny", "没有名为 'tiny' 的预设；"),
    (LORA, "--preset own.yaml", "own.yaml 的 lora 部分：没有名为 lora_rr 的设置；是不是想写 lora_r？"),
    (LORA, "batch_size=4", "多出的参数 'batch_size=4'；设置的写法是 --name 值"),
    (LORA, "--no_packing true", "--no_packing 不带值，却给了 'true'"),
    (LORA, "--model_name nowhere", "nowhere 无法获取：设置了 HF_HUB_OFFLINE；请改用本地的文件夹或文件"),
    (LORA, "--model_name /nowhere/at/all", "MODEL_NAME '/nowhere/at/all'：没有这个文件夹"),
    (SCRIPTS[0], "--dataset_name nobody/nothing-here", "无法获取"),
    (SCRIPTS[0], "--dataset_name '' --seed -1", "DATASET_NAME 的值是 ''；不能为空"),
    ("run_all.py", "--steps 5", "--steps '5' 不是 1 到 4 的步骤"),
    ("run_all.py", "--demo --preset gpu_24gb", "--demo 就是 --preset demo --yes"),
    ("run_all.py", "--lorra.seed 1", "--lorra.seed：没有名为 lorra 的步骤；是不是想写 lora？"),
]


@pytest.mark.parametrize("script, words, expected", MISTAKES, ids=[f"{m[0]} {m[1]}" for m in MISTAKES])
def test_a_common_mistake_is_told_in_chinese(tmp_path, script, words, expected):
    import shlex

    (tmp_path / "own.yaml").write_text("lora:\n  lora_rr: 8\n")
    result = run_zh(script, *shlex.split(words), cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert expected in result.stderr and lines[0].startswith("错误："), result.stderr
    assert english("\n".join(line for line in lines if line[:2] != "  ")) == [], result.stderr  # presets' own words


def test_an_unset_training_is_told_in_chinese(prepared, tiny, tmp_path):
    """Missing data, and what the rows, the memory and the steps do not allow, in three processes of a few seconds."""
    result = run_zh(LORA, "--model_name", tiny, cwd=tmp_path)
    assert result.returncode == 2 and "错误：没有完整的数据：缺少 data/manifest.json（data 是空的）" in result.stderr
    shutil.copytree(prepared / "data", tmp_path / "data")
    result = run_zh(LORA, "--model_name", tiny, "--batch_size", "900", cwd=tmp_path)
    assert result.returncode == 2 and "一个优化步要用 900 x 4 = 3600 行，而总共只有 128 行" in result.stderr
    plan = ["--device_memory_gb", "0.001", "--model_name", tiny, "--plan_only"]
    few = run_zh(LORA, *plan, cwd=tmp_path)
    assert few.returncode == 2 and "至少需要" in few.stderr and "放得下的办法：" in few.stderr, few.stderr
    for said in (result.stderr, few.stderr, few.stdout, result.stdout):
        assert english(said) == [], said


@pytest.mark.parametrize(
    "rows, words, expected",
    [
        ([{"a": "1", "b": "2"}] * 3, [], "无法识别数据集的列：a, b"),
        ([{"instruction": f"What is {n}?", "output": ""} for n in range(9)], [], "原因：回答为空"),
        ([{"instruction": "What is it?", "output": f"It is {n}."} for n in range(9)], [], "必须放在同一侧"),
        (finance_rows(40), ["--column_map", "instruction=nix,output=output"], "COLUMN_MAP 中有一列并不存在"),
    ],
)
def test_what_is_wrong_with_the_data_is_told_in_chinese(tiny, tmp_path, rows, words, expected):
    rows = write_rows(tmp_path / "rows.jsonl", rows)
    result = run_zh(SCRIPTS[0], "--dataset_name", rows, "--model_name", tiny, *words, cwd=tmp_path)
    assert result.returncode == 2 and expected in result.stderr + result.stdout, result.stderr
    assert english(re.sub(r"(检查|columns).*", "", result.stderr)) == [], result.stderr


# --- a walk


@pytest.fixture(scope="module")
def walk(tiny, tmp_path_factory) -> dict[str, str]:
    """{script: what it has said in Chinese} of the steps 1 to 3, with what else a training can have to say."""
    folder = tmp_path_factory.mktemp("walk")
    rows = finance_rows(160) + [{"instruction": "Empty?", "input": "", "output": " "}]
    rows = write_rows(folder / "rows.jsonl", rows)
    said = {"prepare": ["1_prepare_dataset.py", "--dataset_name", rows, "--eval_fraction", "0.2"]}
    said["lora"] = [LORA, *SHORT, "--merge_adapter", "true", "--learning_rate", "5", "--save_total_limit", "1"]
    said["full"] = [FULL, *SHORT]
    said["again"] = [FULL, *SHORT]
    said["other"] = [FULL, *SHORT, "--learning_rate", "1e-4"]
    output = {}
    for name, words in said.items():
        result = run_zh(*words, "--model_name", tiny, cwd=folder)
        assert result.returncode == (2 if name == "other" else 0), result.stderr
        output[name] = result.stdout + ("" if name == "prepare" else result.stderr)
    return output


def test_nothing_in_the_common_walk_stays_english(walk):
    for name, said in walk.items():
        assert english(said) == [], f"{name}\n{said}"


def test_the_walk_says_in_chinese_what_it_says_in_english(walk):
    assert re.search(r"^舍去：1 行，原因：回答为空|^  舍去：1 行，原因：回答为空", walk["prepare"], re.M)
    assert "注意：测试部分只有 16 行" in walk["prepare"]
    assert re.search(
        r"^完成：训练 \d+ 行.*；用时 \d+ 秒；请看 data/dataset_report.md；下一步：python", walk["prepare"], re.M
    )
    line = r"^第 1/4 步 · 轮次 \S+ · 损失 \S+ · 验证 \S+ · 学习率 \S+ · \S+ token/秒 · [\d.]+ [MG]B$"
    assert re.search(line, walk["full"], re.M), walk["full"]
    assert "警告：LEARNING_RATE 是 5.0e+00，比宽度为" in walk["lora"] and "已合并：" in walk["lora"]
    assert "已经完成：outputs/full_model：4 步、" in walk["again"]
    assert "错误：outputs/full_model 里有另一次训练：4 步、" in walk["other"]
    assert "LEARNING_RATE 原为 5e-05，现为 0.0001" in walk["other"] and "；或把它移到 outputs/history" in walk["other"]


def test_what_programs_read_stays_english(walk, tmp_path_factory):
    """training_log.json and manifest.json of a run in Chinese have no Chinese character."""
    folder = max(tmp_path_factory.getbasetemp().glob("walk*"))
    names = ["data/manifest.json", "outputs/lora_model/training_log.json", "outputs/full_model/training_log.json"]
    for name in names:
        text = (folder / name).read_text("utf-8")
        assert not re.search("[\u4e00-\u9fff]", text), name
    status = run_zh("run_all.py", "status", "--json", cwd=folder)
    assert '"state": "' in ok(status) and not re.search("[\u4e00-\u9fff]", status.stdout)


@pytest.mark.skipif(sys.platform == "win32", reason="pexpect needs a terminal")
@pytest.mark.parametrize("columns", [40, 120])
def test_the_line_of_a_training_fits_a_terminal_in_chinese(chinese, columns):
    from rich.cells import cell_len

    from configs.training.progress import line

    shown = line(30, 60, 0.5, 2.8, 3.03, 2.8e-3, 2800, 1.2e9, "0:12 left", width=columns)
    assert shown.startswith("第 30/60 步") and shown.endswith("剩余 0:12") and cell_len(shown) <= columns
    assert ("学习率 2.8e-3" in shown) == (columns == 120)
