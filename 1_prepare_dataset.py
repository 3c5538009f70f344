"""Turns an instruction data set into chat messages, leaves out rows that cannot be learned from, and splits the rest
so that nothing of the evaluation is in the training.

Reads:  a data set of the Hugging Face Hub, or a local .json, .jsonl, .csv or .parquet file or a folder of them Writes:
        data/train, data/eval (with its validation and test parts), data/test_prompts.json, data/manifest.json,
        data/dataset_report.md with length_histogram.png

    python 1_prepare_dataset.py
    python 1_prepare_dataset.py --dataset_name my_rows.jsonl --column_map instruction=task,output=result

Takes about a minute for the 69,000 rows of the default data set, plus its download.
"""

import collections
import contextlib
import csv
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from configs import files
from configs.settings import fail, override, read_constants

# --- data set
DATASET_NAME = "gbharti/finance-alpaca"  # Hub name, or a local file or folder
DATASET_CONFIG: str | None = None  # configuration (subset) of a Hub data set that has several
DATASET_SPLIT = "train"  # split of a Hub data set
DATASET_REVISION: str | None = None  # branch, tag or commit on the Hub; none is the default branch
# Only needed where the columns are not recognised by themselves.
COLUMN_MAP: dict[str, str] = {}  # e.g. instruction=task,input=context,output=result

# --- model
MODEL_NAME = "microsoft/phi-2"  # its tokenizer measures the rows; the same as in the training scripts
MODEL_REVISION: str | None = None  # branch, tag or commit of the model on the Hub; none is its default branch
PROMPT_FORMAT = "auto"  # auto (the model's own chat template, else chatml), chatml, alpaca or llama

# --- rows
MAX_LENGTH = 1024  # tokens of prompt and answer together; longer rows are left out
MAX_DROP_FRACTION = 0.2  # stop when a larger share of the rows has to be left out

# --- split
EVAL_FRACTION = 0.1  # share of the rows held out: half to validate while training, half to test
NUM_TEST_PROMPTS = 100  # prompts of the test part that the models answer in 4_evaluate_compare.py
SEED = 42  # decides which rows are held out
# Near-equal prompts on both sides would let a model recall what it is tested on. Prompts with other figures are other
# questions: 5 % of 300 and 7 % of 450.
NEAR_DUPLICATE_THRESHOLD: float | None = 0.8  # prompts so alike (Jaccard) stay together; none: only equal ones

# --- output
DATA_DIR = "data"  # folder for the result

if __name__ == "__main__":
    override(globals())
    files.go_online(DATASET_NAME, MODEL_NAME)  # first, because the libraries read its answer when they load

import datasets
import jinja2
import numpy as np
import pyarrow
import pyarrow.parquet
import yaml
from datasketch import MinHash
from scipy.sparse import coo_array, csgraph
from tqdm.auto import tqdm

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


def format_to_chatml(example: dict) -> dict | list | str:
    """The conversation of one row. Replace the body to build prompts your own way.

    example: the row with all its columns; those of the recognised schema are also there as `instruction`, `input` and
    `output` (or `messages`). Return one of:
    - {"messages": [...]} or the list itself: {role, content} messages, of which the last is the assistant's answer
    - {"prompt": ..., "completion": ...}: each a string or a list of messages
    - one string that ends with the row's `output`, e.g. f"### Instruction:\\n{q}\\n\\n### Response:\\n{a}"; it is
      split
      in front of the answer, so that the loss stays on the answer
    """
    if "messages" in example:
        return {"messages": example["messages"]}
    question = example["instruction"]
    if example.get("input"):
        question += "\n\n" + example["input"]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": example["output"]}]
    if example.get("system"):
        messages.insert(0, {"role": "system", "content": example["system"]})
    return {"messages": messages}


# --- reading


class BadRow(Exception):
    """A row that cannot be learned from; its text is the reason, as counted in the manifest."""


class BadFunction(Exception):
    """What format_to_chatml returned is of no use; its text says why."""


KINDS = (".json", ".jsonl", ".csv", ".parquet")
# what a folder downloaded from the Hub or from ModelScope holds beside its rows
NO_ROWS = ("config.json", "configuration.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")


def read_rows(name: str, config: str | None, split: str, revision: str | None) -> Iterator[tuple[str, object]]:
    """(place, row) of every row, one after the other; a BadRow stands for a row that cannot even be read.

    The place is for people: `rows.jsonl line 7`. A row is a dict for whatever has columns; the numbers of a column of
    labels (datasets.ClassLabel) are replaced by their names.
    """
    path = files.local_path(name)
    if path is None and files.looks_like_path(name):
        fail(f"DATASET_NAME {name!r}: there is no such file or folder; give one, or the name of a Hub data set")
    if path is None or (path.is_dir() and has_configurations(path)):
        loaded = load_from_hub(name if path is None else str(path), config, split, revision)
        batches = loaded.with_format("arrow").iter(1000)
        return ((f"row {n}", row) for n, row in enumerate(named(batches, loaded.features), 1))
    paths = [path] if path.is_file() else files_of_split(path, split)
    if not paths or paths[0].suffix.lower() not in KINDS:
        fail(
            f"DATASET_NAME {name!r} is not a data set; known files are {', '.join(KINDS)}, or a folder that holds some"
        )
    return itertools.chain.from_iterable(read_file(file) for file in paths)


def has_configurations(folder: Path) -> bool:
    """True for a downloaded repository whose README.md declares its configurations, as the Hub reads them."""
    readme = folder / "README.md"
    return readme.is_file() and re.search(r"^configs:", readme.read_text("utf-8", "replace"), re.M) is not None


