"""Step 1 on what people bring themselves: their encodings, separators, workbooks, column names and dialogues."""

import contextlib
import csv
import datetime
import io
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import datasets
import openpyxl
import pytest
from conftest import ROOT, SCRIPTS, load_script, ok, refused, run, write_rows
from hub import finance_rows
from test_prepare_sources import kept, manifest_of, prepare

from configs.evaluation.candidates import load_held_out
from configs.handover import read_manifest
from configs.preparation.encoding import NAMES, find_encoding
from configs.preparation.tables import cell_text

STEP = SCRIPTS[0]


def table(rows: list[tuple], separator: str = ",") -> str:
    sheet = io.StringIO()
    csv.writer(sheet, delimiter=separator, lineterminator="\r\n").writerows(rows)
    return sheet.getvalue()


def turns_of(folder: Path) -> set[tuple[str, str]]:
    return {(row["prompt"][-1]["content"], row["completion"][0]["content"]) for row in kept(folder)}


def read(path: Path) -> list:
    step = load_script(STEP)
    return [row for _, row in step.read_rows(str(path), None, "train", None)]


# --- encodings

TEXTS = {
    "zh": "什么是市盈率？,市盈率是股价与每股收益的比率，朱镕基也知道。\n如何开户？,带上身份证到银行办理。\n",
    "zh-TW": "什麼是本益比？,本益比是股價與每股盈餘的比率。\n如何開戶？,帶身分證到銀行辦理。\n",
    "ja": "株価収益率とは何ですか？,株価を一株当たり利益で割ったもの。ｶﾌﾞ\n口座を開くには？,カードも作れます。\n",
    "ko": "주가수익비율이란 무엇인가요?,주가를 주당순이익으로 나눈 값입니다.\n계좌는?,은행에서 신청합니다.\n",
    "fr": "Où aller?,À la banque; bien sûr; l'intérêt y est élevé, jusqu'à l'échéance.\n",
    "de": "Was heißt Überziehung?,Größere Beträge kosten Gebühren: für 5 € nichts.\n",
    "es": "¿Qué es una acción?,Una parte de una compañía. ¡Mañana será más fácil!\n",
    "pt": "O que é uma ação?,Uma parte da companhia; há opções à disposição, não só lá.\n",
    "pl": "Co to jest akcja?,To udział w spółce. Można ją kupić na giełdzie, także przez internet.\n",
    "cs": "Co je to akcie?,Podíl ve společnosti. Můžete ji koupit na burze, říká se to často.\n",
    "hu": "Mi az a részvény?,Egy társaság része, a tőzsdén; főleg ősszel gyűlik a pénz.\n",
    "tr": "Hisse senedi nedir?,Bir şirketin payıdır. Hesap bankada açılır, değişik iş için şu yolu seçin.\n",
    "ru": "Что такое акция?,Это доля в компании. Где открыть счёт? В банке.\n",
    "el": "Τι είναι η μετοχή;,Είναι ένα μερίδιο εταιρείας. Πού ανοίγει ένας λογαριασμός;\n",
    "en": "What’s a bond?,It’s “a loan” – nothing else. A café costs £5.\n",
}
SPELLED = [
    ("zh", "gb18030"),
    ("zh", "gbk"),
    ("zh-TW", "big5"),
    ("ja", "shift_jis"),
    ("ja", "euc_jp"),
    ("ko", "euc_kr"),
    ("fr", "cp1252"),
    ("fr", "mac_roman"),
    ("de", "cp1252"),
    ("es", "latin-1"),
    ("pt", "latin-1"),
    ("pl", "cp1250"),
    ("pl", "iso8859_2"),
    ("cs", "cp1250"),
    ("hu", "cp1250"),
    ("tr", "cp1254"),
    ("ru", "cp1251"),
    ("ru", "koi8_r"),
    ("el", "cp1253"),
    ("en", "cp1252"),
    *((name, encoding) for name in ("zh", "de", "ru") for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-be")),
]


@pytest.mark.parametrize("among", [0, 200], ids=["alone", "among English rows"])
@pytest.mark.parametrize("language, encoding", SPELLED, ids=str)
def test_every_encoding_is_read_right(tmp_path, capsys, language, encoding, among):
    text = "question,answer\n" + "What is a stock?,A share of a company\n" * among + TEXTS[language]
    (tmp_path / "rows.csv").write_bytes(text.encode(encoding))
    rows = read(tmp_path / "rows.csv")
    assert rows == list(csv.DictReader(io.StringIO(text)))
    said = capsys.readouterr().out
    if encoding.startswith("utf-8"):
        assert said == ""
    else:
        assert ("UTF-16" if encoding.startswith("utf-16") else "is not UTF-8; read as") in said


def test_a_line_shows_what_the_text_was_taken_for(tmp_path, capsys):
    (tmp_path / "rows.csv").write_bytes(("question,answer\n" + TEXTS["zh"]).encode("gb18030"))
    assert find_encoding(tmp_path / "rows.csv") == "gb18030"
    said = capsys.readouterr().out
    assert "read as GB18030 (GBK), e.g. 什么是市盈率？" in said and "save the file as UTF-8" in said


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_json_in_another_encoding_is_read_right_too(tmp_path, name):
    rows = [{"question": q, "answer": a} for q, a in (line.split(",") for line in TEXTS["zh"].splitlines())]
    text = json.dumps(rows, ensure_ascii=False)
    if name == "rows.jsonl":
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / name).write_bytes(text.encode("gb18030"))
    assert read(tmp_path / name) == rows


