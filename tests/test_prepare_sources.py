"""Step 1: data sets as people really have them, from the Hub, from a download, and damaged."""

import collections
import contextlib
import io
import json
import os
import random
import re
import subprocess
import time
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import SCRIPTS, load_script, ok, refused, run, write_rows
from hub import Hub, finance_rows

from configs import chat
from configs.hub import model_problems
from configs.settings import override

STEP = SCRIPTS[0]
PHRASES = [
    "Operating profit rose to EUR {n} mn from EUR {m} mn in the year before .",
    "The company said that net sales would fall by {n} % .",
    "Finnish {n} Oyj has signed an agreement worth {m} million .",
]
NAMES = ["negative", "neutral", "positive"]


def parquet(rows: list[dict], features: datasets.Features | None = None) -> bytes:
    """The rows as the Hub's converter writes them: the types of `datasets` are in the file's metadata."""
    sink = io.BytesIO()
    datasets.Dataset.from_list(rows, features=features).to_parquet(sink)
    return sink.getvalue()


def phrases(n: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    texts = [rng.choice(PHRASES).format(n=rng.randint(1, 10**6), m=rng.randint(1, 10**6)) for _ in range(n)]
    return [{"sentence": text, "label": i % 3} for i, text in enumerate(texts)]


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def choice(i: int, options: list[str]) -> dict:
    text = f"News number {i}: shares moved by {i * 7 % 113} points.\nQuestion: what is the tone?"
    return {"id": i, "input": text, "options": options, "gold_index": i % len(options), "class_id": i % len(options)}


TASKS_CARD = """---
configs:
  - config_name: ConvFinQA
    data_files:
      - split: test
        path: ConviFinQA/test.json
  - config_name: FPB
    data_files:
      - split: test
        path: FPB/test.json
---
# finance-tasks
"""
TASKS = {
    "README.md": TASKS_CARD.encode(),
    "ConviFinQA/test.json": lines(
        [{"id": i, "input": f"Table {i}: revenue {i * 3}.\nQ: what was it?", "label": f"{i * 3}.0"} for i in range(60)]
    ),
    "FPB/test.json": lines([choice(i, ["Neutral", "Negative", "Positive"]) for i in range(60)]),
}
INSTRUCT = [
    {"system": "You are a banker." if i % 2 else "", "user": row["instruction"], "assistant": row["output"]}
    for i, row in enumerate(finance_rows(60, seed=3))
]


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        hub.add_dataset("gbharti/finance-alpaca", {"Cleaned_date.json": json.dumps(finance_rows(60)).encode()})
        hub.add_dataset("Josephgflowers/Finance-Instruct-500k", {"train.json": lines(INSTRUCT)})
        hub.add_dataset("AdaptLLM/finance-tasks", TASKS)
        hub.add_dataset(
            "takala/financial_phrasebank",
            {"financial_phrasebank.py": b"import datasets", "README.md": b"# Financial PhraseBank"},
        )
        features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)})
        converted = {
            f"{name}/train/0000.parquet": parquet(phrases(60, seed), features)
            for seed, name in enumerate(("sentences_50agree", "sentences_allagree"))
        }
        hub.add_dataset("takala/financial_phrasebank", converted, branch="refs/convert/parquet")
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def step():
    return load_script(STEP)


def kept(folder: Path) -> list[dict]:
    return [row for part in ("train", "eval") for row in datasets.load_from_disk(str(folder / "data" / part))]


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "data" / "manifest.json").read_text(encoding="utf-8"))


# --- the Hub