def files_of_split(folder: Path, split: str) -> list[Path]:
    """The data files of a folder that belong to a split, by their names, as the Hub tells them apart.

    A folder whose names speak of no split is all one.
    """
    try:
        patterns = datasets.data_files.get_data_patterns(str(folder))
    except FileNotFoundError:
        return []

    def data_files(of: str) -> set[Path]:
        found = datasets.data_files.DataFilesList.from_patterns(patterns[of], base_path=str(folder))
        paths = {Path(file).resolve() for file in found}
        return {path for path in paths if path.suffix.lower() in KINDS and path.name not in NO_ROWS}

    every = {path.resolve() for path in folder.rglob("*") if path.suffix.lower() in KINDS}
    every = {path for path in every if path.name not in NO_ROWS}
    if split not in patterns and list(patterns) != ["train"]:
        fail(
            f"DATASET_SPLIT {split!r} is not in {folder}; its files are named for: {', '.join(map(str, patterns))}; "
            f"choose one, e.g. --dataset_split {next(iter(patterns))}, or put the files that you mean into a folder "
            f"of their own (there: {', '.join(sorted(path.name for path in every))})"
        )
    kept = data_files(split if split in patterns else next(iter(patterns)))
    left = sorted(str(path.relative_to(folder.resolve())) for path in every - kept)
    if left:
        files.say(f"note: not read, because their names are not of the split {split!r}: {', '.join(left)}")
    return sorted(kept)


def load_from_hub(name: str, config: str | None, split: str, revision: str | None) -> datasets.Dataset:
    """A data set by its name on the Hub, or a downloaded copy of one. Ends with exit code 2 where it cannot be had."""
    about = f"(DATASET_SPLIT {split!r}, DATASET_CONFIG {config!r})"
    with files.hub_errors("data set", name, "DATASET_NAME", revision):
        try:
            return datasets.load_dataset(name, config, split=split, revision=revision)
        except (FileNotFoundError, yaml.YAMLError) as error:
            if files.local_path(name) is None:
                raise
            cause = " ".join(str(error).split())[:300]
            fail(f"{name}/README.md: its configurations cannot be read ({cause}); mend them, or remove the file")
        except datasets.exceptions.DatasetGenerationError as error:
            cause = " ".join(str(error.__cause__ or error).split())[:300]
            fail(
                f"data set {name!r} cannot be read by the library ({cause}); download its files and give their folder "
                "as DATASET_NAME: rows that do not fit are then left out one by one"
            )
        except (ValueError, RuntimeError) as error:
            # the second text is what the library says when it has read this data set's other branch before
            if not re.search("scripts are no longer supported|Couldn't find cache", str(error)):
                # unknown split or configuration: the library lists what exists
                if type(error) is ValueError and not isinstance(error.__cause__, OSError):
                    fail(f"data set {name!r}: {' '.join(str(error).split())} {about}")
                raise
        # The repository is a program that makes the rows. The Hub has run it and keeps the result, a folder a
        # configuration, on a branch of its own.
        branch = "refs/convert/parquet"
        tree = datasets.data_files.HfFileSystem().ls(f"datasets/{name}@{branch}", detail=True)
        known = sorted(Path(entry["name"]).name for entry in tree if entry["type"] == "directory")
        if config is None and len(known) == 1:
            config = known[0]
        if config not in known:
            fail(
                f"data set {name!r} has the configurations {', '.join(known)}; DATASET_CONFIG is {config!r}: choose "
                f"one, e.g. --dataset_config {known[-1] if known else 'default'}"
            )
        files.say(f"note: {name} is a loading script, which is not run; reading its {branch} instead")
        return datasets.load_dataset(name, data_dir=config, split=split, revision=branch)


class Label(str):
    """The name of a label, and those of all labels of its column."""

    names: list[str] = []


def named(batches: Iterable[pyarrow.Table], features: datasets.Features) -> Iterator[dict]:
    """The rows of Arrow tables, with a Label in place of the number of each datasets.ClassLabel."""
    labels = {}
    for key, kind in features.items():
        if isinstance(kind, datasets.ClassLabel):
            labels[key] = [Label(name) for name in kind.names]
            for label in labels[key]:
                label.names = kind.names
    for batch in batches:
        for row in batch.to_pylist():
            for key, names in labels.items():
                row[key] = names[row[key]] if row[key] is not None and 0 <= row[key] < len(names) else None
            yield row


def read_file(path: Path) -> Iterator[tuple[str, object]]:
    """(place, row) of one file; ends with exit code 2, naming file and line, where it cannot be read on."""
    kind = path.suffix.lower()
    reader = {".parquet": read_parquet, ".csv": read_csv}.get(kind, read_json)
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        # the error's own place counts from the last block read, or from behind the byte order mark
        with open(path, "rb") as file:
            code = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "latin1"
            file.seek(0)
            lines = enumerate(file, 1)
            number = next(n for n, line in lines if line.decode(errors="replace").encode() != line)
        fail(f"{path}, line {number}: not UTF-8 ({error.reason}); convert it, e.g. iconv -f {code} -t utf-8 {path}")
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        fail(f"{path} cannot be read as {kind[1:]}: {str(error).splitlines()[0]}")