@pytest.mark.parametrize("data", [bytes(range(128, 256)) * 9, b"\x81\x8d\x9d\x98 \xff\n" * 20], ids=["all", "none"])
def test_what_cannot_be_told_is_refused_and_never_guessed(tmp_path, capsys, data):
    (tmp_path / "rows.csv").write_bytes(b"question,answer\n" + data)
    with pytest.raises(SystemExit) as end:
        find_encoding(tmp_path / "rows.csv")
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "rows.csv" in line and "CSV UTF-8" in line and "iconv" in line


@pytest.mark.parametrize("language, encoding", [("zh", "gb18030"), ("ja", "cp932"), ("ko", "cp949")])
def test_a_damaged_line_is_named_in_any_encoding(tmp_path, capsys, language, encoding):
    lines = (TEXTS[language] * 40).encode(encoding).splitlines(keepends=True)
    lines[30] = lines[30][:-1] + b"\x81 \n"
    (tmp_path / "rows.csv").write_bytes(b"".join(lines))
    with pytest.raises(SystemExit):
        find_encoding(tmp_path / "rows.csv")
    assert f"line 31: not {NAMES[encoding]}" in capsys.readouterr().err


def test_a_gb18030_file_becomes_data(tiny, tmp_path):
    """As a user has it: Excel in China saves such CSV files."""
    rows = [(f"第{i}号基金是什么？", f"代码为{i}的基金，成立于{1990 + i}年。") for i in range(60)]
    (tmp_path / "rows.csv").write_bytes(table([("问题", "回答"), *rows]).encode("gb18030"))
    out = ok(prepare(tmp_path / "rows.csv", tiny, "--language", "zh"))
    assert "GB18030" in out and "问题/回答" in out
    assert turns_of(tmp_path) == set(rows)
    report = (tmp_path / "data/dataset_report.md").read_text("utf-8")
    assert "rows.csv\n\n读入 60 行（格式：问题/回答），保留 60 行：" in report
    assert rows[0][1] not in out  # data are shown in the report, and on the screen only where they are asked for


# --- separators


