"""Turns an instruction data set into chat messages, leaves out rows that cannot be learned from, and splits
the rest.

Reads:  a data set of the Hugging Face Hub, or a local .json, .jsonl, .csv or .parquet file or a folder of
them
Writes: data/train, data/eval (with its validation and test parts), data/test_prompts.json, data/manifest.json

    python 1_prepare_dataset.py
    python 1_prepare_dataset.py --dataset_name my_rows.jsonl --column_map instruction=task,output=result

Takes about a minute for the 69,000 rows of the default data set, plus its download.
"""

import collections
import csv
import hashlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from configs import files
from configs.settings import fail, override, read_constants

# --- data set
DATASET_NAME = "gbharti/finance-alpaca"  # Hub name, or a local file or folder
DATASET_CONFIG: str | None = None  # configuration (subset) of a Hub data set that has several
DATASET_SPLIT = "train"  # split of a Hub data set
DATASET_REVISION: str | None = None  # branch, tag or commit on the Hub; none is the default branch
# Only needed where the columns are not recognised by themselves.
COLUMN_MAP: dict = {}  # e.g. instruction=task,input=context,output=result

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

# --- output
DATA_DIR = "data"  # folder for the result

if __name__ == "__main__":
    override(globals())
    files.go_online(DATASET_NAME, MODEL_NAME)  # first, because the libraries read its answer when they load

import datasets
import jinja2
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

    example: the row with all its columns; those of the recognised schema are also there as `instruction`,
    `input` and `output` (or `messages`). Return one of:
    - {"messages": [...]} or the list itself: {role, content} messages, of which the last is the assistant's
      answer
    - {"prompt": ..., "completion": ...}: each a string or a list of messages
    - one string that ends with the row's `output`, e.g. f"### Instruction:\\n{q}\\n\\n### Response:\\n{a}";
      it is split
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