def no_twins(names: list[str]) -> None:
    """Raise ValueError for two columns of one name: one of them would silently hide the other."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two columns are named {twice!r}; rename one (columns: {', '.join(names)})")


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    no_twins([key for key, _ in pairs])
    return dict(pairs)


def read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    with pyarrow.parquet.ParquetFile(path) as file:
        no_twins(file.schema_arrow.names)
        batches = file.iter_batches(batch_size=1000)
        try:
            features = datasets.Features.from_arrow_schema(file.schema_arrow)
        except ValueError:  # a type that `datasets` does not know, in a column that need not matter
            features = datasets.Features()
        rows = named(batches, features)
        yield from ((f"{path.name} row {n}", row) for n, row in enumerate(rows, 1))


def read_csv(path: Path) -> Iterator[tuple[str, object]]:
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)  # or a quote that is never closed would swallow the rows behind it
        try:
            reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            no_twins(reader.fieldnames)
            yield from ((f"{path.name} line {reader.line_num}", row) for row in reader)
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}; is a quote not closed, or not doubled?") from error


# strict would refuse a line break inside a string, which people do write
DECODER = json.JSONDecoder(strict=False)
UNIQUE = json.JSONDecoder(strict=False, object_pairs_hook=unique_keys)


def read_json(path: Path) -> Iterator[tuple[str, object]]:
    """A list of rows, an object around one such list, or JSON Lines: one row a line, whatever the file is called.

    A line that is no JSON is a BadRow. Only JSON Lines are read piece by piece; a list is read whole.
    """
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        first = next((line for line in file if line.strip()), "")
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            UNIQUE.decode(first)  # the other lines are like the first
        lines = first.lstrip()[:1] != "[" and (path.suffix.lower() == ".jsonl" or looks_like_lines(first, file))
        if not lines:
            file.seek(0)
            try:
                content = UNIQUE.decode(file.read())
            except json.JSONDecodeError:
                if path.suffix.lower() == ".json":
                    raise
                content = None  # .jsonl whose first line is broken
            if path.suffix.lower() == ".json" and not isinstance(content, list):
                # an object: the rows are its one list, e.g. {"data": [...]}
                values = content.values() if isinstance(content, dict) else ()
                found = [value for value in values if isinstance(value, list)]
                if len(found) != 1:
                    raise ValueError(
                        "the file holds one value; a list of rows, or an object with one such list, is needed"
                    )
                content = found[0]
            if isinstance(content, list):
                yield from ((f"{path.name} row {n}", row) for n, row in enumerate(content, 1))
                return
        file.seek(0)
        broken = 0
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path.name} line {number}"
            try:
                yield place, DECODER.decode(line)
            except (ValueError, RecursionError):
                broken += 1
                if broken <= 3:
                    files.say(f"note: {path}, line {number} is not JSON and is left out: {line[:60]!r}")
                yield place, BadRow("not JSON")


TURNS = ("messages", "conversations", "prompt", "completion")  # columns that are lists of objects themselves


def looks_like_lines(first: str, rest: Iterable[str]) -> bool:
    """True for JSON Lines: the first line is a whole row. rest: the lines behind it."""
    try:
        row = DECODER.decode(first)
    except (ValueError, RecursionError):
        return False
    # an object around the rows may stand on one line, too: {"data": [{...}, {...}]}
    lists = [v for k, v in row.items() if k not in TURNS] if isinstance(row, dict) else []
    around = any(isinstance(v, list) and v and all(isinstance(row, dict) for row in v) for v in lists)
    return isinstance(row, dict) and not (around and not any(line.strip() for line in rest))


# --- schema


# What a set of columns is called, and our names for those that it needs; the first that fits is taken.
SCHEMAS = [
    ("messages", {"messages": "messages"}),
    ("conversations", {"messages": "conversations"}),
    ("alpaca", {"instruction": "instruction", "output": "output"}),
    ("alpaca", {"instruction": "instruction", "output": "response"}),
    ("system/user/assistant", {"instruction": "user", "output": "assistant"}),
    ("question/answer", {"instruction": "question", "output": "answer"}),
    ("question/answer", {"instruction": "query", "output": "answer"}),
    ("prompt/completion", {"instruction": "prompt", "output": "completion"}),
    ("prompt/completion", {"instruction": "prompt", "output": "response"}),
    ("tasks", {"instruction": "input", "options": "options", "gold_index": "gold_index"}),
    ("tasks", {"instruction": "input", "output": "label"}),
    ("classification", {"input": "sentence", "output": "label"}),
    ("classification", {"input": "text", "output": "label"}),
]
# columns that are taken too where they are there and nothing else is: what a question is about, and the system message
OPTIONAL = (("input", "input"), ("input", "context"), ("context", "context"), ("system", "system"))


def find_schema(columns: list[str], column_map: dict) -> tuple[str, dict[str, str]]:
    """Name of the schema and {our column: the data set's}. Ends with exit code 2 when the columns fit
    none."""
    known = "; ".join(f"{name}: {' + '.join(needed.values())}" for name, needed in SCHEMAS)
    if column_map:
        unknown = [f"{key}={value}" for key, value in column_map.items() if value not in columns]
        wrong = [key for key in column_map if key not in ("instruction", "input", "output", "system", "messages")]
        if unknown:
            fail(f"COLUMN_MAP names a column that is not there ({unknown[0]}); the columns are: {', '.join(columns)}")
        if wrong or not ({"instruction", "output"} <= set(column_map) or "messages" in column_map):
            fail(
                f"COLUMN_MAP {column_map} must map instruction and output (and input, system where there are any), or "
                f"messages; the columns are: {', '.join(columns)}"
            )
        return "COLUMN_MAP", column_map
    for name, needed in SCHEMAS:
        if all(column in columns for column in needed.values()):
            schema = dict(needed)
            for ours, column in OPTIONAL if "messages" not in needed else OPTIONAL[-1:]:
                if ours not in schema and column in columns and column not in schema.values():
                    schema[ours] = column
            return name, schema
    if len(columns) == 1 and ";" in columns[0]:
        fail(f"the file has one column, {columns[0]!r}: its separator seems to be a semicolon; save it with commas")
    first, last = (columns + ["?", "?"])[0], (columns or ["?"])[-1]
    fail(
        f"the columns of the data set are not recognised: {', '.join(columns) or 'none'} (known: {known}); name them, "
        f"e.g.: --column_map instruction={first},output={last}"
    )


# --- one row


def normalise(row: object, schema: dict[str, str]) -> dict:
    """The row with the schema's columns under our names. Raises BadRow where an answer or a question is no text."""
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow("not an object with columns")
    if None in row:  # csv's place for what no column is left for
        raise BadRow("more cells than columns (an unquoted comma?)")
    # a column that is called `input` but was not recognised as ours must not slip into the question
    example = {**row, "input": "", "system": "", **{ours: row.get(column) for ours, column in schema.items()}}
    if "options" in schema:
        choices, index = example["options"], example["gold_index"]
        if not isinstance(choices, list) or not isinstance(index, int) or not 0 <= index < len(choices):
            raise BadRow("gold_index names none of the options")
        example["output"] = choices[index]
    if "instruction" not in schema and "messages" not in schema:  # a classification: the label is the answer
        names = getattr(example["output"], "names", [])
        if isinstance(example["output"], int) or (not names and str(example["output"]).strip().isdigit()):
            raise BadRow("label is a number without a name")
        among = f" as {', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else ""
        example["instruction"] = f"Classify the {schema['input']}{among}." if example["input"] else None
    turns = None
    if "messages" in schema:
        turns = example["messages"]
    elif isinstance(example["instruction"], list) and isinstance(example["output"], list):  # TRL's conversations
        turns = example["instruction"] + example["output"]
    if turns is not None or "messages" in schema:
        messages = normalise_messages(turns)
        example["removed"] = len(turns) - len(messages)
        if not isinstance(example["system"], str | None):
            raise BadRow("system is not a string")
        if (example["system"] or "").strip() and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": example["system"]})
        return {**example, "messages": messages}
    if "context" in schema and isinstance(example["context"], str | None):  # beside an input: both are needed
        example["input"] = "\n\n".join(text for text in (example["input"], example["context"]) if text)
    for column, missing, empty, kind in (
        ("output", "missing answer", "empty answer", "answer is not a string"),
        ("instruction", "missing prompt", "empty prompt", "prompt is not a string"),
    ):
        if example[column] is None:
            raise BadRow(missing)
        if not isinstance(example[column], str):
            raise BadRow(kind)
        if not example[column].strip():
            raise BadRow(empty)
    for column in ("input", "system"):
        if not isinstance(example.get(column), str | None):
            raise BadRow(f"{column} is not a string")
    return example


def normalise_messages(messages: object) -> list[dict]:
    """OpenAI's {role, content} or ShareGPT's {from, value}, content a string or text parts, as {role, content:
    str}."""
    if not isinstance(messages, list) or not messages:
        raise BadRow("missing messages")
    result = []
    for message in messages:
        if not isinstance(message, dict):
            raise BadRow("message is not an object")
        role = ROLES.get(str(message.get("role") or message.get("from")).lower())
        content = message.get("content")
        content = message.get("value") if content is None else content
        if isinstance(content, list):
            parts = [
                part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
            ]
            content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
        if role is None or message.get("tool_calls"):
            raise BadRow("role or tool call that cannot be used")
        if not isinstance(content, str):
            raise BadRow("message is not text")
        result.append({"role": role, "content": content})
    while result and result[-1]["role"] != "assistant":  # what follows the last answer has nothing to teach
        result.pop()
    if not result:
        raise BadRow("missing answer")
    return result


def to_conversation(example: dict, formatted: object) -> tuple[list[dict], list[dict]]:
    """(prompt, completion) as messages from whatever format_to_chatml returned. Raises BadRow for an unusable row.

    Raises BadFunction for a string that does not end with the answer: that is a mistake in the function.
    """
    if isinstance(formatted, str):
        return split_text(formatted, example.get("output"))
    if isinstance(formatted, dict) and "messages" in formatted:
        formatted = formatted["messages"]
    if isinstance(formatted, dict) and {"prompt", "completion"} <= set(formatted):
        prompt, completion = formatted["prompt"], formatted["completion"]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        formatted = normalise_messages(list(prompt) + list(completion))
    if not isinstance(formatted, list):
        raise BadFunction(
            f"format_to_chatml returned {type(formatted).__name__}; it must return messages, prompt and completion, "
            "or one string that ends with the answer"
        )
    messages = normalise_messages(formatted)
    if len(messages) < 2 or messages[-2]["role"] != "user":
        raise BadRow("no question in front of an answer")
    return messages[:-1], messages[-1:]


ENDS = r"<\|im_end\|>|<\|endoftext\|>|</s>|<\|eot_id\|>"
# What a string is taken apart by; a row that holds it itself could pose as another turn.
STRING_MARKS = ("<|im_start|>", "<|im_end|>", "### Instruction:", "### Input:", "### Response:")
STRING_MARKS += ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


def split_text(text: str, answer: object) -> tuple[list[dict], list[dict]]:
    """Split one rendered string in front of its answer; the turns of the common templates become messages again."""
    answer = answer.strip() if isinstance(answer, str) else ""  # functions like to strip, too
    at = text.rfind(answer) if answer else -1
    # "s" is also in "</s>": the answer is the last one that has nothing but end tokens behind it
    while at >= 0 and re.sub(ENDS, "", text[at + len(answer) :]).strip():
        at = text.rfind(answer, 0, at + len(answer) - 1)
    if at < 0:
        raise BadFunction(
            f"format_to_chatml returned a string that does not end with the row's answer {str(answer)[:60]!r}, so the "
            "loss could not be kept on the answer; end it with the `output` column, or return messages"
        )
    before, turns = text[:at], []
    if "<|im_start|>" in before:
        turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>\n?|\Z)", before, re.DOTALL)
    elif "### Instruction:" in before:
        body = re.split(r"### (?:Instruction|Input|Response):\n?", before)
        preamble, *parts = [part.strip() for part in body]
        turns = ([("system", preamble)] if preamble else []) + [("user", "\n\n".join(p for p in parts if p))]
    elif "[INST]" in before:
        inner = re.sub(r"^<s>|\[/?INST\]", "", before.strip())
        system, _, user = inner.rpartition("<</SYS>>")
        turns = [("system", system.replace("<<SYS>>", "").strip())] if system.strip() else []
        turns.append(("user", user.strip()))
    else:
        turns = [("user", before.strip())]
    prompt = [{"role": role, "content": content} for role, content in turns if role != "assistant" or content]
    return prompt, [{"role": "assistant", "content": answer}]