RECOMMENDED = [
    ("gbharti/finance-alpaca", [], "alpaca"),
    ("Josephgflowers/Finance-Instruct-500k", [], "system/user/assistant"),
    ("takala/financial_phrasebank", ["--dataset_config", "sentences_allagree"], "classification"),
    ("AdaptLLM/finance-tasks", ["--dataset_config", "FPB", "--dataset_split", "test"], "tasks"),
    ("AdaptLLM/finance-tasks", ["--dataset_config", "ConvFinQA", "--dataset_split", "test"], "tasks"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, flags, schema", RECOMMENDED, ids=lambda value: "-".join(value) if value else "")
def test_the_recommended_data_sets_are_read_by_their_names(hub, home, tiny, tmp_path, name, flags, schema):
    given = ["--dataset_name", name, *flags, "--model_name", tiny, "--eval_fraction", "0.2"]
    ok(run(STEP, *given, cwd=tmp_path, env=hub.env(home)))
    manifest, rows = manifest_of(tmp_path), kept(tmp_path)
    assert manifest["schema"]["name"] == schema
    assert manifest["rows"]["kept"] == len(rows) == 60, manifest["rows"]
    turns = {(row["prompt"][-1]["content"], row["completion"][0]["content"]) for row in rows}
    if schema == "classification":
        asked = "Classify the sentence as negative, neutral or positive.\n\n"
        assert turns == {(asked + row["sentence"], NAMES[row["label"]]) for row in phrases(60, 1)}
    elif "FPB" in flags:
        source = [json.loads(line) for line in TASKS["FPB/test.json"].decode().splitlines()]
        assert turns == {(row["input"], row["options"][row["gold_index"]]) for row in source}
    elif schema == "tasks":
        source = [json.loads(line) for line in TASKS["ConviFinQA/test.json"].decode().splitlines()]
        assert turns == {(row["input"], row["label"]) for row in source}
    elif schema == "system/user/assistant":
        assert turns == {(row["user"], row["assistant"]) for row in INSTRUCT}
        assert collections.Counter(len(row["prompt"]) for row in rows) == {1: 30, 2: 30}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, flags, said",
    [
        ("takala/financial_phrasebank", [], ["sentences_50agree, sentences_allagree", "--dataset_config"]),
        ("AdaptLLM/finance-tasks", [], ["ConvFinQA", "FPB", "DATASET_CONFIG"]),
        ("AdaptLLM/finance-tasks", ["--dataset_config", "FPB"], ["train", "test", "DATASET_SPLIT"]),
    ],
    ids=["script", "card", "split"],
)
def test_a_configuration_or_split_that_is_not_there_names_those_that_are(hub, home, tiny, tmp_path, name, flags, said):
    given = ["--dataset_name", name, *flags, "--model_name", tiny]
    assert len(refused(run(STEP, *given, cwd=tmp_path, env=hub.env(home)), *said)) == 1


@pytest.mark.slow
def test_rows_that_the_library_cannot_read_offer_the_files(hub, home, tiny, tmp_path):
    mixed = {"a.csv": b"instruction,output\nQ?,A.\n", "b.csv": b"question,answer\nQ?,A.\n"}
    hub.add_dataset("some/mixed-rows", mixed)
    given = ["--dataset_name", "some/mixed-rows", "--model_name", tiny]
    refused(run(STEP, *given, cwd=tmp_path, env=hub.env(home)), "some/mixed-rows", "download its files")


# --- a folder that was downloaded


def test_a_folder_from_modelscope_is_read_as_it_comes(step, tmp_path):
    """Rows below data/, one file a split, and JSON files that hold no rows."""
    rows = finance_rows(20)
    (tmp_path / "data").mkdir()
    for name in ("configuration.json", "dataset_infos.json"):
        (tmp_path / name).write_text('{"framework": "pytorch", "tags": ["x"]}', encoding="utf-8")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Rows", encoding="utf-8")
    for split, some in (("train", rows[:15]), ("test", rows[15:])):
        (tmp_path / "data" / f"{split}-00000-of-00001.parquet").write_bytes(parquet(some))
    for split, some in (("train", rows[:15]), ("test", rows[15:])):
        assert [row for _, row in step.read_rows(str(tmp_path), None, split, None)] == some


def test_a_downloaded_copy_of_a_repository_keeps_its_configurations(step, tmp_path):
    for name, data in TASKS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    rows = [row for _, row in step.read_rows(str(tmp_path), "FPB", "test", None)]
    assert rows == [json.loads(line) for line in TASKS["FPB/test.json"].decode().splitlines()]


def test_a_split_that_no_file_is_named_for_is_refused(tmp_path, step, capsys):
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.jsonl", finance_rows(3))
    with pytest.raises(SystemExit):
        step.read_rows(str(tmp_path), None, "validation", None)
    assert "train, test" in capsys.readouterr().err


def test_labels_of_a_local_parquet_file_are_named(step, tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)})
    rows = [{"text": f"T{i}", "label": i % 3} for i in range(5)] + [{"text": "none", "label": None}]
    (tmp_path / "rows.parquet").write_bytes(parquet(rows, features))
    read = [row for _, row in step.read_rows(str(tmp_path / "rows.parquet"), None, "train", None)]
    assert read == [{**row, "label": None if row["label"] is None else NAMES[row["label"]]} for row in rows]
    assert read[0]["label"].names == NAMES