@pytest.mark.parametrize(
    "name, separator, said",
    [
        ("rows.csv", ";", "separated by semicolons"),
        ("rows.csv", "\t", "separated by tabs"),
        ("rows.csv", ",", None),
        ("rows.tsv", "\t", None),
        ("rows.tsv", ",", "separated by commas"),
    ],
)
def test_separators_are_found_out_and_said(tiny, tmp_path, name, separator, said):
    rows = [(f"Is {i}, or {i}; and {i}, even?", f"Maybe; \"{i}\",\nor not; 'so', it's") for i in range(40)]
    (tmp_path / name).write_text(table([("question", "answer"), *rows], separator), "utf-8", newline="")
    out = ok(prepare(tmp_path / name, tiny))
    assert turns_of(tmp_path) == set(rows)
    assert said in out if said else "separated" not in out


def test_the_line_with_which_excel_names_the_separator_is_no_header(tmp_path):
    (tmp_path / "rows.csv").write_text("sep=;\nquestion;answer\nWhy, so?;So, why.\n", "utf-8")
    assert read(tmp_path / "rows.csv") == [{"question": "Why, so?", "answer": "So, why."}]


# --- workbooks


def workbook(path: Path, rows: list[list], title: str = "rows") -> Path:
    book = openpyxl.Workbook()
    book.active.title = title
    for row in rows:
        book.active.append(row)
    book.save(path)
    return path


def test_a_workbook_becomes_data(tiny, tmp_path, capsys):
    rows = [[f"What is {i} times two?", f"Facts {i}." if i % 2 else None, i * 2] for i in range(40)]
    path = workbook(tmp_path / "rows.xlsx", [[], ["Instruction", " Input ", "OUTPUT"], *rows, [], [None, None, ""]])
    ok(prepare(path, tiny))
    manifest = manifest_of(tmp_path)
    assert manifest["rows"]["read"] == manifest["rows"]["kept"] == 40
    assert manifest["schema"] == {
        "name": "alpaca",
        "columns": {"instruction": "Instruction", "output": "OUTPUT", "input": "Input"},
    }
    assert turns_of(tmp_path) == {(q + (f"\n\n{facts}" if facts else ""), str(a)) for q, facts, a in rows}


def test_a_bad_row_of_a_workbook_is_named_by_its_number_in_the_sheet(tiny, tmp_path):
    rows = [[f"Q{i}?", f"A{i}"] for i in range(30)]
    rows[4][1] = None
    ok(prepare(workbook(tmp_path / "rows.xlsx", [["question", "answer"], [], *rows]), tiny))
    assert manifest_of(tmp_path)["dropped_examples"] == {"missing answer": ["rows.xlsx row 7"]}


@pytest.mark.parametrize(
    "value, number_format, text",
    [
        (42, "General", "42"),
        (0.1 + 0.2, "General", "0.3"),
        (0.05, "0%", "5%"),
        (True, "General", "TRUE"),
        (datetime.datetime(2024, 1, 31), "yyyy-mm-dd", "2024-01-31"),
        (datetime.datetime(2024, 1, 31, 8, 30), "yyyy-mm-dd hh:mm", "2024-01-31 08:30:00"),
        ("#N/A", "General", None),
        (" text ", "General", " text "),
        ("one_x000D_\ntwo", "General", "one\ntwo"),
        (None, "General", None),
    ],
)
def test_a_cell_is_the_text_that_people_see(value, number_format, text):
    sheet = openpyxl.Workbook().active
    sheet["A1"] = value
    sheet["A1"].number_format = number_format
    assert cell_text(sheet["A1"]) == text


def test_the_first_sheet_with_rows_is_read_and_the_others_named(tmp_path, capsys):
    book = openpyxl.Workbook()
    book.active.title = "empty"
    for title in ("mine", "notes"):
        for row in (["question", "answer"], [f"Q of {title}?", "A"]):
            (book[title] if title in book.sheetnames else book.create_sheet(title)).append(row)
    book.save(tmp_path / "rows.xlsx")
    assert read(tmp_path / "rows.xlsx") == [{"question": "Q of mine?", "answer": "A"}]
    assert "(mine); not read: notes" in capsys.readouterr().out