def check(prompt: list[dict], completion: list[dict], marks: list[str]) -> None:
    """Raise BadRow when a conversation has an empty side, repeats itself, or holds text that could pose as a turn."""
    answer, text = completion[0]["content"], "\n".join(m["content"] for m in prompt)
    if not answer.strip():
        raise BadRow("empty answer")
    if not text.strip() or not prompt[-1]["content"].strip():
        raise BadRow("empty prompt")
    if prompt[-1]["content"].strip() == answer.strip():
        raise BadRow("prompt equal to answer")
    for content in (text, answer):
        if "\0" in content:
            raise BadRow("NUL character")
        if any(mark in content for mark in marks):
            raise BadRow("template marker or special token in the text")
        try:
            content.encode()
        except UnicodeEncodeError:  # JSON may hold half of a pair, "\\ud83d"; no file can
            raise BadRow("half a surrogate pair") from None


# --- all rows

MESSAGE = {"role": datasets.Value("string"), "content": datasets.Value("string")}
COLUMNS = {"id": datasets.Value("string"), "prompt": [MESSAGE], "completion": [MESSAGE]}


@dataclass
class Tally:
    """What became of the rows: how many were read, which were left out and why, what was changed in the others."""

    read: int = 0
    dropped: collections.Counter = field(default_factory=collections.Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: collections.defaultdict(list))
    changed: collections.Counter = field(default_factory=collections.Counter)
    long: list[int] = field(default_factory=list)  # tokens of each row over MAX_LENGTH; 0 where not counted

    def drop(self, reason: str, place: str) -> None:
        """Count a row that is left out; the places of the first three stand in the report."""
        self.dropped[reason] += 1
        if self.dropped[reason] <= 3:
            self.examples[reason].append(place)


