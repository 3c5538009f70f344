"""Turns an instruction data set into chat messages and splits them into training, validation and test rows.

Rows that cannot be learned from are left out and counted; near-duplicates stay on one side of the split.

Reads:  a data set of the Hugging Face Hub, or a local .json, .jsonl, .csv, .tsv, .xlsx or .parquet file, or a folder
        of them
Writes: data/train, data/eval (validation and test split), data/test_prompts.json, data/manifest.json,
        data/dataset_report.md with length_histogram.png

    python 1_prepare_dataset.py
    python 1_prepare_dataset.py --dataset_name my_rows.csv --column_map instruction=task,output=result --dry_run

Takes 6 s for the demo's 1,245 rows on two CPU cores; a data set on the Hub must be downloaded first.
"""

import collections
import hashlib
import itertools
import shlex
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

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
# Of a dialogue, most answers are not the last one.
TURNS: Literal["all", "last"] = "all"  # answers of a conversation that are trained, each with what was said before it
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
LANGUAGE: Literal["auto", "en", "zh"] = "auto"  # language of the messages and dataset_report.md; auto: the terminal's
DRY_RUN = False  # show the columns, the counts and three rows, and write nothing

if __name__ == "__main__":
    override(globals(), check=hub.model_problems)
    hub.go_online(DATASET_NAME, MODEL_NAME)  # before the imports below: the libraries read its answer

import datasets
import numpy as np
from tqdm.auto import tqdm

from configs import chat, handover, state
from configs.ending import say_done
from configs.preparation.columns import by_name, likely_map
from configs.preparation.conversations import (
    STRING_MARKS,
    BadFunction,
    as_conversation,
    check_conversation,
    ends_of,
    no_form,
    pairs_of,
    text_of_parts,
    to_conversation,
)
from configs.preparation.near_duplicates import find_groups
from configs.preparation.questions import doubt_about
from configs.preparation.reading import BadRow, read_rows
from configs.preparation.report import as_seen, first_rows, write_report
from configs.preparation.writing import save_splits, write_arrow
from configs.translation import phrase
from configs.words import spoken


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
    ("question/answer", {"instruction": "query", "output": "response"}),
    ("prompt/completion", {"instruction": "prompt", "output": "completion"}),
    ("prompt/completion", {"instruction": "prompt", "output": "response"}),
    ("tasks", {"instruction": "input", "options": "options", "gold_index": "gold_index"}),
    ("tasks", {"instruction": "input", "output": "label"}),
    ("input/output", {"instruction": "input", "output": "output"}),
    ("input/output", {"instruction": "input", "output": "target"}),
    ("classification", {"input": "sentence", "output": "label"}),
    ("classification", {"input": "text", "output": "label"}),
    *(
        (f"{question}/{answer}", {"instruction": question, "output": answer})
        for question in ("指令", "问题", "输入")
        for answer in ("输出", "回答", "答案")
    ),
    ("conversations", {"messages": "conversation"}),
    ("messages", {"messages": "contents"}),
]
# columns that are taken too where they are there and nothing else is: what a question is about, the system message,
# and what was said before
OPTIONAL = [("input", "input"), ("input", "context"), ("context", "context")]
OPTIONAL += [("input", "输入"), ("input", "上下文"), ("context", "上下文"), ("history", "history")]
SYSTEM = [("system", "system"), ("system", "系统"), ("system", "systemInstruction")]