def read_rows(
    name: str, config: str | None, split: str, revision: str | None
) -> tuple[list, collections.Counter]:
    """All rows as dicts, and the number of those that could not even be read, by reason."""
    path = files.local_path(name)
    unreadable: collections.Counter = collections.Counter()
    if path is None and files.looks_like_path(name):
        fail(
            f"DATASET_NAME {name!r}: there is no such file or folder; give one, or the name of a Hub data set"
        )
    if path is None:
        with files.hub_errors("data set", name, "DATASET_NAME", revision):
            try:
                loaded = datasets.load_dataset(name, config, split=split, revision=revision)
            except ValueError as error:  # unknown split or configuration: the library lists what exists
                if type(error) is ValueError and not isinstance(error.__cause__, OSError):
                    fail(
                        f"data set {name!r}: {' '.join(str(error).split())} (DATASET_SPLIT {split!r}, "
                        f"DATASET_CONFIG {config!r})"
                    )
                raise
        return list(tqdm(loaded, desc="reading", unit=" rows")), unreadable
    kinds = (".json", ".jsonl", ".csv", ".parquet")
    paths = sorted(p for p in path.iterdir() if p.suffix.lower() in kinds) if path.is_dir() else [path]
    if not paths or paths[0].suffix.lower() not in kinds:
        fail(
            f"DATASET_NAME {name!r} is not a data set; known files are {', '.join(kinds)}, or a folder "
            f"that holds some"
        )
    rows: list = []
    for file in paths:
        try:
            rows.extend(read_file(file, unreadable))
        except UnicodeDecodeError as error:
            # the error's own place counts from the last block read, or from behind the byte order mark
            lines = enumerate(file.read_bytes().split(b"\n"), 1)
            number = next(n for n, line in lines if line.decode(errors="replace").encode() != line)
            code = "utf-16" if file.read_bytes()[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
            fail(
                f"{file}, line {number}: not UTF-8 ({error.reason}); convert it, e.g. iconv -f {code} -t "
                f"utf-8 {file}"
            )
        except (OSError, ValueError, RecursionError, csv.Error) as error:
            fail(f"{file} cannot be read as {file.suffix[1:]}: {str(error).splitlines()[0]}")
    return rows, unreadable


def read_file(path: Path, unreadable: collections.Counter) -> Iterator[object]:
    """Rows of one file. A line of a .jsonl file that is not JSON is counted in `unreadable` and left out."""
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(path).to_pylist()
    elif path.suffix.lower() == ".csv":
        csv.field_size_limit(sys.maxsize)
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            names = [name.strip() for name in reader.fieldnames or []]
            if len(set(names)) < len(names):
                raise ValueError(f"two columns have one name: {', '.join(names)}")
            reader.fieldnames = names
            yield from reader
    else:
        text = path.read_text(encoding="utf-8-sig")
        content = None
        try:
            content = json.loads(text, strict=False)
        except ValueError:
            if path.suffix.lower() == ".json" and not looks_like_lines(text):
                raise
        if isinstance(content, list):
            yield from content
        elif path.suffix.lower() == ".json" and not looks_like_lines(text):
            # an object: the rows are its one list, e.g. {"data": [...]}
            values = content.values() if isinstance(content, dict) else ()
            lists = [value for value in values if isinstance(value, list)]
            if len(lists) != 1:
                raise ValueError(
                    "the file holds one value; a list of rows, or an object with one such list, is needed"
                )
            yield from lists[0]
        else:
            for number, line in enumerate(text.split("\n"), 1):
                if not line.strip():
                    continue
                try:
                    yield json.loads(line, strict=False)
                except ValueError:
                    unreadable["not JSON"] += 1
                    files.say(f"note: {path}, line {number} is not JSON and is left out: {line[:60]!r}")


TURNS = ("messages", "conversations", "prompt", "completion")  # columns that are lists of objects themselves


def looks_like_lines(text: str) -> bool:
    """True for JSON Lines under the name .json: the first line is a whole row."""
    try:
        first = json.loads(text.lstrip().split("\n", 1)[0], strict=False)
    except ValueError:
        return False
    # an object around the rows may stand on one line, too: {"data": [{...}, {...}]}
    lists = [v for k, v in first.items() if k not in TURNS] if isinstance(first, dict) else []
    around = any(isinstance(v, list) and v and all(isinstance(row, dict) for row in v) for v in lists)
    return isinstance(first, dict) and not (around and "\n" not in text.strip())


# --- schema


# What a set of columns is called, and the columns of (instruction, input, output, system); the first that
# fits is taken.
SCHEMAS = [
    ("messages", {"messages": "messages"}),
    ("conversations", {"messages": "conversations"}),
    ("alpaca", {"instruction": "instruction", "input": "input", "output": "output", "system": "system"}),
    ("alpaca", {"instruction": "instruction", "input": "input", "output": "response", "system": "system"}),
    ("system/user/assistant", {"instruction": "user", "output": "assistant", "system": "system"}),
    (
        "question/answer",
        {"instruction": "question", "input": "context", "output": "answer", "system": "system"},
    ),
    ("question/answer", {"instruction": "query", "output": "answer"}),
    ("prompt/completion", {"instruction": "prompt", "output": "completion"}),
    ("prompt/completion", {"instruction": "prompt", "output": "response"}),
]
NEEDED = ("instruction", "output", "messages")


def find_schema(columns: list[str], column_map: dict) -> tuple[str, dict[str, str]]:
    """Name of the schema and {our column: the data set's}. Ends with exit code 2 when the columns fit
    none."""
    if column_map:
        unknown = [f"{key}={value}" for key, value in column_map.items() if value not in columns]
        wrong = [
            key for key in column_map if key not in ("instruction", "input", "output", "system", "messages")
        ]
        if unknown:
            fail(
                f"COLUMN_MAP names a column that is not there ({unknown[0]}); the columns are: "
                f"{', '.join(columns)}"
            )
        if wrong or not ({"instruction", "output"} <= set(column_map) or "messages" in column_map):
            fail(
                f"COLUMN_MAP {column_map} must map instruction and output (and input, system where there "
                f"are any), "
                f"or messages; the columns are: {', '.join(columns)}"
            )
        return "COLUMN_MAP", column_map
    for name, wanted in SCHEMAS:
        if all(column in columns for ours, column in wanted.items() if ours in NEEDED):
            schema = {ours: column for ours, column in wanted.items() if column in columns}
            if "context" in columns and not {"input", "messages"} & set(schema):
                schema["input"] = "context"  # databricks-dolly-15k: instruction, context, response
            return name, schema
    known = "; ".join(dict.fromkeys(" + ".join(c for o, c in w.items() if o in NEEDED) for _, w in SCHEMAS))
    first, last = (columns + ["?", "?"])[0], (columns or ["?"])[-1]
    if len(columns) == 1 and ";" in first:
        fail(
            f"the file has one column, {first!r}: its separator seems to be a semicolon; save it with commas"
        )
    fail(
        f"the columns of the data set are not recognised: {', '.join(columns) or 'none'} (known: {known}); "
        f"name them, e.g.: --column_map instruction={first},output={last}"
    )


# --- one row


class BadRow(Exception):
    """A row that cannot be learned from; its text is the reason, as counted in the manifest."""


class BadFunction(Exception):
    """What format_to_chatml returned is of no use; its text says why."""


def normalise(row: object, schema: dict[str, str]) -> dict:
    """The row with the schema's columns under our names. Raises BadRow where an answer or a question is no
    text."""
    if not isinstance(row, dict):
        raise BadRow("not an object with columns")
    if None in row:  # csv's place for what no column is left for
        raise BadRow("more cells than columns (an unquoted comma?)")
    example = {**row, **{ours: row.get(column) for ours, column in schema.items()}}
    if "messages" in schema:
        example["messages"] = normalise_messages(example["messages"])
        return example
    if isinstance(example["instruction"], list) and isinstance(
        example["output"], list
    ):  # TRL's conversations
        return {**example, "messages": normalise_messages(example["instruction"] + example["output"])}
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
    """OpenAI's {role, content} or ShareGPT's {from, value}, content a string or text parts, as {role,
    content: str}."""
    if not isinstance(messages, list) or not messages:
        raise BadRow("missing messages")
    result = []
    for message in messages:
        if not isinstance(message, dict):
            raise BadRow("message is not an object")
        role = ROLES.get(str(message.get("role", message.get("from"))).lower())
        content = message.get("content", message.get("value"))
        if isinstance(content, list):
            parts = [
                part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
                for part in content
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
    """(prompt, completion) as messages from whatever format_to_chatml returned. Raises BadRow for an unusable
    row.

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
            f"format_to_chatml returned {type(formatted).__name__}; it must return messages, prompt and "
            f"completion, "
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
    """Split one rendered string in front of its answer; the turns of the common templates become messages
    again."""
    answer = answer.strip() if isinstance(answer, str) else ""  # functions like to strip, too
    at = text.rfind(answer) if answer else -1
    # "s" is also in "</s>": the answer is the last one that has nothing but end tokens behind it
    while at >= 0 and re.sub(ENDS, "", text[at + len(answer) :]).strip():
        at = text.rfind(answer, 0, at + len(answer) - 1)
    if at < 0:
        raise BadFunction(
            f"format_to_chatml returned a string that does not end with the row's answer "
            f"{str(answer)[:60]!r}, so the loss "
            "could not be kept on the answer; end it with the `output` column, or return messages"
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
    """Raise BadRow when a conversation has an empty side, repeats itself, or holds text that could pose as a
    turn."""
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


def convert(
    rows: list, schema: dict[str, str], tokenizer, max_length: int
) -> tuple[list[dict], collections.Counter]:
    """The rows that can be learned from as {id, prompt, completion}, and the number of the others by
    reason."""
    kept, dropped, seen = [], collections.Counter(), set()
    marks = files.markers(tokenizer)
    bar = tqdm(rows, desc="checking", unit=" rows")
    for row in bar:
        try:
            example = normalise(row, schema)
            texts = [example[name] for name in schema if isinstance(example[name], str)]
            try:
                formatted = format_to_chatml(example)
            except Exception as error:
                place = error.__traceback__.tb_next
                raise BadFunction(
                    f"format_to_chatml raised {type(error).__name__}: {error}"
                    f"{f' (line {place.tb_lineno})' if place else ''}; the row has: "
                    f"{', '.join(map(str, example))}"
                ) from error
            if isinstance(formatted, str) and any(mark in text for mark in STRING_MARKS for text in texts):
                raise BadRow("template marker or special token in the text")
            prompt, completion = to_conversation(example, formatted)
            check(prompt, completion, marks)
            identity = files.rows_hash([{"prompt": prompt, "completion": completion}])[:16]
            if identity in seen:
                raise BadRow("exact duplicate")
            try:
                size = len("".join(files.render(tokenizer, prompt, completion)).encode())
            except (ValueError, jinja2.TemplateError) as error:  # e.g. Gemma's: no system turn
                raise BadRow("conversation that the chat template cannot render") from error
            # a token is at least one byte, so a short row need not be tokenised
            if size > max_length and sum(map(len, files.encode(tokenizer, prompt, completion))) > max_length:
                raise BadRow(f"longer than {max_length} tokens")
        except BadFunction as mistake:
            bar.close()  # or the sentence would stand behind the bar, on its line
            fail(mistake)
        except BadRow as reason:
            dropped[str(reason)] += 1
            continue
        seen.add(identity)
        kept.append({"id": identity, "prompt": prompt, "completion": completion})
    return kept, dropped


def split_rows(rows: list[dict], fraction: float, seed: int) -> tuple[list[dict], list[dict]]:
    """(train, eval) with `part` in eval. Rows with the same question stay together, so no answer is seen in
    training.

    The place of a row depends on its question and the seed alone, not on its place in the file.
    """
    groups: dict[str, list[dict]] = collections.defaultdict(list)
    for row in rows:
        question = " ".join(" ".join(m["content"] for m in row["prompt"]).lower().split())
        groups[hashlib.sha256(f"{seed}\n{question}".encode()).hexdigest()].append(row)
    wanted = round(fraction * len(rows))
    train, validation, test = [], [], []
    for key in sorted(groups):
        part = (
            validation
            if len(validation) < wanted // 2
            else test
            if len(test) < wanted - wanted // 2
            else train
        )
        part.extend(sorted(groups[key], key=lambda row: row["id"]))
    held_out = [{**row, "part": "validation"} for row in validation]
    return train, held_out + [{**row, "part": "test"} for row in test]


def choose_prompts(rows: list[dict], number: int) -> list[dict]:
    """`number` test rows spread evenly over the lengths of their answers, as {id, prompt, reference}."""
    by_length = sorted(rows, key=lambda row: (len(row["completion"][0]["content"]), row["id"]))
    step = max(len(by_length) / number, 1)
    chosen = [by_length[int((i + 0.5) * step)] for i in range(min(number, len(by_length)))]
    return [
        {"id": r["id"], "prompt": r["prompt"], "reference": r["completion"][0]["content"]} for r in chosen
    ]


def save(data_dir: str, train: list[dict], held_out: list[dict], prompts: list[dict], manifest: dict) -> None:
    """Write everything beside the old data, then put it in place; the manifest is the last to come."""
    message = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    columns = {"id": datasets.Value("string"), "prompt": [message], "completion": [message]}
    folder = Path(data_dir)
    for left in folder.glob(".new-*"):  # by a run that was killed; nobody else writes while we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as staged:
        new = Path(staged)
        for name, rows, extra in (
            ("train", train, {}),
            ("eval", held_out, {"part": datasets.Value("string")}),
        ):
            features = datasets.Features({**columns, **extra})
            datasets.Dataset.from_list(rows, features=features).save_to_disk(str(new / name))
        (folder / "manifest.json").unlink(
            missing_ok=True
        )  # from here to the end, data/ says of itself: not complete
        for name in ("train", "eval"):
            files.put_folder(new / name, folder / name)
        files.write_json(folder / "test_prompts.json", prompts)
        files.write_json(folder / "manifest.json", manifest)


def problems(settings: dict) -> list[str]:
    """What can be seen to be wrong in the constants before anything is read."""
    found = files.check_model(MODEL_NAME, MODEL_REVISION)
    if not 0 < settings["EVAL_FRACTION"] < 1:
        found.append(
            f"EVAL_FRACTION is {settings['EVAL_FRACTION']}; it is a share of the rows: --eval_fraction 0.1"
        )
    if not 0 <= settings["MAX_DROP_FRACTION"] <= 1:
        found.append(
            f"MAX_DROP_FRACTION is {settings['MAX_DROP_FRACTION']}; it is a share: --max_drop_fraction 0.2"
        )
    for name in ("MAX_LENGTH", "NUM_TEST_PROMPTS"):
        if settings[name] < 1:
            found.append(f"{name} is {settings[name]}; it must be at least 1")
    return found


def main() -> None:
    settings = {name: globals()[name] for name in read_constants(__file__)}
    if found := problems(settings):
        fail(*found)
    with files.lock(DATA_DIR):
        # --- read
        tokenizer = files.load_tokenizer(MODEL_NAME, MODEL_REVISION, PROMPT_FORMAT)
        rows, dropped = read_rows(DATASET_NAME, DATASET_CONFIG, DATASET_SPLIT, DATASET_REVISION)
        read = len(rows) + dropped.total()
        if not rows:
            fail(f"DATASET_NAME {DATASET_NAME!r} holds no rows; give a data set that does")
        columns = list(dict.fromkeys(c for row in rows[:1000] if isinstance(row, dict) for c in row if c))
        schema_name, schema = find_schema(columns, COLUMN_MAP)
        files.say(f"{DATASET_NAME}: {read} rows, columns {', '.join(columns)}: read as {schema_name}")

        # --- check and split
        kept, bad = convert(rows, schema, tokenizer, MAX_LENGTH)
        dropped += bad
        for reason, number in dropped.most_common():
            files.say(f"  left out: {number} x {reason}")
        # a duplicate is no fault of the data that a setting could mend
        faulty = dropped.total() - dropped["exact duplicate"]
        if faulty > MAX_DROP_FRACTION * read:
            worst, number = (
                dropped - collections.Counter({"exact duplicate": dropped["exact duplicate"]})
            ).most_common(1)[0]
            accept = (
                f", or accept it with: --max_drop_fraction {min(faulty / read + 0.01, 1):.2f}" if kept else ""
            )
            fail(
                f"{faulty} of {read} rows cannot be used, more than MAX_DROP_FRACTION={MAX_DROP_FRACTION} "
                f"allows; most: {number} x {worst}; mend the data{accept}"
            )
        train, held_out = split_rows(kept, EVAL_FRACTION, SEED)
        sizes = collections.Counter(row["part"] for row in held_out)
        if not train or not sizes["validation"] or not sizes["test"]:
            fail(
                f"{len(kept)} usable rows give {len(train)} to train on, {sizes['validation']} to "
                f"validate and "
                f"{sizes['test']} to test; each needs one: add rows"
                f"{', or --eval_fraction 0.2' if EVAL_FRACTION < 0.2 and len(kept) > 9 else ''}"
            )

        # --- write
        prompts = choose_prompts([row for row in held_out if row["part"] == "test"], NUM_TEST_PROMPTS)
        manifest = {
            "source": DATASET_NAME,
            "revision": DATASET_REVISION,
            "schema": {"name": schema_name, "columns": schema},
            "settings": settings,
            "seed": SEED,
            "rows": {
                "read": read,
                "kept": len(kept),
                "dropped": dict(dropped.most_common()),
                "train": len(train),
                "validation": sizes["validation"],
                "test": sizes["test"],
            },
            "sha256": {"train": files.rows_hash(train), "eval": files.rows_hash(held_out)},
        }
        save(DATA_DIR, train, held_out, prompts, manifest)
    files.say(
        f"done: {len(train)} rows to train on in {DATA_DIR}/train, {sizes['validation']} to validate and "
        f"{sizes['test']} to test in {DATA_DIR}/eval, {len(prompts)} test prompts"
    )
    if sizes["test"] < 100:
        files.say(
            f"note: a test part of {sizes['test']} rows shows only large differences; 100 or more would "
            f"be better"
        )


if __name__ == "__main__":
    main()
