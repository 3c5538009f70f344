"""The rows on the disk: an Arrow file while they are checked, then data/train and data/eval with their hashes."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import pyarrow

from configs import handover
from configs.preparation.near_duplicates import digest, question_of

MESSAGE = {"role": datasets.Value("string"), "content": datasets.Value("string")}
COLUMNS = {"id": datasets.Value("string"), "prompt": [MESSAGE], "completion": [MESSAGE]}


def write_arrow(rows: Iterable[dict], path: Path) -> tuple[datasets.Dataset, np.ndarray, np.ndarray, np.ndarray]:
    """(rows, ids, questions, conversations): the rows in an Arrow file, piece by piece, so that memory does not grow.

    ids: shape (rows,), bytes. questions: shape (rows,), uint64; two are equal where the prompts are, but for case and
    spacing. conversations: shape (rows,), int; the number of the conversation that each row comes from.
    """
    rows, schema = iter(rows), datasets.Features(COLUMNS).arrow_schema
    ids, questions, conversations = [], [], []
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        while chunk := list(itertools.islice(rows, 1000)):
            ids += [row["id"] for row in chunk]
            questions += [digest(" ".join(question_of(row["prompt"]).split())) for row in chunk]
            conversations += [row.pop("conversation") for row in chunk]
            writer.write_batch(pyarrow.RecordBatch.from_pylist(chunk, schema))
    numbers = np.array(questions, np.uint64), np.array(conversations, int)
    return datasets.Dataset.from_file(str(path)), np.array(ids, "S16"), *numbers


def save_splits(
    rows: datasets.Dataset, ids: np.ndarray, groups: np.ndarray, parts: dict[str, np.ndarray], folder: Path
) -> dict[str, str]:
    """Write folder/train and folder/eval; {name: sha256} of both, and of eval's parts "validation" and "test"."""
    datasets.disable_progress_bars()  # of what takes a moment
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