# --- damaged files


def prepare(path: Path, tiny: Path, *flags: str) -> subprocess.CompletedProcess:
    """Step 1 in this process, beside the file: what a run of its own would have said and ended with."""
    step, out, err, code = load_script(STEP), io.StringIO(), io.StringIO(), 0
    given = ["--dataset_name", str(path), "--model_name", str(tiny), "--eval_fraction", "0.2", *flags]
    here = os.getcwd()
    os.chdir(path.parent)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            override(vars(step), given, check=model_problems)
            step.main()
        except SystemExit as end:
            code = end.code
        finally:
            os.chdir(here)
    return subprocess.CompletedProcess(given, code, out.getvalue(), err.getvalue())


def test_a_row_of_50_mb_is_dropped_in_no_time(tiny, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", finance_rows(30))
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"instruction": "Why?", "output": "word " * 10**7}) + "\n")
    began = time.monotonic()
    ok(prepare(path, tiny))
    assert time.monotonic() - began < 20
    manifest = manifest_of(tmp_path)
    assert manifest["rows"]["dropped"] == {"longer than 1024 tokens": 1}
    assert manifest["dropped_examples"] == {"longer than 1024 tokens": ["rows.jsonl line 31"]}


def test_a_cut_last_line_is_counted(tiny, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", finance_rows(30))
    path.write_bytes(path.read_bytes()[:-20])
    ok(prepare(path, tiny))
    rows = manifest_of(tmp_path)["rows"]
    assert (rows["read"], rows["kept"], rows["dropped"]) == (30, 29, {"not JSON": 1})


def test_mixed_types_in_a_column_are_left_out_row_by_row(tiny, tmp_path):
    odd = [{"instruction": "Q", "output": value} for value in (1, 2.5, True, ["a"], {"b": 1}, None)]
    ok(prepare(write_rows(tmp_path / "rows.jsonl", finance_rows(40) + odd), tiny))
    rows = manifest_of(tmp_path)["rows"]
    assert rows["kept"] == 40
    assert rows["dropped"] == {"answer is not a string": 5, "missing answer": 1}


@pytest.mark.parametrize(
    "name, data",
    [
        ("rows.csv", b"instruction,output,output\nQ?,A.,B.\n"),
        ("rows.jsonl", b'{"instruction": "Q?", "output": "A.", "output": "B."}\n'),
        ("rows.json", b'[{"instruction": "Q?", "output": "A.", "output": "B."}]'),
        ("rows.parquet", None),
    ],
)
def test_two_columns_of_one_name_are_refused(tiny, tmp_path, name, data):
    if data is None:
        columns = [pyarrow.array(["Q?"]), pyarrow.array(["A."]), pyarrow.array(["B."])]
        table = pyarrow.Table.from_arrays(columns, ["instruction", "output", "output"])
        pyarrow.parquet.write_table(table, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(data)
    assert len(refused(prepare(tmp_path / name, tiny), name, "'output'")) == 1


# --- the split


def edited(text: str, rng: random.Random) -> str:
    """The prompt with one of the small edits that copies in the wild differ by; its figures stay."""
    words = text.split()
    place = rng.choice([n for n, word in enumerate(words) if word.isalpha() and len(word) > 3])
    kind = rng.randrange(6)
    if kind == 0:
        return text.upper()
    if kind == 1:
        return "  " + text.replace(" ", "  ") + " !!"
    if kind == 2:  # a typing mistake
        word = words[place]
        words[place] = word[:1] + word[2] + word[1] + word[3:]
    elif kind == 3:
        words.insert(place, "really")
    elif kind == 4:
        del words[place]
    else:
        return text + " Thank you."
    return " ".join(words)


def long_rows(n: int) -> list[dict]:
    """Rows that share no wording: each prompt is some 25 words of its own."""
    rng = random.Random(5)
    letters = "abcdefghijklmnopqrstuvwxyz"
    made = ["".join(rng.choices(letters, k=rng.randint(3, 9))) for _ in range(3000)]
    return [{"instruction": " ".join(rng.choices(made, k=25)) + f" {i}?", "output": f"Answer {i}."} for i in range(n)]


def parts_of(folder: Path) -> dict[str, str]:
    """The part of each answer."""
    parts = {row["completion"][0]["content"]: "train" for row in datasets.load_from_disk(str(folder / "data/train"))}
    held_out = datasets.load_from_disk(str(folder / "data/eval"))
    return parts | {row["completion"][0]["content"]: row["part"] for row in held_out}


def test_planted_leaks_stay_on_one_side(tiny, tmp_path):
    """5 % of the rows come again with a small edit and another answer: none on another side than its original."""
    rng, rows = random.Random(7), long_rows(3000)
    copies = [
        {"instruction": edited(row["instruction"], rng), "output": "Copy of " + row["output"]}
        for row in rng.sample(rows, 150)
    ]
    mixed = rows + copies
    rng.shuffle(mixed)
    ok(prepare(write_rows(tmp_path / "rows.jsonl", mixed), tiny))
    parts, manifest = parts_of(tmp_path), manifest_of(tmp_path)
    assert len(parts) == 3150
    crossed = [row for row in copies if parts[row["output"]] != parts[row["output"].removeprefix("Copy of ")]]
    assert crossed == []
    assert {parts[row["output"]] for row in copies} == {"train", "validation", "test"}
    # and nothing else was kept together: the split is as fine as before
    assert manifest["groups"]["groups"] == 3000 and manifest["groups"]["largest"] == 2
    # without the threshold only prompts that are equal, but for case and spacing, stay together
    ok(prepare(tmp_path / "rows.jsonl", tiny, "--near_duplicate_threshold", "none"))
    parts = parts_of(tmp_path)
    assert [r for r in copies if parts[r["output"]] != parts[r["output"].removeprefix("Copy of ")]]


def test_near_equal_prompts_split_alike_in_any_order_of_the_file(tiny, tmp_path):
    rng, rows = random.Random(8), long_rows(300)
    rows += [{"instruction": edited(row["instruction"], rng), "output": row["output"] + "!"} for row in rows[:60]]
    hashes = set()
    for _ in range(2):
        rng.shuffle(rows)
        ok(prepare(write_rows(tmp_path / "rows.jsonl", rows), tiny))
        hashes.add(json.dumps(manifest_of(tmp_path)["sha256"]))
    assert len(hashes) == 1


def test_other_figures_are_another_question(tiny, tmp_path):
    rows = [
        {"instruction": f"What is {n} percent of {7 * n} dollars, rounded to a whole cent?", "output": f"It is {n}."}
        for n in range(100)
    ]
    ok(prepare(write_rows(tmp_path / "rows.jsonl", rows), tiny))
    assert manifest_of(tmp_path)["groups"] == {"groups": 100, "largest": 1, "same_prompt": 0}


def test_chinese_prompts_are_compared_too(tiny, tmp_path):
    texts = ["什么是市盈率，它对选择股票有什么用处？", "请解释一下债券价格为什么会随着利率变化。"]
    texts += [f"第{n}题：请说明第{n}种投资的风险。" for n in range(40)]
    rows = [{"instruction": text, "output": f"答案{i}。"} for i, text in enumerate(texts)]
    rows += [
        {"instruction": text.replace("？", "?").replace("。", " "), "output": "同上。" + text} for text in texts[:2]
    ]
    ok(prepare(write_rows(tmp_path / "rows.jsonl", rows), tiny))
    assert manifest_of(tmp_path)["groups"] == {"groups": 42, "largest": 2, "same_prompt": 2}


def test_rows_that_are_all_nearly_equal_cannot_be_split(tiny, tmp_path):
    text = "The annual report says that revenue grew in the north and fell in the south. Comment on it, "
    rows = [{"instruction": text + word, "output": f"{word}!"} for word in "abcdefghijklmnopqrstuvwxyz"]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    refused(prepare(path, tiny), "26 of their prompts are near-duplicates", "--near_duplicate_threshold")
    ok(prepare(path, tiny, "--near_duplicate_threshold", "none"))


def test_one_prompt_with_several_answers_is_reported_and_kept_together(tiny, tmp_path):
    rows = long_rows(50)
    rows += [{**row, "output": row["output"] + " Or so."} for row in rows[:10]]
    ok(prepare(write_rows(tmp_path / "rows.jsonl", rows), tiny))
    manifest, parts = manifest_of(tmp_path), parts_of(tmp_path)
    assert manifest["groups"] == {"groups": 50, "largest": 2, "same_prompt": 20}
    assert all(parts[row["output"]] == parts[row["output"].removesuffix(" Or so.")] for row in rows[50:])
    assert "20 rows share their prompt" in (tmp_path / "data/dataset_report.md").read_text(encoding="utf-8")


# --- the report


def test_the_report_says_what_was_done(step, tiny, tmp_path, tokenizer_of_tiny):
    rows = [{key: row[key] for key in ("instruction", "input", "output")} for row in finance_rows(60)]
    rows += [{"instruction": f"Long {n}?", "input": "", "output": "word " * n} for n in (1100, 1200)]
    rows += [{"instruction": "Empty?", "input": "", "output": ""}] * 4
    ok(prepare(write_rows(tmp_path / "rows.jsonl", rows), tiny))
    report = (tmp_path / "data/dataset_report.md").read_text(encoding="utf-8")
    assert "66 rows read as alpaca, 60 kept" in report
    assert "| empty answer | 4 | rows.jsonl line 63, rows.jsonl line 64, rows.jsonl line 65 |" in report
    assert "| longer than 1024 tokens | 2 | rows.jsonl line 61, rows.jsonl line 62 |" in report
    lengths = [
        sum(
            map(
                len,
                chat.encode(
                    tokenizer_of_tiny, [{"role": "user", "content": q}], [{"role": "assistant", "content": a}]
                ),
            )
        )
        for q, a in ((r["instruction"] + ("\n\n" + r["input"]) * bool(r["input"]), r["output"]) for r in rows[:62])
    ]
    for limit in (512, 1024, 2048):
        share = sum(n <= limit for n in lengths) / 62
        assert f"| {limit} | {100 * share:.1f} % |" in report
    assert f"99 % of the rows fit at MAX_LENGTH = {sorted(lengths)[61]}." in report
    assert (tmp_path / "data/length_histogram.png").read_bytes()[:4] == b"\x89PNG"
    shown = re.findall(r"assistant\n⟦(.*?)<\|endoftext\|>⟧", report, re.DOTALL)
    assert len(shown) == 3 and set(shown) <= {row["output"] for row in rows}


def test_a_row_full_of_fences_stays_inside_its_own(tiny, tmp_path):
    rows = [{"instruction": f"Q{i}\n~~~\n# not a heading", "output": f"~~~~~\nA{i}"} for i in range(30)]
    ok(prepare(write_rows(tmp_path / "rows.jsonl", rows), tiny))
    markdown = pytest.importorskip("markdown")
    html = markdown.markdown(
        (tmp_path / "data/dataset_report.md").read_text(encoding="utf-8"), extensions=["fenced_code", "tables"]
    )
    assert "not a heading</h1>" not in html


def test_what_was_changed_is_said(tiny, tmp_path):
    turns = [("user", "Q{i}"), ("assistant", "A{i}"), ("user", "Thanks")]
    chats = [
        {"messages": [{"role": role, "content": text.format(i=i)} for role, text in turns[: 2 + i % 2]]}
        for i in range(40)
    ]
    ok(prepare(write_rows(tmp_path / "rows.jsonl", chats), tiny))
    assert manifest_of(tmp_path)["changed"] == {"turns behind the last answer removed": 20}
    assert "turns behind the last answer removed: 20 rows" in (tmp_path / "data/dataset_report.md").read_text("utf-8")


@pytest.fixture(scope="module")
def tokenizer_of_tiny(tiny):
    return chat.load_tokenizer(str(tiny), None, "auto")


# --- what an attack found


def test_a_quote_that_is_not_closed_swallows_no_row(tiny, tmp_path):
    rows = [f'Question {i}?,"Answer {i}."' for i in range(80)]
    rows[60] = 'Question 60?,"Answer 60.'
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(["instruction,output", *rows]), encoding="utf-8")
    assert len(refused(prepare(path, tiny), "rows.csv", "line ", "quote")) == 1


@pytest.mark.parametrize(
    "one, other",
    [
        ("Is ${i}148 enough for a car?", "Is ${i},148 enough for a car?"),
        ("Is {i}111 enough for a car?", "Is {i}111.00 enough for a car?"),
        ("Où est passée l'épargne déposée à côté, numéro {i} ?", "Ou\u0300 est passe\u0301e l'e\u0301pargne "
                                                                 "de\u0301pose\u0301e a\u0300 co\u0302te\u0301, "
                                                                 "nume\u0301ro {i} ?"),
        ("第{i}题：什么是市盈率？", "第{i}题:什么是市盈率?"),
    ],
    ids=["thousands", "decimals", "NFD", "full width"],
)  # fmt: skip
def test_one_prompt_in_two_spellings_stays_on_one_side(tiny, tmp_path, one, other):
    rows = []
    for i in range(10, 60):
        rows += [{"instruction": text.format(i=i), "output": f"{n} {i}"} for n, text in enumerate((one, other))]
    ok(prepare(write_rows(tmp_path / "rows.jsonl", rows), tiny))
    parts = parts_of(tmp_path)
    assert all(parts[f"0 {i}"] == parts[f"1 {i}"] for i in range(10, 60))
    assert manifest_of(tmp_path)["groups"]["groups"] == 50


def test_emoji_and_formulas_are_told_apart(tiny, tmp_path):
    signs = [chr(0x1F600 + i) * 3 for i in range(40)]
    path = write_rows(
        tmp_path / "rows.jsonl", [{"instruction": s, "output": f"Sign {i}"} for i, s in enumerate(signs)]
    )
    ok(prepare(path, tiny))
    assert manifest_of(tmp_path)["groups"]["groups"] == 40


def test_the_classification_that_step_1_asks_for_makes_no_rows_alike(step, tiny, tmp_path):
    names = [f"a rather long name of a topic that customers write about, number {i}" for i in range(40)]
    features = datasets.Features(
        {"topic": datasets.ClassLabel(names=["x", "y"]), "text": datasets.Value("string")}
        | {"label": datasets.ClassLabel(names=names)}
    )
    rows = [{"topic": 0, "text": row["instruction"], "label": i % 40} for i, row in enumerate(long_rows(80))]
    (tmp_path / "rows.parquet").write_bytes(parquet(rows, features))
    ok(prepare(tmp_path / "rows.parquet", tiny, "--max_length", "8000"))
    assert manifest_of(tmp_path)["groups"]["groups"] == 80
    first = kept(tmp_path)[0]  # the names are those of the column that is the answer
    assert names[0] in first["prompt"][0]["content"] and first["completion"][0]["content"] in names


def test_a_system_column_beside_messages_is_not_lost(tiny, tmp_path):
    talk = [{"from": "human", "value": "Q{i}?"}, {"from": "gpt", "value": "A{i}"}]
    rows = [
        {"system": "You are a pirate.", "conversations": [{**t, "value": t["value"].format(i=i)} for t in talk]}
        for i in range(30)
    ]
    ok(prepare(write_rows(tmp_path / "rows.jsonl", rows), tiny))
    assert all(row["prompt"][0] == {"role": "system", "content": "You are a pirate."} for row in kept(tmp_path))


def test_context_beside_an_input_is_not_lost(tiny, tmp_path):
    rows = [
        {"instruction": f"Q{i}?", "input": "In" * (i % 2), "context": f"Facts {i}.", "output": "A"} for i in range(30)
    ]
    ok(prepare(write_rows(tmp_path / "rows.jsonl", rows), tiny))
    assert all("Facts" in row["prompt"][0]["content"] for row in kept(tmp_path))


def test_files_that_are_not_read_are_named(tiny, tmp_path, step, capsys):
    for name in ("train", "more"):
        write_rows(tmp_path / f"{name}.jsonl", finance_rows(5))
    assert len(list(step.read_rows(str(tmp_path), None, "train", None))) == 5
    assert "more.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize(
    "rows, flags, said",
    [
        ([{"instruction": "", "output": "A"}] * 9, ["--max_drop_fraction", "1"], "0 usable rows"),
        ([{"instruction": "Q?", "output": f"A{i}"} for i in range(30)], [], "30 have one prompt"),
        ([{"text": f"T{i}", "label": i % 2} for i in range(30)], [], "label is a number without a name"),
        ([{"text": f"T{i}", "label": str(i % 2)} for i in range(30)], [], "label is a number without a name"),
        (finance_rows(60), ["--eval_fraction", "0.999"], "--eval_fraction 0.1"),
        (finance_rows(9), ["--near_duplicate_threshold", "0.5"], "from 0.7 to 1"),
        (finance_rows(9), ["--near_duplicate_threshold", "0"], "from 0.7 to 1"),
    ],
    ids=["none", "one prompt", "numbers", "digits", "all held out", "too low", "zero"],
)
def test_what_cannot_be_split_says_why(tiny, tmp_path, rows, flags, said):
    assert len(refused(prepare(write_rows(tmp_path / "rows.jsonl", rows), tiny, *flags), said)) == 1


def test_columns_named_by_numbers_can_be_mapped(tiny, tmp_path):
    lines = ["1,2", *(f"Is {i} even?,Maybe {i}." for i in range(30))]
    (tmp_path / "rows.csv").write_text("\n".join(lines), encoding="utf-8")
    ok(prepare(tmp_path / "rows.csv", tiny, "--column_map", "instruction=1,output=2"))
    assert manifest_of(tmp_path)["rows"]["kept"] == 30


def test_a_list_over_several_lines_that_is_called_jsonl(tiny, tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps(r, indent=1) for r in finance_rows(20)), encoding="utf-8"
    )
    result = prepare(tmp_path / "rows.jsonl", tiny)
    assert len(refused(result, "call it .json")) == 1 and result.stdout.count("is not JSON") == 3
