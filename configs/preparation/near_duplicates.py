"""Near-duplicates among prompts: MinHash signatures, locality-sensitive hashing, groups that stay on one side."""

import hashlib
import os
import re
import sys
import unicodedata
from collections.abc import Callable

import datasets
import numpy as np
from datasketch import MinHash
from scipy.sparse import coo_array, csgraph

from configs.translation import phrase

# Two prompts land in one bucket when all hashes of a band agree: with 32 bands of 6, prompts of similarity 0.8 meet at
# least once with a probability of 0.9999 (computed), and prompts of 0.3 with one of 0.02.
BANDS, HASHES = 32, 6
# 192 hashes estimate a similarity to within 0.1 (three standard errors). Too much kept together costs nothing.
SLACK = 0.1
# what is kept of a prompt: the keys of its buckets, and the low bytes of its MinHash
SIGNED = np.dtype([("bands", "u8", BANDS), ("prints", "u1", BANDS * HASHES)])


def question_of(prompt: list[dict]) -> str:
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


def signer() -> Callable[[dict], dict]:
    """The function that reads a batch of rows into SIGNED records, as bytes."""
    sketch = MinHash(num_perm=BANDS * HASHES, seed=1, hashfunc=int)
    powers = np.array([31**n for n in range(5)], np.uint32)
    mix = np.random.default_rng(1).integers(1, 2**63, HASHES + 1, np.uint64) * np.uint64(2) + np.uint64(1)

    def sign(batch: dict) -> dict:
        signed = np.empty(len(batch["prompt"]), SIGNED)
        for row, prompt in enumerate(batch["prompt"]):
            text = question_of(prompt)
            figures = np.array([digest(" ".join(sorted(re.findall(r"\d+(?:\.\d+)?", text))))], np.uint64)
            words = re.sub(r"\W+", " ", text).strip()
            if 2 * len(words) < len(text):  # emoji, formulas: hardly anything is left of them
                words = text
            # a rolling hash of every 5 letters, all of them at once; shorter texts are filled up with spaces
            letters = np.frombuffer(words.ljust(5).encode("utf-32-le"), np.uint32)
            pieces = sum(letters[n : len(letters) - 4 + n] * power for n, power in enumerate(powers))
            # the library's MinHash: the smallest value of each hash function over the pieces
            sketch.clear()
            sketch.update_batch(pieces.tolist())
            # figures enter every key: "5 % of 300" never meets "7 % of 450" in a bucket
            hashes = sketch.hashvalues.reshape(BANDS, HASHES).astype(np.uint64)
            signed["bands"][row] = hashes @ mix[:HASHES] + figures * mix[HASHES]
            # 8 bits of each hash tell near from far: two that differ agree by chance in one of 256 cases
            signed["prints"][row] = sketch.hashvalues.astype(np.uint8)
        return {"signed": [record.tobytes() for record in signed]}

    return sign


def find_groups(
    rows: datasets.Dataset,
    ids: np.ndarray,
    questions: np.ndarray,
    threshold: float | None,
    conversations: np.ndarray,
    joined: list[tuple[int, int]],
) -> np.ndarray:
    """The group of each row, shape (rows,), int: rows with equal prompts or near-duplicates are one group.

    So are the rows of one conversation. conversations: the number of each row's, shape (rows,), int. joined: pairs of
    conversations that begin alike; a row that they would both have is there only once.

    Near-duplicates have the same figures, and a Jaccard similarity of their 5-character pieces, in lower case and
    without punctuation, of at least `threshold` as MinHash estimates it (Broder 1997; datasketch). They are found by
    locality-sensitive hashing (Leskovec, Rajaraman and Ullman 2014, chapter 3). Groups are connected components,
    numbered by their smallest id. threshold None: equal prompts alone.
    """
    # datasketch's own index keeps a Python object a bucket; sorting each band does the same in 448 bytes a row
    if not len(ids):
        return np.empty(0, int)
    order = np.argsort(ids)  # the order of the file must not matter
    pairs = []

    def link(keys: np.ndarray, reach: int, alike: float) -> None:
        """Pair the rows of one key, each with the next ones up to `reach`, where they are alike enough."""
        by_key = np.argsort(keys, kind="stable")
        for step in range(1, min(reach, len(keys) - 1) + 1):
            left, right = by_key[:-step], by_key[step:]
            same_key = np.flatnonzero(keys[left] == keys[right])
            if not len(same_key):
                return  # no key has so many rows, so none has more
            for portion in np.array_split(same_key, len(same_key) // 100_000 + 1):  # in portions, for memory
                a, b = left[portion], right[portion]
                if alike:
                    near = (signed["prints"][a] == signed["prints"][b]).mean(axis=1) >= alike
                    a, b = a[near], b[near]
                pairs.append((a, b))

    link(questions[order], 1, 0)  # equal prompts: neighbours in the order of their hash
    if threshold is not None:
        # a log file needs no copy of the library's own bar
        (datasets.enable_progress_bars if sys.stderr.isatty() else datasets.disable_progress_bars)()
        workers = min(os.cpu_count() or 1, 8) if len(rows) > 20_000 else None
        records = rows.map(
            signer(),
            batched=True,
            num_proc=workers,
            remove_columns=rows.column_names,
            new_fingerprint="signed",
            desc=phrase("comparing prompts"),
        )
        signed = np.frombuffer(b"".join(records.data["signed"].to_pylist()), SIGNED)[order]
        # up to 8 neighbours in a bucket: chains of neighbours join the whole of it, and a huge bucket stays cheap
        for band in signed["bands"].T:
            link(band, 8, threshold - SLACK)
    left, right = (np.concatenate([pair[side] for pair in pairs] or [np.array([], int)]) for side in (0, 1))
    # a conversation is a node, too: its rows hang on it, and so does another conversation that it shares turns with
    numbers = np.concatenate([conversations[order], np.array(joined, int).ravel()])
    nodes = len(ids) + np.unique(numbers, return_inverse=True)[1]
    of_rows, of_pairs = nodes[: len(ids)], nodes[len(ids) :]
    left = np.concatenate([left, np.arange(len(ids)), of_pairs[::2]])
    right = np.concatenate([right, of_rows, of_pairs[1::2]])
    size = int(nodes.max()) + 1
    edges = coo_array((np.ones(len(left), bool), (left, right)), shape=(size, size))
    component = csgraph.connected_components(edges, directed=False)[1][: len(ids)]
    _, first, component = np.unique(component, return_index=True, return_inverse=True)
    groups = np.empty(len(ids), int)
    groups[order] = first[component]  # the place of the group's smallest id
    return groups