def test_a_folder_of_tables_is_read_without_the_lock_file_of_a_spreadsheet(tmp_path):
    workbook(tmp_path / "b.xlsx", [["question", "answer"], ["Q2", "A2"]])
    (tmp_path / "~$b.xlsx").write_bytes(b"\x05user")
    (tmp_path / "a.tsv").write_text("question\tanswer\nQ1\tA1\n", "utf-8")
    assert [row["answer"] for row in read(tmp_path)] == ["A1", "A2"]


def test_a_damaged_workbook_is_one_sentence(tiny, tmp_path):
    path = workbook(tmp_path / "rows.xlsx", [["question", "answer"], *[[f"Q{i}", "A" * 50] for i in range(400)]])
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"\xd0\xcf\x11\xe0" + bytes(600), whole[:800] + bytes(200) + whole[1000:]):
        path.write_bytes(data)
        assert len(refused(prepare(path, tiny), "rows.xlsx cannot be read as xlsx", "save it anew")) == 1


def test_openpyxl_is_named_where_it_is_not_installed(tiny, tmp_path):
    workbook(tmp_path / "rows.xlsx", [["question", "answer"], ["Q", "A"]])
    hide = f"import sys, runpy; sys.modules['openpyxl'] = None; sys.argv = sys.argv[1:]; sys.path[0] = {str(ROOT)!r}"
    words = ["-c", f"{hide}; runpy.run_path(sys.argv[0], run_name='__main__')", str(ROOT / STEP)]
    result = run(*words, "--dataset_name", "rows.xlsx", "--model_name", tiny, cwd=tmp_path)
    refused(result, "'openpyxl' is not installed", "pip install -r")


# --- columns


