"""Columns by the names that people give them, and what to suggest where those say nothing."""

import unicodedata
from collections.abc import Callable


def bare_name(name: str) -> str:
    """The name of a column without what people vary: case, spaces, full-width letters."""
    return "".join(unicodedata.normalize("NFKC", name).casefold().split())


def by_name(columns: list[str]) -> Callable[[str], str | None]:
    """The function that finds the column of a name: the very one, or the first with the same `bare_name`."""
    alike = {bare_name(column): column for column in reversed(columns)}
    return lambda name: name if name in columns else alike.get(bare_name(name))


def likely_map(columns: list[str], rows: list[dict]) -> str:
    """A COLUMN_MAP for the message: the column of messages, or the two with the longest texts, in their order."""
    lengths = {}
    for column in columns:
        values = [row.get(column) for row in rows]
        if any(isinstance(value, list) and value and isinstance(value[0], dict) for value in values):
            return f"messages={column}"
        texts = [value for value in values if isinstance(value, str)]
        lengths[column] = sum(map(len, texts)) if any(map(str.strip, texts)) else 0
    longest = sorted((column for column in columns if lengths[column]), key=lengths.get)[-2:]
    if len(longest) < 2:
        return ""
    question, answer = sorted(longest, key=columns.index)
    return f"instruction={question},output={answer}"
