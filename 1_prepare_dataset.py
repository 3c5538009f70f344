"""Turns an instruction data set into chat messages and splits them into training, validation and test rows.

Rows that cannot be learned from are left out and counted; near-duplicates stay on one side of the split.

Reads:  a data set of the Hugging Face Hub, or a local .json, .jsonl, .csv or .parquet file, or a folder of them
Writes: data/train, data/eval (validation and test split), data/test_prompts.json, data/manifest.json,
        data/dataset_report.md with length_histogram.png

    python 1_prepare_dataset.py
    python 1_prepare_dataset.py --dataset_name my_rows.jsonl --column_map instruction=task,output=result

Takes 6 s for the demo's 1,245 rows on two CPU cores; a data set on the Hub must be downloaded first.
"""

import collections
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from configs import hub
from configs.settings import command, fail, freeze, main_process, override, say

# --- data set
DATASET_NAME: Annotated[str, "not empty"] = "gbharti/finance-alpaca"  # Hub name, or a local file or folder
DATASET_CONFIG: str | None = None  # configuration (subset) of a Hub data set that has several
DATASET_SPLIT = "train"  # split of a Hub data set
DATASET_REVISION: str | None = None  # branch, tag or commit on the Hub; none: the default branch
# Only needed where the columns are not recognised by themselves.
COLUMN_MAP: dict[str, str] = {}  # which column is which, e.g. instruction=task,input=context,output=result

# --- model
MODEL_NAME = "microsoft/phi-2"  # Hub name or local folder; its tokenizer counts tokens; same as in training
MODEL_REVISION: str | None = None  # branch, tag or commit of the model on the Hub; none: its default branch
PROMPT_FORMAT = "auto"  # auto (the model's own chat template, or chatml if it has none), chatml, alpaca or llama

# --- rows
MAX_LENGTH: Annotated[int, "x >= 1"] = 1024  # most tokens of prompt and answer together; longer rows are left out
MAX_DROP_FRACTION: Annotated[float, "0 <= x <= 1"] = 0.2  # stop when a larger share of the rows has to be left out

# --- split
EVAL_FRACTION: Annotated[float, "0 < x < 1"] = 0.1  # share of the rows held out: half for validation, half for testing
NUM_TEST_PROMPTS: Annotated[int, "x >= 1"] = 100  # prompts of the test split that step 4 lets the models answer
SEED: Annotated[int, "0 <= x < 4_000_000_000"] = 42  # decides which rows are held out
# Near-duplicates on both sides would let a model recall what it is tested on. Prompts that differ in a number (5 % of
# 300, 7 % of 450) are different questions. The search finds nothing below 0.7; none keeps only equal prompts together.
NEAR_DUPLICATE_THRESHOLD: Annotated[float | None, "0.7 <= x <= 1"] = 0.8  # keep prompts this alike (Jaccard) together

# --- output
DATA_DIR = "data"  # folder for the prepared data

if __name__ == "__main__":
    override(globals(), check=hub.model_problems)
    hub.go_online(DATASET_NAME, MODEL_NAME)  # before the imports below: the libraries read its answer

import datasets
import numpy as np
import pyarrow
from tqdm.auto import tqdm

from configs import chat, handover, state
from configs.ending import say_done
from configs.preparation.conversations import (
    STRING_MARKS,
    BadFunction,
    check_conversation,
    normalise_messages,
    to_conversation,
)
from configs.preparation.near_duplicates import digest, find_groups, question_of
from configs.preparation.reading import BadRow, read_rows
from configs.preparation.report import write_report