@pytest.mark.parametrize(
    "columns, schema",
    [
        (["Question", " ANSWER "], {"instruction": "Question", "output": " ANSWER "}),
        (["In struction", "ＯＵＴＰＵＴ"], {"instruction": "In struction", "output": "ＯＵＴＰＵＴ"}),
        (["Answer", "answer", "question"], {"instruction": "question", "output": "answer"}),
        (["问题", "回答"], {"instruction": "问题", "output": "回答"}),
        (["问题", "上下文", "答案"], {"instruction": "问题", "input": "上下文", "output": "答案"}),
        (
            ["指令", "输入", "输出", "系统"],
            {"instruction": "指令", "input": "输入", "output": "输出", "system": "系统"},
        ),
        (["输入", "输出"], {"instruction": "输入", "output": "输出"}),
        (["input", "target", "kind"], {"instruction": "input", "output": "target"}),
        (["Messages", "System"], {"messages": "Messages", "system": "System"}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_columns_are_known_by_what_people_call_them(columns, schema):
    assert load_script(STEP).find_schema(columns, {})[1] == schema


def test_a_column_map_does_not_mind_case_and_spaces(tiny, tmp_path):
    rows = [{"My Task ": f"Task {i}?", "The Result": f"Result {i}."} for i in range(30)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    ok(prepare(path, tiny, "--column_map", "instruction=my task,output=the result"))
    assert turns_of(tmp_path) == {(row["My Task "], row["The Result"]) for row in rows}


def test_unknown_columns_are_answered_with_a_command_that_works(tiny, tmp_path):
    """The two columns of the longest texts, in their order; the suggestion is pasted into a shell."""
    rows = [(i, f"What is the price of {i} apples?", "2024", f"They cost about {2 * i} euros.") for i in range(30)]
    (tmp_path / "rows.csv").write_text(table([("id", "My question", "year", "Told"), *rows]), "utf-8")
    (error,) = refused(prepare(tmp_path / "rows.csv", tiny), "not recognised: id, My question, year, Told;")
    assert len(error) < 250
    flags = error.partition("e.g. ")[2]
    assert flags == "--column_map 'instruction=My question,output=Told'"
    ok(prepare(tmp_path / "rows.csv", tiny, *shlex.split(flags)))
    assert turns_of(tmp_path) == {(q, a) for _, q, _, a in rows}


def test_a_column_of_messages_is_suggested_as_such_and_many_columns_are_not_listed(tiny, tmp_path):
    talk = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    rows = [{**{f"column {n}": "x" for n in range(40)}, "chat": talk}] * 9
    errors = refused(prepare(write_rows(tmp_path / "rows.jsonl", rows), tiny), "and 29 more", "messages=chat")
    assert len(errors) == 1 and len(errors[0]) < 350


# --- JSON written by hand


@pytest.mark.parametrize(
    "name, text, line",
    [
        ("rows.json", '[\n{"a": 1},\n{"b": 2},\n]', 3),
        ("rows.json", '[\n{"a": 1},\n{"b": 2,\n}\n]', 3),
        ("rows.json", '{"data": [{"a": [1, 2, ]}]}', 1),
        ("rows.jsonl", '[\n{"a": 1},\n{"b": 2},\n\n]', 3),
    ],
)
def test_a_trailing_comma_is_named_with_its_line(tiny, tmp_path, name, text, line):
    (tmp_path / name).write_text(text, "utf-8")
    said = f"{name}, line {line}: a comma in front of the closing bracket"
    assert len(refused(prepare(tmp_path / name, tiny), said, "delete it")) == 1


def test_lines_that_end_with_a_comma_say_so(tiny, tmp_path):
    lines = [json.dumps(row) for row in finance_rows(30)]
    lines[3] += ","
    lines[4] = lines[4].replace("}", ",}")
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), "utf-8")
    out = ok(prepare(tmp_path / "rows.jsonl", tiny))
    assert "line 4 is not JSON and is left out (a comma behind the row: delete it)" in out
    assert "line 5 is not JSON and is left out (a comma in front of a closing bracket: delete it)" in out


# --- the formats of the large trainers

Q, A = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{**Q, "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "?"}]}, A]},
        {"messages": [{**Q, "content": [{"type": "input_text", "text": "Q?"}]}, A]},
        {"messages": [Q, {**A, "content": [{"type": "output_text", "text": "A.", "annotations": []}]}]},
        {"messages": [{**Q, "content": [{"text": "Q?"}]}, {**A, "content": [{"text": "A."}]}]},
        {"messages": [{**Q, "content": [{"type": "text", "content": "Q?", "image": None}]}, A]},
        {"messages": [{**Q, "content": ["Q?"]}, {**A, "tool_calls": None}]},
        {"contents": [{"role": "user", "parts": [{"text": "Q?"}]}, {"role": "model", "parts": [{"text": "A."}]}]},
        {"conversations": [{"from": "human", "value": "Q?"}, {"from": "chatgpt", "value": "A."}]},
        {"conversation": [{"system": "", "input": "Q?", "output": "A."}]},
        {"conversation": [{"human": "Q?", "assistant": "A."}]},
        {"conversations": [{"from": "user", "value": "Q?"}, {"from": "assistant", "value": "A."}]},
        {"prompt": [Q], "completion": [A]},
        {"query": "Q?", "response": "A.", "history": []},
    ],
    ids=lambda row: json.dumps(row)[:60],
)
def test_the_same_row_in_every_trainers_spelling(tokenizer, row):
    step = load_script(STEP)
    _, schema = step.find_schema(list(row), {})
    tally = step.Tally()
    (made,) = step.convert([("row 1", row)], schema, tokenizer, 1024, tally)
    assert (made["prompt"], made["completion"], tally.dropped) == ([Q], [A], {})


@pytest.mark.parametrize(
    "system",
    [{"systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}]}}, {"system": [{"text": "Be brief."}]}],
    ids=["Gemini", "Bedrock"],
)
def test_a_system_message_in_parts(tokenizer, system):
    step, row = load_script(STEP), {**system, "messages": [Q, A]}
    _, schema = step.find_schema(list(row), {})
    (made,) = step.convert([("row 1", row)], schema, tokenizer, 1024, step.Tally())
    assert made["prompt"] == [{"role": "system", "content": "Be brief."}, Q]


# --- dialogues


def dialogue(number: int, answers: int = 3) -> list[dict]:
    """A conversation whose turns share no wording with those of other ones."""
    word = "".join(chr(97 + int(digit) * 2) * 3 for digit in f"{number * 7919:06d}")
    return [
        {"role": role, "content": f"{word} {role} {part} {word[::-1]}"}
        for part in range(answers)
        for role in ("user", "assistant")
    ]


def converted(tokenizer, row: dict, turns: str = "all") -> tuple[list[tuple], object]:
    step = load_script(STEP)
    _, schema = step.find_schema(list(row), {})
    tally = step.Tally()
    made = list(step.convert([("row 1", row)], schema, tokenizer, 1024, tally, turns))
    return [([*row["prompt"]], *row["completion"]) for row in made], tally


def test_a_file_of_dialogues_becomes_a_row_for_each_answer(tiny, tmp_path):
    talks = [dialogue(i, 1 + i % 4) for i in range(80)]
    out = ok(prepare(write_rows(tmp_path / "rows.jsonl", [{"messages": talk} for talk in talks]), tiny))
    wanted = {json.dumps(talk[:end]) for talk in talks for end in range(2, len(talk) + 1, 2)}
    made = [json.dumps(row["prompt"] + row["completion"]) for row in kept(tmp_path)]
    assert set(made) == wanted and len(made) == len(wanted) == 200
    manifest = manifest_of(tmp_path)
    assert manifest["rows"]["read"] == manifest["rows"]["kept"] == 200
    assert manifest["conversations"] == {"several_answers": 60, "answers": 180, "rows": 180}
    assert "60 conversations of several answers gave 180 rows" in out
    report = (tmp_path / "data/dataset_report.md").read_text("utf-8")
    assert "60 conversations have several answers, 180 in all; 180 of these became rows" in report


def first_turns(folder: Path) -> dict[str, list[str]]:
    """The first turn of every conversation in each part; in eval with its group."""
    held_out = list(datasets.load_from_disk(str(folder / "data/eval")))
    parts = {"train": list(datasets.load_from_disk(str(folder / "data/train")))}
    parts |= {part: [row for row in held_out if row["part"] == part] for part in ("validation", "test")}
    return {part: [row["prompt"][0]["content"] for row in rows] for part, rows in parts.items()}


def test_the_rows_of_a_conversation_are_one_group_on_one_side(tiny, tmp_path):
    talks = [dialogue(i, 4) for i in range(60)]
    flags = ["--near_duplicate_threshold", "none"]  # so that the conversation alone holds them together
    ok(prepare(write_rows(tmp_path / "rows.jsonl", [{"messages": talk} for talk in talks]), tiny, *flags))
    parts = {part: set(turns) for part, turns in first_turns(tmp_path).items()}
    assert sum(map(len, parts.values())) == 60 and all(parts.values())
    assert manifest_of(tmp_path)["groups"] == {"groups": 60, "largest": 4, "same_prompt": 0}
    held_out = datasets.load_from_disk(str(tmp_path / "data/eval"))
    groups = {(row["prompt"][0]["content"], row["group"]) for row in held_out}
    assert len(groups) == len({turn for turn, _ in groups}) == len({group for _, group in groups})


def test_conversations_that_begin_alike_stay_together(tiny, tmp_path):
    """The second one's first rows are exact duplicates: what is left of it must not be tested on the first one."""
    talks = []
    for i in range(0, 120, 2):
        one, other = dialogue(i, 3), dialogue(i + 1, 3)
        talks += [one, one[:4] + other[4:]]
    flags = ["--near_duplicate_threshold", "none"]
    ok(prepare(write_rows(tmp_path / "rows.jsonl", [{"messages": talk} for talk in talks]), tiny, *flags))
    manifest = manifest_of(tmp_path)
    assert manifest["rows"]["dropped"] == {"exact duplicate": 120}
    assert manifest["groups"]["groups"] == 60 and manifest["groups"]["largest"] == 4
    parts = [set(turns) for turns in first_turns(tmp_path).values()]
    assert sum(map(len, parts)) == 60


def test_only_the_last_answer_where_that_is_asked_for(tiny, tmp_path):
    talks = [dialogue(i) for i in range(40)]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": talk} for talk in talks])
    out = ok(prepare(path, tiny, "--turns", "last"))
    made = {json.dumps(row["prompt"] + row["completion"]) for row in kept(tmp_path)}
    assert made == {json.dumps(talk) for talk in talks}
    assert "40 rows of 120 (TURNS is 'last')" in out


def test_dialogues_that_all_begin_alike_name_the_way_out(tiny, tmp_path):
    hello = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello, how can I help?"}]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": hello + dialogue(i)} for i in range(40)])
    refused(prepare(path, tiny, "--max_drop_fraction", "0.5"), "hang together", "--turns last")
    ok(prepare(path, tiny, "--turns", "last"))