class Ruler:
    """Tells which rows are longer than max_length tokens, without tokenising those that cannot be.

    A token is at least one byte, so a row of fewer bytes, its template's included, is short enough. What the template
    adds depends on the roles alone. A tokenizer's longest token says from how many characters on a row is too long
    whatever it holds: 50 MB would take minutes.
    """

    def __init__(self, tokenizer, max_length: int):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.longest = max(map(len, tokenizer.get_vocab()), default=1)
        self.added: dict[tuple, int] = {}

    def too_long(self, prompt: list[dict], completion: list[dict]) -> int | None:
        """None where the row fits, else its tokens, or 0 where it is too long to count them.

        Raises: BadRow where the chat template has no form for such a conversation (Gemma's: no system turn).
        """
        roles = tuple(message["role"] for message in prompt)
        try:
            if roles not in self.added:
                bare = [{"role": role, "content": "x"} for role in roles], [{**completion[0], "content": "x"}]
                text = "".join(files.render(self.tokenizer, *bare))
                self.added[roles] = len(text.encode()) - len(roles) - 1
            texts = [message["content"] for message in (*prompt, *completion)]
            if self.added[roles] + sum(len(text.encode()) for text in texts) <= self.max_length:
                return None
            if sum(map(len, texts)) > max(self.max_length, 2048) * self.longest:
                return 0
            tokens = sum(map(len, files.encode(self.tokenizer, prompt, completion)))
        except (ValueError, jinja2.TemplateError) as error:
            raise BadRow("conversation that the chat template cannot render") from error
        return tokens if tokens > self.max_length else None


def convert(
    rows: Iterable[tuple[str, object]], schema: dict[str, str], tokenizer, max_length: int, tally: Tally
) -> Iterator[dict]:
    """The rows that can be learned from as {id, prompt, completion}; the others are counted in `tally`.

    rows: (place, row). An id is a hash of the conversation: the same on any machine, whatever the order.
    """
    seen: set[str] = set()
    marks, ruler = files.markers(tokenizer), Ruler(tokenizer, max_length)
    bar = tqdm(rows, desc="checking", unit=" rows")
    for place, row in bar:
        tally.read += 1
        try:
            example = normalise(row, schema)
            try:
                formatted = format_to_chatml(example)
            except Exception as error:
                at = error.__traceback__.tb_next
                raise BadFunction(
                    f"format_to_chatml raised {type(error).__name__}: "
                    f"{error}{f' (line {at.tb_lineno})' if at else ''}; the row has: {', '.join(map(str, example))}"
                ) from error
            if isinstance(formatted, str):
                texts = [example[name] for name in schema if isinstance(example[name], str)]
                if any(mark in text for mark in STRING_MARKS for text in texts):
                    raise BadRow("template marker or special token in the text")
            prompt, completion = to_conversation(example, formatted)
            check(prompt, completion, marks)
            identity = files.content_hash(prompt + completion)
            if identity in seen:
                raise BadRow("exact duplicate")
            tokens = ruler.too_long(prompt, completion)
            if tokens is not None:
                tally.long.append(tokens)
                raise BadRow(f"longer than {max_length} tokens")
        except BadFunction as mistake:
            bar.close()  # or the sentence would stand behind the bar, on its line
            fail(mistake)
        except BadRow as reason:
            tally.drop(str(reason), place)
            continue
        if isinstance(formatted, str) and completion[0]["content"] != example["output"]:
            tally.changed["white space around the answer removed"] += 1
        if example.get("removed"):
            tally.changed["turns behind the last answer removed"] += 1
        seen.add(identity)
        yield {"id": identity, "prompt": prompt, "completion": completion}


def write_arrow(rows: Iterable[dict], path: Path) -> tuple[datasets.Dataset, np.ndarray, np.ndarray]:
    """(rows, ids, questions): the rows in an Arrow file, written piece by piece, so that memory does not grow.

    ids: shape (rows,), bytes. questions: shape (rows,), uint64; two are equal where the prompts are, but for case and
    spacing.
    """
    rows, schema = iter(rows), datasets.Features(COLUMNS).arrow_schema
    ids, questions = [], []
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        while chunk := list(itertools.islice(rows, 1000)):
            ids += [row["id"] for row in chunk]
            questions += [digest(" ".join(asked(row["prompt"]).split())) for row in chunk]
            writer.write_batch(pyarrow.RecordBatch.from_pylist(chunk, schema))
    return datasets.Dataset.from_file(str(path)), np.array(ids, "S16"), np.array(questions, np.uint64)


def asked(prompt: list[dict]) -> str:
    """What a prompt asks, in lower case and one spelling: 1,000.50 is 1000.5, NFD is NFC, letters are narrow.

    Left out is what would make all rows alike: the system message, and the instruction that step 1 adds.
    """
    text = " ".join(message["content"] for message in prompt if message["role"] != "system")
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)
    text = re.sub(r"^classify the (?:sentence|text)[^\n]*\.\n\n", "", text.lower())
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) if "," in text else text
    return re.sub(r"\d+\.\d+", lambda m: m[0].rstrip("0").rstrip("."), text) if "." in text else text