def format_to_chatml(example: dict) -> dict | list | str:
    """The conversation of one row. Replace the body to build prompts your own way.

    example: the row with all its columns; those of the recognised schema are also there as `instruction`, `input` and
    `output` (or `messages`). Return one of:
    - {"messages": [...]} or the list itself: {role, content} messages, of which the last is the assistant's answer
    - {"prompt": ..., "completion": ...}: each a string or a list of messages
    - one string that ends with the row's `output`, e.g. f"### Instruction:\\n{q}\\n\\n### Response:\\n{a}"; it is
      split in front of the answer, so that the loss stays on the answer
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
    """(name of the schema, {our column: the data set's}); exit code 2 where the columns fit none."""
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


def convert(
    rows: Iterable[tuple[str, object]], schema: dict[str, str], tokenizer, max_length: int, tally: Tally
) -> Iterator[dict]:
    """The rows that can be learned from as {id, prompt, completion}; the others are counted in `tally`.

    rows: (place, row). An id is a hash of the conversation: the same on any machine, whatever the order.
    """
    seen: set[str] = set()
    marks, ruler = chat.markers(tokenizer), chat.Ruler(tokenizer, max_length)
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
            check_conversation(prompt, completion, marks)
            identity = handover.content_hash(prompt + completion)
            if identity in seen:
                raise BadRow("exact duplicate")
            try:
                tokens = ruler.too_long(prompt, completion)
            except ValueError as error:
                raise BadRow("conversation that the chat template cannot render") from error
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
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        while chunk := list(itertools.islice(rows, 1000)):
            ids += [row["id"] for row in chunk]
            questions += [digest(" ".join(question_of(row["prompt"]).split())) for row in chunk]
            writer.write_batch(pyarrow.RecordBatch.from_pylist(chunk, schema))
    return datasets.Dataset.from_file(str(path)), np.array(ids, "S16"), np.array(questions, np.uint64)


# --- the split


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


# --- mistakes that only the rows show


def check_tally(tally: Tally, max_drop_fraction: float) -> None:
    """Say what was left out; exit code 2 where it is more than `max_drop_fraction` of the rows."""
    for reason, number in tally.dropped.most_common():
        say(f"  left out: {number} x {reason} ({', '.join(tally.examples[reason])})")
    # a duplicate is no fault of the data that a setting could mend
    faults = tally.dropped - collections.Counter({"exact duplicate": tally.dropped["exact duplicate"]})
    if faults.total() <= max_drop_fraction * tally.read:
        return
    reason, number = faults.most_common(1)[0]
    share = min(faults.total() / tally.read + 0.01, 1)
    accept = f", or accept it with: --max_drop_fraction {share:.2f}" if tally.read > tally.dropped.total() else ""
    fail(
        f"{faults.total()} of {tally.read} rows cannot be used, more than MAX_DROP_FRACTION={max_drop_fraction} "
        f"allows; most: {number} x {reason} ({', '.join(tally.examples[reason])}); mend the data{accept}"
    )


def check_parts(sizes: dict[str, int], groups: np.ndarray, questions: np.ndarray, settings) -> None:
    """Exit code 2 where a part got no row, with the setting or the data that would mend it. sizes: rows a part."""
    if all(sizes.values()):
        return
    total = len(groups)
    largest = int(np.bincount(groups).max(initial=0))
    equal = max(collections.Counter(questions.tolist()).values(), default=0)
    mend, half = "add rows", max(total // 2, 2)
    if equal > half:
        mend = f"{equal} have one prompt, which must stay on one side: add rows with other prompts"
    elif largest > half and settings.NEAR_DUPLICATE_THRESHOLD is not None:
        mend = (
            f"{largest} of their prompts are near-duplicates and must stay on one side: "
            "--near_duplicate_threshold 0.95, or none"
        )
    elif not sizes["train"] and settings.EVAL_FRACTION > 0.5:
        mend = "--eval_fraction 0.1"
    elif settings.EVAL_FRACTION < 0.2 and total > 9:
        mend += ", or --eval_fraction 0.2"
    fail(
        f"{total} usable rows give {sizes['train']} to train on, {sizes['validation']} to validate and "
        f"{sizes['test']} to test; each needs one: {mend}"
    )


# --- all together


def open_source(settings) -> tuple[Iterator[tuple[str, object]], str, dict[str, str]]:
    """(rows, name of the schema, {our column: the data set's}): the columns are those of the first 1,000 rows."""
    name = settings.DATASET_NAME
    rows = read_rows(name, settings.DATASET_CONFIG, settings.DATASET_SPLIT, settings.DATASET_REVISION)
    first = list(itertools.islice(rows, 1000))
    if all(isinstance(row, BadRow) for _, row in first):
        why = "; no line is a row: is it a list, or spread over lines? call it .json" if first else ""
        fail(f"DATASET_NAME {name!r} holds no rows{why}; give a data set that does")
    columns = list(dict.fromkeys(column for _, row in first if isinstance(row, dict) for column in row if column))
    columns = [str(column).encode(errors="replace").decode() for column in columns]
    schema_name, schema = find_schema(columns, settings.COLUMN_MAP)
    say(f"{name}: columns {', '.join(columns)}: read as {schema_name}")
    return itertools.chain(first, rows), schema_name, schema


def save_splits(
    rows: datasets.Dataset, ids: np.ndarray, groups: np.ndarray, parts: dict[str, np.ndarray], folder: Path
) -> dict[str, str]:
    """Write folder/train and folder/eval; {name: sha256} of both, and of eval's parts "validation" and "test"."""
    marks = ["validation"] * len(parts["validation"]) + ["test"] * len(parts["test"])
    held_out = np.concatenate([parts["validation"], parts["test"]])
    hashes = {
        "train": handover.split_hash(ids[parts["train"]].astype(str)),
        "eval": handover.split_hash(ids[held_out].astype(str), marks),
    }
    hashes |= {part: handover.split_hash(ids[parts[part]].astype(str)) for part in ("validation", "test")}
    # a fingerprint is the library's name for its cache; by itself it would differ from run to run
    train = rows.select(parts["train"], new_fingerprint=hashes["train"][:16])
    evaluation = rows.select(held_out).add_column("part", marks, new_fingerprint=hashes["eval"][:16])
    # the statistics of step 4 draw near-duplicates together
    group = np.sort(ids)[groups[held_out]].astype(str)
    evaluation = evaluation.add_column("group", group, new_fingerprint=hashes["eval"][16:32])
    train.save_to_disk(folder / "train")
    evaluation.save_to_disk(folder / "eval")
    return hashes


def main() -> None:
    settings = freeze(globals())
    if not main_process():
        return  # of several processes, the first one prepares the data
    folder = Path(settings.DATA_DIR)
    with handover.lock(folder), handover.replacing(folder) as new:
        # --- read and check
        tokenizer = chat.load_tokenizer(settings.MODEL_NAME, settings.MODEL_REVISION, settings.PROMPT_FORMAT)
        source, schema_name, schema = open_source(settings)
        tally = Tally()
        kept = convert(source, schema, tokenizer, settings.MAX_LENGTH, tally)
        rows, ids, questions = write_arrow(kept, new / ".scratch" / "rows.arrow")
        check_tally(tally, settings.MAX_DROP_FRACTION)

        # --- split
        groups = find_groups(rows, ids, questions, settings.NEAR_DUPLICATE_THRESHOLD)
        parts = split_rows(ids, groups, settings.EVAL_FRACTION, settings.SEED)
        sizes = {name: len(numbers) for name, numbers in parts.items()}
        check_parts(sizes, groups, questions, settings)

        # --- write
        hashes = save_splits(rows, ids, groups, parts, new)
        prompts = choose_prompts(rows.select(parts["test"]).to_list(), settings.NUM_TEST_PROMPTS)
        counts = {"read": tally.read, "kept": len(ids), "dropped": dict(tally.dropped.most_common()), **sizes}
        same_prompt = sum(n for n in np.unique(questions, return_counts=True)[1] if n > 1)
        manifest = {
            "source": settings.DATASET_NAME,
            "revision": settings.DATASET_REVISION,
            "source_files": state.files_hash(settings.DATASET_NAME),
            "schema": {"name": schema_name, "columns": schema},
            "settings": vars(settings),
            "seed": settings.SEED,
            "rows": counts,
            "dropped_examples": dict(tally.examples),
            "changed": dict(tally.changed.most_common()),
            "groups": {
                "groups": len(np.unique(groups)),
                "largest": int(np.bincount(groups).max()),
                "same_prompt": int(same_prompt),
            },
            "sha256": hashes,
        }
        handover.write_json(new / "test_prompts.json", prompts)
        write_report(manifest, rows, ids, tokenizer, tally.long, new)
        handover.write_json(new / "manifest.json", manifest)
    if sizes["test"] < 100:
        say(f"note: a test split of {sizes['test']} rows shows only large differences; 100 or more would be better")
    what = f"{sizes['train']} rows to train on in {folder}/train, {sizes['validation']} to validate and "
    what += f"{sizes['test']} to test in {folder}/eval, {len(prompts)} test prompts"
    say_done(what, f"{folder}/dataset_report.md", command(handover.LORA))


if __name__ == "__main__":
    main()