def find_schema(columns: list[str], column_map: dict, example: str = "") -> tuple[str, dict[str, str]]:
    """(name of the schema, {our column: the data set's}); exit code 2 where the columns fit none.

    example: a COLUMN_MAP that this data set may need, for the message.
    """
    actual = by_name(columns)
    listed = ", ".join(columns[:12]) + (f" and {len(columns) - 12} more" if len(columns) > 12 else "") or "none"
    if column_map:
        unknown = [f"{key}={value}" for key, value in column_map.items() if actual(value) is None]
        wrong = [key for key in column_map if key not in ("instruction", "input", "output", "system", "messages")]
        if unknown:
            fail(f"COLUMN_MAP names a column that is not there ({unknown[0]}); the columns are: {listed}")
        if wrong or not ({"instruction", "output"} <= set(column_map) or "messages" in column_map):
            fail(
                f"COLUMN_MAP {column_map} must map instruction and output (and input, system where there are any), or "
                f"messages; the columns are: {listed}"
            )
        return "COLUMN_MAP", {ours: actual(column) for ours, column in column_map.items()}
    for name, needed in SCHEMAS:
        schema = {ours: actual(column) for ours, column in needed.items()}
        if None not in schema.values():
            for ours, wanted in SYSTEM if "messages" in needed else OPTIONAL + SYSTEM:
                column = actual(wanted)
                if ours not in schema and column is not None and column not in schema.values():
                    schema[ours] = column
            return name, schema
    mend = f"name them, e.g. --column_map {shlex.quote(example)}" if example else "a question and an answer are needed"
    fail(f"the columns of the data set are not recognised: {listed}; {mend}")


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
    if isinstance(example["system"], dict | list):  # Gemini's and Bedrock's
        parts = example["system"]["parts"] if "parts" in example["system"] else example["system"]
        example["system"] = text_of_parts(parts) if isinstance(parts, list) else parts
    turns, only_read = None, 0
    if "messages" in schema:
        turns = example["messages"]
    elif isinstance(example["instruction"], list) and isinstance(example["output"], list):  # TRL's conversations
        turns, only_read = example["instruction"] + example["output"], len(example["instruction"])
    if turns is not None or "messages" in schema:
        return as_conversation(example, turns, only_read)
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
    if isinstance(example.get("history"), list) and (earlier := pairs_of(example["history"])):
        question = "\n\n".join(text for text in (example["instruction"], example["input"]) if text)
        last = [{"role": "user", "content": question}, {"role": "assistant", "content": example["output"]}]
        return as_conversation(example, earlier + last, 0)
    return example


# --- all rows


@dataclass
class Tally:
    """What became of the rows: how many were read, which were left out and why, what was changed in the others."""

    read: int = 0
    dropped: collections.Counter = field(default_factory=collections.Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: collections.defaultdict(list))
    changed: collections.Counter = field(default_factory=collections.Counter)
    long: list[int] = field(default_factory=list)  # tokens of each row over MAX_LENGTH; 0 where not counted
    conversations: collections.Counter = field(default_factory=collections.Counter)  # of several answers, their rows
    joined: list[tuple[int, int]] = field(default_factory=list)  # conversations that begin with the same turns

    def drop(self, reason: str, place: str) -> None:
        """Count a row that is left out; the places of the first three stand in the report."""
        self.dropped[reason] += 1
        if self.dropped[reason] <= 3:
            self.examples[reason].append(place)


def convert(
    rows: Iterable[tuple[str, object]],
    schema: dict[str, str],
    tokenizer,
    max_length: int,
    tally: Tally,
    turns: str = "all",
) -> Iterator[dict]:
    """The rows that can be learned from, as {id, prompt, completion, conversation}; `tally` counts the others.

    rows: (place, row). An id is a hash of the conversation: the same on any machine, whatever the order. conversation:
    the number of the row in the source that it comes from; with TURNS = "all", several may come from one.
    """
    seen: dict[str, int] = {}
    marks, ruler = chat.markers(tokenizer), chat.Ruler(tokenizer, max_length)
    bar = tqdm(rows, desc=phrase("checking"), unit=phrase(" rows"))
    for number, (place, row) in enumerate(bar):
        try:
            example = normalise(row, schema)
            messages = example.get("messages", [])
            ends = ends_of(messages, example["only_read"], turns) if messages else [None]
        except BadRow as reason:
            tally.read += 1
            tally.drop(str(reason), place)
            continue
        count_turns(example, ends, turns, tally)
        hopeless = False  # what is said later is longer still
        for nth, end in enumerate(ends, 1):
            tally.read += 1
            where = place if len(ends) == 1 else f"{place}, answer {nth}"
            try:
                if hopeless:
                    tally.long.append(0)
                    raise BadRow(f"longer than {max_length} tokens")
                one = {**example, "messages": messages[:end]} if messages else example
                prompt, completion = conversation_of(one, schema, marks, tally)
                identity = handover.content_hash(prompt + completion)
                if identity in seen:
                    if len(ends) > 1:
                        tally.joined.append((number, seen[identity]))
                    raise BadRow("exact duplicate")
                try:
                    tokens = ruler.too_long(prompt, completion)
                except ValueError as error:
                    raise BadRow(no_form(tokenizer, completion)) from error
                if tokens is not None:
                    tally.long.append(tokens)
                    hopeless = tokens == 0 or tokens > 4 * max_length
                    raise BadRow(f"longer than {max_length} tokens")
            except BadFunction as mistake:
                bar.close()  # or the sentence would stand behind the bar, on its line
                fail(mistake)
            except BadRow as reason:
                tally.drop(str(reason), where)
                continue
            seen[identity] = number
            yield {"id": identity, "prompt": prompt, "completion": completion, "conversation": number}