def digest(text: str) -> int:
    """64 bits of a hash that is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


# --- the split: no prompt, and none that nearly equals it, on two sides

# Two prompts land in one bucket when all hashes of a band agree: with 32 bands of 6, prompts of similarity 0.8 meet at
# least once with a probability of 0.9999 (computed), and prompts of 0.3 with one of 0.02.
BANDS, HASHES = 32, 6
# 192 hashes estimate a similarity to within 0.1 (three standard errors). Too much kept together costs nothing.
SLACK = 0.1
# what is kept of a prompt: the keys of its buckets, and the low bytes of its MinHash
SIGNED = np.dtype([("bands", "u8", BANDS), ("prints", "u1", BANDS * HASHES)])


def signer() -> Callable[[dict], dict]:
    """The function that reads a batch of rows into SIGNED records, as bytes."""
    sketch = MinHash(num_perm=BANDS * HASHES, seed=1, hashfunc=int)
    powers = np.array([31**n for n in range(5)], np.uint32)
    mix = np.random.default_rng(1).integers(1, 2**63, HASHES + 1, np.uint64) * np.uint64(2) + np.uint64(1)

    def sign(batch: dict) -> dict:
        signed = np.empty(len(batch["prompt"]), SIGNED)
        for row, prompt in enumerate(batch["prompt"]):
            text = asked(prompt)
            figures = np.array([digest(" ".join(sorted(re.findall(r"\d+(?:\.\d+)?", text))))], np.uint64)
            words = re.sub(r"\W+", " ", text).strip()
            if 2 * len(words) < len(text):  # emoji, formulas: hardly anything is left of them
                words = text
            letters = np.frombuffer(words.ljust(5).encode("utf-32-le"), np.uint32)
            pieces = sum(letters[n : len(letters) - 4 + n] * power for n, power in enumerate(powers))
            sketch.clear()
            sketch.update_batch(pieces.tolist())
            hashes = sketch.hashvalues.reshape(BANDS, HASHES).astype(np.uint64)
            signed["bands"][row] = hashes @ mix[:HASHES] + figures * mix[HASHES]
            signed["prints"][row] = sketch.hashvalues.astype(np.uint8)
        return {"signed": [record.tobytes() for record in signed]}

    return sign


def find_groups(rows: datasets.Dataset, ids: np.ndarray, questions: np.ndarray, threshold: float | None) -> np.ndarray:
    """The group of each row, shape (rows,), int: rows whose prompts are equal or nearly equal are one group.

    Nearly equal: the same figures, and a Jaccard similarity of their 5-character pieces, in lower case and without
    punctuation, of at least `threshold` as MinHash estimates it (Broder 1997; datasketch), found by locality-sensitive
    hashing (Leskovec, Rajaraman and Ullman 2014, chapter 3); groups are the connected components, numbered by their
    smallest id. datasketch's own index keeps a Python object a bucket; sorting each band does the same in 448 bytes a
    row.
    """
    order = np.argsort(ids)  # the order of the file must not matter
    pairs = []

    def link(keys: np.ndarray, reach: int, alike: float) -> None:
        """Pair the rows of one key, each with the next ones up to `reach`, where they are alike enough."""
        by_key = np.argsort(keys, kind="stable")
        for step in range(1, min(reach, len(keys) - 1) + 1):
            left, right = by_key[:-step], by_key[step:]
            found = np.flatnonzero(keys[left] == keys[right])
            if not len(found):
                return
            for some in np.array_split(found, len(found) // 100_000 + 1):  # in portions, for memory
                a, b = left[some], right[some]
                if alike:
                    near = (signed["prints"][a] == signed["prints"][b]).mean(axis=1) >= alike
                    a, b = a[near], b[near]
                pairs.append((a, b))

    link(questions[order], 1, 0)
    if threshold is not None:
        workers = min(os.cpu_count() or 1, 8) if len(rows) > 20_000 else None
        records = rows.map(
            signer(),
            batched=True,
            num_proc=workers,
            remove_columns=rows.column_names,
            new_fingerprint="signed",
            desc="comparing prompts",
        )
        signed = np.frombuffer(b"".join(records.data["signed"].to_pylist()), SIGNED)[order]
        for band in signed["bands"].T:
            link(band, 8, threshold - SLACK)
    left, right = (np.concatenate([pair[side] for pair in pairs] or [np.array([], int)]) for side in (0, 1))
    edges = coo_array((np.ones(len(left), bool), (left, right)), shape=(len(ids), len(ids)))
    _, component = csgraph.connected_components(edges, directed=False)
    _, first, component = np.unique(component, return_index=True, return_inverse=True)
    groups = np.empty(len(ids), int)
    groups[order] = first[component]  # the place of the group's smallest id
    return groups


def split_rows(ids: np.ndarray, groups: np.ndarray, fraction: float, seed: int) -> dict[str, np.ndarray]:
    """{"train", "validation", "test"}: numbers of the rows of each part. A group is never divided.

    Groups come in an order that depends on their smallest id and the seed alone, not on their place in the file; a
    group that is larger than what is left of a held-out part goes on to the next one.
    """
    wanted = round(fraction * len(ids))
    room = {"validation": wanted // 2, "test": wanted - wanted // 2}
    numbers, sizes = np.unique(groups, return_counts=True)
    smallest = np.sort(ids)[numbers]
    turn = [hashlib.sha256(f"{seed}\n{id.decode()}".encode()).digest() for id in smallest]
    turns = sorted(range(len(numbers)), key=turn.__getitem__)
    part = np.zeros(len(numbers), np.uint8)  # 0 is train
    for group in turns:
        for number, name in enumerate(room, 1):
            if not part[group] and sizes[group] <= room[name]:
                part[group], room[name] = number, room[name] - sizes[group]
        if not any(room.values()):
            break
    place = np.empty(len(numbers), int)
    place[turns] = np.arange(len(numbers))
    of_row = np.searchsorted(numbers, groups)
    order = np.lexsort((ids, place[of_row]))
    return {name: order[part[of_row[order]] == n] for n, name in enumerate(("train", *room))}


def choose_prompts(rows: list[dict], number: int) -> list[dict]:
    """`number` test rows spread evenly over the lengths of their answers, as {id, prompt, reference}."""
    by_length = sorted(rows, key=lambda row: (len(row["completion"][0]["content"]), row["id"]))
    step = max(len(by_length) / number, 1)
    chosen = [by_length[int((i + 0.5) * step)] for i in range(min(number, len(by_length)))]
    return [{"id": r["id"], "prompt": r["prompt"], "reference": r["completion"][0]["content"]} for r in chosen]


# --- report

SAMPLE = 2000  # rows whose tokens are counted


def report(manifest: dict, rows: datasets.Dataset, ids: np.ndarray, tokenizer, long: list[int], folder: Path) -> None:
    """dataset_report.md and length_histogram.png: how long the rows are, what was left out, what the model will see.

    Lengths are those of the SAMPLE rows with the smallest ids, and of every row that was too long.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sample = rows.select(np.argsort(ids)[:SAMPLE])
    lengths = np.sort([sum(map(len, files.encode(tokenizer, r["prompt"], r["completion"]))) for r in sample])
    over = np.sort([n if n else np.inf for n in long])
    limit, whole = manifest["settings"]["MAX_LENGTH"], len(rows) + len(over)

    def fit(tokens: float) -> float:
        return ((lengths <= tokens).mean() * len(rows) + (over <= tokens).sum()) / whole

    candidates = np.concatenate([lengths, over[np.isfinite(over)]])
    keeps = next((int(n) for n in candidates if fit(n) >= 0.99), None)
    figure, axis = pyplot.subplots(figsize=(7, 3))
    axis.hist(lengths, bins=50, color="#4477aa")
    axis.axvline(limit, color="#cc6677", linestyle="--", label=f"MAX_LENGTH = {limit}")
    axis.set_xlabel("tokens of prompt and answer")
    axis.set_ylabel(f"rows of {len(lengths)}")
    axis.legend()
    figure.savefig(folder / "length_histogram.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)

    n, groups = manifest["rows"], manifest["groups"]
    lines = [f"# Data set report: {manifest['source']}", ""]
    lines += [
        f"{n['read']:,} rows read as {manifest['schema']['name']}, {n['kept']:,} kept: {n['train']:,} to train on, "
        f"{n['validation']:,} to validate and {n['test']:,} to test.",
        f"Prompts that are equal or nearly equal stay on one side: {groups['groups']:,} groups, the largest of "
        f"{groups['largest']:,} rows; {groups['same_prompt']:,} rows share their prompt with another row.",
        "",
        "## Lengths",
        "",
        "![tokens per row](length_histogram.png)",
        "",
        f"Tokens of prompt and answer in the model's template, counted on {len(lengths):,} rows; median "
        f"{int(np.median(lengths))}.",
        "",
        "| MAX_LENGTH | rows that fit |",
        "|---|---|",
        *(f"| {tokens} | {100 * fit(tokens):.1f} % |" for tokens in (512, 1024, 2048)),
        "",
        f"99 % of the rows fit at MAX_LENGTH = {keeps}." if keeps else "99 % of the rows fit at no length counted.",
        "",
        "## Left out",
        "",
    ]
    if n["dropped"]:
        lines += ["| reason | rows | examples |", "|---|---|---|"]
        examples = manifest["dropped_examples"]
        lines += [f"| {why} | {count:,} | {', '.join(examples[why])} |" for why, count in n["dropped"].items()]
    else:
        lines += ["Nothing."]
    lines += ["", "## Changed", ""]
    lines += [f"- {what}: {count:,} rows" for what, count in manifest["changed"].items()] or ["Nothing."]
    lines += ["", "## What the model will see", "", "The part between ⟦ and ⟧ is trained; the rest is only read."]
    for row in sample.select(range(min(3, len(sample)))):
        before, after = files.render(tokenizer, row["prompt"], row["completion"])
        text = f"{before[-3000:]}⟦{after[:3000]}⟧"
        fence = "~" * max(3, *(len(run) + 1 for run in re.findall("~+", text)), 3)
        lines += ["", fence, text, fence]
    files.write_text(folder / "dataset_report.md", "\n".join(lines) + "\n")


def problems(settings: dict) -> list[str]:
    """What can be seen to be wrong in the constants before anything is read."""
    found = files.check_model(MODEL_NAME, MODEL_REVISION)
    if not 0 < settings["EVAL_FRACTION"] < 1:
        found.append(f"EVAL_FRACTION is {settings['EVAL_FRACTION']}; it is a share of the rows: --eval_fraction 0.1")
    if not 0 <= settings["MAX_DROP_FRACTION"] <= 1:
        found.append(f"MAX_DROP_FRACTION is {settings['MAX_DROP_FRACTION']}; it is a share: --max_drop_fraction 0.2")
    alike = settings["NEAR_DUPLICATE_THRESHOLD"]
    if alike is not None and not 0.7 <= alike <= 1:  # what is less alike, the buckets would not find
        found.append(
            f"NEAR_DUPLICATE_THRESHOLD is {alike}; it is a similarity from 0.7 to 1, or none: "
            "--near_duplicate_threshold 0.8"
        )
    if not settings["DATASET_NAME"].strip():
        found.append("DATASET_NAME is empty; give a Hub name, a file or a folder")
    for name in ("MAX_LENGTH", "NUM_TEST_PROMPTS"):
        if settings[name] < 1:
            found.append(f"{name} is {settings[name]}; it must be at least 1")
    return found


def stop_at_too_many(tally: Tally) -> None:
    """End with exit code 2 when more than MAX_DROP_FRACTION of the rows had to be left out."""
    # a duplicate is no fault of the data that a setting could mend
    faults = tally.dropped - collections.Counter({"exact duplicate": tally.dropped["exact duplicate"]})
    if faults.total() <= MAX_DROP_FRACTION * tally.read:
        return
    reason, number = faults.most_common(1)[0]
    share = min(faults.total() / tally.read + 0.01, 1)
    accept = f", or accept it with: --max_drop_fraction {share:.2f}" if tally.read > tally.dropped.total() else ""
    fail(
        f"{faults.total()} of {tally.read} rows cannot be used, more than MAX_DROP_FRACTION={MAX_DROP_FRACTION} "
        f"allows; most: {number} x {reason} ({', '.join(tally.examples[reason])}); mend the data{accept}"
    )


def main() -> None:
    settings = {name: globals()[name] for name in read_constants(__file__)}
    if found := problems(settings):
        fail(*found)
    folder = Path(DATA_DIR)
    with files.lock(folder):
        for left in folder.glob(".new-*"):  # by a run that was killed; nobody else writes while we hold the lock
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as work:
            new = Path(work, "data")
            new.mkdir()

            # --- read and check
            tokenizer = files.load_tokenizer(MODEL_NAME, MODEL_REVISION, PROMPT_FORMAT)
            source = read_rows(DATASET_NAME, DATASET_CONFIG, DATASET_SPLIT, DATASET_REVISION)
            first = list(itertools.islice(source, 1000))
            if all(isinstance(row, BadRow) for _, row in first):
                why = "; no line is a row: is it a list, or spread over lines? call it .json" if first else ""
                fail(f"DATASET_NAME {DATASET_NAME!r} holds no rows{why}; give a data set that does")
            columns = list(dict.fromkeys(c for _, row in first if isinstance(row, dict) for c in row if c))
            columns = [str(c).encode(errors="replace").decode() for c in columns]
            schema_name, schema = find_schema(columns, COLUMN_MAP)
            files.say(f"{DATASET_NAME}: columns {', '.join(columns)}: read as {schema_name}")
            tally = Tally()
            kept = convert(itertools.chain(first, source), schema, tokenizer, MAX_LENGTH, tally)
            rows, ids, questions = write_arrow(kept, Path(work, "rows.arrow"))
            for reason, number in tally.dropped.most_common():
                files.say(f"  left out: {number} x {reason} ({', '.join(tally.examples[reason])})")
            stop_at_too_many(tally)

            # --- split
            groups = find_groups(rows, ids, questions, NEAR_DUPLICATE_THRESHOLD) if len(ids) else ids.astype(int)
            parts = split_rows(ids, groups, EVAL_FRACTION, SEED)
            sizes = {name: len(numbers) for name, numbers in parts.items()}
            largest = int(np.bincount(groups).max()) if len(groups) else 0
            if not all(sizes.values()):
                equal = max(collections.Counter(questions.tolist()).values(), default=0)
                mend, half = "add rows", max(len(ids) // 2, 2)
                if equal > half:
                    mend = f"{equal} have one prompt, which must stay on one side: add rows with other prompts"
                elif largest > half and NEAR_DUPLICATE_THRESHOLD is not None:
                    mend = (
                        f"{largest} of their prompts are nearly equal and must stay on one side: "
                        "--near_duplicate_threshold 0.95, or none"
                    )
                elif not sizes["train"] and EVAL_FRACTION > 0.5:
                    mend = "--eval_fraction 0.1"
                elif EVAL_FRACTION < 0.2 and len(ids) > 9:
                    mend += ", or --eval_fraction 0.2"
                fail(
                    f"{len(ids)} usable rows give {sizes['train']} to train on, {sizes['validation']} to validate and "
                    f"{sizes['test']} to test; each needs one: {mend}"
                )

            # --- write
            marks = ["validation"] * sizes["validation"] + ["test"] * sizes["test"]
            held_out = np.concatenate([parts["validation"], parts["test"]])
            hashes = {
                "train": files.split_hash(ids[parts["train"]].astype(str)),
                "eval": files.split_hash(ids[held_out].astype(str), marks),
            }
            # the library's name for its cache; by itself it would differ from run to run
            train = rows.select(parts["train"], new_fingerprint=hashes["train"][:16])
            # the statistics of step 4 draw near-equal prompts together
            alike = np.sort(ids)[groups[held_out]].astype(str)
            held_out = rows.select(held_out).add_column("part", marks, new_fingerprint=hashes["eval"][:16])
            held_out = held_out.add_column("group", alike, new_fingerprint=hashes["eval"][16:32])
            train.save_to_disk(new / "train")
            held_out.save_to_disk(new / "eval")
            prompts = choose_prompts(rows.select(parts["test"]).to_list(), NUM_TEST_PROMPTS)
            manifest = {
                "source": DATASET_NAME,
                "revision": DATASET_REVISION,
                "schema": {"name": schema_name, "columns": schema},
                "settings": settings,
                "seed": SEED,
                "rows": {"read": tally.read, "kept": len(ids), "dropped": dict(tally.dropped.most_common()), **sizes},
                "dropped_examples": dict(tally.examples),
                "changed": dict(tally.changed.most_common()),
                "groups": {
                    "groups": len(np.unique(groups)),
                    "largest": largest,
                    "same_prompt": int(sum(n for n in np.unique(questions, return_counts=True)[1] if n > 1)),
                },
                "sha256": hashes,
            }
            files.write_json(new / "test_prompts.json", prompts)
            report(manifest, rows, ids, tokenizer, tally.long, new)
            files.write_json(new / "manifest.json", manifest)
            files.put_all(new, folder)
    files.say(
        f"done: {sizes['train']} rows to train on in {DATA_DIR}/train, {sizes['validation']} to validate and "
        f"{sizes['test']} to test in {DATA_DIR}/eval, {len(prompts)} test prompts; look at "
        f"{DATA_DIR}/dataset_report.md"
    )
    if sizes["test"] < 100:
        files.say(
            f"note: a test part of {sizes['test']} rows shows only large differences; 100 or more would be better"
        )


if __name__ == "__main__":
    main()