def test_an_answer_without_a_question_is_only_read(tokenizer):
    talk = [{**A, "content": "Welcome."}, Q, A, {**A, "content": "And more."}, {**Q, "content": "Q2?"}, A]
    made, tally = converted(tokenizer, {"messages": talk})
    assert made == [(talk[:2], talk[2]), (talk[:5], talk[5])]
    assert tally.read == 2 and not tally.dropped and list(tally.changed.values()) == [2]


def test_an_answer_of_weight_0_is_only_read(tokenizer):
    talk = [Q, {**A, "weight": 0, "content": "Wrong."}, {**Q, "content": "Really?"}, {**A, "weight": 1}]
    bare = [{key: message[key] for key in ("role", "content")} for message in talk]
    assert converted(tokenizer, {"messages": talk})[0] == [(bare[:3], bare[3])]


def test_the_answers_in_a_prompt_are_only_read(tokenizer):
    """TRL's prompt and completion as lists: what is trained is said."""
    talk = dialogue(1, 3)
    made, _ = converted(tokenizer, {"prompt": talk[:3], "completion": talk[3:]})
    assert made == [(talk[:3], talk[3]), (talk[:5], talk[5])]


@pytest.mark.parametrize(
    "names", [("query", "response"), ("instruction", "output")], ids=["ms-swift", "LLaMA-Factory"]
)
def test_a_history_is_no_longer_lost(tokenizer, names):
    talk = dialogue(1, 3)
    texts = [message["content"] for message in talk]
    row = {names[0]: texts[4], names[1]: texts[5], "history": [texts[:2], texts[2:4]], "system": "S"}
    made, _ = converted(tokenizer, row)
    system = {"role": "system", "content": "S"}
    assert made == [([system, *talk[:end]], talk[end]) for end in (1, 3, 5)]
    assert len(converted(tokenizer, {**row, "history": "of a town"})[0]) == 1  # a column of another kind
    made, tally = converted(tokenizer, {**row, "history": [["only a question"]]})
    assert made == [] and list(tally.dropped) == ["history is not a list of questions and answers"]


