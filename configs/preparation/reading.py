"""Rows and texts from files and from the Hub, one by one, each with its place for people: `rows.jsonl line 7`."""

import contextlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import yaml

from configs import hub
from configs.preparation.encoding import find_encoding
from configs.preparation.tables import no_twins, read_csv, read_xlsx
from configs.settings import fail, say
from configs.text import quoted


class BadRow(Exception):
    """A row that cannot be learned from; its text is the reason, as counted in the manifest."""


KINDS = (".json", ".jsonl", ".csv", ".tsv", ".xlsx", ".parquet")
# what a folder downloaded from the Hub or from ModelScope holds beside its rows
NO_ROWS = ("config.json", "configuration.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")


def read_rows(name: str, config: str | None, split: str, revision: str | None) -> Iterator[tuple[str, object]]:
    """(place, row) of every row, one after the other; a BadRow stands for a row that cannot even be read.

    The place is for people: `rows.jsonl line 7`. A row is a dict for whatever has columns; the numbers of a column of
    labels (datasets.ClassLabel) are replaced by their names.
    """
    path = hub.local_path(name)
    if path is None and hub.looks_like_path(name):
        fail(f"DATASET_NAME {quoted(name)}: there is no such file or folder; give one, or the name of a Hub data set")
    if path is None or (path.is_dir() and has_configurations(path)):
        loaded = load_from_hub(name if path is None else str(path), config, split, revision)
        batches = loaded.with_format("arrow").iter(1000)
        return ((f"row {n}", row) for n, row in enumerate(named(batches, loaded.features), 1))
    paths = [path] if not path.is_dir() else files_of_split(path, split)
    if not paths or paths[0].suffix.lower() not in KINDS:
        fail(
            f"DATASET_NAME {quoted(name)} is not a data set; known files are {', '.join(KINDS)}, or a folder that "
            "holds some"
        )
    return itertools.chain.from_iterable(read_file(file) for file in paths)


def has_configurations(folder: Path) -> bool:
    """True for a downloaded repository whose README.md declares its configurations, as the Hub reads them."""
    readme = folder / "README.md"
    return readme.is_file() and re.search(r"^configs:", readme.read_text("utf-8", "replace"), re.M) is not None


def may_hold_rows(path: Path) -> bool:
    """By its name: ~$rows.xlsx is what Excel leaves beside a workbook that is open."""
    return path.suffix.lower() in KINDS and path.name not in NO_ROWS and not path.name.startswith("~$")


def files_of_split(folder: Path, split: str) -> list[Path]:
    """The data files of a folder that belong to a split, by their names, as the Hub tells them apart.

    A folder whose names speak of no split is all one.
    """
    try:
        patterns = datasets.data_files.get_data_patterns(str(folder))
    except FileNotFoundError:
        return []

    def data_files(of: str) -> set[Path]:
        matching = datasets.data_files.DataFilesList.from_patterns(patterns[of], base_path=str(folder))
        paths = {Path(file).resolve() for file in matching}
        return {path for path in paths if may_hold_rows(path)}

    every = {path.resolve() for path in folder.rglob("*") if may_hold_rows(path)}
    if split not in patterns and list(patterns) != ["train"]:
        fail(
            f"DATASET_SPLIT {split!r} is not in {folder}; its files are named for: {', '.join(map(str, patterns))}; "
            f"choose one, e.g. --dataset_split {next(iter(patterns))}, or put the files that you mean into a folder "
            f"of their own (there: {', '.join(sorted(path.name for path in every))})"
        )
    kept = data_files(split if split in patterns else next(iter(patterns)))
    left = sorted(str(path.relative_to(folder.resolve())) for path in every - kept)
    if left:
        say(f"note: not read, because their names are not of the split {split!r}: {', '.join(left)}")
    return sorted(kept)


