"""The words of the reports that a newcomer may not know: explained at the end, and where the pointer rests on them."""

import re
from html import escape
from pathlib import Path
from typing import NamedTuple

import yaml

TEMPLATES = Path(__file__).with_name("templates")
# A tag, or what no mark may stand in: pictures, code, headings, links, controls, and what is marked already.
APART = re.compile(
    r"<(svg|script|style|code|pre|h\d|a|abbr|button|label|select|textarea|title)\b.*?</\1\s*>|<!--.*?-->|<[^>]*>",
    re.DOTALL | re.IGNORECASE,
)


class Term(NamedTuple):
    """A word of the reports. name: as the glossary has it; forms: how the text writes it; meaning: what it means."""

    name: str
    forms: list[str]
    meaning: str


def load(language: str) -> list[Term]:
    """The glossary of templates/glossary_<language>.yaml."""
    entries = yaml.safe_load((TEMPLATES / f"glossary_{language}.yaml").read_text(encoding="utf-8"))
    return [Term(e["name"], [e["name"], *e.get("forms", [])], e["meaning"]) for e in entries]


def mark(html: str, terms: list[Term], apart: tuple[str, ...] = ()) -> str:
    """HTML in which each term has its meaning as <abbr title>, at its first use in each section (from h2 to h2).

    apart: headings of sections that stay as they are, since what they show are not our words but a user's or a
    model's. Upper and lower case count as the same, except in single letters.
    """
    forms = {form.lower(): term for term in terms for form in term.forms}
    longest = sorted(forms, key=len, reverse=True)
    # letters and digits on either side make another word; Chinese characters do not
    words = re.compile(rf"(?<![A-Za-z0-9_-])(?:{'|'.join(map(re.escape, longest))})(?![A-Za-z0-9_-])", re.IGNORECASE)
    sections = re.split(r"(?=<h2\b)", html)
    return "".join(part if _heading(part) in apart else _mark_section(part, words, forms) for part in sections)


def _heading(section: str) -> str:
    found = re.match(r"<h2\b[^>]*>(.*?)</h2>", section, re.DOTALL)
    return found[1].strip() if found else ""


def _mark_section(section: str, words: re.Pattern, forms: dict[str, Term]) -> str:
    seen: set[str] = set()

    def put(match: re.Match) -> str:
        term = forms[match[0].lower()]
        if term.name in seen or (len(match[0]) == 1 and match[0] not in term.forms):
            return match[0]
        seen.add(term.name)
        return f'<abbr title="{escape(term.meaning)}">{match[0]}</abbr>'

    out, place = [], 0
    for tag in APART.finditer(section):
        out += [words.sub(put, section[place : tag.start()]), tag[0]]
        place = tag.end()
    return "".join([*out, words.sub(put, section[place:])])