def test_a_conversation_without_end_takes_no_time(tokenizer):
    made, tally = converted(tokenizer, {"messages": dialogue(1, 20_000)})
    assert 5 < len(made) < 100 and tally.dropped == {"longer than 1024 tokens": 20_000 - len(made)}


# --- --dry_run and the language of the report


def test_a_dry_run_shows_the_data_and_writes_nothing(tiny, tmp_path):
    rows = [{"question": f"What is {i}?", "answer": f"Number {i}."} for i in range(40)] + [{"question": "?"}]
    write_rows(tmp_path / "rows.jsonl", rows)
    given = ["--dataset_name", "rows.jsonl", "--model_name", tiny, "--eval_fraction", "0.2"]
    out = ok(run(STEP, *given, "--dry_run", cwd=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert out.count("--- row ") == 3 and out.count("⟦Number ") == 3 and "assistant\n⟦Number " in out
    assert "left out: 1 x missing answer (rows.jsonl line 41)" in out
    assert "41 rows read (instruction=question, output=answer), 40 kept: 32 for train, 4 for validation" in out
    # and what it says is what the real run then does
    ok(prepare(tmp_path / "rows.jsonl", tiny))
    counts = manifest_of(tmp_path)["rows"]
    assert [counts[name] for name in ("read", "kept", "train", "validation", "test")] == [41, 40, 32, 4, 4]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    ok(prepare(tmp_path / "rows.jsonl", tiny, "--seed", "7", "--dry_run"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before


def test_the_report_in_both_languages_says_the_same(tiny, tmp_path):
    from configs.preparation.report import WORDS
    from configs.translation import table

    rows = [{"instruction": f"What is {i}?", "input": "", "output": f"Number {i}."} for i in range(40)]
    rows += [{"instruction": "Long?", "output": "word " * 1200}, {"instruction": "Empty?", "output": " "}]
    write_rows(tmp_path / "rows.jsonl", rows)
    reports, manifests = {}, {}
    for language in ("en", "zh"):
        ok(prepare(tmp_path / "rows.jsonl", tiny, "--language", language))
        reports[language] = (tmp_path / "data/dataset_report.md").read_text("utf-8")
        manifests[language] = manifest_of(tmp_path)
    assert manifests["en"] == manifests["zh"]  # so that nothing is out of date
    fixed = {language: [line for line in text.splitlines() if line[:2] == "##"] for language, text in reports.items()}
    assert fixed["zh"] == ["## 长度", "## 剔除的行", "## 改动", "## 模型将看到的内容"] and len(fixed["en"]) == 4
    assert "| 超过 1024 个 token | 1 | rows.jsonl line 41 |" in reports["zh"]
    assert "| 回答为空 | 1 | rows.jsonl line 42 |" in reports["zh"]
    assert len(reports["zh"].splitlines()) == len(reports["en"].splitlines())
    assert set(WORDS["en"]) == set(WORDS["zh"])
    # every reason that the code can give has a translation
    sources = "".join(path.read_text("utf-8") for path in (ROOT / STEP, *(ROOT / "configs/preparation").glob("*.py")))
    given = set(re.findall(r'(?:raise BadRow|yield place, BadRow)\(f?"([^"{]+)"\)', sources))
    given |= set(re.findall(r'changed\["([^"]+)"\]', sources))
    assert len(given) > 15 and given <= set(table()["phrases"])


# --- test questions that step 4 refuses


def sums(count: int) -> list[dict]:
    """Questions that differ in their figures alone."""
    return [
        {"instruction": f"What is {n} % of {7 * n + 3} dollars?", "output": f"{n} times {n}."} for n in range(count)
    ]


REFUSES = "warning: {} test rows ask one question only (figures aside), so step 4 will refuse to compare models: "
MIXED = sums(200) + [{"instruction": "Who are you?", "output": f"Nobody, {n} times."} for n in range(3)]


@pytest.mark.parametrize(
    "rows, words, said",
    [
        (sums(60), [], REFUSES.format(6) + "add rows with other questions"),
        (sums(200), ["--dry_run"], REFUSES.format(20) + "add rows with other questions"),
        (MIXED, ["--seed", "2"], REFUSES.format(21) + "hold out more rows, e.g. --eval_fraction 0.3"),
        (sums(150) + finance_rows(6), [], "questions (figures aside), which can hardly show a difference"),
        (finance_rows(60), [], None),
    ],
)
def test_what_step_4_would_refuse_is_said_by_step_1(tiny, tmp_path, rows, words, said):
    """And step 4 does refuse these data, and no others."""
    output = ok(prepare(write_rows(tmp_path / "rows.jsonl", rows), tiny, *words))
    assert said in output if said else "figures aside" not in output, output
    if "--dry_run" not in words:
        settings = SimpleNamespace(DATA_DIR=str(tmp_path / "data"), MAX_EVAL_SAMPLES=None)
        refusal = pytest.raises(SystemExit) if "refuse" in (said or "") else contextlib.nullcontext()
        with refusal:
            load_held_out(settings, read_manifest(settings.DATA_DIR))