def load_from_hub(name: str, config: str | None, split: str, revision: str | None) -> datasets.Dataset:
    """A data set by its name on the Hub, or a downloaded copy of one. Ends with exit code 2 where it cannot be had."""
    about = f"(DATASET_SPLIT {split!r}, DATASET_CONFIG {config!r})"
    with hub.hub_errors("data set", name, "DATASET_NAME", revision) as check_files:
        try:
            return datasets.load_dataset(
                name, config, split=split, revision=revision, trust_remote_code=hub.TRUST_REMOTE_CODE
            )
        except (FileNotFoundError, yaml.YAMLError) as error:
            check_files()
            if hub.local_path(name) is None:
                raise
            cause = " ".join(str(error).split())[:300]
            fail(f"{name}/README.md: its configurations cannot be read ({cause}); mend them, or remove the file")
        except datasets.exceptions.DatasetGenerationError as error:
            check_files()
            cause = " ".join(str(error.__cause__ or error).split())[:300]
            fail(
                f"data set {name!r} cannot be read by the library ({cause}); download its files and give their folder "
                "as DATASET_NAME: rows that do not fit are then left out one by one"
            )
        except (ValueError, RuntimeError) as error:
            check_files()
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
        say(f"note: {name} is a loading script, which is not run; reading its {branch} instead")
        return datasets.load_dataset(
            name, data_dir=config, split=split, revision=branch, trust_remote_code=hub.TRUST_REMOTE_CODE
        )


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
    readers = {".parquet": read_parquet, ".csv": read_csv, ".tsv": read_csv, ".xlsx": read_xlsx}
    try:
        yield from readers.get(kind, read_json)(path)
    except RecursionError:
        fail(
            f"{path} cannot be read as {kind[1:]}: lists or objects stand in one another too deep; write one row a "
            "line (.jsonl), then only the rows that are so deep are left out"
        )
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be read as {kind[1:]}: {str(error).splitlines()[0]}")


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


# --- JSON


def whole_number(digits: str) -> int | float:
    """An integer of a JSON text; where it has more digits than Python converts (4,300), a float."""
    try:
        return int(digits)
    except ValueError:
        return float(digits)


# strict would refuse a line break inside a string, which people do write
DECODER = json.JSONDecoder(strict=False, parse_int=whole_number)
UNIQUE = json.JSONDecoder(strict=False, parse_int=whole_number, object_pairs_hook=unique_keys)
# columns that are lists of objects themselves
LISTS = ("messages", "conversations", "conversation", "contents", "prompt", "completion", "history")


def read_json(path: Path) -> Iterator[tuple[str, object]]:
    """A list of rows, an object around one such list, or JSON Lines: one row a line, whatever the file is called.

    A line that is no JSON is a BadRow. Only JSON Lines are read piece by piece; a list is read whole.
    """
    with open(path, encoding=find_encoding(path), newline="\n") as file:
        first = next((line for line in file if line.strip()), "")
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            UNIQUE.decode(first)  # the other lines are like the first
        lines = first.lstrip()[:1] != "[" and (path.suffix.lower() == ".jsonl" or looks_like_lines(first, file))
        if not lines:
            file.seek(0)
            try:
                content = UNIQUE.decode(text := file.read())
            except json.JSONDecodeError as error:
                if line := trailing_comma(text, error):
                    fail(
                        f"{path}, line {line}: a comma in front of the closing bracket, which JSON forbids: delete it"
                    )
                if path.suffix.lower() == ".json":
                    raise
                content = None  # .jsonl whose first line is broken
            if path.suffix.lower() == ".json" and not isinstance(content, list):
                # an object: the rows are its one list, e.g. {"data": [...]}
                values = content.values() if isinstance(content, dict) else ()
                lists = [value for value in values if isinstance(value, list)]
                if len(lists) != 1:
                    raise ValueError(
                        "the file holds one value; a list of rows, or an object with one such list, is needed"
                    )
                content = lists[0]
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
            except (ValueError, RecursionError) as error:
                broken += 1
                if broken <= 3:
                    comma = isinstance(error, json.JSONDecodeError) and stray_comma(line, error)
                    why = f" ({comma}: delete it)" if comma else ""
                    say(f"note: {path}, line {number} is not JSON and is left out{why}: {line[:60]!r}")
                yield place, BadRow("not JSON")


def trailing_comma(text: str, error: json.JSONDecodeError) -> int | None:
    """The line of a comma in front of a closing bracket, where that is the mistake; else None."""
    at = error.pos + (text[error.pos : error.pos + 1] == ",")  # newer Pythons point at the comma itself
    before = text[:at].rstrip()
    if before.endswith(",") and text[at:].lstrip()[:1] in ("]", "}"):
        return text.count("\n", 0, len(before)) + 1
    return None


