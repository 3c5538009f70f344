"""General text among the training rows (REPLAY_FRACTION), so that less of what the base knew is forgotten.

Rehearsal is the plainest remedy for forgetting (Robins 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal";
for instruction-tuned language models, Scialom et al. 2022). It is here to be compared: configs/comparison/replay.yaml.
"""

import itertools
import random

from datasets import Dataset, concatenate_datasets

from configs import handover
from configs.preparation.reading import general_text
from configs.settings import fail, say


def with_replay(rows: Dataset, settings, tokenizer) -> Dataset:
    """The training rows, and after them pieces of REPLAY_TEXT that make up REPLAY_FRACTION of all tokens.

    rows: as `token_rows` gives them; the pieces have the same columns, and all of their tokens but the first are
    trained. A piece is no longer than the longest row. Every second paragraph of the text is used and the others are
    left: step 4 measures forgetting by what no model has replayed. Which pieces is drawn by SEED, and where the text
    is too short they are used again. Raises: SystemExit(2) where the text cannot be read or is too short.
    """
    share = settings.REPLAY_FRACTION
    if not share:
        return rows
    wanted, width = share / (1 - share) * sum(rows["length"]), max(rows["length"])
    texts = general_text(settings.REPLAY_TEXT, "REPLAY_TEXT", ("train", "validation", "test"), int(wanted) // 20 + 200)
    pieces = [piece for text in texts[1::2] for piece in cut(text, tokenizer, width)]
    if not pieces:
        fail(f"REPLAY_TEXT {settings.REPLAY_TEXT!r} has one paragraph only; every second one is used, so give more")
    random.Random(settings.SEED).shuffle(pieces)
    taken, tokens = [], 0
    for number, piece in enumerate(itertools.cycle(pieces)):
        if tokens >= wanted:
            break
        taken.append(piece | {"id": f"replay-{number}"})
        tokens += piece["length"]
    often = f", each used about {len(taken) / len(pieces):.0f} times" if len(taken) > 1.5 * len(pieces) else ""
    say(
        f"replay: {len(taken)} pieces of {settings.REPLAY_TEXT}, {tokens:,} tokens, are added to {len(rows)} rows "
        f"with {sum(rows['length']):,}{often}"
    )
    return concatenate_datasets([rows, Dataset.from_list(taken, features=rows.features)])


def cut(text: str, tokenizer, width: int) -> list[dict]:
    """A paragraph in pieces of up to `width` tokens, the first of them the token that begins a text."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    known = {"question": handover.text_hash(text)}
    return [
        {"input_ids": [first, *part], "labels": [-100, *part], "length": len(part) + 1, "trained": len(part), **known}
        for part in (ids[at : at + width - 1] for at in range(0, len(ids), width - 1))
    ]