def count_turns(example: dict, ends: list, turns: str, tally: Tally) -> None:
    """Count what becomes of the turns of a row: how many rows, and what nobody learns from."""
    if example.get("removed"):
        tally.changed["turns behind the last answer removed"] += 1
    trained = example.get("messages", [])[example.get("only_read", 0) :]
    answers = sum(message["role"] == "assistant" for message in trained)
    if answers > 1:
        tally.conversations.update(several_answers=1, answers=answers, rows=len(ends))
        if turns == "all" and len(ends) < answers:
            tally.changed["answers only read (no question in front, or weight 0)"] += answers - len(ends)


def conversation_of(example: dict, schema: dict, marks: list[str], tally: Tally) -> tuple[list[dict], list[dict]]:
    """(prompt, completion) of one row, by format_to_chatml.

    Raises: BadRow where it cannot be learned from, BadFunction where format_to_chatml is at fault.
    """
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
    if isinstance(formatted, str) and completion[0]["content"] != example["output"]:
        tally.changed["white space around the answer removed"] += 1
    return prompt, completion


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


def check_parts(sizes: dict[str, int], groups: np.ndarray, questions: np.ndarray, several: int, settings) -> None:
    """Exit code 2 where a part got no row, with the setting or the data that would mend it. sizes: rows a part.

    several: rows that come from conversations of several answers.
    """
    if all(sizes.values()):
        return
    total = len(groups)
    largest = int(np.bincount(groups).max(initial=0))
    equal = max(collections.Counter(questions.tolist()).values(), default=0)
    mend, half = "add rows", max(total // 2, 2)
    if equal > half:
        mend = f"{equal} have one prompt, which must stay on one side: add rows with other prompts"
    elif largest > half and several > half and settings.TURNS == "all":
        mend = (
            f"{largest} hang together, as turns of one conversation or by turns that conversations share: --turns last"
        )
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
    sample = [row for _, row in first if isinstance(row, dict)]
    schema_name, schema = find_schema(columns, settings.COLUMN_MAP, likely_map(columns, sample))
    say(f"{name}: columns {', '.join(columns)}: read as {schema_name}")
    return itertools.chain(first, rows), schema_name, schema


def dry_run(settings) -> None:
    """Show what step 1 would make of the data: the columns, the counts, three rows; nothing is left on the disk."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = chat.load_tokenizer(settings.MODEL_NAME, settings.MODEL_REVISION, settings.PROMPT_FORMAT)
        rows, ids, _, parts, manifest, _ = prepare(settings, tokenizer, Path(scratch))
        for number, row in enumerate(first_rows(rows, ids), 1):
            say(f"--- row {number}; the model learns the part between ⟦ and ⟧")
            say(as_seen(tokenizer, row))
        del rows  # it is open
    counts = ", ".join(f"{len(numbers)} for {name}" for name, numbers in parts.items())
    columns = ", ".join(f"{ours}={column}" for ours, column in manifest["schema"]["columns"].items())
    say(f"dry run: {manifest['rows']['read']} rows read ({columns}), {len(ids)} kept: {counts}; nothing was written")


def prepare(settings, tokenizer, scratch: Path) -> tuple[datasets.Dataset, np.ndarray, np.ndarray, dict, dict, list]:
    """(rows, ids, groups, parts, manifest, long): all that is known before data/ is written, but for the sha256.

    scratch: a folder for the rows. parts: {"train", "validation", "test"}: numbers of the rows. long: see Tally.
    """
    # --- read and check
    chat.say_if_silent(tokenizer)
    source, schema_name, schema = open_source(settings)
    tally = Tally()
    kept = convert(source, schema, tokenizer, settings.MAX_LENGTH, tally, settings.TURNS)
    rows, ids, questions, conversations = write_arrow(kept, scratch / "rows.arrow")
    several = tally.conversations
    if several:
        say(
            f"  {several['several_answers']} conversations of several answers gave {several['rows']} rows"
            + (", one for each answer" if settings.TURNS == "all" else f" of {several['answers']} (TURNS is 'last')")
        )
    check_tally(tally, settings.MAX_DROP_FRACTION)

    # --- split
    threshold = settings.NEAR_DUPLICATE_THRESHOLD
    groups = find_groups(rows, ids, questions, threshold, conversations, tally.joined)
    parts = split_rows(ids, groups, settings.EVAL_FRACTION, settings.SEED)
    sizes = {name: len(numbers) for name, numbers in parts.items()}
    check_parts(sizes, groups, questions, several["rows"], settings)
    test = [{"prompt": rows[int(n)]["prompt"], "group": str(groups[n])} for n in parts["test"]]
    if doubt := doubt_about(test, rows):
        say(doubt)

    same_prompt = sum(n for n in np.unique(questions, return_counts=True)[1] if n > 1)
    no_matter = ("LANGUAGE", "DRY_RUN")  # to the rows
    manifest = {
        "source": settings.DATASET_NAME,
        "revision": settings.DATASET_REVISION,
        "source_files": state.files_hash(settings.DATASET_NAME),
        "schema": {"name": schema_name, "columns": schema},
        "settings": {name: value for name, value in vars(settings).items() if name not in no_matter},
        "seed": settings.SEED,
        "rows": {"read": tally.read, "kept": len(ids), "dropped": dict(tally.dropped.most_common()), **sizes},
        "conversations": {name: several[name] for name in ("several_answers", "answers", "rows")},
        "dropped_examples": dict(tally.examples),
        "changed": dict(tally.changed.most_common()),
        "groups": {
            "groups": len(np.unique(groups)),
            "largest": int(np.bincount(groups).max()),
            "same_prompt": int(same_prompt),
        },
    }
    return rows, ids, groups, parts, manifest, tally.long


def main() -> None:
    settings = freeze(globals())
    settings = replace(settings, LANGUAGE=spoken(settings.LANGUAGE))
    if not main_process():
        return  # of several processes, the first one prepares the data
    if settings.DRY_RUN:
        return dry_run(settings)
    folder = Path(settings.DATA_DIR)
    with handover.lock(folder), handover.replacing(folder) as new:
        tokenizer = chat.load_tokenizer(settings.MODEL_NAME, settings.MODEL_REVISION, settings.PROMPT_FORMAT)
        rows, ids, groups, parts, manifest, long = prepare(settings, tokenizer, new / ".scratch")
        manifest["sha256"] = save_splits(rows, ids, groups, parts, new)
        prompts = choose_prompts(rows.select(parts["test"]).to_list(), settings.NUM_TEST_PROMPTS)
        handover.write_json(new / "test_prompts.json", prompts)
        write_report(manifest, rows, ids, tokenizer, long, new, settings.LANGUAGE)
        handover.write_json(new / "manifest.json", manifest)
    sizes = manifest["rows"]
    if sizes["test"] < 100:
        say(f"note: a test split of {sizes['test']} rows shows only large differences; 100 or more would be better")
    what = f"{sizes['train']} rows to train on in {folder}/train, {sizes['validation']} to validate and "
    what += f"{sizes['test']} to test in {folder}/eval, {len(prompts)} test prompts"
    say_done(what, f"{folder}/dataset_report.md", command(handover.LORA))


if __name__ == "__main__":
    main()
