"""What the scripts say, in Chinese: sentences are looked up as they are said, in configs/sentences_zh.yaml.

The code says all it says in English, and so do the files that programs read. `say` and `fail` hand each finished
sentence to `translated`, which finds the pattern that it was made from ("{path} is missing; it is written by: {mend}")
and fills its Chinese with the same fields. A sentence that the table does not have stays English.

In the Chinese, {mend:zh} is a field that is a phrase of its own and translated, too; {names:list} is an enumeration of
such phrases ("a, b or c"). All other fields are data and stay as they are. Light: PyYAML is imported where Chinese is
spoken, and nowhere else.
"""

import functools
import re
import string
from pathlib import Path

from configs.text import load_yaml
from configs.words import spoken

TABLE = Path(__file__).with_name("sentences_zh.yaml")
PREFIXES = {"note: ": "注意：", "warning: ": "警告：", "error: ": "错误："}
JOINTS = {", or ": "，或 ", ", ": "、", " or ": " 或 ", " and ": " 和 ", "; or ": "；或", "; ": "；"}
LONGEST = 10_000  # characters of what is looked up; more is data
_language = ""  # of this process; "": the terminal's


def use(settings: dict) -> None:
    """From here on this process speaks the LANGUAGE (or REPORT_LANGUAGE) of these settings; "auto": the terminal's."""
    global _language
    asked = settings.get("LANGUAGE", settings.get("REPORT_LANGUAGE"))
    _language = spoken(asked if asked in ("en", "zh") else "auto")


def is_chinese() -> bool:
    """Whether this process speaks Chinese."""
    return (_language or spoken()) == "zh"


def translated(text: str) -> str:
    """A sentence that was said, in the language that is spoken; "note: " and the like in front of it, too.

    Of several lines that are not one sentence, each is looked up by itself.
    """
    if not is_chinese() or len(text) > LONGEST:
        return text
    prefix = next((prefix for prefix in PREFIXES if text.startswith(prefix)), "")
    inner = text.removeprefix(prefix)
    chinese = _found(inner, "sentences")
    if chinese is None and "\n" in inner.strip():
        chinese = "\n".join(_found(line, "sentences") or line for line in inner.split("\n"))
    return text if chinese in (None, inner) else PREFIXES.get(prefix, "") + chinese


def phrase(text: str) -> str:
    """A part of a sentence, or a label, in the language that is spoken."""
    return Phrase(text).chinese() if is_chinese() else text


@functools.cache
def table() -> dict[str, dict[str, str]]:
    """{"sentences", "phrases", "items": {English pattern: Chinese}}: said by itself, part of that, of enumerations."""
    return load_yaml(TABLE.read_text("utf-8"))[0]


class Phrase(str):
    """The text of a field: f"{field:zh}" is its Chinese, f"{field:list}" that of an enumeration."""

    def __format__(self, spec: str) -> str:
        return {"zh": self.chinese, "list": self.enumerated}.get(spec, self.__str__)()

    def chinese(self) -> str:
        """As a whole; else what it has of lines, or of clauses that a semicolon separates, each by itself."""
        if (whole := _found(self, "phrases")) is not None:
            return whole
        if "\n" in self:
            return "\n".join(_found(line, "phrases") or line for line in self.split("\n"))
        return self._joined("(; or |; )", ["phrases"])

    def enumerated(self) -> str:
        return table()["items"].get(self) or self._joined("(, or |, | or | and )", ["items", "phrases"])

    def _joined(self, between: str, sections: list[str]) -> str:
        parts = re.split(between, self)
        known = [next(filter(None, (_found(part, section) for section in sections)), None) for part in parts[::2]]
        if sections == ["phrases"] and not any(known):
            return str(self)  # one text, with a semicolon of its own
        parts[::2] = [chinese or part for chinese, part in zip(known, parts[::2], strict=True)]
        parts[1::2] = [JOINTS[joint] for joint in parts[1::2]]
        return re.sub("(?<=[）\u4e00-\u9fff]) (?=[和或])|(?<=[和或]) (?=[\u4e00-\u9fff])", "", "".join(parts))


@functools.cache
def _patterns(section: str) -> list[tuple[list[str], list[str], str]]:
    """(the fixed texts of a pattern, its fields between them, its Chinese).

    What begins with a fixed text comes first, and then what has the longest ones.
    """
    patterns = []
    for english, chinese in table()[section].items():
        parts = list(string.Formatter().parse(english))
        texts, fields = [text for text, _, _, _ in parts], [field for _, field, _, _ in parts if field is not None]
        patterns.append((texts if len(texts) > len(fields) else [*texts, ""], fields, chinese))
    return sorted(patterns, key=lambda pattern: (not pattern[0][0], -sum(map(len, pattern[0]))))


def _found(text: str, section: str) -> str | None:
    """The Chinese of a text, white space around it kept; None where the table has no pattern for it."""
    inner = text.strip()
    for texts, fields, chinese in _patterns(section) if inner else ():
        values = _between(texts, inner)
        if values is None:
            continue
        named = dict(zip(fields, values, strict=True))
        # lines, or clauses, that were joined must not pass for one with a long value
        data = [value for name, value in named.items() if f"{{{name}}}" in chinese]
        joined = "\n" in inner or any("; " in value for value in data)
        if section == "sentences" or not joined:
            found = chinese.format(**{name: Phrase(value) for name, value in named.items()})
            return found if inner == text else text.replace(inner, found, 1)
    return None


def _between(texts: list[str], text: str) -> list[str] | None:
    """What stands between the fixed texts, each at the first place where it occurs; None where they are not there.

    No regular expression: what a user has pasted may be long, and must cost no more than its length.
    """
    if len(texts) == 1:
        return [] if text == texts[0] else None
    first, *middle, last = texts
    place, end = len(first), len(text) - len(last)
    if not (text.startswith(first) and text.endswith(last) and place <= end):
        return None
    values = []
    for fixed in middle:
        at = text.find(fixed, place, end)
        if at < 0:
            return None
        values.append(text[place:at])
        place = at + len(fixed)
    return [*values, text[place:end]]