def stray_comma(line: str, error: json.JSONDecodeError) -> str:
    """Which comma makes a line of JSON Lines no JSON; "" where that is not the mistake."""
    if error.msg == "Extra data" and line[error.pos :].strip() == ",":
        return "a comma behind the row"
    return "a comma in front of a closing bracket" if trailing_comma(line, error) else ""


def looks_like_lines(first: str, rest: Iterable[str]) -> bool:
    """True for JSON Lines: the first line is a whole row. rest: the lines behind it."""
    try:
        row = DECODER.decode(first)
    except (ValueError, RecursionError):
        return False
    # an object around the rows may stand on one line, too: {"data": [{...}, {...}]}
    lists = [v for k, v in row.items() if k not in LISTS] if isinstance(row, dict) else []
    around = any(isinstance(v, list) and v and all(isinstance(row, dict) for row in v) for v in lists)
    return isinstance(row, dict) and not (around and not any(line.strip() for line in rest))


# --- general text


READ_AT_MOST = 100_000  # rows of a split of a Hub data set from which the general text is taken


def general_text(
    name: str | None,
    flag: str = "GENERAL_TEXT",
    order: tuple[str, ...] = ("test", "validation", "train"),
    count: int = 200,
) -> list[str]:
    """The paragraphs of a file, or `count` texts of a Hub data set (fewer where it has fewer); [] where name is None.

    Where no line of the file is empty, each line is a paragraph.
    Of a data set: column text (or the first one of strings) of the first of these splits that it has, evenly over
    the split (over its first 100,000 rows, where it has more). flag: the setting that gave the name.
    """
    if name is None:
        return []
    no = "--general_text none" if flag == "GENERAL_TEXT" else "--replay_fraction 0"
    mend = f"give a text file, a Hub data set with a text column (owner/name#config), or: {no}"
    path = hub.local_path(name)
    if path is None:
        repo, _, config = name.partition("#")
        if not hub.is_hub_name(repo):
            fail(f"{flag} {quoted(name)}: there is no such file; {mend}")
        from datasets import get_dataset_config_names, get_dataset_split_names, load_dataset

        with hub.hub_errors("data set", repo, flag) as check_files:
            try:
                configs = get_dataset_config_names(repo)
                if config not in configs and (config or len(configs) > 1):
                    known = ", ".join(configs[:12])
                    fail(f"{flag} {name!r}: choose one of its configurations, {repo}#...: {known}")
                config = config or configs[0]
                splits = get_dataset_split_names(repo, config)
                split = next((s for s in order if s in splits), splits[0])
                rows = load_dataset(repo, config, split=split, streaming=True, trust_remote_code=hub.TRUST_REMOTE_CODE)
            except ValueError as error:
                check_files()
                fail(f"{flag} {name!r} cannot be read ({str(error).splitlines()[0]}); {mend}")
            texts = evenly(filter(None, map(text_of, itertools.islice(rows, READ_AT_MOST))), count)
        return texts or fail(f"{flag} {name!r} holds no text; {mend}")
    if not path.is_file():
        fail(f"{flag} {name!r} is no file; {mend}")
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
        gap = r"\n\s*\n" if re.search(r"\n\s*\n", text) else "\n"
        texts = [p.strip() for p in re.split(gap, text) if p.strip()]
    except UnicodeDecodeError as error:
        fail(f"{flag} {name!r} is not UTF-8 text ({error.reason}); {mend}")
    return texts or fail(f"{flag} {name!r} is empty; {mend}")


def text_of(row: dict) -> str:
    """The text of a data set's row; "" where it is a heading at most."""
    text = row.get("text") or next((value for value in row.values() if isinstance(value, str)), "")
    return text.strip() if len(text.split()) >= 8 or len(text) >= 40 else ""


def evenly(items: Iterable, count: int) -> list:
    """`count` of these items, spread evenly, however many there are; all of them where they are fewer.

    No more than 2 x count are held at once: where they become more, every second one goes, and so do those to come.
    """
    kept, step = [], 1
    for number, item in enumerate(items):
        if number % step == 0:
            kept.append(item)
            if len(kept) == 2 * count:
                kept, step = kept[::2], 2 * step
    return [kept[i * len(kept) // count] for i in range(count)] if len(kept) > count else kept
